"""What a predictor of codes scores on held-out target frames: one form for the model and for every baseline.

Frames count, the end symbol does not: losses and accuracies are over the real target frames of each cut, for the
model and the baselines alike. The model still pays for what it gives to the end symbol at these frames, since its
probabilities are normalized over codes and end symbol together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from valle.evaluation.statistics import Interval, bootstrap_ci

TOP_K = 10


@dataclass(frozen=True)
class SplitCodes:
    """One cut's codes, split into what is given and what is scored."""

    cut_id: str
    prompt: np.ndarray  # (S, Q) int64
    target: np.ndarray  # (T, Q) int64
    text: np.ndarray | None = None  # (L,) or (L, F) what the model reads, if it does
    wrong: np.ndarray | None = None  # another cut's
    times: np.ndarray | None = (
        None  # (L,) the frame at which each symbol of `text` begins, where that is known
    )
    wrong_times: np.ndarray | None = None  # (L,) where the symbols of `wrong` fit best

    @property
    def context(self) -> np.ndarray:
        """(T, Q): the frame before each target frame; the first one's is the prompt's last."""
        return np.concatenate([self.prompt[-1:], self.target[:-1]])


@dataclass(frozen=True)
class PositionSums:
    """Sums over all cuts by position in the target, some frames together.

    Attributes:
        bin_frames: frames that share a position.
        frames: (P,) target frames at each position.
        sums: (P, Q, 3) in the order of `frame_scores`.
    """

    bin_frames: int
    frames: np.ndarray
    sums: np.ndarray

    @classmethod
    def of(
        cls, splits: Sequence[SplitCodes], num_quantizers: int, bin_frames: int | None
    ) -> "PositionSums | None":
        """Zero sums for these cuts; None without `bin_frames`."""
        if bin_frames is None:
            return None
        lengths = np.array([len(split.target) for split in splits])
        starts = np.arange(0, lengths.max(), bin_frames)
        frames = np.clip(lengths - starts[:, None], 0, bin_frames).sum(axis=1)
        return cls(bin_frames, frames, np.zeros((len(starts), num_quantizers, 3)))

    def add(self, scores: np.ndarray, quantizer: int) -> None:
        """Add (T, 3) scores of frames 0 … T - 1."""
        np.add.at(self.sums[:, quantizer], np.arange(len(scores)) // self.bin_frames, scores)

    def per_frame(self) -> np.ndarray:
        """(P, Q, 3)."""
        return self.sums / self.frames[:, None, None]


@dataclass(frozen=True)
class TokenScores:
    """Per cut and quantizer, sums over the target frames.

    Attributes:
        frames: (n,) target frames of each cut.
        loss: (n, Q) cross-entropy in nats, summed over frames.
        top1: (n, Q) frames whose code was the likeliest.
        top10: (n, Q) frames whose code was among the ten likeliest.
        positions: the same by position, where it was asked for.
    """

    frames: np.ndarray
    loss: np.ndarray
    top1: np.ndarray
    top10: np.ndarray
    positions: PositionSums | None = None

    def per_frame(self, metric: str, quantizer: int) -> np.ndarray:
        """(n,) mean per frame of `loss`, `top1` or `top10` of each cut."""
        return getattr(self, metric)[:, quantizer] / np.maximum(self.frames, 1)

    def interval(self, metric: str, quantizer: int, seed: int) -> Interval:
        """Mean per frame over all cuts (long cuts weigh more), with its bootstrap interval over cuts."""
        return bootstrap_ci(self.per_frame(metric, quantizer), seed, self.frames)

    def total(self, seed: int, factor: float = 1.0) -> Interval:
        """Loss of all quantizers together, in nats per frame times `factor`."""
        return bootstrap_ci(factor * self.loss.sum(axis=1) / np.maximum(self.frames, 1), seed, self.frames)

    def difference(self, other: "TokenScores", metric: str, quantizer: int, seed: int) -> Interval:
        """`self` minus `other`, paired by cut."""
        delta = self.per_frame(metric, quantizer) - other.per_frame(metric, quantizer)
        return bootstrap_ci(delta, seed, self.frames)


def frame_scores(scores: Tensor, targets: Tensor) -> Tensor:
    """Loss and hits of each frame.

    Equal scores are ranked by their index, so that a predictor that knows nothing gains nothing by ties.

    Args:
        scores: (..., V) logits or log-probabilities; they are normalized here.
        targets: (...) int64 codes that came.

    Returns:
        (..., 3) float64: cross-entropy in nats, top-1 hit, top-10 hit.
    """
    log_probs = scores.double().log_softmax(dim=-1)
    chosen = log_probs.gather(-1, targets[..., None])  # (..., 1)
    index = torch.arange(log_probs.shape[-1], device=log_probs.device)
    ahead = (log_probs > chosen) | ((log_probs == chosen) & (index < targets[..., None]))
    rank = ahead.sum(dim=-1)
    return torch.stack([-chosen[..., 0], (rank < 1).double(), (rank < TOP_K).double()], dim=-1)


def stack_scores(
    frames: Sequence[int], sums: np.ndarray, positions: PositionSums | None = None
) -> TokenScores:
    """(n, Q, 3) sums over frames, in the order of `frame_scores` -> TokenScores."""
    return TokenScores(
        np.asarray(frames, dtype=np.int64), sums[..., 0], sums[..., 1], sums[..., 2], positions
    )
