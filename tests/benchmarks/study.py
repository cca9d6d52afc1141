"""The runs of a study in its long-lived processes, against launching each on its own.

    python tests/benchmarks/study.py [--runs 24]

Both make the same runs of the digits (the sequential run of ds_configs/study.json with seeds 0, 1, ...), as many at
a time as there are cores: once as a study, its start and its report included, and once by `python trainer/main.py`
for each. Printed are the wall times, their ratio, and whether the parameters are the same.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def _call(*arguments: str, cwd: Path) -> None:
    subprocess.run(
        [sys.executable, *arguments], cwd=cwd, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=24)
    flags = parser.parse_args()
    values: dict[str, Any] = json.loads((ROOT / "ds_configs" / "study.json").read_text())
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        study = {"arms": ["sequential"], "seeds": flags.runs, "timing": None, "output_dir": str(folder / "study")}
        (folder / "study.json").write_text(json.dumps(values | {"study": study}))
        began_s = time.perf_counter()
        _call("-m", "trainer", "study", str(folder / "study.json"), cwd=ROOT)
        study_s = time.perf_counter() - began_s

        values.pop("study")
        values["trainer"] |= {"guard_every_steps": 0, "checkpoint": {"every_steps": 0}, "gradient_noise": True}
        (folder / "one.json").write_text(json.dumps(values | {"tensorboard": {"enabled": False}}))

        def launch(seed: int) -> None:
            out = ["--seed", str(seed), "--output_dir", str(folder / f"run-{seed}")]
            _call("trainer/main.py", "--ds_config", str(folder / "one.json"), *out, cwd=ROOT)

        began_s = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(cores) as pool:
            list(pool.map(launch, range(flags.runs)))
        alone_s = time.perf_counter() - began_s
        hashes = {
            (r["seed"], r["parameters_sha256"])
            for r in (json.loads(file.read_text()) for file in (folder / "study" / "runs").glob("*.json"))
        }
        launched = {
            (seed, json.loads((folder / f"run-{seed}" / "summary.json").read_text())["parameters_sha256"])
            for seed in range(flags.runs)
        }
    print(f"{flags.runs} runs, {cores} at a time: as a study {study_s:.1f} s, each launched {alone_s:.1f} s,")
    print(f"{alone_s / study_s:.1f} times as long; the same parameters: {'yes' if hashes == launched else 'NO'}")


if __name__ == "__main__":
    main()
