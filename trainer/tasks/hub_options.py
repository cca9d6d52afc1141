"""Options shared by the tasks on a user's own data and model."""

from __future__ import annotations

from dataclasses import dataclass

from ..config.schema import option


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Data, local or from the hub, and its splits."""

    config_name: str | None = option(None, "the configuration of a hub dataset")
    split_column: str | None = option(None, "the column of a single table that names each row's split")
    group_column: str | None = option(
        None, "the column of groups (patients, authors, ...) whose samples stay together when splits are held out"
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
class TextModelOptions(HubOptions, FormatOptions):
    """Texts, and a model of them."""

    text_column: str | None = option(None, "the column of texts; the usual names are found")
    attention: str | None = option(
        None,
        'transformers\' attn_implementation ("sdpa", "eager", ...); without it the model\'s default; a kernel of the '
        "hub (owner/name) needs trust_remote_code",
    )
