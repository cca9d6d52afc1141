"""What `plan` shows of each number of ranks."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from trainer.commands.cli import main
from trainer.commands.show_plan import plan_table
from trainer.config.keys import parse
from trainer.errors import UserError


def table(world_sizes: list[int], **keys: int) -> tuple[str, dict[int, list[str]]]:
    """The heading, and each row's cells by world size."""
    text = plan_table(parse(dict(keys)), world_sizes)
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("ranks"))
    header = re.split(r" {2,}", lines[first])
    assert header == ["ranks", "global batch", "micro-batches per rank", "accumulation", "speed-up at most", "possible"]
    assert set(lines[first + 1]) == {"-", " "}
    rows = [re.split(r" {2,}", line) for line in itertools.takewhile(bool, lines[first + 2 :])]
    return "\n".join(lines[:first]), {int(row[0]): row[1:] for row in rows}


def test_table_of_strong_scaling() -> None:
    heading, rows = table([1, 2, 3, 32, 33], train_batch_size=2048, train_micro_batch_size_per_gpu=64)
    assert "strong scaling" in heading and "64 samples" in heading and "the same model" in heading
    assert rows == {
        1: ["2,048", "32", "32", "1.00", "yes"],
        2: ["2,048", "16", "16", "2.00", "yes"],
        3: ["2,048", "10 or 11", "11", "2.91", "yes"],  # 32 / 11
        32: ["2,048", "1", "1", "32.00", "yes"],
        33: ["-", "-", "-", "-", "no; nearest is 32"],
    }


def test_what_a_larger_micro_batch_would_gain_and_limit() -> None:
    def said(world_sizes: list[int], **keys: int) -> str:
        return plan_table(parse(dict(keys)), world_sizes).partition("\n\n")[2].partition("\n\n")[2]

    text = said([1, 8], train_batch_size=256, train_micro_batch_size_per_gpu=8)
    assert "32 micro-batches allow up to 32 ranks" in text
    assert "16 samples allow 16, 32 samples allow 8" in text
    assert "For 8 ranks, train_micro_batch_size_per_gpu=32 is small enough" in text
    assert "is small enough" not in said([1, 32], train_batch_size=256, train_micro_batch_size_per_gpu=8)
    assert not said([1, 8], train_batch_size=256, train_micro_batch_size_per_gpu=32), "they are large"
    assert not said([2], train_batch_size=96, train_micro_batch_size_per_gpu=16, gradient_accumulation_steps=3)


def test_speeds_of_earlier_runs_are_shown(tmp_path: Path) -> None:
    keys = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 8}
    config = parse(keys | {"trainer": {"output_dir": str(tmp_path / "next")}})
    for W, speed in {1: 1000.0, 2: 640.0}.items():
        (tmp_path / f"run{W}").mkdir()
        (tmp_path / f"run{W}" / "summary.json").write_text(json.dumps({"world_size": W, "samples_per_s": speed}))
        (tmp_path / f"run{W}" / "manifest.json").write_text(json.dumps({"config": config.as_dict()}))
    text = plan_table(config, [1, 2, 4])
    assert re.search(r"^1 .* 1\.00 +1,000 +yes$", text, re.MULTILINE)
    assert re.search(r"^4 .* 4\.00 +- +yes$", text, re.MULTILINE)
    assert "0.64 times as fast as 1 rank (run1): 2 ranks don't pay here, 1 is faster; efficiency 0.32" in text


def test_table_of_weak_scaling() -> None:
    heading, rows = table([1, 2, 5], train_micro_batch_size_per_gpu=16, gradient_accumulation_steps=3)
    assert "weak scaling" in heading and "16 samples" in heading and "another model" in heading
    assert rows == {
        1: ["48", "3", "3", "1.00", "yes"],
        2: ["96", "3", "3", "2.00", "yes"],
        5: ["240", "3", "3", "5.00", "yes"],
    }


def test_table_of_all_three_keys() -> None:
    keys = {"train_batch_size": 96, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 3}
    heading, rows = table([1, 4, 6], **keys)
    assert "strong scaling" in heading
    assert rows == {
        1: ["-", "-", "-", "-", "no; nearest is 4"],
        4: ["96", "3", "3", "4.00", "yes"],
        6: ["-", "-", "-", "-", "no; nearest is 4"],
    }


def test_table_of_keys_that_no_world_size_satisfies() -> None:
    with pytest.raises(UserError, match=re.escape("train_micro_batch_size_per_gpu (16) is larger")):
        table([1, 2], train_batch_size=8, train_micro_batch_size_per_gpu=16)


def test_a_table_of_impossible_rows_alone_promises_nothing() -> None:
    heading, rows = table([33, 40], train_batch_size=2048, train_micro_batch_size_per_gpu=64)
    assert heading == ""
    assert rows == {W: ["-", "-", "-", "-", "no; nearest is 32"] for W in (33, 40)}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text('{"train_batch_size": 64, "train_micro_batch_size_per_gpu": 8}')
    common = ["plan", "--ds_config", str(tmp_path / "run.json"), "--world_sizes", "1", "8"]
    assert main([*common, "--set", "train_batch_size=72"]) == 0
    out = capsys.readouterr().out
    assert "strong scaling, micro-batches of 8 samples" in out
    assert [line.split()[:2] for line in out.splitlines()[-2:]] == [["1", "72"], ["8", "72"]]
    assert main([*common, "--set", "train_batch_size=4"]) == 2
    assert "train_micro_batch_size_per_gpu (8) is larger" in capsys.readouterr().err
