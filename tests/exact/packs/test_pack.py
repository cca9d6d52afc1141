"""A pack has the bits of its micro-batches computed one by one, in models of many kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.exact.packs.packed import SAMPLES, dense, floats, m, made, trained
from tests.exact.packs.pieces import CPU
from trainer.exact.batch_norm import RunningStatistics
from trainer.exact.packs import layer_functions, rules
from trainer.exact.packs.findings import Findings
from trainer.exact.packs.leaves import Kept, Leaves
from trainer.exact.packs.pack import Pack
from trainer.exact.packs.streams import Streams
from trainer.exact.packs.tensors import NUMBERS, PARTED, SAME
from trainer.exact.packs.trace import Trace
from trainer.exact.packs.verdicts import RefusedError

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = 2  # samples of a micro-batch


class Lab:
    """Calls functions of samples (rows, 3) for single micro-batches, in a trial, and in a later pack.

    Args:
        parameters: trained ones.
        g: micro-batches.
        apart: modules that are called for one micro-batch at a time.
    """

    def __init__(self, *parameters: Tensor, g: int = 2, apart: Sequence[nn.Module] = ()) -> None:
        self.g, self.apart, self.parameters = g, apart, parameters or (torch.ones(1, requires_grad=True),)
        self.places = {id(p): place for place, p in enumerate(self.parameters)}
        self.findings, self.keys = Findings(), [7 + k for k in range(g)]
        self.x = torch.arange(1.0, 1.0 + g * ROWS * 3).view(g * ROWS, 3)
        self.pack: Any = None

    def samples(self, k: int | None = None) -> Tensor:
        """Micro-batch k's, or all."""
        return self.x.clone() if k is None else self.x[ROWS * k : ROWS * (k + 1)].clone()

    def alone(self, forward: Any, loss: Any = None) -> tuple[list[Trace], list[Any]]:
        """What each micro-batch calls, and what it gives."""
        traces, found = [], []
        for k in range(self.g):
            torch.manual_seed(self.keys[k])
            x = self.samples(k)
            traces.append(Trace({"x": x}, frozenset(self.places), self.apart))
            with traces[-1].active():
                outputs = forward(x)
                traces[-1].end_of_forward()
                found.append(outputs if loss is None else loss(outputs, x))
        return traces, found

    def together(self, forward: Any, loss: Any = None, traces: Sequence[Trace | None] = ()) -> Any:
        """What the pack gives."""
        x, streams = self.samples(), Streams(self.g, CPU)
        streams.begin(self.keys)
        statistics, leaves = RunningStatistics(nn.Identity()), Leaves(self.parameters, self.g, Kept())
        self.pack = pack = Pack(
            self.places,
            frozenset(),
            statistics,
            arrays={"x": x},
            rows=len(x),
            g=self.g,
            leaves=leaves,
            streams=streams,
            findings=self.findings,
            traces=traces,
        )
        with pack.active(self.apart):
            outputs = found = forward(x)
            pack.end_of_forward()
            if loss is not None:
                losses = []
                for k in range(self.g):
                    own, piece = pack.outputs_of(outputs, k), pack.samples_of({"x": x}, k)
                    with pack.now(k):
                        losses.append(loss(own, piece["x"]))
                found = pack.stacked(losses)
        pack.end_of_losses()
        assert not streams.disturbed()
        return found

    def trial(self, forward: Any, loss: Any = None, in_pack: Any = None, loss_in_pack: Any = None) -> Any:
        """What a trial gives; `in_pack` and `loss_in_pack` are what the pack calls, if it calls something else."""
        traces, _ = self.alone(forward, loss)
        return self.together(in_pack or forward, loss_in_pack or loss, traces)

    def check(self, forward: Any, loss: Any = None) -> Any:
        """Whether a trial, and a later pack, give what single micro-batches do. Returns what the pack gives."""
        traces, singles = self.alone(forward, loss)
        expected = torch.stack(singles) if loss is not None or singles[0].dim() == 0 else torch.cat(singles)
        found = self.together(forward, loss, traces)
        assert torch.equal(found, expected)
        later = self.together(forward, loss)
        assert torch.equal(later, expected)
        return later

    def refuses(self, why: str, *arguments: Any, **named: Any) -> RefusedError:
        with pytest.raises(RefusedError, match=why) as caught:
            self.trial(*arguments, **named)
        return caught.value

    def ways(self) -> list[bool]:
        """Of the calls in trials: whether they were made once for all micro-batches."""
        return [way.together for way in self.findings.calls.values()]


