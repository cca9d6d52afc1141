"""The parts of a variance: against values by hand, and how often their interval holds, by simulation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.study.made_up import results
from trainer.study.arms import id_of_values
from trainer.study.results import Results, rows_of
from trainer.study.variance import parts_in, parts_of, variance_sentences, variance_table

Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]

# Effects with a mean of 0 and a variance of 1.
SHAPES: dict[str, Draw] = {
    "normal": lambda r, shape: r.normal(0, 1, shape),
    "heavy tails": lambda r, shape: r.standard_t(3, shape) / math.sqrt(3),
    "skewed": lambda r, shape: r.exponential(1, shape) - 1,
}


def test_parts_by_hand() -> None:
    """Means 2, 5, 8 with 1 to each side: 18 between splits, 2 within; so 8 and 2, and F is 9 with 2 and 3 freedoms."""
    parts = parts_of([[1.0, 3.0], [4.0, 6.0], [7.0, 9.0]], 0.05)
    assert (parts.splits, parts.seeds) == (3, 2)
    assert (parts.split**2, parts.seed**2, parts.whole**2) == pytest.approx((8, 2, 10))
    assert parts.share == pytest.approx(0.8)
    low, high = parts.share_interval
    assert low == 0.0, "F(0.975; 2, 3) is 16.04"
    assert high == pytest.approx(1 - 1 / (1 + (9 / 0.025533 - 1) / 2), rel=1e-4)
    alike = parts_of([[1.0, 3.0], [3.0, 1.0], [2.0, 2.0]], 0.05)
    assert (alike.split, alike.share) == (0.0, 0.0)
    assert parts_of([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]], 0.05).share == 1.0
    assert math.isnan(parts_of([[1.0, 1.0]] * 3, 0.05).share)


def held(shape: str, share: float, count: int) -> tuple[float, float]:
    """How often the interval of 10 splits with 3 seeds holds the true share; and the mean of the estimates."""
    random, draw, inside, shares = np.random.default_rng(5), SHAPES[shape], 0, []
    for _ in range(count):
        values = math.sqrt(share) * draw(random, (10, 1)) + math.sqrt(1 - share) * draw(random, (10, 3))
        parts = parts_of(values.tolist(), 0.05)
        inside += parts.share_interval[0] <= share <= parts.share_interval[1]
        shares.append(parts.share)
    return inside / count, float(np.mean(shares))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_interval_of_normal_effects_is_exact(share: float) -> None:
    """Where the split does nothing, one side of the interval cannot be wrong."""
    found, mean = held("normal", share, 200)
    level = 0.975 if share == 0.0 else 0.95
    assert found == pytest.approx(level, abs=3.1 * math.sqrt(level * (1 - level) / 200))
    assert mean == pytest.approx(0.07 if share == 0.0 else 0.48, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "share", "least"),
    [
        ("normal", 0.3, 0.93), ("normal", 0.7, 0.93), ("heavy tails", 0.3, 0.86), ("heavy tails", 0.7, 0.77),
        ("skewed", 0.3, 0.88), ("skewed", 0.7, 0.79),
    ],
)  # fmt: skip
def test_how_well_the_interval_holds(shape: str, share: float, least: float) -> None:
    """With heavy tails in both parts, and most of the variance the split's, it holds in about 80 %."""
    found, _ = held(shape, share, 1000)
    assert least <= found <= 0.98


def test_what_a_study_says_of_its_splits(tmp_path: Path) -> None:
    folder = results(tmp_path, seeds=10, splits={"repeated": 4, "seeds": 3}, arms=["weak"], world_sizes=[2])
    file = folder / "study.json"
    declared = json.loads(file.read_text())
    assert len(declared["repeats"]) == 12
    read = Results(folder)
    assert read.missing() == 8
    assert variance_sentences(read) == [
        "How much of the variance is the split's is not known: 8 of the 12 runs that tell it are missing."
    ]
    assert variance_table(read) == ""
    judged = next(iter(read.runs.values()))
    for i, repeat in enumerate(declared["repeats"]):
        value = 0.9 + 0.01 * repeat["split"] + 0.002 * (i % 3)
        run = read.runs.get(repeat["id"])
        if run is None:
            config = {"trainer": {"repeat": i}}
            repeat["id"] = id_of_values(config)
            run = judged | {"id": repeat["id"], "config": config}
        run = run | {"metrics": {"test": {"accuracy": value, "loss": 1 - value}}}
        (folder / "runs" / f"{repeat['id']}.json").write_text(json.dumps(run))
    file.write_text(json.dumps(declared))
    read = Results(folder)
    (said,) = variance_sentences(read)
    assert said.startswith("Of the variance of test/accuracy among sequential runs, the split explains 98 % and the")
    assert "judged runs with a standard deviation of 0.0020 instead of 0.0130" in said
    assert "<td>0.0129</td>" in variance_table(read)
    more = [row for row in rows_of(read) if row["arm"] == "sequential_repeated"]
    assert [(row["split_seed"], row["seed"]) for row in more] == [
        (split, 10 + 2 * split + k) for split in range(4) for k in (0, 1)
    ]
    assert {row["split_seed"] for row in rows_of(read) if row["seed"] == 3} == {3}
    broken = folder / "runs" / f"{declared['repeats'][1]['id']}.json"
    broken.write_text(json.dumps(json.loads(broken.read_text()) | {"metrics": {}}))
    assert parts_in(Results(folder)) == "1 of the 12 runs that tell it is not finite"
    (tmp_path / "one").mkdir()
    assert variance_sentences(Results(results(tmp_path / "one"))) == []
