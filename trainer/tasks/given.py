"""Tasks that a program gives as classes: from a file of their own, or from no file, as in a notebook."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .first_look import BUILT_IN

# Name in a run -> class. These classes lie in no file that can be loaded by itself.
_given: dict[str, type] = {}


def find(name: str) -> type | None:
    """The class that a program has given under a name; None if there is none."""
    return _given.get(name)


def file_of(cls: type) -> str | None:
    """A class as `trainer.task` names it: path/to/file.py:ClassName, or a ready task. None if no file can be loaded.

    It is None for a class of the program itself (a notebook's), for one inside a function, and for one of a package:
    modules of a package may import one another by relative names.
    """
    module = sys.modules.get(cls.__module__)
    package, _, inner = cls.__module__.rpartition(".")
    if package == __package__ and inner in BUILT_IN and getattr(module, "TASK", None) is cls:
        return inner
    file: Any = getattr(module, "__file__", None)
    found = getattr(module, cls.__name__, None) is cls
    if not Path(file or "").is_file() or cls.__module__ == "__main__" or package or not found:
        return None
    path = Path(file)
    return f"{path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}:{cls.__name__}"


@contextlib.contextmanager
def given(cls: type | None) -> Iterator[None]:
    """A context in which `load_task` finds a class under `name_of`."""
    if cls is None:
        yield
        return
    _given[name_of(cls)] = cls
    try:
        yield
    finally:
        del _given[name_of(cls)]


def name_of(cls: type) -> str:
    """The name that a run has for a class that is in no file."""
    return f"{cls.__module__}:{cls.__qualname__}"


def code_sha256(cls: type) -> str:
    """SHA-256 of the code of a class, and of what it uses of its own module: other classes, functions, constants.

    Of classes and functions that it takes from other modules, the modules' files count.
    """
    total, seen = hashlib.sha256(), set()

    def note(*values: object) -> None:
        total.update(repr(values).encode())

    def visit_code(code: types.CodeType, names: dict[str, Any]) -> None:
        note(code.co_name, code.co_code, code.co_names, code.co_varnames, code.co_freevars)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                visit_code(constant, names)
            else:
                note(constant)
        for name in code.co_names:
            visit(names.get(name))

    def visit(value: Any) -> None:
        value = inspect.unwrap(getattr(value, "__func__", getattr(value, "fget", value)) or value)
        if isinstance(value, (int, float, str, bytes, bool, type(None))):
            note(value)
        elif id(value) in seen:  # functions may call one another in a circle
            note(value.__name__)
        elif getattr(value, "__module__", None) != cls.__module__:
            note(getattr(value, "__name__", type(value).__name__))
            file = Path(getattr(sys.modules.get(str(getattr(value, "__module__", ""))), "__file__", None) or "")
            if file.suffix == ".py" and file.is_file():
                total.update(file.read_bytes())
        elif isinstance(value, types.FunctionType):
            seen.add(id(value))
            note(value.__defaults__, value.__kwdefaults__)
            visit_code(value.__code__, value.__globals__)
        elif isinstance(value, type):
            seen.add(id(value))
            for base in value.__bases__:
                visit(base)
            for name, inner in sorted(vars(value).items()):
                # Python adds these names itself. They are not the user's code.
                if name not in ("__module__", "__dict__", "__weakref__", "__firstlineno__", "__static_attributes__"):
                    note(name)
                    visit(inner)

    visit(cls)
    return total.hexdigest()
