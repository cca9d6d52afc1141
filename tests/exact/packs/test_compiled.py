"""Whether torch's compiler has to do with a model; nothing is compiled here, since that takes a minute."""

from __future__ import annotations

import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from torch import nn

from trainer.exact.packs.compiled import compiler_was_at_work, has_compiled_part


class OptimizedModule(nn.Module):
    """As torch.compile(module) returns."""


def called_through_the_compiler() -> nn.Module:
    """As module.compile() leaves it."""
    module = nn.Linear(2, 2)
    module._compiled_call_impl = module.forward  # type: ignore[assignment]
    return module


@pytest.mark.parametrize("part", [OptimizedModule, called_through_the_compiler])
def test_a_compiled_part_of_a_model_is_found(part: type[nn.Module]) -> None:
    assert has_compiled_part(part())
    assert has_compiled_part(nn.Sequential(nn.ReLU(), nn.Sequential(part())))


def test_a_plain_model_has_no_compiled_part() -> None:
    assert not has_compiled_part(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))


def test_torch_still_keeps_there_what_compile_has_made() -> None:
    """A module that is not compiled has None, as the class has it."""
    assert nn.Module._compiled_call_impl is None


@pytest.mark.parametrize(("frames", "was_at_work"), [({}, False), ({"total": 0}, False), ({"total": 2, "ok": 1}, True)])
def test_functions_that_were_compiled_in_this_process(
    frames: dict[str, int], was_at_work: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task may compile a function in its first step."""
    counters = {"frames": Counter(frames)}
    monkeypatch.setitem(sys.modules, "torch._dynamo.utils", SimpleNamespace(counters=counters))  # type: ignore[arg-type]
    assert compiler_was_at_work() is was_at_work


def test_without_a_compiler_nothing_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch._dynamo.utils", raising=False)
    assert compiler_was_at_work() is False
