"""Makes the checks in their order, prints one line for each, and writes a JSON file with all figures."""

from __future__ import annotations

import datetime
import importlib
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ... import __version__
from ...errors import TrainerError, UserError
from ...files import write_json
from ...ranks.workers import WorkerError
from ...record.console import say

_PASSED, _FAILED, _NOT_HERE = "passed", "failed", "not possible here"


@dataclass(frozen=True)
class Line:
    """The result of one check.

    Attributes:
        subject: what was checked.
        verdict: "passed", "failed" or "not possible here".
        text: the figures in words, or the reason.
        figures: the same for programs.
        seconds: how long it took.
    """

    subject: str
    verdict: str
    text: str
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def shown(self) -> str:
        """The line as it is printed."""
        return f"{self.verdict:18}{self.subject:22}{self.text}"


Check = Callable[[], tuple[str, dict[str, Any]]]


def _tried(subject: str, check: Check, not_here: str | None) -> Line:
    """Makes one check. `not_here` says why it cannot be made; None if it can."""
    if not_here is not None:
        return Line(subject, _NOT_HERE, not_here)
    began_s = time.monotonic()
    try:
        text, figures = check()
        verdict = _PASSED
    except (TrainerError, WorkerError) as error:
        verdict, text, figures = _FAILED, str(error), {}
    except Exception:  # a check that breaks is a finding, too, and the other checks go on
        verdict, text, figures = _FAILED, traceback.format_exc(), {}
    return Line(subject, verdict, text, figures, round(time.monotonic() - began_s, 1))


def doctor(device: str, output: str) -> int:
    """Tries on this machine what the trainer promises, and prints a line for each check.

    Args:
        device: "auto", "cpu" or "cuda".
        output: the JSON file.

    Returns:
        0 if nothing failed, else 1.

    Raises:
        UserError: there is no such device, or the file cannot be written.
    """
    try:
        if Path(output).is_dir():
            raise IsADirectoryError("it is a folder")
        tempfile.TemporaryFile(dir=Path(output).absolute().parent).close()
    except OSError as error:
        raise UserError(
            f"--output {output} cannot be written: {error.strerror or error}. Name another file."
        ) from error
    # These load torch. So a wrong --output is reported before, at once.
    exactness, machines, speed = (
        importlib.import_module(f".{name}", __package__) for name in ("exactness", "machine", "speed")
    )
    machine = machines.look(device)
    say("Each check prints a line when it ends. Some checks take a minute, and longer on a busy machine.", "")
    no_gpu = None if machine.gpus else "needs an NVIDIA GPU"
    lines: list[Line] = []

    def hash_of(subject: str) -> str:
        found = next((line.figures.get("parameters_sha256") for line in lines if line.subject == subject), None)
        if found is None:
            raise TrainerError("there is no hash to compare with, because exactness failed")
        return str(found)

    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="doctor-") as scratch:
        at = Path(scratch)
        checks: list[tuple[str, Check, str | None]] = [
            ("devices", lambda: machines.devices(machine), None),
            ("versions", lambda: machines.versions(machine), None),
            ("exact, float32", lambda: exactness.one_hash(machine, at / "float32", bf16=False), None),
            ("exact, bfloat16", lambda: exactness.one_hash(machine, at / "bfloat16", bf16=True), None),
            (
                "stop and resume",
                lambda: exactness.stop_and_resume(machine, at / "stopped", hash_of("exact, float32")),
                None,
            ),
            ("a killed rank", lambda: exactness.killed_rank(machine, at / "killed"), None),
            ("speed", lambda: speed.throughput(machine, at / "speed"), None),
            ("kernels and waits", lambda: speed.kernels(machine, at / "kernels"), no_gpu),
            (
                "exchange",
                lambda: speed.exchange(machine, at / "exchange"),
                "needs two GPUs" if machine.gpus == 1 else None,
            ),
        ]
        for subject, check, not_here in checks:
            lines.append(_tried(subject, check, not_here))
            say(lines[-1].shown())
    spent_s = time.monotonic() - began_s
    failed = [line.subject for line in lines if line.verdict == _FAILED]
    report = {
        "trainer": __version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(spent_s, 1),
        "failed": failed,
        "lines": [asdict(line) for line in lines],
    }
    write_json(Path(output), report)
    say("", f"{'FAILED: ' + ', '.join(failed) if failed else 'Nothing failed'}. {spent_s:.0f} s. Figures: {output}")
    return int(bool(failed))


def markdown(report: dict[str, Any]) -> str:
    """A report, as read from its JSON file, as a table for a README."""
    rows = [f"| {line['subject']} | {line['verdict']} | {line['text'].splitlines()[0]} |" for line in report["lines"]]
    return "\n".join(["| check | verdict | figures |", "|---|---|---|", *rows])
