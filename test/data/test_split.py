"""Prompt and target: per row, seeded by cut and epoch, independent of the batch."""

import pytest
import torch

from valle.data.split import drawn_ratio, parse_ratio_range, prompt_length, split_prompt_target
from valle.utils.errors import UserError


def test_rows_are_split_each_at_its_own_place():
    torch.manual_seed(0)
    codes, lens = torch.randint(100, (3, 10, 4)), torch.tensor([10, 6, 3])
    frames = torch.tensor([4, 5, 1])
    split = split_prompt_target(codes, lens, frames)
    assert split.prompt.shape == (3, 5, 4) and split.target.shape == (3, 6, 4)
    assert split.prompt_lens.tolist() == [4, 5, 1] and split.target_lens.tolist() == [6, 1, 2]
    for row in range(3):
        s, n = int(frames[row]), int(lens[row])
        assert torch.equal(split.prompt[row, :s], codes[row, :s]) and not split.prompt[row, s:].any()
        assert (
            torch.equal(split.target[row, : n - s], codes[row, s:n]) and not split.target[row, n - s :].any()
        )


def test_one_number_splits_all_rows():
    split = split_prompt_target(torch.ones(2, 8, 4, dtype=torch.long), torch.tensor([8, 5]), 3)
    assert split.prompt_lens.tolist() == [3, 3] and split.target_lens.tolist() == [5, 2]


@pytest.mark.parametrize("frames", [0, 5, 9])
def test_a_split_outside_the_recording_is_refused(frames):
    with pytest.raises(ValueError, match="row 1: 5 frames"):
        split_prompt_target(
            torch.zeros(2, 20, 4, dtype=torch.long), torch.tensor([20, 5]), torch.tensor([3, frames])
        )


def test_clips_of_every_length_get_the_same_share():
    """An ancestor gave clips of 5, 10 and 15 s prompts of 40, 20 and 13 %: the shortest one's in the batch."""
    assert [prompt_length(n, 0.4) for n in (250, 500, 750)] == [100, 200, 300]
    assert prompt_length(2, 0.4) == 1 and prompt_length(2, 0.99) == 1


def test_drawn_ratios_depend_on_cut_epoch_and_seed_alone():
    ratios = [drawn_ratio(0.2, 0.6, f"cut-{i}", epoch, 1) for i in range(300) for epoch in range(2)]
    assert all(0.2 <= r < 0.6 for r in ratios) and len(set(ratios)) == 600
    assert abs(sum(ratios) / 600 - 0.4) < 0.02
    assert (
        drawn_ratio(0.2, 0.6, "a", 3, 1)
        == drawn_ratio(0.2, 0.6, "a", 3, 1)
        != drawn_ratio(0.2, 0.6, "a", 3, 2)
    )


def test_ranges_are_checked():
    assert parse_ratio_range(None) is None and parse_ratio_range("0.2,0.6") == (0.2, 0.6)
    for text in ("0.6,0.2", "0,0.5", "0.5,1", "half", "0.1,0.2,0.3"):
        with pytest.raises(UserError, match="prompt-ratio-range"):
            parse_ratio_range(text)
