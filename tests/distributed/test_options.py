"""What a config may ask of any task: parameter groups, frozen and low-rank parameters, the best model."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.distributed.jobs import USER_TASKS, first_gradient, small_config, train
from tests.distributed.test_exactness import BF16, digits, same_everywhere
from tests.standing import run_ranks
from trainer.commands.cli import main as command_line
from trainer.errors import UserError
from trainer.exact.checks.hashes import state_sha256
from trainer.exact.order import by_length, epoch_order, key
from trainer.exact.plan import micro_batch_bounds

MORE = f"{USER_TASKS}/more_tasks.py"
ADAMW = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.5, "torch_adam": True, "fused": True}}


def words(path: Path, **extra: Any) -> Any:
    options = {"train_batch_size": 52, "gradient_clipping": 0.0, "epochs": 2, "optimizer": ADAMW}
    return small_config(path, task=f"{MORE}:Words", **(options | extra))


def a_task(name: str, *arguments: Any) -> Any:
    sys.path.insert(0, str(USER_TASKS))
    import more_tasks

    return getattr(more_tasks, name)(*arguments)


@pytest.mark.parametrize("precision", [{}, BF16], ids=["fp32", "bf16"])
def test_padding_is_that_of_the_micro_batch(tmp_path: Path, precision: dict[str, Any]) -> None:
    """One hash at every world size, and what stands in the padding changes nothing."""
    clean = same_everywhere(lambda W: words(tmp_path / str(W), **precision), [1, 2, 3, 5])
    odd = run_ranks(train, 2, words(tmp_path / "odd", task_options={"garbage": 7}, **precision))[0]
    assert odd["parameters_sha256"] == clean["parameters_sha256"]


def test_weighted_and_padded_gradient_against_float64(tmp_path: Path) -> None:
    ours = run_ranks(first_gradient, 3, words(tmp_path / "run", seed=5, torch_autocast=None))[0]
    task = a_task("Words")
    torch.default_generator.manual_seed(key(5, "model"))
    model, split = task.model().double(), task.splits()["train"]
    chosen = by_length(epoch_order(5, 0, 200), split.lengths, 52, 8)[:52]
    total = 0.0
    means = []
    for j, (start, stop) in enumerate(micro_batch_bounds(52, 8)):
        batch = {name: array[chosen[start:stop]] for name, array in split.arrays.items()}
        longest = int(batch["mask"].sum(1).max())
        batch = {n: a[:, :longest] if a.ndim > 1 else a for n, a in batch.items()} | {}
        torch.default_generator.manual_seed(key(5, "forward", 0, j))
        mean = (model.words(batch["words"]) * batch["mask"][..., None]).sum(1) / batch["mask"].sum(1, keepdim=True)
        # Dropout draws float32 numbers in the run: the same ones here.
        kept = F.dropout(torch.ones_like(mean, dtype=torch.float32), 0.1, True).double()
        loss = F.cross_entropy(model.head(model.norm(mean) * kept), batch["y"], reduction="none")
        weight = batch["mask"].sum(1).double()
        total = total + (loss * weight).sum()
        means.append((loss * weight).sum() / weight.sum())
    count = sum(float(split.lengths[i]) for i in chosen)
    right = torch.autograd.grad(total / count, model.parameters(), retain_graph=True)
    naive = torch.autograd.grad(torch.stack(means).mean(), model.parameters())
    for mine, expected, averaged in zip(ours, right, naive, strict=True):
        torch.testing.assert_close(torch.from_numpy(mine).double(), expected, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(averaged, expected, rtol=1e-3, atol=1e-6)  # the mean of means is something else


def test_biases_and_norms_are_not_decayed_and_groups_have_their_own_rates(tmp_path: Path) -> None:
    """Against a plain loop with the groups written out."""
    groups = {"outer": {"lr": 0.002}, "outer.bias": {"weight_decay": 0.3}}
    extra = {"optimizer": ADAMW, "gradient_clipping": 0.0, "epochs": 1, "parameter_groups": groups}
    extra["task_options"] = {"dropout": 0.0, "noise": 0.0}
    same_everywhere(lambda W: small_config(tmp_path / str(W), **extra), [1, 3])
    ours = load_file(tmp_path / "3" / "model" / "model.safetensors")

    sys.path.insert(0, str(USER_TASKS))
    from my_task import MyTask

    task = MyTask(24, 0.0, 0.0)
    torch.default_generator.manual_seed(key(0, "model"))
    model, split = task.model(), task.splits()["train"]
    optimizer = torch.optim.AdamW(
        [
            {"params": [model.inner.weight], "lr": 0.01, "weight_decay": 0.5},
            {"params": [model.inner.bias, *model.norm.parameters(), *model.average.parameters()], "weight_decay": 0.0},
            {"params": [model.outer.weight], "lr": 0.002, "weight_decay": 0.5},
            {"params": [model.outer.bias], "lr": 0.002, "weight_decay": 0.3},
        ],
        lr=0.01,
    )
    for chosen in epoch_order(0, 0, 500).split(104):
        optimizer.zero_grad()
        for start, stop in micro_batch_bounds(len(chosen), 8):
            x, y = split["x"][chosen[start:stop]], split["y"][chosen[start:stop]]
            (F.cross_entropy(model(x), y, reduction="sum") / len(chosen)).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        if name == "inner.bias":
            continue  # BatchNorm subtracts it again: its gradient is rounding
        torch.testing.assert_close(ours[name], parameter.detach(), rtol=1e-3, atol=1e-5, msg=name)


def test_decay_of_biases_and_norms_on_request(tmp_path: Path) -> None:
    def norm_gain(**extra: Any) -> float:
        rate = ADAMW | {"params": ADAMW["params"] | {"weight_decay": 5.0}}
        run_ranks(train, 1, words(tmp_path / str(len(list(tmp_path.iterdir()))), optimizer=rate, **extra))
        return float(load_file(max(tmp_path.iterdir()) / "model" / "model.safetensors")["norm.weight"].mean())

    assert norm_gain() > 0.95
    assert norm_gain(decay_biases_and_norms=True) < 0.8


def test_frozen_parameters_stay(tmp_path: Path) -> None:
    same_everywhere(lambda W: words(tmp_path / str(W), freeze=["words", "norm.*"]), [1, 2, 3])
    after = load_file(tmp_path / "2" / "model" / "model.safetensors")
    torch.default_generator.manual_seed(key(0, "model"))
    before = a_task("Words").model().state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved == {"head.weight", "head.bias"}


def test_low_rank_updates(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the extra lora is not installed")
    lora = {"rank": 2, "dropout": 0.1, "target_modules": ["inner"], "also_train": ["outer"]}
    same_everywhere(lambda W: small_config(tmp_path / str(W), lora=lora, epochs=2), [1, 2, 3])
    saved = load_file(tmp_path / "3" / "model" / "model.safetensors")
    assert set(saved) >= {"inner.weight", "inner.bias", "outer.weight"}  # merged: loads into the plain model
    torch.default_generator.manual_seed(key(0, "model"))
    before = a_task("WithValidation", 24).model().state_dict()
    change = saved["inner.weight"] - before["inner.weight"]
    assert 1 <= torch.linalg.matrix_rank(change, rtol=1e-3) <= 2
    assert torch.equal(saved["inner.bias"], before["inner.bias"])
    assert (tmp_path / "3" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("extra", "words_in_message"),
    [
        ({"freeze": ["nothing.*"]}, ['"trainer.freeze"', "nothing.*", "inner.weight"]),
        ({"parameter_groups": {"outr": {"lr": 0.1}}}, ["outr", "matches no parameter"]),
        ({"gradient_checkpointing": True}, ["gradient_checkpointing", "Net"]),
        ({"lora": {"target_modules": ["none"]}}, ["trainer.lora", "inner, outer"]),
        ({"freeze": ["*"]}, ["nothing to train"]),
        ({"best": {"patience_evaluations": 2}}, ["validation split"]),
    ],
    ids=["freeze", "groups", "checkpointing", "lora", "all frozen", "no validation"],
)
def test_what_a_model_cannot_do(tmp_path: Path, extra: dict[str, Any], words_in_message: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        run_ranks(train, 2, small_config(tmp_path / "run", **extra))
    for word in words_in_message:
        assert word in str(caught.value)
    assert not (tmp_path / "run").exists()


def overfits(path: Path, **extra: Any) -> Any:
    options: dict[str, Any] = {"train_batch_size": 60, "gradient_clipping": 0.0, "epochs": 12, "optimizer": ADAMW}
    return small_config(path, **({"task": f"{MORE}:WithValidation"} | options | extra))


def test_the_best_model_on_validation_is_kept_and_tested_once(tmp_path: Path) -> None:
    summary = same_everywhere(lambda W: overfits(tmp_path / str(W)), [1, 3])
    records = [json.loads(line) for line in (tmp_path / "3" / "metrics.jsonl").read_text().splitlines()]
    seen = {r["step"]: r["eval/validation/accuracy"] for r in records if "eval/validation/accuracy" in r}
    assert sorted(seen) == list(range(5, 61, 5))
    best = max(seen.values())
    losses = {r["step"]: r["eval/validation/loss"] for r in records if "eval/validation/loss" in r}
    first = min((step for step, value in seen.items() if value == best), key=lambda step: (losses[step], step))
    assert summary["best"] == {"step": first, "metric": "accuracy", "mode": "max", "value": best}
    assert first < 60, "the test wants a run that gets worse"
    assert summary["metrics"]["validation"]["accuracy"] == best
    assert sum("eval/test/accuracy" in r for r in records) == 1

    # The saved model is that of the best step: a run that ends there has it.
    run_ranks(train, 1, overfits(tmp_path / "short", max_steps=first, best={"metric": None}))
    kept, short = (load_file(tmp_path / n / "model" / "model.safetensors") for n in ("3", "short"))
    assert state_sha256(kept) == state_sha256(short)
    task = a_task("WithValidation")
    model, test = task.model(), task.splits()["test"]
    model.load_state_dict(kept)
    with torch.inference_mode():
        accuracy = (model.eval()(test["x"]).argmax(1) == test["y"]).double().mean()
    assert summary["metrics"]["test"]["accuracy"] == pytest.approx(float(accuracy), abs=1e-6)

    last = run_ranks(train, 2, overfits(tmp_path / "last", best={"metric": None}))[0]
    assert "best" not in last
    assert last["parameters_sha256"] == summary["parameters_sha256"]


def test_early_stopping(tmp_path: Path) -> None:
    full = run_ranks(train, 1, overfits(tmp_path / "full", best={"metric": "loss"}))[0]
    best = full["best"]["step"]
    assert best < 50, "the test wants a run that gets worse"
    early = same_everywhere(
        lambda W: overfits(tmp_path / str(W), best={"metric": "loss", "patience_evaluations": 2}), [1, 2]
    )
    assert (early["status"], early["steps"]) == ("stopped early", best + 10)
    assert early["best"] == full["best"]
    assert early["metrics"] == full["metrics"]


def test_a_misspelt_metric_is_found_before_training(tmp_path: Path) -> None:
    for best, message in (
        ({"metric": "acuracy"}, 'Did you mean "accuracy"?'),
        ({"metric": "macro"}, "validation has no metric"),
    ):
        with pytest.raises(UserError, match=r"trainer\.best") as caught:
            run_ranks(train, 2, overfits(tmp_path / "run", best=best))
        assert message in str(caught.value)
        assert not (tmp_path / "run").exists()


def test_saving_in_a_tasks_own_way_and_predicting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"tensorboard": {"enabled": True}, "task_options": {"names": ["no", "ja"]}}
    run_ranks(train, 2, overfits(tmp_path / "run", task=f"{MORE}:Predicts", epochs=2, **options))
    assert {f.name for f in (tmp_path / "run" / "model").iterdir()} == {
        "weights.safetensors", "trainer.json", "README.md",
    }  # fmt: skip
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["parameters_sha256"] in card
    assert f"| accuracy | {summary['metrics']['validation']['accuracy']:.4f} |" in card

    task = a_task("Predicts", 8, ["no", "ja"])
    x = task.splits()["test"]["x"][:7]
    with (tmp_path / "in.csv").open("w") as file:
        csv.writer(file).writerows(x.tolist())
    with torch.inference_mode():
        expected = [task.names[i] for i in task.load(tmp_path / "run" / "model").eval()(x).argmax(1).tolist()]
    common = ["predict", "--model", str(tmp_path / "run"), "--input", str(tmp_path / "in.csv"), "--batch_size", "3"]
    assert command_line([*common, "--task", f"{MORE}:Predicts"]) == 0
    assert capsys.readouterr().out.splitlines() == ["label", *expected]
    out = tmp_path / "out.jsonl"
    assert command_line([*common, "--task", f"{MORE}:Predicts", "--output", str(out)]) == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == [{"label": e} for e in expected]


@pytest.mark.slow
def test_compiled_models_are_exact(tmp_path: Path) -> None:
    same_everywhere(lambda W: digits(tmp_path / f"cnn{W}", "cnn", compile=True), [1, 3])
