"""The README tells the truth about the config, the code and the example task."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

from tests.distributed.jobs import ROOT, train
from trainer.config import Best, Checkpoint, LearningRate, Lora, Trainer, load, parse
from trainer.study.plan import Study
from trainer.workers import run_ranks

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_config_is_the_file() -> None:
    shown = [json.loads(block) for block in blocks("json")]
    assert json.loads((ROOT / "ds_configs" / "strong.json").read_text()) in shown
    for values in shown:
        parse(values)


def test_every_trainer_key_and_config_file_is_explained() -> None:
    blocks = {"learning_rate": LearningRate, "best": Best, "lora": Lora, "checkpoint": Checkpoint}
    keys = [f.name for f in dataclasses.fields(Trainer) if f.name not in blocks]
    keys += [f"{block}.{f.name}" for block, cls in blocks.items() for f in dataclasses.fields(cls)]
    keys += [f.name for f in dataclasses.fields(Study)]
    for name in [*keys, *(file.name for file in (ROOT / "ds_configs").iterdir())]:
        assert f"`{name}`" in README, name


def test_the_map_of_the_code_is_complete() -> None:
    (tree,) = re.findall(r"```\ntrainer/\n(.*?)```", README, flags=re.DOTALL)
    for indent, folder in (("  ", "trainer"), ("    ", "trainer/study")):
        listed = set(re.findall(rf"^{indent}(\w+\.py) ", tree, flags=re.MULTILINE))
        there = {file.name for file in (ROOT / folder).glob("*.py")} - {"__init__.py", "__main__.py"}
        assert listed == there


def test_the_example_task_is_exact(tmp_path: Path) -> None:
    (example,) = blocks("python")
    (tmp_path / "my_task.py").write_text(example)
    summaries = []
    for W in (1, 2, 3):
        overrides = {
            "trainer.task": f"{tmp_path}/my_task.py:MyTask",
            "trainer.task_options": {},
            "train_batch_size": 64,
            "trainer.output_dir": str(tmp_path / str(W)),
            "trainer.epochs": 4,
        }
        summaries.append(run_ranks(train, W, load(ROOT / "ds_configs" / "strong.json", overrides))[0])
    assert summaries[0]["trace"] == summaries[1]["trace"] == summaries[2]["trace"]
    assert summaries[0]["metrics"]["test"]["accuracy"] > 0.6


def test_every_command_names_files_that_exist() -> None:
    for block in blocks("bash"):
        for path in re.findall(r"(?:launch|ds_configs|tests|trainer)/[\w/]+\.(?:py|sh|json)", block):
            assert (ROOT / path).is_file(), path
