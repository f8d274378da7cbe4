"""Random pieces of recordings, for training a codec. All audio is held in memory as 16-bit samples."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from valle.utils.audio import convert_audio, load_audio
from valle.utils.errors import UserError
from valle.utils.progress import progress

GAIN_DB = (-12.0, 3.0)  # range of the random level change
PEAK = 0.99


class RandomSegments:
    """Batches {"wav": (B, 1, N) float32} of random pieces at random level.

    The pieces of epoch e are a function of (seed, e) alone, so that a training resumes exactly. An epoch draws as
    many seconds as the recordings have.

    Args:
        paths: audio files.
        sample_rate: Hz of the pieces.
        seconds: length of a piece.
        batch_size: pieces in a batch.
        seed: of the draw.
    """

    def __init__(
        self, paths: Sequence[Path], sample_rate: int, seconds: float, batch_size: int, seed: int
    ) -> None:
        if not paths:
            raise UserError("no recordings to train the codec on")
        self.num_samples, self.batch_size, self.seed = round(seconds * sample_rate), batch_size, seed
        self.piece_seconds = self.num_samples / sample_rate
        loaded = []
        for path in progress(paths, desc="reading", unit="file"):
            wav = convert_audio(*load_audio(path), sample_rate, 1)[0]
            if len(wav) < self.num_samples:
                wav = np.pad(wav, (0, self.num_samples - len(wav)))
            loaded.append((np.clip(wav, -1, 1) * 32767).astype(np.int16))
        self.recordings = loaded
        lengths = np.array([len(wav) for wav in loaded], dtype=np.float64)
        self.weights = lengths / lengths.sum()
        self.batches_per_epoch = max(1, int(lengths.sum() / self.num_samples / batch_size))
        self.seconds = float(lengths.sum() / sample_rate)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[dict[str, Any]]:
        """The batches of one epoch, from number `skip` on; every rank has as many, as it holds the same recordings."""
        for number in range(skip, self.batches_per_epoch):
            yield self._batch(epoch, number, self.batch_size)

    def largest(self, epoch: int, max_duration: float | None = None) -> dict[str, Any]:
        """The first batch of an epoch: all are as large.

        Args:
            epoch: number of the epoch.
            max_duration: as if a batch had so many seconds of pieces, one piece or more (default: as it is).
        """
        if max_duration is None:
            return self._batch(epoch, 0, self.batch_size)
        return self._batch(epoch, 0, max(1, int(max_duration / self.piece_seconds + 1e-6)))

    def _batch(self, epoch: int, number: int, batch_size: int) -> dict[str, Any]:
        draw = np.random.default_rng((self.seed, epoch, number))
        chosen = draw.choice(len(self.recordings), batch_size, p=self.weights)
        pieces = []
        for index in chosen:
            wav = self.recordings[index]
            start = draw.integers(0, len(wav) - self.num_samples + 1)
            piece = wav[start : start + self.num_samples].astype(np.float32) / 32767
            gain = 10 ** (draw.uniform(*GAIN_DB) / 20)
            pieces.append(piece * min(gain, PEAK / max(float(np.abs(piece).max()), 1e-4)))
        return {"wav": torch.from_numpy(np.stack(pieces).astype(np.float32))[:, None]}
