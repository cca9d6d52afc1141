"""What is read from a study's file, and what is refused in it, each with the file's name and what to do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.jobs import ROOT
from tests.study.made_up import SHIPPED, write
from trainer.commands.cli import main
from trainer.errors import UserError
from trainer.study.load import load_study


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ({"arms": ["weak_lineer"]}, "holds 'weak_lineer'. Did you mean \"weak_linear\""),
        ({"seeds": 1}, '"study.seeds" must be at least 2'),
        ({"seeds": [1, 1]}, "each of them once"),
        ({"seeds": ["a", "b"]}, '"study.seeds[0]" must be a whole number, not "a"'),
        ({"seeds": "ten"}, "must be a list"),
        ({"world_sizes": [0]}, "whole numbers of at least 1"),
        ({"world_sizes": []}, "at least one"),
        ({"world_sizes": [1]}, "One rank is the sequential run itself"),
        ({"budgets": ["steps"]}, "holds 'steps'"),
        ({"metric": "accuracy"}, "<split>/<metric>"),
        ({"metric": "test/"}, "<split>/<metric>"),
        ({"metric": "test/loss"}, "but a loss is better when it is low"),
        ({"seeds": 20_000}, "asks for more than 1,000 seeds"),
        ({"collapse": 0.005}, "a collapse is more than a loss that matters"),
        ({"variants": {"one": {"study.margin": 3}}}, 'study.variants "one" sets study.margin, and no variant can'),
        ({"variants": {"one": {"trainer.seed": 3}}}, "every arm sets it"),
        ({"variants": {"one": {"trainer.epochs": 20}}}, "changes nothing"),
        ({"dataset_sizes": [150], "variants": {"150 samples": {"trainer.epochs": 2}}}, "the name of one in"),
        ({"alpha": 2}, "must be below 0.5"),
        ({"margn": 0.1}, 'Did you mean "margin"'),
        ({"output_dir": ""}, '"study.output_dir" is missing'),
        ({"budgets": ["epochs"], "max_epochs": 50}, "no effect"),
        ({"budgets": ["updates"], "max_epochs": 5}, "less than trainer.epochs"),
        ({"budgets": ["updates"], "epochs": [5, 60], "max_epochs": 50}, '(50) is less than 60 in "study.epochs"'),
        ({"epochs": [60, 60]}, "each of them once"),
        ({"epochs": [0]}, "whole numbers of at least 1"),
        ({"arms": ["weak", "sequential_equal_updates"], "budgets": ["updates"]}, 'Add "epochs" to it'),
        ({"epochs": [60], "variants": {"60 epochs": {"trainer.epochs": 61}}}, "the name of one in"),
        ({"dataset_sizes": [100, 100]}, "each of them once"),
        ({"variants": {"wide": 3}}, "a name and a block of dotted config keys"),
        ({"variants": {"wide": {"trainer.task_optins": 3}}}, 'Did you mean "task_options"'),
        ({"variants": {"short": {"trainer.max_steps": 3}}}, "has no place in the base config"),
        ({"tuning": {"searches": 4}}, "at least 5"),
        ({"tuning": {"spacing": 5.7}}, "at most 2"),
        ({"tuning": {"momentum": [0.9, 1.0]}}, "different numbers of at least 0 and below 1"),
        ({"tuning": {"warmup_epochs": [1, 1]}}, "different numbers of at least 0"),
        ({"tuning": {"metric": "test/accuracy"}}, "would make the test meaningless"),
        ({"timing": {"world_sizes": [0]}}, "whole numbers of at least 1"),
        ({"timing": {"world_sizes": [5]}}, '"study.timing.world_sizes" holds 5: 5 ranks are more than'),
        ({"seeds": [1, 1_000_003]}, "Seeds from 1000003 on belong to searches"),
        ({"variants": {"one": {"synchronised_batch_norm": 1}}}, "must be true or false"),
    ],
)
def test_bad_studies(tmp_path: Path, study: dict[str, Any], message: str) -> None:
    values = {"max_epochs": None, **study}
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_study(str(write(tmp_path, values)))
    assert str(tmp_path / "study.json") in str(caught.value)


def test_keys_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """They win over the file, for the base config and for the study, and are checked like it."""
    study, (base, *_) = load_study(
        str(SHIPPED), {"study.seeds": 9, "trainer.task_options.data": "mine.csv", "trainer.epochs": 3}
    )
    assert study.seeds == list(range(9))
    assert base.config.trainer.epochs == 3
    assert base.values["trainer"]["task_options"]["data"] == "mine.csv"
    assert main(["study", str(SHIPPED), "--set", "study.seedz=9"]) == 2
    assert 'Did you mean "seeds"' in capsys.readouterr().err
    assert main(["study", str(SHIPPED), "--set", "trainer.epohcs=9"]) == 2
    assert 'Did you mean "epochs"' in capsys.readouterr().err


def test_a_config_without_a_study(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", str(ROOT / "ds_configs" / "strong.json")]) == 2
    assert 'a study needs a "study" block' in capsys.readouterr().err


def test_the_line_for_editors_is_no_part_of_the_declaration(tmp_path: Path) -> None:
    """With it or without it, a study is the same one, and continues in its folder."""
    path = write(tmp_path)
    values = json.loads(path.read_text())
    assert "$schema" in values
    with_it = load_study(str(path))
    del values["$schema"]
    path.write_text(json.dumps(values))
    assert load_study(str(path)) == with_it


def test_variants_come_after_the_base_and_leave_it_alone(tmp_path: Path) -> None:
    """Sizes first, then budgets, then the user's own; each has the base's values but for its own change."""
    study = {"dataset_sizes": [300], "epochs": [5, 20], "variants": {"wide": {"trainer.task_options.width": 9}}}
    _, (base, *others) = load_study(str(write(tmp_path, study)))
    assert [v.name for v in others] == ["300 samples", "5 epochs", "wide"]  # 20 epochs are the base's own
    assert [v.config.trainer.train_samples for v in others] == [300, None, None]
    assert [v.config.trainer.epochs for v in (base, *others)] == [20, 20, 5, 20]
    assert "width" not in base.values["trainer"]["task_options"]


def test_a_tuned_arm_needs_a_rate_to_search_around(tmp_path: Path) -> None:
    path = write(tmp_path, {"arms": ["weak_tuned"]})
    values = json.loads(path.read_text())
    del values["optimizer"]["params"]["lr"]
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r'searches around "optimizer\.params\.lr", which is not given'):
        load_study(str(path))


def test_an_optimizer_without_momentum_has_none_to_search(tmp_path: Path) -> None:
    path = write(tmp_path, {"arms": ["weak_tuned"]})
    values = json.loads(path.read_text())
    values["optimizer"] = {"type": "Adagrad", "params": {"lr": 0.01}}
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r'Adagrad has no momentum. Set "study.tuning.momentum" to \[\]'):
        load_study(str(path))
    values["study"]["tuning"]["momentum"] = []
    path.write_text(json.dumps(values))
    assert load_study(str(path))[0].tuning.momentum == []
