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

    @property
    def context(self) -> np.ndarray:
        """(T, Q): the frame before each target frame; the first one's is the prompt's last."""
        return np.concatenate([self.prompt[-1:], self.target[:-1]])


@dataclass(frozen=True)
class TokenScores:
    """Per cut and quantizer, sums over the target frames.

    Attributes:
        frames: (n,) target frames of each cut.
        loss: (n, Q) cross-entropy in nats, summed over frames.
        top1: (n, Q) frames whose code was the likeliest.
        top10: (n, Q) frames whose code was among the ten likeliest.
    """

    frames: np.ndarray
    loss: np.ndarray
    top1: np.ndarray
    top10: np.ndarray

    def per_frame(self, metric: str, quantizer: int) -> np.ndarray:
        """(n,) mean per frame of `loss`, `top1` or `top10` of each cut."""
        return getattr(self, metric)[:, quantizer] / np.maximum(self.frames, 1)

    def interval(self, metric: str, quantizer: int, seed: int) -> Interval:
        """Mean per frame over all cuts (long cuts weigh more), with its bootstrap interval over cuts."""
        return bootstrap_ci(self.per_frame(metric, quantizer), seed, self.frames)

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


def stack_scores(frames: Sequence[int], sums: np.ndarray) -> TokenScores:
    """(n, Q, 3) sums over frames, in the order of `frame_scores` -> TokenScores."""
    return TokenScores(np.asarray(frames, dtype=np.int64), sums[..., 0], sums[..., 1], sums[..., 2])
