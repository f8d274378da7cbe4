"""The one interface of every codec: waveform (B, C, N) <-> codes (B, T, Q).

Nobody else types a frame rate, a hop or a codebook size: these numbers come from here.
"""

import hashlib
import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn


class Codec(nn.Module):
    """A neural audio codec.

    Attributes:
        name: registry name, or the folder it was loaded from.
        sample_rate: Hz.
        channels: C.
        hop_length: samples per frame.
        num_quantizers: Q, codes per frame.
        codebook_size: V, values of a code.
        causal: no sample depends on a frame after its own.
    """

    name: str
    sample_rate: int
    channels: int
    hop_length: int
    num_quantizers: int
    codebook_size: int
    causal: bool = False

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sample_rate / self.hop_length

    @property
    def context_frames(self) -> int:
        """Frames before and behind a frame that its samples depend on, as far as can be heard.

        Decoding in pieces decodes so many again. One second, unless a codec knows its own reach.
        """
        return math.ceil(self.frame_rate)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @abstractmethod
    def encode(self, wav: Tensor) -> Tensor:
        """(B, C, N) float32 in [-1, 1] at `sample_rate` -> codes (B, T, Q) int64, T = num_frames(N)."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """codes (B, T, Q) int64 -> (B, C, T · hop_length)."""

    def codebooks(self) -> Tensor | None:
        """(Q, V, D): the vectors that a frame's codes stand for, which add up; None where they do not."""
        return None

    def num_frames(self, num_samples: int) -> int:
        """Frames that `num_samples` samples are coded in."""
        return -(-num_samples // self.hop_length)

    def fingerprint(self) -> str:
        """16 hexadecimal digits over the weights that decide the codes: equal for equal codes, on any device."""
        return self._digest(self.state_dict())

    def _digest(self, state: dict[str, Tensor]) -> str:
        digest = hashlib.sha256(f"{self.num_quantizers}".encode())
        for name, tensor in sorted(state.items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def info(self) -> dict[str, Any]:
        """What manifests and checkpoints keep about the codec."""
        return {
            "name": self.name,
            "sample_rate": self.sample_rate,
            "channels": self.channels,
            "hop_length": self.hop_length,
            "frame_rate": self.frame_rate,
            "num_quantizers": self.num_quantizers,
            "codebook_size": self.codebook_size,
            "fingerprint": self.fingerprint(),
        }
