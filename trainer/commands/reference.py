"""`python -m trainer.commands.reference`: writes the tables of all keys into the pages that hold them, and the schema.

Run it after adding a key. In a page, the comment `<!-- keys: name -->` marks where a table begins, and `<!-- end -->`
where it ends. A test checks that the pages and the schema are up to date.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

from ..config import json_schema, ready
from ..config.keys import Config, TrainerOptions
from ..config.reference import table

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "ds_configs/README.md",
    "trainer/tasks/DATA.md",
    "trainer/study/README.md",
    "trainer/search/README.md",
    "trainer/folds/README.md",
)
# What a search may try for a key.
_CHOICES = {"type": "array", "minItems": 2, "uniqueItems": True}
_RANGE = {
    "type": "object",
    "properties": {
        "low": {"description": "the lowest value", "type": "number"},
        "high": {"description": "the highest value", "type": "number"},
        "log": {"description": "draw evenly by the logarithm", "type": "boolean"},
        "step": {"description": "only low, low + step, ...", "type": ["number", "null"], "exclusiveMinimum": 0},
    },
    "required": ["low", "high"],
    "additionalProperties": False,
}


def _options() -> dict[str, type]:
    """Task -> the dataclass of its options. Imports torch."""
    from ..tasks.first_look import BUILT_IN

    return {name: importlib.import_module(f"trainer.tasks.{name}").TASK.Options for name in BUILT_IN}


def tables() -> dict[str, str]:
    """Name -> table."""
    from ..folds.declaration import CrossValidation
    from ..search.declaration import Search
    from ..study.declaration import Study

    found = {
        "deepspeed": table(Config, skipped=("trainer",)),
        "trainer": table(TrainerOptions, "trainer."),
        "study": table(Study, "study."),
        "cross_validation": table(CrossValidation, "cross_validation."),
        "search": table(Search, "search."),
    }
    return found | {name: table(options, "") for name, options in _options().items()}


def schema() -> str:
    """The schema of a config file, as JSON text."""
    from ..folds.declaration import CrossValidation
    from ..search.declaration import Search
    from ..study.arms import NAMES
    from ..study.declaration import Study

    # Rules that the blocks' own checks add to a field's type and range.
    some: dict[str, Any] = {"minItems": 1, "uniqueItems": True}
    from_0 = {"items": {"type": "integer", "minimum": 0}, "uniqueItems": True}
    from_1: dict[str, Any] = {"uniqueItems": True, "items": {"type": "integer", "minimum": 1}}
    more: dict[str, json_schema.Schema] = {
        "study": {"required": ["output_dir", "seeds"]},
        "study.output_dir": {"minLength": 1},
        "study.arms": {"items": {"enum": list(NAMES)}, **some},
        "study.budgets": {"items": {"enum": ["epochs", "updates"]}, **some},
        "study.world_sizes": {**some, **from_1},
        "study.dataset_sizes": from_1,
        "study.epochs": from_1,
        "study.timing.world_sizes": from_1,
        "study.seeds": {"type": ["integer", "array"], "minimum": 2, "minItems": 2, **from_0},
        "study.variants": {"additionalProperties": {"type": "object", "minProperties": 1}},
        "study.metric": {"pattern": "^[^/]*/[^/]*$"},
        "study.tuning.warmup_epochs": {"items": {"type": "number", "minimum": 0}, "uniqueItems": True},
        "study.tuning.momentum": {
            "items": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
            "uniqueItems": True,
        },
        "study.tuning.metric": {"pattern": "^(|(?!test/)[^/]*/[^/]*)$"},
        "search": {"required": ["parameters"]},
        "search.parameters": {"minProperties": 1, "additionalProperties": {"anyOf": [_CHOICES, _RANGE]}},
        "search.metric": {"pattern": "^[^/]*$"},
    }
    blocks: dict[str, tuple[type, str]] = {
        "study": (Study, "what `study` compares, and how"),
        "search": (Search, "what `search` tries, and how"),
        "cross_validation": (CrossValidation, "how `cross-validate` cuts the samples into folds"),
    }
    return json.dumps(json_schema.document(_options(), blocks, more), indent=1) + "\n"


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
    file = ready.folder() / ready.SCHEMA
    file.parent.mkdir(exist_ok=True)
    file.write_text(schema())
