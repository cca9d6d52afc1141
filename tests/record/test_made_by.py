"""Which code made a result, and the command that makes it again."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.record import made_by
from trainer.record.made_by import command, commit, without_secrets


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that could be a checkout of the trainer, in the place of the real one."""
    file = tmp_path / "trainer" / "record" / "made_by.py"
    file.parent.mkdir(parents=True)
    shutil.copy(made_by.__file__, file)
    monkeypatch.setattr(made_by, "__file__", str(file))
    commit.cache_clear()
    yield tmp_path
    commit.cache_clear()


def git(folder: Path, *arguments: str) -> str:
    own = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(folder), *own, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_no_checkout_has_no_commit(checkout: Path) -> None:
    assert commit() is None


def test_a_package_installed_inside_somebodys_checkout_has_none(checkout: Path) -> None:
    git(checkout.parent, "init", "-q")
    try:
        git(checkout.parent, "commit", "-q", "--allow-empty", "-m", "a")
        assert commit() is None
    finally:
        shutil.rmtree(checkout.parent / ".git")


@pytest.mark.parametrize("change", [None, "edited", "new"])
def test_the_commit_and_changes_of_the_code(checkout: Path, change: str | None) -> None:
    git(checkout, "init", "-q")
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "a")
    (checkout / "notes.txt").write_text("no code")
    if change is not None:
        name = {"edited": "record/made_by.py", "new": "more.py"}[change]
        (checkout / "trainer" / name).write_text("# changed")
    found = commit()
    assert found == (git(checkout, "rev-parse", "HEAD"), change is not None)
    assert str(found).endswith("not committed") == (change is not None)
    git(checkout, "commit", "-q", "--allow-empty", "-m", "later")
    assert commit() is found  # a run keeps the commit that it began with


@pytest.mark.parametrize(
    ("arguments", "world_size", "wanted"),
    [
        (
            ["trainer/main.py", "--local_rank=0", "--ds_config", "a b.json"],
            1,
            "python trainer/main.py --ds_config 'a b.json'",
        ),
        (["trainer/main.py", "--ds_config", "a"], 3, "deepspeed --num_gpus 3 trainer/main.py --ds_config a"),
        (["/home/x/trainer/main.py", "--ds_config", "a"], 1, "python -m trainer.main --ds_config a"),
        (["/x/trainer/main.py", "--epochs", "2"], 2, "deepspeed --num_gpus 2 --module trainer.main --epochs 2"),
        (["/x/bin/strong-scaling-trainer", "train", "a.json"], 2, "strong-scaling-trainer train a.json"),
        (["/x/trainer/__main__.py", "train", "a.json"], 1, "python -m trainer train a.json"),
    ],
)
def test_how_a_run_is_started_again(arguments: list[str], world_size: int, wanted: str) -> None:
    assert command(arguments, world_size) == wanted


def test_a_run_is_made_again_in_a_new_folder() -> None:
    flags = "--resume auto --seed 3 --output_dir=runs/a --allow_changed_config --output_dir runs/b --local_rank 0 -x 2"
    assert command(["main.py", *flags.split()], 1) == "python main.py --seed 3 -x 2"


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("trainer.task_options.token=abc", "trainer.task_options.token=..."),
        ("trainer.task_options.hub_token=abc", "trainer.task_options.hub_token=..."),
        ('trainer.task_options={"api_key": "abc", "width": 3}', 'trainer.task_options={"api_key": "...", "width": 3}'),
        ("trainer.task_options.data=https://me:abc@host/x.csv", "trainer.task_options.data=https://...@host/x.csv"),
        ("trainer.task_options.tokenizer=words", "trainer.task_options.tokenizer=words"),
        ("trainer.task_options.max_new_tokens=5", "trainer.task_options.max_new_tokens=5"),
        ('trainer.task_options={"width":3}', 'trainer.task_options={"width":3}'),
    ],
)
def test_secrets_are_left_out(word: str, wanted: str) -> None:
    assert shlex.split(command(["main.py", "--set", word], 1))[-1] == wanted


def test_secrets_in_a_config() -> None:
    values = {"a": [{"password": "x", "tokenizer": "words", "secret": None}], "b": "s3://k:x@bucket", "n": 1}
    assert without_secrets(values) == {
        "a": [{"password": "...", "tokenizer": "words", "secret": None}], "b": "s3://...@bucket", "n": 1,
    }  # fmt: skip
