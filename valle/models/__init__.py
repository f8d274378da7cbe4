"""The models."""

from valle.models.audio_lm import AudioLM
from valle.models.builder import build_model, load_audio_lm, load_model
from valle.models.codec_lm import CodecLM, LossOutput
from valle.models.generating import Generation
from valle.models.valle import VALLE, VALLF

__all__ = [
    "VALLE",
    "VALLF",
    "AudioLM",
    "CodecLM",
    "Generation",
    "LossOutput",
    "build_model",
    "load_audio_lm",
    "load_model",
]
