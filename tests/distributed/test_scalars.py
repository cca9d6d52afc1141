"""Parameters of no dimension, as CLIP's logit scale: trained and frozen, exact, and resumed on another world size."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.jobs import USER_TASKS, small_config, train, train_interrupted
from tests.distributed.test_exactness import BF16, same_everywhere
from tests.run.test_resume import same_end
from tests.standing import run_ranks
from trainer.config.keys import Config
from trainer.errors import UserError
from trainer.exact.order import epoch_order, key
from trainer.exact.plan import micro_batch_bounds

SCALARS = f"{USER_TASKS}/scalar_tasks.py"
ADAMW = {"type": "AdamW", "params": {"lr": 0.02, "weight_decay": 0.1, "torch_adam": True}}
FUSED = ADAMW | {"params": ADAMW["params"] | {"fused": True}}
SGD = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}


def scalars(path: Path, name: str = "LogitScale", **extra: Any) -> Config:
    return small_config(path, task=f"{SCALARS}:{name}", **({"epochs": 2, "optimizer": FUSED} | extra))


def plain_torch(optimizer: Any, steps: int) -> dict[str, torch.Tensor]:
    """The same training as a loop that knows neither DeepSpeed nor ranks: two micro-batches of 8 a step."""
    sys.path.insert(0, str(USER_TASKS))
    from scalar_tasks import LogitScale

    task = LogitScale()
    torch.default_generator.manual_seed(key(0, "model"))
    model, split = task.model(), task.splits()["train"]
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    chosen = optimizer([{"params": decayed}, {"params": others, "weight_decay": 0.0}])
    for indices in epoch_order(0, 0, 500).split(16)[:steps]:
        chosen.zero_grad()
        for start, stop in micro_batch_bounds(16, 8):
            batch = {name: array[indices[start:stop]] for name, array in split.items()}
            loss, _ = task.loss(task.forward(model, batch), batch)
            (loss / 16).backward()
        chosen.step()
    return model.state_dict()


@pytest.mark.parametrize(
    ("config", "optimizer"),
    [
        (FUSED, lambda groups: torch.optim.AdamW(groups, lr=0.02, weight_decay=0.1, fused=True)),
        (ADAMW, lambda groups: torch.optim.AdamW(groups, lr=0.02, weight_decay=0.1)),
        (SGD, lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9)),
    ],
    ids=["AdamW, fused", "AdamW", "SGD"],
)
@pytest.mark.usefixtures("one_thread")
def test_the_bits_of_plain_torch(tmp_path: Path, config: dict[str, Any], optimizer: Any) -> None:
    extra = {"train_batch_size": 16, "gradient_clipping": 0.0, "max_steps": 20, "optimizer": config}
    same_everywhere(lambda W: scalars(tmp_path / str(W), **extra), [1, 2])
    ours, theirs = load_file(tmp_path / "2" / "model" / "model.safetensors"), plain_torch(optimizer, 20)
    assert set(ours) == set(theirs) >= {"logit_scale", "temperature", "offset"}
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape, name
        assert torch.equal(ours[name], tensor), name
    assert float(ours["logit_scale"]) != pytest.approx(0.7, abs=0.01)
    assert float(ours["temperature"]) == 1.5


@pytest.mark.parametrize("precision", [{}, BF16], ids=["fp32", "bf16"])
def test_exact_at_every_world_size(tmp_path: Path, precision: dict[str, Any]) -> None:
    same_everywhere(lambda W: scalars(tmp_path / str(W), **precision), [1, 2, 3])


def test_a_model_of_scalars_alone(tmp_path: Path) -> None:
    same_everywhere(lambda W: scalars(tmp_path / str(W), "OnlyScalars"), [1, 2, 3])
    after = load_file(tmp_path / "3" / "model" / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in after.items()} == {"slope": (), "intercept": ()}
    assert all(float(after[name]) != start for name, start in (("slope", 1.0), ("intercept", 0.0)))


def test_every_rank_starts_from_the_scalars_of_rank_0(tmp_path: Path) -> None:
    same_everywhere(lambda W: scalars(tmp_path / str(W), "OtherStart", guard_every_steps=1), [1, 2])


@pytest.mark.parametrize(
    "extra",
    [
        {"optimizer": FUSED},
        {"optimizer": ADAMW},
        {"optimizer": ADAMW, **BF16},
        {"optimizer": SGD},
        {"optimizer": {"type": "Adagrad", "params": {"lr": 0.01}}},  # makes its state before the first step
        {"optimizer": {"type": "NAdam", "params": {"lr": 0.01}}},  # has a product of no dimension beside its moments
        {"optimizer": {"type": "Adafactor", "params": {"lr": 0.01}}},
        {"optimizer": {"type": "LAMB", "params": {"lr": 0.01}}},
        {"optimizer": {"type": "LARS", "params": {"lr": 0.5}}},
    ],
    ids=["AdamW, fused", "AdamW", "AdamW, bf16", "SGD", "Adagrad", "NAdam", "Adafactor", "LAMB", "LARS"],
)
def test_resumed_on_another_world_size(tmp_path: Path, extra: dict[str, Any]) -> None:
    if extra["optimizer"]["type"] in ("LAMB", "LARS"):
        pytest.importorskip("pytorch_optimizer", reason="the extra study is not installed")
    same_end(lambda path: scalars(path, **extra), tmp_path, [(3, 4), (1, 0)])


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_trains_and_resumes_them_within_tolerance(tmp_path: Path, stage: int) -> None:
    exact = run_ranks(train, 1, scalars(tmp_path / "exact"))[0]
    zero = {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    stopped = run_ranks(train_interrupted, 2, scalars(tmp_path / "zero", **zero), {4: 1})[0]
    assert "stopped" in stopped
    result = run_ranks(train_interrupted, 3, scalars(tmp_path / "zero", **zero), {})[0]
    assert result["exactness"] == "tolerance"
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("zero", "exact"))
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}
    for name in ("logit_scale", "temperature", "outer.weight"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)
    assert result["steps"] == exact["steps"]


def test_zero_stage_3_refuses_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"parameter logit_scale has no dimension .*\n.*torch\.ones\(1\)"):
        run_ranks(train, 2, scalars(tmp_path / "run", zero_optimization={"stage": 3}))
    assert not (tmp_path / "run").exists()
