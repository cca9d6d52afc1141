"""Sample order and keyed random numbers: a draw depends on what it is for, never on the rank that draws it.

A key is a hash of the run's seed and of what the number is for. Nothing is seeded by rank, and
no generator carries its state from one micro-batch to the next, so any rank can compute any micro-batch.
"""

from __future__ import annotations

import hashlib
import random
import struct
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .plan import micro_batch_bounds

_MASK = (1 << 64) - 1
# splitmix64: the increment is 2^64 / golden ratio, the multipliers are Stafford's variant 13
# (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def key(seed: int, purpose: str, *position: int) -> int:
    """A 63-bit key for one use of randomness, the same on every rank and machine.

    Args:
        seed: the run's seed.
        purpose: what the numbers are for ("order", "forward", "augmentation", ...).
        position: where in the run, for example (step, micro-batch).
    """
    # A cryptographic hash, so keys of neighbouring steps or seeds are unrelated, and the same on every machine.
    message = purpose.encode() + struct.pack(f"<{1 + len(position)}Q", seed & _MASK, *position)
    # 63 bits, so that a key fits an int64: torch has few operations for unsigned numbers of 64 bits.
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little") >> 1


def epoch_order(seed: int, epoch: int, samples: int) -> Tensor:
    """The permutation of the training set for one epoch: (samples,) int64 on the CPU."""
    # Always on the CPU: a GPU's generator would give another permutation for the same seed.
    generator = torch.Generator().manual_seed(key(seed, "order", epoch))
    return torch.randperm(samples, generator=generator)


def nested_subset(samples: int, chosen: int) -> Tensor:
    """The same `chosen` of `samples` samples in every run: (chosen,) int64 on the CPU, in their original order.

    They are the first ones of a fixed pseudo-random order. So a smaller subset is part of a larger one, and all seeds
    of a study train on the same data. The first rows of the file would be a bad choice: they may all be of one class.
    """
    assert 1 <= chosen <= samples
    generator = torch.Generator().manual_seed(key(0, "train_samples"))
    return torch.randperm(samples, generator=generator)[:chosen].sort().values


def by_length(order: Tensor, lengths: Tensor, global_batch_size: int, micro_batch_size: int) -> Tensor:
    """The order, arranged within each global batch: samples of about the same length share a micro-batch.

    A step has the same samples as before, and so the same gradient up to rounding, with less padding. For example, with
    questions of 13 tokens on average and 4 micro-batches of 8, a question takes 16 computed tokens instead of 21. The
    micro-batches come as shortest, longest, second shortest, second longest, ...: every pair of neighbours is about the
    same amount of work, so ranks with blocks of equal size have about the same amount, too.

    Args:
        order: (n,) int64, an epoch's.
        lengths: (samples,) int64.
        global_batch_size, micro_batch_size: of the plan.

    Returns:
        (n,) int64.
    """
    parts = []
    for samples in order.split(global_batch_size):
        # The sort must be stable. Then samples of equal length keep their order, whichever algorithm torch chooses.
        samples = samples[torch.argsort(lengths[samples], stable=True)]
        bounds = micro_batch_bounds(len(samples), micro_batch_size)
        # The sizes stay those of the plan: micro-batch j has sizes[j] samples, whatever their length.
        sizes = [stop - start for start, stop in bounds]
        starts = [0] * len(bounds)
        position = 0
        # From the shortest samples to the longest: micro-batches 0, 2, 4, ..., and back over 5, 3, 1.
        for place in (*range(0, len(bounds), 2), *reversed(range(1, len(bounds), 2))):
            starts[place] = position
            position += sizes[place]
        parts += [samples[start : start + size] for start, size in zip(starts, sizes)]
    return torch.cat(parts)


def seed_generators(value: int, device: torch.device) -> None:
    """Seeds torch's generators, from which dropout and the like draw, on the CPU and on `device`.

    This runs once a micro-batch, and is cheaper than torch.manual_seed, which visits every device.
    """
    # Both, also on a GPU: a task may draw on the host there.
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(value)


