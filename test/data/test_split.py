"""Prompt and target: per row, seeded by cut and epoch, independent of the batch."""

import itertools

import pytest
import torch
from lhotse import CutSet

from valle.bin import trainer_audiolm
from valle.config import DataConfig, parse
from valle.data.dataset import CutBatches, PromptTargetDataset, load_codes
from valle.data.manifests import read_manifest
from valle.data.split import (
    PromptRule,
    RowSplit,
    draw_split,
    drawn_ratio,
    parse_ratio_range,
    prompt_length,
    settle_prompt,
    split_prompt_target,
)
from valle.utils.errors import UserError


def test_rows_are_split_each_at_its_own_place():
    torch.manual_seed(0)
    codes, lens = torch.randint(100, (3, 10, 4)), torch.tensor([10, 6, 3])
    frames = torch.tensor([4, 5, 1])
    split = split_prompt_target(codes, lens, frames)
    assert split.prompt.shape == (3, 5, 4) and split.target.shape == (3, 6, 4)
    assert split.prompt_lens.tolist() == [4, 5, 1] and split.target_lens.tolist() == [6, 1, 2]
    assert torch.equal(split.prefix_lens, split.prompt_lens)
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


def test_a_prompt_may_stand_on_both_sides_or_begin_late():
    """Rows: a gap in the middle, at the start and at the end (a continuation), and a prompt of one frame."""
    torch.manual_seed(0)
    codes, lens = 1 + torch.randint(100, (4, 10, 4)), torch.tensor([10, 6, 7, 9])
    target_starts, target_lens = torch.tensor([3, 0, 2, 4]), torch.tensor([2, 4, 5, 5])
    split = split_prompt_target(codes, lens, target_starts, target_lens, torch.tensor([0, 0, 0, 3]))
    prompts = [[0, 1, 2, 5, 6, 7, 8, 9], [4, 5], [0, 1], [3]]
    targets = [[3, 4], [0, 1, 2, 3], [2, 3, 4, 5, 6], [4, 5, 6, 7, 8]]
    assert split.prompt.shape == (4, 8, 4) and split.target.shape == (4, 5, 4)
    assert split.prefix_lens.tolist() == [3, 0, 2, 1]
    assert split.prompt_lens.tolist() == [8, 2, 2, 1] and torch.equal(split.target_lens, target_lens)
    for row in range(4):
        for part, frames in ((split.prompt, prompts[row]), (split.target, targets[row])):
            assert torch.equal(part[row, : len(frames)], codes[row, frames])
            assert not part[row, len(frames) :].any()


@pytest.mark.parametrize(
    ("target_start", "target_len", "prompt_start"),
    [(0, 5, 0), (2, 0, 0), (2, 4, 0), (2, 3, 2), (1, 2, 2), (2, 1, -1)],
)
def test_a_gap_outside_the_recording_is_refused(target_start, target_len, prompt_start):
    with pytest.raises(ValueError, match="row 1: 5 frames"):
        split_prompt_target(
            torch.zeros(2, 20, 4, dtype=torch.long), torch.tensor([20, 5]), torch.tensor([3, target_start]),
            torch.tensor([3, target_len]), torch.tensor([0, prompt_start]),
        )  # fmt: skip


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


def draw(frames, infill=0.0, drop=0.0, ratio=0.4, cut="a", epoch=0, seed=1):
    return draw_split(frames, prompt_length(frames, ratio), infill, drop, cut, epoch, seed)


def test_without_shares_every_row_continues_its_prompt():
    for epoch in range(20):
        assert draw(10, epoch=epoch) == RowSplit(0, 4, 6)
        assert draw(10, drop=1.0, epoch=epoch) == RowSplit(3, 4, 6), "the prompt's last frame is left"
        assert draw(2, infill=1.0, epoch=epoch) == RowSplit(0, 1, 1), "2 frames have no middle"


@pytest.mark.parametrize("ratio", [0.01, 0.4, 0.9])
def test_gaps_are_as_long_as_continuations_and_anywhere_inside(ratio):
    places = [draw(10, infill=1.0, drop=1.0, ratio=ratio, cut=f"cut-{i}") for i in range(3000)]
    length = min(10 - prompt_length(10, ratio), 8)
    assert {(place.prompt_start, place.target_len) for place in places} == {(0, length)}
    counts = torch.tensor([place.target_start for place in places]).bincount(minlength=10)
    possible = torch.arange(10)[1 : 10 - length]
    assert counts[possible].sum() == 3000, "a frame or more on either side"
    # 3000 draws: the expected count, give or take five standard deviations.
    share = 1 / len(possible)
    assert ((counts[possible] - 3000 * share).abs() <= 5 * (3000 * share * (1 - share)) ** 0.5).all()


