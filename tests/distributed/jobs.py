"""What the tests run in ranks: functions importable by name, as `workers.run_ranks` needs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tests.standing import fresh
from trainer.config.keys import Config, parse
from trainer.ranks.place import Ranks

ROOT = Path(__file__).resolve().parents[2]
USER_TASKS = ROOT / "tests" / "user_tasks"


def small_config(output_dir: Path | str, **trainer: Any) -> Config:
    """A short run with everything awkward in it: M = 13, a ragged last batch of 7 micro-batches, clipping.

    500 samples of the user's task: 104 a step, so the fifth step has 84. Keyword arguments go into
    "trainer"; those with a dot-free name of a top-level key go there.
    """
    values: dict[str, Any] = {
        "train_batch_size": 104,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True, "fused": True}},
        "tensorboard": {"enabled": False},
    }
    top_level = set(Config.__dataclass_fields__) - {"trainer"}
    values |= {name: trainer.pop(name) for name in list(trainer) if name in top_level}
    values["trainer"] = {
        "task": f"{USER_TASKS}/my_task.py:MyTask",
        "epochs": 3,
        "output_dir": str(output_dir),
    } | trainer
    return parse({name: value for name, value in values.items() if value is not None})


def train(ranks: Ranks, config: Config) -> dict[str, Any]:
    """A whole run; its summary, with the digests of every step as "trace"."""
    from trainer.exact.checks.hashes import digest
    from trainer.run.run import run

    trace: list[dict[str, str]] = []

    def watch(step: int, engine: Any, losses: Any) -> None:
        trace.append({"loss": digest(losses)} | {name: digest(tensor) for name, tensor in engine.state().items()})

    summary = run(config, ranks, config_name="test", started_at_s=time.time(), trace=watch)
    return summary | {"trace": trace}


def linear_is_torchs(ranks: Ranks) -> bool:
    import torch

    return torch.nn.functional.linear is torch._C._nn.linear


def train_interrupted(ranks: Ranks, config: Config, stops: dict[int, int], resume: str = "auto") -> dict[str, Any]:
    """A run that goes on from its newest checkpoint; rank `stops[step]` gets a SIGTERM after `step` steps.

    Returns {"stopped": message} where it stopped, else as `train`.
    """
    import os
    import signal

    from trainer.errors import Stopped
    from trainer.exact.checks.hashes import digest
    from trainer.run.claim import Resume
    from trainer.run.run import run

    trace: dict[int, dict[str, str]] = {}

    def watch(step: int, engine: Any, losses: Any) -> None:
        trace[step] = {"loss": digest(losses)} | {name: digest(t) for name, t in engine.state().items()}
        if stops.get(step) == ranks.rank:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)  # until the watching thread has seen it, as the test wants to know the step

    try:
        summary = run(
            config, ranks, config_name="test", started_at_s=time.time(), trace=watch, resume=Resume(resume, False)
        )
    except Stopped as stopped:
        return {"stopped": str(stopped), "trace": trace}
    return summary | {"trace": trace}


@fresh
def train_without_summary(ranks: Ranks, config: Config) -> str:
    """A run that rank 0 cannot write to its end, as a folder stands where its summary goes; the rank's error."""
    import os

    from trainer.errors import TrainerError
    from trainer.run.run import run

    def block(step: int, engine: Any, losses: Any) -> None:
        if ranks.first and step == 1:
            (Path(str(config.trainer.output_dir)) / f".summary.json.{os.getpid()}").mkdir()

    try:
        run(config, ranks, config_name="test", started_at_s=time.time(), trace=block)
    except TrainerError as error:
        return str(error)
    return "finished"


@fresh
def train_with_shards(ranks: Ranks, config: Config) -> dict[str, Any]:
    """The same, with the exchange that large gradients take."""
    from trainer.exact import exchange

    exchange.DIRECT_LIMIT_BYTES = 0
    return train(ranks, config)


@fresh
def train_as_on_a_gpu(ranks: Ranks, config: Config) -> dict[str, Any]:
    """The same, with the host looking at losses only at the end of a window, as on a GPU."""
    import trainer.run.course
    from trainer.exact.step import ExactStep

    class Deferred(ExactStep):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self.deferred = self._optimizer.skip_update_where(self.broken)
            assert self.deferred

    trainer.run.course.ExactStep = Deferred  # type: ignore[misc]
    return train(ranks, config)


