"""The promise: one and the same model, step by step, at every world size."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.distributed.jobs import (
    USER_TASKS,
    first_gradient,
    sent_early,
    small_config,
    train,
    train_as_on_a_gpu,
    train_with_shards,
)
from tests.standing import run_ranks
from trainer.config.keys import Config
from trainer.errors import NonFiniteError
from trainer.exact.order import epoch_order, key
from trainer.exact.plan import micro_batch_bounds
from trainer.tasks.digits import Digits

BF16 = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}


def same_everywhere(make: Any, world_sizes: list[int], job: Any = train) -> dict[str, Any]:
    """Runs at every world size and compares all that a user can see; returns the first run's summary."""
    runs = {W: run_ranks(job, W, make(W)) for W in world_sizes}
    reference = runs[world_sizes[0]][0]
    for W, ranks in runs.items():
        for summary in ranks:
            assert summary["exactness"] == "bitwise"
            for step, (a, b) in enumerate(zip(reference["trace"], summary["trace"], strict=True), start=1):
                assert a == b, f"W={W}: step {step} differs in {[name for name in a if a[name] != b.get(name)]}"
            for name in ("parameters_sha256", "model_sha256", "metrics", "steps"):
                assert summary[name] == reference[name], (W, name)
    return reference


def digits(path: Path, model: str, **extra: Any) -> Config:
    # 1,200 samples: 11 steps of 104 and one of 56, which is 7 micro-batches, fewer than 8 ranks.
    options = {"task": "digits", "task_options": {"model": model}, "epochs": 2, "max_steps": 14, "log_every_steps": 3}
    return small_config(path, **options, **extra)


def test_packs_change_no_bit(tmp_path: Path) -> None:
    """Each number of ranks has packs of another size; some fewer micro-batches than a pack."""
    packs = {4: 1, 1: 8, 2: 4, 3: 3}
    same_everywhere(lambda W: digits(tmp_path / str(W), "cnn", pack=packs[W]), [4, 1, 2, 3])
    for W in (1, 2, 3):
        summary = json.loads((tmp_path / str(W) / "summary.json").read_text())
        pack = summary["pack"]
        assert pack.keys() == {"size", "share"}, "nothing refused"
        assert pack["size"] == packs[W]
        assert pack["share"] > 0.3


def test_looking_for_the_fastest_packs_changes_no_bit(tmp_path: Path) -> None:
    """A run of 60 steps or more tries and times all sizes."""

    def looks(W: int) -> Config:
        return small_config(
            tmp_path / str(W), task="digits", task_options={"model": "mlp"}, epochs=6, max_steps=65, pack=packs[W]
        )

    packs = {2: 1, 1: "auto", 3: "auto"}
    same_everywhere(looks, [2, 1, 3])
    for W in (1, 3):
        found = json.loads((tmp_path / str(W) / "summary.json").read_text())["pack"]
        assert "speed_up" in found and "refused" not in found


