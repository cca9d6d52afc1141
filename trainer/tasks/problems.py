"""What tasks on texts and images share: loss, metrics and predictions of one class, several classes, or a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.task_options import refuse
from ..data import targets
from ..data.preparation import Numeric
from ..errors import UserError
from ..exact.splits import Batch
from . import classification, regression


class OneClass:
    """One class a sample: cross-entropy."""

    best_metric = ("accuracy", "max")

    def __init__(self, class_weights: Any = None, smoothing: float = 0.0, separator: str = targets.SEPARATOR) -> None:
        self.names: list[str] = []
        self.target: Numeric | None = None  # of numbers: their mean and deviation
        self._option, self._smoothing, self._separator = class_weights, smoothing, separator
        self._weights: Tensor | None = None  # (classes,) float32

    @property
    def outputs(self) -> int:
        """How many numbers the model gives for a sample."""
        return len(self.names)

    def settle(self, names: Sequence[str], train: Tensor) -> None:
        """Takes what the training split decides. train: its labels, as `targets.numbered` gives them."""
        self.names = list(names)
        self._weights = classification.class_weights(self._option, names, train.numpy())

    def said(self) -> str:
        """What is learnt, for messages."""
        if self.target is not None:
            return "one number to predict"
        return f"{len(self.names)} classes ({', '.join(self.names[:10])})"

    def labels(self, values: Tensor) -> Tensor:
        """What a split holds of labels that `targets.numbered` gave."""
        return values

    def counts(self, labels: Tensor) -> Tensor | None:
        """What each sample contributes to the loss's count, (samples,); None for 1 each."""
        return classification.counts(labels, self._weights)

    def outputs_of(self, logits: Tensor) -> Tensor:
        """The outputs of a task for the logits (B, outputs)."""
        return logits

    def _weights_on(self, device: torch.device) -> Tensor | None:
        if self._weights is not None and self._weights.device != device:
            # The first call may be an evaluation's, and a tensor made in inference mode cannot be used in a backward.
            with torch.inference_mode(False):
                self._weights = self._weights.to(device)  # once
        return self._weights

    def sample_losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The loss of each sample, (B,) float32."""
        return classification.sample_losses(outputs, labels, self._weights_on(outputs.device), self._smoothing)

    def count(self, labels: Tensor) -> Any:
        """What the summed loss is divided by: the number of samples, or their summed weight."""
        return classification.count(labels, self._weights_on(labels.device))

    def metrics(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Accuracy, macro-averaged F1, and the area under the ROC curve where every class occurs."""
        return classification.metrics(outputs, labels)

    def why_without(self, name: str, labels: Tensor) -> str:
        """Why a split with these labels has no metric of this name; an empty text where nothing is known."""
        return classification.why_no_auroc(name, self.names, labels)

    def predictions(self, outputs: Tensor) -> list[dict[str, Any]]:
        """A dictionary for each row: {"label", "score"}."""
        return classification.predictions(outputs, self.names)

    def columns(self, outputs: Tensor, labels: Tensor) -> dict[str, Sequence[Any]]:
        """Columns for the table of a fold's predictions: target, prediction, and the probability of each class."""
        return classification.columns(outputs, labels, self.names)


