"""The pieces of one pack of two or more micro-batches, without a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.exact.batch_norm import RunningStatistics
from trainer.exact.packs.derived import Derived
from trainer.exact.packs.findings import Findings
from trainer.exact.packs.layers import Rule, Site, cut
from trainer.exact.packs.leaves import Kept, Leaves
from trainer.exact.packs.shares import Shares
from trainer.exact.packs.sites import Sites
from trainer.exact.packs.streams import Streams
from trainer.exact.packs.tensors import NUMBERS, PARTED, Tensors

CPU = torch.device("cpu")


class Pieces:
    """What a `Pack` has, each piece by its name.

    Args:
        parameters: the trained ones.
        g: micro-batches.
        trial: whether layers are compared.
        model: has normalisation layers.
        constants: tensors of the model that are not trained.
    """

    def __init__(
        self,
        *parameters: Tensor,
        g: int = 2,
        trial: bool = True,
        model: nn.Module | None = None,
        constants: Sequence[Tensor] = (),
    ) -> None:
        self.g, self.parameters = g, parameters or (trained(1),)
        self.kept, self.findings = Kept(), Findings()
        self.leaves = Leaves(self.parameters, g, self.kept)
        places = {id(parameter): place for place, parameter in enumerate(self.parameters)}
        self.tensors = Tensors(places, frozenset(map(id, constants)), {})
        self.statistics = RunningStatistics(nn.Identity() if model is None else model)
        self.shares = Shares(g, self.tensors, self.leaves, self.statistics)
        self.streams = Streams(g, CPU)
        self.streams.begin(range(g))
        self.derived = Derived(self.tensors, self.leaves)
        pieces = {"tensors": self.tensors, "shares": self.shares, "streams": self.streams}
        self.sites = Sites(g, self.leaves, findings=self.findings, checks=trial, **pieces)  # type: ignore[arg-type]

    def parted(self, tensor: Tensor) -> Tensor:
        """The tensor, of which each micro-batch has a part."""
        return self.tensors.mark(tensor, PARTED)

    def numbers(self, tensor: Tensor) -> Tensor:
        """The tensor, which has one number for each micro-batch."""
        return self.tensors.mark(tensor, NUMBERS)

    def gradients(self) -> dict[int, list[list[float] | None]]:
        """What the parameters have got: place -> one gradient a micro-batch, None where there is none."""
        self.leaves.finish()
        return {
            place: [row.flatten().tolist() if present is None or present[k] else None for k, row in enumerate(rows)]
            for place, rows, present in self.kept.taken
        }


def trained(*shape: int) -> Tensor:
    """A trained parameter: 1, 2, 3 and so on."""
    size = int(torch.tensor(shape).prod()) if shape else 1
    return torch.arange(1.0, 1.0 + size).view(shape).requires_grad_()


def one_by_one(site: Site, x: Tensor, *rest: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A rule's forward that is right on every processor."""
    return torch.cat([site.call(own, *rest, place=k) for k, own in enumerate(cut(x, site.g))]), ()


RIGHT = Rule(one_by_one, lambda site, *values: site.alone(*values))
