"""Models of grey images, saved with three channels: they compute the same, and pipelines of transformers take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.data import grey, pretrained

AUTO = "AutoModelForImageClassification"
RESNET = {"model_type": "resnet", "layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
VIT = {
    "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "patch_size": 4, "image_size": 16,
}  # fmt: skip
CONVNEXT = {"model_type": "convnext", "num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]}

pytestmark = pytest.mark.usefixtures("one_thread")


def logits(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=pixels).logits


@pytest.mark.parametrize("spec", [RESNET, VIT, CONVNEXT], ids=["resnet", "vit", "convnext"])
def test_a_grey_model_computes_the_same_with_three_channels(spec: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = pretrained.build(AUTO, spec, pretrained.configuration(spec, num_channels=1, num_labels=3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert grey.save(model, tmp_path) == 3
    saved = pretrained.load_saved(AUTO, tmp_path)
    image = torch.rand(2, 1, 16, 16)
    torch.testing.assert_close(logits(saved, image.expand(2, 3, 16, 16)), logits(model, image), atol=1e-5, rtol=1e-5)
    colours = torch.rand(2, 3, 16, 16)
    shares = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    torch.testing.assert_close(
        logits(saved, colours), logits(model, (colours * shares).sum(1, keepdim=True)), atol=1e-5, rtol=1e-5
    )
    assert model.config.num_channels == 1, "the trained model stays as it is"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_of_colours_is_saved_as_it_is(tmp_path: Path) -> None:
    model = pretrained.build(AUTO, RESNET, pretrained.configuration(RESNET, num_labels=3))
    assert grey.save(model, tmp_path) == 3
    state = pretrained.load_saved(AUTO, tmp_path).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