@pytest.mark.parametrize("precision", [{}, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model", ["cnn", "mlp"])
def test_digits(tmp_path: Path, model: str, precision: dict[str, Any]) -> None:
    summary = same_everywhere(lambda W: digits(tmp_path / str(W), model, **precision), [1, 2, 3, 4, 8])
    assert summary["steps"] == 14


@pytest.mark.parametrize("precision", [{}, BF16], ids=["fp32", "bf16"])
def test_a_users_own_task(tmp_path: Path, precision: dict[str, Any]) -> None:
    summary = same_everywhere(lambda W: small_config(tmp_path / str(W), **precision), [1, 2, 3, 4, 8])
    assert summary["steps"] == 15


def test_powers_of_two_and_every_optimizer_kind(tmp_path: Path) -> None:
    for kind in ({"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}, {"type": "Adagrad", "params": {"lr": 0.01}}):
        name = kind["type"]
        same_everywhere(
            lambda W, kind=kind, name=name: small_config(
                tmp_path / f"{name}{W}", train_batch_size=64, optimizer=kind, max_steps=6, gradient_clipping=0.0
            ),
            [1, 2, 8],
        )


def test_learning_rate_schedules_of_both_kinds(tmp_path: Path) -> None:
    ours = {"learning_rate": {"schedule": "cosine", "warmup_epochs": 1}, "max_steps": 8}
    theirs = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4}}, "max_steps": 8}
    for name, extra in (("ours", ours), ("theirs", theirs)):
        same_everywhere(lambda W, extra=extra, name=name: small_config(tmp_path / f"{name}{W}", **extra), [1, 3])


def test_large_gradients_take_another_exchange_to_the_same_bits(tmp_path: Path) -> None:
    direct = run_ranks(train, 1, small_config(tmp_path / "direct"))[0]
    shards = same_everywhere(lambda W: small_config(tmp_path / f"s{W}"), [3, 4, 5, 8], train_with_shards)
    assert shards["trace"] == direct["trace"]


def test_an_exchange_under_the_backward_has_the_same_bits(tmp_path: Path) -> None:
    """In buckets, of one micro-batch or of a pack; whole nodes or shards; with audits, and with norms measured."""
    more = {"exchange_bucket_mib": 0.0005, "audit_every_steps": 2, "gradient_noise": True}
    direct = run_ranks(train, 1, small_config(tmp_path / "direct", max_steps=8))[0]
    buckets = same_everywhere(lambda W: small_config(tmp_path / f"b{W}", max_steps=8, pack=W, **more), [1, 2, 3])
    shards = same_everywhere(
        lambda W: small_config(tmp_path / f"s{W}", max_steps=8, pack=2, **more), [3, 5], train_with_shards
    )
    assert direct["trace"] == buckets["trace"] == shards["trace"]
    assert buckets["exactness"] == "bitwise"


def test_buckets_are_sent_before_the_backward_ends(tmp_path: Path) -> None:
    """By each rank, in single micro-batches and in packs; a pack that is given up then ends the run."""
    config = small_config(tmp_path / "run", exchange_bucket_mib=0.0005, pack=4)
    (sent, error), (other, elsewhere) = run_ranks(sent_early, 2, config)
    assert sent == other
    assert sent["singly"] == sent["in packs"] == sent["buckets"] - 1 > 0
    # Rank 1's last micro-batch has no pack, so it gives none up after it has sent something.
    assert error.startswith("TrainerError: A pack of step 6 could not be computed (on purpose)")
    assert "exchange_bucket_mib=null" in error
    assert elsewhere.startswith("RuntimeError: ") and "onnection" in elsewhere  # it has not applied the step


def test_logged_curves_lie_on_one_another(tmp_path: Path) -> None:
    def curves(W: int) -> list[dict[str, float]]:
        run_ranks(train, W, small_config(tmp_path / str(W), log_every_steps=4))
        lines = [json.loads(line) for line in (tmp_path / str(W) / "metrics.jsonl").read_text().splitlines()]
        return [
            {k: v for k, v in line.items() if not k.startswith(("throughput/", "memory/", "time_s"))} for line in lines
        ]

    one, three = curves(1), curves(3)
    assert one == three
    logged = [line["step"] for line in one if "train/loss" in line]
    assert logged == [4, 8, 12, 15]


def test_weak_scaling_on_one_rank_is_weak_scaling_on_many(tmp_path: Path) -> None:
    """The run at W is the run with a W times larger global batch and the same micro-batches."""
    for W in (2, 4):
        rate = {"scaling_rule": "linear", "warmup_epochs": 1, "schedule": "linear"}
        weak = small_config(
            tmp_path / f"weak{W}", train_batch_size=None, gradient_accumulation_steps=3, learning_rate=rate
        )
        strong = small_config(
            tmp_path / f"strong{W}", train_batch_size=24 * W, learning_rate=rate | {"base_global_batch_size": 24}
        )
        real, emulated = run_ranks(train, W, weak)[0], run_ranks(train, 1, strong)[0]
        assert real["global_batch_size"] == 24 * W
        assert real["trace"] == emulated["trace"]
        assert real["metrics"] == emulated["metrics"]


def test_the_gradient_against_float64(tmp_path: Path) -> None:
    """The reduced gradient of the first, whole batch against autograd in float64 on the same samples."""
    options = {"model": "mlp", "dropout": 0.0, "shift": 0}
    config = small_config(tmp_path / "run", task="digits", task_options=options, gradient_clipping=0.0, seed=3)
    task = Digits(**options)
    torch.default_generator.manual_seed(key(3, "model"))
    model = task.model().double()
    train_split = task.splits()["train"]
    chosen = epoch_order(3, 0, 1200)[:104]
    loss = F.cross_entropy(model(train_split["image"][chosen].double()), train_split["label"][chosen])
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for W in (1, 3):
        for ours, theirs in zip(run_ranks(first_gradient, W, config)[0], expected, strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("clipping", [0.0, 0.5])
def test_it_is_the_training_that_plain_pytorch_does(tmp_path: Path, clipping: float) -> None:
    """Three epochs against a plain full-batch loop: same samples, mean loss of each batch, torch's own SGD.

    SGD without clipping follows the gradient's scale, which Adam would hide; 0.5 clips most of these steps.
    """
    options: dict[str, Any] = {"model": "mlp", "dropout": 0.0, "shift": 0}
    sgd = {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}}
    config = small_config(
        tmp_path / "run",
        task="digits",
        task_options=options,
        optimizer=sgd,
        gradient_clipping=clipping,
        decay_biases_and_norms=True,
        best={"metric": None},
    )
    ours = run_ranks(train, 2, config)[0]
    task = Digits(**options)
    torch.default_generator.manual_seed(key(0, "model"))
    model, splits = task.model(), task.splits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    image, label = splits["train"]["image"], splits["train"]["label"]
    for epoch in range(3):
        for chosen in epoch_order(0, epoch, 1200).split(104):
            optimizer.zero_grad()
            F.cross_entropy(model(image[chosen]), label[chosen]).backward()
            if clipping:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clipping)
            optimizer.step()
    with torch.no_grad():
        test_loss = F.cross_entropy(model(splits["test"]["image"]), splits["test"]["label"]).item()
    assert ours["metrics"]["test"]["loss"] == pytest.approx(test_loss, rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
        ("SGD", {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),  # some get their momentum later than others
    ],
    ids=["adamw", "sgd"],
)
def test_parameters_without_a_gradient_are_passed_over_as_in_plain_pytorch(
    tmp_path: Path, kind: str, params: dict[str, Any]
) -> None:
    """Weight decay and momentum do not touch what no micro-batch of a step used; against a plain loop."""
    sys.path.insert(0, str(USER_TASKS))
    from bad_tasks import UnusedParameters
    from safetensors.torch import load_file

    task = UnusedParameters()
    own = {"torch_adam": True} if kind == "AdamW" else {}
    fused = {"type": kind, "params": params | own | {"fused": True}}
    extra = {"train_batch_size": 40, "optimizer": fused, "gradient_clipping": 0.0, "epochs": 2}
    extra["decay_biases_and_norms"] = True
    name = f"{USER_TASKS}/bad_tasks.py:UnusedParameters"
    same_everywhere(lambda W: small_config(tmp_path / str(W), task=name, **extra), [1, 2, 3, 5])
    ours = load_file(tmp_path / "3" / "model" / "model.safetensors")

    torch.default_generator.manual_seed(key(0, "model"))
    model, train_split = task.model(), task.splits()["train"]
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = getattr(torch.optim, kind)(model.parameters(), **params)
    unused_steps = 0
    for epoch in range(2):
        for chosen in epoch_order(0, epoch, 500).split(40):
            optimizer.zero_grad()
            for start, stop in micro_batch_bounds(len(chosen), 8):
                x, y = train_split["x"][chosen[start:stop]], train_split["y"][chosen[start:stop]]
                (F.cross_entropy(model(x), y, reduction="sum") / len(chosen)).backward()
            unused_steps += model.sometimes.weight.grad is None
            optimizer.step()
    assert 3 < unused_steps < 23, "the test wants both kinds of steps"
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    for name in ("never.weight", "never.bias"):
        assert torch.equal(ours[name], initial[name])


