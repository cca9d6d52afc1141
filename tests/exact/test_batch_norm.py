"""Running statistics against plain PyTorch, which sees the micro-batches one after the other."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from trainer.errors import UserError
from trainer.exact.batch_norm import RunningStatistics
from trainer.exact.plan import rank_block

STEPS = (4, 4, 1, 7, 3, 4)  # micro-batches of each step


pytestmark = pytest.mark.usefixtures("one_thread")


def small_model(momentum: float | None = 0.1) -> nn.Module:
    """Convolution, BatchNorm in two dimensions, then in one; each with statistics of its own."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6, momentum=momentum),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 5),
        nn.BatchNorm1d(5, momentum=momentum),
    )


def micro_batches(count: int, seed: int) -> list[Tensor]:
    """Of unlike means and sizes, so that order and weights show."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (1 + j) * torch.randn(3 + j % 3, 2, 4, 4, generator=generator) + 10 * torch.randn(1, generator=generator)
        for j in range(count)
    ]


def sequential(model: nn.Module, steps: Sequence[Sequence[Tensor]]) -> nn.Module:
    """Plain PyTorch in float64: a forward for each micro-batch, in order."""
    reference = copy.deepcopy(model).double()
    for step in steps:
        for batch in step:
            reference(batch.double())
    return reference


def forward_all(model: nn.Module, statistics: RunningStatistics, step: Sequence[Tensor]) -> Tensor:
    """A rank's part of a step: (micro-batches, size)."""
    statistics.begin()
    rows = []
    for batch in step:
        model(batch)
        rows.append(torch.empty(statistics.size))
        statistics.collect(rows[-1])
    statistics.settle()
    return torch.stack(rows) if rows else torch.zeros(0, statistics.size)


def run_ranks(models: Sequence[nn.Module], steps: Sequence[Sequence[Tensor]]) -> None:
    """Every step as the ranks make it: each forwards its block, all apply everything in order."""
    everyone = [RunningStatistics(model) for model in models]
    for step in steps:
        blocks = [rank_block(len(step), len(models), rank) for rank in range(len(models))]
        rows = [
            forward_all(model, statistics, [step[j] for j in block])
            for model, statistics, block in zip(models, everyone, blocks)
        ]
        for statistics in everyone:
            statistics.apply(torch.cat(rows))


def check_against(model: nn.Module, reference: nn.Module) -> None:
    ours, theirs = dict(model.named_buffers()), dict(reference.named_buffers())
    assert list(ours) == list(theirs)
    for name, buffer in ours.items():
        if "num_batches_tracked" in name:
            assert int(buffer) == int(theirs[name]), name
            assert buffer.dtype == torch.int64
        else:
            torch.testing.assert_close(buffer.double(), theirs[name], rtol=3e-6, atol=3e-6, msg=name)


@pytest.mark.parametrize("momentum", [0.1, 0.5, 1.0, None])
@pytest.mark.parametrize("W", [1, 3])
def test_against_plain_pytorch(momentum: float | None, W: int) -> None:
    """Momentum None is the cumulative average: all micro-batches ever seen weigh the same."""
    steps = [micro_batches(count, seed) for seed, count in enumerate(STEPS)]
    models = [small_model(momentum) for _ in range(W)]
    reference = sequential(models[0], steps)
    run_ranks(models, steps)
    for model in models:
        check_against(model, reference)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("W", [2, 3, 4, 7, 9])
def test_the_same_bits_at_every_world_size(momentum: float | None, W: int) -> None:
    steps = [micro_batches(count, seed) for seed, count in enumerate(STEPS)]
    one, many = small_model(momentum), [small_model(momentum) for _ in range(W)]
    run_ranks([one], steps)
    run_ranks(many, steps)
    for model in many:
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, one.get_buffer(name)), name


