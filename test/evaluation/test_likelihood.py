"""Scores of a model whose logits are known; batches and padding change nothing."""

import math

import numpy as np
import pytest
import torch

from valle.evaluation.likelihood import score_model
from valle.evaluation.scores import SplitCodes, frame_scores


def test_known_logits_give_known_scores(make_model, make_codes):
    codes = make_codes(30, seed=0, errors=0.0)
    codes[20, 0] = (
        codes[20, 0] + 5
    ) % 12  # one surprise, and its follower, for quantizer 0; its right code is not q - 1's
    scores = score_model(make_model(), [SplitCodes("a", codes[:10], codes[10:])], show_progress=False)
    right_ar, wrong_ar = math.log((9 + 12) / 9), math.log(9 + 12)  # 12 codes and the end symbol
    right_nar, wrong_nar = math.log((9 + 11) / 9), math.log(9 + 11)
    assert scores.frames.tolist() == [20]
    assert scores.loss[0] == pytest.approx(
        [18 * right_ar + 2 * wrong_ar, 19 * right_nar + wrong_nar, 20 * right_nar]
    )
    assert scores.top1[0].tolist() == [18, 19, 20]


def test_batched_equals_one_by_one(make_model, make_codes):
    splits = [
        SplitCodes(str(n), codes[: n // 3], codes[n // 3 :])
        for n in (9, 40, 17, 33, 12)
        for codes in [make_codes(n, n)]
    ]
    one_by_one = [score_model(make_model(), [split], show_progress=False) for split in splits]
    for max_frames in (1, 60, 10_000):
        batched = score_model(make_model(), splits, max_frames=max_frames, show_progress=False)
        for name in ("frames", "loss", "top1", "top10"):
            assert getattr(batched, name) == pytest.approx(
                np.concatenate([getattr(one, name) for one in one_by_one])
            )


def test_padded_frames_are_not_scored_whatever_the_model_says_there(make_model, make_codes):
    class Wild(make_model):
        def ar_logits(self, x, x_lens, y, y_lens):
            logits = super().ar_logits(x, x_lens, y, y_lens)
            beyond = torch.arange(logits.shape[1]) > y_lens[:, None]
            return logits.masked_fill(beyond[..., None], float("nan"))

    splits = [SplitCodes(str(n), codes[:4], codes[4:]) for n in (10, 30) for codes in [make_codes(n, n)]]
    wild, tame = (score_model(kind(), splits, show_progress=False) for kind in (Wild, make_model))
    assert np.isfinite(wild.loss).all() and wild.loss == pytest.approx(tame.loss)


def test_interval_is_per_frame_and_differences_are_paired(make_model, make_codes):
    splits = [SplitCodes(str(n), codes[:4], codes[4:]) for n in (10, 30, 24) for codes in [make_codes(n, n)]]
    scores = score_model(make_model(), splits, show_progress=False)
    assert scores.interval("loss", 0, seed=0).mean == pytest.approx(
        scores.loss[:, 0].sum() / scores.frames.sum()
    )
    same = scores.difference(scores, "loss", 0, seed=0)
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_frame_scores_ranks():
    logits = torch.arange(20.0).repeat(3, 1)
    scores = frame_scores(logits, torch.tensor([19, 10, 9]))
    assert scores[:, 1].tolist() == [1, 0, 0] and scores[:, 2].tolist() == [1, 1, 0]
    assert scores[0, 0].item() == pytest.approx(-logits[0].double().log_softmax(0)[19].item())
