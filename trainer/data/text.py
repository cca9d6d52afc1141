"""Texts as token numbers: tokenizers of a model or built from the training texts, and tokenising with a progress bar.

transformers and tokenizers are imported inside functions. If the cache has the tokens, they are not needed before the
model is saved.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from . import pretrained
from .cache import hash_files
from .unknown import SUBWORDS

# Tokenizers that are built from the training texts. Nothing has to be downloaded for them.
WORDS, CHARACTERS = "words", "characters"

# A word that occurs only once becomes [UNK]. If it were in the vocabulary, [UNK] would never be trained.
MIN_WORD_COUNT = 2

# This many texts are tokenised at a time. Then the progress bar moves.
CHUNK_TEXTS = 1000
# Long texts are tokenised in parts of about this many characters, cut after a line. This bounds the memory for offsets,
# which are Python objects.
CHUNK_CHARACTERS = 1 << 18

_TOKENIZER_FILES = ("token*", "*.model", "vocab*", "merges*", "special_tokens*", "added_tokens*", "config.json")

# These models give a text's first token the position "number of the padding token + 1". So they take fewer tokens than
# they have positions.
POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "mpnet",
                            "longformer", "ibert", "xmod", "data2vec-text", "luke", "esm")  # fmt: skip


def check_tokenizer(
    option: str | None, spec: pretrained.Spec, from_weights: bool, default: str, built: Sequence[str]
) -> str:
    """The tokenizer that the option names: one that is built here, or a folder or hub name. Raises UserError.

    Args:
        option: as given; None for the model's own, or for `default` if the model is a configuration.
        spec: the option `model`.
        from_weights: whether pretrained weights are read.
        default: for a configuration.
        built: the tokenizers that the task builds from its training texts.
    """
    if option is None:
        return default if isinstance(spec, Mapping) else spec
    if option in built and from_weights and isinstance(spec, str):
        raise UserError(
            f'"trainer.task_options.tokenizer" is "{option}", but the weights of {spec} were trained with another one. '
            'Leave "tokenizer" out to use the model\'s own, or train from scratch ("pretrained": false).'
        )
    return str(option)


def versions(*packages: str) -> dict[str, str]:
    """The versions of installed packages that a cache depends on, without importing them."""
    return {name: importlib.metadata.version(name) for name in packages}


def position_limit(config: Any) -> int | None:
    """The most tokens that a model takes, by its configuration; None if it has no such limit."""
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    if config.model_type in POSITIONS_AFTER_PADDING:
        limit -= int(config.pad_token_id or 0) + 1
    return limit


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' progress bars and warnings, such as for too long texts: the trainer says it once."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        if bars:
            transformers_logging.enable_progress_bar()


# --- building tokenizers ----------------------------------------------------------------------------------------------


def _train(tokenizer: Any, texts: Sequence[str], special: list[str], size: int | None, at_least: int) -> None:
    """Trains a vocabulary: by frequency, then by alphabet. The order of the texts changes nothing."""
    from tokenizers import trainers

    trainer = trainers.WordLevelTrainer(
        vocab_size=2**31 - 1 if size is None else size + len(special),
        min_frequency=at_least,
        special_tokens=special,
        show_progress=False,
    )
    tokenizer.train_from_iterator((texts[i : i + 1000] for i in range(0, len(texts), 1000)), trainer)


def build_words(texts: Sequence[str], size: int | None = None, lowercase: bool = True) -> str:
    """A word-level tokenizer for classifiers, as JSON: words, numbers and punctuation marks.

    Args:
        texts: of the training set only.
        size: the largest number of words, the most frequent first; None for all that occur twice or more.
        lowercase: capital letters are read as small ones.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    _train(tokenizer, texts, special, size, MIN_WORD_COUNT)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return str(tokenizer.to_str())


def build_for_generation(kind: str, texts: Sequence[str], size: int | None = None) -> str:
    r"""A tokenizer for language models, as JSON. Its decoder restores the text, white space included.

    Args:
        kind: "characters": each is a token. Or "words": runs of letters and digits, and single other characters, each
            with the blank before it, as in GPT-2's first step of splitting.
        texts: of the training set only.
        size: the largest number of characters or words, the most frequent first.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    assert kind in (WORDS, CHARACTERS)
    special = ["<|endoftext|>", "<|pad|>", "<|unk|>"]
    tokenizer = Tokenizer(models.WordLevel(unk_token="<|unk|>"))
    pattern = r"[\s\S]" if kind == CHARACTERS else r" ?\w+| ?[^\w\s]|\s"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    _train(tokenizer, texts, special, size, 1 if kind == CHARACTERS else MIN_WORD_COUNT)
    return str(tokenizer.to_str())


def wrap(built: str, max_length: int | None, token_types: bool = False) -> Any:
    """A transformers tokenizer around one that was built here. AutoTokenizer can load it after it is saved."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_str(built)
    names = ["input_ids", "token_type_ids", "attention_mask"] if token_types else ["input_ids", "attention_mask"]
    if tokenizer.token_to_id("[CLS]") is not None:
        special = {name: f"[{name[:-6].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token")}
        special["mask_token"] = "[MASK]"
    else:
        special = {"pad_token": "<|pad|>", "unk_token": "<|unk|>"} | dict.fromkeys(
            ("eos_token", "bos_token"), "<|endoftext|>"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        model_input_names=names,
        clean_up_tokenization_spaces=False,  # else decoding "a ." would give "a."
        **special,
    )


