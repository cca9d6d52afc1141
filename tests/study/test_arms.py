"""Arms against values computed by hand from their papers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from trainer.config.keys import Config, parse
from trainer.errors import UserError
from trainer.study.arms import (
    COMPARED,
    EQUAL_UPDATES,
    WEAK,
    Budget,
    ImpossibleError,
    Place,
    Settings,
    adam_for,
    centre_of,
    compared_arms,
    contrasted,
    momentum_key,
    rivals_of,
    run_id,
    title_of,
    values_of,
)
from trainer.study.base import check_base

SAMPLES = 1200


def base(**trainer: Any) -> dict[str, Any]:
    return {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.002, "betas": [0.9, 0.999], "eps": 1e-8, "torch_adam": True}},
        "trainer": {"epochs": 20, "learning_rate": {"schedule": "cosine", "warmup_epochs": 1}, **trainer},
    }


def of(
    arm: str, world_size: int = 1, budget: Budget = "epochs", values: dict[str, Any] | None = None, **more: Any
) -> Config:
    return parse(values_of(values or base(), arm, world_size, budget, 3, SAMPLES, **more))


def test_sequential_is_the_base_with_a_seed() -> None:
    values = base()
    values["trainer"] |= {"seed": 3, "log_every_steps": 12}  # 38 steps an epoch, 760 in all: 60 points of a curve
    assert of("sequential") == parse(values)


@pytest.mark.parametrize("world_size", [2, 4, 32])
def test_every_weak_arm_has_the_batch_of_w_ranks_and_the_same_micro_batches(world_size: int) -> None:
    for arm in WEAK:
        if arm == "weak_sqrt_adam" and world_size > 10:
            continue
        config = of(arm, world_size)
        plan = config.plan(1)
        assert (plan.global_batch_size, plan.micro_batch_size) == (32 * world_size, 8)
        assert (config.trainer.seed, config.trainer.epochs, config.trainer.max_steps) == (3, 20, None)


def test_a_base_that_is_weak_scaling_itself() -> None:
    values = base()
    del values["train_batch_size"]
    values["gradient_accumulation_steps"] = 4
    assert of("weak", 8, values=values) == of("weak", 8)
    assert of("sequential", values=values) == of("sequential")


def test_rules() -> None:
    rates = {arm: of(arm, 4).trainer.learning_rate for arm in WEAK}
    assert {arm: r.scaling_rule for arm, r in rates.items()} == {
        "weak": "none", "weak_linear": "linear", "weak_linear_warmup": "linear", "weak_sqrt": "sqrt",
        "weak_sqrt_adam": "sqrt", "weak_lars": "linear", "weak_lamb": "sqrt", "weak_adascale": "adascale",
        "weak_tuned": "none",
    }  # fmt: skip
    unscaled = ("weak", "weak_tuned")
    assert {r.base_global_batch_size for arm, r in rates.items() if arm not in unscaled} == {32}
    # Goyal et al. 2017, and both papers of You et al.: five epochs, whatever the base does; other arms keep the base's.
    five = dict.fromkeys(("weak_linear_warmup", "weak_lars", "weak_lamb"), 5.0)
    assert {arm: r.warmup_epochs for arm, r in rates.items()} == dict.fromkeys(WEAK, 1.0) | five
    assert {r.schedule for r in rates.values()} == {"cosine"}


def test_adam_by_malladi() -> None:
    """1 - 4 (1 - 0.9) = 0.6, 1 - 4 (1 - 0.999) = 0.996, 1e-8 / 2; the rate, by sqrt(4), is the rule's."""
    params = of("weak_sqrt_adam", 4).optimizer.params
    assert params["betas"] == pytest.approx([0.6, 0.996])
    assert params["eps"] == pytest.approx(5e-9)
    assert params["lr"] == 0.002
    assert params["torch_adam"] is True
    assert of("weak_sqrt", 4).optimizer.params["betas"] == [0.9, 0.999]
    # torch's own defaults, where the config gives none
    assert adam_for({}, 9)["betas"] == pytest.approx([0.1, 0.991])
    assert adam_for({}, 9)["eps"] == pytest.approx(1e-8 / 3)


def test_where_malladi_ends() -> None:
    assert of("weak_sqrt_adam", 8).optimizer.params["betas"][0] == pytest.approx(0.2)
    with pytest.raises(ImpossibleError, match=r"beta1 = 1 - 16 \(1 - 0.9\) = -0.6 is negative.* 10 times"):
        of("weak_sqrt_adam", 16)


def test_adam_rule_without_adam() -> None:
    with pytest.raises(UserError, match="this optimizer is SGD"):
        of("weak_sqrt_adam", 2, values={**base(), "optimizer": {"type": "SGD", "params": {"lr": 0.1}}})


