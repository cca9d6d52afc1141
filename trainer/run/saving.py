"""Saves the trained model in its library's own format, with all that is needed to use it, and a model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..engine.adapt import merged
from ..files import to_json
from ..record.folder import ORIGIN, OutputFolder, write_tensors
from .build import Pieces


def save_model(p: Pieces, folder: OutputFolder) -> None:
    """Writes <output_dir>/model, and with LoRA <output_dir>/adapter as well. Rank 0; parameters must be whole."""
    model = merged(p.engine.model)
    save = getattr(p.task, "save", None)

    def write(target: Path) -> None:
        if save is None:
            write_tensors(target / "model.safetensors", model.state_dict())
        else:
            save(model, target)
        origin = {"task": p.config.trainer.task, "task_options": p.config.trainer.task_options}
        (target / ORIGIN).write_text(to_json(origin, indent=2) + "\n", encoding="utf-8")

    folder.write_folder("model", write)
    if model is not p.engine.model:
        # With save_embedding_layers, peft would ask the hub whether the vocabulary has grown.
        folder.write_folder(
            "adapter",
            lambda target: p.engine.model.save_pretrained(str(target), save_embedding_layers=False),  # type: ignore[operator]
        )


def save_card(p: Pieces, folder: OutputFolder, summary: dict[str, Any]) -> None:
    """Writes the model card, model/README.md: the model, its metrics, and how it was trained. Rank 0."""
    trainer, plan = p.config.trainer, p.plan
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in p.host_splits.items())
    splits = list(summary["metrics"])
    names = list(dict.fromkeys(name for metrics in summary["metrics"].values() for name in metrics))
    rows = [
        f"| {name} | "
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
        f"Task `{trainer.task}`; {sizes} samples. {summary['steps']:,} steps of {plan.global_batch_size} samples "
        f"({plan.scaling} scaling, micro-batches of {plan.micro_batch_size}), seed {trainer.seed}.",
        *([f"The model of step {kept['step']:,}, the best {kept['metric']} on validation."] if kept else []),
        "",
        "## Metrics",
        "",
        f"| | {' | '.join(splits)} |",
        f"|---|{'---|' * len(splits)}",
        *rows,
        "",
        "## How it was trained",
        "",
        f"Exactness: {p.exactness}. "
        + (
            f"Any 1 to {plan.micro_batches} ranks give these very bits, on the same device model and versions."
            if p.exactness == "bitwise" and plan.scaling == "strong"
            else "; ".join(p.inexact)
        ),
        "",
        f"- parameters after the last step: sha256 `{summary['parameters_sha256']}`",
        *[f"- data of {name}: sha256 `{split.data_hash()}`" for name, split in p.host_splits.items()],
        *[f"- {name}: {value}" for name, value in p.facts.items()],
        "",
        "The config as resolved:",
        "",
        "```json",
        json.dumps(p.config.as_dict(), indent=2),
        "```",
    ]
    card = folder.path / "model" / "README.md"
    card.write_text("\n".join(lines) + "\n", encoding="utf-8")