def load_tokenizer(spec: str, trust_remote_code: bool, **options: Any) -> Any:
    """The tokenizer in a folder or under a hub name. `options` go to from_pretrained. Raises UserError.

    A tokenizer without a padding token pads with its end-of-text token. This changes nothing: padding is masked, and
    does not count in the loss.
    """
    tokenizer = pretrained.tokenizer_of(spec, trust_remote_code, **options)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise UserError(f'"trainer.task_options.tokenizer": the tokenizer in "{spec}" has no padding token.')
    return tokenizer


def tokenizer_key(spec: str, trust_remote_code: bool) -> Any:
    """A tokenizer's part of a cache key: hashes of its files, or the content of a tokenizer from the hub."""
    if spec in (WORDS, CHARACTERS, SUBWORDS):
        return {"built": spec, "at_least": MIN_WORD_COUNT}
    folder = Path(spec).expanduser()
    if folder.is_dir():
        files = sorted({file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()})
        return [[file.name, hash_files(file)] for file in files]
    tokenizer = load_tokenizer(spec, trust_remote_code)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return [spec, repr(tokenizer), backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())]


def facts_of(tokenizer: Any) -> dict[str, Any]:
    """What a model's configuration needs: the size of the vocabulary and the numbers of the special tokens."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
    largest = max(tokenizer.get_vocab().values(), default=0)
    return {"vocab_size": largest + 1} | {name: getattr(tokenizer, name, None) for name in names}


def fit_configuration(config: Any, facts: Mapping[str, Any], spec: pretrained.Spec, scratch: bool) -> None:
    """Makes a model's configuration agree with the tokenizer. Raises UserError where it cannot.

    Args:
        config: changed in place.
        facts: from `facts_of`.
        spec: the option `model`.
        scratch: no pretrained weights: vocabulary and special tokens follow the tokenizer.
    """
    given = spec if isinstance(spec, Mapping) else {}
    text_config = config.get_text_config()
    if scratch and "vocab_size" not in given:
        text_config.vocab_size = facts["vocab_size"]
    elif facts["vocab_size"] > text_config.vocab_size:
        raise UserError(
            f'The tokenizer has {facts["vocab_size"]:,} tokens, but the model of "trainer.task_options.model" has '
            f"embeddings for {text_config.vocab_size:,} (vocab_size). "
            + ("Leave vocab_size out, to follow the tokenizer." if given else "Use the tokenizer that belongs to it.")
        )
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
        if (scratch or getattr(text_config, name, None) is None) and name not in given and hasattr(text_config, name):
            if name in ("bos_token_id", "eos_token_id") and facts[name] is None and not scratch:
                continue
            setattr(text_config, name, facts[name])


def tokenizer_limit(tokenizer: Any) -> int | None:
    """The most tokens that a tokenizer says its model takes; None if it knows no limit: transformers writes 10^30."""
    limit = tokenizer.model_max_length
    return int(limit) if limit is not None and limit < 1e9 else None


def adds_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer puts a start token before every text by itself, as Llama's does."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes what from_pretrained of the Auto classes reads: weights (safetensors), configuration and tokenizer."""
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


# --- tokenising -------------------------------------------------------------------------------------------------------


def chunks(count: int, size: int, what: str) -> Iterator[range]:
    """Ranges that cover 0..count-1, with a progress bar on a terminal (of the one process that builds the cache)."""
    bar = None
    if sys.stderr.isatty() and count > size:
        from tqdm import tqdm

        bar = tqdm(total=count, desc=what, unit="text", dynamic_ncols=True, leave=False)
    try:
        for start in range(0, count, size):
            part = range(start, min(start + size, count))
            yield part
            if bar is not None:
                bar.update(len(part))
    finally:
        if bar is not None:
            bar.close()


@dataclass
class Encoded:
    """Tokenised texts.

    Attributes:
        ids: token numbers of each text.
        types: token types of each text, where the tokenizer gives any.
        longest: the largest number of tokens before any truncation, and its row.
        too_long: how many texts had more than the limit.
    """

    ids: list[list[int]]
    types: list[list[int]]
    longest: tuple[int, int] = (0, 0)
    too_long: int = 0


