"""Which folder a run takes, and which run `--resume auto` goes on with."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.run.small import config_of
from trainer.record.checkpoints import way_on
from trainer.run.claim import Resume, claim


@pytest.mark.parametrize(
    ("names", "newest"),
    [
        (["small-999", "small-1000"], "small-1000"),
        (["small-099", "small-100", "small-20"], "small-100"),
        (["small-002", "small-x", "other-003", "small-003.bak"], "small-002"),
    ],
)
def test_the_newest_run_is_that_of_the_highest_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], newest: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in names:
        (tmp_path / "runs" / name / "checkpoints" / "step-000000500").mkdir(parents=True)
        (tmp_path / "runs" / name / "manifest.json").write_text(
            '{"batch_plan": {}, "exactness": "bitwise", "config": {}}'
        )
    folder, source = claim(Resume("auto", False), config_of(output_dir=None), "small")
    folder.unlock()
    assert (folder.path.name, source) == (newest, folder.path / "checkpoints")


@pytest.mark.parametrize("name", ["my runs", "it's", "$HOME", "a;b"])
@pytest.mark.parametrize("begun", [False, True])
def test_what_to_type_next_can_be_pasted_into_a_shell(tmp_path: Path, name: str, begun: bool) -> None:
    run = tmp_path / name
    if begun:
        (run / "checkpoints" / "step-000000500").mkdir(parents=True)
    said = way_on(run).replace(", on any number of ranks.", "").rstrip(".")
    assert shlex.split(said[said.index("--resume auto") :])[:4] == ["--resume", "auto", "--output_dir", str(run)]
