"""One pack of two micro-batches, outside of any run: for tests of single calls in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.exact.batch_norm import RunningStatistics
from trainer.exact.packs.findings import Findings
from trainer.exact.packs.leaves import Kept, Leaves
from trainer.exact.packs.pack import Pack
from trainer.exact.packs.streams import Streams

G, KEYS = 2, (5, 6)  # micro-batches of the pack; each seeds the random numbers of one


def pack_of(
    *samples: Tensor, parameters: Sequence[Tensor] = (), statistics: RunningStatistics | None = None, **options: Any
) -> Pack:
    """A pack that is not active, so that nothing is called by itself.

    Args:
        samples: tensors with a part for each micro-batch, one after the other.
        parameters: the trained ones.
        statistics: of normalisation layers; None for none.
        options: others of `Pack`.
    """
    streams = Streams(G, torch.device("cpu"))
    streams.begin(KEYS)
    defaults: dict[str, Any] = {"findings": Findings(), "traces": ()}
    return Pack(
        {id(parameter): place for place, parameter in enumerate(parameters)},
        frozenset(),
        statistics or RunningStatistics(nn.Identity()),
        arrays={str(i): tensor for i, tensor in enumerate(samples)},
        rows=len(samples[0]),
        g=G,
        leaves=Leaves(parameters or [torch.zeros(1)], G, Kept()),
        streams=streams,
        **defaults | options,
    )


def one_by_one(call: Callable[..., Tensor], *samples: Tensor) -> Tensor:
    """What a call gives for one micro-batch at a time, each with memory and random numbers of its own."""
    found = []
    for k, key in enumerate(KEYS):
        torch.manual_seed(key)
        parts = [x.chunk(G)[k] for x in samples]
        found.append(call(*(torch.empty_strided(p.shape, _own(p), dtype=p.dtype).copy_(p) for p in parts)))
    return torch.cat(found)


def _own(part: Tensor) -> Sequence[int]:
    """The strides of a tensor that is made as this part was, and has memory of its own."""
    order = sorted(range(part.dim()), key=part.stride, reverse=True)
    return torch.empty([part.size(d) for d in order]).permute([order.index(d) for d in range(part.dim())]).stride()
