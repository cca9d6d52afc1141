"""The figures of a study, and its runs in TensorBoard: read back as their readers read them."""

from __future__ import annotations

import base64
import io
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from trainer.errors import UserError
from trainer.study import drawing, figures
from trainer.study.arms import NAMES, SEQUENTIAL_TUNED
from trainer.study.drawing import Curve, Group, Level, Point, Series
from trainer.study.figures import data_uri, save
from trainer.study.hparams import write_hparams

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
        lambda: figures.noise_scale("noise", [Curve([1, 2], [50.0, 90.0]), Curve([1, 2], [-3, 80])], [Level(32, "B")]),
        {"noise", "gradient noise scale (samples)", "B", "median over seeds"},
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


def test_every_arm_is_drawn_alike_everywhere_and_unlike_all_others() -> None:
    assert set(drawing.ARMS) == {*NAMES, SEQUENTIAL_TUNED}
    styles = drawing.styles_of([(arm, "") for arm in drawing.ARMS])
    assert len({(s.colour, s.mark, s.filled) for s in styles}) == len({s.label for s in styles}) == 12
    assert len({(s.colour, s.dashes) for s in styles}) == 12
    assert drawing.styles_of([("anything", "weak_lars")])[0]._replace(label="weak, LARS") in styles
    others = drawing.styles_of([(f"other {i}", "") for i in range(14)])
    assert len({(s.colour, s.mark, s.filled) for s in others}) == 14


def test_arms_lie_apart_and_near_their_w() -> None:
    for count, sizes in ((1, [2, 4, 8]), (2, [2, 4]), (12, [8]), (12, [2, 32])):
        shifts = drawing.shifts(count, sizes)
        assert len(set(shifts)) == count
        assert max(shifts) / min(shifts) < 2**0.6
        assert math.prod(shifts) == pytest.approx(1)
    assert max(drawing.shifts(12, [30, 31, 32])) < (31 / 30) ** 0.5


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
    drawn(figures.noise_scale("t", [curve], [Level(8, "b"), Level(9, "c"), Level(-1, "no"), Level(NAN, "no")]))


def test_what_is_a_thousand_times_off_does_not_hide_the_rest(tmp_path: Path) -> None:
    figure = figures.over_world_sizes("t", "y", [Series("weak", HUGE)], Level(0.5, "sequential"))
    low, high = figure.axes[0].get_ylim()
    assert 0.3 < low < 0.4 < 0.6 < high < 0.7
    assert {"beyond the axis", "not finite"} <= texts(save(figure, tmp_path, "a"))


def test_the_median_over_seeds() -> None:
    """Grids differ, and a run that broke off is infinite: two of three, and so is the median."""
    line = drawing.across_seeds(
        [Curve([0, 2, 4], [0, 2, 4]), Curve([0, 2, 4], [10, NAN, 1]), Curve([0, 4], [8, 8], broken=True), Curve([], [])]
    )
    assert line.x.tolist() == [0, 2, 4]
    assert line.middle.tolist() == [8, 8, 8]
    assert line.low.tolist() == [0, 2, 4]
    assert line.high.tolist() == [10, math.inf, math.inf]
    assert line.ends == [(0, 10), (4, 8)]
    line = drawing.across_seeds([Curve([0, 1, 2], [1, 2, 3]), Curve([0, 1], [1, NAN]), Curve([0, 1], [1, math.inf])])
    assert line.middle.tolist() == [1, math.inf, math.inf]
    # one that is only shorter has no part in the rest
    assert drawing.across_seeds([Curve([0, 4], [1, 1]), Curve([0, 2], [3, 3])]).middle.tolist() == [2, 2, 1]


