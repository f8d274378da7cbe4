"""Metrics that compare a waveform with another: spectra, harmony, waveform, intelligibility.

Those of task "codec" compare sample by sample: how near a resynthesis is to its recording. A continuation may
be as good as the recording and yet be another performance: `Profile` compares with it what does not depend on the
order in time.

- Mel and STFT distance, SI-SDR: `audio.py` has the equations.
- Chroma: the power of all frequencies folded into twelve pitch classes (Fujishima, ICMC 1999), windows of 256 ms every
  64 ms. Distance is one minus the cosine of two such vectors: 0 is the same harmony, 1 has nothing in common.
- STOI (Taal et al., IEEE TASLP 2011) by `pystoi`; PESQ (ITU-T P.862.2, wide band) by `pesq`.
"""

import warnings
from functools import lru_cache

import numpy as np
import torch

from valle.evaluation.audio import log_mel, log_mel_distance, si_sdr, stft_distance
from valle.evaluation.metrics import Case, Excerpt, install_hint
from valle.modules.spectral import Spectrogram
from valle.utils.audio import convert_audio

SHORTER_SECONDS = 0.1  # what a codec may leave out at the end because it has no frame for it

CHROMA_WINDOW_SECONDS = 0.256
CHROMA_HERTZ = (100.0, 5000.0)  # below, a window cannot tell semitones apart; above, there is little harmony
CHROMA_RANGE = 1e-6  # of power: 60 dB below the loudest frame is silence
SILENCE = 1e-10  # power of a frame; a full-scale tone has about 1e5 to 1e7

PESQ_RATE = 16000
MINIMUM_SECONDS = 0.25  # PESQ takes no less


def converted(excerpt: Excerpt, sample_rate: int, channels: int) -> np.ndarray:
    """(channels, N) float32 at the rate wanted."""
    wav = np.atleast_2d(np.asarray(excerpt.wav, dtype=np.float32))
    if wav.shape[1] == 0:
        return np.zeros((channels, 0), dtype=np.float32)
    return convert_audio(wav, excerpt.sample_rate, sample_rate, channels)


def aligned(
    audio: Excerpt, reference: Excerpt, sample_rate: int | None = None, channels: int | None = None
) -> tuple[np.ndarray, np.ndarray, int]:
    """The reference and the audio as two arrays of one shape, and their sample rate.

    What goes on after the reference's end is not heard. What ends before it goes on with silence, so that leaving
    out is no way to a better figure; only up to 0.1 s, as a codec's last frame may be missing, both are cut.

    Args:
        audio: what to judge, at any rate, with any channels.
        reference: what it should be.
        sample_rate, channels: those wanted; None: the reference's.

    Returns:
        reference (C, N), audio (C, N), sample rate in Hz.
    """
    rate = sample_rate or reference.sample_rate
    count = channels or np.atleast_2d(reference.wav).shape[0]
    true, estimate = (converted(excerpt, rate, count) for excerpt in (reference, audio))
    missing = true.shape[1] - estimate.shape[1]
    if missing > round(SHORTER_SECONDS * rate):
        estimate = np.pad(estimate, ((0, 0), (0, missing)))
    length = min(true.shape[1], estimate.shape[1])
    return true[:, :length], estimate[:, :length], rate


class _Builtin:
    """What metrics without optional packages have in common."""

    def missing(self) -> str | None:
        return None

    def applies(self, case: Case) -> bool:
        return case.reference.wav.size > 0


class MelDistance(_Builtin):
    """Mean absolute difference of log10-mel spectra; 0 is identical, 1 is ten times louder or softer."""

    name = "mel"
    task = "codec"
    keys = {"mel_distance": "lower"}

    def __call__(self, audio: Excerpt, case: Case) -> dict[str, float | None]:
        true, estimate, rate = aligned(audio, case.reference)
        return {"mel_distance": log_mel_distance(true, estimate, rate) if true.size else None}


