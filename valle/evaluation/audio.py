"""How audio compares with audio, and how good speech sounds: log-mel distance and DNSMOS.

- Log-mel distance: mean absolute difference of log10-mel spectra, 80 bands, windows of 64 ms every 16 ms (1024 and
  256 samples at 16 kHz), so that figures at different sample rates are comparable.
- DNSMOS P.835 (Reddy et al., arXiv 2110.01763): a network's guess of listeners' opinions, 1 to 5, of speech signal,
  background and overall quality. The weights come in the PyPI package `speechmos`. They are run here by onnxruntime
  alone, window for window as the package does: the package's own code would need librosa and numba for a second
  score (P.808) that is not reported.
"""

import importlib.util
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from valle.modules.spectral import LogMel
from valle.utils.audio import convert_audio
from valle.utils.errors import UserError

MEL_BANDS = 80
WINDOW_SECONDS = 0.064
HOP_SECONDS = 0.016

DNSMOS_RATE = 16000
DNSMOS_SECONDS = 9.01
DNSMOS_HOP_SECONDS = 1
DNSMOS_HINT = "pip install speechmos onnxruntime"
# From raw network outputs to opinion scores: highest power first (speechmos 0.0.1.1, get_polyfit_val).
DNSMOS_POLYNOMIALS = {
    "sig": (-0.08397278, 1.22083953, 0.0052439),
    "bak": (-0.13166888, 1.60915514, -0.39604546),
    "ovrl": (-0.06766283, 1.11546468, 0.04602535),
}


@lru_cache(maxsize=8)
def _mel_transform(sample_rate: int) -> LogMel:
    n_fft = 2 * round(sample_rate * WINDOW_SECONDS / 2)
    return LogMel(sample_rate, n_fft, round(sample_rate * HOP_SECONDS), MEL_BANDS)


def mel_frequencies(sample_rate: int) -> np.ndarray:
    """(80,) centre frequency of each band in Hz, increasing."""
    filters = _mel_transform(sample_rate).get_buffer("filters").numpy()  # (F, M)
    bins = np.linspace(0, sample_rate / 2, filters.shape[0])
    return (filters * bins[:, None]).sum(axis=0) / filters.sum(axis=0)


def log_mel(wav: np.ndarray, sample_rate: int) -> np.ndarray:
    """Log10-mel spectrum of each channel.

    Args:
        wav: (C, N) or (N,) float32.
        sample_rate: Hz.

    Returns:
        (C, T, 80) float32; a frame is 16 ms.
    """
    transform = _mel_transform(sample_rate)
    samples = torch.from_numpy(np.atleast_2d(np.asarray(wav, dtype=np.float32)))
    hop = transform.spectrogram.hop_length
    samples = torch.nn.functional.pad(samples, (0, max(hop - samples.shape[1], 0)))  # at least one frame
    return (transform(samples) / math.log(10)).numpy()


def log_mel_distance(reference: np.ndarray, other: np.ndarray, sample_rate: int) -> float:
    """Mean absolute difference of two log10-mel spectra over their common length; 0 is identical.

    Args:
        reference, other: (C, N) or (N,) with equal C; what is longer is cut at the end.
        sample_rate: Hz, of both.
    """
    reference, other = np.atleast_2d(reference), np.atleast_2d(other)
    if reference.shape[0] != other.shape[0]:
        raise ValueError(f"{reference.shape[0]} channels against {other.shape[0]}")
    length = min(reference.shape[1], other.shape[1])
    return float(
        np.abs(log_mel(reference[:, :length], sample_rate) - log_mel(other[:, :length], sample_rate)).mean()
    )


def dnsmos_available() -> bool:
    """Whether the packages that DNSMOS needs are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("speechmos", "onnxruntime"))


@lru_cache(maxsize=1)
def _dnsmos_session() -> Any:
    if not dnsmos_available():
        raise UserError(f"DNSMOS needs two packages that are not installed: {DNSMOS_HINT}")
    import onnxruntime

    spec = importlib.util.find_spec("speechmos")
    assert spec is not None and spec.origin is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    weights = Path(spec.origin).parent / "dnsmos_models" / "sig_bak_ovr.onnx"
    return onnxruntime.InferenceSession(str(weights), options, providers=["CPUExecutionProvider"])


def dnsmos(wav: np.ndarray, sample_rate: int) -> dict[str, float]:
    """DNSMOS P.835 of one clip: `ovrl`, `sig` and `bak`, 1 (bad) to 5 (excellent).

    The network hears 9.01 s. As in `speechmos`, shorter clips are repeated, longer ones scored every second and
    averaged. Louder than full scale is scaled down to a peak of 1.

    Args:
        wav: (C, N) or (N,) float32.
        sample_rate: Hz; resampled to 16 kHz mono.

    Raises:
        UserError: the packages are not installed.
        ValueError: there are no samples.
    """
    audio = convert_audio(np.atleast_2d(wav), sample_rate, DNSMOS_RATE, 1)[0]
    if audio.size == 0:
        raise ValueError("DNSMOS of a clip without samples")
    audio = audio / max(1.0, float(np.abs(audio).max()))
    length = int(DNSMOS_SECONDS * DNSMOS_RATE)
    while len(audio) < length:
        audio = np.append(audio, audio)
    hops = int(np.floor(len(audio) / DNSMOS_RATE) - DNSMOS_SECONDS) + 1
    starts = [hop * DNSMOS_HOP_SECONDS * DNSMOS_RATE for hop in range(hops)]
    windows = [audio[start : start + length] for start in starts if start + length <= len(audio)]
    session = _dnsmos_session()
    raw = np.concatenate(
        [session.run(None, {"input_1": window[None].astype(np.float32)})[0] for window in windows]
    )
    scores = {
        name: np.polyval(DNSMOS_POLYNOMIALS[name], raw[:, i]) for i, name in enumerate(("sig", "bak", "ovrl"))
    }
    return {name: float(scores[name].mean()) for name in ("ovrl", "sig", "bak")}
