"""What a study's folder says, in sentences and in rows."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.study.made_up import network, results, timed
from trainer.errors import UserError
from trainer.study.results import Results, metric_of, rows_of, speed_ups, verdicts


def test_verdicts_of_a_folder(tmp_path: Path) -> None:
    lines = verdicts(results(tmp_path))
    text = "\n".join(lines)
    assert text.startswith("sequential: test/accuracy 0.95")
    assert "strong scaling has the accuracy of the sequential runs: supported at W = 2, 4, by construction" in text
    assert "strong scaling at W = 8: impossible here" in text
    at = lines.index("weak, learning rate unchanged, equal epochs: loses against its sequential runs?")
    assert lines[at + 1].startswith("  W = 2: contradicted. ")
    assert lines[at + 2].startswith("  W = 8: supported. 0.2")
    at = lines.index("weak, learning rate unchanged, equal epochs: fails to converge more often than not?")
    assert lines[at + 1].startswith("  W = 2: contradicted. 0 of 10 runs")
    assert lines[at + 2].startswith("  W = 8: supported. 10 of 10 runs (95 % interval 0.69 to 1.00)")


def test_the_noise_scale_speaks_of_equal_epochs(tmp_path: Path) -> None:
    """Where it stands beside what the study saw: W = 8 times 32 samples lose, at equal epochs."""
    noise = {"scale_samples": 146.0}
    (tmp_path / "epochs").mkdir()
    said = verdicts(results(tmp_path / "epochs", noise=noise))[-1]
    assert "146 about twice as many: W = 4.56 times the batch of 32" in said
    assert said.endswith("The study shows a loss of weak from W = 8 (a batch of 256) on.")
    (tmp_path / "updates").mkdir()
    said = verdicts(results(tmp_path / "updates", budget="updates", noise=noise))[-1]
    assert said.endswith("at equal epochs, at which this study compares nothing.")


def test_a_folder_without_a_study_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a study's folder: it has no study\.json"):
        Results(tmp_path)


def test_a_run_that_stopped_being_finite_has_no_metric() -> None:
    assert metric_of({"metrics": {"test": {"accuracy": 1}}}, "test/accuracy") == 1.0
    assert metric_of({"metrics": {"test": {"loss": 1}}}, "test/accuracy") is None
    assert metric_of({"metrics": {}}, "test/accuracy") is None


def test_every_cell_is_one_row_with_the_same_keys(tmp_path: Path) -> None:
    read = Results(results(tmp_path, noise={"scale_samples": 146.0}))
    rows = rows_of(read)
    assert len(rows) == 10 * (1 + 2 * 2)
    assert len({tuple(row) for row in rows}) == 1
    assert [rows[0][key] for key in ("arm", "world_size", "version_torch", "noise_scale_samples")] == [
        "sequential", 1, "2", 146.0,
    ]  # fmt: skip
    (broken,) = (row for row in rows if row["status"] == "not finite")
    assert broken["test/accuracy"] is None
    assert math.isclose(rows[0]["test/accuracy"] + rows[0]["test/loss"], 1)


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
    measured, predicted = speed_ups(Results(folder))
    assert measured == pytest.approx({1: 1.0, 2: 1.5})
    assert predicted == {}, "nothing is known of the network"


def test_whole_runs_on_real_ranks_must_have_the_studys_own_bits(tmp_path: Path) -> None:
    folder = results(tmp_path, seeds=2)
    for W in (1, 2):
        timed(folder, W, max_steps=None, parameters_sha256=f"{0:064x}")  # the first run's, see made_up
    assert "whole runs of seed 0 at W = 1, 2 ended with the same bits" in "\n".join(verdicts(folder))
    for W in (1, 2):
        timed(folder, W, max_steps=None)
    assert "NOT the same bits at W = 1, 2" in "\n".join(verdicts(folder))


def test_speed_ups_are_predicted_where_the_plan_allows_them(tmp_path: Path) -> None:
    """4 micro-batches can be dealt to 4 ranks, and not to 8."""
    folder = results(tmp_path, seeds=2)
    assert speed_ups(Results(folder)) == ({}, {})
    timed(folder, 1)
    network(folder)
    measured, predicted = speed_ups(Results(folder))
    assert measured == {1: 1.0}
    assert list(predicted) == [1, 2, 4]
    assert predicted[1] == pytest.approx(1.0)
    assert 1.0 < predicted[2] < predicted[4] < 4.0


# Sizes of the training set


@pytest.mark.parametrize(
    ("lost", "end"),
    [
        ((), "a loss is shown at no size"),
        (("300 samples",), "a loss is shown up to 300 samples and ruled out from 600 on"),
        (("300 samples", "600 samples", ""), "a loss is shown up to 1,200 samples, and ruled out at no larger size"),
    ],
)
def test_from_how_many_samples_on_weak_scaling_is_harmless(tmp_path: Path, lost: tuple[str, ...], end: str) -> None:
    folder = results(
        tmp_path,
        lost=lambda cell: cell.arm == "weak" and cell.variant in lost,
        arms=["weak"],
        world_sizes=[2],
        dataset_sizes=[600, 300],
    )
    (said,) = (line for line in verdicts(folder) if "by training samples" in line)
    assert said.startswith(f"weak, learning rate unchanged, equal epochs, W = 2, by training samples: {end} (300: ")
    assert said.index("300: ") < said.index("600: ") < said.index("1,200: ")


# Runs that are missing


def test_a_search_that_has_ended_gives_its_cells_their_runs(tmp_path: Path) -> None:
    """study.json does not know these ids: the rate was found later."""
    folder = results(tmp_path, seeds=2, arms=["weak_tuned"], world_sizes=[2])
    tuned = [cell for cell in json.loads((folder / "study.json").read_text())["cells"] if cell["id"] is None]
    assert {cell["arm"] for cell in tuned} == {"sequential_tuned", "weak_tuned"}
    assert Results(folder).missing() == 4
    assert Results(folder).searches == {}
    found: dict[str, dict[str, str]] = {"one": {}}
    for i, cell in enumerate(tuned):
        arm = f"{cell['arm']}, W = 2" if cell["world_size"] > 1 else cell["arm"]
        found["one"][f"{arm} seed {cell['seed']}"] = f"run{i}"
        run = json.loads(next((folder / "runs").iterdir()).read_text()) | {"id": f"run{i}"}
        (folder / "runs" / f"run{i}.json").write_text(json.dumps(run))
    (folder / "tuning").mkdir()
    (folder / "tuning" / "found.json").write_text(json.dumps({"one": {"ids": found["one"]}}))
    read = Results(folder)
    assert read.missing() == 0
    assert {cell["id"] for cell in read.cells} >= {"run0", "run1", "run2", "run3"}


def test_files_of_others_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Copies, notes and damaged files in a study's folder are named, and change no number."""
    out = results(tmp_path)
    timed(out, 1)
    before, times = rows_of(Results(out)), Results(out).timings
    assert "passed over" not in capsys.readouterr().out
    one = next((out / "runs").glob("*.json"))
    foreign = [out / "runs" / name for name in (f"{one.stem} (copy).json", "notes.json", "list.json", "half.json")]
    for file, text in zip(foreign, (one.read_text(), '{"id": "notes"}', "[]", '{"id": ')):
        file.write_text(text)
    copy = out / "timing" / "W1-0 (copy).json"
    copy.write_text((out / "timing" / "W1-0.json").read_text())
    again = Results(out)
    assert (rows_of(again), again.timings) == (before, times)
    said = capsys.readouterr().out
    assert all(f"note: {file} is not the result of a" in said for file in [*foreign, copy])
