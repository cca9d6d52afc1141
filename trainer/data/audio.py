"""Clips of sound: reading one, its log-mel features, and changing whole batches of features on the device.

Files are read by soundfile, as in transformers. Its wheels contain libsndfile, so nothing has to be installed in the
system. Clips are resampled by scipy, which the trainer needs anyway: a polyphase filter in double precision, on one
thread.
"""

from __future__ import annotations

import functools
import io
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.task_options import refuse
from ..errors import UserError

# Files with these suffixes are read.
SUFFIXES = (".wav", ".flac", ".aif", ".aifc", ".aiff", ".au", ".caf", ".mp3", ".oga", ".ogg", ".opus", ".rf64",
            ".snd", ".w64", ".wave")  # fmt: skip
# These are sound as well, but are not read. They are an error: to leave them out would be worse.
OTHERS = (".3gp", ".aac", ".amr", ".m4a", ".mp4", ".pcm", ".raw", ".webm", ".wma")
# Sample rates in Hz. With any other, the header is damaged. Such a rate would also need filters of many gigabytes.
RATES = (1_000, 768_000)
# Without `max_seconds`, a longer clip is an error: all clips would be padded to its length.
LONGEST_S = 30.0
# A frame of silence: the power of 16-bit samples cannot be lower by much.
_FLOOR = 1e-10


def soundfile() -> ModuleType:
    """The library that reads audio. Raises UserError if it is not installed."""
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: its libsndfile cannot be loaded
        raise UserError(
            f'Audio needs the package soundfile: pip install "strong-scaling-trainer[audio]" ({error}).'
        ) from error
    return soundfile


# ---------------------------------------------------------------- one clip


def _opened(source: bytes | str | Path | None) -> Any:
    if source is None:
        raise ValueError("missing")
    if not isinstance(source, bytes) and (suffix := Path(source).suffix.lower()) in OTHERS:
        raise ValueError(f"{suffix} files are not read: convert it to wav or flac")
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise FileNotFoundError(source)  # the library would only call it a system error
    file = soundfile().SoundFile(io.BytesIO(source) if isinstance(source, bytes) else str(source))
    if not RATES[0] <= file.samplerate <= RATES[1]:
        raise ValueError(f"its sample rate is {file.samplerate:,} Hz, which cannot be right")
    if file.frames == 0:
        raise ValueError("it is empty: it has no samples")
    return file


def length_s(source: bytes | str | Path | None) -> float:
    """The length of a clip in seconds, by its header. Raises ValueError, OSError, RuntimeError."""
    with _opened(source) as file:
        return float(file.frames / file.samplerate)


