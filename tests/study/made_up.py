"""Studies that are planned and not run: their files, their plans, and folders as their runs would have left them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from tests.distributed.jobs import ROOT
from trainer.study.declaration import Plan, Study, expand, load_study
from trainer.study.runner import declaration

SHIPPED = ROOT / "ds_configs" / "study.json"


def write(folder: Path, study: dict[str, Any] | None = None, **trainer: Any) -> Path:
    values = json.loads(SHIPPED.read_text())
    values["study"] |= {"output_dir": str(folder / "study"), **(study or {})}
    values["trainer"] |= trainer
    path = folder / "study.json"
    path.write_text(json.dumps(values))
    return path


def planned(path: Path, samples: int = 1200) -> tuple[Study, Plan]:
    study, variants = load_study(str(path))
    sizes = [v.config.trainer.train_samples or samples for v in variants]
    return study, expand(study, [dataclasses.replace(v, samples=n) for v, n in zip(variants, sizes)])


NASTY = "<script>alert(\"x\")</script> & 'q'"


def results(folder: Path, seeds: int = 10, budget: str = "epochs", noise: dict[str, Any] | None = None) -> Path:
    """A study's folder as the runs would have left it: weak at W = 8 is bad, W = 2 good, one run not finite."""
    arms = ["sequential", "strong", "weak", "weak_sqrt"]
    path = write(folder, {"seeds": seeds, "arms": arms, "world_sizes": [2, 8], "budgets": [budget]})
    _, plan = planned(path)
    out = folder / "out"
    (out / "runs").mkdir(parents=True)
    declared = declaration(plan, {"samples": {"train": 1200}, "data_sha256": {}})
    declared["base"]["trainer"]["task"] = declared["command"] = NASTY
    declared["impossible"] = [["weak, W = 64", NASTY]]
    (out / "study.json").write_text(json.dumps(declared))
    for i, cell in enumerate(plan.cells):
        lost = cell.arm == "weak" and cell.world_size == 8
        value = (0.7 if lost else 0.95) + 0.002 * ((cell.seed * 7 + i) % 5)
        broken = lost and cell.seed == 0
        run: dict[str, Any] = {
            **cell.__dict__, "status": "not finite" if broken else "finished", "exactness": "bitwise",
            "metrics": {} if broken else {"test": {"accuracy": value, "loss": 1 - value}}, "steps": 760, "epochs": 20,
            "global_batch_size": 32, "micro_batch_size": 8, "parameters_sha256": None if broken else f"{i:064x}",
            "started_at_s": 1.0, "wall_time_s": 1.0, "step_time_s": None if broken else 0.001, "samples_per_s": 9.0,
            "learning_rate": 0.003, "samples": 1200, "curves": {}, "gradient_noise": noise,
            "code_sha256": "c" * 64, "device_model": NASTY, "facts": {"torch": "2", "device_model": NASTY},
        }  # fmt: skip
        (out / "runs" / f"{cell.id}.json").write_text(json.dumps(run))
    return out
