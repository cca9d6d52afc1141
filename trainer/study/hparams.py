"""The runs of a study for TensorBoard's HParams tab."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import whole_folder
from ..record.events import write_file
from ..record.hparams import end, start, told

# What the tab lists as hyper-parameters, in this order, where a row has it; what has a "/" in its name is a metric.
_HPARAMS = (
    "variant", "arm", "budget", "world_size", "seed", "split_seed", "global_batch_size", "learning_rate", "epochs",
    "steps", "status", "config_sha256",
)  # fmt: skip

# The tab shows a box to tick for each value that it knows. With more values than this, it gets their range instead.
_MOST_VALUES = 30


def write_hparams(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    hparams: Sequence[str] = _HPARAMS,
    name_of: Callable[[Mapping[str, Any]], str] | None = None,
) -> Path:
    """Writes <folder>/tensorboard, a folder of events for each run, in place of an older one.

    Args:
        folder: the study's.
        rows: one a run (see `results.rows_of`): hyper-parameters by name, and metrics as <split>/<metric>, None
            or not finite where the run has none. `started_at_s` and `wall_time_s` are used where they are given.
        hparams: the keys of a row that are hyper-parameters, in the order of the tab.
        name_of: gives the name of a row's folder; None for that of a study's run.

    Returns:
        What to give to `tensorboard --logdir`.
    """
    from tensorboard.plugins.hparams import api_pb2, metadata

    target, written_at_s = folder / "tensorboard", time.time()
    experiment = api_pb2.Experiment(
        name=folder.name,
        time_created_secs=written_at_s,
        hparam_infos=_hparam_infos(rows, hparams),
        metric_infos=[api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in _metrics(rows)],
    )
    with whole_folder(target) as temporary:
        _write(temporary, written_at_s, [told(metadata.EXPERIMENT_TAG, experiment=experiment)])
        taken: set[str] = set()
        for row in rows:
            name = _unique(_name(row) if name_of is None else name_of(row), taken)
            (temporary / name).mkdir()
            _write(temporary / name, written_at_s, _session(row, name, written_at_s, hparams))
    return target


def _name(row: Mapping[str, Any]) -> str:
    """The name of a run's folder. The name of a variant is the user's, so it may hold what no file name can."""
    name = f"{row['arm']}-{row['budget']}-W{row['world_size']}-seed{row['seed']}"
    if row.get("variant"):
        name += "-" + re.sub(r"[^A-Za-z0-9_.=]+", "_", str(row["variant"]))[:60]
    return name


def _unique(name: str, taken: set[str]) -> str:
    unique, number = name, 2
    while unique in taken:
        unique, number = f"{name}-{number}", number + 1
    taken.add(unique)
    return unique


def _hparams(row: Mapping[str, Any], keys: Sequence[str]) -> dict[str, str | float]:
    values = {key: row[key] for key in keys if row.get(key) is not None}
    if "variant" in values:
        values["variant"] = values["variant"] or "base"
    return {key: value if isinstance(value, str) else float(value) for key, value in values.items()}


def _metrics(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row if "/" in key))


def _hparam_infos(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[Any]:
    """Name, type and, where they are few, values of each hyper-parameter."""
    from tensorboard.plugins.hparams import api_pb2

    infos = []
    known = [_hparams(row, keys) for row in rows]
    for key in keys:
        values = {row[key] for row in known if key in row}
        if not values:
            continue
        texts = any(isinstance(value, str) for value in values)
        kind = api_pb2.DATA_TYPE_STRING if texts else api_pb2.DATA_TYPE_FLOAT64
        info = api_pb2.HParamInfo(name=key, type=kind)
        if len(values) <= _MOST_VALUES:
            info.domain_discrete.extend(sorted(values))
        elif not texts:
            info.domain_interval.min_value, info.domain_interval.max_value = min(values), max(values)
        infos.append(info)
    return infos


def _session(row: Mapping[str, Any], name: str, written_at_s: float, hparams: Sequence[str]) -> list[Any]:
    """The summaries of one run: how it began, its metrics, and how it ended."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    began_at_s = row.get("started_at_s") or written_at_s
    metrics = [Summary.Value(tag=key, simple_value=row[key]) for key in row if "/" in key and _is_known(row[key])]
    # Each run is a group of its own: TensorBoard takes the runs of one group for repetitions, and shows their mean.
    return [
        start(_hparams(row, hparams), began_at_s, group=name),
        Summary(value=metrics),
        end(row.get("status") == "finished", began_at_s + (row.get("wall_time_s") or 0.0)),
    ]


def _is_known(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _write(folder: Path, written_at_s: float, summaries: Sequence[Any]) -> None:
    """Writes an event file. TensorBoard's own writer would start a thread for each, of up to a thousand files."""
    # The time is in the name, because a running TensorBoard moves on only to a file whose name sorts after the old one.
    write_file(folder / f"events.out.tfevents.{written_at_s:.6f}.study", written_at_s, summaries)
