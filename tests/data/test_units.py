"""Models of standardised numbers: saved in units, loaded as they were, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from trainer.data import units
from trainer.data.preparation import Numeric
from trainer.errors import UserError

SIZES = {
    "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
    "num_labels": 1, "pad_token_id": 0,
}  # fmt: skip
INPUTS = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}


def model(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **SIZES))


def logits(of: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = of.eval()(**INPUTS).logits
    return found


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_saved_in_units_and_restored(kind: str, tmp_path: Path) -> None:
    trained, target = model(kind), Numeric("", 300.0, 0.7)
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    plain = logits(trained)
    units.check(trained, INPUTS, plain)
    with units.saved(trained, target, tmp_path):
        trained.save_pretrained(tmp_path)  # type: ignore[operator]
    assert all(torch.equal(before[name], tensor) for name, tensor in trained.state_dict().items())
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), plain * 0.7 + 300, atol=1e-3, rtol=1e-6)
    assert units.restore(loaded, tmp_path) == target
    assert all(torch.equal(before[name], tensor) for name, tensor in loaded.state_dict().items())


def test_what_cannot_be_in_units(tmp_path: Path) -> None:
    gpt2 = model("gpt2")
    with pytest.raises(UserError, match="a gpt2 does not end with a linear layer with a bias"):
        units.check(gpt2, INPUTS, logits(gpt2))
    with pytest.raises(UserError, match=r"standardised_head.safetensors cannot be used"):
        units.restore(model("bert"), tmp_path)
