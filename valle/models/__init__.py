"""The models."""

from valle.models.audio_lm import AudioLM, AudioLMOutput, Generation
from valle.models.builder import build_model, load_model

__all__ = ["AudioLM", "AudioLMOutput", "Generation", "build_model", "load_model"]
