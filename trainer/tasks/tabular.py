"""Classifies the rows of a table, or predicts a number for each, from columns of numbers and of categories.

The training split decides means, deviations, categories and classes. They are computed once, and saved with the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..config.schema import option, read_json
from ..config.task_options import read_options, refuse, required
from ..data import features, held_out, preparation, report, sources, tables
from ..data.cache import Cached, cached
from ..data.cut import Cut, together
from ..data.features import FEW, Column, Wish
from ..data.preparation import Preparation
from ..data.table_files import Table
from ..errors import UserError
from ..exact.splits import Batch, Split
from ..wording import counted
from . import classification, regression
from .first_look import LABEL_COLUMNS
from .hub_options import DataOptions, FormatOptions
from .tabular_models import MLP, NORMS, Inputs, ResNet
from .weights import load_weights

# The file beside model.safetensors that says how a table becomes inputs.
COLUMNS = "columns.json"
# Increase it when the arrays of a cache file change their meaning.
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class TabularOptions(DataOptions, FormatOptions):
    """The options of `tabular`."""

    data: Any = required(
        "a csv, tsv, json, jsonl or parquet file (also .gz); a folder of such; a pattern of files; a name on the "
        "dataset hub; or {split: any of these}"
    )
    label_column: str | None = option(None, "the column to predict; the usual names are found")
    problem: Literal["classification", "regression"] | None = option(
        None,
        "without it, texts, true and false, and up to 20 different whole numbers are classes; other numbers are "
        "predicted as numbers. A note says which was chosen",
    )
    numeric_columns: list[str] = option([], "columns that are read as numbers, whatever they seem to be")
    categorical_columns: list[str] = option([], "columns that are read as categories: the same")
    ignored_columns: list[str] = option([], "columns that are not used as features")
    missing_values: list[str] = option([], 'texts that mark a missing value, such as "?"; an empty field always does')
    model: Literal["mlp", "resnet"] = option(
        "resnet", "a multilayer perceptron, or a residual network (Gorishniy et al. 2021)"
    )
    width: int = option(128, "units of a hidden layer, or between the residual blocks", minimum=1, maximum=8192)
    depth: int = option(2, "hidden layers, or residual blocks", minimum=1, maximum=100)
    dropout: float = option(0.1, "probability of zeroing a unit", minimum=0, maximum=0.99)
    norm: Literal["batch", "layer", "none"] | None = option(
        None, "of hidden units; without it batch for the resnet and none for the mlp, as in Gorishniy et al. 2021"
    )
    embedding_size: int = option(
        0, "numbers that stand for a category; 0 for min(600, 1.6 n^0.56) of n categories", minimum=0, maximum=4096
    )
    validation_fraction: float = option(
        0.1, "of the training set, of each class, if the data has no validation split; 0 for none", minimum=0, below=1
    )
    test_fraction: float = option(0.0, "the same for the test split", minimum=0, below=1)
    label_smoothing: float = option(
        0.0, "of classification: share of the target that goes to all classes alike", minimum=0, below=1
    )
    class_weights: Any = option(None, 'of classification: "balanced", a list, or {class: weight}')


class Tabular:
    """Predicts a column of a table from the others. Its arguments are `TabularOptions`."""

    Options = TabularOptions
    random_weights = True

    def __init__(self, **given: Any) -> None:
        o = read_options(TabularOptions, given)
        sources.check_data(o.data, o.config_name)
        held_out.check_fractions(o.validation_fraction, o.test_fraction)
        if any(not mark.strip() for mark in o.missing_values):
            refuse("missing_values", o.missing_values, "texts that are not blank: a blank field is missing anyway")
        self._o = o
        self._how = tables.checked_format(o.separator, o.encoding)
        marks = frozenset(mark.strip() for mark in o.missing_values)
        self._wish = Wish(o.numeric_columns, o.categorical_columns, o.ignored_columns, marks)
        self.notes: list[str] = []
        self.data_lines: list[str] = []
        self.best_metric = ("loss", "min")
        self._preparation: Preparation | None = None
        self._weights: Tensor | None = None  # (classes,) float32
        if o.problem is not None:
            self._settle_problem(o.problem)

    def _settle_problem(self, problem: str) -> None:
        self.pipeline_tag = f"tabular-{problem}"
        self.best_metric = ("accuracy", "max") if problem == "classification" else ("rmse", "min")
        for name in ("label_smoothing", "class_weights"):
            if problem == "regression" and getattr(self._o, name):
                refuse(name, getattr(self._o, name), "left out: numbers are predicted here (regression), not classes")

    # --- data ---------------------------------------------------------------------------------------------------------

    def splits(self, cut: Cut | None = None) -> dict[str, Split]:
        """Arrays: numbers (N, inputs) float32, categories (N, columns) int64, label (N,) int64 or standardised float32.

        Without a column of numbers or categories, there is no such array. With `cut`, the splits of a fold.
        """
        o = self._o
        content, found = tables.content_of(o.data, self._read)
        key = {
            "version": _VERSION,
            "data": content,
            "format": [o.separator, o.encoding],
            "columns": [o.split_column, o.label_column, o.group_column, o.problem],
            "features": [o.numeric_columns, o.categorical_columns, o.ignored_columns, sorted(self._wish.missing)],
            "held_out": [o.test_fraction, o.validation_fraction, o.split_seed],
            "one_file": isinstance(o.data, str),
        }
        if cut is None:
            arrays, facts = cached("tabular", key, lambda: self._build(found or self._read()))
        else:
            arrays, facts = self._build(found or self._read(), cut)
        self._preparation = preparation.from_json(facts["preparation"], "the cache")
        self._settle_problem("classification" if self._preparation.classes else "regression")
        self.data_lines[:], self.notes[:] = facts["read"], facts["notes"]
        if self._preparation.classes:
            names, labels = self._preparation.classes, arrays["train.label"].numpy()
            self._weights = classification.class_weights(o.class_weights, names, labels)
        result = {}
        for split in facts["splits"]:
            own = {n: arrays[f"{split}.{n}"] for n in ("numbers", "categories", "label") if f"{split}.{n}" in arrays}
            result[split] = Split(own, classification.counts(own["label"], self._weights))
        return result

    def _read(self) -> dict[str, Table]:
        o = self._o
        return tables.read(o.data, config_name=o.config_name, split_column=o.split_column, how=self._how)

    def _build(self, found: dict[str, Table], cut: Cut | None = None) -> Cached:
        """What the cache keeps: arrays by "split.name", and facts."""
        o, train = self._o, found["train"]
        label = tables.find_column(train.column_names, o.label_column, LABEL_COLUMNS, "label_column")
        notes = tables.notes_of(found)
        found = self._with_labels(found, label, notes)
        if cut is not None:
            found = together(cut, found, [label, *([] if o.group_column is None else [o.group_column])])
            train = found["train"]
        columns = [c for c in train.column_names if c not in (label, o.group_column, o.split_column)]
        whole = features.find(train, columns, self._wish, notes)
        kinds = {column: features.kind_of(values) for column, values in whole.items()}
        read = {s: features.read(t, kinds, s, self._wish.missing) for s, t in found.items() if s != "train"}
        labels, classes = self._labels(found, label, notes)

        wanted = {"test": o.test_fraction, "validation": o.validation_fraction}
        wanted = {name: part for name, part in wanted.items() if name not in found}
        groups = tables.groups(train, o.group_column, "train")
        strata = labels["train"] if classes else None
        if cut is None:
            chosen = held_out.held_out(len(train), wanted, o.split_seed, strata, groups)
        else:
            chosen = cut(len(train), strata, groups)
        every = labels["train"]
        for name, rows in chosen.items():
            read[name] = {c: features.rows_of(values, rows) for c, values in whole.items()}
            labels[name] = every[rows]
        read, labels = sources.in_order(read), sources.in_order(labels)

        fitted = Preparation(label, *preparation.fit(read["train"], notes), classes)
        if not fitted.kinds:
            raise UserError('"trainer.task_options.data": each column has only one value in train. Add other columns.')
        if not classes:
            fitted = replace(fitted, target=regression.standard(label, labels["train"]))
        arrays = self._arrays(fitted, read, labels, notes)
        described = [
            report.rows_line(
                {split: len(values) for split, values in labels.items()},
                list(found),
                groups=report.Groups(o.group_column, tables.parted(groups, chosen)),
            ),
            _label_line(fitted, labels),
            *preparation.described(fitted),
            *_not_read(train.column_names, [label, o.group_column, *fitted.kinds]),
            _sample_line(train, int(chosen["train"][0]), fitted),
        ]
        facts = {"splits": list(read), "preparation": fitted.as_json(), "notes": notes, "read": described}
        return arrays, facts

    def _with_labels(self, found: dict[str, Table], label: str, notes: list[str]) -> dict[str, Table]:
        """Leaves out splits without labels, such as the test.csv of a competition. Raises UserError for a named one."""
        kept = {}
        for split, table in found.items():
            if label in table.column_names:
                kept[split] = table
            elif not isinstance(self._o.data, str):  # the user named each of them
                tables.find_column(table.column_names, label, (), "label_column", where=split)
            else:
                notes.append(f'{counted(len(table), "row")} of {split} left out: there is no column "{label}"')
        return kept

    def _labels(
        self, found: Mapping[str, Table], label: str, notes: list[str]
    ) -> tuple[dict[str, np.ndarray], list[str]]:
        """Of each split (rows,): int64 positions in the classes, or float64 numbers; and the classes."""
        train = found["train"]
        for split, table in found.items():
            values = tables.values_of(table, label, split)
            marked = [None if str(value).strip() in self._wish.missing else value for value in values]
            tables.check_complete(marked, split, label)
        values = tables.labels(train, label, "train")
        problem: str | None = self._o.problem
        if problem is None:
            problem, why = _problem(values, train, label)
            notes.append(f"this is {problem}, because {why}")
        if problem == "regression":
            return {s: features.read_numbers(t, label, s, (), target=True) for s, t in found.items()}, []
        numbers, wrong = features.parsed(train, label, "train")
        if not len(wrong) and (numbers % 1).any() and label not in train.classes:
            raise UserError(
                f'"trainer.task_options.problem" is "classification", but "{label}" holds fractions, such as '
                f'{values[int(np.flatnonzero(numbers % 1)[0])]}, which are not classes. Leave "problem" out.'
            )
        by_split = {s: values if s == "train" else tables.labels(t, label, s) for s, t in found.items()}
        classes = tables.class_names(by_split, tables.declared_names(train, label))
        return {s: tables.label_numbers(own, classes) for s, own in by_split.items()}, classes

    def _arrays(
        self,
        fitted: Preparation,
        read: Mapping[str, Mapping[str, Column]],
        labels: Mapping[str, np.ndarray],
        notes: list[str],
    ) -> dict[str, Tensor]:
        every = {}
        for split, columns in read.items():
            label = labels[split]
            if fitted.target is not None:
                label = ((label - fitted.target.mean) / fitted.target.deviation).astype(np.float32)
            every[split] = {**fitted.encode(columns, split, notes), "label": label}
        notes += report.copies_notes(every)
        return {f"{s}.{name}": torch.from_numpy(array) for s, own in every.items() for name, array in own.items()}

    # --- model --------------------------------------------------------------------------------------------------------

    def model(self) -> nn.Module:
        """Numbers (B, inputs), categories (B, columns) -> logits (B, classes), or (B, 1)."""
        p, o = self._preparation, self._o
        assert p is not None, "splits() or load() comes first"
        inputs = Inputs(p.inputs, [len(column.categories) for column in p.categorical], o.embedding_size)
        norm = NORMS[o.norm or {"mlp": "none", "resnet": "batch"}[o.model]]
        network = {"mlp": MLP, "resnet": ResNet}[o.model]
        return network(inputs, len(p.classes) or 1, o.width, o.depth, o.dropout, norm)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits (B, classes), or the standardised target (B,)."""
        outputs = model(batch.get("numbers"), batch.get("categories"))
        assert self._preparation is not None
        return outputs if self._preparation.classes else outputs.flatten()

    def loss(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Any]:
        """Summed cross-entropy and the number of samples, or their summed class weights; or summed squared errors."""
        return self.sample_losses(outputs, batch).sum(), classification.count(batch["label"], self._weights)

    def sample_losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The cross-entropy of each sample, or the squared error of its standardised target: (B,) float32."""
        if outputs.ndim == 1:
            return (outputs.float() - batch["label"]).square()
        if self._weights is not None and self._weights.device != outputs.device:
            # The first call may be an evaluation's, and a tensor made in inference mode cannot be used in a backward.
            with torch.inference_mode(False):
                self._weights = self._weights.to(outputs.device)  # once
        return classification.sample_losses(outputs, batch["label"], self._weights, self._o.label_smoothing)

    def metrics(self, outputs: Tensor, batch: Batch) -> dict[str, float]:
        """Accuracy, macro-F1 and AUROC; or R2, MAE and RMSE in the units of the target."""
        p = self._preparation
        assert p is not None
        if p.target is None:
            return classification.metrics(outputs, batch["label"])
        return regression.metrics(regression.in_units(outputs, p.target), regression.in_units(batch["label"], p.target))

    def why_without(self, name: str, batch: Batch) -> str:
        """Why a split has no metric of this name; an empty text where nothing is known."""
        assert self._preparation is not None
        if self._preparation.target is not None:
            return regression.why_no_r2(name)
        return classification.why_no_auroc(name, self._preparation.classes, batch["label"])

    def predictions(self, outputs: Tensor, batch: Batch) -> dict[str, Sequence[Any]]:
        """Of each row: target and prediction, and the probability of each class."""
        p = self._preparation
        assert p is not None
        if p.target is None:
            return classification.columns(outputs, batch["label"], p.classes)
        return regression.columns(outputs, batch["label"], p.target)

    # --- what becomes of it -------------------------------------------------------------------------------------------

    def save(self, model: nn.Module, folder: Path) -> None:
        """model.safetensors, and columns.json: how a table becomes its inputs, and what its outputs mean."""
        from safetensors.torch import save_file

        assert self._preparation is not None
        state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, str(folder / "model.safetensors"))
        text = json.dumps(self._preparation.as_json(), indent=2, ensure_ascii=False)
        (folder / COLUMNS).write_text(text + "\n", encoding="utf-8")

    def load(self, folder: Path) -> nn.Module:
        """The model that `save` wrote. Raises UserError if a file is missing or damaged."""
        weights, columns = Path(folder) / "model.safetensors", Path(folder) / COLUMNS
        self._preparation = preparation.from_json(read_json(columns), str(columns))
        return load_weights(self.model(), weights)

    def predict(self, model: nn.Module, source: str | Path, batch_size: int) -> Iterator[dict[str, Any]]:
        """{"label", "score"} of each row of a file: the likeliest class and its probability; or {"value"}.

        Columns may stand in any order, and others are not read.
        """
        p = self._preparation
        assert p is not None
        table = tables.rows_of(Path(source), self._how)
        self.notes += table.notes
        where = f"--input {source}"
        arrays = p.encode(features.read(table, p.kinds, where, self._wish.missing), where, self.notes)
        tensors, device = {name: torch.from_numpy(a) for name, a in arrays.items()}, next(model.parameters()).device
        for start in range(0, len(table), batch_size):
            batch = {name: array[start : start + batch_size].to(device) for name, array in tensors.items()}
            with torch.inference_mode():
                outputs = self.forward(model, batch)
            if p.target is None:
                yield from classification.predictions(outputs, p.classes)
            else:
                yield from ({"value": value} for value in regression.in_units(outputs.cpu(), p.target).tolist())


def _problem(values: list[Any], table: Table, label: str) -> tuple[str, str]:
    """Classification or regression, by the labels of the training set; and why. Raises UserError if neither fits."""
    if tables.declared_names(table, label) is not None:
        return "classification", f'the data declares the classes of "{label}"'
    different = len(set(values))
    numbers, wrong = features.parsed(table, label, "train")
    if len(wrong):
        if different > FEW and 2 * different > len(values):
            odd = values[wrong[0]]
            raise UserError(
                f'"{label}", the column to predict, holds {different:,} different values in {len(values):,} rows, such '
                f'as {odd!r}. They are neither classes nor numbers. Correct them, or name another "label_column".'
            )
        return "classification", f'"{label}" holds {different:,} different values, which are not all numbers'
    fractions = np.flatnonzero(numbers % 1)
    if len(fractions):
        return "regression", f'"{label}" holds fractions, such as {values[fractions[0]]}'
    many = different > FEW or 2 * different > len(values)
    found, other = ("regression", "classification") if many else ("classification", "regression")
    return found, (
        f'"{label}" holds {different:,} different whole numbers; "problem": "{other}" in trainer.task_options changes '
        "it"
    )


def _label_line(fitted: Preparation, labels: Mapping[str, np.ndarray]) -> str:
    if fitted.target is None:
        return f'label from "{fitted.label}"; {report.classes_line(fitted.classes, labels)}'
    own, target = labels["train"], fitted.target
    return (
        f'target from "{fitted.label}": in train mean {target.mean:.6g}, standard deviation {target.deviation:.6g}, '
        f"from {own.min():.6g} to {own.max():.6g}"
    )


def _sample_line(train: Table, row: int, fitted: Preparation) -> str:
    first = {column: train.values(column, row, row + 1)[0] for column in (*fitted.kinds, fitted.label)}
    label = str(first.pop(fitted.label))
    return report.sample_line(", ".join(f"{column} {value}" for column, value in first.items()), label)


def _not_read(columns: Sequence[str], used: Sequence[str | None]) -> list[str]:
    rest = [column.strip() or repr(column) for column in columns if column not in used]
    return [f"not read: {', '.join(rest)}"] if rest else []


TASK = Tabular
