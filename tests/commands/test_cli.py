"""Command lines: what wins over what, errors in one message, and which command gets what."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.commands import check_task, cli, predict, show_plan, verify
from trainer.config import ready
from trainer.config.keys import Config, load_config
from trainer.errors import UserError
from trainer.study import page, runner

ROOT = Path(__file__).resolve().parents[2]
BASE: dict[str, Any] = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.001}},
}


def base(**changes: Any) -> dict[str, Any]:
    """A valid config with some top-level keys changed."""
    return {**BASE, **changes}


def write(folder: Path, values: dict[str, Any]) -> str:
    path = folder / "run.json"
    path.write_text(json.dumps(values))
    return str(path)


# The flags of a run


def from_flags(folder: Path, values: dict[str, Any], *flags: str) -> Config:
    return cli.config_from(cli.run_parser().parse_args(["--ds_config", write(folder, values), *flags]))


@pytest.mark.parametrize(
    ("flag", "text", "field", "in_file", "default"),
    [
        ("--task", "mine.py:Task", "task", "digits", "digits"),
        ("--epochs", "3", "epochs", 7, 20),
        ("--max_steps", "3", "max_steps", 7, None),
        ("--seed", "3", "seed", 7, 0),
        ("--output_dir", "there", "output_dir", "here", None),
    ],
)
def test_flag_wins_over_file_over_default(
    tmp_path: Path, flag: str, text: str, field: str, in_file: Any, default: Any
) -> None:
    typed = int(text) if text.isdigit() else text
    filled = base(trainer={field: in_file})
    assert getattr(from_flags(tmp_path, BASE).trainer, field) == default
    assert getattr(from_flags(tmp_path, filled).trainer, field) == in_file
    assert getattr(from_flags(tmp_path, filled, flag, text).trainer, field) == typed
    assert getattr(from_flags(tmp_path, filled, "--set", f"trainer.{field}={text}").trainer, field) == typed
    # The named flag wins over --set, wherever it stands.
    assert getattr(from_flags(tmp_path, BASE, flag, text, "--set", f"trainer.{field}=1").trainer, field) == typed


def test_a_flag_leaves_the_rest_of_the_file(tmp_path: Path) -> None:
    filled = base(trainer={"seed": 7, "epochs": 9, "learning_rate": {"schedule": "cosine", "warmup_epochs": 2}})
    c = from_flags(tmp_path, filled, "--seed", "1", "--set", "trainer.learning_rate.warmup_epochs=0.5")
    assert (c.trainer.seed, c.trainer.epochs, c.train_batch_size) == (1, 9, 64)
    assert (c.trainer.learning_rate.schedule, c.trainer.learning_rate.warmup_epochs) == ("cosine", 0.5)


def test_set_reaches_deep_and_makes_blocks(tmp_path: Path) -> None:
    c = from_flags(
        tmp_path,
        BASE,
        *("--set", "trainer.learning_rate.schedule=cosine", "--set", "optimizer.params.betas=[0.8, 0.9]"),
        *("--set", "trainer.task_options.width=4", "--set", "train_batch_size=128"),
    )
    assert c.trainer.learning_rate.schedule == "cosine"
    assert c.optimizer.params == {"lr": 0.001, "betas": [0.8, 0.9]}
    assert c.trainer.task_options == {"width": 4} and c.train_batch_size == 128


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--set", "trainer.epoch=3"), ('unknown key "trainer.epoch"', '"epochs"')),
        (("--set", 'trainer={"epochs": 3}'), ('"trainer" is the whole block', '"trainer.epochs"')),
        (("--set", "trainer.epochs=three"), ('"trainer.epochs" must be a whole number, not "three" (a string)',)),
        (("--set", "trainer.epochs=NaN"), ('"trainer.epochs" must be a whole number, not "NaN"',)),
        (("--set", "train_batch_size.x=3"), ("--set train_batch_size.x", "64 (a whole number)", "not a block")),
        (("--epochs", "0"), ('"trainer.epochs" is 0', "at least 1")),
        (("--seed", "-1"), ('"trainer.seed" is -1', "at least 0")),
        (("--epochs", "many"), ("--epochs", "many", "usage: ")),
        (("--epoch", "3"), ("--epoch", "usage: ")),  # no abbreviations: --epoch could become ambiguous
    ],
)
def test_errors_of_the_command_line(tmp_path: Path, flags: tuple[str, ...], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        from_flags(tmp_path, BASE, *flags)
    for word in words:
        assert word in str(caught.value)


def test_the_config_flag_is_required() -> None:
    with pytest.raises(UserError, match="--ds_config"):
        cli.run_parser().parse_args([])


def test_the_launchers_flag_is_taken() -> None:
    assert cli.run_parser().parse_args(["--ds_config", "x", "--local_rank=3"]).local_rank == 3


def test_config_and_plan_come_before_torch(tmp_path: Path) -> None:
    """A bad config is reported at once: nothing heavy is imported for it, nor for `plan`."""
    path = write(tmp_path, BASE)
    code = (
        "import sys, trainer.config.keys, trainer.commands.show_plan, trainer.commands.cli\n"
        f"assert trainer.commands.cli.main(['plan', '--ds_config', {path!r}]) == 0\n"
        "heavy = {'torch', 'deepspeed', 'numpy', 'sklearn', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# python -m trainer


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments with which commands are called, instead of the commands."""
    calls: list[tuple[Any, ...]] = []

    def note(name: str) -> Any:
        def call(*arguments: Any) -> int:
            calls.append((name, *arguments))
            return 7

        return call

    for module, name in (
        (check_task, "check_task"), (predict, "predict"), (verify, "verify"), (runner, "study"), (page, "report"),
        (show_plan, "plan_table"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, note(name))
    return calls


@pytest.mark.parametrize(
    ("arguments", "call"),
    [
        ("check-task digits", ("check_task", "digits", {}, None)),
        (
            "check-task a.py:A --ds_config c.json --set trainer.task_options.x=3 --set train_batch_size=8",
            ("check_task", "a.py:A", {"trainer.task_options.x": 3, "train_batch_size": 8}, "c.json"),
        ),
        ("predict --model m --input i", ("predict", "m", "i", None, None, None, 32, "auto", False)),
        (
            "predict --model m --input i --output o --overwrite --format jsonl --task a.py:A --batch_size 4 "
            "--device cpu",
            ("predict", "m", "i", "o", "jsonl", "a.py:A", 4, "cpu", True),
        ),
        ("study s.json", ("study", "s.json", False, {})),
        ("study s.json --dry_run --set study.seeds=5", ("study", "s.json", True, {"study.seeds": 5})),
        ("report folder", ("report", ["folder"], None)),
        ("report one two --paper p.html", ("report", ["one", "two"], "p.html")),
    ],
)
def test_a_command_gets_what_was_said(called: list[tuple[Any, ...]], arguments: str, call: tuple[Any, ...]) -> None:
    """And its exit code is that of the process."""
    assert cli.main(arguments.split()) == 7
    assert called == [call]


def test_plan_and_verify_get_the_config_and_the_world_sizes(tmp_path: Path, called: list[tuple[Any, ...]]) -> None:
    common = ["--ds_config", write(tmp_path, BASE), "--seed", "5", "--set", "trainer.epochs=3"]
    assert cli.main(["plan", *common]) == 0
    assert cli.main(["verify", *common, "--world_sizes", "1", "8"]) == 7
    assert cli.main(["verify", *common, "--packs", "1", "auto"]) == 7
    expected = (("plan_table", [1, 2, 3, 4]), ("verify", [1, 8], [None]), ("verify", [1, 2, 3, 4], [1, "auto"]))
    for (name, config, *sizes), wanted in zip(called, expected, strict=True):
        assert (name, *sizes) == wanted
        assert (config.trainer.seed, config.trainer.epochs, config.train_batch_size) == (5, 3, 64)


@pytest.mark.parametrize(
    "arguments", ["study study.json", "check-task digits --ds_config study.json", "verify --ds_config study.json"]
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_bare_name_finds_a_ready_config(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    called: list[tuple[Any, ...]],
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    rank: int,
) -> None:
    """Rank 0 says so, for all."""
    for name, value in {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments.split()) == 7
    own = ready.folder() / "study.json"
    (call,) = called
    assert str(own) in call or load_config(own) in call
    said = f"study.json is not in this folder, so the trainer's own is used: {own}\n"
    assert capsys.readouterr().err == (said if rank == 0 else "")


def test_who_stops_reading_sees_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # else every line is written at once
    reads, writes = os.pipe()
    os.close(reads)
    for arguments in (["schema"], ["keys", "trainer.best"]):
        done = subprocess.run(
            [sys.executable, "-m", "trainer", *arguments], cwd=ROOT, stdout=writes, stderr=subprocess.PIPE, timeout=60
        )
        assert (done.returncode, done.stderr) == (1, b"")
    os.close(writes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", ("required: command", "usage: python -m trainer")),
        ("paln", ("paln", "plan", "usage: ")),
        ("plan", ("--ds_config", "usage: python -m trainer plan")),
        ("plan --ds_config no.json", ("no.json does not exist", "run.json")),
        ("plan --ds_config run.json --world_sizes 2 0", ("--world_sizes 0: a world size must be at least 1",)),
        ("verify --ds_config run.json --world_sizes two", ("--world_sizes", "two")),
        ("verify --ds_config run.json --packs 4 0", ("--packs", "'0' is not \"auto\" or a whole number of at least 1")),
        ("plan --ds_config run.json --set trainer.epoch=3", ('unknown key "trainer.epoch". Did you mean "epochs"?',)),
        ("plan --ds_config run.json --epoch 3", ("--epoch", "usage: python -m trainer plan")),
        ("predict --model m --in f", ("--in", "usage: ")),
        ("predict --model m --input f --format xml", ("--format", "xml", "csv")),
        ("check-task digits --set trainer.seed", ("expected dotted.key=value",)),
        ("study nowhere.json", ("nowhere.json does not exist",)),
    ],
)
def test_an_error_is_one_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    words: tuple[str, ...],
) -> None:
    write(tmp_path, BASE)
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("error: ") == 1
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "You typed trian. Did you mean train?"),
        (["train", "--ds_config", "x.json", "--max_step", "3"], "You typed --max_step. Did you mean --max_steps?"),
        (["train", "--ds_confg=x.json"], "You typed --ds_confg. Did you mean --ds_config?"),
        (["init"], "The tasks are audio_classification, causal_lm, "),
        (["plan", "--ds_config", "data.csv"], "data.csv is no config: a config is a JSON object {...}, but its first"),
        (["train", "--ds_config", "run.json", "--resume", "auto1"], "no such folder (looked from"),
        (["train", "--ds_config", "run.json", "--output_dir", "mine"], "holds files that no run has written (a.csv)"),
    ],
)
def test_what_was_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name in ("data.csv", "mine/a.csv"):
        (tmp_path / name).write_text("text,label\n")
    write(tmp_path, base())
    assert cli.main(words) == 2
    assert said in capsys.readouterr().err
