"""The feature extractor of a pretrained model of sound."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.data.feature_extractors import Extractor
from trainer.errors import UserError


def test_clips_are_prepared_as_the_extractor_does_it(tmp_path: Path) -> None:
    from transformers import Wav2Vec2FeatureExtractor

    own = Wav2Vec2FeatureExtractor(sampling_rate=8000, do_normalize=True, return_attention_mask=True)
    own.save_pretrained(tmp_path)
    front = Extractor(str(tmp_path), False)
    assert (front.rate, front.name) == (8000, "input_values")
    front.samples = 12
    clip = np.random.default_rng(0).normal(3, 2, 9)
    threads = torch.get_num_threads()
    features, length = front(clip)
    assert torch.get_num_threads() == threads
    assert length == 9
    np.testing.assert_allclose(features[:9], (clip - clip.mean()) / clip.std(), rtol=1e-4, atol=1e-5)
    assert features.dtype == np.float32 and (features[9:] == 0).all()
    before = front.facts
    (tmp_path / "saved").mkdir()
    front.save(tmp_path / "saved")
    again = Extractor(str(tmp_path / "saved"), False)
    again.samples = 12
    assert again.facts == before


def test_an_extractor_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=r"(?s)the feature extractor of .* cannot be used.*preprocessor_config\.json"):
        Extractor(str(tmp_path), False)
