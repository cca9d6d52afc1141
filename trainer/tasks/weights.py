"""Weights of a model that a task has saved."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..errors import UserError


def load_weights(model: nn.Module, file: Path) -> nn.Module:
    """Loads a safetensors file into a model. Raises UserError if it is missing, damaged, or of another model."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(str(file)))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{file} cannot be loaded: {reason[0]}") from error
    return model
