"""What was saved is loaded again, as others will, and compared with what was trained and measured."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.run.small import PlainEngine, Task, config_of, course_of, pieces_of
from trainer.engine.adapt import adapt
from trainer.errors import TrainerError
from trainer.record.folder import RAW, OutputFolder
from trainer.run.build import Pieces
from trainer.run.finish import finish
from trainer.run.loop import train
from trainer.run.reload import problems
from trainer.run.saving import save_model
from trainer.tasks.causal_lm import CausalLM
from trainer.tasks.image_classification import ImageClassification
from trainer.tasks.text_classification import TextClassification

pytestmark = pytest.mark.usefixtures("one_rank", "own_caches")

GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 16}
BERT = {
    "model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 16,
}  # fmt: skip


class Own(Task):
    """Saves and loads in its own way."""

    def save(self, model: nn.Module, folder: Path) -> None:
        save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "own.safetensors")

    def load(self, folder: Path) -> nn.Module:
        model = self.model()
        model.load_state_dict(load_file(folder / "own.safetensors"))
        return model


class Forgets(Own):
    """Its file lacks BatchNorm's running statistics."""

    def load(self, folder: Path) -> nn.Module:
        model = self.model()
        state = {n: t for n, t in load_file(folder / "own.safetensors").items() if "running" not in n}
        model.load_state_dict(state, strict=False)
        return model


class CannotLoad(Own):
    def load(self, folder: Path) -> nn.Module:
        raise KeyError("layer")


class CannotSave(Task):
    def save(self, model: nn.Module, folder: Path) -> None:
        raise ValueError("GenerationConfig is invalid")


class Predicts(Task):
    """Saved as the trainer does it."""

    def predict(self, model: nn.Module, source: Path, batch_size: int) -> Any:
        yield {}


@pytest.mark.parametrize("task", [Own, Predicts, Task])
def test_what_is_the_same_leaves_nothing_behind(
    task: type[Task], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    course = course_of(tmp_path / "run", task(), max_steps=3)
    train(course)
    assert finish(course)["saved_model"] == "as measured"
    assert not (tmp_path / "run" / RAW).exists()
    assert "WARNING" not in capsys.readouterr().out
    assert course.pieces.engine.model.training


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (
            Forgets,
            "is not the model that was measured: loaded again, its outputs for 8 samples of test differ by up to",
        ),
        (CannotLoad, "was saved, but cannot be loaded: KeyError: 'layer'"),
    ],
)
def test_a_difference_is_said_loudly_and_the_weights_are_kept(
    task: type[Task], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    course = course_of(tmp_path / "run", task(), max_steps=3)
    train(course)
    summary = finish(course)
    assert said in summary["saved_model"][0]
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    console = capsys.readouterr().out
    last = console[console.index("results ") :]
    assert "WARNING: " in last
    assert said in last
    assert f"The trained weights are in {tmp_path / 'run' / RAW}" in last
    kept, state = load_file(tmp_path / "run" / RAW), course.pieces.engine.model_state()
    assert all(torch.equal(kept[name], tensor) for name, tensor in state.items())


def test_a_model_that_cannot_be_saved_costs_neither_weights_nor_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    course = course_of(tmp_path / "run", CannotSave(), max_steps=3)
    train(course)
    with pytest.raises(TrainerError, match="could not be saved in its own format: ValueError: Generation") as caught:
        finish(course)
    assert caught.value.agreed
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary["metrics"]) == {"validation", "test"}
    assert set(load_file(tmp_path / "run" / RAW)) == set(course.pieces.engine.model_state())
    assert "WARNING: The model could not be saved" in capsys.readouterr().out


def test_a_check_that_itself_fails_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: Any) -> Any:
        raise MemoryError("none left")

    monkeypatch.setattr("trainer.run.finish.problems", no_memory)
    course = course_of(tmp_path / "run", Own(), max_steps=3)
    train(course)
    assert "could not be compared with the trained model: MemoryError" in finish(course)["saved_model"][0]
    assert (tmp_path / "run" / RAW).exists()


# ---------------------------------------------------------------- the ready tasks


def saved(task: type[Any], folder: Path, options: dict[str, Any], **trainer: Any) -> tuple[Pieces, list[str]]:
    """A model with weights that nothing else has, saved; and what is found to be wrong with it."""
    config = config_of(task_options=options, **trainer)
    pieces = pieces_of(config, task(**options))
    model = adapt(pieces.engine.model, config)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    pieces.engine = PlainEngine(model)  # type: ignore[assignment]
    claimed = OutputFolder.claim(str(folder), "test")
    assert save_model(pieces, claimed) is None
    claimed.unlock()
    return pieces, problems(pieces, folder)


@pytest.fixture
def records(tmp_path: Path) -> str:
    rows = [{"prompt": f"{i}+{i % 7}=", "completion": str(i + i % 7)} for i in range(40)]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "records.jsonl")


@pytest.fixture
def base(records: str, tmp_path: Path) -> str:
    """A language model with tied embeddings, in a folder with its tokenizer."""
    task = CausalLM(model=GPT2, data=records)
    task.splits()
    torch.manual_seed(0)
    (tmp_path / "base").mkdir()
    task.save(task.model(), tmp_path / "base")
    return str(tmp_path / "base")


