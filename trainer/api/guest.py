"""A run as a guest in a user's process: it computes as in a new process, and leaves this one as it was."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError


@dataclass(frozen=True)
class _Setting:
    """A setting of the whole process on which the bits of a run may depend.

    Attributes:
        get, put: read and set it.
        fresh: its value in a new process; None if a run sets it itself.
    """

    get: Callable[[], Any]
    put: Callable[[Any], object]
    fresh: Any = None


def _attribute(owner: Any, name: str, fresh: Any = None) -> _Setting:
    return _Setting(lambda: getattr(owner, name), lambda value: setattr(owner, name, value), fresh)


def _settings() -> dict[str, _Setting]:
    """Name -> setting, in the order in which they are set."""
    import numpy as np
    import torch

    backends = torch.backends
    found = {
        "environment": _Setting(lambda: dict(os.environ), _put_environment),
        "default dtype": _Setting(torch.get_default_dtype, torch.set_default_dtype, torch.float32),
        "default device": _Setting(
            _default_device, lambda name: torch.set_default_device(None if name == "cpu" else name), "cpu"
        ),
        "threads": _Setting(torch.get_num_threads, torch.set_num_threads),
        "deterministic algorithms": _Setting(
            lambda: (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            ),
            lambda on: torch.use_deterministic_algorithms(on[0], warn_only=on[1]),
            (False, False),
        ),
        "filling of uninitialised memory": _attribute(torch.utils.deterministic, "fill_uninitialized_memory"),
        "gradients": _Setting(torch.is_grad_enabled, torch.set_grad_enabled, True),
        "denormal numbers": _Setting(_flushes_denormals, torch.set_flush_denormal, False),
        "oneDNN": _Setting(torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled, True),
        "cuDNN": _attribute(backends.cudnn, "enabled", True),
        "cuDNN benchmark": _attribute(backends.cudnn, "benchmark", False),
        "cuDNN deterministic": _attribute(backends.cudnn, "deterministic", False),
        "precision": _Setting(_precision, _put_precision, ("highest", True, ("none",) * len(_places()))),
        "sums in bfloat16": _attribute(backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", True),
        "garbage collection": _Setting(gc.isenabled, lambda on: gc.enable() if on else gc.disable(), True),
        "DeepSpeed's log": _Setting(
            lambda: logging.getLogger("DeepSpeed").level, lambda level: logging.getLogger("DeepSpeed").setLevel(level)
        ),
        "Python's random": _Setting(random.getstate, random.setstate),
        "numpy's random": _Setting(np.random.get_state, np.random.set_state),
        "torch's random": _Setting(torch.get_rng_state, torch.set_rng_state),
    }
    for kind in ("flash", "mem_efficient", "math", "cudnn"):  # ways to compute attention
        get, put = getattr(backends.cuda, f"{kind}_sdp_enabled"), getattr(backends.cuda, f"enable_{kind}_sdp")
        found[f"{kind} attention"] = _Setting(get, put, True)
    for device in ("cpu", "cuda"):
        found[f"autocast on {device}"] = _Setting(*_autocast(device), False)
    return found | _settings_of_gpus()


def _settings_of_gpus() -> dict[str, _Setting]:
    """The settings of GPUs; none until this process has used a GPU, because reading them would start CUDA."""
    import torch

    if not torch.cuda.is_initialized():
        return {}
    return {
        "current GPU": _Setting(torch.cuda.current_device, torch.cuda.set_device),
        "GPUs' random": _Setting(torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all),
    }


def _default_device() -> str:
    """The device of torch.set_default_device. A `with torch.device(...)` around the call does not count."""
    import torch

    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return "cpu" if context is None else str(context.device)


def _put_environment(values: dict[str, str]) -> None:
    for name in os.environ.keys() - values.keys():
        del os.environ[name]
    os.environ.update(values)


def _autocast(device: str) -> tuple[Callable[[], bool], Callable[[bool], None]]:
    import torch

    return lambda: torch.is_autocast_enabled(device), lambda on: torch.set_autocast_enabled(device, on)


def _flushes_denormals() -> bool:
    import torch

    return float(torch.tensor(1e-40, dtype=torch.float32, device="cpu") * 1) == 0.0


def _places() -> list[Any]:
    """The parts of torch with a precision of their own (torch 2.9 and newer), the most general one first.

    The order matters: a part without a value of its own has that of the more general part.
    """
    import torch

    b: Any = torch.backends
    if not hasattr(b, "fp32_precision"):
        return []
    return [
        b,
        b.cuda.matmul,
        b.cudnn,
        b.cudnn.conv,
        b.cudnn.rnn,
        b.mkldnn,
        b.mkldnn.matmul,
        b.mkldnn.conv,
        b.mkldnn.rnn,
    ]


def _precision() -> tuple[str | None, bool | None, tuple[str, ...]]:
    """The precision of float32 products, by torch's older functions and by its newer ones.

    The older functions fail if the newer ones were used. Then their value is None.
    """
    import torch

    matmul, convolution = None, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(RuntimeError):
            matmul = torch.get_float32_matmul_precision()
        with contextlib.suppress(RuntimeError):
            convolution = torch.backends.cudnn.allow_tf32
        return matmul, convolution, tuple(place.fp32_precision for place in _places())


def _put_precision(values: tuple[str | None, bool | None, tuple[str, ...]]) -> None:
    import torch

    matmul, convolution, newer = values
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for place in _places():  # else the older functions may refuse
            place.fp32_precision = "none"
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if convolution is not None:
            torch.backends.cudnn.allow_tf32 = convolution
        for place, value in zip(_places(), newer):
            if value not in (place.fp32_precision, "none"):
                place.fp32_precision = value


class Host:
    """The state of a process in which a run is a guest.

    Use it as a context. Inside, torch has the settings of a new process. Afterwards the process has its own again.
    """

    def __init__(self) -> None:
        self._settings = _settings()
        self._own: dict[str, Any] = {}

    def _read(self) -> dict[str, Any]:
        return {name: setting.get() for name, setting in self._settings.items()}

    def _put(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            self._settings[name].put(value)

    def __enter__(self) -> Host:
        import torch

        self._own = self._read()
        try:
            self._put({name: setting.fresh for name, setting in self._settings.items() if setting.fresh is not None})
            if torch.get_default_device().type != "cpu":
                raise UserError(
                    "train() was called inside `with torch.device(...)`, which would move tensors of the run.\n"
                    "Call it outside. trainer.device says where the run computes."
                )
        except BaseException:
            self._put(self._own)
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._put(self._own)

    @contextlib.contextmanager
    def at_home(self) -> Iterator[None]:
        """A context for callbacks. Inside, the process has its own state again; afterwards it has the run's."""
        self._settings |= _settings_of_gpus()  # the run may be the first to use one
        inside = self._read()
        self._put(self._own)
        try:
            yield
        finally:
            self._own = self._read()  # what a callback has changed is to stay, once the run has ended
            self._put(inside)


