"""Who a process is, from the variables of launchers."""

from __future__ import annotations

import pytest

from trainer.errors import UserError
from trainer.ranks.place import Ranks

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")


def place(monkeypatch: pytest.MonkeyPatch, local_rank: int | None = None, **variables: str) -> Ranks:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return Ranks.from_environment(local_rank)


def test_what_launchers_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place(monkeypatch) == Ranks(0, 1, 0, 1)
    torchrun = place(monkeypatch, RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4")
    assert torchrun == Ranks(5, 8, 1, 4) and not torchrun.first
    assert place(monkeypatch, RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_SIZE="4") == Ranks(
        5, 8, 1, 4
    )  # DeepSpeed
    assert place(monkeypatch, 2, RANK="2", WORLD_SIZE="4") == Ranks(2, 4, 2, 4)  # its flag fills in
    assert place(monkeypatch, 3, RANK="2", WORLD_SIZE="4", LOCAL_RANK="2") == Ranks(2, 4, 2, 4)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "two"}, "RANK is 'two'. It must be a whole number"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "contradict one another: RANK=4, WORLD_SIZE=4"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK=2"),
    ],
)
def test_variables_that_contradict_one_another(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        place(monkeypatch, **variables)
