"""What a run is built of, and what is refused before anything is computed. DeepSpeed's engine is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.run.small import Task, config_of, pieces_of
from trainer.errors import UserError
from trainer.ranks.place import Ranks
from trainer.record.console import DeepSpeedLog
from trainer.run import build as build_module
from trainer.run.build import Pieces, build, chosen_samples, measures_norms, refuse_inexact

pytestmark = pytest.mark.usefixtures("plain_engine")


def built(monkeypatch: pytest.MonkeyPatch, task: Any = None, **trainer: Any) -> Pieces:
    config = config_of(**trainer)
    monkeypatch.setattr(build_module, "load_task", lambda name, options: Task() if task is None else task)
    return build(config, Ranks(), config.plan(1), DeepSpeedLog(keep=False))


def test_what_a_run_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = built(monkeypatch)
    assert (pieces.steps_per_epoch, pieces.total_steps, pieces.exactness) == (4, 12, "bitwise")
    assert {name: len(split) for name, split in pieces.splits.items()} == {"train": 30, "validation": 10, "test": 10}
    assert pieces.engine.model.training
    assert pieces.hosts[0].endswith(" cpu")
    manifest = pieces.manifest()
    assert manifest["batch_plan"]["micro_batches"] == 2
    assert manifest["samples"] == {"train": 30, "validation": 10, "test": 10}
    assert manifest["config"]["trainer"]["epochs"] == 3
    assert len(set(manifest["data_sha256"].values())) == 3
    assert manifest["facts"]["torch"] == torch.__version__


def test_a_seed_gives_a_model_whatever_was_drawn_before(monkeypatch: pytest.MonkeyPatch) -> None:
    class Drawn(Task):
        def model(self) -> nn.Module:
            return nn.Linear(2, 1)

    def weights(**trainer: Any) -> Tensor:
        torch.rand(7)
        return built(monkeypatch, Drawn(), **trainer).engine.model_state()["weight"]

    first = weights()
    assert torch.equal(weights(), first)
    assert not torch.equal(weights(seed=1), first)


def test_a_run_may_be_shorter_than_its_epochs_and_never_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert built(monkeypatch, max_steps=5).total_steps == 5
    assert built(monkeypatch, max_steps=500).total_steps == 12
    assert built(monkeypatch, drop_last=True).total_steps == 9


def test_the_ranks_have_met_before_the_data_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """From then on a rank that is lost is noticed."""
    told: list[str] = []

    class Slow(Task):
        def splits(self) -> Any:
            told.append("splits")
            return super().splits()

    config = config_of()
    monkeypatch.setattr(build_module, "load_task", lambda name, options: Slow())
    build(config, Ranks(), config.plan(1), DeepSpeedLog(keep=False), lambda: told.append("met"))
    assert told == ["met", "splits"]


def test_samples_of_a_part_are_those_of_a_larger_part(monkeypatch: pytest.MonkeyPatch) -> None:
    ten = built(monkeypatch, train_samples=10).host_splits["train"].arrays["x"]
    twenty = built(monkeypatch, train_samples=20).host_splits["train"].arrays["x"]
    assert (len(ten), len(twenty)) == (10, 20)
    assert {tuple(row) for row in ten.tolist()} < {tuple(row) for row in twenty.tolist()}
    whole = pieces_of(config_of()).host_splits["train"]
    assert chosen_samples(whole, None) is whole


class NoModule(Task):
    def model(self) -> Any:
        return "a model"


class Lazy(Task):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.LazyLinear(3))


class Sparse(Task):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(2, 3), nn.ModuleDict({"words": nn.Embedding(3, 3, sparse=True)}))


@pytest.mark.parametrize(
    ("task", "trainer", "said"),
    [
        (Sparse(), {}, r"The gradient of 1\.words\.weight is sparse, .* Leave out its sparse=True"),
        (NoModule(), {}, r"NoModule\.model\(\) must return a torch\.nn\.Module, not str"),
        (Lazy(), {}, r"The parameter 0\.weight has no shape yet\. Call the model once in model\(\)"),
        (None, {"train_samples": 31}, r"train_samples is 31, but the training split has only 30 samples"),
        (None, {"train_batch_size": 32}, r"batch of 32 samples is larger than the training set of 30"),
        (None, {"train_batch_size": 4, "gradient_noise": True}, "the global batch of 4 samples is a single one"),
        (Task(("test",)), {}, 'must return a dictionary with a "train" split'),
    ],
    ids=["sparse", "no module", "lazy", "too many samples", "too large a batch", "noise of one", "no training split"],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused(
    monkeypatch: pytest.MonkeyPatch, task: Any, trainer: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        built(monkeypatch, task, **trainer)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.SyncBatchNorm(3), "1 is a SyncBatchNorm, whose statistics depend on which micro-batches run"),
        (nn.BatchNorm1d(3).double(), r"1 keeps its running statistics in torch\.float64"),
    ],
)
def test_statistics_that_are_not_exact_are_labelled_or_refused(
    monkeypatch: pytest.MonkeyPatch, layer: nn.Module, reason: str
) -> None:
    class Normed(Task):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Linear(2, 3), layer)

    pieces = built(monkeypatch, Normed())
    assert pieces.exactness == "tolerance"
    with pytest.raises(UserError, match=reason):
        built(monkeypatch, Normed(), exactness="bitwise")


def test_a_refusal_gives_all_reasons_and_what_to_do() -> None:
    with pytest.raises(UserError) as caught:
        refuse_inexact(config_of(exactness="bitwise"), ["a differs", "b counts"], ["Leave a out.", "Mend b."])
    assert str(caught.value) == (
        'trainer.exactness is "bitwise", but a differs; b counts.\nLeave a out.\nMend b.\n'
        'With "auto" the run continues and is labelled tolerance.'
    )
    assert caught.value.agreed, "every rank raises it"
    refuse_inexact(config_of(exactness="bitwise"), [])
    refuse_inexact(config_of(), ["a differs"])


def test_ranks_on_other_device_models_are_labelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "compare_facts", lambda facts, config, splits: ["rank 1 runs on another"])
    pieces = built(monkeypatch)
    assert not pieces.alike
    assert (pieces.exactness, pieces.inexact) == ("tolerance", ["rank 1 runs on another"])
    with pytest.raises(UserError, match="rank 1 runs on another"):
        built(monkeypatch, exactness="bitwise")


def test_norms_are_measured_only_where_something_needs_them() -> None:
    rate = {"scaling_rule": "adascale", "base_global_batch_size": 4}
    assert not measures_norms(config_of())
    assert measures_norms(config_of(gradient_noise=True))
    assert measures_norms(config_of(learning_rate=rate))


def test_what_a_forward_changes_by_itself_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = built(monkeypatch)
    assert set(pieces.common_state()) == set(pieces.engine.model_state())
    pieces.changing = ["1.running_mean"]
    assert set(pieces.engine.model_state()) - set(pieces.common_state()) == {"1.running_mean"}
    before = pieces.engine.model_state()["1.running_mean"].clone()
    pieces.follow_first()
    assert torch.equal(pieces.engine.model_state()["1.running_mean"], before), "rank 0 follows itself"


def test_a_task_is_found_by_its_file(tmp_path: Path) -> None:
    config = config_of(task=f"{Path(__file__).with_name('small.py')}:Task", task_options={"splits": ["train"]})
    pieces = build(config, Ranks(), config.plan(1), DeepSpeedLog(keep=False))
    assert type(pieces.task).__name__ == "Task"
    assert list(pieces.splits) == ["train"]
