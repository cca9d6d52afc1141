"""Global batches and their micro-batches: what is in them, and that each is computed as if it were alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.errors import UserError
from trainer.exact import micro_batches as module
from trainer.exact.micro_batches import GlobalBatch, GlobalBatches, MicroBatches
from trainer.exact.order import by_length, epoch_order, key
from trainer.exact.progress import Progress
from trainer.exact.splits import Split

CPU = torch.device("cpu")
SAMPLES, B, m = 30, 12, 4  # 12, 12 and 6 samples: 3, 3 and 2 micro-batches; the last ones have 3 samples

pytestmark = pytest.mark.usefixtures("one_thread")


def split_of(**more: Any) -> Split:
    generator = torch.Generator().manual_seed(1)
    return Split({"x": torch.randn(SAMPLES, 5, generator=generator), "y": torch.arange(SAMPLES)}, **more)


def batches_of(split: Split, **options: Any) -> GlobalBatches:
    given = {"seed": 3, "global_batch_size": B, "micro_batch_size": m, "drop_last": False, "total_steps": 8} | options
    return GlobalBatches(split, CPU, **given)


# Global batches


def test_every_epoch_has_every_sample_once_in_its_own_order() -> None:
    batches = batches_of(split_of())
    assert batches.steps_per_epoch == 3
    found = list(batches.starting_at(0))
    assert [batch.step for batch in found] == list(range(8))
    assert [batch.progress for batch in found] == [Progress(step, step // 3, 8) for step in range(8)]
    assert [len(batch.indices) for batch in found] == [12, 12, 6, 12, 12, 6, 12, 12]
    for epoch in range(2):
        of_epoch = torch.cat([batch.indices for batch in found[3 * epoch : 3 * epoch + 3]])
        assert torch.equal(of_epoch, epoch_order(3, epoch, SAMPLES))
    assert found[0].bounds == [(0, 4), (4, 8), (8, 12)]
    assert found[2].bounds == [(0, 3), (3, 6)]
    assert (found[0].count, found[0].tokens, found[0].longest, found[0].counts) == (12.0, 0, None, None)


@pytest.mark.parametrize("first", [1, 2, 3, 5, 6, 7])
def test_a_run_that_goes_on_has_the_batches_that_are_left(first: int) -> None:
    batches = batches_of(split_of())
    whole, rest = list(batches.starting_at(0)), list(batches.starting_at(first))
    assert len(rest) == 8 - first
    for one, other in zip(whole[first:], rest):
        assert one.progress == other.progress and torch.equal(one.indices, other.indices)
    assert torch.equal(batches.at(first).indices, whole[first].indices)


@pytest.mark.parametrize("total_steps", [1, 2, 3, 4, 6])
def test_the_run_ends_where_it_should(total_steps: int) -> None:
    assert len(list(batches_of(split_of(), total_steps=total_steps).starting_at(0))) == total_steps


def test_the_last_smaller_batch_can_be_left_out() -> None:
    batches = batches_of(split_of(), drop_last=True)
    assert batches.steps_per_epoch == 2
    assert [len(batch.indices) for batch in batches.starting_at(0)] == [12] * 8
    assert torch.equal(batches.at(3).indices, epoch_order(3, 1, SAMPLES)[12:24])


@pytest.mark.parametrize(
    ("batch_size", "drop_last", "wanted"), [(12, False, {3, 2}), (12, True, {3}), (15, False, {4}), (28, False, {7, 1})]
)
def test_every_number_of_micro_batches_is_known_before(batch_size: int, drop_last: bool, wanted: set[int]) -> None:
    """Buffers are made for them once."""
    batches = batches_of(split_of(), global_batch_size=batch_size, drop_last=drop_last)
    assert batches.micro_batch_counts() == wanted
    assert {len(batch.bounds) for batch in batches.starting_at(0)} == wanted


def test_counts_are_added_up_from_the_samples() -> None:
    counts = torch.arange(SAMPLES) * 1.5
    batch = batches_of(split_of(counts=counts), counted=True).at(0)
    assert batch.count == float(counts[batch.indices].sum())
    assert batch.counts == [float(counts[batch.indices[a:b]].sum()) for a, b in batch.bounds]


def test_a_batch_that_counts_nothing_is_an_error_with_its_step() -> None:
    counts = torch.ones(SAMPLES)
    counts[epoch_order(3, 0, SAMPLES)[12:24]] = 0.0
    batches = batches_of(split_of(counts=counts))
    assert batches.at(0).count == 12.0
    said = r"^The counts \(valid tokens, or weights\) of the 12 samples of step 2 add up to 0, so"
    with pytest.raises(UserError, match=said) as caught:
        batches.at(1)
    assert caught.value.agreed


# Samples of different lengths

LENGTHS = torch.arange(SAMPLES) % 7 + 1


def padded_split(lengths: Tensor = LENGTHS) -> Split:
    return Split({"x": torch.randn(SAMPLES, 9), "y": torch.arange(SAMPLES)}, lengths=lengths, padded=("x",))


def test_samples_of_about_one_length_share_a_micro_batch() -> None:
    batches = batches_of(padded_split())
    for epoch in range(2):
        order = by_length(epoch_order(3, epoch, SAMPLES), LENGTHS, B, m)
        assert torch.equal(torch.cat([batches.at(3 * epoch + i).indices for i in range(3)])[:SAMPLES], order)
    batch = batches.at(0)
    assert batch.longest == [int(LENGTHS[batch.indices[a:b]].max()) for a, b in batch.bounds]
    assert batch.tokens == int(LENGTHS[batch.indices].sum())
    assert len(set(batch.longest)) > 1


@pytest.mark.parametrize(("shorter", "arranged"), [(0, False), (1, False), (15, True)])
def test_samples_of_nearly_one_length_keep_their_order(shorter: int, arranged: bool) -> None:
    """Packed text, say: there is nothing to gain."""
    lengths = torch.full((SAMPLES,), 9)
    lengths[:shorter] = 8
    batches = batches_of(padded_split(lengths))
    plain = epoch_order(3, 0, SAMPLES)[:B]
    assert torch.equal(batches.at(0).indices, plain) != arranged
    assert batches.at(0).longest is not None


@pytest.mark.parametrize(("shorter", "arranged"), [(15, False), (16, True)])
def test_lengths_of_98_percent_on_average_are_nearly_one_length(shorter: int, arranged: bool) -> None:
    lengths = torch.full((SAMPLES,), 50)
    lengths[:shorter] = 48  # a mean of 49
    split = Split({"x": torch.zeros(SAMPLES, 50), "y": torch.arange(SAMPLES)}, lengths=lengths, padded=("x",))
    plain = epoch_order(3, 0, SAMPLES)[:B]
    assert torch.equal(batches_of(split).at(0).indices, plain) != arranged


def test_one_shape_leaves_samples_as_long_as_they_are() -> None:
    batch = batches_of(padded_split(), one_shape=True).at(0)
    assert batch.longest is None
    assert torch.equal(batch.indices, epoch_order(3, 0, SAMPLES)[:B])
    assert batch.tokens == int(LENGTHS[batch.indices].sum())


# Micro-batches


class Task:
    """Notes what its methods are called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.drawn: list[float] = []
        self.batches: list[dict[str, Tensor]] = []

    def forward(self, model: nn.Module, batch: dict[str, Tensor], progress: Progress) -> Tensor:
        self.calls.append(("forward", progress.step))
        self.batches.append(batch)
        self.drawn.append(float(torch.rand(())))
        return model(batch["x"])

    def loss(self, outputs: Tensor, batch: dict[str, Tensor], progress: Progress) -> tuple[Tensor, int]:
        self.calls.append(("loss", progress.step))
        return (outputs[:, 0] * batch["y"]).sum(), len(outputs)


