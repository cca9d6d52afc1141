"""Where trials run: one on each device, or one on all of them. Which of the two finishes sooner is measured."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..config.keys import Config
from ..engine.gpus import sharing
from ..errors import Stopped, TrainerError
from ..exact.plan import steps_per_epoch
from ..ranks.stopping import EndedBySignal
from ..ranks.workers import WorkerError, run_ranks
from ..study.many_runs import duration
from ..study.slots import Slots
from .trial import make

How = Literal["done", "error", "traceback", "died"]


@dataclass(frozen=True)
class Job:
    """A run to make. Attributes: its name, also of its folder; its config; whether it is tested at its end."""

    name: str
    config: Config
    tested: bool = False


# Next returns the next run, or None if there is none. Report gets a validation (or None: nothing new), and returns why
# the run has to stop, or None. Done gets how a run has ended, with its summary if it is "done", else with a text.
Next = Callable[[], Job | None]
Report = Callable[[Job, dict[str, Any] | None], str | None]
Done = Callable[[Job, How, Any], None]


class Places:
    """The devices of a search.

    Args:
        slots: processes with one device each.
        devices: how many.
        cuda: whether they are GPUs.
        folder: for the files of runs under way.
    """

    def __init__(self, slots: Slots, devices: int, cuda: bool, folder: Path) -> None:
        self._slots, self.devices, self._cuda, self._folder = slots, devices, cuda, folder

    def run(self, together: bool, jobs: Next, report: Report, done: Done) -> None:
        """Makes runs until none is left.

        Args:
            together: whether all devices work on one run; else each device works on a run of its own.
            jobs, report, done: see `Next`, `Report` and `Done`. They are called in this thread.

        Raises:
            KeyboardInterrupt: a signal has ended the runs.
        """
        (self._on_all if together else self._on_each)(jobs, report, done)

    def _on_each(self, jobs: Next, report: Report, done: Done) -> None:
        self._slots.grow(self.devices)
        idle, busy = list(range(self.devices))[::-1], dict[int, Job]()  # reversed: pop() takes the first device first
        while True:
            while idle and (job := jobs()) is not None:
                busy[slot := idle.pop()] = job
                self._slots.send(slot, make, job.config, str(self._folder / job.name), job.tested)
            if not busy:
                return
            for slot, kind, value in self._slots.wait(list(busy), survive=True):
                if kind == "asks":
                    self._slots.send(slot, report(busy[slot], value))
                    continue
                if kind == "died":
                    self._slots.renew(slot)
                idle.append(slot)
                done(busy.pop(slot), kind, value)  # type: ignore[arg-type]

    def _on_all(self, jobs: Next, report: Report, done: Done) -> None:
        while (job := jobs()) is not None:
            how: How = "done"
            W = min(self.devices, job.config.plan(1).micro_batches)  # a rank without a micro-batch is not possible
            value: Any
            try:
                value = run_ranks(
                    make,
                    W,
                    sharing(job.config, W, self.devices if self._cuda else 0),
                    str(self._folder / job.name),
                    job.tested,
                    cuda=self._cuda,
                    timeout_s=math.inf,
                    hear=lambda event, job=job: report(job, event),  # type: ignore[misc]
                )[0]
            except (Stopped, EndedBySignal):
                raise KeyboardInterrupt from None
            except WorkerError as error:
                how, value = "died", str(error)
            except TrainerError as error:
                how, value = "error", str(error)
            done(job, how, value)


@dataclass(frozen=True)
class Times:
    """What was measured.

    Attributes:
        devices: how many there are.
        on_one_s: seconds of a whole trial on one device, while all the others run trials, too.
        on_all_s: seconds of a whole trial on all devices together.
    """

    devices: int
    on_one_s: float
    on_all_s: float


def measure(places: Places, config: Config, samples: int, steps: int) -> Times:
    """Times short runs: one on each device at the same time, twice, and one on all of them.

    Args:
        places: with two devices or more.
        config: of a typical trial.
        samples: of its training split.
        steps: of each run.

    Raises:
        TrainerError: a run could not be made.
    """
    B, trainer = config.plan(1).global_batch_size, config.trainer
    whole = steps_per_epoch(samples, B, trainer.drop_last) * trainer.epochs
    whole = min(whole, trainer.max_steps or whole)
    short = dataclasses.replace(config, trainer=dataclasses.replace(trainer, max_steps=min(steps, whole)))
    took: list[float] = []

    def timed(together: bool, count: int) -> float:
        began_s: dict[str, float] = {}
        took.clear()
        names = [f"timed-{i}" for i in range(count)]

        def jobs() -> Job | None:
            if not names:
                return None
            began_s[names[0]] = time.monotonic()
            return Job(names.pop(0), short)

        def done(job: Job, how: How, value: Any) -> None:
            if how != "done":
                raise TrainerError(f"A run to measure times could not be made: {str(value).strip().splitlines()[-1]}")
            wall_s, n = time.monotonic() - began_s[job.name], value.get("steps") or 1
            step_s = value.get("step_time_s") or wall_s / n
            step_s = step_s if math.isfinite(step_s) else wall_s / n
            # What is not a step (start, data, evaluation) counts once. The time of the steps is that of a whole trial.
            took.append(max(0.0, wall_s - n * step_s) + whole * step_s)

        places.run(together, jobs, lambda job, event: None, done)
        return statistics.median(took)

    timed(False, places.devices)  # not counted: the first run of a process pays for late imports
    return Times(places.devices, timed(False, places.devices), timed(True, 1))


def choose(times: Times, trials: int | None) -> tuple[bool, str]:
    """Whether all devices work on one run, and a line that says why.

    Args:
        times: measured.
        trials: how many are left; None if only the time limits them.
    """
    W = times.devices
    measured = (
        f"with the file's own values a trial takes {_time(times.on_one_s)} on one of {W} devices with all {W} in use, "
        f"{_time(times.on_all_s)} on all together"
    )
    if trials is None:
        together, reason = times.on_all_s < times.on_one_s / W, "more trials end in the time that is left"
    else:
        apart_s, together_s = -(-trials // W) * times.on_one_s, trials * times.on_all_s
        together = together_s < apart_s
        soon_s, late_s = sorted((together_s, apart_s))
        left = f"the {trials:,} trials left are" if trials > 1 else "the trial left is"
        reason = f"{left} done in {_time(soon_s)} instead of {_time(late_s)}"
    how = "all devices for one trial" if together else "one trial on each"
    return together, f"measured: {measured}; so {how}: {reason}"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)
