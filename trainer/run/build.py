"""Builds the pieces of a run in one explicit order, and refuses what cannot be trained exactly, or at all."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..config.keys import Config
from ..data.cut import Cut
from ..engine import device as devices
from ..engine.adapt import adapt, compile_in_place
from ..engine.adascale import growth
from ..engine.optimizers import check_optimizer
from ..engine.rates import Rates
from ..errors import TrainerError, UserError
from ..exact.micro_batches import GlobalBatches
from ..exact.order import key, nested_subset, seed_generators, seed_python
from ..exact.plan import BatchPlan, steps_per_epoch
from ..exact.splits import Split, as_splits
from ..ranks import rendezvous
from ..ranks.collectives import COLLECTIVE_TIMEOUT_S, broadcast_tensor, gather_objects, raise_together
from ..ranks.place import Ranks
from ..record.console import DeepSpeedLog, say
from ..record.made_by import without_secrets
from ..tasks.folds import splits_in_fold
from ..tasks.protocol import Task, load_task
from .facts import compare_facts, facts_of

if TYPE_CHECKING:
    from ..engine.deepspeed_engine import Engine

T = TypeVar("T")


@dataclass
class Pieces:
    """The pieces of a run.

    Attributes:
        host_splits, splits: the data on the CPU and on the device.
        batches: of the training split, step by step.
        rates: the learning rate of each step.
        inexact: why the run is not bitwise; empty if it is.
        facts: what the bits depend on besides config and data.
        hosts: the host and device of each rank.
        alike: whether all ranks have the same device model.
        changing: parameters and buffers that the task's forward changes by itself. So the ranks differ in them. The
            rehearsal finds them.
        cut: which samples are train, validation and test, in a fold of a cross-validation.
    """

    config: Config
    ranks: Ranks
    plan: BatchPlan
    task: Task
    device: torch.device
    host_splits: dict[str, Split]
    splits: dict[str, Split]
    batches: GlobalBatches
    engine: Engine
    rates: Rates
    inexact: list[str]
    facts: dict[str, Any]
    hosts: list[str]
    alike: bool = True
    changing: list[str] = field(default_factory=list)
    cut: Cut | None = None
    _data_sha256: dict[str, str] = field(default_factory=dict)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        return self.batches.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """The length of the run, in optimizer steps."""
        return self.batches.total_steps

    @property
    def exactness(self) -> str:
        """The run's label: bitwise, or tolerance if something cannot be exact."""
        return "tolerance" if self.inexact else "bitwise"

    def common_state(self) -> dict[str, Tensor]:
        """The parameters and buffers that must be the same on every rank: name -> tensor."""
        state = self.engine.model_state()
        return {name: tensor for name, tensor in state.items() if name not in self.changing}

    def follow_first(self) -> None:
        """Copies rank 0's values of `changing` to every rank. Collective: every rank."""
        state = self.engine.model_state() if self.changing else {}
        for name in self.changing:
            own = state[name]
            own.copy_(broadcast_tensor(own.cpu() if self.ranks.first else None, own.dtype, tuple(own.shape)))

    def data_sha256(self) -> dict[str, str]:
        """The hash of each split's data."""
        if not self._data_sha256:
            self._data_sha256.update({name: split.data_hash() for name, split in self.host_splits.items()})
        return self._data_sha256

    def manifest(self) -> dict[str, Any]:
        """Everything that determines the result, for manifest.json."""
        return {
            "config": without_secrets(self.config.as_dict()),
            "batch_plan": asdict(self.plan) | {"micro_batches": self.plan.micro_batches},
            "exactness": self.exactness,
            "inexact": self.inexact,
            "seed": self.config.trainer.seed,
            "samples": {name: len(split) for name, split in self.host_splits.items()},
            "total_steps": self.total_steps,
            "data_sha256": self.data_sha256(),
            "facts": self.facts,
            "hosts": self.hosts,
        }