def test_order_matters_and_is_kept() -> None:
    """The last micro-batch weighs most. If the reverse order gave the same, these tests would prove little."""
    step = micro_batches(5, 0)
    one, other = small_model(), small_model()
    run_ranks([one], [step])
    run_ranks([other], [step[::-1]])
    assert not torch.allclose(one[1].running_mean, other[1].running_mean)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_training_goes_on_from_what_the_model_has(momentum: float | None) -> None:
    """A model that was trained before: its statistics and its count are where ours begin."""
    model = small_model(momentum)
    for batch in micro_batches(6, 9):
        model(batch)
    steps = [micro_batches(3, 1), micro_batches(5, 2)]
    reference = sequential(model, steps)
    run_ranks([model], steps)
    check_against(model, reference)
    assert int(model[1].num_batches_tracked) == 6 + 3 + 5


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_synchronised_layer_runs_and_counts_once(momentum: float | None) -> None:
    """It refuses to run without a counter of its own. In a process of its own it is a BatchNorm."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(small_model(momentum))
    assert isinstance(model[1], nn.SyncBatchNorm)
    steps = [micro_batches(3, 1), micro_batches(5, 2)]
    reference = sequential(model, steps)
    run_ranks([model], steps)
    check_against(model, reference)
    assert int(model[1].num_batches_tracked) == 3 + 5


def test_mixed_momenta() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2, momentum=0.3), nn.BatchNorm2d(2, momentum=None), nn.BatchNorm2d(2))
    steps = [micro_batches(count, seed) for seed, count in enumerate(STEPS)]
    reference = sequential(model, steps)
    run_ranks([model], steps)
    check_against(model, reference)


def frozen_model() -> nn.Module:
    """A pretrained layer in evaluation mode, as in fine-tuning, before one that trains."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2))
    for batch in micro_batches(4, 5):
        model(batch)
    model[0].eval()
    return model


def test_frozen_layers_keep_what_they_have() -> None:
    model = frozen_model()
    before = model[0].running_mean.clone(), model[0].running_var.clone()
    steps = [micro_batches(3, 1), micro_batches(2, 2)]
    reference = sequential(model, steps)
    run_ranks([model], steps)
    assert torch.equal(model[0].running_mean, before[0])
    assert torch.equal(model[0].running_var, before[1])
    assert model[0].momentum == 0.1
    for name in ("1.running_mean", "1.running_var"):
        torch.testing.assert_close(
            model.get_buffer(name).double(), reference.get_buffer(name), rtol=3e-6, atol=3e-6, msg=name
        )
    assert int(model[1].num_batches_tracked) == 4 + 5


def test_frozen_layers_do_not_count() -> None:
    model = frozen_model()
    run_ranks([model], [micro_batches(3, 1)])
    assert int(model[0].num_batches_tracked) == 4


def test_a_frozen_layer_forwards_with_its_own_statistics() -> None:
    """Inside a step too: it normalises with the running mean, not with scratch memory."""
    model = frozen_model()
    batch = micro_batches(1, 8)[0]
    expected = model[0](batch)
    statistics = RunningStatistics(model)
    statistics.begin()
    assert torch.equal(model[0](batch), expected)
    statistics.settle()


@pytest.mark.parametrize("momentum", [0.1, 0.7])
def test_instance_norm(momentum: float) -> None:
    model = nn.Sequential(nn.InstanceNorm2d(2, track_running_stats=True, momentum=momentum), nn.Conv2d(2, 3, 1))
    steps = [micro_batches(count, seed) for seed, count in enumerate(STEPS)]
    reference = sequential(model, steps)
    run_ranks([model], steps)
    for name in ("0.running_mean", "0.running_var"):
        torch.testing.assert_close(
            model.get_buffer(name).double(), reference.get_buffer(name), rtol=3e-6, atol=3e-6, msg=name
        )


def test_instance_norm_does_not_count() -> None:
    model = nn.Sequential(nn.InstanceNorm2d(2, track_running_stats=True))
    steps = [micro_batches(2, 0)]
    reference = sequential(model, steps)
    run_ranks([model], steps)
    check_against(model, reference)


