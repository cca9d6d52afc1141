"""Strong scaling on real ranks, for a study: how fast it is, and whether its bits are those of one rank."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.keys import Config
from ..config.schema import read_json
from ..engine.gpus import sharing
from ..files import write_json
from ..ranks.place import Ranks
from ..ranks.workers import run_ranks
from ..record.console import say
from .arms import SEQUENTIAL, Place
from .prediction import Measured

if TYPE_CHECKING:
    from .declaration import Plan, Timing

# Messages of two sizes, in float32: the small one shows the latency, the difference of the two the bandwidth.
_SMALL, _LARGE, _ROUNDS = 256, 1 << 20, 30


def time_ranks(timing: Timing, plan: Plan, folder: Path, cuda: bool) -> None:
    """Runs the first seed's sequential run on W real ranks, as often as declared. Finished runs are not repeated.

    Raises:
        UserError: a W cannot be run.
    """
    config = plan.config(Place("", SEQUENTIAL, "epochs", 1), plan.study.seeds[0])
    trainer = dataclasses.replace(config.trainer, gradient_noise=False, max_steps=timing.max_steps)
    config = dataclasses.replace(config, trainer=trainer)
    devices = _devices(config, cuda)
    sizes = timing.world_sizes or [2**i for i in range(devices.bit_length()) if 2**i <= devices]
    most = config.plan(1).micro_batches
    sizes = sorted({1, *(W for W in sizes if timing.world_sizes or most >= W)})
    for W in sizes:
        config.plan(W)  # raises where there are more ranks than micro-batches
    if len(sizes) == 1:
        say(f"timing: there is one device, and {most} micro-batches: nothing can be run on several ranks")
    out = folder / "timing"
    out.mkdir(exist_ok=True)
    for file, run in _timed_runs(out):
        if run["max_steps"] != timing.max_steps:
            file.unlink()  # it has another length, so neither its bits nor its time can be compared with these runs
    # In turn over W, because a speed-up compares times of the same repetition.
    missing = [(r, W) for r in range(timing.repeats) for W in sizes if not (out / f"W{W}-{r}.json").exists()]
    if missing:
        say(f"timing: {len(missing)} runs on {', '.join(map(str, sizes))} real ranks, one at a time")
    for repeat, W in missing:
        running = folder / "running"
        own = dataclasses.replace(config, trainer=dataclasses.replace(trainer, output_dir=str(running / "timed")))
        shutil.rmtree(running, ignore_errors=True)
        try:
            result = run_ranks(_timed, W, sharing(own, W, devices if cuda else 0), cuda=cuda, timeout_s=7 * 86400.0)[0]
        finally:
            shutil.rmtree(running, ignore_errors=True)
        write_json(out / f"W{W}-{repeat}.json", {**result, "devices": devices, "own_devices": devices >= W})
    given = {"latency_us": timing.latency_us, "bandwidth_gb_per_s": timing.bandwidth_gb_per_s}
    given = {name: value for name, value in given.items() if value is not None}
    network = read_json(out / "network.json") if (out / "network.json").exists() else {}
    if len(given) < 2 and len(sizes) > 1 and "measured" not in network:
        W = max(2, *(W for W in sizes if devices >= W))
        network["measured"] = run_ranks(_network, W, config.trainer.device, cuda=cuda)[0]
    write_json(out / "network.json", {**network, "given": given})


def _devices(config: Config, cuda: bool) -> int:
    if cuda:
        import torch

        return torch.cuda.device_count()
    return max(1, len(os.sched_getaffinity(0)) // config.trainer.cpu_threads)


def _timed(ranks: Ranks, config: Config) -> dict[str, Any]:
    from ..run.run import run

    floats: list[int] = []

    def count(step: int, engine: Any, losses: Any) -> None:
        if not floats:
            floats.append(sum(p.numel() for p in engine.parameters))

    summary = run(config, ranks, config_name="study", started_at_s=time.time(), trace=count)
    phases: dict[str, list[float]] = {}
    if ranks.first:
        records = [json.loads(line) for line in (Path(str(config.trainer.output_dir)) / "metrics.jsonl").open()]
        windows = [r for r in records if "throughput/compute_ms" in r]
        for record in windows[1:] or windows:  # the first window holds the first step, which warms up
            for name in ("data", "compute", "reduce", "optimizer"):
                phases.setdefault(name, []).append(record[f"throughput/{name}_ms"] / 1e3)
    kept = ("world_size", "steps", "step_time_s", "samples_per_s", "wall_time_s", "parameters_sha256", "exactness")
    return {name: summary[name] for name in kept} | {
        "phases_s": {name: statistics.median(values) for name, values in phases.items()},
        "floats": floats[0],
        "micro_batches": config.plan(1).micro_batches,
        "max_steps": config.trainer.max_steps,
    }


def _network(ranks: Ranks, device: str) -> dict[str, Any]:
    """Latency and bandwidth of the ranks' collectives, from messages of two sizes."""
    import torch

    from ..ranks.collectives import all_gather_flat
    from ..ranks.rendezvous import GLOO_AND_NCCL, start

    cuda = device != "cpu" and torch.cuda.is_available()
    gpus = torch.cuda.device_count() if cuda else 0
    where = torch.device("cuda", ranks.local_rank % gpus) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(where)
    # NCCL refuses two ranks on one GPU.
    start(ranks, GLOO_AND_NCCL if cuda and gpus >= ranks.local_world_size else "gloo", 600.0)
    seconds = {}
    for numel in (_SMALL, _LARGE):
        piece = torch.ones(numel, device=where)
        received = torch.empty(numel * ranks.world_size, device=where)
        times = []
        # The first five warm up, and are left out of the median.
        for _ in range(_ROUNDS + 5):
            torch.distributed.barrier()
            began_s = time.perf_counter()
            all_gather_flat(received, piece)
            if cuda:
                torch.cuda.synchronize()  # the call returns before the GPU has finished
            times.append(time.perf_counter() - began_s)
        seconds[numel] = statistics.median(times[5:])
    size = (_LARGE - _SMALL) * 4 * (ranks.world_size - 1)
    return {
        "world_size": ranks.world_size,
        "latency_us": seconds[_SMALL] * 1e6,
        "bandwidth_gb_per_s": size / max(1e-9, seconds[_LARGE] - seconds[_SMALL]) / 1e9,
    }


