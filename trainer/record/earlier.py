"""Finished runs beside this one: how fast the same model was at other numbers of ranks."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..config.loggers import OFF
from .made_by import without_secrets

# Keys that do not change the speed of a step.
_LOGGERS = {name.partition(".")[0] for name in OFF}
_NO_SPEED = ("output_dir", "epochs", "max_steps", "seed", "learning_rate", "checkpoint", "best")


class Earlier(NamedTuple):
    """A finished run: its folder, and its mean speed over all ranks."""

    folder: Path
    samples_per_s: float


def of_this_model(summary: Mapping[str, Any], folder: Path) -> dict[int, Earlier]:
    """The newest run of each other world size, beside `folder`, that ended in the same parameters, bit for bit."""
    found = {}
    for path, other in _summaries(folder.parent):
        W = other["world_size"]
        if summary["world_size"] != W and other.get("parameters_sha256") == summary["parameters_sha256"]:
            found[W] = Earlier(path, other["samples_per_s"])
    return found


def of_this_config(config: Mapping[str, Any], base: Path) -> dict[int, Earlier]:
    """The newest run of each world size in a folder of runs whose steps were those of a config (as a dictionary)."""
    wanted, found = _speed_keys(config), {}
    for path, summary in _summaries(base):
        manifest = _read(path / "manifest.json")
        if manifest is not None and _speed_keys(manifest.get("config")) == wanted:
            found[summary["world_size"]] = Earlier(path, summary["samples_per_s"])
    return found


def compared(world_size: int, samples_per_s: float, other_size: int, other: Earlier) -> str:
    """How fast a run is, compared with one at another world size; says so if the larger one does not pay."""
    ratio = samples_per_s / other.samples_per_s
    ranks = f"{other_size} rank{'s' * (other_size > 1)}"
    text = f"{ratio:.2f} times as fast as {ranks} ({other.folder.name})"
    if (ratio < 1.0) == (world_size > other_size):
        more, fewer = max(world_size, other_size), min(world_size, other_size)
        text += f": {more} ranks don't pay here, {fewer} {'is' if fewer == 1 else 'are'} faster"
    return text


def _summaries(base: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The summaries of finished runs in a folder, the oldest first; what is no such file is passed over."""
    written = []
    for path in base.glob("*/summary.json"):
        summary = _read(path)
        if summary is None or not isinstance(summary.get("world_size"), int):
            continue
        speed = summary.get("samples_per_s")
        if isinstance(speed, float) and math.isfinite(speed) and speed > 0.0:
            written.append((path.stat().st_mtime, str(path.parent), summary))
    for _, folder, summary in sorted(written, key=lambda entry: entry[:2]):
        yield Path(folder), summary


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _speed_keys(config: Any) -> Any:
    if not isinstance(config, Mapping) or not isinstance(config.get("trainer"), Mapping):
        return None
    config = without_secrets(copy.deepcopy(dict(config)))
    for block in _LOGGERS:
        config.pop(block, None)
    for name in _NO_SPEED:
        config["trainer"].pop(name, None)
    return config
