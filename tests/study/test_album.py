"""Which figures a study has, and what is in them."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.study.made_up import network, results, timed
from trainer.study.album import Album, figures_of
from trainer.study.page import write_report
from trainer.study.results import Results

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install -e .[study]")


def test_the_figures(tmp_path: Path) -> None:
    folder = results(tmp_path)
    write_report(folder)
    made = sorted(file.name for file in (folder / "figures").iterdir())
    assert made == [
        f"{name}.{kind}" for name in ("below-epochs", "metric-epochs", "unconverged-epochs") for kind in ("pdf", "svg")
    ]
    for name, title in (("metric", "test/accuracy over W"), ("unconverged", "share of runs that do not converge")):
        figure = ElementTree.parse(folder / "figures" / f"{name}-epochs.svg")
        text = " ".join("".join(element.itertext()) for element in figure.iter() if element.tag.endswith("text"))
        assert title in text
        assert "weak, square root" in text or "weak_sqrt" in text, text
        # Four micro-batches can be dealt to no more ranks, and the line of the sequential runs goes on to W = 8.
        assert ("strong, the same models, up to W = 4" in text) == (name == "metric")


def made(folder: Path) -> dict[str, str]:
    """The figures of a study, name -> all text in them."""
    figures_of(Results(folder), folder / "figures")
    found = {}
    for file in sorted((folder / "figures").glob("*.svg")):
        elements = ElementTree.parse(file).iter()
        found[file.stem] = " | ".join("".join(e.itertext()) for e in elements if e.tag.endswith("text"))
    return found


def test_losses_are_drawn_at_the_smallest_and_the_largest_w(tmp_path: Path) -> None:
    curves = {"train/loss": {"epoch": [1, 2], "step": [38, 76], "value": [2.0, 1.0]}}
    found = made(results(tmp_path, seeds=2, curves=curves, world_sizes=[2, 4, 8]))
    assert set(found) == {
        "below-epochs", "metric-epochs", "unconverged-epochs", "loss-W2-epochs", "loss-W8-epochs",
    }  # fmt: skip
    assert "training loss at W = 8" in found["loss-W8-epochs"]
    assert "sequential" in found["loss-W8-epochs"]
    assert "not finite from here" in found["loss-W8-epochs"], "the run of seed 0 at W = 8"
    assert "not finite" not in found["loss-W2-epochs"]


def test_the_noise_scale_stands_beside_the_batches_that_lose(tmp_path: Path) -> None:
    curves = {
        "noise/trace": {"epoch": [1, 2], "value": [50.0, 150.0]},
        "noise/gradient_squared": {"epoch": [1, 2], "value": [1.0, 1.0]},
    }
    found = made(results(tmp_path, curves=curves))["noise"]
    assert "one rank's batch, 32" in found
    assert "weak lose at 256" in found
    assert "weak_sqrt" not in found


def test_sizes_of_the_training_set_have_a_figure(tmp_path: Path) -> None:
    """Each variant has figures of its own; they are numbered, as its name is anybody's text."""
    found = made(results(tmp_path, seeds=2, arms=["weak"], world_sizes=[2], dataset_sizes=[300, 600]))
    assert {"sizes-epochs", "metric-epochs", "metric-1-epochs", "metric-2-epochs"} <= set(found)
    assert "margin" in found["sizes-epochs"]
    assert "1,200" in found["sizes-epochs"]
    assert "300 samples, equal epochs" in found["metric-2-epochs"] + found["metric-1-epochs"]


def test_budgets_have_a_figure_with_the_sequential_runs_and_the_controls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.study.album._draw_block", lambda *_: None)  # the other figures
    arms = ["weak", "weak_linear_warmup", "weak_sqrt", "weak_linear", "sequential_equal_updates"]
    found = made(results(tmp_path, seeds=2, arms=arms, world_sizes=[2, 8], epochs=[60]))
    panels = found["budgets"]
    for needed in ("sequential", "W = 2", "W = 8, as few updates", "weak, linear, warm-up", "20", "60"):
        assert needed in panels
    assert "weak, square root" not in panels, "three panels; the caption names what is left out"
    (tmp_path / "one").mkdir()
    assert "budgets" not in made(results(tmp_path / "one", seeds=2))


def test_speed_is_drawn_where_several_ranks_were_timed(tmp_path: Path) -> None:
    folder = results(tmp_path, seeds=2)
    timed(folder, 1)
    assert "speed-up" not in made(folder)
    timed(folder, 2, 0, 0.06)
    network(folder)
    found = made(folder)
    assert {"speed-up", "trials"} <= set(found)
    assert "measured" in found["speed-up"] and "predicted" in found["speed-up"]
    # On the largest number of ranks that is known, measured or predicted.
    assert "a search for the best configuration on 4 devices" in found["trials"]


def test_a_caption_is_text_and_its_picture_is_part_of_the_page(tmp_path: Path) -> None:
    from trainer.study import figures
    from trainer.study.drawing import Point, Series

    album = Album(tmp_path)
    album.add("mine", figures.trials("t", "s", [Series("a", [Point(1, 2)])]), '<b> & "more"')
    (part,) = album.parts
    assert "<b>" not in part
    assert "&lt;b&gt; &amp; &quot;more&quot; (figures/mine.svg, .pdf)" in part
    assert 'src="data:image/svg+xml;base64,' in part
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine.pdf", "mine.svg"]
