"""The floating-point operations of a model's forward and backward: counted once, then known for every step.

For this a micro-batch is computed once more, under a mode of torch's dispatcher that sees every operation. Its results
are thrown away. They may have other bits, because torch takes other paths in places while a mode is active. Afterwards
the rehearsal restores generators, parameters, buffers and Python's state, as after everything that it computes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from ..exact.micro_batches import GlobalBatch
from .stage import Item, Stage


class ModelFlops(NamedTuple):
    """The operations of a sample's forward and backward; a multiplication and an addition are two.

    Attributes:
        linear: operations for each position of a sample; for the whole sample if samples have no lengths.
        quadratic: operations for each pair of positions, as in attention. It follows from the counts at two lengths.
    """

    linear: float
    quadratic: float = 0.0

    def of(self, batch: GlobalBatch) -> float:
        """The operations of a step of all ranks. It computes with numbers of the host, and waits for nothing."""
        if batch.longest is None:
            return self.linear * len(batch.indices)
        return sum(
            (stop - start) * length * (self.linear + self.quadratic * length)
            for (start, stop), length in zip(batch.bounds, batch.longest)
        )


def count(stage: Stage) -> ModelFlops | str:
    """The operations; or a text that says why they cannot be counted. The caller restores what micro-batches change."""
    if not stage.exact:
        return "with ZeRO, no rank has whole gradients"
    items, longest = stage.items[:1], stage.items[0].batch.longest
    if longest is not None:
        ordered = sorted(stage.items, key=_length)
        items = [ordered[0], ordered[-1]]
        if _length(items[0]) == _length(items[1]):
            items = items[:1]
    found: list[tuple[int, float]] = []
    for item in items:
        try:
            counter = _counted(stage, item)
        except Exception as error:  # of any kind: a mode may meet what it does not support, and memory may run out
            return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:100]}".rstrip(": ")
        if counter.unknown is not None:
            return f"torch has no formula for {counter.unknown}"
        length = 1 if longest is None else _length(item)
        found.append((length, counter.total / item.samples / length))
    return _through(found)


def _length(item: Item) -> int:
    assert item.batch.longest is not None
    return max(1, item.batch.longest[item.j])


def _through(found: Sequence[tuple[int, float]]) -> ModelFlops:
    """The operations as a function of the length, from (length, operations for each position) at one or two lengths."""
    (short, low), (long, high) = found[0], found[-1]
    quadratic = (high - low) / (long - short) if long > short else 0.0
    return ModelFlops(low - quadratic * short, quadratic)


def _counted(stage: Stage, item: Item) -> _Counter:
    counter, scale = _Counter(), torch.ones((), device=stage.subject.device)
    micro_batches = stage.micro_batches
    chunk = range(item.j, item.j + 1)
    (arrays,) = micro_batches.samples(item.batch, chunk, micro_batches.augments_in_chunks)
    # Compiled code runs kernels that no mode sees, so the model is computed without it.
    eager = torch.compiler.set_stance("force_eager") if stage.engine.compiled else contextlib.nullcontext()
    stage.statistics.begin()
    try:
        with eager, counter:
            loss = micro_batches.forward(item.batch, item.j, arrays).result[0]
            torch.autograd.grad(loss, stage.engine.parameters, scale, allow_unused=True)
    finally:
        stage.statistics.settle()
    return counter


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> float:
    return float(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> float:
    return float(sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape))


_aten = torch.ops.aten
# Attention on the CPU. Torch's table has only the kernels for GPUs.
_MORE: dict[Any, Callable[..., float]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
# Operations that multiply matrices, but are not in torch's table. A count without them would be far too low. All other
# operations of aten without a formula count as 0, as in torch's own counter.
_UNKNOWN = {
    "_cudnn_rnn", "miopen_rnn", "mkldnn_rnn_layer",  # LSTM, GRU and RNN in one kernel
    "linear", "matmul", "einsum", "lstm", "gru",  # only seen whole in inference mode
    "_grouped_mm", "_scaled_grouped_mm", "_int_mm", "addbmm", "_scaled_dot_product_fused_attention_overrideable",
    "_cdist_forward", "_trilinear", "_sparse_addmm", "_sparse_mm",
}  # fmt: skip
_NAMESPACES = {"aten", "prim", "prims"}


class _Counter(TorchDispatchMode):
    """Adds up the operations of everything that torch computes, by the formulas of its own counter.

    torch's own `FlopCounterMode` puts hooks on all modules as well, and skips what it does not know.

    Attributes:
        total: floating-point operations.
        unknown: an operation that cannot be counted; None if there was none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0
        self.unknown: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        formula = flop_registry.get(packet)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        elif packet in _MORE:
            self.total += _MORE[packet](*args, **(kwargs or {}))
        elif func.namespace not in _NAMESPACES or packet.__name__ in _UNKNOWN:
            self.unknown = f"{func.namespace}.{packet.__name__}"
        return out
