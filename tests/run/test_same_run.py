"""Which runs may go on, and what is refused or labelled: config, length, data, code and machine are compared."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.run.small import Task, config_of, make, pieces_of
from trainer.errors import UserError
from trainer.run import facts as facts_module
from trainer.run.build import Pieces
from trainer.run.claim import Resume
from trainer.run.same_run import check_same_run

pytestmark = pytest.mark.usefixtures("plain_engine")

COSINE = {"schedule": "cosine"}


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({}, {"seed": 1}, r"has finished, and these settings differ(.|\n)*trainer\.seed: 0 before, 1 now"),
        ({}, {"gradient_clipping": 0.5}, r"gradient_clipping: 1\.0 before, 0\.5 now"),
        ({}, {"max_steps": 6}, r"has made 8 steps already, but trainer.epochs and trainer.max_steps now give only 6"),
        ({}, {"max_steps": 10, "seed": 1}, r"The checkpoint is of another run(.|\n)*trainer\.seed: 0 before, 1 now"),
        ({"learning_rate": COSINE}, {"max_steps": 10}, r"steps, on which the learning rate depends: 8 before, 10 now"),
        (
            {"checkpoint": {"every_steps": 0}},
            {"max_steps": 10},
            r"finished without a checkpoint, so it cannot go on to 10",
        ),
    ],
    ids=["another seed", "another clip", "fewer steps", "longer with another seed", "longer schedule", "no checkpoint"],
)
def test_a_finished_run_is_compared_before_anything_is_said_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: dict[str, Any], now: dict[str, Any], said: str
) -> None:
    make(monkeypatch, tmp_path / "run", max_steps=8, **before)
    files = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=said):
        make(monkeypatch, tmp_path / "run", resume="auto", **{"max_steps": 8} | before | now)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == files


def test_a_key_that_the_version_before_did_not_have_had_its_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = make(monkeypatch, tmp_path / "run", max_steps=4)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    del manifest["config"]["trainer"]["tf32"]
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    assert make(monkeypatch, tmp_path / "run", resume="auto", max_steps=4) == summary
    with pytest.raises(UserError, match=r"trainer\.tf32: False before, True now"):
        make(monkeypatch, tmp_path / "run", resume="auto", max_steps=4, tf32=True)


def test_a_longer_schedule_is_another_run_that_may_be_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(monkeypatch, tmp_path / "run", max_steps=8, learning_rate=COSINE)
    longer = make(monkeypatch, tmp_path / "run", resume="auto", allow=True, max_steps=10, learning_rate=COSINE)
    assert (longer["steps"], longer["exactness"]) == (10, "tolerance")
    assert "steps, on which the learning rate depends: 8 before, 10 now" in longer["inexact"][0]


@pytest.mark.parametrize(
    ("then", "now", "label"), [("a", "a", "bitwise"), ("a", "b", "tolerance"), (None, "b", "bitwise")]
)
def test_an_edited_task_is_labelled_when_its_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str | None, now: str, label: str
) -> None:
    """A checkpoint of an earlier version does not say what the code was."""
    monkeypatch.setattr(facts_module, "task_code_sha256", lambda task, name: then)
    make(monkeypatch, tmp_path / "run", max_steps=7)
    monkeypatch.setattr(facts_module, "task_code_sha256", lambda task, name: now)
    summary = make(monkeypatch, tmp_path / "run", resume="auto")
    assert summary["exactness"] == label
    assert summary["inexact"] == (["the code of the task has changed since the checkpoint"] * (label == "tolerance"))
    if label == "tolerance":
        (tmp_path / "run" / "summary.json").unlink()
        with pytest.raises(UserError, match="but the code of the task has changed since the checkpoint"):
            make(monkeypatch, tmp_path / "run", resume="auto", exactness="bitwise")


def test_a_run_that_stopped_early_does_not_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its patience is used up, however many epochs it may have."""
    slow = {"optimizer": {"type": "SGD", "params": {"lr": 1e-9}}, "best": {"patience_evaluations": 1}}
    summary = make(monkeypatch, tmp_path / "run", epochs=9, **slow)
    assert summary["status"] == "stopped early"
    assert make(monkeypatch, tmp_path / "run", resume="auto", epochs=12, **slow) == summary
    assert "nothing to do" in capsys.readouterr().out


