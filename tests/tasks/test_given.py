"""Tasks that are given as classes: which file one is in, and whether its code has changed."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from trainer.tasks import given
from trainer.tasks.digits import Digits
from trainer.tasks.first_look import BUILT_IN
from trainer.tasks.own_code import task_code_sha256
from trainer.tasks.protocol import load_task

CODE = """
import math

FACTOR = 2

def half(x):
    return x / 2

class Base:
    def splits(self): return {}
    def model(self): return None
    def forward(self, model, batch): return half(batch)
    def loss(self, outputs, batch): return outputs * FACTOR, 1

class Task(Base):
    rate = 0.5
    def metrics(self, outputs, batch):
        return [math.pi * x for x in outputs if x > 1]
"""


def notebook(monkeypatch: pytest.MonkeyPatch, code: str = CODE, file: str | None = None) -> Any:
    """The class Task as a notebook defines it: in a module without a file. A program from stdin has one of no file."""
    module = types.ModuleType("__main__")
    module.__file__ = file
    monkeypatch.setitem(sys.modules, "__main__", module)
    exec(compile(code, "a cell", "exec"), vars(module))
    return module.Task  # type: ignore[attr-defined]


def test_the_file_of_a_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "some_task.py").write_text(CODE)
    import some_task  # type: ignore[import-not-found]

    try:
        assert given.file_of(some_task.Task) == "some_task.py:Task"
        assert type(load_task("some_task.py:Task", {})).__name__ == "Task"
    finally:
        del sys.modules["some_task"], sys.modules["user_task_some_task"]
    assert given.file_of(Digits) == "digits" and "digits" in BUILT_IN

    class Inner:
        pass

    # No file can be loaded for a class of a notebook, one inside a function, and one of a package.
    assert given.file_of(notebook(monkeypatch)) is None
    assert given.file_of(Inner) is None


def test_a_class_of_a_notebook_is_found_for_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = notebook(monkeypatch)
    with given.given(cls):
        assert isinstance(load_task("__main__:Task", {}), cls)
    assert given.find("__main__:Task") is None


def test_what_a_class_takes_from_another_file_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    found = []
    for factor in (2, 3):
        (tmp_path / "some_helper.py").write_text(f"def scaled(x):\n    return {factor} * x\n")
        code = CODE.replace("import math", "import math\nfrom some_helper import scaled").replace(
            "half(batch)", "scaled(1)"
        )
        found.append(given.code_sha256(notebook(monkeypatch, code)))
        del sys.modules["some_helper"]
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("import math\n", "import math\n\n# a comment\n", True),
        ("FACTOR = 2", "FACTOR = 2\nOTHER = 3", True),  # which the task does not use
        ("FACTOR = 2", "FACTOR = 3", False),
        ("return x / 2", "return x / 4", False),
        ("rate = 0.5", "rate = 0.25", False),
        ("math.pi * x for", "math.e * x for", False),
        ("if x > 1", "if x > 2", False),
        ("def model(self): return None", "def model(self): return 1", False),
    ],
)
def test_its_code_is_known_again(monkeypatch: pytest.MonkeyPatch, old: str, new: str, same: bool) -> None:
    """In another cell, too. It covers what the class uses of the notebook."""
    before = task_code_sha256(notebook(monkeypatch, file="<stdin>")(), "__main__:Task")
    assert CODE.count(old) == 1
    after = task_code_sha256(notebook(monkeypatch, "\n\n" + CODE.replace(old, new))(), "__main__:Task")
    assert before is not None and (before == after) is same
