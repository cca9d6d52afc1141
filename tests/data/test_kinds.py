"""The list of kinds of data names tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def test_every_kind_has_its_tests() -> None:
    rows = [line for line in (TESTS / "data" / "README.md").read_text().splitlines() if line.startswith("| ")]
    for row in rows:
        cell = row.rstrip("| ").rpartition(" | ")[2]
        for place, names in re.findall(r"`([\w/*]+\.py)`(?:: ([\w, ]+))?", cell):
            files = [*TESTS.glob(place), *(TESTS / "data").glob(place)]
            assert files, place
            for name in filter(None, names.split(", ")):
                assert any(f"def test_{name}" in file.read_text() for file in files), (place, name)