def test_an_interrupted_run_cannot_have_fewer_steps_than_it_has_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(monkeypatch, tmp_path / "run", max_steps=7)
    (tmp_path / "run" / "summary.json").unlink()  # killed at its very end
    with pytest.raises(
        UserError, match=r"has made 7 steps already, but trainer\.epochs and trainer\.max_steps now give only 5"
    ):
        make(monkeypatch, tmp_path / "run", resume="auto", max_steps=5)
    assert make(monkeypatch, tmp_path / "run", resume="auto", max_steps=7)["steps"] == 7


def facts_of(p: Pieces) -> dict[str, Any]:
    """What a checkpoint of this run says of it."""
    return {
        "config": json.loads(json.dumps(p.config.as_dict())),
        "plan": asdict(p.plan),
        "total_steps": p.total_steps,
        "data_sha256": dict(p.data_sha256()),
        "facts": dict(p.facts),
        "inexact": [],
    }


@pytest.mark.parametrize(
    "harmless",
    [
        {"output_dir": "elsewhere"},
        {"pack": 4},
        {"checkpoint": {"every_steps": 7}},
        {"max_steps": 11},
        {"audit_every_steps": 3},
        {"csv_monitor": {"enabled": True}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_settings_that_change_no_bit_may_change(harmless: dict[str, Any]) -> None:
    now = pieces_of(config_of(**harmless))
    check_same_run(now, 4, facts_of(pieces_of(config_of())), Resume("auto"))
    assert now.exactness == "bitwise"


class OtherData(Task):
    """The same shapes, but other numbers in training."""

    def splits(self) -> dict[str, dict[str, Tensor]]:
        splits = super().splits()
        splits["train"]["x"][3] += 1
        return splits


def test_other_data_is_refused_and_the_split_is_named() -> None:
    now = pieces_of(config_of(), OtherData())
    with pytest.raises(UserError, match=r"of another run(.|\n)*  the data of train\n") as caught:
        check_same_run(now, 4, facts_of(pieces_of(config_of())), Resume("auto"))
    assert caught.value.agreed, "every rank raises it"
    check_same_run(now, 4, facts_of(pieces_of(config_of())), Resume("auto", allow_changed_config=True))
    assert now.inexact == ["after a checkpoint the data of train"]


def test_another_batch_size_is_named_by_its_effect() -> None:
    now = pieces_of(config_of(train_batch_size=12))
    with pytest.raises(UserError, match="global batch size: 8 before, 12 now"):
        check_same_run(now, 3, facts_of(pieces_of(config_of())), Resume("auto"))


def test_another_version_or_device_is_labelled_or_refused() -> None:
    """It may change the bits, and may not: so the run goes on, unless it has to be bitwise."""
    before = facts_of(pieces_of(config_of()))
    before["facts"] |= {"torch": "1.0", "device_model": "a GPU"}
    now = pieces_of(config_of())
    check_same_run(now, 4, before, Resume("auto"))
    torch_reason, device_reason = now.inexact
    assert torch_reason.startswith("the checkpoint was made with torch 1.0, but this is ")
    assert device_reason == "the checkpoint was made with device_model a GPU, but this is a processor"
    with pytest.raises(
        UserError, match=r'trainer\.exactness is "bitwise", but the checkpoint was made with torch 1\.0'
    ):
        check_same_run(pieces_of(config_of(exactness="bitwise")), 4, before, Resume("auto"))


def test_a_label_stays_with_a_run() -> None:
    before = facts_of(pieces_of(config_of())) | {"inexact": ["after a checkpoint trainer.seed: 0 before, 1 now"]}
    now = pieces_of(config_of())
    for _ in range(2):
        check_same_run(now, 4, before, Resume("auto"))
    assert now.inexact == before["inexact"], "once, however often it goes on"
