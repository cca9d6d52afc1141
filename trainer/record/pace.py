"""Measures time: the phases of the steps, and the speed of the whole run."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import torch

PHASES = ("data", "compute", "reduce", "optimizer")


class PhaseTimer:
    """Sums the time of each phase: call `begin` at the start of a step, and `mark(phase)` at the end of each phase.

    On a GPU a mark is a CUDA event, which is read much later, so the host need not wait. On the CPU it reads the clock.

    Args:
        device: the device that computes.
        clock: seconds, replaceable for tests.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._cuda = device.type == "cuda"
        self._totals = dict.fromkeys(PHASES, 0.0)
        self._last = 0.0
        self._events: list[tuple[str, Any]] = []
        self._pool: list[Any] = []

    def begin(self) -> None:
        """Starts a step's first phase now."""
        if self._cuda:
            self._record("")
        else:
            self._last = self._clock()

    def mark(self, phase: str) -> None:
        """Adds the time since the last mark to `phase`."""
        if self._cuda:
            self._record(phase)
        else:
            now = self._clock()
            self._totals[phase] += now - self._last
            self._last = now

    def _record(self, phase: str) -> None:
        event = self._pool.pop() if self._pool else torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append((phase, event))

    def take(self) -> Callable[[], dict[str, float]]:
        """Ends a window. Returns a function that returns its seconds by phase, and may wait for the device."""
        totals, self._totals = self._totals, dict.fromkeys(PHASES, 0.0)
        events, self._events = self._events, []

        def read() -> dict[str, float]:
            if events:
                events[-1][1].synchronize()
                for (_, before), (phase, after) in itertools.pairwise(events):
                    if phase:
                        totals[phase] += before.elapsed_time(after) / 1e3
                self._pool.extend(event for _, event in events)
            return totals

        return read


class Pace:
    """Samples and seconds of the whole run, without evaluations and without the first steps (warm-up).

    Args:
        total_steps: of the run; a tenth of them, at most ten and at least one, are warm-up.
        clock: seconds, replaceable for tests.
    """

    def __init__(self, total_steps: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._warmup = min(10, max(1, total_steps // 10))
        self._clock = clock
        self._began_s = 0.0
        self._seconds = 0.0
        self._steps = self._samples = self._tokens = 0
        self._flops = 0.0

    def step(self, done: int, samples: int, tokens: int = 0, flops: float = 0.0) -> None:
        """Counts a step of all ranks: its samples, tokens and operations. `done`: the steps so far, with this one."""
        if done == self._warmup:
            self._began_s = self._clock()
        elif done > self._warmup:
            self._steps += 1
            self._samples += samples
            self._tokens += tokens
            self._flops += flops

    def pause(self, seconds: float) -> None:
        """Leaves the seconds of an evaluation out."""
        self._began_s += seconds

    def stop(self) -> None:
        """Ends the measured time. Call it when the device has finished."""
        self._seconds = self._clock() - self._began_s

    @property
    def step_time_s(self) -> float:
        """Mean seconds of a step; nan if there were only warm-up steps."""
        return self._seconds / self._steps if self._steps else math.nan

    @property
    def samples_per_s(self) -> float:
        """Mean samples a second over all ranks; nan if there were only warm-up steps."""
        return self._samples / self._seconds if self._steps else math.nan

    @property
    def tokens_per_s(self) -> float | None:
        """Mean tokens (padding not counted) a second over all ranks; None for data without lengths."""
        return self._tokens / self._seconds if self._tokens else None

    @property
    def model_tflops_per_s(self) -> float | None:
        """Mean 10^12 floating-point operations of the model a second, over all ranks; None if none were counted."""
        return self._flops / self._seconds / 1e12 if self._flops else None


def memory_gib(device: torch.device) -> dict[str, float]:
    """Peak memory of this rank so far: on its GPU, and on the host (resident set)."""
    import resource

    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux gives KiB
    result = {"memory/host_peak_gib": host}
    if device.type == "cuda":
        result["memory/device_peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return result