def build(
    config: Config,
    ranks: Ranks,
    plan: BatchPlan,
    log: DeepSpeedLog,
    met: Callable[[], None] = lambda: None,
    failed: BaseException | None = None,
) -> Pieces:
    """Builds everything a run needs. Collective: every rank.

    Args:
        config, ranks, plan: of the run.
        log: takes DeepSpeed's messages.
        met: called when the ranks have joined the process group, before anything slow.
        failed: this rank's error so far. All ranks leave with it when they meet, so this rank must come, too.

    Raises:
        UserError: something must change first. Nothing has been computed then.
    """
    device, backend = torch.device("cpu"), "gloo"
    task: Any = None
    try:
        if failed is None:
            _check_noise(config, plan)
            device, backend = devices.choose(config, ranks)
            devices.settle(config)
            with log.capture():  # DeepSpeed prints when it is imported
                from ..engine import deepspeed_engine  # noqa: F401
            check_optimizer(config)
            # A task may draw splits or weights from these generators. They then agree on every rank and in every run.
            seed_python(key(config.trainer.seed, "task"))
            task = load_task(config.trainer.task, config.trainer.task_options)
    except (Exception, SystemExit) as own:
        failed = own
    rendezvous.start(ranks, backend, COLLECTIVE_TIMEOUT_S, failed)
    met()

    # From here on ranks wait for one another, so an error on one rank must be raised on all of them.
    host_splits, cut, total_steps, model = _together(lambda: _data_and_model(task, config, plan, device))

    facts = facts_of(task, config, device, model)
    unlike = compare_facts(facts, config, host_splits)
    inexact = _zero_reason(config) + _normalisation_reason(model) + unlike
    refuse_inexact(config, inexact)

    engine = _together(lambda: _engine(config, ranks, plan, log, model, device))
    batches = GlobalBatches(
        host_splits["train"],
        device,
        seed=config.trainer.seed,
        global_batch_size=plan.global_batch_size,
        micro_batch_size=plan.micro_batch_size,
        drop_last=config.trainer.drop_last,
        total_steps=total_steps,
        one_shape=config.trainer.compile,
        counted=measures_norms(config),
    )
    return Pieces(
        config=config,
        ranks=ranks,
        plan=plan,
        task=task,
        device=device,
        host_splits=host_splits,
        splits={name: split.to(device) for name, split in host_splits.items()},
        batches=batches,
        engine=engine,
        rates=Rates(config, plan, batches.steps_per_epoch, total_steps),
        inexact=inexact,
        facts=facts,
        hosts=gather_objects(f"{socket.gethostname()} {device}"),
        alike=not unlike,
        cut=cut,
    )


def _together(make: Callable[[], T]) -> T:
    """What `make` returns. If it raises a TrainerError on one rank, every rank raises it. Collective: every rank."""
    error: TrainerError | None = None
    made: T
    try:
        made = make()
    except TrainerError as own:
        error = own
    raise_together(error)
    return made


def _data_and_model(
    task: Task, config: Config, plan: BatchPlan, device: torch.device
) -> tuple[dict[str, Split], Cut | None, int, nn.Module]:
    """The splits, on the CPU, which samples went where in a fold, the length of the run in steps, and the model.

    Raises:
        UserError: the task or the config asks for something that cannot be made.
    """
    cut = None if config.trainer.fold is None else Cut(config.trainer.fold)
    host_splits = splits_of(task, config, cut)
    total_steps = _total_steps(config, plan, len(host_splits["train"]))
    # After the splits: the first weights must not depend on how many numbers a task draws for its data.
    seed_generators(key(config.trainer.seed, "model"), device)
    return host_splits, cut, total_steps, built_model(task, config)


def _engine(
    config: Config, ranks: Ranks, plan: BatchPlan, log: DeepSpeedLog, model: nn.Module, device: torch.device
) -> Engine:
    """Moves the model to the device, and puts DeepSpeed's engine around it. Raises TrainerError."""
    from ..engine.deepspeed_engine import Engine, builds_an_op

    if builds_an_op(config) and ranks.first:
        say(
            f"DeepSpeed builds its {config.optimizer.type} kernel when it is first used on a machine. This takes one "
            'to three minutes, once. ("torch_adam": true in optimizer.params uses a kernel that is compiled already.)'
        )
    model.to(device).train()
    with log.capture():
        return Engine(model, config, micro_batch_size=plan.micro_batch_size, world_size=ranks.world_size)


def train_split(config: Config) -> Split:
    """The training split of a config, without a model."""
    seed_python(key(config.trainer.seed, "task"))
    return splits_of(load_task(config.trainer.task, config.trainer.task_options), config)["train"]


