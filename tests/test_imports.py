"""Imports point one way, heavy packages are loaded late, and deepspeed has one importer."""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TRAINER = ROOT / "trainer"

# The packages, from what all may import to what imports all. A module imports from its own package and from those
# before it in this list.
PACKAGES = (
    "colours",
    "errors",
    "files",
    "wording",
    "ranks",
    "exact",
    "config",
    "record",
    "data",
    "engine",
    "tasks",
    "rehearsal",
    "run",
    "study",
    "api",
    "search",
    "folds",
    "commands",
    "main",
    "__main__",
)
# Said before torch is loaded, and computed without it.
WITHOUT_TORCH = {
    "colours",
    "errors",
    "files",
    "wording",
    "ranks.place",
    "exact.plan",
    "exact.gradient_noise",
    "config.schema",
    "config.keys",
    "config.loggers",
    "config.deepspeed_keys",
    "config.task_options",
    "config.json_schema",
    "config.ready",
    "config.optimizer_names",
    "record.console",
    "record.made_by",
    "engine.learning_rate",
    "engine.adascale",
    "engine.rates",
    "commands.keys",
    "commands.show_plan",
    "commands.start",
    "commands.version",
    "study.arms",
    "search.declaration",
    "tasks.first_look",
}
HEAVY = {
    "PIL",
    "pytorch_optimizer",
    "peft",
    "scipy",
    "soundfile",
    "tokenizers",
    "transformers",
    "datasets",
    "sklearn",
    "pandas",
    "matplotlib",
    "optuna",
    "torchvision",
    "tensorboard",
    "safetensors",
}


@dataclass(frozen=True)
class Import:
    """One imported name: "trainer.config", "torch.nn", ...; `late` if inside a function."""

    target: str
    late: bool


def is_type_checking(node: ast.If) -> bool:
    return "TYPE_CHECKING" in ast.unparse(node.test)


def imports_in(source: str, package: str) -> Iterator[Import]:
    """Every import of a module of `package`, those for type checkers excepted.

    `from a import b` gives a.b as well as a, as b may be a module.
    """

    def walk(node: ast.AST, late: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and is_type_checking(node):
            children: list[ast.AST] = list(node.orelse)
        else:
            children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            yield Import(base, late)
            yield from (Import(f"{base}.{alias.name}", late) for alias in node.names)
        inside = late or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in children:
            yield from walk(child, inside)

    return walk(ast.parse(source), False)


@functools.cache
def modules() -> dict[str, tuple[Import, ...]]:
    """Module of the trainer ("config", "tasks.digits") -> its imports. A package is its __init__."""
    found = {}
    for path in sorted(TRAINER.rglob("*.py")):
        parts = path.relative_to(TRAINER).with_suffix("").parts
        package = ".".join(["trainer", *parts[:-1]])
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name or "__init__"] = tuple(imports_in(path.read_text(), package))
    return found


def own(entry: Import) -> str | None:
    """The trainer's module that an import names, or None."""
    if entry.target == "trainer":
        return "__init__"
    name = entry.target.removeprefix("trainer.")
    return name if name != entry.target and name in modules() else None


def needs(module: str, *, late: bool) -> set[str]:
    """The trainer's modules that a module imports; `late` includes those inside functions."""
    found = {own(entry) for entry in modules()[module] if late or not entry.late}
    return {name for name in found if name is not None and name not in ("__init__", module)}


def packages(module: str, *, late: bool) -> set[str]:
    """What a module imports from outside, by full name."""
    return {e.target for e in modules()[module] if (late or not e.late) and not e.target.startswith("trainer")}


def reached(module: str, *, late: bool = False) -> set[str]:
    """A module, and all of the trainer's that are loaded with it."""
    seen, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += needs(name, late=late)
            if "." in name:
                waiting.append(name.rpartition(".")[0])  # its package
    return seen


def loaded_packages(module: str, *, late: bool = False) -> set[str]:
    """The top-level packages that are loaded with a module."""
    names = {name for m in reached(module, late=late) for name in packages(m, late=late)}
    return {name.partition(".")[0] for name in names}


def test_the_walker_sees_what_it_should() -> None:
    source = """
import os, torch.nn
from typing import TYPE_CHECKING
from . import device as d
from .config import Config
from ..order import key
if TYPE_CHECKING:
    from .engine import Engine
else:
    import numpy
class A:
    import json
    def f(self):
        from .run import run
try:
    import deepspeed
except ImportError:
    pass
"""
    found = {(e.target, e.late) for e in imports_in(source, "trainer.tasks")}
    early = {name for name, late in found if not late}
    assert {"os", "torch.nn", "typing", "numpy", "json", "deepspeed"} <= early
    assert {"trainer.tasks.device", "trainer.tasks.config", "trainer.order", "trainer.order.key"} <= early
    assert {name for name, late in found if late} == {"trainer.tasks.run", "trainer.tasks.run.run"}
    assert not any("engine" in name for name, _ in found)


def test_the_walker_sees_this_package() -> None:
    """If it found nothing, nothing below could fail."""
    assert "torch" in packages("exact.tree", late=False)
    assert "deepspeed" in packages("engine.deepspeed_engine", late=False)
    assert {"config.keys", "errors"} <= needs("engine.deepspeed_engine", late=False)
    assert "engine.deepspeed_engine" in needs("run.build", late=True) - needs("run.build", late=False)
    assert {"exact.splits", "tasks"} <= reached("tasks.digits")


def package_of(module: str) -> str:
    return module.partition(".")[0]


def test_every_package_has_its_place() -> None:
    missing = {package_of(name) for name in modules() if name != "__init__"} - set(PACKAGES)
    assert not missing, f"give {missing} a place in PACKAGES of {Path(__file__).name}"


