"""Finished runs beside this one: how fast the same model was at other numbers of ranks."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..config.loggers import OFF
from .made_by import without_secrets

# Keys that do not change the speed of a step.
_LOGGERS = {name.partition(".")[0] for name in OFF}
# A run looks for the run to compare itself with among this many of the newest ones in its folder.
_CANDIDATES = 200
# A larger file of the name that we look for was not written by a run.
_LARGEST_BYTES = 16 << 20
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


def at_another_size(manifest: Mapping[str, Any], world_size: int, folder: Path) -> tuple[int, Earlier] | None:
    """The last run beside `folder` that differs from a run only in the world size and the folder: (world size, run).

    Args:
        manifest: of the run: its config, and facts of its device.
        world_size: of the run.
        folder: of the run.
    """
    wanted, device = _same_keys(json.loads(json.dumps(manifest["config"]))), manifest["facts"].get("device_model")
    for path, summary in reversed(list(_summaries(folder.parent, newest=_CANDIDATES))):
        W = summary["world_size"]
        other = _read(path / "manifest.json") if world_size != W and path != folder else None
        if other is None or _same_keys(other.get("config")) != wanted:
            continue
        facts = other.get("facts")
        if isinstance(facts, Mapping) and facts.get("device_model") == device:
            return W, Earlier(path, summary["samples_per_s"])
    return None


def efficiency(world_size: int, samples_per_s: float, other_size: int, other: Earlier) -> float:
    """Samples per second and rank, as a fraction of those at another world size.

    With strong scaling this is the strong efficiency, W0 T0 / (W T) of the times of a step, which is T1 / (W T) if the
    other run had one rank. With weak scaling it is the weak efficiency, T0 / T.
    """
    return samples_per_s / world_size / (other.samples_per_s / other_size)


def compared(world_size: int, samples_per_s: float, other_size: int, other: Earlier) -> str:
    """How fast a run is, compared with one at another world size; says so if the larger one does not pay."""
    ratio = samples_per_s / other.samples_per_s
    ranks = f"{other_size} rank{'s' * (other_size > 1)}"
    text = f"{ratio:.2f} times as fast as {ranks} ({other.folder.name})"
    if (ratio < 1.0) == (world_size > other_size):
        more, fewer = max(world_size, other_size), min(world_size, other_size)
        text += f": {more} ranks don't pay here, {fewer} {'is' if fewer == 1 else 'are'} faster"
    return text


def _summaries(base: Path, newest: int | None = None) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The summaries of finished runs in a folder, the oldest first. Other files of that name are skipped.

    Args:
        base: the folder.
        newest: read only this many; None for all.
    """
    written = []
    for path in base.glob("*/summary.json"):
        with contextlib.suppress(OSError):  # somebody may remove it meanwhile
            written.append((path.stat().st_mtime, str(path)))
    for _, name in sorted(written)[-newest if newest is not None else 0 :]:
        summary = _read(Path(name))
        if summary is None or type(summary.get("world_size")) is not int or summary["world_size"] < 1:
            continue
        speed = summary.get("samples_per_s")
        if isinstance(speed, float) and math.isfinite(speed) and speed > 0.0:
            yield Path(name).parent, summary


def _read(path: Path) -> dict[str, Any] | None:
    try:
        # Anybody may have made a file of this name. A pipe would never end, and a large file is not ours.
        if not path.is_file() or path.stat().st_size > _LARGEST_BYTES:
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _same_keys(config: Any) -> Any:
    return _speed_keys(config, ("output_dir",))


def _speed_keys(config: Any, left_out: Sequence[str] = _NO_SPEED) -> Any:
    if not isinstance(config, Mapping) or not isinstance(config.get("trainer"), Mapping):
        return None
    config = without_secrets(copy.deepcopy(dict(config)))
    for block in _LOGGERS:
        config.pop(block, None)
    for name in left_out:
        config["trainer"].pop(name, None)
    return config
