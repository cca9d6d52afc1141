"""From global batches to ranks: every sample once at every world size, and errors whose remedies work."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trainer.errors import UserError
from trainer.exact.plan import BatchPlan, micro_batch_bounds, nearest_possible, rank_block, resolve, steps_per_epoch

# Without a deadline: on a busy machine any example can take long.
checked = settings(deadline=None)

sizes = st.integers(1, 300)
worlds = st.integers(1, 40)


# Micro-batches


@checked
@given(samples=st.integers(1, 2000), size=sizes)
def test_micro_batches_hold_every_sample_once(samples: int, size: int) -> None:
    bounds = micro_batch_bounds(samples, size)
    covered = [position for start, stop in bounds for position in range(start, stop)]
    assert covered == list(range(samples))


@checked
@given(samples=st.integers(1, 2000), size=sizes)
def test_micro_batches_are_even_and_no_larger_than_asked(samples: int, size: int) -> None:
    lengths = [stop - start for start, stop in micro_batch_bounds(samples, size)]
    assert min(lengths) >= 1 and max(lengths) - min(lengths) <= 1 and max(lengths) <= size
    fewest = samples // size + (samples % size > 0)
    assert len(lengths) == fewest
    if samples % size == 0:
        assert set(lengths) == {size}


def test_micro_batches_by_hand() -> None:
    assert micro_batch_bounds(12, 4) == [(0, 4), (4, 8), (8, 12)]
    assert [b - a for a, b in micro_batch_bounds(9, 8)] == [4, 5]  # not 8 and 1: BatchNorm needs two samples
    assert micro_batch_bounds(3, 8) == [(0, 3)]


@pytest.mark.parametrize(("samples", "whole", "all_of_them"), [(30, 2, 3), (24, 2, 2), (25, 2, 3), (5, 0, 1)])
def test_steps_of_an_epoch(samples: int, whole: int, all_of_them: int) -> None:
    assert steps_per_epoch(samples, 12, drop_last=True) == whole
    assert steps_per_epoch(samples, 12, drop_last=False) == all_of_them


# Ranks


@checked
@given(micro_batches=st.integers(0, 500), world_size=worlds)
def test_blocks_follow_one_another_and_cover(micro_batches: int, world_size: int) -> None:
    blocks = [rank_block(micro_batches, world_size, rank) for rank in range(world_size)]
    assert [j for block in blocks for j in block] == list(range(micro_batches))
    lengths = [len(block) for block in blocks]
    assert max(lengths) - min(lengths) <= 1
    assert max(lengths) == -(-micro_batches // world_size)


def test_blocks_by_hand() -> None:
    assert [list(rank_block(8, 3, r)) for r in range(3)] == [[0, 1], [2, 3, 4], [5, 6, 7]]
    # A tail batch smaller than the world: two micro-batches on five ranks.
    assert [list(rank_block(2, 5, r)) for r in range(5)] == [[], [], [0], [], [1]]


@checked
@given(samples=st.integers(1, 400), B=sizes, m=sizes, W=worlds)
def test_an_epoch_uses_every_sample_once_at_every_world_size(samples: int, B: int, m: int, W: int) -> None:
    """The ragged last batch included, which may have fewer micro-batches than there are ranks."""
    assume(m <= B)
    seen, cut = [], []
    for start in range(0, samples, B):
        bounds = micro_batch_bounds(min(B, samples - start), m)
        for rank in range(W):
            for j in rank_block(len(bounds), W, rank):
                cut.append((start + bounds[j][0], start + bounds[j][1]))
                seen += range(*cut[-1])
    assert seen == list(range(samples))
    # What is in a micro-batch doesn't depend on W: the cut is that of one rank.
    alone = [(s + a, s + b) for s in range(0, samples, B) for a, b in micro_batch_bounds(min(B, samples - s), m)]
    assert cut == alone


# Plans


@checked
@given(B=sizes, m=sizes, W=worlds)
def test_strong_scaling_holds_the_global_batch(B: int, m: int, W: int) -> None:
    M = len(range(0, B, m))
    assume(m <= B and W <= M)
    plan = resolve(W, B, m, None)
    assert plan == BatchPlan("strong", B, m, W)
    assert plan.micro_batches == M
    blocks = [len(rank_block(M, W, rank)) for rank in range(W)]
    assert sum(blocks) == M and min(blocks) >= 1
    assert plan.gradient_accumulation_steps == max(blocks)
    assert len(micro_batch_bounds(B, m)) == M


@checked
@given(m=sizes, accumulation=st.none() | st.integers(1, 20), W=worlds)
def test_weak_scaling_grows_the_global_batch(m: int, accumulation: int | None, W: int) -> None:
    plan = resolve(W, None, m, accumulation)
    each = 1 if accumulation is None else accumulation
    assert plan == BatchPlan("weak", W * m * each, m, W)
    assert plan.per_rank() == str(each)
    # And it is the strong-scaling run of that batch on one rank.
    assert resolve(1, plan.global_batch_size, m, None).micro_batches == plan.micro_batches


@checked
@given(m=sizes, accumulation=st.integers(1, 20), W=worlds)
def test_all_three_keys_where_they_agree(m: int, accumulation: int, W: int) -> None:
    plan = resolve(W, m * accumulation * W, m, accumulation)
    assert plan == BatchPlan("strong", m * accumulation * W, m, W)
    assert plan.gradient_accumulation_steps == accumulation


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ((1, 256, 8, None), "global batch 256 samples = 32 micro-batches x 8 samples; 1 rank x 32 micro-batches"),
        ((32, 256, 8, None), "global batch 256 samples = 32 micro-batches x 8 samples; 32 ranks x 1 micro-batch"),
        ((1, 8, 8, None), "global batch 8 samples = 1 micro-batch x 8 samples; 1 rank x 1 micro-batch"),
        ((2, 4, 1, None), "global batch 4 samples = 4 micro-batches x 1 sample; 2 ranks x 2 micro-batches"),
        ((2, 4, 2, None), "global batch 4 samples = 2 micro-batches x 2 samples; 2 ranks x 1 micro-batch"),
        ((4, 4096, 8, None), "global batch 4,096 samples = 512 micro-batches x 8 samples; 4 ranks x 128 micro-batches"),
        (
            (3, 256, 8, None),
            "global batch 256 samples = 32 micro-batches x 8 samples; 3 ranks x 10 or 11 micro-batches",
        ),
        (
            (2, 10, 4, None),
            "global batch 10 samples = 3 micro-batches x at most 4 samples; 2 ranks x 1 or 2 micro-batches",
        ),
    ],
)
def test_equation(keys: tuple[int, int, int, None], wanted: str) -> None:
    assert resolve(*keys).equation() == wanted


# Errors and their remedies


def refusal(W: int, B: int | None, m: int | None, accumulation: int | None = None) -> str:
    with pytest.raises(UserError) as caught:
        resolve(W, B, m, accumulation)
    return str(caught.value)


def numbers(pattern: str, message: str) -> list[int]:
    """The numbers a message gives in a pattern; fails if it doesn't."""
    found = re.search(pattern, message)
    assert found, f"{pattern} not in: {message}"
    return [int(number) for number in found.groups()]


