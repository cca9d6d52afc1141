"""Sample order and keyed numbers: functions of names alone, and random enough."""

from __future__ import annotations

import itertools
import math
import random as python_random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trainer.exact.order import (
    SampleRandom,
    _signed,
    by_length,
    epoch_order,
    hashed_uniform,
    key,
    mixed,
    nested_subset,
    seed_generators,
    seed_python,
)
from trainer.exact.plan import micro_batch_bounds

CPU = torch.device("cpu")

# Made with hashlib and Python's integers, not with the code under test.
GOLDEN_KEYS = [5196463127434771566, 3401104845953914624, 7852627002861757409]
GOLDEN_UNIFORM = [[306148, 4944402], [14674780, 10398967], [13092353, 9709681]]
GOLDEN_SUBSET = [1, 3, 6, 7]  # as torch 2.13 gives it

# Without a deadline: on a busy machine any example can take long.
checked = settings(deadline=None, max_examples=60)


# Keys


def test_keys_are_those_of_earlier_versions() -> None:
    """Golden values: other bits here mean that no earlier run can be repeated. Then say so in the release."""
    assert key(0, "order", 0) == GOLDEN_KEYS[0]
    assert key(1, "forward", 12, 3) == GOLDEN_KEYS[1]
    assert key(2**64 - 1, "augmentation") == GOLDEN_KEYS[2]


def test_keys_are_63_bits_so_that_every_generator_takes_them() -> None:
    values = [key(seed, "forward", step) for seed in range(20) for step in range(100)]
    assert all(0 <= value < 2**63 for value in values)
    assert max(values) > 2**62  # and use all of them
    torch.Generator().manual_seed(max(values))


def test_a_seed_counts_modulo_2_to_the_64() -> None:
    assert key(2**64 + 5, "order", 1) == key(5, "order", 1)
    assert key(-1, "order") == key(2**64 - 1, "order")
    assert key(2**63, "order") != key(0, "order")


def test_keys_differ_wherever_a_name_does() -> None:
    purposes = ["order", "forward", "augmentation", "model", "evaluation", "digits split"]
    positions = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (256,), (1 << 40,)]
    names = list(itertools.product(range(5), purposes, positions))
    assert len({key(seed, purpose, *position) for seed, purpose, position in names}) == len(names)


# The order of an epoch


@checked
@given(seed=st.integers(0, 2**70), epoch=st.integers(0, 1000), samples=st.integers(1, 500))
def test_epoch_order_is_a_permutation(seed: int, epoch: int, samples: int) -> None:
    order = epoch_order(seed, epoch, samples)
    assert order.dtype == torch.int64
    assert order.device == CPU
    assert sorted(order.tolist()) == list(range(samples))


def test_epoch_order_depends_on_seed_and_epoch_alone() -> None:
    orders = {}
    for seed, epoch in itertools.product(range(4), range(4)):
        torch.manual_seed(seed * 7 + epoch)  # the state of the global generator is nobody's business
        orders[seed, epoch] = epoch_order(seed, epoch, 100)
        torch.rand(3)
        assert torch.equal(orders[seed, epoch], epoch_order(seed, epoch, 100))
    assert len({tuple(order.tolist()) for order in orders.values()}) == len(orders)


def test_epoch_order_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    epoch_order(0, 0, 100)
    assert torch.equal(torch.rand(4), expected)


def test_epoch_order_mixes() -> None:
    """Every place is as likely for every sample: chi-squared over 4,000 epochs of six samples."""
    counts = torch.zeros(6, 6)
    for epoch in range(4000):
        counts[torch.arange(6), epoch_order(11, epoch, 6)] += 1
    statistic = float(((counts - 4000 / 6) ** 2 / (4000 / 6)).sum())
    assert stats.chi2.sf(statistic, 25) > 1e-4


def test_seed_generators_is_manual_seed() -> None:
    torch.manual_seed(77)
    expected = torch.rand(5)
    torch.rand(100)
    seed_generators(77, CPU)
    assert torch.equal(torch.rand(5), expected)


def test_seed_generators_seeds_the_generator_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    generators = [torch.Generator(), torch.Generator()]
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    untouched = generators[0].initial_seed()
    seed_generators(78, torch.device("cuda", 1))
    assert [generator.initial_seed() for generator in generators] == [untouched, 78]
    assert torch.default_generator.initial_seed() == 78


@pytest.mark.parametrize(
    ("value", "of_numpy"), [(5, 5), (2**32 - 1, 2**32 - 1), (2**32 + 7, 7), (2**63 - 1, 2**32 - 1)]
)
def test_seed_python_takes_any_key(value: int, of_numpy: int) -> None:
    expected = python_random.Random(value).random(), np.random.RandomState(of_numpy).random_sample()
    seed_python(value)
    assert (python_random.random(), np.random.random_sample()) == expected


