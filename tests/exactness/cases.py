"""Random cases for the fuzzer: a task, a config and four world sizes, as a pure function of a seed and a number.

A case has one main feature, its kind, and whatever else chance adds. Every fifth case has a flaw (flaws.py) that the
trainer must find. What a run may be refused for rightly, such as BatchNorm over a single sample, is not drawn.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.exactness.flaws import FLAWS
from tests.exactness.networks import Network
from tests.exactness.settings import optimizer, trainer_options
from trainer.exact.plan import micro_batch_bounds

TASK = str(Path(__file__).resolve().parent / "random_task.py")
MAX_WORLD_SIZE = 8
MAX_MICRO_BATCHES = 13
# Of a whole run, so that a case takes about a second.
MOST_MICRO_STEPS = 40

KINDS = (
    "dense layers",
    "convolutions",
    "recurrent layers",
    "attention",
    "padded tokens",
    "bags of tokens",
    "BatchNorm",
    "other normalisation",
    "dropout",
    "augmentation of a sample",
    "augmentation of a micro-batch",
    "tied and reused weights",
    "scalar, unused and rare weights",
    "frozen weights",
    "LoRA",
    "gradient checkpointing",
    "annealing",
    "variational",
    "optimizers",
    "bfloat16",
    "uneven counts",
    "short tails",
    "innocent state",
)

OF_A_SAMPLE = ("gaussian", "power", "sigmoid", "matrix", "cutout", "roll", "flip")
OF_A_MICRO_BATCH = ("standardize", "permutation", "randn_like", "mixup", "shift")


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
        seed, number: what it follows from.
        kind: its main feature.
        config: JSON values, without an output folder.
        world_sizes: four of them, or as many as there are micro-batches.
        flaw: a name of FLAWS; None where the run has to be exact.
    """

    seed: int
    number: int
    kind: str
    config: dict[str, Any]
    world_sizes: tuple[int, ...]
    flaw: str | None = None

    @property
    def command(self) -> str:
        """What repeats it."""
        return f"python tests/exactness/fuzz.py --seed {self.seed} --case {self.number}"


@dataclass(frozen=True)
class Plan:
    """The batch arithmetic of a case: m, B, samples, and the smallest micro-batch of all."""

    micro_batch_size: int
    global_batch_size: int
    samples: int
    drop_last: bool
    smallest: int
    micro_batches: int
    steps: int


