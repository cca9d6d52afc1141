"""What a run measures of itself: loss, throughput and phases, to TensorBoard and `metrics.jsonl`.

A value is a mean over the logging window. The step never waits for one: on a GPU a window's numbers
are copied away when it ends and read a window later. Losses are sums of what every rank has in the same
order (math.fsum rounds once), so the curves of several world sizes lie on one another bit for bit.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from .gradient_noise import NoiseScale, estimates
from .output import to_json

PHASES = ("data", "compute", "reduce", "optimizer")


class PhaseTimer:
    """Adds up the time of a step's phases: `begin` a step, then `mark(phase)` at each phase's end.

    On a GPU, marks are CUDA events, read long after; on the CPU they are the clock.

    Args:
        device: where the work happens.
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
        """Books the time since the last mark to `phase`."""
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
        """Ends a window. Returns a function that gives its seconds by phase, waiting for the device if it must."""
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


class Window:
    """The numbers of the steps since the last log, kept on the device until the window ends.

    Args:
        steps: capacity.
        micro_batches: the largest M.
        device: where losses and norms are.
        clock: seconds, replaceable for tests.
        noise: the run's gradient noise, to which the window adds its steps when it is read; None to measure none.
    """

    def __init__(
        self,
        steps: int,
        micro_batches: int,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
        noise: NoiseScale | None = None,
    ) -> None:
        self._device, self._clock = device, clock
        self._losses = torch.zeros(steps, micro_batches, device=device)
        self._norms = torch.zeros(steps, device=device)
        self._noise = noise
        self._micro_norms = torch.zeros(steps, micro_batches, device=device) if noise is not None else None
        self._counts: list[list[float]] = []  # of each step's micro-batches, if noise is measured
        self._capacity = steps
        self.timer = PhaseTimer(device, clock)
        # M, count, samples, learning rate and tokens of each step
        self._filled: list[tuple[int, float, int, float, int]] = []
        self._started_at_s = clock()
        self._paused_s = 0.0
        self._before = 0  # steps of the window that were made before this process began

    def begin_step(self) -> None:
        """Starts a step's time."""
        if len(self._filled) == self._before:
            self._started_at_s, self._paused_s = self._clock(), 0.0
        self.timer.begin()

    def end_step(
        self,
        losses: Tensor,
        norm: Tensor,
        count: float,
        samples: int,
        learning_rate: float,
        tokens: int = 0,
        micro_norms: Tensor | None = None,
        counts: Sequence[float] | None = None,
    ) -> None:
        """Takes one step's numbers.

        Args:
            losses: (M,) sums of the micro-batches.
            norm: () of the gradient.
            count, samples, learning_rate, tokens: of the step.
            micro_norms: (M,) of the micro-batches' gradients, if noise is measured.
            counts: (M,) what `count` is the sum of, if noise is measured.
        """
        i = len(self._filled)
        self._losses[i, : len(losses)].copy_(losses)
        self._norms[i].copy_(norm)
        self._filled.append((len(losses), count, samples, learning_rate, tokens))
        if self._micro_norms is not None:
            assert micro_norms is not None and counts is not None
            self._micro_norms[i, : len(losses)].copy_(micro_norms)
            self._counts.append(list(counts))

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves what happens in this context out of the window's time."""
        began_s = self._clock()
        try:
            yield
        finally:
            self._paused_s += self._clock() - began_s

    @property
    def filled(self) -> int:
        """Steps in the window."""
        return len(self._filled)

    @property
    def full(self) -> bool:
        """Whether the window has to be closed before the next step."""
        return len(self._filled) == self._capacity

    def first_non_finite(self) -> tuple[int, list[float], float] | None:
        """The first step of the window whose numbers are not finite: (its place, its losses, its norm)."""
        losses, norms = self._losses[: self.filled].tolist(), self._norms[: self.filled].tolist()  # device to host
        for i, (row, norm) in enumerate(zip(losses, norms)):
            own = row[: self._filled[i][0]]
            if not all(map(math.isfinite, [*own, norm])):
                return i, own, norm
        return None

    def checkpoint(self) -> dict[str, Any]:
        """What a checkpoint holds of a window that has begun: JSON values. Waits for the device."""
        n = self.filled
        values = {"filled": list(self._filled), "losses": self._losses[:n].tolist(), "norms": self._norms[:n].tolist()}
        if self._noise is None or self._micro_norms is None:
            return values
        micro_norms = self._micro_norms[:n].tolist()
        # The run's noise with that of the window's steps: these are there even if the window will not fit.
        total = self._noise.copy()
        samples = [samples for _, _, samples, *_ in self._filled]
        for noise in estimates(micro_norms, self._counts, values["norms"], samples)[self._before :]:
            total.add(noise)
        return values | {"micro_norms": micro_norms, "counts": list(self._counts), "noise": total.checkpoint()}

    def load(self, values: Mapping[str, Any]) -> None:
        """Puts back what `checkpoint` gave, if it fits; its steps count for loss and norm, and not for the time."""
        if self._noise is not None and self._micro_norms is not None:
            if "noise" not in values:
                return  # it was not measured then
            self._noise.load(values["noise"])
        filled = [(int(m), float(c), int(s), float(r), int(t)) for m, c, s, r, t in values["filled"]]
        if not filled or len(filled) >= self._capacity:
            return
        self._filled = filled
        self._losses[: len(filled)].copy_(torch.tensor(values["losses"]))
        self._norms[: len(filled)].copy_(torch.tensor(values["norms"]))
        if self._micro_norms is not None:
            self._micro_norms[: len(filled)].copy_(torch.tensor(values["micro_norms"]))
            self._counts = [[float(c) for c in counts] for counts in values["counts"]]
        self._before = len(filled)

    def close(self, step: int, epoch: int) -> Callable[[], dict[str, float]] | None:
        """Ends the window after `step`. Returns a function that gives its record, or None if it is empty."""
        steps, filled = len(self._filled), self._filled
        if steps == 0:
            return None
        before, self._before = self._before, 0
        timed = filled[before:]
        elapsed_s = self._clock() - self._started_at_s - self._paused_s
        phases = self.timer.take()
        losses, norms = self._copy(self._losses[:steps]), self._copy(self._norms[:steps])
        micro_norms = None if self._micro_norms is None else self._copy(self._micro_norms[:steps])
        counts, self._filled, self._counts = self._counts, [], []

        def read() -> dict[str, float]:
            seconds = phases()  # on a GPU this waits for the window's last step, and so for the copies
            sums = losses.tolist()
            record: dict[str, float] = {
                "step": step,
                "epoch": epoch,
                # fsum rounds once: the mean does not depend on how the sums were made.
                "train/loss": math.fsum(v for row, (m, *_) in zip(sums, filled) for v in row[:m])
                / math.fsum(count for _, count, *_ in filled),
                "train/learning_rate": math.fsum(rate for *_, rate, _ in filled) / steps,
                "train/grad_norm": math.fsum(norms.tolist()) / steps,
            }
            if self._noise is not None and micro_norms is not None:
                own, samples = NoiseScale(), [samples for _, _, samples, *_ in filled]
                for i, noise in enumerate(estimates(micro_norms.tolist(), counts, norms.tolist(), samples)):
                    own.add(noise)
                    if i >= before:  # the others are in the checkpoint's
                        self._noise.add(noise)
                record.update({f"noise/{name}": value for name, value in own.means().items() if value is not None})
            if not timed:
                return record
            record["throughput/samples_per_s"] = sum(samples for _, _, samples, *_ in timed) / elapsed_s
            record["throughput/step_time_ms"] = elapsed_s / len(timed) * 1e3
            tokens = sum(t for *_, t in timed)
            if tokens:
                record["throughput/tokens_per_s"] = tokens / elapsed_s
            record.update({f"throughput/{phase}_ms": seconds[phase] / len(timed) * 1e3 for phase in PHASES})
            return record

        return read

    def _copy(self, tensor: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return tensor.clone()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)  # device to host, not waited for


