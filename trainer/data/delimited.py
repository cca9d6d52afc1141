"""Rows of csv and tsv files, as text. The meaning of a field is never guessed: every value is what is written.

Quotes are the difficulty. In csv, a text with a comma or a line break stands in quotes, and a quote in it is doubled.
Files of tweets use no quoting, and a text may begin with a quote. If such a file is read with quoting, this text takes
in all lines up to the next quote. So a file with quotes is read in both ways, and the reading that fits is taken.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Sequence

from ..errors import UserError

SEPARATORS = (",", ";", "\t", "|")
# A first line for Excel, such as sep=; which names the separator of the other lines.
_SAYS_SEPARATOR = re.compile(r"\ufeff?\"?sep=(.)\"?\r?\n", re.IGNORECASE)

# Tuples, not lists: Python's garbage collector stops tracking tuples of texts. It would visit lists again and again.
Rows = list[tuple[str, ...]]


def read_rows(text: str, where: str, separator: str | None, tabs: bool) -> tuple[list[str], Rows, list[str]]:
    """The header, the rows, and notes on what was not as usual.

    Args:
        text: of the file.
        where: its name, for messages.
        separator: between fields; None for the tab of a .tsv file, or the one in the header of a .csv file.
        tabs: a file of tab-separated values. It is read with quoting only if it must be.

    Raises:
        UserError: it has no header, or its rows differ in their number of fields.
    """
    said = _SAYS_SEPARATOR.match(text)
    if said is not None and not tabs:
        text, separator = text[said.end() :], separator or said[1]
    lines = text.replace("\r\n", "\n").replace("\r", "\n").rstrip("\n").split("\n")
    header_line = next((line for line in lines if line.strip()), "")
    if not header_line:
        raise UserError(f'"trainer.task_options.data": {where} is empty.')
    if _is_json(header_line):
        raise UserError(
            f'"trainer.task_options.data": the lines of {where} are JSON and not separated values. Call it .jsonl.'
        )
    notes = []
    short = where.rpartition("/")[2]  # notes are cached with the content, which may lie elsewhere the next time
    if separator is None:
        separator = "\t" if tabs else _separator_in(header_line)
        if not tabs and separator != ",":
            notes.append(f"{short} is separated by {'tabs' if separator == chr(9) else repr(separator)}")
    filled = [line for line in lines if line.strip(" ")]
    blank = len(lines) - len(filled)
    if '"' in text:
        rows, note = _chosen(text, filled, where, short, separator, tabs)
    else:
        rows, note = _plain(filled, separator), None
    width = len(rows[0])
    for number, row in enumerate(rows):
        if len(row) != width:
            raise UserError(
                f'"trainer.task_options.data": {where} cannot be read: row {number} (below the header) has {len(row)} '
                f"field{'s' * (len(row) != 1)}, but the header has {width}: {separator.join(row)[:60]!r}.\n"
                'A text that holds the separator must stand in quotes. Another separator is set with "separator" in '
                "trainer.task_options."
            )
    header = [name.strip() for name in rows[0]]
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice is not None:
        raise UserError(f'"trainer.task_options.data": {where} has two columns "{twice}".')
    if note:
        notes.append(note)
    if blank and len(rows) == len(filled):
        notes.append(f"{blank:,} blank line{'s' * (blank > 1)} of {short} left out")
    return header, rows[1:], notes


def _is_json(line: str) -> bool:
    if not line.startswith(("{", "[")):
        return False
    try:
        return isinstance(json.loads(line.rstrip().rstrip(",")), (dict, list))
    except ValueError:
        return False


def _separator_in(header: str) -> str:
    """A comma, if the header has one; else whichever of the usual separators it has."""
    return next((s for s in SEPARATORS if s in header), ",")


def _chosen(
    text: str, lines: Sequence[str], where: str, short: str, separator: str, tabs: bool
) -> tuple[Rows, str | None]:
    """The rows of the reading that fits, with or without quoting; and a note if the other one was to be expected."""
    strict = _quoted(text, separator, strict=True)
    # Of csv, the reading without quoting is not made unless it is needed: it takes as long again.
    plain = _plain(lines, separator) if tabs or isinstance(strict, str) or not _one_width(strict) else []
    fits = _one_width(plain)
    if isinstance(strict, list) and _one_width(strict):
        unquoted = fits and (len(strict) < len(plain) or not _consistent(plain, separator))
        if not unquoted:
            fewer = f"{len(lines):,} lines of {short} are {len(strict):,} rows, because quoted texts hold line breaks"
            return strict, fewer if len(strict) < len(lines) else None
    if fits:
        return plain, None if tabs else f"quotes in {short} do not pair up, so they are read as they are written"
    loose = _quoted(text, separator, strict=False)
    if isinstance(loose, list) and len(loose) == len(plain) and _one_width(loose):
        return loose, f"some texts of {short} have quotes inside quotes that are not doubled"
    if isinstance(strict, str):
        raise UserError(f'"trainer.task_options.data": {where} cannot be read: {strict}.')
    return strict, None


def _plain(lines: Sequence[str], separator: str) -> Rows:
    return [tuple(line.split(separator)) for line in lines]


def _one_width(rows: Rows) -> bool:
    return len(set(map(len, rows))) == 1


def _quoted(text: str, separator: str, strict: bool) -> Rows | str:
    """The rows of a reading with quoting, or what is wrong."""
    csv.field_size_limit(sys.maxsize)  # Python's own limit is 131,072 characters: a long document is an error then
    # From bytes, because StringIO would hold four bytes a character.
    file = io.TextIOWrapper(io.BytesIO(text.encode("utf-8", "surrogatepass")), "utf-8", "surrogatepass", newline="")
    reader = csv.reader(file, delimiter=separator, strict=strict)
    try:
        return [tuple(row) for row in reader if len(row) > 1 or (row and row[0].strip(" "))]
    except csv.Error as error:
        return f"line {reader.line_num}: {error}"


def _consistent(plain: Rows, separator: str) -> bool:
    """Whether each column has quotes around all of its fields, or only around those that need them.

    Programs that write quotes do so by one of these two rules. Quotes that people type in texts follow neither.
    """

    def quoted(field: str) -> bool:
        return len(field) > 1 and field[0] == field[-1] == '"'

    def needed(field: str) -> bool:
        return separator in field[1:-1] or '"' in field[1:-1]

    columns: list[Sequence[str]] = list(zip(*plain[1:]))
    return all(all(quoted(f) for f in column if f) or all(needed(f) for f in column if quoted(f)) for column in columns)
