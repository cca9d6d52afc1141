"""Files that somebody else made: damaged or hostile, they end in one clear message, or in what they say.

Valid files are mutated, more than 10,000 times in all, in this process: bits, lengths, blocks, headers, numbers,
nesting, text. Whatever comes in, a reader returns or raises this project's own errors; it runs nothing, takes
little memory and comes to an end. Which mutations is a function of the seed: a failure names its case.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import pickle
import random
import resource
import struct
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.commands import predict as prediction
from trainer.config import keys as config
from trainer.data import cache, image_arrays, image_data, images, lidc, pretrained, tables, text
from trainer.errors import UserError
from trainer.record import checkpoints as checkpoint
from trainer.record.checkpoints import Checkpoints, DamagedError, Snapshot
from trainer.tasks.nodules import Nodules

ROOT = Path(__file__).resolve().parents[1]
# Characters of an error: see errors.readable.
LONGEST_MESSAGE = 4100
SLOWEST_CASE_S = 20.0
MOST_MEMORY_KIB = 1 << 20
CASES = {
    "checkpoint": 2500,
    "hostile checkpoint": 1500,
    "config": 3000,
    "cache": 1000,
    "npz of images": 700,
    "npz of masks": 1500,
    "image": 1500,
    "table": 60,
    "text": 500,
    "model folder": 500,
    "transformers folder": 100,
}
assert sum(CASES.values()) >= 10_000

# What parsers stumble over.
WORDS = [
    b"NaN", b"-Infinity", b"1e999", b"-1", b"0", b"null", b"true", b'""', b"[]", b"{}", b"\x00", b"\xff\xfe", b'"',
    b"\\", b"\\ud800", b"\xed\xa0\x80", "\u202e\u0000\u2028".encode(), b"\x1b[2J", b"9" * 400, b"18446744073709551615",
    b"[" * 3000, b'{"a":' * 3000, b"\r\n", b"\n\n", b",,,", b"../../../etc/passwd", b"%s%n", b"__reduce__",
    b"A" * 20_000,
]  # fmt: skip
VALUES: list[Any] = [
    None, True, -1, 0, 2**63, -(2**80), 1.5, 1e308, float("nan"), float("-inf"), "", "x" * 20_000, "\ud800",
    "\x1b[2J\x00", [], {}, [[[[]]]], {"a": {"a": {}}}, [None] * 1000, "../x", "auto",
]  # fmt: skip


class Canary:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Canary]:
    """A payload that must not run."""
    trap = Canary(tmp_path / "it ran")
    yield trap
    assert not trap.path.exists(), "a payload ran"
    pickle.loads(pickle.dumps(trap))
    assert trap.path.exists(), "the payload works"


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path / "cache"))


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The data with one to three things wrong."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, to = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
        kind = rng.randrange(9)
        if kind <= 1 and data:  # bits
            changed = bytearray(data)
            for _ in range(rng.randint(1, 8)):
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            data = bytes(changed)
        elif kind == 2:
            data = data[:at]
        elif kind == 3:
            data = data[:at] + rng.randbytes(rng.randint(1, 64)) + data[at:]
        elif kind == 4:
            data = data[:at] + rng.choice(WORDS) + data[at:]
        elif kind == 5:
            data = data[:at] + data[min(to, at + 200) :]
        elif kind == 6:  # blocks change places
            middle = rng.randrange(at, to + 1)
            data = data[:at] + data[middle:to] + data[at:middle] + data[to:]
        elif kind == 7:
            data = data[:at] + data[at : at + 100] * rng.randint(2, 5) + data[at:]
        else:  # a number
            places = [i for i, byte in enumerate(data[:20_000]) if 48 <= byte <= 57]
            if places:
                place = rng.choice(places)
                data = (
                    data[:place] + rng.choice((b"-1", b"0", b"77", b"99999999999999999999", b"1e5")) + data[place + 1 :]
                )
    return data


def altered(value: Any, rng: random.Random) -> Any:
    """A JSON value with one thing in it, at any depth, replaced, renamed or left out."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        if rng.random() < 0.15:
            rest = {k: v for k, v in value.items() if k != key}
            return rest if rng.random() < 0.5 else rest | {str(rng.choice(VALUES))[:300]: value[key]}
        return value | {key: altered(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        return [*value[:place], altered(value[place], rng), *value[place + 1 :]]
    return rng.choice(VALUES)


def safetensors_with(header: Any, body: bytes, length: int | None = None) -> bytes:
    """A safetensors file: eight bytes of the header's length, the header, the tensors."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + body


def mutated_tensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header lies, or one of any other kind of damage."""
    kind = rng.randrange(4)
    if kind == 0:
        return mutated(data, rng)
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header, body = data[8:end], data[end:]
    if kind == 1:
        length = rng.choice((0, 1, 2**63, 2**64 - 1, 10**8, 10**9, len(header) + 1, len(data)))
        return safetensors_with(header, body, length)
    return safetensors_with(altered(json.loads(header), rng) if kind == 2 else mutated(header, rng), body)


def run_cases(name: str, case: Callable[[random.Random], Any], count: int | None = None) -> None:
    """Calls `case(rng)` so many times: it may return, or raise the project's own errors."""
    returned = refused = 0
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(CASES[name] if count is None else count):
        began_s = time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, of large images
                case(random.Random(f"{name} {number}"))
            returned += 1
        except (UserError, DamagedError) as error:
            refused += 1
            check_message(str(error))
        except BaseException as error:  # panics of Rust libraries are no Exceptions
            raise AssertionError(f"{name}, case {number}: {type(error).__name__}: {str(error)[:500]}") from error
        assert time.monotonic() - began_s < SLOWEST_CASE_S, f"{name}, case {number} takes too long"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < MOST_MEMORY_KIB, name
    assert refused > 0, f"{name}: no mutation had any effect ({returned} returned)"


def check_message(message: str) -> None:
    assert 10 < len(message) <= LONGEST_MESSAGE
    message.encode("utf-8")
    assert all(c.isprintable() or c in "\n\t" for c in message)


# ---------------------------------------------------------------- checkpoints and caches


def a_checkpoint(folder: Path) -> Path:
    model = {"weight": torch.arange(12.0).view(3, 4), "bias": torch.zeros(4)}
    tensors = {"model": model, "optimizer": {"weight.exp_avg": torch.ones(3, 4)}}
    writer = Checkpoints(folder, keep=2)
    writer.save(Snapshot(7, tensors, {"config": {"train_batch_size": 8}, "history": [], "inexact": []}))
    writer.wait()
    (path,) = checkpoint.list_checkpoints(folder)
    return path


def content_of(snapshot: Snapshot) -> str:
    tensors = {p: {n: t.tolist() for n, t in ts.items()} for p, ts in snapshot.tensors.items()}
    return json.dumps([snapshot.step, tensors, snapshot.facts], sort_keys=True)


def test_a_checkpoint_is_read_as_it_was_written_or_not_at_all(tmp_path: Path) -> None:
    folder = a_checkpoint(tmp_path)
    original = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    expected = content_of(checkpoint.read(folder))

    def case(rng: random.Random) -> None:
        path = rng.choice(list(original))
        path.write_bytes(mutated(original[path], rng))
        try:
            assert content_of(checkpoint.read(folder)) == expected
        finally:
            path.write_bytes(original[path])

    run_cases("checkpoint", case)


def test_a_checkpoint_with_checksums_that_agree(tmp_path: Path, canary: Canary) -> None:
    """Whoever makes a hostile checkpoint writes its checksums as well."""
    folder = a_checkpoint(tmp_path)
    manifest = checkpoint.read_manifest(folder)
    model = (folder / "model.safetensors").read_bytes()
    payloads = [pickle.dumps(canary), pickled_weights(canary)]

    def case(rng: random.Random) -> None:
        changed = json.loads(json.dumps(manifest))
        data = model
        if rng.random() < 0.6:
            data = mutated_tensors(model, rng) if rng.random() < 0.9 else rng.choice(payloads)
            changed["files"]["model.safetensors"] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        else:
            changed = altered(changed, rng)
        (folder / "model.safetensors").write_bytes(data)
        (folder / "manifest.json").write_bytes(checkpoint._sealed(changed))
        snapshot = checkpoint.read(folder)
        assert isinstance(snapshot.step, int)

    run_cases("hostile checkpoint", case)


def pickled_weights(canary: Canary) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(2), "payload": canary}, buffer)
    return buffer.getvalue()


