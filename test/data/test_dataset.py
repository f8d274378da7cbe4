"""From cuts to batches."""

import itertools
import random

import numpy as np
import pytest
import torch
from lhotse import CutSet, Features
from synthetic import write_tokenized

from valle.config import DataConfig
from valle.data.dataset import CutBatches, PromptTargetDataset, describe_codes, load_codes
from valle.data.manifests import read_manifest
from valle.data.packed import PackedCodes
from valle.utils import distributed
from valle.utils.errors import UserError

DRAWN = {"prompt_ratio_range": "0.2,0.6", "infill_prob": 0.3, "drop_prompt_prob": 0.3}


def batches(folder, training=True, accumulate=1, **options):
    data = DataConfig(**{"max_duration": 8, "num_buckets": 2, **options})
    dataset = PromptTargetDataset(data, 4, 30, 7, draw=True)
    return CutBatches(folder / "cuts_train.jsonl.gz", data, dataset, 7, training, accumulate)


def same(one, two):
    """Two batches are bit-equal, in every key."""
    return one.keys() == two.keys() and all(
        torch.equal(value, two[key]) if isinstance(value, torch.Tensor) else value == two[key]
        for key, value in one.items()
    )


def padded_frames(batch):
    return len(batch["ids"]) * batch["num_frames"]


@pytest.fixture
def read(monkeypatch):
    """The cuts whose codes have been read, by number."""
    numbers, original = [], PackedCodes.__getitem__
    monkeypatch.setattr(
        PackedCodes, "__getitem__", lambda codes, number: numbers.append(number) or original(codes, number)
    )
    return numbers


def test_an_epoch_has_every_cut_once_and_is_repeatable(tokenized):
    source = batches(tokenized)
    first, again, other = (list(source.epoch(number)) for number in (1, 1, 2))
    ids = [cut for batch in first for cut in batch["ids"]]
    assert sorted(ids) == sorted(cut.id for cut in read_manifest(tokenized / "cuts_train.jsonl.gz"))
    assert [b["ids"] for b in first] == [b["ids"] for b in again] != [b["ids"] for b in other]
    for one, two in zip(first, again, strict=True):
        assert all(torch.equal(one[key], two[key]) for key in ("x", "x_lens", "y", "y_lens"))


def test_validation_goes_through_its_cuts_in_one_order(tokenized):
    source = batches(tokenized, training=False, drop_last=True, accumulate=50)
    first, second = (list(source.epoch(number)) for number in (0, 1))
    assert [batch["ids"] for batch in first] == [batch["ids"] for batch in second]
    assert sum(len(batch["ids"]) for batch in first) == 24, "all of them, whatever a training leaves out"


def test_skipping_gives_the_rest_of_the_same_epoch(tokenized):
    source = batches(tokenized)
    whole = [batch["ids"] for batch in source.epoch(3)]
    for skip in (0, 1, len(whole) - 1, len(whole), len(whole) + 5):
        assert [batch["ids"] for batch in source.epoch(3, skip)] == whole[skip:]


def test_skipping_reads_nothing_of_what_is_skipped(tokenized, read):
    source = batches(tokenized, **DRAWN)
    whole = list(source.epoch(3))
    read.clear()
    assert same(next(source.epoch(3, len(whole) - 1)), whole[-1])
    assert len(read) == len(whole[-1]["ids"])


def test_a_new_process_goes_on_with_the_same_batches(tokenized):
    """Training, validation and other epochs before it change nothing."""
    source = batches(tokenized, **DRAWN)
    went = list(source.epoch(1)) + list(source.epoch(2))
    fresh = batches(tokenized, **DRAWN)
    first = source.num_batches(1)
    assert same(fresh.largest(1), source.largest(1))
    resumed = list(fresh.epoch(1, 3)) + list(fresh.epoch(2))
    assert len(resumed) == len(went) - 3
    assert all(same(one, two) for one, two in zip(resumed, went[3:], strict=True))
    assert fresh.num_batches(1) == first == sum(1 for _ in fresh.epoch(1))


def test_two_epochs_at_once_do_not_mix(tokenized):
    source = batches(tokenized, **DRAWN)
    apart = [list(source.epoch(number)) for number in (1, 2)]
    together = itertools.zip_longest(source.epoch(1), source.epoch(2))
    for expected, found in zip(itertools.zip_longest(*apart), together, strict=True):
        assert all(one is two is None or same(one, two) for one, two in zip(expected, found, strict=True))


