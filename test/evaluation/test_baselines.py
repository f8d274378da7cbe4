"""Unigram and bigram against values computed by hand and against a slow reference."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from valle.evaluation.baselines import (
    BIGRAM_ALPHA,
    BIGRAM_LAMBDA,
    UNIGRAM_K,
    Bigram,
    PairCounts,
    Unigram,
    fit_baselines,
    sample_unigram,
    score_baseline,
)
from valle.evaluation.scores import SplitCodes


def split(cut_id: str, prompt: list[int], target: list[int]) -> SplitCodes:
    return SplitCodes(cut_id, np.array(prompt)[:, None], np.array(target)[:, None])


def test_unigram_by_hand():
    model = Unigram(np.array([3.0, 1.0, 0.0]), k=1.0)
    assert model.probs() == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    scores = score_baseline([model], [split("a", [0], [0, 2])])
    assert scores.loss[0, 0] == pytest.approx(-math.log(4 / 7) - math.log(1 / 7))
    assert (scores.top1[0, 0], scores.top10[0, 0], scores.frames[0]) == (1, 2, 2)


def test_bigram_by_hand():
    unigram = Unigram(np.array([2.0, 2.0, 0.0]), k=1.0)  # 3/7, 3/7, 1/7
    pairs = PairCounts.of([np.array([0, 1, 0, 1]), np.array([1, 1])], 3)  # 0->1 twice, 1->0 once, 1->1 once
    assert pairs.rows(np.array([0, 1, 2])).tolist() == [[0, 2, 0], [1, 1, 0], [0, 0, 0]]
    by_count = Bigram(unigram, pairs, "count", 2.0)  # λ = 1/2 after 0 and 1, 0 after 2
    assert by_count.probs(np.array([0]))[0] == pytest.approx([3 / 14, 1 / 2 + 3 / 14, 1 / 14])
    assert by_count.probs(np.array([2]))[0] == pytest.approx([3 / 7, 3 / 7, 1 / 7])
    constant = Bigram(unigram, pairs, "constant", 0.25)
    assert constant.probs(np.array([1]))[0] == pytest.approx([0.125 + 9 / 28, 0.125 + 9 / 28, 3 / 28])
    scores = score_baseline(
        [by_count], [split("a", [2, 0], [1, 2])]
    )  # the prompt's last frame is the first context
    assert scores.loss[0, 0] == pytest.approx(-math.log(5 / 7) - math.log(1 / 4 * 0 + 1 / 2 * 1 / 7))


def brute_force(train, k_or_rule, value, contexts, targets, size, k=None):
    """P of each target, counted one by one."""
    flat = [code for sequence in train for code in sequence]
    unigram = Counter(flat)
    pair = Counter((a, b) for sequence in train for a, b in itertools.pairwise(sequence))
    seen = Counter(a for sequence in train for a in sequence[:-1])
    out = []
    for context, target in zip(contexts, targets, strict=True):
        base = (unigram[target] + k) / (len(flat) + k * size)
        if k_or_rule == "count":
            weight = seen[context] / (seen[context] + value)
        else:
            weight = value if seen[context] else 0.0
        likely = pair[context, target] / seen[context] if seen[context] else 0.0
        out.append(weight * likely + (1 - weight) * base)
    return out


def test_fit_finds_the_best_smoothing_on_validation_and_scores_like_brute_force(make_codes):
    size = 12
    train = [make_codes(frames, seed) for seed, frames in enumerate((40, 60, 25))]
    valid = [SplitCodes("v", codes[:10], codes[10:]) for codes in (make_codes(50, 10), make_codes(30, 11))]
    test = [SplitCodes("t", codes[:8], codes[8:]) for codes in (make_codes(45, 20), make_codes(20, 21))]
    fitted = fit_baselines(train, valid, size)
    scores = score_baseline([pair.bigram for pair in fitted], test)
    for quantizer, pair in enumerate(fitted):
        sequences = [codes[:, quantizer].tolist() for codes in train]

        def loss(splits, rule, value, k, quantizer=quantizer, sequences=sequences):
            contexts = [c for part in splits for c in part.context[:, quantizer].tolist()]
            targets = [c for part in splits for c in part.target[:, quantizer].tolist()]
            return -np.log(brute_force(sequences, rule, value, contexts, targets, size, k))

        k = min(UNIGRAM_K, key=lambda k: loss(valid, "constant", 0.0, k).mean())
        assert pair.unigram.k == k
        rules = [("count", value) for value in BIGRAM_ALPHA] + [
            ("constant", value) for value in BIGRAM_LAMBDA
        ]
        best = min(rules, key=lambda rule: loss(valid, *rule, k).mean())
        assert (pair.bigram.rule, pair.bigram.value) == best
        assert scores.loss[:, quantizer].sum() == pytest.approx(loss(test, *best, k).sum())


def test_probabilities_sum_to_one_and_bigram_beats_unigram_where_order_matters(make_codes):
    train = [make_codes(200, seed) for seed in range(4)]
    valid = [SplitCodes("v", codes[:10], codes[10:]) for codes in (make_codes(100, 10),)]
    test = [SplitCodes("t", codes[:10], codes[10:]) for codes in (make_codes(100, 20),)]
    for pair in fit_baselines(train, valid, 12):
        assert pair.bigram.probs(np.arange(12)).sum(axis=1) == pytest.approx(np.ones(12))
        assert (
            score_baseline([pair.bigram], test).loss[0, 0] < score_baseline([pair.unigram], test).loss[0, 0]
        )


def test_ties_give_nothing_for_free():
    uniform = Unigram(np.zeros(40), k=1.0)
    scores = score_baseline([uniform], [split("a", [0], list(range(40)))])
    assert (scores.top1[0, 0], scores.top10[0, 0]) == (1, 10)
    assert scores.loss[0, 0] == pytest.approx(40 * math.log(40))


def test_no_training_or_validation_cuts_is_an_error(make_codes):
    with pytest.raises(ValueError, match="baselines need"):
        fit_baselines([], [], 12)


def test_unigram_samples_follow_the_counts_and_the_seed():
    model = Unigram(np.array([0.0, 300.0, 100.0]), k=0.001)
    codes = sample_unigram([model, model], 4000, seed=1)
    assert codes.shape == (4000, 2) and (codes == sample_unigram([model, model], 4000, seed=1)).all()
    assert np.bincount(codes[:, 0], minlength=3) / 4000 == pytest.approx([0, 0.75, 0.25], abs=0.03)
