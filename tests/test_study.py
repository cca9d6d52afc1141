"""What a study plans and refuses, and the report that is made of its results alone."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.distributed.jobs import ROOT
from trainer.arms import SEQUENTIAL, WEAK
from trainer.cli import main
from trainer.errors import UserError
from trainer.study import Plan, Study, duration, expand, load, plan_text, work
from trainer.study_report import report, verdicts, write_report

SHIPPED = ROOT / "ds_configs" / "study.json"


def write(folder: Path, study: dict[str, Any] | None = None, **trainer: Any) -> Path:
    values = json.loads(SHIPPED.read_text())
    values["study"] |= {"output_dir": str(folder / "study"), **(study or {})}
    values["trainer"] |= trainer
    path = folder / "study.json"
    path.write_text(json.dumps(values))
    return path


def planned(path: Path, samples: int = 1200) -> tuple[Study, Plan]:
    study, base, _ = load(str(path))
    return study, expand(study, base, samples)


# Planning


def test_the_shipped_study() -> None:
    study, plan = planned(SHIPPED)
    assert len(study.seeds) >= 10
    assert max(study.world_sizes) == 32
    assert {c.arm for c in plan.cells} == {SEQUENTIAL, *WEAK}
    assert 2.0 ** -len(study.seeds) * plan.comparisons() <= study.alpha  # a verdict is possible
    assert [(arm, W) for arm, budget, W, _ in plan.impossible if budget == "epochs"] == [
        ("weak_sqrt_adam", 16), ("weak_sqrt_adam", 32),
    ]  # fmt: skip
    assert [W for W, answer in plan.strong if answer == 4] == [2, 4]


def test_seeds_come_whole(tmp_path: Path) -> None:
    """A study that is interrupted has all arms of its first seeds."""
    _, plan = planned(write(tmp_path, {"seeds": [5, 3], "budgets": ["epochs"], "world_sizes": [2, 4]}))
    assert [c.seed for c in plan.cells] == [5] * 11 + [3] * 11
    assert plan.cells[0].arm == plan.cells[11].arm == SEQUENTIAL
    assert len(plan.configs) == 22
    assert {c.trainer.exactness for c in plan.configs.values()} == {"bitwise"}


def test_equal_configs_are_one_run(tmp_path: Path) -> None:
    """At W = 2, 20 epochs of 64 samples are 20 steps, and equal updates 40; if only 20 epochs are allowed, the same."""
    path = write(tmp_path, {"seeds": 2, "budgets": ["epochs", "updates"], "world_sizes": [2], "arms": ["weak"]})
    _, plan = planned(path, samples=64)
    assert (len(plan.cells), len(plan.configs)) == (6, 6)
    path = write(tmp_path, {"seeds": 2, "budgets": ["epochs", "updates"], "world_sizes": [2], "arms": ["weak"],
                            "max_epochs": 20})  # fmt: skip
    _, plan = planned(path, samples=64)
    assert (len(plan.cells), len(plan.configs)) == (6, 4)


def test_work_follows_the_samples(tmp_path: Path) -> None:
    path = write(tmp_path, {"budgets": ["epochs", "updates"], "world_sizes": [2], "arms": ["weak"]}, epochs=3)
    _, plan = planned(path)
    efforts = {(c.arm, c.budget): work(plan.configs[c.id], 1200) for c in plan.cells}
    assert efforts == {
        ("sequential", "epochs"): 3600,
        ("weak", "epochs"): 3600,
        ("weak", "updates"): 7200,
    }  # 6 epochs of 19


def test_the_table_says_what_is_impossible_and_what_no_seeds_can_decide(tmp_path: Path) -> None:
    study, plan = planned(write(tmp_path, {"seeds": 3, "budgets": ["epochs"], "world_sizes": [2, 64]}))
    text = plan_text(study, plan, 1200)
    assert re.search(r"weak_linear +epochs +2 +64 +20 +380 +3\n", text)
    assert "weak, equal epochs, W = 64: impossible, the global batch 64 x 32 = 2,048 is larger" in text
    assert "strong, W = 64: impossible, 64 ranks are more than the 4 micro-batches" in text
    assert "note: with 3 seeds no verdict is possible on 5 comparisons at alpha 0.05; at least 7 are needed" in text


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ({"arms": ["weak_lineer"]}, "holds 'weak_lineer'. Did you mean \"weak_linear\""),
        ({"seeds": 1}, '"study.seeds" must be at least 2'),
        ({"seeds": [1, 1]}, "each of them once"),
        ({"seeds": ["a", "b"]}, "whole numbers"),
        ({"seeds": "ten"}, "must be a list"),
        ({"world_sizes": [0]}, "whole numbers of at least 1"),
        ({"world_sizes": []}, "at least one"),
        ({"budgets": ["steps"]}, "holds 'steps'"),
        ({"metric": "accuracy"}, "<split>/<metric>"),
        ({"alpha": 2}, "must be below 1"),
        ({"margn": 0.1}, 'Did you mean "margin"'),
        ({"output_dir": ""}, '"study.output_dir" is missing'),
        ({"budgets": ["epochs"], "max_epochs": 50}, "no effect"),
        ({"budgets": ["updates"], "max_epochs": 5}, "less than trainer.epochs"),
    ],
)
def test_bad_studies(tmp_path: Path, study: dict[str, Any], message: str) -> None:
    values = {"max_epochs": None, **study}
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load(str(write(tmp_path, values)))
    assert str(tmp_path / "study.json") in str(caught.value)


def test_a_config_without_a_study(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", str(ROOT / "ds_configs" / "strong.json")]) == 2
    assert 'a study needs a "study" block' in capsys.readouterr().err


def test_durations() -> None:
    assert [duration(s) for s in (4.4, 99, 600, 36_000)] == ["4 s", "99 s", "10 min", "10.0 h"]


# The report

NASTY = "<script>alert(\"x\")</script> & 'q'"


def results(folder: Path, seeds: int = 10) -> Path:
    """A study's folder as the runs would have left it: weak at W = 8 is bad, W = 2 good, one run not finite."""
    arms = ["sequential", "strong", "weak", "weak_sqrt"]
    path = write(folder, {"seeds": seeds, "arms": arms, "world_sizes": [2, 8], "budgets": ["epochs"]})
    _, base, _ = load(str(path))
    study, plan = planned(path)
    out = folder / "out"
    (out / "runs").mkdir(parents=True)
    fixed = {k: v for k, v in json.loads(json.dumps(study.__dict__)).items() if k not in ("max_parallel", "output_dir")}
    base["trainer"]["task"] = NASTY
    declared = {"study": fixed, "base": base, "cells": [c.__dict__ for c in plan.cells], "command": NASTY}
    declared |= {"impossible": [["weak", "epochs", 64, NASTY]], "strong": plan.strong}
    (out / "study.json").write_text(json.dumps(declared))
    for i, cell in enumerate(plan.cells):
        lost = cell.arm == "weak" and cell.world_size == 8
        value = (0.7 if lost else 0.95) + 0.002 * ((cell.seed * 7 + i) % 5)
        broken = lost and cell.seed == 0
        run: dict[str, Any] = {
            **cell.__dict__, "status": "not finite" if broken else "finished", "exactness": "bitwise",
            "metrics": {} if broken else {"test": {"accuracy": value, "loss": 1 - value}}, "steps": 760, "epochs": 20,
            "global_batch_size": 32, "micro_batch_size": 8, "parameters_sha256": None if broken else f"{i:064x}",
            "started_at_s": 1.0, "wall_time_s": 1.0, "step_time_s": None if broken else 0.001, "samples_per_s": 9.0,
            "code_sha256": "c" * 64, "device_model": NASTY, "facts": {"torch": "2", "device_model": NASTY},
        }  # fmt: skip
        (out / "runs" / f"{cell.id}.json").write_text(json.dumps(run))
    return out


