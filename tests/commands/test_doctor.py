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
from trainer.errors import LostRankError, RanksDifferError, TrainerError, UserError

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


@pytest.mark.parametrize(
    ("gpus", "sizes", "shared"),
    [(0, [1, 2, 3], []), (1, [1, 3], [3]), (2, [1, 2, 3], [3]), (8, [1, 2, 4, 8, 9], [9]), (6, [1, 2, 4, 6, 7], [7])],
)
def test_the_numbers_of_ranks(gpus: int, sizes: list[int], shared: list[int]) -> None:
    """All GPUs, and more ranks than GPUs, which must share."""
    found = Machine(gpus, 8)
    assert exactness.world_sizes(found) == sizes
    assert [W for W in sizes if found.shared_by(W)] == shared
    assert [W for W in sizes if "sharing" in exactness.named(found, W)] == shared


def test_versions_that_do_not_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said, figures = machine.versions(CPU)
    assert f"DeepSpeed {figures['deepspeed']}" in said
    found = machine.importlib.metadata.version
    monkeypatch.setattr(machine.importlib.metadata, "version", lambda n: "1.9" if n == "torch" else found(n))
    with pytest.raises(UserError, match=r"torch is 1\.9 \(torch<3,>=2\.6 is needed\)\. Install"):
        machine.versions(CPU)


def test_runs_that_differ_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ran(function: Any, world_size: int, config: Any, folder: str, **named: Any) -> Any:
        (Path(folder) / "trace.jsonl").write_text(json.dumps({"loss": "a", "weight": str(world_size // 2)}) + "\n")
        return [{"parameters_sha256": "0" * 64}]

    monkeypatch.setattr(exactness, "run_ranks", ran)
    with pytest.raises(RanksDifferError, match="2 ranks differ from 1, first at step 1, in weight"):
        exactness.one_hash(CPU, tmp_path / "runs", bf16=False)


def test_the_wrong_rank_named_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*arguments: Any, **named: Any) -> Any:
        (tmp_path / "killed" / "left_at_0").write_text("3.5")
        (tmp_path / "killed" / "killed_at").write_text("1.0")
        raise LostRankError(said)

    monkeypatch.setattr(exactness, "run_ranks", lost)
    said = "Rank 1 on here did not answer"
    assert exactness.killed_rank(CPU, tmp_path / "killed")[0] == "rank 1 of 2 was named, and the others left in 2.5 s"
    (tmp_path / "killed").rename(tmp_path / "before")
    said = "Rank 0 on here did not answer"
    with pytest.raises(TrainerError, match="rank 1 was killed, but the message is: Rank 0"):
        exactness.killed_rank(CPU, tmp_path / "killed")


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
