"""The output folder: claimed, released, never overwritten, and files that are whole.

Unwritable places are made with a file in the way: permission bits mean nothing to root, which tests
often are.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trainer.errors import UserError
from trainer.record import folder as output
from trainer.record.folder import ORIGIN, OutputFolder, write_tensors


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders without a name go to ./runs."""
    monkeypatch.chdir(tmp_path)


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Claiming


def test_a_new_folder_is_numbered(tmp_path: Path) -> None:
    paths = [OutputFolder.claim(None, "strong").path for _ in range(3)]
    assert paths == [Path("runs/strong-001"), Path("runs/strong-002"), Path("runs/strong-003")]
    assert OutputFolder.claim(None, "weak").path == Path("runs/weak-001")
    assert everything(tmp_path) == [
        "runs",
        *(f"runs/{n}" for n in ("strong-001", "strong-002", "strong-003", "weak-001")),
    ]


def test_a_number_that_is_taken_by_anything_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "strong-001").write_text("a file")
    (tmp_path / "runs" / "strong-003").mkdir()
    assert [OutputFolder.claim(None, "strong").path.name for _ in range(2)] == ["strong-002", "strong-004"]
    assert (tmp_path / "runs" / "strong-001").read_text() == "a file"


def test_a_wanted_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    folder = OutputFolder.claim("a/b/c", "strong")
    assert folder.path == Path("a/b/c")
    assert everything(tmp_path) == ["a", "a/b", "a/b/c"]  # and nothing else: the probe is gone


def test_a_folder_with_logs_and_the_config_alone_is_taken(tmp_path: Path) -> None:
    names = [".hidden", "empty", "slurm-7.out", "strong.json"]
    (tmp_path / "mine" / "empty").mkdir(parents=True)
    for name in (".hidden", "slurm-7.out", "strong.json"):
        (tmp_path / "mine" / name).write_text("mine")
    assert OutputFolder.claim("mine", "strong").path == Path("mine")
    assert everything(tmp_path) == ["mine", *(f"mine/{name}" for name in names)]


@pytest.mark.parametrize("again", [False, True])
def test_a_folder_of_the_users_own_files_is_refused(tmp_path: Path, again: bool) -> None:
    (tmp_path / "mine" / "cats").mkdir(parents=True)
    for name in ("a.csv", "b.csv", "c.csv", "cats/1.png"):
        (tmp_path / "mine" / name).write_text("mine")
    with pytest.raises(UserError, match=r"mine holds files that no run has written \(a.csv, b.csv, c.csv and 1 more\)"):
        OutputFolder.claim("mine", "strong", again)
    folder = OutputFolder.claim("mine/run", "strong")
    folder.write_json("manifest.json", MANIFEST)
    folder.unlock()
    (folder.path / "notes.txt").write_text("a note on the run")
    assert OutputFolder.claim("mine/run", "strong", again=True).continues


# What tells a run's manifest from another one.
MANIFEST = {"config": {}, "batch_plan": {}, "exactness": "bitwise"}


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(
    "name", ["manifest.json", "summary.json", "metrics.jsonl", "model", "adapter", "checkpoints", "logs/deepspeed.log"]
)
def test_what_is_there_is_never_overwritten(tmp_path: Path, name: str, again: bool) -> None:
    """Something of the user's that has the name of what a run writes; with --resume as well."""
    (tmp_path / "mine" / name).parent.mkdir(parents=True)
    (tmp_path / "mine" / name).write_text('{"name": "a browser extension"}')
    with pytest.raises(UserError) as caught:
        OutputFolder.claim("mine", "strong", again)
    for word in ("output folder mine", "not written by a run", name, "never overwritten", "--output_dir"):
        assert word in str(caught.value)
    assert (tmp_path / "mine" / name).read_text() == '{"name": "a browser extension"}'


def test_two_runs_cannot_have_one_folder() -> None:
    folder = OutputFolder.claim("mine", "strong")
    folder.write_json("manifest.json", MANIFEST)
    with pytest.raises(UserError, match="already holds a run"):
        OutputFolder.claim("mine", "strong")


def test_an_empty_name_is_no_folder() -> None:
    """As of a shell variable that is not set: the run would go into the current folder."""
    with pytest.raises(UserError, match="--output_dir is empty"):
        OutputFolder.claim("", "strong")