def test_equal_updates() -> None:
    """1,200 samples: 38 steps an epoch of 32, 10 of 128, so 20 epochs are 760 updates, or 76 epochs of 10."""
    config = of("weak_linear_warmup", 4, "updates")
    assert (config.trainer.epochs, config.trainer.max_steps) == (76, 760)
    assert round(config.trainer.learning_rate.warmup_epochs * 10) == 5 * 38  # as many steps of warm-up
    assert config.trainer.evaluate_every_epochs == 4  # 3.8: 19 validations, for 20
    # 1,024: 2 steps an epoch
    config = of("weak", 32, "updates")
    assert (config.trainer.epochs, config.trainer.max_steps) == (380, 760)


def test_adascale_counts_its_own_steps() -> None:
    """Equal epochs: the base's; equal updates: the sequential run's 760 steps, in as many passes as it takes."""
    config = of("weak_adascale", 4)
    assert (config.trainer.epochs, config.trainer.learning_rate.adascale_steps) == (20, None)
    config = of("weak_adascale", 4, "updates")
    assert (config.trainer.epochs, config.trainer.max_steps) == (76, None)
    assert config.trainer.learning_rate.adascale_steps == 760


def test_other_optimizers_take_a_rate_of_their_own() -> None:
    values = base()
    values["optimizer"]["params"]["weight_decay"] = 0.02
    config = parse(values_of(values, "weak_lamb", 4, "epochs", 0, SAMPLES, settings=Settings(0.03, 1.0, 0.8)))
    assert config.optimizer.type == "LAMB"
    assert config.optimizer.params == {"lr": 0.03, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 0.02}
    assert config.trainer.learning_rate.warmup_epochs == 5.0  # the arm's own
    # The search is made with one rank's batch, where there is nothing to scale.
    config = parse(values_of(values, "sequential_lars", 1, "epochs", 0, SAMPLES, settings=Settings(2.0, 3.0, 0.9)))
    assert config.optimizer.params == {"lr": 2.0, "momentum": 0.9, "weight_decay": 0.0005}
    assert (config.train_batch_size, config.trainer.learning_rate.scaling_rule) == (32, "none")
    assert config.trainer.learning_rate.warmup_epochs == 3.0

    values["optimizer"] = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.001}}
    config = parse(values_of(values, "sequential_lars", 1, "epochs", 0, SAMPLES, settings=Settings(2.0)))
    assert config.optimizer.params == {"lr": 2.0, "momentum": 0.8, "weight_decay": 0.001}


def test_tuned_is_compared_with_tuned() -> None:
    place = Place("group norm", "weak_tuned", "updates", 8)
    assert place.reference == Place("group norm", "sequential_tuned", "epochs", 1)
    assert Place("", "weak_sqrt", "epochs", 8).reference == Place("", "sequential", "epochs", 1)
    assert str(place) == "group norm: weak_tuned, W = 8, equal updates"
    config = of("weak_tuned", 8, settings=Settings(0.01, 4.0, 0.7))
    assert (config.optimizer.params["lr"], config.optimizer.params["betas"]) == (0.01, [0.7, 0.999])
    assert config.trainer.learning_rate.warmup_epochs == 4.0
    # With equal updates a warm-up has as many steps as the sequential run's.
    config = of("weak_tuned", 4, "updates", settings=Settings(0.01, 5.0, 0.7))
    assert round(config.trainer.learning_rate.warmup_epochs * 10) == 5 * 38


def test_layerwise_optimizers_are_compared_with_themselves() -> None:
    """And take the settings that are searched for these sequential runs."""
    place = Place("a", "weak_lars", "updates", 8)
    assert place.reference == place.tuned_at == Place("a", "sequential_lars", "epochs", 1)
    assert place.reference.tuned_at == place.reference
    tuned = Place("", "weak_tuned", "updates", 8)
    assert tuned.tuned_at == tuned
    assert Place("", "weak_sqrt", "epochs", 8).tuned_at is None
    assert centre_of(place.reference, check_base(base(), "b")) == 4.0
    assert centre_of(tuned, check_base(base(), "b")) == 0.002


def test_what_a_tuned_arm_must_not_lose_against() -> None:
    rivals = rivals_of(Place("v", "weak_tuned", "epochs", 8))
    assert {(p.variant, p.budget, p.world_size) for p in rivals} == {("v", "epochs", 8)}
    assert {p.arm for p in rivals} == set(WEAK) - {"weak_tuned", "weak_lars", "weak_lamb"}
    assert rivals_of(Place("v", "sequential_tuned", "epochs", 1)) == [Place("v", "sequential", "epochs", 1)]
    assert rivals_of(Place("v", "weak_lars", "epochs", 8)) == rivals_of(Place("v", "weak", "epochs", 8)) == []


def test_names_of_arms() -> None:
    """AdaScale decides when to stop; with equal epochs it does not, and is not called AdaScale alone."""
    assert title_of("weak_adascale", "epochs") == "weak, AdaScale's gain without its stopping rule"
    assert title_of("weak_adascale", "updates") == "weak, AdaScale"
    assert title_of("sequential_lars") == "sequential, LARS"
    assert (momentum_key("AdamW"), momentum_key("LARS"), momentum_key("Adagrad")) == ("betas", "momentum", None)


# Controls