def weights(*shape: int) -> Tensor:
    return torch.full(shape, 2.0, requires_grad=True)


# Functions of samples


@pytest.mark.parametrize(
    ("forward", "together"),
    [
        (lambda x: torch.tanh(x), [True]),
        (lambda x: torch.softmax(x, dim=1), [True]),
        (lambda x: x.view(x.size(dim=0), -1) * 2.0, [True, True]),
        (lambda x: x.view(len(x) * 3), [True]),
        (lambda x: x.cumsum(0), [False]),
        (lambda x: x.cumsum(0).tanh(), [False, True]),
        (lambda x: x / len(x), [False]),
        (lambda x: x.sum(), [False]),
        (lambda x: x.sum().exp(), [False, False]),
        (lambda x: x * x.mean(), [False, False]),
        (lambda x: x.max(1).values, [True]),
        (lambda x: x.unsqueeze(0).squeeze(0), [False, False]),
        (lambda x: x + torch.arange(3.0), [True, True]),
        (lambda x: x + torch.ones(len(x), 3), [False, True]),
        (lambda x: x + torch.rand(len(x), 3), [False, True]),
        (lambda x: x + torch.rand_like(x), [True, True]),
        (lambda x: F.dropout(x, 0.5), [True]),
        (lambda x: F.relu(x, inplace=True), [True]),
    ],
)
def test_functions_are_called_once_or_for_one_micro_batch_at_a_time(forward: Any, together: list[bool]) -> None:
    lab = Lab()
    lab.check(forward)
    assert [way for way in lab.ways() if way] == [way for way in together if way]
    assert len(lab.ways()) == len(together)


@pytest.mark.parametrize(
    ("forward", "kind"),
    [
        (lambda x: x.tanh(), PARTED),
        (lambda x: x.cumsum(0), PARTED),
        (lambda x: x.sum(), NUMBERS),
        (lambda x: x.sum() * 2.0, NUMBERS),
        (lambda x: torch.arange(3.0), SAME),
        (lambda x: torch.arange(3.0).exp(), SAME),
        (lambda x: torch.zeros(len(x), 3), PARTED),
    ],
)
def test_what_is_made_is_known_by_what_made_it(forward: Any, kind: int) -> None:
    lab = Lab()
    assert lab.pack is None
    found = lab.trial(forward)
    assert lab.pack.tensors.kind(found) == kind


@pytest.mark.parametrize(
    ("forward", "together"),
    [
        (lambda w, x: F.linear(x, w), True),
        (lambda w, x: x * w[0], True),
        (lambda w, x: torch.maximum(x, w[0]), False),
        (lambda w, x: x.sum(1) * w.exp().sum(), True),
    ],
)
def test_functions_of_parameters_without_a_rule_are_called_for_one_micro_batch_at_a_time(
    forward: Any, together: bool
) -> None:
    weight = weights(3, 3)
    lab = Lab(weight)
    lab.check(lambda x: forward(weight, x))
    assert lab.ways()[-1] == together
    assert all(lab.ways()[:-1])


def test_what_follows_from_parameters_alone_is_a_parameter_of_its_own() -> None:
    weight = weights(3)
    lab = Lab(weight)
    lab.check(lambda x: torch.maximum(x, weight.exp()))
    assert len(lab.pack.derived.inputs) == 1
    lab.pack.close()
    assert lab.pack.derived.inputs == [] and lab.pack.shares.ends == {}


def test_each_call_takes_a_tensor_apart_anew() -> None:
    """So that each use gives it a gradient of its own, in its turn."""
    weight = weights(3)
    lab, ends = Lab(weight), list[set[Any]]()

    def forward(x: Tensor) -> Tensor:
        h = x * weight
        found = torch.zeros(())
        for _ in range(2):
            found = found + h.cumsum(0)
            if lab.pack is not None:
                ends.append(set(lab.pack.shares.ends))
        return found

    lab.check(forward)
    assert ends[0].isdisjoint(ends[1]) and ends[2].isdisjoint(ends[3])
    assert [len(own) for own in ends[2:]] == [1, 1]


