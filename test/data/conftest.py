"""A codec small enough to be checked by hand, and recordings made on the spot."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lhotse.cut import Cut
from torch import Tensor, nn

from valle.codecs.base import Codec
from valle.data.manifests import make_cut, make_recording, make_supervision, write_audio, write_cuts

RATE, HOP, QUANTIZERS, CODES = 8000, 160, 3, 32


class LevelCodec(Codec):
    """Codes of a frame: its mean level, plus the quantizer's number."""

    name, sample_rate, channels, hop_length = "level", RATE, 1, HOP
    num_quantizers, codebook_size = QUANTIZERS, CODES

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([weight]))
        self.calls = 0

    def encode(self, wav: Tensor) -> Tensor:
        self.calls += 1
        padded = nn.functional.pad(wav[:, 0], (0, -wav.shape[-1] % HOP))
        level = padded.view(len(wav), -1, HOP).abs().mean(-1)  # (B, T)
        codes = (self.weight * level * (CODES - QUANTIZERS)).long().clamp(0, CODES - QUANTIZERS)
        return codes[..., None] + torch.arange(QUANTIZERS)

    def decode(self, codes: Tensor) -> Tensor:
        raise NotImplementedError


@pytest.fixture
def make_codec() -> type[LevelCodec]:
    return LevelCodec


@pytest.fixture
def codec(make_codec) -> LevelCodec:
    return make_codec()


@pytest.fixture
def write_corpus() -> Callable[..., list[Cut]]:
    return _write_corpus


def _write_corpus(folder: Path, splits: list[str], sample_rate: int = RATE, channels: int = 1) -> list[Cut]:
    """One recording of two to three seconds a split; cuts_all.jsonl.gz in `folder`."""
    cuts = []
    for number, split in enumerate(splits):
        rng = np.random.default_rng(number)
        wav = 0.3 * rng.uniform(-1, 1, (channels, int((2 + 0.1 * number) * sample_rate)))
        path = folder / "audio" / f"clip-{number}.flac"
        write_audio(path, wav, sample_rate)
        recording = make_recording(f"clip-{number}", path, wav.shape, sample_rate)
        supervision = make_supervision(recording, f"sentence {number}", "someone", "en", split)
        cuts.append(make_cut(recording, supervision, "audio"))
        cuts.append(make_cut(recording, supervision, "utterance", f"clip-{number}-utterance"))
    write_cuts(folder / "cuts_all.jsonl.gz", cuts)
    return cuts
