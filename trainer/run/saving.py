"""Saves the trained model in its library's own format, with everything that is needed to use it. Loads it again."""

from __future__ import annotations

import contextlib
import hashlib
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

    First the weights are written as they are, beside it. So the training is not lost if a library, or a task's own
    `save`, fails. They stay until `reload.problems` has found that the saved model is the trained one.

    Returns:
        What went wrong, as a sentence; None if all is saved.
    """
    save = getattr(p.task, "save", None)
    adapted = hasattr(p.engine.model, "merge_and_unload")
    # An error is ignored: a disk may have room for one copy only, and then the model itself matters more.
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
            files = {"files": sorted(file.name for file in target.iterdir())}
            (target / ORIGIN).write_text(to_json(_origin(p) | files, indent=2) + "\n", encoding="utf-8")

        folder.write_folder("model", write)
        if adapted:
            # With save_embedding_layers, peft would ask the hub whether the vocabulary has grown.
            folder.write_folder(
                "adapter",
                lambda target: p.engine.model.save_pretrained(str(target), save_embedding_layers=False),  # type: ignore[operator]
            )
    except Exception as error:  # of any kind: a library's or a task's code runs here
        if of_the_folder(error, folder) is not None:
            raise
        lines = str(error).strip().splitlines()
        return f"The model could not be saved in its own format: {type(error).__name__}: {lines[0] if lines else ''}"
    return None


def _origin(p: Pieces) -> dict[str, Any]:
    """What made a model. For a user's own task also the file of its code, and the hash by which it is recognised."""
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
