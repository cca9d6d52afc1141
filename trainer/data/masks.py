"""Attention masks that need no look at their values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def for_each_head(mask: Tensor) -> Tensor:
    """A mask (B, tokens) of ones and zeros as (B, 1, 1, tokens) bool, which broadcasts over heads and queries."""
    return mask[:, None, None, :].bool()


def may_be_prepared(model: nn.Module, tokens: int) -> bool:
    """Whether a text classifier of transformers gives the same logits for a mask with four dimensions.

    A mask with two makes transformers ask whether it hides anything. The host would wait for the answer in every
    forward, and micro-batches with different answers could not share a pack.

    Args:
        model: the classifier.
        tokens: the longest text; a model may look at near neighbours only.
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
