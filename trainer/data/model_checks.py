"""Checks of a transformers model before it is trained: its kind, its settings, and that it computes.

Without them, the same faults would show later: in the first step, when the model is saved, or when it is used.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .pretrained import OPTION, Spec, quiet, reason

# What each Auto class is, and a few types that it knows.
KINDS = {
    "AutoModelForCausalLM": ("causal language model", "gpt2, llama, qwen2 or mistral"),
    "AutoModelForSequenceClassification": ("classifier of texts", "bert, distilbert, roberta or deberta-v2"),
    "AutoModelForTokenClassification": ("tagger of words", "bert, distilbert, roberta or deberta-v2"),
    "AutoModelForImageClassification": ("classifier of images", "resnet, vit, convnext or swin"),
    "AutoModelForAudioClassification": (
        "classifier of audio",
        "wav2vec2, hubert, wavlm or audio-spectrogram-transformer",
    ),
}
# Settings of a configuration that are sizes, for the message.
_SIZES = re.compile(r"(head|size|dim|layers|rank|groups|experts|width|depth|channels|embd|inner)")


def check_kind(auto: str, spec: Spec, config: Any, trust_remote_code: bool) -> None:
    """Raises UserError if an Auto class of transformers has no model for a configuration."""
    import transformers

    own_code = auto in (getattr(config, "auto_map", None) or {})
    if type(config) in getattr(transformers, auto)._model_mapping or (own_code and trust_remote_code):
        return
    kind, examples = KINDS[auto]
    which = f"{config.model_type}" if isinstance(spec, Mapping) else f"{spec}, a {config.model_type},"
    raise UserError(
        f"{OPTION}: {which} is not a {kind}: transformers has no {auto} of this type.\nTypes that it has are, for "
        f"example, {examples}."
    )


def check_problem_type(spec: Spec, wanted: str) -> None:
    """Raises UserError if a configuration asks for another loss than the option `problem_type`."""
    given = spec.get("problem_type") if isinstance(spec, Mapping) else None
    if given not in (None, wanted):
        raise UserError(
            f'"trainer.task_options.model.problem_type" is {given!r}, but "trainer.task_options.problem_type" is '
            f"{wanted!r}. Leave the first one out: it follows from the second."
        )


def settle_generation(model: nn.Module, tokens: Mapping[str, Any]) -> list[str]:
    """Makes a language model's settings for generation valid, and its special tokens those of the tokenizer.

    There are two reasons. transformers loads invalid settings, but refuses to save them. And a model that has learnt to
    end with the tokenizer's end-of-text token never stops if its settings name another one.

    Args:
        model: its configuration and settings are changed in place.
        tokens: from `text.facts_of`.

    Returns:
        Notes on what was changed.
    """
    generation, config = getattr(model, "generation_config", None), model.config.get_text_config()  # type: ignore[operator,union-attr]
    notes: list[str] = []
    if generation is not None:
        dropped = _dropped_settings(generation)
        if dropped:
            notes.append(
                "the model's generation_config.json is invalid, so transformers could not save it again. Left out: "
                + ", ".join(f"{name} {value!r}" for name, value in dropped.items())
            )
    end = tokens["eos_token_id"]
    if end is not None:
        said = [_ids(getattr(of, "eos_token_id", None)) for of in (config, generation) if of is not None]
        if any(end not in ids for ids in said):
            before = " and ".join(dict.fromkeys(" or ".join(map(str, ids)) or "none" for ids in said))
            notes.append(
                f"the tokenizer's end-of-text token is {end}, but the model's settings said {before}. Now they say "
                f"{end}, too, so generation stops"
            )
        config.eos_token_id = _with(end, config.eos_token_id) if isinstance(config.eos_token_id, list) else end
        if generation is not None:
            generation.eos_token_id = _with(end, generation.eos_token_id)  # any of them stops
    start = tokens["bos_token_id"]
    for of in (config, generation):
        if of is not None and start is not None and getattr(of, "bos_token_id", start) != start:
            of.bos_token_id = start
    if generation is not None and tokens["pad_token_id"] is not None:
        generation.pad_token_id = tokens["pad_token_id"]
    return notes


def _ids(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _with(first: int, others: Any) -> int | list[int]:
    ids = [first, *(i for i in _ids(others) if i != first)]
    return first if len(ids) == 1 else ids


def _dropped_settings(generation: Any) -> dict[str, Any]:
    """Resets the settings with which transformers would refuse to save, and returns them. The others stay."""
    if _is_valid(generation):
        return {}
    usual = type(generation)().__dict__
    own = {name: value for name, value in vars(generation).items() if name[:1] != "_" and value != usual.get(name)}
    for name in own:
        setattr(generation, name, usual.get(name))
    dropped = {}
    # do_sample and num_beams first: others are valid only with them.
    for name in sorted(own, key=lambda name: (name not in ("do_sample", "num_beams"), name)):
        setattr(generation, name, own[name])
        if not _is_valid(generation):
            setattr(generation, name, usual.get(name))
            dropped[name] = own[name]
    return dropped


def _is_valid(generation: Any) -> bool:
    try:
        with quiet():
            generation.validate(strict=True)
    except Exception:  # of several kinds: a comparison of a text with a number is a TypeError
        return False
    return True


def check_saving(model: nn.Module, spec: Spec) -> None:
    """Raises UserError if transformers cannot save a model's settings. Its weights are not written."""
    parts: Sequence[Any] = [model.config, getattr(model, "generation_config", None)]
    with tempfile.TemporaryDirectory() as folder, quiet():
        for part in parts:
            try:
                if part is not None:
                    part.save_pretrained(folder)
            except OSError:  # of the disk
                raise
            except Exception as error:  # of many kinds, by the setting
                raise UserError(
                    f"{OPTION}: transformers cannot save the settings of {_named(spec)}: {reason(error)}\n"
                    f"Correct its {'generation_config' if part is not model.config else 'config'}.json."
                ) from error


