"""The guard: ranks that differ are named, with the first tensor in which they do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.errors import RanksDifferError
from trainer.exact.checks import guard
from trainer.exact.checks.guard import compare_ranks
from trainer.exact.checks.hashes import hash64


def compare_with(monkeypatch: pytest.MonkeyPatch, states: list[dict[str, Tensor]]) -> None:
    """compare_ranks on rank 0 of as many ranks as there are states."""
    monkeypatch.setattr(guard, "gather_int64", lambda own: [int(hash64(state.values())) for state in states])
    by_tensor = [{name: int(hash64([tensor])) for name, tensor in state.items()} for state in states]
    monkeypatch.setattr(guard, "gather_objects", lambda own: by_tensor)
    compare_ranks(states[0], 17)


def state(**changes: float) -> dict[str, Tensor]:
    return {name: torch.full((3,), changes.get(name, 1.0)) for name in ("embedding", "body", "head")}


def test_equal_ranks_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    compare_with(monkeypatch, [state(), state(), state()])
    compare_with(monkeypatch, [state()])


@pytest.mark.parametrize(
    ("states", "words"),
    [
        ([state(), state(body=2.0), state()], ("rank 1 differs from the others", "first in body")),
        ([state(head=2.0), state(), state()], ("rank 0 differs from the others", "first in head")),
        (
            [state(), state(head=2.0), state(), state(body=2.0), state()],
            ("ranks 1, 3 differ from the others", "first in body"),  # in the order of the model
        ),
        ([state(), state(head=2.0)], ("ranks 0 and 1 differ", "first in head")),
    ],
)
def test_who_differs_is_named(
    monkeypatch: pytest.MonkeyPatch, states: list[dict[str, Tensor]], words: tuple[str, ...]
) -> None:
    with pytest.raises(RanksDifferError) as caught:
        compare_with(monkeypatch, states)
    for word in ("After step 17", *words):
        assert word in str(caught.value)
    assert caught.value.agreed
    assert caught.value.exit_code == 4


def test_alone_there_is_nobody_to_differ_from() -> None:
    compare_ranks(state(), 1)
