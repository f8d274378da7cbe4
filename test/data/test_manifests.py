"""Splits, windows and joins keep their promises; manifests are written once."""

import itertools
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from valle.data.manifests import (
    MAX_ID_BYTES,
    SPLITS,
    assign_splits,
    cut_windows,
    file_id,
    join_groups,
    make_cut,
    make_recording,
    make_supervision,
    normalize_text,
    read_manifest,
    split_manifest,
    split_of,
    write_audio,
    write_jsonl,
    write_manifests,
)
from valle.utils.errors import UserError

RATE = 1000  # Hz


def test_split_of_is_stable_and_about_80_10_10():
    assert [split_of(key) for key in ("a", "b", "c")] == [split_of(key) for key in ("a", "b", "c")]
    counts = Counter(split_of(f"key {number}") for number in range(5000))
    assert abs(counts["train"] / 5000 - 0.8) < 0.02
    assert abs(counts["validation"] / 5000 - 0.1) < 0.02


@pytest.mark.parametrize("number", [3, 4, 5, 9])
def test_assign_splits_leaves_none_empty(number):
    for trial in range(50):
        keys = [f"{trial}/{index}" for index in range(number)]
        assert set(assign_splits(keys).values()) == set(SPLITS)
        assert assign_splits(keys) == assign_splits(keys[::-1])


def test_normalize_text_ignores_case_punctuation_and_spaces():
    assert normalize_text("  Hello,  WORLD! ") == normalize_text("hello world") == "hello world"
    assert normalize_text("Прощай.") == "прощай"
    assert normalize_text("...") == ""


def test_cut_windows_cover_the_recording_within_the_limits():
    for seconds in np.arange(5.0, 120.0, 0.37):
        windows = cut_windows(round(seconds * RATE), RATE, 5.0, 15.0, key=f"{seconds}")
        assert windows[0].start == 0 and windows[-1].stop == round(seconds * RATE)
        assert all(left.stop == right.start for left, right in itertools.pairwise(windows))
        assert all(5 * RATE <= len(window) <= 15 * RATE for window in windows)
    lengths = [len(window) / RATE for window in cut_windows(2000 * RATE, RATE, 5.0, 15.0, key="long")]
    assert min(lengths) < 7 and max(lengths) > 13  # not all of one length


def test_cut_windows_of_what_is_too_short_and_of_narrow_limits():
    assert cut_windows(round(4.9 * RATE), RATE, 5.0, 15.0, key="x") == []
    # 9 s cannot be cut into pieces of 5 to 8 s: one piece, and the end is left out.
    for seconds in (9, 11, 23):
        windows = cut_windows(seconds * RATE, RATE, 5.0, 8.0, key="x")
        assert windows and all(5 * RATE <= len(window) <= 8 * RATE for window in windows)


def test_join_groups_use_every_clip_once_within_the_limits():
    for trial in range(200):
        draw = random.Random(trial)
        durations = [draw.uniform(0.3, 5.5) for _ in range(draw.randint(4, 60))]
        groups = join_groups(durations, 5.0, 15.0, 0.2, key=f"{trial}")
        assert [index for group in groups for index in group] == list(range(len(durations)))
        totals = [sum(durations[index] for index in group) + 0.2 * (len(group) - 1) for group in groups]
        if sum(durations) >= 5.0:
            assert min(totals) >= 5.0
            assert max(totals) <= 15.0
    totals = [len(group) for group in join_groups([1.0] * 500, 5.0, 15.0, 0.0, key="even")]
    assert min(totals) <= 6 and max(totals) >= 14


def test_join_groups_with_clips_that_are_too_long_or_too_few():
    assert join_groups([], 5.0, 15.0, 0.2, key="x") == []
    assert join_groups([1.0, 2.0], 5.0, 15.0, 0.2, key="x") == [[0, 1]]
    assert join_groups([40.0], 5.0, 15.0, 0.2, key="x") == [[0]]
    for durations in ([3.0, 13.0], [12.0, 30.0, 2.0], [14.0, 4.0]):
        groups = join_groups(durations, 5.0, 15.0, 0.2, key="x")
        for group in groups:
            seconds = sum(durations[index] for index in group) + 0.2 * (len(group) - 1)
            assert cut_windows(round(seconds * RATE), RATE, 5.0, 15.0, key="x")


def test_file_id_names_a_file():
    assert file_id("a b/c?d") == "a_b_c_d"
    assert file_id("été/Прощай") == "été_Прощай"
    assert file_id("../..") == "_"
    long = file_id("ü" * 400)
    assert len(long.encode()) <= MAX_ID_BYTES and long != file_id("ü" * 401)


def test_writing_the_same_again_changes_nothing(tmp_path):
    path, audio = tmp_path / "m.jsonl.gz", tmp_path / "a.flac"
    wav = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 800))
    stamps = []
    for _ in range(2):
        write_jsonl(path, [{"text": "é"}])
        write_audio(audio, wav, 8000)
        stamps.append(
            [(item.read_bytes(), item.stat().st_mtime_ns, item.stat().st_ino) for item in (path, audio)]
        )
    assert stamps[0] == stamps[1]
    write_audio(audio, 0.5 * wav, 8000)
    assert audio.read_bytes() != stamps[0][1][0]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.flac", "m.jsonl.gz"]


def test_split_manifest_divides_by_split_and_kind(tmp_path, write_corpus):
    cuts = write_corpus(tmp_path, ["train", "train", "validation", "test"])
    counts = split_manifest(tmp_path)
    assert counts == {
        "cuts_train.jsonl.gz": 2,
        "cuts_validation.jsonl.gz": 1,
        "cuts_test.jsonl.gz": 1,
        "utterances_train.jsonl.gz": 2,
        "utterances_validation.jsonl.gz": 1,
        "utterances_test.jsonl.gz": 1,
    }
    back = [cut.id for name in counts for cut in read_manifest(tmp_path / name)]
    assert sorted(back) == sorted(cut.id for cut in cuts)


def test_split_manifest_names_what_is_wrong(tmp_path, write_corpus):
    with pytest.raises(UserError, match="does not exist"):
        split_manifest(tmp_path)
    write_corpus(tmp_path, ["train", "validation"])
    with pytest.raises(UserError, match=r"no cut for cuts_test\.jsonl\.gz"):
        split_manifest(tmp_path)
    write_corpus(tmp_path, ["train", "validation", "dev"])
    with pytest.raises(UserError, match="'clip-2': split is 'dev'"):
        split_manifest(tmp_path)


def test_read_manifest_of_something_else(tmp_path):
    path = tmp_path / "cuts.jsonl.gz"
    path.write_text("no gzip")
    with pytest.raises(UserError, match="no manifest"):
        read_manifest(path)
    write_jsonl(tmp_path / "x.jsonl", [{"hello": 1}])
    with pytest.raises(UserError, match="no manifest"):
        read_manifest(tmp_path / "x.jsonl")


def test_write_manifests_refuses_an_id_twice(tmp_path):
    recording = make_recording("a", Path("a.flac"), (1, 8000), 8000)
    supervision = make_supervision(recording, None, None, None, "train")
    cut = make_cut(recording, supervision, "audio")
    with pytest.raises(UserError, match="cut id 'a' occurs twice"):
        write_manifests(tmp_path, "x", [recording], [supervision], [cut, cut])
