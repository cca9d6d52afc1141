"""What a task has to return: one row of outputs a sample, and a summed loss with its count."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import UserError


def check_outputs(outputs: Any, samples: int) -> dict[str, Tensor]:
    """The named tensors of a task's outputs. Raises UserError unless each has one row a sample."""
    if isinstance(outputs, Tensor):
        named = {"": outputs}
    elif isinstance(outputs, Mapping):
        named = {name: value for name, value in outputs.items() if isinstance(value, Tensor)}
    else:
        raise UserError(f"forward() must return a tensor or a dictionary of tensors, not {type(outputs).__name__}.")
    for name, value in named.items():
        if value.ndim == 0 or len(value) != samples:
            raise UserError(
                f"forward() returned an output{name and f' {name!r}'} of shape {tuple(value.shape)} for {samples} "
                "samples. Each output needs one row a sample."
            )
    return named


def check_loss(task: str, result: object) -> tuple[Tensor, float]:
    """The summed loss and its count. Raises UserError if a task's loss() returned something else."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise UserError(
            f"{task}.loss() must return two things, (summed loss, count); it returned a {type(result).__name__}."
        )
    loss, count = result
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise UserError(
            f"{task}.loss() must return (summed loss, count), the loss a scalar tensor; it returned {got}.\n"
            'Sum over the micro-batch, for example F.cross_entropy(..., reduction="sum").'
        )
    if (isinstance(count, Tensor) and count.ndim != 0) or not isinstance(count, (int, float, Tensor, np.number)):
        got = f"a tensor of shape {tuple(count.shape)}" if isinstance(count, Tensor) else f"a {type(count).__name__}"
        raise UserError(f"{task}.loss() must return (summed loss, count), the count a number; it returned {got}.")
    return loss, float(count)


def sample_losses_problem(task: str, summed: Tensor, result: object) -> str | None:
    """What is wrong if sample_losses() does not add up to what loss() returned; None if it does."""
    one, other = float(summed.detach()), float(check_loss(task, result)[0].detach())
    if math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-6) or not math.isfinite(other):
        return None
    return (
        f"{task}.sample_losses() adds up to {one:g} where {task}.loss() returns {other:g}. Training uses the first and "
        "evaluation the second, so they must agree. Let loss() return sample_losses(...).sum()."
    )


def check_micro_batch(
    task: str,
    outputs: Any,
    result: object,
    *,
    samples: int,
    count: float,
    micro_batch: int,
    finite: bool,
    graph: bool,
) -> dict[str, Tensor]:
    """Checks what a task returned for one micro-batch of training. Waits for the device.

    Args:
        task: its name.
        outputs, result: of forward() and loss().
        samples: how many samples the micro-batch has.
        count: the sum of their counts in the data.
        micro_batch: its number, for messages.
        finite: whether the loss has to be finite.
        graph: whether the loss has to have a graph, for the backward pass.

    Returns:
        The named tensors of the outputs.

    Raises:
        UserError: the task does not keep the protocol.
    """
    named = check_outputs(outputs, samples)  # now, rather than in the first evaluation
    loss, counted = check_loss(task, result)
    if graph and not loss.requires_grad:
        raise UserError(
            f"{task}.loss() returned a loss without a graph: nothing in it depends on the model's parameters."
        )
    if not math.isclose(counted, count, rel_tol=1e-5):
        raise UserError(
            f"{task}.loss() counted {counted:g} for micro-batch {micro_batch}, but its samples' counts add up to "
            f"{count:g}.\nThe count is the number of samples, unless the split says otherwise: "
            "Split(arrays, counts=...) (valid tokens, or weights, of each sample)."
        )
    value = float(loss.detach())
    if finite and not math.isfinite(value):
        raise UserError(f"{task}.loss() is {value} for micro-batch {micro_batch} of the first step. It must be finite.")
    return named


def metrics_problem(task: str, metrics: Any) -> str | None:
    """What is wrong with what a task's metrics() returned; None if it is name -> number."""
    if not isinstance(metrics, Mapping):
        return f"{task}.metrics() must return a dictionary, name -> number; it returned a {type(metrics).__name__}."
    for name, value in metrics.items():
        try:
            float(value)
        except (TypeError, ValueError, RuntimeError):
            shown = repr(value)
            if len(shown) > 80:
                shown = f"a {type(value).__name__}" + (
                    f" of shape {tuple(value.shape)}" if isinstance(value, (Tensor, np.ndarray)) else ""
                )
            return f"{task}.metrics() must return numbers, but {name!r} is {shown}.\nUse .item(), or .mean().item()."
    return None


def check_augmented(task: str, arrays: Any, samples: int) -> None:
    """Raises UserError unless augment() has returned a dictionary of tensors with one row a sample."""
    if not isinstance(arrays, Mapping) or not all(isinstance(array, Tensor) for array in arrays.values()):
        raise UserError(f"{task}.augment() must return the batch, a dictionary of tensors, not {_shown(arrays)}.")
    for name, array in arrays.items():
        if array.ndim == 0 or len(array) != samples:
            raise UserError(
                f"{task}.augment() returned {name!r} of shape {tuple(array.shape)} for {samples} samples. It must "
                "return one row a sample, in the same order."
            )


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"one with {', '.join(sorted({type(v).__name__ for v in value.values()}))}"
    return f"a {type(value).__name__}"