class SometimesSkipped(nn.Module):
    """A layer that not every micro-batch goes through, as with stochastic depth or an auxiliary head."""

    def __init__(self, momentum: float | None) -> None:
        super().__init__()
        self.always, self.sometimes = nn.BatchNorm2d(2, momentum=momentum), nn.BatchNorm2d(2, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        x = self.always(x)
        return self.sometimes(x) if len(x) != 4 else x  # of micro-batches 0, 1, 2, ...: not in 1, 4, ...


def steps_with_gaps() -> list[list[Tensor]]:
    """The first step, and a later one, in which `sometimes` is not called at all."""
    return [micro_batches(2, 0)[1:], micro_batches(6, 1), micro_batches(2, 2)[1:], micro_batches(5, 3)]


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("W", [2, 4])
def test_a_layer_that_was_not_called_gives_the_same_bits_at_every_world_size(momentum: float | None, W: int) -> None:
    one, many = SometimesSkipped(momentum), [SometimesSkipped(momentum) for _ in range(W)]
    run_ranks([one], steps_with_gaps())
    run_ranks(many, steps_with_gaps())
    for model in many:
        assert all(torch.equal(buffer, one.get_buffer(name)) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_layer_that_was_not_called_is_left_alone(momentum: float | None, steps: int) -> None:
    """After one step it was never called, and has what it was made with."""
    model = SometimesSkipped(momentum)
    reference = sequential(model, steps_with_gaps()[:steps])
    run_ranks([model], steps_with_gaps()[:steps])
    check_against(model, reference)


def test_a_layer_may_be_frozen_and_thawed_between_steps() -> None:
    """As when the first epochs of a fine-tuning train only the head."""
    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2))
    reference = copy.deepcopy(model).double()
    statistics = RunningStatistics(model)
    for seed, frozen in enumerate((False, True, True, False)):
        step = micro_batches(3, seed)
        for both in (model, reference):
            both[0].train(not frozen)
        for batch in step:
            reference(batch.double())
        statistics.apply(forward_all(model, statistics, step))
    check_against(model, reference)
    assert int(model[0].num_batches_tracked) == 6


# What others see of the model


def test_outside_of_a_step_the_model_is_as_anyone_expects() -> None:
    model = small_model(momentum=None)
    names = list(model.state_dict())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    statistics = RunningStatistics(model)
    forward_all(model, statistics, micro_batches(3, 0))
    # Not applied yet: nothing has changed, names, values and momentum included.
    state = model.state_dict()
    assert list(state) == names
    assert all(torch.equal(state[name], before[name]) for name in names)
    assert model[1].momentum is None
    assert model[1].num_batches_tracked is not None
    # And evaluation uses the running statistics, which `apply` changes in place.
    held = model[1].running_mean
    statistics.apply(torch.ones(2, statistics.size))
    assert model[1].running_mean is held
    assert torch.equal(held, torch.ones(6))
    model.eval()
    x = torch.randn(2, 2, 4, 4)
    expected = nn.functional.batch_norm(model[0](x), torch.ones(6), torch.ones(6), model[1].weight, model[1].bias)
    assert torch.equal(model[1](model[0](x)), expected)


def test_a_saved_state_loads_into_a_plain_model() -> None:
    model, plain = small_model(), small_model()
    run_ranks([model], [micro_batches(4, 0)])
    plain.load_state_dict(model.state_dict())
    model.eval()
    plain.eval()
    x = torch.randn(3, 2, 4, 4)
    assert torch.equal(model(x), plain(x))


def test_inside_a_step_the_forward_is_plain_pytorchs() -> None:
    model = small_model()
    plain = copy.deepcopy(model)
    statistics = RunningStatistics(model)
    statistics.begin()
    for batch in micro_batches(3, 0):
        assert torch.equal(model(batch), plain(batch))
    statistics.settle()


def test_the_statistics_are_those_of_the_micro_batch() -> None:
    """Mean and unbiased variance of each channel, layer after layer; nothing of the micro-batch before."""
    model = nn.Sequential(nn.BatchNorm2d(2))
    statistics = RunningStatistics(model)
    batches = micro_batches(3, 4)
    rows = forward_all(model, statistics, batches)
    for row, batch in zip(rows, batches):
        channels = batch.double().transpose(0, 1).flatten(1)
        wanted = torch.cat([channels.mean(1), channels.var(1)])
        torch.testing.assert_close(row.double(), wanted, rtol=1e-5, atol=1e-5)


