"""TensorBoard's event file of one process of a run, in order even if the clock is set back.

TensorBoard reads the files of a folder in the order of their names. Its own writer puts the time into the name. If the
clock is set back before a run continues, the new file would be read first, and the curve would run backwards in time.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_NAME = re.compile(r"events\.out\.tfevents\.(\d+)\..*")
# TensorBoard reads this file before all others of its folder. About a row of the HParams tab, it keeps what it reads
# first. So a run that continues writes this file anew, and has one row.
FIRST = "events.out.tfevents.0000000000.hparams"


def _number(file: Path) -> int:
    """The whole second in the name of an event file; 0 for any other file."""
    match = _NAME.fullmatch(file.name)
    return int(match[1]) if match else 0


def _last_s(file: Path) -> float:
    """The time of the last event in a file, up to where it is damaged; 0 if there is none."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    return max((Event.FromString(event).wall_time for event in RawEventFileLoader(str(file)).Load()), default=0.0)


def write_file(file: Path, at_s: float, summaries: Sequence[Any]) -> None:
    """Writes a whole event file, all of its events of one time and step 0."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    with file.open("wb") as opened:
        writer = RecordWriter(opened)
        writer.write(Event(wall_time=at_s, file_version="brain.Event:2").SerializeToString())
        for summary in summaries:
            writer.write(Event(wall_time=at_s, step=0, summary=summary).SerializeToString())


class Events:
    """A new event file. Its name and its events come after those in the folder, whatever the clock says.

    Args:
        folder: of event files; it is made.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        last = max(folder.iterdir(), key=lambda file: (_number(file), file.name), default=None)
        before_s, number = (_last_s(last), _number(last)) if last is not None and _number(last) else (0.0, 0)
        began_s = max(time.time(), before_s, number + 1.0)
        # From here on the monotonic clock counts: the other one may be set while the run goes on.
        self._ahead_s = began_s - time.monotonic()
        name = f"events.out.tfevents.{int(began_s):010d}.{socket.gethostname()}"
        self._writer: Any = RecordWriter((folder / name).open("xb"))
        self._write(file_version="brain.Event:2")

    def _write(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.write(Event(wall_time=self._ahead_s + time.monotonic(), **content).SerializeToString())
        self._writer.flush()  # a TensorBoard that looks on sees it at once

    def restart(self, step: int) -> None:
        """Makes TensorBoard ignore what earlier files have from this step on."""
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self._write(session_log=SessionLog(status=SessionLog.START), step=step)

    def add(self, summary: Any, step: int) -> None:
        """Writes a summary of TensorBoard's."""
        self._write(summary=summary, step=step)

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()
