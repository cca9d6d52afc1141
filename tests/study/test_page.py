"""The page and the tables of a study, made of its results alone."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.study.made_up import NASTY, network, results, timed
from trainer.commands.cli import main
from trainer.errors import UserError
from trainer.study.page import report, write_report
from trainer.study.sentences import verdicts


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page(tmp_path: Path) -> None:
    source = write_report(results(tmp_path)).read_text()
    page = Page()
    page.feed(source)
    assert page.open == []
    assert (
        page.text.index("Verdicts")
        < page.text.index("Share of runs that miss the target")
        < page.text.index("Every run")
    )
    for needed in ("Declared before the runs", "Clopper-Pearson", "Holm", "What could not be run", "seed 9"):
        assert needed in page.text
    # everything of a user's is text
    assert page.text.count(NASTY) >= 4
    assert "script" not in page.tags
    # and nothing is asked of anybody: pictures are part of the page
    assert not {"script", "link", "iframe", "object", "use", "image"} & set(page.tags)
    assert not {"href", "xlink:href", "srcset", "action"} & {name for name, _ in page.attributes}
    pictures = [value or "" for name, value in page.attributes if name == "src"]
    assert len(pictures) == page.tags.count("img") == 3
    assert all(picture.startswith("data:image/svg+xml;base64,") for picture in pictures)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "http" not in source.replace("http-equiv", "")
    assert "url(" not in source
    assert "@import" not in source


def test_the_tables(tmp_path: Path) -> None:
    import pyarrow.parquet

    folder = results(tmp_path)
    write_report(folder)
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 50
    first = rows[0]
    assert (first["arm"], first["world_size"], first["seed"], first["device_model"]) == ("sequential", "1", "0", NASTY)
    assert float(first["test/accuracy"]) == pytest.approx(0.95)
    broken = [row for row in rows if row["status"] == "not finite"]
    assert [(row["arm"], row["world_size"], row["test/accuracy"]) for row in broken] == [("weak", "8", "")]
    parquet = pyarrow.parquet.read_table(folder / "results.parquet").to_pylist()
    assert [row["config_sha256"] for row in parquet] == [row["config_sha256"] for row in rows]
    assert sum(row["test/accuracy"] is None for row in parquet) == 1


def test_an_unfinished_study_says_so(tmp_path: Path) -> None:
    folder = results(tmp_path)
    runs = sorted((folder / "runs").iterdir())
    for file in runs[:3]:
        file.unlink()
    assert "3 declared runs are missing: nothing is decided before they are there." in verdicts(folder)
    assert "3 declared runs are missing" in write_report(folder).read_text()


def test_runs_of_other_code_are_pointed_out(tmp_path: Path) -> None:
    folder = results(tmp_path)
    file = next((folder / "runs").iterdir())
    file.write_text(file.read_text().replace("c" * 64, "d" * 64))
    assert "The runs come from 2 versions of the code" in write_report(folder).read_text()


def test_report_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = results(tmp_path)
    assert report([str(folder)]) == 0
    assert f"report: {folder / 'report.html'}" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "nothing is not a study's folder: it has no study.json." in capsys.readouterr().err
    for file in (folder / "runs").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="no finished run yet"):
        write_report(folder)


def page_of(folder: Path) -> Page:
    """The report of a folder, parsed."""
    page = Page()
    page.feed(write_report(folder).read_text())
    return page


def test_a_search_whose_best_rate_is_at_the_edge_is_pointed_out(tmp_path: Path) -> None:
    """A better one may lie beyond it."""
    folder = results(tmp_path, seeds=2)
    assert "Searches" not in page_of(folder).text
    trials = [
        {"lr": lr, "warmup_epochs": 5.0, "momentum": 0.9, "value": value}
        for lr, value in ((0.1, 0.9), (0.4, None), (0.02, 0.8))
    ]
    place = {"variant": "", "arm": "weak_tuned", "budget": "epochs", "world_size": 2}
    found = {
        name: {"best": best, "trials": trials, "ids": {}, "place": place}
        for name, best in (("low", trials[2]), ("middle", trials[0]), ("high", trials[1]))
    }
    (folder / "tuning").mkdir()
    (folder / "tuning" / "found.json").write_text(json.dumps(found))
    text = page_of(folder).text
    tried = "0.1, warm-up 5 epochs, momentum 0.9: 0.9000; 0.02, warm-up 5 epochs, momentum 0.9: 0.8000"
    assert f"low0.02, warm-up 5 epochs, momentum 0.9lowest rate{tried}" in text
    assert "middle0.1, warm-up 5 epochs, momentum 0.9none" in text
    assert "high0.4, warm-up 5 epochs, momentum 0.9highest rate" in text
    assert (
        "searches of weak_tuned, W = 2: 1 of 3 found the highest rate, 1 of 3 found the lowest rate that they tried"
        in text
    )


def test_times_of_a_search_say_what_was_measured_and_what_predicted(tmp_path: Path) -> None:
    folder = results(tmp_path, seeds=2)
    assert "Where the devices serve a search best" not in page_of(folder).text
    for W, step_time_s in ((1, 0.1), (2, 0.05)):
        timed(folder, W, 0, step_time_s)
    network(folder)
    text = page_of(folder).text
    assert "for runs of 20 steps that take 30 s on one device" in text
    # W, trials, one at a time on W, W at once: two ranks are exactly twice as fast.
    assert "2115.000030.000015.00001 at a time, 2 ranks eachmeasured" in text
    assert "4115" not in text and "predicted" in text


def test_both_tables_of_a_block(tmp_path: Path) -> None:
    """The typical run with its verdict and collapses; and the runs that fail, with the sequential ones in brackets."""
    text = page_of(results(tmp_path)).text
    assert "material loss 10 collapsed" in text
    assert "miss it 10 of 10 (0) not converged 1 of 10 (0)" in text
    source = (tmp_path / "out" / "report.html").read_text()
    assert "<b>miss it 10 of 10 (0)</b> <span>not converged 1 of 10 (0)</span>" in source
    assert '<span class="verdict material-loss">material loss</span>' in source


def test_numbers_are_shown_as_people_read_them(tmp_path: Path) -> None:
    """In the table of all runs: hashes short, what is missing a dash."""
    text = page_of(results(tmp_path, seeds=3)).text
    assert f"{'c' * 12}" in text
    assert "c" * 13 not in text
    assert "nan" not in text
    assert "None" not in text


def test_the_answer_stands_first_in_two_sentences(tmp_path: Path) -> None:
    text = page_of(results(tmp_path)).text
    assert text.index("Strong scaling gives the sequential run's very model at W = 2, 4, so it loses nothing. Weak") < (
        text.index("Verdicts")
    )
    assert "loses more than 0.01 of test/accuracy in 1 (weak, W = 8)" in text


def test_undecided_never_reads_as_no_loss(tmp_path: Path) -> None:
    """Too few seeds are told once, not once for each comparison, and in each cell beside its number."""
    folder = results(tmp_path, seeds=3)
    page = page_of(folder)
    assert "4 are undecided, so a loss there is neither shown nor ruled out" in page.text
    assert page.text.count("seeds cannot decide one of 4 comparisons") == 1
    assert "undecided too few runs" in page.text
    told = verdicts(folder)
    assert sum("cannot decide one of" in line for line in told) == 1
    assert any(line.startswith("4 of 4 comparisons are undecided, which does not mean that nothing") for line in told)
