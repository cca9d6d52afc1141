"""Gives each word of a sentence a tag (named entities, parts of speech) with any token classifier of transformers.

A word's label stands at its first token, and the word's other tokens have none. So the loss is the mean over words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.schema import option
from ..config.task_options import read_options, required
from ..data import held_out, masks, model_checks, report, sources, tables, tagged, targets, text, unknown
from ..data import pretrained as models
from ..data.cache import Cached, cached
from ..data.cut import Cut, together
from ..data.table_files import Table
from ..data.tagged import Sentences
from ..data.token_rows import IGNORED
from ..errors import UserError
from ..exact.splits import Batch, Split
from . import entities
from .hub_options import LanguageModelOptions

AUTO = "AutoModelForTokenClassification"
_BUILT = (text.WORDS, unknown.SUBWORDS)
_INPUTS = ("input_ids", "attention_mask")
# Increase it when the arrays of a cache file change their meaning.
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class TokenOptions(LanguageModelOptions):
    """The options of `token_classification`."""

    data: Any = required(
        "a file with a word and its tag on each line (.conll, .iob, .bio, .txt, .tsv, ...); a json, jsonl or parquet "
        "file with lists of words and of tags (also .gz); a folder of such; a pattern of files; a name on the "
        "dataset hub; or {split: any of these}"
    )
    model: Any = required(
        "a model's folder or hub name, or a configuration such as "
        '{"model_type": "bert", "hidden_size": 128, "num_hidden_layers": 2}'
    )
    words_column: str | None = option(
        None, 'the column of words; the usual names are found. Of files with a word a line, its number: "1"'
    )
    tags_column: str | None = option(None, "the column of tags; the usual names, or the last number, are found")
    new_head: bool = option(False, "replace a head that was trained for another number of tags")
    tokenizer: str | None = option(
        None,
        '"subwords" or "words" (made of the training sentences), or a folder or hub name; without it the model\'s own, '
        'or "subwords" where the model is a configuration',
    )
    vocabulary: int | None = option(
        None, "the most subwords or words; without it 8,000 subwords, or all words that occur twice or more", minimum=1
    )
    max_length: int | None = option(None, "tokens of a sentence; without it what the model takes", minimum=3)
    truncate: bool = option(False, "cut longer sentences instead of refusing them; cut words are not learnt")
    validation_fraction: float = option(
        0.1, "of the training sentences, if the data has no validation split; 0 for none", minimum=0, below=1
    )
    test_fraction: float = option(0.0, "the same for the test split", minimum=0, below=1)
    label_smoothing: float = option(0.0, "share of the target that goes to all tags alike", minimum=0, below=1)


class TokenClassification:
    """Tags words. Its arguments are `TokenOptions`."""

    Options = TokenOptions
    pipeline_tag = "token-classification"
    best_metric = ("loss", "min")

    def __init__(self, **given: Any) -> None:
        o = read_options(TokenOptions, given)
        models.check_spec(o.model, "tagger", '{"model_type": "bert", "hidden_size": 128, "num_hidden_layers": 2}')
        self._scratch = isinstance(o.model, Mapping) or not o.pretrained
        if o.new_head and self._scratch:
            raise UserError(
                '"trainer.task_options.new_head" has no effect: a model from scratch has a new head anyway.'
            )
        self._tokenizer_name = text.check_tokenizer(o.tokenizer, o.model, not self._scratch, unknown.SUBWORDS, _BUILT)
        if o.vocabulary is not None and self._tokenizer_name not in _BUILT:
            raise UserError(
                '"trainer.task_options.vocabulary" has an effect only on the tokenizers "words" and "subwords".'
            )
        sources.check_data(o.data, o.config_name)
        held_out.check_fractions(o.validation_fraction, o.test_fraction)
        self._o, self.random_weights = o, self._scratch
        self._how = replace(tables.checked_format(o.separator, o.encoding), conll=True)
        self.notes: list[str] = []
        self.data_lines: list[str] = []
        self._facts: dict[str, Any] = {}  # what the cache says beside the arrays
        self._names: list[str] = []
        self._sample: Batch = {}  # two rows of the training set, on which `model` tries the model
        self._longest, self._prepares_masks = 0, False
        self._saved: Path | None = None  # where `load` found the model

    # --- data ---------------------------------------------------------------------------------------------------------

    def splits(self, cut: Cut | None = None) -> dict[str, Split]:
        """input_ids, attention_mask, labels (N, tokens) int64; words (N,) int64, how many words a sentence has.

        A label stands at the first token of a word. All others are -100.
        """
        o = self._o
        limit = self._limit(self._configuration())
        content, found = tables.content_of(o.data, self._read)
        key = {
            "version": _VERSION,
            "data": content,
            "format": [o.separator, o.encoding],
            "columns": [o.split_column, o.words_column, o.tags_column, o.group_column],
            "tokenizer": text.tokenizer_key(self._tokenizer_name, o.trust_remote_code),
            "vocabulary": o.vocabulary,
            "rows": [limit, o.truncate],
            "held_out": [o.test_fraction, o.validation_fraction, o.split_seed],
            "versions": text.versions("datasets", "tokenizers", "transformers"),
        }
        if cut is None:
            arrays, self._facts = cached("token-classification", key, lambda: self._build(found or self._read(), limit))
        else:
            arrays, self._facts = self._build(found or self._read(), limit, cut)
        self._names = self._facts["names"]
        if tagged.are_entities(self._names):
            self.best_metric = ("entity_f1", "max")
        other = None if self._tokenizer_name in _BUILT else self._tokenizer_name
        self.data_lines[:] = self._facts["read"]
        self.notes[:] = self._facts["notes"] + models.trust_note(o.trust_remote_code, o.model, other)
        result = {}
        for split in self._facts["splits"]:
            own = {name: arrays[f"{split}.{name}"] for name in (*_INPUTS, "labels", "words")}
            padded = (*_INPUTS, "labels")
            result[split] = Split(own, own["words"].float(), arrays[f"{split}.lengths"], padded)
            self._longest = max(self._longest, own["labels"].shape[1])
        self._sample = {name: result["train"].arrays[name][:2].clone() for name in _INPUTS}
        return result

    def _read(self) -> dict[str, Table]:
        o = self._o
        return tables.read(o.data, config_name=o.config_name, split_column=o.split_column, how=self._how)

    def _build(self, found: dict[str, Table], limit: int | None, cut: Cut | None = None) -> Cached:
        """What the cache keeps: arrays by "split.name", and facts."""
        o, notes = self._o, tables.notes_of(found)
        words_column, tags_column = tagged.columns_of(found["train"], o.words_column, o.tags_column)
        if cut is not None:
            used = (words_column, tags_column, o.group_column)
            found = together(cut, found, [column for column in used if column is not None])
        read: dict[str, Sentences] = {}
        for split, table in found.items():
            for name, column in (("words_column", words_column), ("tags_column", tags_column)):
                tables.find_column(table.column_names, column, (), name, where=split)
            read[split] = tagged.read(table, words_column, tags_column, split, o.group_column, notes)
        names = tagged.tag_names({split: own.tags for split, own in read.items()})
        read = self._hold_out(read, names, cut)
        notes += tables.duplicates_note({split: [tuple(words) for words in own.words] for split, own in read.items()})
        tokenizer, built = self._made_tokenizer([" ".join(words) for words in read["train"].words], limit)
        place = {name: i for i, name in enumerate(names)}
        arrays: dict[str, Tensor] = {}
        shares = {}
        for split, own in read.items():
            whole = tagged.encode(tokenizer, own.words, None, f"Tokenising {split}")
            shares[split] = unknown.unknown_share(tokenizer, whole.ids)
            tokens = self._cut(tokenizer, whole, own, split, limit, notes)
            lengths = torch.tensor([len(ids) for ids in tokens.ids])
            labels = [[IGNORED] * len(ids) for ids in tokens.ids]
            for line, places, tags in zip(labels, tokens.places, own.tags):
                for at, tag in zip(places, tags):
                    if at >= 0:
                        line[at] = place[tag]
            arrays[f"{split}.input_ids"] = text.pad(tokens.ids, tokenizer.pad_token_id)
            arrays[f"{split}.labels"] = text.pad(labels, IGNORED)
            arrays[f"{split}.attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
            arrays[f"{split}.words"] = (arrays[f"{split}.labels"] != IGNORED).sum(1)
            arrays[f"{split}.lengths"] = lengths
        said = f'the tokenizer "{self._tokenizer_name}"' if built else f"the tokenizer of {self._tokenizer_name}"
        notes += unknown.check_share(
            shares, said, 'Set another "tokenizer" in trainer.task_options, such as "subwords".'
        )
        said_of = {"words": words_column, "tags": tags_column, "group": o.group_column}
        numbers = {s: np.array([place[tag] for tags in own.tags for tag in tags]) for s, own in read.items()}
        first = " ".join(f"{w}/{t}" for w, t in zip(read["train"].words[0], read["train"].tags[0]))
        lines = [
            report.rows_line(
                {split: len(own.words) for split, own in read.items()},
                list(found),
                "sentence",
                groups=report.Groups(o.group_column, {split: own.groups for split, own in read.items()}),
            ),
            report.columns_line(found["train"].column_names, said_of),
            report.classes_line(names, numbers),
            report.sample_line(first),
        ]
        facts = {"splits": list(read), "names": names, "notes": notes, "read": lines, "limit": limit}
        return arrays, facts | {"tokens": text.facts_of(tokenizer), "tokenizer": built}

    def _hold_out(self, read: dict[str, Sentences], names: list[str], cut: Cut | None) -> dict[str, Sentences]:
        """The splits, with parts of train as those that the data lacks, drawn by rarest tags; or those of a fold."""
        wanted = {"test": self._o.test_fraction, "validation": self._o.validation_fraction}
        wanted = {name: part for name, part in wanted.items() if name not in read}
        train = read["train"]
        place = {name: i for i, name in enumerate(names)}
        present = np.zeros((len(train.words), len(names)), dtype=bool)
        for line, tags in zip(present, train.tags):
            line[[place[tag] for tag in tags]] = True
        count, strata = len(train.words), targets.rarest(present)
        if cut is None:
            chosen = held_out.held_out(count, wanted, self._o.split_seed, strata, train.groups)
        else:
            chosen = cut(count, None, train.groups)
        return sources.in_order(read | {name: train.take(rows) for name, rows in chosen.items()})

    def _made_tokenizer(self, sentences: list[str], limit: int | None) -> tuple[Any, str | None]:
        """The tokenizer; and its JSON if it is made of the training sentences. Capital letters stay, for names."""
        if self._tokenizer_name not in _BUILT:
            return self._own_tokenizer(), None
        make = text.build_words if self._tokenizer_name == text.WORDS else unknown.build_subwords
        built = make(sentences, self._o.vocabulary, lowercase=False)
        return text.wrap(built, limit), built

    def _own_tokenizer(self) -> Any:
        """The model's own. Raises UserError if it cannot tell which token belongs to which word."""
        name, trust = self._tokenizer_name, self._o.trust_remote_code
        tokenizer = text.load_tokenizer(name, trust)
        if not tokenizer.is_fast:
            raise UserError(
                f'"trainer.task_options.tokenizer": the tokenizer in "{name}" is a slow one. It does not say which '
                "token belongs to which word. Take one with a tokenizer.json."
            )
        # A tokenizer of bytes, such as roberta's, needs a blank before each word that is given by itself.
        if '"ByteLevel"' in str(tokenizer.backend_tokenizer.pre_tokenizer):
            tokenizer = text.load_tokenizer(name, trust, add_prefix_space=True)
        return tokenizer

    def _cut(
        self, tokenizer: Any, whole: tagged.Tokens, own: Sentences, split: str, limit: int | None, notes: list[str]
    ) -> tagged.Tokens:
        """The tokens of sentences, at most `limit` each. Raises UserError if some are longer, and must not be cut."""
        lengths = [len(ids) for ids in whole.ids]
        if limit is None or max(lengths) <= limit:
            return whole
        longest = int(np.argmax(lengths))
        encoded = text.Encoded(whole.ids, [], (lengths[longest], longest), sum(n > limit for n in lengths))
        message = text.length_message(encoded, split, limit, own.rows)
        if not self._o.truncate:
            raise UserError(
                f'{message}.\nSplit such sentences in the data, or set "truncate": true in trainer.task_options to cut '
                "them there."
            )
        tokens = tagged.encode(tokenizer, own.words, limit, f"Tokenising {split}")
        lost = sum(place < 0 for places in tokens.places for place in places)
        notes.append(f"{message}: cut there. Their {lost:,} last words are neither learnt nor measured")
        return tokens

    # --- model --------------------------------------------------------------------------------------------------------

    def _configuration(self, **changes: Any) -> Any:
        o = self._o
        config = models.configuration(o.model, o.trust_remote_code, attention=o.attention, **changes)
        model_checks.check_kind(AUTO, o.model, config, o.trust_remote_code)
        return config

    def _limit(self, config: Any) -> int | None:
        """The most tokens of a sentence: the option, which may not exceed what the model takes, or what it takes."""
        takes, asked = text.position_limit(config), self._o.max_length
        if asked is not None and takes is not None and asked > takes:
            raise UserError(
                f'"trainer.task_options.max_length" is {asked}, but the model takes {takes} tokens at most.'
            )
        return asked or takes

    def model(self) -> nn.Module:
        """input_ids, attention_mask (B, tokens) -> logits (B, tokens, tags)."""
        assert self._facts, "splits() comes first"
        o, names = self._o, self._names
        given = o.model if isinstance(o.model, Mapping) else {}
        for name in ("num_labels", "id2label", "label2id"):
            own = given.get(name)
            if own is not None and (own if name == "num_labels" else len(own)) != len(names):
                raise UserError(
                    f'"trainer.task_options.model.{name}" is {own}, but the data has {len(names)} tags '
                    f"({', '.join(names[:10])}). Leave it out, to follow the data."
                )
        config = self._configuration(
            num_labels=len(names), id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}
        )
        text.fit_configuration(config, self._facts["tokens"], o.model, self._scratch)
        fresh: list[str] = []
        model = models.build(
            AUTO,
            o.model,
            config,
            pretrained=not self._scratch,
            classes=names,
            new_head=o.new_head,
            trust_remote_code=o.trust_remote_code,
            notes=fresh,
        )
        self.notes += [note for note in fresh if note not in self.notes]
        model_checks.check_saving(model, o.model)
        shape = self._sample["input_ids"].shape
        logits = model_checks.tried(model, o.model, self._sample, f"sentences of {shape[1]:,} tokens")
        if logits.shape != (*shape, len(names)):
            raise UserError(
                f'"trainer.task_options.model" gives logits of shape {tuple(logits.shape)} for {shape[0]} sentences of '
                f"{shape[1]} tokens, but the data has {len(names)} tags."
            )
        self._prepares_masks = masks.may_be_prepared(model, self._longest)
        return model

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B, tokens, tags)."""
        inputs = {name: batch[name] for name in _INPUTS}
        if self._prepares_masks:
            inputs["attention_mask"] = masks.for_each_head(inputs["attention_mask"])
        return model(**inputs).logits

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Of each sentence, nll: its words' summed loss (B,); in evaluation also tags: (B, tokens), of each token.

        tags are padded to the longest sentence of all splits: those of a split must be of one shape.
        """
        labels = batch["labels"]  # (B, tokens)
        logits = self._logits(model, batch)
        nll = F.cross_entropy(
            logits.float().flatten(0, 1),
            labels.flatten(),
            reduction="none",
            ignore_index=IGNORED,
            label_smoothing=self._o.label_smoothing,
        ).view(labels.shape)
        outputs = {"nll": nll.sum(dim=1)}
        if not model.training:
            outputs["tags"] = F.pad(logits.argmax(dim=-1), (0, max(0, self._longest - labels.shape[1])))
        return outputs

    def loss(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed cross-entropy, and the number of words."""
        return outputs["nll"].sum(), batch["words"].sum()

    def sample_losses(self, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        """The summed cross-entropy of each sentence, (B,)."""
        return outputs["nll"]

    def metrics(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, float]:
        """The accuracy of a word's tag; and entities' precision, recall and F1, or, of other tags, macro-F1."""
        from sklearn.metrics import f1_score

        labels = batch["labels"].numpy()
        chosen = outputs["tags"].numpy()[:, : labels.shape[1]]
        there = labels != IGNORED
        result = {"accuracy": float((chosen == labels)[there].mean())}
        if not tagged.are_entities(self._names):
            f1 = f1_score(labels[there], chosen[there], average="macro", zero_division=0)
            return result | {"macro_f1": float(f1)}
        names = np.array(self._names, dtype=object)
        rows = [(names[own[at]].tolist(), names[true[at]].tolist()) for own, true, at in zip(chosen, labels, there)]
        return result | entities.metrics([own for own, _ in rows], [true for _, true in rows])

    def predictions(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, list[str]]:
        """Of each sentence: target and prediction, the tags of its words with blanks between them."""
        labels = batch["labels"].numpy()
        chosen = outputs["tags"].numpy()[:, : labels.shape[1]]

        def joined(rows: np.ndarray) -> list[str]:
            return [" ".join(self._names[i] for i in row[true != IGNORED]) for row, true in zip(rows, labels)]

        return {"target": joined(labels), "prediction": joined(chosen)}

    # --- what becomes of it -------------------------------------------------------------------------------------------

    def _tokenizer(self) -> Any:
        if self._saved is not None:
            return text.load_tokenizer(str(self._saved), False)
        facts = self._facts
        tokenizer = (
            self._own_tokenizer() if facts["tokenizer"] is None else text.wrap(facts["tokenizer"], facts["limit"])
        )
        if facts["limit"] is not None:
            tokenizer.model_max_length = facts["limit"]
        return tokenizer

    def save(self, model: nn.Module, folder: Path) -> None:
        """Weights, configuration with the tags, and tokenizer: what from_pretrained reads."""
        text.save_model(model, self._tokenizer(), folder)

    def load(self, folder: Path) -> nn.Module:
        """The model that `save` wrote."""
        model = models.load_saved(AUTO, Path(folder))
        self._saved = Path(folder)
        config: Any = model.config
        self._names = [config.id2label[i] for i in range(len(config.id2label))]
        return model

    def _asked(self, source: Path) -> list[list[str]]:
        """The words of each sentence to predict on. A .txt file without tags holds a sentence a line."""
        how = self._how
        if source.suffix.lower() == ".txt":
            table = tables.rows_of(source, replace(how, conll=False))
            fields = [line.split() for line in table.values("text")]
            last = {own[-1] for own in fields if own and own[0] != "-DOCSTART-"}
            widths = {len(own) for own in fields if own and own[0] != "-DOCSTART-"}
            if not (len(widths) == 1 and (widths == {1} or last <= set(self._names))):
                return [own for own in fields if own]
        table = tables.rows_of(source, how)
        self.notes += table.notes
        column = tables.find_column(table.column_names, self._o.words_column, tagged.WORD_COLUMNS, "words_column")
        return tagged.words_of(table, column, "--input")

    def predict(self, model: nn.Module, source: str | Path, batch_size: int) -> Iterator[dict[str, Any]]:
        """{"sentence", "word", "tag", "score"} of each word. Sentences count from 1; long ones are read in parts."""
        sentences = self._asked(Path(source))
        tokenizer, device = self._tokenizer(), next(model.parameters()).device
        limit = text.tokenizer_limit(tokenizer)
        parts = tagged.pieces(tokenizer, sentences, limit)
        for start in range(0, len(parts), batch_size):
            some = parts[start : start + batch_size]
            words = [sentences[sentence][first:stop] for sentence, first, stop in some]
            tokens = tagged.encode(tokenizer, words, limit, "Tokenising")
            ids = text.pad(tokens.ids, tokenizer.pad_token_id)
            lengths = torch.tensor([len(own) for own in tokens.ids])
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            with torch.inference_mode():
                logits = self._logits(model, {"input_ids": ids.to(device), "attention_mask": mask.to(device)})
            scores, tags = torch.softmax(logits.double(), dim=-1).cpu().max(dim=-1)
            for row, ((sentence, _, _), own) in enumerate(zip(some, words)):
                for word, place in zip(own, tokens.places[row]):
                    tag, score = self._names[int(tags[row, place])], round(float(scores[row, place]), 6)
                    yield {"sentence": sentence + 1, "word": word, "tag": tag, "score": score}


TASK = TokenClassification
