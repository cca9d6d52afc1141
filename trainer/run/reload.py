"""Loads the saved model again, as a user will, and compares it with the model that was trained and measured."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config.task_options import read_arguments
from ..exact.order import key, seed_generators, seed_python
from ..exact.progress import Progress, TaskCalls
from ..exact.splits import Batch
from ..tasks.contract import check_outputs
from .build import Pieces
from .saving import load_model

# Samples of the batch that is compared.
_SAMPLES = 8
# The largest allowed difference of an output, as a fraction of the largest output. The same weights on the same device
# give the same numbers. Merging LoRA's updates into the weights rounds, so there more is allowed.
_TOLERANCE, _MERGED_TOLERANCE = 1e-4, 1e-3


def problems(p: Pieces, folder: Path) -> list[str]:
    """What is wrong with <output_dir>/model and adapter, in sentences. Empty if their outputs are the trained model's.

    Rank 0; parameters must be whole. A new task loads the model, as in `predict`. So the other files of the folder (the
    tokenizer, the image processor) are tested, too. At ZeRO stage 3 nothing is compared, because a forward there needs
    every rank.

    Args:
        p: of the run.
        folder: <output_dir>.
    """
    if p.engine.zero_stage == 3:
        return []
    split = next(name for name in ("test", "validation", "train") if name in p.host_splits)
    samples = torch.arange(min(_SAMPLES, len(p.host_splits[split])))
    longest = p.host_splits[split].longest(samples, [(0, len(samples))])
    batch = p.splits[split].gather(samples.to(p.device))
    batch = p.splits[split].cut(batch, None if longest is None else longest[0])
    adapted = hasattr(p.engine.model, "merge_and_unload")
    tolerance = _MERGED_TOLERANCE if adapted else _TOLERANCE
    trained = _outputs(p, p.task, p.engine.model, batch)

    def compared(name: str, load: Any) -> list[str]:
        path = folder / name
        try:
            task, model = load(path)
        except Exception as error:  # of any kind: a library's, or the task's
            lines = str(error).strip().splitlines()
            return [f"{path} was saved, but cannot be loaded: {type(error).__name__}: {lines[0] if lines else ''}"]
        try:
            difference = _difference(trained, _outputs(p, task, model, batch))
        except Exception as error:
            lines = str(error).strip().splitlines()
            return [f"{path} was saved, but fails once loaded: {type(error).__name__}: {lines[0] if lines else ''}"]
        if difference <= tolerance:
            return []
        return [
            f"{path} is not the model that was measured: loaded again, its outputs for {len(samples)} samples of "
            f"{split} differ by up to {difference:.1%} of the largest output"
        ]

    found = []
    # Without load() or predict(), the file is the weights as they are, and model() may need the splits. So nothing is
    # loaded.
    if any(callable(getattr(p.task, name, None)) for name in ("load", "predict")):
        found += compared("model", lambda path: _loaded(p, path))
    base = p.engine.model.get_base_model() if adapted else None  # type: ignore[operator]
    # An adapter needs its base model in a folder or on the hub. Random weights and models of a task's own have neither.
    if getattr(base, "name_or_path", "") and not getattr(p.task, "random_weights", False):
        found += compared("adapter", lambda path: (p.task, _on_its_base(base, path)))
    return found


def _loaded(p: Pieces, path: Path) -> tuple[Any, nn.Module]:
    task = type(p.task)(**read_arguments(type(p.task), p.config.trainer.task_options))
    return task, load_model(task, path)


def _on_its_base(base: Any, path: Path) -> nn.Module:
    """The adapter in a folder on its base model, as others load it: from the base's own folder or hub name."""
    import peft

    from ..data.pretrained import quiet

    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh = type(base).from_pretrained(
            base.name_or_path,
            config=copy.deepcopy(base.config),
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # a new head, which the adapter holds
        )
        model: nn.Module = peft.PeftModel.from_pretrained(fresh, str(path))
    return model


def _outputs(p: Pieces, task: Any, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """A task's outputs for a batch, in evaluation mode and without autocast; on the CPU."""
    with _as_evaluated(model.to(p.device)):
        # Models that draw random numbers in evaluation, too, draw the same ones.
        seed_generators(key(p.config.trainer.seed, "evaluation", 0), p.device)
        seed_python(key(p.config.trainer.seed, "evaluation", 0))
        progress = Progress(p.total_steps, p.total_steps // p.steps_per_epoch, p.total_steps)
        outputs = TaskCalls(task).forward(model, batch, progress)
    rows = len(next(iter(batch.values())))
    return {name: value.detach().cpu() for name, value in check_outputs(outputs, rows).items()}


@contextlib.contextmanager
def _as_evaluated(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(training)


def _difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of floating outputs, as a share of the largest output of that name; inf for other shapes.

    Outputs of whole numbers are left out: rounding may change a choice, such as the likeliest class.
    """
    worst = 0.0
    for name, tensor in one.items():
        if not tensor.is_floating_point():
            continue
        if name not in other or other[name].shape != tensor.shape:
            return math.inf
        a, b = tensor.double(), other[name].double()
        same = (a == b) | (a.isnan() & b.isnan())
        apart = torch.where(same, 0.0, (a - b).abs())
        largest = float(a.abs().nan_to_num(0.0, 0.0, 0.0).max()) if a.numel() else 0.0
        share = float(apart.max()) / max(largest, 1e-12) if a.numel() else 0.0
        worst = max(worst, math.inf if math.isnan(share) else share)
    return worst
