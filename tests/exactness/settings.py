"""The part of a random config that is not the task: optimizers, rates, evaluation, frozen weights, LoRA."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from tests.exactness.flaws import FLAWS

if TYPE_CHECKING:
    from tests.exactness.cases import Plan
    from tests.exactness.networks import Network

# Every one that works on the CPU without compiling: torch.optim's, and LARS and LAMB.
OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {"lr": 0.01, "torch_adam": True, "fused": True}),
    ("AdamW", {"lr": 0.01, "torch_adam": True, "fused": False, "weight_decay": 0.1}),
    ("AdamW", {"lr": 0.01, "torch_adam": True, "foreach": True}),
    ("Adam", {"lr": 0.01, "torch_adam": True, "adam_w_mode": False, "amsgrad": True}),
    ("Adam", {"lr": 0.01, "torch_adam": True, "fused": True, "amsgrad": True, "betas": [0.8, 0.95]}),
    ("SGD", {"lr": 0.05}),
    ("SGD", {"lr": 0.03, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.03, "momentum": 0.8, "dampening": 0.1, "fused": True}),
    ("Adagrad", {"lr": 0.03}),
    ("Adagrad", {"lr": 0.03, "fused": True, "lr_decay": 0.1}),
    ("RMSprop", {"lr": 0.003}),
    ("RMSprop", {"lr": 0.003, "centered": True, "momentum": 0.5}),
    ("NAdam", {"lr": 0.005}),
    ("RAdam", {"lr": 0.01, "weight_decay": 0.01}),
    ("Adamax", {"lr": 0.01}),
    ("ASGD", {"lr": 0.03}),
    ("Rprop", {"lr": 0.003}),
    ("Adadelta", {"lr": 0.5}),
    ("Adafactor", {"lr": 0.01}),
    ("LARS", {"lr": 0.5, "weight_decay": 0.001}),
    ("LAMB", {"lr": 0.01, "weight_decay": 0.01}),
]


def optimizer(chance: random.Random, lora: bool) -> dict[str, Any]:
    """An optimizer's block. The layerwise ones are left out with LoRA, whose first updates are zero by design."""
    usable = [o for o in OPTIMIZERS if not lora or o[0] not in ("LARS", "LAMB")]
    name, params = chance.choice(usable)
    return {"type": name, "params": params}


def trainer_options(
    chance: random.Random, kind: str, plan: Plan, network: Network, spec: dict[str, Any]
) -> dict[str, Any]:
    """The "trainer" block without the task, and "scheduler", which belongs one level higher."""
    per_epoch = plan.samples // plan.global_batch_size
    per_epoch += bool(plan.samples % plan.global_batch_size) and not plan.drop_last
    options: dict[str, Any] = {
        "epochs": -(-plan.steps // per_epoch),
        "max_steps": plan.steps,
        "seed": chance.randrange(1 << chance.choice([4, 31, 60])),
        "drop_last": plan.drop_last,
        "exactness": chance.choice(["auto", "bitwise"]),
        "evaluate_micro_batch_size": chance.choice([*range(1, 10), 128]),
        "evaluate_every_epochs": chance.choice([0, 1, 1, 2]),
        "log_every_steps": chance.randint(1, 5),
        "guard_every_steps": chance.choice([1, 2, 50]),
        "hang_timeout_s": 60,
    }
    if chance.random() < 0.4:
        options["audit_every_steps"] = chance.choice([0, 1, 2, 3])
    if chance.random() < 0.15:
        # More samples than are trained on: a subset of them is chosen.
        options["train_samples"] = plan.samples
        spec["samples"]["train"] += chance.randint(1, 9)
    if plan.micro_batches > 1 and chance.random() < 0.15:
        options["gradient_noise"] = True
    options["pack"] = chance.choice([1, 2, 2, 3, 4, 8, "auto"])
    _rates(chance, plan, options)
    _best(chance, spec, options)
    if network.flaw is not None and FLAWS[network.flaw].late:
        # An audit of the last step finds it, if the run comes so far.
        options |= {"audit_every_steps": chance.randint(1, 4)}
        options.pop("best", None)
    weights = network.weighted_layers()
    if kind == "LoRA" and network.lora_targets():
        targets = network.lora_targets()
        lora: dict[str, Any] = {
            "rank": chance.randint(1, 4),
            "alpha": chance.randint(1, 8),
            "dropout": chance.choice([0, 0, 0.2]),
        }
        if len(targets) > 1 and chance.random() < 0.5:
            lora["also_train"] = ["head"]
            targets = [name for name in targets if name != "head"]
        lora["target_modules"] = chance.sample(targets, chance.randint(1, len(targets)))
        options["lora"] = lora
    elif weights and not network.flaw and (kind == "frozen weights" or chance.random() < 0.1):
        options["freeze"] = chance.sample(weights, chance.randint(1, len(weights)))
    if kind == "gradient checkpointing" or (kind != "LoRA" and chance.random() < 0.08):
        options["gradient_checkpointing"] = True
    if "lora" not in options and "scheduler" not in options and chance.random() < 0.15:
        options["parameter_groups"] = {"head": {"lr": 0.002}}
    return options


def _rates(chance: random.Random, plan: Plan, options: dict[str, Any]) -> None:
    if chance.random() < 0.5:
        return
    if chance.random() < 0.5:
        rate: dict[str, Any] = {"schedule": chance.choice(["linear", "cosine"])}
        rate["final_fraction"] = chance.choice([0.0, 0.1])
        rate["warmup_epochs"] = chance.choice([0, 0.5, 1])
        if plan.micro_batches > 1 and chance.random() < 0.3:
            rate |= {"scaling_rule": chance.choice(["sqrt", "linear", "adascale"])}
            rate["base_global_batch_size"] = max(1, plan.global_batch_size // 2)
        options["learning_rate"] = rate
        return
    options["scheduler"] = chance.choice(
        [
            {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 3}},
            {"type": "WarmupDecayLR", "params": {"total_num_steps": 9, "warmup_num_steps": 2}},
            {"type": "WarmupCosineLR", "params": {"total_num_steps": 9, "warmup_num_steps": 2}},
            {"type": "LRRangeTest", "params": {"lr_range_test_min_lr": 0.001, "lr_range_test_step_size": 2}},
            {"type": "OneCycle", "params": {"cycle_min_lr": 0.001, "cycle_max_lr": 0.01, "cycle_momentum": False}},
        ]
    )


def _best(chance: random.Random, spec: dict[str, Any], options: dict[str, Any]) -> None:
    if "validation" not in spec["samples"] or chance.random() < 0.4:
        return
    best: dict[str, Any] = {"metric": chance.choice(["auto", "loss", "mean", None])}
    if best["metric"] == "mean":
        best["mode"] = chance.choice(["min", "max"])
    if best["metric"] is not None and options["evaluate_every_epochs"] and chance.random() < 0.4:
        best["patience_evaluations"] = 1
    options["best"] = best
