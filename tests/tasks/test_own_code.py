"""The hash of a user's task: what changes it, and what does not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.tasks.own_code import task_code_sha256
from trainer.tasks.protocol import load_task

TASK = """
import torch, json
from helpers import scale
from package import layers
from package.sub.deep import value

class Task:
    def splits(self):
        import late_one  # only when it is called
        return {}
    def model(self): ...
    def forward(self, model, batch): return scale
    def loss(self, outputs, batch): ...
    def metrics(self, outputs, batch): return {}
"""
FILES = {
    "task.py": TASK,
    "helpers.py": "scale = 1\ntry:\n    import broken\nexcept SyntaxError:\n    pass\n",
    "late_one.py": "x = 1\n",
    "broken.py": "x = (\n",
    "package/__init__.py": "",
    "package/layers.py": "from .sub import deep\nfrom . import sibling\n",
    "package/sibling.py": "y = 1\n",
    "package/sub/deep.py": "value = 1\n",  # a folder without __init__.py
    "unused.py": "z = 1\n",
}


@pytest.fixture
def digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str | None]:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    # They are imported by other tasks, too.
    for name in [n for n in sys.modules if n.partition(".")[0] in ("helpers", "package", "late_one", "broken")]:
        monkeypatch.delitem(sys.modules, name)

    def now() -> str | None:
        name = f"{tmp_path / 'task.py'}:Task"
        return task_code_sha256(load_task(name, {}), name)

    return now


@pytest.mark.parametrize("file", [name for name in FILES if name != "unused.py"])
def test_what_a_task_imports_beside_it_belongs_to_it(
    tmp_path: Path, digest: Callable[[], str | None], file: str
) -> None:
    """Its own file, neighbours, packages, folders without __init__.py, and what is imported inside a method."""
    before = digest()
    with (tmp_path / file).open("a") as text:
        text.write("\nmore = 2\n")
    assert before != digest() is not None


def test_what_is_not_imported_and_comments_do_not_count(tmp_path: Path, digest: Callable[[], str | None]) -> None:
    before = digest()
    (tmp_path / "unused.py").write_text("z = 2\n")
    (tmp_path / "helpers.py").write_text("# a comment\n" + FILES["helpers.py"])
    assert digest() == before


def test_a_class_from_another_file_belongs_to_the_task(tmp_path: Path) -> None:
    (tmp_path / "the_class.py").write_text("class Task:" + TASK.split("class Task:")[1].replace("scale", "1"))
    (tmp_path / "entry.py").write_text("from the_class import Task\nrate = 1\n")
    name = f"{tmp_path / 'entry.py'}:Task"
    task = load_task(name, {})
    before = task_code_sha256(task, name)
    (tmp_path / "entry.py").write_text("from the_class import Task\nrate = 2\n")
    between = task_code_sha256(task, name)
    (tmp_path / "the_class.py").write_text((tmp_path / "the_class.py").read_text() + "more = 2\n")
    assert len({before, between, task_code_sha256(task, name)}) == 3


def test_a_task_of_the_trainer_has_none() -> None:
    assert task_code_sha256(load_task("digits", {}), "digits") is None
