"""The arms of a study: from a base config to the config of one run on one rank. Pure arithmetic.

A run's bits do not depend on how many ranks compute it, so weak scaling on W ranks is the run of one rank with a
W times larger global batch and the same micro-batches. An arm says what else changes with that batch.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..config.keys import Config, OptimizerOptions, TrainerOptions, parse
from ..errors import UserError
from ..exact.plan import steps_per_epoch

Budget = Literal["epochs", "updates"]
Rule = Literal["none", "linear", "sqrt", "adascale"]


@dataclass(frozen=True)
class Arm:
    """The changes of one arm, on W ranks, to a config whose hyper-parameters were chosen for one rank.

    Attributes:
        title: for people.
        rule: of trainer.learning_rate.scaling_rule, in the growth W of the global batch.
        warmup_epochs: of trainer.learning_rate; None for the base config's own.
        scales_adam: change Adam's betas and eps with the batch as well.
        optimizer: used instead of the base config's; None to keep that one.
        centre: the middle of the learning rates that are searched; 0 for the base config's rate.
        tuned: "" for settings that are given, "base" for those searched with the batch of one rank, whose rate is then
            scaled by the rule, "own" for those searched with the batch of W.
        reference: the sequential arm that it is compared with. It has the same optimizer, and is tuned alike.
    """

    title: str
    rule: Rule = "none"
    warmup_epochs: float | None = None
    scales_adam: bool = False
    optimizer: Literal["LARS", "LAMB"] | None = None
    centre: float = 0.0
    tuned: Literal["", "base", "own"] = ""
    reference: str = "sequential"


@dataclass(frozen=True)
class Settings:
    """What a search finds.

    Attributes:
        lr: learning rate.
        warmup_epochs: of trainer.learning_rate; None for the base config's own.
        momentum: of SGD and LARS, or the first of Adam's betas; None for the base config's own.
    """

    lr: float
    warmup_epochs: float | None = None
    momentum: float | None = None

    def __str__(self) -> str:
        more = f", warm-up {self.warmup_epochs:g} epochs" if self.warmup_epochs is not None else ""
        return f"{self.lr:g}{more}" + (f", momentum {self.momentum:g}" if self.momentum is not None else "")


SEQUENTIAL, STRONG, SEQUENTIAL_TUNED = "sequential", "strong", "sequential_tuned"
# An arm is compared with the sequential runs of its own optimizer. Otherwise what LARS costs by itself would count as a
# loss of the larger batch.
SEQUENTIALS = {
    SEQUENTIAL: Arm("sequential"),
    SEQUENTIAL_TUNED: Arm("sequential, tuned", tuned="own"),
    "sequential_lars": Arm("sequential, LARS", optimizer="LARS", centre=4.0, tuned="base"),
    "sequential_lamb": Arm("sequential, LAMB", optimizer="LAMB", centre=0.01, tuned="base"),
}
WEAK = {
    "weak": Arm("weak, learning rate unchanged"),
    # Goyal et al. 2017, arXiv 1706.02677, sections 2.1 and 2.2.
    "weak_linear": Arm("weak, linear rule", "linear"),
    "weak_linear_warmup": Arm("weak, linear rule, warm-up over 5 epochs", "linear", warmup_epochs=5.0),
    # Krizhevsky 2014, arXiv 1404.5997; Hoffer et al. 2017, arXiv 1705.08741. Only the rate changes.
    "weak_sqrt": Arm("weak, square-root rule", "sqrt"),
    # Malladi et al. 2022, arXiv 2205.10287.
    "weak_sqrt_adam": Arm("weak, square-root rule with Adam's betas and eps", "sqrt", scales_adam=True),
    # You et al. 2017, arXiv 1708.03888, and 2020, arXiv 1904.00962, with the rules that their authors use. The rate of
    # the base's optimizer does not suit them, so settings are searched for each, with the batch of one rank.
    "weak_lars": Arm(
        "weak, LARS, linear rule, warm-up over 5 epochs", "linear", 5.0, False, "LARS", 4.0, "base", "sequential_lars"
    ),
    "weak_lamb": Arm(
        "weak, LAMB, square-root rule, warm-up over 5 epochs",
        "sqrt",
        5.0,
        False,
        "LAMB",
        0.01,
        "base",
        "sequential_lamb",
    ),
    # Johnson et al. 2020, arXiv 2007.05105.
    "weak_adascale": Arm("weak, AdaScale", "adascale"),
    # Shallue et al. 2019, arXiv 1811.03600: a fair comparison gives each batch size its own best rate.
    "weak_tuned": Arm("weak, tuned at each W", tuned="own", reference=SEQUENTIAL_TUNED),
}
# Runs with the batch of one rank, and with as few updates as a weak run at W makes in its epochs. What they lose is
# lost by fewer updates. What a weak run loses against them is lost by its batch. A short run may have another best
# rate, so the controls of a tuned arm are tuned at each W, too.
EQUAL_UPDATES = "sequential_equal_updates"
CONTROLS = {
    EQUAL_UPDATES: Arm("sequential, as few updates"),
    "sequential_tuned_equal_updates": Arm("sequential, tuned, as few updates", tuned="own", reference=SEQUENTIAL_TUNED),
}
DEFAULTS = (SEQUENTIAL, STRONG, *WEAK)
NAMES = (*DEFAULTS, EQUAL_UPDATES)
# What is compared with sequential runs.
COMPARED = (*WEAK, *CONTROLS)
_ARMS = SEQUENTIALS | WEAK | CONTROLS


def title_of(arm: str, budget: str = "updates") -> str:
    """An arm in words."""
    if arm == STRONG:
        return "strong"
    if (arm, budget) == ("weak_adascale", "epochs"):
        return "weak, AdaScale's gain without its stopping rule"
    return _ARMS[arm].title


@dataclass(frozen=True, order=True)
class Place:
    """The place of runs in a study: everything but the seed.

    Attributes:
        variant: of the base config; "" for the base itself.
        arm, budget, world_size: W is 1 for the sequential arms.
    """

    variant: str
    arm: str
    budget: Budget
    world_size: int

    @property
    def reference(self) -> Place:
        """The sequential runs that this is compared with."""
        return Place(self.variant, _ARMS[self.arm].reference, "epochs", 1)

    @property
    def tuned_at(self) -> Place | None:
        """Where the settings of these runs are searched; None where they are given."""
        arm = _ARMS[self.arm]
        if not arm.tuned:
            return None
        return (
            self
            if arm.tuned == "own"
            else Place(self.variant, arm.reference if self.arm in WEAK else self.arm, "epochs", 1)
        )

    @property
    def control(self) -> Place | None:
        """The sequential runs with as few updates; None where a study has none. Of a weak place at equal epochs."""
        if self.arm in WEAK and self.budget == "epochs":
            for name, control in CONTROLS.items():
                if control.reference == WEAK[self.arm].reference:
                    return Place(self.variant, name, "epochs", self.world_size)
        return None

    def __str__(self) -> str:
        what = f"{self.arm}, W = {self.world_size}" if self.world_size > 1 else self.arm
        what += ", equal updates" if self.budget == "updates" else ""
        return f"{self.variant}: {what}" if self.variant else what


def centre_of(place: Place, base: Config) -> float:
    """The middle of the learning rates that are searched at a place."""
    return _ARMS[place.arm].centre or float(base.optimizer.params["lr"])


def rivals_of(place: Place) -> list[Place]:
    """The untuned places that a well-tuned place does not lose against: those with its batch and budget.

    Empty unless the settings of the place are searched with its own batch.
    """
    if place.arm == SEQUENTIAL_TUNED:
        return [Place(place.variant, SEQUENTIAL, "epochs", 1)]
    if place.arm in CONTROLS and CONTROLS[place.arm].tuned:
        return [Place(place.variant, EQUAL_UPDATES, "epochs", place.world_size)]
    if place.arm not in WEAK or WEAK[place.arm].tuned != "own":
        return []
    return [Place(place.variant, arm, place.budget, place.world_size) for arm in WEAK if not WEAK[arm].tuned]


def compared_arms(arms: Collection[str], budget: Budget) -> list[str]:
    """The arms that are compared with sequential runs: the weak ones, and the controls of these at equal epochs."""
    weak = [arm for arm in WEAK if arm in arms]
    if EQUAL_UPDATES not in arms or budget != "epochs":
        return weak
    needed = {SEQUENTIAL, *(WEAK[arm].reference for arm in weak)}
    return weak + [name for name, control in CONTROLS.items() if control.reference in needed]


def contrasted(places: Collection[Place]) -> list[Place]:
    """The weak places whose control is among the given places: they are compared with it, too."""
    return [place for place in places if place.control in places]


class ImpossibleError(UserError):
    """This arm cannot be run at this W; the message says why. The study reports it and continues."""


def adam_for(params: Mapping[str, Any], k: int) -> dict[str, Any]:
    """Adam's betas and eps for a k times larger batch; the rate is scaled by sqrt(k) elsewhere.

    Malladi et al. 2022: beta -> 1 - k (1 - beta) for both, eps -> eps / sqrt(k). Weight decay stays as it is, because
    the paper says nothing about it.

    Raises:
        ImpossibleError: a beta would be negative, beyond k = 1 / (1 - beta).
    """
    betas, eps = params.get("betas", (0.9, 0.999)), params.get("eps", 1e-8)
    scaled = [1.0 - k * (1.0 - beta) for beta in betas]
    for i, (beta, new) in enumerate(zip(betas, scaled), start=1):
        if new < 0:
            raise ImpossibleError(
                f"beta{i} = 1 - {k} (1 - {beta:g}) = {new:.3g} is negative: the rule ends at a {1 / (1 - beta):.4g} "
                "times larger batch"
            )
    return {**params, "betas": scaled, "eps": eps / k**0.5}


def values_of(
    base: Mapping[str, Any],
    arm: str,
    world_size: int,
    budget: Budget,
    seed: int,
    samples: int,
    max_epochs: int | None = None,
    settings: Settings | None = None,
) -> dict[str, Any]:
    """The config values of one run, on one rank.

    Equal epochs keep `trainer.epochs`.

    Equal updates (Hoffer et al. 2017: large batches generalise worse because they make fewer updates) give exactly the
    sequential run's number of optimizer steps. Warm-up and the time between validations are stretched alike. So every
    run chooses its model from about as many validations.

    AdaScale counts scale-invariant steps. With equal updates it makes as many of them as the sequential run makes
    steps, as its authors do. With equal epochs its gain is used instead of a rule's constant factor.

    Args:
        base: config values that `base.check_base` has passed.
        arm: a key of SEQUENTIALS, WEAK or CONTROLS.
        world_size: W; 1 for the sequential arms.
        budget: what this run has in common with the sequential one.
        seed: of the run.
        samples: of the training set.
        max_epochs: the most epochs that equal updates may take; a run that would need more ends there.
        settings: what a search found, with the batch of one rank, or with that of W for arms that are tuned at each W;
            None for the base's own.

    Raises:
        ImpossibleError: the global batch is larger than the training set, or the arm's rule ends before W.
    """
    config = parse(dict(base))
    B, trainer = config.plan(1).global_batch_size, config.trainer
    values = copy.deepcopy(dict(base))
    # It was made for the base's batch, and the three batch keys have to agree. Without it, it follows from the others.
    values.pop("gradient_accumulation_steps", None)
    values["train_batch_size"] = B if arm in CONTROLS else B * world_size
    block: dict[str, Any] = values.setdefault("trainer", {})
    block["seed"] = seed
    own = steps_per_epoch(samples, B * world_size, trainer.drop_last)
    this = _ARMS[arm]
    if this.optimizer is not None:
        values["optimizer"] = {"type": this.optimizer, "params": _params_for(this.optimizer, config.optimizer)}
    if settings is not None:
        _set(values, block, settings)
    if arm in SEQUENTIALS:
        assert world_size == 1
        block["log_every_steps"] = _window(own * trainer.epochs)
        return values
    if B * world_size > samples:
        raise ImpossibleError(
            f"the global batch {world_size} x {B} = {B * world_size:,} is larger than the training set of {samples:,}"
        )
    if arm in CONTROLS:
        _cut(block, trainer, own * trainer.epochs, steps_per_epoch(samples, B, trainer.drop_last))
        return values
    rate: dict[str, Any] = block.setdefault("learning_rate", {})
    warmup_epochs = rate.get("warmup_epochs", 0.0) if this.warmup_epochs is None else this.warmup_epochs
    if budget == "updates":
        every = steps_per_epoch(samples, B, trainer.drop_last)
        # -(-a // b) rounds up. `max_steps` then ends the run within its last epoch.
        stretch, epochs = every / own, -(-every * trainer.epochs // own)
        if max_epochs is not None and epochs > max_epochs:
            epochs, stretch = max_epochs, max_epochs / trainer.epochs
        elif this.rule != "adascale":
            block["max_steps"] = every * trainer.epochs
        block["epochs"] = epochs
        if trainer.evaluate_every_epochs:
            block["evaluate_every_epochs"] = max(1, round(trainer.evaluate_every_epochs * stretch))
        # AdaScale ends by its own count, so it has no `max_steps`.
        if this.rule == "adascale":
            rate["adascale_steps"] = every * trainer.epochs
        warmup_epochs *= stretch
    if warmup_epochs:
        rate["warmup_epochs"] = warmup_epochs
    if this.rule != "none" and world_size > 1:
        if "lr" not in values["optimizer"]["params"]:
            raise UserError(
                f'The arm {arm} scales "optimizer.params.lr", which is not given. Give it, or leave the arm out.'
            )
        rate |= {"scaling_rule": this.rule, "base_global_batch_size": B}
    if this.scales_adam:
        if config.optimizer.type.lower() not in ("adam", "adamw"):
            raise UserError(
                f"The arm {arm} is for Adam and AdamW; this optimizer is {config.optimizer.type}. Leave it out."
            )
        values["optimizer"]["params"] = adam_for(config.optimizer.params, world_size)
    block["log_every_steps"] = _window(block.get("max_steps") or own * block.get("epochs", trainer.epochs))
    return values


def _cut(block: dict[str, Any], base: TrainerOptions, updates: int, every: int) -> None:
    """Makes a run with `every` steps an epoch as short as `updates` steps; `block` is its trainer's, from the base's.

    Warm-up and the time between validations take the same share of the run. A run validates once an epoch at most.
    """
    share = updates / (base.epochs * every)
    block["epochs"], block["max_steps"] = -(-updates // every), updates
    rate: dict[str, Any] = block.setdefault("learning_rate", {})
    if rate.get("warmup_epochs"):
        rate["warmup_epochs"] *= share
    if base.evaluate_every_epochs:
        block["evaluate_every_epochs"] = max(1, round(base.evaluate_every_epochs * share))
    block["log_every_steps"] = _window(updates)


def _set(values: dict[str, Any], block: dict[str, Any], settings: Settings) -> None:
    """Puts settings into config values; `block` is their trainer's."""
    optimizer = values.setdefault("optimizer", {})
    params = optimizer.setdefault("params", {})
    params["lr"] = settings.lr
    if settings.warmup_epochs is not None:
        block.setdefault("learning_rate", {})["warmup_epochs"] = settings.warmup_epochs
    if settings.momentum is not None:
        key = momentum_key(optimizer.get("type", "AdamW"))
        assert key is not None
        betas = [settings.momentum, params.get("betas", (0.9, 0.999))[1]]
        params[key] = betas if key == "betas" else settings.momentum