LORA = {"rank": 2, "alpha": 8}
TIED: list[dict[str, Any]] = [
    {"target_modules": ["lm_head", "c_attn"]},
    {"target_modules": ["wte", "c_attn"]},
    {"target_modules": ["wte", "lm_head"]},
    {"target_modules": ["c_attn"], "also_train": ["lm_head"]},
    {"target_modules": ["c_attn"], "also_train": ["wte"]},
    {"target_modules": ["c_attn"], "also_train": ["wte", "lm_head"]},
    {},
]


@pytest.mark.parametrize(
    "lora", TIED, ids=["head", "embedding", "both", "whole-head", "whole-embedding", "whole", "all"]
)
def test_low_rank_updates_of_tied_weights(lora: dict[str, Any], base: str, records: str, tmp_path: Path) -> None:
    """The model and the adapter, loaded with transformers and peft, give what was trained."""
    _, found = saved(CausalLM, tmp_path / "run", {"data": records, "model": base}, lora=LORA | lora)
    assert found == []


def test_an_update_that_reaches_a_tied_weight_would_be_found(
    base: str, records: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.run.saving.merged", lambda model: copy.deepcopy(model).merge_and_unload())
    options = {"data": records, "model": base}
    _, found = saved(CausalLM, tmp_path / "run", options, lora=LORA | {"target_modules": ["lm_head"]})
    assert len(found) == 1
    assert f"{tmp_path / 'run' / 'model'} is not the model that was measured" in found[0]


def test_an_adapter_on_another_base_is_found(base: str, records: str, tmp_path: Path) -> None:
    pieces, found = saved(CausalLM, tmp_path / "run", {"data": records, "model": base}, lora=LORA)
    assert found == []
    weights = load_file(Path(base) / "model.safetensors")
    save_file({n: t + 0.5 for n, t in weights.items()}, Path(base) / "model.safetensors", {"format": "pt"})
    assert [text.partition(" is not")[0] for text in problems(pieces, tmp_path / "run")] == [
        str(tmp_path / "run" / "adapter")
    ]


def test_tied_weights_that_are_all_trained(base: str, records: str, tmp_path: Path) -> None:
    assert saved(CausalLM, tmp_path / "run", {"data": records, "model": base})[1] == []


def test_an_adapter_of_random_weights_is_not_looked_for_in_the_models_folder(
    base: str, records: str, tmp_path: Path
) -> None:
    options = {"data": records, "model": base, "pretrained": False, "tokenizer": "characters"}
    assert saved(CausalLM, tmp_path / "run", options, lora=LORA)[1] == []


@pytest.mark.parametrize("trainer", [{}, {"lora": LORA}, {"freeze": ["bert"]}], ids=["all", "lora", "freeze"])
@pytest.mark.parametrize("was_for", [{"num_labels": 1, "problem_type": "regression"},
                                     {"num_labels": 6, "problem_type": "multi_label_classification"}],
                         ids=["regression", "multi-label"])  # fmt: skip
def test_a_classifier_of_texts_says_what_it_was_trained_for(
    trainer: dict[str, Any], was_for: dict[str, Any], tmp_path: Path
) -> None:
    import transformers

    table = tmp_path / "table.csv"
    table.write_text("text,label\n" + "".join(f"a b {w} {i % 5},{w}\n" for i in range(15) for w in ("x", "y", "z")))
    first = TextClassification(data=str(table), model=BERT)
    first.splits()
    config = transformers.AutoConfig.for_model(**BERT, **was_for, vocab_size=first._facts["tokens"]["vocab_size"])
    folder = tmp_path / "base"
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    first._tokenizer().save_pretrained(folder)
    options = {"data": str(table), "model": str(folder), "new_head": True}
    _, found = saved(TextClassification, tmp_path / "run", options, **trainer)
    assert found == []
    pipe = transformers.pipeline("text-classification", model=str(tmp_path / "run" / "model"), top_k=None)
    (scores,) = pipe(["a b x 1"])
    assert {score["label"] for score in scores} == {"x", "y", "z"}
    assert sum(score["score"] for score in scores) == pytest.approx(1.0)


def test_a_classifier_of_grey_images_works_in_a_pipeline(tmp_path: Path) -> None:
    import numpy as np
    import transformers
    from PIL import Image

    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(generator.integers(0, 255, (16, 16), dtype=np.uint8)).save(
                tmp_path / "images" / name / f"{i}.png"
            )
    model = {"model_type": "resnet", "layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8], "depths": [1]}
    options = {"data": str(tmp_path / "images"), "model": model}
    pieces, found = saved(ImageClassification, tmp_path / "run", options)
    assert found == []
    file = str(tmp_path / "images" / "cat" / "0.png")
    pipe = transformers.pipeline("image-classification", model=str(tmp_path / "run" / "model"))
    image = torch.from_numpy(np.array(Image.open(file)))[None, None]
    batch: dict[str, Tensor] = {"image": image}
    with torch.no_grad():
        wanted = pieces.task.forward(pieces.engine.model.eval(), batch).softmax(1)[0]
    got = {score["label"]: score["score"] for score in pipe(file)}
    assert [got["cat"], got["dog"]] == pytest.approx(wanted.tolist(), abs=1e-4)


def test_the_settings_of_an_invalid_base_do_not_cost_the_model(base: str, records: str, tmp_path: Path) -> None:
    file = Path(base) / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.9, "top_p": 0.6}))
    pieces, found = saved(CausalLM, tmp_path / "run", {"data": records, "model": base})
    assert found == []
    assert any("generation_config.json is invalid" in note for note in pieces.task.notes)  # type: ignore[attr-defined]
