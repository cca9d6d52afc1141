"""Communication between ranks: objects, rows and tensors, and errors that all ranks raise together.

Everything also works with one rank: then no message is sent.
"""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import BY_EXIT_CODE, TrainerError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

# Ranks wait this long for one another before they give up. It is long because the first step may compile kernels.
COLLECTIVE_TIMEOUT_S = 1800.0


class _Meetings:
    """Counts the collectives that this rank has entered, and notes when.

    Ranks that wait for one another have the same count. On a GPU a rank may be ahead of the rank that it waits for.
    There the host leaves a collective at once and goes on, until the device can queue no more work.

    Attributes:
        count: of collectives; one inside another does not count.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Counts from 0 again. Collective: every rank, between the same collectives, so that counts can be compared."""
        self.count, self._depth = 0, 0
        # (count, time.monotonic() when entered), of those that no rank can leave before all have come.
        self._entered: collections.deque[tuple[int, float]] = collections.deque(maxlen=64)

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth == 1:
            self.count += 1
            self._entered.append((self.count, time.monotonic()))

    def __exit__(self, *exception: object) -> None:
        self._depth -= 1

    @contextlib.contextmanager
    def from_first(self) -> Iterator[None]:
        """A collective in which only rank 0 sends: a rank that has left it does not wait for those still to come."""
        with self:
            yield
        if self._depth == 0:
            self._entered.pop()

    def since_s(self, count: int) -> float | None:
        """Since when this rank, or its device, has been waiting for a rank that has entered `count` collectives.

        Returns:
            A time of time.monotonic(); None if it does not wait.
        """
        return next((at_s for entered, at_s in list(self._entered) if entered > count), None)


# The watching thread reads it: the others wait for the rank with the lowest count.
meetings = _Meetings()


def gather_objects(value: T) -> list[T]:
    """Every rank's value, by rank. Collective: every rank. For start-up and rare events, not for the step."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    with meetings:
        dist.all_gather_object(gathered, value)
    return gathered


def message_device(device: torch.device) -> torch.device:
    """The device on which a tensor must be to be sent: NCCL sends from the GPU, gloo from the CPU's memory."""
    import torch
    import torch.distributed as dist

    # A group of both backends is called "cpu:gloo,cuda:nccl". It takes the one that belongs to a tensor's device.
    return device if device.type == "cuda" and "nccl" in dist.get_backend() else torch.device("cpu")


def all_gather_flat(out: Tensor, piece: Tensor) -> None:
    """Every rank's `piece` (n,), one after the other, into `out` (W n,). Collective: every rank.

    Both lie on a `message_device`.
    """
    with meetings:
        wait_for(begin_gather(out, piece))


def begin_gather(out: Tensor, piece: Tensor, tag: int = 0) -> list[Any]:
    """Begins an `all_gather_flat` without waiting for its end. `meetings` does not count it. Collective: every rank.

    Args:
        out, piece: as in `all_gather_flat`. On the CPU, do not touch them before the collective has ended.
        tag: a number. Collectives that are under way at the same time need different ones.

    Returns:
        What `wait_for` takes. Empty for a GPU: there the current stream waits by itself.
    """
    import torch.distributed as dist

    if piece.device.type == "cpu":
        # gloo's own all-gather makes two more copies in fresh memory. Sending to each rank usually takes a quarter to
        # two thirds of its time, and less for large pieces (tests/benchmarks/exchange.py).
        rank, world_size = dist.get_rank(), dist.get_world_size()
        rows = out.view(world_size, -1)
        sources = [(rank - k) % world_size for k in range(1, world_size)]
        works = [dist.irecv(rows[source], source, tag=tag) for source in sources]
        works += [dist.isend(piece, (rank + k) % world_size, tag=tag) for k in range(1, world_size)]
        rows[rank].copy_(piece)
        return works
    # torch 2.13 renames the collective and warns about the old name.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out, piece)
    return []


def begin_all_to_all(out: Tensor, piece: Tensor, out_sizes: list[int], sizes: list[int]) -> list[Any]:
    """As `begin_gather`: a part of `sizes[r]` elements goes to rank r, and one of `out_sizes[r]` comes from it."""
    import torch.distributed as dist

    work = dist.all_to_all_single(out, piece, out_sizes, sizes, async_op=piece.device.type == "cpu")
    return [] if work is None else [work]


def wait_for(works: Sequence[Any]) -> None:
    """Waits until collectives that have begun have ended. Raises RuntimeError if another rank is gone."""
    # This loop must stay in this module: `run.failures` knows by the module that an error is of a collective.
    for work in works:
        work.wait()


def gather_int64(value: Tensor) -> list[int]:
    """Every rank's number, by rank: () int64. Collective: every rank. Waits for the device."""
    return gather_rows(value.reshape(1)).flatten().tolist()


def gather_rows(row: Tensor) -> Tensor:
    """Every rank's (n,), by rank: (W, n) on the CPU. Collective: every rank, with equal n. Waits for the device."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return row.cpu()[None]
    row = row.cpu()  # device to host
    gathered = torch.empty(dist.get_world_size() * len(row), dtype=row.dtype)
    all_gather_flat(gathered, row)
    return gathered.view(-1, len(row))


def broadcast_object(value: T | None) -> T:
    """Rank 0's value, on every rank. Collective: every rank."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        assert value is not None
        return value
    box: list[Any] = [value]
    with meetings.from_first():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast_tensor(value: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Rank 0's tensor on every rank, on the CPU, bit for bit. Collective: every rank."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        assert value is not None
        return value
    result = torch.empty(shape, dtype=dtype) if value is None else value.cpu().contiguous()  # device to host
    if result.numel() == 0:
        return result
    with meetings.from_first():
        dist.broadcast(result.view(-1).view(torch.uint8), src=0)  # as bytes, because gloo does not know all types
    return result.view(shape)


def raise_together(error: TrainerError | None) -> None:
    """Raises one rank's error (the lowest rank's) on every rank, so that no rank continues or waits forever.

    Collective: every rank, with its own error or None.
    """
    said = gather_objects((error.exit_code, str(error)) if error is not None else None)
    for exit_code, message in (s for s in said if s is not None):
        raise BY_EXIT_CODE.get(exit_code, TrainerError)(message, agreed=True)


def common_value(values: Sequence[Any]) -> Any:
    """The value that most ranks have; among equally frequent ones, the lowest rank's."""
    keys = [repr(v) for v in values]
    return values[max(range(len(keys)), key=lambda i: (keys.count(keys[i]), -i))]