def test_a_damaged_cache_is_built_again(tmp_path: Path, canary: Canary) -> None:
    def build() -> cache.Cached:
        return {"x": torch.arange(6).view(2, 3), "y": torch.ones(2)}, {"names": ["a", "b"]}

    cache.cached("fuzz", {}, build)
    (path,) = (tmp_path / "cache").glob("*.safetensors")
    original = path.read_bytes()

    def case(rng: random.Random) -> None:
        path.write_bytes(mutated_tensors(original, rng) if rng.random() < 0.95 else pickle.dumps(canary))
        arrays, facts = cache.cached("fuzz", {}, build)
        assert facts == {"names": ["a", "b"]}
        assert {name: array.tolist() for name, array in arrays.items()} == {"x": [[0, 1, 2], [3, 4, 5]], "y": [1, 1]}
        if path.read_bytes() == original:  # byte for byte as before
            raise UserError("it was built again")

    run_cases("cache", case)


# ---------------------------------------------------------------- JSON


def test_configs(tmp_path: Path) -> None:
    files = [path.read_bytes() for path in sorted((ROOT / "ds_configs").glob("*.json"))]
    path = tmp_path / "config.json"

    def case(rng: random.Random) -> None:
        data = rng.choice(files)
        if rng.random() < 0.6:
            data = json.dumps(altered(json.loads(data), rng)).encode("utf-8", "surrogatepass")
        if rng.random() < 0.5:
            data = mutated(data, rng)
        path.write_bytes(data)
        json.dumps(config.load_config(path).as_dict())

    run_cases("config", case)


