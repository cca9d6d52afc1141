"""DeepSpeed's engine, and the few places where exactness needs it to behave differently.

The engine owns the optimizer and its update. At ZeRO stage 0 the trainer computes gradients itself
(`torch.autograd.grad` on the plain module), sums them along its tree, clips the sum and gives it to the engine. The
engine's own forward and backward would only add Python work to every micro-step. Its all-reduce would add in an order
that depends on the number of ranks. At stages 1 to 3 the engine's forward, backward, reduction and clipping are used
unchanged.

This is the only module that imports deepspeed.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from torch import Tensor, nn

from ..config import deepspeed_keys
from ..config.keys import Config
from ..errors import UserError
from . import contract as engine_contract
from .adapt import parameter_groups
from .device import as_local_rank
from .optimizers import client_optimizer, for_vectors
from .undo import Undo

VERSION: str = deepspeed.__version__
# By import_module, because the attribute `deepspeed.comm.torch` is torch itself.
_COMMUNICATION = importlib.import_module("deepspeed.comm.torch")
# The state that optimizers keep on the host. All other state lies on the parameter's device. Names decide, as "step"
# does in torch's Optimizer.load_state_dict. Shapes cannot: for a parameter of shape (), the moments have shape (), too.
_ON_THE_HOST = ("step", "mu_product")


def builds_an_op(config: Config) -> bool:
    """Whether DeepSpeed compiles a kernel when this optimizer is made for the first time."""
    name = config.optimizer.type.lower()
    return name in deepspeed_keys.OPTIMIZERS and not config.optimizer.params.get("torch_adam")


def use_accelerator(device: torch.device) -> None:
    """Makes DeepSpeed use the device that we chose.

    DeepSpeed makes its own choice when it is imported: by the installed packages, or by DS_ACCELERATOR, which a user or
    another program may have set.
    """
    if get_accelerator().device_name() != device.type:
        set_accelerator(CUDA_Accelerator() if device.type == "cuda" else CPU_Accelerator())


class Engine:
    """One DeepSpeed engine around one model.

    Args:
        model: on its device already.
        config: the run's.
        micro_batch_size, world_size: for DeepSpeed's batch keys, which must agree with one another.

    Raises:
        UserError: DeepSpeed or torch refuse the optimizer, or this DeepSpeed is not as `contract` needs it.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        *,
        micro_batch_size: int,
        world_size: int,
    ) -> None:
        self.model = model
        self.zero_stage = config.zero_stage
        self.compiled = config.trainer.compile
        # At stage 0 `exact.step` clips. DeepSpeed's clipping would divide the norm by W and all-reduce it. That is one
        # more collective, and at three ranks the division rounds.
        self._max_norm = config.gradient_clipping if config.zero_stage > 0 else 0.0
        self._autocast_dtype = torch.bfloat16 if config.torch_autocast.enabled else None
        self.names = {p: n for n, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(self.names)
        if not self.parameters:
            raise UserError("The model has no parameter that requires a gradient, so there is nothing to train.")
        for parameter, name in self.names.items():
            if parameter.dtype != torch.float32:
                raise UserError(
                    f"The parameter {name} is {str(parameter.dtype).removeprefix('torch.')}. Trained parameters must "
                    "be float32. For speed use torch_autocast: it computes in bfloat16 and keeps float32 weights."
                )
        self.device = self.parameters[0].device
        use_accelerator(self.device)
        engine_contract.check(VERSION, self.zero_stage, deepspeed=deepspeed, communication=_COMMUNICATION)
        # An empty list, so that DeepSpeed does not compile a kernel for its own all-reduce on CPUs, which we don't use.
        # To make the list, it would try all kernels that it knows (23 for GPUs, in 1 to 3 s on every rank). Then it
        # would compile that one, in half a minute.
        deepspeed.ops.__compatible_ops__ = {}
        groups = parameter_groups(model, config, for_vectors(config))
        odd = self._send_odd_parameters()
        try:
            with as_local_rank(self.device):
                self._engine, self.optimizer, _, _ = deepspeed.initialize(
                    model=model,
                    model_parameters=groups,
                    optimizer=client_optimizer(config, groups),
                    config=_deepspeed_config(config, micro_batch_size, world_size, self._max_norm),
                    dist_init_required=False,
                )
        except (ValueError, TypeError) as error:
            raise UserError(f"The optimizer {config.optimizer.type} cannot be built: {error}") from error
        except (RuntimeError, ImportError, OSError) as error:
            if builds_an_op(config):
                raise UserError(
                    f"DeepSpeed could not build its {config.optimizer.type} kernel: {str(error).splitlines()[0]}\n"
                    "It needs a C++ compiler, for a GPU also nvcc, and an environment whose path has no space. Or set "
                    '"torch_adam": true in optimizer.params: torch\'s fused kernel is compiled already.'
                ) from error
            raise
        for parameter in odd:
            del parameter.ds_optim_param
        parts = {"engine": self._engine, "optimizer": self.optimizer, "parameter": self.parameters[0]}
        engine_contract.check(VERSION, self.zero_stage, **parts)
        engine_contract.check_settings(VERSION, self._engine, self.zero_stage, self._max_norm)
        self._inner = self.optimizer if self.zero_stage == 0 else self.optimizer.optimizer  # ZeRO wraps torch's
        self._base_rates = [group["lr"] for group in self._inner.param_groups]
        first = self._inner.param_groups[0]
        self._lacks_momentum = (
            self.zero_stage == 0
            and isinstance(self._inner, torch.optim.SGD)
            and first.get("fused", False)
            and first["momentum"] > 0
        )
        self._undo: Undo | None = None
        if self.zero_stage == 0:
            self._take_over(config.memory_breakdown)

    def _send_odd_parameters(self) -> list[Any]:
        """Sends rank 0's parameters that DeepSpeed cannot send, and marks them. Collective: every rank.

        DeepSpeed sends the model as bytes. Its `view(torch.uint8)` needs a last dimension with its elements side by
        side in memory. Parameters of shape () and those in the memory format channels_last have none. DeepSpeed skips
        parameters with the mark ds_optim_param. Its own use of the mark is for parameters that the ranks do not share.
        """
        odd: list[Any] = []
        for name, parameter in self.model.named_parameters():
            if parameter.ndim > 0 and parameter.stride(-1) == 1:
                continue
            if self.zero_stage == 3 and parameter.ndim == 0:
                raise UserError(
                    f"The parameter {name} has no dimension (its shape is ()), and ZeRO stage 3 cannot cut it into "
                    "parts.\nUse ZeRO stage 0, 1 or 2, or give it a dimension: torch.ones(1), not torch.ones(())."
                )
            # clone always copies. contiguous() would not copy a tensor with strides such as (9, 1, 3, 1), and the
            # message would share its memory.
            message = parameter.detach().clone(memory_format=torch.contiguous_format).view(-1)
            torch.distributed.broadcast(message, src=0)
            parameter.detach().copy_(message.view(parameter.shape))
            odd.append(parameter)
            odd[-1].ds_optim_param = True
        return odd

    def _take_over(self, memory_breakdown: bool) -> None:
        # Stage 0: the gradient is already summed over all ranks.
        self._engine.enable_backward_allreduce = False
        # Gradients are views of one buffer that every step overwrites. zero_grad would set them to None, and each
        # step would have to set them again.
        self._engine.zero_grad = lambda: None
        # DeepSpeed's hooks on the forward are for its timers, its profiler and ZeRO. None of them is used here. With a
        # tiny model the hooks take several per cent of a micro-step. Only the memory report needs them.
        if not memory_breakdown:
            for hook in ("module_forward_pre_hook", "module_forward_post_hook"):
                getattr(self._engine, hook).remove()
                setattr(self._engine, hook, None)

    def use_gradient(self, flat: Tensor, views: list[Tensor]) -> None:
        """Tells `update` where the gradients are: in the flat buffer, with one view for each parameter, in order."""
        self._views = views
        for parameter, view in zip(self.parameters, views):
            parameter.grad = view

    @property
    def forward_module(self) -> nn.Module:
        """The model that a task's forward is called with."""
        return self.model if self.zero_stage == 0 else self._engine

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision context of forward and loss."""
        if self._autocast_dtype is None or self.zero_stage > 0:  # with ZeRO the engine enters its own context
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self._autocast_dtype)

    def skip_update_where(self, flag: Tensor) -> bool:
        """From now on an update leaves the parameters alone if `flag` () is not 0. Returns False if it cannot.

        This keeps the last good parameters, and the host need not wait for the loss. Kernels of torch's fused
        optimizers skip the update. Other optimizers make it, and it is taken back. Their momenta are not taken back.
        """
        if self.zero_stage > 0:
            return False
        if getattr(self.optimizer, "_step_supports_amp_scaling", False):
            # Both attributes are those that torch.amp.GradScaler sets on a fused optimizer.
            self.optimizer.grad_scale = None
            self.optimizer.found_inf = flag
        else:
            self._undo = Undo(self.parameters, flag)
        return True

    def set_learning_rate(self, factor: float | None) -> float:
        """Sets the rate of the next update.

        Args:
            factor: multiple of `optimizer.params.lr`, or of its own rate for a parameter group that has one; None if
                DeepSpeed's scheduler sets the rate.

        Returns:
            The rate of the first group.
        """
        if factor is not None:
            for group, base in zip(self._inner.param_groups, self._base_rates):
                group["lr"] = base * factor
        return float(self._inner.param_groups[0]["lr"])

    def update(self, unused: Sequence[int] = ()) -> None:
        """Updates the parameters, and advances DeepSpeed's scheduler if there is one.

        Args:
            unused: positions of the parameters that no micro-batch used. As in plain PyTorch, the optimizer skips
                them: with a gradient of zero it would still decay them.
        """
        for i in unused:
            self.parameters[i].grad = None
        late = self._used_late()
        if late:
            for i, parameter in enumerate(self.parameters):
                parameter.grad = self._views[i] if i in late else None
            self.optimizer.step()
            for i, parameter in enumerate(self.parameters):
                parameter.grad = None if i in late or i in unused else self._views[i]
        if self._undo is not None:
            self._undo.note()
        self._engine.step()
        if self._undo is not None:
            self._undo.undo()
        for i in [*unused, *late]:
            self.parameters[i].grad = self._views[i]

    def _used_late(self) -> list[int]:
        """Positions of parameters that are used for the first time, later than others.

        Torch's fused SGD makes all momentum buffers in its first step. It fails if some exist already. So these
        parameters get a first step of their own.
        """
        if not self._lacks_momentum:
            return []
        lacking = [
            i for i, p in enumerate(self.parameters) if self.optimizer.state.get(p, {}).get("momentum_buffer") is None
        ]
        self._lacks_momentum = bool(lacking)
        used = [i for i in lacking if self.parameters[i].grad is not None]
        return used if len(lacking) < len(self.parameters) else []

    def zero_step(self, losses: Iterator[Tensor]) -> Tensor:
        """One step with DeepSpeed's own reduction. Collective: every rank, with the same number of losses.

        Args:
            losses: the losses of this rank's micro-batches, each divided by the global count and multiplied by W,
                because DeepSpeed averages over ranks. Each is computed when it is asked for.

        Returns:
            The gradient norm, () float32.
        """
        for loss in losses:
            self._engine.backward(loss, scale_wrt_gas=False)
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return torch.as_tensor(float("nan") if norm is None else norm, dtype=torch.float32, device=self.device)

    @contextlib.contextmanager
    def whole_parameters(self, change: bool = False) -> Iterator[None]:
        """A context in which parameters are whole on every rank. Collective: every rank, at ZeRO stage 3.

        Args:
            change: keep changes to them. Every rank must write the same values.
        """
        if self.zero_stage < 3:
            yield
            return
        with deepspeed.zero.GatheredParameters(list(self.model.parameters()), modifier_rank=0 if change else None):
            yield

    def model_state(self) -> dict[str, Tensor]:
        """Name -> tensor of all parameters and buffers, under the model's own names."""
        state = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        state.update(self.model.named_buffers())
        return state

    def whole_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> whole shape of all parameters and buffers, even if a rank holds only a part. Not collective."""
        shapes = {n: tuple(getattr(t, "ds_shape", t.shape)) for n, t in self.model.named_parameters()}
        return shapes | {n: tuple(b.shape) for n, b in self.model.named_buffers()}

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state of optimizer and schedule for a checkpoint. Collective with ZeRO: every rank.

        Returns:
            "<parameter>.<kind>" -> tensor, whole as on one rank; and JSON values.
        """
        values: dict[str, Any] = {
            "groups": [{k: v for k, v in g.items() if _is_plain(v)} for g in self._inner.param_groups],
            "schedule": {},
            "state": {},
        }
        if self._engine.lr_scheduler is not None:
            schedule = self._engine.lr_scheduler.state_dict()
            values["schedule"] = {k: v for k, v in schedule.items() if _is_plain(v) and k != "lr_lambdas"}
        tensors: dict[str, Tensor] = {}
        if self.zero_stage == 0:
            for parameter, state in self.optimizer.state.items():
                name = self.names[parameter]
                tensors |= {f"{name}.{k}": v for k, v in state.items() if isinstance(v, Tensor)}
                plain = {k: v for k, v in state.items() if not isinstance(v, Tensor) and _is_plain(v)}
                if plain:
                    values["state"][name] = plain
            return tensors, values
        self._link_partitions()
        states = self._inner.state
        kinds = {k for p, s in states.items() for k, v in s.items() if isinstance(v, Tensor) and v.shape == p.shape}
        for parameter, name in self.names.items():
            for kind in sorted(kinds):
                tensors[f"{name}.{kind}"] = deepspeed.utils.safe_get_full_optimizer_state(parameter, kind).clone()
            tensors[f"{name}.weights"] = deepspeed.utils.safe_get_full_fp32_param(parameter).clone()
        for state in states.values():
            values["odd"] = {k: float(v) for k, v in state.items() if k not in kinds and v is not None}
        return tensors, values

    def load_state(self, model: dict[str, Tensor], optimizer: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Restores what `model_state` and `optimizer_state` returned. Collective with ZeRO: every rank.

        Raises:
            UserError: the checkpoint is of another optimizer.
        """
        inner = self._inner
        if len(values["groups"]) != len(inner.param_groups):
            raise UserError(
                f"The checkpoint has {len(values['groups'])} parameter groups, this run has {len(inner.param_groups)}.",
                agreed=True,
            )
        with self.whole_parameters(change=True), torch.no_grad():
            for name, tensor in self.model_state().items():
                tensor.copy_(model[name])
        for group, saved in zip(inner.param_groups, values["groups"]):
            group.update(saved)
        if self._engine.lr_scheduler is not None and values["schedule"]:
            self._engine.lr_scheduler.load_state_dict({**self._engine.lr_scheduler.state_dict(), **values["schedule"]})
        if self.zero_stage == 0:
            for parameter, name in self.names.items():
                kinds = [k for k in optimizer if k.rpartition(".")[0] == name]
                if kinds or name in values["state"]:
                    state = {k.rpartition(".")[2]: self._placed(k, optimizer[k], parameter) for k in kinds}
                    self.optimizer.state[parameter] = state | values["state"].get(name, {})
            return
        of_optimizer = {key.rpartition(".")[2] for key in optimizer} - {"weights"}
        partitions = [p for group in inner.param_groups for p in group["params"]]
        if self.zero_stage == 3:
            partitions = self.optimizer.fp32_partitioned_groups_flat  # stage 3 keeps them in a list of its own
        fused = any(group.get("fused") for group in inner.param_groups)
        # Normally the optimizer makes this state in its first step. DeepSpeed's setters below need it to exist.
        for partition in partitions:
            inner.state[partition] = {kind: torch.zeros_like(partition) for kind in sorted(of_optimizer)} | {
                kind: torch.tensor(value, device=partition.device if fused else "cpu")
                for kind, value in values.get("odd", {}).items()
            }
        self._link_partitions()
        for key, tensor in optimizer.items():
            name, _, kind = key.rpartition(".")
            parameter = self.model.get_parameter(name)
            whole = tensor.to(self.device)
            if self.zero_stage == 3:
                # DeepSpeed's "full" setters fail if a parameter's size is no multiple of the number of ranks.
                part = self._own_part(parameter, whole)
                if kind == "weights":
                    deepspeed.utils.safe_set_local_fp32_param(parameter, part)
                else:
                    deepspeed.utils.safe_set_local_optimizer_state(parameter, part, kind)
            elif kind == "weights":
                deepspeed.utils.safe_set_full_fp32_param(parameter, whole)
            else:
                deepspeed.utils.safe_set_full_optimizer_state(parameter, whole, kind)

    def _own_part(self, parameter: Any, whole: Tensor) -> Tensor:
        """This rank's part of a whole parameter or state at ZeRO stage 3, padded with zeros as DeepSpeed does it."""
        size = parameter.ds_tensor.numel()
        padded = torch.zeros(size * torch.distributed.get_world_size(), dtype=whole.dtype, device=self.device)
        padded[: whole.numel()] = whole.flatten()
        return padded.narrow(0, size * torch.distributed.get_rank(), size)

    def _link_partitions(self) -> None:
        # DeepSpeed links optimizer state to parameters once, after the first step of the first group. The other groups
        # have no state then. So we clear its mark and let it link again.
        if self.zero_stage < 3:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _placed(self, key: str, tensor: Tensor, parameter: Tensor) -> Tensor:
        # Fused kernels need the step on the parameter's device, other kernels on the CPU.
        fused = any(group.get("fused") or group.get("capturable") for group in self.optimizer.param_groups)
        if key.rpartition(".")[2] in _ON_THE_HOST and not fused:
            return tensor.clone()
        # empty_like keeps the parameter's memory format, for example channels_last.
        result = torch.empty_like(parameter) if tensor.shape == parameter.shape else torch.empty_like(tensor)
        return result.to(device=parameter.device, dtype=tensor.dtype).copy_(tensor)

    def state(self) -> dict[str, Tensor]:
        """Everything the next step depends on: parameters, buffers and optimizer state, named by kind."""
        tensors = {f"parameter {n}": p.detach() for n, p in self.model.named_parameters()}
        tensors.update({f"buffer {n}": b for n, b in self.model.named_buffers()})
        for parameter, state in self.optimizer.state.items():
            name = self.names.get(parameter, "partition")
            tensors.update({f"optimizer {name}.{k}": v for k, v in state.items() if isinstance(v, Tensor)})
        return tensors


def _is_plain(value: Any) -> bool:
    """Whether a value of an optimizer's or a schedule's state can be written as JSON."""
    if isinstance(value, (list, tuple)):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _deepspeed_config(config: Config, micro_batch_size: int, world_size: int, max_norm: float) -> dict[str, Any]:
    """The config that DeepSpeed gets. Its batch keys only have to agree: the trainer accumulates and weights."""
    result: dict[str, Any] = {
        "train_batch_size": micro_batch_size * world_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": max_norm,
        "memory_breakdown": config.memory_breakdown,
        "dump_state": config.dump_state,
        "disable_python_gc": config.disable_python_gc,
        # DeepSpeed's throughput timer synchronises the device twice a step.
        "timers": {"throughput": {"enabled": False}},
    }
    if config.optimizer.type.lower() not in deepspeed_keys.LAYERWISE:  # those are passed as an object
        result["optimizer"] = {"type": config.optimizer.type, "params": dict(config.optimizer.params)}
    if config.scheduler is not None:
        result["scheduler"] = {"type": config.scheduler.type, "params": dict(config.scheduler.params)}
    if config.steps_per_print is not None:
        result["steps_per_print"] = config.steps_per_print
    if config.zero_stage > 0:
        result["zero_optimization"] = dict(config.zero_optimization)
        if config.torch_autocast.enabled:
            result["torch_autocast"] = {"enabled": True, "dtype": config.torch_autocast.dtype}
        for key in deepspeed_keys.ONLY_WITH_ZERO:
            if getattr(config, key) is not None:
                result[key] = getattr(config, key)
    return result


def leave_group() -> None:
    """Leaves the process group, and has DeepSpeed forget it: a later run in this process joins a new one."""
    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
