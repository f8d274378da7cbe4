"""From cuts to batches."""

import numpy as np
import pytest
import torch
from lhotse import CutSet, Features
from synthetic import write_tokenized

from valle.config import DataConfig
from valle.data.dataset import CutBatches, PromptTargetDataset, describe_codes, load_codes
from valle.data.manifests import read_manifest
from valle.utils.errors import UserError


def batches(folder, **options):
    data = DataConfig(**{"max_duration": 8, "num_buckets": 2, **options})
    dataset = PromptTargetDataset(data, 4, 30, 7, draw=True)
    return CutBatches(folder / "cuts_train.jsonl.gz", data, dataset, 7, training=True)


def test_an_epoch_has_every_cut_once_and_is_repeatable(tokenized):
    source = batches(tokenized)
    first, again, other = (list(source.epoch(number)) for number in (1, 1, 2))
    ids = [cut for batch in first for cut in batch["ids"]]
    assert sorted(ids) == sorted(cut.id for cut in read_manifest(tokenized / "cuts_train.jsonl.gz"))
    assert [b["ids"] for b in first] == [b["ids"] for b in again] != [b["ids"] for b in other]
    for one, two in zip(first, again, strict=True):
        assert all(torch.equal(one[key], two[key]) for key in ("x", "x_lens", "y", "y_lens"))


def test_skipping_gives_the_rest_of_the_same_epoch(tokenized):
    source = batches(tokenized)
    whole = [batch["ids"] for batch in source.epoch(3)]
    for skip in (0, 1, len(whole) - 1, len(whole), len(whole) + 5):
        assert [batch["ids"] for batch in source.epoch(3, skip)] == whole[skip:]


def test_workers_do_not_change_the_batches(tokenized):
    alone, helped = (
        list(batches(tokenized, num_workers=n, prompt_ratio_range="0.2,0.6").epoch(2)) for n in (0, 2)
    )
    assert [b["ids"] for b in alone] == [b["ids"] for b in helped]
    assert all(torch.equal(a["y"], b["y"]) for a, b in zip(alone, helped, strict=True))


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
        assert sum(durations[cut] for cut in batch["ids"]) <= 8
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
