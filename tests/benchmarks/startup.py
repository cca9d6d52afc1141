"""How late the first optimizer step comes: this trainer against a minimal DeepSpeed script, same launcher.

    python tests/benchmarks/startup.py [--rounds 5]

Each round starts `deepspeed --num_gpus 2` with one and then the other, and takes the time from the
command to the end of the first step. One round of warm-up is not counted: in it the minimal script
builds DeepSpeed's shared-memory kernel, which ours does without.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

MINIMAL = """
import argparse, time
import deepspeed, torch
from sklearn.datasets import load_digits

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int)
parser.parse_args()
deepspeed.init_distributed()
data = load_digits()
images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(data.target)
model = torch.nn.Sequential(torch.nn.Conv2d(1, 32, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(1152, 10))
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config={
    "train_batch_size": 256, "train_micro_batch_size_per_gpu": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "torch_adam": True, "fused": True}}})
for start in range(0, 128, 8):
    loss = torch.nn.functional.cross_entropy(engine(images[start:start + 8]), labels[start:start + 8])
    engine.backward(loss)
    engine.step()
if torch.distributed.get_rank() == 0:
    print("FIRST STEP AT", time.time(), flush=True)
"""


def _launch(arguments: list[str], folder: Path) -> str:
    environment = {**os.environ, "PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"}
    command = ["deepspeed", "--num_gpus", "2", "--master_port", "29577", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout


def _minimal(folder: Path) -> float:
    (folder / "minimal.py").write_text(MINIMAL)
    began_s = time.time()
    output = _launch(["minimal.py"], folder)
    return float(next(line for line in output.splitlines() if "FIRST STEP AT" in line).split()[-1]) - began_s


def _ours(folder: Path) -> float:
    began_s = time.time()
    out = folder / f"run-{began_s}"
    config = ["--ds_config", str(ROOT / "ds_configs" / "strong.json"), "--max_steps", "2", "--output_dir", str(out)]
    _launch([str(ROOT / "trainer" / "main.py"), *config], folder)
    summary = json.loads((out / "summary.json").read_text())
    return summary["started_at_s"] + summary["time_to_first_step_s"] - began_s


def main() -> None:
    """Runs the benchmark and prints one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pairs = [(_ours(folder), _minimal(folder)) for _ in range(rounds + 1)][1:]
    ratios = [ours / minimal for ours, minimal in pairs]
    ours, minimal = ([pair[i] for pair in pairs] for i in (0, 1))
    seconds = f"ours {statistics.median(ours):.2f} s, minimal {statistics.median(minimal):.2f} s"
    print(f"first step after, median of {rounds}: {seconds}")
    print(f"ratio: median {statistics.median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
