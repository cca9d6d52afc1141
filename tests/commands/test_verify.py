"""What `verify` says of runs that stop, have metrics that are not a number, or are labelled tolerance."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.jobs import small_config
from trainer.commands import verify as verifying
from trainer.commands.verify import first_difference, run_to_a_stop, verify
from trainer.errors import NonFiniteError, TrainerError, UserError

ZERO = "ZeRO stage 1 reduces gradients in an order that depends on the number of ranks"
MODELS = "rank 1 on node7 runs on NVIDIA A100, others on NVIDIA H100"
SECONDS = {"seconds": 1.25}
STOP = "Step 4 is not finite: the loss of micro-batch 7 is nan."


def finished(losses: str = "abcde", **summary: Any) -> tuple[str, dict[str, Any]]:
    """A run's trace, a letter a step for the digest of its loss, and its summary."""
    return losses, {
        "steps": len(losses),
        "metrics": {"test": {"loss": 0.5}},
        "parameters_sha256": "f" * 64,
    } | SECONDS | summary


def stopped(losses: str = "abc", why: str = STOP, **summary: Any) -> tuple[str, dict[str, Any]]:
    return losses, {"steps": 3, "metrics": {}, "stopped": why, "inexact": []} | SECONDS | summary


@pytest.fixture
def say_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """The exit code and text of verify for runs that are given: world size -> trace and summary."""

    def call(runs: dict[int, tuple[str, dict[str, Any]]]) -> tuple[int, str]:
        def run_ranks(job: Any, W: int, config: Any, folder: str, **options: Any) -> list[dict[str, Any]]:
            lines = [json.dumps({"loss": letter, "parameter w": letter}) for letter in runs[W][0]]
            (Path(folder) / "trace.jsonl").write_text("".join(line + "\n" for line in lines))
            summary = runs[W][1]
            return summary.pop("of_ranks", [summary])

        monkeypatch.setattr(verifying, "run_ranks", run_ranks)
        return verify(small_config(tmp_path / "run"), list(runs)), capsys.readouterr().out

    return call


def row(out: str, world_size: int) -> str:
    """A world size's row of the table."""
    return next(line for line in out.splitlines() if line.startswith(f"{world_size} ") and "rank" not in line[:8])


def test_a_run_that_stops_earlier_is_a_row(say_of: Any) -> None:
    code, out = say_of({1: finished(), 2: stopped()})
    assert code == 1
    assert "3, stopped at 4" in row(out, 2)
    assert row(out, 2).endswith("NO: 3 steps, but the reference made 5")
    assert f"2 ranks, stopped: {STOP}" in out
    assert "NOT the same bits" in out


def test_a_reference_that_stops_earlier(say_of: Any) -> None:
    code, out = say_of({1: stopped(), 2: finished(), 3: stopped("abx")})
    assert code == 1
    assert row(out, 1).endswith("reference")
    assert row(out, 2).endswith("NO: 5 steps, but the reference made 3")
    assert row(out, 3).endswith("NO: first at step 3, in loss")


def test_fewer_steps_without_a_stop(say_of: Any) -> None:
    code, out = say_of({1: finished(), 2: finished("abcd")})
    assert code == 1
    assert row(out, 2).endswith("NO: 4 steps, but the reference made 5")


def test_equal_stops_are_the_same_bits(say_of: Any) -> None:
    """Steps after the bad one, which a GPU makes before anyone looks at the loss, are not compared."""
    code, out = say_of({1: stopped("abcXY"), 2: stopped("abcZ"), 3: stopped()})
    assert code == 0
    assert row(out, 2).endswith("yes")
    assert row(out, 3).endswith("yes")
    assert "Every run stopped at step 4 for the same reason. Before it, the same bits" in out
    assert "in each of 3 steps" in out


def test_a_stop_for_another_reason_is_a_difference(say_of: Any) -> None:
    code, out = say_of({1: stopped(), 2: stopped(why=STOP.replace("7", "8"))})
    assert code == 1
    assert row(out, 2).endswith("NO: it stopped for another reason than the reference")


def test_a_stop_at_the_first_step(say_of: Any) -> None:
    code, out = say_of({1: stopped("", steps=0), 2: stopped("", steps=0)})
    assert code == 0
    assert "0, stopped at 1" in row(out, 2)
    assert "Every run stopped at step 1 for the same reason, so no update was made that could differ." in out


@pytest.mark.parametrize(("other", "same"), [(math.nan, True), (0.5, False), (0.0, False)])
def test_metrics_that_are_not_a_number(say_of: Any, other: float, same: bool) -> None:
    # As it comes out of another process: nan is then another object.
    metrics = {"test": {"loss": 0.5, "area": float("nan")}}
    code, out = say_of({1: finished(metrics=metrics), 2: finished(metrics={"test": {"loss": 0.5, "area": other}})})
    assert code == (0 if same else 1)
    assert row(out, 2).endswith("yes" if same else "NO: the final metrics differ, although every step is the same")


@pytest.mark.parametrize("reason", [ZERO, MODELS])
def test_a_label_is_explained(say_of: Any, reason: str) -> None:
    code, out = say_of({1: finished(inexact=[]), 2: finished("abXYZ", inexact=[reason, "and more"])})
    assert code == 1
    assert row(out, 1).endswith("reference")
    assert row(out, 2).endswith("NO: first at step 3, in loss (labelled tolerance)")
    assert f"2 ranks, labelled tolerance: {reason}; and more." in out
    assert "1 rank, labelled" not in out
    assert "need not have the same bits" in out


