"""Bad input ends in one readable message, exit code 2, no traceback and nothing left behind.

Here in one process or in forked ranks; test_end_to_end.py has the same under the real launcher.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.jobs import ROOT, USER_TASKS, small_config, train
from trainer.errors import UserError
from trainer.main import main
from trainer.ranks.workers import run_ranks

BAD = f"{USER_TASKS}/bad_tasks.py"
STRONG = ROOT / "ds_configs" / "strong.json"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a command that must be refused."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("error:") == 1
    assert "Traceback" not in captured.err + captured.out
    return captured.err


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def config_file(tmp_path: Path) -> Any:
    def write(change: dict[str, Any] | None = None, text: str | None = None) -> str:
        values = json.loads(STRONG.read_text()) | (change or {})
        path = tmp_path / "config.json"
        path.write_text(json.dumps(values) if text is None else text)
        return str(path)

    return write


def nothing_left(tmp_path: Path) -> bool:
    return {p.name for p in tmp_path.iterdir()} <= {"config.json", "taken"}


def test_files(capsys: pytest.CaptureFixture[str], config_file: Any, tmp_path: Path) -> None:
    assert "missing.json does not exist" in refused(capsys, "--ds_config", "missing.json")
    broken = config_file(text='{\n  "train_batch_size": 4,\n  "optimizer": {,}\n}')
    assert "line 3, column 17" in refused(capsys, "--ds_config", broken)
    assert nothing_left(tmp_path)


def test_keys_types_and_contradictions(capsys: pytest.CaptureFixture[str], config_file: Any, tmp_path: Path) -> None:
    wrong = config_file({"gradient_cliping": 1.0})
    assert 'Did you mean "gradient_clipping"?' in refused(capsys, "--ds_config", wrong)
    strong = config_file()
    assert '"trainer.epochs" must be a whole number, not "ten"' in refused(
        capsys, "--ds_config", strong, "--set", "trainer.epochs=ten"
    )
    message = refused(capsys, "--ds_config", strong, "--set", "gradient_accumulation_steps=4")
    assert "train_batch_size (256) is not" in message
    assert "= 32" in message
    assert "unknown optimizer" in refused(capsys, "--ds_config", strong, "--set", 'optimizer={"type":"AdamZ"}')
    message = refused(
        capsys, "--ds_config", strong, "--set", 'optimizer={"type":"SGD","params":{"lr":0.1,"momentun":0.9}}'
    )
    assert 'Did you mean "momentum"?' in message
    assert "unrecognized arguments" in refused(capsys, "--ds_config", strong, "--epoch", "3")
    assert nothing_left(tmp_path)


def test_more_ranks_than_micro_batches(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, config_file: Any, tmp_path: Path
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "64", "LOCAL_RANK": "0", "LOCAL_SIZE": "64"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("trainer.ranks.speech.time.sleep", lambda seconds: None)
    message = refused(capsys, "--ds_config", config_file())
    assert "64 ranks are more than the 32 micro-batches" in message
    assert "at most 32 ranks" in message
    assert "train_micro_batch_size_per_gpu=4" in message
    assert nothing_left(tmp_path)


def test_tasks_and_devices(capsys: pytest.CaptureFixture[str], config_file: Any, tmp_path: Path) -> None:
    strong = config_file()
    assert 'Did you mean "digits"?' in refused(capsys, "--ds_config", strong, "--task", "digit")
    assert "does not exist" in refused(capsys, "--ds_config", strong, "--task", "nowhere/task.py:Task")
    assert "has no class Mytask. Did you mean" in refused(
        capsys, "--ds_config", strong, "--task", f"{USER_TASKS}/my_task.py:Mytask", "--set", "trainer.task_options={}"
    )
    message = refused(capsys, "--ds_config", strong, "--set", "trainer.task_options.modle=cnn")
    assert 'Did you mean "model"?' in message
    assert "lacks forward()" in refused(
        capsys, "--ds_config", strong, "--task", f"{BAD}:NoForward", "--set", "trainer.task_options={}"
    )
    assert "finds no GPU" in refused(capsys, "--ds_config", strong, "--set", "trainer.device=cuda")
    assert nothing_left(tmp_path)


def test_output_folders(capsys: pytest.CaptureFixture[str], config_file: Any, tmp_path: Path) -> None:
    strong = config_file()
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "summary.json").write_text("{}")
    message = refused(capsys, "--ds_config", strong, "--output_dir", str(taken))
    assert "taken holds summary.json" in message and "never overwritten" in message
    message = refused(capsys, "--ds_config", strong, "--output_dir", str(taken / "summary.json" / "below"))
    assert "cannot be written" in message
    assert [p.name for p in taken.iterdir()] == ["summary.json"]
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("MeanLoss", ["MeanLoss.loss()", "scalar", "shape (8,)"]),
        ("NoCount", ["two things", "(summed loss, count)"]),
        ("WrongCount", ["counted 1", "add up to 8"]),
        ("CountTensor", ["the count a number", "shape (3,)"]),
        ("DetachedLoss", ["without a graph"]),
        ("InfiniteAtOnce", ["first step", "finite"]),
        ("OutputsOneNumber", ["output 'mean' of shape ()", "one row a sample"]),
        ("EmptySplit", ['splits()["train"] is empty']),
        ("RaggedSplit", ["x: 7, y: 5"]),
    ],
)
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_users_task_that_cannot_be_right(tmp_path: Path, task: str, words: list[str], world_size: int) -> None:
    config = small_config(tmp_path / "run", task=f"{BAD}:{task}")
    with pytest.raises(UserError) as caught:
        run_ranks(train, world_size, config)
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_global_batch_larger_than_the_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="global batch of 600 samples is larger than the training set of 500"):
        run_ranks(train, 1, small_config(tmp_path / "run", train_batch_size=600))
    weak = small_config(tmp_path / "run", train_batch_size=None, gradient_accumulation_steps=32)
    with pytest.raises(UserError, match=r"(?s)weak scaling on 2 ranks\).*at most 1 ranks"):
        run_ranks(train, 2, weak)


def test_a_micro_batch_of_one_sample_has_no_variance(tmp_path: Path) -> None:
    """500 = 499 + 1: the last batch of the epoch is one sample, and the user's model has BatchNorm1d."""
    with pytest.raises(UserError, match=r"(?s)one sample has no variance.*drop_last"):
        run_ranks(train, 1, small_config(tmp_path / "run", train_batch_size=499))
    dropped = small_config(tmp_path / "dropped", train_batch_size=499, drop_last=True, epochs=1)
    assert run_ranks(train, 1, dropped)[0]["steps"] == 1