def splits_of(task: Task, config: Config, cut: Cut | None = None) -> dict[str, Split]:
    """A task's splits, on the CPU: name -> split; those of `trainer.fold` if it is set. Raises UserError.

    Pass a `cut` to learn from it afterwards which samples went where.
    """
    if cut is None and config.trainer.fold is not None:
        cut = Cut(config.trainer.fold)
    splits = as_splits(task.splits(), type(task).__name__) if cut is None else splits_in_fold(task, cut)
    splits["train"] = chosen_samples(splits["train"], config.trainer.train_samples)
    return splits


def measures_norms(config: Config) -> bool:
    """Whether a run's steps measure the norms of the micro-batches' gradients."""
    return config.trainer.gradient_noise or config.trainer.learning_rate.scaling_rule == "adascale"


def built_model(task: Task, config: Config) -> nn.Module:
    """A task's model as a run trains it, on the CPU. Raises UserError."""
    model = task.model()
    if not isinstance(model, nn.Module):
        raise UserError(f"{type(task).__name__}.model() must return a torch.nn.Module, not {type(model).__name__}.")
    lazy = [n for n, q in model.named_parameters() if isinstance(q, nn.parameter.UninitializedParameter)]
    if lazy:
        raise UserError(
            f"The parameter {lazy[0]} has no shape yet. Call the model once in model(): a lazy layer takes its shape "
            "from its first input."
        )
    sparse = [n for n, m in model.named_modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.sparse]
    if sparse:
        raise UserError(
            f"The gradient of {sparse[0]}.weight is sparse, but the ranks add dense gradients. Leave out its "
            "sparse=True."
        )
    model = adapt(model, config)
    if config.trainer.compile:
        compile_in_place(model)
    return model


def refuse_inexact(config: Config, reasons: Sequence[str], remedies: Sequence[str] = ()) -> None:
    """Raises UserError, on every rank, if the config asks for bitwise and there is a reason against it.

    Args:
        config: of the run.
        reasons: clauses.
        remedies: sentences on what to do.
    """
    if reasons and config.trainer.exactness == "bitwise":
        advice = "".join(f"{remedy}\n" for remedy in remedies)
        raise UserError(
            f'trainer.exactness is "bitwise", but {"; ".join(reasons)}.\n{advice}'
            'With "auto" the run continues and is labelled tolerance.',
            agreed=True,
        )


def _check_noise(config: Config, plan: BatchPlan) -> None:
    if config.trainer.learning_rate.scaling_rule == "adascale":
        growth(config, plan)
    if config.trainer.gradient_noise and plan.micro_batches == 1:
        raise UserError(
            '"trainer.gradient_noise" compares the gradients of micro-batches, but the global batch of '
            f"{plan.global_batch_size} samples is a single one (train_micro_batch_size_per_gpu "
            f"{plan.micro_batch_size}).\nLeave it out, or use a smaller micro-batch (which is another model)."
        )


def chosen_samples(split: Split, samples: int | None) -> Split:
    """The part of the training split that the config asks for."""
    if samples is None:
        return split
    if samples > len(split):
        raise UserError(
            f"trainer.train_samples is {samples:,}, but the training split has only {len(split):,} samples.\n"
            f"Use at most {len(split)}, or leave it out for all of them."
        )
    return split.subset(nested_subset(len(split), samples))


def _total_steps(config: Config, plan: BatchPlan, samples: int) -> int:
    B = plan.global_batch_size
    if samples < B:
        growth = f" (weak scaling on {plan.world_size} ranks)" if plan.scaling == "weak" else ""
        raise UserError(
            f"A global batch of {B} samples{growth} is larger than the training set of {samples}.\n"
            + (
                f"Use at most {samples * plan.world_size // B} ranks, or a smaller train_micro_batch_size_per_gpu."
                if plan.scaling == "weak" and samples * plan.world_size >= B
                else f"Use a train_batch_size of at most {samples}."
            )
        )
    total = steps_per_epoch(samples, B, config.trainer.drop_last) * config.trainer.epochs
    return min(total, config.trainer.max_steps or total)


def _zero_reason(config: Config) -> list[str]:
    if config.zero_stage == 0:
        return []
    return [f"ZeRO stage {config.zero_stage} reduces gradients in an order that depends on the number of ranks"]


def _normalisation_reason(model: nn.Module) -> list[str]:
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            return [f"{name} is a SyncBatchNorm, whose statistics depend on which micro-batches run at the same time"]
        if (
            isinstance(module, _BatchNorm)
            and module.running_mean is not None
            and module.running_mean.dtype != torch.float32
        ):
            return [f"{name} keeps its running statistics in {module.running_mean.dtype}"]
    return []
