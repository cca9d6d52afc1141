"""Models that predict a standardised number: saved with outputs in units, and loaded as they were trained.

Such a model is trained on z = (y - mean) / deviation. Pipelines of transformers show what the last layer gives. So the
model is saved with this layer turned into units: weight x deviation, bias x deviation + mean. This rounds. So the layer
as it was trained is saved beside it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError
from .preparation import Numeric
from .pretrained import OPTION

# The last layer as it was trained, and the mean and deviation of the numbers.
FILE = "standardised_head.safetensors"


def _head(model: nn.Module) -> nn.Linear | None:
    """The last linear layer with one output; None if there is none, or it has no bias, which the mean needs."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1]
    return layers[-1] if layers and layers[-1].bias is not None else None


def check(model: nn.Module, inputs: Mapping[str, Tensor], logits: Tensor) -> None:
    """Raises UserError if a model's last layer cannot be turned into units.

    Args:
        model: on the CPU, in training mode before and afterwards.
        inputs: what its forward takes.
        logits: what it gives for them in evaluation mode.
    """
    head, found = _head(model), False
    if head is not None:
        # With mean 1 and deviation 2, a model that ends with this layer gives 2 z + 1.
        model.eval()
        with torch.random.fork_rng(devices=[]), torch.no_grad(), in_units(model, Numeric("", 1.0, 2.0)):
            found = torch.allclose(model(**inputs).logits, 2 * logits + 1, rtol=1e-3, atol=1e-3)
        model.train()
    if not found:
        raise UserError(
            f"{OPTION}: a {getattr(model.config, 'model_type', 'model')} does not end with a linear layer with a bias, "
            "which is needed to give numbers in their units. Take another one, such as bert for texts or resnet for "
            "images."
        )


@contextlib.contextmanager
def in_units(model: nn.Module, target: Numeric) -> Iterator[None]:
    """Within it, a model of z gives mean + deviation x z, up to rounding. Afterwards it is as before, bit for bit."""
    head = _head(model)
    assert head is not None, "checked when the model was built"
    with torch.no_grad():
        before = {"weight": head.weight.clone(), "bias": head.bias.clone()}
        try:
            head.weight.copy_(before["weight"].double() * target.deviation)
            head.bias.copy_(before["bias"].double() * target.deviation + target.mean)
            yield
        finally:
            head.weight.copy_(before["weight"])
            head.bias.copy_(before["bias"])


@contextlib.contextmanager
def saved(model: nn.Module, target: Numeric | None, folder: Path) -> Iterator[None]:
    """Within it a model is saved into a folder: in units, with the layer as it was trained beside it.

    Without a target, nothing is done.
    """
    if target is None:
        yield
        return
    from safetensors.torch import save_file

    with in_units(model, target):
        yield
    head = _head(model)
    assert head is not None
    tensors = {"weight": head.weight.detach().cpu().clone(), "bias": head.bias.detach().cpu().clone()}
    numbers = {"mean": target.mean, "deviation": target.deviation}
    save_file(tensors | {n: torch.tensor(v, dtype=torch.float64) for n, v in numbers.items()}, str(folder / FILE))


def restore(model: nn.Module, folder: Path) -> Numeric:
    """Gives a loaded model the last layer as it was trained. Returns mean and deviation. Raises UserError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file, head = folder / FILE, _head(model)
    try:
        found = load_file(str(file))
        assert head is not None
        with torch.no_grad():
            for parameter, name in ((head.weight, "weight"), (head.bias, "bias")):
                assert found[name].shape == parameter.shape
                parameter.copy_(found[name])
        return Numeric("", float(found["mean"]), float(found["deviation"]))
    except (OSError, SafetensorError, RuntimeError, AssertionError, KeyError) as error:
        raise UserError(
            f"{file} cannot be used with the model beside it. It holds the last layer as it was trained, and the units."
        ) from error
