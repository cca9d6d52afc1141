"""Tensors that follow from trained parameters alone, as a normalised weight: a pack takes them for parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .independent import is_in_place
from .layers import Site, name_of
from .leaves import Leaves
from .nested import mapped, parts
from .tensors import Tensors
from .values import LOW_PRECISION
from .verdicts import RefusedError


class Pair(NamedTuple):
    """A tensor that follows from trained parameters alone.

    Attributes:
        graph, leaf: with its graph; without.
        roots: places of the parameters that it follows from.
        version: of its memory when it was made: another one later says that it has been changed in place.
        at_once: passes the gradients of all micro-batches on to its only root: (g, *shape) -> (g, *shape of the root).
            None if that has to be done one by one.
    """

    graph: Tensor
    leaf: Tensor
    roots: frozenset[int]
    version: int
    at_once: Callable[[Tensor], Tensor] | None


class Derived:
    """Tensors that follow from trained parameters alone.

    The backward of a pack ends at such a tensor, with one gradient a micro-batch. Afterwards these gradients are
    passed on to the parameters.

    Args:
        tensors: what each tensor is.
        leaves: takes the gradients.
    """

    def __init__(self, tensors: Tensors, leaves: Leaves) -> None:
        self._tensors, self._leaves = tensors, leaves
        self.pairs: list[Pair] = []

    @property
    def inputs(self) -> list[Tensor]:
        """Those to which the backward of a pack leads."""
        return [pair.leaf for pair in self.pairs]

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], used: set[int]) -> Any:
        """A function of trained parameters alone."""
        graphs = self._graphs((args, kwargs))
        found = func(*graphs[0], **graphs[1])
        if not isinstance(found, Tensor):
            if isinstance(found, (list, tuple)) and any(isinstance(f, Tensor) and f.requires_grad for f in found):
                roots = self._roots(used)
                return type(found)(
                    self._derive(f, roots) if isinstance(f, Tensor) and f.requires_grad else f for f in found
                )
            return found
        if not found.requires_grad:
            return found
        known = next((pair.leaf for pair in self.pairs if pair.graph is found), None)
        if known is not None and not is_in_place(func, kwargs):
            return known  # the function returned its argument, as `.to()` does if there is nothing to do
        if self._touches_graph((args, kwargs)):
            raise RefusedError(f"{name_of(func)} with parameters", tuple(i for i in used if i >= 0))
        return self._derive(found, self._roots(used))

    def looked_up(self, indices: Tensor, weight: Tensor, site: Site) -> Tensor:
        """What an embedding gives for indices that all micro-batches share, as positions.

        Args:
            indices: where to look.
            weight: the table, a parameter.
            site: of the same embedding with indices for each micro-batch, (g, *indices.shape).
        """
        table, x = site.weight, indices.expand(site.g, *indices.shape)
        assert table is not None

        def at_once(rows: Tensor) -> Tensor:
            gradient = site.rule.backward(site, rows, x, weight, None)[1]
            assert gradient is not None
            return gradient

        return self._derive(site.call(indices, weight, None), self._roots({table}), at_once)

    def _roots(self, used: set[int]) -> frozenset[int]:
        """The parameters from which arguments follow. They get gradients after the backward."""
        own = {i for i in used if i >= 0}
        self._leaves.hold(own)
        return frozenset(own).union(*(self.pairs[-i - 1].roots for i in used if i < 0))

    def _derive(
        self, graph: Tensor, roots: frozenset[int], at_once: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Makes a tensor that follows from parameters alone a parameter of its own, see `pass_on` for its gradients."""
        if graph.dtype != torch.float32 and graph.dtype not in LOW_PRECISION:
            raise RefusedError(f"what follows from parameters alone is {graph.dtype}")
        leaf = graph.detach().requires_grad_()
        self.pairs.append(Pair(graph, leaf, roots, graph._version, at_once))
        self._tensors.derived[id(leaf)] = -len(self.pairs)
        self._leaves.expect_shape(-len(self.pairs), leaf)
        return leaf

    def _graphs(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            place = self._tensors.derived.get(id(value))
            return value if place is None else self.pairs[-place - 1].graph
        return mapped(value, self._graphs)

    def _touches_graph(self, value: Any) -> bool:
        """Whether a tensor that follows from samples and parameters is among the arguments."""
        if isinstance(value, Tensor):
            return value.requires_grad and self._tensors.place(value) is None
        return any(self._touches_graph(v) for v in parts(value))

    def used_several_times(self) -> tuple[int, ...]:
        """After the losses: parameters from which several tensors follow that samples meet.

        Each passes its gradients on by itself. Autograd would first add gradients that meet on the way. That is another
        order, which shows only if they are not 0.
        """
        counts = Counter(
            place
            for number, pair in enumerate(self.pairs, start=1)
            if self._leaves.is_expected(-number)
            for place in pair.roots
        )
        return tuple(place for place, count in counts.items() if count > 1)

    def pass_on(self, trained: Sequence[Tensor]) -> None:
        """After the backward: passes the gradients that came on to the parameters, `trained`."""
        for number, pair in reversed(list(enumerate(self.pairs, start=1))):
            found = self._leaves.of(-number)
            if found is None:
                continue
            rows, present = found
            # Not if the tensor has been changed in place since: `at_once` knows the gradient of the lookup alone.
            if pair.at_once is not None and present is None and pair.graph._version == pair.version:
                (root,) = pair.roots
                self._leaves.put(root, pair.at_once(rows))
                continue
            for k, row in enumerate(rows):
                if present is not None and not present[k]:
                    continue
                # The graph is kept, because it is used once for each micro-batch.
                own = torch.autograd.grad(pair.graph, trained, row, retain_graph=True, allow_unused=True)
                for place, gradient in enumerate(own):
                    if gradient is not None:
                        self._leaves.put_one(place, k, gradient)

    def close(self) -> None:
        """Lets go of all graphs."""
        self.pairs.clear()
