"""`evaluate` gives the numbers of the run, and `predict` the rows of the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.commands.test_predict import ROWS, TASK
from tests.distributed.jobs import USER_TASKS, small_config, train
from trainer import Result, UserError, evaluate, predict
from trainer.ranks.workers import run_ranks


def test_a_saved_model_is_worth_what_its_run_has_measured(tmp_path: Path) -> None:
    """Bit for bit, in whatever precision: with the run's seed, micro-batches and autocast."""
    config = small_config(tmp_path / "run", torch_autocast={"enabled": True}, evaluate_micro_batch_size=32, max_steps=4)
    measured = run_ranks(train, 1, config)[0]["metrics"]["test"]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert evaluate(tmp_path / "run") == measured
        assert evaluate(Result.read(tmp_path / "run"), "train") != measured
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    from tests.user_tasks.my_task import MyTask

    data = MyTask().splits()["test"]
    assert evaluate(tmp_path / "run" / "model", data) == measured
    assert evaluate(tmp_path / "run", {name: array.numpy()[:50] for name, array in data.items()}) != measured
    # A model's folder that lies alone knows neither the run's precision, nor the code of a user's task.
    shutil.copytree(tmp_path / "run" / "model", tmp_path / "alone")
    with pytest.raises(UserError, match=r"Add task='path/to/file.py:ClassName'\."):
        evaluate(tmp_path / "alone")
    alone = evaluate(tmp_path / "alone", task=f"{USER_TASKS}/my_task.py:MyTask")
    assert alone != measured and alone["loss"] == pytest.approx(measured["loss"], rel=0.01)
    with pytest.raises(UserError, match=r'has no split "validation"\. It has: train, test\.'):
        evaluate(tmp_path / "run", "validation")
    with pytest.raises(UserError, match="must be a tensor or an array of numbers"):
        evaluate(tmp_path / "run", {"x": [1, 2]})
    with pytest.raises(UserError, match=r"loss\(\) of .*:MyTask has raised KeyError: 'y'\. .* only the arrays x\.$"):
        evaluate(tmp_path / "run", {"x": data["x"]})
    result = Result.read(tmp_path / "run")
    with pytest.raises(UserError, match=r"^device='nowhere' cannot be used: "):
        result.model("nowhere")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"^device='cuda', but torch finds no GPU on this machine\.$"):
            result.model("cuda")
    assert not result.model().training


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's folder, beside the code of its task and an input of three numbers."""
    (tmp_path / "tasks.py").write_text(TASK)
    (tmp_path / "in.txt").write_text("1\n2\n3\n")
    (tmp_path / "model").mkdir()
    save_file({"0.weight": torch.tensor([[10.0]])}, tmp_path / "model" / "model.safetensors")
    origin = {"task": "elsewhere/tasks.py:Doubles", "task_options": {"scale": 3.0}}
    (tmp_path / "model" / "trainer.json").write_text(json.dumps(origin))
    return tmp_path / "model"


def test_predictions_are_the_rows_of_the_command(model: Path) -> None:
    task = f"{model.parent}/tasks.py:Doubles"
    assert predict(model, model.parent / "in.txt", task=task, batch_size=2) == ROWS
    assert predict(str(model), str(model.parent / "in.txt"), task=task, batch_size=1)[2] == {**ROWS[2], "of": 1}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"model": "nowhere"}, "model='nowhere' holds no model of this trainer"),
        ({"model": 5}, "model is 5. Give a run's output folder, its Result, or a model's folder."),
        ({"data": "nowhere.txt"}, "nowhere.txt does not exist (looked from "),
        ({"data": [1]}, "data is of the type list. Give the path of a file, or of a folder."),
        ({"batch_size": 0}, "batch_size is 0. It must be a whole number of at least 1."),
        ({"device": "gpu"}, 'device is \'gpu\'. It must be "auto", "cpu" or "cuda".'),
        ({"task": 5}, 'task is 5. Give a name such as "digits", path/to/file.py:ClassName, or a class.'),
        ({"device": "cuda"}, "device='cuda', but torch finds no GPU on this machine."),
        ({"task": "tasks.py:Mute"}, "has no method predict(), so it cannot predict on new data."),
    ],
)
def test_what_cannot_be_predicted(
    model: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, object], words: str
) -> None:
    monkeypatch.chdir(model.parent)
    arguments = {"model": model, "data": "in.txt", "task": "tasks.py:Doubles"} | given
    with pytest.raises(UserError) as caught:
        predict(**arguments)  # type: ignore[arg-type]
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"device": "gpu"}, 'device is \'gpu\'. It must be "auto", "cpu" or "cuda".'),
        ({"model": None}, "model is None. Give a run's output folder, its Result, or a model's folder."),
    ],
)
def test_what_cannot_be_evaluated(model: Path, given: dict[str, object], words: str) -> None:
    with pytest.raises(UserError) as caught:
        evaluate(**({"model": model} | given))  # type: ignore[arg-type]
    assert words in str(caught.value)
