"""The one interface of every codec: waveform (B, C, N) <-> codes (B, T, Q).

Nobody else types a frame rate, a hop or a codebook size: these numbers come from here.
"""

import hashlib
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

LONG_SECONDS = 120.0  # a recording beyond it is encoded in pieces, so that memory does not grow with it
PIECE_SECONDS = 60.0
CONTEXT_SECONDS = 10.0  # on both sides of a piece, where a codec's reach is not known


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
    def encode_reach(self) -> int | None:
        """Frames before and behind a frame that its codes depend on; None: not bounded, or not known."""
        return None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @abstractmethod
    def encode(self, wav: Tensor) -> Tensor:
        """(B, C, N) float32 in [-1, 1] at `sample_rate` -> codes (B, T, Q) int64, T = num_frames(N)."""

    def encode_batch(self, wavs: Sequence[Tensor]) -> list[Tensor]:
        """Encode recordings of any lengths together: each gets the codes that it gets alone.

        A recording longer than `LONG_SECONDS` is encoded in pieces of `PIECE_SECONDS`, with so much of what is before
        and behind them that the codes stay the same (`encode_reach`). Where that is not bounded (a recurrent layer, a
        norm over time), it is `CONTEXT_SECONDS`, and codes can differ from those of one piece.

        Args:
            wavs: (C, N) float32 each, at `sample_rate`, on any device.

        Returns:
            (T, Q) int64 each, in the order of `wavs`.
        """
        longest = LONG_SECONDS * self.sample_rate  # samples
        moved = [wav.to(self.device) for wav in wavs]
        together = [index for index, wav in enumerate(moved) if wav.shape[-1] <= longest]
        codes: list[Tensor] = [torch.empty(0)] * len(moved)
        if together:
            encoded = self._encode_rows([moved[index] for index in together])
            for index, rows in zip(together, encoded, strict=True):
                codes[index] = rows
        for index, wav in enumerate(moved):
            if wav.shape[-1] > longest:
                codes[index] = self._encode_long(wav)
        return codes

    def _encode_rows(self, wavs: Sequence[Tensor]) -> list[Tensor]:
        """`encode_batch` without pieces. Here only recordings of one length share a batch: nothing is padded."""
        lengths: dict[int, list[int]] = {}
        for index, wav in enumerate(wavs):
            lengths.setdefault(wav.shape[-1], []).append(index)
        codes: dict[int, Tensor] = {}
        for indices in lengths.values():
            codes.update(
                zip(indices, self.encode(torch.stack([wavs[index] for index in indices])), strict=True)
            )
        return [codes[index] for index in range(len(wavs))]

    def _encode_long(self, wav: Tensor) -> Tensor:
        """(C, N) -> (T, Q), piece by piece."""
        hop, total = self.hop_length, self.num_frames(wav.shape[-1])
        reach = self.encode_reach
        context = math.ceil(CONTEXT_SECONDS * self.frame_rate) if reach is None else reach  # frames
        size = max(1, math.ceil(PIECE_SECONDS * self.frame_rate))
        pieces = []
        for start in range(0, total, size):
            first, last = max(0, start - context), min(total, start + size + context)
            codes = self._encode_piece(wav[None, :, first * hop : last * hop])[0]
            pieces.append(codes[start - first : min(total, start + size) - first])
        return torch.cat(pieces)

    def _encode_piece(self, wav: Tensor) -> Tensor:
        """As `encode`, for a part of a recording."""
        return self.encode(wav)

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