def test_a_smaller_subset_is_part_of_a_larger_one() -> None:
    """Golden values, so that a study can go on with the data it began with."""
    assert nested_subset(10, 4).tolist() == GOLDEN_SUBSET
    subsets = [set(nested_subset(10, chosen).tolist()) for chosen in range(1, 11)]
    assert all(small < large for small, large in itertools.pairwise(subsets))
    assert [len(subset) for subset in subsets] == list(range(1, 11))


# Numbers by index


def test_hashed_uniform_is_that_of_earlier_versions() -> None:
    indices = torch.tensor([0, 1, 1_000_000])
    values = (hashed_uniform(key(0, "golden"), indices, 2) * 2**24).to(torch.int64)
    assert values.tolist() == GOLDEN_UNIFORM


def splitmix64(x: int) -> int:
    """In Python's integers, which neither overflow nor shift in signs."""
    mask = (1 << 64) - 1
    x = x * 0x9E3779B97F4A7C15 & mask
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return x ^ x >> 31


def splitmix_reference(value: int, index: int, column: int) -> float:
    """The same number: splitmix64's finaliser over a counter."""
    return (splitmix64(index * 0xD1B54A32D192ED03 + column + value) >> 40) / 2**24


def test_all_64_bits_are_those_of_splitmix64() -> None:
    numbers = [0, 1, 2, 12345, 2**40, 2**63 - 1, -1, -(2**63)]
    assert mixed(torch.tensor(numbers)).tolist() == [_signed(splitmix64(x)) for x in numbers]


def test_unsigned_numbers_are_given_to_torch_as_signed_ones() -> None:
    assert [_signed(x) for x in (0, 2**63 - 1, 2**63, 2**64 - 1, 2**64 + 3)] == [0, 2**63 - 1, -(2**63), -1, 3]


@checked
@given(
    value=st.integers(0, 2**63 - 1),
    indices=st.lists(st.integers(0, 2**40), min_size=1, max_size=20),
    columns=st.integers(1, 5),
)
def test_hashed_uniform_is_splitmix64(value: int, indices: list[int], columns: int) -> None:
    numbers = hashed_uniform(value, torch.tensor(indices), columns)
    assert numbers.dtype == torch.float32
    assert numbers.tolist() == [[splitmix_reference(value, i, c) for c in range(columns)] for i in indices]
    assert float(numbers.min()) >= 0.0
    assert float(numbers.max()) < 1.0


@checked
@given(indices=st.lists(st.integers(0, 5000), min_size=1, max_size=80), seed=st.integers(0, 2**32))
def test_numbers_belong_to_an_index_whatever_the_batch(indices: list[int], seed: int) -> None:
    everyone = hashed_uniform(seed, torch.arange(5001), 3)
    assert torch.equal(hashed_uniform(seed, torch.tensor(indices), 3), everyone[indices])


@pytest.fixture(scope="module")
def sample() -> torch.Tensor:
    """(50000, 4) numbers of one key, float64."""
    return hashed_uniform(key(3, "statistics"), torch.arange(50_000), 4).double()