class StftDistance(_Builtin):
    """Spectral convergence plus difference of log magnitudes, mean of three resolutions; 0 is identical."""

    name = "stft"
    task = "codec"
    keys = {"stft_distance": "lower"}

    def __call__(self, audio: Excerpt, case: Case) -> dict[str, float | None]:
        true, estimate, rate = aligned(audio, case.reference)
        return {"stft_distance": stft_distance(true, estimate, rate) if true.size else None}


class SiSdr(_Builtin):
    """Scale-invariant signal-to-distortion ratio in dB, -100 to 100; None where the reference is silent."""

    name = "si_sdr"
    task = "codec"
    keys = {"si_sdr": "higher"}

    def __call__(self, audio: Excerpt, case: Case) -> dict[str, float | None]:
        true, estimate, _ = aligned(audio, case.reference)
        return {"si_sdr": si_sdr(true, estimate) if true.size else None}


@lru_cache(maxsize=8)
def _chroma_transform(sample_rate: int) -> tuple[Spectrogram, torch.Tensor]:
    """The spectrogram, and (F, 12) how much of each frequency's power belongs to each pitch class, C first."""
    hop = max(1, round(sample_rate * CHROMA_WINDOW_SECONDS / 4))
    spectrogram = Spectrogram(4 * hop, hop)
    hertz = torch.linspace(0, sample_rate / 2, 2 * hop + 1)
    pitch = 69 + 12 * torch.log2(hertz.clamp(min=1) / 440)  # MIDI numbers: 60 is middle C
    away = (pitch[:, None] - torch.arange(12) + 6) % 12 - 6  # semitones to the nearest octave of each class
    weights = (1 - away.abs()).clamp(min=0)  # what lies between two classes belongs to both
    inside = (hertz >= CHROMA_HERTZ[0]) & (hertz <= CHROMA_HERTZ[1])
    return spectrogram, weights * inside[:, None]


def chroma(wav: np.ndarray, sample_rate: int) -> np.ndarray:
    """Power of each pitch class over time, of all channels together.

    Args:
        wav: (C, N) or (N,) float32.
        sample_rate: Hz.

    Returns:
        (T, 12) float32, C first; a frame is 64 ms.
    """
    spectrogram, weights = _chroma_transform(sample_rate)
    samples = torch.from_numpy(np.atleast_2d(np.asarray(wav, dtype=np.float32)))
    samples = torch.nn.functional.pad(samples, (0, max(spectrogram.hop_length - samples.shape[1], 0)))
    return (spectrogram(samples).square() @ weights).sum(dim=0).numpy()


def _cosine_distance(true: np.ndarray, estimate: np.ndarray) -> np.ndarray:
    """One minus the cosine along the last axis; 1 where either is silent."""
    true, estimate = true.astype(np.float64), estimate.astype(np.float64)
    power = true.sum(axis=-1) * estimate.sum(axis=-1)
    norm = np.linalg.norm(true, axis=-1) * np.linalg.norm(estimate, axis=-1)
    cosine = (true * estimate).sum(axis=-1) / np.where(norm > 0, norm, 1)
    return np.where(power > 0, np.clip(1 - cosine, 0, 1), 1.0)


def chroma_distance(reference: np.ndarray, other: np.ndarray, sample_rate: int) -> float | None:
    """Mean over time of one minus the cosine of two chroma vectors: 0 is the same harmony, 1 none in common.

    Frames where the reference is silent (60 dB below its loudest) do not count.

    Args:
        reference, other: (C, N) or (N,) of one length.
        sample_rate: Hz, of both.

    Returns:
        None where the reference is silent all along.
    """
    true, estimate = chroma(reference, sample_rate), chroma(other, sample_rate)
    power = true.sum(axis=1)
    heard = power > max(SILENCE, CHROMA_RANGE * float(power.max()))
    if not heard.any():
        return None
    estimate = np.where(estimate.sum(axis=1, keepdims=True) > SILENCE, estimate, 0)
    return float(_cosine_distance(true[heard], estimate[heard]).mean())


