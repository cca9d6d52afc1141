"""A run from top to bottom, with a plain optimizer in place of DeepSpeed's engine: how it ends, and what it leaves."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.run.small import Task, make, records
from trainer.errors import NonFiniteError, Stopped, TrainerError, UserError
from trainer.ranks.stopping import EndedBySignal
from trainer.record import checkpoints
from trainer.record.checkpoints import list_checkpoints

pytestmark = pytest.mark.usefixtures("plain_engine")


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Any:
    """After a run, however it ends, signals, threads and DeepSpeed's log are as they were."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
    assert "watch" not in {thread.name for thread in threading.enumerate()}
    assert logging.getLogger("DeepSpeed").filters == []


def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = make(monkeypatch, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert summary["steps"] == 12
    names = {file.name for file in (tmp_path / "run").iterdir()}
    assert names == {"manifest.json", "metrics.jsonl", "logs", "model", "summary.json", "checkpoints"}


def test_a_run_that_was_stopped_goes_on_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(step: int, engine: Any, losses: Any) -> None:
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)  # until the watching thread has seen it

    whole = make(monkeypatch, tmp_path / "whole")
    with pytest.raises(Stopped, match="SIGTERM") as stopped:
        make(monkeypatch, tmp_path / "run", trace=interrupt)
    assert stopped.value.exit_code == 75
    assert not (tmp_path / "run" / "summary.json").exists()
    summary = make(monkeypatch, tmp_path / "run", resume="auto")
    for name in ("parameters_sha256", "model_sha256", "metrics", "best", "steps"):
        assert summary[name] == whole[name], name
    curves = [
        [(r["step"], r["train/loss"]) for r in records(tmp_path / name) if "train/loss" in r]
        for name in ("whole", "run")
    ]
    assert curves[0] == curves[1]

    # It has finished: nothing is done again.
    capsys.readouterr()
    again = make(monkeypatch, tmp_path / "run", trace=lambda *step: pytest.fail("a step"), resume="auto")
    assert again == summary
    assert f"The run in {tmp_path / 'run'} has finished already" in capsys.readouterr().out


def test_a_finished_run_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(monkeypatch, tmp_path / "run", max_steps=1)
    before = (tmp_path / "run" / "summary.json").read_bytes()
    with pytest.raises(UserError, match="already holds a run"):
        make(monkeypatch, tmp_path / "run", max_steps=2)
    assert (tmp_path / "run" / "summary.json").read_bytes() == before


def without_times(folder: Path) -> list[dict[str, float]]:
    return [
        {k: v for k, v in r.items() if not k.startswith(("throughput/", "memory/", "noise/", "time_s"))}
        for r in records(folder)
    ]


@pytest.mark.parametrize("steps", [7, 8], ids=["inside an epoch and a window", "at the end of both"])
def test_a_finished_run_goes_on_as_if_it_had_never_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Its last evaluations, its last short window and its summary belong to the end that it no longer has."""
    whole = make(monkeypatch, tmp_path / "whole", log_every_steps=4)
    make(monkeypatch, tmp_path / "run", log_every_steps=4, max_steps=steps)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == steps
    made: list[int] = []

    def watch(step: int, engine: Any, losses: Any) -> None:
        assert not (tmp_path / "run" / "summary.json").exists()
        made.append(step)

    longer = make(monkeypatch, tmp_path / "run", trace=watch, resume="auto", log_every_steps=4)
    assert made == list(range(steps + 1, 13))
    for name in ("parameters_sha256", "model_sha256", "metrics", "best", "steps", "exactness"):
        assert longer[name] == whole[name], name
    assert without_times(tmp_path / "run") == without_times(tmp_path / "whole")
    times_s = [record["time_s"] for record in records(tmp_path / "run")]
    assert times_s == sorted(times_s), "the clock of the training goes on"


def test_another_run_that_ended_here_meanwhile_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two starts within seconds: the second waits for the folder, and must look at it again when it has it."""
    from trainer.record import folder as folders

    lock = folders._make_and_lock

    def late(path: Path, created: list[Path]) -> int | None:
        if not waited:
            waited.append(True)
            make(monkeypatch, tmp_path / "run", seed=1)  # the first run, from its start to its end
        return lock(path, created)

    for resume, said in (("none", "already holds a run"), ("auto", "trainer.seed: 1 before, 0 now")):
        waited: list[bool] = []
        monkeypatch.setattr(folders, "_make_and_lock", late)
        with pytest.raises(UserError, match=said):
            make(monkeypatch, tmp_path / "run", resume=resume)
        assert json.loads((tmp_path / "run" / "manifest.json").read_text())["seed"] == 1
        shutil.rmtree(tmp_path / "run")


