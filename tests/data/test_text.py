"""Tokenizers made of the training texts, tokenising with lengths and bytes, and options that must fit a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.data import text
from trainer.errors import UserError

TEXTS = ["the cat sat", "The dog, the cat!", "a dog sat; naïve 日本", "a hapax"]
PROSE = "First Citizen:\r\nBefore we proceed, hear  me.\n\n\tAll: «speak» 🎭 é日本\n"


def vocabulary(built: str) -> list[str]:
    from tokenizers import Tokenizer

    found: dict[str, int] = Tokenizer.from_str(built).get_vocab()
    return sorted(found, key=lambda word: found[word])


def test_words_by_frequency_then_alphabet_and_whatever_the_order() -> None:
    built = text.build_words(TEXTS)
    # the: 3; a, cat, dog, sat: 2. Words that come once stand for all unknown ones.
    assert vocabulary(built) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "cat", "dog", "sat"]
    assert text.build_words(TEXTS[::-1]) == built
    assert vocabulary(text.build_words(TEXTS, 2))[5:] == ["the", "a"]
    tokenizer = text.wrap(built, 7)
    assert tokenizer("The cat, unseen")["input_ids"] == [2, 5, 7, 1, 1, 3]
    assert tokenizer.model_max_length == 7
    pair = text.wrap(built, None, token_types=True)(["a cat"], ["dog"])
    assert pair["input_ids"] == [[2, 6, 7, 3, 8, 3]]
    assert pair["token_type_ids"] == [[0, 0, 0, 0, 1, 1]]


@pytest.mark.parametrize("kind", [text.CHARACTERS, text.WORDS])
def test_tokenizers_for_generation_give_the_text_back(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    twice = [PROSE, PROSE]  # words that come once would be unknown
    tokenizer = text.wrap(text.build_for_generation(kind, twice), 99)
    ids = tokenizer(PROSE)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == PROSE
    if kind == text.CHARACTERS:
        assert len(ids) == len(PROSE)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(PROSE)["input_ids"] == ids
    assert again.decode(ids) == PROSE
    assert (again.eos_token, again.pad_token, again.model_max_length) == ("<|endoftext|>", "<|pad|>", 99)


def test_the_words_tokenizer_is_loaded_from_its_folder_alone(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = text.wrap(text.build_words(TEXTS), 16)
    tokenizer.save_pretrained(tmp_path)
    AutoConfig.for_model("bert").save_pretrained(tmp_path)  # beside which AutoTokenizer might take BERT's own class
    again = AutoTokenizer.from_pretrained(tmp_path)
    for sample in (*TEXTS, PROSE):
        assert again(sample)["input_ids"] == tokenizer(sample)["input_ids"]
    assert again.model_max_length == 16


def test_bytes_of_tokens_add_up_to_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    assert text.utf8_ends("aé日🎭").tolist() == [0, 1, 3, 6, 10]
    characters = text.wrap(text.build_for_generation(text.CHARACTERS, [PROSE]), None)
    ((ids, sizes),) = text.encode_with_bytes(characters, [PROSE], "")
    assert sizes.tolist() == [len(c.encode()) for c in PROSE]
    # A byte-level tokenizer has several tokens for one character, and they name the same place in the text.
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    for tested in (fast, text.wrap(text.build_words([PROSE]), None)):  # the second drops white space
        ((ids, sizes),) = text.encode_with_bytes(tested, [PROSE], "")
        assert len(ids) == len(sizes)
        assert sizes.sum() == len(PROSE.encode())
        assert sizes.min() >= 0
    # In parts that end after a line, several texts at once.
    whole = text.encode_with_bytes(characters, [PROSE * 3, "", "All"], "")
    monkeypatch.setattr(text, "CHUNK_CHARACTERS", 20)
    assert max(len(part) for part in text._parts(PROSE * 3)) <= 20
    parts = text.encode_with_bytes(characters, [PROSE * 3, "", "All"], "")
    for (a, b), (c, d) in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(b, d)


def test_lengths_are_counted_and_cut_only_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "CHUNK_TEXTS", 2)
    tokenizer = text.wrap(text.build_words(TEXTS), None)
    found = text.encode(tokenizer, TEXTS, None, 6, False, "")
    assert [len(ids) for ids in found.ids] == [5, 8, 9, 4]
    assert (found.longest, found.too_long) == ((9, 2), 2)
    assert text.length_message(found, "train", 6) == (
        "2 of the 4 texts in train are longer than 6 tokens (the longest, in row 3, has 9)"
    )
    cut = text.encode(tokenizer, TEXTS, None, 6, True, "")
    assert [len(ids) for ids in cut.ids] == [5, 6, 6, 4]
    assert cut.ids[1][-1] == 3, "the end mark stays"
    assert cut.too_long == 2
    assert text.pad([[1, 2], [3], []], 9).tolist() == [[1, 2], [3, 9], [9, 9]]


def test_what_a_model_takes() -> None:
    from transformers import AutoConfig

    assert text.position_limit(AutoConfig.for_model("bert", max_position_embeddings=64)) == 64
    assert text.position_limit(AutoConfig.for_model("gpt2", n_positions=32)) == 32
    # RoBERTa's first position is the padding token's number and one.
    assert text.position_limit(AutoConfig.for_model("roberta", max_position_embeddings=514, pad_token_id=1)) == 512
    assert text.position_limit(AutoConfig.for_model("bloom")) is None


@pytest.mark.parametrize("model_type", ["roberta", "camembert", "mpnet"])
def test_models_that_count_positions_from_their_padding(model_type: str) -> None:
    """The list is right: a text of the limit goes through, one token more does not."""
    from transformers import AutoConfig, AutoModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = AutoConfig.for_model(model_type, vocab_size=9, max_position_embeddings=10, pad_token_id=1, **sizes)
    model, limit = AutoModel.from_config(config).eval(), text.position_limit(config)
    assert limit == 8
    model(input_ids=torch.full((1, limit), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, limit + 1), 5))


def test_a_configuration_follows_the_tokenizer() -> None:
    from transformers import AutoConfig

    facts = text.facts_of(text.wrap(text.build_words(TEXTS), None))
    assert facts == {
        "vocab_size": 10, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "cls_token_id": 2,
        "sep_token_id": 3,
    }  # fmt: skip
    spec: dict[str, Any] = {"model_type": "bert"}
    config = AutoConfig.for_model("bert")
    text.fit_configuration(config, facts, spec, True)
    assert (config.vocab_size, config.pad_token_id) == (10, 0)
    with pytest.raises(UserError, match=r"has 10 tokens.*for 7 \(vocab_size\). Leave vocab_size out"):
        text.fit_configuration(AutoConfig.for_model("bert", vocab_size=7), facts, spec | {"vocab_size": 7}, True)
    with pytest.raises(UserError, match="Use the tokenizer that belongs to it"):
        text.fit_configuration(AutoConfig.for_model("bert", vocab_size=7), facts, "folder", False)


def test_tokenizer_options() -> None:
    with pytest.raises(UserError, match=r'is "words", but the weights of folder were trained with another one'):
        text.check_tokenizer("words", "folder", True, "words", ("words",))
    assert text.check_tokenizer(None, "folder", True, "words", ("words",)) == "folder"
    assert text.check_tokenizer(None, {}, False, "words", ("words",)) == "words"
    with pytest.raises(UserError, match=r"(?s)there is no tokenizer in \".*Give a folder that holds tokenizer.json"):
        text.load_tokenizer(str(Path(__file__).parent), False)