def test_shares_are_kept_and_do_not_depend_on_one_another():
    """A quarter is filled in, half of the rest has no prompt; nothing but cut, epoch and seed decides."""
    keys = [(f"cut-{i}", epoch) for i in range(1000) for epoch in range(4)]
    rows = [draw(50, 0.25, 0.5, cut=cut, epoch=epoch) for cut, epoch in keys]
    infilled = [row.target_start + row.target_len < 50 for row in rows]
    dropped = [row.prompt_start > 0 for row in rows]
    assert abs(sum(infilled) - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5
    assert abs(sum(dropped) - 1500) < 5 * (4000 * 0.375 * 0.625) ** 0.5
    # Another draw than the ratio's: filled gaps would else be of one length.
    ratios = torch.tensor([drawn_ratio(0.0, 1.0, cut, epoch, 1) for cut, epoch in keys])
    assert abs(float(ratios[torch.tensor(infilled)].mean()) - 0.5) < 0.05
    assert rows == [draw(50, 0.25, 0.5, cut=cut, epoch=epoch) for cut, epoch in keys]
    assert rows != [draw(50, 0.25, 0.5, cut=cut, epoch=epoch, seed=2) for cut, epoch in keys]
    fewer = [draw(50, 0.25, 0.0, cut=cut, epoch=epoch) for cut, epoch in keys]
    assert [row for row, no in zip(rows, dropped, strict=True) if not no] == [
        row for row, no in zip(fewer, dropped, strict=True) if not no
    ]


def make_source(folder, draw=True, **options):
    data = DataConfig(**{"max_duration": 8, "num_buckets": 2, "prompt_ratio_range": "0.2,0.6", **options})
    dataset = PromptTargetDataset(data, 4, 30, 7, draw)
    return CutBatches(folder / "cuts_train.jsonl.gz", data, dataset, 7, training=True)


def rows_of(batches):
    """By cut: prompt, target and prefix."""
    return {
        cut: (
            batch["x"][row, : batch["x_lens"][row]].tolist(),
            batch["y"][row, : batch["y_lens"][row]].tolist(),
            int(batch["prefix_lens"][row]),
        )
        for batch in batches
        for row, cut in enumerate(batch["ids"])
    }


def test_batches_of_gaps_dropped_prompts_and_continuations(tokenized):
    shares = dict(infill_prob=0.5, drop_prompt_prob=0.5)
    codes = {cut.id: load_codes(cut).tolist() for cut in read_manifest(tokenized / "cuts_train.jsonl.gz")}
    plain = rows_of(make_source(tokenized).epoch(3))
    rows = rows_of(make_source(tokenized, **shares).epoch(3))
    kinds = {"infilled": 0, "dropped": 0, "plain": 0}
    for cut, (prompt, target, prefix) in rows.items():
        whole = plain[cut]
        assert whole[0] + whole[1] == codes[cut] and whole[2] == len(whole[0])
        if prefix < len(prompt):
            kinds["infilled"] += 1
            assert prompt[:prefix] + target + prompt[prefix:] == codes[cut]
            assert len(target) == len(whole[1]), "as long as the continuation would be"
        elif len(prompt) < len(whole[0]):
            kinds["dropped"] += 1
            assert (prompt, target, prefix) == (whole[0][-1:], whole[1], 1)
        else:
            kinds["plain"] += 1
            assert (prompt, target, prefix) == whole
    assert all(count >= 2 for count in kinds.values()), kinds
    # The same whatever the batch, and after a resumed training skipped the first batches.
    assert rows == rows_of(
        make_source(tokenized, max_duration=1000, bucketing_sampler=False, **shares).epoch(3)
    )
    rest = rows_of(make_source(tokenized, **shares).epoch(3, skip=2))
    assert 0 < len(rest) < len(rows) and all(rows[cut] == row for cut, row in rest.items())
    assert rows != rows_of(make_source(tokenized, **shares).epoch(4))
    # Validation continues prompts of the fixed ratio.
    fixed = make_source(tokenized, draw=False, infill_prob=1.0, drop_prompt_prob=1.0).epoch(3)
    for cut, (prompt, target, prefix) in rows_of(fixed).items():
        assert prefix == len(prompt) == prompt_length(len(codes[cut]), 0.4) and prompt + target == codes[cut]


@pytest.mark.parametrize("flag", ["infill_prob", "drop_prompt_prob"])
def test_shares_are_checked_and_are_flags_of_the_trainer(flag, capsys):
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match=f"--{flag.replace('_', '-')} is"):
            PromptTargetDataset(DataConfig(**{flag: share}), 4, 30, 7, draw=False)
    with pytest.raises(SystemExit):
        trainer_audiolm.main(["--help"])
    assert f"--{flag.replace('_', '-')}" in capsys.readouterr().out