def test_numbers_are_uniform(sample: torch.Tensor) -> None:
    n = sample.numel()
    # Five standard errors; of the variance it is sqrt((1/80 - 1/144) / n).
    assert abs(float(sample.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / n)
    assert abs(float(sample.var()) - 1 / 12) < 5 * math.sqrt((1 / 80 - 1 / 144) / n)
    assert stats.kstest(sample.flatten().numpy(), "uniform").pvalue > 1e-3
    for column in sample.T:
        assert stats.kstest(column.numpy(), "uniform").pvalue > 1e-3


def test_all_24_bits_are_random(sample: torch.Tensor) -> None:
    words = (sample.flatten() * 2**24).to(torch.int64)
    for bit in range(24):
        ones = int((words >> bit & 1).sum())
        assert stats.binomtest(ones, len(words)).pvalue > 1e-4, bit


def test_numbers_are_uncorrelated(sample: torch.Tensor) -> None:
    limit = 5 / math.sqrt(len(sample))
    between_columns = torch.corrcoef(sample.T) - torch.eye(4)
    assert float(between_columns.abs().max()) < limit
    for lag in (1, 2, 7, 64):
        for column in sample.T:
            assert abs(float(torch.corrcoef(torch.stack([column[:-lag], column[lag:]]))[0, 1])) < limit
        # The next index's first column and this one's last lie one counter apart or far: neither may show.
        pair = torch.stack([sample[:-lag, 3], sample[lag:, 0]])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < limit
    other = hashed_uniform(key(4, "statistics"), torch.arange(50_000), 1).double()[:, 0]
    assert abs(float(torch.corrcoef(torch.stack([sample[:, 0], other]))[0, 1])) < limit


# What a task's augmentation draws from


def draws(random: SampleRandom, indices: torch.Tensor) -> list[torch.Tensor]:
    """One of each kind, in the order that an `augment` would call them."""
    random.of(indices)
    return [
        random.uniform(),
        random.uniform(3),
        random.integers(5, columns=2),
        random.normal(2),
        random.integers(5, columns=2),
        random.uniform(3),
    ]


@checked
@given(
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 50),
    indices=st.lists(st.integers(0, 299), min_size=1, max_size=40),
)
def test_table_and_direct_path_give_the_same_bits(seed: int, epoch: int, indices: list[int]) -> None:
    by_table = SampleRandom(seed, 300, CPU, table_limit=10**9)
    direct = SampleRandom(seed, 300, CPU, table_limit=0)
    mixed = SampleRandom(seed, 300, CPU, table_limit=600)  # one and two columns by table, three direct
    for random in (by_table, direct, mixed):
        random.start_epoch(epoch)
    rows = torch.tensor(indices)
    draws(by_table, torch.arange(40))  # what came before doesn't matter
    wanted = draws(direct, rows)
    for random in (by_table, mixed):
        for _ in range(2):  # the second time from the filled tables
            assert all(map(torch.equal, draws(random, rows), wanted))


@pytest.mark.parametrize("table_limit", [0, 10**9])
def test_a_sample_is_augmented_alike_in_whatever_batch(table_limit: int) -> None:
    random = SampleRandom(3, 1000, CPU, table_limit=table_limit)
    everyone = draws(random, torch.arange(1000))
    for size in (1, 2, 3, 7, 8, 17, 64):
        rows = torch.randperm(1000, generator=torch.Generator().manual_seed(size))[:size]
        assert all(torch.equal(some, every[rows]) for some, every in zip(draws(random, rows), everyone))


@pytest.mark.parametrize("table_limit", [0, 10**9])
def test_streams_epochs_and_seeds_differ(table_limit: int) -> None:
    rows = torch.arange(200)
    seen = []
    for seed, epoch in itertools.product((0, 1), (0, 1, 2)):
        random = SampleRandom(seed, 200, CPU, table_limit=table_limit)
        random.start_epoch(epoch)
        random.of(rows)
        seen += [tuple(random.uniform().flatten().tolist()) for _ in range(3)]
    assert len(set(seen)) == len(seen)


def test_the_streams_of_a_sample_are_those_of_earlier_versions() -> None:
    """The n-th draw has the key (seed, epoch, n): other bits mean that no earlier run can be repeated."""
    rows = torch.tensor([4, 2])
    random = SampleRandom(9, 5, CPU)
    for epoch in (0, 3):  # epoch 0 without being told
        if epoch:
            random.start_epoch(epoch)
        streams = [hashed_uniform(key(9, "augmentation", epoch, n), rows, 1) for n in range(4)]
        random.of(rows)
        assert torch.equal(random.uniform(), streams[0])
        assert torch.equal(random.integers(10), (10 * streams[1]).long())
        normal = torch.sqrt(-2.0 * torch.log1p(-streams[2])) * torch.cos(2.0 * torch.pi * streams[3])
        assert torch.equal(random.normal(), normal)


def test_an_epoch_can_be_gone_back_to() -> None:
    """Resuming: epoch 1 is epoch 1, whether epoch 0 came before it or 2 did."""
    rows = torch.arange(50)
    one, other = SampleRandom(0, 50, CPU), SampleRandom(0, 50, CPU)
    one.start_epoch(1)
    first = one.of(rows).uniform()
    for epoch in (2, 1):
        other.start_epoch(epoch)
        again = other.of(rows).uniform()
    assert torch.equal(first, again)


def test_integers() -> None:
    random = SampleRandom(1, 60_000, CPU)
    for high in (1, 2, 3, 10):
        values = random.of(torch.arange(60_000)).integers(high)
        assert values.dtype == torch.int64
        counts = values.flatten().bincount(minlength=high)
        assert len(counts) == high
        if high > 1:
            assert stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("table_limit", [0, 10**9])
