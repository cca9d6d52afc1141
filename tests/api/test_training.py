"""`train`: the bits of a run of its own, at one rank as a guest and at several; what a program hears, and errors."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed import jobs
from tests.distributed.jobs import USER_TASKS
from trainer import Callback, CallbackError, LostRankError, Result, UserError, load_config, train
from trainer.config import ready
from trainer.config.keys import Config
from trainer.ranks import group
from trainer.ranks.place import Ranks
from trainer.ranks.workers import run_ranks

CONFIG: dict[str, Any] = {
    "train_batch_size": 104,
    "train_micro_batch_size_per_gpu": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
    "tensorboard": {"enabled": False},
    "trainer": {"task": f"{USER_TASKS}/my_task.py:MyTask", "epochs": 2, "log_every_steps": 2},
}
ENDLESS = {"trainer.epochs": 100_000}
# A task of one's own that fails in a chosen way, on rank 1 in the fourth step.
FAILS = f"""
import os, signal, sys
sys.path.insert(0, {str(USER_TASKS)!r})
from my_task import MyTask


class Fails(MyTask):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def augment(self, batch, random, progress):
        if progress.step == 3 and os.environ["RANK"] == "1":
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyError("a slip")
        return super().augment(batch, random)
"""


class Hears(Callback):
    """Notes what it hears, and changes all that it gets."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []
        self.evaluations: list[tuple[str, dict[str, float], int]] = []
        self.results: list[Result] = []

    def on_log(self, record: dict[str, float]) -> None:
        self.logs.append(dict(record))
        record.clear()

    def on_evaluation(self, split: str, metrics: dict[str, float], step: int) -> None:
        self.evaluations.append((split, dict(metrics), step))
        metrics.clear()

    def on_end(self, result: Result) -> None:
        self.results.append(result)


class Meddles(Hears):
    """Changes what holds for the whole process."""

    def __init__(self) -> None:
        super().__init__()
        self.streams: list[Any] = []

    def on_log(self, record: dict[str, float]) -> None:
        import torch

        super().on_log(record)
        self.streams.append((sys.stdout, sys.stderr))
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        torch.set_num_threads(2)
        torch.set_default_dtype(torch.float16)
        torch.use_deterministic_algorithms(False)
        torch.set_grad_enabled(False)
        os.environ["MEDDLED"] = "1"


class Presses(Callback):
    """Sends this process a signal at a step."""

    def __init__(self, number: int, step: int = 4) -> None:
        self.number, self.step = number, step

    def on_log(self, record: dict[str, float]) -> None:
        if record["step"] == self.step:
            os.kill(os.getpid(), self.number)


def slow(folder: Path) -> dict[str, Any]:
    return {"trainer.output_dir": str(folder / "run")} | ENDLESS


def plain_run(folder: Path) -> dict[str, Any]:
    """A run in a process of its own, as trainer/main.py makes it; its summary."""
    config = load_config(CONFIG, {"trainer.output_dir": str(folder / "plain")})
    summary: dict[str, Any] = run_ranks(jobs.train, 1, config)[0]
    return summary


# One rank, in this process


def state() -> dict[str, Any]:
    """What a program may have set in its process."""
    import torch

    numbers = (random.getstate()[1][:5], np.random.get_state()[1][:5].tolist(), torch.get_rng_state()[:64].tolist())
    return {
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32),
        "precision": (torch.get_float32_matmul_precision(), torch.backends.mkldnn.matmul.fp32_precision),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "gradients": torch.is_grad_enabled(),
        "generators": numbers,
        "environment": dict(os.environ),
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
        "group": torch.distributed.is_initialized(),
    }


def models() -> int:
    """Models of the task that this process still holds."""
    return sum(type(value).__name__ == "Net" for value in gc.get_objects())