# ---- what was measured ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Timings:
    """The folder `timing/`, read.

    Attributes:
        steps_s: W -> seconds per step, one for each repetition; only of runs whose ranks had a device each.
        walls_s: W -> seconds of a whole run, of the same runs.
        hashes: W -> the parameters' hashes, of all runs.
        shared: W whose ranks had to share devices. They are run for their bits, not for their time.
        max_steps: of each run; None for whole ones.
        measured: for predictions; None where latency or bandwidth are not known.
        given: whether latency and bandwidth were given, and not measured.
    """

    steps_s: dict[int, list[float]]
    walls_s: dict[int, list[float]]
    hashes: dict[int, list[str]]
    shared: list[int]
    max_steps: int | None
    measured: Measured | None
    given: bool

    def speed_ups(self) -> dict[int, list[float]]:
        """W -> time of a step on one rank over that on W, of the same repetition."""
        one = self.steps_s.get(1, [])
        return {W: [a / b for a, b in zip(one, values)] for W, values in self.steps_s.items()}


def _timed_runs(out: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The timed runs in a folder, each with its file. Other files are ignored, with a note."""
    runs = []
    for file in sorted(out.glob("W*.json")):
        run = read_json(file) if re.fullmatch(r"W\d+-\d+", file.stem) else {}
        if {"world_size", "max_steps"} <= run.keys():
            runs.append((file, run))
        else:
            say(f"note: {file} is not the result of a timed run, and is ignored")
    return runs


def read_timings(folder: Path) -> Timings | None:
    """What `time_ranks` has left; None if nothing. Raises UserError for a damaged file."""
    runs: list[Mapping[str, Any]] = [run for _, run in _timed_runs(folder / "timing")]
    if not any(run["world_size"] == 1 for run in runs):
        return None
    runs.sort(key=lambda run: run["world_size"])
    by_size: dict[int, list[Mapping[str, Any]]] = {}
    for run in runs:
        by_size.setdefault(int(run["world_size"]), []).append(run)
    own = {W: of for W, of in by_size.items() if of[0]["own_devices"]}
    return Timings(
        {W: [float(run["step_time_s"]) for run in of] for W, of in own.items()},
        {W: [float(run["wall_time_s"]) for run in of] for W, of in own.items()},
        {W: [str(run["parameters_sha256"]) for run in of] for W, of in by_size.items()},
        [W for W in by_size if W not in own],
        by_size[1][0]["max_steps"],
        *_measured(folder, by_size[1]),
    )


def _measured(folder: Path, one: Sequence[Mapping[str, Any]]) -> tuple[Measured | None, bool]:
    file = folder / "timing" / "network.json"
    network = read_json(file) if file.exists() else {"given": {}}
    known = network.get("measured", {}) | network["given"]
    latency, bandwidth, given = known.get("latency_us"), known.get("bandwidth_gb_per_s"), bool(network["given"])
    if latency is None or bandwidth is None:
        return None, given
    M = int(one[0]["micro_batches"])
    micro = statistics.median((run["phases_s"]["data"] + run["phases_s"]["compute"]) / M for run in one)
    whole = statistics.median(float(run["step_time_s"]) for run in one)
    return (
        Measured(micro, max(0.0, whole - M * micro), latency / 1e6, bandwidth * 1e9, M, int(one[0]["floats"])),
        given,
    )


def check_bits(timings: Timings, sequential: str | None) -> tuple[list[int], list[int]]:
    """W at which real ranks gave the bits of one rank, and W at which they did not.

    Args:
        timings: of a study.
        sequential: the hash of the sequential run with the same seed, which whole runs must have as well.
    """
    expected = timings.hashes[1][0] if timings.max_steps is not None or sequential is None else sequential
    same = [W for W, hashes in timings.hashes.items() if set(hashes) == {expected}]
    return same, [W for W in timings.hashes if W not in same]