# What a later pack may not do


def test_other_functions_than_in_the_trials_are_compared_first() -> None:
    lab = Lab()
    lab.trial(lambda x: x.tanh())
    with pytest.raises(RefusedError, match=r"^it calls other functions than in its trials$") as caught:
        lab.together(lambda x: x.sin())
    assert caught.value.untried


def test_other_numbers_of_samples_than_in_the_trials_are_compared_first() -> None:
    lab = Lab()
    lab.trial(lambda x: x * (2 * len(x)))
    with pytest.raises(RefusedError, match=r"^it has other numbers than in its trials$") as caught:
        lab.together(lambda x: x * (3 * len(x)))
    assert caught.value.untried


def test_a_number_that_follows_progress_may_change() -> None:
    lab = Lab()
    lab.trial(lambda x: x * 7)
    assert torch.equal(lab.together(lambda x: x * 9), lab.samples() * 9)


@pytest.mark.parametrize(("one", "other"), [(lambda x: 2 * len(x), lambda x: 7), (lambda x: 7, lambda x: 2 * len(x))])
def test_a_number_that_is_that_of_all_samples_at_times_is_refused(one: Any, other: Any) -> None:
    lab = Lab()
    lab.trial(lambda x: x * one(x))
    lab.refuses("^mul gets a number that is that of all samples at times$", lambda x: x * other(x))


def test_what_a_trial_has_found_may_be_found_again() -> None:
    lab = Lab()
    for _ in range(2):
        lab.trial(lambda x: x * (2 * len(x)) + x.view(len(x), 3))


# What cannot be taken apart


