"""What a study declares and plans, before any of its runs is made."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.distributed.jobs import ROOT
from tests.study.made_up import SHIPPED, planned, write
from trainer.errors import UserError
from trainer.study.arms import SEQUENTIAL, SEQUENTIALS, WEAK
from trainer.study.load import load_study


def test_the_shipped_studies_of_the_digits() -> None:
    study, plan = planned(SHIPPED)
    _, searched = planned(ROOT / "ds_configs" / "study_tuned.json")
    assert len(study.seeds) >= 10
    assert max(study.world_sizes) == 32
    assert {c.arm for c in [*plan.cells, *searched.cells]} == {*SEQUENTIALS, *WEAK}  # controls have to be asked for
    assert all(c.id for c in plan.cells)  # no searches, which take hours
    assert 2.0 ** -len(study.seeds) * plan.comparisons() <= study.alpha  # a verdict is possible
    assert [str(place) for place, _ in plan.impossible if place.budget == "epochs"] == [
        "weak_sqrt_adam, W = 16", "weak_sqrt_adam, W = 32",
    ]  # fmt: skip
    assert [W for W, answer in plan.strong if answer == 4] == [2, 4]


def test_strong_is_planned_as_far_as_it_goes(tmp_path: Path) -> None:
    """4 micro-batches can be dealt to 4 ranks, whatever W the weak arms are asked for."""
    _, plan = planned(write(tmp_path, {"world_sizes": [8, 32]}))
    assert [W for W, _ in plan.strong] == [4, 8, 32]
    assert [W for W, answer in plan.strong if answer == 4] == [4]
    _, plan = planned(write(tmp_path, {"world_sizes": [1, 3]}))
    assert [(W, answer) for W, answer in plan.strong] == [(3, 4), (4, 4)]


@pytest.mark.parametrize("file", sorted((ROOT / "ds_configs").glob("study*.json")), ids=lambda p: p.stem)
def test_every_shipped_study_can_decide(file: Path) -> None:
    study, plan = planned(file)
    assert plan.comparisons() >= 4
    assert 2.0 ** -len(study.seeds) * plan.comparisons() <= study.alpha
    assert all("weak_sqrt_adam" in str(place) for place, _ in plan.impossible)


def test_seeds_come_whole(tmp_path: Path) -> None:
    """A study that is interrupted has all arms of its first seeds."""
    _, plan = planned(write(tmp_path, {"seeds": [5, 3], "budgets": ["epochs"], "world_sizes": [2, 4]}))
    assert [c.seed for c in plan.cells] == [5] * 22 + [3] * 22
    assert plan.cells[0].arm == plan.cells[22].arm == SEQUENTIAL
    assert len(plan.configs) == 2 * (22 - 9)  # the settings of 9 places are searched first
    assert {c.trainer.exactness for c in plan.configs.values()} == {"bitwise"}


def test_equal_configs_are_one_run(tmp_path: Path) -> None:
    """At W = 2, 20 epochs of 64 samples are 20 steps, and equal updates 40; if only 20 epochs are allowed, the same."""
    path = write(tmp_path, {"seeds": 2, "budgets": ["epochs", "updates"], "world_sizes": [2], "arms": ["weak"]})
    _, plan = planned(path, samples=64)
    assert (len(plan.cells), len(plan.configs)) == (6, 6)
    path = write(tmp_path, {"seeds": 2, "budgets": ["epochs", "updates"], "world_sizes": [2], "arms": ["weak"],
                            "max_epochs": 20})  # fmt: skip
    _, plan = planned(path, samples=64)
    assert (len(plan.cells), len(plan.configs)) == (6, 4)


def test_variants_are_studies_of_their_own(tmp_path: Path) -> None:
    """A subset has its own batches beyond the data, and one micro-batch of all ranks stands for synchronised ones."""
    path = write(
        tmp_path,
        {
            "seeds": 2, "budgets": ["epochs"], "world_sizes": [2, 8], "arms": ["weak"], "dataset_sizes": [100],
            "variants": {"synchronised": {"synchronised_batch_norm": True, "trainer.task_options.model": "cnn"}},
        },
    )  # fmt: skip
    _, plan = planned(path)
    assert list(plan.variants) == ["", "100 samples", "synchronised"]
    assert [str(place) for place, _ in plan.impossible] == ["100 samples: weak, W = 8"]
    configs = {str(c.place): plan.configs[c.id] for c in plan.cells if c.id is not None}
    assert configs["100 samples: weak, W = 2"].trainer.train_samples == 100
    assert configs["weak, W = 8"].train_micro_batch_size_per_gpu == 8
    synchronised = configs["synchronised: weak, W = 8"]
    assert (synchronised.train_batch_size, synchronised.train_micro_batch_size_per_gpu) == (256, 64)
    assert synchronised.trainer.task_options == {"model": "cnn"}
    assert configs["synchronised: sequential"].train_micro_batch_size_per_gpu == 8
    measured = [name for name, config in configs.items() if config.trainer.gradient_noise]
    assert measured == ["sequential"]
    assert plan.comparisons() == 5


def test_the_runs_of_a_study_are_bitwise_and_keep_no_files(tmp_path: Path) -> None:
    """A run that is not exact is not the run of W ranks, so it is refused and not labelled."""
    _, plan = planned(write(tmp_path, {"seeds": 2, "world_sizes": [2], "arms": ["weak"]}))
    for config in plan.configs.values():
        assert config.trainer.exactness == "bitwise"
        assert not config.tensorboard.enabled
        assert config.trainer.checkpoint.every_steps == 0


def test_every_searched_run_has_a_search_of_its_own(tmp_path: Path) -> None:
    """LAMB's settings are searched once for all W; a tuned arm's at each. Names of variants become files."""
    path = write(
        tmp_path,
        {
            "seeds": 7, "budgets": ["epochs"], "world_sizes": [2, 4], "arms": ["weak_lamb", "weak_tuned"],
            "variants": {"a b": {"trainer.epochs": 30}, "a/b": {"trainer.epochs": 40}}, "dataset_sizes": [],
            "tuning": {"searches": 5, "seeds": 2},
        },
    )  # fmt: skip
    _, plan = planned(path)
    names = [name for name in plan.searches if name.startswith("base-")]
    places = ("sequential_lamb-epochs-W1", "sequential_tuned-epochs-W1", "weak_tuned-epochs-W2", "weak_tuned-epochs-W4")
    assert names == [f"base-{place}-{number}" for number in (1, 2, 3, 4, 5) for place in places]
    assert len(plan.searches) == 3 * 4 * 5
    assert all(re.fullmatch(r"[\w-]+", name) for name in plan.searches)
    lamb = {
        name for (place, seed), name in plan.tuned.items() if "lamb" in place.arm and (place.variant, seed) == ("", 3)
    }
    assert lamb == {"base-sequential_lamb-epochs-W1-4"}, "of W = 1, 2 and 4"
    # Seeds 5 and 6 have no search. Each of the others has runs of sequential, and with LAMB and tuned, of W = 1, 2, 4.
    assert len(plan.cells) == 3 * (7 + 5 * 6)
    # 60 searches of 40 + 14 runs, sequential runs whose settings are given, and runs whose settings are searched.
    assert plan.runs() == 60 * 54 + 3 * 7 + 3 * 5 * 6


def test_searches_go_by_validation_unless_told_otherwise(tmp_path: Path) -> None:
    study, _ = load_study(str(write(tmp_path, {"metric": "test/loss", "direction": "min"})))
    assert study.tuning_metric == "validation/loss"
    assert not study.rules.higher_is_better
    study, _ = load_study(str(write(tmp_path, {"tuning": {"metric": "validation/accuracy"}})))
    assert study.tuning_metric == "validation/accuracy"


def test_a_size_that_is_the_whole_is_no_size(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds 1,200, which is all of the base's training samples"):
        planned(write(tmp_path, {"dataset_sizes": [150, 1200]}))