def as_a_guest(ranks: Ranks, folder: str) -> dict[str, Any]:
    """Runs in a process with settings of its own, one after the other."""
    import torch

    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    torch.set_num_threads(2)
    torch.manual_seed(5)
    os.environ["MINE"] = "1"
    before, hears = state(), Meddles()
    with torch.inference_mode():
        first = train(CONFIG, output_dir=f"{folder}/first", quiet=True)
    changed = {name: (value, state()[name]) for name, value in before.items() if state()[name] != value}
    # Another run in between, then the first again.
    train(CONFIG, output_dir=f"{folder}/other", quiet=True, overrides={"torch_autocast.enabled": True})
    second = train(CONFIG, output_dir=f"{folder}/second", quiet=True, callbacks=[hears])
    meddled = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), os.environ.get("MEDDLED"))
    # In a quiet run, too, callbacks may print.
    assert hears.streams == [(sys.stdout, sys.stderr)] * 5
    del hears.streams
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    return {
        "first": first,
        "second": second,
        "changed": changed,
        "meddled": meddled,
        "hears": hears,
        "models": models(),
    }


def test_a_guest_leaves_a_process_as_it_was_and_has_the_bits_of_a_process_of_its_own(tmp_path: Path) -> None:
    """Whatever the process has set, whatever runs came before, and whatever a callback changes."""
    import torch

    alone = plain_run(tmp_path)
    found = run_ranks(as_a_guest, 1, str(tmp_path))[0]
    assert found["changed"] == {}
    for result in (found["first"], found["second"]):
        assert result.parameters_sha256 == alone["parameters_sha256"]
        assert result.metrics == alone["metrics"]
    # What a callback changes of the process is the program's own affair, and stays.
    assert found["meddled"] == (torch.float16, 2, False, "1")
    assert [record["step"] for record in found["hears"].logs] == [2, 4, 6, 8, 10]
    assert found["models"] == 0


def interrupted(ranks: Ranks, folder: str) -> dict[str, Any]:
    """What Ctrl-C and a failing callback do to a run in this process, and how it goes on."""

    class Fails(Callback):
        def on_log(self, record: dict[str, float]) -> None:
            raise ZeroDivisionError("a slip")

    class Late(Callback):
        def on_evaluation(self, split: str, metrics: dict[str, float], step: int) -> None:
            if split == "test":
                os.kill(os.getpid(), signal.SIGINT)

    caught: list[Any] = []
    overrides = [("ctrl-c", Presses(signal.SIGINT), ENDLESS), ("callback", Fails(), {}), ("late", Late(), {})]
    for name, callback, changes in overrides:
        try:
            train(CONFIG, output_dir=f"{folder}/{name}", callbacks=[callback], overrides=changes, quiet=True)
        except (KeyboardInterrupt, CallbackError) as error:
            caught.append(error)
            # The exception is kept, and does not keep the model.
            assert models() == 0
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    resumed = train(CONFIG, output_dir=f"{folder}/callback", resume="auto", quiet=True)
    return {"caught": [(type(e), str(e), repr(e.__cause__)) for e in caught], "handlers": handlers, "resumed": resumed}


def test_a_guest_that_is_stopped_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    alone = plain_run(tmp_path)
    found = run_ranks(interrupted, 1, str(tmp_path))[0]
    (pressed, said, _), (failed, why, cause), (late, too_late, _) = found["caught"]
    assert late is KeyboardInterrupt and too_late.startswith("the run had finished already, in ")
    assert pressed is KeyboardInterrupt and "stopped after step 5 of" in said and "SIGINT. Nothing is lost." in said
    assert failed is CallbackError and cause == "ZeroDivisionError('a slip')"
    assert why.startswith("The callback Fails.on_log() has raised ZeroDivisionError: a slip\nThe run was stopped after")
    assert found["handlers"] == [signal.default_int_handler, signal.SIG_DFL]
    assert found["resumed"].parameters_sha256 == alone["parameters_sha256"]
    assert found["resumed"].exactness == "bitwise"