@pytest.mark.parametrize("depth", [50, 90, 900, 100_000])
def test_deep_configs(tmp_path: Path, depth: int) -> None:
    path = tmp_path / "config.json"
    values = '{"train_batch_size": 8, "train_micro_batch_size_per_gpu": 8, "trainer": {"task_options": {"x": '
    path.write_text(values + "[" * depth + "]" * depth + "}}}")
    with contextlib.suppress(UserError):
        json.dumps(config.load_config(path).as_dict())
        assert depth <= 100


# ---------------------------------------------------------------- npz


def with_members(members: dict[str, bytes], rng: random.Random) -> bytes:
    """A zip file, as numpy.savez writes: its own checksums are right, whatever the members hold."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA))) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def mutated_npz(arrays: dict[str, np.ndarray], rng: random.Random, canary: Canary) -> bytes:
    members = {f"{name}.npy": npy(array) for name, array in arrays.items()}
    kind, name = rng.randrange(6), rng.choice(list(members))
    if kind == 0:
        return mutated(with_members(members, rng), rng)
    if kind == 1:
        members[name] = npy(np.array([canary, None], dtype=object))
    elif kind == 2:  # a header that promises what is not there
        shape = rng.choice(((10**15,), (2**40, 2**40), (-1,), (3, 10**9), (0,), (1 << 62, 4096)))
        kinds = rng.choice(("|u1", "<f8", "|O", "|S1000000000", "|V9", "<M8[s]", "nonsense"))
        header = f"{{'descr': '{kinds}', 'fortran_order': False, 'shape': {shape}, }}"
        encoded = header.ljust(117).encode() + b"\n"
        members[name] = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(encoded)) + encoded + members[name][128:]
    elif kind == 3:
        members[name] = rng.choice((b"", pickle.dumps(canary), b"\x93NUMPY", bytes(4 << 20)))
    elif kind == 4:
        members[rng.choice(("../up.npy", "\u202e.npy", "shape.npy", "x.npy", "train_y.npy"))] = members.pop(name)
    else:
        members[name] = mutated(members[name], rng)
    return with_members(members, rng)


def test_npz_of_images(tmp_path: Path, canary: Canary) -> None:
    rows = np.random.default_rng(0)
    arrays = {
        "train_x": rows.integers(0, 256, (6, 4, 4), dtype=np.uint8), "train_y": np.array([0, 1, 2, 0, 1, 2]),
        "test_x": rows.integers(0, 256, (3, 4, 4), dtype=np.uint8), "test_y": np.array(["0", "1", "2"]).astype(int),
    }  # fmt: skip
    path = tmp_path / "images.npz"

    def case(rng: random.Random) -> None:
        path.write_bytes(mutated_npz(arrays, rng, canary))
        image_data.read_images(str(path), channels=1, size=(4, 4))
        image_arrays.read_npz_images(path)

    run_cases("npz of images", case)


def test_npz_of_masks(tmp_path: Path, canary: Canary) -> None:
    arrays = {"masks_packed": np.full((3, lidc.BYTES), 3, dtype=np.uint8), "patient": np.array(["a", "b", "c"])}
    path = tmp_path / "masks.npz"

    def case(rng: random.Random) -> None:
        path.write_bytes(mutated_npz(arrays, rng, canary))
        masks, patients = lidc.read_npz(path)
        assert patients is not None
        assert len(masks) == len(patients)

    run_cases("npz of masks", case)


# ---------------------------------------------------------------- images, tables, texts


def encoded_images() -> list[bytes]:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    picture, files = Image.fromarray(pixels), []
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in ("png", "gif", "bmp", "tiff", "webp", "ppm")]
    kinds += [("jpeg", {"exif": exif}), ("jpeg", {"progressive": True}), ("tiff", {"compression": "tiff_lzw"})]
    for kind, options in kinds:
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        files.append(buffer.getvalue())
    return files


def test_images() -> None:
    files = encoded_images()

    def case(rng: random.Random) -> None:
        channels, size = rng.choice((1, 3, None)), rng.choice(((8, 8), None))
        ((_, pixels, _),) = images.decode_all([("a.png", mutated(rng.choice(files), rng))], channels, size)
        assert pixels.dtype == np.uint8

    run_cases("image", case)


def test_tables(tmp_path: Path, canary: Canary) -> None:
    import datasets

    rows = [{"text": f"colour {i}, or no", "label": "ab"[i % 2], "n": i} for i in range(12)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    table = "text,label,n\n" + "".join(f'"{row["text"]}",{row["label"]},{row["n"]}\n' for row in rows)
    parquet = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(rows).to_parquet(parquet)
    files = {"csv": table.encode(), "jsonl": lines, "tsv": table.replace(",", "\t").encode()}
    files |= {"parquet": parquet.read_bytes()}

    def case(rng: random.Random) -> None:
        suffix = rng.choice(list(files))
        path = tmp_path / f"data.{suffix}"
        path.write_bytes(mutated(files[suffix], rng) if rng.random() < 0.95 else pickle.dumps(canary))
        found = tables.read(str(path))["train"]
        column = tables.find_column(found.column_names, None, ("text",), "text_column")
        tables.texts(found, column, "train")
        label = tables.find_column(found.column_names, None, ("label",), "label_column")
        names = tables.class_names({"train": tables.labels(found, label, "train")})
        tables.label_numbers(tables.labels(found, label, "train"), names)

    run_cases("table", case)


def test_texts(tmp_path: Path) -> None:
    original = ("To be, or not to be.\n" * 20 + "Größe 漢字 \U0001f600\n").encode()
    path = tmp_path / "data.txt"

    def case(rng: random.Random) -> None:
        path.write_bytes(mutated(original, rng))
        found = tables.text_files(str(path))
        assert found is not None
        built = text.wrap(text.build_for_generation(text.CHARACTERS, found["train"]), None)
        ((_, sizes),) = text.encode_with_bytes(built, found["train"], "")
        assert sizes.sum() == len(path.read_bytes())

    run_cases("text", case)


# ---------------------------------------------------------------- trained models


def test_model_folders(tmp_path: Path, canary: Canary, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save

    task = Nodules(model="autoencoder", width=1, latent=2)
    weights = save({n: t.contiguous() for n, t in task.model().state_dict().items()})
    origin = json.dumps({"task": "nodules", "task_options": {"model": "autoencoder", "width": 1, "latent": 2}}).encode()
    folder, masks = tmp_path / "model", tmp_path / "masks.npz"
    folder.mkdir()
    np.savez(masks, masks_packed=np.full((1, lidc.BYTES), 3, dtype=np.uint8))

    def case(rng: random.Random) -> None:
        said, tensors = origin, weights
        if rng.random() < 0.4:
            said = rng.choice((mutated(origin, rng), json.dumps(altered(json.loads(origin), rng)).encode()))
        elif rng.random() < 0.9:
            tensors = mutated_tensors(weights, rng)
        else:
            tensors = pickled_weights(canary)
        (folder / "trainer.json").write_bytes(said)
        (folder / "model.safetensors").write_bytes(tensors)
        prediction.predict(str(folder), str(masks), None, None, None, 4, "cpu")
        capsys.readouterr()

    run_cases("model folder", case)


def test_transformers_folders(tmp_path: Path, canary: Canary) -> None:
    auto = "AutoModelForSequenceClassification"
    spec = {
        "model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 12,
        "intermediate_size": 8,
    }  # fmt: skip
    folder = tmp_path / "model"
    pretrained.build(auto, spec, pretrained.configuration(spec, num_labels=2)).save_pretrained(folder)  # type: ignore[operator]
    weights, described = (folder / "model.safetensors").read_bytes(), (folder / "config.json").read_bytes()

    def case(rng: random.Random) -> None:
        (folder / "model.safetensors").write_bytes(weights)
        (folder / "config.json").write_bytes(described)
        if rng.random() < 0.3:
            damaged = {k: v for k, v in json.loads(described).items() if not isinstance(v, int) or k == "hidden_size"}
            (folder / "config.json").write_text(json.dumps(altered(damaged, rng)))
        elif rng.random() < 0.9:
            (folder / "model.safetensors").write_bytes(mutated_tensors(weights, rng))
        else:
            (folder / "model.safetensors").write_bytes(pickled_weights(canary))
        pretrained.load_saved(auto, folder)

    run_cases("transformers folder", case)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickled_weights_are_not_loaded(tmp_path: Path, name: str, canary: Canary) -> None:
    folder = tmp_path / "model"
    pretrained.configuration({"model_type": "bert", "hidden_size": 8, "num_attention_heads": 2}).save_pretrained(folder)
    (folder / name).write_bytes(pickled_weights(canary))
    with pytest.raises(UserError, match="are pickled"):
        pretrained.load_saved("AutoModelForSequenceClassification", folder)


def test_a_model_folder_does_not_switch_on_its_own_code(tmp_path: Path) -> None:
    """trainer.json may say trust_remote_code, from a run that did; its folder may be anybody's since."""
    folder, ran = tmp_path / "model", tmp_path / "it ran"
    options = {"data": "x.npz", "model": {"model_type": "resnet"}, "trust_remote_code": True}
    spec = {"model_type": "resnet", "hidden_sizes": [4], "depths": [1], "layer_type": "basic", "embedding_size": 4}
    auto = "AutoModelForImageClassification"
    made = pretrained.build(auto, spec, pretrained.configuration(spec, num_labels=2))
    made.save_pretrained(folder)  # type: ignore[operator]
    (folder / "trainer.json").write_text(json.dumps({"task": "image_classification", "task_options": options}))
    processor = {"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "own.Own"}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n")
    (tmp_path / "a.png").write_bytes(encoded_images()[0])
    with pytest.raises(UserError):
        prediction.predict(str(folder), str(tmp_path / "a.png"), None, None, None, 4, "cpu")
    assert not ran.exists()