def test_verdicts_of_a_folder(tmp_path: Path) -> None:
    lines = verdicts(results(tmp_path))
    text = "\n".join(lines)
    assert text.startswith("sequential: test/accuracy 0.95")
    assert "strong scaling has the accuracy of the sequential runs: supported at W = 2, by construction" in text
    assert "strong scaling at W = 8: impossible here" in text
    at = lines.index("weak, learning rate unchanged, equal epochs: loses accuracy against the sequential runs?")
    assert lines[at + 1].startswith("  W = 2: contradicted. ")
    assert lines[at + 2].startswith("  W = 8: supported. 0.2")
    at = lines.index("weak, learning rate unchanged, equal epochs: fails to converge more often than not?")
    assert lines[at + 1].startswith("  W = 2: contradicted. 0 of 10 runs")
    assert lines[at + 2].startswith("  W = 8: supported. 10 of 10 runs (95 % interval 0.69 to 1.00)")


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "path", "circle", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "circle", "rect"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page(tmp_path: Path) -> None:
    source = write_report(results(tmp_path)).read_text()
    page = Page()
    page.feed(source)
    assert page.open == []
    assert page.text.index("Verdicts") < page.text.index("failure rate") < page.text.index("Every run")
    for needed in ("Declared before the runs", "Clopper-Pearson", "Holm", "What could not be run", "seed 9"):
        assert needed in page.text
    # everything of a user's is text
    assert page.text.count(NASTY) >= 4
    assert "script" not in page.tags
    # and nothing is asked of anybody
    assert not {"script", "link", "img", "iframe", "object", "use", "image"} & set(page.tags)
    assert not {"src", "href", "xlink:href", "srcset", "action"} & {name for name, _ in page.attributes}
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "http" not in source.replace("http-equiv", "")
    assert "url(" not in source
    assert "@import" not in source


