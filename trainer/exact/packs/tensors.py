"""What a tensor is to a pack: known by the functions that made it, not by its size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .nested import tensors_of

# Kinds of tensors. PARTED: with a part for each micro-batch, one after the other along the first dimension, (g m, ...).
# NUMBERS: with one number for each micro-batch, (g,). SAME: the same for all of them. Tensors that were made before the
# pack have no kind.
PARTED, NUMBERS, SAME = 1, 2, 4


class Tensors:
    """Knows the tensors of one pack.

    Attributes:
        derived: id of a tensor that follows from parameters alone -> its place, below 0.

    Args:
        parameters: id of a trained parameter -> its place.
        constants: ids of the model's other tensors.
        arrays: the samples.
    """

    def __init__(self, parameters: Mapping[int, int], constants: frozenset[int], arrays: Mapping[str, Tensor]) -> None:
        self._parameters, self._constants = parameters, constants
        self.derived: dict[int, int] = {}
        self._count = 0  # of tensors that were made
        # Marks on tensors. They are objects of this pack alone, so that it does not know a tensor of an earlier pack.
        self._marks = {kind: (kind,) for kind in (PARTED, NUMBERS, SAME)}
        # Tensors that are made for one micro-batch have a mark, too: another micro-batch must not use them.
        self._scope = object()
        for array in arrays.values():
            self.mark(array, PARTED)

    def mark(self, tensor: Tensor, kind: int) -> Tensor:
        """Notes that a tensor has been made, and of which kind it is."""
        self._count += 1
        tensor._made = self._count  # type: ignore[attr-defined]
        return self.as_part(tensor, kind)

    def as_part(self, tensor: Tensor, kind: int = PARTED) -> Tensor:
        """Notes the kind of a tensor that no call of the task's has made."""
        tensor._kind = self._marks[kind]  # type: ignore[attr-defined]
        return tensor

    def kind(self, tensor: Tensor) -> int:
        """What a tensor is: one of the kinds above; 0 for one that was made outside of the pack."""
        mark = getattr(tensor, "_kind", None)
        return mark[0] if mark is not None and self._marks[mark[0]] is mark else 0

    def has_part(self, value: Any) -> bool:
        """Whether a value is a tensor of which each micro-batch has its own part, one after the other."""
        return isinstance(value, Tensor) and self.kind(value) == PARTED

    def has_parts(self, value: Any) -> bool:
        """Whether a micro-batch has something of its own among a function's arguments."""
        return any(self.kind(t) in (PARTED, NUMBERS) for t in tensors_of(value))

    def place(self, tensor: Any) -> int | None:
        """The place of a trained parameter, or of what follows from parameters alone; None for any other."""
        found = self._parameters.get(id(tensor))
        return self.derived.get(id(tensor)) if found is None else found

    def named(self, tensor: Tensor) -> Any:
        """What names a tensor in this pack: its place if it is a parameter, or when it was made."""
        place = self.place(tensor)
        return ("parameter", place) if place is not None else getattr(tensor, "_made", None)

    def mark_here(self, tensor: Tensor) -> None:
        """Notes that a tensor belongs only to the micro-batch that is computed alone now."""
        tensor._scope = self._scope  # type: ignore[attr-defined]

    def made_here(self, tensor: Tensor) -> bool:
        """Whether a tensor was marked so, for this micro-batch."""
        return getattr(tensor, "_scope", None) is self._scope

    def leave_scope(self) -> None:
        """Another micro-batch begins: tensors that were marked before do not belong to it."""
        self._scope = object()

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether it belongs to the model and is not trained."""
        return id(tensor) in self._constants

    def is_new(self, tensor: Tensor) -> bool:
        """Whether nothing is known of it: it has no kind, and does not belong to the model."""
        return not self.kind(tensor) and id(tensor) not in self._constants and self.place(tensor) is None
