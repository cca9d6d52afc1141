"""Operations that torch refuses on GPUs, because their kernels there add in another order each time.

Torch's error names the operation, and advises to allow it. Often it is a backward that no user has called. Our message
also names the module that uses it, and a substitute. `check-task` finds such operations without a GPU.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import UserError

_BY_MATRICES = "{0}(torch.eye(H).to(x){1}, {2}){3}.T @ x @ {0}(torch.eye(W).to(x){1}, {4}){3}"
_RESIZED = _BY_MATRICES.format(
    "F.interpolate", "[None, None]", "(H, height), mode=mode", "[0, 0]", "(W, width), mode=mode"
)
_BY_THREE = 'torch.einsum("ncdhw,di,hj,wk->ncijk", x, *({} for n, m in zip(x.shape[2:], output_size)))'
# Beginning of an operation's name -> an expression of a layer's input x that computes the same, up to rounding. After a
# semicolon: under which condition. The tests compute both.
SUBSTITUTES = {
    "adaptive_avg_pool2d": _BY_MATRICES.format("F.adaptive_avg_pool1d", "", "height", "", "width"),
    "adaptive_avg_pool3d": _BY_THREE.format("F.adaptive_avg_pool1d(torch.eye(n).to(x), m)"),
    "avg_pool3d": _BY_THREE.format("F.avg_pool1d(torch.eye(n).to(x), kernel_size, stride)"),
    "adaptive_max_pool2d": "F.max_pool2d(x, k); where the input's height and width are k times the output's",
    "adaptive_max_pool3d": "F.max_pool3d(x, k); where the input's sizes are k times the output's",
    "upsample_linear1d": 'F.interpolate(x.unsqueeze(2), (1, length), mode="bilinear").squeeze(2)',
    "upsample_bicubic2d_aa": _RESIZED.replace("mode=mode", "mode=mode, antialias=True"),
    "upsample_bilinear2d_aa": _RESIZED.replace("mode=mode", "mode=mode, antialias=True"),
    "upsample_bicubic2d": _RESIZED,
    "reflection_pad": "torch.cat([x[..., 1 : p + 1].flip(-1), x, x[..., -p - 1 : -1].flip(-1)], -1); for the last "
    "dimension, and the same for the others",
    "max_unpool": "x.new_zeros(N, C, H * W).scatter(2, indices.flatten(2), x.flatten(2)).view(N, C, H, W)",
    "nll_loss2d": 'F.cross_entropy(x, target, reduction="none").sum()',
    "embedding_bag": "F.embedding(indices, weight).max(1).values",
    "bincount": "torch.zeros(n).to(weights).index_add(0, x, weights)",
    "median": "x.sort(dim).values.select(dim, (x.shape[dim] - 1) // 2)",
    "kthvalue": "x.sort(dim).values.select(dim, k - 1)",
    "put": "x.flatten().index_copy(0, indices, values).view_as(x)",
}


def _averages(values: Mapping[str, Any]) -> bool:
    return bool(values["reduction"] != 0)


def _takes_the_largest(values: Mapping[str, Any]) -> bool:
    return bool(values["mode"] == 2)


# The operations that torch 2.13 refuses on GPUs under use_deterministic_algorithms, by ATen's names. Some are refused
# only with certain arguments. Source: alertNotDeterministic in ATen/native/cuda, and its tests in test/test_torch.py.
# Left out are operations that torch.nn.functional then computes in another way: bilinear and trilinear upsampling,
# MaxPool3d, replication padding.
_REFUSED: dict[str, Callable[[Mapping[str, Any]], bool] | None] = dict.fromkeys(
    (
        "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward", "avg_pool3d_backward",
        "adaptive_max_pool2d_backward", "adaptive_max_pool3d_backward",
        "fractional_max_pool2d_backward", "fractional_max_pool3d_backward", "max_unpool2d", "max_unpool3d",
        "upsample_linear1d_backward", "upsample_bicubic2d_backward",
        "_upsample_bilinear2d_aa_backward", "_upsample_bicubic2d_aa_backward",
        "reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward",
        "_ctc_loss_backward", "grid_sampler_2d_backward", "grid_sampler_3d_backward", "index_reduce", "put", "put_",
    )
)  # fmt: skip
_REFUSED |= {
    "nll_loss2d_forward": _averages,
    "_embedding_bag_dense_backward": _takes_the_largest,
    "bincount": lambda values: values.get("weights") is not None,
    "histc": lambda values: bool(values["self"].is_floating_point()),
    "median": lambda values: "dim" in values,
    "nanmedian": lambda values: "dim" in values,
}
_TORCH_SAYS = re.compile(r"^(.+?) does not have a deterministic implementation")


class Operation(NamedTuple):
    """An operation that was called: its name, and where: a module, or "" outside of all."""

    name: str
    where: str


class Watch(TorchDispatchMode):
    """Notes the operations that a GPU would refuse, and the last operation of all, while the mode is entered.

    An operation of a backward belongs to the module in whose forward autograd recorded it.

    Attributes:
        refused: in the order of their first call.
        last: the last operation. If torch has refused an operation, it is this one.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.refused: list[Operation] = []
        self.last: Operation | None = None
        self._model = model
        self._open: list[tuple[str, int]] = []  # modules whose forward is going on, and autograd's count at its start
        self._ended: list[tuple[int, int, str]] = []  # the counts at the start and the end of a forward

    @contextlib.contextmanager
    def modules(self) -> Iterator[None]:
        """Enters this mode, and follows the forwards of the model's modules."""
        handles: list[Any] = []
        for name, module in self._model.named_modules():
            title = f"the module {name} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
            handles.append(module.register_forward_pre_hook(lambda *_, title=title: self._open.append((title, _now()))))
            handles.append(module.register_forward_hook(lambda *_: self._close(), always_call=True))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _close(self) -> None:
        title, began = self._open.pop()
        self._ended.append((began, _now(), title))

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func._overloadpacket.__name__
        self.last = Operation(name, self._where())
        if name in _REFUSED and self.last not in self.refused:
            values = dict(zip((a.name for a in func._schema.arguments), args)) | dict(kwargs or {})
            if (condition := _REFUSED[name]) is None or condition(values):
                self.refused.append(self.last)
        return func(*args, **(kwargs or {}))

    def _where(self) -> str:
        node = torch._C._current_autograd_node()
        if node is None:
            return self._open[-1][0] if self._open else ""
        number = node._sequence_nr()
        # Inner modules end first.
        return next((title for began, ended, title in self._ended if began <= number < ended), "")


def _now() -> int:
    """The number that autograd gives to the next node."""
    return int(torch._C._autograd._get_sequence_nr())


def sentence(operation: Operation) -> str:
    """What uses an operation, and what to use instead."""
    where = operation.where or "forward() or loss()"
    name = operation.name.strip("_")
    substitute = next((how for part, how in SUBSTITUTES.items() if name.startswith(part)), None)
    if substitute is None:
        return (
            f"{where} uses {name}. Nothing in torch computes exactly the same: use another layer, or train on the CPU"
        )
    return f"{where} uses {name}. This computes the same, up to rounding: {substitute}"


def refusal(error: BaseException, where: str = "") -> UserError | None:
    """The message for an operation that torch has refused, as a RuntimeError; None for any other error.

    Args:
        error: as torch raised it.
        where: what has called the operation, if that is known.
    """
    found = _TORCH_SAYS.match(str(error)) if isinstance(error, RuntimeError) else None
    if found is None:
        return None
    return UserError(
        "Torch has no kernel on this device that gives the same bits each time for an operation of this task, so it "
        f"cannot be trained exactly.\nHere {sentence(Operation(found[1], where))}"
    )
