"""DeepSpeed is as the trainer needs it, or a run says so at its start; and what we replace is what it calls."""

from __future__ import annotations

import contextlib
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.jobs import ROOT, small_config, train
from trainer.config.keys import Config
from trainer.engine import contract as engine_contract
from trainer.engine.contract import KNOWN_VERSION, NEEDS, Need, check, check_settings
from trainer.errors import UserError
from trainer.ranks.place import Ranks
from trainer.ranks.rendezvous import start
from trainer.ranks.workers import run_ranks


@contextlib.contextmanager
def replaced(owner: Any, name: str, *value: Any) -> Iterator[None]:
    """An attribute, wherever it is kept, has another value meanwhile; without a value it is not there at all."""
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    assert hasattr(owner, last)  # a module of DeepSpeed's may make it only now
    places = [owner, *type(owner).__mro__]
    holder = next(place for place in places if last in vars(place))
    saved = {last: vars(holder)[last]}
    if isinstance(owner, types.ModuleType):
        saved["__getattr__"] = vars(owner).get("__getattr__")  # which would make it again
        if saved["__getattr__"] is not None:
            del owner.__getattr__
    if value:
        setattr(holder, last, *value)
    else:
        delattr(holder, last)
    try:
        yield
    finally:
        for key, was in saved.items():
            if was is not None:
                setattr(holder, key, was)


def made(ranks: Ranks, config: Config) -> dict[str, Any]:
    """What `Engine` has checked, as DeepSpeed has made it: by the table's owners."""
    import deepspeed

    from trainer.engine.deepspeed_engine import _COMMUNICATION, _deepspeed_config

    deepspeed.ops.__compatible_ops__ = {}  # as Engine does: nothing is compiled
    start(ranks, "gloo", 60.0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 3), torch.nn.Linear(3, 2))
    parameters = list(model.parameters())
    engine, optimizer, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameters,
        config=_deepspeed_config(config, 8, 1, config.gradient_clipping),
        dist_init_required=False,
    )
    return {
        "deepspeed": deepspeed,
        "communication": _COMMUNICATION,
        "engine": engine,
        "optimizer": optimizer,
        "parameter": parameters[0],
    }


def said(need: Need, stage: int, owners: dict[str, Any], *value: Any) -> str:
    """The error where a thing of the table has another value, or is not there; "" for none."""
    with replaced(owners[need.owner], need.name, *value):
        try:
            check("0.20.1", stage, **owners)
        except UserError as error:
            return str(error)
    return ""


def refusals(ranks: Ranks, config: Config) -> list[tuple[str, str, str, list[str]]]:
    """For each thing of the table: its name, and what is said when it is gone, of another kind, or not used."""
    owners = made(ranks, config)
    stage = config.zero_stage
    check("0.20.1", stage, **owners)
    check_settings("0.20.1", owners["engine"], stage, config.gradient_clipping)
    found = []
    for need in NEEDS:
        if stage not in need.stages:
            continue
        wrong = object() if isinstance(need.kind, type) else (lambda of, another, signature: None)
        unused = [said(need, stage, owners, without(need, name)) for name in need.reads]
        found.append((f"{need.owner}.{need.name}", said(need, stage, owners), said(need, stage, owners, wrong), unused))
    return found


def without(need: Need, name: str) -> Any:
    """A function with the arguments that the table wants, which uses all that it should but one name."""
    arguments = str(need.kind).strip("()")
    body = ", ".join(repr(other) for other in need.reads if other != name) or "None"
    scope: dict[str, Any] = {}
    self_too = "self, " if need.owner == "engine" else ""
    exec(f"def function({self_too}{arguments}):\n    print({body})", scope)
    return scope["function"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_whatever_is_missing_or_other_is_named(tmp_path: Path, stage: int) -> None:
    config = small_config(tmp_path, zero_optimization={"stage": stage}, zero_allow_untested_optimizer=None)
    found = run_ranks(refusals, 1, config)[0]
    whys = {f"{need.owner}.{need.name}": need.why for need in NEEDS}
    assert len(found) >= 8
    for name, gone, other, unused in found:
        for text in (gone, other, *unused):
            assert f"{name}, which the trainer {whys[name]}, " in text, name
            assert "DeepSpeed 0.20.1: " in text
            assert f"pip install deepspeed=={KNOWN_VERSION}" in text
        # nn.Module has a zero_grad as well, of other arguments.
        assert "does not exist" in gone or name == "engine.zero_grad", name
        assert "is of type" in other or "takes the arguments" in other, name
        assert all("no longer uses" in text for text in unused), name


def test_settings_that_deepspeed_passes_over() -> None:
    answers = {"zero_optimization_stage": 0, "gradient_clipping": 0.5, "managed_gradient_accumulation": False}
    for name, wrong in (("gradient_clipping", 0.0), ("managed_gradient_accumulation", True)):
        engine = types.SimpleNamespace(**{n: lambda v=v: v for n, v in (answers | {name: wrong}).items()})
        with pytest.raises(UserError, match=rf"engine\.{name}\(\) returns {wrong}, but"):
            check_settings("0.20.1", engine, 0, 0.5)


def test_the_known_version_is_the_one_that_the_tests_pass_with() -> None:
    import deepspeed

    pinned = re.search(r"^deepspeed==(\S+)", (ROOT / "launch" / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert pinned[1] == KNOWN_VERSION == engine_contract.KNOWN_VERSION
    assert deepspeed.__version__.split("+")[0] == KNOWN_VERSION, "compare engine_contract.NEEDS with its source"


def train_with_a_renamed_step(ranks: Ranks, config: Config) -> dict[str, Any]:
    """A run on a DeepSpeed of which one part of the step has another name."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    DeepSpeedEngine.take_model_step = DeepSpeedEngine._take_model_step
    del DeepSpeedEngine._take_model_step
    return train(ranks, config)


def test_a_run_ends_before_its_first_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"engine\._take_model_step, which the trainer needs .* does not exist"):
        run_ranks(train_with_a_renamed_step, 2, small_config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