def test_integers_stay_below_high(monkeypatch: pytest.MonkeyPatch, table_limit: int) -> None:
    """The largest of the uniform numbers times `high` must not round up to `high`."""
    monkeypatch.setattr(
        "trainer.exact.order.hashed_uniform", lambda key, rows, columns: torch.full((4, 1), 1.0 - 2.0**-24)
    )
    random = SampleRandom(0, 4, CPU, table_limit=table_limit)
    for high in [*range(1, 3000), 12_345, 65_535, 65_536, 1_000_003]:
        assert int(random.of(torch.arange(4)).integers(high).max()) == high - 1


def test_normal_moments() -> None:
    values = SampleRandom(2, 40_000, CPU).of(torch.arange(40_000)).normal(2)
    assert values.dtype == torch.float32
    assert values.shape == (40_000, 2)
    flat = values.flatten().double()
    n = len(flat)
    assert torch.isfinite(flat).all()
    # Standard errors of mean, variance, skewness and excess kurtosis: 1, sqrt 2, sqrt 6, sqrt 24 over sqrt n.
    moments = (flat.mean(), flat.var() - 1, (flat**3).mean(), (flat**4).mean() - 3)
    for moment, error in zip(moments, (1, 2, 15, 96)):
        assert abs(float(moment)) < 5 * math.sqrt(error / n)
    assert stats.kstest(flat.numpy(), "norm").pvalue > 1e-3
    assert abs(float(torch.corrcoef(values.T.double())[0, 1])) < 5 / math.sqrt(n / 2)


def test_a_stream_does_not_remember_its_kind() -> None:
    """An `augment` that draws integers for one micro-batch and a uniform number for the next gets what it asks for."""
    rows = torch.arange(20)
    fresh, used = SampleRandom(0, 20, CPU), SampleRandom(0, 20, CPU)
    used.of(rows).integers(7, columns=2)
    assert torch.equal(used.of(rows).uniform(2), fresh.of(rows).uniform(2))
    assert torch.equal(used.of(rows).integers(3, columns=2), fresh.of(rows).integers(3, columns=2))
    assert torch.equal(used.of(rows).integers(7, columns=2), SampleRandom(0, 20, CPU).of(rows).integers(7, columns=2))


@pytest.mark.parametrize(("samples", "batch", "micro"), [(100, 32, 8), (7, 4, 1), (50, 20, 20), (12, 12, 5), (3, 8, 8)])
def test_by_length_keeps_the_samples_of_each_batch(samples: int, batch: int, micro: int) -> None:
    order, lengths = epoch_order(3, 0, samples), torch.arange(samples) * 7 % 11
    arranged = by_length(order, lengths, batch, micro)
    for before, after in zip(order.split(batch), arranged.split(batch)):
        assert sorted(before.tolist()) == sorted(after.tolist())
        bounds = micro_batch_bounds(len(after), micro)
        of_micro_batches = [lengths[after[start:stop]] for start, stop in bounds]
        for part in of_micro_batches:  # what lies between its shortest and longest is in it
            inside = (lengths[after] > part.min()) & (lengths[after] < part.max())
            assert int(inside.sum()) == int(((part > part.min()) & (part < part.max())).sum())


@pytest.mark.parametrize(
    ("samples", "wanted"),
    [
        (4, [[0, 1, 2, 3]]),
        (8, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (12, [[0, 1, 2, 3], [8, 9, 10, 11], [4, 5, 6, 7]]),
        (11, [[0, 1, 2], [7, 8, 9, 10], [3, 4, 5, 6]]),  # sizes are those of the plan
        (16, [[0, 1, 2, 3], [12, 13, 14, 15], [4, 5, 6, 7], [8, 9, 10, 11]]),
    ],
)
def test_by_length_by_hand(samples: int, wanted: list[list[int]]) -> None:
    order = torch.arange(samples).flip(0)
    assert by_length(order, torch.arange(samples), 100, 4).tolist() == [i for part in wanted for i in part]


@pytest.mark.parametrize("kinds", [1, 2, 7])
def test_samples_of_one_length_keep_their_order(kinds: int) -> None:
    """A sort that is not stable orders equal lengths as its kernel likes, from some size on."""
    order = epoch_order(0, 0, 300)
    lengths = torch.arange(300) % kinds
    wanted = sorted(order.tolist(), key=lambda sample: int(lengths[sample]))
    assert by_length(order, lengths, 300, 300).tolist() == wanted


def test_by_length_gives_every_rank_short_and_long_ones() -> None:
    lengths = torch.arange(64)
    arranged = by_length(torch.randperm(64), lengths, 64, 8)
    assert arranged.view(8, 8).float().mean(1).tolist() == [3.5, 59.5, 11.5, 51.5, 19.5, 43.5, 27.5, 35.5]
    assert len({int(part.sum()) for part in arranged.view(4, 16)}) == 1
