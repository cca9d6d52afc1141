"""Tries the promise on this machine: several numbers of ranks, both precisions, a stop and a resume, a killed rank."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from ...config.keys import Config, parse
from ...engine.gpus import sharing
from ...errors import LostRankError, RanksDifferError, Stopped, TrainerError
from ...ranks.place import Ranks
from ...ranks.workers import run_ranks
from ..verify import first_difference, run_to_a_stop
from .machine import Machine

_STEPS = 12
_STOP_AFTER = 5


def config_for(machine: Machine, folder: Path, world_size: int, *, bf16: bool = False, **trainer: Any) -> Config:
    """The config of the digits, as in ds_configs/strong.json, for this many ranks of this machine.

    Args:
        machine: where it runs.
        folder: takes the run's output.
        world_size: how many ranks. They share GPUs if there are fewer.
        bf16: whether in bfloat16 autocast.
        trainer: more keys of the trainer block.
    """
    config = parse(
        {
            "train_batch_size": 256,
            "train_micro_batch_size_per_gpu": 8,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.002, "torch_adam": True, "fused": True}},
            "gradient_clipping": 1.0,
            "torch_autocast": {"enabled": bf16, "dtype": "bfloat16"},
            "tensorboard": {"enabled": False},
            "trainer": {
                "task": "digits",
                "task_options": {"model": "cnn"},
                "device": machine.device,
                "max_steps": _STEPS,
                "epochs": 100_000,
                "learning_rate": {"schedule": "cosine", "warmup_epochs": 2},
                "evaluate_every_epochs": 0,
                "guard_every_steps": 1,
                "output_dir": str(folder / "run"),
            }
            | trainer,
        },
        "doctor",
    )
    return sharing(config, world_size, machine.gpus)


def world_sizes(machine: Machine) -> list[int]:
    """The numbers of ranks to try: on the CPU 1, 2 and 3; on GPUs 1, 2, 4, ... and all, and one GPU shared."""
    if not machine.gpus:
        return [1, 2, 3]
    own = {2**i for i in range(machine.gpus.bit_length()) if 2**i <= machine.gpus}
    return sorted(own | {machine.gpus, max(3, machine.gpus + 1)})


def named(machine: Machine, world_size: int) -> str:
    """The number of ranks for a message, and whether they share a GPU: "3 (sharing)"."""
    return f"{world_size} (sharing)" if machine.shared_by(world_size) else str(world_size)


def one_hash(machine: Machine, folder: Path, *, bf16: bool) -> tuple[str, dict[str, Any]]:
    """Makes the same run at several numbers of ranks, and compares every step.

    Returns:
        A sentence, and the figures.

    Raises:
        RanksDifferError: two runs differ; the message says where first.
    """
    sizes = world_sizes(machine)
    figures: dict[str, Any] = {"world_sizes": sizes, "steps": _STEPS}
    for W in sizes:
        own = folder / str(W)
        own.mkdir(parents=True)
        summary = run_ranks(run_to_a_stop, W, config_for(machine, own, W, bf16=bf16), str(own), cuda=machine.gpus > 0)[
            0
        ]
        difference = first_difference(folder / str(sizes[0]) / "trace.jsonl", own / "trace.jsonl")
        if difference is not None:
            raise RanksDifferError(
                f"{named(machine, W)} ranks differ from {sizes[0]}, first at step {difference[0]}, in {difference[1]}"
            )
        if summary.get("inexact"):
            raise RanksDifferError(f"{named(machine, W)} ranks are labelled tolerance: {'; '.join(summary['inexact'])}")
        figures["parameters_sha256"] = summary["parameters_sha256"]
    said = ", ".join(named(machine, W) for W in sizes)
    return f"one hash at {said} ranks after each of {_STEPS} steps ({figures['parameters_sha256'][:16]})", figures


def _until_stopped(ranks: Ranks, config: Config) -> str:
    """Makes a run, and sends its last rank a SIGTERM. Returns the message of the stop; an empty text without a stop."""
    from ...run.run import run

    def stop(step: int, engine: Any, losses: Any) -> None:
        if step == _STOP_AFTER and ranks.rank == ranks.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)  # else a fast machine could finish before the watching thread has seen the signal

    try:
        run(config, ranks, config_name="doctor", started_at_s=time.time(), trace=stop)
    except Stopped as stopped:
        return str(stopped)
    return ""


def _resumed(ranks: Ranks, config: Config) -> dict[str, Any]:
    from ...run.claim import Resume
    from ...run.run import run

    return run(config, ranks, config_name="doctor", started_at_s=time.time(), resume=Resume("auto", False))


def stop_and_resume(machine: Machine, folder: Path, expected: str) -> tuple[str, dict[str, Any]]:
    """Stops a run of two ranks by SIGTERM, and continues it with one.

    Args:
        machine, folder: where.
        expected: the hash of the same run without a stop.

    Raises:
        TrainerError: it did not stop, or it ended in other bits.
    """
    folder.mkdir()
    said = run_ranks(_until_stopped, 2, config_for(machine, folder, 2), cuda=machine.gpus > 0)[0]
    if not said:
        raise TrainerError("a run of two ranks did not stop when one got SIGTERM")
    summary = run_ranks(_resumed, 1, config_for(machine, folder, 1), cuda=machine.gpus > 0)[0]
    if summary["parameters_sha256"] != expected:
        raise RanksDifferError(f"after a stop the run ends in {summary['parameters_sha256'][:16]}, not {expected[:16]}")
    return "2 ranks stopped by SIGTERM, 1 went on to the same hash", {"parameters_sha256": expected}


def _killed(ranks: Ranks, config: Config, folder: str) -> None:
    from ...run.run import run

    def kill(step: int, engine: Any, losses: Any) -> None:
        if step == _STOP_AFTER and ranks.rank == ranks.world_size - 1:
            (Path(folder) / "killed_at").write_text(str(time.monotonic()))
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        run(config, ranks, config_name="doctor", started_at_s=time.time(), trace=kill)
    finally:
        (Path(folder) / f"left_at_{ranks.rank}").write_text(str(time.monotonic()))


def killed_rank(machine: Machine, folder: Path) -> tuple[str, dict[str, Any]]:
    """Kills the last of several ranks during training: the others must name it and leave.

    Raises:
        TrainerError: they named no rank, or another one.
    """
    folder.mkdir()
    W = machine.gpus if machine.gpus > 1 else 2
    try:
        run_ranks(_killed, W, config_for(machine, folder, W), str(folder), cuda=machine.gpus > 0)
    except LostRankError as error:
        said = str(error)
    else:
        raise TrainerError("the other ranks did not notice that one was killed")
    took_s = float((folder / "left_at_0").read_text()) - float((folder / "killed_at").read_text())
    if not said.startswith(f"Rank {W - 1} "):
        raise TrainerError(f"rank {W - 1} was killed, but the message is: {said}")
    return f"rank {W - 1} of {W} was named, and the others left in {took_s:.1f} s", {"seconds": round(took_s, 2)}
