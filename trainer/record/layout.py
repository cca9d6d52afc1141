"""The first look at a run in TensorBoard: loss, validation, speed and the time of a step in its Custom Scalars tab."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .pace import PHASES

_STACK = "step_time_ms"


def stacked(record: Mapping[str, float]) -> dict[str, float]:
    """The time of a step as a stack, for TensorBoard only: the phases' milliseconds, each added to those before it.

    The last line is the whole step. The time between it and the line before belongs to no phase.
    """
    whole = record.get("throughput/step_time_ms")
    if whole is None:
        return {}
    found, total = {}, 0.0
    for number, phase in enumerate(PHASES, start=1):
        total += record[f"throughput/{phase}_ms"]
        found[f"{_STACK}/{number}_to_{phase}"] = total
    return found | {f"{_STACK}/{len(PHASES) + 1}_to_end": whole}


def layout(*, tokens: bool, mfu: bool) -> Any:
    """The summary with the layout. TensorBoard combines the layouts of the runs that it shows.

    Args:
        tokens: whether samples have lengths.
        mfu: whether the devices' peak is known.
    """
    from torch.utils.tensorboard.summary import custom_scalars

    return custom_scalars(
        {
            "Model": {
                "loss": _lines("train/loss", "eval/.*/loss"),
                "validation and test": _lines("eval/[^/]*/(?!loss$).*"),
            },
            "Throughput": {
                "samples a second": _lines("throughput/samples_per_s"),
                **({"tokens a second": _lines("throughput/tokens_per_s")} if tokens else {}),
                "model TFLOP/s": _lines("throughput/model_tflops_per_s"),
                **({"MFU, a share of the peak": _lines("throughput/mfu")} if mfu else {}),
            },
            "Time of a step": {
                "milliseconds, stacked": _lines(f"{_STACK}/.*"),
                "milliseconds of each phase": _lines(*(f"throughput/{phase}_ms" for phase in PHASES)),
                "milliseconds of evaluations and checkpoints": _lines("throughput/(eval|checkpoint)_ms"),
            },
            "Optimizer": {
                "learning rate": _lines("train/learning_rate"),
                "gradient norm": _lines("train/grad_norm"),
            },
        }
    )


def _lines(*tags: str) -> list[Any]:
    """A chart of the scalars whose names match, as regular expressions."""
    return ["Multiline", [f"^{tag}$" for tag in tags]]
