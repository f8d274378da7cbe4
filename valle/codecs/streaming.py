"""Codes that arrive in pieces -> waveform in pieces, without a click at the seams.

Road: generation hands over each chunk of frames -> here -> `valle.utils.audio.AudioSink`. A codec's decoder looks at
frames on both sides of a sample, so every piece is decoded together with `codec.context_frames` frames before it, and
its last frames wait for the `lookahead` frames behind them. Where the lookahead is shorter than the decoder's reach,
two decodes of the same place differ a little; they are blended over 10 ms.
"""

import math

import torch
from torch import Tensor

from valle.codecs.base import Codec
from valle.utils.errors import UserError

LOOKAHEAD_SECONDS = 0.1
BLEND_SECONDS = 0.01


class StreamDecoder:
    """Decodes one recording piece by piece.

    What it gives depends on the codes and the sizes of the pieces alone; joined, it has exactly the samples of
    `codec.decode` over all codes, and equals it to rounding where `lookahead` is at least `codec.context_frames`.

    Args:
        codec: decodes the codes, on its own device.
        lookahead: frames of future that every sample given out has been decoded with. Default: 0.1 s, at most
            what the codec looks at; none for a causal codec.

    Attributes:
        delay: samples held back: those of the lookahead, and the 10 ms (at most a frame) to be blended.

    Raises:
        UserError: a negative lookahead.
    """

    def __init__(self, codec: Codec, lookahead: int | None = None) -> None:
        if lookahead is None:
            usual = min(codec.context_frames, math.ceil(LOOKAHEAD_SECONDS * codec.frame_rate))
            lookahead = 0 if codec.causal else usual
        if lookahead < 0:
            raise UserError(f"lookahead of {lookahead} frames, expected 0 or more")
        self.codec = codec
        blend = min(codec.hop_length, round(BLEND_SECONDS * codec.sample_rate))
        self.delay = lookahead * codec.hop_length + blend
        # Weight of the newer decode: rises smoothly from 0 to 1, both left out.
        phase = torch.arange(1, blend + 1, device=codec.device) / (blend + 1)
        self._ramp = 0.5 - 0.5 * torch.cos(math.pi * phase)
        self._reset()

    def _reset(self) -> None:
        device = self.codec.device
        self._codes: Tensor | None = None  # (frames, Q): context, then what is not given out yet
        self._received = 0  # frames pushed
        self._given = 0  # samples given out
        self._tail = torch.zeros(
            self.codec.channels, 0, device=device
        )  # what follows them, by the last decode

    def prime(self, codes: Tensor) -> None:
        """Give the codes (T, Q) that precede the first push, as a prompt does: context only, no sound of their own.

        Raises:
            ValueError: codes have been given already, or are not (T, Q).
        """
        if self._codes is not None:
            raise ValueError("codes were given before; prime() comes first")
        self._append(codes)
        self._forget(self.codec.context_frames)
        self._received = 0

    def push(self, codes: Tensor) -> Tensor:
        """Take the next frames.

        Args:
            codes: (T, Q) int64, T >= 0.

        Returns:
            (C, n) float32, the samples that are final by now: all received but the last `delay`.

        Raises:
            ValueError: codes are not (T, Q), or have another Q than those before.
        """
        self._append(codes)
        return self._give(self._received * self.codec.hop_length - self.delay)

    def flush(self) -> Tensor:
        """End the recording: the rest of the samples, (C, n). The decoder is as new then."""
        rest = self._give(self._received * self.codec.hop_length)
        self._reset()
        return rest

    def _append(self, codes: Tensor) -> None:
        if codes.ndim != 2 or (self._codes is not None and codes.shape[1] != self._codes.shape[1]):
            wanted = "Q" if self._codes is None else str(self._codes.shape[1])
            raise ValueError(f"codes {tuple(codes.shape)}, expected (T, {wanted})")
        codes = codes.to(self.codec.device)
        self._codes = codes if self._codes is None else torch.cat([self._codes, codes])
        self._received += len(codes)

    def _forget(self, keep: int) -> None:
        assert self._codes is not None
        self._codes = self._codes[max(0, len(self._codes) - keep) :]

    def _give(self, end: int) -> Tensor:
        """The samples from the last one given out to `end`, both counted from the first push."""
        if end <= self._given:
            return self._tail[:, :0]
        assert self._codes is not None
        hop = self.codec.hop_length
        wav = self.codec.decode(self._codes[None])[0]  # (C, frames · hop)
        if wav.shape[-1] != len(self._codes) * hop:
            raise ValueError(
                f"codec '{self.codec.name}' made {wav.shape[-1]} samples of {len(self._codes)} frames, "
                f"expected {hop} a frame"
            )
        wav = wav[:, wav.shape[-1] - (self._received * hop - self._given) :].clone()
        seam = self._tail.shape[-1]  # 0 for the first piece
        wav[:, :seam] = torch.lerp(self._tail, wav[:, :seam], self._ramp[:seam])
        count = end - self._given
        self._tail = wav[:, count : count + len(self._ramp)]
        self._given = end
        self._forget(self._received - end // hop + self.codec.context_frames)
        return wav[:, :count]
