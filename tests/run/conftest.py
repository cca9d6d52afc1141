"""Fixtures of runs in this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture
def one_rank(one_thread: None) -> Iterator[None]:
    """A process group of one rank."""
    from tests.run.small import one_rank

    with one_rank():
        yield


@pytest.fixture
def plain_engine(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`build` and `run` with a plain optimizer in place of DeepSpeed's engine; torch's settings stay as they are."""
    import trainer.engine
    from tests.run.small import engine_module

    module = engine_module()
    monkeypatch.setitem(sys.modules, "trainer.engine.deepspeed_engine", module)
    monkeypatch.setattr(trainer.engine, "deepspeed_engine", module, raising=False)
    monkeypatch.setattr("trainer.engine.device.settle", lambda config: None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
