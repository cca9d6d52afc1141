"""Notices that another thread draws from torch's generators.

Dropout and the like draw from them, and torch has only one generator a device. It is seeded for each micro-batch, so
what a program draws between steps changes nothing. A thread that draws during a micro-batch takes numbers away from it.
"""

from __future__ import annotations

import torch

from ...errors import RanksDifferError


class ForeignDraws:
    """Looks at torch's generators where nothing of a step draws: between its micro-batches and its end.

    A thread that draws all the time is noticed in one of the next steps. One that draws once may not be.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = torch.cuda.default_generators[device.index] if device.type == "cuda" else None
        self._host = torch.default_generator
        self._draws: bool | None = None  # whether this task draws at all
        self._state: torch.Tensor | None = None
        self._gpus: tuple[int, int] | None = None

    def after_one(self, key: int) -> None:
        """A micro-batch has been computed alone, seeded with `key`. The first one tells whether the task draws."""
        if self._draws is None:
            fresh, gpu = torch.Generator().manual_seed(key).get_state(), self._of_gpu()
            self._draws = not torch.equal(self._host.get_state(), fresh) or (gpu is not None and gpu[1] != 0)

    def begin(self) -> None:
        """Notes the generators' state. From here to `end`, nothing of a step draws."""
        if self._draws:
            self._state, self._gpus = self._host.get_state(), self._of_gpu()

    def end(self, step: int) -> None:
        """The step has ended. Raises RanksDifferError if somebody has drawn since `begin`."""
        if not self._draws or self._state is None:
            return
        if torch.equal(self._host.get_state(), self._state) and self._of_gpu() == self._gpus:
            return
        raise RanksDifferError(
            f"Another thread of this process draws from torch's global random generator, in step {step + 1} for "
            "example. The task draws from it as well (dropout), so its numbers have changed, now or in earlier steps.\n"
            "Let the thread draw from a torch.Generator of its own. Do not trust checkpoints of this run that were "
            "written after the thread began."
        )

    def _of_gpu(self) -> tuple[int, int] | None:
        return None if self._gpu is None else (self._gpu.initial_seed(), self._gpu.get_offset())
