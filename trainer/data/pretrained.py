"""Models of the transformers library: from a folder, a hub name, or a configuration. Errors say what to do.

Weights are read only from safetensors, so no file is unpickled. Code that comes with a model runs only if the config
allows it (`trust_remote_code`).
"""

from __future__ import annotations

import contextlib
import json
import logging as python_logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError

Spec = str | Mapping[str, Any]

OPTION = '"trainer.task_options.model"'


def check_spec(spec: Any, kind: str, example: str) -> None:
    """Raises UserError unless a `model` option is a folder, a hub name or a configuration with a known model_type."""
    if isinstance(spec, str) and spec:
        return
    if not isinstance(spec, Mapping) or not isinstance(spec.get("model_type"), str):
        raise UserError(
            f"{OPTION} is {spec!r}. It must be a folder or hub name of a {kind}, or a configuration to build "
            f"one from, such as {example}."
        )


def reason(error: Exception) -> str:
    """The first line of an error's text that is not empty; with the next line if it ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


@contextlib.contextmanager
def _told(spec: Spec) -> Iterator[None]:
    """Turns the exceptions of transformers for a folder or name into one message that says what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # many types are possible, depending on the library and the damage
        why = reason(error)
        if isinstance(spec, str) and not Path(spec).expanduser().is_dir():
            raise UserError(
                f'{OPTION}: "{spec}" is not a folder here, and the model hub gives nothing for this name: {why}\n'
                "Without a network, give the path of a local folder that holds config.json and model.safetensors."
            ) from error
        if isinstance(spec, str) and "trust_remote_code" in str(error):
            raise UserError(
                f"{OPTION}: {spec} comes with Python code of its own. It runs only if the config says "
                '"trust_remote_code": true in trainer.task_options. Read that code first.'
            ) from error
        shown = spec if isinstance(spec, str) else json.dumps(spec)
        raise UserError(f"{OPTION}: {shown} cannot be used: {why}") from error


def trust_note(trusted: bool, *specs: Any) -> list[str]:
    """A sentence for a task's notes: which Python code a config allows to run."""
    named = dict.fromkeys(spec for spec in specs if isinstance(spec, str))
    if not trusted or not named:
        return []
    return [f"trust_remote_code is on: Python code that comes with {' and '.join(named)} may run here"]


def where(spec: str) -> str:
    """The argument for from_pretrained: a local folder's path, or the unchanged hub name."""
    path = Path(spec).expanduser()
    return str(path) if path.exists() else spec


