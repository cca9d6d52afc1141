"""By which rule each layer of a pack is computed: the fastest that a trial has found to be exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .findings import ALONE, Findings
from .layers import Layer, Rule, Site
from .leaves import Leaves
from .shares import Shares
from .streams import Streams
from .tensors import Tensors
from .values import start_of
from .verdicts import RefusedError, out_of_memory


class Sites:
    """The layers of one pack.

    Attributes:
        g: micro-batches in the pack.
        leaves: takes the gradients.

    Args:
        g, leaves: as above.
        tensors: what each tensor is.
        shares: counts the uses of parameters.
        streams: random numbers. What is drawn here belongs to no micro-batch.
        findings: which rules are exact. A trial adds to it.
        checks: whether this is a trial.
    """

    def __init__(
        self,
        g: int,
        leaves: Leaves,
        *,
        tensors: Tensors,
        shares: Shares,
        streams: Streams,
        findings: Findings,
        checks: bool,
    ) -> None:
        self.g, self.leaves, self._checks = g, leaves, checks
        self._tensors, self._shares, self._streams, self._findings = tensors, shares, streams, findings

    def layer(
        self,
        rules: Sequence[Rule],
        name: str,
        call: Callable[..., Tensor],
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        casts: bool = True,
        **options: Any,
    ) -> Any:
        """A layer by one of its rules; NotImplemented where it has to be computed one micro-batch at a time."""
        places = [None if p is None else self._tensors.place(p) for p in (weight, bias)]
        key = (name, self.g, *places, tuple(x.shape), x.stride(), start_of(x))
        chosen = self._findings.sites.get(key, len(rules) - 1 if self._checks else ALONE)
        if chosen == ALONE or not torch.is_grad_enabled():
            return NotImplemented
        tensors = [x, weight, bias]
        if casts and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            # The casts are made here, so that the backward gets the same tensors as the forward.
            tensors = [t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors]
        sites = [Site(self, rule, call, key, *places, **options) for rule in rules]
        if self._checks and key not in self._findings.sites:
            with torch.no_grad(), self._streams.aside():
                chosen = self._fastest(sites, tensors)
            self._findings.sites[key] = chosen
            if chosen == ALONE:
                return NotImplemented
        site = sites[chosen]
        for place in places:
            if place is not None:
                self.leaves.expect(place)
                self._shares.note_low_use(place, alone=False)
        return Layer.apply(site, *tensors)

    def shared(
        self, rules: Sequence[Rule], name: str, call: Callable[..., Tensor], x: Tensor, weight: Tensor, **options: Any
    ) -> Site | None:
        """A layer of what all micro-batches share, (1, ...); None where its gradients are made one at a time."""
        place = self._tensors.place(weight)
        key = (name, "shared", self.g, place, tuple(x.shape))
        sites = [Site(self, rule, call, key, place, None, **options) for rule in rules]
        if self._checks and key not in self._findings.sites:
            with torch.no_grad(), self._streams.aside():
                own = x.expand(self.g, *x.shape[1:]).contiguous()
                self._findings.sites[key] = self._fastest(sites, [own, weight, None])
        chosen = self._findings.sites.get(key, ALONE)
        return None if chosen == ALONE else sites[chosen]

    def set_alone(self, site: Site) -> NoReturn:
        """Gives up a rule that does not fit the gradient: its layer is computed one micro-batch at a time then."""
        if self._checks:
            self._findings.sites[site.key] = ALONE
        name = site.key[0]
        raise RefusedError(f"{name} gets a gradient that lies in memory in another way", untried=not self._checks)

    def holds(self, site: Site, grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
        """Whether a rule is exact for a gradient that does not lie in memory as the layer's output does."""
        key = (*site.key, "gradient", grad.stride())
        if key not in self._findings.sites:
            if not self._checks:
                return False
            with torch.no_grad(), self._streams.aside():
                self._findings.sites[key] = ALONE if site.differs(x, weight, bias, like=grad) else 0
        return self._findings.sites[key] != ALONE

    @staticmethod
    def _fastest(sites: list[Site], tensors: list[Any]) -> int:
        """The place of the fastest rule that is exact; ALONE if none is."""
        places = list(range(len(sites)))
        if len(places) > 1:  # comparing takes longer than timing
            times_s = [site.backward_s(*tensors) for site in sites]
            # The first has the fewest operators, so it wins if the clock does not clearly say otherwise.
            places.sort(key=lambda place: (times_s[place] >= 1.2 * min(times_s), place))
        return next((place for place in places if _is_exact(sites[place], tensors)), ALONE)


def _is_exact(site: Site, tensors: list[Any]) -> bool:
    try:
        return not site.differs(*tensors)
    except RuntimeError as error:  # a device may have no such kernel
        if out_of_memory(error):
            raise
        return False
