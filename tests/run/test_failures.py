"""What a person is told when the machine fails a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trainer.errors import UserError
from trainer.exact.plan import resolve
from trainer.record.folder import OutputFolder
from trainer.run.failures import explained, of_a_collective

PLAN = resolve(2, 64, 8, None)


def raised(function: object) -> BaseException:
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        function()  # type: ignore[operator]
    return caught.value


def test_an_error_inside_torch_distributed_is_one_of_a_collective() -> None:
    """By where it was raised: not by its words, which another error may have."""
    import torch.distributed as dist

    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        inside = raised(lambda: dist.all_gather([torch.zeros(3)], torch.zeros(2)))
    finally:
        dist.destroy_process_group()
    assert isinstance(inside, (RuntimeError, ValueError))
    assert of_a_collective(inside) == isinstance(inside, RuntimeError)

    def user_code() -> None:
        raise RuntimeError("the connection to my data store timed out: gloo, nccl, socket, broken pipe")

    assert not of_a_collective(raised(user_code))


def test_out_of_memory_names_the_next_smaller_micro_batch() -> None:
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        MemoryError(),
    ):
        if str(error):
            said = str(explained(error, PLAN, None))
            assert "micro-batch of 8 samples" in said and "Try half of it, 4" in said


def test_an_operation_that_torch_refuses_has_a_substitute_and_its_place() -> None:
    """Outside of a rehearsal, as in a metric on the device: by the line that called it."""

    def metrics() -> None:
        raise RuntimeError("median CUDA with indices output does not have a deterministic implementation, but you set")

    said = explained(raised(metrics), PLAN, None)
    assert isinstance(said, UserError)
    assert f"Here {__file__}, line " in str(said)
    assert ", in metrics(), uses median CUDA with indices output. This computes the same, up to" in str(said)
    assert "x.sort(dim)" in str(said)


def test_an_error_of_the_file_system_is_the_folders(tmp_path: Path) -> None:
    folder = OutputFolder.claim(str(tmp_path / "run"), "test")
    missing = raised(lambda: (tmp_path / "nowhere" / "x").read_text())
    assert f"{tmp_path / 'run'} cannot be written: No such file" in str(explained(missing, PLAN, folder))
    assert "There is no checkpoint yet, so the run has to begin again" in str(explained(missing, PLAN, folder))
    assert explained(missing, PLAN, None) is None
    assert explained(ValueError("no"), PLAN, folder) is None


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda: F.cross_entropy(torch.randn(4, 2), torch.zeros(4)), "got Float.\nUsually inputs have to be float32"),
        (lambda: F.cross_entropy(torch.randn(4, 2), torch.zeros(4, dtype=torch.int32)), 'y.astype("int64")'),
        (lambda: nn.Linear(3, 2)(torch.zeros(4, 3, dtype=torch.float64)), 'x.astype("float32")'),
        (lambda: nn.Conv1d(3, 2, 1)(torch.zeros(4, 3, 5, dtype=torch.float64)), 'x.astype("float32")'),
        (lambda: nn.Embedding(3, 2)(torch.zeros(4, 3)), "tokens int64"),
        (lambda: F.cross_entropy(torch.randn(4, 2), torch.full((4,), 7)), "Count classes from 0"),
    ],
    ids=["float classes", "int32 classes", "float64", "float64 in a convolution", "float tokens", "a class too large"],
)
def test_types_that_numpy_gives_by_itself_are_explained_with_the_line_of_the_task(function: Any, words: str) -> None:
    said = explained(raised(function), PLAN, None)
    assert isinstance(said, UserError)
    assert "test_failures.py, line" in str(said) and words in str(said)


def test_other_errors_of_a_task_are_its_own() -> None:
    def wrong_shape() -> None:
        torch.randn(4, 3) @ torch.randn(4, 3)

    assert explained(raised(wrong_shape), PLAN, None) is None
    assert explained(raised(lambda: [][1]), PLAN, None) is None
