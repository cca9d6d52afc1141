"""What every classification task shares: the weighted loss with its exact count, and its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError


def class_weights(option: Any, names: Sequence[str], labels: np.ndarray) -> Tensor | None:
    """The weight of each class, (classes,) float32, from the option `class_weights`.

    Args:
        option: None; "balanced" (samples / (classes x samples of the class), as in scikit-learn); a list in the order
            of the classes; or {class name: weight}, 1 for those left out.
        names: the classes.
        labels: (samples,) of the training set.

    Raises:
        UserError: it is something else, or a weight is not positive.
    """
    if option is None:
        return None
    if option == "balanced":
        counts = np.bincount(labels, minlength=len(names)).clip(min=1)
        return torch.tensor(len(labels) / (len(names) * counts), dtype=torch.float32)
    if isinstance(option, dict):
        unknown = [name for name in option if name not in names]
        if unknown:
            raise UserError(
                f'"trainer.task_options.class_weights" names the class "{unknown[0]}". '
                f"The data has: {', '.join(names)}."
            )
        option = [option.get(name, 1.0) for name in names]
    if not isinstance(option, list) or len(option) != len(names):
        raise UserError(
            f'"trainer.task_options.class_weights" is {option!r}. It must be "balanced", one number for each of the '
            f"{len(names)} classes ({', '.join(names)}), or a dictionary of class name -> number."
        )
    if not all(isinstance(w, (int, float)) and not isinstance(w, bool) and w > 0 for w in option):
        raise UserError(f'"trainer.task_options.class_weights" is {option}. Every weight must be a positive number.')
    return torch.tensor(option, dtype=torch.float32)


def counts(labels: Tensor, weights: Tensor | None) -> Tensor | None:
    """What each sample contributes to the loss's count: its class's weight, (samples,); None without weights."""
    return None if weights is None else weights.index_select(0, labels)


def sample_losses(logits: Tensor, labels: Tensor, weights: Tensor | None, smoothing: float) -> Tensor:
    """The cross-entropy of each sample. Their sum divided by `count` is torch's weighted and smoothed mean.

    Args:
        logits: (B, classes), of any floating type; the loss is float32.
        labels: (B,) int64.
        weights: (classes,) float32 on the same device, or None.
        smoothing: share of the target that goes to all classes alike (Szegedy et al. 2016).

    Returns:
        (B,) float32.
    """
    return F.cross_entropy(logits.float(), labels, weight=weights, reduction="none", label_smoothing=smoothing)


def count(labels: Tensor, weights: Tensor | None) -> Any:
    """What the summed loss is divided by: the number of samples, or their summed weight."""
    return len(labels) if weights is None else weights.index_select(0, labels).sum()


def metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, macro-averaged F1 and, where every class occurs, the area under the ROC curve (one against the rest).

    Args:
        logits: (N, classes).
        labels: (N,) int64.
    """
    from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

    logits = logits.double()
    truth, chosen = labels.numpy(), logits.argmax(dim=1).numpy()
    classes = logits.shape[1]
    result = {
        "accuracy": float(accuracy_score(truth, chosen)),
        "macro_f1": float(f1_score(truth, chosen, average="macro", zero_division=0)),
    }
    if len(np.unique(truth)) == classes and bool(torch.isfinite(logits).all()):
        probabilities = torch.softmax(logits, dim=1).numpy()
        if classes == 2:
            result["auroc"] = float(roc_auc_score(truth, probabilities[:, 1]))
        else:
            result["auroc"] = float(roc_auc_score(truth, probabilities, multi_class="ovr", average="macro"))
    return result


def multi_label_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """F1 over all labels (micro) and averaged over the classes (macro), and mean average precision (map).

    A label is predicted where its probability is 0.5 or more. Average precision is that of scikit-learn: the area under
    precision against recall, without interpolation. Its mean is over the classes that occur. If none occurs, there is
    no map.

    Args:
        logits: (N, classes).
        labels: (N, classes) of 0 and 1.
    """
    from sklearn.metrics import average_precision_score, f1_score

    scores, truth = logits.double().numpy(), labels.numpy() > 0.5
    chosen = scores >= 0  # logits: the sigmoid of 0 is 0.5
    result = {
        f"{kind}_f1": float(f1_score(truth, chosen, average=kind, zero_division=0)) for kind in ("micro", "macro")
    }
    there = np.flatnonzero(truth.any(axis=0))
    if len(there) and np.isfinite(scores).all():
        areas = [float(average_precision_score(truth[:, i], scores[:, i])) for i in there]
        result["map"] = sum(areas) / len(areas)
    return result


def why_no_auroc(name: str, names: Sequence[str], labels: Tensor) -> str:
    """Why `metrics` gives no `auroc` for the labels (N,) of a split: the classes that it lacks; or an empty text."""
    lacking = [f'"{names[place]}"' for place in sorted(set(range(len(names))) - set(labels.tolist()))]
    if name != "auroc" or not lacking:
        return ""
    return (
        f"there is no sample of the class{'es' * (len(lacking) > 1)} {', '.join(lacking[:10])} in it, and auroc needs "
        "every class. Add some, or choose another metric"
    )


def columns(logits: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, Sequence[Any]]:
    """Columns for the table of a fold's predictions: target, prediction, and the probability of each class.

    Args:
        logits: (N, classes).
        labels: (N,) int64.
        names: the classes.
    """
    probabilities = torch.softmax(logits.double(), dim=1)
    result: dict[str, Sequence[Any]] = {"target": [names[place] for place in labels.tolist()]}
    result["prediction"] = [names[place] for place in logits.argmax(dim=1).tolist()]
    for place, name in enumerate(names):
        result[f"probability of {name}"] = [round(p, 9) for p in probabilities[:, place].tolist()]
    return result


def predictions(logits: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """For each row of logits (B, classes): {"label": name, "score": its probability}."""
    probabilities = torch.softmax(logits.double(), dim=1).cpu()
    scores, places = probabilities.max(dim=1)
    return [{"label": names[p], "score": round(s, 6)} for p, s in zip(places.tolist(), scores.tolist())]