class Pace:
    """Samples and seconds of the whole run, without evaluation and without the first steps, which warm up.

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

    def step(self, done: int, samples: int, tokens: int = 0) -> None:
        """Counts a step: `done` so far, with this one, of `samples`."""
        if done == self._warmup:
            self._began_s = self._clock()
        elif done > self._warmup:
            self._steps += 1
            self._samples += samples
            self._tokens += tokens

    def pause(self, seconds: float) -> None:
        """Leaves time out: an evaluation's."""
        self._began_s += seconds

    def stop(self) -> None:
        """Ends the run's time, once the device has finished."""
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


def memory_gib(device: torch.device) -> dict[str, float]:
    """Peak memory of this rank so far: on its GPU, and on the host (resident set)."""
    import resource

    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux gives KiB
    result = {"memory/host_peak_gib": host}
    if device.type == "cuda":
        result["memory/device_peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return result


def _lines_until(path: Path, step: int) -> list[str]:
    """The records of a metrics.jsonl up to a step; a last line that was cut off is dropped."""
    kept = []
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    for line in text.splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return kept


class Writer:
    """Rank 0's files: TensorBoard events and one JSON line a record.

    Args:
        folder: the run's output folder.
        tensorboard: whether to write events.
        after_step: go on with the files of a run, without what they hold of later steps; 0 for new ones.
    """

    def __init__(self, folder: Path, tensorboard: bool, after_step: int = 0) -> None:
        path = folder / "metrics.jsonl"
        kept = _lines_until(path, after_step) if after_step else []
        temporary = path.with_name(f".{path.name}")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)
        self._lines: TextIO = path.open("a", encoding="utf-8")
        self._events: Any = None
        if tensorboard:
            from torch.utils.tensorboard.writer import FileWriter

            self._events = FileWriter(str(folder / "tensorboard"))
            if after_step:
                # TensorBoard then drops what earlier files hold of later steps.
                from tensorboard.compat.proto.event_pb2 import Event, SessionLog

                self._events.add_event(Event(file_version="brain.Event:2"), after_step + 1)
                self._events.add_event(Event(session_log=SessionLog(status=SessionLog.START)), after_step + 1)

    def describe(self, texts: Mapping[str, str], scalars: Mapping[str, float], step: int = 0) -> None:
        """Writes what holds for the run from a step on."""
        if self._events is not None:
            from torch.utils.tensorboard.summary import text

            for name, content in texts.items():
                self._events.add_summary(text(name, content), step)
            self._add_scalars(scalars, step)

    def write(self, record: Mapping[str, float]) -> None:
        """Writes one record: "step", "epoch" and scalars by their TensorBoard names."""
        self._lines.write(to_json(record) + "\n")
        self._lines.flush()
        if self._events is not None:
            scalars = {name if "/" in name else f"train/{name}": v for name, v in record.items() if name != "step"}
            self._add_scalars(scalars, int(record["step"]))

    def draw(self, pictures: Mapping[str, Tensor], step: int) -> None:
        """Writes pictures, name -> (C, H, W) uint8."""
        if self._events is not None:
            from torch.utils.tensorboard.summary import image

            for name, picture in pictures.items():
                self._events.add_summary(image(name, picture, dataformats="CHW"), step)

    def _add_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        # All in one event: SummaryWriter.add_scalar for each takes four times as long.
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._events.add_summary(Summary(value=values), step)

    def close(self) -> None:
        """Flushes everything to disk."""
        self._lines.close()
        if self._events is not None:
            self._events.close()