class _Keeps(nn.Module):
    """Multiplies with what it has kept."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.ones(ROWS, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = x.exp() * self.kept
        self.kept = y
        return y


GENERATOR = torch.Generator()
REFUSED: dict[str, tuple[Any, str]] = {
    "a hook": (lambda x: (h := x.requires_grad_() * 2.0, h.register_hook(lambda g: g))[0], "a gradient has a hook"),
    "a generator": (
        lambda x: x + torch.rand(len(x), 3, generator=GENERATOR),
        "^rand with a generator of its own$",
    ),
    "in place": (
        lambda x: (x + 0.0).cumsum_(0),
        "^cumsum_, which cannot be called one micro-batch at a time, in place$",
    ),
    "in place, of another shape": (lambda x: (x + 0.0).unsqueeze_(0), "^unsqueeze_ gives a micro-batch another shape$"),
    "a slice in place": (
        lambda x: ((h := x + 0.0), h[:1].mul_(2.0))[0],
        "^tensors are changed in place, and __getitem__ gives a copy or a view, unlike alone$",
    ),
    "numbers": (lambda x: x * float(x.sum()), "^__float__: what is done next depends on values$"),
    "an array": (lambda x: x * x[:1, :1].numpy().item(), "^numpy: what is done next depends on values$"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_taken_apart_is_refused(what: str) -> None:
    forward, why = REFUSED[what]
    assert not Lab().refuses(why, forward).untried


def test_hooks_on_what_is_saved_are_refused() -> None:
    def forward(x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            return x.exp()

    Lab().refuses("^what is saved for the backward goes through hooks, which would get that of all samples$", forward)


@pytest.mark.parametrize("other", [lambda h: h.max(1).values, lambda h: h.tanh(), lambda h: h * 2.0])
def test_a_tensor_that_a_function_uses_several_times_beside_others_is_refused(other: Any) -> None:
    weight = weights(3)

    def forward(x: Tensor) -> Tensor:
        h = x * weight
        return other(h).sum() + torch.einsum("nd,nd->d", h, h).sum()

    Lab(weight).refuses("^einsum uses a tensor several times that others use as well$", forward)
    Lab(weight).check(lambda x: torch.einsum("nd,nd->d", h := x * weight, h).sum())
    # A use without a gradient does not count.
    Lab(weight).check(lambda x: (torch.einsum("nd,nd->d", h := x * weight, h) * (h > 0).sum()).sum())


def test_an_output_is_a_use() -> None:
    weight = weights(3)

    def forward(x: Tensor) -> Any:
        h = x * weight
        return h, torch.einsum("nd,nd->n", h, h)

    Lab(weight).refuses(
        "^einsum uses a tensor several times that others use as well$", forward, lambda o, x: o[0].sum() + o[1].sum()
    )
    for g in (2, 3):
        Lab(weight, g=g).check(lambda x: forward(x)[1], lambda o, x: o.sum())


def test_calls_are_compared_with_those_of_a_micro_batch_alone() -> None:
    lab = Lab()
    lab.refuses("^sin is called where a micro-batch alone calls tanh$", lambda x: x.tanh(), in_pack=lambda x: x.sin())
    lab.refuses(
        "calls fewer functions than with a micro-batch alone", lambda x: x.tanh().sin(), in_pack=lambda x: x.tanh()
    )
    traces, _ = lab.alone(lambda x: x.tanh())
    with pytest.raises(RefusedError, match="is called where"):
        lab.together(lambda x: x.sin(), None, [None, traces[1]])


# Losses, for one micro-batch at a time


@pytest.mark.parametrize("g", [2, 3])
def test_losses_are_computed_for_one_micro_batch_at_a_time(g: int) -> None:
    Lab(g=g).check(lambda x: x * 2.0, lambda outputs, x: F.dropout((outputs - x).exp().sqrt(), 0.5).sum())
    Lab(g=g).check(lambda x: [x * 2.0, (x > 2.0)], lambda outputs, x: (outputs[0] * outputs[1] * x).mean())
    weight = weights(3)
    Lab(weight, g=g).check(lambda x: x * 2.0, lambda outputs, x: torch.where(x > 0, outputs * weight, x).sum())


def test_another_loss_than_in_the_trials_is_compared_first() -> None:
    lab = Lab()
    lab.trial(lambda x: x * 2.0, lambda outputs, x: outputs.sum())
    one = lab.pack.form
    lab.together(lambda x: x * 2.0, lambda outputs, x: outputs.sum())
    assert lab.pack.form == one
    lab.together(lambda x: x * 2.0, lambda outputs, x: outputs.exp().sum())
    assert lab.pack.form != one


def test_a_loss_is_compared_with_that_of_the_micro_batch_alone() -> None:
    lab, loss = Lab(), lambda outputs, x: outputs.exp().sum()
    why = "^sin is called where a micro-batch alone calls exp$"
    lab.refuses(why, lambda x: x * 2.0, loss, loss_in_pack=lambda outputs, x: outputs.sin().sum())


def test_a_loss_gets_nothing_that_another_micro_batch_has_left_behind() -> None:
    left: list[Tensor] = []

    def loss(outputs: Tensor, x: Tensor) -> Tensor:
        left.append(outputs.exp())
        return (left[0] + outputs).sum()

    lab = Lab()
    traces, _ = lab.alone(lambda x: x * 2.0, loss)
    left.clear()
    with pytest.raises(RefusedError, match=r"^add gets what another micro-batch has left behind$"):
        lab.together(lambda x: x * 2.0, loss, traces)


@pytest.mark.parametrize(
    "outputs", [lambda x: x.sum(), lambda x: torch.ones(4, 3), lambda x: [x, torch.ones(4)], lambda x: [], lambda x: 3]
)
def test_an_output_has_one_row_a_sample(outputs: Any) -> None:
    lab = Lab()
    why = r"^an output that does not have one row a sample$"
    with pytest.raises(RefusedError, match=why):
        lab.trial(outputs, lambda o, x: x.sum())


@pytest.mark.parametrize(
    ("losses", "right"),
    [
        (lambda x: x.sum(1), True),
        (lambda x: x[:, :1], False),
        (lambda x: torch.arange(4.0), False),
        (lambda x: x.view(-1), False),
    ],
)
def test_losses_of_samples_are_added_for_each_micro_batch(losses: Any, right: bool) -> None:
    lab = Lab()
    found = lab.trial(losses)
    if right:
        assert lab.pack.summed(found).tolist() == [21.0, 57.0]
    else:
        with pytest.raises(RefusedError, match=r"^sample_losses\(\) does not return one number a sample$"):
            lab.pack.summed(found)


# Values that the host reads


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: x * 2.0 if bool((x > 0).all()) else x,
        lambda x: x * 2.0 if torch.equal(input=x, other=x) else x,
        lambda x: x * (x[:, 0] > 0).tolist()[1],
        lambda x: x * float(torch.arange(3.0)[2]),
        lambda x: x * (x > 2.5).any(1).sum().clamp(max=1).item(),
    ],
)
def test_the_host_may_read_what_is_the_same_for_all_micro_batches(forward: Any) -> None:
    Lab().check(forward)
    Lab(g=3).check(forward)


@pytest.mark.parametrize(
    ("forward", "once"),
    [
        (lambda x: x * 2.0 if bool((x > 6).all()) else x, True),
        (lambda x: x * 2.0 if int(x[:, 0].sum()) > 9 else x, True),
        (lambda x: x * 2.0 if float(x[:, 0].sum()) > 9 else x, False),
        (lambda x: x * 2.0 if x[:, 0].tolist()[0] > 9 else x, False),
    ],
)
@pytest.mark.parametrize("g", [2, 3])
def test_what_the_host_reads_has_to_be_the_same_for_all(forward: Any, once: bool, g: int) -> None:
    """A flag or a count may be the same for the next micro-batches."""
    lab = Lab(g=g)
    assert lab.refuses("what is done next depends on values", forward).once == once


def test_one_micro_batch_with_another_value_is_enough() -> None:
    for odd in range(3):
        lab = Lab(g=3)
        lab.x[ROWS * odd] = -1.0
        assert lab.refuses("depends on values", lambda x: x if bool((x > 0).all()) else x.abs()).once


# Modules that are called for one micro-batch at a time


class Draws(nn.Module):
    """Draws, and uses its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 3.0))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = F.dropout(x - x.mean(0), 0.5)
        return y * self.weight * scale