def test_a_log_is_taken_over_only_when_the_run_begins(tmp_path: Path) -> None:
    """A run that is refused before leaves nothing that would stand in the way of the next one."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.jsonl").write_text("{}\n")
    folder = OutputFolder.claim("new", "strong")
    folder.inherit(tmp_path / "old")
    assert everything(folder.path) == []
    folder.begin()
    assert (folder.path / "metrics.jsonl").read_text() == "{}\n"


# Places that cannot be written


def refusal(wanted: str | None) -> str:
    with pytest.raises(UserError) as caught:
        OutputFolder.claim(wanted, "strong")
    return str(caught.value)


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    assert refusal("mine") == "The output folder mine cannot be written: it is a file."
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_file_above_the_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    message = refusal("mine/results/1")
    assert "mine/results/1 cannot be written" in message
    assert "directory" in message
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_file_in_the_place_of_runs(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("precious")
    assert refusal(None) == "The output folder runs cannot be written: it is a file."
    assert (tmp_path / "runs").read_text() == "precious"


def test_a_name_too_long(tmp_path: Path) -> None:
    assert "cannot be written" in refusal("a/b/" + "x" * 300)
    assert everything(tmp_path) == []  # what was made on the way is gone again


def test_a_full_disk_is_found_when_claiming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing decides, not permission bits."""

    def no_space(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", no_space)
    assert refusal("a/b") == "The output folder a/b cannot be written: No space left on device."
    assert everything(tmp_path) == []


# Releasing


def test_release_removes_what_claim_made(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    OutputFolder.claim("a/b/c", "strong").release()
    assert everything(tmp_path) == ["a"]
    OutputFolder.claim(None, "strong").release()
    assert everything(tmp_path) == ["a"]


def test_release_keeps_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    OutputFolder.claim("mine", "strong").release()
    assert everything(tmp_path) == ["mine"]
    first = OutputFolder.claim(None, "strong")
    OutputFolder.claim(None, "strong").release()
    assert everything(tmp_path) == ["mine", "runs", str(first.path)]


def test_release_keeps_what_was_put_there_since(tmp_path: Path) -> None:
    folder = OutputFolder.claim("a/b", "strong")
    folder.write_json("manifest.json", {})
    folder.release()
    assert everything(tmp_path) == ["a", "a/b", "a/b/manifest.json"]


# Files


def test_json_reads_back() -> None:
    folder = OutputFolder.claim(None, "strong")
    folder.write_json("summary.json", {"steps": 3, "metrics": {"test": {"loss": 0.1}}, "hosts": ["a", "b"]})
    text = (folder.path / "summary.json").read_text()
    assert json.loads(text) == {"steps": 3, "metrics": {"test": {"loss": 0.1}}, "hosts": ["a", "b"]}
    assert text.endswith("}\n")


def test_what_is_not_finite_is_null_wherever_it_stands() -> None:
    """A metric of nan must not cost the summary of a run that has ended."""
    folder = OutputFolder.claim(None, "strong")
    value = {"a": math.nan, "b": {"c": math.inf, "d": [1.0, -math.inf, (math.nan, 2)]}, "e": 1}
    folder.write_json("summary.json", value)
    read = json.loads((folder.path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert read == {"a": None, "b": {"c": None, "d": [1.0, None, [None, 2]]}, "e": 1}
    assert math.isnan(value["a"])  # the value itself is left alone


def test_a_file_is_replaced_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = OutputFolder.claim("mine", "strong")
    folder.write_json("summary.json", {"steps": 1})

    def interrupted(source: Any, target: Any) -> None:
        # All of the new file is on disk by now, and the old one is untouched.
        assert json.loads(Path(source).read_text()) == {"steps": 2}
        assert Path(source).parent == Path(target).parent  # a rename across file systems is no rename
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            folder.write_json("summary.json", {"steps": 2})
    assert json.loads((folder.path / "summary.json").read_text()) == {"steps": 1}
    folder.write_json("summary.json", {"steps": 3})
    assert json.loads((folder.path / "summary.json").read_text()) == {"steps": 3}
    assert everything(folder.path) == ["summary.json"]


def test_model_reads_back_with_tied_weights_and_views(tmp_path: Path) -> None:
    """Statistics lie in one buffer and tied weights are one tensor; safetensors takes neither as they are."""
    weight, buffer = torch.randn(4, 3), torch.randn(10)
    state = {
        "embedding": weight,
        "head": weight,
        "mean": buffer[:5],
        "var": buffer[5:],
        "channels_last": torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last),
        "count": torch.tensor(7),
        "bf16": torch.randn(3).bfloat16(),
    }
    folder = OutputFolder.claim("mine", "strong")
    for _ in range(2):  # the second over the first
        folder.write_folder("model", lambda target: write_tensors(target / "model.safetensors", state))
    read = load_file(tmp_path / "mine" / "model" / "model.safetensors")
    assert set(read) == set(state)
    for name, tensor in state.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name
    assert everything(folder.path) == ["model", "model/model.safetensors"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = OutputFolder.claim("mine", "strong")
    folder.write_folder("model", lambda target: (target / "a").write_text("first"))

    def fails(target: Path) -> None:
        (target / "b").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        folder.write_folder("model", fails)
    assert everything(folder.path) == ["model", "model/a"]


def hold(folder: str, held: Any, let_go: Any) -> None:
    OutputFolder.claim(folder, "strong")
    held.set()
    let_go.wait(60)


def test_a_folder_in_use_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs never write into one folder; one that goes on waits for ranks that are still leaving."""
    monkeypatch.setattr(output, "_LEAVING_S", 0.5)
    context = multiprocessing.get_context("spawn")
    held, let_go = context.Event(), context.Event()
    other = context.Process(target=hold, args=(str(tmp_path / "run"), held, let_go))
    other.start()
    assert held.wait(60)
    with pytest.raises(UserError, match=rf"is in use: process {other.pid} \(.*python.*\) still holds it"):
        OutputFolder.claim(str(tmp_path / "run"), "strong", again=True)
    let_go.set()
    other.join(60)
    (tmp_path / "run" / ".model.123").mkdir()
    (tmp_path / "run" / ".summary.json.123").write_text("half")
    (tmp_path / "run" / ".eslintrc.json.bak").write_text("the user's")
    OutputFolder.claim(str(tmp_path / "run"), "strong", again=True)
    assert everything(tmp_path / "run") == [".eslintrc.json.bak"]


def claim_late(folder: str, waiting: Any) -> str:
    output._LEAVING_S = 30.0
    waiting.set()
    try:
        OutputFolder.claim(folder, "strong")
    except UserError as error:
        return str(error)
    return "claimed"


def test_a_folder_is_looked_at_once_it_is_locked(tmp_path: Path) -> None:
    """The first run writes its first file only when the second already waits for the folder."""
    context = multiprocessing.get_context("spawn")
    waiting = context.Manager().Event()
    first = OutputFolder.claim(str(tmp_path / "run"), "strong")
    with context.Pool(1) as pool:
        second = pool.apply_async(claim_late, (str(tmp_path / "run"), waiting))
        assert waiting.wait(60)
        time.sleep(0.3)
        first.write_json("manifest.json", MANIFEST)
        first.unlock()
        assert "already holds a run" in second.get(60)


def test_a_folder_that_went_while_it_was_waited_for_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ends before its first step removes its folder. A lock on the removed folder would lock nothing."""
    lock = output._lock

    def slow(path: Path) -> int | None:
        found = lock(path)
        if not seen:
            path.rmdir()
        seen.append(found)
        return found

    seen: list[int | None] = []
    monkeypatch.setattr(output, "_lock", slow)
    folder = OutputFolder.claim("mine", "strong")
    assert len(seen) == 2 and folder.path.is_dir()
    monkeypatch.setattr(output, "_lock", lock)
    monkeypatch.setattr(output, "_LEAVING_S", 0.0)
    with pytest.raises(UserError, match="is in use"):
        OutputFolder.claim("mine", "strong")


def test_a_process_that_a_task_forks_does_not_keep_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a loader of its own that outlives the run: the run could not be resumed until it ends."""
    folder = OutputFolder.claim("mine", "strong")
    context = multiprocessing.get_context("fork")
    started, end = context.Event(), context.Event()

    def child() -> None:
        started.set()
        end.wait(60)

    process = context.Process(target=child)
    process.start()
    try:
        assert started.wait(60)
        folder.unlock()
        monkeypatch.setattr(output, "_LEAVING_S", 0.0)
        OutputFolder.claim("mine", "strong").unlock()
    finally:
        end.set()
        process.join(60)


@pytest.mark.parametrize("kind", ["a folder of the user's", "a link"])
def test_a_model_that_no_run_has_written_is_not_replaced(tmp_path: Path, kind: str) -> None:
    OutputFolder.claim("mine", "strong").write_json("manifest.json", MANIFEST)
    model = tmp_path / "mine" / "model"
    if kind == "a link":
        (tmp_path / "elsewhere").mkdir()
        model.symlink_to(tmp_path / "elsewhere")
    else:
        model.mkdir()
    with pytest.raises(UserError, match=r"mine/model was not written by a run: it (lacks trainer\.json|is a link)"):
        _without_lock(lambda: OutputFolder.claim("mine", "strong", again=True))
    assert os.path.lexists(model)


def test_what_a_user_has_put_beside_a_model_stays(tmp_path: Path) -> None:
    """A finished run that goes on writes its model again. Files of its own that the new model lacks are gone."""
    folder = OutputFolder.claim("mine", "strong")

    def write(*names: str) -> None:
        def model(target: Path) -> None:
            for name in names:
                (target / name).write_text("new")
            (target / ORIGIN).write_text(json.dumps({"files": names}))

        folder.write_folder("model", model)

    write("old.safetensors", "config.json")
    model = tmp_path / "mine" / "model"
    (model / "notes.txt").write_text("mine")
    (model / "plots").mkdir()
    (model / "plots" / "a.png").write_text("mine")
    (model / "link").symlink_to("notes.txt")
    write("new.safetensors", "config.json")
    names = ["config.json", "link", "new.safetensors", "notes.txt", "plots", "trainer.json"]
    assert sorted(file.name for file in model.iterdir()) == names
    assert (model / "link").is_symlink() and (model / "plots" / "a.png").read_text() == "mine"


def _without_lock(function: Any) -> Any:
    while output._locks:
        os.close(output._locks.pop())
    return function()


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    assert OutputFolder.claim("~/run", "strong").path == tmp_path / "home" / "run"
    assert everything(tmp_path) == ["home", "home/run"]
