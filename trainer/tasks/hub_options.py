"""Options that the tasks on a user's own data and model share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..config.schema import option
from ..data import targets


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Data, local or from the hub, and its splits."""

    config_name: str | None = option(None, "the configuration of a hub dataset")
    split_column: str | None = option(None, "the column of a single table that names each row's split")
    group_column: str | None = option(
        None, "the column of groups (patients, authors, ...): samples of a group stay together when splits are held out"
    )
    split_seed: int = option(0, "chooses the samples that are held out, independently of the run's seed", minimum=0)


@dataclass(frozen=True, kw_only=True)
class FormatOptions:
    """How files of text are read."""

    separator: str | None = option(None, "between the fields of csv files; without it the one in the header")
    encoding: str | None = option(None, 'of text files, such as "latin-1"; without it UTF-8, or what the file says')


@dataclass(frozen=True, kw_only=True)
class HubOptions(DataOptions):
    """Data and a model, local or from the hub."""

    pretrained: bool = option(True, "read the weights of the model; false trains its architecture from scratch")
    trust_remote_code: bool = option(False, "run Python code that comes with a model")


@dataclass(frozen=True, kw_only=True)
class LanguageModelOptions(HubOptions, FormatOptions):
    """Files of text, and a model of their language."""

    attention: str | None = option(
        None,
        'transformers\' attn_implementation ("sdpa", "eager", ...); without it the model\'s default; a kernel of the '
        "hub (owner/name) needs trust_remote_code",
    )


@dataclass(frozen=True, kw_only=True)
class TextModelOptions(LanguageModelOptions):
    """Texts in a column, and a model of them."""

    text_column: str | None = option(None, "the column of texts; the usual names are found")


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """What is to be learnt of each sample."""

    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] = option(
        "single_label_classification", "one class a sample; any number of classes; or a number"
    )
    label_column: str | None = option(
        None,
        "the column of labels (whole numbers or texts), of lists of labels, or of numbers to predict; the usual names "
        "are found",
    )
    label_columns: list[str] = option([], "of several labels a sample: a column of 0 and 1 for each label")
    label_separator: str | None = option(
        None, 'of several labels a sample in one text: what stands between them, such as "|"'
    )
    label_smoothing: float = option(
        0.0, "with one class a sample: share of the target that goes to all classes alike", minimum=0, below=1
    )
    class_weights: Any = option(
        None,
        '"balanced", a list in the order of the classes, or {class: weight}; of several labels, the weight of a '
        "label's presence",
    )

    def wish(self) -> targets.Wish:
        """The options that say where labels are, checked. Raises UserError."""
        return targets.wish(self.problem_type, self.label_column, self.label_columns, self.label_separator)
