"""The logging window: the numbers of the steps since the last record, kept on the device until the window ends.

A logged value is a mean over the window. No step waits for it: on a GPU a window's numbers are copied when the window
ends, and read one window later. Every rank has the same losses, and math.fsum rounds only once. So the curves are
identical at every world size, bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..exact.gradient_noise import NoiseScale, estimates
from .pace import PHASES, PhaseTimer


class StepNumbers(NamedTuple):
    """The numbers of a step that the host knows.

    Attributes:
        micro_batches: M.
        loss_count: the count by which its summed loss is divided.
        samples: of its global batch.
        learning_rate: of its update.
        tokens: of its samples; 0 if they have no lengths.
    """

    micro_batches: int
    loss_count: float
    samples: int
    learning_rate: float
    tokens: int = 0


class Window:
    """The numbers of the steps since the last log, kept on the device until the window ends.

    Args:
        steps: capacity.
        micro_batches: the largest M.
        device: where losses and norms are.
        clock: seconds, replaceable for tests.
        noise: the run's gradient noise scale. The window adds its steps when it is read. None: it is not measured.
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
        self._filled: list[StepNumbers] = []
        self._started_at_s = clock()
        self._paused_s = 0.0
        self._before = 0  # steps of the window that were made before this process began
        self._flops = 0.0  # of the steps that this process has made

    def begin_step(self) -> None:
        """Starts the time of a step."""
        if len(self._filled) == self._before:
            self._started_at_s, self._paused_s = self._clock(), 0.0
        self.timer.begin()

    def end_step(
        self,
        numbers: StepNumbers,
        losses: Tensor,
        norm: Tensor,
        micro_norms: Tensor | None = None,
        counts: Sequence[float] | None = None,
        flops: float = 0.0,
    ) -> None:
        """Takes one step's numbers.

        Args:
            numbers: of the step.
            losses: (M,) sums of the micro-batches.
            norm: () of the gradient.
            micro_norms: (M,) of the micro-batches' gradients, if noise is measured.
            counts: (M,) of the micro-batches, whose sum is `numbers.loss_count`, if noise is measured.
            flops: floating-point operations of the model in this step, of all ranks; 0 if they are not known.
        """
        i = len(self._filled)
        self._losses[i, : len(losses)].copy_(losses)
        self._norms[i].copy_(norm)
        self._filled.append(numbers)
        self._flops += flops
        if self._micro_norms is not None:
            assert micro_norms is not None and counts is not None
            self._micro_norms[i, : len(losses)].copy_(micro_norms)
            self._counts.append(list(counts))

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """A context whose time does not count for the window."""
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
        """The first step of the window whose numbers are not finite: (its position, losses and norm); None if none."""
        losses, norms = self._losses[: self.filled].tolist(), self._norms[: self.filled].tolist()  # device to host
        for i, (row, norm) in enumerate(zip(losses, norms)):
            own = row[: self._filled[i].micro_batches]
            if not all(map(math.isfinite, [*own, norm])):
                return i, own, norm
        return None

    def state_dict(self) -> dict[str, Any]:
        """JSON values of a window that has begun, for a checkpoint. Waits for the device."""
        n = self.filled
        values = {"filled": list(self._filled), "losses": self._losses[:n].tolist(), "norms": self._norms[:n].tolist()}
        if self._noise is None or self._micro_norms is None:
            return values
        micro_norms = self._micro_norms[:n].tolist()
        # The run's noise, with the window's steps added. A resumed run may be unable to use the window (if it logs at
        # other intervals, say). Its steps count even then.
        total = self._noise.copy()
        samples = [numbers.samples for numbers in self._filled]
        for noise in estimates(micro_norms, self._counts, values["norms"], samples)[self._before :]:
            total.add(noise)
        return values | {"micro_norms": micro_norms, "counts": list(self._counts), "noise": total.state_dict()}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned, if it fits. Its steps count for loss and norm, but not for the time."""
        if self._noise is not None and self._micro_norms is not None:
            if "noise" not in values:
                return  # the earlier process did not measure it
            self._noise.load_state_dict(values["noise"])
        filled = [StepNumbers(int(m), float(c), int(s), float(r), int(t)) for m, c, s, r, t in values["filled"]]
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
        """Ends the window after `step`. Returns a function that returns its record; None if the window is empty."""
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
        flops, self._flops = self._flops, 0.0

        def read() -> dict[str, float]:
            seconds = phases()  # on a GPU this waits for the window's last step, and so for the copies
            sums = losses.tolist()
            record: dict[str, float] = {
                "step": step,
                "epoch": epoch,
                # fsum rounds once, at the end, so the order of adding does not matter.
                "train/loss": math.fsum(v for row, numbers in zip(sums, filled) for v in row[: numbers.micro_batches])
                / math.fsum(numbers.loss_count for numbers in filled),
                "train/learning_rate": math.fsum(numbers.learning_rate for numbers in filled) / steps,
                "train/grad_norm": math.fsum(norms.tolist()) / steps,
            }
            if self._noise is not None and micro_norms is not None:
                own, samples = NoiseScale(self._noise.population), [numbers.samples for numbers in filled]
                for i, noise in enumerate(estimates(micro_norms.tolist(), counts, norms.tolist(), samples)):
                    own.add(noise)
                    if i >= before:  # the checkpoint's total already includes the others
                        self._noise.add(noise)
                record.update({f"noise/{name}": value for name, value in own.means().items() if value is not None})
            if not timed:
                return record
            record["throughput/samples_per_s"] = sum(numbers.samples for numbers in timed) / elapsed_s
            record["throughput/step_time_ms"] = elapsed_s / len(timed) * 1e3
            tokens = sum(numbers.tokens for numbers in timed)
            if tokens:
                record["throughput/tokens_per_s"] = tokens / elapsed_s
            if flops:
                record["throughput/model_tflops_per_s"] = flops / elapsed_s / 1e12
            record.update({f"throughput/{phase}_ms": seconds[phase] / len(timed) * 1e3 for phase in PHASES})
            return record

        return read

    def _copy(self, tensor: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return tensor.clone()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)  # device to host, not waited for
