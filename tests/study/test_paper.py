"""Several studies as one paper: what it has to say, and where it says it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.study.made_up import NASTY, results
from tests.study.test_page import Page
from trainer.commands.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two studies, study-digits and study-texts, and their paper, written by the command."""
    folder = tmp_path_factory.mktemp("paper")
    for name, options in (("digits", {"seeds": 12}), ("texts", {"seeds": 4, "budget": "updates", "max_epochs": 100})):
        (folder / name).mkdir()
        results(folder / name, **options).rename(folder / f"study-{name}")  # type: ignore[arg-type]
    studies = [str(folder / "study-digits"), str(folder / "study-texts")]
    assert main(["report", *studies, "--paper", str(folder / "paper.html")]) == 0
    return folder


def sections(folder: Path) -> dict[str, str]:
    return dict(part.split("\n", 1) for part in (folder / "paper.md").read_text().split("\n## ")[1:])


def test_a_paper_of_two_studies(folder: Path) -> None:
    page = Page()
    page.feed((folder / "paper.html").read_text())
    assert page.open == []
    assert "script" not in page.tags
    assert page.tags.count("img") == 2
    assert list(sections(folder)) == [
        *("Abstract", "Question", "Design, declared before the runs", "Results", "Strong scaling"),
        *("What speaks for the claim", "What speaks against the claim", "What is undecided"),
        *("Threats to validity", "In short", "Cost", "Appendix: rules and words, declared before the runs"),
        "Appendix: further numbers",
    ]
    assert "Only the abstract of that paper was at hand" in page.text
    assert NASTY in page.text  # as text
    pictures = {file.name for file in (folder / "paper-figures").iterdir()}
    assert pictures >= {"study-digits.svg", "study-texts.svg"}


def test_its_verdicts_stand_where_they_belong(folder: Path) -> None:
    """What the sections say is in test_paper_text.py."""
    said = sections(folder)
    digits, texts = "study-digits", "study-texts"
    assert any(digits in line and "W = 8" in line for line in said["What speaks for the claim"].splitlines())
    against = said["What speaks against the claim"].splitlines()
    assert any(digits in line and "W = 2 (ruled out)" in line for line in against)
    assert any(texts in line and "W = 2, 8" in line for line in said["What is undecided"].splitlines())
    assert "| ruled out 2 (of 2) | lose 1, ruled out 1 (of 2) |" in said["In short"]
    assert "the last batch of an epoch has fewer samples" in said["Threats to validity"]
    assert "At equal epochs, 4 comparisons:" in said["Abstract"]
    assert " runs, " in said["Cost"]
    # Rules that differ between studies are said of each.
    assert "at most 100 epochs" in said["Appendix: rules and words, declared before the runs"]


def test_what_cannot_be_a_paper_is_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = str(results(tmp_path, seeds=4))
    assert main(["report", study, "--paper", str(tmp_path / "paper.pdf")]) == 2
    assert "has to end in .html" in capsys.readouterr().err
    assert main(["report", study, study, "--paper", str(tmp_path / "paper.html")]) == 2
    assert f"The folder {study} is given twice" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    assert main(["report", study, str(results(tmp_path / "other", seeds=4)), "--paper", str(tmp_path / "p.html")]) == 2
    assert "Two of the folders are called out" in capsys.readouterr().err
    assert not (Path(study) / "report.html").exists()
