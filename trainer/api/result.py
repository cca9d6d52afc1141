"""The result of a finished run: metrics, history, the model."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.gpus import usable_gpus
from ..errors import UserError

if TYPE_CHECKING:
    import pandas
    from torch import nn


@dataclass(frozen=True, repr=False)
class Result:
    """A run that has finished.

    Attributes:
        output_dir: its folder (an absolute path). Everything else is read from there.
        summary: the content of summary.json.
        task: the class of a task that is in no file (of a notebook, for example); else None.
    """

    output_dir: Path
    summary: dict[str, Any]
    task: type | None = field(default=None, repr=False)

    @staticmethod
    def read(output_dir: str | Path) -> Result:
        """The result of a run that has finished earlier, whatever command has made it.

        Raises:
            UserError: the folder holds no finished run.
        """
        path = Path(output_dir).expanduser().absolute()
        try:
            summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
            finished = summary["metrics"] is not None
        except (OSError, ValueError, KeyError, TypeError):
            finished = False
        if not finished:
            raise UserError(f"{path} holds no finished run: its summary.json is missing, or has no metrics.")
        return Result(path, summary)

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Split ("validation", "test") -> metric ("loss", and those of the task) -> value, of the kept model."""
        return {split: dict(values) for split, values in self.summary["metrics"].items()}

    @property
    def parameters_sha256(self) -> str:
        """The hash of all parameters after the last step: the same at every number of ranks if the run is bitwise."""
        return str(self.summary["parameters_sha256"])

    @property
    def exactness(self) -> str:
        """The run's label: "bitwise" or "tolerance"."""
        return str(self.summary["exactness"])

    @property
    def records(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl, in order: one for each logging window and each evaluation."""
        lines = (self.output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    @property
    def history(self) -> pandas.DataFrame:
        """The records as a table: one row for each step that was logged or evaluated, in order; the step is the index.

        Its columns are the names in TensorBoard: "epoch", "train/loss", "eval/validation/accuracy", ... A cell is NaN
        where a step has no such number.
        """
        import pandas

        rows: dict[int, dict[str, float]] = {}
        for record in self.records:
            rows.setdefault(int(record["step"]), {}).update(record)
        table = pandas.DataFrame(list(rows.values()))
        return table.set_index("step") if len(table) else table

    def model(self, device: str = "cpu") -> nn.Module:
        """The trained model in evaluation mode, loaded anew from the output folder.

        Args:
            device: where to put it, as torch names devices.

        Raises:
            UserError: it cannot be loaded, or the device cannot be used.
        """
        from .saved import hosted_model

        with hosted_model(self, None) as (found, _):
            _refuse_unusable(device)
            return found.model().to(device).eval()

    def __repr__(self) -> str:
        """The folder, the steps and the metrics in one line."""
        metrics = "; ".join(
            f"{split} " + ", ".join(f"{name} {value:.4f}" for name, value in values.items())
            for split, values in self.metrics.items()
        )
        status, steps, path = self.summary.get("status", "?"), self.summary.get("steps", 0), self.output_dir
        shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        return f"Result({str(shown)!r}: {status} after {steps:,} steps, {self.exactness}; {metrics})"


def _refuse_unusable(device: str) -> None:
    """Raises UserError if torch cannot put a tensor on a device. It is called before a model is loaded."""
    import torch

    if str(device).startswith("cuda") and usable_gpus("cuda") == 0:
        raise UserError(f"device={str(device)!r}, but torch finds no GPU on this machine.")
    try:
        torch.zeros(1, device=device)
    except Exception as error:  # torch's errors are of many classes: AssertionError, RuntimeError, TypeError, ...
        raise UserError(f"device={device!r} cannot be used: {str(error).strip().splitlines()[0]}") from error
