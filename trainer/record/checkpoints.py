"""Checkpoints: a run continues from one on any number of ranks, to the same bits.

A checkpoint does not depend on the world size. It holds parameters, buffers, optimizer state, the step, the logging
window and the best model. It is a folder of safetensors files and one JSON manifest, each with a checksum. Nothing is
unpickled. It is written under another name, synced and renamed. So the previous checkpoint is still there, at whatever
moment the run is killed.

Training continues while rank 0 writes: the state is copied, and a thread does the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import TrainerError, UserError, readable
from ..exact.checks.hashes import bytes_of
from ..files import sync, whole_folder

_FORMAT = 1
MANIFEST = "manifest.json"
# Folders with other names are copies that a user has made. They are never read, counted or removed.
_NAME = re.compile(r"step-(\d{9,})")
_UNFINISHED = re.compile(r"\.step-\d{9,}\.\d+")


class DamagedError(Exception):
    """The files of a checkpoint are not as they were written."""

    def __init__(self, message: str) -> None:
        super().__init__(readable(message))


@dataclass
class Snapshot:
    """The content of one checkpoint, on the CPU.

    Attributes:
        step: optimizer steps made so far.
        tensors: file name without suffix -> name -> tensor.
        facts: JSON values.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    facts: dict[str, Any]