def test_where_skip_is_set_the_running_statistics_stay() -> None:
    model = small_model()
    statistics = RunningStatistics(model)
    before = model[1].running_mean.clone(), model[1].running_var.clone()
    for bad in (torch.nan, 5.0):  # the loss was not finite; the statistics may be
        statistics.apply(torch.full((3, statistics.size), bad), torch.ones(()))
    assert torch.equal(model[1].running_mean, before[0])
    assert torch.equal(model[1].running_var, before[1])
    assert int(model[1].num_batches_tracked) == 0
    good = torch.full((3, statistics.size), 2.0)
    statistics.apply(good, torch.zeros(()))
    kept = 0.9**3  # from mean 0 and variance 1
    torch.testing.assert_close(model[1].running_mean, torch.full((6,), 2 - 2 * kept))
    torch.testing.assert_close(model[1].running_var, torch.full((6,), 2 - kept))
    assert int(model[1].num_batches_tracked) == 3


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(3, 2),
        nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.InstanceNorm1d(3), nn.LayerNorm(3)),
    ],
    ids=["no normalisation", "none that keeps statistics"],
)
def test_models_without_running_statistics(model: nn.Module) -> None:
    statistics = RunningStatistics(model)
    assert statistics.size == 0
    # A pack has a row for each of its micro-batches, of which the audit reads one.
    assert statistics.rows_of(statistics.scratch_blocks(3), 3).shape == (3, 0)
    statistics.begin()
    statistics.settle()


def test_a_momentum_that_a_forward_has_set_is_noticed() -> None:
    layer = nn.BatchNorm1d(3)
    statistics = RunningStatistics(layer)
    statistics.begin()
    assert statistics.objection() is None
    layer.momentum = 0.5
    assert "momentum" in str(statistics.objection())
    statistics.settle()
    assert layer.momentum == 0.1
    layer.eval()
    statistics.begin()
    layer.momentum = 0.5
    assert statistics.objection() is None  # whose statistics nobody collects


@pytest.mark.parametrize("trained", [True, False])
def test_a_layer_whose_mode_a_forward_has_changed_is_noticed(trained: bool) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[1].train(trained)
    statistics = RunningStatistics(model)
    statistics.begin()
    assert statistics.objection() is None
    model[1].train(not trained)
    assert "changes the mode of 1 (BatchNorm1d)" in str(statistics.objection())
    statistics.settle()
    statistics.begin()  # from the next step on it is a layer of the other mode
    assert statistics.objection() is None


def test_what_a_layer_reads_too_early_is_not_overlooked() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    statistics = RunningStatistics(model)
    statistics.begin()
    mean, var = model[0].running_mean.clone(), model[0].running_var.clone()
    x = torch.randn(5, 3)
    for read in (mean, var):
        assert not (x - 0.1 * read).square().sum().isfinite()
    assert model(x).isfinite().all()
    torch.testing.assert_close(model[0].running_mean, x.mean(0))


def test_one_of_several_momenta_that_was_set_is_noticed() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    statistics = RunningStatistics(model)
    statistics.begin()
    model[1].momentum = 0.5
    assert statistics.objection() is not None


def test_layers_of_one_channel() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1), nn.BatchNorm2d(1), nn.BatchNorm2d(1))
    steps = [micro_batches(count, seed) for seed, count in enumerate(STEPS)]
    reference = sequential(model, steps)
    run_ranks([model], steps)
    check_against(model, reference)


def test_a_channel_without_any_variance_counts() -> None:
    """A dead channel, say: its variance of 0 is not taken for that of a layer that was not called."""
    model = nn.Sequential(nn.BatchNorm2d(2))
    steps = [micro_batches(3, 0)]
    for batch in steps[0]:
        batch[:, 0] = 7.0
    reference = sequential(model, steps)
    run_ranks([model], steps)
    check_against(model, reference)
    assert int(model[0].num_batches_tracked) == 3