def test_a_label_where_the_bits_are_the_same(say_of: Any) -> None:
    code, out = say_of({1: finished(inexact=[ZERO]), 2: finished(inexact=[ZERO]), 3: finished()})
    assert code == 0
    assert row(out, 1).endswith("reference (labelled tolerance)")
    assert row(out, 2).endswith("yes (labelled tolerance)")
    assert row(out, 3).endswith("yes")


def test_runs_without_a_label_are_not_spoken_of(say_of: Any) -> None:
    _, out = say_of({1: finished(inexact=[]), 2: finished()})
    assert "tolerance" not in out
    assert "stopped" not in out


def test_a_single_world_size_compares_nothing_and_says_so(say_of: Any) -> None:
    code, out = say_of({2: finished()})
    assert code == 0
    assert "there was nothing to compare" in out
    assert "same bits at every world size" not in out


def test_another_error_names_the_world_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_ranks(job: Any, W: int, *arguments: Any, **options: Any) -> list[Any]:
        raise UserError("no such file")

    monkeypatch.setattr(verifying, "run_ranks", run_ranks)
    with pytest.raises(UserError, match="at 2 ranks: no such file"):
        verify(small_config(tmp_path / "run"), [2])


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifying, "usable_gpus", lambda wanted: 2)


@pytest.mark.usefixtures("two_gpus")
def test_more_ranks_than_gpus_share_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said before the first run, not found out by one that has been waited for."""
    asked: list[tuple[int, int, bool]] = []

    def run_ranks(job: Any, W: int, config: Any, folder: str, *, cuda: bool, **options: Any) -> list[Any]:
        asked.append((W, config.trainer.ranks_per_gpu, cuda))
        (Path(folder) / "trace.jsonl").write_text("")
        return [finished("")[1]]

    monkeypatch.setattr(verifying, "run_ranks", run_ranks)
    assert verify(small_config(tmp_path / "run"), [1, 2, 3, 8]) == 0
    assert asked == [(1, 1, True), (2, 1, True), (3, 2, True), (8, 4, True)]
    out = capsys.readouterr().out
    assert out.startswith(
        "note: this machine has 2 GPUs, which 3 and 8 ranks share, over gloo (trainer.ranks_per_gpu)."
    )
    assert out.count("note: ") == 1
    assert verify(small_config(tmp_path / "run"), [1, 2]) == 0
    assert "note: " not in capsys.readouterr().out


def test_an_error_loses_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_ranks(job: Any, W: int, config: Any, folder: str, **options: Any) -> list[Any]:
        if W == 3:
            raise TrainerError("does not fit into the memory")
        (Path(folder) / "trace.jsonl").write_text("")
        return [finished("")[1]]

    monkeypatch.setattr(verifying, "run_ranks", run_ranks)
    with pytest.raises(TrainerError, match="at 3 ranks: does not fit"):
        verify(small_config(tmp_path / "run"), [1, 2, 3, 4])
    out = capsys.readouterr().out
    assert row(out, 1).endswith("reference")
    assert row(out, 2).endswith("yes")


def test_seconds_are_those_of_the_run_without_the_start_of_its_processes(say_of: Any) -> None:
    _, out = say_of({1: finished(seconds=2.34), 2: stopped(seconds=0.5)})
    assert " 2.3 " in row(out, 1)
    assert " 0.5 " in row(out, 2)


def test_refused_packs_are_named_with_the_ranks_that_refused_them(say_of: Any) -> None:
    why = "the losses differ"
    exact, odd = finished()[1], finished(pack={"size": 1, "refused": {"4": why}})[1]
    _, out = say_of(
        {1: finished(of_ranks=[odd]), 2: finished(of_ranks=[odd, odd]), 3: finished(of_ranks=[exact, odd, odd])}
    )
    assert f"Packs of 4 were refused at 1, 2 and 3 ranks (at 3 ranks only on ranks 1 and 2): {why}." in out.splitlines()


@pytest.mark.parametrize("started", [True, False])
def test_what_a_stopped_run_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: bool) -> None:
    def run_traced(*arguments: Any) -> dict[str, Any]:
        error = NonFiniteError(f"{STOP}\nA lower learning rate often helps.")
        error.good_steps = 3
        raise error

    monkeypatch.setattr(verifying, "run_traced", run_traced)
    config = small_config(tmp_path / "run")
    if started:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "manifest.json").write_text(json.dumps({"inexact": [ZERO]}))
    found = run_to_a_stop(None, config, str(tmp_path))  # type: ignore[arg-type]
    assert found.pop("seconds") >= 0
    assert found == {"steps": 3, "stopped": STOP, "metrics": {}, "inexact": [ZERO] if started else []}


def test_steps_of_one_trace_alone_are_not_compared(tmp_path: Path) -> None:
    for name, letters in (("one", "abc"), ("other", "abcd"), ("third", "xbc")):
        (tmp_path / name).write_text("".join(json.dumps({"loss": letter}) + "\n" for letter in letters))
    one, other, third = (tmp_path / name for name in ("one", "other", "third"))
    assert first_difference(one, other) is None
    assert first_difference(one, third) == (1, "loss")
    assert first_difference(one, third, steps=0) is None