def copy_to_host(tensors: Mapping[str, Tensor], into: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies tensors into memory that is reused for each checkpoint. Device to host; waits for the device."""
    for name in set(into) - set(tensors):
        del into[name]
    cuda = False
    for name, tensor in tensors.items():
        kept = into.get(name)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = into[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        kept.copy_(tensor.detach(), non_blocking=True)
        cuda = cuda or tensor.is_cuda
    if cuda:
        torch.cuda.synchronize()
    return into


class Checkpoints:
    """Rank 0's checkpoints of one run.

    Args:
        folder: <output_dir>/checkpoints.
        keep: the number of newest checkpoints to keep.
        whole: the step of the checkpoint from which the run continues. It was read, and is not damaged.
        fault: called with a name at each moment of writing, for tests that end the process there.
    """

    def __init__(
        self, folder: Path, keep: int, whole: int | None = None, fault: Callable[[str], None] = lambda moment: None
    ) -> None:
        self._folder, self._keep, self._fault = folder, keep, fault
        self._whole = set() if whole is None else {whole}
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None
        # Removes what a run that was killed during writing has left here.
        for rubbish in folder.glob(".step-*.*"):
            if _UNFINISHED.fullmatch(rubbish.name):
                shutil.rmtree(rubbish, ignore_errors=True)

    def save(self, snapshot: Snapshot) -> None:
        """Starts writing. Until `wait`, nobody may change the snapshot's memory."""
        self.wait()
        self._thread = threading.Thread(target=self._write_safely, args=(snapshot,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Waits until the last checkpoint is on disk.

        Raises:
            TrainerError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise TrainerError(
                f"The checkpoint folder {self._folder} cannot be written: {error.strerror or error}. Earlier "
                "checkpoints are unchanged.\nFree some space, or make the folder writable again. "
                f"{way_on(self._folder.parent)}"
            ) from error

    def _write_safely(self, snapshot: Snapshot) -> None:
        try:
            self._write(snapshot)
        except OSError as error:
            self._error = error
        except BaseException as error:  # safetensors raises its own error for a full disk
            self._error = OSError(None, str(error))

    def _write(self, snapshot: Snapshot) -> None:
        self._folder.mkdir(exist_ok=True)
        with whole_folder(self._folder / f"step-{snapshot.step:09d}") as temporary:
            files: dict[str, Any] = {}
            for part, tensors in snapshot.tensors.items():
                file = temporary / f"{part}.safetensors"
                self._fault(f"before {part}")
                digest, size = _write_tensors(file, tensors)
                files[file.name] = {"sha256": digest, "bytes": size}
            self._fault("before manifest")
            manifest = temporary / MANIFEST
            manifest.write_bytes(_sealed({"format": _FORMAT, "step": snapshot.step, "files": files, **snapshot.facts}))
            sync(manifest)
            sync(temporary)
            self._fault("before rename")
        sync(self._folder)
        self._whole.add(snapshot.step)
        # Checkpoints of later steps are damaged: the run did not continue from them. It will write them again.
        earlier = [path for path in list_checkpoints(self._folder) if step_of(path) < snapshot.step]
        # Those that are known to be whole come first, so they are kept. An earlier process wrote the others: they may
        # be damaged.
        earlier.sort(key=lambda path: step_of(path) not in self._whole)
        for old in earlier[self._keep - 1 :]:
            self._fault("before deleting")
            _remove(old)


def _remove(checkpoint: Path) -> None:
    """Removes a checkpoint. If a user has put files into it, these stay, in a folder with another name."""
    ours = {MANIFEST, *(path.name for path in checkpoint.glob("*.safetensors"))}
    with contextlib.suppress(DamagedError):
        ours |= set(read_manifest(checkpoint)["files"])
    if all(path.name in ours for path in checkpoint.iterdir()):
        shutil.rmtree(checkpoint, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        kept = checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}-your-files"))
        for name in ours:
            (kept / name).unlink(missing_ok=True)


# safetensors' names of the types that models and optimizers have.
_DTYPES = {
    torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip


def refuse_unstorable(tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError, the same on every rank, if a parameter or buffer is of a type that no file can hold."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise UserError(
                f"The model's {name} has the type {tensor.dtype}, which neither a checkpoint nor the saved model can "
                "hold.\nKeep it as another type: complex64 instead of complex128, for example, or as two real tensors.",
                agreed=True,
            )


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[str, int]:
    """Writes tensors on the CPU as a safetensors file, synced. Returns its sha256 and its size in bytes.

    It writes straight from the tensors' memory. The library's own writer first makes two copies and takes five times
    the processor time, and rank 0 needs that time for training.
    """
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the data to 8 bytes
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        data: Iterator[Any] = (bytes_of(t) for t in tensors.values() if t.numel())
        for part in itertools.chain((len(text).to_bytes(8, "little"), text), data):
            left = memoryview(part)
            digest.update(left)
            while left:  # an unbuffered write may write only a part
                left = left[file.write(left) :]
        os.fsync(file.fileno())
    return digest.hexdigest(), 8 + len(text) + offset


def _sealed(content: Mapping[str, Any]) -> bytes:
    """JSON of a manifest with a checksum over itself."""
    text = json.dumps(content, sort_keys=True)
    return json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "content": text}).encode()


def step_of(checkpoint: Path) -> int:
    """The number of steps in a checkpoint's name; -1 if it is not the name of one."""
    found = _NAME.fullmatch(checkpoint.name)
    return int(found[1]) if found else -1


def list_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints in a folder, the newest first, damaged ones included."""
    try:
        if not folder.is_dir():
            return []
        return sorted((p for p in folder.iterdir() if step_of(p) >= 0 and p.is_dir()), key=step_of, reverse=True)
    except PermissionError as error:
        raise UserError(f"The folder {folder} cannot be read: {error.strerror}. Change its permissions.") from error


def way_on(run: Path, *, began: bool = False, resumed: bool = False) -> str:
    """What to do after a run has ended before its time, as a sentence.

    Args:
        run: its output folder, which may be out of sight from here.
        began: whether it has begun to write a checkpoint.
        resumed: whether it went on from one.
    """
    found, place = list_checkpoints(run / "checkpoints"), "--output_dir " + shlex.quote(str(run))
    if str(run).startswith("-"):
        place = shlex.quote(f"--output_dir={run}")
    if found or (began and not run.is_dir()):
        step = f", that of step {step_of(found[0]):,}" if found else ""
        return (
            f"To go on from the last checkpoint{step}, start the run again with --resume auto {place}, on "
            "any number of ranks."
        )
    if resumed:
        return "Start the same command again: it goes on from the same checkpoint."
    return f"There is no checkpoint yet, so the run has to begin again: start it with --resume auto {place}."


def read_manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest. Raises DamagedError."""
    path = folder / MANIFEST
    try:
        sealed = json.loads(path.read_bytes())
        text = sealed["content"]
        if hashlib.sha256(text.encode()).hexdigest() != sealed["sha256"]:
            raise DamagedError(f"{path} does not match its checksum")
        content = json.loads(text)
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{path} is not a checkpoint's manifest") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT or not isinstance(content.get("files"), dict):
        raise DamagedError(f"{path} has another format than this version's ({_FORMAT})")
    step = content.get("step")
    if not isinstance(step, int) or step < 0:
        raise DamagedError(f"{path} has no number of steps")
    return content


def read(folder: Path) -> Snapshot:
    """A checkpoint, every file checked against its checksum. Raises DamagedError, which names the file."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    manifest = read_manifest(folder)
    if step_of(folder) not in (-1, manifest["step"]):
        raise DamagedError(f"{folder} is a copy of the checkpoint of step {manifest['step']:,}, under another name")
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, expected in manifest["files"].items():
        path = folder / name
        if Path(name).name != name or not isinstance(expected, dict):
            raise DamagedError(f"{folder / MANIFEST} names a file outside its folder: {name}")
        try:
            size = path.stat().st_size
            if size != expected.get("bytes"):
                raise DamagedError(
                    f"{path} has {size:,} bytes, but {expected.get('bytes')} were written: it is truncated"
                )
            data = path.read_bytes()
        except OSError as error:
            raise DamagedError(f"{path} cannot be read: {error.strerror or error}") from error
        except ValueError as error:  # a name that no file can have
            raise DamagedError(f"{folder / MANIFEST} names no file: {name}") from error
        if hashlib.sha256(data).hexdigest() != expected.get("sha256"):
            raise DamagedError(f"{path} does not match its checksum: some of its bits have changed")
        try:
            tensors[path.stem] = load(data)
        except (SafetensorError, ValueError, KeyError) as error:
            raise DamagedError(f"{path} is not a safetensors file: {error}") from error
    return Snapshot(manifest["step"], tensors, manifest)


def read_newest(folder: Path, say: Callable[[str], None]) -> tuple[Path, Snapshot] | None:
    """The newest checkpoint that is not damaged; None if there is no checkpoint at all.

    Args:
        folder: <output_dir>/checkpoints.
        say: takes a sentence on each damaged checkpoint that is skipped.

    Raises:
        UserError: there are checkpoints, but all are damaged.
    """
    damaged = []
    for path in list_checkpoints(folder):
        try:
            return path, read(path)
        except DamagedError as error:
            damaged.append(str(error))
            say(f"checkpoint {path.name} is damaged ({error}); the one before it is used")
    if damaged:
        raise UserError(
            f"All checkpoints in {folder} are damaged: {'; '.join(damaged)}.\n"
            "Start a new run with another --output_dir, or give an undamaged checkpoint with --resume DIR."
        )
    return None