class Leaves(Task):
    """Ends the process in one of its methods, as sys.exit() in a user's code does."""

    def __init__(self, method: str, code: Any) -> None:
        super().__init__()
        self.method, self.code = method, code

    def splits(self) -> dict[str, dict[str, Tensor]]:
        if self.method == "splits":
            argparse.ArgumentParser().exit(self.code)
        return super().splits()

    def metrics(self, outputs: Tensor, batch: dict[str, Tensor]) -> dict[str, float]:
        if self.method == "metrics":
            sys.exit(self.code)
        return super().metrics(outputs, batch)


@pytest.mark.parametrize(
    ("method", "code"), [("metrics", 0), ("metrics", None), ("metrics", "no data"), ("metrics", 7), ("splits", 0)]
)
def test_a_task_that_ends_the_process_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, code: Any
) -> None:
    """An exit code of success, in silence, would look like a finished run."""
    with pytest.raises(TrainerError, match=r"The task ended the process in the middle of the run") as caught:
        make(monkeypatch, tmp_path / "run", Leaves(method, code))
    assert caught.value.exit_code == 1
    assert f"{__file__}, line " in str(caught.value) and f"in {method}()" in str(caught.value)
    assert ("(no data)" in str(caught.value)) == (code == "no data")
    assert not (tmp_path / "run" / "summary.json").exists()


class Waits(Task):
    """A scheduler ends the run while it reads its data. `caught`: by an `except:` that knows nothing of it."""

    def __init__(self, caught: bool) -> None:
        super().__init__()
        self._caught = caught

    def splits(self) -> Any:
        with contextlib.suppress(BaseException) if self._caught else contextlib.nullcontext():
            os.kill(os.getpid(), signal.SIGTERM)
        return super().splits()


@pytest.mark.parametrize("caught", [False, True])
def test_a_signal_before_the_first_step_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caught: bool
) -> None:
    with pytest.raises(EndedBySignal, match="SIGTERM"):
        make(monkeypatch, tmp_path / "new" / "run", Waits(caught))
    assert not (tmp_path / "new").exists()


def tamper(checkpoint: Path, part: str, value: Any) -> None:
    """Changes a checkpoint's facts as a program would that writes one by itself, with checksums that are right."""
    path = checkpoint / "manifest.json"
    content = json.loads(json.loads(path.read_bytes())["content"])
    if part == "dtype":
        file = checkpoint / f"{value[0]}.safetensors"
        save_file({n: t.to(value[1]) for n, t in load_file(file).items()}, file)
        data = file.read_bytes()
        content["files"][file.name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    else:
        content[part] = value
    path.write_bytes(checkpoints._sealed(content))


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("history", [], "was not written by a run: it has no history"),
        ("window", {}, "is undamaged, but no run writes such a content"),
        ("window", {"filled": "many"}, "is undamaged, but no run writes such a content"),
        ("best", [], "is undamaged, but no run writes such a content"),
        ("dtype", ("model", torch.float64), r"of another model: .* is torch\.float64 in it, torch\.float32 here"),
        ("dtype", ("optimizer", torch.float64), r"of another optimizer: 0\.bias\.momentum_buffer is torch\.float64"),
        ("dtype", ("optimizer", torch.int32), r"of another optimizer: 0\.bias\.momentum_buffer is torch\.int32"),
        ("dtype", ("best", torch.float16), r"of another model: .* is torch\.float16 in it, torch\.float32 here"),
        ("step", 6, "is a copy of the checkpoint of step 6"),
    ],
)
def test_a_whole_checkpoint_that_no_run_wrote_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, value: Any, said: str
) -> None:
    make(monkeypatch, tmp_path / "run", max_steps=7)
    (tmp_path / "run" / "summary.json").unlink()
    tamper(tmp_path / "run" / "checkpoints" / "step-000000007", part, value)
    with pytest.raises(UserError, match=said):
        make(monkeypatch, tmp_path / "run", resume="auto")


