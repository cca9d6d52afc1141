"""What is said before torch is loaded: a task, a file or a column that is not there, and what to type instead."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import UserError
from trainer.tasks.first_look import look

ROOT = Path(__file__).resolve().parents[2]
BERT = {"model_type": "bert"}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("reviews.csv").write_text("review,stars\ngood,5\n")
    Path("odd.csv").write_text("a,b,stars\nx,y,5\n")
    Path("semicolon.csv").write_text("text;label\nx;y\n")
    Path("mixed.csv").write_text("text, as written;label\nx;y\n")
    Path("quoted.csv").write_text('"te\nxt",label\nx,y\n')
    Path("split.json").write_text('{"columns": ["words"], "index": [0], "data": [["a"]]}\n')
    Path("nested.json").write_text('{"version": 1, "data": [{"words": "a"}]}\n')
    Path("qa.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "b", "more": 1}\n')
    Path("mine.py").write_text("from other import Imported\nclass MyTask:\n    pass\nAlias = MyTask\n")
    return tmp_path


def texts(**options: Any) -> tuple[str, dict[str, Any]]:
    return "text_classification", {"data": "reviews.csv", "model": BERT, "label_column": "stars", **options}


@pytest.mark.parametrize(
    ("task", "options", "said"),
    [
        ("text_clasification", {}, 'Did you mean "text_classification"? Type --task text_classification.'),
        ("zzz", {}, "Known: audio_classification, causal_lm, "),
        ("mien.py:MyTask", {}, "There is mine.py: --task mine.py:MyTask"),
        ("mine.py:MyTsk", {}, 'has no class MyTsk. Did you mean "MyTask"? Type --task mine.py:MyTask.'),
        ("mine.py", {}, "must be given as path/to/file.py:ClassName"),
        (*texts(data="review.csv"), "There is reviews.csv: --set trainer.task_options.data=reviews.csv"),
        (*texts(data="no/such.csv"), "Give its path: --set trainer.task_options.data=PATH"),
        (
            *texts(data={"train": "reviews.csv", "test": "review.csv"}),
            '"trainer.task_options.data.test": review.csv does not exist',
        ),
        (*texts(model="./bert"), '"trainer.task_options.model": ./bert does not exist'),
        (
            *texts(label_column="star"),
            "no column \"star\". It has: review, stars.\nPerhaps --set trainer.task_options.label_column=stars",
        ),
        (*texts(text_column="zzz"), "Name it: --set trainer.task_options.text_column=COLUMN"),
        (*texts(label_column=None), '"trainer.task_options.label_column": which column holds the labels?'),
        (*texts(data="odd.csv"), "which column holds the texts? It has: a, b, stars."),
        ("tabular", {"data": "odd.csv"}, "which column holds the labels? It has: a, b, stars."),
        ("causal_lm", {"data": "qa.jsonl", "prompt_column": "prmpt"}, "trainer.task_options.prompt_column=prompt"),
        ("image_classification", {"data": "./images"}, "./images does not exist"),
    ],
)  # fmt: skip
def test_what_is_certainly_wrong_is_said_with_the_flag_to_type(task: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        look(task, options)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("digits", {}),
        ("mine.py:MyTask", {}),
        ("mine.py:Imported", {}),
        ("mine.py:Alias", {}),
        texts(),
        texts(data="organisation/dataset", model="organisation/model"),
        texts(data="*.csv"),
        texts(data="semicolon.csv", text_column="text", label_column="label"),
        texts(data="mixed.csv", text_column="text, as written", label_column="label"),
        texts(data="quoted.csv", text_column="te\nxt", label_column="label"),
        texts(data={"train": "reviews.csv", "test": "odd.csv"}),
        ("tabular", {"data": "odd.csv", "label_column": "stars", "model": "resnet"}),
        ("causal_lm", {"data": "qa.jsonl", "text_column": "more"}),
        ("causal_lm", {"data": "split.json", "text_column": "words"}),
        ("causal_lm", {"data": "nested.json", "text_column": "words"}),
        ("causal_lm", {}),
    ],
)
def test_what_may_be_right_is_left_to_the_task(task: str, options: dict[str, Any]) -> None:
    look(task, options)


def test_torch_is_not_loaded_for_these_messages(here: Path) -> None:
    """In one process: the command of a run, and `python -m trainer`."""
    values = {
        "train_batch_size": 8, "train_micro_batch_size_per_gpu": 4,
        "trainer": {"task": "text_classification", "task_options": texts()[1]},
    }  # fmt: skip
    (here / "config.json").write_text(json.dumps(values))
    wrong = [["--task", "digts"], ["--set", "trainer.task_options.data=review.csv"],
             ["--set", "trainer.task_options.text_column=zzz"]]  # fmt: skip
    code = f"""
import sys
from trainer.main import main
from trainer.commands.cli import main as commands
for wrong in {wrong!r}:
    assert main(["--ds_config", "config.json", *wrong]) == 2
    assert commands(["verify", "--ds_config", "config.json", *wrong]) == 2
assert commands(["check-task", "digts"]) == 2
heavy = {{"torch", "deepspeed", "transformers", "datasets", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=here,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == 7
    assert "--task digits" in done.stderr


@pytest.mark.parametrize(
    ("task", "name", "content", "said"),
    [
        ("text_classification", "none.csv", "", "none.csv is empty"),
        ("tabular", "head.csv", "a,label\n", "has a single line, 'a,label'.*no samples"),
        ("token_classification", "words.csv", "tokens,tags\na b,O O\n", "A csv file has no lists"),
    ],
)
def test_files_that_cannot_hold_the_samples(task: str, name: str, content: str, said: str) -> None:
    Path(name).write_text(content)
    with pytest.raises(UserError, match=said):
        look(task, {"data": name})
