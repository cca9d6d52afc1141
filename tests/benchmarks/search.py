"""A search on W devices: all of them for one trial at a time, against a trial on each of them. Measured, not modelled.

    python tests/benchmarks/search.py [--ds_config ds_configs/strong.json] [--trials 8] [--repeats 3] [--set KEY=VALUE]

The same trials (learning rates, drawn at random; none is ended early) are made in three ways, in turn: one at a time on
one device, one at a time on all of them, and one on each at once. Printed are the seconds until the first k trials are
known, and, beside them, what `trainer/study/prediction.py` says from the times of single trials. It assumes that trials
on their own devices do not slow one another, which cores that share memory do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from trainer.record.console import table  # noqa: E402
from trainer.search.results import trials_in  # noqa: E402
from trainer.study.prediction import search_times  # noqa: E402

WAYS = ("one device", "all for one", "one on each")


def searched(config: dict[str, Any], sets: list[str], way: str, devices: int, folder: Path) -> list[dict[str, Any]]:
    """The trials of one search, by number."""
    how = {"devices_per_trial": "all" if way == "all for one" else "one", "output_dir": str(folder / "search")}
    config["search"] |= how | {"max_parallel": 1 if way == "one device" else devices}
    file = folder / "search.json"
    file.write_text(json.dumps(config))
    command = [sys.executable, "-m", "trainer", "search", str(file), *(f"--set={value}" for value in sets)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return trials_in(folder / "search")


def known_after_s(trials: list[dict[str, Any]]) -> list[float]:
    """Seconds from the start of the first trial until trials 0 to k - 1 have ended, for k = 1, 2, ..."""
    began = min(trial["started_at_s"] for trial in trials)
    ends = [trial["started_at_s"] + trial["wall_time_s"] - began for trial in trials]
    return [max(ends[:k]) for k in range(1, len(ends) + 1)]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ds_config", default=str(ROOT / "ds_configs" / "strong.json"))
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the file")
    flags = parser.parse_args()
    config: dict[str, Any] = json.loads(Path(flags.ds_config).read_text())
    rate = config["optimizer"]["params"]["lr"]
    config["search"] = {
        "parameters": {"optimizer.params.lr": {"low": rate / 4, "high": rate * 4, "log": True}},
        "sampler": "random",
        "pruner": {"type": "none"},
        "trials": flags.trials,
        "test_seeds": 1,
    }
    seconds: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    single: dict[str, list[float]] = {way: [] for way in WAYS}
    hashes: dict[int, set[str]] = {}
    for _ in range(flags.repeats):
        for way in WAYS:
            with tempfile.TemporaryDirectory() as name:
                trials = searched(config, flags.set, way, flags.devices, Path(name))
            seconds[way].append(known_after_s(trials))
            single[way] += [trial["wall_time_s"] for trial in trials]
            for trial in trials:
                hashes.setdefault(trial["number"], set()).add(trial["parameters_sha256"])
    alone_s, all_s, each_s = (statistics.median(single[way]) for way in WAYS)
    W, speed_up = flags.devices, alone_s / all_s
    print(
        f"\n{flags.ds_config}: a trial takes {alone_s:.2f} s on one device, {all_s:.2f} s on {W} ({speed_up:.2f} times "
        f"as fast), {each_s:.2f} s beside others ({alone_s / each_s:.2f} times as fast). The same bits in each way: "
        f"{all(len(found) == 1 for found in hashes.values())}\n"
    )
    rows = []
    for k in sorted({1, 2, 3, flags.trials // 2, flags.trials}):
        said = search_times(alone_s, {1: 1.0, W: speed_up}, W, k)
        cells = [f"{statistics.median(of):.1f} ({min(of):.1f} to {max(of):.1f})" for of in _columns(seconds, k)]
        rows.append([str(k), *cells, f"{said.strong:.1f}", f"{said.at_once:.1f}"])
    header = ["trials", *(f"{way}, s" for way in WAYS), "all for one, predicted", "one on each, predicted"]
    print(table(rows, header))


def _columns(seconds: dict[str, list[list[float]]], k: int) -> list[list[float]]:
    return [[times[k - 1] for times in seconds[way]] for way in WAYS]


if __name__ == "__main__":
    main()
