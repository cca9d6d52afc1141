"""What large batches ask for: the noise in the gradient, AdaScale, LARS and LAMB; a part of the training set."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.jobs import USER_TASKS, small_config, train, train_with_shards
from tests.distributed.test_exactness import same_everywhere
from tests.distributed.test_options import a_task, overfits, words
from tests.run.test_resume import same_end
from tests.standing import run_ranks
from trainer.config.keys import Config
from trainer.engine.adascale import gain
from trainer.errors import UserError
from trainer.exact.order import epoch_order, nested_subset
from trainer.exact.splits import Split

PULLS = {"task": f"{USER_TASKS}/more_tasks.py:Pulls", "gradient_clipping": 0.0}
SGD = {"type": "SGD", "params": {"lr": 0.01}}
ADASCALE = {"scaling_rule": "adascale", "base_global_batch_size": 16}
BY_EPOCHS = {"learning_rate": ADASCALE | {"schedule": "linear"}}
BY_GAIN = {"learning_rate": ADASCALE | {"schedule": "cosine", "warmup_epochs": 1, "adascale_steps": 40}}
LARS = {"optimizer": {"type": "LARS", "params": {"lr": 2.0, "weight_decay": 0.01}}}
LAMB = {"optimizer": {"type": "LAMB", "params": {"lr": 0.02, "weight_decay": 0.01}}}
NOISE = {"gradient_noise": True}


def records(folder: Path, kind: str = "train/loss") -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in line]


def alike(make: Any, tmp_path: Path, name: str, job: Any = train) -> dict[str, Any]:
    """The same bits, and the same numbers said of them, at every world size."""
    summary = same_everywhere(lambda W: make(tmp_path / str(W)), [1, 2, 3], job)
    for W in (1, 2, 3):
        assert json.loads((tmp_path / str(W) / "summary.json").read_text())[name] == summary[name], W
    one = [{k: v for k, v in r.items() if k.startswith(("noise/", "train/"))} for r in records(tmp_path / "1")]
    for W in (2, 3):
        assert [{k: r[k] for k in own} for r, own in zip(records(tmp_path / str(W)), one, strict=True)] == one
    return summary


@pytest.mark.parametrize("job", [train, train_with_shards], ids=["whole nodes", "shards"])
def test_noise_is_the_same_everywhere_and_changes_no_bit(tmp_path: Path, job: Any) -> None:
    summary = alike(lambda path: small_config(path, **NOISE, log_every_steps=4), tmp_path, "gradient_noise", job)
    assert summary["gradient_noise"]["steps"] == 15
    assert summary["gradient_noise"]["trace"] > 0
    without = run_ranks(train, 2, small_config(tmp_path / "without"))[0]
    assert without["trace"] == summary["trace"]
    assert "gradient_noise" not in without
    assert not records(tmp_path / "without", "noise/trace")
    assert all("noise/trace" in record for record in records(tmp_path / "1"))


def test_noise_of_known_gradients(tmp_path: Path) -> None:
    """Each sample's gradient is the sample: the trace is that of their covariance."""
    summary = run_ranks(train, 2, small_config(tmp_path / "run", **PULLS, **NOISE, optimizer=SGD))[0]
    x = a_task("Pulls").splits()["train"]["x"].double()
    trace = float(x.var(dim=0, unbiased=True).sum())
    noise = summary["gradient_noise"]
    # Of 15 steps of 12 degrees of freedom in 20 dimensions: a standard error of 2.4 %.
    assert noise["trace"] == pytest.approx(trace, rel=0.1)
    # Step by step from the samples themselves, in float64.
    traces, squares = [], []
    for epoch in range(3):
        for chosen in epoch_order(0, epoch, 500).split(104):
            M = -(-len(chosen) // 8)
            bounds = [j * len(chosen) // M for j in range(M + 1)]
            means = [x[chosen[a:b]].mean(0) for a, b in itertools.pairwise(bounds)]
            whole, n = x[chosen].mean(0), len(chosen)
            spread = sum((b - a) * (h @ h) for (a, b), h in zip(itertools.pairwise(bounds), means)) - n * (
                whole @ whole
            )
            traces.append(float(spread / (M - 1)))
            squares.append(float(whole @ whole) - traces[-1] * (1 / n - 1 / 500))
    assert noise["trace"] == pytest.approx(np.mean(traces), rel=1e-5)
    assert noise["gradient_squared"] == pytest.approx(np.mean(squares), rel=1e-4)
    assert noise["scale_samples"] == pytest.approx(np.sum(traces) / np.sum(squares), rel=1e-4)


def test_noise_over_tokens(tmp_path: Path) -> None:
    summary = alike(lambda path: words(path, **NOISE), tmp_path, "gradient_noise")
    assert summary["gradient_noise"]["trace"] > 0


@pytest.mark.parametrize("extra", [BY_EPOCHS, BY_GAIN], ids=["by epochs", "by gain"])
def test_adascale(tmp_path: Path, extra: dict[str, Any]) -> None:
    """The rate that is logged follows from the noise that is logged, and is the one that moved the weights."""

    def make(path: Path) -> Config:
        return small_config(path, **PULLS, **NOISE, **extra, optimizer=SGD, log_every_steps=1)

    summary = alike(make, tmp_path, "adascale")
    logged = records(tmp_path / "3")
    position, rates = 0.0, []
    for t in range(len(logged)):
        past = logged[:t]
        variance = np.mean([r["noise/trace"] / 16 for r in past]) if past else 0.0
        # AdaScale takes batches as they are drawn, without what the logged norm has for drawing from 500 samples.
        squared = np.mean([r["noise/gradient_squared"] - r["noise/trace"] / 500 for r in past]) if past else 0.0
        r = gain(max(float(variance), 0.0), max(float(squared), 0.0), 104 / 16) if past else 1.0
        if extra is BY_EPOCHS:
            scheduled = 1 - t / 15
        elif position < 5:  # an epoch of warm-up
            scheduled = min((position + 1) / 5, 1.0)
        else:
            scheduled = 0.5 * (1 + np.cos(np.pi * min(1.0, (position - 5) / 35)))
        rates.append(0.01 * scheduled * r)
        assert extra is BY_EPOCHS or position < 40
        position += r
    np.testing.assert_allclose([record["train/learning_rate"] for record in logged], rates, rtol=1e-9)
    assert max(rates) > 0.015, "the test wants gains above 1"
    assert summary["adascale"] == {
        "position": pytest.approx(position),
        "mean_gain": pytest.approx(position / len(logged)),
    }
    if extra is BY_GAIN:
        assert position >= 40
        assert summary["status"] == "finished"
        assert summary["steps"] == len(logged) < 15
        assert len(records(tmp_path / "3", "eval/test/loss")) == 1
    else:
        assert summary["steps"] == 15
    x = a_task("Pulls").splits()["train"]["x"].double()
    steps = [chosen for epoch in range(3) for chosen in epoch_order(0, epoch, 500).split(104)]
    weight = -sum(rate * x[chosen].mean(0) for rate, chosen in zip(rates, steps))
    saved = load_file(tmp_path / "3" / "model" / "model.safetensors")["weight"]
    torch.testing.assert_close(saved[0].double(), weight, rtol=1e-4, atol=1e-6)


def test_a_run_that_ends_by_gain_is_evaluated_once(tmp_path: Path) -> None:
    """With S = 1 each gain is 1, so 10 steps end with an epoch, after which there would be a validation anyway."""
    rate = {"scaling_rule": "adascale", "base_global_batch_size": 60, "adascale_steps": 10}
    summary = run_ranks(train, 2, overfits(tmp_path / "run", learning_rate=rate))[0]
    assert (summary["steps"], summary["adascale"]) == (10, {"position": 10.0, "mean_gain": 1.0})
    assert [r["step"] for r in records(tmp_path / "run", "eval/validation/loss")] == [5, 10]


def test_adascale_multiplies_every_groups_own_rate(tmp_path: Path) -> None:
    extra: dict[str, Any] = {"parameter_groups": {"outer": {"lr": 0.002}}, **BY_GAIN}
    alike(lambda path: small_config(path, **extra), tmp_path, "adascale")


@pytest.mark.parametrize("extra", [LARS, LAMB], ids=["lars", "lamb"])
def test_optimizers_that_scale_layers(tmp_path: Path, extra: dict[str, Any]) -> None:
    summary = alike(lambda path: small_config(path, **extra, **BY_EPOCHS), tmp_path, "adascale")
    assert summary["metrics"]["test"]["accuracy"] > 0.55
    facts = json.loads((tmp_path / "1" / "manifest.json").read_text())["facts"]
    assert facts["pytorch_optimizer"].split(".")[0].isdigit()


@pytest.mark.parametrize(
    "extra",
    [NOISE, BY_EPOCHS, BY_GAIN | NOISE, LARS, LAMB],
    ids=["noise", "adascale by epochs", "adascale by gain", "lars", "lamb"],
)
def test_going_on_in_the_middle(tmp_path: Path, extra: dict[str, Any]) -> None:
    same_end(lambda path: small_config(path, **extra), tmp_path, [(2, 3), (3, 7), (1, 0)])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (NOISE, r"(?s)trainer.gradient_noise.*104 samples is a single one .*104"),
        (BY_EPOCHS, r'(?s)"adascale" compares the gradients .*104 samples is a single one'),
    ],
    ids=["noise", "adascale"],
)
def test_one_micro_batch_tells_nothing(tmp_path: Path, extra: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_ranks(train, 1, small_config(tmp_path / "run", train_micro_batch_size_per_gpu=104, **extra))
    assert not (tmp_path / "run").exists()


def test_subsets_are_part_of_one_another() -> None:
    larger, smaller = set(nested_subset(1000, 200).tolist()), set(nested_subset(1000, 100).tolist())
    assert smaller < larger
    assert (len(smaller), len(larger)) == (100, 200)
    for n in (1, 100, 1000):
        chosen = nested_subset(1000, n)
        assert torch.equal(chosen, chosen.sort().values)
    assert nested_subset(1000, 1000).tolist() == list(range(1000))
    assert abs(float(nested_subset(1000, 200).double().mean()) - 500) < 100, "from the whole split"


def test_training_on_a_part(tmp_path: Path) -> None:
    """The same part for every seed, and the hash of the data is the part's."""
    task, chosen = a_task("Words"), nested_subset(200, 120)
    whole = task.splits()["train"]
    part = Split({n: a[chosen] for n, a in whole.arrays.items()}, whole.counts[chosen], whole.lengths[chosen])
    summary = same_everywhere(lambda W: words(tmp_path / str(W), train_samples=120), [1, 2, 3])
    assert summary["steps"] == 6  # two epochs of 52, 52 and 16
    run_ranks(train, 1, words(tmp_path / "seed", train_samples=120, seed=4))
    for name in ("1", "seed"):
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        assert manifest["samples"]["train"] == 120
        assert manifest["data_sha256"]["train"] == part.data_hash() != whole.data_hash()
    with pytest.raises(UserError, match=r"(?s)train_samples is 201, but the training split has only 200 .*most 200"):
        run_ranks(train, 2, words(tmp_path / "more", train_samples=201))