def test_tied_and_frozen_weights(tmp_path: Path) -> None:
    sys.path.insert(0, str(USER_TASKS))
    from bad_tasks import Tied
    from safetensors.torch import load_file

    name = f"{USER_TASKS}/bad_tasks.py:TiedWeights"
    same_everywhere(lambda W: small_config(tmp_path / str(W), task=name), [1, 2, 3])
    torch.default_generator.manual_seed(key(0, "model"))
    model = Tied()
    frozen = model.frozen.weight.detach().clone()
    model.load_state_dict(load_file(tmp_path / "3" / "model" / "model.safetensors"), strict=True)
    assert torch.equal(model.inner.weight, model.outer.weight)
    assert torch.equal(model.frozen.weight, frozen)


def test_a_seed_is_a_run(tmp_path: Path) -> None:
    one = run_ranks(train, 1, small_config(tmp_path / "a", seed=1, max_steps=2))[0]
    again = run_ranks(train, 1, small_config(tmp_path / "b", seed=1, max_steps=2))[0]
    other = run_ranks(train, 1, small_config(tmp_path / "c", seed=2, max_steps=2))[0]
    assert one["trace"] == again["trace"]
    assert one["parameters_sha256"] != other["parameters_sha256"]


NADAM = {"type": "NAdam", "params": {"lr": 0.01}}  # its kernel cannot skip an update


def test_the_deferred_check_of_a_gpu_changes_no_bit(tmp_path: Path) -> None:
    direct = run_ranks(train, 1, small_config(tmp_path / "direct"))[0]
    deferred = same_everywhere(lambda W: small_config(tmp_path / f"d{W}"), [1, 2], train_as_on_a_gpu)
    assert deferred["trace"] == direct["trace"]


@pytest.mark.parametrize(
    ("job", "more"),
    [(train, {}), (train_as_on_a_gpu, {}), (train_as_on_a_gpu, {"optimizer": NADAM})],
    ids=["cpu", "as on a gpu", "as on a gpu, not fused"],
)
def test_a_loss_that_stops_being_finite_keeps_the_last_good_state(
    tmp_path: Path, job: Any, more: dict[str, Any]
) -> None:
    task = more | {"task": str(Path(__file__).parents[1] / "user_tasks" / "bad_tasks.py") + ":InfiniteLater"}
    place = int((epoch_order(0, 0, 500) == 123).nonzero())
    step = place // 104
    assert 0 < step < 4, "the test wants a step in the middle of the first epoch"
    last = run_ranks(train, 2, small_config(tmp_path / "good", max_steps=step, **task))[0]
    with pytest.raises(NonFiniteError, match=rf"(?s)Step {step + 1} .*micro-batch {place % 104 // 8} is inf"):
        run_ranks(job, 2, small_config(tmp_path / "bad", **task))
    summary = json.loads((tmp_path / "bad" / "summary.json").read_text())
    assert summary["steps"] == step
    assert "not finite" in summary["status"]
    good, kept = (
        p.read_bytes() for p in (tmp_path / "good/model/model.safetensors", tmp_path / "bad/model/model.safetensors")
    )
    assert good == kept
    assert last["steps"] == step
