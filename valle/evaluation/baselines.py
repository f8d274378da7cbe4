"""What counting alone predicts: unigram and interpolated bigram of each quantizer's codes.

A model that is no better than these has learnt nothing about sequences. Counts come from the training cuts, the
amount of smoothing from the validation cuts, and the test cuts are only scored, on the same target frames as the
model (see `scores`: the end symbol does not count for either side).

- Unigram, add-k: P(v) = (n(v) + k) / (n + k V).
- Bigram over time: P(v | c) = λ(c) n(c, v) / n(c) + (1 - λ(c)) P(v), c the same quantizer's code one frame before.
  λ(c) is either n(c) / (n(c) + α), which trusts a context the more, the more often it was seen (MacKay & Peto 1995),
  or one constant for all contexts (Jelinek & Mercer 1980); whichever the validation cuts prefer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from valle.evaluation.scores import PositionSums, SplitCodes, TokenScores, frame_scores, stack_scores

UNIGRAM_K = (0.001, 0.01, 0.1, 0.3, 1.0, 3.0)
BIGRAM_ALPHA = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0, 100000.0)
BIGRAM_LAMBDA = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
ROWS_AT_ONCE = 2048


@dataclass(frozen=True)
class Unigram:
    """Add-k unigram of one quantizer."""

    counts: np.ndarray  # (V,)
    k: float

    def probs(self) -> np.ndarray:
        """(V,) float64."""
        smoothed = self.counts + self.k
        return smoothed / smoothed.sum()

    def score(self, context: np.ndarray, target: np.ndarray) -> Tensor:
        """context (T,), unused, and target (T,) -> (T, 3) as `frame_scores`."""
        log_probs = torch.from_numpy(self.probs()).log()
        return frame_scores(log_probs.expand(len(target), -1), torch.from_numpy(target))


@dataclass(frozen=True)
class PairCounts:
    """Sparse counts of (code, next code) pairs, sorted: pair = code · V + next code."""

    pairs: np.ndarray
    counts: np.ndarray
    codebook_size: int

    @classmethod
    def of(cls, sequences: Sequence[np.ndarray], codebook_size: int) -> "PairCounts":
        """Count over 1-D sequences; no pair spans two of them."""
        keys = [sequence[:-1] * codebook_size + sequence[1:] for sequence in sequences]
        pairs, counts = np.unique(np.concatenate(keys), return_counts=True)
        return cls(pairs, counts, codebook_size)

    def rows(self, contexts: np.ndarray) -> np.ndarray:
        """(n,) codes -> (n, V) counts of what followed each."""
        out = np.zeros((len(contexts), self.codebook_size))
        starts = np.searchsorted(self.pairs, contexts * self.codebook_size)
        ends = np.searchsorted(self.pairs, (contexts + 1) * self.codebook_size)
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            out[row, self.pairs[start:end] % self.codebook_size] = self.counts[start:end]
        return out


@dataclass(frozen=True)
class Bigram:
    """Bigram of one quantizer over time, interpolated with its unigram."""

    unigram: Unigram
    pairs: PairCounts
    rule: str  # "count": λ(c) = n(c) / (n(c) + value); "constant": λ(c) = value
    value: float

    def probs(self, contexts: np.ndarray) -> np.ndarray:
        """(n,) codes -> (n, V) probabilities of what follows."""
        counts = self.pairs.rows(contexts)
        return self._interpolate(counts, counts.sum(axis=1, keepdims=True), self.unigram.probs())

    def score(self, context: np.ndarray, target: np.ndarray) -> Tensor:
        """context (T,) and target (T,) -> (T, 3) as `frame_scores`."""
        parts = []
        for start in range(0, len(target), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            log_probs = torch.from_numpy(self.probs(context[rows])).log()
            parts.append(frame_scores(log_probs, torch.from_numpy(target[rows])))
        return torch.cat(parts)

    def _interpolate(self, pair: np.ndarray, total: np.ndarray, prior: np.ndarray) -> np.ndarray:
        weight = (
            total / (total + self.value) if self.rule == "count" else np.where(total > 0, self.value, 0.0)
        )
        return weight * pair / np.maximum(total, 1) + (1 - weight) * prior


@dataclass(frozen=True)
class QuantizerBaselines:
    """Both baselines of one quantizer."""

    unigram: Unigram
    bigram: Bigram


def fit_baselines(
    train: Sequence[np.ndarray], valid: Sequence[SplitCodes], codebook_size: int
) -> list[QuantizerBaselines]:
    """Count on the training cuts and choose the smoothing on the validation cuts.

    Args:
        train: codes (T, Q) of each training cut.
        valid: split validation cuts; their target frames choose k and λ.
        codebook_size: V.

    Returns:
        One pair of baselines a quantizer.
    """
    if not train or not valid:
        raise ValueError(
            "the baselines need training cuts to count and validation cuts to choose the smoothing"
        )
    out = []
    for quantizer in range(train[0].shape[1]):
        sequences = [codes[:, quantizer].astype(np.int64) for codes in train]
        context = np.concatenate([split.context[:, quantizer] for split in valid]).astype(np.int64)
        target = np.concatenate([split.target[:, quantizer] for split in valid]).astype(np.int64)
        counts = np.bincount(np.concatenate(sequences), minlength=codebook_size).astype(np.float64)
        unigram = min(
            (Unigram(counts, k) for k in UNIGRAM_K), key=lambda model: -np.log(model.probs()[target]).mean()
        )
        bigram = _choose_bigram(unigram, PairCounts.of(sequences, codebook_size), context, target)
        out.append(QuantizerBaselines(unigram, bigram))
    return out


def _choose_bigram(unigram: Unigram, pairs: PairCounts, context: np.ndarray, target: np.ndarray) -> Bigram:
    """The rule and weight with the lowest validation loss; only P(target) is needed, not whole rows."""
    bounds = [np.searchsorted(pairs.pairs, (context + shift) * pairs.codebook_size) for shift in (0, 1)]
    running = np.concatenate([[0], np.cumsum(pairs.counts)])
    total = (running[bounds[1]] - running[bounds[0]]).astype(np.float64)  # n(c) of each frame
    key = context * pairs.codebook_size + target
    place = np.minimum(np.searchsorted(pairs.pairs, key), len(pairs.pairs) - 1)
    pair = np.where(pairs.pairs[place] == key, pairs.counts[place], 0).astype(np.float64)  # n(c, v)
    prior = unigram.probs()[target]

    def loss(model: Bigram) -> float:
        return float(-np.log(model._interpolate(pair, total, prior)).mean())

    candidates = [Bigram(unigram, pairs, "count", alpha) for alpha in BIGRAM_ALPHA]
    candidates += [Bigram(unigram, pairs, "constant", weight) for weight in BIGRAM_LAMBDA]
    return min(candidates, key=loss)


def score_baseline(
    models: Sequence[Unigram | Bigram], splits: Sequence[SplitCodes], bin_frames: int | None = None
) -> TokenScores:
    """Score one baseline a quantizer on the target frames of each cut; see `score_model`."""
    sums = np.zeros((len(splits), len(models), 3))
    positions = PositionSums.of(splits, len(models), bin_frames)
    for row, split in enumerate(splits):
        for quantizer, model in enumerate(models):
            context = split.context[:, quantizer].astype(np.int64)
            target = split.target[:, quantizer].astype(np.int64)
            scores = model.score(context, target).numpy()
            sums[row, quantizer] = scores.sum(axis=0)
            if positions is not None:
                positions.add(scores, quantizer)
    return stack_scores([len(split.target) for split in splits], sums, positions)


def sample_unigram(models: Sequence[Unigram], num_frames: int, seed: int) -> np.ndarray:
    """Codes (num_frames, Q) drawn from the unigrams: what a continuation without any sequence model sounds like."""
    generator = np.random.default_rng(seed)
    columns = [generator.choice(len(model.counts), size=num_frames, p=model.probs()) for model in models]
    return np.stack(columns, axis=1).astype(np.int64)
