"""Attention masks that need no look at their values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Result = TypeVar("Result")
# transformers' function that finds several texts in a row by their positions: another text begins where a position does
# not follow the one before it. transformers calls it if a causal model gets no mask. The host waits for its answer.
_ASKED = "find_packed_sequence_indices"


def for_each_head(mask: Tensor) -> Tensor:
    """A mask (B, tokens) of ones and zeros as (B, 1, 1, tokens) bool, which broadcasts over heads and queries."""
    return mask[:, None, None, :].bool()


def may_be_prepared(model: nn.Module, tokens: int) -> bool:
    """Whether a text classifier of transformers gives the same logits for a mask with four dimensions.

    With a mask of two dimensions, transformers asks whether it hides anything. The host would wait for the answer in
    every forward, and micro-batches with different answers could not share a pack.

    Args:
        model: the classifier.
        tokens: the length of the longest text. It has to be tried: some models look only at near neighbours.
    """
    config: Any = model.config
    if getattr(config, "_attn_implementation", None) != "sdpa" or tokens < 2:
        return False
    device = next(model.parameters()).device
    numbers = torch.arange(2 * tokens, device=device).view(2, tokens)
    ids = 5 + numbers % max(1, int(getattr(config, "vocab_size", 6)) - 5)
    mask = torch.ones_like(ids)
    mask[1, tokens // 2 :] = 0
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            one = model(input_ids=ids, attention_mask=mask).logits
            other = model(input_ids=ids, attention_mask=for_each_head(mask)).logits
    except Exception:  # a model that knows nothing of such masks: of any type, from inside its code
        return False
    finally:
        model.train(was_training)
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def whether_rows_are_texts(forward: Callable[[], Result]) -> tuple[Result, bool]:
    """What a forward returns, and whether transformers takes each row for one text, whatever its tokens are.

    This is so if the model numbers the places of all rows 0, 1, 2, ... in one tensor for all of them. RoBERTa numbers
    each row by its tokens: such a model has to be asked again for every batch.

    Args:
        forward: of a causal model of transformers, for two rows or more, without a mask.
    """
    from transformers import masking_utils

    found: list[bool] = []
    ask = getattr(masking_utils, _ASKED, None)

    def noted(position_ids: Tensor) -> Any:
        texts = ask(position_ids)  # type: ignore[misc]
        found.append(texts is None and len(position_ids) > 1 and position_ids.stride(0) == 0)
        return texts

    with _asked_instead(noted) if ask is not None else contextlib.nullcontext():
        result = forward()
    return result, bool(found) and all(found)


def rows_are_texts() -> contextlib.AbstractContextManager[None]:
    """A context in which transformers knows that each row is one text. The answer is the same, without the wait."""
    return _asked_instead(lambda position_ids: None)


@contextlib.contextmanager
def _asked_instead(function: Callable[[Tensor], Any]) -> Iterator[None]:
    from transformers import masking_utils

    before = getattr(masking_utils, _ASKED)
    setattr(masking_utils, _ASKED, function)
    try:
        yield
    finally:
        setattr(masking_utils, _ASKED, before)
