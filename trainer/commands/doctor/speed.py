"""What a step costs on this machine: compared with a plain loop, in kernels and waits, and in its exchange."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...config.keys import Config
from ...errors import TrainerError
from ...ranks.place import Ranks
from ...ranks.workers import run_ranks
from .exactness import config_for
from .machine import Machine

_TURN = 5  # steps
_ROUNDS = 12
_WARM_UP = 12  # rounds: "auto" tries sizes of packs in the first 50 steps or so
_COUNTED = 4  # steps
_GRADIENTS = {"0.4 MB": 100_000, "40 MB": 10_000_000}  # float32

# A host that calls one of these waits for the GPU.
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cuStreamSynchronize")
_LAUNCHES = ("LaunchKernel", "cudaGraphLaunch")


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _in_turns(ranks: Ranks, config: Config) -> dict[str, list[float]]:
    """Seconds of each turn of `_TURN` steps, of our loop and of a plain loop. Collective: every rank.

    The two take turns in the same processes, so a busy machine slows both down.
    """
    from ...exact.packs import packs
    from ...run.run import run
    from .plain_loop import plain_loop

    packs.FEWEST_STEPS = 1  # a run as short as this one would look for no packs; a longer one does
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    plain: Callable[[], None] | None = None
    resumed_s = 0.0

    def trace(step: int, engine: Any, losses: Any) -> None:
        nonlocal plain, resumed_s
        if step % _TURN:
            return
        _wait_for(engine.device)
        if plain is None:
            plain = plain_loop(config, ranks, engine.device)
        else:
            times["ours"].append(time.perf_counter() - resumed_s)
        began_s = time.perf_counter()
        for _ in range(_TURN):
            plain()
        _wait_for(engine.device)
        times["plain"].append(time.perf_counter() - began_s)
        if ranks.world_size > 1:
            torch.distributed.barrier()  # else our turn would begin with a wait for a rank whose plain loop is late
        resumed_s = time.perf_counter()

    run(config, ranks, config_name="doctor", started_at_s=time.time(), trace=trace)
    return {name: values[-_ROUNDS:] for name, values in times.items()}


def throughput(machine: Machine, folder: Path) -> tuple[str, dict[str, Any]]:
    """Samples per second, and their share of a plain loop's: at one rank, and at all GPUs or two CPU ranks.

    On GPUs it also measures with CUDA graphs.
    """
    figures: dict[str, Any] = {}
    said = []
    sizes = sorted({1, machine.gpus or min(2, machine.cores)})
    for W, graph in itertools.product(sizes, (None, "auto") if machine.gpus else (None,)):
        name = f"{W}{' with CUDA graphs' * (graph is not None)}"
        own = folder / name
        own.mkdir(parents=True)
        steps = _TURN * (_WARM_UP + _ROUNDS + 1)
        more: dict[str, Any] = {"guard_every_steps": 50, "drop_last": True, "cuda_graph": graph}
        config = config_for(machine, own, W, max_steps=steps, **more)
        found = run_ranks(_in_turns, W, config, cuda=machine.gpus > 0)[0]
        ratios = [plain / ours for ours, plain in zip(found["ours"], found["plain"])]
        low, middle, high = statistics.quantiles(ratios, n=4)
        per_s = 256 * _TURN / statistics.median(found["ours"])
        figures[name] = {"samples_per_s": round(per_s), "of_a_plain_loop": [round(r, 3) for r in (low, middle, high)]}
        ranks = f"{W} rank{'s' * (W > 1)}{' with CUDA graphs' * (graph is not None)}"
        said.append(f"{per_s:,.0f} samples/s at {ranks}, {middle:.2f} of a plain loop's ({low:.2f} to {high:.2f})")
    return f"digits CNN: {'; '.join(said)}. Measured, no bound is set", figures


# ---- kernels and waits -----------------------------------------------------------------------------------------------


def _calls(profile: Any) -> dict[str, int]:
    """How often the host waited for the GPU, and how often it launched a kernel."""
    found = {"waits": 0, "launches": 0}
    for event in profile.events():
        found["waits"] += event.name in _WAITS
        found["launches"] += any(name in event.name for name in _LAUNCHES)
    return found


def _counted(ranks: Ranks, config: Config) -> dict[str, dict[str, float]]:
    """Launches and waits for each step, of our loop and of a plain loop."""
    from torch.profiler import ProfilerActivity, profile

    from ...exact.packs import packs
    from ...run.run import run
    from .plain_loop import plain_loop

    packs.FEWEST_STEPS = 1
    first = config.trainer.max_steps or 0
    first -= _COUNTED + 2
    found: dict[str, dict[str, float]] = {}
    profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])

    def trace(step: int, engine: Any, losses: Any) -> None:
        if step == first:
            profiler.start()
        if step == first + _COUNTED:
            profiler.stop()
            found["ours"] = {name: count / _COUNTED for name, count in _calls(profiler).items()}
            plain = plain_loop(config, ranks, engine.device)
            plain()  # not counted: a first step also makes the optimizer's state
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as other:
                for _ in range(_COUNTED):
                    plain()
            found["plain"] = {name: count / _COUNTED for name, count in _calls(other).items()}

    run(config, ranks, config_name="doctor", started_at_s=time.time(), trace=trace)
    return found


def kernels(machine: Machine, folder: Path) -> tuple[str, dict[str, Any]]:
    """Kernel launches and host waits of a step at one rank.

    A step may wait once: for the flag of the step two before it.

    Raises:
        TrainerError: a step waits more than once, or the profiler saw no kernel.
    """
    folder.mkdir()
    steps = _TURN * (_WARM_UP + 2)
    config = config_for(
        machine, folder, 1, max_steps=steps, guard_every_steps=0, log_every_steps=10 * steps, drop_last=True
    )
    found = run_ranks(_counted, 1, config, cuda=True)[0]
    ours, plain = found["ours"], found["plain"]
    said = (
        f"{ours['launches']:.0f} kernels a step, {ours['launches'] / max(1.0, plain['launches']):.1f} times a plain "
        f"loop's; {ours['waits']:.2g} host waits a step"
    )
    if not ours["launches"]:
        raise TrainerError("torch's profiler saw no kernel: no figures")
    if ours["waits"] > 1:
        raise TrainerError(f"{said}, but a step should wait once at most")
    return said, found


# ---- the exchange ----------------------------------------------------------------------------------------------------


def _exchanged(ranks: Ranks, config: Config) -> dict[str, dict[str, float]]:
    """Size of the gradient -> milliseconds of our exchange and of one all-reduce. Collective: every rank."""
    import torch.distributed as dist

    from ...engine.device import choose
    from ...exact.exchange import Exchange
    from ...exact.gradient_sum import GradientSum
    from ...exact.record import RecordLayout
    from ...ranks.rendezvous import start

    torch.set_num_threads(1)
    device, backend = choose(config, ranks)
    start(ranks, backend, 600.0)
    W, layout = ranks.world_size, RecordLayout(0)
    found: dict[str, dict[str, float]] = {}
    for size, numel in _GRADIENTS.items():
        like = [torch.zeros(numel, device=device)]
        gradient_sum = GradientSum(like, leaves=[W], rank=ranks.rank, world_size=W, head_size=layout.size)
        exchange = Exchange(gradient_sum, layout, leaves=[W], rank=ranks.rank, world_size=W)
        gradient = torch.ones(numel, device=device)
        ways: dict[str, Callable[[], Any]] = {
            "exchange": functools.partial(exchange, W),
            "all_reduce": functools.partial(dist.all_reduce, gradient),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(2 + _ROUNDS):
            gradient_sum.add(gradient_sum.start(W).start, [gradient])
            for name, way in ways.items():
                dist.barrier()  # all ranks begin at the same time, so only the exchange itself is timed
                _wait_for(device)
                began_s = time.perf_counter()
                way()
                _wait_for(device)
                times[name].append(time.perf_counter() - began_s)
        found[size] = {name: statistics.median(values[2:]) * 1e3 for name, values in times.items()}
    return found


def exchange(machine: Machine, folder: Path) -> tuple[str, dict[str, Any]]:
    """The tree's exchange compared with one all-reduce of the same gradient, on all GPUs, or on two CPU ranks."""
    W = machine.gpus or 2
    found = run_ranks(_exchanged, W, config_for(machine, folder, W), cuda=machine.gpus > 0)[0]
    said = [
        f"{size} {times['exchange']:.2f} ms, all-reduce {times['all_reduce']:.2f} ms" for size, times in found.items()
    ]
    return f"{W} ranks: {'; '.join(said)}. Measured, no bound is set", {"world_size": W, "ms": found}
