"""The internals of DeepSpeed that the trainer uses, in one table, checked before any of them is used or replaced.

DeepSpeed promises none of these names. If it renames one, Python still lets us set the old name, which nobody reads any
more. DeepSpeed could then sum the gradient a second time, without an error. So each name is looked up, and its type or
its arguments are checked. If DeepSpeed itself has to read a name, the code that reads it is checked, too.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..errors import UserError

# The version whose source this table was compared with, and with which the tests pass.
KNOWN_VERSION = "0.19.8"

_MISSING = object()


@dataclass(frozen=True)
class Need:
    """One thing inside DeepSpeed.

    Attributes:
        owner: the object that has it: "deepspeed", its module "communication", "engine", "optimizer" or "parameter".
        name: the path from the owner, with dots.
        kind: the type of a value, or the arguments of a callable as `inspect.signature` writes them.
        why: what the trainer does with it. It completes the sentence "which the trainer ...".
        reads: names that the callable's own code must use.
        stages: the ZeRO stages at which it is needed.
    """

    owner: str
    name: str
    kind: type | str
    why: str
    reads: tuple[str, ...] = ()
    stages: tuple[int, ...] = (0, 1, 2, 3)


_STEP = "calls for every update, with the gradient in place"
_HOOK = "removes, since only DeepSpeed's timers use it and it slows every micro-step down"
_STATE = "uses to write a parameter's optimizer state into a checkpoint and to read it back"

NEEDS = (
    Need(
        "communication",
        "build_shm_op",
        "()",
        "keeps from compiling a kernel that only DeepSpeed's all-reduce on CPUs would use",
        reads=("__compatible_ops__",),
    ),
    Need(
        "deepspeed",
        "DeepSpeedEngine._broadcast_model",
        "(self)",
        "makes skip parameters that it cannot send, by the mark ds_optim_param",
        reads=("ds_optim_param",),
    ),
    Need(
        "engine",
        "step",
        "(lr_kwargs=None)",
        _STEP,
        reads=("managed_gradient_accumulation", "enable_backward_allreduce", "_take_model_step"),
    ),
    Need(
        "engine",
        "_take_model_step",
        "(lr_kwargs)",
        "needs to call the zero_grad that the trainer replaces",
        reads=("zero_grad",),
        stages=(0,),
    ),
    Need(
        "engine",
        "enable_backward_allreduce",
        bool,
        "switches off, since the gradient has been summed over the ranks already",
        stages=(0,),
    ),
    Need("engine", "zero_grad", "()", "replaces with a no-op, since every step overwrites the gradient", stages=(0,)),
    Need("engine", "module_forward_pre_hook", RemovableHandle, _HOOK, stages=(0,)),
    Need("engine", "module_forward_post_hook", RemovableHandle, _HOOK, stages=(0,)),
    Need("engine", "managed_gradient_accumulation", "()", "asks whether every step() is an update"),
    Need("engine", "gradient_clipping", "()", "asks whether step() clips"),
    Need("engine", "zero_optimization_stage", "()", "asks who sums the gradient"),
    Need("optimizer", "state", dict, _STATE, stages=(0,)),
    Need("optimizer", "param_groups", list, _STATE, stages=(0,)),
    Need("optimizer", "optimizer", Optimizer, _STATE, stages=(1, 2, 3)),
    Need("optimizer", "_hp_optimizer_states_linked", bool, _STATE, stages=(1, 2)),
    Need("optimizer", "_lazy_init_hp_params_optimizer_state", "()", _STATE, stages=(1, 2)),
    Need("optimizer", "fp32_partitioned_groups_flat", list, _STATE, stages=(3,)),
    Need("parameter", "ds_tensor", Tensor, _STATE, stages=(3,)),
    Need("parameter", "ds_shape", tuple, "reads a parameter's whole shape from", stages=(3,)),
    Need("parameter", "ds_numel", int, "counts parameters by", stages=(3,)),
    Need("deepspeed", "utils.safe_get_full_fp32_param", "(param)", _STATE, stages=(1, 2, 3)),
    Need("deepspeed", "utils.safe_get_full_optimizer_state", "(param, optim_state_key)", _STATE, stages=(1, 2, 3)),
    Need("deepspeed", "utils.safe_set_full_fp32_param", "(param, value)", _STATE, stages=(1, 2)),
    Need("deepspeed", "utils.safe_set_full_optimizer_state", "(param, value, optim_state_key)", _STATE, stages=(1, 2)),
    Need("deepspeed", "utils.safe_set_local_fp32_param", "(param, value)", _STATE, stages=(3,)),
    Need("deepspeed", "utils.safe_set_local_optimizer_state", "(param, value, optim_state_key)", _STATE, stages=(3,)),
)


def check(version: str, stage: int, **owners: Any) -> None:
    """Checks the table's entries for these owners at a ZeRO stage.

    Args:
        version: DeepSpeed's, for the message.
        stage: of ZeRO.
        owners: the object for each `Need.owner` that exists by now.

    Raises:
        UserError: something is missing or has changed. The message names the version, the thing and the remedy.
    """
    for need in NEEDS:
        if need.owner in owners and stage in need.stages:
            problem = _problem(need, owners[need.owner])
            if problem is not None:
                raise _refusal(version, f"{need.owner}.{need.name}, which the trainer {need.why}, {problem}.")


def check_settings(version: str, engine: Any, stage: int, max_norm: float) -> None:
    """Checks that an engine has the settings of the config. DeepSpeed ignores a key that it no longer knows.

    Args:
        version: DeepSpeed's, for the message.
        engine: DeepSpeed's, checked already.
        stage: of ZeRO.
        max_norm: the norm to which DeepSpeed clips; 0 if the trainer clips.

    Raises:
        UserError: the engine has another value.
    """
    told = {"zero_optimization_stage": stage, "gradient_clipping": max_norm, "managed_gradient_accumulation": False}
    for name, value in told.items():
        answer = getattr(engine, name)()
        if answer != value:
            raise _refusal(version, f"engine.{name}() returns {answer!r}, but the config says {value!r}.")


def _refusal(version: str, problem: str) -> UserError:
    return UserError(
        f"The trainer cannot work with DeepSpeed {version}: {problem}\n"
        f"The version known to work is {KNOWN_VERSION}: pip install deepspeed=={KNOWN_VERSION}"
    )


def _problem(need: Need, owner: Any) -> str | None:
    """What is wrong, as the end of a sentence that begins with the name; None if all is well."""
    value = owner
    for part in need.name.split("."):
        value = getattr(value, part, _MISSING)
    if value is _MISSING:
        return "does not exist"
    if isinstance(need.kind, type):
        if isinstance(value, need.kind):
            return None
        return f"is of type {type(value).__name__}, not {need.kind.__name__}"
    if not callable(value):
        return f"is of type {type(value).__name__}, not a function"
    arguments = _arguments(value)
    if arguments != need.kind:
        return f"takes the arguments {arguments}, not {need.kind}"
    used = set(_names(inspect.unwrap(value).__code__)) if need.reads else set()
    unread = [name for name in need.reads if name not in used]
    return f"no longer uses {unread[0]}" if unread else None


def _arguments(function: Any) -> str:
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def _names(code: CodeType) -> Iterator[str]:
    """Every name and text in a function's code, and in the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _names(constant)