def settled(*flags, yaml="", tmp_path=None):
    """The data configuration of a command line, over a recipe's YAML."""
    recipe = tmp_path / "recipe" / "conf"
    recipe.mkdir(parents=True, exist_ok=True)
    (recipe / "audiolm.yaml").write_text(yaml)
    return settle_prompt(parse("", [DataConfig], flags, recipe / "audiolm.yaml")[0])


def test_flags_that_contradict_each_other_are_refused(tmp_path):
    ways = {
        "--prompt-ratio-range": "0.2,0.6", "--prompt-seconds": "3", "--prompt-from-cut": "true",
    }  # fmt: skip
    for one, other in itertools.combinations(ways, 2):
        with pytest.raises(UserError, match=f"{one} and {other} both say how long prompts are"):
            settled(one, ways[one], other, ways[other], tmp_path=tmp_path)
    for way in ("--prompt-seconds", "--prompt-from-cut"):
        with pytest.raises(UserError, match=f"--prompt-ratio and {way} both"):
            settled("--prompt-ratio", "0.3", way, ways[way], tmp_path=tmp_path)
        settled(way, ways[way], tmp_path=tmp_path)
    # The range's middle is no contradiction: it is what validation keeps.
    assert settled("--prompt-ratio", "0.3", *("--prompt-ratio-range", "0.2,0.6"), tmp_path=tmp_path)
    with pytest.raises(UserError, match="--prompt-ratio-range and --prompt-seconds both"):
        settled(yaml="prompt_ratio_range: 0.1,0.4\nprompt_seconds: 3\n", tmp_path=tmp_path)
    with pytest.raises(UserError, match="--prompt-seconds and --prompt-from-cut both"):
        PromptTargetDataset(DataConfig(prompt_seconds=1.0, prompt_from_cut=True), 4, 30, 7, True, 50.0)


def test_the_users_way_wins_over_the_recipes(tmp_path):
    yaml = "prompt_ratio: 0.3\nprompt_ratio_range: 0.1,0.4\n"
    config = settled("--prompt-seconds", "3", yaml=yaml, tmp_path=tmp_path)
    assert config.prompt_seconds == 3 and config.prompt_ratio_range is None
    assert settled(yaml=yaml, tmp_path=tmp_path).prompt_ratio_range == "0.1,0.4"
    config = settled("--prompt-ratio-range", "0.2,0.3", yaml="prompt_seconds: 2\n", tmp_path=tmp_path)
    assert config.prompt_seconds is None and config.prompt_ratio_range == "0.2,0.3"


def make_marked(folder, draw=True, name="cuts_train", **options):
    data = DataConfig(**{"max_duration": 8, "num_buckets": 2, **options})
    dataset = PromptTargetDataset(data, 4, 30, 7, draw, 50.0)
    return CutBatches(folder / f"{name}.jsonl.gz", data, dataset, 7, training=draw)


def mark(folder, value):
    """Give each cut its mark: value(number, cut)."""
    path = folder / "cuts_train.jsonl.gz"
    cuts = list(read_manifest(path))
    for number, cut in enumerate(cuts):
        cut.custom["prompt_duration"] = value(number, cut)
    CutSet.from_cuts(cuts).to_file(str(path))
    return cuts


@pytest.mark.parametrize("draw", [True, False])
def test_prompts_of_fixed_seconds(tokenized, draw):
    codes = {cut.id: load_codes(cut).tolist() for cut in read_manifest(tokenized / "cuts_train.jsonl.gz")}
    for epoch in (1, 2):
        rows = rows_of(make_marked(tokenized, draw, prompt_seconds=0.5).epoch(epoch))
        assert len(rows) == 24
        for cut, (prompt, target, prefix) in rows.items():
            assert len(prompt) == prefix == 25 and prompt + target == codes[cut], "0.5 s at 50 Hz"