@pytest.mark.parametrize("g", [2, 3])
def test_a_module_is_called_for_one_micro_batch_at_a_time(g: int) -> None:
    module, other = Draws(), Draws()
    lab = Lab(module.weight, other.weight, g=g, apart=[module, other])
    lab.check(lambda x: other((module(x.tanh()) + 1.0).sin(), scale=2.0).exp())
    assert not hasattr(module, "__dict__") or "forward" not in vars(module), "it is as it was"


def test_such_a_module_may_hold_another() -> None:
    """What the outer one calls is a micro-batch's own already."""
    inner = Draws()
    outer = nn.Sequential(inner, nn.Tanh())
    Lab(inner.weight, apart=[outer, inner]).check(lambda x: outer(x).exp())


class Function(nn.Module):
    """A module of a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def of(function: Callable[..., Any], *parameters: Tensor) -> tuple[Lab, Function]:
    module = Function(function)
    return Lab(*parameters, apart=[module]), module


def test_a_module_gets_the_numbers_of_its_micro_batch() -> None:
    lab, module = of(lambda x, n, scale: x.cumsum(0) / n * scale)
    _, singles = lab.alone(lambda x: module(x, n=len(x), scale=3.0))
    assert torch.equal(lab.trial(lambda x: module(x, n=len(x), scale=3.0)), torch.cat(singles))


@pytest.mark.parametrize("g", [2, 3])
def test_a_module_gets_no_tensor_that_another_micro_batch_left(g: int) -> None:
    module = _Keeps()
    lab, first = Lab(g=g, apart=[module]), module.kept
    traces, _ = lab.alone(module)
    module.kept = first
    with pytest.raises(RefusedError, match=r"^mul gets what another micro-batch has left behind$"):
        lab.together(module, None, traces)


def test_a_module_that_does_something_else_in_a_pack_is_refused() -> None:
    lab, module = of(lambda x: x.exp())
    traces, _ = lab.alone(lambda x: module(x.tanh()).sin())
    module.function = lambda x: x.sqrt()
    with pytest.raises(RefusedError, match=r"^sqrt is called where a micro-batch alone calls exp$"):
        lab.together(lambda x: module(x.tanh()).sin(), None, traces)


def test_a_module_that_changes_its_input_is_refused() -> None:
    lab, module = of(lambda x: x.mul_(2.0))
    lab.refuses("^Function changes its input in place$", lambda x: module(x + 0.0))


def test_a_module_that_gets_the_same_for_all_micro_batches_is_refused() -> None:
    lab, module = of(lambda x: x.exp())
    why = "^Function has to be computed one micro-batch at a time, and gets the same input for all of them$"
    lab.refuses(why, lambda x: x + module(torch.arange(3.0)))
    numbers, module = of(lambda x: x.exp())
    numbers.check(lambda x: module(x.mean()))


def test_a_module_that_gives_a_view_is_refused_where_tensors_are_changed() -> None:
    lab, module = of(lambda x: x[:, :2])
    lab.check(lambda x: module(x + 0.0).exp())
    lab.refuses("Function gives a copy or a view, unlike alone$", lambda x: module(x + 0.0).mul_(2.0))
    other, module = of(lambda x: x[:, :2] * 2.0)
    other.check(lambda x: module(x + 0.0).mul_(2.0))


def test_a_module_that_uses_its_input_several_times_is_refused_beside_other_uses() -> None:
    weight = weights(3)
    lab, module = of(lambda h: h * h, weight)
    lab.check(lambda x: module(x * weight))
    why = "^Function uses a tensor several times that others use as well$"
    lab.refuses(why, lambda x: module(h := x * weight) + h.sin())
    lab.refuses(why, lambda x: module(h := x * weight) + module(h))


def test_gradients_of_a_modules_two_calls_come_in_their_turn() -> None:
    """Each call gives its input a gradient of its own."""
    weight = weights(3)
    lab, module = of(lambda h: h * 2.0, weight)
    ends: list[Any] = []

    def forward(x: Tensor) -> Tensor:
        h = x * weight
        y = module(h)
        if lab.pack is not None:
            ends.append(set(lab.pack.shares.ends))
        z = module(h)
        if lab.pack is not None:
            ends.append(set(lab.pack.shares.ends))
        return y + z

    lab.check(forward)
    assert len(ends) == 4 and ends[0].isdisjoint(ends[1]) and ends[2].isdisjoint(ends[3])
    assert all(len(own) == 1 for own in ends)


# Whole runs

runs = pytest.mark.usefixtures("group_of_one", "early_packs")


class Tokens(nn.Module):
    """Tied embeddings, positions that no sample has a part of, a class token, and an average."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(20, 8, padding_idx=0), nn.Embedding(6, 8)
        self.first = nn.Parameter(torch.randn(1, 1, 8))
        self.gain = nn.Parameter(torch.randn(8))
        self.norm, self.dropout = nn.LayerNorm(8), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.words(x) + self.places(torch.arange(6)[None])
        y = torch.cat([self.first.expand(len(x), -1, -1), y], dim=1)
        y = self.dropout(self.norm(y * self.gain))
        q = y.unflatten(-1, (2, 4)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, q, q, dropout_p=0.1).transpose(1, 2).flatten(2)
        return F.linear(y.mean(1), self.words.weight)