def edited_in_between(ranks: Ranks, folder: str) -> list[float]:
    """Two runs of one process, between which a file beside the task's is edited; their test losses."""
    task = f"from scale import SCALE\n{(USER_TASKS / 'my_task.py').read_text()}"
    task = task.replace("self.outer(", "SCALE * self.outer(")
    Path(folder, "edited.py").write_text(task)
    losses = []
    for scale in (1.0, 3.0):
        Path(folder, "scale.py").write_text(f"SCALE = {scale}\n")
        out = f"{folder}/{scale}"
        result = train(CONFIG, task=f"{folder}/edited.py:MyTask", output_dir=out, quiet=True)
        losses.append(result.metrics["test"]["loss"])
    return losses


def test_a_run_has_the_code_of_the_moment(tmp_path: Path) -> None:
    one, other = run_ranks(edited_in_between, 1, str(tmp_path))[0]
    assert one != other


# Several ranks


def test_several_ranks_are_one_run_of_which_this_process_hears(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone, hears = plain_run(tmp_path), Hears()
    result = train(CONFIG, ranks=3, output_dir=tmp_path / "run", callbacks=[hears])
    assert result.parameters_sha256 == alone["parameters_sha256"]
    assert result.metrics == alone["metrics"] and result.exactness == "bitwise"
    assert result.summary["world_size"] == 3 and result.output_dir == tmp_path / "run"
    assert [record["step"] for record in hears.logs] == [2, 4, 6, 8, 10]
    assert hears.evaluations == [("test", result.metrics["test"], 10)]
    assert hears.results == [result]
    # The records that callbacks get are the lines of the log, whatever they do to them.
    assert [{**record} for record in result.records if "train/loss" in record] == hears.logs
    out, err = capsys.readouterr()
    assert out.count("3 ranks x") == 1 and "test accuracy" in out and err == ""


def ended(folder: Path) -> bool:
    """Whether no process has anything open in a folder, or it as the place where it works."""
    found = subprocess.run(
        ["ls", "-l", *(str(p) for p in Path("/proc").glob("[0-9]*/fd"))], capture_output=True, text=True
    )
    return str(folder) not in found.stdout


def test_ctrl_c_stops_all_ranks_with_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step \d+ of [\d,]+: SIGINT\. Nothing is lost\."):
        train(CONFIG, ranks=2, overrides=slow(tmp_path), callbacks=[Presses(signal.SIGINT)], quiet=True)
    assert time.monotonic() - began_s < 60
    assert list((tmp_path / "run" / "checkpoints").glob("step-*")) and ended(tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert capsys.readouterr() == ("", "")


def test_a_callback_that_fails_hangs_no_rank_and_loses_nothing(tmp_path: Path) -> None:
    class Fails(Hears):
        def on_log(self, record: dict[str, float]) -> None:
            super().on_log(record)
            raise KeyError("a slip")

    first, fails = Hears(), Fails()
    with pytest.raises(
        CallbackError, match=r"The callback Fails.on_log\(\) has raised KeyError: 'a slip'\nThe run was stopped"
    ):
        train(CONFIG, ranks=2, overrides=slow(tmp_path), callbacks=[first, fails], quiet=True)
    assert len(first.logs) == len(fails.logs) == 1  # none is called any more
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ("slip", KeyError, "a slip"),
        ("kill", LostRankError, r"^Rank 1 on .* ended without a message, in step [34]: killed"),
    ],
)
def test_the_error_of_a_rank_is_raised_here(tmp_path: Path, how: str, kind: type[Exception], words: str) -> None:
    """With its own class, where this process knows that; a lost rank is named."""
    (tmp_path / "fails.py").write_text(FAILS)
    changes = {"trainer.task_options": {"how": how}}
    with pytest.raises(kind, match=words) as caught:
        train(
            CONFIG,
            ranks=2,
            task=f"{tmp_path}/fails.py:Fails",
            output_dir=tmp_path / "run",
            overrides=changes,
            quiet=True,
        )
    assert type(caught.value) is kind


