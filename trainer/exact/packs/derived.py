"""What follows from trained parameters alone, as a tied or a normalised weight: a parameter of its own in a pack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .layers import name_of
from .leaves import Leaves
from .nested import mapped, parts
from .tensors import Tensors
from .values import LOW_PRECISION
from .verdicts import RefusedError


class Derived:
    """Tensors that follow from trained parameters alone.

    A micro-batch's gradient of such a tensor comes first, and is passed on to the parameters in the end.

    Args:
        tensors: what each tensor is.
        leaves: takes the gradients.
    """

    def __init__(self, tensors: Tensors, leaves: Leaves) -> None:
        self._tensors, self._leaves = tensors, leaves
        self.pairs: list[tuple[Tensor, Tensor]] = []  # with its graph; without

    @property
    def inputs(self) -> list[Tensor]:
        """Those to which the backward of a pack leads."""
        return [leaf for _, leaf in self.pairs]

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], used: set[int]) -> Any:
        """A function of trained parameters alone."""
        graphs = self._graphs((args, kwargs))
        found = func(*graphs[0], **graphs[1])
        if not isinstance(found, Tensor):
            if isinstance(found, (list, tuple)) and any(isinstance(f, Tensor) and f.requires_grad for f in found):
                self._leaves.hold({i for i in used if i >= 0})
                return type(found)(self._derive(f) if isinstance(f, Tensor) and f.requires_grad else f for f in found)
            return found
        if not found.requires_grad:
            return found
        if self._touches_graph((args, kwargs)):
            raise RefusedError(f"{name_of(func)} with parameters", tuple(i for i in used if i >= 0))
        self._leaves.hold({i for i in used if i >= 0})
        return self._derive(found)

    def _derive(self, graph: Tensor) -> Tensor:
        """Makes what follows from parameters alone a parameter of its own, whose gradients are passed on in the end."""
        if graph.dtype != torch.float32 and graph.dtype not in LOW_PRECISION:
            raise RefusedError(f"what follows from parameters alone is {graph.dtype}")
        leaf = graph.detach().requires_grad_()
        self.pairs.append((graph, leaf))
        self._tensors.derived[id(leaf)] = -len(self.pairs)
        self._leaves.expect_shape(-len(self.pairs), leaf)
        return leaf

    def _graphs(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            place = self._tensors.derived.get(id(value))
            return value if place is None else self.pairs[-place - 1][0]
        return mapped(value, self._graphs)

    def _touches_graph(self, value: Any) -> bool:
        """Whether a tensor that follows from samples and parameters is among the arguments."""
        if isinstance(value, Tensor):
            return value.requires_grad and self._tensors.place(value) is None
        return any(self._touches_graph(v) for v in parts(value))

    def pass_on(self, trained: Sequence[Tensor]) -> None:
        """After the backward: passes the gradients that came on to the parameters, `trained`."""
        for number, (graph, _) in reversed(list(enumerate(self.pairs, start=1))):
            rows = self._leaves.of(-number)
            for k, row in enumerate(rows or []):
                if row is None:
                    continue
                found = torch.autograd.grad(graph, trained, row, retain_graph=True, allow_unused=True)
                for place, gradient in enumerate(found):
                    if gradient is not None:
                        self._leaves.put_one(place, k, gradient)

    def close(self) -> None:
        """Lets go of all graphs."""
        self.pairs.clear()
