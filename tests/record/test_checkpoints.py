"""The checkpoint's own writer of safetensors, read back by the library."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file

from trainer.record.checkpoints import Checkpoints, Snapshot, read


def test_what_is_written_is_what_the_library_reads(tmp_path: Path) -> None:
    """Tensors of every type that models and optimizers have, strided, empty and scalar ones too."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"a {t}": torch.randn(3, 5, generator=generator).to(t) for t in (torch.float32, torch.float64)}
    tensors |= {f"b {t}": torch.randn(7, generator=generator).to(t) for t in (torch.bfloat16, torch.float16)}
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    tensors |= {f"c {t}": torch.randint(0, 2, (9,), generator=generator).to(t) for t in integers}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "strided": torch.arange(24.0).view(4, 6).t()}
    writer = Checkpoints(tmp_path / "checkpoints", keep=1)
    writer.save(Snapshot(7, {"model": tensors, "nothing": {}}, {"note": "one"}))
    writer.wait()
    (folder,) = (tmp_path / "checkpoints").glob("step-*")
    loaded = load_file(folder / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype, name
        assert torch.equal(loaded[name], tensor), name
    assert load_file(folder / "nothing.safetensors") == {}
    snapshot = read(folder)
    assert (snapshot.step, snapshot.facts["note"]) == (7, "one")
    assert (
        hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        in (folder / "manifest.json").read_text()
    )
