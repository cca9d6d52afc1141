"""What `predict` writes, and which code it runs: with models made by hand, as whole runs are tested elsewhere."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from trainer.commands.cli import main

TASK = """
import torch
from torch import nn


class Doubles:
    def __init__(self, scale: float = 2.0):
        self.scale = scale
        self.notes = ["numbers are doubled"]

    def splits(self):
        raise AssertionError("nobody needs the training data")

    def model(self):
        return nn.Sequential(nn.Linear(1, 1, bias=False), nn.Dropout(0.5))

    def forward(self, model, batch):
        return model(batch["x"])

    def loss(self, outputs, batch):
        return outputs.sum(), len(outputs)

    def metrics(self, outputs, batch):
        return {}

    def predict(self, model, source, batch_size):
        lines = source.read_text().split()
        for start in range(0, len(lines), batch_size):
            part = lines[start : start + batch_size]
            out = self.scale * model(torch.tensor([[float(line)] for line in part])).squeeze(1)
            assert not out.requires_grad
            for line, value in zip(part, out.tolist()):
                yield {"name": f"no. {line}, ü", "value": value, "of": len(part)}


class Mute(Doubles):
    predict = None


class Breaks(Doubles):
    def predict(self, model, source, batch_size):
        yield from super().predict(model, source, 1)
        raise OSError(28, "No space left on device")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a task's file, a run's output folder and an input of three numbers."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks.py").write_text(TASK)
    (tmp_path / "in.txt").write_text("1\n2\n3\n")
    (tmp_path / "run" / "model").mkdir(parents=True)
    save_file({"0.weight": torch.tensor([[10.0]])}, tmp_path / "run" / "model" / "model.safetensors")
    say_origin(tmp_path, task="elsewhere/tasks.py:Doubles", task_options={"scale": 3.0})
    return tmp_path


def say_origin(folder: Path, **values: Any) -> None:
    (folder / "run" / "model" / "trainer.json").write_text(json.dumps(values))


def predict(*arguments: str, task: str | None = "tasks.py:Doubles") -> int:
    named = ["--task", task] if task else []
    return main(["predict", "--model", "run", "--input", "in.txt", *named, *arguments])


ROWS = [{"name": f"no. {i}, ü", "value": 30.0 * i, "of": 2 if i < 3 else 1} for i in (1, 2, 3)]