class Augments(Task):
    """Adds a number that belongs to the sample and the epoch; draws from torch's generator, too."""

    def __init__(self, in_chunks: bool = False) -> None:
        super().__init__()
        if in_chunks:
            self.augment_in_chunks = True
        self.augmented: list[int] = []
        self.noise: list[float] = []

    def augment(self, batch: dict[str, Tensor], random: Any) -> dict[str, Tensor]:
        self.augmented.append(len(batch["x"]))
        self.noise.append(float(torch.rand(())))
        return {**batch, "x": 2 * batch["x"] + random.uniform(5)}


def made(task: Task, split: Split | None = None, **options: Any) -> MicroBatches:
    torch.manual_seed(0)
    split = split or split_of()
    model = nn.Linear(split.arrays["x"][0].numel(), 1)
    return MicroBatches(task, model, split, device=CPU, seed=3, micro_batch_size=m, **options)


@contextlib.contextmanager
def chunks_of(monkeypatch: pytest.MonkeyPatch, micro_batches: int) -> Iterator[None]:
    """Room for so many micro-batches of `split_of()` in a chunk: a sample has 5 x 4 + 8 bytes."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", micro_batches * m * 28)
        yield


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
@pytest.mark.parametrize(
    "kind", [Task, Augments, lambda: Augments(in_chunks=True)], ids=["plain", "augments", "chunks"]
)
@pytest.mark.parametrize("block", [range(3), range(1, 3), range(2, 2)])
def test_a_micro_batch_among_others_is_as_if_it_were_alone(
    monkeypatch: pytest.MonkeyPatch, chunk: int, kind: Any, block: range
) -> None:
    batch = batches_of(split_of()).at(1)
    among, alone = kind(), kind()
    with chunks_of(monkeypatch, chunk):
        losses = list(made(among).losses(batch, block))
    single = made(alone)
    computed = []
    for j in reversed(block):
        torch.manual_seed(j)
        computed.insert(0, single.compute(batch, j))
    assert len(losses) == len(block)
    for loss, one in zip(losses, computed):
        assert torch.equal(loss, one.result[0]) and loss.requires_grad
        assert one.result[1] == 4
        assert torch.equal((one.outputs[:, 0] * one.arrays["y"]).sum(), one.result[0])
    assert among.drawn == alone.drawn[::-1]
    assert len(set(among.drawn)) == len(block)
    assert among.calls == [("forward", 1), ("loss", 1)] * len(block)


def test_generators_are_seeded_for_each_micro_batch_and_step() -> None:
    batches, task = batches_of(split_of()), Task()
    micro_batches = made(task)
    for step in (0, 1):
        list(micro_batches.losses(batches.at(step), range(3)))
    wanted = []
    for step in (0, 1):
        for j in range(3):
            torch.manual_seed(key(3, "forward", step, j))
            wanted.append(float(torch.rand(())))
    assert task.drawn == wanted


@pytest.mark.parametrize(("chunk", "marks"), [(1, 3), (2, 2), (3, 1)])
def test_samples_are_gathered_for_as_many_micro_batches_as_have_room(
    monkeypatch: pytest.MonkeyPatch, chunk: int, marks: int
) -> None:
    marked: list[str] = []
    task = Augments(in_chunks=True)
    with chunks_of(monkeypatch, chunk):
        micro_batches = made(task, mark=marked.append)
    list(micro_batches.losses(batches_of(split_of()).at(0), range(3)))
    assert marked == ["data"] * marks
    assert task.augmented == {1: [4, 4, 4], 2: [8, 4], 3: [12]}[chunk]


def test_a_micro_batch_larger_than_a_chunk_is_gathered_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Augments(in_chunks=True)
    with chunks_of(monkeypatch, 0):
        micro_batches = made(task)
    assert len(list(micro_batches.losses(batches_of(split_of()).at(0), range(3)))) == 3
    assert task.augmented == [4, 4, 4]


def test_augmentation_is_called_for_one_micro_batch_at_a_time() -> None:
    """And torch's generator is seeded for each, so that its numbers do not depend on who computes what before."""
    batch, task = batches_of(split_of()).at(0), Augments()
    list(made(task).losses(batch, range(3)))
    assert task.augmented == [4, 4, 4]
    wanted = []
    for j in range(3):
        torch.manual_seed(key(3, "augment", 0, j))
        wanted.append(float(torch.rand(())))
    assert task.noise == wanted
    again = Augments()
    list(made(again).losses(batch, range(2, 3)))
    assert again.noise == wanted[2:]


