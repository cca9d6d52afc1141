"""What a paper of several studies says: its counts, and on which side of the claim each result stands."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.study.made_up import results, timed
from trainer.study.paper_text import (
    Block,
    abstract,
    by_data,
    cost,
    design_table,
    in_short,
    threats,
    trained,
    weighed,
)
from trainer.study.results import Results


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """study-digits, at equal epochs, and study-texts, at equal updates with too few seeds. They share some runs."""
    folder = tmp_path_factory.mktemp("paper")
    for name, options in (("digits", {"seeds": 12}), ("texts", {"seeds": 4, "budget": "updates", "max_epochs": 100})):
        (folder / name).mkdir()
        results(folder / name, **options).rename(folder / f"study-{name}")  # type: ignore[arg-type]
    return [Results(folder / "study-digits"), Results(folder / "study-texts")]


def sections(blocks: Sequence[Block]) -> dict[str, list[str]]:
    """Title -> the lines below it, one a study."""
    said = dict[str, list[str]]()
    for block in blocks:
        if block.kind == "h2":
            said[block.texts[0]] = []
        else:
            said[list(said)[-1]] += block.texts
    return said


def test_each_result_is_weighed_on_its_side_of_the_claim(studies: list[Results]) -> None:
    said = sections(list(weighed(studies)))
    (digits, texts) = said["What speaks for the claim"]
    assert digits.startswith("study-digits (") and "weak, learning rate unchanged at W = 8" in digits
    assert texts.endswith(": nothing.")  # too few seeds
    digits, texts = said["What speaks against the claim"]
    assert "W = 2 (ruled out)" in digits and "8" not in digits.split("learning rate unchanged at ")[1].split(";")[0]
    assert texts.endswith(": nothing.")
    digits, texts = said["What is undecided"]
    assert digits.endswith(": nothing.")
    assert "W = 2, 8" in texts


def test_strong_scaling_speaks_for_the_claim_only_where_it_is_faster(tmp_path: Path) -> None:
    folder = results(tmp_path, seeds=3)
    timed(folder, 1, step_time_s=0.1)
    timed(folder, 2, step_time_s=0.05)
    said = sections(list(weighed([Results(folder)])))
    faster = "strong scaling is 2.00 times as fast as one rank at W = 2"
    assert faster in said["What speaks for the claim"][0]
    assert "strong scaling" not in said["What speaks against the claim"][0]
    timed(folder, 2, step_time_s=0.2)
    said = sections(list(weighed([Results(folder)])))
    assert "strong scaling" not in said["What speaks for the claim"][0]
    assert "strong scaling is 0.50 times as fast as one rank at W = 2" in said["What speaks against the claim"][0]
    assert "At two real ranks it was 0.50 (out (" in abstract([Results(folder)])


def test_runs_that_converge_less_often_speak_for_the_claim_though_none_loses(tmp_path: Path) -> None:
    """The claim is about convergence, too."""

    def curves(cell: object) -> dict[str, object]:
        end = 1.9 if getattr(cell, "arm", "") == "weak" else 0.1
        return {"train/loss": {"epoch": [1.0, 20.0], "step": [38, 760], "value": [2.0, end]}}

    study = Results(results(tmp_path, seeds=12, curves=curves, lost=lambda cell: False))
    said = sections(list(weighed([study])))["What speaks for the claim"][0]
    assert "weak, learning rate unchanged converges less often at W = 2, 8" in said
    assert "in 2 of them" in abstract([study])


def test_the_last_batch_that_is_smaller_is_a_threat(studies: list[Results]) -> None:
    """1,200 samples are 37 batches of 32 and 16 samples."""
    short = "the last batch of an epoch has fewer samples: 48 of 64 at W = 2, 176 of 256 at W = 8."
    assert any(short in line for line in threats(studies))


def test_batches_that_are_all_whole_are_no_threat(tmp_path: Path) -> None:
    study = Results(results(tmp_path, seeds=2))
    for run in study.runs.values():
        run["samples"] = 1024 + 64  # whole batches at W = 2, and not at W = 8
    assert any(
        line.endswith("fewer samples: 64 of 256 at W = 8. It is an update like any other.") for line in threats([study])
    )
    for run in study.runs.values():
        run["samples"] = 1024
    assert not any("the last batch" in line for line in threats([study]))


def test_equal_epochs_and_equal_updates_are_counted_apart(studies: list[Results]) -> None:
    said = abstract(studies)
    assert "At equal epochs, 4 comparisons: the typical run loses more than the margin in 1, such a loss" in said
    assert "At equal updates, 4 comparisons: nothing is shown either way in 4." in said
    (row_of_epochs,) = {tuple(row[1:]) for row in by_data(studies).rows if row[-1] != "0"}
    assert row_of_epochs == ("1", "0", "3", "0", "0", "0", "4")
    assert [row[2:] for row in in_short(studies).rows] == [
        ["equal epochs", "ruled out 2 (of 2)", "lose 1, ruled out 1 (of 2)"],
        ["equal updates", "nothing shown (of 2)", "nothing shown (of 2)"],
    ]


def test_the_runs_of_each_study_are_counted_and_shared_ones_told(studies: list[Results]) -> None:
    """Both studies have made the sequential runs of their common seeds."""
    ids = [set(study.runs) for study in studies]
    assert ids[0] & ids[1]
    assert cost(studies).startswith(f"{sum(map(len, ids))} runs, ")
    models = [{run["parameters_sha256"] for run in study.runs.values()} - {None} for study in studies]
    assert f"{len(models[0] & models[1])} runs are the same in several studies" in abstract(studies)


def test_the_design_has_the_numbers_of_the_sequential_run(studies: list[Results]) -> None:
    table = design_table(studies)
    digits = dict(zip(table.texts, table.rows[0], strict=True))
    expected = {
        "training samples": "1,200", "batch of one rank": "32", "epochs": "20", "updates": "760", "W": "2, 8",
        "seeds": "12", "margin": "0.01 of test/accuracy", "comparisons": "4", "runs": f"{len(studies[0].runs)}",
    }  # fmt: skip
    assert digits.items() >= expected.items()
    assert re.search(r"model mlp.*; AdamW, lr 0\.\d+, .*; a run keeps the last model\.$", trained(studies[0]))


def test_a_path_of_the_users_data_is_not_told(tmp_path: Path) -> None:
    """A paper is read by others: of the data it names the file, and not where it lies."""
    study = Results(results(tmp_path, seeds=2))
    study.declared["base"]["trainer"]["task_options"]["data"] = "/home/somebody/reviews.csv"
    assert "data reviews.csv" in trained(study)
    assert by_data([study]).rows[0][0].endswith(" reviews.csv")
    assert "somebody" not in trained(study) + by_data([study]).rows[0][0]
