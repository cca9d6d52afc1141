"""Which rank this process is, and of how many."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process's global rank and world size, and the same within its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone prints and writes files."""
        return self.rank == 0

    @staticmethod
    def from_environment(local_rank: int | None = None) -> Ranks:
        """From the variables that the deepspeed launcher or torchrun set; one rank if there are none.

        Args:
            local_rank: the launcher's --local_rank flag, which only fills in for a missing LOCAL_RANK.

        Raises:
            UserError: the variables contradict one another.
        """

        def read(name: str, default: int) -> int:
            text = os.environ.get(name, "")
            if text and not text.isdigit():
                raise UserError(f"The environment variable {name} is {text!r}. It must be a whole number.")
            return int(text) if text else default

        world_size, rank = read("WORLD_SIZE", 1), read("RANK", 0)
        local = read("LOCAL_RANK", local_rank if local_rank is not None and local_rank >= 0 else 0)
        # torchrun sets LOCAL_WORLD_SIZE, DeepSpeed's launcher sets LOCAL_SIZE.
        local_size = read("LOCAL_WORLD_SIZE", read("LOCAL_SIZE", world_size))
        if world_size < 1 or rank >= world_size or local >= local_size:
            raise UserError(
                f"The launcher's variables contradict one another: RANK={rank}, WORLD_SIZE={world_size}, "
                f"LOCAL_RANK={local}, ranks on this machine={local_size}. Start the run with one launcher."
            )
        return Ranks(rank, world_size, local, local_size)
