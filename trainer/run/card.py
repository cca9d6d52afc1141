"""The model card: what a model is, how it is used, how good it is, and how it was trained."""

from __future__ import annotations

import html
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from ..record.folder import CARD, OutputFolder
from ..record.made_by import command, commit, without_secrets
from .build import Pieces


def _plain(text: str) -> str:
    """A text of the user or of the data, escaped for Markdown: it cannot make HTML, a link, code or a table cell."""
    escaped = re.sub(r"([\\`\[\]|])", r"\\\1", html.escape(text, quote=False))
    return " ".join(escaped.split())


def save_card(p: Pieces, folder: OutputFolder, summary: dict[str, Any]) -> None:
    """Writes the model card, model/README.md. Rank 0."""
    model = folder.path / "model"
    if not model.is_dir():  # the model could not be saved
        return
    trainer, plan = p.config.trainer, p.plan
    sizes = ", ".join(f"{len(split):,} {_plain(name)}" for name, split in p.host_splits.items())
    kept = summary.get("best")
    lines = [
        *_head(p, model),
        "",
        f"# {type(p.task).__name__}, trained on {len(p.host_splits['train']):,} samples",
        "",
        f"Task {_plain(trainer.task)}; {sizes} samples. {summary['steps']:,} steps of {plan.global_batch_size} samples "
        f"({plan.scaling} scaling, micro-batches of {plan.micro_batch_size}), seed {trainer.seed}.",
        *([f"The model of step {kept['step']:,}, the best {_plain(kept['metric'])} on validation."] if kept else []),
        "",
        "## How to use it",
        "",
        *_usage(p, model),
        "",
        "## Metrics",
        "",
        *_metrics(summary["metrics"]),
        "",
        "## How it was trained",
        "",
        *_training(p, summary),
    ]
    (model / CARD).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _of_transformers(model: Path) -> bool:
    """Whether a model was saved as transformers saves them."""
    try:
        return "architectures" in json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _head(p: Pieces, model: Path) -> list[str]:
    """What model hubs read."""
    name, tag = p.config.trainer.task, getattr(p.task, "pipeline_tag", None)
    return [
        "---",
        f"library_name: {'transformers' if _of_transformers(model) else 'pytorch'}",
        *([f"pipeline_tag: {tag}"] if isinstance(tag, str) and re.fullmatch(r"[a-z0-9-]+", tag) else []),
        f"tags: [{name if ':' not in name else 'custom-task'}, strong-scaling-trainer]",
        "---",
    ]


# What a pipeline of transformers is called with.
_CALLS = {
    "text-classification": '"a text", truncation=True',
    "image-classification": '"picture.png"',
    "token-classification": '"a text", aggregation_strategy="first"',
    "text-generation": '"the beginning of a text", max_new_tokens=50',
}


def _usage(p: Pieces, model: Path) -> list[str]:
    """Lines that predict, with data prepared as in training; if the task cannot do that, lines that load the model."""
    tag, options = getattr(p.task, "pipeline_tag", None), p.config.trainer.task_options
    if tag in _CALLS and _of_transformers(model):
        call = _CALLS[tag]
        if options.get("pair_column") is not None:
            call = '{"text": "a text", "text_pair": "the second text"}, truncation=True'
        if tag == "text-classification" and options.get("problem_type") == "multi_label_classification":
            call += ", top_k=None"  # every label, not the likeliest alone
        return [
            "```python",
            "from transformers import pipeline",
            "",
            f"model = pipeline({json.dumps(tag)}, model={str(model)!r})",
            f"print(model({call}))",
            "```",
        ]
    return [*(_predicting(model) if callable(getattr(p.task, "predict", None)) else ()), *_loading(p, model)]


def _predicting(model: Path) -> list[str]:
    """The command and the function that predict, and a sentence on what comes behind them."""
    return [
        "Predictions for new files, which are prepared as in training:",
        "",
        "```bash",
        f"python -m trainer predict --model {shlex.quote(str(model))} --input NEW_DATA --output predictions.csv",
        "```",
        "",
        "```python",
        "from trainer import predict",
        "",
        f'rows = predict({str(model)!r}, "NEW_DATA")  # a dictionary for each sample',
        "```",
        "",
        "The bare model, whose inputs you prepare yourself:",
        "",
    ]


def _loading(p: Pieces, model: Path) -> list[str]:
    """Lines of Python that load the model as a module of torch."""
    own = not callable(getattr(p.task, "load", None)) and ":" in p.config.trainer.task
    return [
        "```python",
        "from pathlib import Path",
        "",
        "from trainer.run.saving import load_model",
        "from trainer.tasks.protocol import load_task",
        "",
        f"task = load_task({p.config.trainer.task!r}, {without_secrets(p.config.trainer.task_options)!r})",
        *(["# Call task.splits() here if model() needs the data."] if own else []),
        f"model = load_model(task, Path({str(model)!r})).eval()  # a torch.nn.Module",
        "```",
    ]


def _metrics(metrics: dict[str, dict[str, float]]) -> list[str]:
    """A table: a row a metric, a column a split."""
    names = list(dict.fromkeys(name for of_split in metrics.values() for name in of_split))
    return [
        f"| | {' | '.join(map(_plain, metrics))} |",
        f"|---|{'---|' * len(metrics)}",
        *(
            f"| {_plain(name)} | " + " | ".join(f"{m.get(name, float('nan')):.4f}" for m in metrics.values()) + " |"
            for name in names
        ),
    ]


def _training(p: Pieces, summary: dict[str, Any]) -> list[str]:
    plan, code = p.plan, commit()
    anywhere = p.exactness == "bitwise" and plan.scaling == "strong"
    return [
        f"Exactness: {p.exactness}. "
        + (
            f"Any 1 to {plan.micro_batches} ranks give these very bits, on the same device model and versions."
            if anywhere
            else _plain("; ".join(p.inexact))
        ),
        "",
        "```bash",
        command(sys.argv, 1 if anywhere else plan.world_size),
        "```",
        "",
        f"- parameters after the last step: sha256 `{summary['parameters_sha256']}`",
        *[f"- data of {_plain(name)}: sha256 `{split.data_hash()}`" for name, split in p.host_splits.items()],
        *([f"- git commit of the trainer: {code}"] if code is not None else []),
        *[f"- {name}: {_plain(str(value))}" for name, value in p.facts.items()],
        "",
        "The config as resolved:",
        "",
        "```json",
        json.dumps(without_secrets(p.config.as_dict()), indent=2),
        "```",
    ]
