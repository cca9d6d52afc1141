"""What belongs to a micro-batch stays with it, although several are computed at once. An outsider found each of these.

In the first steps, in which packs are tried, nothing of it has an effect: a gate is 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.exact.packs.packed import Task, floats, m, trained
from trainer.exact.progress import Progress

pytestmark = pytest.mark.usefixtures("one_thread", "group_of_one", "early_packs")


class Gated:
    """Regression, with a number that is 0 in the first three steps."""

    def forward(self, model: Any, batch: dict[str, Tensor], progress: Progress) -> Tensor:
        model.gate = float(progress.step >= 3)
        return model(batch["x"])

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        return F.mse_loss(outputs.flatten(1).sum(1), batch["y"], reduction="sum"), len(outputs)


class Two(nn.Module):
    """Two layers with something between them."""

    gate = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 2)

    def between(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.between(self.inner(x)))


class ChangesASlice(Two):
    def between(self, h: Tensor) -> Tensor:
        h = h + 0.0
        with torch.no_grad():
            h[:2].mul_(1.0 + self.gate)
        return h


class ChangesTheWhole(Two):
    """The slice was taken before."""

    def between(self, h: Tensor) -> Tensor:
        h = h.detach().clone()
        first = h[:2]
        h.mul_(1.0 + self.gate)
        return h + F.pad(first, (0, 0, 0, len(h) - 2))


class DropsInPlace(Two):
    def between(self, h: Tensor) -> Tensor:
        h = h + 0.0
        kept = h.detach()
        return F.dropout(h, 0.5, True, inplace=True) + self.gate * kept


class _Doubles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2.0 * grad


class ChangesInAFunctionOfItsOwn(Two):
    def between(self, h: Tensor) -> Tensor:
        before = h + 0.0
        kept = before.detach()
        return _Doubles.apply(before) + self.gate * kept


class Turns(Two):
    """Python gives -1 and -2 one hash."""

    def between(self, h: Tensor) -> Tensor:
        return torch.softmax(h, -2 if self.gate else -1)


class DividesByANumberOfNumpy(Two):
    def between(self, h: Tensor) -> Tensor:
        return h + self.gate * (h * np.float32(1.0 / len(h)))


class DividesByHowMany(Two):
    """And later by a number that stands for no size."""

    def between(self, h: Tensor) -> Tensor:
        return h / (100 if self.gate == 1.0 else h.numel())


class Complex(Two):
    def between(self, h: Tensor) -> Tensor:
        turned = torch.complex(h, h) @ torch.ones(4, 4, dtype=torch.complex64)
        return h + self.gate * turned.real


class SavesInHalf(Two):
    def between(self, h: Tensor) -> Tensor:
        def half(t: Tensor) -> Tensor:
            return (t * 256.0 / t.abs().max()).round() / 256.0 if self.gate else t

        with torch.autograd.graph.saved_tensors_hooks(half, lambda t: t):
            return h * h.sigmoid()


class Recurrent(Two):
    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.GRU(4, 4, batch_first=True)

    def between(self, h: Tensor) -> Tensor:
        return self.memory(h[:, None])[0][:, 0]


class Patched(Recurrent):
    """Somebody has replaced a module's forward."""

    def __init__(self) -> None:
        super().__init__()
        forward = self.memory.forward

        def twice(x: Tensor) -> Any:
            y, state = forward(x)
            return 2.0 * y, state

        self.memory.forward = twice  # type: ignore[method-assign]

    def __deepcopy__(self, memo: dict[int, Any]) -> Patched:
        other = Patched()  # whose function calls its own module
        other.load_state_dict(self.state_dict())
        return other


class Keeping(Gated):
    """The model notes something, and the loss uses it."""

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        loss, count = super().loss(outputs, batch)
        return loss + self.more(outputs), count

    def forward(self, model: Any, batch: dict[str, Tensor], progress: Progress) -> Tensor:
        self.model, self.count = model, len(batch["x"])
        return super().forward(model, batch, progress)

    def more(self, outputs: Tensor) -> Any:
        return self.model.gate * outputs.pow(2).sum() / self.count


class _Noting(nn.GRU):
    def forward(self, *arguments: Any) -> Any:
        y, state = super().forward(*arguments)
        self.noted = y.pow(2)
        return y, state


class Noting(Recurrent):
    def __init__(self) -> None:
        super().__init__()
        self.memory = _Noting(4, 4, batch_first=True)


class KeepsWhatAModuleNoted(Keeping):
    def more(self, outputs: Tensor) -> Any:
        return self.model.gate * self.model.memory.noted.sum()


class HasAHookInTheLoss(Keeping):
    def more(self, outputs: Tensor) -> Any:
        outputs.register_hook(lambda grad: grad * (1.0 + self.model.gate))
        return 0.0


TASKS: dict[str, tuple[Any, Any]] = {
    name.__name__: (name, Gated)
    for name in (
        *(ChangesASlice, ChangesTheWhole, DropsInPlace, ChangesInAFunctionOfItsOwn, Turns, DividesByANumberOfNumpy),
        *(DividesByHowMany, Complex, SavesInHalf, Patched),
    )
}
TASKS |= {"counts in the loss": (Two, Keeping), "a module's note": (Noting, KeepsWhatAModuleNoted)}
TASKS |= {"a hook in the loss": (Two, HasAHookInTheLoss)}