class Recurrent(nn.Module):
    """A layer that is computed one micro-batch at a time, and one that mixes places."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.LSTM(3, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.memory(x)[0]
        return self.attention(y, y, y)[0]


def convolutions() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv1d(3, 6, 3, padding=1, groups=3, bias=False), nn.BatchNorm1d(6), nn.ReLU(inplace=True)),
        *(nn.Dropout1d(0.2), nn.ConvTranspose1d(6, 4, 2, stride=2), nn.GroupNorm(2, 4), nn.SiLU()),
        *(nn.InstanceNorm1d(4, track_running_stats=True), nn.PReLU(), nn.BatchNorm1d(4, affine=False, momentum=None)),
        *(nn.Flatten(), nn.LazyLinear(5), nn.Sigmoid()),
    )


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "dense": (dense, lambda: floats(3)),
    "convolutions": (convolutions, lambda: floats(3, 6)),
    "tokens": (Tokens, lambda: torch.randint(0, 20, (SAMPLES, 6), generator=torch.Generator().manual_seed(2))),
    "recurrent": (Recurrent, lambda: floats(5, 3)),
}


@runs
@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("case", list(CASES))
def test_packs_have_the_bits_of_single_micro_batches(case: str, size: int) -> None:
    torch.manual_seed(0)
    make, data = CASES[case]
    model, x = make(), data()
    with torch.no_grad():
        model(x[:m])  # lazy layers
    expected, _ = trained(model, x, 0)
    found, packs = trained(model, x, size)
    assert found == expected
    assert packs is not None
    assert packs.refusals() == {}, "they were used"


@runs
def test_packs_have_the_bits_of_single_micro_batches_in_bfloat16() -> None:
    torch.manual_seed(0)
    model, x = convolutions(), floats(3, 6)
    model(x[:m])
    options = {"autocast": lambda: torch.autocast("cpu", torch.bfloat16)}
    found, packs = trained(model, x, 4, **options)
    assert found == trained(model, x, 0, **options)[0]
    assert packs is not None and packs.refusals() == {}


@runs
def test_a_frozen_weight_whose_rows_divide_is_no_part_of_a_micro_batch() -> None:
    """In packs of 2, a frozen layer of 8 features looks as if it had 4 rows for each micro-batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 1))
    model[0].requires_grad_(False)
    found, packs = trained(model, floats(5), 2, micro_batch_size=2)
    assert found == trained(model, floats(5), 0, micro_batch_size=2)[0]
    assert packs is not None and packs.refusals() == {}


