"""The blocks of loggers beside TensorBoard: DeepSpeed's `wandb`, `comet` and `csv_monitor`, and `mlflow`."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import UserError
from .schema import option

# Block -> the package it needs, which is also its extra.
_PACKAGES = {"wandb": "wandb", "comet": "comet_ml", "mlflow": "mlflow"}
# Overrides that switch every logger off, for runs whose files are not kept.
OFF: dict[str, Any] = {f"{block}.enabled": False for block in ("tensorboard", "csv_monitor", *_PACKAGES)}


@dataclass(frozen=True)
class WandbOptions:
    """`wandb`, DeepSpeed's block, and its mode."""

    enabled: bool = option(False, "log to Weights & Biases (extra wandb); sends data unless its mode is offline")
    project: str = option("deepspeed", "its project")
    group: str | None = option(None, "its group")
    team: str | None = option(None, "its team (entity)")
    mode: Literal["online", "offline"] | None = option(
        None,
        "offline writes only under <output_dir>/wandb; null: what WANDB_MODE or `wandb offline` says, else online",
    )


@dataclass(frozen=True)
class CometOptions:
    """`comet`, DeepSpeed's block."""

    enabled: bool = option(False, "log to Comet (extra comet); sends data unless online is false")
    project: str | None = option(None, "its project; null for Comet's own configuration")
    workspace: str | None = option(None, "its workspace; null for Comet's own configuration")
    api_key: str | None = option(None, "its key; better in COMET_API_KEY; the trainer's own files show ... instead")
    experiment_name: str | None = option(None, "the experiment's name; default: the output folder's")
    experiment_key: str | None = option(None, "the experiment's key, of 32 to 50 letters and digits")
    online: bool | None = option(None, "false writes only under <output_dir>/comet; null is online, as in DeepSpeed")
    mode: Literal["get", "create", "get_or_create"] | None = option(None, "an experiment that exists, or a new one")


@dataclass(frozen=True)
class CsvMonitorOptions:
    """`csv_monitor`, DeepSpeed's block."""

    enabled: bool = option(False, "write a CSV file for each scalar")
    output_path: str = option("", "folder of these files; default: <output_dir>/csv_monitor")
    job_name: str = option("", "a folder in it")


@dataclass(frozen=True)
class MlflowOptions:
    """`mlflow`, a block of this trainer: DeepSpeed has none."""

    enabled: bool = option(False, "log to MLflow (extra mlflow)")
    tracking_uri: str | None = option(
        None, "a server (to which data is sent), a folder or a database; default: <output_dir>/mlflow, a folder"
    )
    experiment_name: str = option("Default", "its experiment, which is made if there is none of this name")
    run_name: str | None = option(None, "its run; default: the output folder's name")


def refuse_missing(config: Any) -> None:
    """Raises UserError if a logger is enabled and its package is not installed. Imports none of the packages."""
    for block, package in _PACKAGES.items():
        if not getattr(config, block).enabled:
            continue
        found = importlib.util.find_spec(package)
        # A folder of this name in the working directory looks like a package, but one without a file.
        if found is None or found.origin is None:
            raise UserError(
                f'"{block}.enabled" is true, but the package {package} is not installed: '
                f'pip install "strong-scaling-trainer[{block}]"'
            )