@pytest.mark.parametrize("together", [False, True])
def test_samples_after_augmentation_are_what_forward_gets(together: bool) -> None:
    split, batches = split_of(), batches_of(split_of())
    task = Augments(together)
    micro_batches = made(task, split)
    for step in (4, 0, 3):  # of epochs 1, 0 and 1
        batch = batches.at(step)
        arrays = micro_batches.samples(batch, range(1, 3), together)
        alone = [micro_batches.augmented(batch, j) for j in (1, 2)]
        for piece, one, (start, stop) in zip(arrays, alone, batch.bounds[1:]):
            indices = batch.indices[start:stop]
            random = module.SampleRandom(3, SAMPLES, CPU)
            random.start_epoch(batch.progress.epoch)
            wanted = 2 * split.arrays["x"][indices] + random.of(indices).uniform(5)
            assert torch.equal(piece["x"], wanted) and torch.equal(one["x"], wanted)
            assert piece["y"].tolist() == indices.tolist()
        (computed,) = (micro_batches.compute(batch, j) for j in (1,))
        assert torch.equal(computed.arrays["x"], arrays[0]["x"])
        assert torch.equal(task.batches[-1]["x"], arrays[0]["x"])


def test_looking_at_a_task_without_augment_shows_its_samples() -> None:
    batch = batches_of(split_of()).at(2)
    arrays = made(Task()).augmented(batch, 1)
    assert arrays["y"].tolist() == batch.indices[3:].tolist()


