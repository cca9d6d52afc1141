"""Which folder a run takes, and which run `--resume auto` goes on with."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.run.small import config_of
from trainer.errors import UserError
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


def a_run(path: Path, *steps: int) -> Path:
    for step in steps:
        (path / "checkpoints" / f"step-{step:09d}").mkdir(parents=True)
    path.mkdir(exist_ok=True)
    (path / "manifest.json").write_text('{"batch_plan": {}, "exactness": "bitwise", "config": {}}')
    return path


def test_what_lies_around_a_copied_checkpoint_is_not_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run took the folder over, and pruned the checkpoints that were there."""
    other = a_run(tmp_path / "other", 8, 9)
    copy = other / "keep" / "step-000000018"
    copy.mkdir(parents=True)
    with pytest.raises(UserError, match=r"outside of a run's folder checkpoints\. Add --output_dir"):
        claim(Resume(str(copy)), config_of(output_dir=None), "small")
    folder, source = claim(Resume(str(copy)), config_of(output_dir=str(tmp_path / "new")), "small")
    folder.unlock()
    assert (folder.path, source) == (tmp_path / "new", copy)


def test_a_checkpoint_may_be_named_from_within_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(tmp_path / "run", 18)
    monkeypatch.chdir(run / "checkpoints")
    folder, source = claim(Resume("step-000000018"), config_of(output_dir=None), "small")
    folder.unlock()
    assert (folder.path, source) == (run, run / "checkpoints" / "step-000000018")


def test_checkpoints_that_are_out_of_sight_are_spoken_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path / "run")
    claim(Resume("auto"), config_of(output_dir=str(run)), "small")[0].unlock()
    assert f"there is no checkpoint in {run / 'checkpoints'}, so the run begins again" in capsys.readouterr().out
    (run / "checkpoints").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"is a link to \S+/gone, which is not there\.\nMount its disk"):
        claim(Resume("auto"), config_of(output_dir=str(run)), "small")


@pytest.mark.parametrize("name", ["my runs", "it's", "$HOME", "a;b"])
@pytest.mark.parametrize("begun", [False, True])
def test_what_to_type_next_can_be_pasted_into_a_shell(tmp_path: Path, name: str, begun: bool) -> None:
    run = tmp_path / name
    if begun:
        (run / "checkpoints" / "step-000000500").mkdir(parents=True)
    said = way_on(run).replace(", on any number of ranks.", "").rstrip(".")
    assert shlex.split(said[said.index("--resume auto") :])[:4] == ["--resume", "auto", "--output_dir", str(run)]


def test_a_folder_with_a_leading_dash_is_no_option() -> None:
    assert "--resume auto --output_dir=-d2." in way_on(Path("-d2"))
