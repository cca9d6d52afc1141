"""The page of a search: what it has, and that texts of the data or the task cannot break it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from tests.search.small import write
from trainer.search import page as pages
from trainer.search.declaration import load_search
from trainer.search.page import write_page

LR = "optimizer.params.lr"
MODEL = "trainer.task_options.model"


def trial(number: int, state: str, value: float | None, lr: float, **more: Any) -> dict[str, Any]:
    metrics = {"validation": {"accuracy": value, "loss": 0.5}} if value is not None else {}
    point = {LR: lr, MODEL: "mlp"}
    return {"number": number, "state": state, "value": value, "metrics": metrics, "point": point, "epoch": 2,
            "reason": None, "wall_time_s": 1.5, "parameters_sha256": f"{number}" * 64, "curves": {}} | more  # fmt: skip


class NoImportance:
    """In place of `ledger.Ledger`, which would need a journal."""

    def importances(self) -> dict[str, float]:
        return {}


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a search leaves it, and its page, without figures."""
    folder = tmp_path / "out"
    parameters = {LR: {"low": 0.001, "high": 1.0, "log": True}, MODEL: ["cnn", "mlp"]}
    plan = load_search(str(write(tmp_path, parameters=parameters, output_dir=str(folder))))
    trials = [
        trial(0, "complete", 0.8, 0.1),
        trial(1, "complete", 0.9, 0.95),
        trial(2, "complete", 0.9, 0.2),
        trial(3, "failed", None, 0.3, reason="loss() gave <b>nan</b> & stopped"),
        trial(4, "complete", 0.8, 0.1, **{"as": 0}),
    ]
    (folder / "trials").mkdir(parents=True)
    (folder / "test").mkdir()
    for one in trials:
        (folder / "trials" / f"{one['number']:04d}.json").write_text(json.dumps(one))
    test = {
        "seed": 1,
        "status": "finished",
        "metrics": {"validation": {"loss": 0.4}, "test": {"loss": 0.5, "accuracy": 0.875}},
    }
    (folder / "test" / "seed-1.json").write_text(json.dumps(test | {"parameters_sha256": "a" * 64}))
    choice = {"metric": "accuracy", "mode": "max", "seeds": [1]}
    choice |= {name: trials[1][name] for name in ("number", "point", "value")}
    (folder / "choice.json").write_text(json.dumps(choice))
    (folder / "best.json").write_text(json.dumps(plan.values_of(choice["point"])))
    declared = {"command": "python -m trainer search a<b>.json", "facts": {"torch": "2.13"}, "search": {}}
    (folder / "search.json").write_text(json.dumps(declared))
    monkeypatch.setattr(pages, "_draw", lambda *_: None)
    return write_page(plan, NoImportance())  # type: ignore[arg-type]


def test_the_page_has_all_of_it(whole: Path) -> None:
    page = (whole / "out" / "report.html").read_text()
    assert page.count("<figure>") == 3  # one key has no importance
    for text in ("Best: trial", "Test accuracy", "The best configuration", '<td class="text">optimizer.params.lr</td>'):
        assert text in page
    assert len(list((whole / "out" / "tensorboard").glob("*/events*"))) == 6
    assert len((whole / "out" / "trials.csv").read_text().splitlines()) == 5


def test_texts_are_shown_and_not_run(page: Path) -> None:
    text = page.read_text()
    assert "trial 4: loss() gave &lt;b&gt;nan&lt;/b&gt; &amp; stopped" in text
    assert "search a&lt;b&gt;.json" in text
    assert "<script" not in text


def test_the_best_value_at_the_edge_of_its_range_is_said(page: Path) -> None:
    """A rate of 0.95 in a range up to 1, by its logarithm. A list has no edge."""
    text = page.read_text()
    assert text.count("at the edge") == 1
    assert "Too few trials have finished to say which key matters." in text


def test_the_csv_has_a_row_for_each_trial_with_its_choice(page: Path) -> None:
    with (page.parent / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert [row["choice"] for row in rows] == ["", "taken", "a tie", "", ""]
    assert [row["state"] for row in rows] == ["finished", "finished", "finished", "failed", "finished"]
    assert [row["as trial"] for row in rows] == ["", "", "", "", "1"]
    assert [row["lr"] for row in rows] == ["0.1", "0.95", "0.2", "0.3", "0.1"]


def test_the_metric_on_test_stands_first_among_the_tested_runs(page: Path) -> None:
    header = page.read_text().partition("<h2>Fresh seeds</h2>")[2].partition("</tr>")[0]
    names = ("seed", "status", "test accuracy", "test loss", "validation loss", "parameters sha256")
    assert sorted(names, key=header.index) == list(names)
