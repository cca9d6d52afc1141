"""The notebook runs from its first cell to its last, as Jupyter runs it."""

from __future__ import annotations

import os
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).with_name("training.ipynb")


def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(NOTEBOOK.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))  # the kernel finds this trainer
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    book = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in book.cells)  # outputs are not kept: they would be out of date
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(
        o.get("text", "") for cell in book.cells for o in cell.get("outputs", []) if o.get("name") == "stdout"
    )
    assert "2 ranks x 4 micro-batches" in printed and "test accuracy" in printed
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["run-001", "run-002"]
