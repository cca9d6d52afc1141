"""Saves a model of grey images as a model of colour images, because pipelines of transformers convert every image."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .pretrained import quiet

# The shares of red, green and blue in grey (ITU-R BT.601). Pillow makes grey images with them.
_SHARES = (0.299, 0.587, 0.114)


def save(model: nn.Module, folder: Path) -> int:
    """Writes what AutoModelForImageClassification reads. Returns the channels that the saved model takes.

    A model of one channel is saved with three. Each weight of its first layer is divided among them. So for a colour
    image it computes what it has learnt for the grey one, up to rounding.
    """
    config: Any = model.config
    channels = int(getattr(config, "num_channels", 0) or 3)
    state = _of_three_channels(model) if channels == 1 else None
    whole: Any = model
    if state is not None:
        whole, channels = copy.copy(model), 3  # a shallow copy: its weights are given below
        whole.config = copy.deepcopy(config)
        whole.config.num_channels = 3
    with quiet():
        whole.save_pretrained(str(folder), state_dict=state)
    return channels


def _of_three_channels(model: Any) -> dict[str, Tensor] | None:
    """A grey model's weights as those of a model with three channels; None if its layers do not allow that."""
    config = copy.deepcopy(model.config)
    config.num_channels = 3
    state = dict(model.state_dict())
    with torch.device("meta"), quiet():
        wanted = type(model)(config).state_dict()
    other = [name for name, tensor in wanted.items() if name not in state or state[name].shape != tensor.shape]
    if len(other) != 1 or len(wanted) != len(state) or other[0] not in state:
        return None
    # One weight differs, in its channels: this is the first layer. Otherwise the model is saved as it is.
    one, three = state[other[0]], wanted[other[0]]
    places = [place for place in range(one.ndim) if one.shape[place] == 1 and three.shape[place] == 3]
    if len(places) != 1 or one.repeat_interleave(3, places[0]).shape != three.shape:
        return None
    shares = torch.tensor(_SHARES, dtype=torch.float64, device=one.device)
    shares = shares.view([3 if place == places[0] else 1 for place in range(one.ndim)])
    return state | {other[0]: (one.double() * shares).to(one.dtype)}