def test_imports_point_one_way() -> None:
    """Also those inside functions: late is not another direction."""
    place = {name: i for i, name in enumerate(PACKAGES)} | {"__init__": len(PACKAGES)}  # it only names what is public
    pairs = [(m, n) for m in modules() for n in needs(m, late=True)]
    wrong = [f"{m} -> {n}" for m, n in pairs if place[package_of(n)] > place[package_of(m)]]
    assert not wrong


def test_the_promise_knows_no_config_no_files_no_deepspeed() -> None:
    for module in modules():
        if package_of(module) == "exact":
            outside = {package_of(name) for name in needs(module, late=True)} - {"exact", "ranks", "errors"}
            assert not outside, module
            assert not packages(module, late=True) & {"json", "pathlib", "os", "tempfile", "io"}, module


def test_there_are_no_cycles() -> None:
    for module in modules():
        circle = [n for n in needs(module, late=False) if module in reached(n)]
        assert not circle, f"{module} and {circle} import one another"


@pytest.mark.parametrize("module", sorted(WITHOUT_TORCH))
def test_what_comes_before_torch_never_imports_it(module: str) -> None:
    """Not even inside a function, except for the progress bar's tqdm."""
    outside = loaded_packages(module, late=True) - {"__future__"} - set(sys.stdlib_module_names)
    assert outside <= {"tqdm"}, outside


@pytest.mark.parametrize(
    "module",
    [
        *("__init__", "api.callbacks", "api.evaluation", "api.launch", "api.result", "api.saved", "api.training"),
        *("commands.cli", "commands.train", "main", "__main__"),
        *("ranks.collectives", "record.folder", "commands.verify", "ranks.workers"),
        "search.runner",
    ],
)
def test_what_a_person_starts_loads_torch_late(module: str) -> None:
    """So that `plan`, a bad config and a bad flag are answered at once."""
    assert loaded_packages(module) <= set(sys.stdlib_module_names) | {"__future__"}


def test_deepspeed_has_one_importer() -> None:
    importers = {m for m in modules() if any(re.match(r"deepspeed\b", n) for n in packages(m, late=True))}
    assert importers == {"engine.deepspeed_engine"}


def test_deepspeed_is_loaded_late() -> None:
    """Its import prints and looks for devices, so `run.build` does it where that is caught."""
    for module in set(modules()) - {"engine.deepspeed_engine"}:
        assert "deepspeed" not in loaded_packages(module), module
        if PACKAGES.index(package_of(module) if module != "__init__" else "errors") < PACKAGES.index("engine"):
            assert "deepspeed" not in loaded_packages(module, late=True), module


@pytest.mark.parametrize(
    "module", ["exact.order", "exact.batch_norm", "exact.splits", "record.window", "tasks.protocol", "tasks.digits"]
)
def test_who_knows_nothing_of_other_ranks(module: str) -> None:
    """What is computed here must not depend on the world size, and cannot ask for it."""
    for name in reached(module, late=True):
        assert not [n for n in packages(name, late=True) if n.startswith("torch.distributed")], name
    assert not {package_of(name) for name in reached(module, late=True)} & {"ranks"}


def test_heavy_packages_are_loaded_late() -> None:
    early = {m: n for m in modules() for n in packages(m, late=False) if n.partition(".")[0] in HEAVY}
    assert not early
    boards = [m for m in modules() if "torch.utils.tensorboard" in packages(m, late=False)]
    assert not boards


def test_no_module_hides_another() -> None:
    """`deepspeed trainer/main.py` puts the folder itself on the path, so a json.py in it would be everyone's json."""
    dependencies = {name.partition(".")[0] for m in modules() for name in packages(m, late=True)}
    declared = set(re.findall(r'^ *"?([A-Za-z0-9_-]+)[<>=~]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    assert {"torch", "numpy", "deepspeed"} <= dependencies
    for name in {m.partition(".")[0] for m in modules()} - {"__init__", "__main__"}:
        assert name not in sys.stdlib_module_names, name
        assert name not in dependencies | declared, name


# Files of more than 400 lines, each with the reason why it is one.
LONG = {
    "config/keys.py": "every key of a config, and what contradicts what",
    "data/tables.py": "every kind of table is read by the same steps",
    "data/text.py": "tokenizers, from the text to padded rows",
    "exact/packs/packs.py": "which packs are tried, used and refused is one story",
    "engine/deepspeed_engine.py": "the only file that imports deepspeed",
    "study/drawing.py": "one function a figure",
    "tasks/causal_lm.py": "a task is one file, as a user's own is",
    "tasks/image_classification.py": "a task is one file, as a user's own is",
    "tasks/text_classification.py": "a task is one file, as a user's own is",
    "tasks/nodules.py": "a task is one file, as a user's own is",
    "tasks/token_classification.py": "a task is one file, as a user's own is",
}


def test_long_files_have_a_reason() -> None:
    long = {
        str(path.relative_to(ROOT / "trainer"))
        for path in (ROOT / "trainer").rglob("*.py")
        if len(path.read_text().splitlines()) > 400
    }
    assert long == set(LONG)


def test_the_clock_only_makes_stamps() -> None:
    """A clock may be set while a run goes on, so a duration comes from time.monotonic() or time.perf_counter()."""

    def of_the_clock(tree: ast.AST) -> bool:
        return any(ast.unparse(node) == "time.time()" for node in ast.walk(tree) if isinstance(node, ast.Call))

    compared = {
        str(path.relative_to(TRAINER))
        for path in TRAINER.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.BinOp, ast.Compare)) and of_the_clock(node)
    }
    assert compared == {"files.py"}  # with the stamp of a file
