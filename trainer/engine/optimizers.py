"""Optimizers that DeepSpeed does not build itself: torch.optim's by their signature, and LARS and LAMB.

In LARS and LAMB the step of each tensor is a fraction of the tensor's own norm. DeepSpeed has no LARS, and its
FusedLamb needs fp16. So both come from the package pytorch-optimizer, and DeepSpeed's engine gets the finished object.

LARS (You, Gitman and Ginsburg 2017, arXiv 1708.03888, algorithm 1) is SGD with momentum. In each tensor the gradient,
weight decay included, is scaled by trust_coefficient |w| / (|g| + weight_decay |w|), or by 1 if a norm is 0. As in
torch's SGD the learning rate multiplies the momentum. In the paper it is part of the momentum, which is the same at a
constant rate. Parameters of one dimension (biases, the gains of norms) are not scaled by their norms and not decayed,
and their rate is the learning rate times trust_coefficient. Their norms mean nothing: a bias starts at 0. The package
gives them the plain learning rate. That is far too much: LARS has rates that are 1 / trust_coefficient times as large
as SGD's, a thousand times at the usual coefficient of 0.001. Runs with large batches then diverge.

LAMB (You et al. 2020, arXiv 1904.00962, algorithm 2) takes Adam's quotient u = m / (sqrt(v) + eps) plus
weight_decay w, and scales it in each tensor to the length min(|w|, 10). If a norm is 0, it is not scaled. m and v are
used without Adam's bias correction: the paper's appendix finds that the correction has the effect of warm-up. The
package differs from the paper in two places, and we set its options to follow the paper. Its weight decay would act on
the weights beside the scaling. Its first steps would be 1 / (1 - beta1^t) times as long: ten times in the first step.
As in the authors' code, parameters of one dimension are not decayed (`trainer.decay_biases_and_norms` changes that) and
not scaled: they get Adam's step. Unlike in the authors' code, this step has Adam's bias correction. In matrices the
scaling makes up for a missing correction. In vectors nothing does: without it their step would be up to 6.6 times as
long (at step 12).

Both are exact: each rank makes the whole step, with elementwise arithmetic and norms of whole tensors. The state
consists of momenta, which checkpoints hold by parameter, and a count of steps in each group. LAMB also keeps its last
norms there, only to be looked at.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch

from ..config.deepspeed_keys import LAYERWISE, OPTIMIZERS
from ..config.keys import Config
from ..config.schema import near
from ..errors import UserError

# What makes the package's LAMB the paper's. `adam_debias` is an option of its groups, but in no signature.
_AS_IN_THE_PAPER: dict[str, dict[str, Any]] = {"lars": {}, "lamb": {"weight_decouple": False, "adam_debias": True}}


# Marks the groups of parameters of at most one dimension, whose rate `_vector_rate` changes.
_VECTORS = "vectors"


def _vector_rate(name: str, group: dict[str, Any]) -> float:
    """The factor of the learning rate of a group of vectors, for its next step."""
    if name == "lars":
        return float(group["trust_coefficient"])
    beta1, beta2 = group["betas"]
    step = group.get("step", 0) + 1
    return math.sqrt(1 - beta2**step) / (1 - beta1**step)


@functools.cache
def _with_vector_rates(name: str) -> type[torch.optim.Optimizer]:
    """LARS or LAMB that makes the package's step, with another rate for vectors. Raises UserError."""
    cls = _layerwise(name)

    class WithVectorRates(cls):  # type: ignore[valid-type,misc]
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            rates = [group["lr"] for group in self.param_groups]
            for group in self.param_groups:
                if group.get(_VECTORS):
                    group["lr"] *= _vector_rate(name, group)
            try:
                return super().step(closure)
            finally:
                for group, rate in zip(self.param_groups, rates):
                    group["lr"] = rate

    WithVectorRates.__name__ = WithVectorRates.__qualname__ = cls.__name__
    return WithVectorRates


def _layerwise(name: str) -> type[torch.optim.Optimizer]:
    """The class for an `optimizer.type` of LAYERWISE. Raises UserError without the package."""
    try:
        import pytorch_optimizer
    except ImportError as error:
        raise UserError(
            f'"optimizer.type" {name} needs the package pytorch-optimizer ({error}): '
            'pip install "strong-scaling-trainer[study]"'
        ) from error
    classes: dict[str, Any] = {"lars": pytorch_optimizer.LARS, "lamb": pytorch_optimizer.Lamb}
    return classes[name.lower()]


def _arguments(name: str) -> dict[str, inspect.Parameter]:
    """The arguments that an optimizer takes from `optimizer.params`. Not for optimizers that DeepSpeed builds."""
    cls = _layerwise(name) if name.lower() in LAYERWISE else getattr(torch.optim, name)
    found = list(inspect.signature(cls).parameters.values())[1:]
    return {p.name: p for p in found if p.kind is not inspect.Parameter.VAR_KEYWORD}


def check_optimizer(config: Config) -> None:
    """Checks the name and the arguments of an optimizer that DeepSpeed does not build. Raises UserError."""
    name = config.optimizer.type
    if name.lower() in OPTIMIZERS:
        return
    known = [n for n, c in vars(torch.optim).items() if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)]
    known.remove("Optimizer")
    if name not in known and name.lower() not in LAYERWISE:
        raise UserError(f'unknown optimizer "{name}". {near(name, [*known, "FusedAdam", "LARS", "LAMB"])}')
    fixed = _AS_IN_THE_PAPER.get(name.lower(), {})
    arguments = [argument for argument in _arguments(name) if argument not in fixed]
    for key in config.optimizer.params:
        if key in fixed:
            raise UserError(f'"optimizer.params.{key}" is always {fixed[key]} here, as in the paper. Leave it out.')
        if key not in arguments:
            raise UserError(f'unknown key "optimizer.params.{key}" for {name}. {near(key, arguments)}')


def for_vectors(config: Config) -> dict[str, Any]:
    """The optimizer's arguments that differ for parameters of at most one dimension (see adapt.parameter_groups).

    Biases and the gains of norms are not decayed: decay draws weights to 0, and 0 is not a sensible gain.
    """
    result: dict[str, Any] = {}
    if config.optimizer.type.lower() in LAYERWISE:
        result[_VECTORS] = True
    if config.optimizer.type.lower() == "lamb":
        result["adam"] = True  # a trust ratio of 1
    if not config.trainer.decay_biases_and_norms and _has_weight_decay(config):
        result["weight_decay"] = 0.0
    return result


def _has_weight_decay(config: Config) -> bool:
    name = config.optimizer.type
    if config.optimizer.params.get("weight_decay") == 0:
        return False
    if name.lower() in OPTIMIZERS:
        return "weight_decay" in OPTIMIZERS[name.lower()]
    known = _arguments(name)
    return "weight_decay" in known and bool(config.optimizer.params.get("weight_decay", known["weight_decay"].default))


def client_optimizer(config: Config, groups: list[dict[str, Any]]) -> torch.optim.Optimizer | None:
    """LARS or LAMB over parameter groups, to be handed to DeepSpeed; None for optimizers that it makes by name.

    Raises:
        ValueError: the package refuses a value.
    """
    name = config.optimizer.type
    if name.lower() not in LAYERWISE:
        return None
    arguments: dict[str, Any] = dict(config.optimizer.params) | _AS_IN_THE_PAPER[name.lower()]
    return _with_vector_rates(name.lower())(groups, **arguments)
