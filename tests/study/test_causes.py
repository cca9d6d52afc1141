"""Why a weak run loses, read from three verdicts, and from nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.study.made_up import results
from tests.study.test_page import page_of
from trainer.study.arms import CONTROLS, EQUAL_UPDATES, Place
from trainer.study.causes import cause_headline, cause_of, cause_rows, cause_sentences, contrasts
from trainer.study.declaration import Cell
from trainer.study.judgement import Verdict
from trainer.study.paper import write_paper
from trainer.study.results import Results
from trainer.study.sentences import headline, noise_sentences

LOSS: Verdict = "material loss"


@pytest.mark.parametrize(
    ("total", "updates", "batch", "cause"),
    [
        (LOSS, LOSS, "ruled out", "fewer updates"),
        (LOSS, LOSS, "small loss", "fewer updates"),
        (LOSS, LOSS, LOSS, "both, fewer updates and the batch itself"),
        (LOSS, LOSS, "undecided", "fewer updates (whether the batch adds to it is undecided)"),
        (LOSS, "ruled out", LOSS, "the batch itself"),
        (LOSS, "undecided", LOSS, "the batch itself (whether fewer updates add to it is undecided)"),
        (LOSS, "small loss", "small loss", "both together, as neither alone loses the margin"),
        (LOSS, "undecided", "ruled out", "undecided"),
        (LOSS, "ruled out", "undecided", "undecided"),
        ("ruled out", LOSS, "ruled out", "no material loss"),
        ("small loss", "undecided", "undecided", "no material loss"),
        ("undecided", LOSS, "ruled out", "undecided whether it loses"),
    ],
)
def test_a_cause_follows_from_three_verdicts(total: Verdict, updates: Verdict, batch: Verdict, cause: str) -> None:
    assert cause_of(total, updates, batch) == cause


ARMS = ["sequential", "weak", "weak_sqrt", "weak_lars", EQUAL_UPDATES]


def both_lose(cell: Cell) -> bool:
    return cell.world_size == 8 and (cell.arm == "weak" or cell.arm in CONTROLS)


def test_few_updates_lose_as_much_as_the_weak_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At W = 8; the square-root rule makes as few and loses nothing. LARS has no control."""
    read = Results(results(tmp_path, seeds=14, arms=ARMS, lost=both_lose, margin=0.02))
    # Four arms at two W, and two arms against the control: the level of each is alpha / 10.
    assert read.judgement.tests == 4 * 2 + 2 * 2
    assert {str(place) for place in contrasts(read)} == {f"{a}, W = {W}" for a in ("weak", "weak_sqrt") for W in (2, 8)}
    assert cause_sentences(read) == [
        "weak, learning rate unchanged, equal epochs, why it loses: no material loss at W = 2; fewer updates at W = 8.",
        "weak, square-root rule, equal epochs, why it loses: no material loss at W = 2, 8.",
    ]
    weak = next(row for row in cause_rows(read) if row[1:3] == ["weak", 8])
    assert weak[3] == "fewer updates"
    assert (weak[5], weak[7], weak[11]) == (LOSS, LOSS, "ruled out")
    assert cause_headline(read) == [
        "What causes the 1 material loss that can be compared with as few updates: fewer updates in 1."
    ]
    monkeypatch.setattr("trainer.study.page.figures_of", lambda *_: [])  # they take most of the time
    text = page_of(tmp_path / "out").text
    assert "why does weak scaling lose?" in text and "by the batch itself" in text


def test_a_batch_that_loses_although_as_few_updates_do_not(tmp_path: Path) -> None:
    read = Results(results(tmp_path, seeds=14, arms=ARMS, margin=0.02))
    assert "the batch itself at W = 8" in cause_sentences(read)[0]


def test_a_contrast_is_judged_at_the_level_of_the_whole_study(tmp_path: Path) -> None:
    """Seven seeds decide one of six comparisons, and no more: 2^-7 is above 0.05 / 7."""
    read = Results(results(tmp_path, seeds=7, arms=["weak", EQUAL_UPDATES], lost=both_lose, world_sizes=[2, 8]))
    assert read.judgement.tests == 6
    assert all(c.verdicts["loses"] != "undecided" for c in contrasts(read).values() if c.place.world_size == 2)
    arms = ["weak", "weak_sqrt", EQUAL_UPDATES]
    (tmp_path / "more").mkdir()
    read = Results(results(tmp_path / "more", seeds=7, arms=arms, lost=both_lose, world_sizes=[2]))
    assert read.judgement.tests == 5
    (tmp_path / "most").mkdir()
    read = Results(results(tmp_path / "most", seeds=7, arms=arms, lost=both_lose, world_sizes=[2, 8]))
    assert read.judgement.tests == 10
    assert {c.verdicts["loses"] for c in contrasts(read).values()} == {"undecided"}
    assert "7 seeds cannot decide one of 10 comparisons" in next(iter(contrasts(read).values())).sentences["loses"]


def test_nothing_is_said_before_every_run_is_there(tmp_path: Path) -> None:
    folder = results(tmp_path, seeds=14, arms=ARMS, lost=both_lose, margin=0.02)
    gone = next(c for c in Results(folder).cells if c["arm"] == EQUAL_UPDATES and c["world_size"] == 8)
    (folder / "runs" / f"{gone['id']}.json").unlink()
    read = Results(folder)
    assert contrasts(read)[Place("", "weak", "epochs", 8)].missing == 1
    assert "undecided at W = 8" in cause_sentences(read)[0]


def test_a_control_is_no_weak_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where "weak scaling" is said, controls are left out."""
    noise = {"trace": 100.0, "gradient_squared": 1.0, "scale_samples": 100.0}
    folder = results(tmp_path, seeds=14, arms=ARMS, lost=lambda c: c.arm in CONTROLS, margin=0.02, noise=noise)
    read = Results(folder)
    assert "Weak scaling, 4 comparisons" in " ".join(headline(read))
    assert "material loss of" not in " ".join(noise_sentences(read))
    assert cause_headline(read) == []
    monkeypatch.setattr("trainer.study.figures.save", lambda *_: "<svg/>")
    paper = write_paper([str(folder)], str(tmp_path / "paper.html")).with_suffix(".md").read_text()
    assert "for the claim\n\n- out (" in paper and "): nothing." in paper.split("for the claim")[1].split("##")[0]
