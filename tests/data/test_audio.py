"""Clips of sound: what is read, what cannot be, their log-mel features by the definition, and masks."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from trainer.data import audio
from trainer.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


def tone(path: Path, hertz: float, seconds: float = 0.5, rate: int = 8000, channels: int = 1, seed: int = 0) -> Path:
    """A sine with a little noise, as a file of 16 bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(0, 0.01, (len(time), channels))
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * hertz * time)[:, None] + noise, rate, subtype="PCM_16")
    return path


def loudest(clip: np.ndarray, rate: int) -> float:
    """The frequency with the most power, in Hz."""
    return float(np.abs(np.fft.rfft(clip)).argmax() * rate / len(clip))


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_a_clip_is_mono_resampled_and_cut(tmp_path: Path, suffix: str) -> None:
    path = tone(tmp_path / f"a.{suffix}", 440, seconds=0.5, rate=22_050, channels=2)
    assert audio.length_s(path) == 0.5
    clip, done = audio.read_clip(path, 16_000, 4_000)
    assert clip.shape == (4_000,)
    assert done == "made mono; resampled from 22,050 Hz to 16,000 Hz; cut to the first 0.25 s; "
    assert loudest(clip, 16_000) == pytest.approx(440, abs=5)
    whole, done = audio.read_clip(path.read_bytes(), 22_050, 30_000)
    assert done == "made mono; "
    np.testing.assert_allclose(whole, soundfile.read(path)[0].mean(axis=1), atol=1e-12)


def broken(folder: Path) -> dict[str, tuple[Any, str]]:
    """Sources that cannot be read, and why."""
    whole = tone(folder / "whole.wav", 300)
    header = bytearray(whole.read_bytes())
    header[24:28] = struct.pack("<I", 3)  # the sample rate of a wav file
    (folder / "rate.wav").write_bytes(header)
    (folder / "nonsense.wav").write_bytes(b"nonsense")
    (folder / "song.m4a").write_bytes(b"another format")
    soundfile.write(folder / "empty.wav", np.zeros(0), 8000)
    soundfile.write(folder / "nan.wav", np.array([0.0, np.nan]), 8000, subtype="FLOAT")
    flac = tone(folder / "half.flac", 300, seconds=4).read_bytes()
    (folder / "half.flac").write_bytes(flac[: len(flac) // 2])
    return {
        "rate": (folder / "rate.wav", "its sample rate is 3 Hz, which cannot be right"),
        "nonsense": (folder / "nonsense.wav", "Format not recognised"),
        "format": (folder / "song.m4a", ".m4a files are not read: convert it to wav or flac"),
        "empty": (folder / "empty.wav", "it is empty"),
        "nan": (folder / "nan.wav", "not finite numbers"),
        "half": (folder / "half.flac", ""),  # libsndfile's own words
        "none": (folder / "none.wav", "not there"),
        "missing": (None, "missing"),
    }


@pytest.mark.parametrize("case", ["rate", "nonsense", "format", "empty", "nan", "half", "none", "missing"])
def test_what_cannot_be_read_says_why(tmp_path: Path, case: str) -> None:
    source, words = broken(tmp_path)[case]
    with pytest.raises((ValueError, OSError, RuntimeError)) as error:
        audio.read_clip(source, 8000, 80_000)
    assert words in audio.reason(error.value)


FRONT = audio.LogMel(rate=8000, samples=2000, bands=24, window=200, hop=80)


def test_log_mel_features_by_their_definition() -> None:
    clip = np.random.default_rng(0).normal(0, 0.1, 1500)
    found = FRONT(clip)
    assert found.shape == (1, 24, FRONT.frames) == (1, 24, 23)
    assert found.dtype == np.int16
    padded, place = np.concatenate([clip, np.zeros(500)]), 7
    shape = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(200) / 200)
    frame = padded[place * 80 : place * 80 + 200] * shape / shape.sum()
    frequency = np.arange(257) * 8000 / 512
    power = np.array([abs(np.sum(frame * np.exp(-2j * np.pi * f * np.arange(200) / 8000))) ** 2 for f in frequency])
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 4000 / 700), 26) / 2595) - 1)
    for band in range(24):
        low, middle, high = edges[band : band + 3]
        share = np.clip(np.minimum((frequency - low) / (middle - low), (high - frequency) / (high - middle)), 0, None)
        expected = 100 * 10 * np.log10(max(float(share @ power), 1e-10))
        assert found[0, band, place] == pytest.approx(expected, abs=0.51)
    assert (found[0, :, -1] == -10_000).all(), "silence"


def test_a_tone_is_loudest_in_its_band(tmp_path: Path) -> None:
    clip, _ = audio.read_clip(tone(tmp_path / "a.wav", 1000), 8000, 2000)
    mel = 2595 * np.log10(1 + 1000 / 700) / (2595 * np.log10(1 + 4000 / 700)) * 25
    assert abs(int(FRONT(clip)[0, :, 5].argmax()) + 1 - mel) < 1


@pytest.mark.parametrize(
    ("front", "words"),
    [
        (audio.LogMel(8000, 100, 24, 200, 80), r"max_seconds\" is 0\.0125. It must be at least window_seconds"),
        (audio.LogMel(8000, 2000, 512, 200, 80), r'mel_bands" is 512. It must be fewer'),
    ],
)
def test_features_that_cannot_be(front: audio.LogMel, words: str) -> None:
    with pytest.raises(UserError, match=words):
        front.check()


def test_moves_and_masks_against_one_clip_at_a_time() -> None:
    random = np.random.default_rng(1)
    features = torch.from_numpy(random.integers(-9000, 0, (6, 1, 5, 9), dtype=np.int16))
    moves, draws = torch.tensor([0, 3, -2, 8, -8, 1]), torch.from_numpy(random.random((6, 2), dtype=np.float32))
    rolled = audio.roll(features, moves)
    for one, move, result in zip(features.numpy(), moves.tolist(), rolled.numpy()):
        np.testing.assert_array_equal(result, np.roll(one, move, axis=2))
    for dim, most in ((2, 5), (3, 4)):
        masked = audio.mask(features, dim, most, draws, -77)
        for one, (width, place), result in zip(features.numpy(), draws.numpy(), masked.numpy()):
            wide = int(width * np.float32(most + 1))
            first = int(place * np.float32(one.shape[dim - 1] - wide + 1))
            expected = one.copy()
            expected[(slice(None),) * (dim - 1) + (slice(first, first + wide),)] = -77
            np.testing.assert_array_equal(result, expected)
        assert (masked == -77).any() and (masked != -77).any()
