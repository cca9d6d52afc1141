"""From a global batch to micro-batches to ranks: pure arithmetic, shared by `plan` and the training loop.

This file handles no tensors. A global batch of B samples is cut into M micro-batches in a way that
does not depend on the world size W. Rank r then takes a contiguous block of them. So W decides only
which rank computes a micro-batch, never what is in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import UserError


def micro_batch_bounds(samples: int, micro_batch_size: int) -> list[tuple[int, int]]:
    """The micro-batches of one global batch as [start, stop) positions in it.

    There are ceil(samples / micro_batch_size) of them, and their sizes differ by one sample at most. A
    batch that is a multiple of the micro-batch size is cut into exactly that size. Any other batch is cut
    into nearly equal parts and has no tiny remainder: BatchNorm takes its statistics from a micro-batch,
    and a micro-batch of a single sample has no variance.
    """
    assert samples >= 1 and micro_batch_size >= 1
    # -(-a // b) is a / b rounded up. It stays in whole numbers, so it is exact for any size.
    count = -(-samples // micro_batch_size)
    return [(j * samples // count, (j + 1) * samples // count) for j in range(count)]


def rank_block(micro_batches: int, world_size: int, rank: int) -> range:
    """The micro-batches of `rank`: [floor(r M / W), floor((r+1) M / W)), empty for some ranks if M < W."""
    assert 0 <= rank < world_size
    # This formula gives contiguous blocks that cover all M, and two blocks differ by one micro-batch at most.
    return range(rank * micro_batches // world_size, (rank + 1) * micro_batches // world_size)


def steps_per_epoch(samples: int, global_batch_size: int, drop_last: bool) -> int:
    """Optimizer steps of one pass over `samples`: the last, smaller batch counts unless it is dropped."""
    return samples // global_batch_size if drop_last else -(-samples // global_batch_size)


@dataclass(frozen=True)
class BatchPlan:
    """How one global batch is computed at one world size.

    Attributes:
        scaling: "strong" holds the global batch as the world grows, "weak" grows it with the world.
        global_batch_size: B, samples of one optimizer step over all ranks.
        micro_batch_size: m, samples of one forward/backward (the last batch of an epoch may have fewer).
        world_size: W, data-parallel ranks.
    """

    scaling: Literal["strong", "weak"]
    global_batch_size: int
    micro_batch_size: int
    world_size: int

    @property
    def micro_batches(self) -> int:
        """M, micro-batches in a full global batch."""
        return -(-self.global_batch_size // self.micro_batch_size)

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-steps of the rank that has the most of them in a step. They determine the step time."""
        return -(-self.micro_batches // self.world_size)

    def per_rank(self) -> str:
        """Micro-batches of a rank, for people: "16", or "10 or 11" where ranks differ."""
        least, most = self.micro_batches // self.world_size, self.gradient_accumulation_steps
        return str(most) if least == most else f"{least} or {most}"

    def equation(self) -> str:
        """The batch arithmetic in one line, for the console."""
        full = self.micro_batches * self.micro_batch_size == self.global_batch_size
        size = f"{self.micro_batch_size} samples" if full else f"at most {self.micro_batch_size} samples"
        size = size if self.micro_batch_size > 1 else "1 sample"
        ranks = "rank" if self.world_size == 1 else "ranks"
        whole, own = ("es" if count != "1" else "" for count in (str(self.micro_batches), self.per_rank()))
        return (
            f"global batch {self.global_batch_size:,} samples = {self.micro_batches} micro-batch{whole} x {size}; "
            f"{self.world_size} {ranks} x {self.per_rank()} micro-batch{own}"
        )


def resolve(
    world_size: int,
    train_batch_size: int | None,
    train_micro_batch_size_per_gpu: int | None,
    gradient_accumulation_steps: int | None,
) -> BatchPlan:
    """The plan that DeepSpeed's three batch keys mean at this world size.

    Raises:
        UserError: the keys leave the micro-batch size open, contradict one another at this world size, or
            make fewer micro-batches than ranks. The message shows the arithmetic and a remedy.
    """
    B, m, accumulation = train_batch_size, train_micro_batch_size_per_gpu, gradient_accumulation_steps
    W = world_size
    # Without a micro-batch size, DeepSpeed derives one from W. Then the model would depend on W.
    if m is None:
        if B is None:
            raise UserError(
                "No batch size: the config has neither train_batch_size nor train_micro_batch_size_per_gpu.\n"
                "For strong scaling give both; for weak scaling give train_micro_batch_size_per_gpu "
                "and gradient_accumulation_steps."
            )
        suggestion = max(1, B // 32)
        without = "" if accumulation is None else ", and leave gradient_accumulation_steps out"
        raise UserError(
            f"train_batch_size ({B}) is given without train_micro_batch_size_per_gpu. The micro-batch would then "
            "change with the number of ranks, and with it BatchNorm, dropout and all rounding.\n"
            f"Add train_micro_batch_size_per_gpu, for example {suggestion}{without}. Then 1 to "
            f"{-(-B // suggestion)} ranks give the same model."
        )
    if B is None:  # weak scaling: the global batch grows with W
        return BatchPlan("weak", m * (accumulation or 1) * W, m, W)
    if m > B:
        remedies = [f"train_batch_size={max(m, m * (W - 1) + 1)} or more"]
        if B >= W:
            remedies.insert(0, f"train_micro_batch_size_per_gpu={B // W} or less")
        at = f", on {W} ranks" if W > 1 else ""
        raise UserError(
            f"train_micro_batch_size_per_gpu ({m}) is larger than train_batch_size ({B}).\n"
            f"Try {', or '.join(remedies)}{at}."
        )
    # A config that fixes all three keys fits only one world size.
    if accumulation is not None and m * accumulation * W != B:
        raise UserError(_contradiction(B, m, accumulation, W))
    plan = BatchPlan("strong", B, m, W)
    # A rank that has no micro-batch in any step could not contribute anything.
    if plan.micro_batches < W:
        remedy = f"Use at most {plan.micro_batches} ranks"
        if B >= W:
            remedy += f", or train_micro_batch_size_per_gpu={B // W} or less"
            remedy += " (a smaller micro-batch is another model: it changes BatchNorm and dropout)"
        raise UserError(
            f"{W} ranks are more than the {plan.micro_batches} micro-batches of a global batch "
            f"(train_batch_size {B} / train_micro_batch_size_per_gpu {m}).\n{remedy}."
        )
    return plan


def _contradiction(B: int, m: int, accumulation: int, W: int) -> str:
    product = m * accumulation * W
    message = (
        f"train_batch_size ({B}) is not train_micro_batch_size_per_gpu ({m}) x gradient_accumulation_steps "
        f"({accumulation}) x {W} rank{'s' * (W > 1)} = {product}.\n"
    )
    choices = []
    if -(-B // m) >= W:
        choices.append("leave gradient_accumulation_steps out (strong scaling: it is derived at every world size)")
    if B % (m * accumulation) == 0:
        choices.append(f"run on {B // (m * accumulation)} ranks")
    choices.append(f"set train_batch_size={product}")
    if B % (m * W) == 0:
        choices.append(f"set gradient_accumulation_steps={B // (m * W)}")
    return message + "Either " + ", or ".join(choices) + "."


def nearest_possible(world_size: int, B: int | None, m: int | None, accumulation: int | None) -> int | None:
    """The world size closest to `world_size` that the batch keys allow, the smaller of two equally close; or None."""
    # Strong scaling allows at most M ranks. For weak scaling, any W works, so the search ends at once.
    largest = -(-B // m) if B is not None and m is not None else world_size
    for distance in range(max(world_size, largest) + 1):
        for candidate in (world_size - distance, world_size + distance):
            if candidate >= 1:
                try:
                    resolve(candidate, B, m, accumulation)
                except UserError:
                    continue
                return candidate
    return None