def encode(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None, limit: int | None, truncate: bool, what: str
) -> Encoded:
    """Tokenises texts, or pairs of them, with the tokenizer's own special tokens.

    Args:
        tokenizer: a transformers tokenizer.
        texts, pairs: the rows.
        limit: tokens that a row may have; None for any number.
        truncate: cut longer rows (of a pair, the longer text). Otherwise they are only counted.
        what: for the progress bar.
    """
    result = Encoded([], [])
    with quiet():
        for rows in chunks(len(texts), CHUNK_TEXTS, what):
            first = list(texts[rows.start : rows.stop])
            second = None if pairs is None else list(pairs[rows.start : rows.stop])
            output = tokenizer(first, second, padding=False, truncation=False, return_attention_mask=False)
            ids, types = output["input_ids"], output.get("token_type_ids", [])
            for place, row in enumerate(ids):
                # The row is negative: of equally long texts, max() then keeps the first.
                result.longest = max(result.longest, (len(row), -(rows.start + place)))
            long = [place for place, row in enumerate(ids) if limit is not None and len(row) > limit]
            result.too_long += len(long)
            if long and truncate:
                cut = tokenizer(
                    [first[p] for p in long],
                    None if second is None else [second[p] for p in long],
                    padding=False,
                    truncation=True,
                    max_length=limit,
                    return_attention_mask=False,
                )
                for i, place in enumerate(long):
                    ids[place] = cut["input_ids"][i]
                    if types:
                        types[place] = cut["token_type_ids"][i]
            result.ids += ids
            result.types += types
    result.longest = (result.longest[0], -result.longest[1])
    return result


def length_message(encoded: Encoded, split: str, limit: int, rows: np.ndarray | None = None) -> str:
    """A clause that says how many texts are too long, and which is the longest; `rows`: their rows in the file."""
    n, (longest, row) = encoded.too_long, encoded.longest
    row = row if rows is None else int(rows[row])
    return (
        f"{n:,} of the {len(encoded.ids):,} texts in {split} {'is' if n == 1 else 'are'} longer than {limit:,} tokens "
        f"(the longest, in row {row + 1}, has {longest:,})"
    )


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """(rows, longest) int64, filled up on the right."""
    longest = max(map(len, rows), default=0)
    result = np.full((len(rows), longest), value, dtype=np.int64)
    for line, row in zip(result, rows):
        line[: len(row)] = row
    return torch.from_numpy(result)


def utf8_ends(text: str) -> np.ndarray:
    """(characters + 1,) int64: the UTF-8 bytes before each character, and of the whole text."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
    return np.concatenate([[0], np.cumsum(sizes)])


def encode_with_bytes(tokenizer: Any, texts: Sequence[str], what: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each text its token numbers, without special tokens, and the UTF-8 bytes that each token stands for.

    The bytes always add up to those of the text. A token counts the bytes from the end of the previous token to its own
    end, and the last token counts the rest. So white space and characters of several tokens are counted once.

    Returns:
        For each text (tokens,) int64 and (tokens,) int64.
    """
    parts = [(place, part) for place, text in enumerate(texts) for part in _parts(text)]
    found: list[tuple[list[np.ndarray], list[np.ndarray]]] = [([], []) for _ in texts]
    fast = bool(tokenizer.is_fast)
    size = 1 if len(texts) < len(parts) else CHUNK_TEXTS  # parts of long texts are large: one at a time
    with quiet():
        for rows in chunks(len(parts), size, what):
            some = [part for _, part in parts[rows.start : rows.stop]]
            output = tokenizer(some, add_special_tokens=False, return_offsets_mapping=fast, return_attention_mask=False)
            for i, (place, part) in enumerate(parts[rows.start : rows.stop]):
                numbers = np.asarray(output["input_ids"][i], dtype=np.int64)
                if not len(numbers):
                    continue
                before = utf8_ends(part)
                if fast:
                    ends = np.asarray(output["offset_mapping"][i], dtype=np.int64)[:, 1]
                    cumulative = before[np.maximum.accumulate(ends)]
                else:  # slow tokenizers have no offsets: the bytes are spread evenly, and their sum is exact
                    cumulative = before[-1] * np.arange(1, len(numbers) + 1) // len(numbers)
                cumulative[-1] = before[-1]
                found[place][0].append(numbers)
                found[place][1].append(np.diff(cumulative, prepend=0))
    empty = [np.zeros(0, dtype=np.int64)]
    return [(np.concatenate(numbers or empty), np.concatenate(sizes or empty)) for numbers, sizes in found]


def _parts(text: str) -> Iterator[str]:
    """A text, in parts of at most CHUNK_CHARACTERS that end after a line."""
    start = 0
    while len(text) - start > CHUNK_CHARACTERS:
        end = text.rfind("\n", start, start + CHUNK_CHARACTERS) + 1
        end = end if end > start else start + CHUNK_CHARACTERS
        yield text[start:end]
        start = end
    yield text[start:]
