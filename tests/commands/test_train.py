"""`python -m trainer train`: the run of trainer/main.py, its exit codes, and our message as the last on the screen."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import jobs
from tests.distributed.jobs import USER_TASKS
from trainer.api import launch
from trainer.commands.cli import main
from trainer.config.keys import load_config
from trainer.errors import LostRankError, NonFiniteError, RanksDifferError, Stopped, TrainerError, UserError
from trainer.ranks.place import Ranks
from trainer.ranks.stopping import EndedBySignal
from trainer.ranks.workers import WorkerError, run_ranks

CONFIG: dict[str, Any] = {
    "train_batch_size": 104,
    "train_micro_batch_size_per_gpu": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
    "tensorboard": {"enabled": False},
    "trainer": {"task": f"{USER_TASKS}/my_task.py:MyTask", "max_steps": 4, "log_every_steps": 2},
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(CONFIG))
    return "run.json"


def train(config: str, *flags: str) -> int:
    return main(["train", "--ds_config", config, *flags])


def on_one_rank(ranks: Ranks, config: str) -> int:
    return train(config)


def test_the_same_run_at_any_number_of_ranks(config: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """In the folders, and with the bits, of trainer/main.py. Without a GPU, the default is one rank."""
    assert train(config, "--ranks", "2") == 0
    out, err = capsys.readouterr()
    assert "2 ranks x" in out and out.splitlines()[-1] == "results        runs/run-001" and err == ""
    assert run_ranks(on_one_rank, 1, config) == [0]
    plain = run_ranks(jobs.train, 1, load_config(config, {"trainer.output_dir": str(tmp_path / "plain")}))[0]
    summaries = [json.loads(Path(f"runs/run-00{n}/summary.json").read_text()) for n in (1, 2)]
    assert [summary["world_size"] for summary in summaries] == [2, 1]
    for summary in summaries:
        assert summary["parameters_sha256"] == plain["parameters_sha256"] and summary["metrics"] == plain["metrics"]


def press_when_it_runs(folder: Path, number: int) -> None:
    """Sends this process a signal when a run has begun to log, as a terminal or a scheduler does."""

    def wait() -> None:
        deadline_s = time.monotonic() + 120
        while time.monotonic() < deadline_s:
            if (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size:
                os.kill(os.getpid(), number)
                return
            time.sleep(0.05)

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_ranks_with_a_checkpoint(
    config: str, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    press_when_it_runs(Path("out"), number)
    flags = ("--ranks", "2", "--output_dir", "out", "--set", "trainer.max_steps=1000000", "--epochs", "1000000")
    assert train(config, *flags) == 75
    err = capsys.readouterr().err
    assert err.startswith("\nstopped after step ") and err.count("\n") == 2
    assert f"{number.name}. Nothing is lost. To continue on any number of ranks, start the same command with" in err
    assert list(Path("out/checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("error", "code", "last"),
    [
        (UserError("a typo"), 2, "error: a typo"),
        (NonFiniteError("nan"), 3, "error: nan"),
        (RanksDifferError("rank 1"), 4, "error: rank 1"),
        (LostRankError("Rank 1 is gone"), 5, "error: Rank 1 is gone"),
        (Stopped("stopped after step 3"), 75, "stopped after step 3"),
        (TrainerError("the disk is full"), 1, "error: the disk is full"),
        (WorkerError("rank 1 failed:\nTraceback\nKeyError: 3"), 1, "KeyError: 3"),
        (KeyboardInterrupt(), 130, "stopped from the keyboard before the first step"),
        (EndedBySignal(signal.SIGTERM), 143, "stopped by SIGTERM before the first step"),
    ],
)
def test_how_a_run_ends_is_said_last(
    config: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    last: str,
) -> None:
    """With the exit codes of trainer/main.py, which the README lists."""

    def on_ranks(*given: Any, **named: Any) -> None:
        raise error

    monkeypatch.setattr(launch, "on_ranks", on_ranks)
    handler = signal.getsignal(signal.SIGTERM)
    assert train(config, "--ranks", "2") == code
    assert capsys.readouterr().err.splitlines()[-1] == last
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--ranks", "0"), "--ranks 0: it must be at least 1."),
        (("--ranks", "two"), "--ranks"),
        (("--ranks", "14"), "13 micro-batches"),
        (("--task", "digitz"), 'unknown task "digitz". Did you mean "digits"?'),
        (("--set", "trainer.epoch=3"), 'unknown key "trainer.epoch". Did you mean "epochs"?'),
    ],
)
def test_what_cannot_be_run(
    config: str, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], words: str
) -> None:
    assert train(config, *flags) == 2
    assert words in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_launcher_starts_the_main_program(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "1")
    assert train(config) == 2
    assert "python -m trainer train starts its ranks itself, but a launcher has started" in capsys.readouterr().err
