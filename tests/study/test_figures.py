"""The figures of a study, read back as their readers read them."""

from __future__ import annotations

import base64
import io
import math
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from trainer.errors import UserError
from trainer.study import figures
from trainer.study.drawing import Curve, Group, Level, Point, Series
from trainer.study.figures import data_uri, save

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install -e .[study]")

NAN = math.nan
SVG = "{http://www.w3.org/2000/svg}"


def accuracy(title: str = "accuracy over W") -> Any:
    series = [
        Series("weak", [Point(W, 0.9 - W / 100, 0.8, 0.95) for W in (2, 8)]),
        Series("weak_lamb", [Point(2, 0.9)]),
    ]
    return figures.over_world_sizes(
        title, "test/accuracy", series, Level(0.95, "sequential", 0.94, 0.96), Level(0.9, "target")
    )


def losses() -> Any:
    curves = [Curve([1, 2, 3], [2.0, 1.0, 0.1]), Curve([1.5, 3], [2.0, 0.2]), Curve([1, 2], [3.0, NAN])]
    return figures.loss_curves("losses", "train/loss", [Group("sequential", curves[:2]), Group("weak", curves)])


DRAWINGS = {
    "accuracy": (accuracy, {"accuracy over W", "test/accuracy", "W, ranks", "weak", "weak, LAMB", "target", "2", "8"}),
    "losses": (losses, {"losses", "train/loss", "epochs", "sequential", "weak", "not finite from here"}),
    "speed_up": (
        lambda: figures.speed_up("speed", [Point(1, 1), Point(4, 3.2, 3, 3.4)], [Point(32, 20)]),
        {"speed", "ideal", "measured", "predicted", "efficiency, T1 / (W TW)", "32"},
    ),
    "noise": (
        lambda: figures.noise_scale("noise", [Point(1, 50.0, 20.0, 90.0), Point(2, NAN)], [Level(32, "B")]),
        {"noise", "gradient noise scale (samples)", "B", "mean over seeds", "interval"},
    ),
    "sizes": (
        lambda: figures.over_sizes(
            "sizes", "difference", [Series("weak", [Point(75, 0), Point(1200, 0)], world_size=W) for W in (2, 8)], -0.01
        ),
        {"sizes", "difference", "W = 2", "W = 8", "margin", "1,200", "training samples"},
    ),
    "trials": (
        lambda: figures.trials("trials", "time (s)", [Series("at <once> & $all$", [Point(1, 60), Point(8, 60)])]),
        {"trials", "time (s)", "at <once> & $all$"},
    ),
}  # fmt: skip


def texts(svg: str) -> set[str]:
    return {"".join(e.itertext()).strip() for e in ElementTree.fromstring(svg).iter(f"{SVG}text")}


@pytest.mark.parametrize("name", DRAWINGS)
def test_labels_are_text_and_the_same_data_are_the_same_bytes(tmp_path: Path, name: str) -> None:
    draw, labels = DRAWINGS[name]
    files = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        figure = draw()
        svg = save(figure, folder, name)
        assert svg == (folder / f"{name}.svg").read_text() == save(figure, folder, name)
        assert sorted(file.name for file in folder.iterdir()) == [f"{name}.pdf", f"{name}.svg"]
        files.append((svg, (folder / f"{name}.pdf").read_bytes()))
    assert files[0] == files[1]
    svg, pdf = files[0]
    assert labels <= texts(svg)
    assert pdf.startswith(b"%PDF")
    assert b"Date" not in pdf
    assert "date" not in svg
    assert 'href="http' not in svg
    assert base64.b64decode(data_uri(svg).removeprefix("data:image/svg+xml;base64,")).decode() == svg


def test_the_legend_lies_outside_of_the_axes(tmp_path: Path) -> None:
    figure = accuracy()
    save(figure, tmp_path, "a")
    axes, legend = figure.axes[0].get_window_extent(), figure.legends[0].get_window_extent()
    assert figure.bbox.x0 < axes.x0 < axes.x1 < legend.x0 < legend.x1 <= figure.bbox.x1
    assert figure.bbox.y0 < axes.y0 < axes.y1 < figure.bbox.y1


def test_a_users_settings_change_nothing(tmp_path: Path) -> None:
    import matplotlib

    before = save(accuracy(), tmp_path, "a")
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.grid": False, "svg.hashsalt": None}):
        mine = dict(matplotlib.rcParams)
        assert save(accuracy(), tmp_path, "a") == before
        assert dict(matplotlib.rcParams) == mine


HUGE = [Point(2, 0.5, 0.4, 0.6), Point(4, 1e300), Point(8, NAN), Point(16, -1e20, -1e25, 1e3), Point(32, math.inf)]


def drawn(figure: Any) -> None:
    """Draws it for real. A view that is no view, or a layout that has no room, is a warning."""
    figure.savefig(io.BytesIO(), format="png")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "points", [[], [Point(4, 0.5)], [Point(4, NAN)], HUGE, [Point(4, 0.0), Point(8, 0.0, 0.0, 0.0)], [Point(3, -1e9)]]
)
def test_no_value_is_too_much(points: list[Point]) -> None:
    series = [Series("weak", points)]
    drawn(figures.over_world_sizes("t", "y", series))
    drawn(figures.over_world_sizes("t", "y", series, Level(0.5, "r", NAN, NAN), Level(NAN, "t")))
    drawn(figures.over_world_sizes("t", "y", series, limits=(0, 1)))
    drawn(figures.speed_up("t", points, points))
    drawn(figures.trials("t", "y", series))
    drawn(figures.over_sizes("t", "y", [*series, Series("strong", points, world_size=2)], 0.01))
    curve = Curve([p.x for p in points], [p.y for p in points])
    drawn(figures.loss_curves("t", "y", [Group("weak", [curve]), Group("mine", [curve, Curve([1, 9], [-1, -2])])]))
    drawn(figures.loss_curves("t", "y", []))
    drawn(figures.noise_scale("t", points, [Level(8, "b"), Level(9, "c"), Level(-1, "no"), Level(NAN, "no")]))


def test_what_is_a_thousand_times_off_does_not_hide_the_rest(tmp_path: Path) -> None:
    figure = figures.over_world_sizes("t", "y", [Series("weak", HUGE)], Level(0.5, "sequential"))
    low, high = figure.axes[0].get_ylim()
    assert 0.3 < low < 0.4 < 0.6 < high < 0.7
    assert {"beyond the axis", "not finite"} <= texts(save(figure, tmp_path, "a"))


def test_matplotlib_is_imported_late_and_missed_politely() -> None:
    code = (
        "import sys; sys.modules['matplotlib.style'] = None\n"
        "import trainer.study.figures as f, trainer.study.hparams\n"
        "assert not {'matplotlib', 'tensorboard'} & set(sys.modules)\n"
        "try: f.trials('t', 'y', [])\nexcept ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert 'pip install "strong-scaling-trainer[study]"' in done.stdout


def test_drawing_leaves_pyplot_alone(tmp_path: Path) -> None:
    code = "import sys\nfrom tests.study.test_figures import *\nsave(accuracy(), Path(sys.argv[1]), 'a')\n"
    code += "assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, cwd=Path(__file__).parents[2])


def test_a_figure_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = save(accuracy(), tmp_path, "a")
    monkeypatch.setattr("trainer.files.os.replace", lambda *places: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(losses(), tmp_path, "a")
    assert (tmp_path / "a.svg").read_text() == old


def test_a_missing_matplotlib_is_the_users_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(UserError, match="need matplotlib"):
        accuracy()
