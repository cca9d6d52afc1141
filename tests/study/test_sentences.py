"""What a study says in sentences, made of folders as runs would have left them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.study.made_up import results, timed
from trainer.study.results import Results
from trainer.study.sentences import search_sentences, verdicts


def test_verdicts_of_a_folder(tmp_path: Path) -> None:
    lines = verdicts(results(tmp_path))
    text = "\n".join(lines)
    assert text.startswith("sequential: test/accuracy 0.95")
    assert "10 seeds; 0 of 10 not finite, 0 not converged, 0 missed the target (0.93" in lines[0]
    assert "strong scaling has the accuracy of the sequential runs: supported at W = 2, 4, by construction" in text
    assert "strong scaling at W = 8: impossible here" in text
    at = lines.index(
        "weak, learning rate unchanged, equal epochs: does the typical run lose against its sequential run?"
    )
    assert lines[at + 1].startswith("  W = 2: ruled out. ")
    assert lines[at + 2].startswith("  W = 8: material loss. 0.2")
    assert "10 of 10 collapsed" in lines[at + 2]
    at = lines.index(
        "weak, learning rate unchanged, equal epochs: do runs miss the target more often than sequential runs?"
    )
    assert lines[at + 1].startswith("  W = 2: not shown. 0 of 10 runs")
    assert lines[at + 2].startswith(
        "  W = 8: more often. 10 of 10 runs (95 % interval 0.69 to 1.00), 0 of 10 sequential"
    )


def noise(trace: float, squared: float) -> dict[str, Any]:
    return {"scale_samples": trace / squared, "trace": trace, "gradient_squared": squared}


def test_the_noise_scale_speaks_of_equal_epochs(tmp_path: Path) -> None:
    """Where it stands beside what the study saw: W = 8 times 32 samples lose, at equal epochs."""
    curves = {
        f"noise/{name}": {"epoch": [0.5, 1, 1.5, 2], "value": values}
        for name, values in (("trace", [100.0, 100.0, 300.0, 100.0]), ("gradient_squared", [1.0, 3.0, 1.0, 1.0]))
    }
    (tmp_path / "epochs").mkdir()
    said = verdicts(results(tmp_path / "epochs", noise=noise(146.0, 1.0), curves=curves))[-1]
    assert "146 samples over whole runs (95 % interval 146 to 146); 50 in epoch 1 (50 to 50), 200 in epoch 2" in said
    assert "146 about twice as many: W = 4.56 times the batch of 32" in said
    assert said.endswith(
        "Among 4 weak comparisons, a material loss is shown of: weak, learning rate unchanged at W = 8."
    )
    (tmp_path / "small").mkdir()
    said = verdicts(results(tmp_path / "small", noise=noise(10.0, 1.0)))[-1]
    assert "10 about twice as many: less than the batch of 32." in said
    (tmp_path / "updates").mkdir()
    said = verdicts(results(tmp_path / "updates", budget="updates", noise=noise(146.0, 1.0)))[-1]
    assert said.endswith("This study compares nothing at equal epochs.")


# Strong scaling


def test_strong_scaling_without_real_ranks_says_so(tmp_path: Path) -> None:
    said = "\n".join(verdicts(results(tmp_path, seeds=2)))
    assert "These are equal plans, not runs on W ranks; `python -m trainer verify` makes those." in said
    assert "on real ranks" not in said


def test_strong_scaling_on_real_ranks(tmp_path: Path) -> None:
    """Its speed-up is the median over repetitions, in the sentence and in the figure."""
    folder = results(tmp_path, seeds=2)
    for repeat, (one, two) in enumerate([(0.1, 0.1), (0.1, 0.05)]):
        timed(folder, 1, repeat, one)
        timed(folder, 2, repeat, two)
    timed(folder, 4, own_devices=False, parameters_sha256="b" * 64)
    said = "\n".join(verdicts(folder))
    assert "runs of 20 steps of seed 0 at W = 1, 2 ended with the same bits (sha256 aaaaaaaa)." in said
    assert "strong scaling on real ranks: NOT the same bits at W = 4." in said
    assert "W = 2 is 1.50 times as fast as one rank (efficiency 0.75; 1.00 to 2.00 in 2 runs)." in said
    assert "W = 4 is" not in said, "ranks that share devices say nothing of the speed"
    assert "These are equal plans" not in said


def test_whole_runs_on_real_ranks_must_have_the_studys_own_bits(tmp_path: Path) -> None:
    folder = results(tmp_path, seeds=2)
    for W in (1, 2):
        timed(folder, W, max_steps=None, parameters_sha256=f"{0:064x}")  # the first run's, see made_up
    assert "whole runs of seed 0 at W = 1, 2 ended with the same bits" in "\n".join(verdicts(folder))
    for W in (1, 2):
        timed(folder, W, max_steps=None)
    assert "NOT the same bits at W = 1, 2" in "\n".join(verdicts(folder))


# Sizes of the training set


@pytest.mark.parametrize(
    ("lost", "end"),
    [
        ((), "small loss at 300; ruled out at 600, 900, 1,200"),
        (("300 samples",), "material loss at 300; ruled out at 600, 900, 1,200"),
        (("300 samples", "900 samples"), "material loss at 300, 900; ruled out at 600, 1,200"),
    ],
)
def test_every_size_is_listed_with_its_verdict(tmp_path: Path, lost: tuple[str, ...], end: str) -> None:
    """Where 900 lost, "ruled out from 600 on" was said."""
    folder = results(
        tmp_path,
        lost=lambda cell: cell.arm == "weak" and cell.variant in lost,
        arms=["weak"],
        world_sizes=[2],
        dataset_sizes=[600, 300, 900],
        margin=0.02,
    )
    (said,) = (line for line in verdicts(folder) if "by training samples" in line)
    assert said.startswith(f"weak, learning rate unchanged, equal epochs, W = 2, by training samples: {end} (300: ")
    assert said.index("(300: ") < said.index(" 600: ") < said.index(" 1,200: ")


# Searches


def test_searches_that_end_at_the_edge_are_counted(tmp_path: Path) -> None:
    folder = results(tmp_path, seeds=5)
    assert search_sentences(Results(folder)) == []
    place = {"variant": "", "arm": "weak_tuned", "budget": "epochs", "world_size": 8}
    trials = [{"lr": lr, "warmup_epochs": 1.0, "momentum": 0.9, "value": 0.9} for lr in (0.1, 0.2, 0.4)]
    found = {
        f"{k}": {"best": trials[k % 3], "trials": trials, "ids": {}, "place": place, "seed": k, "centre": 0.2}
        for k in range(5)
    }
    (folder / "tuning").mkdir()
    (folder / "tuning" / "found.json").write_text(json.dumps(found))
    assert search_sentences(Results(folder)) == [
        "searches of weak_tuned, W = 8: 1 of 5 found the highest rate, 2 of 5 found the lowest rate that they tried, "
        "so something better may lie beyond."
    ]
