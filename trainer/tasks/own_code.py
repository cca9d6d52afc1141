"""The hash of a user's task: its file, and what it imports from beside it."""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

from .given import code_sha256


def task_code_sha256(task: object, name: str) -> str | None:
    """SHA-256 of the code of a task; None for a task of the trainer, whose code has a hash of its own.

    It covers the task's file, and every module that any of these files imports, at any place, from the folder of the
    task or of the program. Comments and layout do not count. Installed packages are left out, and so are imports by a
    computed name. Imports are read, not made. So the hash does not depend on a rank, a cache or an order.

    Args:
        task: the loaded task.
        name: trainer.task.
    """
    cls = type(task)
    if ":" not in name or cls.__module__.startswith("trainer."):
        return None
    if not Path(getattr(sys.modules[cls.__module__], "__file__", None) or "").is_file():  # of a notebook, or of stdin
        return code_sha256(cls)
    # The class may come from another file than the one that is named.
    roots = [Path(name.rpartition(":")[0]).resolve(), Path(str(sys.modules[cls.__module__].__file__)).resolve()]
    folders = list(dict.fromkeys([*(file.parent for file in roots), Path(sys.path[0] or ".").resolve()]))
    found = {f"/{number}": file for number, file in enumerate(dict.fromkeys(roots)) if file.is_file()}
    waiting = list(found)
    total: dict[str, str] = {}
    while waiting:
        module = waiting.pop()
        source = found[module].read_bytes()
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # of a file that is imported only if it can be
            total[module] = hashlib.sha256(source).hexdigest()
            continue
        total[module] = hashlib.sha256(ast.dump(tree).encode()).hexdigest()  # no comments, no layout
        package = (
            ""
            if module.startswith("/")
            else module
            if found[module].name == "__init__.py"
            else module.rpartition(".")[0]
        )
        for wanted in _imports(tree, package):
            for part, path in _files(wanted, folders):
                if part not in found:
                    found[part] = path
                    waiting.append(part)
    return hashlib.sha256(repr(sorted(total.items())).encode()).hexdigest()


def _imports(tree: ast.Module, package: str) -> Iterator[str]:
    """The full names that a file imports. `from a import b` gives a.b, as b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _files(wanted: str, folders: list[Path]) -> Iterator[tuple[str, Path]]:
    """(module, its file) of each part of a dotted name that lies in one of the folders."""
    parts = wanted.split(".")
    if parts[0] == "trainer":  # the trainer's code has a hash of its own
        return
    for folder in folders:
        if not ((folder / parts[0]).is_dir() or (folder / f"{parts[0]}.py").is_file()):
            continue
        for count in range(1, len(parts) + 1):
            place = folder.joinpath(*parts[:count])
            for path in (place / "__init__.py", place.with_name(f"{place.name}.py")):
                if path.is_file():
                    yield ".".join(parts[:count]), path
                    break
        return