def works(W: int, B: int | None, m: int | None, accumulation: int | None) -> bool:
    try:
        resolve(W, B, m, accumulation)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("accumulation", [None, 4])
def test_no_batch_size(accumulation: int | None) -> None:
    message = refusal(2, None, None, accumulation)
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert name in message


@checked
@given(B=st.integers(1, 5000))
def test_no_micro_batch_size(B: int) -> None:
    message = refusal(1, B, None)
    assert f"train_batch_size ({B})" in message
    (m,) = numbers(r"Add train_micro_batch_size_per_gpu, for example (\d+)", message)
    (largest,) = numbers(r"1 to (\d+) ranks", message)
    assert works(1, B, m, None) and works(largest, B, m, None) and not works(largest + 1, B, m, None)


def test_no_micro_batch_size_with_accumulation() -> None:
    message = refusal(2, 256, None, 4)
    assert "leave gradient_accumulation_steps out" in message
    (m,) = numbers(r"Add train_micro_batch_size_per_gpu, for example (\d+)", message)
    assert works(2, 256, m, None)


@checked
@given(B=sizes, more=st.integers(1, 100))
def test_micro_batch_larger_than_the_global_batch(B: int, more: int) -> None:
    m = B + more
    message = refusal(1, B, m)
    assert f"train_micro_batch_size_per_gpu ({m})" in message and f"train_batch_size ({B})" in message
    (smaller,) = numbers(r"train_micro_batch_size_per_gpu=(\d+) or less", message)
    (larger,) = numbers(r"train_batch_size=(\d+) or more", message)
    assert works(1, B, smaller, None) and works(1, B, max(1, smaller // 2), None)
    assert works(1, larger, m, None) and works(1, larger + 5, m, None) and not works(1, larger - 1, m, None)


def test_micro_batch_larger_than_the_global_batch_on_several_ranks() -> None:
    message = refusal(4, 8, 16)
    (smaller,) = numbers(r"train_micro_batch_size_per_gpu=(\d+) or less", message)
    (larger,) = numbers(r"train_batch_size=(\d+) or more", message)
    assert works(4, 8, smaller, None) and works(4, larger, 16, None)


@checked
@given(B=sizes, m=sizes, more=st.integers(1, 100))
def test_more_ranks_than_micro_batches(B: int, m: int, more: int) -> None:
    assume(m <= B)
    M = -(-B // m)
    W = M + more
    message = refusal(W, B, m)
    assert f"{W} ranks" in message and f"{M} micro-batches" in message
    assert f"train_batch_size {B} / train_micro_batch_size_per_gpu {m}" in message
    (ranks,) = numbers(r"Use at most (\d+) ranks", message)
    assert works(ranks, B, m, None) and not works(ranks + 1, B, m, None)
    if B >= W:
        (smaller,) = numbers(r"train_micro_batch_size_per_gpu=(\d+) or less", message)
        assert works(W, B, smaller, None) and works(W, B, 1, None)
        assert "another model" in message
    else:
        assert "or less" not in message and not works(W, B, 1, None)


@given(B=st.integers(1, 200), m=st.integers(1, 20), accumulation=st.integers(1, 10), W=st.integers(1, 10))
@settings(deadline=None, max_examples=300)
def test_three_keys_that_contradict_one_another(B: int, m: int, accumulation: int, W: int) -> None:
    product = m * accumulation * W
    assume(m <= B and product != B)
    message = refusal(W, B, m, accumulation)
    assert (
        f"train_batch_size ({B}) is not train_micro_batch_size_per_gpu ({m}) x gradient_accumulation_steps "
        f"({accumulation}) x {W} rank{'s' if W > 1 else ''} = {product}" in message
    )
    (other_batch,) = numbers(r"set train_batch_size=(\d+)", message)
    assert works(W, other_batch, m, accumulation)
    assert ("run on" in message) == (B % (m * accumulation) == 0)
    if "run on" in message:
        (ranks,) = numbers(r"run on (\d+) ranks?\b", message)
        assert works(ranks, B, m, accumulation)
    assert ("set gradient_accumulation_steps" in message) == (B % (m * W) == 0)
    if "set gradient_accumulation_steps" in message:
        (other_accumulation,) = numbers(r"set gradient_accumulation_steps=(\d+)", message)
        assert works(W, B, m, other_accumulation)
    if -(-B // m) >= W:  # with fewer micro-batches than ranks see the next test
        assert "leave gradient_accumulation_steps out" in message and works(W, B, m, None)


@pytest.mark.parametrize(
    ("keys", "remedies"),
    [
        ((1, 8, 16), "Try train_micro_batch_size_per_gpu=8 or less, or train_batch_size=16 or more."),
        ((2, 8, 16), "Try train_micro_batch_size_per_gpu=4 or less, or train_batch_size=17 or more, on 2 ranks."),
        ((4, 8, 16), "Try train_micro_batch_size_per_gpu=2 or less, or train_batch_size=49 or more, on 4 ranks."),
        ((8, 8, 16), "Try train_micro_batch_size_per_gpu=1 or less, or train_batch_size=113 or more, on 8 ranks."),
        ((9, 8, 16), "Try train_batch_size=129 or more, on 9 ranks."),
        ((8, 8, 2), "Use at most 4 ranks, or train_micro_batch_size_per_gpu=1 or less (a smaller micro-batch is"),
        ((9, 8, 2), "Use at most 4 ranks."),
        ((1, 256, None), "for example 8. Then 1 to 32 ranks give the same model."),
        ((1, 20, None), "for example 1. Then 1 to 20 ranks give the same model."),
    ],
)
def test_remedies_by_hand(keys: tuple[int, int, int | None], remedies: str) -> None:
    assert remedies in refusal(*keys)


def test_leaving_accumulation_out_is_only_suggested_where_it_helps() -> None:
    assert not works(4, 8, 4, None)
    assert "leave gradient_accumulation_steps out" not in refusal(4, 8, 4, 4)


# Nearest world size


@given(
    W=st.integers(1, 60),
    B=st.none() | st.integers(1, 120),
    m=st.none() | st.integers(1, 30),
    accumulation=st.none() | st.integers(1, 8),
)
@settings(deadline=None, max_examples=300)
def test_nearest_possible_is_the_nearest(W: int, B: int | None, m: int | None, accumulation: int | None) -> None:
    """Against every world size up to where none can work any more."""
    possible = [w for w in range(1, 200) if works(w, B, m, accumulation)]
    expected = min(possible, key=lambda w: (abs(w - W), w), default=None)
    assert nearest_possible(W, B, m, accumulation) == expected


def test_nearest_possible_by_hand() -> None:
    assert nearest_possible(3, 64, 8, None) == 3
    assert nearest_possible(100, 64, 8, None) == 8
    assert nearest_possible(1, 64, 8, 2) == 4
    assert nearest_possible(9, 64, 8, 2) == 4
    assert nearest_possible(3, 64, 8, 3) is None  # 64 / 24 is no number of ranks
    assert nearest_possible(3, 64, None, None) is None