def test_a_logging_window_longer_than_the_run_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make(monkeypatch, tmp_path / "whole", log_every_steps=10**12)
    make(monkeypatch, tmp_path / "run", log_every_steps=10**12, max_steps=7)
    longer = make(monkeypatch, tmp_path / "run", resume="auto", log_every_steps=10**12)
    assert longer["parameters_sha256"] == whole["parameters_sha256"]
    assert without_times(tmp_path / "run") == without_times(tmp_path / "whole")


RARE = [torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64]


class Rare(Task):
    """A model with buffers such as a table of rotary positions, or of scales."""

    def __init__(self, *types: torch.dtype) -> None:
        super().__init__()
        self.types = types

    def model(self) -> nn.Module:
        model = super().model()
        for number, dtype in enumerate(self.types):
            model.register_buffer(f"table{number}", torch.arange(1.0, 6.0).to(dtype))
        return model


def test_buffers_of_rare_types_are_stored_and_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make(monkeypatch, tmp_path / "whole", Rare(*RARE))
    make(monkeypatch, tmp_path / "run", Rare(*RARE), max_steps=7)
    summary = make(monkeypatch, tmp_path / "run", Rare(*RARE), resume="auto")
    assert summary["model_sha256"] == whole["model_sha256"]


def test_a_type_that_no_file_holds_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"The model's table0 has the type torch\.complex128"):
        make(monkeypatch, tmp_path / "run", Rare(torch.complex128))
    assert list(tmp_path.iterdir()) == []


class NoLoss(Task):
    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
        return outputs.mean()


class Slips(Task):
    def model(self) -> nn.Module:
        raise KeyError("a slip")


@pytest.mark.parametrize(
    ("task", "error", "said"),
    [(NoLoss(), UserError, r"NoLoss\.loss\(\) must return two things"), (Slips(), KeyError, "a slip")],
    ids=["the user's", "a slip"],
)
def test_a_run_that_ends_before_its_first_step_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: Any, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        make(monkeypatch, tmp_path / "new" / "run", task)
    assert list(tmp_path.iterdir()) == []
    # The folder can be used for the next attempt.
    make(monkeypatch, tmp_path / "new" / "run", max_steps=1)


def test_a_run_that_fails_on_its_way_keeps_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(step: int, engine: Any, losses: Any) -> None:
        if step == 5:
            raise KeyError("a slip")

    with pytest.raises(KeyError, match="a slip"):
        make(monkeypatch, tmp_path / "run", trace=fail, checkpoint={"every_steps": 2, "keep": 9})
    # That of step 4 may still be on its way to the disk.
    assert "step-000000002" in [c.name for c in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert [r["step"] for r in records(tmp_path / "run") if "train/loss" in r] == [2, 4]


def test_memory_that_runs_out_is_told_with_a_smaller_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(step: int, engine: Any, losses: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    said = r"(?s)A micro-batch of 4 samples does not fit .*\nTry half of it, 2 \(train_micro_batch_size_per_gpu\), or "
    with pytest.raises(TrainerError, match=said) as caught:
        make(monkeypatch, tmp_path / "run", trace=fail)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_the_last_good_model_of_a_run_that_stops_being_finite_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflow(step: int, engine: Any, losses: Any) -> None:
        if step == 3:
            engine.model[0].weight.data.fill_(torch.inf)

    with pytest.raises(NonFiniteError, match="Step 4 is not finite"):
        make(monkeypatch, tmp_path / "run", trace=overflow)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 3
    assert "Step 4 is not finite" in summary["status"]
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_a_run_without_time_left_stops_after_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Stopped, match=r"stopped after step 1 of 12: .*wall-time budget"):
        make(monkeypatch, tmp_path / "run", max_wall_time_s=0.001)
    assert [c.name for c in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-000000001"]


def test_a_run_that_is_stopped_has_its_curve_in_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that goes on begins after them, so what is missing would stay missing."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def interrupt(step: int, engine: Any, losses: Any) -> None:
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)

    with pytest.raises(Stopped):
        make(monkeypatch, tmp_path / "run", trace=interrupt, tensorboard={"enabled": True})
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6]