def tried(model: nn.Module, spec: Spec, inputs: Mapping[str, Tensor], what: str, advice: str = "") -> Tensor:
    """The logits of a few samples. A model that cannot compute them is found here, not only in the first step.

    Args:
        model: in training mode before and afterwards.
        spec: the option `model`.
        inputs: what forward takes; on the CPU.
        what: what the inputs are, for the message.
        advice: a sentence for the message.

    Raises:
        UserError: the model raises an exception, or returns no logits.
    """
    model.eval()
    try:
        # Draws of a model in its forward must not change those of training.
        with torch.random.fork_rng(devices=[]), torch.no_grad(), quiet():
            return model(**inputs).logits
    except Exception as error:  # of any kind: it is code of others
        shown = f"{type(error).__name__}: {reason(error)}" if str(error) else type(error).__name__
        raise UserError(
            f"{OPTION}: {_named(spec)} cannot compute {what}: {shown}\n" + (advice or _advice(spec, model.config))
        ) from error
    finally:
        model.train()


def check_causal(ids: Tensor, logits_of: Callable[[Tensor], Tensor], spec: Spec) -> None:
    """Raises UserError if a language model sees the tokens that it is to predict, as a BERT does.

    Args:
        ids: (1, tokens) int64, at least two tokens.
        logits_of: ids -> (1, tokens, vocabulary).
        spec: the option `model`.
    """
    # If only the last token changes, the outputs for all earlier ones must stay.
    other = ids.clone()
    other[0, -1] = 0 if int(ids[0, -1]) else 1
    before, after = logits_of(ids)[0, :-1], logits_of(other)[0, :-1]
    if (before - after).abs().max() > 1e-5 * before.abs().max():
        raise UserError(
            f"{OPTION}: {_named(spec)} is not causal: its outputs for a token depend on later tokens, which it should "
            'predict. Take a causal model such as gpt2. For models like bert, set "is_decoder": true in the '
            "configuration."
        )


def _named(spec: Spec) -> str:
    return spec if isinstance(spec, str) else f"a {spec['model_type']} of this configuration"


def _advice(spec: Spec, config: Any) -> str:
    """What to change in a configuration. A size that is not given is that of the type's first model."""
    if not isinstance(spec, Mapping):
        return "Its files do not belong together, or this version of transformers cannot use them."
    heads, groups = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(groups, int) and groups and heads % groups:
        return (
            f"num_key_value_heads is {groups}{'' if 'num_key_value_heads' in spec else ', the usual one of its type'}, "
            f"and num_attention_heads ({heads}) is no multiple of it. Set "
            f'"num_key_value_heads": {heads} in trainer.task_options.model, or a divisor of it.'
        )
    also = {own for own, other in (config.attribute_map or {}).items() if other in spec}
    usual = [
        f"{name} {value}"
        for name, value in config.to_dict().items()
        if name not in spec
        and name not in also
        and _SIZES.search(name)
        and isinstance(value, int)
        and value > 1
        and name not in ("vocab_size", "type_vocab_size")
    ]
    return (
        "The sizes of a configuration must agree. These are not given here, so they are those of the first model of "
        f"its type: {', '.join(usual[:12])}."
        if usual
        else "The sizes of a configuration must agree."
    )
