"""What every page has: the head, the style, tables, and numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
.headline { font-size: 1.15rem; border-left: 4px solid #0072b2; padding-left: 1rem; }
p, li, h1, h2, h3, summary { overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: 0.85rem; display: block; overflow-x: auto; }
th, td { padding: 0.2rem 0.6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child, td.text { text-align: left; } th.text { text-align: inherit; }
code { font-size: 0.85em; overflow-wrap: anywhere; } summary { cursor: pointer; }
.verdict { font-weight: 600; } .material-loss, .more-often { color: #b3261e; } .small-loss { color: #8a4b00; }
.ruled-out { color: #006d3c; } .undecided, .not-shown { color: #555; }
.by-size td { vertical-align: top; white-space: normal; } .by-size td > * { display: block; }
.by-size .more { color: #555; }
pre { overflow-x: auto; }
@media (max-width: 40rem) {
  body { margin: 1rem auto; } h1 { font-size: 1.5rem; }
  .by-size, .by-size tbody, .by-size tr, .by-size td { display: block; } .by-size thead { display: none; }
  .by-size td { text-align: left; white-space: normal; border: 0; padding-left: 1rem; }
  .by-size td:first-child { font-weight: 600; padding-left: 0; } .by-size tr { border-bottom: 1px solid #ddd; }
  .by-size td[data-size]::before { content: "W = " attr(data-size); color: #555; }
  figure { overflow-x: auto; } figure img { min-width: 34rem; }
}
figure { margin: 1.5rem 0; } figure img { width: 100%; max-width: 50rem; }
"""


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page as HTML. It has no script and loads nothing.

    Args:
        title: as text.
        parts: of the body, as HTML.
    """
    return (
        # The policy forbids the browser to load anything, whatever a user's names hold.
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def shown_value(value: Any) -> str:
    """A number, a text or nothing, as a cell of a table."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e6 or value == 0 else f"{value:.3g}"
    if isinstance(value, str) and len(value) == 64:  # a sha256: its first digits tell hashes apart
        return value[:12]
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def table(rows: Iterable[Sequence[Any]], header: Sequence[str]) -> str:
    """A table as HTML; its cells are values or plain text."""

    def line(cells: Sequence[Any], tag: str) -> str:
        words = [' class="text"' if isinstance(cell, str) and cell != "-" else "" for cell in cells]
        return "<tr>" + "".join(f"<{tag}{w}>{escape(shown_value(c))}</{tag}>" for c, w in zip(cells, words)) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(header, 'th')}</thead><tbody>\n{body}\n</tbody></table>"
