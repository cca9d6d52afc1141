"""`doctor`: what it tries, how it judges, and that it goes on after a check that fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.commands.cli import main
from trainer.commands.doctor import doctor as doctors
from trainer.commands.doctor import exactness, machine, speed
from trainer.commands.doctor.machine import Machine
from trainer.errors import RanksDifferError

CPU = Machine(gpus=0, cores=2)


def quiet_checks(monkeypatch: pytest.MonkeyPatch, **instead: Any) -> None:
    """Every check passes at once, but for those that are named."""
    fine: Any = lambda *a, **k: ("fine", {"parameters_sha256": "ab"})  # noqa: E731
    for owner, names in (
        (machine, ("devices", "versions")),
        (exactness, ("one_hash", "stop_and_resume", "killed_rank")),
        (speed, ("throughput", "kernels", "exchange")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, instead.get(name, fine))


def test_a_line_each_and_the_figures_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet_checks(monkeypatch)
    file = tmp_path / "found.json"
    assert main(["doctor", "--device", "cpu", "--output", str(file)]) == 0
    said = capsys.readouterr().out
    assert "passed            exact, bfloat16" in said
    assert "not possible here kernels and waits     needs an NVIDIA GPU" in said
    assert "Nothing failed." in said
    report = json.loads(file.read_text())
    assert [line["verdict"] for line in report["lines"]].count("passed") == 8
    assert report["failed"] == []
    table = doctors.markdown(report).splitlines()
    assert table[2] == "| devices | passed | fine |"
    assert len(table) == 2 + len(report["lines"])


def test_a_check_that_fails_or_breaks_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def differ(*arguments: Any, **named: Any) -> Any:
        raise RanksDifferError("2 ranks differ from 1, first at step 3, in conv.weight")

    def broken(*arguments: Any) -> Any:
        raise ZeroDivisionError

    quiet_checks(monkeypatch, one_hash=differ, throughput=broken)
    file = tmp_path / "found.json"
    assert main(["doctor", "--device", "cpu", "--output", str(file)]) == 1
    said = capsys.readouterr().out
    assert "failed            exact, float32        2 ranks differ from 1, first at step 3, in conv.weight" in said
    assert "there is no hash to compare with, because exactness failed" in said, "nothing to resume against"
    assert "ZeroDivisionError" in said
    assert "passed            exchange" in said, "the last check was made, too"
    assert json.loads(file.read_text())["failed"] == ["exact, float32", "exact, bfloat16", "stop and resume", "speed"]


def test_a_device_that_is_not_there_and_a_file_that_cannot_be_written_are_said_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: False)
    quiet_checks(monkeypatch)
    assert main(["doctor", "--device", "cuda", "--output", str(tmp_path / "a.json")]) == 2
    assert main(["doctor", "--device", "cpu", "--output", str(tmp_path / "no" / "a.json")]) == 2
    assert main(["doctor", "--device", "cpu", "--output", "/proc/a.json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "", "nothing was tried"
    assert "torch finds no GPU" in captured.err
    assert "--output" in captured.err


@pytest.mark.slow
def test_on_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.json"
    assert doctors.doctor("cpu", str(file)) == 0, capsys.readouterr().out
    report = json.loads(file.read_text())
    by_subject = {line["subject"]: line for line in report["lines"]}
    assert by_subject["a killed rank"]["figures"]["seconds"] < 15
    assert set(by_subject["speed"]["figures"]) == {"1", "2"}
    assert (
        by_subject["exact, float32"]["figures"]["parameters_sha256"]
        != (by_subject["exact, bfloat16"]["figures"]["parameters_sha256"])
    )
