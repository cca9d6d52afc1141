"""The server from which ranks are forked: its ranks have the environment of the process that started it."""

from __future__ import annotations

import os

import pytest

from trainer.ranks import server, workers
from trainer.ranks.place import Ranks
from trainer.ranks.workers import run_ranks


def variables(ranks: Ranks) -> list[str | None]:
    return [os.environ.get(name) for name in ("PYTHONPATH", "PYTHONSAFEPATH", server.RESTORED)]


def test_ranks_see_nothing_of_what_the_server_was_started_with() -> None:
    own = [os.environ.get(name) for name in ("PYTHONPATH", "PYTHONSAFEPATH")]
    assert run_ranks(variables, 1) == [[*own, None]]


@pytest.mark.parametrize("own", [None, "/mine"])
def test_variables_come_back(monkeypatch: pytest.MonkeyPatch, own: str | None) -> None:
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    if own is None:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", own)
    given = workers._path()
    assert given["PYTHONPATH"].split(os.pathsep)[1:] == ([] if own is None else [own])
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    server.restore()
    assert [os.environ.get(name) for name in ("PYTHONPATH", "PYTHONSAFEPATH", server.RESTORED)] == [own, None, None]