def test_padding_behind_the_longest_of_a_micro_batch_is_cut() -> None:
    split = padded_split()
    batch = batches_of(split).at(0)
    assert batch.longest is not None
    for block in (range(3), range(1, 3)):
        pieces = made(Task(), split).samples(batch, block, False)
        for j, piece in zip(block, pieces):
            start, stop = batch.bounds[j]
            assert torch.equal(piece["x"], split.arrays["x"][batch.indices[start:stop], : batch.longest[j]])
            assert len(piece["y"]) == 4
    uncut = made(Task(), split).samples(replace(batch, longest=None), range(3), False)
    assert [piece["x"].shape for piece in uncut] == [(4, 9)] * 3


@pytest.mark.parametrize("columns", [1, 4, 5, 16])
@pytest.mark.parametrize("step", [0, 2])
def test_every_micro_batch_starts_where_a_fresh_tensor_would(columns: int, step: int) -> None:
    """A kernel may be chosen by where a tensor starts. Those that start well in a chunk anyway are not copied."""
    split = Split({"x": torch.randn(SAMPLES, columns), "y": torch.arange(SAMPLES)})
    batch = batches_of(split).at(step)
    pieces = made(Task(), split).samples(batch, range(len(batch.bounds)), False)
    assert all(tensor.data_ptr() % 64 == 0 for piece in pieces for tensor in piece.values())
    shared = len({piece["x"].untyped_storage().data_ptr() for piece in pieces}) == 1
    size = 4 if step == 0 else 3  # samples of a micro-batch
    assert shared == (size * columns * 4 % 64 == 0)
    assert all(piece["x"].is_contiguous() for piece in pieces)


