"""What a study plans and refuses, and the report that is made of its results alone."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.distributed.jobs import ROOT
from trainer.commands.cli import main
from trainer.errors import UserError
from trainer.study.arms import SEQUENTIAL, SEQUENTIAL_TUNED, WEAK
from trainer.study.declaration import Plan, Study, expand, load_study, plan_text, work
from trainer.study.page import report, write_report
from trainer.study.results import verdicts
from trainer.study.runner import declaration, duration

SHIPPED = ROOT / "ds_configs" / "study.json"


def write(folder: Path, study: dict[str, Any] | None = None, **trainer: Any) -> Path:
    values = json.loads(SHIPPED.read_text())
    values["study"] |= {"output_dir": str(folder / "study"), **(study or {})}
    values["trainer"] |= trainer
    path = folder / "study.json"
    path.write_text(json.dumps(values))
    return path


def planned(path: Path, samples: int = 1200) -> tuple[Study, Plan]:
    study, variants = load_study(str(path))
    sizes = [v.config.trainer.train_samples or samples for v in variants]
    return study, expand(study, [dataclasses.replace(v, samples=n) for v, n in zip(variants, sizes)])


# Planning


def test_the_shipped_study() -> None:
    study, plan = planned(SHIPPED)
    assert len(study.seeds) >= 10
    assert max(study.world_sizes) == 32
    assert {c.arm for c in plan.cells} == {SEQUENTIAL, SEQUENTIAL_TUNED, *WEAK}
    assert 2.0 ** -len(study.seeds) * plan.comparisons() <= study.alpha  # a verdict is possible
    assert [str(place) for place, _ in plan.impossible if place.budget == "epochs"] == [
        "weak_sqrt_adam, W = 16", "weak_sqrt_adam, W = 32",
    ]  # fmt: skip
    assert [W for W, answer in plan.strong if answer == 4] == [2, 4]


def test_strong_is_planned_as_far_as_it_goes(tmp_path: Path) -> None:
    """4 micro-batches can be dealt to 4 ranks, whatever W the weak arms are asked for."""
    _, plan = planned(write(tmp_path, {"world_sizes": [8, 32]}))
    assert [W for W, _ in plan.strong] == [4, 8, 32]
    assert [W for W, answer in plan.strong if answer == 4] == [4]
    _, plan = planned(write(tmp_path, {"world_sizes": [1, 3]}))
    assert [(W, answer) for W, answer in plan.strong] == [(3, 4), (4, 4)]


@pytest.mark.parametrize("file", sorted((ROOT / "ds_configs").glob("study*.json")), ids=lambda p: p.stem)
def test_every_shipped_study_can_decide(file: Path) -> None:
    study, plan = planned(file)
    assert plan.comparisons() >= 4
    assert 2.0 ** -len(study.seeds) * plan.comparisons() <= study.alpha
    assert all("weak_sqrt_adam" in str(place) for place, _ in plan.impossible)


def test_seeds_come_whole(tmp_path: Path) -> None:
    """A study that is interrupted has all arms of its first seeds."""
    _, plan = planned(write(tmp_path, {"seeds": [5, 3], "budgets": ["epochs"], "world_sizes": [2, 4]}))
    assert [c.seed for c in plan.cells] == [5] * 20 + [3] * 20
    assert plan.cells[0].arm == plan.cells[20].arm == SEQUENTIAL
    assert len(plan.configs) == 2 * (20 - 7)  # the rates of 7 places are searched first
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


def test_variants_are_studies_of_their_own(tmp_path: Path) -> None:
    """A subset has its own batches beyond the data, and one micro-batch of all ranks stands for synchronised ones."""
    path = write(
        tmp_path,
        {
            "seeds": 2, "budgets": ["epochs"], "world_sizes": [2, 8], "arms": ["weak"], "dataset_sizes": [100],
            "variants": {"synchronised": {"synchronised_batch_norm": True, "trainer.task_options.model": "cnn"}},
        },
    )  # fmt: skip
    _, plan = planned(path)
    assert list(plan.variants) == ["", "100 samples", "synchronised"]
    assert [str(place) for place, _ in plan.impossible] == ["100 samples: weak, W = 8"]
    configs = {str(c.place): plan.configs[c.id] for c in plan.cells if c.id is not None}
    assert configs["100 samples: weak, W = 2"].trainer.train_samples == 100
    assert configs["weak, W = 8"].train_micro_batch_size_per_gpu == 8
    synchronised = configs["synchronised: weak, W = 8"]
    assert (synchronised.train_batch_size, synchronised.train_micro_batch_size_per_gpu) == (256, 64)
    assert synchronised.trainer.task_options == {"model": "cnn"}
    assert configs["synchronised: sequential"].train_micro_batch_size_per_gpu == 8
    measured = [name for name, config in configs.items() if config.trainer.gradient_noise]
    assert measured == ["sequential"]
    assert plan.comparisons() == 5


def test_work_follows_the_samples(tmp_path: Path) -> None:
    path = write(tmp_path, {"budgets": ["epochs", "updates"], "world_sizes": [2], "arms": ["weak"]}, epochs=3)
    _, plan = planned(path)
    efforts = {(c.arm, c.budget): work(plan.configs[c.id], 1200) for c in plan.cells if c.id is not None}
    assert efforts == {
        ("sequential", "epochs"): 3600,
        ("weak", "epochs"): 3600,
        ("weak", "updates"): 7200,
    }  # 6 epochs of 19


def test_the_table_says_what_is_impossible_and_what_no_seeds_can_decide(tmp_path: Path) -> None:
    arms = ["strong", "weak", "weak_linear", "weak_sqrt", "weak_tuned", "weak_lars"]
    _, plan = planned(write(tmp_path, {"seeds": 3, "budgets": ["epochs"], "world_sizes": [2, 64], "arms": arms}))
    text = plan_text(plan)
    assert re.search(r"weak_linear +epochs +2 +64 +20 +380 +3\n", text)
    assert "weak, W = 64: impossible, the global batch 64 x 32 = 2,048 is larger" in text
    assert "3 searches for a learning rate, of 9 runs each, by validation/accuracy" in text
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
        ({"dataset_sizes": [100, 100]}, "each of them once"),
        ({"variants": {"wide": 3}}, "a name and a block of dotted config keys"),
        ({"variants": {"wide": {"trainer.task_optins": 3}}}, 'Did you mean "task_options"'),
        ({"variants": {"short": {"trainer.max_steps": 3}}}, "has no place in the base config"),
        ({"tuning": {"trials": 1}}, "at least 3"),
        ({"tuning": {"metric": "test/accuracy"}}, "would make the test meaningless"),
        ({"timing": {"world_sizes": [0]}}, "whole numbers of at least 1"),
        ({"timing": {"world_sizes": [5]}}, '"study.timing.world_sizes" holds 5: 5 ranks are more than'),
        ({"seeds": [1, 1_000_003]}, "belongs to the searches"),
    ],
)
def test_bad_studies(tmp_path: Path, study: dict[str, Any], message: str) -> None:
    values = {"max_epochs": None, **study}
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_study(str(write(tmp_path, values)))
    assert str(tmp_path / "study.json") in str(caught.value)


def test_keys_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """They win over the file, for the base config and for the study, and are checked like it."""
    study, (base, *_) = load_study(
        str(SHIPPED), {"study.seeds": 9, "trainer.task_options.data": "mine.csv", "trainer.epochs": 3}
    )
    assert study.seeds == list(range(9))
    assert base.config.trainer.epochs == 3
    assert base.values["trainer"]["task_options"]["data"] == "mine.csv"
    assert main(["study", str(SHIPPED), "--set", "study.seedz=9"]) == 2
    assert 'Did you mean "seeds"' in capsys.readouterr().err
    assert main(["study", str(SHIPPED), "--set", "trainer.epohcs=9"]) == 2
    assert 'Did you mean "epochs"' in capsys.readouterr().err


def test_a_config_without_a_study(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", str(ROOT / "ds_configs" / "strong.json")]) == 2
    assert 'a study needs a "study" block' in capsys.readouterr().err


def test_durations() -> None:
    assert [duration(s) for s in (4.4, 99, 600, 36_000)] == ["4 s", "99 s", "10 min", "10.0 h"]


# The report

NASTY = "<script>alert(\"x\")</script> & 'q'"


def results(folder: Path, seeds: int = 10, budget: str = "epochs", noise: dict[str, Any] | None = None) -> Path:
    """A study's folder as the runs would have left it: weak at W = 8 is bad, W = 2 good, one run not finite."""
    arms = ["sequential", "strong", "weak", "weak_sqrt"]
    path = write(folder, {"seeds": seeds, "arms": arms, "world_sizes": [2, 8], "budgets": [budget]})
    _, plan = planned(path)
    out = folder / "out"
    (out / "runs").mkdir(parents=True)
    declared = declaration(plan, {"samples": {"train": 1200}, "data_sha256": {}})
    declared["base"]["trainer"]["task"] = declared["command"] = NASTY
    declared["impossible"] = [["weak, W = 64", NASTY]]
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
            "learning_rate": 0.003, "samples": 1200, "curves": {}, "gradient_noise": noise,
            "code_sha256": "c" * 64, "device_model": NASTY, "facts": {"torch": "2", "device_model": NASTY},
        }  # fmt: skip
        (out / "runs" / f"{cell.id}.json").write_text(json.dumps(run))
    return out