_busy = threading.Lock()
# Modules that runs in this process have imported from the folders of tasks.
_imported: set[str] = set()


@contextlib.contextmanager
def hosted(code: Path | None = None) -> Iterator[Host]:
    """A context for one run, or one evaluation, in this process. Afterwards the process is as it was.

    Args:
        code: the folder of a user's task. The next run imports its modules anew, because their files may have changed.

    Raises:
        UserError: another run is under way in this process, or the process has joined a process group.
    """
    if not _busy.acquire(blocking=False):
        raise UserError(
            "Another run is under way in this process, and its settings hold for the whole process.\n"
            "Wait for it to end, or use ranks=2 or more: such a run has processes of its own."
        )
    for name in _imported:
        sys.modules.pop(name, None)
    _imported.clear()
    before = set(sys.modules)
    try:
        import torch
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            raise UserError(
                "This process has joined a process group of torch.distributed, and a run makes its own.\n"
                "Leave it first (torch.distributed.destroy_process_group()), or use another process."
            )
        with Host() as host, torch.inference_mode(False):  # the program may have called from inside inference_mode
            try:
                yield host
            finally:
                _leave_group()
                _imported.update(_from(code, set(sys.modules) - before))
        give_memory_back()
    finally:
        _busy.release()


def give_memory_back() -> None:
    """Frees the memory of a run that has ended."""
    import torch

    gc.collect()  # an engine refers to itself, so only the collector frees it
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _leave_group() -> None:
    engines = sys.modules.get("trainer.engine.deepspeed_engine")
    if engines is not None:
        engines.leave_group()  # DeepSpeed remembers the group, too
    from ..ranks.rendezvous import close

    close()


def _from(code: Path | None, names: set[str]) -> Iterator[str]:
    """The modules whose files lie in a folder, without those of installed packages and of the trainer."""
    if code is None:
        return
    folder, trainer = code.resolve(), Path(__file__).resolve().parents[1]
    for name in names:
        file = getattr(sys.modules.get(name), "__file__", None)
        path = folder.parent if file is None else Path(file).resolve()
        if path.is_relative_to(folder) and not path.is_relative_to(trainer) and "site-packages" not in path.parts:
            yield name
