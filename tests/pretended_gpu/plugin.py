"""A plugin of pytest: tests meet pretended GPUs, and so do the ranks that they start.

PRETENDED_GPUS=2 python -m pytest -p tests.pretended_gpu.plugin -m gpu -k "not bf16" tests/test_gpu.py
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from tests.pretended_gpu.device import PretendedGpu
from tests.pretended_gpu.jobs import on_gpus
from trainer.ranks import workers


def pytest_configure(config: pytest.Config) -> None:
    gpus = int(os.environ["PRETENDED_GPUS"])
    run_ranks = workers.run_ranks

    def run_on_gpus(function: Callable[..., Any], world_size: int, *arguments: Any, cuda: bool) -> list[Any]:
        assert cuda
        # Nothing of a GPU is in the server from which these are forked.
        return run_ranks(on_gpus, world_size, gpus, function, *arguments)

    workers.run_ranks = run_on_gpus  # type: ignore[assignment]
    gpu = PretendedGpu(gpus)
    gpu.__enter__()
    config.add_cleanup(lambda: gpu.__exit__(None, None, None))
