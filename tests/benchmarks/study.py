"""The runs of a study in its long-lived processes, against launching each on its own.

    python tests/benchmarks/study.py [--runs 120] [--launched 12]

The runs are those of the digits: the sequential run of ds_configs/study.json with seeds 0, 1, ... Once they are made
as a study, its start and its report included; then some of them are launched, in three ways: by the main command
(`deepspeed --num_gpus 1 trainer/main.py ...`) one after the other, by the main command as many at a time as a study
makes, and by `python trainer/main.py ...` as many at a time. Printed are seconds a run, their ratios to the study's,
and whether the parameters are the same.
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
BIN = Path(sys.executable).parent


def _call(*command: str) -> None:
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)


def _launched_s(start: list[str], config: Path, folder: Path, runs: int, at_a_time: int) -> tuple[float, set[Any]]:
    """Seconds a run, and (seed, parameters_sha256) of each."""

    def launch(seed: int) -> None:
        out = ["--seed", str(seed), "--output_dir", str(folder / f"run-{seed}")]
        # A port of its own: launchers that run at once would take the same.
        port = [f"--master_port={29600 + seed}"] if start[0].endswith("deepspeed") else []
        _call(*start, *port, "trainer/main.py", "--ds_config", str(config), *out)

    began_s = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(at_a_time) as pool:
        list(pool.map(launch, range(runs)))
    elapsed_s = time.perf_counter() - began_s
    summaries = [(seed, json.loads((folder / f"run-{seed}" / "summary.json").read_text())) for seed in range(runs)]
    return elapsed_s / runs, {(seed, summary["parameters_sha256"]) for seed, summary in summaries}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=120, help="of the study")
    parser.add_argument("--launched", type=int, default=12, help="of them, launched in each way")
    flags = parser.parse_args()
    launched = min(flags.launched, flags.runs)
    values: dict[str, Any] = json.loads((ROOT / "ds_configs" / "study.json").read_text())
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        study = {"arms": ["sequential"], "seeds": flags.runs, "timing": None, "output_dir": str(folder / "study")}
        (folder / "study.json").write_text(json.dumps(values | {"study": study}))
        began_s = time.perf_counter()
        _call(sys.executable, "-m", "trainer", "study", str(folder / "study.json"))
        study_s = time.perf_counter() - began_s
        files = (folder / "study" / "runs").glob("*.json")
        hashes = {(r["seed"], r["parameters_sha256"]) for r in (json.loads(file.read_text()) for file in files)}
        print(f"a study of {flags.runs} runs, {cores} at a time: {study_s:.1f} s, {study_s / flags.runs:.2f} s a run")

        # What a run of a study does without, these do without.
        values.pop("study")
        values["trainer"] |= {"guard_every_steps": 0, "checkpoint": {"every_steps": 0}, "gradient_noise": True}
        config = folder / "one.json"
        config.write_text(json.dumps(values | {"tensorboard": {"enabled": False}}))
        deepspeed = [str(BIN / "deepspeed"), "--num_gpus", "1"]
        ways = [("deepspeed, one after the other", deepspeed, 1)]
        ways += [(f"deepspeed, {cores} at a time", deepspeed, cores)]
        ways += [(f"python, {cores} at a time", [sys.executable], cores)]
        for number, (title, start, at_a_time) in enumerate(ways):
            each_s, own = _launched_s(start, config, folder / str(number), launched, at_a_time)
            ratio, same = each_s * flags.runs / study_s, "the same" if own <= hashes else "OTHER"
            print(f"{launched} launched by {title}: {each_s:.2f} s a run, {ratio:.1f} times as long; {same} parameters")


if __name__ == "__main__":
    main()