@pytest.mark.parametrize("world_size", [2, 4, 16])
def test_the_control_has_the_updates_of_the_weak_run_and_the_batch_of_one_rank(world_size: int) -> None:
    """1,200 samples: 20 epochs of 600/32 W steps each, of one rank's 32 samples; its schedule is as short."""
    weak, control = (of(arm, world_size).trainer for arm in ("weak", EQUAL_UPDATES))
    updates = 20 * -(-1200 // (32 * world_size))
    assert (control.max_steps, control.epochs) == (updates, -(-updates // 38))
    assert of(EQUAL_UPDATES, world_size).plan(1) == of("sequential").plan(1)
    # Both warm up for the same share of their updates.
    assert control.learning_rate.warmup_epochs * 38 / updates == pytest.approx(1 / 20)
    assert weak.learning_rate.warmup_epochs / weak.epochs == 1 / 20
    assert control.learning_rate.scaling_rule == "none"


def test_the_control_validates_as_often_as_it_can() -> None:
    values = base(evaluate_every_epochs=4)
    assert [of(EQUAL_UPDATES, W, values=values).trainer.evaluate_every_epochs for W in (2, 4, 16)] == [2, 1, 1]
    assert of(EQUAL_UPDATES, 4, values=base(evaluate_every_epochs=0)).trainer.evaluate_every_epochs == 0
    with pytest.raises(ImpossibleError, match="larger than the training set"):
        of(EQUAL_UPDATES, 38)


def test_each_weak_arm_has_the_control_that_is_tuned_like_it() -> None:
    assert Place("v", "weak_sqrt", "epochs", 8).control == Place("v", EQUAL_UPDATES, "epochs", 8)
    tuned = Place("v", "sequential_tuned_equal_updates", "epochs", 8)
    assert Place("v", "weak_tuned", "epochs", 8).control == tuned
    assert (tuned.reference.arm, tuned.tuned_at) == ("sequential_tuned", tuned)
    assert rivals_of(tuned) == [Place("v", EQUAL_UPDATES, "epochs", 8)]
    # LARS and LAMB have none, equal updates need none, and a control is none of its own.
    others = [
        Place("", "weak_lars", "epochs", 8),
        Place("", "weak", "updates", 8),
        Place("", EQUAL_UPDATES, "epochs", 8),
    ]
    assert [place.control for place in others] == [None] * 3
    config = of(tuned.arm, 4, settings=Settings(0.01, 5.0, 0.7))
    assert config.trainer.learning_rate.warmup_epochs == pytest.approx(5.0 * 200 / 760)


def test_what_is_compared() -> None:
    arms = ["sequential", "weak", "weak_tuned", EQUAL_UPDATES]
    assert compared_arms(arms, "epochs") == ["weak", "weak_tuned", EQUAL_UPDATES, "sequential_tuned_equal_updates"]
    assert compared_arms(arms, "updates") == ["weak", "weak_tuned"]
    assert compared_arms(["weak", EQUAL_UPDATES], "epochs") == ["weak", EQUAL_UPDATES]
    assert compared_arms(["weak_tuned"], "epochs") == ["weak_tuned"]
    places = [
        Place("", arm, "epochs", W) for arm, W in (("weak", 2), ("weak", 4), (EQUAL_UPDATES, 4), ("weak_lars", 4))
    ]
    assert contrasted(places) == [Place("", "weak", "epochs", 4)]
    assert {*WEAK, EQUAL_UPDATES} < set(COMPARED)


def test_a_cap_on_equal_updates() -> None:
    config = of("weak", 4, "updates", max_epochs=40)
    assert (config.trainer.epochs, config.trainer.max_steps) == (40, None)
    assert config.trainer.learning_rate.warmup_epochs == 2.0
    assert of("weak", 4, "updates", max_epochs=76) == of("weak", 4, "updates")


def test_updates_without_the_last_batch() -> None:
    """37 steps an epoch of 32, 9 of 128: 740 updates are 83 epochs, the last of them cut."""
    config = of("weak", 4, "updates", values=base(drop_last=True))
    assert (config.trainer.epochs, config.trainer.max_steps) == (83, 740)


def test_a_batch_beyond_the_data() -> None:
    assert values_of(base(), "weak", 37, "epochs", 0, SAMPLES)["train_batch_size"] == 1184
    with pytest.raises(ImpossibleError, match="38 x 32 = 1,216 is larger than the training set of 1,200"):
        of("weak", 38)


def test_the_base_is_left_alone() -> None:
    values = base()
    before = json.dumps(values)
    for arm in WEAK:
        of(arm, 4, "updates", values=values)
    assert json.dumps(values) == before


def test_ids() -> None:
    one = run_id(of("weak", 4))
    assert one == run_id(of("weak", 4)) == run_id(of("weak", 4, values=base(output_dir="elsewhere")))
    others = {run_id(of(arm, W, b)) for arm in WEAK for W in (2, 4, 8) for b in ("epochs", "updates")}
    assert len(others) == 8 * 3 * 2  # before its rate is found, weak_tuned is weak
    assert len(one) == 16
