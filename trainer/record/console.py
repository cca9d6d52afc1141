"""What the user sees during a run. Rank 0 only.

DeepSpeed's own messages do not go to the console but to a log file.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from ..colours import has_colours, painted, signalled

# The bars that are on the terminal now.
_bars: list[Any] = []


def say(*lines: str) -> None:
    """Prints lines at once, above a bar. If the pipe or terminal is closed, the run continues without output."""
    bars = list(_bars)
    for bar in bars:
        bar.clear()
    try:
        for line in lines:
            print(signalled(line, sys.stdout), flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    for bar in bars:
        bar.refresh()


class DeepSpeedLog(logging.Filter):
    """Catches what DeepSpeed logs and prints. It keeps it in memory until there is a file for it.

    Call `install` before deepspeed is imported. On import, DeepSpeed attaches a console handler to its logger, but a
    filter on the logger itself is asked first.
    """

    def __init__(self, keep: bool) -> None:
        super().__init__()
        self._sink: TextIO = io.StringIO()
        self._keep = keep
        self._formatter = logging.Formatter("%(asctime)s %(levelname)s %(filename)s:%(lineno)d %(message)s")

    def install(self) -> None:
        """Starts catching log records of this process."""
        logging.getLogger("DeepSpeed").addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Takes the record. The name of this hook is given by logging."""
        if self._keep:
            with contextlib.suppress(OSError):  # the disk is full: no message of DeepSpeed's is worth a run
                print(self._formatter.format(record), file=self._sink)
        return False

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Also catches what is printed in this context, and from now on DeepSpeed's messages of level INFO."""
        if self._keep:
            logging.getLogger("DeepSpeed").setLevel(logging.INFO)
        with contextlib.redirect_stdout(self._sink), contextlib.redirect_stderr(self._sink):
            yield

    def open(self, path: Path) -> None:
        """Writes what was caught to a file, and everything from now on."""
        assert isinstance(self._sink, io.StringIO)
        path.parent.mkdir(exist_ok=True)
        caught = self._sink.getvalue()
        self._sink = path.open("a", encoding="utf-8", buffering=1)  # of a run that continues, there is one already
        self._sink.write(caught)

    def close(self) -> None:
        """Stops catching."""
        logging.getLogger("DeepSpeed").removeFilter(self)
        with contextlib.suppress(OSError):
            self._sink.close()


class _Terminal:
    """Standard error, for a bar. If the terminal is gone, the run continues without it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()


def _bar(**options: Any) -> Any:
    from tqdm import tqdm

    colour = "green" if has_colours(sys.stderr) else None
    bar = tqdm(file=_Terminal(), dynamic_ncols=True, colour=colour, **options)
    _bars.append(bar)
    return bar


def _close(bar: Any) -> None:
    bar.close()
    if bar in _bars:
        _bars.remove(bar)


# An evaluation that takes longer than this prints how far it is.
_QUIET_S = 30.0
# On a terminal it shows a bar after this time. A bar that disappears at once would only flicker.
_FLICKER_S = 0.5
# The format of a run's bar. tqdm's own rate is left out: it counts steps, and the bar shows samples beside the loss.
_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
# The fewest columns of the bar itself; and the columns around it, without those of the count of steps.
_BAR_COLUMNS, _OTHER_COLUMNS = 6, 22


class ProgressBar:
    """A progress bar on a terminal; elsewhere a plain line every tenth of the run.

    Args:
        total: steps of the run.
        visible: True only on rank 0.
        done: steps made before this process began.
    """

    def __init__(self, total: int, visible: bool, done: int = 0) -> None:
        self._total, self._visible, self._done = total, visible, done
        self._terminal = visible and sys.stderr.isatty()
        self._bar: Any = None
        self._inner: Any = None  # that of an evaluation
        self._next_line = self._next_evaluation = 0
        self._loss = self._rate = ""
        self._validation: list[str] = []

    def begin(self) -> None:
        """Shows the bar. Call it after the lines that belong above it have been printed."""
        if self._terminal and self._bar is None:
            self._bar = _bar(total=self._total, initial=self._done, unit="step", bar_format=_FORMAT)

    def logged(self, record: dict[str, float]) -> None:
        """Shows a logging window."""
        if not self._visible:
            return
        step = int(record["step"])
        rate = f"{record.get('throughput/samples_per_s', 0.0):,.0f} samples/s"
        if self._bar is not None:
            self._loss, self._rate = f"loss {record['train/loss']:.4f}", rate
            self._bar.set_postfix_str(self._beside(), refresh=False)
            self._bar.update(step - self._bar.n)
        elif step >= self._next_line and not self._terminal:
            say(
                f"step {step:,} of {self._total:,}  epoch {record['epoch']:g}  loss {record['train/loss']:.4f}  "
                f"learning rate {record['train/learning_rate']:.3g}  {rate}"
            )
            self._next_line = step + max(1, self._total // 10)

    def _beside(self) -> str:
        """The text beside the bar, while there is room: loss, a metric of validation, speed, other metrics."""
        room = (self._bar.format_dict["ncols"] or 80) - _BAR_COLUMNS - _OTHER_COLUMNS - 2 * len(str(self._total))
        shown = ""
        for part in filter(None, (self._loss, *self._validation[:1], self._rate, *self._validation[1:])):
            added = f", {part}" if shown else part
            room -= len(added)
            if room < 0:
                break
            shown += painted(added, "cyan", sys.stderr) if part in self._validation else added
        return shown

    def evaluating(self, split: str) -> Callable[[int, int], None]:
        """A function that shows how far the evaluation of a split is, called with (forwards made, of how many).

        On a terminal it is a bar that goes when it is full; elsewhere a line, at most twice a minute.
        """
        said_at_s = time.monotonic()

        def tick(done: int, total: int) -> None:
            nonlocal said_at_s
            if self._terminal:
                if done == 1:
                    self._inner = _bar(total=total, desc=split, unit="batch", leave=False, delay=_FLICKER_S)
                self._inner.update(done - self._inner.n)
                if done == total:
                    _close(self._inner)
            elif self._visible and done < total and time.monotonic() - said_at_s > _QUIET_S:
                say(f"{split}: {done:,} of {total:,} micro-batches of this rank")
                said_at_s = time.monotonic()

        return tick

    def evaluated(self, step: int, split: str, metrics: dict[str, float]) -> None:
        """Shows an evaluation: beside the bar, or as a line about as often as a logging window."""
        if self._bar is not None:
            names = sorted(metrics, key=lambda name: name == "loss")  # the task's own metrics first
            self._validation = [f"{split} {name} {metrics[name]:.4f}" for name in names]
            self._bar.set_postfix_str(self._beside())
        elif self._visible and not self._terminal and step >= self._next_evaluation:
            shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            say(f"step {step:,} of {self._total:,}  {split}: {shown}")
            self._next_evaluation = step + max(1, self._total // 10)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        for bar in (self._inner, self._bar):
            if bar is not None:
                _close(bar)
        self._bar = None


def table(rows: Iterable[Sequence[str]], header: Sequence[str] | None = None) -> str:
    """Aligned columns. The first is aligned left; with a header, the others are aligned right."""
    cells = [list(row) for row in rows]
    every = [list(header), *cells] if header else cells
    widths = [max(len(row[i]) for row in every) for i in range(len(every[0]))]

    def line(row: list[str]) -> str:
        aligned = [c.rjust(w) if header and i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))]
        return "  ".join(aligned).rstrip()

    lines = [line(row) for row in every]
    if header:
        lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)
