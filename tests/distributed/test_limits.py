"""What machines run out of: memory, disks, ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.jobs import USER_TASKS, small_config, train, train_without_summary
from trainer.errors import LostRankError, TrainerError
from trainer.ranks.workers import run_ranks


def test_out_of_memory_names_the_micro_batch(tmp_path: Path) -> None:
    """One message, on the rank that ran out; the others leave, and wait for nobody."""
    config = small_config(tmp_path / "run", task=f"{USER_TASKS}/bad_tasks.py:NoMemory")
    with pytest.raises(TrainerError) as caught:
        run_ranks(train, 2, config, timeout_s=60.0)
    message = str(caught.value)
    for words in ("micro-batch of 8 samples", "memory of this device", "half of it, 4", "changes the bits"):
        assert words in message, message


def test_a_run_whose_last_file_cannot_be_written_has_finished_nowhere(tmp_path: Path) -> None:
    """As on a disk that is full by then: all ranks end with the error, which rank 0 says."""
    folder = tmp_path / "run"
    errors = run_ranks(train_without_summary, 2, small_config(folder, max_steps=2))
    for error in errors:
        assert "cannot be written: Is a directory" in error and "--resume auto" in error, errors
    assert (folder / "model" / "model.safetensors").exists()
    assert not (folder / "summary.json").exists()


def test_a_full_disk_under_the_weights_is_told_as_one(tmp_path: Path) -> None:
    """The writer of safetensors has an exception of its own for it, the same as for a file that cannot be read."""
    import resource

    import torch
    from safetensors import SafetensorError

    from trainer.record.folder import OutputFolder, write_tensors
    from trainer.run.failures import of_the_folder

    folder = OutputFolder.claim(str(tmp_path / "run"), "test")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # the nearest thing to a full disk
    try:
        with pytest.raises(SafetensorError) as raised:
            write_tensors(tmp_path / "weights", {"weight": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    full = raised.value
    message = str(of_the_folder(full, folder))
    assert f"{tmp_path / 'run'} cannot be written" in message and "File too large" in message
    assert of_the_folder(SafetensorError("Error while deserializing header: invalid"), folder) is None
    assert of_the_folder(full, None) is None  # another rank than the one that writes


def test_a_rank_that_is_lost_before_the_first_step(tmp_path: Path) -> None:
    """The others leave at once, with a message that names it, and leave nothing behind."""
    config = small_config(tmp_path / "run", task=f"{USER_TASKS}/bad_tasks.py:DiesAtStart", hang_timeout_s=15.0)
    with pytest.raises(LostRankError, match=r"(?s)Rank 1 on .* before the first step.*Start the run again\.$"):
        run_ranks(train, 3, config, timeout_s=60.0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("checkpoint_every", "way_on"),
    [
        (1, r"go on from the last checkpoint, that of step [12], start the run again with --resume auto --output_dir"),
        (0, "There is no checkpoint yet, so the run has to begin again: start it with --resume auto --output_dir"),
    ],
)
def test_a_rank_that_is_lost_later(tmp_path: Path, checkpoint_every: int, way_on: str) -> None:
    """What is said of checkpoints is true."""
    config = small_config(
        tmp_path / "run",
        task=f"{USER_TASKS}/bad_tasks.py:DiesInTheThirdStep",
        hang_timeout_s=15.0,
        checkpoint={"every_steps": checkpoint_every},
    )
    with pytest.raises(LostRankError, match=rf"(?s)Rank 1 on .* in step 3.*{way_on} {tmp_path}/run"):
        run_ranks(train, 2, config, timeout_s=60.0)
