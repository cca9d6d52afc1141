"""Exact strong scaling: any number of ranks, the same model bit for bit.

In Python (see trainer/api/README.md):

    from trainer import train

    result = train("strong.json", ranks=2, overrides={"trainer.epochs": 3})
    result.metrics["test"], result.history, result.model()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api.callbacks import Callback, CallbackError
    from .api.evaluation import evaluate, predict
    from .api.result import Result
    from .api.training import load_config, train
    from .errors import LostRankError, NonFiniteError, RanksDifferError, Stopped, TrainerError, UserError
    from .ranks.messages import WorkerError

__version__ = "0.1.0"
# Public name -> its module. They are loaded when they are asked for, so `import trainer` loads nothing.
_PUBLIC = {"Callback": "api.callbacks", "CallbackError": "api.callbacks", "Result": "api.result"}
_PUBLIC |= {"evaluate": "api.evaluation", "predict": "api.evaluation"}
_PUBLIC |= {"load_config": "api.training", "train": "api.training"}
_PUBLIC |= {"TrainerError": "errors", "UserError": "errors", "NonFiniteError": "errors", "Stopped": "errors"}
_PUBLIC |= {"RanksDifferError": "errors", "LostRankError": "errors", "WorkerError": "ranks.messages"}
__all__ = [
    "Callback",
    "CallbackError",
    "LostRankError",
    "NonFiniteError",
    "RanksDifferError",
    "Result",
    "Stopped",
    "TrainerError",
    "UserError",
    "WorkerError",
    "evaluate",
    "load_config",
    "predict",
    "train",
]


def __getattr__(name: str) -> Any:
    """A public name, which is loaded now."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
