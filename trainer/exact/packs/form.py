"""The form of a pack: which functions were called so far, of what shapes, in which order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .findings import Findings
from .independent import ARITHMETIC, plain_name
from .tensors import SAME, Tensors
from .verdicts import RefusedError


class Form:
    """Of one pack. Numbers in arithmetic do not count: a task may let them follow its progress.

    Attributes:
        value: names the calls so far.

    Args:
        tensors: what each tensor is.
        rows: samples of the pack.
        findings: of trials.
        trying: whether this is a trial.
    """

    def __init__(self, tensors: Tensors, rows: int, findings: Findings, trying: bool) -> None:
        self._tensors, self._rows, self._findings, self._trying = tensors, rows, findings, trying
        self.value = 0

    def add(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, set[int]]:
        """Adds a call for the pack.

        Returns:
            Which kinds of tensors are among the arguments; the places of the parameters among them.
        """
        known: list[Any] = [func, torch.is_grad_enabled()]
        numbers, used = plain_name(func) not in ARITHMETIC, set[int]()
        given = self._look_at(args, known, numbers, used)
        if kwargs:
            given |= self._look_at(kwargs, known, numbers, used)
        self.value = hash((self.value, *known))
        return given, used

    def add_alone(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Adds a call for one micro-batch."""
        known: list[Any] = [func]
        self._look_at((args, kwargs), known, plain_name(func) not in ARITHMETIC, set())
        self.value = hash((self.value, *known))

    def _look_at(self, values: Any, known: list[Any], numbers: bool, used: set[int]) -> int:
        """Notes the form of arguments, and which kinds and parameters there are. One pass, as every call needs it."""
        found, tensors = 0, self._tensors
        if isinstance(values, Mapping):
            known += values
            values = values.values()
        for value in values:
            if isinstance(value, Tensor):
                kind, place = tensors.kind(value), tensors.place(value)
                made = value._made if kind else None  # type: ignore[attr-defined]
                known += (value.shape, value.stride(), value.dtype, value.requires_grad, place, kind, made)
                if value.is_complex():
                    raise RefusedError("complex numbers")
                if kind != SAME:
                    found |= kind
                if not kind and place is None and not self._trying and not self._was_there(value):
                    raise RefusedError("it gets a tensor that packs have not seen being made", untried=True)
                if place is not None:
                    used.add(place)
            elif value is None or isinstance(value, (str, bool, torch.dtype)):
                known.append(value)
            elif isinstance(value, (list, tuple, Mapping)):
                known.append(len(value))
                found |= self._look_at(value, known, numbers, used)
            elif isinstance(value, slice):
                known += (_name_of(value.start), _name_of(value.stop), _name_of(value.step))
            elif isinstance(value, np.generic):
                known.append(value.item() if numbers else type(value))
            elif isinstance(value, (int, float)):
                # In arithmetic only one number counts: that of the pack's samples, which a micro-batch would not have.
                known.append(_name_of(value) if numbers else (type(value), value == self._rows))
            else:
                known.append(type(value))
        return found

    def _was_there(self, tensor: Tensor) -> bool:
        """Whether a tensor that packs have not seen being made was an argument of calls in trials, too."""
        there = self._findings.outside.get(id(tensor))
        known = self._tensors.is_constant(tensor) or self._tensors.made_here(tensor)
        return known or (there is not None and there() is tensor)


def _name_of(value: Any) -> Any:
    """What stands for a number in a form: Python gives -1 and -2 the same hash."""
    return -1.5 if value == -1 else value
