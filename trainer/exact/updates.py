"""What a step needs from the object that applies its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Updates(Protocol):
    """Applies gradients to the parameters. In a run this is DeepSpeed's engine, see `engine.deepspeed_engine`."""

    @property
    def parameters(self) -> Sequence[Tensor]:
        """The trained parameters, in order."""
        ...

    def use_gradient(self, flat: Tensor, views: list[Tensor]) -> None:
        """Tells `update` where to read gradients: in a flat buffer, with one view a parameter, in order."""
        ...

    def skip_update_where(self, flag: Tensor) -> bool:
        """From now on skips each update, on the device, if `flag` () is not 0. Returns False if it cannot do that."""
        ...

    def set_learning_rate(self, factor: float | None) -> float:
        """Sets the rate of the next update, as a multiple of the configured one. Returns the rate."""
        ...

    def update(self, unused: Sequence[int] = ()) -> None:
        """Updates the parameters, except those at the positions `unused`."""
        ...