def test_what_an_abandoned_micro_batch_left_is_not_taken_for_the_next_ones() -> None:
    """Its forward failed half-way, and the step is begun again."""
    model = SometimesSkipped(0.1)
    statistics = RunningStatistics(model)
    statistics.begin()
    model(micro_batches(1, 0)[0])
    statistics.settle()
    statistics.begin()
    model(micro_batches(2, 1)[1])  # does not call the second layer
    row = torch.empty(statistics.size)
    statistics.collect(row)
    statistics.settle()
    assert (row[:4] > -1.0).all() and (row[6:] < 0.0).all()
    statistics.begin(5.0)
    statistics.collect(row)
    assert row.tolist() == [5.0] * 8


@pytest.mark.parametrize(("momentum", "lost"), [(0.1, True), (None, False)])
def test_statistics_that_come_with_another_momentum_are_noticed(momentum: float | None, lost: bool) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    statistics, x = RunningStatistics(model), torch.randn(4, 3)
    statistics.begin()
    assert statistics.lost() is None  # nothing was called
    model[0](x)
    layer = model[1]
    own = layer.momentum if momentum is None else momentum
    nn.functional.batch_norm(x, layer.running_mean, layer.running_var, training=True, momentum=own)
    assert ("running statistics of 1 and a momentum of its own" in str(statistics.lost())) == lost
    statistics.settle()


def test_a_variance_of_zero_is_not_taken_for_lost_statistics() -> None:
    """All samples of a micro-batch may be alike, for example empty images."""
    model = nn.BatchNorm1d(3)
    statistics = RunningStatistics(model)
    statistics.begin()
    model(torch.ones(4, 3))
    assert statistics.lost() is None


def test_a_pack_has_scratch_memory_for_each_of_its_micro_batches() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(2))
    statistics = RunningStatistics(model)
    statistics.begin()
    blocks = statistics.scratch_blocks(4)
    assert blocks.shape == (4 * statistics.size,) and bool((blocks < -1e30).all())
    buffers = [model[0].running_mean, model[0].running_var, model[1].running_mean, model[1].running_var]
    for number, (buffer, features) in enumerate(zip(buffers, (3, 3, 2, 2))):
        piece = statistics.scratch_piece(buffer, blocks)
        assert piece is not None and piece.shape == (4, features)
        piece.copy_(torch.arange(4.0)[:, None] * 100 + 10 * number + torch.arange(features))
    first = [0.0, 1.0, 2.0, 10.0, 11.0, 12.0, 20.0, 21.0, 30.0, 31.0]
    assert statistics.rows_of(blocks, 4).tolist() == [[100.0 * k + number for number in first] for k in range(4)]
    part = statistics.scratch_piece(model[0].running_var[1:], blocks)
    assert part is not None and part[0].tolist() == [11.0, 12.0]


def test_what_is_no_statistic_has_no_scratch_memory() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    statistics = RunningStatistics(model)
    own = model[0].running_mean
    statistics.begin()
    blocks = statistics.scratch_blocks(2)
    mean = model[0].running_mean
    for tensor in (torch.zeros(3), own, model[1].bias, mean.view(1, 3)):
        assert statistics.scratch_piece(tensor, blocks) is None
    without = RunningStatistics(nn.Linear(3, 1))
    assert without.scratch_blocks(2).shape == (0,)
    assert without.scratch_piece(mean, blocks) is None
    assert without.rows_of(without.scratch_blocks(2), 2).shape == (2, 0)


def test_an_instance_norm_beside_a_batch_norm_counts_no_batches() -> None:
    """As in plain PyTorch."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True))
    statistics = RunningStatistics(model)
    statistics.begin()
    model(torch.randn(4, 3, 5))
    row = torch.empty(1, statistics.size)
    statistics.collect(row[0])
    statistics.settle()
    statistics.apply(row)
    assert [int(layer.num_batches_tracked) for layer in model] == [1, 0]


def test_a_forward_that_changes_a_layers_mode_is_an_error_that_names_the_step() -> None:
    model = nn.BatchNorm1d(3)
    statistics = RunningStatistics(model)
    statistics.begin()
    statistics.check(6)  # no objection
    model.eval()
    with pytest.raises(UserError, match=r"^The task changes the mode of BatchNorm1d [\s\S]*\nStep 7 was not made\.$"):
        statistics.check(6)
