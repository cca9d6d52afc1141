"""Classifies texts, or predicts a number of each, with any sequence-classification model of the transformers library.

The data is a csv, json lines or parquet file, a folder or a hub name. The model is a folder, a hub name, or a
configuration. A configuration is trained from scratch, with a tokenizer made of the training texts: this needs no
download at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config.schema import option
from ..config.task_options import read_options, required
from ..data import held_out, masks, model_checks, report, sources, tables, targets, text, units, unknown
from ..data import pretrained as models
from ..data.cache import Cached, cached
from ..data.cut import Cut, together
from ..data.table_files import Table
from ..errors import UserError
from ..exact.splits import Batch, Split
from ..wording import counted
from . import problems
from .first_look import LABEL_COLUMNS, TEXT_COLUMNS
from .hub_options import TargetOptions, TextModelOptions

AUTO = "AutoModelForSequenceClassification"
# Tokenizers that are made of the training texts.
_BUILT = (text.WORDS, unknown.SUBWORDS)
# This many texts are enough to estimate the share of unknown words.
_SOME_TEXTS = 5000
# The arguments of the model, of which the last may be missing.
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# Increase it when the arrays of a cache file change their meaning.
_VERSION = 4


@dataclass(frozen=True, kw_only=True)
class TextOptions(TargetOptions, TextModelOptions):
    """The options of `text_classification`."""

    data: Any = required(
        "a csv, tsv, json, jsonl or parquet file (also .gz); a folder of such, or of a folder of texts for each class; "
        "a pattern of files; a name on the dataset hub; or {split: any of these}"
    )
    model: Any = required(
        "a model's folder or hub name, or a configuration such as "
        '{"model_type": "bert", "hidden_size": 128, "num_hidden_layers": 2}'
    )
    pair_column: str | None = option(None, "a column of second texts, for tasks on pairs such as entailment")
    new_head: bool = option(False, "replace a head that was trained for another number of classes")
    tokenizer: str | None = option(
        None,
        '"words" or "subwords" (made of the training texts), or a folder or hub name; without it the model\'s own, or, '
        'where the model is a configuration, "words", and "subwords" if most words occur only once',
    )
    vocabulary: int | None = option(
        None,
        "the most words or subwords; without it all words that occur twice or more, or 8,000 subwords",
        minimum=1,
    )
    max_length: int | None = option(None, "tokens of a text; without it what the model takes", minimum=3)
    truncate: bool = option(False, "cut longer texts instead of refusing them")
    validation_fraction: float = option(
        0.1, "of the training set, of each class, if the data has no validation split; 0 for none", minimum=0, below=1
    )
    test_fraction: float = option(0.0, "the same for the test split", minimum=0, below=1)


class TextClassification(problems.WithProblem):
    """Classifies texts, or pairs of texts. Its arguments are `TextOptions`."""

    Options = TextOptions
    pipeline_tag = "text-classification"

    def __init__(self, **given: Any) -> None:
        o = read_options(TextOptions, given)
        models.check_spec(o.model, "classifier", '{"model_type": "bert", "hidden_size": 128, "num_hidden_layers": 2}')
        self._wish = o.wish()
        model_checks.check_problem_type(o.model, self._wish.problem)
        self._problem = problems.problem(self._wish, o.class_weights, o.label_smoothing)
        self.best_metric = self._problem.best_metric
        self._scratch = isinstance(o.model, Mapping) or not o.pretrained
        if o.new_head and self._scratch:
            raise UserError(
                '"trainer.task_options.new_head" has no effect: a model from scratch has a new head anyway.'
            )
        self._tokenizer_name = text.check_tokenizer(o.tokenizer, o.model, not self._scratch, text.WORDS, _BUILT)
        self._tokenizer_named = o.tokenizer is not None
        if o.vocabulary is not None and self._tokenizer_name not in _BUILT:
            raise UserError(
                '"trainer.task_options.vocabulary" has an effect only on the tokenizers "words" and "subwords".'
            )
        self.random_weights = self._scratch
        sources.check_data(o.data, o.config_name)
        held_out.check_fractions(o.validation_fraction, o.test_fraction)
        self.notes: list[str] = []
        self.data_lines: list[str] = []
        self._how = tables.checked_format(o.separator, o.encoding)
        self._group_column = o.group_column
        self._data, self._config_name, self._split_column = o.data, o.config_name, o.split_column
        self._text_column, self._pair_column = o.text_column, o.pair_column
        self._spec, self._new_head, self._trust, self._attention = o.model, o.new_head, o.trust_remote_code, o.attention
        self._vocabulary, self._max_length, self._truncate = o.vocabulary, o.max_length, o.truncate
        self._fractions = {"test": o.test_fraction, "validation": o.validation_fraction}
        self._split_seed = o.split_seed
        self._longest, self._prepares_masks = 0, False
        self._facts: dict[str, Any] = {}  # what the cache says beside the arrays
        self._sample: Batch = {}  # two rows of the training set, on which `model` tries the model
        self._saved: Path | None = None  # where `load` found the model

    # --- data ---------------------------------------------------------------------------------------------------------

    def splits(self, cut: Cut | None = None) -> dict[str, Split]:
        """input_ids and attention_mask (N, tokens) int64, and label; token_type_ids where they differ from 0.

        label is (N,) int64, (N, classes) float32 of 0 and 1, or (N,) float32, standardised.
        """
        config = self._configuration()
        self._check_kind(config)
        limit = self._limit(config)
        known = [] if self._scratch else [str(name) for name in (config.id2label or {}).values()]
        token_types = _takes_types(config)
        content, found = tables.content_of(self._data, self._read)
        key = {
            "version": _VERSION,
            "data": content,
            "format": [self._how.separator, self._how.encoding],
            "columns": [
                self._split_column,
                self._text_column,
                self._pair_column,
                self._wish.key,
                self._group_column,
            ],
            "tokenizer": [text.tokenizer_key(self._tokenizer_name, self._trust), self._tokenizer_named],
            "vocabulary": self._vocabulary,
            "limit": limit,
            "truncate": self._truncate,
            "held_out": [self._fractions, self._split_seed],
            "model": [known, token_types],
            "versions": text.versions("datasets", "tokenizers", "transformers"),
        }
        if cut is None:
            arrays, self._facts = cached(
                "text-classification", key, lambda: self._build(found or self._read(), limit, known, token_types)
            )
        else:
            arrays, self._facts = self._build(found or self._read(), limit, known, token_types, cut)
        other = None if self._tokenizer_name in _BUILT else self._tokenizer_name
        self.data_lines[:] = self._facts["read"]
        self.notes[:] = self._facts["notes"] + models.trust_note(self._trust, self._spec, other)
        result = {}
        self._problem.settle(self._facts["names"], arrays["train.label"])
        for split in self._facts["splits"]:
            padded = tuple(name for name in _INPUTS if f"{split}.{name}" in arrays)
            own = {name: arrays[f"{split}.{name}"] for name in padded}
            own["label"] = self._problem.labels(arrays[f"{split}.label"])
            result[split] = Split(own, self._problem.counts(own["label"]), arrays[f"{split}.lengths"], padded)
            self._longest = max(self._longest, own["input_ids"].shape[1])
        self._sample = {n: result["train"].arrays[n][:2].clone() for n in _INPUTS if n in result["train"].arrays}
        return result

    def _read(self) -> dict[str, Table]:
        return tables.read(self._data, config_name=self._config_name, split_column=self._split_column, how=self._how)

    def _build(
        self, found: dict[str, Table], limit: int | None, known: list[str], token_types: bool, cut: Cut | None = None
    ) -> Cached:
        """What the cache keeps: arrays by "split.name", and facts."""
        columns = found["train"].column_names
        label_columns = targets.columns_of(found["train"], self._wish, LABEL_COLUMNS)
        usual = self._usual(columns, label_columns)
        text_column = tables.find_column(columns, self._text_column, usual, "text_column")
        if self._pair_column is not None:
            tables.find_column(columns, self._pair_column, (), "pair_column")
        notes = tables.notes_of(found)
        found = self._with_labels(found, label_columns, notes)
        if cut is not None:
            read = (text_column, *label_columns, self._pair_column, self._group_column)
            found = together(cut, found, [column for column in read if column is not None])
        rows: dict[str, dict[str, Any]] = {}
        for split, table in found.items():
            needed = [("text_column", text_column), ("pair_column", self._pair_column)]
            needed += [("label_columns" if self._wish.columns else "label_column", c) for c in label_columns]
            for name, column in needed:
                if column is not None:
                    tables.find_column(table.column_names, column, (), name, where=split)
            rows[split] = {
                "text": tables.texts(table, text_column, split),
                "pair": None if self._pair_column is None else tables.texts(table, self._pair_column, split),
                "label": targets.read(table, label_columns, self._wish, split),
                "row": np.arange(len(table)),
                "group": tables.groups(table, self._group_column, split),
            }
        # A model that was trained on the same classes keeps their order. Otherwise its head would mix them up.
        declared = targets.declared_names(found["train"], label_columns, self._wish)
        raw = {split: row["label"] for split, row in rows.items()}
        labels, names = targets.numbered(raw, self._wish, declared, known)
        for split, row in rows.items():
            row["label"] = labels[split]
        rows = self._hold_out(rows, cut)

        train = rows["train"]
        notes += targets.notes(names, train["label"], self._wish)
        types = token_types and self._pair_column is not None
        tokenizer, tokenizer_text = self._made_tokenizer(train, limit, types, notes)
        contents = {s: r["text"] if r["pair"] is None else list(zip(r["text"], r["pair"])) for s, r in rows.items()}
        notes += tables.duplicates_note(contents)
        shares = {}
        arrays: dict[str, Tensor] = {}
        for split, row in rows.items():
            encoded = text.encode(tokenizer, row["text"], row["pair"], limit, self._truncate, f"Tokenising {split}")
            shares[split] = unknown.unknown_share(tokenizer, encoded.ids)
            if encoded.too_long and limit is not None:
                message = text.length_message(encoded, split, limit, row["row"])
                if not self._truncate:
                    raise UserError(
                        f"{message}, which is {self._limit_is()}.\n"
                        'To cut such texts there, set "truncate": true in trainer.task_options.'
                    )
                notes.append(f"{message}: cut there")
            lengths = torch.tensor([len(ids) for ids in encoded.ids])
            arrays[f"{split}.input_ids"] = text.pad(encoded.ids, tokenizer.pad_token_id)
            places = torch.arange(arrays[f"{split}.input_ids"].shape[1])
            arrays[f"{split}.attention_mask"] = (places < lengths[:, None]).long()
            if token_types and any(any(types) for types in encoded.types):
                arrays[f"{split}.token_type_ids"] = text.pad(encoded.types, tokenizer.pad_token_type_id)
            arrays[f"{split}.label"] = torch.from_numpy(row["label"])
            arrays[f"{split}.lengths"] = lengths
        notes += unknown.check_share(shares, self._tokenizer_said(), self._tokenizer_remedy())
        label = {"label" + f" {i}" * (len(label_columns) > 1): c for i, c in enumerate(label_columns, start=1)}
        used = {"text": text_column, "pair": self._pair_column, **label, "group": self._group_column}
        described = [
            report.rows_line(
                {split: len(row["label"]) for split, row in rows.items()},
                list(found),
                groups=report.Groups(self._group_column, {split: row["group"] for split, row in rows.items()}),
            ),
            report.columns_line(columns, used),
            targets.said(names, {split: row["label"] for split, row in rows.items()}),
            report.sample_line(train["text"][0], targets.shown(names, train["label"][0])),
        ]
        facts = {
            "splits": list(rows),
            "names": names,
            "label_columns": label_columns,
            "notes": notes,
            "read": described,
            "tokens": text.facts_of(tokenizer),
            "limit": limit,
            "tokenizer": tokenizer_text,
            "token_types": types,
        }
        return arrays, facts

    def _with_labels(self, found: dict[str, Table], columns: Sequence[str], notes: list[str]) -> dict[str, Table]:
        """Leaves out splits without labels, such as the test.csv of a competition, unless the user named the splits."""
        without = [s for s, table in found.items() if s != "train" and not set(columns) <= set(table.column_names)]
        if not isinstance(self._data, str):
            return found
        for split in without:
            lacks = next(column for column in columns if column not in found[split].column_names)
            notes.append(f'{counted(len(found[split]), "row")} of {split} left out: there is no column "{lacks}"')
        return {split: table for split, table in found.items() if split not in without}

    def _made_tokenizer(
        self, train: Mapping[str, Any], limit: int | None, types: bool, notes: list[str]
    ) -> tuple[Any, str | None]:
        """The tokenizer; and its JSON if it is made of the training texts, else None."""
        if self._tokenizer_name not in _BUILT:
            return text.load_tokenizer(self._tokenizer_name, self._trust), None
        texts = [*train["text"], *(train["pair"] or [])]
        if self._tokenizer_name == text.WORDS:
            built = text.build_words(texts, self._vocabulary)
            tokenizer = text.wrap(built, limit, types)
            if self._tokenizer_named or self._vocabulary is not None:
                return tokenizer, built
            some = texts[:: max(1, len(texts) // _SOME_TEXTS)]
            share = unknown.unknown_share(tokenizer, text.encode(tokenizer, some, None, None, False, "Words").ids)
            if share <= unknown.REFUSED:
                return tokenizer, built
            notes.append(
                f'{share:.0%} of the words of train occur only once, so the tokenizer is "subwords" instead of "words"'
            )
        built = unknown.build_subwords(texts, self._vocabulary)
        return text.wrap(built, limit, types), built

    def _tokenizer_said(self) -> str:
        built = self._tokenizer_name in _BUILT
        return f'the tokenizer "{self._tokenizer_name}"' if built else f"the tokenizer of {self._tokenizer_name}"

    def _tokenizer_remedy(self) -> str:
        if self._tokenizer_name in _BUILT:
            return 'Set "tokenizer": "subwords" in trainer.task_options, or a larger "vocabulary" if it is set.'
        return "Take a model whose tokenizer knows the language of the texts."

    def _usual(self, columns: Sequence[str], label_columns: Sequence[str] = ()) -> list[str]:
        """The names that the column of texts may have: the usual ones, and that of the only column that is left."""
        known = {*label_columns, self._pair_column, self._split_column or "split", self._group_column}
        others = [c for c in columns if c not in known and c.lower() not in LABEL_COLUMNS]
        return [name.lower() for name in (*TEXT_COLUMNS, *(others if len(others) == 1 else ()))]

    def _hold_out(self, rows: dict[str, dict[str, Any]], cut: Cut | None) -> dict[str, dict[str, Any]]:
        """The splits, with parts of train as those that the data lacks; or those of a fold."""
        train = rows["train"]
        wanted = {name: part for name, part in self._fractions.items() if name not in rows}
        labels, groups = train["label"], train["group"]
        if cut is None:
            chosen = held_out.held_out(len(labels), wanted, self._split_seed, targets.strata(labels), groups)
        else:
            chosen = cut(len(labels), targets.classes(labels), groups)

        def take(places: np.ndarray) -> dict[str, Any]:
            lists = {name: train[name] and [train[name][i] for i in places] for name in ("text", "pair", "group")}
            return lists | {name: train[name][places] for name in ("label", "row")}

        every = rows | {name: take(places) for name, places in chosen.items()}
        return sources.in_order(every)

    # --- model --------------------------------------------------------------------------------------------------------

    def _configuration(self, **changes: Any) -> Any:
        config = models.configuration(self._spec, self._trust, attention=self._attention, **changes)
        model_checks.check_kind(AUTO, self._spec, config, self._trust)
        return config

    def _check_kind(self, config: Any) -> None:
        kind = config.model_type
        if kind == "xlnet":
            raise UserError(
                f'"trainer.task_options.model": {kind} reads its answer from the last position, so it needs padding on '
                "the left, but here padding is on the right. Take another model."
            )
        if config.is_encoder_decoder and self._tokenizer_name in _BUILT:
            raise UserError(
                f'"trainer.task_options.model": {kind}, an encoder with a decoder, reads its answer from an end-of-'
                f'text token. The tokenizer "{self._tokenizer_name}" has none. Take a pretrained one, or an encoder '
                "such as bert."
            )

    def _limit(self, config: Any) -> int | None:
        """The most tokens of a text: the option, which may not exceed what the model takes, or what the model takes."""
        takes = text.position_limit(config)
        if self._max_length is not None and takes is not None and self._max_length > takes:
            raise UserError(
                f'"trainer.task_options.max_length" is {self._max_length}, but the model takes {takes} tokens at most.'
            )
        return self._max_length or takes

    def _limit_is(self) -> str:
        return '"trainer.task_options.max_length"' if self._max_length else "what the model takes"

    def model(self) -> nn.Module:
        """input_ids, attention_mask (B, tokens) -> logits (B, classes)."""
        assert self._facts, "splits() comes first"
        names, given = self._output_names(), self._spec if isinstance(self._spec, Mapping) else {}
        for name in ("num_labels", "id2label", "label2id"):
            own = given.get(name)
            if own is not None and (own if name == "num_labels" else len(own)) != len(names):
                raise UserError(
                    f'"trainer.task_options.model.{name}" is {own}, but the data has {self._said(names)}. '
                    "Leave it out, to follow the data."
                )
        config = self._configuration(
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={n: i for i, n in enumerate(names)},
            # A base model may have been trained for another problem. Pipelines would give sigmoids or bare numbers.
            problem_type=self._wish.problem,
        )
        text.fit_configuration(config, self._facts["tokens"], self._spec, self._scratch)
        fresh: list[str] = []
        model = models.build(
            AUTO,
            self._spec,
            config,
            pretrained=not self._scratch,
            classes=names,
            new_head=self._new_head,
            trust_remote_code=self._trust,
            notes=fresh,
        )
        self.notes += [note for note in fresh if note not in self.notes]
        model_checks.check_saving(model, self._spec)
        logits = model_checks.tried(
            model, self._spec, self._sample, f"texts of {self._sample['input_ids'].shape[1]:,} tokens"
        )
        if logits.shape != (len(self._sample["input_ids"]), len(names)):
            raise UserError(
                f'"trainer.task_options.model" gives logits of shape {tuple(logits.shape)} for two texts, but the data '
                f"has {self._said(names)}."
            )
        if self._problem.target is not None:
            units.check(model, self._sample, logits)
        self._prepares_masks = masks.may_be_prepared(model, self._longest)
        return model

    def _output_names(self) -> list[str]:
        """What each output of the model is called: the classes, or the column of numbers."""
        names: list[str] = self._facts["names"] or self._facts["label_columns"]
        return names

    def _said(self, names: Sequence[str]) -> str:
        """What is learnt, for messages."""
        if self._problem.target is not None:
            return "one number to predict"
        return f"{len(names)} classes ({', '.join(names[:10])})"

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits (B, classes), or the standardised number (B,)."""
        inputs = {name: batch[name] for name in _INPUTS if name in batch}
        if self._prepares_masks:
            inputs["attention_mask"] = masks.for_each_head(inputs["attention_mask"])
        return self._problem.outputs_of(model(**inputs).logits)

    # --- what becomes of it -------------------------------------------------------------------------------------------

    def _tokenizer(self) -> Any:
        if self._saved is not None:
            return text.load_tokenizer(str(self._saved), False)
        facts = self._facts
        if facts["tokenizer"] is not None:
            return text.wrap(facts["tokenizer"], facts["limit"], facts["token_types"])
        tokenizer = text.load_tokenizer(self._tokenizer_name, self._trust)
        if facts["limit"] is not None:
            tokenizer.model_max_length = facts["limit"]
        return tokenizer

    def save(self, model: nn.Module, folder: Path) -> None:
        """Weights, configuration with the classes' names, and tokenizer: what from_pretrained reads."""
        with units.saved(model, self._problem.target, folder):
            text.save_model(model, self._tokenizer(), folder)

    def load(self, folder: Path) -> nn.Module:
        """The model that `save` wrote."""
        model = models.load_saved(AUTO, Path(folder))
        self._saved = Path(folder)
        config: Any = model.config
        self._problem.names = [config.id2label[i] for i in range(len(config.id2label))]
        if self._wish.problem == targets.NUMBER:
            self._problem.target = units.restore(model, self._saved)
        return model

    def predict(self, model: nn.Module, source: str | Path, batch_size: int) -> Iterator[dict[str, Any]]:
        """The prediction for each row of a file, or text of a folder: see `problems`. Longer texts are cut."""
        path = Path(source)
        table = tables.rows_of(path, self._how)
        self.notes += table.notes
        column = tables.text_column_of(path, table, self._text_column, self._usual(table.column_names), "text_column")
        texts = tables.texts(table, column, "--input")
        asked, pairs = {column: texts} if path.is_file() else {"file": table.values("file")}, None
        if self._pair_column is not None:
            tables.find_column(table.column_names, self._pair_column, (), "pair_column", f"--input {source}")
            pairs = tables.texts(table, self._pair_column, "--input")
            asked[self._pair_column] = pairs
        tokenizer = self._tokenizer()
        limit = text.tokenizer_limit(tokenizer)
        encoded = text.encode(tokenizer, texts, pairs, limit, True, "Tokenising")
        if encoded.too_long and limit is not None:
            self.notes.append(f"{text.length_message(encoded, str(source), limit)}: cut there")
        takes_types, device = _takes_types(model.config), next(model.parameters()).device
        for start in range(0, len(texts), batch_size):
            part = slice(start, start + batch_size)
            lengths = torch.tensor([len(ids) for ids in encoded.ids[part]])
            batch = {"input_ids": text.pad(encoded.ids[part], tokenizer.pad_token_id)}
            batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
            if takes_types and encoded.types:
                batch["token_type_ids"] = text.pad(encoded.types[part], tokenizer.pad_token_type_id)
            with torch.inference_mode():
                outputs = self.forward(model, {name: array.to(device) for name, array in batch.items()})
            for row, prediction in enumerate(self._problem.predictions(outputs), start=start):
                yield {column: values[row] for column, values in asked.items()} | prediction


def _takes_types(config: Any) -> bool:
    """Whether a model distinguishes the tokens of a first and a second text."""
    return int(getattr(config, "type_vocab_size", 0) or 0) > 1


TASK = TextClassification