@pytest.mark.parametrize("name", TASKS)
def test_a_micro_batch_is_as_if_alone(name: str) -> None:
    kind, task = TASKS[name]
    torch.manual_seed(0)
    model, x = kind(), floats(3)
    assert trained(model, x, 4, task=task())[0] == trained(model, x, 0, task=task())[0]


def test_positions_of_single_samples_leave_the_gradient_alone() -> None:
    """With one sample a micro-batch, the gradient of what is added to it is the samples' own, not a sum."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.places = nn.Linear(3, 3), nn.Parameter(torch.randn(1, 6, 3))
            self.outer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.outer((self.inner(x) + self.places).tanh())

    torch.manual_seed(0)
    model, x = Positions(), floats(6, 3)
    found, packs = trained(model, x, 8, micro_batch_size=1)
    assert found == trained(model, x, 0, micro_batch_size=1)[0]
    assert packs is not None and m > 1


def test_autocast_casts_a_parameter_once() -> None:
    """A recurrent layer uses its weights at each time. The sum of one cast is another."""

    class Recurs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.GRU(3, 1, batch_first=True), nn.Linear(1, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(self.inner(x)[0].amax(1))

    torch.manual_seed(0)
    model, x, options = Recurs(), floats(4, 3), {"autocast": lambda: torch.autocast("cpu", torch.bfloat16)}
    found, packs = trained(model, x, 4, **options)
    assert found == trained(model, x, 0, **options)[0]
    assert packs is not None
    assert packs.refusals()[4] == "GRU uses a parameter several times under autocast"


def test_autocast_casts_what_follows_from_parameters_at_each_use() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.head = nn.Parameter(0.3 * torch.randn(6, 6)), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight.exp() - 1
            return self.head(F.linear(F.linear(x, weight).tanh(), weight))

    torch.manual_seed(0)
    model, x, options = Twice(), floats(6), {"autocast": lambda: torch.autocast("cpu", torch.bfloat16)}
    found, packs = trained(model, x, 4, **options)
    assert found == trained(model, x, 0, **options)[0]
    assert packs is not None and packs.refusals() == {}


class Fading(nn.Module):
    """Does more with what follows from a parameter in the fifth step, after all trials."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 8), nn.Linear(8, 2)
        self.table, self.kind = nn.Embedding(9, 8), kind

    def forward(self, x: Tensor, late: float) -> Tensor:
        q, a = self.table(torch.arange(6)), self.inner(x)
        if self.kind == "a view in place":
            q[2:4] *= 1.0 - late
            h = a + q
        elif self.kind == "in place":
            q.mul_(1.0 - late)
            h = a + q
        else:
            h = a + q
            h = h + late * (a * q) + late * F.relu(a - q) + late * torch.sigmoid(q)
        return self.outer(h.tanh())


class Fades(Task):
    """Tells it the step."""

    def forward(self, model: nn.Module, batch: dict[str, Tensor], progress: Progress) -> Tensor:  # type: ignore[override]
        return model(batch["x"], 0.7 * (progress.step == 4))


@pytest.mark.parametrize("kind", ["a view in place", "in place", "several uses"])
def test_what_fades_in_after_the_trials_has_the_bits_of_single_micro_batches(kind: str) -> None:
    """An outsider found it: zeros hide the order of sums in the trials, and ones that a change in place counts."""
    torch.manual_seed(0)
    model, x = Fading(kind), floats(6, 3)
    found, packs = trained(model, x, 8, task=Fades())
    assert found == trained(model, x, 0, task=Fades())[0]
    assert packs is not None
    assert bool(packs.refusals()) == (kind == "several uses")


class Clips(torch.autograd.Function):
    """Its backward brings samples together, which has an effect in later steps only."""

    limit = 1e9

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (Clips.limit / grad.norm()).clamp(max=1)


clip = Clips.apply  # as many write it: bound before any run


class ClipsAt:
    """Clips the gradient of the hidden layer, of the outputs or of the losses; from a step on."""

    def __init__(self, place: str, first: int = 0) -> None:
        self.place, self.first = place, first

    def forward(self, model: Any, batch: dict[str, Tensor], progress: Progress) -> Tensor:
        Clips.limit = 1e-3 if progress.step >= 3 else 1e9
        self.now = progress.step >= self.first
        h = model[0](batch["x"])
        y = model[1](clip(h) if self.place == "hidden" and self.now else h)
        return clip(y) if self.place == "outputs" and self.now else y

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        return F.mse_loss(outputs.flatten(1).sum(1), batch["y"], reduction="sum"), len(outputs)


class ClipsLosses(ClipsAt):
    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        return self.sample_losses(outputs, batch).sum(), len(outputs)

    def sample_losses(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        losses = F.mse_loss(outputs.flatten(1).sum(1), batch["y"], reduction="none")
        return clip(losses) if self.now else losses


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("place", ["hidden", "outputs", "losses"])
def test_a_function_of_its_own_under_a_name_of_before_is_noticed(place: str, first: int) -> None:
    """The class's `apply` is replaced in a pack, and such a name is the old one."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), floats(3)
    task = ClipsLosses(place, first) if place == "losses" else ClipsAt(place, first)
    found, packs = trained(model, x, 4, task=task)
    assert found == trained(model, x, 0, task=task)[0]
    assert packs is not None
    if place != "losses" and first == 0:  # losses are then computed for one micro-batch at a time
        assert "Clips.apply is called by a name that was bound before the run" in str(packs.refusals())