def read_clip(source: bytes | str | Path | None, rate: int, samples: int) -> tuple[np.ndarray, str]:
    """One clip: (n,) float64 with n <= samples, and what was done to it, in words.

    Several channels become their mean. A longer clip is cut after the first samples.

    Args:
        source: a file's content or path; None for a missing value.
        rate: in Hz, to which a clip of another rate is resampled.
        samples: the most at that rate.

    Raises:
        ValueError, OSError, RuntimeError: it cannot be read.
    """
    from scipy.signal import resample_poly

    with _opened(source) as file:
        own: int = file.samplerate
        wanted = min(file.frames, math.ceil(samples * own / rate))
        clip = file.read(wanted, dtype="float64", always_2d=True)  # (n, channels)
        cut = file.frames > wanted
        # Headers of mp3 files are only estimates.
        if len(clip) < wanted and (len(clip) == 0 or file.format not in ("MP3", "OGG")):
            raise ValueError(f"it ends after {len(clip):,} of its {file.frames:,} samples")
    if not np.isfinite(clip).all():
        raise ValueError("some of its samples are not finite numbers")
    done = "made mono; " if clip.shape[1] > 1 else ""
    clip = clip[:, 0] if clip.shape[1] == 1 else clip.mean(axis=1)
    if own != rate:
        divisor = math.gcd(own, rate)
        clip = resample_poly(clip, rate // divisor, own // divisor)
        done += f"resampled from {own:,} Hz to {rate:,} Hz; "
    if cut:
        done += f"cut to the first {samples / rate:g} s; "
    return clip[:samples], done


def reason(error: Exception) -> str:
    """Why a clip cannot be read, in words."""
    if isinstance(error, FileNotFoundError):
        return "not there"
    return str(getattr(error, "error_string", error)).strip().rstrip(".") or type(error).__name__


# ---------------------------------------------------------------- features


@dataclass(frozen=True)
class LogMel:
    """Log-mel features: how much power each band of a mel scale has in each frame, in decibels.

    They are whole hundredths of a decibel, for three reasons. They take half the memory of float32. Their sums are
    exact. And another processor gives the same numbers, even if it rounds the last bit of a spectrum in another way.

    Attributes:
        rate: samples per second, in Hz.
        samples: of a clip.
        bands: of the mel scale (O'Shaughnessy 1987), from 0 Hz to half the rate.
        window, hop: the length of a frame, and the distance from one frame to the next, in samples.
    """

    rate: int
    samples: int
    bands: int
    window: int
    hop: int

    @property
    def frames(self) -> int:
        """The number of frames of a clip. A frame that reaches beyond its end is left out."""
        return 1 + (self.samples - self.window) // self.hop

    @property
    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def check(self) -> None:
        """Raises UserError if a clip is too short for a frame, or the bands are too narrow."""
        if self.samples < self.window:
            refuse("max_seconds", self.samples / self.rate, f"at least window_seconds ({self.window / self.rate:g})")
        if (_filters(self.rate, self.bands, self.window).sum(axis=1) == 0).any():
            refuse("mel_bands", self.bands, f"fewer: at {self.rate:,} Hz some bands hold no frequency")

    def __call__(self, clip: np.ndarray) -> np.ndarray:
        """(n,) float64, n <= samples -> (1, bands, frames) int16, in 0.01 dB. Shorter clips end with silence."""
        from scipy.signal.windows import hann

        padded = np.zeros(self.samples)
        padded[: len(clip)] = clip
        frames = np.lib.stride_tricks.sliding_window_view(padded, self.window)[:: self.hop]
        shape = hann(self.window, sym=False)
        spectrum = np.fft.rfft(frames * shape, n=_fft_size(self.window))  # (frames, bins)
        power = np.square(np.abs(spectrum) / shape.sum())
        # Sparse times dense: it adds in one order, whatever the number of threads.
        mel = _filters(self.rate, self.bands, self.window) @ power.T  # (bands, frames)
        decibels = 10 * np.log10(np.maximum(mel, _FLOOR))
        return np.rint(100 * decibels).astype(np.int16)[None]


def _fft_size(window: int) -> int:
    """A power of two, at least twice the window. With fewer, the lowest bands would hold no frequency."""
    return 2 ** math.ceil(math.log2(2 * window))


@functools.lru_cache(maxsize=8)
def _filters(rate: int, bands: int, window: int) -> Any:
    """(bands, bins) float64, sparse: the share of each frequency in each band."""
    import warnings

    from scipy.sparse import csr_matrix
    from transformers.audio_utils import mel_filter_bank

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bands without a frequency, which `check` refuses
        filters = mel_filter_bank(
            num_frequency_bins=_fft_size(window) // 2 + 1,
            num_mel_filters=bands,
            min_frequency=0.0,
            max_frequency=rate / 2,
            sampling_rate=rate,
        )
    return csr_matrix(filters.T)


# ---------------------------------------------------------------- batches on the device


def roll(features: Tensor, moves: Tensor) -> Tensor:
    """Moves each clip along its frames; what leaves at one end comes in at the other.

    Args:
        features: (B, C, bands, frames).
        moves: (B,) int64, of fewer frames than a clip has; positive is later.
    """
    frames = features.shape[3]
    places = torch.arange(frames, device=features.device) - moves[:, None]  # (B, frames)
    # Without the remainder %: it is not known to give the same bits in a tensor of another size.
    places = torch.where(places < 0, places + frames, places)
    places = torch.where(places >= frames, places - frames, places)
    return features.gather(3, places[:, None, None].expand(features.shape))


def mask(features: Tensor, dim: int, most: int, draws: Tensor, fill: int) -> Tensor:
    """One stripe of each clip is filled, as in SpecAugment (Park et al. 2019).

    Args:
        features: (B, C, bands, frames).
        dim: 2 for bands, 3 for frames.
        most: the widest stripe; its width is uniform from 0 on.
        draws: (B, 2) in [0, 1): width and place.
        fill: what stands there instead.
    """
    side = features.shape[dim]
    width = (draws[:, 0] * (most + 1)).floor()
    first = (draws[:, 1] * (side - width + 1)).floor()
    at = torch.arange(side, device=features.device)
    covered = (at >= first[:, None]) & (at < (first + width)[:, None])  # (B, side)
    return features.masked_fill(covered[:, None, :, None] if dim == 2 else covered[:, None, None], fill)
