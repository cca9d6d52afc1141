"""A finished run as a program reads it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from trainer import Result, UserError

SUMMARY = {
    "status": "finished",
    "exactness": "bitwise",
    "steps": 4,
    "parameters_sha256": "f" * 64,
    "metrics": {"validation": {"loss": 0.5}, "test": {"loss": 0.25, "accuracy": 0.75}},
}
RECORDS = [
    {"step": 2, "epoch": 1, "train/loss": 1.0},
    {"step": 4, "epoch": 2, "train/loss": 0.5},
    {"step": 4, "epoch": 2, "eval/test/loss": 0.25},
]


def write(folder: Path, summary: object = SUMMARY) -> Path:
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return folder


def test_what_a_folder_holds(tmp_path: Path) -> None:
    result = Result.read(write(tmp_path))
    assert result.metrics == SUMMARY["metrics"] and result.summary == SUMMARY
    assert (result.exactness, result.parameters_sha256) == ("bitwise", "f" * 64)
    assert result.records == RECORDS
    assert repr(result) == (
        f"Result({str(tmp_path)!r}: finished after 4 steps, bitwise; validation loss 0.5000; test loss 0.2500, "
        "accuracy 0.7500)"
    )


def test_history_has_a_row_for_each_step(tmp_path: Path) -> None:
    table = Result.read(write(tmp_path)).history
    assert table.index.tolist() == [2, 4] and table.index.name == "step"
    assert table.columns.tolist() == ["epoch", "train/loss", "eval/test/loss"]
    assert table["train/loss"].tolist() == [1.0, 0.5]
    assert math.isnan(table["eval/test/loss"][2]) and table["eval/test/loss"][4] == 0.25


@pytest.mark.parametrize("summary", [None, [], {"status": "nan in step 3", "steps": 2}])
def test_a_run_that_has_not_finished_is_none(tmp_path: Path, summary: object) -> None:
    """Also one that stopped because its loss was not finite: it has a summary without metrics."""
    if summary is not None:
        write(tmp_path, summary)
    with pytest.raises(UserError, match="holds no finished run"):
        Result.read(tmp_path)