def test_the_figures(tmp_path: Path) -> None:
    source = write_report(results(tmp_path)).read_text()
    figures = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL)]
    assert [f.findtext("title") for f in figures] == [
        "test/accuracy over W by arm, equal epochs",
        "Share of runs that fail to converge over W by arm, equal epochs",
    ]
    marks = [g.findtext("title") or "" for g in figures[1].iter("g")]
    assert "weak, W = 8: 1.0000 (0.6915 to 1.0000)" in marks
    assert len(marks) == 4
    numbers = [float(n) for f in figures for e in f.iter() for n in re.findall(r"[\d.]+", e.get("d", ""))]
    assert 0 <= min(numbers) <= max(numbers) <= 760


def test_the_tables(tmp_path: Path) -> None:
    import pyarrow.parquet

    folder = results(tmp_path)
    write_report(folder)
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 50
    first = rows[0]
    assert (first["arm"], first["world_size"], first["seed"], first["device_model"]) == ("sequential", "1", "0", NASTY)
    assert float(first["test/accuracy"]) == pytest.approx(0.95)
    broken = [row for row in rows if row["status"] == "not finite"]
    assert [(row["arm"], row["world_size"], row["test/accuracy"]) for row in broken] == [("weak", "8", "")]
    parquet = pyarrow.parquet.read_table(folder / "results.parquet").to_pylist()
    assert [row["config_sha256"] for row in parquet] == [row["config_sha256"] for row in rows]
    assert sum(row["test/accuracy"] is None for row in parquet) == 1


def test_an_unfinished_study_says_so(tmp_path: Path) -> None:
    folder = results(tmp_path)
    runs = sorted((folder / "runs").iterdir())
    for file in runs[:3]:
        file.unlink()
    assert "3 declared runs are missing." in verdicts(folder)
    assert "3 declared runs are missing" in write_report(folder).read_text()


def test_runs_of_other_code_are_pointed_out(tmp_path: Path) -> None:
    folder = results(tmp_path)
    file = next((folder / "runs").iterdir())
    file.write_text(file.read_text().replace("c" * 64, "d" * 64))
    assert "The runs come from 2 versions of the code" in write_report(folder).read_text()


def test_report_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = results(tmp_path)
    assert report(str(folder)) == 0
    assert f"report: {folder / 'report.html'}" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "holds no study" in capsys.readouterr().err
    for file in (folder / "runs").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="no finished run yet"):
        write_report(folder)
