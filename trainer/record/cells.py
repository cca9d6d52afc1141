"""Values of a csv file that a spreadsheet may open."""

from __future__ import annotations

import re
from typing import Any

# If a cell begins with one of these, a spreadsheet takes it for a formula. The last four are the wide forms, as in
# Japanese.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def no_formula(value: Any) -> Any:
    """A csv value that no spreadsheet runs: a text that begins like a formula gets a quote mark in front.

    Such a text may be part of the data, which may come from anybody. A formula can send the cells beside it away. The
    rule is OWASP's, https://owasp.org/www-community/attacks/CSV_Injection. Numbers and a sign alone stay unchanged.
    """
    if not isinstance(value, str):
        return value
    value = re.sub(r"\r(?!\n)", "\n", value)  # before version 3.13, Python's csv would not quote it
    if not value.startswith(_FORMULA) or len(value.strip()) < 2:
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value
