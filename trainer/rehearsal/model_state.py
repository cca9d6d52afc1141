"""The tensors that a step depends on: saved before a rehearsal, compared and restored after it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..exact.checks.hashes import hash_each

if TYPE_CHECKING:
    from ..engine.deepspeed_engine import Engine


class ModelState:
    """A model's parameters, buffers and optimizer state, saved when this object is made.

    Args:
        engine: holds them.
        whole: whether this rank holds all of them. With ZeRO it does not. Then only the model's buffers are saved, but
            not the running statistics: these are updated in the order of the micro-batches.
    """

    def __init__(self, engine: Engine, whole: bool) -> None:
        self._engine, self._whole = engine, whole
        self._tensors = self._now()
        self._hashes = hash_each(self._tensors)
        # On the host, because a GPU may not have enough memory for two copies.
        self._copies = {
            name: tensor.detach().to("cpu", copy=True)
            for name, tensor in self._tensors.items()
            if not name.startswith("optimizer ")
        }
        # Buffers, hooks and children. Parameters only without ZeRO: at stage 3 DeepSpeed replaces that dictionary.
        kept = [name for name, value in vars(nn.Module()).items() if isinstance(value, dict) and name != "_parameters"]
        kept += ["_parameters"] if whole else []
        self._objects: list[tuple[Any, dict[Any, Any]]] = [
            (own, dict(own)) for module in engine.model.modules() for own in (getattr(module, name) for name in kept)
        ]

    def _now(self) -> dict[str, Tensor]:
        return self._engine.state() if self._whole else _unordered_buffers(self._engine.model)

    def put_back_parameters(self) -> None:
        """Restores the parameters that are trained."""
        with torch.no_grad():
            for parameter, name in self._engine.names.items():
                parameter.copy_(self._copies[f"parameter {name}"])

    def put_back(self) -> list[tuple[str, str]]:
        """Restores parameters and buffers.

        Returns:
            What had been changed, added or removed: ("parameter", "buffer" or "optimizer", name). The optimizer's
            state is not restored.
        """
        now = self._now()
        hashes = hash_each(now)
        for names, objects in self._objects:
            # A forward may also assign a new tensor, as in `self.average = 0.9 * self.average + ...`.
            names.clear()
            names.update(objects)
        changed = []
        for called in [*self._tensors, *(name for name in now if name not in self._tensors)]:
            if hashes.get(called) == self._hashes.get(called):
                continue
            kind, _, name = called.partition(" ")
            if called in self._copies:
                with torch.no_grad():
                    self._tensors[called].copy_(self._copies[called])
            changed.append((kind, name))
        return changed


def _unordered_buffers(model: nn.Module) -> dict[str, Tensor]:
    ordered = {id(b) for m in model.modules() if isinstance(m, _NormBase) for b in m.buffers(recurse=False)}
    return {f"buffer {n}": b for n, b in model.named_buffers() if id(b) not in ordered}