def test_verdicts_of_a_folder(tmp_path: Path) -> None:
    lines = verdicts(results(tmp_path))
    text = "\n".join(lines)
    assert text.startswith("sequential: test/accuracy 0.95")
    assert "strong scaling has the accuracy of the sequential runs: supported at W = 2, 4, by construction" in text
    assert "strong scaling at W = 8: impossible here" in text
    at = lines.index("weak, learning rate unchanged, equal epochs: loses against its sequential runs?")
    assert lines[at + 1].startswith("  W = 2: contradicted. ")
    assert lines[at + 2].startswith("  W = 8: supported. 0.2")
    at = lines.index("weak, learning rate unchanged, equal epochs: fails to converge more often than not?")
    assert lines[at + 1].startswith("  W = 2: contradicted. 0 of 10 runs")
    assert lines[at + 2].startswith("  W = 8: supported. 10 of 10 runs (95 % interval 0.69 to 1.00)")


def test_the_noise_scale_speaks_of_equal_epochs(tmp_path: Path) -> None:
    """Where it stands beside what the study saw: W = 8 times 32 samples lose, at equal epochs."""
    noise = {"scale_samples": 146.0}
    (tmp_path / "epochs").mkdir()
    said = verdicts(results(tmp_path / "epochs", noise=noise))[-1]
    assert "146 about twice as many: W = 4.56 times the batch of 32" in said
    assert said.endswith("The study shows a loss of weak from W = 8 (a batch of 256) on.")
    (tmp_path / "updates").mkdir()
    said = verdicts(results(tmp_path / "updates", budget="updates", noise=noise))[-1]
    assert said.endswith("at equal epochs, at which this study compares nothing.")


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
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page(tmp_path: Path) -> None:
    source = write_report(results(tmp_path)).read_text()
    page = Page()
    page.feed(source)
    assert page.open == []
    assert page.text.index("Verdicts") < page.text.index("Failure rates") < page.text.index("Every run")
    for needed in ("Declared before the runs", "Clopper-Pearson", "Holm", "What could not be run", "seed 9"):
        assert needed in page.text
    # everything of a user's is text
    assert page.text.count(NASTY) >= 4
    assert "script" not in page.tags
    # and nothing is asked of anybody: pictures are part of the page
    assert not {"script", "link", "iframe", "object", "use", "image"} & set(page.tags)
    assert not {"href", "xlink:href", "srcset", "action"} & {name for name, _ in page.attributes}
    pictures = [value or "" for name, value in page.attributes if name == "src"]
    assert len(pictures) == page.tags.count("img") == 2
    assert all(picture.startswith("data:image/svg+xml;base64,") for picture in pictures)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "http" not in source.replace("http-equiv", "")
    assert "url(" not in source
    assert "@import" not in source


def test_the_figures(tmp_path: Path) -> None:
    folder = results(tmp_path)
    write_report(folder)
    made = sorted(file.name for file in (folder / "figures").iterdir())
    assert made == [f"{name}.{kind}" for name in ("failures-epochs", "metric-epochs") for kind in ("pdf", "svg")]
    for name, title in (("metric", "test/accuracy over W"), ("failures", "share of runs that fail to converge")):
        figure = ElementTree.parse(folder / "figures" / f"{name}-epochs.svg")
        text = " ".join("".join(element.itertext()) for element in figure.iter() if element.tag.endswith("text"))
        assert title in text
        assert "weak, square root" in text or "weak_sqrt" in text, text


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
    assert "is not a study's folder" in capsys.readouterr().err
    for file in (folder / "runs").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="no finished run yet"):
        write_report(folder)