@runs
def test_a_batch_norm_whose_gradient_lies_in_memory_in_another_way() -> None:
    """Torch adds such a gradient in another order. The random tasks found it: all places of a channel come in a row."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope, self.norm = nn.PReLU(1), nn.BatchNorm3d(2, affine=False)
            self.head = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.slope(x)).flatten(2).transpose(1, 2)
            return self.head(y).amax(1)

    torch.manual_seed(0)
    model, x = Turned(), floats(2, 3, 4, 3)
    found, packs = trained(model, x, 4)
    assert found == trained(model, x, 0)[0]
    assert packs is not None and packs.refusals() == {}
    assert "batch_norm" in packs.summary()["one_at_a_time"]


class Places(nn.Module):
    """Adds what stands in a table at places that all samples share: some of them twice, one of them for padding."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 8), nn.Linear(8, 2)
        self.table = nn.Embedding(7, 8, **options)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.tensor([[4, 1, 0, 4, 6, 1]])
        return self.outer((self.inner(x) + self.table(places).to(x.device)).tanh())


class Calls(TorchDispatchMode):
    """Counts an operation's calls."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.count = name, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() == self.name
        return func(*args, **(kwargs or {}))


@runs
@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}, {"scale_grad_by_freq": True}])
def test_a_table_that_all_samples_share_has_its_gradients_made_in_one_call(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = Places(**options), floats(6, 3)
    found, packs = trained(model, x, 8)
    assert found == trained(model, x, 0)[0]
    assert packs is not None and packs.refusals() == {}
    step, batches = made(model, x, 8)
    for number, batch in enumerate(batches.starting_at(0)):
        with Calls("aten::embedding_dense_backward") as calls:
            step(batch)
        if number == 4:  # a step of 8 micro-batches; trials compute more, for comparison
            assert calls.count == 1


@runs
def test_a_table_whose_gradients_are_others_in_one_call_is_passed_on_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a device whose kernel adds in an order that follows the number of indices."""

    def wrong(site: Any, grad: Tensor, *rest: Any) -> Any:
        return rules._embedding_backward(site, grad.roll(1, 0), *rest)

    monkeypatch.setattr(layer_functions, "EMBEDDING", (rules.EMBEDDING[0]._replace(backward=wrong),))
    torch.manual_seed(0)
    model, x = Places(), floats(6, 3)
    found, packs = trained(model, x, 8)
    assert found == trained(model, x, 0)[0]
    assert packs is not None and packs.refusals() == {}
