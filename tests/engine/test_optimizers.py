"""LARS and LAMB against their papers' formulas, written out here in float64; checks of optimizer arguments."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from trainer.config.keys import Config, parse
from trainer.engine.adapt import parameter_groups
from trainer.engine.optimizers import check_optimizer, client_optimizer, for_vectors
from trainer.errors import UserError

GRADIENTS = [
    np.array([[0.5, -1.0], [2.0, 0.25]]),
    np.array([[-1.0, 0.5], [0.0, 4.0]]),
    np.array([[0.1, 0.2], [0.3, 0.4]]),
]
START = np.array([[1.0, -2.0], [0.5, 3.0]])
BIAS, BIAS_GRADIENT = np.array([2.0, -1.0]), np.array([0.5, 1.5])


def config(name: str, params: dict[str, Any], **trainer: Any) -> Config:
    values = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "trainer": trainer}
    return parse(values | {"optimizer": {"type": name, "params": params}})


def stepped(name: str, params: dict[str, Any], **trainer: Any) -> tuple[np.ndarray, np.ndarray]:
    """A weight and a bias after a step with each of GRADIENTS."""
    model = nn.Linear(2, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(START))
        model.bias.copy_(torch.from_numpy(BIAS))
    this = config(name, params, **trainer)
    check_optimizer(this)
    optimizer = client_optimizer(this, parameter_groups(model, this, for_vectors(this)))
    assert optimizer is not None
    for gradient in GRADIENTS:
        model.weight.grad, model.bias.grad = torch.from_numpy(gradient.copy()), torch.from_numpy(BIAS_GRADIENT.copy())
        optimizer.step()
    return model.weight.detach().numpy(), model.bias.detach().numpy()


def norm(x: np.ndarray) -> float:
    return math.sqrt(float((x * x).sum()))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lars_by_its_paper(decay: float) -> None:
    """You et al. 2017, algorithm 1: lambda = eta |w| / (|g| + beta |w|), v = m v + gamma lambda (g + beta w)."""
    gamma, m, eta = 0.5, 0.9, 0.02
    w, v = START.copy(), np.zeros_like(START)
    for g in GRADIENTS:
        local = eta * norm(w) / (norm(g) + decay * norm(w))
        v = m * v + gamma * local * (g + decay * w)
        w = w - v
    params = {"lr": gamma, "momentum": m, "trust_coefficient": eta, "weight_decay": decay}
    weight, bias = stepped("LARS", params)
    np.testing.assert_allclose(weight, w, rtol=1e-12)
    # Of one dimension: SGD with momentum, not decayed, at a rate that suits SGD and not LARS.
    b, v = BIAS.copy(), np.zeros(2)
    for _ in GRADIENTS:
        v = m * v + BIAS_GRADIENT
        b = b - gamma * eta * v
    np.testing.assert_allclose(bias, b, rtol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lamb_by_its_paper(decay: float) -> None:
    """You et al. 2020, algorithm 2, without bias correction: x -= eta phi(|x|) / |r + lambda x| (r + lambda x).

    Vectors are not scaled, which makes up for the correction in matrices: theirs is Adam's step, corrected.
    """
    eta, beta1, beta2, eps = 0.05, 0.9, 0.99, 1e-6

    def by_hand(x: np.ndarray, gradients: list[np.ndarray], decay: float, scaled: bool) -> np.ndarray:
        m, v = np.zeros_like(x), np.zeros_like(x)
        for t, g in enumerate(gradients, start=1):
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            u = m / (np.sqrt(v) + eps) + decay * x
            correction = math.sqrt(1 - beta2**t) / (1 - beta1**t)
            x = x - eta * (norm(x) / norm(u) if scaled else correction) * u
        return x

    params = {"lr": eta, "betas": [beta1, beta2], "eps": eps, "weight_decay": decay}
    weight, bias = stepped("LAMB", params)
    # The package adds eps to |u| as well.
    np.testing.assert_allclose(weight, by_hand(START, GRADIENTS, decay, True), rtol=3e-6)
    np.testing.assert_allclose(bias, by_hand(BIAS, [BIAS_GRADIENT] * 3, 0.0, False), rtol=1e-12)
    first = norm(by_hand(START, GRADIENTS[:1], decay, True) - START)
    assert first == pytest.approx(eta * norm(START)), "a step is a fraction of the weights' norm, the first one too"
    _, bias = stepped("LAMB", params, decay_biases_and_norms=True)
    np.testing.assert_allclose(bias, by_hand(BIAS, [BIAS_GRADIENT] * 3, decay, False), rtol=1e-12)


def test_lamb_bounds_the_norm_of_large_weights() -> None:
    weight = nn.Parameter(torch.full((4, 4), 25.0))  # of norm 100
    this = config("lamb", {"lr": 0.01})
    optimizer = client_optimizer(this, [{"params": [weight]}])
    assert optimizer is not None
    weight.grad = torch.full((4, 4), 3.0)
    optimizer.step()
    assert float((25.0 - weight.detach()).norm()) == pytest.approx(0.01 * 10.0, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("LARS", {"momentumm": 0.9}, ('unknown key "optimizer.params.momentumm" for LARS', 'Did you mean "momentum"?')),
        ("LAMB", {"beta": [0.9, 0.99]}, ('unknown key "optimizer.params.beta" for LAMB', '"betas"')),
        ("LAMB", {"kwargs": {}}, ('unknown key "optimizer.params.kwargs"',)),
        ("LAMB", {"weight_decouple": True}, ("weight_decouple", "always False", "as in the paper")),
        ("LAMB", {"adam_debias": False}, ("adam_debias", "always True")),
        ("SGD", {"momentumm": 0.9}, ('unknown key "optimizer.params.momentumm" for SGD', '"momentum"')),
        ("SDG", {}, ('unknown optimizer "SDG"', "SGD")),
        ("LARSS", {}, ('unknown optimizer "LARSS"', '"LARS"')),
    ],
)
def test_wrong_arguments(name: str, params: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        check_optimizer(config(name, params))
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    for name in ("LARS", "lamb"):
        with pytest.raises(UserError, match=rf"{name} needs the package pytorch-optimizer .*-scaling-trainer\[study\]"):
            check_optimizer(config(name, {}))
    check_optimizer(config("SGD", {"lr": 0.1}))
