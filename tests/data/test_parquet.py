"""Parquet files: what the datasets library declares in them is kept, and what cannot fit into the memory is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from tests.data.test_memory import with_memory
from trainer.data.table_files import read_file
from trainer.errors import UserError


def test_what_the_datasets_library_declares_in_parquet(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    datasets.Dataset.from_dict({"image": [None], "label": [1]}, features).to_parquet(tmp_path / "a.parquet")
    table = read_file(tmp_path / "a.parquet")
    assert (table.images, table.classes, table.values("label")) == (["image"], {"label": ["no", "yes"]}, [1])


def one_text(rows: int, text: str) -> Any:
    """A text that stands once in the file, however many rows name it."""
    return pa.array([text]).take(pa.array(np.zeros(rows, dtype=np.int64)))


@pytest.mark.parametrize("kind", ["numbers", "texts", "long texts", "nested", "prefixes", "pictures"])
def test_a_parquet_file_that_unpacks_to_more_than_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    options: dict[str, Any] = {}
    rows = 50_000
    if kind == "numbers":
        columns: dict[str, Any] = {"label": np.zeros(4_000_000, dtype=np.int64)}
    elif kind == "texts":
        columns = {"label": np.zeros(400_000, dtype=np.int8), "text": one_text(400_000, "a text of one line " * 4)}
    elif kind == "long texts":
        columns = {"text": one_text(2_000, "word " * 20_000)}
    elif kind == "nested":
        columns = {
            "tokens": pa.ListArray.from_arrays(np.arange(0, rows + 1, 2, dtype=np.int32), one_text(rows, "x" * 999))
        }
    elif kind == "prefixes":
        columns = {"text": [f"{'x' * 999}{i % 7}" for i in range(rows)]}
        options = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    else:
        columns = {"image": pa.StructArray.from_arrays([one_text(rows, "x" * 999).cast(pa.binary())], ["bytes"])}
    file = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table(columns), file, compression="zstd", **options)
    assert file.stat().st_size < 120_000
    assert len(read_file(file)) > 0
    with_memory(monkeypatch, 24)
    monkeypatch.setattr(pa.parquet.ParquetFile, "read", None)
    with pytest.raises(
        UserError, match=r"rows of .*a\.parquet would take more than this machine's memory of 25,165,824"
    ):
        read_file(file)


def test_a_parquet_file_that_fits_into_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named texts are counted as they are, not by the longest that they could be."""
    texts = ["short", "x" * 100_000]
    rows = pa.array(np.arange(50_000) == 0, pa.int8()).cast(pa.int64())
    table = {"text": pa.array(texts).take(rows), "label": np.arange(50_000)}
    pa.parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    with_memory(monkeypatch, 24)
    assert read_file(tmp_path / "a.parquet").values("text", 0, 2) == ["x" * 100_000, "short"]
