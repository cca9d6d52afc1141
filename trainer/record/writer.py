"""Rank 0's log: one line of JSON for each record, and TensorBoard events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from ..files import to_json, whole_file
from .events import FIRST, Events, write_file
from .hparams import end, start
from .layout import layout, stacked


def _lines_until(path: Path, step: int) -> list[str]:
    """The records of a metrics.jsonl up to a step, without a last line that was cut off."""
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


def _scalars(scalars: Mapping[str, float]) -> Any:
    # All scalars in one event: a call of SummaryWriter.add_scalar for each would take four times as long.
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()])


class Writer:
    """Rank 0's files: TensorBoard events, and one JSON line for each record.

    Args:
        folder: the run's output folder.
        tensorboard: whether to write events.
        after_step: continue the files of a run, without their records of later steps; 0 for new files.
        records: the most lines to keep. A run that ended at `after_step` wrote records of its end after its checkpoint.
            If it continues, these are dropped.

    Attributes:
        lines: records written so far, those of earlier processes included.
    """

    def __init__(self, folder: Path, tensorboard: bool, after_step: int = 0, records: int | None = None) -> None:
        path = folder / "metrics.jsonl"
        kept = _lines_until(path, after_step)[:records] if after_step else []
        self.lines = len(kept)
        with whole_file(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")
        self._file: TextIO = path.open("a", encoding="utf-8")
        self._folder = folder / "tensorboard"
        self._events = Events(self._folder) if tensorboard else None
        if self._events is not None and after_step:
            self._events.restart(after_step + 1)

    def describe(self, texts: Mapping[str, str], scalars: Mapping[str, float], step: int = 0) -> None:
        """Writes facts about the run that hold from a step on."""
        if self._events is not None:
            from torch.utils.tensorboard.summary import text

            for name, content in texts.items():
                self._events.add(text(name, content), step)
            self._events.add(_scalars(scalars), step)

    def arrange(self, *, tokens: bool, mfu: bool, step: int = 0) -> None:
        """Writes what the Custom Scalars tab shows, see `layout`."""
        if self._events is not None:
            self._events.add(layout(tokens=tokens, mfu=mfu), step)

    def set_row(self, settings: Mapping[str, str | float | bool], began_at_s: float) -> None:
        """Writes the run's row of the HParams tab: one, however often the run is interrupted."""
        if self._events is not None:
            with whole_file(self._folder / FIRST) as temporary:
                write_file(temporary, began_at_s, [start(settings, began_at_s)])

    def end_row(self, results: Mapping[str, float], ended_at_s: float, step: int) -> None:
        """Writes the results of a run that has come to its end, by name, into its row."""
        if self._events is not None:
            self._events.add(_scalars({f"result/{name}": value for name, value in results.items()}), step)
            self._events.add(end(True, ended_at_s), step)

    def write(self, record: Mapping[str, float]) -> None:
        """Writes one record: "step", "epoch" and scalars by their TensorBoard names."""
        self._file.write(to_json(record) + "\n")
        self._file.flush()
        self.lines += 1
        if self._events is not None:
            scalars = {name if "/" in name else f"train/{name}": v for name, v in record.items() if name != "step"}
            self._events.add(_scalars(scalars | stacked(record)), int(record["step"]))

    def draw(self, pictures: Mapping[str, Tensor], step: int) -> None:
        """Writes pictures, name -> (C, H, W) uint8."""
        if self._events is not None:
            from torch.utils.tensorboard.summary import image

            for name, picture in pictures.items():
                self._events.add(image(name, picture, dataformats="CHW"), step)

    def close(self) -> None:
        """Flushes everything to disk."""
        self._file.close()
        if self._events is not None:
            self._events.close()