def test_rows_on_the_console(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model is in evaluation (no dropout), has the run's options, and notes of the task are no rows."""
    assert predict("--batch_size", "2") == 0
    out, err = capsys.readouterr()
    assert list(csv.DictReader(out.splitlines())) == [{k: str(v) for k, v in row.items()} for row in ROWS]
    assert err == "note: numbers are doubled\n"
    assert predict("--batch_size", "2", "--format", "jsonl") == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == ROWS


@pytest.mark.parametrize(
    ("name", "flags", "kind"),
    [
        ("out.csv", (), "csv"),
        ("out.txt", (), "csv"),
        ("out.jsonl", (), "jsonl"),
        ("out.json", (), "jsonl"),
        ("out.json", ("--format", "csv"), "csv"),
        ("out.csv", ("--format", "jsonl"), "jsonl"),
    ],
)
def test_rows_in_a_file(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, flags: tuple[str, ...], kind: str
) -> None:
    assert predict("--output", name, *flags, "--batch_size", "2") == 0
    assert capsys.readouterr() == ("", f"note: numbers are doubled\n3 predictions in {name}\n")
    text = (folder / name).read_text(encoding="utf-8")
    assert "ü" in text and "\r" not in text
    if kind == "csv":
        assert list(csv.DictReader(text.splitlines())) == [{k: str(v) for k, v in row.items()} for row in ROWS]
    else:
        assert [json.loads(line) for line in text.splitlines()] == ROWS


def test_the_models_folder_itself_may_be_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--model", "run/model", "--input", "in.txt", "--task", "tasks.py:Doubles"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_a_tasks_own_way_to_load(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "run" / "model" / "model.safetensors").unlink()
    with (folder / "tasks.py").open("a") as file:
        file.write(
            "\n\nclass Loads(Doubles):\n    def load(self, folder):\n"
            "        assert (folder / 'trainer.json').is_file()\n        return nn.Identity()\n"
        )
    assert predict("--format", "jsonl", task="tasks.py:Loads") == 0
    assert [json.loads(line)["value"] for line in capsys.readouterr().out.splitlines()] == [3.0, 6.0, 9.0]


def test_a_models_folder_does_not_choose_which_code_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n" + TASK)
    say_origin(folder, task="evil.py:Doubles", task_options={})
    assert predict(task=None) == 2
    said = capsys.readouterr().err
    assert "This model belongs to a user's own task, evil.py:Doubles. Add --task path/to/file.py:ClassName." in said
    assert predict() == 0
    assert not (folder / "ran").exists()


def say_code(folder: Path, file: Path, name: str = "Doubles") -> None:
    """What a run notes of a task of one's own: where its code is, and its hash."""
    (folder / "run" / "manifest.json").write_text("{}")
    say_origin(
        folder, task=f"moved/{file.name}:{name}", task_options={"scale": 3.0}, task_file=str(file.resolve()),
        task_sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
    )  # fmt: skip


def test_the_folder_of_a_run_is_enough_for_a_task_of_ones_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say_code(folder, folder / "tasks.py")
    assert predict("--format", "jsonl", "--batch_size", "2", task=None) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == ROWS
    assert main(["predict", "--model", "run/model", "--input", "in.txt"]) == 0


def test_a_task_without_predict_is_told_what_to_write(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say_code(folder, folder / "tasks.py", "Mute")
    assert predict(task=None) == 2
    assert "Add one to the class:\n    def predict(self, model, source, batch_size):" in capsys.readouterr().err


def test_only_the_code_that_made_a_run_is_run_unasked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever gives away a folder knows neither the files of this machine nor can bring some along."""
    evil = f"open({str(folder / 'ran')!r}, 'w')\n" + TASK
    (folder / "run" / "evil.py").write_text(evil)
    say_code(folder, folder / "run" / "evil.py")
    assert predict(task=None) == 2
    assert "is not there now. Add --task" in capsys.readouterr().err
    say_code(folder, folder / "tasks.py")
    (folder / "tasks.py").write_text(evil)
    assert predict(task=None) == 2
    said = capsys.readouterr().err
    assert "has changed since the model was trained. To use the code as it is now, add --task" in said
    assert f"--task {folder / 'tasks.py'}:Doubles" in said
    (folder / "tasks.py").unlink()
    assert predict(task=None) == 2
    assert "is not there now. Add --task" in capsys.readouterr().err
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("change", "flags", "words"),
    [
        ({}, ("--batch_size", "0"), "--batch_size 0: it must be at least 1."),
        ({}, ("--model", "nowhere"), "--model nowhere holds no model of this trainer: there is no trainer.json in it"),
        ({}, ("--input", "nowhere.txt"), "--input nowhere.txt does not exist (looked from "),
        ({}, ("--output", "./in.txt"), "--output ./in.txt is the input itself, which would be overwritten"),
        ({}, ("--output", "no/such/out.csv"), "--output no/such/out.csv cannot be written: No such file or directory."),
        ({}, ("--task", "tasks.py:Mute"), "The task tasks.py:Mute has no method predict(), so it cannot predict"),
        ({}, ("--task", "tasks.py:Double"), 'Did you mean "Doubles"?'),
        ({"task": 3}, (), "trainer.json is damaged: it must name a task and its options."),
        ({"task_options": None}, (), "trainer.json is damaged"),
    ],
)
def test_what_cannot_be_predicted(
    folder: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], flags: tuple[str, ...], words: str
) -> None:
    say_origin(folder, **({"task": "elsewhere/tasks.py:Doubles", "task_options": {}} | change))
    before = (folder / "in.txt").read_bytes()
    assert predict(*flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and words in err
    assert (folder / "in.txt").read_bytes() == before


@pytest.mark.parametrize(
    "output", ["./in.txt", "link.txt", "texts/a.txt", "run/model/model.safetensors", "m/trainer.json"]
)
def test_no_file_of_the_input_or_the_model_is_overwritten(
    folder: Path, capsys: pytest.CaptureFixture[str], output: str
) -> None:
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("1\n")
    (folder / "link.txt").symlink_to("in.txt")
    (folder / "m").symlink_to("run/model")
    before = (folder / output).read_bytes()
    assert predict("--output", output, *(("--input", "texts") if output.startswith("texts") else ())) == 2
    assert "would be overwritten" in (err := capsys.readouterr().err) or "is a file in the folder of --" in err
    assert (folder / output).read_bytes() == before


FORMULAS = ["=HYPERLINK(1)", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\uff1d1+1"]


@pytest.mark.parametrize("text", [*FORMULAS, "-1.5", "+3", "-", "+", "a=b", "", "-1e-3", "'=1", "a\rb"])
def test_a_spreadsheet_runs_no_text_of_the_data(folder: Path, text: str) -> None:
    """Numbers, signs alone and json lines stay as they are."""
    with (folder / "tasks.py").open("a") as file:
        file.write(
            "\n\nclass Says(Doubles):\n    def predict(self, model, source, batch_size):\n"
            f"        yield {{'label': {text!r}, '=x': -0.5}}\n"
        )
    assert predict("--output", "out.csv", task="tasks.py:Says") == 0
    with (folder / "out.csv").open(newline="", encoding="utf-8") as file:
        header, row = csv.reader(file)
    assert header == ["label", "'=x"]
    shown = text.replace("\r", "\n")
    assert row == [f"'{shown}" if text in FORMULAS else shown, "-0.5"]
    assert predict("--output", "out.jsonl", task="tasks.py:Says") == 0
    assert json.loads((folder / "out.jsonl").read_text()) == {"label": text, "=x": -0.5}


@pytest.mark.parametrize("damage", ["no file", "no safetensors", "another shape"])
def test_weights_that_do_not_fit_are_named(folder: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    file = folder / "run" / "model" / "model.safetensors"
    file.unlink()
    if damage == "no safetensors":
        file.write_bytes(b"12345678 and no header")
    if damage == "another shape":
        save_file({"0.weight": torch.ones(2, 1)}, file)
    assert predict() == 2
    assert "run/model/model.safetensors cannot be loaded into the task's model: " in capsys.readouterr().err


def test_predictions_that_fail_halfway_leave_the_old_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "out.csv").write_text("precious\n")
    assert predict("--output", "out.csv", "--overwrite", task="tasks.py:Breaks") == 2
    assert "--output out.csv cannot be written: No space left on device." in capsys.readouterr().err
    assert (folder / "out.csv").read_text() == "precious\n"
    assert not [name for name in os.listdir(folder) if name.startswith(".out.csv")]


def test_a_gpu_that_is_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict("--device", "cuda") == 2
    assert "--device cuda, but torch finds no GPU on this machine." in capsys.readouterr().err
    assert predict("--device", "auto") == 0


def test_a_file_is_replaced_only_if_that_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "out.csv").write_text("mine")
    assert predict("--output", "out.csv") == 2
    assert "--output out.csv exists. Name another file, or add --overwrite" in capsys.readouterr().err
    assert (folder / "out.csv").read_text() == "mine"
    assert predict("--output", "out.csv", "--overwrite") == 0
    assert len((folder / "out.csv").read_text().splitlines()) == 4
