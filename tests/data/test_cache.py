"""The cache: built once, by one process while others wait, never stale, and never half written."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import torch as safetensors_torch

from trainer.data import cache
from trainer.data.cache import cached, hash_files
from trainer.data.sources import fingerprint
from trainer.errors import UserError

ARRAYS = {"x": torch.arange(6).view(2, 3), "y": torch.ones(2, dtype=torch.bfloat16)}
FACTS = {"classes": ["a", "ü"], "longest": [9, 2]}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Build:
    """Builds the same each time, and counts how often."""

    def __init__(self, arrays: dict[str, torch.Tensor] = ARRAYS, seconds: float = 0.0) -> None:
        self.arrays, self.seconds, self.calls = arrays, seconds, 0

    def __call__(self) -> cache.Cached:
        self.calls += 1
        time.sleep(self.seconds)
        return self.arrays, FACTS


def test_the_second_call_reads_what_the_first_has_built(folder: Path) -> None:
    build = Build()
    for _ in range(2):
        arrays, facts = cached("words", {"max_length": 5, "data": "abc"}, build)
        assert facts == FACTS
        assert set(arrays) == {"x", "y"}
        assert all(torch.equal(arrays[name], ARRAYS[name]) for name in ARRAYS)
        assert {name: array.dtype for name, array in arrays.items()} == {"x": torch.int64, "y": torch.bfloat16}
    cached("words", {"data": "abc", "max_length": 5}, build)  # the order of the key does not matter
    assert build.calls == 1
    (file,) = folder.glob("*.safetensors")
    assert file.name.startswith("words-")


@pytest.mark.parametrize(
    "other", [("words", {"data": "b"}), ("words", {"data": "a", "n": 1}), ("images", {"data": "a"})]
)
def test_another_key_or_kind_is_another_file(other: tuple[str, dict[str, Any]], folder: Path) -> None:
    first, second = Build(), Build({"x": torch.zeros(1)})
    cached("words", {"data": "a"}, first)
    assert torch.equal(cached(*other, second)[0]["x"], torch.zeros(1))
    assert second.calls == 1
    assert len(list(folder.glob("*.safetensors"))) == 2
    assert torch.equal(cached("words", {"data": "a"}, first)[0]["x"], ARRAYS["x"])


def test_what_was_cached_in_an_older_format_is_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    build = Build()
    cached("words", {}, build)
    monkeypatch.setattr(cache, "_FORMAT", 2)
    cached("words", {}, build)
    assert build.calls == 2


def test_a_tensor_that_is_a_view_of_another_is_read_back_as_it_looked() -> None:
    view = torch.arange(12).view(3, 4).T[::2]
    cached("views", {}, Build({"view": view}))
    assert torch.equal(cached("views", {}, Build())[0]["view"], view)


@pytest.mark.parametrize("error", [UserError("one image cannot be read"), KeyboardInterrupt()])
def test_a_build_that_fails_leaves_nothing_and_may_be_tried_again(error: BaseException, folder: Path) -> None:
    def fail() -> cache.Cached:
        raise error

    with pytest.raises(type(error)):
        cached("words", {}, fail)
    assert not list(folder.glob("*.safetensors"))
    assert cached("words", {}, Build())[1] == FACTS


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_a_file_that_is_damaged_is_built_again(content: bytes | None, folder: Path) -> None:
    build = Build()
    cached("words", {}, build)
    (file,) = folder.glob("*.safetensors")
    whole = file.read_bytes()
    if content is None:  # a single bit, in the last tensor: the format itself would not notice
        content = whole[:-1] + bytes([whole[-1] ^ 1])
    file.write_bytes(content)
    arrays, _ = cached("words", {}, build)
    assert torch.equal(arrays["x"], ARRAYS["x"])
    cached("words", {}, build)
    assert build.calls == 2


def test_one_builds_while_the_others_wait() -> None:
    """As ranks do; a lock of the file system is the same among threads and among processes."""
    build, results = Build(seconds=0.05), []
    threads = [threading.Thread(target=lambda: results.append(cached("words", {}, build))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert build.calls == 1
    assert len(results) == 4
    assert all(torch.equal(arrays["x"], ARRAYS["x"]) for arrays, _ in results)


def test_a_full_disk_is_one_message_and_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(contents: Any, path: str, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_torch, "save_file", full)
    with pytest.raises(UserError, match=r"(?s)words-\w+\.safetensors cannot be written: No space left.*TRAINER_CACHE"):
        cached("words", {}, Build())
    assert {file.suffix for file in folder.iterdir()} == {".lock"}


def test_where_the_folder_cannot_be_written_the_folder_of_temporary_files_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    build = Build()
    for _ in range(2):
        assert cached("words", {}, build)[1] == FACTS
    assert build.calls == 1
    (own,) = (tmp_path / "tmp").iterdir()
    assert own.stat().st_mode & 0o777 == 0o700, "others cannot put files there"
    # A folder of that name may be someone else's, who could put a file of their own there.
    monkeypatch.setattr(os, "getuid", lambda: own.stat().st_uid + 1)
    with pytest.raises(UserError, match=r"belongs to someone else\. Set TRAINER_CACHE to a folder of your own"):
        cached("words", {}, build)


def test_the_folder_is_the_users_choice_then_that_of_their_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINER_CACHE", "/mine")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache.folder() == Path("/mine")
    monkeypatch.setenv("TRAINER_CACHE", "")
    assert cache.folder() == Path("/caches/strong-scaling-trainer")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache.folder() == Path("/home/me/.cache/strong-scaling-trainer")


def test_a_hash_follows_the_contents_of_files_in_their_order(tmp_path: Path) -> None:
    for name, content in {"a": "x", "b": "yz", "c": "x", "d": "xy", "e": "z"}.items():
        (tmp_path / name).write_text(content)
    a, b, c, d, e = (tmp_path / name for name in "abcde")
    assert hash_files(a) == hash_files(c)
    assert hash_files(a, b) != hash_files(b, a)
    assert hash_files(a, b) != hash_files(d, e), "where one file ends is part of it"


@pytest.mark.parametrize("change", ["appended", "replaced", "removed", "a file more"])
def test_data_that_changes_between_its_hash_and_its_reading_is_not_cached(
    tmp_path: Path, folder: Path, change: str
) -> None:
    """Else its content would be kept under the hash of the former content, for good."""
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "a.csv"
    file.write_text("a,b\n")
    source = str(file if change != "a file more" else tmp_path / "data")

    def build() -> cache.Cached:
        if change == "appended":
            file.write_text("a,b\n1,2\n")
        elif change == "replaced":
            file.write_text("b,a\n")
        elif change == "removed":
            file.unlink()
        else:
            (tmp_path / "data" / "b.csv").write_text("a,b\n")
        return ARRAYS, FACTS

    with pytest.raises(UserError, match="The data changed while it was read"):
        cached("words", {"data": fingerprint({"train": source})}, build)
    assert not list(folder.glob("*.safetensors"))
    file.write_text("a,b\n")
    cached("words", {"data": fingerprint({"train": source})}, Build())
    assert len(list(folder.glob("*.safetensors"))) == 1


def test_what_a_killed_start_has_left_is_removed_after_a_day(folder: Path) -> None:
    """Only files with our names: other files, whole ones, and what is being written now stay."""
    folder.mkdir()
    name = f".words-{'a1' * 16}.safetensors.123"
    old = [name, name.replace("words", "grey_images"), name[1:], f"{name}.txt", ".words.123", name[1:-4]]
    for file in [*old, name.replace("123", "124")]:
        (folder / file).write_bytes(b"half")
    for file in old:
        os.utime(folder / file, (time.time() - 90_000,) * 2)
    cached("words", {"data": "a"}, Build())
    assert not any((folder / file).exists() for file in old[:2])
    assert all((folder / file).exists() for file in [*old[2:], name.replace("123", "124")])