class ChromaDistance(_Builtin):
    """Difference of harmony frame by frame, whatever the level; 0 is the same, 1 has nothing in common."""

    name = "chroma"
    task = "codec"
    keys = {"chroma_distance": "lower"}

    def __call__(self, audio: Excerpt, case: Case) -> dict[str, float | None]:
        true, estimate, rate = aligned(audio, case.reference)
        return {"chroma_distance": chroma_distance(true, estimate, rate) if true.size else None}


class Profile(_Builtin):
    """How the whole of the audio is like the whole of the reference and of the prompt, whatever the order in time.

    - `spectrum_*`: mean absolute difference of log10-mel spectra that are averaged over time: timbre and level.
    - `harmony_*`: one minus the cosine of chroma vectors that are summed over time: key and register of harmony.
    """

    name = "profile"
    task = "similarity"
    keys = {
        "spectrum_reference": "lower",
        "spectrum_prompt": "lower",
        "harmony_reference": "lower",
        "harmony_prompt": "lower",
    }

    def __call__(self, audio: Excerpt, case: Case) -> dict[str, float | None]:
        figures: dict[str, float | None] = dict.fromkeys(self.keys)
        rate = case.reference.sample_rate
        wav = converted(audio, rate, 1)
        for label, other in (("reference", case.reference), ("prompt", case.prompt)):
            if other is None or other.wav.size == 0 or wav.size == 0:
                continue
            true = converted(other, rate, 1)
            spectra = [log_mel(one, rate)[0].mean(axis=0) for one in (true, wav)]
            figures[f"spectrum_{label}"] = float(np.abs(spectra[0] - spectra[1]).mean())
            folded = [chroma(one, rate) for one in (true, wav)]
            if float(folded[0].sum()) > SILENCE * len(folded[0]):
                sums = [one.sum(axis=0) for one in folded]
                figures[f"harmony_{label}"] = float(_cosine_distance(sums[0], sums[1]))
        return figures


class Stoi:
    """Short-time objective intelligibility of speech, about 0 to 1, of all channels mixed to one.

    None where less than 0.4 s are left without the silent frames, which it leaves out.
    """

    name = "stoi"
    task = "codec"
    keys = {"stoi": "higher"}

    def missing(self) -> str | None:
        return install_hint("STOI", ("pystoi",), "'valle[eval]'")

    def applies(self, case: Case) -> bool:
        return case.reference.wav.size > 0

    def __call__(self, audio: Excerpt, case: Case) -> dict[str, float | None]:
        from pystoi import stoi

        true, estimate, rate = aligned(audio, case.reference, channels=1)
        if true.shape[1] < MINIMUM_SECONDS * rate or not true.any():
            return {"stoi": None}
        if not estimate.any():
            return {"stoi": 0.0}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            score = float(stoi(true[0].astype(np.float64), estimate[0].astype(np.float64), rate))
        too_short = any("Not enough STFT frames" in str(one.message) for one in said)
        return {"stoi": None if too_short or not np.isfinite(score) else score}


class Pesq:
    """Perceptual evaluation of speech quality, wide band, about 1 (bad) to 4.64 (no difference heard).

    Its standard aligns the two in time, so a delay costs little or nothing. None where either is silent, too short, or
    where it finds no speech.
    """

    name = "pesq"
    task = "codec"
    keys = {"pesq": "higher"}

    def missing(self) -> str | None:
        return install_hint("PESQ", ("pesq",), "'valle[eval-pesq]' (is compiled: needs a C compiler)")

    def applies(self, case: Case) -> bool:
        return case.reference.wav.size > 0

    def __call__(self, audio: Excerpt, case: Case) -> dict[str, float | None]:
        from pesq import PesqError, pesq

        true, estimate, rate = aligned(audio, case.reference, PESQ_RATE, channels=1)
        if true.shape[1] < MINIMUM_SECONDS * rate or not true.any() or not estimate.any():
            return {"pesq": None}
        try:
            score = float(pesq(rate, true[0], estimate[0], "wb"))
        except PesqError:  # as where it finds no speech
            return {"pesq": None}
        return {"pesq": score if np.isfinite(score) else None}
