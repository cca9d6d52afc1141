"""Whether a part of a model is compiled. Torch's compiler would take the packs' own code for a part of the model."""

from __future__ import annotations

import sys

from torch import nn


def has_compiled_part(model: nn.Module) -> bool:
    """Whether a module of the model is compiled."""
    return any(
        type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def compiler_was_at_work() -> bool:
    """Whether anything was compiled in this process: a function of the task's, in its first step."""
    utils = sys.modules.get("torch._dynamo.utils")
    return utils is not None and bool(utils.counters["frames"]["total"])
