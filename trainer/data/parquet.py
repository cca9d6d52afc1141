"""Reads Parquet files whose unpacked rows fit into the memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from .memory import machine_bytes

# The fewest bytes of a value: a number, or a place in a list of Python's.
_VALUE_BYTES = 8
# Texts or pictures of more bytes each, or of so many together, are stored once for each row. Only short ones may be
# stored once for many rows, in a dictionary: no usual writer has a dictionary of so many bytes.
_WHOLE_BYTES, _DICTIONARY_BYTES = 16, 4 << 20


def read_parquet(path: Path, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The columns of a file, and what the datasets library has noted about them.

    Args:
        path: of the file.
        where: its name, for messages.

    Returns:
        (name -> pyarrow array, name -> feature).

    Raises:
        UserError: its rows do not fit into the memory.
    """
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        _refuse_too_large(file, where)
        table = file.read()
    metadata = (table.schema.metadata or {}).get(b"huggingface")
    features = json.loads(metadata).get("info", {}).get("features", {}) if metadata else {}
    known = {name: f for name, f in features.items() if isinstance(f, Mapping) and name in table.column_names}
    return dict(zip(table.column_names, table.columns)), known


def _refuse_too_large(file: Any, where: str) -> None:
    """Raises UserError if the rows would take more than the memory, from the file's own account of its columns.

    The account says how many values there are. It does not say how long the texts are that a dictionary holds once. So
    these are measured, a few rows at a time.
    """
    memory = machine_bytes()
    shape = file.metadata
    chunks = [
        (group, shape.row_group(group).column(column))
        for group in range(shape.num_row_groups)
        for column in range(shape.num_columns)
    ]
    total = 0

    def add(count: int) -> None:
        nonlocal total
        total += count
        if total > memory:
            raise UserError(
                f'"trainer.task_options.data": the {shape.num_rows:,} rows of {where} would take more than this '
                f"machine's memory of {memory:,} bytes.\nKeep the rows and columns that are needed, in another file."
            )

    for _, chunk in chunks:
        add(max(chunk.total_uncompressed_size, _VALUE_BYTES * chunk.num_values))
    for group, chunk in chunks:
        size, count = chunk.total_uncompressed_size, chunk.num_values
        # No text is longer than all texts of its chunk.
        short = size < max(_WHOLE_BYTES * count, _DICTIONARY_BYTES) and size * count > memory - total
        if short and chunk.physical_type == "BYTE_ARRAY":
            few = min(1 << 16, max(1, memory // 16 // size))
            for batch in file.iter_batches(few, [group], [chunk.path_in_schema]):
                add(batch.nbytes)