@fresh
def sent_early(ranks: Ranks, config: Config) -> tuple[dict[str, int], str]:
    """Buckets that a rank has sent before the exchange: singly, in packs, and all; and the error of a pack given up."""
    from trainer.errors import TrainerError
    from trainer.exact.packs.packs import Packs
    from trainer.exact.packs.verdicts import RefusedError

    pieces, step = built(ranks, config)
    found, early = {"buckets": len(step._early.buckets)}, step._early
    finish, sent = type(early).__call__, []

    def noted(self: Any, leaves: int) -> Any:
        sent.append(self.sent)
        return finish(self, leaves)

    type(early).__call__ = noted
    batches = [pieces.batches.at(number) for number in (0, 1, 2, 3, 5)]
    step(batches[0])
    size = config.trainer.pack
    assert isinstance(size, int)
    parameters, model = pieces.engine.parameters, pieces.engine.model
    step.own_block.packs = Packs(step.micro_batches, parameters, model, step.statistics, pieces.device, size, 1000)
    for batch in batches[:4]:  # three steps of trials
        step(batch)
    found |= {"singly": sent[0], "in packs": sent[-1]}
    compute = Packs.compute

    def given_up(self: Packs, *arguments: Any, **named: Any) -> Any:
        compute(self, *arguments, **named)
        raise RefusedError("on purpose")

    Packs.compute = given_up  # type: ignore[method-assign]
    try:
        step(batches[4])
    except (TrainerError, RuntimeError) as error:
        return found, f"{type(error).__name__}: {error}"
    return found, "none"


def first_gradient(ranks: Ranks, config: Config) -> list[Any]:
    """The reduced gradient of the first step, one numpy array a parameter."""
    pieces, step = built(ranks, config)
    step(pieces.batches.at(0))
    return [view.clone().numpy() for view in step.gradient_views]


def built(ranks: Ranks, config: Config) -> tuple[Any, Any]:
    """A run's pieces, and what makes its steps."""
    from trainer.record.console import DeepSpeedLog
    from trainer.run.build import build
    from trainer.run.course import make_step

    log = DeepSpeedLog(keep=False)
    log.install()
    pieces = build(config, ranks, config.plan(ranks.world_size), log)
    return pieces, make_step(pieces)


@fresh
def train_unrehearsed(ranks: Ranks, config: Config) -> dict[str, Any]:
    """A run without its rehearsal and its audits."""
    import trainer.run.course

    trainer.run.course._rehearse = lambda p, step, first_step: (0.0, [], "")  # type: ignore[assignment]
    return train(ranks, config)


def rehearse_once(ranks: Ranks, config: Config) -> tuple[Any, Any]:
    """A run's pieces, and what their rehearsal finds."""
    from trainer.rehearsal.rehearse import rehearse
    from trainer.run.course import subject_of

    pieces, step = built(ranks, config)
    return pieces, rehearse(subject_of(pieces, step), 0)


@fresh
def kept_state(ranks: Ranks, config: Config) -> list[str]:
    """What micro-batches change of Python's state, again and again."""
    _, found = rehearse_once(ranks, config)
    return list(found.kept)


@fresh
def rehearsed_state(ranks: Ranks, config: Config) -> tuple[Any, Any]:
    """Everything that a next step could depend on, before a rehearsal and after it, as comparable values."""
    from trainer.exact.checks.hashes import digest
    from trainer.rehearsal.python_state import PythonState
    from trainer.rehearsal.rehearse import rehearse
    from trainer.run.course import subject_of

    states: list[Any] = []

    def note(pieces: Any) -> None:
        import torch

        python = PythonState(pieces.task, pieces.engine.model)
        values = {python.name_of(key): saved.content for key, saved in python.take().items()}
        tensors = {name: digest(tensor) for name, tensor in pieces.engine.state().items()}
        states.append((values, tensors, digest(torch.get_rng_state()), pieces.host_splits["train"].data_hash()))

    pieces, step = built(ranks, config)
    subject = subject_of(pieces, step)
    note(pieces)
    rehearse(subject, 0)
    note(pieces)
    return states[0], states[1]


@fresh
def train_on_two_device_models(ranks: Ranks, config: Config) -> dict[str, Any]:
    """A run whose last rank has a processor of another model."""
    import trainer.engine.device

    if ranks.rank == ranks.world_size - 1:
        trainer.engine.device.cpu_model = lambda: "another processor"
    return train(ranks, config)


@fresh
def rehearsal_work(ranks: Ranks, config: Config) -> tuple[int, int]:
    """How many micro-batches a rehearsal computes, and of how many the gradient."""
    import torch

    from trainer.exact.micro_batches import MicroBatches

    counts = [0, 0]
    forward, grad = MicroBatches.forward, torch.autograd.grad

    def counted(place: int, function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            counts[place] += 1
            return function(*arguments, **named)

        return call

    MicroBatches.forward = counted(0, forward)  # type: ignore[method-assign]
    torch.autograd.grad = counted(1, grad)
    rehearse_once(ranks, config)
    return counts[0], counts[1]