def test_matplotlib_is_imported_late_and_missed_politely() -> None:
    code = (
        "import sys; sys.modules['matplotlib.style'] = None\n"
        "import trainer.study.figures as f, trainer.study.hparams\n"
        "assert not {'matplotlib', 'tensorboard'} & set(sys.modules)\n"
        "try: f.trials('t', 'y', [])\nexcept ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "pip install -e .[study]" in done.stdout


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


# TensorBoard


def row(arm: str, world_size: int, seed: int, accuracy: float | None, **more: Any) -> dict[str, Any]:
    return {
        "variant": "", "arm": arm, "budget": "epochs", "world_size": world_size, "seed": seed,
        "config_sha256": f"{arm}{world_size}{seed}", "global_batch_size": 32 * world_size, "learning_rate": 0.1,
        "epochs": 20, "steps": 760, "status": "not finite" if accuracy is None else "finished",
        "started_at_s": 1000.0, "wall_time_s": 2.0, "device_model": "x", "test/accuracy": accuracy, "test/loss": 1.0,
    } | more  # fmt: skip


def session_groups(folder: Path) -> list[Any]:
    """What the tab gets when it asks for all runs."""
    from tensorboard import context
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups

    multiplexer = plugin_event_multiplexer.EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(folder)).Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(folder))
    asked = context.RequestContext()
    backend = backend_context.Context(base_plugin.TBContext(data_provider=provider))
    experiment = get_experiment.Handler(asked, backend, "x", api_pb2.GetExperimentRequest()).run()
    every = [api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE]
    request = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=10_000, allowed_statuses=every, aggregation_type=api_pb2.AGGREGATION_AVG,
        col_params=[api_pb2.ColParams(hparam=info.name, include_in_result=True) for info in experiment.hparam_infos]
        + [api_pb2.ColParams(metric=info.name, include_in_result=True) for info in experiment.metric_infos],
    )  # fmt: skip
    return list(list_session_groups.Handler(asked, backend, "x", request).run().session_groups)


def value(part: Any) -> Any:
    return getattr(part, part.WhichOneof("kind"))


def test_the_hparams_tab_finds_every_run(tmp_path: Path) -> None:
    from tensorboard.plugins.hparams import api_pb2

    rows = [row("weak", W, seed, None if (W, seed) == (8, 1) else 0.9 + W / 1000) for W in (2, 8) for seed in (0, 1)]
    rows += [row("sequential", 1, 0, 0.95, variant=name, learning_rate=None) for name in ("", "a/b", "a b", "../b")]
    for _ in range(2):  # and again, in place of the first
        write_hparams(tmp_path, rows)
    groups = {group.name: group for group in session_groups(tmp_path / "tensorboard")}
    assert len(groups) == len(rows)
    names = {file.name for file in (tmp_path / "tensorboard").iterdir() if file.is_dir()}
    assert names == set(groups)
    assert {"weak-epochs-W2-seed0", "weak-epochs-W8-seed1", "sequential-epochs-W1-seed0"} <= names
    assert all("/" not in name for name in names)

    group = groups["weak-epochs-W2-seed0"]
    found = {key: value(part) for key, part in group.hparams.items()}
    assert found == {
        "variant": "base", "arm": "weak", "budget": "epochs", "world_size": 2, "seed": 0, "global_batch_size": 64,
        "learning_rate": 0.1, "epochs": 20, "steps": 760, "status": "finished", "config_sha256": "weak20",
    }  # fmt: skip
    metrics = {m.name.tag: m.value for m in group.metric_values}
    assert metrics == {"test/accuracy": pytest.approx(0.902), "test/loss": 1.0}
    assert (group.sessions[0].start_time_secs, group.sessions[0].end_time_secs) == (1000, 1002)
    assert group.sessions[0].status == api_pb2.STATUS_SUCCESS
    broken = groups["weak-epochs-W8-seed1"]
    assert broken.sessions[0].status == api_pb2.STATUS_FAILURE
    assert {m.name.tag for m in broken.metric_values} == {"test/loss"}
    assert value(broken.hparams["status"]) == "not finite"
    assert not groups["sequential-epochs-W1-seed0"].hparams["learning_rate"].WhichOneof("kind")
    assert [file.name for file in tmp_path.iterdir()] == ["tensorboard"]


def test_metrics_are_read_by_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = write_hparams(tmp_path, [row("weak", 2, 0, 0.9)])
    events = EventAccumulator(str(folder / "weak-epochs-W2-seed0")).Reload()
    assert [event.value for event in events.Scalars("test/accuracy")] == [pytest.approx(0.9)]
    assert re.match(r"events\.out\.tfevents\.\d+", next((folder / "weak-epochs-W2-seed0").iterdir()).name)


def test_a_thousand_runs_take_seconds(tmp_path: Path) -> None:
    began_s = time.monotonic()
    folder = write_hparams(tmp_path, [row("weak", 2**i, seed, 0.9) for i in range(10) for seed in range(100)])
    assert time.monotonic() - began_s < 20  # one second, on a machine that is left alone
    assert len(list(folder.rglob("events.*"))) == 1001


def test_a_missing_matplotlib_is_the_users_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(UserError, match="need matplotlib"):
        accuracy()
