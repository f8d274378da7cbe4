"""How audio compares with audio, and how good speech sounds: log-mel and STFT distance, SI-SDR, DNSMOS.

- Log-mel distance: mean absolute difference of log10-mel spectra, 80 bands, windows of 64 ms every 16 ms (1024 and
  256 samples at 16 kHz), so that figures at different sample rates are comparable.
- STFT distance in three resolutions (Yamamoto et al., arXiv 1910.11480, equations 4 to 6): spectral convergence plus
  the mean absolute difference of log magnitudes, windows of 16, 32 and 64 ms.
- SI-SDR (Le Roux et al., arXiv 1811.02508): decibels of what a waveform shares with another over what it does not.
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

from valle.modules.spectral import LogMel, Spectrogram
from valle.utils.audio import convert_audio
from valle.utils.errors import UserError

MEL_BANDS = 80
WINDOW_SECONDS = 0.064
HOP_SECONDS = 0.016
STFT_SECONDS = (0.016, 0.032, 0.064)  # windows; a hop is a quarter
FLOOR = 1e-5  # of magnitudes before their logarithm, as in LogMel
SI_SDR_LIMIT = 100.0  # dB: equal waveforms have no end

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
    one, two = _alike(reference, other)
    return float(np.abs(log_mel(one, sample_rate) - log_mel(two, sample_rate)).mean())


@lru_cache(maxsize=24)
def _stft(sample_rate: int, seconds: float) -> Spectrogram:
    hop = max(1, round(sample_rate * seconds / 4))
    return Spectrogram(4 * hop, hop)


def stft_distance(reference: np.ndarray, other: np.ndarray, sample_rate: int) -> float:
    """Distance of two magnitude spectra, mean over three resolutions and the channels; 0 is identical.

    Args:
        reference, other: (C, N) or (N,) with equal C; what is longer is cut at the end.
        sample_rate: Hz, of both.
    """
    one, two = (torch.from_numpy(wav) for wav in _alike(reference, other))
    distances = []
    for seconds in STFT_SECONDS:
        transform = _stft(sample_rate, seconds)
        missing = max(transform.hop_length - one.shape[1], 0)  # at least one frame
        true, estimate = (
            transform(torch.nn.functional.pad(wav, (0, missing))).clamp(min=FLOOR) for wav in (one, two)
        )  # (C, T, F)
        convergence = (true - estimate).norm(dim=(1, 2)) / true.norm(dim=(1, 2))
        distances.append(convergence.mean() + (true.log() - estimate.log()).abs().mean())
    return float(torch.stack(distances).mean())


def si_sdr(reference: np.ndarray, other: np.ndarray) -> float | None:
    """Scale-invariant signal-to-distortion ratio in dB, -100 to 100, mean over channels; higher is closer.

    It compares waveforms, so what sounds the same with other phases scores low.

    Args:
        reference, other: (C, N) or (N,) with equal C; what is longer is cut at the end.

    Returns:
        None where the reference is silent in every channel.
    """
    ratios = []
    for true, estimate in zip(*_alike(reference, other), strict=True):
        true, estimate = (wav.astype(np.float64) - wav.mean(dtype=np.float64) for wav in (true, estimate))
        energy = float(true @ true)
        if energy <= 1e-12 * max(len(true), 1):
            continue
        part = (float(estimate @ true) / energy) * true
        signal, noise = float(part @ part), float(((estimate - part) ** 2).sum())
        if signal <= noise * 10 ** (-SI_SDR_LIMIT / 10):  # also of silence
            ratios.append(-SI_SDR_LIMIT)
        elif noise <= signal * 10 ** (-SI_SDR_LIMIT / 10):
            ratios.append(SI_SDR_LIMIT)
        else:
            ratios.append(10 * math.log10(signal / noise))
    return sum(ratios) / len(ratios) if ratios else None


def _alike(reference: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both (C, N) float32 of one length."""
    one, two = (np.atleast_2d(np.asarray(wav, dtype=np.float32)) for wav in (reference, other))
    if one.shape[0] != two.shape[0]:
        raise ValueError(f"{one.shape[0]} channels against {two.shape[0]}")
    length = min(one.shape[1], two.shape[1])
    return one[:, :length], two[:, :length]


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