def test_workers_do_not_change_the_batches(tokenized):
    alone, helped = (list(batches(tokenized, num_workers=n, **DRAWN).epoch(2)) for n in (0, 2))
    assert len(alone) > 4
    assert all(same(one, two) for one, two in zip(alone, helped, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_do_not_draw_from_the_random_numbers_of_the_training(tokenized, workers):
    def state():
        return torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()

    source = batches(tokenized, num_workers=workers, **DRAWN)
    before = state()
    list(source.epoch(1))
    source.largest(1)
    assert state() == before


def test_ranks_share_the_cuts_and_the_one_that_is_short_gets_a_filler(tokenized, monkeypatch):
    cuts = sorted(cut.id for cut in read_manifest(tokenized / "cuts_train.jsonl.gz"))
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    for training in (True, False):
        ranks = []
        for rank in range(4):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            ranks.append(list(batches(tokenized, training, max_duration=5).epoch(1)))
        assert len({len(rank) for rank in ranks}) == 1
        every = [batch for rank in ranks for batch in rank]
        assert sorted(cut for b in every if not b["filler"] for cut in b["ids"]) == cuts
        fillers = [batch for batch in every if batch["filler"]]
        assert fillers and all(batch["y_lens"].min() > 0 for batch in fillers), "a batch that can be computed"


def test_two_ranks_train_on_what_one_accumulates(tokenized, monkeypatch):
    alone = list(batches(tokenized, accumulate=2, **DRAWN).epoch(1))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    ranks = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        ranks.append(list(batches(tokenized, **DRAWN).epoch(1)))
    shared = [batch for step in zip(*ranks, strict=True) for batch in step if not batch["filler"]]
    assert all(same(one, two) for one, two in zip(alone, shared, strict=True))


def test_the_largest_batch_is_found_without_reading_the_others(tokenized, read):
    source = batches(tokenized, prompt_ratio_range="0.2,0.6", infill_prob=0.3)
    every = list(source.epoch(4))
    read.clear()
    largest = source.largest(4)
    assert len(read) == len(largest["ids"])
    assert any(same(largest, batch) for batch in every)
    assert padded_frames(largest) == max(map(padded_frames, every))
    # As if the budget were another; this source's own stays.
    smaller = source.largest(4, max_duration=3.0)
    assert same(
        smaller, batches(tokenized, max_duration=3, prompt_ratio_range="0.2,0.6", infill_prob=0.3).largest(4)
    )
    assert padded_frames(smaller) < padded_frames(largest)
    assert same(source.largest(4), largest)
    assert len(source.largest(4, max_duration=1e6)["ids"]) == 24


def test_the_largest_batch_is_as_large_as_any_may_be_drawn(tokenized):
    """Rows whose prompt is dropped are short, which rows those are changes from epoch to epoch."""
    source = batches(tokenized, prompt_ratio_range="0.2,0.6", drop_prompt_prob=1.0)
    assert padded_frames(source.largest(2)) > max(map(padded_frames, source.epoch(2)))
    assert same(source.largest(2), batches(tokenized, prompt_ratio_range="0.2,0.6").largest(2))


def test_the_share_of_padding_is_counted(tokenized):
    source = batches(tokenized)
    every = list(source.epoch(2))
    used = sum(int((batch["x_lens"] + batch["y_lens"]).sum()) for batch in every)
    assert source.padding_share(2) == pytest.approx(1 - used / sum(map(padded_frames, every)))
    assert 0 < source.padding_share(2) < batches(tokenized, bucketing_sampler=False).padding_share(2)


def test_settings_that_leave_no_batch_are_named(tokenized):
    for options, message in (
        ({"max_duration": 0}, "--max-duration is 0"),
        ({"max_duration": float("nan")}, "--max-duration is nan"),
        ({"num_buckets": 0}, "--num-buckets is 0, expected 1 or more"),
        ({"num_workers": -1}, "--num-workers is -1"),
        ({"drop_last": True, "accumulate": 50}, "--drop-last leaves no batch"),
    ):
        with pytest.raises(UserError, match=message):
            batches(tokenized, **options)


def test_a_cut_of_one_frame_is_named_before_training(tokenized):
    manifest = tokenized / "cuts_train.jsonl.gz"
    cuts = list(read_manifest(manifest))
    path = tokenized / "codes" / f"{cuts[5].id}.npy"
    np.save(path, np.load(path)[:1])
    cuts[5].duration = 0.02
    CutSet.from_cuts(cuts).to_file(str(manifest))
    with pytest.raises(UserError, match=f"{cuts[5].id}': 1 frame cannot be split"):
        batches(tokenized)
    assert len(list(batches(tokenized, filter_min_duration=0.5).epoch(1))) > 1


def test_a_row_does_not_depend_on_its_batch(tokenized):
    """The drawn prompt of a cut is the same whatever it is batched with."""
    prompts = []
    for options in ({"max_duration": 4}, {"max_duration": 1000, "bucketing_sampler": False}):
        found = {}
        for batch in batches(tokenized, prompt_ratio_range="0.2,0.6", **options).epoch(5):
            for row, cut in enumerate(batch["ids"]):
                found[cut] = (int(batch["x_lens"][row]), batch["y"][row, : int(batch["y_lens"][row])])
        prompts.append(found)
    assert len(prompts[0]) == 24
    for cut, (length, target) in prompts[0].items():
        assert prompts[1][cut][0] == length and torch.equal(prompts[1][cut][1], target)


def test_batches_respect_duration_and_filters(tokenized):
    durations = {cut.id: cut.duration for cut in read_manifest(tokenized / "cuts_train.jsonl.gz")}
    seen = []
    for batch in batches(tokenized, filter_min_duration=1.2, filter_max_duration=1.8).epoch(1):
        assert max(durations[cut] for cut in batch["ids"]) * len(batch["ids"]) <= 8
        seen += batch["ids"]
    assert sorted(seen) == sorted(cut for cut, length in durations.items() if 1.2 <= length <= 1.8)


def test_codes_in_cut_features_are_read(tokenized, tmp_path):
    """Recipes in the manner of lifeiteng/vall-e keep the codes as features."""
    cut = next(iter(read_manifest(tokenized / "cuts_train.jsonl.gz")))
    codes = load_codes(cut)
    old = cut.drop_features()
    old.custom = None
    np.save(tmp_path / "old.npy", codes.astype(np.float32))
    old.features = Features(
        type="encodec", num_frames=len(codes), num_features=4, frame_shift=0.02, sampling_rate=16000, start=0.0,
        duration=cut.duration, storage_type="numpy_files", storage_path=str(tmp_path), storage_key="old.npy",
        recording_id=cut.recording_id, channels=0,
    )  # fmt: skip
    assert np.array_equal(load_codes(old, 4, 30), codes) and load_codes(old).dtype == np.int64


def test_bad_codes_are_named_with_their_cut(tokenized, tmp_path):
    cut = next(iter(read_manifest(tokenized / "cuts_train.jsonl.gz")))
    with pytest.raises(UserError, match=f"{cut.id}.*4 quantizers, but 8 are to be modelled"):
        load_codes(cut, 8)
    with pytest.raises(UserError, match=f"{cut.id}.*expected 0 to 4"):
        load_codes(cut, 4, 5)
    bare = cut.drop_features()
    bare.custom = None
    with pytest.raises(UserError, match=f"{cut.id}.*has no codes"):
        load_codes(bare)
    (tokenized / "codes" / f"{cut.id}.npy").write_bytes(b"junk")
    with pytest.raises(UserError, match=f"{cut.id}.*cannot be read"):
        load_codes(cut)


def test_manifests_without_codec_json_are_described_by_their_codes(tmp_path):
    folder = write_tokenized(tmp_path / "other", num_quantizers=3)
    (folder / "codec.json").unlink()
    info = describe_codes(folder, folder / "cuts_train.jsonl.gz")
    assert info == {"name": None, "num_quantizers": 3, "codebook_size": 2048}
    (folder / "codec.json").write_text("{}")
    with pytest.raises(UserError, match="does not describe a codec"):
        describe_codes(folder, folder / "cuts_train.jsonl.gz")


def test_a_missing_or_broken_manifest_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_manifest(tmp_path / "cuts_train.jsonl.gz")
    (tmp_path / "cuts_train.jsonl.gz").write_text("nonsense")
    with pytest.raises(UserError, match="no manifest"):
        read_manifest(tmp_path / "cuts_train.jsonl.gz")
    assert isinstance(CutSet.from_cuts([]), CutSet)