def seed_python(value: int) -> None:
    """Seeds the global generators of Python and numpy. This is slower than torch's, so the step does not do it."""
    random.seed(value)
    np.random.seed(value % (1 << 32))


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # torch's >> on int64 copies the sign bit downwards. splitmix64 shifts zeros in: the mask makes them.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mixed(x: Tensor) -> Tensor:
    """A number that looks random for each number, elementwise: int64 to int64, one to one.

    This is the output function of splitmix64 (see the constants above).
    """
    # int64 arithmetic wraps modulo 2^64, on every device: these products are meant to overflow.
    x = x * _signed(_GOLDEN)
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX2)
    return x ^ _shift_right(x, 31)


def hashed_uniform(value: int, indices: Tensor, columns: int) -> Tensor:
    """Uniform numbers in [0, 1) that depend on the key and on each index alone.

    Args:
        value: a key.
        indices: (B,) int64, for example sample indices.
        columns: how many numbers each index gets.

    Returns:
        (B, columns) float32 on the device of `indices`, of 24 random bits each.
    """
    # The multiplier is odd and spreads indices over all 64 bits: 2^64 / x, where x^4 = x + 1 (Roberts 2018, R3).
    column = torch.arange(columns, device=indices.device)  # (columns,)
    # (B, columns). Each number has a counter of its own, and no state: any rank can make any of them.
    counter = indices[:, None] * _signed(0xD1B54A32D192ED03) + column[None, :]
    # The upper 24 bits: float32 holds each such number exactly, and a multiplication by 2^-24 does not round.
    return _shift_right(mixed(counter + _signed(value)), 40).to(torch.float32) * (2.0**-24)


@dataclass
class SampleRandom:
    """Random numbers for augmentation, keyed by (seed, epoch, sample): what a task's `augment` draws from.

    The n-th draw of an `augment` call takes the n-th stream of numbers of each sample. So a sample is
    augmented in the same way in any micro-batch, and differently in every epoch.
    """

    seed: int
    samples: int
    device: torch.device
    epoch: int = 0
    # A stream with at most this many numbers for the whole split is drawn once an epoch. Each micro-batch then gathers
    # its own by index: one operation instead of a dozen. The numbers are the same either way.
    table_limit: int = 1 << 20
    _indices: Tensor | None = None
    _stream: int = 0
    _tables: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    def start_epoch(self, epoch: int) -> None:
        """Switches to the numbers of an epoch."""
        self.epoch = epoch
        self._tables.clear()

    def of(self, indices: Tensor) -> SampleRandom:
        """This object, set to the first stream of one micro-batch's samples. indices: (B,) int64."""
        self._indices = indices
        self._stream = 0
        return self

    def uniform(self, columns: int = 1) -> Tensor:
        """(B, columns) float32 in [0, 1)."""
        return self._draw(columns, 0)

    def integers(self, high: int, columns: int = 1) -> Tensor:
        """(B, columns) int64 in 0..high-1. They have 24 random bits, so `high` should be far below 2^24."""
        return self._draw(columns, high)

    def _draw(self, columns: int, high: int) -> Tensor:
        assert self._indices is not None
        stream, self._stream = self._stream, self._stream + 1
        table = self._tables.get((stream, columns, high))
        if table is not None:
            return table.index_select(0, self._indices)
        few = self.samples * columns <= self.table_limit
        indices = torch.arange(self.samples, device=self.device) if few else self._indices
        numbers = hashed_uniform(self._key(stream), indices, columns)
        if high:
            numbers = (numbers * high).to(torch.int64)
        if not few:
            return numbers
        self._tables[stream, columns, high] = numbers
        return numbers.index_select(0, self._indices)

    def normal(self, columns: int = 1) -> Tensor:
        """(B, columns) float32, standard normal (Box and Muller 1958)."""
        # log1p and cos may give an element other bits in a tensor of another size. So no table of normal numbers is
        # kept: they are computed for one micro-batch, like everything in `augment`.
        radius = torch.sqrt(-2.0 * torch.log1p(-self.uniform(columns)))
        return radius * torch.cos(2.0 * torch.pi * self.uniform(columns))

    def _key(self, stream: int) -> int:
        return key(self.seed, "augmentation", self.epoch, stream)
