"""The JSON schema that editors check a config with: it agrees with the parser."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from trainer.config import deepspeed_keys, ready
from trainer.config.keys import load_config, parse
from trainer.config.task_options import check_options
from trainer.errors import UserError
from trainer.folds.declaration import load as load_folds
from trainer.search.declaration import load_search
from trainer.study.load import load_study
from trainer.tasks.first_look import BUILT_IN
from trainer.tasks.protocol import load_task

CONFIGS = [ready.folder() / name for name in ready.names()]
DATA = {"data": "d", "model": "m"}
# What else a task needs, where it is not these two.
NEEDED: dict[str, dict[str, Any]] = {key: {} for key in ("digits", "nodules")}
NEEDED |= {key: {"data": "d"} for key in ("audio_classification", "image_segmentation", "tabular")}


@functools.cache
def schema() -> dict[str, Any]:
    return json.loads((ready.folder() / ready.SCHEMA).read_text())


@functools.cache
def validator() -> Draft202012Validator:
    Draft202012Validator.check_schema(schema())
    return Draft202012Validator(schema())


@functools.cache
def options_of(task: str) -> type:
    return type(load_task(task, NEEDED.get(task, DATA))).Options


def refused_by_the_trainer(values: dict[str, Any], folder: Path) -> str | None:
    """What the trainer says before it looks at data; None if it says nothing."""
    try:
        config = parse(copy.deepcopy(values))
        task = config.trainer.task
        if task in BUILT_IN:
            if "" in config.trainer.task_options.values():
                return "an empty text"
            check_options(options_of(task), config.trainer.task_options)
        elif ":" not in task and not task.endswith(".py"):
            return "unknown task"
        if "study" in values:
            file = folder / "study.json"
            file.write_text(json.dumps(values))
            load_study(str(file))
        if "search" in values:
            file = folder / "search.json"
            file.write_text(json.dumps(values))
            load_search(str(file))
        if "cross_validation" in values:
            file = folder / "folds.json"
            file.write_text(json.dumps(values))
            load_folds(str(file))
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_ready_config_is_valid_and_names_its_schema(file: Path) -> None:
    values = json.loads(file.read_text())
    assert [error.message for error in validator().iter_errors(values)] == []
    assert (file.parent / values["$schema"]).resolve() == (ready.folder() / ready.SCHEMA).resolve()


def test_the_place_of_the_schema_is_no_setting(tmp_path: Path) -> None:
    """A run that goes on does not see another config, nor does a study."""
    for file in CONFIGS:
        without = {key: value for key, value in json.loads(file.read_text()).items() if key != "$schema"}
        bare = tmp_path / file.name
        bare.write_text(json.dumps(without))
        assert load_config(file) == load_config(bare)
        assert "schema" not in json.dumps(load_config(file).as_dict())
        if "study" in without:
            assert load_study(str(file)) == load_study(str(bare))


# Mutations


def blocks_of(node: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every key of the schema outside conditions, with its own schema."""
    for name, inner in node.get("properties", {}).items():
        yield (*path, name), inner
        yield from blocks_of(inner, (*path, name))


# Not 3.0: to JSON schema it is a whole number, to the trainer it is none.
VALUES: list[Any] = [None, True, 0, 1, -1, 2.5, 10**7, "", "auto", "a/b", [], [1], [1, 1], ["a"], {}, {"a": 1}]


def laid(base: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    values = copy.deepcopy(base)
    inner = values
    for name in path[:-1]:
        if not isinstance(inner.get(name), dict):
            inner[name] = {}
        inner = inner[name]
    inner[path[-1]] = value
    return values


def whole(task: str) -> dict[str, Any]:
    options: dict[str, Any] = dict(NEEDED.get(task, DATA))
    return {
        "train_batch_size": 64, "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "torch_adam": True}},
        "trainer": {"task": task, "task_options": options},
    }  # fmt: skip


def of_keys(base: dict[str, Any], node: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """Every key below a node of the schema with every kind of value, and with a letter more in its name."""
    study = {"study": {"output_dir": "runs/s", "seeds": 3}}
    search = {"search": {"parameters": {"optimizer.params.lr": [0.1, 0.2]}, "trials": 3, "metric": "accuracy"}}
    for place, inner in blocks_of(node, path):
        beside = {"study": study, "search": search, "zero_optimization": {"zero_optimization": {"stage": 1}}}
        start = base | beside.get(place[0], {})
        for value in (*VALUES, *inner.get("enum", ())):
            yield laid(start, place, value)
        yield laid(start, (*place[:-1], f"{place[-1]}x"), 1)


def of_tasks() -> Iterator[dict[str, Any]]:
    """Every option of every task, and each that is needed left out."""
    for condition in schema()["properties"]["trainer"]["allOf"]:
        good = whole(condition["if"]["properties"]["task"]["const"])
        yield from of_keys(good, condition["then"], ("trainer",))
        for name in good["trainer"]["task_options"]:
            less = copy.deepcopy(good)
            del less["trainer"]["task_options"][name]
            yield less


def of_deepspeed(base: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """DeepSpeed's free blocks, and its keys that are refused."""
    names = ("lr", "betas", "weight_decay", "warmup_max_lr", "total_num_steps", "cycle_min_lr", "torch_adam", "x")
    values = (None, True, 1, -1, 0.5, "a", [], [0.9, 0.99], [0.9, 1.0], [1, False])
    kinds = [("optimizer", name) for name in (*deepspeed_keys.OPTIMIZERS, "SGD", "Muon", "LBFGS", "LARS", "ADAMW")]
    kinds += [("scheduler", name) for name in (*deepspeed_keys.SCHEDULERS, "", "warmuplr")]
    for kind, name in kinds:
        yield base | {kind: {"type": name}}
        for key, value in itertools.product(names, values):
            yield base | {kind: {"type": name, "params": {key: value}}}
    for key, value in itertools.product(
        deepspeed_keys.REFUSED, (False, None, {"enabled": False}, {"enabled": True}, {}, True, 0, "a")
    ):
        yield base | {key: value}
    for stage in (-1, 0, 1, 3, 4, True, "1"):
        yield base | {"zero_optimization": {"stage": stage}}
    for groups in ({"a": {"lr": 1}}, {"a": {}}, {"a": {"lr": -1}}, {"a": {"rl": 1}}, {"a": 1}, {"a": {"lr": True}}):
        yield laid(base, ("trainer", "parameter_groups"), groups)


# What the schema lets through: rules between keys.
BETWEEN_KEYS = re.compile(
    "has no effect (at|with|without) |nothing to scale under strong scaling|names no metric|belongs to torch's"
    "|knows no groups|is for a task of your own|counted from 0|needs a budget|there is one split for each"
    "|So few splits tell nothing"
)


@pytest.mark.parametrize("share", [0.2, pytest.param(1.0, marks=pytest.mark.slow)])
def test_schema_and_parser_agree(tmp_path: Path, share: float) -> None:
    """Whatever the schema refuses, the parser refuses; the other way round, too, but for rules between keys."""
    base = whole("digits")
    everything = [*of_keys(base, schema()), *of_tasks(), *of_deepspeed(base)]
    chosen = random.Random(0).sample(everything, int(share * len(everything)))
    verdicts = {(True, True): 0, (False, False): 0}
    for values in chosen:
        said, valid = refused_by_the_trainer(values, tmp_path), validator().is_valid(values)
        if said is not None and BETWEEN_KEYS.search(said):
            continue
        assert valid == (said is None), f"{said}: {values}"
        verdicts[valid, said is None] += 1
    assert min(verdicts.values()) > 0.05 * len(chosen)
