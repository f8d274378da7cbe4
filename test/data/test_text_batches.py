"""Batches of recordings and what is said in them: prompts from neighbours, and gaps to fill."""

import numpy as np
import pytest
import torch

from valle.data.dataset import TextAudioDataset
from valle.utils.errors import UserError

Q, V = 3, 50


class Texts:
    """Of cut n, n + 1 symbols n; its neighbour is the next one."""

    neighbours = np.array([1, 2, 3, 4, -1])

    def __getitem__(self, index):
        return np.full(index + 1, index)


def codes_of(frames, seed=0):
    return np.random.default_rng(seed).integers(V, size=(frames, Q + 1))


CODES = [codes_of(frames, seed) for seed, frames in enumerate((2, 3, 30, 41, 12))]
IDS = ["two", "three", "thirty", "forty-one", "twelve"]


def batch(infill_prob=0.0, epoch=1, seed=7, cuts=(0, 1, 2, 3, 4), neighbours=None):
    dataset = TextAudioDataset(Texts(), neighbours, Q, V, seed, 6, infill_prob)
    return dataset.batch([IDS[cut] for cut in cuts], [CODES[cut] for cut in cuts], epoch, None, list(cuts))


def sides(**changes):
    found = batch(**changes)
    return list(zip(found["prefix_lens"].tolist(), found["suffix_lens"].tolist(), strict=True))


def test_without_gaps_a_batch_says_nothing_of_them():
    found = batch()
    assert set(found) == {"x", "x_lens", "y", "y_lens", "ids", "num_frames"}
    assert found["y_lens"].tolist() == [2, 3, 30, 41, 12] and found["num_frames"] == 41
    for row, codes in enumerate(CODES):
        assert torch.equal(found["y"][row, : len(codes)], torch.from_numpy(codes[:, :Q]))
        assert found["x"][row, : row + 1].tolist() == [row] * (row + 1)
    gaps = batch(1.0)
    assert all(torch.equal(gaps[key], found[key]) for key in ("x", "x_lens", "y", "y_lens"))


def test_a_gap_depends_on_id_epoch_and_seed_alone():
    together = sides(infill_prob=0.5)
    assert sides(infill_prob=0.5) == together
    for cut, place in enumerate(together):
        assert sides(infill_prob=0.5, cuts=(cut,)) == [place]
    assert sides(infill_prob=0.5, cuts=(4, 3, 2)) == together[:1:-1]
    for changes in ({"epoch": 2}, {"seed": 8}):
        assert sides(infill_prob=1.0, **changes) != sides(infill_prob=1.0)


def test_gaps_are_anywhere_of_every_length_and_as_many_as_asked():
    drawn = [sides(infill_prob=1.0, epoch=epoch) for epoch in range(800)]
    for rows in drawn:
        assert rows[0] == (0, 0), "2 frames have no middle"
        assert rows[1] == (1, 1), "of 3 frames, the middle one"
        for (before, behind), codes in zip(rows[2:], CODES[2:], strict=True):
            assert before >= 1 and behind >= 1 and before + behind < len(codes)
    twelve = [12 - before - behind for *_, (before, behind) in drawn]
    for length in range(1, 11):
        assert abs(twelve.count(length) - 80) < 5 * 80**0.5, "each length is as likely as any other"
    ones = [before for *_, (before, behind) in drawn if before + behind == 11]
    assert set(ones) == set(range(1, 11))
    share = [sides(infill_prob=0.25, epoch=epoch)[3] != (0, 0) for epoch in range(800)]
    assert abs(sum(share) - 200) < 5 * (800 * 0.25 * 0.75) ** 0.5


def test_times_are_those_of_each_cut():
    """Behind a row's text there is anything; gaps, prompts and the order of rows change nothing."""
    times = [(np.arange(cut + 1) * 15_000).astype(np.uint16) for cut in range(5)]
    cuts = [4, 0, 2]
    for neighbours, infill_prob in ((None, 0.0), (CODES, 1.0)):
        dataset = TextAudioDataset(Texts(), neighbours, Q, V, 7, 6, infill_prob, times)
        found = dataset.batch([IDS[cut] for cut in cuts], [CODES[cut] for cut in cuts], 1, None, cuts)
        assert found["x_times"].shape == found["x"].shape and found["x_times"].dtype == torch.float32
        for row, cut in enumerate(cuts):
            assert found["x_times"][row, : cut + 1].tolist() == [n * 15_000 for n in range(cut + 1)]


def test_prompts_from_neighbours_stay_what_they_are():
    plain, gaps = (batch(prob, neighbours=CODES) for prob in (0.0, 1.0))
    assert plain["prompts_lens"].tolist() == [3, 6, 6, 6, 6]
    for key in ("prompts", "prompts_lens"):
        assert torch.equal(plain[key], gaps[key])


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_named(share):
    with pytest.raises(UserError, match="--infill-prob is .*, expected a share from 0 to 1"):
        batch(share)
