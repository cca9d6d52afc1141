"""Texts of which a tokenizer knows little: said, refused, or read in parts of words."""

from __future__ import annotations

import pytest

from trainer.data import text
from trainer.data.unknown import build_subwords, check_share, unknown_share
from trainer.errors import UserError

THAI = [f"หนังเรื่องนี้ดีมาก{i}" for i in range(20)] + [f"ฉันไม่ชอบหนังเรื่องนี้เลย{i}" for i in range(20)]
UNIQUE = [f"u{i}x v{i}y" for i in range(40)]


@pytest.mark.parametrize("texts", [THAI, UNIQUE], ids=["thai", "unique"])
def test_subwords_know_what_words_do_not(texts: list[str]) -> None:
    words, parts = text.wrap(text.build_words(texts), None), text.wrap(build_subwords(texts), None)
    assert unknown_share(words, words(texts)["input_ids"]) > 0.9
    assert unknown_share(parts, parts(texts)["input_ids"]) == 0.0
    assert build_subwords(texts) == build_subwords(texts[::-1]), "whatever the order"
    lengths = [len(ids) for ids in parts(texts)["input_ids"]]
    assert max(lengths) < max(map(len, texts)), "parts, not only characters"


def test_the_share_is_that_of_tokens_that_are_not_special() -> None:
    tokenizer = text.wrap(text.build_words(["a b", "a b"]), None)
    assert unknown_share(tokenizer, tokenizer(["a b c", "d"])["input_ids"]) == 0.5
    assert unknown_share(tokenizer, []) == 0.0


def test_what_is_said_of_a_share() -> None:
    assert check_share({"train": 0.1, "validation": 0.2}, "it", "Do.") == []
    assert check_share({"train": 0.1, "test": 0.3}, "it", "Do.") == ["unknown to it: 10% of train, 30% of test"]
    with pytest.raises(UserError, match=r"51% of train is unknown to it, .*\nDo\."):
        check_share({"train": 0.51}, "it", "Do.")