def configuration(spec: Spec, trust_remote_code: bool = False, attention: str | None = None, **changes: Any) -> Any:
    """The transformers configuration that a `model` option describes, with changes applied.

    `attention` is transformers' attn_implementation, None for the model's default.

    Raises:
        UserError: there is none, its model_type or a value is unknown, or it names code that is not trusted.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if attention is not None:
        changes["attn_implementation"] = attention
    if isinstance(spec, Mapping):
        from ..config.schema import near

        values = dict(spec)
        model_type = values.pop("model_type")
        if model_type not in CONFIG_MAPPING:
            raise UserError(
                f'{OPTION}: unknown model_type "{model_type}". {near(model_type, list(CONFIG_MAPPING.keys()))}'
            )
        known = AutoConfig.for_model(model_type).to_dict()
        for name in values:
            # attribute_map: n_embd and hidden_size name the same thing.
            if name not in known and name not in {"num_labels", *(CONFIG_MAPPING[model_type].attribute_map or {})}:
                raise UserError(f'{OPTION}: unknown key "{name}" for {model_type}. {near(name, list(known))}')
        with _told(spec):
            config = AutoConfig.for_model(model_type, **(values | changes))
    else:
        with _told(spec), quiet():
            config = AutoConfig.from_pretrained(where(spec), trust_remote_code=trust_remote_code, **changes)
    if not trust_remote_code:
        _refuse_kernels(config)
    return config


def _refuse_kernels(config: Any) -> None:
    """Raises UserError if an option, or the config.json of a model, names code to fetch from the hub (owner/name)."""
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        for kind in ("_attn_implementation", "_experts_implementation"):
            value = getattr(part, kind, None)
            if isinstance(value, str) and "/" in value:
                raise UserError(
                    f"{kind[1:]} is {value}: code that transformers would fetch from the model hub and run. It runs "
                    'only if the config says "trust_remote_code": true in trainer.task_options. Read that code first.\n'
                    '"trainer.task_options.attention" can name another one, such as "sdpa".'
                )


def build(
    auto: str,
    spec: Spec,
    config: Any,
    *,
    pretrained: bool = True,
    classes: Sequence[str] | None = None,
    new_head: bool = False,
    trust_remote_code: bool = False,
    notes: list[str] | None = None,
) -> nn.Module:
    """A model in float32, on the CPU.

    Args:
        auto: the Auto class: "AutoModelForSequenceClassification", ...
        spec: the `model` option.
        config: from `configuration`, with the number of classes set.
        pretrained: read weights, if `spec` names a folder or the hub. Otherwise only the configuration is used.
        classes: the classes of the data, for the messages of a classifier.
        new_head: replace a head that was trained for another number of classes.
        trust_remote_code: run Python code that comes with the model.
        notes: takes a sentence on weights that the folder lacks.

    Raises:
        UserError: no weights, weights of another shape, or anything that transformers cannot load.
    """
    import transformers

    cls = getattr(transformers, auto)
    if isinstance(spec, Mapping) or not pretrained:
        with _told(spec):
            return cls.from_config(config, trust_remote_code=trust_remote_code, dtype=torch.float32)
    folder = Path(spec).expanduser()
    if folder.is_dir():
        _check_weights(folder)
    with _told(spec), quiet():
        model, loading = cls.from_pretrained(
            where(spec),
            config=config,
            trust_remote_code=trust_remote_code,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are reported below, in our words
            output_loading_info=True,
        )
    mismatched = list(loading["mismatched_keys"])
    if mismatched and not (new_head and classes is not None):
        name, has, wanted = mismatched[0]
        if classes is not None and wanted and wanted[0] == len(classes):
            raise UserError(
                f"{OPTION}: {spec} was trained for {has[0]} classes, but the data has {len(classes)} "
                f"({', '.join(list(classes)[:10])}).\nTo replace its last layer by a new one, set "
                '"new_head": true in trainer.task_options.'
            )
        raise UserError(f"{OPTION}: {name} of {spec} has the shape {tuple(has)}, but the model needs {tuple(wanted)}.")
    missing = sorted([*loading["missing_keys"], *(name for name, *_ in mismatched)])
    if missing and notes is not None:
        notes.append(f"{spec} has no weights for {', '.join(missing)}: they are initialised from the seed")
    return model


def _check_weights(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise UserError(
            f"{OPTION}: the weights in {folder} are pickled (.bin or .pt). Such files can run code, so they are not "
            "loaded.\nIf you trust them, convert them once: load the model with transformers and call "
            "save_pretrained, which writes model.safetensors."
        )
    raise UserError(
        f"{OPTION}: {folder} has no weights (no .safetensors file).\n"
        'To train its architecture from scratch, set "pretrained": false in trainer.task_options.'
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences what transformers prints on every rank, such as a report of missing weights: the trainer says it."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    python_logging.getLogger("huggingface_hub").setLevel(python_logging.ERROR)  # it warns of each retry
    try:
        yield
    finally:
        logging.set_verbosity(before)


def tokenizer_of(spec: str, trust_remote_code: bool = False, **options: Any) -> Any:
    """The fast tokenizer in a folder or under a hub name. Raises UserError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(where(spec), trust_remote_code=trust_remote_code, use_fast=True, **options)
    except Exception as error:  # tokenizers raises plain Exception for a damaged tokenizer.json
        raise UserError(
            f'"trainer.task_options.tokenizer": there is no tokenizer in "{spec}": {reason(error)}\n'
            "Give a folder that holds tokenizer.json, or one of the tokenizers that are built from the training text."
        ) from error


def load_saved(auto: str, folder: Path) -> nn.Module:
    """The model that a run saved in a folder, in evaluation mode. Raises UserError."""
    import transformers

    _check_weights(folder)
    config = configuration(str(folder))
    with _told(str(folder)), quiet():
        model, loading = getattr(transformers, auto).from_pretrained(
            str(folder), config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers would initialise them at random
        raise UserError(f"The model in {folder} is damaged: its weights lack {', '.join(missing[:5])}.")
    # In memory of their own. In the file's memory they may begin at any address, and a math library may choose by the
    # address a kernel that rounds in another way.
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model.eval()
