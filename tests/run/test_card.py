"""The card of a model: what it says, and that what it shows can be run."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import logging

from tests.run.small import config_of, pieces_of
from trainer.record.folder import OutputFolder
from trainer.record.made_by import Commit
from trainer.run import card as module
from trainer.run.card import save_card
from trainer.run.saving import save_model
from trainer.tasks.protocol import load_task

SUMMARY: dict[str, Any] = {
    "metrics": {"validation": {"loss": 0.5, "error": 0.25}, "test": {"loss": 0.75}}, "steps": 1200,
    "parameters_sha256": "ab" * 32,
}  # fmt: skip
TASK = """
from tests.run import small


class Task(small.Task):
    def __init__(self, width: int = 1, token: str = ""):
        super().__init__()
"""


def card(path: Path, inexact: tuple[str, ...] = (), summary: dict[str, Any] | None = None, **trainer: Any) -> str:
    pieces, folder = pieces_of(config_of(**trainer)), OutputFolder.claim(str(path / "run"), "test")
    pieces.inexact += inexact
    (folder.path / "model").mkdir()
    save_card(pieces, folder, summary or SUMMARY)
    return (folder.path / "model" / "README.md").read_text()


def test_a_card_says_what_the_model_is_and_how_good(tmp_path: Path) -> None:
    text = card(tmp_path)
    assert text.startswith("---\nlibrary_name: pytorch\ntags: [custom-task, strong-scaling-trainer]\n---\n")
    assert "\n# Task, trained on 30 samples\n" in text
    assert "1,200 steps of 8 samples (strong scaling, micro-batches of 4), seed 0." in text
    assert "| | validation | test |\n|---|---|---|\n| loss | 0.5000 | 0.7500 |\n| error | 0.2500 | nan |\n" in text
    assert f"sha256 `{'ab' * 32}`" in text
    assert "- torch: " in text
    assert text.count("- data of ") == 3
    assert '"train_batch_size": 8' in text
    assert "The model of step" not in text


def test_a_card_names_the_step_that_was_kept(tmp_path: Path) -> None:
    best = {"step": 1100, "metric": "error", "mode": "min", "value": 0.25}
    assert "The model of step 1,100, the best error on validation." in card(tmp_path, summary=SUMMARY | {"best": best})


def test_a_card_without_metrics(tmp_path: Path) -> None:
    assert "## Metrics" in card(tmp_path, summary=SUMMARY | {"metrics": {}})


@pytest.mark.parametrize(
    ("inexact", "trainer", "said"),
    [
        ((), {}, "Exactness: bitwise. Any 1 to 2 ranks give these very bits, on the same device model and versions."),
        (("a differs", "b counts"), {}, "Exactness: tolerance. a differs; b counts"),
        ((), {"train_batch_size": None, "gradient_accumulation_steps": 2}, "Exactness: bitwise. \n"),
    ],
    ids=["strong", "tolerance", "weak"],
)
def test_a_card_promises_what_the_run_can_keep(
    tmp_path: Path, inexact: tuple[str, ...], trainer: dict[str, Any], said: str
) -> None:
    assert said in card(tmp_path, inexact, **trainer)


def test_a_name_in_the_card_is_only_a_text(tmp_path: Path) -> None:
    """A class of the data may have any name, and is part of its metric's."""
    name = "f1 of <script>alert(1)</script> | ![x](http://a/b.png) `\n# no"
    text = card(tmp_path, inexact=("the rank of <b>",), summary=SUMMARY | {"metrics": {"te<i>st": {name: 0.5}}})
    assert r"| f1 of &lt;script&gt;alert(1)&lt;/script&gt; \| !\[x\](http://a/b.png) \` # no | 0.5000 |" in text
    assert "| | te&lt;i&gt;st |" in text
    assert "the rank of &lt;b&gt;" in text