def test_a_rank_that_dies_before_the_first_step_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "_GRACE_S", 0.5)  # the others wait for it, as long as they may
    kills = "        if os.environ['RANK'] == '1':\n            os.kill(os.getpid(), signal.SIGKILL)\n"
    (tmp_path / "fails.py").write_text(FAILS.replace("        super().__init__()\n", kills))
    changes = {"trainer.task_options": {"how": ""}}
    with pytest.raises(LostRankError, match=r"^Rank 1 was killed by SIGKILL"):
        train(CONFIG, ranks=2, task=f"{tmp_path}/fails.py:Fails", output_dir=tmp_path / "run", overrides=changes)
    assert not (tmp_path / "run").exists()


# What is given


def test_a_config_is_a_file_a_dictionary_or_a_config(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(CONFIG))
    changes = {"trainer.seed": np.int64(3), "optimizer.params.betas": (0.8, 0.9), "trainer.output_dir": tmp_path}
    for given in (tmp_path / "run.json", str(tmp_path / "run.json"), CONFIG, load_config(CONFIG)):
        config = load_config(given, changes)
        assert isinstance(config, Config)
        assert (config.trainer.seed, config.optimizer.params["betas"]) == (3, [0.8, 0.9])
        assert config.trainer.output_dir == str(tmp_path) and config.trainer.epochs == 2
    assert "seed" not in CONFIG["trainer"]  # nobody's dictionary is changed


def test_a_ready_config_is_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As by the commands, in a folder without any config."""
    monkeypatch.chdir(tmp_path)
    assert load_config("strong.json") == load_config(ready.folder() / "strong.json")
    said = f"strong.json is not in this folder, so the trainer's own is used: {ready.folder() / 'strong.json'}\n"
    assert capsys.readouterr() == ("", said)
    for quiet in (True, False):
        with pytest.raises(
            UserError, match=r'strong\.json with trainer\.epoch=3: unknown key "trainer\.epoch"'
        ):  # so it has been read
            train(Path("strong.json"), overrides={"trainer.epoch": 3}, quiet=quiet)
        assert capsys.readouterr() == ("", "" if quiet else said)
    with pytest.raises(UserError, match=r"does not exist\. The trainer has a ready one: type strong\.json$"):
        load_config("ds_configs/strong.json")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"ranks": 0}, "ranks is 0. It must be a whole number of at least 1."),
        ({"ranks": 2.0}, "ranks is 2.0"),
        ({"ranks": 14}, "13 micro-batches"),
        ({"overrides": {"trainer.epoch": 3}}, 'unknown key "trainer.epoch". Did you mean "epochs"?'),
        (
            {"overrides": {"trainer.seed": object()}},
            'overrides["trainer.seed"] is a object. A config holds what JSON has',
        ),
        ({"overrides": {"trainer": {"epochs": 3}}}, 'Name single keys, for example "trainer.epochs".'),
        ({"overrides": ["trainer.epochs=3"]}, 'Give a dictionary, such as {"trainer.epochs": 3}.'),
        ({"task": "no.py:Task"}, "The task file no.py does not exist"),
        ({"task": Presses(2)}, 'task is of the type Presses. Give a name such as "digits"'),
        ({"output_dir": 5}, "output_dir is 5. Give the path of a folder."),
        ({"resume": True}, 'resume is True. Give "auto", or the folder of a run or of a checkpoint.'),
        ({"callbacks": Hears()}, "callbacks is of the type Hears. Give a list, such as callbacks=[MyCallback()]."),
        ({"callbacks": [Hears]}, "callbacks[0] is the class Hears. Give an object: Hears()."),
        (
            {"callbacks": [Hears(), 3]},
            "callbacks[1] is a int, which has none of the methods on_log, on_evaluation, on_end.",
        ),
        ({"resume": "no_such_run"}, "--resume no_such_run: there is no such folder"),
    ],
)
def test_what_cannot_be_run_is_said_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        train(CONFIG, **{"ranks": 2, "quiet": True, **given})
    assert words in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if list(path.iterdir())]


def test_in_a_process_of_a_launcher_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(
        UserError, match=r"train\(\) starts its ranks itself, but a launcher has started this process as"
    ):
        train(CONFIG)
