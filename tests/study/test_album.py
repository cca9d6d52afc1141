"""Which figures a study has, and what is in them."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.study.made_up import results
from trainer.study.page import write_report

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install -e .[study]")


def test_the_figures(tmp_path: Path) -> None:
    folder = results(tmp_path)
    write_report(folder)
    made = sorted(file.name for file in (folder / "figures").iterdir())
    assert made == [f"{name}.{kind}" for name in ("failures-epochs", "metric-epochs") for kind in ("pdf", "svg")]
    for name, title in (("metric", "test/accuracy over W"), ("failures", "share of runs that fail to converge")):
        figure = ElementTree.parse(folder / "figures" / f"{name}-epochs.svg")
        text = " ".join("".join(element.itertext()) for element in figure.iter() if element.tag.endswith("text"))
        assert title in text
        assert "weak, square root" in text or "weak_sqrt" in text, text