class SeveralClasses(OneClass):
    """Any number of classes a sample: the binary cross-entropy of each class, and their mean."""

    best_metric = ("map", "max")

    def settle(self, names: Sequence[str], train: Tensor) -> None:
        """As of one class. A class's weight is that of its presence against its absence."""
        self.names = list(names)
        if self._option == "balanced":
            present = train.double().sum(0)
            # At least 1e-3: with the weight 0, the presence of a label that every sample has would cost nothing.
            self._weights = ((len(train) - present) / present.clamp(min=1)).clamp(min=1e-3).float()
        else:
            self._weights = classification.class_weights(self._option, names, np.zeros(0, np.int64))

    def counts(self, labels: Tensor) -> None:
        """Each sample counts once."""
        return

    def sample_losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The mean over the classes of each sample's binary cross-entropy, (B,) float32."""
        weights = self._weights_on(outputs.device)
        losses = F.binary_cross_entropy_with_logits(outputs.float(), labels, pos_weight=weights, reduction="none")
        return losses.mean(dim=1)

    def count(self, labels: Tensor) -> int:
        """The number of samples."""
        return len(labels)

    def metrics(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """F1 over all labels and averaged over the classes, and mean average precision."""
        return classification.multi_label_metrics(outputs, labels)

    def why_without(self, name: str, labels: Tensor) -> str:
        """Why a split with these labels has no metric of this name."""
        return "none of its samples has a label" if name == "map" else ""

    def predictions(self, outputs: Tensor) -> list[dict[str, Any]]:
        """{"labels"}: the classes of probability 0.5 or more, in one text, and {"score_CLASS"}: each probability."""
        rows = []
        for row in torch.sigmoid(outputs.double()).cpu().tolist():
            chosen = self._separator.join(name for name, score in zip(self.names, row) if score >= 0.5)
            scores = {f"score_{name}": round(score, 6) for name, score in zip(self.names, row)}
            rows.append({"labels": chosen} | scores)
        return rows

    def columns(self, outputs: Tensor, labels: Tensor) -> dict[str, Sequence[Any]]:
        """Target and prediction: the labels in one text. Then the probability of each."""
        probabilities = torch.sigmoid(outputs.double()).cpu()

        def joined(present: Tensor) -> list[str]:
            return [self._separator.join(n for n, there in zip(self.names, row) if there) for row in present.tolist()]

        result: dict[str, Sequence[Any]] = {"target": joined(labels > 0.5), "prediction": joined(outputs >= 0)}
        for place, name in enumerate(self.names):
            result[f"probability of {name}"] = [round(p, 9) for p in probabilities[:, place].tolist()]
        return result


class Number(OneClass):
    """A number a sample, standardised by the training split: the squared error."""

    best_metric = ("rmse", "min")

    @property
    def outputs(self) -> int:
        """One."""
        return 1

    def settle(self, names: Sequence[str], train: Tensor) -> None:
        """Takes the mean and the deviation. Raises UserError if all numbers are alike."""
        self.target = regression.standard("", train.numpy())

    def labels(self, values: Tensor) -> Tensor:
        """(samples,) float32, standardised."""
        assert self.target is not None
        return ((values - self.target.mean) / self.target.deviation).float()

    def counts(self, labels: Tensor) -> None:
        """Each sample counts once."""
        return

    def outputs_of(self, logits: Tensor) -> Tensor:
        """(B, 1) -> (B,)."""
        return logits.flatten()

    def sample_losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The squared error of each standardised number, (B,) float32."""
        return (outputs.float() - labels).square()

    def count(self, labels: Tensor) -> int:
        """The number of samples."""
        return len(labels)

    def metrics(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """R2, the mean absolute error and the root mean squared error, in the units of the data."""
        assert self.target is not None
        truth = regression.in_units(labels, self.target)
        return regression.metrics(regression.in_units(outputs, self.target), truth)

    def why_without(self, name: str, labels: Tensor) -> str:
        """Why a split with these labels has no metric of this name."""
        return regression.why_no_r2(name)

    def predictions(self, outputs: Tensor) -> list[dict[str, Any]]:
        """{"value"} of each row, in the units of the data."""
        assert self.target is not None
        return [{"value": value} for value in regression.in_units(outputs.cpu(), self.target).tolist()]

    def columns(self, outputs: Tensor, labels: Tensor) -> dict[str, Sequence[Any]]:
        """Target and prediction, in the units of the data."""
        assert self.target is not None
        return regression.columns(outputs, labels, self.target)


def problem(wanted: targets.Wish, class_weights: Any, smoothing: float) -> OneClass:
    """What `problem_type` asks for. Raises UserError if another option has no effect on it."""
    if wanted.problem != targets.ONE and smoothing:
        refuse("label_smoothing", smoothing, f'left out with "problem_type": "{wanted.problem}"')
    if wanted.problem == targets.NUMBER and class_weights is not None:
        raise UserError('"trainer.task_options.class_weights" has no effect where numbers are predicted. Leave it out.')
    kinds = {targets.ONE: OneClass, targets.SEVERAL: SeveralClasses, targets.NUMBER: Number}
    return kinds[wanted.problem](class_weights, smoothing, wanted.separator or targets.SEPARATOR)


class WithProblem:
    """The methods that a task with an array `label` leaves to its problem."""

    _problem: OneClass

    def loss(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Any]:
        """The summed loss, and the number of samples or their summed class weights."""
        return self.sample_losses(outputs, batch).sum(), self._problem.count(batch["label"])

    def sample_losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The loss of each sample, (B,)."""
        return self._problem.sample_losses(outputs, batch["label"])

    def metrics(self, outputs: Tensor, batch: Batch) -> dict[str, float]:
        """Accuracy, macro-F1 and AUROC; or micro-F1, macro-F1 and mean average precision; or R2, MAE and RMSE."""
        return self._problem.metrics(outputs, batch["label"])

    def why_without(self, name: str, batch: Batch) -> str:
        """Why a split has no metric of this name; an empty text where nothing is known."""
        return self._problem.why_without(name, batch["label"])

    def predictions(self, outputs: Tensor, batch: Batch) -> dict[str, Sequence[Any]]:
        """Of each sample: target and prediction, and the probability of each class."""
        return self._problem.columns(outputs, batch["label"])


_LABEL_KEYS = ("num_labels", "id2label", "label2id")


def named_outputs(names: Sequence[str], wanted: targets.Wish) -> dict[str, Any]:
    """What a transformers configuration says of a model's outputs."""
    # A base model may have been trained for another problem.
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": wanted.problem,
    }


def without_labels(spec: Mapping[str, Any], outputs: int, said: str) -> dict[str, Any]:
    """A `model` option without its keys on labels. Raises UserError if it has another number of outputs.

    Args:
        spec: the option.
        outputs: how many the data asks for.
        said: what the data has, for the message ("3 classes (a, b, c)").
    """
    named = spec.get("id2label", spec.get("label2id"))
    told = spec.get("num_labels", len(named) if isinstance(named, (Mapping, list)) else named)
    if told is not None and told != outputs:
        raise UserError(
            f'"trainer.task_options.model" is for {told} classes, but the data has {said}. Leave num_labels and '
            "id2label out: they follow from the data."
        )
    return {name: value for name, value in spec.items() if name not in _LABEL_KEYS}