def test_a_card_says_which_code_and_command_made_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "trainer.task_options.token=abc"
    monkeypatch.setattr(
        sys,
        "argv",
        ["trainer/main.py", "--local_rank=0", "--ds_config", "a b.json", "--set", secret, "--resume", "auto"],
    )
    monkeypatch.setattr(module, "commit", lambda: Commit("c0ffee", True))
    text = card(tmp_path, task_options={"token": "abc"})
    wanted = "python trainer/main.py --ds_config 'a b.json' --set trainer.task_options.token=..."
    assert f"```bash\n{wanted}\n```\n" in text
    assert "- git commit of the trainer: c0ffee, with changes that are not committed\n" in text
    assert "abc" not in text.replace("ab" * 32, "")


def test_without_a_checkout_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "commit", lambda: None)
    assert "git commit" not in card(tmp_path)


# What a card shows is run as it stands there, in a folder with the model.


def saved(folder: Path, name: str, options: dict[str, Any]) -> str:
    """The card of an untrained model."""
    task = load_task(name, options)
    pieces = pieces_of(config_of(task=name, task_options=options), task)
    output = OutputFolder.claim(str(folder / "run"), "test")
    assert save_model(pieces, output) is None
    save_card(pieces, output, SUMMARY)
    return (folder / "run" / "model" / "README.md").read_text()


def run(text: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    *_, shown = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(compile(shown, "card", "exec"), names)
    return names


@pytest.fixture
def quiet(own_caches: None, one_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    logging.disable_progress_bar()


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("pair", [None, "second"])
def test_a_classifier_of_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str], pair: str | None) -> None:
    rows = "".join(f"{word} film number {i},more,{word}\n" for i in range(20) for word in ("good", "bad"))
    (tmp_path / "a.csv").write_text("text,second,label\n" + rows)
    model = {
        "model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "intermediate_size": 8, "max_position_embeddings": 16,
    }  # fmt: skip
    text = saved(tmp_path, "text_classification", {"data": "a.csv", "model": model, "pair_column": pair})
    head = "---\nlibrary_name: transformers\npipeline_tag: text-classification\ntags: [text_classification,"
    assert text.startswith(head)
    run(text.replace("a text", "good " * 50))  # longer than the model takes
    assert re.search(r"'label': '(good|bad)', 'score': 0\.", capsys.readouterr().out)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("channels", [(), (3,)], ids=["grey", "colours"])
def test_a_classifier_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str], channels: tuple[int, ...]) -> None:
    draw = np.random.default_rng(0)
    for i in range(8):
        for name in ("cat", "dog"):
            (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
            pixels = draw.integers(0, 256, (8, 8, *channels), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    model = {"model_type": "resnet", "layer_type": "basic", "embedding_size": 4, "hidden_sizes": [4], "depths": [1]}
    text = saved(tmp_path, "image_classification", {"data": "images", "model": model})
    assert "library_name: transformers\npipeline_tag: image-classification\n" in text
    run(text)
    assert re.search(r"'label': '(cat|dog)', 'score': ", capsys.readouterr().out)


@pytest.mark.usefixtures("quiet")
def test_a_language_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("the beginning of a text and its end. " * 40)
    model = {"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 128}
    text = saved(tmp_path, "causal_lm", {"data": "a.txt", "model": model, "sequence_length": 16})
    assert "pipeline_tag: text-generation\n" in text
    run(text)
    assert "{'generated_text': 'the beginning of a text" in capsys.readouterr().out


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    ("name", "options"), [("digits", {"width": 4, "model": "mlp"}), ("mine.py:Task", {"width": 2})]
)
def test_a_model_of_torch(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    (tmp_path / "mine.py").write_text(TASK)
    text = saved(tmp_path, name, options)
    assert "library_name: pytorch\n" in text and "pipeline_tag" not in text
    assert ("task.splits()" in text) == (name != "digits")
    # Digits can predict; the other task cannot.
    model = tmp_path / "run" / "model"
    first = f"python -m trainer predict --model {model} --input NEW_DATA --output predictions.csv\n"
    assert [first in text, f'predict({str(model)!r}, "NEW_DATA")' in text] == [name == "digits"] * 2
    assert text.find("trainer predict") < text.find("load_model")
    names = run(text)
    task = load_task(name, options)
    expected = task.model() if name != "digits" else names["model"]
    assert str(names["model"]) == str(expected) and not names["model"].training
    assert json.loads((tmp_path / "run" / "model" / "trainer.json").read_text())["task_options"] == options
