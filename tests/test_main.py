"""`trainer/main.py`: how a rank's exit code and its last words follow from how its run ended. No run is made."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import trainer.run.run
from trainer import main as program
from trainer.errors import LostRankError, NonFiniteError, RanksDifferError, Stopped, TrainerError, UserError
from trainer.main import main
from trainer.ranks import speech
from trainer.ranks.place import Ranks
from trainer.ranks.stopping import EndedBySignal
from trainer.run.claim import Resume

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "PMI_SIZE")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small config, in an environment that no launcher has set."""
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"train_batch_size": 64, "train_micro_batch_size_per_gpu": 8}))
    return str(file)


def ending(monkeypatch: pytest.MonkeyPatch, error: BaseException | None) -> list[tuple[Any, ...]]:
    """A run that ends so. Returns its calls: (config, ranks, other arguments)."""
    calls: list[tuple[Any, ...]] = []

    def run(config: Any, ranks: Ranks, **others: Any) -> None:
        calls.append((config, ranks, others))
        if error is not None:
            raise error

    monkeypatch.setattr(trainer.run.run, "run", run)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return calls


def test_what_a_run_is_given(monkeypatch: pytest.MonkeyPatch, config: str) -> None:
    calls = ending(monkeypatch, None)
    assert main(["--ds_config", config, "--epochs", "7", "--resume", "auto"]) == 0
    ((given, ranks, others),) = calls
    assert (given.trainer.epochs, ranks) == (7, Ranks())
    assert (others["config_name"], others["resume"]) == ("mine", Resume("auto", False))
    assert others["began_s"] <= time.monotonic(), "from the start of the process on: imports count"


@pytest.mark.parametrize("kind", [TrainerError, UserError, NonFiniteError, RanksDifferError, LostRankError, Stopped])
def test_an_error_for_the_user_is_printed_once_and_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: str, kind: type[TrainerError]
) -> None:
    ending(monkeypatch, kind("why it ended", agreed=True))
    assert main(["--ds_config", config]) == kind.exit_code
    said = capsys.readouterr()
    assert said.err.count("why it ended") == 1
    assert "Traceback" not in said.err + said.out


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "stopped from the keyboard"),
        (EndedBySignal(signal.SIGTERM), 128 + signal.SIGTERM, "stopped by SIGTERM before the first step"),
    ],
)
def test_a_signal_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    config: str,
    end: BaseException,
    code: int,
    words: str,
) -> None:
    ending(monkeypatch, end)
    assert main(["--ds_config", config]) == code
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("first", [True, False])
def test_of_several_ranks_one_shows_a_slip_in_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: str, first: bool
) -> None:
    """The first that comes to it raises it, with its traceback; the others end with 1 and print nothing."""
    ending(monkeypatch, ZeroDivisionError())
    monkeypatch.setattr(program, "first_to_speak", lambda ranks: first)
    if first:
        with pytest.raises(ZeroDivisionError):
            main(["--ds_config", config])
    else:
        assert main(["--ds_config", config]) == 1
        assert capsys.readouterr().err == ""


def test_a_task_finds_the_usual_variables_under_every_launcher(monkeypatch: pytest.MonkeyPatch, config: str) -> None:
    """Open MPI has other names for them."""
    calls = ending(monkeypatch, None)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # so that they are taken away again
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in {"RANK": 1, "SIZE": 2, "LOCAL_RANK": 1, "LOCAL_SIZE": 2}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", str(value))
    assert main(["--ds_config", config]) == 0
    assert calls[0][1] == Ranks(1, 2, 1, 2)
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["1", "2", "1"]


def test_what_cannot_work_is_said_before_a_run_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: str
) -> None:
    calls = ending(monkeypatch, None)
    # An earlier test of this process may have claimed to speak for this launch.
    monkeypatch.setattr(speech, "first_to_speak", lambda ranks: True)
    monkeypatch.setenv("WORLD_SIZE", "9")
    assert main(["--ds_config", config]) == 2
    assert "WORLD_SIZE is 9, but RANK is not set" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    assert main(["--ds_config", config]) == 2, "8 micro-batches are too few for 9 ranks"
    assert "9 ranks" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    assert main(["--ds_config", config, "--task", "digts"]) == 2
    assert "Did you mean" in capsys.readouterr().err
    assert calls == []
