"""Weights that a task loads, and files that are none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from trainer.errors import UserError
from trainer.tasks.weights import load_weights


def test_weights_are_loaded_into_memory_of_the_models_own(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    own = model.weight.data_ptr()
    save_file({"weight": torch.ones(1, 2), "bias": torch.zeros(1)}, tmp_path / "w.safetensors")
    assert load_weights(model, tmp_path / "w.safetensors") is model
    assert model.weight.tolist() == [[1.0, 1.0]] and model.weight.data_ptr() == own


@pytest.mark.parametrize("content", [None, b"no tensors", "another model"])
def test_a_file_of_anything_else_is_named(tmp_path: Path, content: bytes | str | None) -> None:
    file = tmp_path / "w.safetensors"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        save_file({"weight": torch.ones(3, 2)}, file)
    with pytest.raises(UserError, match=r"w\.safetensors cannot be loaded: "):
        load_weights(nn.Linear(2, 1), file)
