"""`python -m trainer.commands.reference`: writes the tables of all keys into the pages that hold them.

Run it after adding a key. In a page, the comment `<!-- keys: name -->` marks where a table begins, and `<!-- end -->`
where it ends. A test checks that the pages are up to date.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..config.keys import Config, TrainerOptions
from ..config.reference import table

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("ds_configs/README.md", "trainer/tasks/README.md", "trainer/study/README.md")


def tables() -> dict[str, str]:
    """Name -> table."""
    import importlib

    from ..study.declaration import Study
    from ..tasks.first_look import BUILT_IN

    found = {
        "deepspeed": table(Config, skipped=("trainer",)),
        "trainer": table(TrainerOptions, "trainer."),
        "study": table(Study, "study."),
    }
    for name in BUILT_IN:
        found[name] = table(importlib.import_module(f"trainer.tasks.{name}").TASK.Options, "")
    return found


def filled(page: str) -> str:
    """A page with its tables as they are today."""
    now = tables()
    return re.sub(
        r"(<!-- keys: (\w+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}\n{now[match[2]]}\n\n{match[3]}",
        page,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for path in PAGES:
        (ROOT / path).write_text(filled((ROOT / path).read_text()))