def test_one_micro_batch_that_starts_badly_is_enough_to_copy() -> None:
    """Of 3, 4 and 4 samples of 16 bytes: the first ends at no multiple of 64, the second is one."""
    split = Split({"x": torch.randn(SAMPLES, 4), "y": torch.arange(SAMPLES)})
    batch = batches_of(split, global_batch_size=11).at(0)
    assert batch.bounds == [(0, 3), (3, 7), (7, 11)]
    pieces = made(Task(), split).samples(batch, range(3), False)
    assert all(piece["x"].data_ptr() % 64 == 0 for piece in pieces)


def test_a_chunk_that_augmentation_transposed_is_made_contiguous() -> None:
    class Transposes(Task):
        augment_in_chunks = True

        def augment(self, batch: dict[str, Tensor], random: Any) -> dict[str, Tensor]:
            return {**batch, "x": batch["x"].t().contiguous().t()}

    split = Split({"x": torch.randn(SAMPLES, 16), "y": torch.arange(SAMPLES)})
    pieces = made(Transposes(), split).samples(batches_of(split).at(0), range(3), True)
    alone = [made(Transposes(), split).samples(batches_of(split).at(0), range(j, j + 1), True)[0] for j in range(3)]
    for piece, one in zip(pieces, alone):
        assert torch.equal(piece["x"], one["x"])
        assert len({piece["x"].untyped_storage().data_ptr() for piece in pieces}) == 3


def test_forward_and_loss_run_in_the_precision_context() -> None:
    entered: list[str] = []

    @contextlib.contextmanager
    def precision() -> Iterator[None]:
        entered.append("in")
        yield
        entered.append("out")

    class Notes(Task):
        def loss(self, outputs: Tensor, batch: dict[str, Tensor], progress: Progress) -> tuple[Tensor, int]:
            entered.append("loss")
            return super().loss(outputs, batch, progress)

    made(Notes(), autocast=precision).compute(batches_of(split_of()).at(0), 0)
    assert entered == ["in", "loss", "out"]


def test_a_batch_knows_its_step() -> None:
    batch = GlobalBatch(Progress(4, 1, 9), torch.arange(3), [(0, 3)], 3.0)
    assert batch.step == 4
    assert batch.tokens == 0


def test_a_split_of_a_single_sample() -> None:
    split = Split({"x": torch.randn(1, 5), "y": torch.arange(1)})
    batch = batches_of(split, total_steps=2).at(1)
    (loss,) = made(Task(), split).losses(batch, range(1))
    assert torch.isfinite(loss)


def test_no_batch_is_left_behind_the_end() -> None:
    batches = batches_of(split_of())
    assert list(batches.starting_at(8)) == list(batches.starting_at(9)) == list(batches.starting_at(20)) == []


@pytest.mark.parametrize("part", [(0, 1), (0, 2), (0, 3), (1, 3)])
def test_a_pack_has_the_samples_of_its_own_micro_batches(part: tuple[int, ...]) -> None:
    """They need not be neighbours."""
    split = split_of()
    batch = batches_of(split, global_batch_size=16).at(0)
    wanted = torch.cat([batch.indices[4 * j : 4 * j + 4] for j in part])
    assert torch.equal(made(Task(), split).pack_samples(batch, part)["y"], wanted)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (torch.ones(()), r"it returned a tensor of shape \(\)"),
        (torch.ones(4, 1), r"it returned a tensor of shape \(4, 1\)"),
        ([1.0] * 4, r"it returned \[1.0, 1.0, 1.0, 1.0\]"),
    ],
)
def test_sample_losses_must_be_one_number_a_sample(returned: Any, said: str) -> None:
    class Wrong(Task):
        def sample_losses(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
            return returned

    split = split_of()
    batch = batches_of(split).at(0)
    with pytest.raises(UserError, match=rf"a tensor of shape \(4,\); {said}"):
        made(Wrong(), split).compute(batch, 0)
