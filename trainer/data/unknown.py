"""Words that a tokenizer does not know: their share, and a tokenizer of subwords for texts with few repeated words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import UserError

SUBWORDS = "subwords"
# Above the first share of unknown tokens there is a note, and above the second one the run is refused.
NOTED, REFUSED = 0.2, 0.5
# A vocabulary that small data can fill.
SUBWORDS_SIZE = 8000


def unknown_share(tokenizer: Any, rows: Sequence[Sequence[int] | np.ndarray]) -> float:
    """The share of unknown tokens among those that are not special.

    Args:
        tokenizer: a transformers tokenizer.
        rows: token numbers of each text.
    """
    unknown = tokenizer.unk_token_id
    if unknown is None or not rows:
        return 0.0
    tokens = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    special = np.isin(tokens, [number for number in tokenizer.all_special_ids if number != unknown])
    return float((tokens == unknown).sum()) / max(int((~special).sum()), 1)


def check_share(shares: dict[str, float], what: str, remedy: str) -> list[str]:
    """A note if many words are unknown.

    Args:
        shares: split -> share; of "train" among them.
        what: the tokenizer, for messages.
        remedy: a sentence on what to do.

    Raises:
        UserError: more than half of the training set is unknown.
    """
    said = ", ".join(f"{share:.0%} of {split}" for split, share in shares.items())
    if shares["train"] > REFUSED:
        raise UserError(f"{said} is unknown to {what}, so the model would see [UNK] instead of words.\n{remedy}")
    return [f"unknown to {what}: {said}"] if max(shares.values()) > NOTED else []


def build_subwords(texts: Sequence[str], size: int | None = None, lowercase: bool = True) -> str:
    """A tokenizer of parts of words for classifiers, as JSON: byte-pair encoding (Sennrich et al. 2016) of characters.

    It also serves for languages without blanks between words, and for texts with few repeated words.

    Args:
        texts: of the training set only.
        size: the largest number of parts; None for 8,000.
        lowercase: capital letters are read as small ones.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=(size or SUBWORDS_SIZE) + len(special), min_frequency=2, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator((texts[i : i + 1000] for i in range(0, len(texts), 1000)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return str(tokenizer.to_str())