def momentum_key(optimizer: str) -> str | None:
    """Which of optimizer.params is the momentum, or holds it as the first of two; None for optimizers without any."""
    name = optimizer.lower()
    if name in ("sgd", "lars", "rmsprop"):
        return "momentum"
    return "betas" if name in ("adam", "adamw", "fusedadam", "lamb", "nadam", "radam", "adamax", "lion") else None


# Points of a loss curve, about as many for a long run as for a short one.
_CURVE_POINTS = 60


def _window(steps: int) -> int:
    return max(1, steps // _CURVE_POINTS)


# You et al. 2017, section 6.
_LARS = {"momentum": 0.9, "weight_decay": 0.0005}


def _params_for(optimizer: str, base: OptimizerOptions) -> dict[str, Any]:
    """The arguments that LARS and LAMB take from the base's optimizer. Their rate is searched.

    LAMB is built like Adam. LARS is built like SGD: Adam's decay, which acts beside the gradient, means nothing to it.
    """
    like, known = ("adam", ("betas", "eps", "weight_decay")) if optimizer == "LAMB" else ("sgd", tuple(_LARS))
    kept = {n: v for n, v in base.params.items() if n in known} if base.type.lower().startswith(like) else {}
    return {"lr": 1.0, **(_LARS if optimizer == "LARS" else {}), **kept}


def run_id(config: Config) -> str:
    """16 hexadecimal digits of a hash over a run's config: runs with equal configs are the same run."""
    return id_of_values(config.as_dict())


def id_of_values(config: Mapping[str, Any]) -> str:
    """As `run_id`, of a config's values."""
    # Where a run writes changes none of its numbers.
    values = {**config, "trainer": {k: v for k, v in config["trainer"].items() if k != "output_dir"}}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
