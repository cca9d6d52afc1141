"""The model that a run leaves: its weights, and what made them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.run.small import Task, config_of, pieces_of
from trainer.record.folder import ORIGIN, RAW, OutputFolder
from trainer.run.saving import save_model


def folder_of(path: Path) -> OutputFolder:
    return OutputFolder.claim(str(path / "run"), "test")


def test_the_weights_load_into_the_tasks_model(tmp_path: Path) -> None:
    pieces = pieces_of(config_of(task_options={"width": 3}))
    with torch.no_grad():
        for parameter in pieces.engine.model.parameters():
            parameter.add_(1.0)
    save_model(pieces, folder_of(tmp_path))
    again = Task().model()
    again.load_state_dict(load_file(tmp_path / "run" / "model" / "model.safetensors"))
    state = pieces.engine.model_state()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert json.loads((tmp_path / "run" / "model" / ORIGIN).read_text()) == {
        "task": "mine.py:Task", "task_options": {"width": 3}, "files": ["model.safetensors"],
    }  # fmt: skip
    assert not (tmp_path / "run" / "adapter").exists()


def test_the_code_of_ones_own_task_can_be_found_again(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("class Task: ...\n")
    save_model(pieces_of(config_of(task=f"{tmp_path}/mine.py:Task")), folder_of(tmp_path))
    origin = json.loads((tmp_path / "run" / "model" / ORIGIN).read_text())
    assert origin["task_file"] == str(tmp_path / "mine.py")
    assert origin["task_sha256"] == hashlib.sha256(b"class Task: ...\n").hexdigest()


def test_a_task_may_save_in_its_own_way(tmp_path: Path) -> None:
    class Own(Task):
        def save(self, model: nn.Module, folder: Path) -> None:
            (folder / "mine.txt").write_text(type(model).__name__)

    save_model(pieces_of(config_of(), Own()), folder_of(tmp_path))
    model = tmp_path / "run" / "model"
    assert sorted(file.name for file in model.iterdir()) == ["mine.txt", ORIGIN]
    assert (model / "mine.txt").read_text() == "Sequential"


def test_a_model_that_cannot_be_saved_leaves_the_one_before(tmp_path: Path) -> None:
    folder, pieces = folder_of(tmp_path), pieces_of(config_of())
    save_model(pieces, folder)
    before = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()

    class Fails(Task):
        def save(self, model: nn.Module, folder: Path) -> None:
            (folder / "half.txt").write_text("half")
            raise OSError(28, "no space")

    with pytest.raises(OSError, match="no space"):
        save_model(pieces_of(config_of(), Fails()), folder)
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == before
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["model", RAW]


def test_what_fails_in_saving_is_said_and_the_weights_are_there_as_they_are(tmp_path: Path) -> None:
    class Fails(Task):
        def save(self, model: nn.Module, folder: Path) -> None:
            raise ValueError("GenerationConfig is invalid:\nmore")

    pieces = pieces_of(config_of(), Fails())
    problem = save_model(pieces, folder_of(tmp_path))
    assert problem == "The model could not be saved in its own format: ValueError: GenerationConfig is invalid:"
    saved = load_file(tmp_path / "run" / RAW)
    state = pieces.engine.model_state()
    assert set(saved) == set(state)
    assert all(torch.equal(saved[name], tensor) for name, tensor in state.items())
    assert not (tmp_path / "run" / "model").exists()


def test_low_rank_updates_are_merged_and_saved_beside_the_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the extra lora is not installed")
    pieces = pieces_of(config_of())
    plain = {name: tensor.clone() for name, tensor in pieces.engine.model_state().items()}
    adapted = peft.get_peft_model(pieces.engine.model, peft.LoraConfig(r=1, target_modules=["0"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1.0)
    pieces.engine.model = adapted
    save_model(pieces, folder_of(tmp_path))
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert set(saved) == set(plain)
    assert {name for name in plain if not torch.equal(saved[name], plain[name])} == {"0.weight"}
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
