"""The names of torch's optimizers, without importing torch."""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path


@functools.cache
def optimizer_names() -> tuple[str, ...]:
    """The names of the classes in the installed torch.optim, from its source; none if the source cannot be read.

    Importing torch takes seconds, but a misspelt name should be reported at once.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return ()
    try:
        file = Path(spec.submodule_search_locations[0], "optim", "__init__.py")
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return ()
    # torch.optim imports each class with "from torch.optim.adam import Adam as Adam".
    imported = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    found = [alias.asname or alias.name for node in imported for alias in node.names]
    return tuple(name for name in found if name[:1].isupper() and name != "Optimizer")
