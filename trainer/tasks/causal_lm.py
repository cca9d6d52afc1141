"""Trains language models of the transformers library on plain text, or on records of a prompt and its completion.

The loss is the summed negative log-likelihood divided by the valid tokens of the global batch: exactly the mean over
its tokens. (Micro-batches have different numbers of tokens. The average of their means would be another loss.)

No attention mask is passed. Padding stands on the right, and a token of a causal model sees only what is left of it. So
padding changes nothing where a loss is taken, and models take their fastest path. Models do not look for several texts
in a row, either: a row is one text, or several that are read as one.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.schema import option
from ..config.task_options import read_options, required
from ..data import held_out, masks, model_checks, report, sources, tables, text, unknown
from ..data import pretrained as models
from ..data.cache import Cached, cached
from ..data.table_files import Table
from ..data.token_rows import IGNORED, TokenSequence, pack, pad_rows
from ..errors import UserError
from ..exact.splits import Batch, Split
from ..wording import counted
from .hub_options import TextModelOptions

AUTO = "AutoModelForCausalLM"
TEXT_COLUMNS = ("text", "content", "document", "story")
PROMPT_COLUMNS = ("prompt", "instruction", "question", "input")
COMPLETION_COLUMNS = ("completion", "response", "output", "answer")
# The two columns of a prompt in Alpaca and Dolly: what to do, and with what. The second is often empty.
INSTRUCTION, INPUTS = "instruction", ("input", "context")
# Columns that may belong to a prompt. If one is left out, the user must know it.
_OF_PROMPTS = (*PROMPT_COLUMNS, "context", "system", "history", "passage")
# A model that takes 100,000 tokens is trained on that many only if the config says so.
USUAL_LENGTH = 1024
_NOT_CUT = '"trainer.task_options.truncate" has no effect on packed rows: texts of any length go into them.'
# Increase it when the arrays of a cache file change their meaning.
_VERSION = 3


@dataclass
class _Documents:
    """One split: texts, or prompts with their completions.

    `whole` is a text file as it is, not a record of many; `rows` are the places of records in their file.
    """

    texts: list[str]
    prompts: list[str] | None = None
    whole: bool = False
    rows: np.ndarray | None = None
    groups: list[Any] | None = None

    def take(self, places: np.ndarray) -> _Documents:
        prompts = None if self.prompts is None else [self.prompts[i] for i in places]
        groups = None if self.groups is None else [self.groups[i] for i in places]
        return _Documents([self.texts[i] for i in places], prompts, rows=places, groups=groups)


@dataclass
class _Read:
    """What the data holds: documents by split, lines on what was read, and notes."""

    documents: dict[str, _Documents]
    columns: str
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class LanguageOptions(TextModelOptions):
    """The options of `causal_lm`."""

    data: Any = required(
        "a text file or a folder of such; a csv, tsv, json, jsonl or parquet file or a folder of such (also .gz); a "
        "pattern of files; a name on the dataset hub; or {split: any of these}"
    )
    model: Any = required(
        'a model\'s folder or hub name, or a configuration such as {"model_type": "gpt2", "n_layer": 4, "n_head": 4, '
        '"n_embd": 128}'
    )
    prompt_column: str | None = option(
        None,
        "the column of prompts, which are given; without it the usual names are found, and instruction and input (or "
        "context) are joined by a line break",
    )
    completion_column: str | None = option(None, "the column of completions, which are learnt")
    tokenizer: str | None = option(
        None,
        '"characters" or "words" (made of the training texts), or a folder or hub name; without it the model\'s own, '
        'or "characters" where the model is a configuration',
    )
    vocabulary: int | None = option(None, "the most characters or words", minimum=1)
    sequence_length: int | None = option(
        None, "tokens of a row; without it what the model takes, at most 1,024", minimum=2
    )
    packed: bool | None = option(
        None,
        "true: all texts one after another, cut into full rows; false: one record a row; without it true for texts, "
        "false for prompts",
    )
    truncate: bool = option(False, "with one record a row, cut longer ones instead of refusing them")
    validation_fraction: float = option(
        0.1,
        "share held out if the data has no such split: of a single text a part near its end, of records a random "
        "choice; 0 for none",
        minimum=0,
        below=1,
    )
    test_fraction: float = option(0.0, "the same for the test split", minimum=0, below=1)
    max_new_tokens: int = option(
        100, "the most that predict writes after a prompt, and at most half of what the model takes", minimum=1
    )


class CausalLM:
    """Predicts the next token. Its arguments are `LanguageOptions`."""

    Options = LanguageOptions
    pipeline_tag = "text-generation"
    best_metric = ("loss", "min")

    def __init__(self, **given: Any) -> None:
        o = read_options(LanguageOptions, given)
        models.check_spec(o.model, "language model", '{"model_type": "gpt2", "n_layer": 4, "n_head": 4, "n_embd": 128}')
        if (o.prompt_column is None) != (o.completion_column is None):
            raise UserError(
                '"trainer.task_options.prompt_column" and "completion_column" go together: give both, or neither.'
            )
        if o.prompt_column is not None and o.text_column is not None:
            raise UserError('"trainer.task_options": give a text_column, or prompt_column and completion_column.')
        if o.packed and o.truncate:
            raise UserError(_NOT_CUT)
        self._scratch = isinstance(o.model, Mapping) or not o.pretrained
        built = (text.CHARACTERS, text.WORDS)
        self._tokenizer_name = text.check_tokenizer(o.tokenizer, o.model, not self._scratch, text.CHARACTERS, built)
        if o.vocabulary is not None and self._tokenizer_name not in built:
            raise UserError(
                '"trainer.task_options.vocabulary" has an effect on the tokenizers "characters" and "words" only.'
            )
        held_out.check_fractions(o.validation_fraction, o.test_fraction)
        self.random_weights = self._scratch
        sources.check_data(o.data, o.config_name)
        self.notes: list[str] = []
        self.data_lines: list[str] = []
        self._how = tables.checked_format(o.separator, o.encoding)
        self._group_column = o.group_column
        self._data, self._config_name, self._split_column = o.data, o.config_name, o.split_column
        self._text_column = o.text_column
        self._prompt_column, self._completion_column = o.prompt_column, o.completion_column
        self._spec, self._trust, self._attention = o.model, o.trust_remote_code, o.attention
        self._vocabulary, self._sequence_length = o.vocabulary, o.sequence_length
        self._packed, self._truncate = o.packed, o.truncate
        self._fractions = {"test": o.test_fraction, "validation": o.validation_fraction}
        self._split_seed, self._max_new_tokens = o.split_seed, o.max_new_tokens
        self._facts: dict[str, Any] = {}  # what the cache says beside the arrays
        self._sample: Tensor | None = None  # (2, tokens) int64 of the training set, on which `model` tries the model
        self._saved: Path | None = None  # where `load` found the model
        self._rows_are_texts = False  # known to transformers without a look at a batch: see `masks`
        self._arguments: dict[str, Any] = {}  # what the model is called with beside its inputs

    # --- data ---------------------------------------------------------------------------------------------------------

    def splits(self) -> dict[str, Split]:
        """input_ids and targets (N, sequence_length) int64; tokens and bytes (N,) int64 of the valid targets."""
        limit = self._limit(self._configuration())
        content, found = tables.content_of(self._data, self._tables)
        key = {
            "version": _VERSION,
            "data": content,
            "format": [self._how.separator, self._how.encoding],
            "columns": [
                self._split_column,
                self._text_column,
                self._prompt_column,
                self._completion_column,
                self._group_column,
            ],
            "tokenizer": text.tokenizer_key(self._tokenizer_name, self._trust),
            "vocabulary": self._vocabulary,
            "rows": [limit, self._packed, self._truncate],
            "held_out": [self._fractions, self._split_seed],
            "versions": text.versions("datasets", "tokenizers", "transformers"),
        }
        arrays, self._facts = cached("causal-lm", key, lambda: self._build(self._read(found), limit))
        made = (text.CHARACTERS, text.WORDS)
        self.data_lines[:] = self._facts["read"]
        others = None if self._tokenizer_name in made else self._tokenizer_name
        self.notes[:] = self._facts["notes"] + models.trust_note(self._trust, self._spec, others)
        result = {}
        for split in self._facts["splits"]:
            own = {name: arrays[f"{split}.{name}"] for name in ("input_ids", "targets", "tokens", "bytes")}
            # Packed rows are all full, but for the last one of a split.
            padded = () if self._facts["packed"] else ("input_ids", "targets")
            result[split] = Split(own, own["tokens"].float(), arrays[f"{split}.lengths"], padded)
        self._sample = arrays["train.input_ids"][:2].clone()
        return result

    def _tables(self) -> dict[str, Table]:
        return tables.read(self._data, config_name=self._config_name, split_column=self._split_column, how=self._how)

    def _read(self, found: dict[str, Table] | None) -> _Read:
        """The splits that the data has."""
        notes: list[str] = []
        if found is None:
            files = tables.text_files(self._data, self._how, notes)
            if files is not None:
                for option, column in (
                    ("text_column", self._text_column),
                    ("prompt_column", self._prompt_column),
                    ("split_column", self._split_column),
                    ("group_column", self._group_column),
                ):
                    if column is not None:
                        raise UserError(f'"trainer.task_options.{option}" has no effect on text files.')
                documents = {name: _Documents(texts, whole=len(texts) == 1) for name, texts in files.items()}
                return _Read(documents, "whole text files", notes)
            found = self._tables()
        columns = found["train"].column_names
        lower = [column.lower() for column in columns]
        prompted = self._prompt_column is not None or (
            self._text_column is None
            and any(name in lower for name in PROMPT_COLUMNS)
            and any(name in lower for name in COMPLETION_COLUMNS)
        )
        documents = {}
        if prompted:
            prompts = self._prompt_columns(columns)
            learnt = tables.find_column(columns, self._completion_column, COMPLETION_COLUMNS, "completion_column")
            used = dict(zip(("prompt", "its input"), prompts)) | {"completion": learnt}
        else:
            prompts, learnt = [], tables.find_column(columns, self._text_column, TEXT_COLUMNS, "text_column")
            used = {"text": learnt}
        for split, table in found.items():
            documents[split] = _Documents(
                self._texts(table, learnt, "completion_column" if prompted else "text_column", split),
                _prompts(table, prompts, split) if prompted else None,
                groups=tables.groups(table, self._group_column, split),
            )
        said = report.columns_line(columns, {**used, "group": self._group_column})
        return _Read(documents, said, tables.notes_of(found))

    def _prompt_columns(self, columns: Sequence[str]) -> list[str]:
        """The columns of prompts: the one that is named, Alpaca's two, or the one with a usual name.

        Raises:
            UserError: another column would be left out that may belong to the prompt.
        """
        if self._prompt_column is not None:
            return [tables.find_column(columns, self._prompt_column, (), "prompt_column")]
        lower = {column.lower(): column for column in columns}
        usual = [lower[name] for name in _OF_PROMPTS if name in lower]
        if len(usual) == 2 and usual[0].lower() == INSTRUCTION and usual[1].lower() in INPUTS:
            return usual
        if len(usual) > 1:
            raise UserError(
                f'"trainer.task_options.prompt_column" is needed: {" and ".join(usual)} may all belong to the prompt, '
                "and only one column is read. Name it, or join them into one column."
            )
        return [tables.find_column(columns, None, PROMPT_COLUMNS, "prompt_column")]

    @staticmethod
    def _texts(table: Table, column: str, option: str, split: str) -> list[str]:
        tables.find_column(table.column_names, column, (), option, where=split)
        return tables.texts(table, column, split)

    def _build(self, read: _Read, limit: int) -> Cached:
        """What the cache keeps: arrays by "split.name", and facts."""
        documents = self._hold_out(read.documents)
        train = documents["train"]
        packed = (train.prompts is None) if self._packed is None else self._packed
        if packed and self._truncate:
            raise UserError(_NOT_CUT)
        built = None
        if self._tokenizer_name in (text.CHARACTERS, text.WORDS):
            texts = [*train.texts, *(train.prompts or [])]
            built = text.build_for_generation(self._tokenizer_name, texts, self._vocabulary)
            tokenizer = text.wrap(built, limit)
        else:
            tokenizer = text.load_tokenizer(self._tokenizer_name, self._trust)
        rows_of = {
            name: split.texts if split.prompts is None else list(zip(split.prompts, split.texts))
            for name, split in documents.items()
        }
        notes = read.notes + (tables.duplicates_note(rows_of) if not train.whole else [])
        shares = {}
        arrays: dict[str, Tensor] = {}
        for name, split in documents.items():
            sequences = _tokenise(tokenizer, split, f"Tokenising {name}")
            notes += _unknown_note(tokenizer, sequences, name) if built is not None else []
            shares[name] = unknown.unknown_share(tokenizer, [s.ids for s in sequences])
            if not packed:
                sequences = self._check_lengths(sequences, name, split.rows, limit, notes)
            own = (pack if packed else pad_rows)(sequences, limit, tokenizer.pad_token_id)
            if not len(own["input_ids"]):
                raise UserError(
                    f'"trainer.task_options.data": {name} has no token to predict, its texts are too short.'
                )
            arrays |= {f"{name}.{array}": torch.from_numpy(values) for array, values in own.items()}
        notes += unknown.check_share(
            shares,
            f'the tokenizer "{self._tokenizer_name}"' if built else f"the tokenizer of {self._tokenizer_name}",
            'Set "tokenizer": "characters" in trainer.task_options.'
            if built
            else "Take a model whose tokenizer knows the language of the texts.",
        )
        unit = "text" if train.prompts is None else "record"
        first = train.texts[0] if train.prompts is None else f"{train.prompts[0]} -> {train.texts[0]}"
        characters = {name: sum(map(len, split.texts)) for name, split in documents.items()}
        lines = [
            report.rows_line(
                {name: len(split.texts) for name, split in documents.items()},
                list(read.documents),
                unit,
                groups=report.Groups(self._group_column, {name: split.groups for name, split in documents.items()}),
            ),
            f"{read.columns}; characters to learn: {', '.join(f'{n} {c:,}' for n, c in characters.items())}",
            report.sample_line(first),
        ]
        facts = {
            "splits": list(documents),
            "packed": packed,
            "notes": notes,
            "read": lines,
            "tokens": text.facts_of(tokenizer),
            "limit": limit,
            "tokenizer": built,
        }
        return arrays, facts

    def _hold_out(self, documents: dict[str, _Documents]) -> dict[str, _Documents]:
        """The splits, with parts of train as those that the data lacks."""
        wanted = {name: part for name, part in self._fractions.items() if part and name not in documents}
        train = documents["train"]
        if not wanted:
            return documents
        held: dict[str, _Documents] = {}
        if len(train.texts) == 1 and train.prompts is None:
            whole = train.texts[0]
            end = len(whole)
            for name, part in wanted.items():  # the test part is the last one
                start = end - round(len(whole) * part)
                held[name], end = _Documents([whole[start:end]], whole=train.whole), start
            held["train"] = _Documents([whole[:end]], whole=train.whole)
            if not all(split.texts[0] for split in held.values()):
                raise UserError(f'"trainer.task_options.data": the text has {len(whole)} characters, too few to split.')
        else:
            chosen = held_out.held_out(len(train.texts), wanted, self._split_seed, groups=train.groups)
            held = {name: train.take(places) for name, places in chosen.items()}
            lacking = [name for name in (*wanted, "train") if name not in held or not held[name].texts]
            if lacking:
                raise UserError(
                    f'"trainer.task_options.data": {len(train.texts)} records are too few to hold out {lacking[-1]}.'
                )
        every = documents | held
        return sources.in_order(every)

    def _check_lengths(
        self, sequences: list[TokenSequence], split: str, rows: np.ndarray | None, limit: int, notes: list[str]
    ) -> list[TokenSequence]:
        """Records of at most limit + 1 tokens, of which `limit` are put in: the last one is only predicted."""
        places = np.array([len(s.ids) - 1 for s in sequences])
        long = int((places > limit).sum())
        if long:
            longest = int(places.argmax())
            row = longest if rows is None else int(rows[longest])
            message = (
                f"{long:,} of the {len(sequences):,} records of {split} {'is' if long == 1 else 'are'} longer than "
                f"{limit:,} tokens (the longest, in row {row + 1}, has {places[longest]:,})"
            )
            if not self._truncate:
                raise UserError(
                    f"{message}, which is {self._limit_is()}.\n"
                    'To cut such records there, set "truncate": true in trainer.task_options.'
                )
            notes.append(f"{message}: cut there")
        cut = [TokenSequence(s.ids[: limit + 1], s.predicted[: limit + 1], s.bytes[: limit + 1]) for s in sequences]
        kept = [s for s in cut if s.predicted[1:].any()]
        if len(kept) < len(cut):
            notes.append(f"{counted(len(cut) - len(kept), 'record')} of {split} with nothing left to predict left out")
        return kept

    # --- model --------------------------------------------------------------------------------------------------------

    def _configuration(self) -> Any:
        config = models.configuration(self._spec, self._trust, attention=self._attention)
        model_checks.check_kind(AUTO, self._spec, config, self._trust)
        return config

    def _limit(self, config: Any) -> int:
        takes = text.position_limit(config)
        if self._sequence_length is not None and takes is not None and self._sequence_length > takes:
            raise UserError(
                f'"trainer.task_options.sequence_length" is {self._sequence_length}, but the model takes {takes} '
                "tokens at most."
            )
        return self._sequence_length or min(takes or USUAL_LENGTH, USUAL_LENGTH)

    def _limit_is(self) -> str:
        named = '"trainer.task_options.sequence_length"'
        return named if self._sequence_length else f"what rows have without {named}"

    def model(self) -> nn.Module:
        """input_ids (B, tokens) -> logits (B, tokens, vocabulary)."""
        assert self._facts and self._sample is not None, "splits() comes first"
        config = self._configuration()
        # If a configuration has a padding token, models look for it in every batch. On a GPU, the host waits for this.
        tokens = self._facts["tokens"]
        if config.model_type not in text.POSITIONS_AFTER_PADDING:  # these need it
            tokens = tokens | {"pad_token_id": None}
        text.fit_configuration(config, tokens, self._spec, self._scratch)
        fresh: list[str] = []
        model = models.build(
            AUTO,
            self._spec,
            config,
            pretrained=not self._scratch,
            trust_remote_code=self._trust,
            notes=fresh,
        )
        if "use_cache" in inspect.signature(model.forward).parameters:
            self._arguments = {"use_cache": False}  # keys and values are kept for generation alone
        fresh += model_checks.settle_generation(model, self._facts["tokens"])
        self.notes += [note for note in fresh if note not in self.notes]
        model_checks.check_saving(model, self._spec)
        self._try(model, self._sample)
        return model

    def _try(self, model: nn.Module, ids: Tensor) -> None:
        """Two rows of the training set through the model. Raises UserError."""

        def logits_of(ids: Tensor) -> Tensor:
            return model_checks.tried(
                model, self._spec, {"input_ids": ids, **self._arguments}, f"{ids.shape[1]:,} tokens of the training set"
            )

        rows = ids if len(ids) > 1 else ids.repeat(2, 1)
        logits, self._rows_are_texts = masks.whether_rows_are_texts(lambda: logits_of(rows))
        shape = tuple(logits.shape)
        if shape[:2] != tuple(rows.shape):
            raise UserError(
                f'"trainer.task_options.model" gives logits of shape {shape} for tokens of shape {tuple(rows.shape)}. '
                "A causal language model gives one row a token."
            )
        # Only a few tokens: among many, one changes little.
        model_checks.check_causal(ids[:1, :8], logits_of, self._spec)

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Of each row, nll: the summed negative log-likelihood (B,); in evaluation also correct: right tokens (B,).

        These are sums and not logits, because the logits of a whole split would not fit into memory.
        """
        targets = batch["targets"]  # (B, tokens)
        # Not for a compiled model: its graph contains the positions, and has other kernels.
        known = self._rows_are_texts and getattr(model, "_compiled_call_impl", None) is None
        with masks.rows_are_texts() if known else contextlib.nullcontext():
            logits = model(input_ids=batch["input_ids"], **self._arguments).logits  # (B, tokens, vocabulary)
        nll = F.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED
        ).view(targets.shape)
        outputs = {"nll": nll.sum(dim=1)}
        if not model.training:
            outputs["correct"] = (logits.argmax(dim=-1) == targets).sum(dim=1)
        return outputs

    def loss(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed negative log-likelihood, and the number of valid tokens."""
        return outputs["nll"].sum(), batch["tokens"].sum()

    def sample_losses(self, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        """The negative log-likelihood of each row, (B,)."""
        return outputs["nll"]

    def metrics(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, float]:
        """Perplexity and accuracy of a token, and bits for each byte of UTF-8 text (end-of-text tokens included)."""
        nll = float(outputs["nll"].double().sum())
        tokens, size = int(batch["tokens"].sum()), int(batch["bytes"].sum())
        result = {
            "perplexity": math.exp(min(nll / tokens, 700.0)),  # e^709 is the largest float
            "token_accuracy": int(outputs["correct"].sum()) / tokens,
        }
        return result | ({"bits_per_byte": nll / math.log(2) / size} if size else {})

    # --- what becomes of it -------------------------------------------------------------------------------------------

    def _tokenizer(self) -> Any:
        if self._saved is not None:
            return text.load_tokenizer(str(self._saved), False)
        if self._facts["tokenizer"] is not None:
            return text.wrap(self._facts["tokenizer"], self._facts["limit"])
        return text.load_tokenizer(self._tokenizer_name, self._trust)

    def save(self, model: nn.Module, folder: Path) -> None:
        """Weights, configuration, generation's settings and tokenizer: what from_pretrained reads."""
        text.save_model(model, self._tokenizer(), folder)

    def load(self, folder: Path) -> nn.Module:
        """The model that `save` wrote."""
        model = models.load_saved(AUTO, Path(folder))
        self._saved = Path(folder)
        return model

    def _asked(self, source: Path, table: Table) -> list[str]:
        """The prompts of a file to predict on, read as in training."""
        given = self._prompt_column or self._text_column
        lower = {column.lower() for column in table.column_names}
        if given is None and lower & set(PROMPT_COLUMNS) and len(lower & set(_OF_PROMPTS)) > 1:
            return _prompts(table, self._prompt_columns(table.column_names), "--input")
        option = "text_column" if self._text_column else "prompt_column"
        usual = (*PROMPT_COLUMNS, *TEXT_COLUMNS)
        return tables.texts(table, tables.text_column_of(source, table, given, usual, option), "--input")

    def predict(self, model: nn.Module, source: str | Path, batch_size: int) -> Iterator[dict[str, Any]]:
        """Continues each prompt of a file with the likeliest tokens: a prompt a line, or a column of prompts.

        One at a time, because a batch would need padding on the left, which changes what a model computes.
        """
        path = Path(source)
        table = tables.rows_of(path, self._how)
        self.notes += table.notes
        tokenizer = self._tokenizer()
        limit = text.position_limit(model.config)
        new = min(self._max_new_tokens, (limit or 2 * self._max_new_tokens) // 2)
        device = next(model.parameters()).device
        prefix = [tokenizer.bos_token_id] if text.adds_bos(tokenizer) else []
        for prompt in self._asked(path, table):
            ids = prefix + tokenizer(prompt, add_special_tokens=False)["input_ids"]
            ids = ids if limit is None else ids[-(limit - new) :]
            inputs = torch.tensor([ids], device=device)
            with torch.inference_mode():
                output = model.generate(  # type: ignore[operator]
                    input_ids=inputs,
                    attention_mask=torch.ones_like(inputs),
                    max_new_tokens=new,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                )
            completion = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
            yield {"prompt": prompt, "completion": completion}


def _prompts(table: Table, columns: Sequence[str], split: str) -> list[str]:
    """The prompts of a table: of two columns, joined by a line break where the second has a text."""
    for column in columns:
        tables.find_column(table.column_names, column, (), "prompt_column", where=split)
    first = tables.texts(table, columns[0], split)
    if len(columns) == 1:
        return first
    second = [value if value is not None else "" for value in tables.values_of(table, columns[1], split)]
    odd = next((value for value in second if not isinstance(value, str)), None)
    if odd is not None:
        raise UserError(f'The column "{columns[1]}" in {split} must hold texts, but one row is {str(odd)[:50]!r}.')
    return [f"{a}\n{b}" if b.strip() else a for a, b in zip(first, second)]


def _tokenise(tokenizer: Any, documents: _Documents, what: str) -> list[TokenSequence]:
    """Documents with the special tokens around them: one for the start where the model's tokenizer adds it, one for the
    end of each record, so that a model learns to stop. A prompt and its completion are tokenised apart, as in use.
    """  # noqa: D205
    start = [tokenizer.bos_token_id] if text.adds_bos(tokenizer) else []
    end = [] if documents.whole or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    nothing = (np.zeros(0, dtype=np.int64),) * 2
    prompts = [nothing] * len(documents.texts)
    if documents.prompts is not None:
        prompts = text.encode_with_bytes(tokenizer, documents.prompts, f"{what}, prompts")
    result = []
    for (given, _), (learnt, sizes) in zip(prompts, text.encode_with_bytes(tokenizer, documents.texts, what)):
        before = len(start) + len(given)
        ids = np.concatenate([np.array(start, np.int64), given, learnt, np.array(end, np.int64)])
        after = np.zeros(len(end), np.int64)
        result.append(
            TokenSequence(
                ids, np.arange(len(ids)) >= before, np.concatenate([np.zeros(before, np.int64), sizes, after])
            )
        )
    return result


def _unknown_note(tokenizer: Any, sequences: Sequence[TokenSequence], split: str) -> list[str]:
    unknown = sum(int((s.ids == tokenizer.unk_token_id).sum()) for s in sequences)
    if split == "train" or not unknown:
        return []
    return [
        f"{unknown:,} of the {sum(len(s.ids) for s in sequences):,} tokens of {split} are unknown to the tokenizer "
        "made of the training texts; perplexity and bits per byte count them as one token, so they come out too low"
    ]


TASK = CausalLM
