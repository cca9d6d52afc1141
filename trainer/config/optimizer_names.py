"""The optimizers that torch has, without importing it."""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path


@functools.cache
def optimizer_names() -> tuple[str, ...]:
    """The classes that the installed torch.optim offers, from its source; none if that cannot be read.

    Importing torch takes seconds, and a misspelt name is to be answered at once.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return ()
    try:
        file = Path(spec.submodule_search_locations[0], "optim", "__init__.py")
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return ()
    imported = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    found = [alias.asname or alias.name for node in imported for alias in node.names]
    return tuple(name for name in found if name[:1].isupper() and name != "Optimizer")
