"""What is found of a model before it is trained: its kind, settings that could not be saved, end tokens, a forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.data import model_checks as checks
from trainer.data import pretrained
from trainer.errors import UserError

LM, TEXTS, IMAGES = "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModelForImageClassification"
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 16, "vocab_size": 12}
TOKENS = {"eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0}
IDS = torch.tensor([[1, 2, 3, 4, 5, 6], [3, 2, 1, 6, 5, 4]])

pytestmark = pytest.mark.usefixtures("one_thread")


def made(spec: dict[str, Any], auto: str = LM) -> Any:
    torch.manual_seed(0)
    return pretrained.build(auto, spec, pretrained.configuration(spec))


@pytest.mark.parametrize(
    ("auto", "model_type", "said"),
    [
        (LM, "t5", r"(?s)t5 is not a causal language model: .*for example, gpt2, llama"),
        (LM, "resnet", "resnet is not a causal language model"),
        (TEXTS, "vit", "vit is not a classifier of texts"),
        (IMAGES, "bert", "bert is not a classifier of images"),
    ],
)
def test_a_model_of_another_kind_is_refused(auto: str, model_type: str, said: str) -> None:
    spec = {"model_type": model_type}
    with pytest.raises(UserError, match=said):
        checks.check_kind(auto, spec, pretrained.configuration(spec), False)


def test_a_configuration_for_another_loss_is_refused() -> None:
    for own in ("single_label_classification", "regression"):
        checks.check_problem_type({"problem_type": own}, own)
        checks.check_problem_type("folder", own)
    with pytest.raises(
        UserError, match=r"model.problem_type\" is 'regression', but .* is 'multi_label_classification'"
    ):
        checks.check_problem_type({"problem_type": "regression"}, "multi_label_classification")


# ---------------------------------------------------------------- settings for generation


@pytest.mark.parametrize(
    ("settings", "left_out"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, ["temperature 0.9", "top_p 0.6"]),
        ({"do_sample": True, "temperature": 0.9}, []),
        ({"do_sample": True, "temperature": 0.9, "early_stopping": True}, ["early_stopping True"]),
        ({"num_beams": 4, "early_stopping": True, "length_penalty": 2.0}, []),
        ({"length_penalty": 2.0, "max_new_tokens": 7}, ["length_penalty 2.0"]),
        ({"num_return_sequences": 3}, ["num_return_sequences 3"]),
        ({"cache_implementation": "none such", "min_new_tokens": 2}, ["cache_implementation 'none such'"]),
        ({"max_new_tokens": -3}, ["max_new_tokens -3"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_settings_that_could_not_be_saved_are_left_out_and_named(
    settings: dict[str, Any], left_out: list[str], tmp_path: Path
) -> None:
    model = made(GPT2)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    notes = [note for note in checks.settle_generation(model, TOKENS | {"eos_token_id": None}) if "invalid" in note]
    assert [note.partition("Left out: ")[2] for note in notes] == ([", ".join(left_out)] if left_out else [])
    model.save_pretrained(tmp_path)  # the whole model, as after training
    kept = json.loads((tmp_path / "generation_config.json").read_text())
    dropped = {text.partition(" ")[0] for text in left_out}
    assert {name: kept[name] for name in settings if name not in dropped} == {
        name: value for name, value in settings.items() if name not in dropped
    }
    assert not any(kept.get(name) == settings[name] for name in dropped)


@pytest.mark.parametrize(
    ("config", "generation", "in_config", "in_generation"),
    [
        (0, 0, 1, [1, 0]),
        (1, 1, 1, 1),
        (None, None, 1, 1),
        (1, [3, 4], 1, [1, 3, 4]),
        ([3, 1], [3, 1], [1, 3], [1, 3]),
        (1, 0, 1, [1, 0]),
    ],
)
def test_the_end_that_is_learnt_stops_generation(
    config: Any, generation: Any, in_config: Any, in_generation: Any
) -> None:
    model = made(GPT2)
    model.config.eos_token_id, model.generation_config.eos_token_id = config, generation
    notes = checks.settle_generation(model, TOKENS)
    assert (model.config.eos_token_id, model.generation_config.eos_token_id) == (in_config, in_generation)
    aligned = 1 in checks._ids(config) and 1 in checks._ids(generation)
    assert [note[:41] for note in notes] == ([] if aligned else ["the tokenizer's end-of-text token is 1, b"])


def test_settings_that_cannot_be_saved_at_all_are_refused_before_training() -> None:
    model = made(GPT2)
    checks.check_saving(model, GPT2)
    model.config.odd = {1, 2}  # no JSON
    with pytest.raises(UserError, match="cannot save the settings of a gpt2 of this configuration"):
        checks.check_saving(model, GPT2)


# ---------------------------------------------------------------- a forward


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "mistral", "gemma", "stablelm"])
def test_sizes_that_do_not_agree_are_found_before_the_run(model_type: str) -> None:
    spec = {"model_type": model_type, **SIZES, "vocab_size": 12}
    with pytest.raises(UserError, match=r"(?s)cannot compute some texts: .*\"num_key_value_heads\": 2 in trainer"):
        checks.tried(made(spec), spec, {"input_ids": IDS}, "some texts")
    right = spec | {"num_key_value_heads": 2}
    assert checks.tried(made(right), right, {"input_ids": IDS}, "some texts").shape == (2, 6, 12)


def test_any_failure_of_a_forward_names_the_sizes_that_were_not_given() -> None:
    spec = {"model_type": "gptj", "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 12}
    with pytest.raises(UserError, match=r"(?s)RuntimeError: .*These are not given here, .*: rotary_dim 64\."):
        checks.tried(made(spec), spec, {"input_ids": IDS}, "some texts")


def test_a_trial_changes_nothing() -> None:
    model = made(GPT2)
    before, state = torch.get_rng_state(), {n: t.clone() for n, t in model.state_dict().items()}
    checks.tried(model, GPT2, {"input_ids": IDS}, "some texts")
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("spec", "causal"),
    [
        (GPT2, True),
        ({"model_type": "bert", **SIZES, "vocab_size": 12}, False),
        ({"model_type": "bert", **SIZES, "vocab_size": 12, "is_decoder": True}, True),
        ({"model_type": "electra", **SIZES, "vocab_size": 12, "embedding_size": 16}, False),
        ({"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "vocab_size": 12}, True),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else None,
)
def test_a_model_that_sees_what_it_is_to_predict_is_refused(spec: dict[str, Any], causal: bool) -> None:
    model = made(spec).eval()

    def logits_of(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    if causal:
        checks.check_causal(IDS[:1], logits_of, spec)
    else:
        with pytest.raises(UserError, match=r"is not causal: .*depend on later tokens"):
            checks.check_causal(IDS[:1], logits_of, spec)
