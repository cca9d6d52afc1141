"""The networks of the task `tabular`: a multilayer perceptron and a residual one.

Both are those of Gorishniy, Rubachev, Khrulkov and Babenko (2021), "Revisiting deep learning models for tabular data",
section 3; the second is their "ResNet". Linear layers, ReLU and dropout, written anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]
NORMS: dict[str, Norm] = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "none": lambda width: nn.Identity()}
# Units inside a block of the residual network, as a multiple of those between blocks.
EXPANSION = 2


def embedding_size(categories: int) -> int:
    """Numbers that stand for a category: fastai's rule, min(600, 1.6 n^0.56) (Howard and Gugger 2020)."""
    return min(600, round(1.6 * categories**0.56))


class Inputs(nn.Module):
    """Numbers and embedded categories, side by side.

    Args:
        numbers: how many numbers a row has.
        categories: of each column of categories, how many there are.
        size: of every embedding; 0 for `embedding_size`.
    """

    def __init__(self, numbers: int, categories: Sequence[int], size: int) -> None:
        super().__init__()
        # Row 0 of an embedding is the missing or unknown category, hence n + 1.
        self.embeddings = nn.ModuleList(nn.Embedding(n + 1, size or embedding_size(n + 1)) for n in categories)
        # If no value is missing in the training split, nothing is learnt for row 0. Then it must add nothing.
        for embedding in self.embeddings:
            with torch.no_grad():
                embedding.weight[0].zero_()  # type: ignore[index]
        self.width = numbers + sum(size or embedding_size(n + 1) for n in categories)

    def forward(self, numbers: Tensor | None, categories: Tensor | None) -> Tensor:
        """(B, numbers) float32, (B, columns) int64 -> (B, width)."""
        parts = [] if numbers is None else [numbers]
        if categories is not None:
            parts += [embed(column) for embed, column in zip(self.embeddings, categories.unbind(1))]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class MLP(nn.Module):
    """`depth` hidden layers: linear, norm if any, ReLU, dropout."""

    def __init__(self, inputs: Inputs, outputs: int, width: int, depth: int, dropout: float, norm: Norm) -> None:
        super().__init__()
        self.inputs = inputs
        widths = [inputs.width, *[width] * depth]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), norm(after), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], outputs)

    def forward(self, numbers: Tensor | None, categories: Tensor | None) -> Tensor:
        """(B, numbers) float32, (B, columns) int64 -> (B, outputs)."""
        return self.head(self.layers(self.inputs(numbers, categories)))


class Block(nn.Module):
    """x + dropout(linear(dropout(ReLU(linear(norm(x))))))."""

    def __init__(self, width: int, dropout: float, norm: Norm) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            norm(width),
            nn.Linear(width, EXPANSION * width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(EXPANSION * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, width) -> (B, width)."""
        return x + self.layers(x)


class ResNet(nn.Module):
    """A linear layer, `depth` blocks, then norm, ReLU and a linear layer."""

    def __init__(self, inputs: Inputs, outputs: int, width: int, depth: int, dropout: float, norm: Norm) -> None:
        super().__init__()
        self.inputs = inputs
        self.stem = nn.Linear(inputs.width, width)
        self.blocks = nn.Sequential(*(Block(width, dropout, norm) for _ in range(depth)))
        self.head = nn.Sequential(norm(width), nn.ReLU(), nn.Linear(width, outputs))

    def forward(self, numbers: Tensor | None, categories: Tensor | None) -> Tensor:
        """(B, numbers) float32, (B, columns) int64 -> (B, outputs)."""
        return self.head(self.blocks(self.stem(self.inputs(numbers, categories))))
