"""Ranks that differ are named: refused if they would train something else, labelled if only their devices differ."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

from tests.run.small import CPU, Task, config_of, engine_module
from trainer.errors import UserError
from trainer.run import facts as facts_module
from trainer.run.facts import compare_facts, facts_of

FACTS = {"torch": "2.0", "device_model": "a processor", "cpu_capability": "all", "math_settings": "", "cpu_model": "x"}


def ranks_say(monkeypatch: pytest.MonkeyPatch, changes: list[dict[str, str]]) -> list[str]:
    """What comes of as many ranks as changes, each with facts of its own."""

    def gather(value: Any) -> list[Any]:
        return [(f"host{rank}", value[1] | change) for rank, change in enumerate(changes)]

    monkeypatch.setattr(facts_module, "gather_objects", gather)
    return compare_facts(dict(FACTS), config_of(), {})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([{}, {"torch": "1.0"}, {}], r"rank 1 on host1 has another torch than the other ranks: 1\.0, others 2\.0\.$"),
        ([{"config": "x"}, {}, {}], r"rank 0 on host0 has another config than the other ranks\.$"),
        ([{}, {}, {"data of train": "x"}], "rank 2 on host2 has another data of train"),
        # The worse difference is the one that is reported.
        ([{}, {"device_model": "old"}, {"torch": "1.0"}], "rank 2 on host2 has another torch"),
    ],
)
def test_ranks_that_would_train_something_else_are_refused(
    monkeypatch: pytest.MonkeyPatch, changes: list[dict[str, str]], said: str
) -> None:
    with pytest.raises(UserError, match=said) as caught:
        ranks_say(monkeypatch, changes)
    assert caught.value.agreed


def test_ranks_on_other_device_models_are_labelled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = [{}, {"device_model": "old"}, {}, {"device_model": "older", "cpu_capability": "none"}]
    assert ranks_say(monkeypatch, changes) == ["rank 3 on host3 runs on none, others on all"]


def test_ranks_with_other_settings_of_math_libraries_are_labelled(monkeypatch: pytest.MonkeyPatch) -> None:
    (reason,) = ranks_say(monkeypatch, [{}, {"math_settings": "MKL_CBWR=COMPATIBLE"}, {}])
    assert reason == "rank 1 on host1 runs on MKL_CBWR=COMPATIBLE, others on default settings of math libraries"


def test_another_processor_beside_equal_gpus_is_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks_say(monkeypatch, [{}, {"cpu_model": "y"}]) == []


def test_the_facts_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trainer.engine.deepspeed_engine", engine_module())
    facts = facts_of(Task(), config_of(), CPU, nn.Linear(1, 1))
    assert (facts["torch"], facts["deepspeed"]) == (torch.__version__, "0")
    assert "transformers" not in facts, "it is not used, so its version does not matter"
