"""Whether a function is called once for all micro-batches of a pack: by its kind, and by comparing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .findings import ALONE, Findings, Key
from .independent import ARITHMETIC, MOVES, is_independent, plain_name, takes_sizes
from .layers import Join, name_of
from .nested import cloned, mapped, tensors_of
from .shares import Shares
from .streams import Streams
from .tensors import Tensors
from .values import (
    ENOUGH_VALUES,
    EVEN,
    LOW_PRECISION,
    MOST_DRAWS,
    ODD,
    cancelling_like,
    drawn_gradient,
    drawn_like,
    same_bits,
)


class Together:
    """In a trial: compares functions with themselves, called for one micro-batch at a time.

    Args:
        g: micro-batches in the pack.
        tensors: what each tensor is.
        shares: takes arguments apart.
        streams: random numbers. What is drawn here belongs to no micro-batch.
        findings: what differs is added to it.
        device_type: "cpu" or "cuda".
    """

    def __init__(
        self, g: int, tensors: Tensors, shares: Shares, streams: Streams, findings: Findings, device_type: str
    ) -> None:
        self._g, self._tensors, self._shares, self._streams = g, tensors, shares, streams
        self._findings, self._device_type = findings, device_type

    def may_be(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], scaled: frozenset[int]) -> bool:
        """Whether a function is called once for all micro-batches."""
        if scaled and not takes_sizes(func):
            return False
        if not is_independent(func, args, kwargs, self._tensors.has_part):
            return False
        key = self._function_key(func, args, kwargs)
        return key is None or not self._is_alone(key, func, args, kwargs)

    def _function_key(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Key | None:
        """Names a function of samples by its shapes; None for one that only looks at tensors or moves values."""
        name = name_of(func)
        if plain_name(func) in MOVES:
            return None
        tensors = list(tensors_of((args, kwargs)))
        if not any(t.is_floating_point() and self._tensors.has_part(t) for t in tensors):
            return None
        cast = torch.is_autocast_enabled(self._device_type)
        shapes = ((tuple(t.shape), t.stride()) for t in tensors)
        counts = plain_name(func) not in ARITHMETIC
        numbers = (*filter(_plain, args), *filter(_plain, kwargs.values())) if counts else ()
        return (name, self._g, *shapes, str(tensors[0].dtype), cast, numbers)

    def _is_alone(self, key: Key, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a function gives other bits for a pack, as has been found out now or before."""
        if key not in self._findings.checked:
            self._findings.checked.add(key)
            with self._streams.aside():
                if self._differs(func, args, kwargs):
                    self._findings.sites[key] = ALONE
        return key in self._findings.sites

    def _differs(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a function gives other bits for a pack than one micro-batch at a time, of random values."""
        wide = self._widened((args, kwargs))
        if wide is not None:  # in float32 another order shows, which low precision would hide: as in `Site.differs`
            with torch.autocast(self._device_type, enabled=False):
                if self._differs(func, *wide):
                    return True
        compared = 0
        # The gradient's last dimension is the one that a matrix product adds over in the first argument's gradient.
        cancelling = [(sign, rest, last) for sign in (EVEN, ODD) for rest, last in ((-sign, sign), (-sign, -sign))]
        for signs in [*cancelling, *[None] * MOST_DRAWS]:
            inputs: list[Tensor] = []
            own = self._drawn((args, kwargs), inputs, None if signs is None else [signs[0]])
            try:
                with torch.enable_grad():
                    together = func(*cloned(own[0]), **cloned(own[1]))
                    if not isinstance(together, Tensor) or not together.is_floating_point():
                        return False
                    pieces = [
                        func(*cloned(self._shares.part(own[0], k)), **cloned(self._shares.part(own[1], k)))
                        for k in range(self._g)
                    ]
                    if any(p.shape[1:] != together.shape[1:] or p.dim() == 0 for p in pieces):
                        return True
                    joined = Join.apply(*pieces)
                    if joined.shape != together.shape:
                        return False
                    if not same_bits(together, joined):
                        return True
                    if together.requires_grad:
                        grad = drawn_gradient(together)
                        if signs is not None:
                            dims = [signs[1]] * (together.dim() - 1) + [signs[2]]
                            grad = cancelling_like(together.detach(), dims, self._g)
                        one = torch.autograd.grad(together, inputs, grad, allow_unused=True)
                        other = torch.autograd.grad(joined, inputs, grad, allow_unused=True)
                        parted = [(a, b) for a, b, i in zip(one, other, inputs) if self._tensors.has_part(i)]
                        if not all(same_bits(a, b) for a, b in parted):
                            return True
            except RuntimeError:
                return False  # it cannot be called with random values; the comparison of the whole pack decides
            compared += together.numel() if signs is None else 0
            if compared > ENOUGH_VALUES:
                break
        return False

    def _widened(self, value: Any) -> Any:
        """Arguments with float32 in place of lower precision; None if none is used: by type or by autocast."""
        low: list[Tensor] = []

        def widen(v: Any) -> Any:
            if not isinstance(v, Tensor):
                return mapped(v, widen)
            if v.dtype not in LOW_PRECISION or not self._tensors.has_part(v):
                return v
            low.append(v)
            return self._tensors.as_part(v.detach().float().requires_grad_(v.requires_grad))

        wide = widen(value)
        return wide if low or torch.is_autocast_enabled(self._device_type) else None

    def _drawn(self, value: Any, inputs: list[Tensor], signs: list[int] | None) -> Any:
        """Arguments with random values. signs: where they cancel, that of the first tensor, and then of the others."""
        if isinstance(value, Tensor):
            if not value.is_floating_point() or not self._tensors.has_part(value):
                return value
            if signs is None:
                drawn = self._tensors.as_part(drawn_like(value.detach()))
            else:
                drawn = self._tensors.as_part(cancelling_like(value.detach(), signs[-1], self._g))
                if len(signs) == 1:
                    signs.append(-signs[0])
            if value.requires_grad:
                inputs.append(drawn.requires_grad_())
            return drawn
        return mapped(value, lambda v: self._drawn(v, inputs, signs))


def _plain(value: Any) -> bool:
    """Whether an argument is a number, a name, or a few of them, such as dimensions."""
    if isinstance(value, tuple):
        return all(isinstance(v, (int, float, str)) for v in value)
    return isinstance(value, (int, float, str))
