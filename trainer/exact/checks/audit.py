"""The audit: now and then a micro-batch is computed a second time, and its bits are compared with what was summed.

The guard compares ranks with one another after the sum. It cannot see a wrong summand, because every rank applies the
same sum. So in an audited step each rank computes one micro-batch of another rank again, with the parameters of that
step. A single rank takes one of its own micro-batches, out of order. The hashes of loss, statistics and gradient are
compared with the owner's. A difference has one of three causes: the task keeps state, a number depends on the rank, or
a device computes wrongly. The comparison comes before the update, so nothing of the step has been applied yet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import RanksDifferError
from ...ranks.collectives import gather_rows
from ...ranks.place import Ranks
from ..order import key
from ..plan import rank_block
from .hashes import hash64

# With the default interval, at most this fraction of a rank's micro-batches is computed again.
LARGEST_SHARE = 0.005


def interval(every_steps: int | None, guard_every_steps: int, micro_batches: int, world_size: int) -> int:
    """Steps between audits; 0 for none.

    Args:
        every_steps: `trainer.audit_every_steps`. None for the default: as often as the guard, and less often if a rank
            has few micro-batches a step, so that at most `LARGEST_SHARE` of them are computed again.
        guard_every_steps: `trainer.guard_every_steps`.
        micro_batches: M.
        world_size: W.
    """
    if every_steps is not None:
        return every_steps
    if guard_every_steps == 0:
        return 0
    # A multiple of the guard's interval: a rank with n micro-batches a step computes 1 in n * interval again.
    fewest = micro_batches // world_size
    return guard_every_steps * math.ceil(1 / (LARGEST_SHARE * fewest * guard_every_steps))


class Audit:
    """Chooses what is computed again, and compares.

    In an audited step, call `choose`, then `note_summed` for the micro-batch `own` and `note_again` for the micro-batch
    `other`, then `compare` (collective: every rank). All ranks make the same choice.

    Args:
        ranks: this rank, and how many.
        hosts: of each rank, for messages.
        names: of the parameters, in the order of their gradients.
        every_steps: steps between audits.
        total_steps: of the run; its last step is audited, too.
        seed: of the run; it and the step determine the choice.
        alike: whether all ranks have the same device model. If not, each rank checks its own micro-batches.
    """

    def __init__(
        self,
        ranks: Ranks,
        hosts: Sequence[str],
        names: Sequence[str],
        *,
        every_steps: int,
        total_steps: int,
        seed: int,
        alike: bool,
    ) -> None:
        self._ranks, self._hosts = ranks, hosts
        self._names = ["loss", "BatchNorm's statistics", *(f"the gradient of {name}" for name in names)]
        self.every_steps, self._total_steps, self._seed, self._alike = every_steps, total_steps, seed, alike
        self._passed: int | None = None  # the last step whose audit found nothing
        self._leaves = 0
        self._shift = 0
        self._step = 0
        self._zero: Tensor | None = None
        self._summed: Tensor | None = None
        self._again: Tensor | None = None
        self.own: int | None = None
        self.other: int | None = None

    def due(self, step: int) -> bool:
        """Whether the next step is audited, after `step` steps."""
        # The last step, too: otherwise the steps after the last regular audit would never be checked.
        return (step + 1) % self.every_steps == 0 or step + 1 == self._total_steps

    def choose(self, step: int, leaves: int) -> None:
        """Begins an audited step of M micro-batches.

        Afterwards `own` is the micro-batch of this rank that another rank computes again, and `other` is the one that
        this rank computes again. Either is None if its rank has no micro-batch in this step (in an epoch's last batch).
        """
        W = self._ranks.world_size
        # Rank r checks rank r + shift. A shift of 1 to W - 1 gives every rank another one, and it changes from audit to
        # audit. Every rank computes the same key, so nothing has to be sent. The shift is 0 if device models differ:
        # their bits may then differ without a fault.
        self._step, self._leaves = step, leaves
        self._shift = 1 + key(self._seed, "audit", step) % (W - 1) if W > 1 and self._alike else 0
        self.own = self._chosen(self._ranks.rank)
        self.other = self._chosen((self._ranks.rank + self._shift) % W)
        self._summed = self._again = None

    def _chosen(self, owner: int) -> int | None:
        block = rank_block(self._leaves, self._ranks.world_size, owner)
        return block[key(self._seed, "audited micro-batch", self._step, owner) % len(block)] if len(block) else None

    def note_summed(self, loss: Tensor, statistics: Tensor, gradients: Sequence[Tensor | None]) -> None:
        """Notes what this rank adds to the sum for the micro-batch `own`."""
        self._summed = self._hashes(loss, statistics, gradients)

    def note_again(self, loss: Tensor, statistics: Tensor, gradients: Sequence[Tensor | None]) -> None:
        """Notes what this rank computes for the micro-batch `other`."""
        self._again = self._hashes(loss, statistics, gradients)

    def _hashes(self, loss: Tensor, statistics: Tensor, gradients: Sequence[Tensor | None]) -> Tensor:
        """One hash a tensor, (2 + parameters,) int64: 0 for a gradient that is None."""
        if self._zero is None:
            self._zero = torch.zeros((), dtype=torch.int64, device=loss.device)
        zero = self._zero
        # A hash of its own for each tensor, so that the message can name the first one that differs.
        found = [hash64([loss]), hash64([statistics]) if statistics.numel() else zero]
        found += [zero if gradient is None else hash64([gradient]) for gradient in gradients]
        return torch.stack(found)

    def compare(self) -> None:
        """Compares over all ranks. Collective: every rank, in the same steps. Waits for the device.

        Raises:
            RanksDifferError: on every rank, naming the step, the micro-batch, the tensor and both ranks.
        """
        W, size = self._ranks.world_size, len(self._names)
        assert self._summed is not None or self._again is not None or self._leaves < W
        # A rank without a micro-batch sends zeros: collectives take rows of one size. They are skipped below.
        nothing = torch.zeros(size, dtype=torch.int64)
        parts = [nothing if part is None else part.cpu() for part in (self._summed, self._again)]
        rows = gather_rows(torch.cat(parts)).view(W, 2, size)  # (rank, summed or again, tensor)
        # Every rank compares all rows, so every rank raises the same error.
        for witness in range(W):
            owner = (witness + self._shift) % W
            j = self._chosen(owner)
            if j is None:
                continue
            differs = (rows[owner, 0] != rows[witness, 1]).nonzero().flatten().tolist()
            if differs:
                raise RanksDifferError(self._message(owner, witness, j, self._names[differs[0]]), agreed=True)
        self._passed = self._step + 1

    def failed(self, error: Exception) -> RanksDifferError:
        """The error for a micro-batch `other` that cannot be computed again, although its rank has computed it."""
        return RanksDifferError(
            f"The audit of step {self._step + 1} could not compute micro-batch {self.other} again "
            f"({type(error).__name__}: {error}).\n"
            "It has been computed in this step, so the task or the model keeps something from one micro-batch to the "
            "next. Keep nothing there: what a forward needs is in its samples and in the keyword progress.\n"
            f"Step {self._step + 1} was not applied. {self._passed_so_far()}"
        )

    def _passed_so_far(self) -> str:
        if self._passed is None:
            return "No audit has passed since this process began: do not trust checkpoints that it wrote."
        return f"The audit of step {self._passed} passed: do not trust checkpoints of later steps."

    def _message(self, owner: int, witness: int, j: int, tensor: str) -> str:
        def rank(number: int) -> str:
            return f"rank {number} on {self._hosts[number]}"

        if owner == witness:
            who = f"{rank(owner)} computed it twice, and its two results differ, first in {tensor}"
        else:
            who = f"{rank(owner)} summed it, {rank(witness)} computed it again, and they differ, first in {tensor}"
        return (
            f"The audit of step {self._step + 1} found two results for micro-batch {j}: {who}.\n"
            "A device computes wrongly, or a pack does, or the task keeps state or uses the rank in a way that the "
            "rehearsal before the first step could not see. Start the run again with trainer.audit_every_steps=1: if "
            "the task is the cause, that finds the step in which it begins. For annealing, use the keyword progress "
            "instead of a counter. If the error stays away with trainer.pack=1, packs are the cause: please report it."
            f"\nStep {self._step + 1} was not applied. {self._passed_so_far()}"
        )