def random_case(seed: int, number: int) -> Case:
    """Case `number` of a seed: the same on every machine."""
    chance = random.Random(f"{seed} {number}")
    flaw = list(FLAWS)[(number // 5 + seed) % len(FLAWS)] if number % 5 == 4 else None
    kind = KINDS[(number - number // 5 + seed) % len(KINDS)] if flaw is None else ""
    plan = _plan(chance, kind, flaw)
    bfloat16 = kind == "bfloat16" or chance.random() < 0.2
    network = Network(chance, kind, flaw, single=plan.smallest == 1, bfloat16=bfloat16)
    loss = network.loss()
    rest = 0 if plan.drop_last else plan.samples % plan.global_batch_size
    if loss["counts"] == "weights" and min(plan.global_batch_size, rest or plan.global_batch_size) >= 8:
        loss["least"] = chance.choice([0, 1])  # micro-batches without any count, too, but no whole batch
    late = flaw is not None and FLAWS[flaw].late
    annealed = kind == "annealing" or late or chance.random() < 0.1
    spec: dict[str, Any] = {
        "data_seed": chance.randrange(1000),
        "samples": {"train": plan.samples},
        "input": network.input,
        "layers": network.layers,
        "head": network.head,
        "outputs": network.outputs,
        "loss": loss,
        "augment": _augmentations(chance, kind, network, loss),
        "claims_chunks": chance.random() < 0.3,
        "anneals": annealed,
        "innocent": flaw is None and (kind == "innocent state" or chance.random() < 0.05),
        "bare": chance.random() < 0.5,
        "flaw": None
        if flaw is None or FLAWS[flaw].layer or FLAWS[flaw].tokens
        else _place(chance, flaw, network, plan),
    }
    for name in ("validation", "test"):
        if chance.random() < 0.4:
            spec["samples"][name] = chance.randint(1, 24)
    name = "AnnealedTask" if annealed else "RandomTask"
    options = trainer_options(chance, kind, plan, network, spec)
    values: dict[str, Any] = {
        "train_batch_size": plan.global_batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_clipping": chance.choice([0, 0, 0.05, 0.5, 1.0]),
        "optimizer": optimizer(chance, lora="lora" in options),
        "tensorboard": {"enabled": False},
        "trainer": {"task": f"{TASK}:{name}", "task_options": {"spec": spec}, "device": "cpu"} | options,
    }
    if "scheduler" in options:
        values["scheduler"] = values["trainer"].pop("scheduler")
    if chance.random() < 0.5:
        values["trainer"]["task"] = f"{TASK}:{name.removesuffix('Task')}InOneCallTask".replace("Random", "")
    if bfloat16:
        values["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    label = kind if flaw is None else f"flaw: {flaw}"
    return Case(seed, number, label, values, _world_sizes(chance, plan.micro_batches), flaw)


def _plan(chance: random.Random, kind: str, flaw: str | None) -> Plan:
    while True:
        m = chance.randint(1, 9)
        M = chance.choice([1, 2, 3, *range(4, MAX_MICRO_BATCHES + 1), *range(4, MAX_MICRO_BATCHES + 1)])
        if flaw is not None and M < 4:
            continue
        B = m * M - (chance.randrange(m) if chance.random() < 0.5 else 0)
        if -(-B // m) != M or m > B:
            continue
        tail = chance.randrange(B) if chance.random() < 0.7 else 0
        if kind == "short tails":
            # Fewer micro-batches in the tail than ranks.
            tail = chance.randint(1, max(1, B // 3))
        samples = B * chance.randint(1, 3) + tail
        drop_last = kind != "short tails" and chance.random() < 0.2
        sizes = [stop - start for start, stop in micro_batch_bounds(B, m)]
        if samples % B and not drop_last:
            sizes += [stop - start for start, stop in micro_batch_bounds(samples % B, m)]
        if kind == "BatchNorm" and min(sizes) == 1:
            continue
        if flaw == "ragged_random" and len(set(sizes)) == 1:
            continue
        steps = min(chance.randint(3, 8), max(3, MOST_MICRO_STEPS // M))
        return Plan(m, B, samples, drop_last, min(sizes), M, steps)


def _world_sizes(chance: random.Random, M: int) -> tuple[int, ...]:
    """1, one that does not divide M where there is one, and others: four where M allows, mostly small ones."""
    possible = list(range(2, min(MAX_WORLD_SIZE, M) + 1))
    uneven = [W for W in possible if M % W]
    # Many ranks share few cores, so large world sizes are drawn less often.
    rarity = {W: chance.random() ** (W * W / 4) for W in possible}
    chosen = [max(uneven, key=rarity.__getitem__)] if uneven else []
    others = sorted((W for W in possible if W not in chosen), key=rarity.__getitem__, reverse=True)
    return tuple(sorted([1, *chosen, *others[: 3 - len(chosen)]]))


def _augmentations(chance: random.Random, kind: str, network: Network, loss: dict[str, Any]) -> list[str]:
    if network.input["form"] == "tokens":
        return ["token_dropout"] if kind.startswith("augmentation") or chance.random() < 0.2 else []
    mixing = [name for name in OF_A_MICRO_BATCH if name != "mixup" or not loss.get("each_place")]
    found = []
    if kind == "augmentation of a sample" or chance.random() < 0.3:
        found += chance.sample(OF_A_SAMPLE, chance.randint(1, 3))
    if kind == "augmentation of a micro-batch" or chance.random() < 0.1:
        found += chance.sample(mixing, chance.randint(1, 2))
    if "mixup" in found:  # makes targets that later steps do not know of
        found.remove("mixup")
        found.append("mixup")
    return found


def _place(chance: random.Random, flaw: str, network: Network, plan: Plan) -> dict[str, Any]:
    """Where a task goes wrong; tokens are whole numbers, which nothing can be added to."""
    places = ["loss"] if network.input["form"] == "tokens" else ["forward", "augment", "loss"]
    kinds = {"late_random": "python_random", "ragged_random": "python_random", "late_counter": "task_counter"}
    size = plan.smallest if flaw == "ragged_random" else None
    return {"kind": kinds.get(flaw, flaw), "where": chance.choice(places), "late": FLAWS[flaw].late, "size": size}
