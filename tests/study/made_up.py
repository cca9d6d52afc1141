"""Studies that are planned and not run: their files, their plans, and folders as their runs would have left them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.distributed.jobs import ROOT
from trainer.study.cells import Cell
from trainer.study.declaration import Plan, Study, expand
from trainer.study.load import load_study
from trainer.study.runner import declaration

SHIPPED = ROOT / "ds_configs" / "study.json"


def write(folder: Path, study: dict[str, Any] | None = None, **trainer: Any) -> Path:
    """A study of the digits; without `arms` of all arms."""
    values = json.loads(SHIPPED.read_text())
    of_its_own = {"output_dir": str(folder / "study"), "splits": None, "tuning": {"searches": 14}}
    values["study"] = {k: v for k, v in values["study"].items() if k != "arms"} | of_its_own | (study or {})
    values["trainer"] |= trainer
    path = folder / "study.json"
    path.write_text(json.dumps(values))
    return path


def planned(path: Path, samples: int = 1200) -> tuple[Study, Plan]:
    study, variants = load_study(str(path))
    sizes = [v.config.trainer.train_samples or samples for v in variants]
    return study, expand(study, [dataclasses.replace(v, samples=n) for v, n in zip(variants, sizes)])


NASTY = "<script>alert(\"x\")</script> & 'q'"


def is_lost(cell: Cell) -> bool:
    """Whether a run is one of those that are bad: weak scaling at W = 8."""
    return cell.arm == "weak" and cell.world_size == 8


def results(
    folder: Path,
    seeds: int = 10,
    budget: str = "epochs",
    noise: dict[str, Any] | None = None,
    curves: dict[str, Any] | Callable[[Cell], dict[str, Any]] | None = None,
    lost: Callable[[Cell], bool] = is_lost,
    **study: Any,
) -> Path:
    """A study's folder as the runs would have left it: weak at W = 8 is bad, W = 2 good, one run not finite.

    Args:
        folder: where the config goes; the study's own folder is out/ in it.
        seeds, budget, study: of its declaration.
        noise, curves: of every run; curves may be a function of its cell.
        lost: which runs are bad.
    """
    arms = ["sequential", "strong", "weak", "weak_sqrt"]
    path = write(folder, {"seeds": seeds, "arms": arms, "world_sizes": [2, 8], "budgets": [budget], **study})
    _, plan = planned(path)
    out = folder / "out"
    (out / "runs").mkdir(parents=True)
    declared = declaration(plan, {"samples": {"train": 1200}, "data_sha256": {}})
    declared["base"]["trainer"]["task"] = declared["command"] = NASTY
    declared["impossible"] = [["weak, W = 64", NASTY]]
    (out / "study.json").write_text(json.dumps(declared))
    for i, cell in enumerate(plan.cells):
        if cell.id is None:
            continue  # its settings have not been found
        value = (0.7 if lost(cell) else 0.95) + 0.002 * ((cell.seed * 7 + i) % 5)
        broken = lost(cell) and cell.seed == 0
        run: dict[str, Any] = {
            **cell.__dict__, "status": "not finite" if broken else "finished", "exactness": "bitwise",
            "metrics": {} if broken else {"test": {"accuracy": value, "loss": 1 - value}}, "steps": 760, "epochs": 20,
            "global_batch_size": 32, "micro_batch_size": 8, "parameters_sha256": None if broken else f"{i:064x}",
            "started_at_s": 1.0, "wall_time_s": 1.0, "step_time_s": None if broken else 0.001, "samples_per_s": 9.0,
            "learning_rate": 0.003, "warmup_epochs": 1.0, "samples": 1200,
            "curves": curves(cell) if callable(curves) else curves or {},
            "gradient_noise": noise,
            "code_sha256": "c" * 64, "device_model": NASTY, "facts": {"torch": "2", "device_model": NASTY},
            "config": plan.configs[cell.id].as_dict(),
        }  # fmt: skip
        (out / "runs" / f"{cell.id}.json").write_text(json.dumps(run))
    return out


def timed(folder: Path, world_size: int, repeat: int = 0, step_time_s: float = 0.1, **changes: Any) -> None:
    """A timed run of a study, as `timing.time_ranks` leaves it: by default 4 micro-batches of 20 ms, and 20 ms once."""
    run = {
        "world_size": world_size, "steps": 20, "step_time_s": step_time_s, "samples_per_s": 32 / step_time_s,
        "wall_time_s": 30.0, "parameters_sha256": "a" * 64, "exactness": "bitwise", "floats": 100_000,
        "phases_s": {"data": 0.02, "compute": 0.06, "reduce": 0.01, "optimizer": 0.01}, "micro_batches": 4,
        "max_steps": 20, "devices": 8, "own_devices": True,
    } | changes  # fmt: skip
    (folder / "timing").mkdir(exist_ok=True)
    (folder / "timing" / f"W{world_size}-{repeat}.json").write_text(json.dumps(run))


def network(folder: Path, **given: float) -> None:
    """What is known of the ranks' network: measured, and what the user gave."""
    values = {"measured": {"world_size": 2, "latency_us": 1000.0, "bandwidth_gb_per_s": 1.0}, "given": given}
    (folder / "timing" / "network.json").write_text(json.dumps(values))
