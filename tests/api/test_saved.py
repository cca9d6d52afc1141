"""Which folder holds a model, and which code belongs to it: a folder from somebody else must not choose that."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from trainer.api import saved
from trainer.api.result import Result
from trainer.api.saved import argument, find, hosted_model
from trainer.errors import UserError

TASK = """
import torch
from torch import nn


class Mine:
    def __init__(self, scale: float = 1.0):
        self.scale = scale

    def splits(self):
        raise AssertionError("nobody needs the training data")

    def model(self):
        return nn.Linear(1, 1, bias=False)

    def forward(self, model, batch):
        return model(batch["x"])

    def loss(self, outputs, batch):
        return outputs.sum(), len(outputs)

    def metrics(self, outputs, batch):
        return {}

    def predict(self, model, source, batch_size):
        yield {"value": self.scale}
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The output folder of a run, and beside it the code of its task, as it was when the run began."""
    (tmp_path / "mine.py").write_text(TASK)
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "manifest.json").write_text("{}")
    save_file({"weight": torch.tensor([[10.0]])}, tmp_path / "run" / "model" / "model.safetensors")
    say_origin(tmp_path / "run")
    return tmp_path / "run"


def say_origin(run: Path, **changes: Any) -> None:
    code = run.parent / "mine.py"
    values = {"task": "mine.py:Mine", "task_options": {"scale": 3.0}, "task_file": str(code)}
    values |= {"task_sha256": hashlib.sha256(code.read_bytes()).hexdigest()} | changes
    (run / "model" / "trainer.json").write_text(json.dumps(values))


def refusal(run: Path, task: str | None = None, **how: Any) -> str:
    with pytest.raises(UserError) as caught:
        find(run, task, **how)
    return str(caught.value)


def test_the_folder_of_a_run_or_of_its_model_is_enough(run: Path) -> None:
    for folder in (run, run / "model"):
        found = find(folder, None)
        assert (found.folder, found.run, found.code) == (run / "model", run, run.parent)
        assert found.task_name == f"{run.parent}/mine.py:Mine"
    task, model = found.predictor("cpu")
    assert (task.scale, model.weight.item(), model.training) == (3.0, 10.0, False)  # type: ignore[attr-defined]


def test_code_that_has_changed_is_run_only_if_it_is_named(run: Path) -> None:
    code = run.parent / "mine.py"
    code.write_text(TASK + "\nraise SystemExit('it was run')\n")
    said = refusal(run)
    assert f"Its code in {code} has changed since the model was trained" in said
    assert said.endswith(f"add task='{code}:Mine'")
    assert find(run, f"{code}:Mine").task_name == f"{code}:Mine"


def test_code_inside_of_the_folder_is_never_run_unasked(run: Path) -> None:
    """Who sends a run's folder would choose which code runs here."""
    inside = run / "model" / "mine.py"
    inside.write_text(TASK)
    say_origin(run, task_file=str(inside))
    assert refusal(run, flags=True).endswith("is not there now. Add --task path/to/file.py:ClassName.")
    link = run.parent / "linked.py"
    link.symlink_to(inside)
    say_origin(run, task_file=str(link))
    assert "is not there now" in refusal(run)


def test_a_models_folder_that_lies_alone_names_no_code(run: Path) -> None:
    (run / "manifest.json").unlink()
    assert refusal(run) == (
        "This model belongs to a user's own task, mine.py:Mine. Add task='path/to/file.py:ClassName'."
    )
    assert find(run, "other.py:Mine").run is None


@pytest.mark.parametrize("changes", [{"task": None}, {"task": 5}, {"task_options": None}, {"task_options": [1]}])
def test_a_damaged_origin_is_named(run: Path, changes: dict[str, Any]) -> None:
    say_origin(run, **changes)
    assert refusal(run) == f"{run / 'model' / 'trainer.json'} is damaged: it must name a task and its options."


def test_a_ready_tasks_model_does_not_allow_code_from_a_hub(run: Path) -> None:
    """Its options come with the model, perhaps from somebody else."""
    say_origin(run, task="text_classification", task_options={"model": "x", "trust_remote_code": True})
    found = find(run, None)
    assert found.task_options == {"model": "x", "trust_remote_code": False}
    assert found.code is None


def test_a_folder_without_a_model_is_named_as_the_user_named_it(tmp_path: Path) -> None:
    assert refusal(tmp_path).startswith(f"model='{tmp_path}' holds no model of this trainer")
    assert refusal(tmp_path, flags=True).startswith(f"--model {tmp_path} holds no model of this trainer")
    assert argument("task", Path("a.py"), False) == "task='a.py'"


def test_each_call_loads_the_tasks_code_anew(run: Path) -> None:
    """As in a notebook, where the file is changed between two calls."""
    with hosted_model(run, None) as (found, _):
        assert found.task().scale == 3.0  # type: ignore[attr-defined]
    code = run.parent / "mine.py"
    code.write_text(TASK.replace("self.scale = scale", "self.scale = 2 * scale"))
    with hosted_model(run, f"{code}:Mine") as (found, _):
        assert found.task().scale == 6.0  # type: ignore[attr-defined]


def test_a_class_of_the_program_itself_comes_with_its_result(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook's class is in no file, so a saved model could not name it."""
    cls = type("Cell", (), {"__module__": "__main__"})
    monkeypatch.setattr(saved, "file_of", lambda task: None)
    with hosted_model(Result(run, {}, cls), None) as (found, _):
        assert found.task_name.endswith(":Cell")
