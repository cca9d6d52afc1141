"""Updates that are taken back on the device: the parameters have the very bits that they had."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trainer.engine.undo import Undo

# -0.0 and values far apart: adding and subtracting floats would not give them back.
BEFORE = [1.0, -0.0, 1e-38, 3e38, -7.25]


def updated(flag: float, after: list[float]) -> Tensor:
    """A parameter after an update to `after` under this flag."""
    parameter = torch.nn.Parameter(torch.tensor(BEFORE))
    undo = Undo([parameter], torch.tensor(flag))
    undo.note()
    with torch.no_grad():
        parameter.copy_(torch.tensor(after))
    undo.undo()
    return parameter.detach()


def same_bits(one: Tensor, other: list[float]) -> bool:
    return torch.equal(one.view(torch.int32), torch.tensor(other).view(torch.int32))


@pytest.mark.parametrize("flag", [1.0, math.nan, -1.0])
@pytest.mark.parametrize("after", [[math.nan] * 5, [math.inf, 0.0, -1e-38, -3e38, 1e30]], ids=["nan", "far away"])
def test_an_update_is_taken_back_while_the_flag_is_not_0(flag: float, after: list[float]) -> None:
    assert same_bits(updated(flag, after), BEFORE)


@pytest.mark.parametrize("after", [[math.nan] * 5, [math.inf, 0.0, -1e-38, -3e38, 1e30]], ids=["nan", "far away"])
def test_an_update_stays_while_the_flag_is_0(after: list[float]) -> None:
    assert same_bits(updated(0.0, after), after)


def test_only_the_flagged_update_is_taken_back() -> None:
    """The flag is read at each update, on the device: the host sets nothing anew."""
    parameters = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.ones(1))]
    flag = torch.tensor(0.0)
    undo = Undo(parameters, flag)
    seen = []
    for value in (0.0, 1.0, 0.0):
        flag.fill_(value)
        undo.note()
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(1.0)
        undo.undo()
        seen.append([float(parameter.detach()[0]) for parameter in parameters])
    assert seen == [[1.0, 2.0], [1.0, 2.0], [2.0, 3.0]]
