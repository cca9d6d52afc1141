"""Saves the trained model in its library's own format, with all that is needed to use it, and a model card."""

from __future__ import annotations

import contextlib
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

from torch import nn

from ..engine.adapt import merged
from ..errors import UserError
from ..files import to_json, whole_file
from ..record.folder import ORIGIN, RAW, OutputFolder, write_tensors
from .build import Pieces
from .failures import of_the_folder


def save_model(p: Pieces, folder: OutputFolder) -> str | None:
    """Writes <output_dir>/model, and with LoRA <output_dir>/adapter as well. Rank 0; parameters must be whole.

    The weights are first written as they are, beside it: whatever goes wrong in a library's or a task's own way of
    saving, the training is not lost. They stay until `reload.problems` has found the saved model to be the trained one.

    Returns:
        What went wrong, as a sentence; None if all is saved.
    """
    save = getattr(p.task, "save", None)
    adapted = hasattr(p.engine.model, "merge_and_unload")
    # A disk may have room for one copy only. Then the model itself comes first.
    with contextlib.suppress(Exception), whole_file(folder.path / RAW) as raw:
        if save is not None or adapted:
            write_tensors(raw, p.engine.model_state())
    try:
        model = merged(p.engine.model)

        def write(target: Path) -> None:
            if save is None:
                write_tensors(target / "model.safetensors", model.state_dict())
            else:
                save(model, target)
            (target / ORIGIN).write_text(to_json(_origin(p), indent=2) + "\n", encoding="utf-8")

        folder.write_folder("model", write)
        if adapted:
            # With save_embedding_layers, peft would ask the hub whether the vocabulary has grown.
            folder.write_folder(
                "adapter",
                lambda target: p.engine.model.save_pretrained(str(target), save_embedding_layers=False),  # type: ignore[operator]
            )
    except Exception as error:  # of any kind: it is another's code
        if of_the_folder(error, folder) is not None:
            raise
        lines = str(error).strip().splitlines()
        return f"The model could not be saved in its own format: {type(error).__name__}: {lines[0] if lines else ''}"
    return None


def _origin(p: Pieces) -> dict[str, Any]:
    """What made a model. For a task of one's own: where its code lies, and the hash by which it is known again."""
    name = p.config.trainer.task
    origin = {"task": name, "task_options": p.config.trainer.task_options}
    file = Path(name.rpartition(":")[0])
    if ":" in name and file.is_file():
        origin |= {"task_file": str(file.resolve()), "task_sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    return origin


def load_model(task: Any, folder: Path) -> nn.Module:
    """The model in a folder that `save_model` wrote. Raises UserError if it cannot be loaded without a task's `load`.

    Args:
        task: one that was built for this, whose `splits` was not called.
        folder: <output_dir>/model.
    """
    load = getattr(task, "load", None)
    if load is not None:
        model: nn.Module = load(folder)
        return model
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / "model.safetensors"
    try:
        state = load_file(str(file))
        model = task.model()
        model.load_state_dict(state)
    except UserError:
        raise
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip() or type(error).__name__
        raise UserError(f"{file} cannot be loaded into the task's model: {reason.splitlines()[0]}") from error
    return model


def _plain(text: str) -> str:
    """A text of the user's or of the data as it is shown in Markdown: no HTML, link, code or cell of a table."""
    escaped = re.sub(r"([\\`\[\]|])", r"\\\1", html.escape(text, quote=False))
    return " ".join(escaped.split())


def save_card(p: Pieces, folder: OutputFolder, summary: dict[str, Any]) -> None:
    """Writes the model card, model/README.md: the model, its metrics, and how it was trained. Rank 0."""
    trainer, plan = p.config.trainer, p.plan
    sizes = ", ".join(f"{len(split):,} {_plain(name)}" for name, split in p.host_splits.items())
    splits = list(summary["metrics"])
    names = list(dict.fromkeys(name for metrics in summary["metrics"].values() for name in metrics))
    rows = [
        f"| {_plain(name)} | "
        + " | ".join(f"{summary['metrics'][split].get(name, float('nan')):.4f}" for split in splits)
        + " |"
        for name in names
    ]
    kept = summary.get("best")
    lines = [
        "---",
        f"tags: [{trainer.task if ':' not in trainer.task else 'custom-task'}, strong-scaling-trainer]",
        "---",
        "",
        f"# {type(p.task).__name__}, trained on {len(p.host_splits['train']):,} samples",
        "",
        f"Task {_plain(trainer.task)}; {sizes} samples. {summary['steps']:,} steps of {plan.global_batch_size} samples "
        f"({plan.scaling} scaling, micro-batches of {plan.micro_batch_size}), seed {trainer.seed}.",
        *([f"The model of step {kept['step']:,}, the best {_plain(kept['metric'])} on validation."] if kept else []),
        "",
        "## Metrics",
        "",
        f"| | {' | '.join(map(_plain, splits))} |",
        f"|---|{'---|' * len(splits)}",
        *rows,
        "",
        "## How it was trained",
        "",
        f"Exactness: {p.exactness}. "
        + (
            f"Any 1 to {plan.micro_batches} ranks give these very bits, on the same device model and versions."
            if p.exactness == "bitwise" and plan.scaling == "strong"
            else _plain("; ".join(p.inexact))
        ),
        "",
        f"- parameters after the last step: sha256 `{summary['parameters_sha256']}`",
        *[f"- data of {_plain(name)}: sha256 `{split.data_hash()}`" for name, split in p.host_splits.items()],
        *[f"- {name}: {_plain(str(value))}" for name, value in p.facts.items()],
        "",
        "The config as resolved:",
        "",
        "```json",
        json.dumps(p.config.as_dict(), indent=2),
        "```",
    ]
    card = folder.path / "model" / "README.md"
    if card.parent.is_dir():  # not if the model could not be saved
        card.write_text("\n".join(lines) + "\n", encoding="utf-8")
