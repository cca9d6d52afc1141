"""Attention masks that need no look at their values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from trainer.data import masks

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40}


def classifier(model_type: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(AutoConfig.for_model(model_type, **SMALL | options)).eval()


class Reads(TorchDispatchMode):
    """Counts what the host reads from tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "roberta", "electra"])
def test_a_prepared_mask_hides_the_same_and_is_not_read(model_type: str) -> None:
    model = classifier(model_type, max_position_embeddings=40)
    assert masks.may_be_prepared(model, 12)
    ids = torch.randint(5, 40, (3, 12))
    for lengths in ([12, 7, 3], [12, 12, 12]):
        mask = (torch.arange(12) < torch.tensor(lengths)[:, None]).long()
        with Reads() as reads, torch.no_grad():
            logits = model(input_ids=ids, attention_mask=masks.for_each_head(mask)).logits
        assert reads.count == 0
        torch.testing.assert_close(logits, model(input_ids=ids, attention_mask=mask).logits)


def test_a_model_that_needs_more_than_such_a_mask_does_not_get_it() -> None:
    # Near neighbours only, causal, and one whose attention knows no such masks.
    assert masks.may_be_prepared(classifier("modernbert", local_attention=4, pad_token_id=0), 3)
    assert not masks.may_be_prepared(classifier("modernbert", local_attention=4, pad_token_id=0), 12)
    assert not masks.may_be_prepared(classifier("gpt2", n_embd=16, n_layer=2, n_head=2, pad_token_id=0), 12)
    assert not masks.may_be_prepared(classifier("bert", attn_implementation="eager"), 12)


def test_looking_leaves_the_model_and_the_random_numbers_as_they_were() -> None:
    model = classifier("bert").train()
    before = torch.get_rng_state()
    masks.may_be_prepared(model, 8)
    assert model.training
    assert torch.equal(before, torch.get_rng_state())


LANGUAGE: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 40},
    "llama": SMALL | {"num_key_value_heads": 2},
    "mistral": SMALL | {"num_key_value_heads": 1, "sliding_window": 4},
}


def language_model(model_type: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options, use_cache=False)).eval()


@pytest.mark.parametrize("model_type", LANGUAGE)
def test_rows_of_one_text_are_not_looked_at(model_type: str) -> None:
    """Bit for bit the same logits, also where the mask is of near neighbours."""
    model = language_model(model_type, **LANGUAGE[model_type])
    ids = torch.randint(5, 40, (3, 12))
    with torch.no_grad():
        logits, known = masks.whether_rows_are_texts(lambda: model(input_ids=ids).logits)
        with Reads() as looks:
            model(input_ids=ids)
        with Reads() as reads, masks.rows_are_texts():
            again = model(input_ids=ids).logits
    assert known and looks.count and not reads.count
    assert torch.equal(logits, again)


def test_a_model_whose_positions_follow_from_its_tokens_is_asked_each_time() -> None:
    from transformers import masking_utils

    before = masking_utils.find_packed_sequence_indices
    model = language_model("roberta", **SMALL, max_position_embeddings=40, is_decoder=True, pad_token_id=1)
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 1, 1]])
    with torch.no_grad():
        assert not masks.whether_rows_are_texts(lambda: model(input_ids=ids[:1]).logits)[1]  # one row tells nothing
        assert not masks.whether_rows_are_texts(lambda: model(input_ids=ids).logits)[1]
        assert not masks.whether_rows_are_texts(lambda: ids)[1]  # and a model that asks nobody
    assert masking_utils.find_packed_sequence_indices is before
