"""Prepares clips for a pretrained model of sound, by the feature extractor of transformers that comes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UserError
from .pretrained import OPTION, quiet, reason, where

FILE = "preprocessor_config.json"


class Extractor:
    """The feature extractor in a folder or under a hub name, for clips of at most `samples`.

    Attributes:
        rate: the sample rate that it takes, in Hz.
        samples: the number of samples of the longest clip. The extractor pads shorter ones in its own way.
        name: what the model calls its input.
    """

    def __init__(self, spec: str, trust_remote_code: bool) -> None:
        from transformers import AutoFeatureExtractor

        try:
            with quiet():
                self._own: Any = AutoFeatureExtractor.from_pretrained(where(spec), trust_remote_code=trust_remote_code)
            self.rate, self.name = int(self._own.sampling_rate), str(self._own.model_input_names[0])
        except Exception as error:  # of many kinds, by the library and the damage
            raise UserError(
                f"{OPTION}: the feature extractor of {spec} cannot be used: {reason(error)}\nA model of sound comes "
                f"with a {FILE} that says how clips are prepared."
            ) from error
        self.samples = 0

    @property
    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return {"kind": type(self._own).__name__, "settings": self._own.to_json_string(), "samples": self.samples}

    def check(self) -> None:
        """Raises UserError if it cannot prepare a clip."""
        try:
            self(np.zeros(self.samples))
        except Exception as error:  # it is another's code
            raise UserError(
                f"{OPTION}: its feature extractor cannot prepare a clip of {self.samples / self.rate:g} s: "
                f"{reason(error)}\nSet max_seconds in trainer.task_options to another length."
            ) from error

    def __call__(self, clip: np.ndarray) -> tuple[np.ndarray, int | None]:
        """(n,) float64 -> its features, float32 of one shape, and how many samples are not padding.

        The second is None if the extractor gives no attention mask: its model takes padding for silence.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # some compute with torch, and sums depend on the number of threads
        try:
            with quiet():
                found = self._own(
                    clip.astype(np.float32),
                    sampling_rate=self.rate,
                    padding="max_length",
                    max_length=self.samples,
                    truncation=True,
                    return_tensors="np",
                )
        finally:
            torch.set_num_threads(threads)
        mask = found.get("attention_mask")
        return np.asarray(found[self.name][0], dtype=np.float32), None if mask is None else int(mask[0].sum())

    def save(self, folder: Path) -> None:
        """Writes what AutoFeatureExtractor reads."""
        with quiet():
            self._own.save_pretrained(str(folder))
