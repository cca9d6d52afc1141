"""AdaScale's gain against values computed by hand from the paper's formula, and its averages step by step."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config.keys import parse
from trainer.engine.adascale import AdaScale, gain, growth
from trainer.errors import UserError
from trainer.exact.gradient_noise import Noise, estimate

checked = settings(deadline=None)


def test_the_papers_formula() -> None:
    """The gain is (sigma^2 + mu^2) / (sigma^2 / S + mu^2)."""
    assert gain(1.0, 1.0, 4.0) == 1.6  # 2 / 1.25
    assert gain(3.0, 1.0, 8.0) == pytest.approx(4 / 1.375)
    assert gain(0.0, 2.0, 16.0) == 1.0  # no noise: a larger batch is worth nothing
    assert gain(2.0, 0.0, 16.0) == 16.0  # nothing but noise: linear scaling
    assert gain(0.0, 0.0, 16.0) == 1.0
    assert gain(5.0, 1.0, 1.0) == 1.0


@checked
@given(variance=st.floats(0, 1e30), squared=st.floats(0, 1e30), scale=st.floats(1, 1e4))
def test_between_one_and_the_growth(variance: float, squared: float, scale: float) -> None:
    assert 1.0 <= gain(variance, squared, scale) <= scale


def made(scale: float, steps: int | None = None, base: int = 1) -> AdaScale:
    return AdaScale(scale, base, lambda position: 1.0, steps)


def test_the_first_steps_take_the_mean_of_all_before() -> None:
    """Appendix B.3: r_0 = 1, and the mean of past samples for t < 1 / (1 - theta) = 1000 / S."""
    ada = made(4.0, base=2)
    assert ada.gain == 1.0
    ada.observe(Noise(trace=2.0, gradient_squared=1.0))  # sigma^2 of two samples is half of that of one
    assert ada.gain == 1.6
    ada.observe(Noise(10.0, 0.0))
    assert ada.gain == pytest.approx(gain(3.0, 0.5, 4.0))
    ada.observe(None)  # a step of one micro-batch tells nothing
    assert ada.gain == pytest.approx(gain(3.0, 0.5, 4.0))
    ada.observe(Noise(0.0, -0.25))  # an estimate below 0 counts as it is
    assert ada.gain == pytest.approx(gain(2.0, 0.25, 4.0))
    ada.observe(Noise(0.0, -5.0))  # an average below 0 counts as 0
    assert ada.gain == 4.0
    assert ada.position == pytest.approx(1.0 + 1.6 + 2 * gain(3.0, 0.5, 4.0) + gain(2.0, 0.25, 4.0))
    assert ada.summary() == {"position": ada.position, "mean_gain": ada.position / 5}


def test_the_gain_is_not_biased_by_steps_that_are_mostly_noise() -> None:
    """A true gain of 30 at S = 32. Where every estimate below 0 counted as 0, this gave 25."""
    random, S, variance = np.random.default_rng(0), 32, 1.0
    squared = variance * (1 - 30 / S) / 29
    assert gain(variance, squared, S) == pytest.approx(30)
    mean, gains = np.full(5, math.sqrt(squared / 5)), []
    for _ in range(12):
        ada = made(S, base=32)
        for step in range(100):
            # 32 micro-batches of 32: with five directions, |G|^2 of one step scatters by nine times its value.
            h = mean + random.normal(0, math.sqrt(variance / 5), (32, 5))
            norms, whole = np.linalg.norm(h / 32, axis=1), float(np.linalg.norm(h.mean(0)))
            ada.observe(estimate(norms.tolist(), [32.0] * 32, whole, 1024))
            if step >= 50:
                gains.append(ada.gain)
    assert np.mean(gains) == pytest.approx(30, abs=1.5)


def test_later_a_moving_average() -> None:
    """S = 250: theta = 0.75, so four steps of the mean, then a quarter of the newest."""
    ada = made(250.0)
    for trace in (1.0, 2.0, 3.0, 6.0):
        ada.observe(Noise(trace, 1.0))
    assert ada.gain == pytest.approx(gain(3.0, 1.0, 250.0))
    ada.observe(Noise(7.0, 1.0))
    assert ada.gain == pytest.approx(gain(0.75 * 3.0 + 0.25 * 7.0, 1.0, 250.0))
    fast = made(2000.0)  # theta = 0: the newest alone
    for trace in (1.0, 9.0):
        fast.observe(Noise(trace, 1.0))
    assert fast.gain == pytest.approx(gain(9.0, 1.0, 2000.0))


def test_the_position_of_the_schedule() -> None:
    """Optimizer steps, or with `steps` the sum of the gains, and then the run ends by it."""
    seen: list[float] = []

    def schedule(position: float) -> float:
        seen.append(position)
        return 0.5

    by_steps, by_gain = AdaScale(4.0, 1, schedule, None), AdaScale(4.0, 1, schedule, 5)
    for ada in (by_steps, by_gain):
        for step in range(4):
            assert ada.factor(step) == 0.5 * ada.gain
            assert not ada.finished
            ada.observe(Noise(1.0, 1.0))
    assert seen == pytest.approx([0, 1, 2, 3, 0, 1, 2.6, 4.2])
    assert by_gain.finished and not by_steps.finished


def test_a_checkpoint_holds_all_of_it() -> None:
    whole, parts = made(300.0), made(300.0)
    noises = [Noise(math.pi * i, math.e / i) for i in range(1, 9)]
    for noise in noises:
        whole.observe(noise)
    for noise, _ in zip(noises, itertools.count()):
        again = made(300.0)
        again.load_state_dict(json.loads(json.dumps(parts.state_dict())))
        again.observe(noise)
        parts = again
    assert parts.state_dict() == whole.state_dict()
    assert parts.summary() == whole.summary()


def test_where_it_has_nothing_to_go_by() -> None:
    def of(B: int, m: int, base: int, world_size: int = 1) -> float:
        config = parse(
            {
                "train_batch_size": B,
                "train_micro_batch_size_per_gpu": m,
                "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
                "trainer": {"learning_rate": {"scaling_rule": "adascale", "base_global_batch_size": base}},
            }
        )
        return growth(config, config.plan(world_size))

    assert of(64, 8, 16) == 4.0
    with pytest.raises(UserError, match=r"(?s)global batch \(64\) is smaller than the base batch \(128\).*linear"):
        of(64, 8, 128)
    with pytest.raises(UserError, match=r"(?s)64 samples is a single one .*at most 32"):
        of(64, 64, 16)
    weak = parse(
        {
            "train_micro_batch_size_per_gpu": 8,
            "gradient_accumulation_steps": 2,
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
            "trainer": {"learning_rate": {"scaling_rule": "adascale"}},
        }
    )
    assert growth(weak, weak.plan(3)) == 3.0  # the batch of one rank is the base
