"""The names of torch's optimizers are read from its source, because importing torch takes seconds."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.config.test_deepspeed_keys import refusal
from trainer.config import optimizer_names as names
from trainer.config.keys import parse

ROOT = Path(__file__).resolve().parents[2]


def test_a_misspelt_optimizer_is_named_before_torch_is_loaded() -> None:
    assert 'unknown optimizer "AdamV". Did you mean "AdamW"?' in refusal(optimizer={"type": "AdamV"})
    import torch

    classes = {n for n, c in vars(torch.optim).items() if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)}
    assert {*names.optimizer_names(), "Optimizer"} == classes


def test_torch_is_not_imported() -> None:
    code = "import sys; from trainer.config.optimizer_names import optimizer_names as n; assert n(); "
    subprocess.run([sys.executable, "-c", f"{code}assert 'torch' not in sys.modules"], cwd=ROOT, check=True)


@pytest.fixture
def asked_anew() -> Iterator[None]:
    """Without the answer that was remembered, before the test and after it."""
    names.optimizer_names.cache_clear()
    yield
    names.optimizer_names.cache_clear()


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize("source", [None, "from . import (", ""])
def test_where_torch_cannot_be_read_every_name_is_let_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str | None
) -> None:
    """Its source is missing, broken or empty. The check with torch itself comes later."""
    if source is not None:
        (tmp_path / "optim").mkdir()
        (tmp_path / "optim" / "__init__.py").write_text(source)
    spec: Any = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("trainer.config.optimizer_names.importlib.util.find_spec", lambda name: spec)
    assert names.optimizer_names() == ()
    config = parse({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 8, "optimizer": {"type": "Nonesuch"}})
    assert config.optimizer.type == "Nonesuch"
