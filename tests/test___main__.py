"""`python -m trainer`: the exit code of a command is that of the process, however the process ends."""

from __future__ import annotations

import runpy
import signal
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

import trainer.commands.cli
import trainer.commands.ending
from trainer.ranks.stopping import end_at_once


@pytest.fixture(autouse=True)
def signals_stay() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def start(monkeypatch: pytest.MonkeyPatch, code: int) -> list[str]:
    """Starts a command that ends with a code. Returns how the process ended."""
    ended: list[str] = []
    monkeypatch.setattr(trainer.commands.cli, "main", lambda: code)
    monkeypatch.setattr(trainer.commands.ending, "end", lambda code: ended.append(f"at once with {code}"))
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("trainer", run_name="__main__")
    return [*ended, f"as usual with {caught.value.code}"]


@pytest.mark.parametrize("code", [0, 2, 75])
def test_a_command_without_a_run(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    assert start(monkeypatch, code) == [f"as usual with {code}"]


def test_a_process_that_has_made_a_run_ends_without_a_clean_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's own takes seconds, and threads that wait in C++ would crash the interpreter's."""
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    assert start(monkeypatch, 3)[0] == "at once with 3"


def test_ctrl_c_ends_it_at_once_while_it_still_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    start(monkeypatch, 0)
    assert signal.getsignal(signal.SIGINT) is end_at_once