@pytest.mark.parametrize("draw", [True, False])
def test_prompts_where_each_cut_is_marked(tokenized, draw):
    cuts = mark(tokenized, lambda number, cut: 0.02 * (1 + number))
    for options in ({}, {"max_duration": 1000, "bucketing_sampler": False}):
        rows = rows_of(make_marked(tokenized, draw, prompt_from_cut=True, **options).epoch(3))
        assert len(rows) == 24
        for number, cut in enumerate(cuts):
            prompt, target, _ = rows[cut.id]
            assert len(prompt) == 1 + number and prompt + target == load_codes(cut).tolist()


def test_validation_is_fixed_and_training_is_drawn_by_cut_and_epoch(tokenized):
    fixed = [rows_of(make_source(tokenized, draw=False).epoch(epoch)) for epoch in (1, 2)]
    drawn = [rows_of(make_source(tokenized).epoch(epoch)) for epoch in (1, 2)]
    assert fixed[0] == fixed[1] and drawn[0] != drawn[1] != fixed[0]


def test_cuts_that_do_not_fit_their_prompt_are_named_before_training(tokenized):
    shortest = min(read_manifest(tokenized / "cuts_train.jsonl.gz"), key=lambda cut: cut.duration)
    with pytest.raises(UserError, match=r"cut 'train-.*--prompt-seconds is 1.5 s, 75 frames, but it has"):
        make_marked(tokenized, prompt_seconds=1.5)
    kept = rows_of(make_marked(tokenized, prompt_seconds=1.5, filter_min_duration=1.6).epoch(1))
    assert 0 < len(kept) < 24 and shortest.id not in kept
    with pytest.raises(UserError, match="cut 'train-000' has no custom field 'prompt_duration'"):
        make_marked(tokenized, prompt_from_cut=True)
    for value, message in (
        (0.0, "0 s, 0 frames"), (-1.0, "-1 s"), (9.0, "9 s, 450 frames"), (True, "True"),
        ("1", "'1', expected a number"),
    ):  # fmt: skip
        mark(tokenized, lambda number, cut, value=value: value if number == 5 else 0.5)
        with pytest.raises(UserError, match=f"cut 'train-005': its 'prompt_duration' is {message}"):
            make_marked(tokenized, prompt_from_cut=True)


def test_seconds_are_checked_and_need_a_frame_rate(tokenized):
    for seconds in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match="--prompt-seconds is"):
            PromptTargetDataset(DataConfig(prompt_seconds=seconds), 4, 30, 7, True, 50.0)
    for options, flag in (
        ({"prompt_seconds": 1.0}, "--prompt-seconds"),
        ({"prompt_from_cut": True}, "--prompt-from"),
    ):
        with pytest.raises(UserError, match=f"{flag}.* needs the codec's frame rate"):
            PromptTargetDataset(DataConfig(**options), 4, 30, 7, draw=True)


def test_a_checkpoints_rule_is_that_of_its_validation():
    assert PromptRule.of({}, None, fixed=True).frames(100, "a") == 40, "older checkpoints say nothing"
    saved = {"prompt_ratio": 0.25, "prompt_ratio_range": "0.5,0.6"}
    assert PromptRule.of(saved, None, fixed=True).frames(100, "a", epoch=3) == 25
    assert 50 <= PromptRule.of(saved, None).frames(100, "a", epoch=3) < 60
    assert PromptRule.of({"prompt_seconds": 0.5}, 50.0, fixed=True).frames(100, "a") == 25
    assert PromptRule.of({"prompt_from_cut": True}, 50.0, fixed=True).frames(100, "a", 0.3) == 15
    assert PromptRule.of({"prompt_seconds": 3.0}, 50.0).describe() == "3 s"
    assert PromptRule.of(saved, None, fixed=True).describe() == "25% of it"


def test_gaps_of_fixed_seconds_are_as_long_as_the_continuation(tokenized):
    plain = rows_of(make_marked(tokenized, prompt_seconds=0.5).epoch(1))
    filled = rows_of(make_marked(tokenized, prompt_seconds=0.5, infill_prob=1.0).epoch(1))
    assert all(len(filled[cut][1]) == len(plain[cut][1]) for cut in plain)
