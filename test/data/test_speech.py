"""Utterances of a corpus to manifests: groups, repeated sentences, files that cannot be read."""

import json
from pathlib import Path

import numpy as np
import pytest
from lhotse import CutSet

from valle.data.manifests import make_recording, write_audio
from valle.data.speech import Utterance, group_utterances, read_with_lhotse, write_speech_manifests
from valle.utils.errors import UserError

RATE = 8000


def utterance(name, seconds, split="train", passage="p", text=None, folder=None):
    """With a file only where a folder is given."""
    path = (folder or Path("nowhere")) / f"{name}.flac"
    samples = round(seconds * RATE)
    if folder:
        write_audio(path, 0.1 * np.random.default_rng(len(name)).standard_normal((1, samples)), RATE)
    recording = make_recording(name, path, (1, samples), RATE)
    return Utterance(recording, f"text of {name}" if text is None else text, "s", "en", split, passage)


@pytest.mark.parametrize(
    ("seconds", "groups"),
    [
        ([5, 15, 7], [([0], 1), ([1], 1), ([2], 1)]),  # as they are
        ([2, 6, 7], [([0, 1], 1), ([2], 1)]),  # a short one takes the next along
        ([1, 1, 1, 1, 1, 6], [([0, 1, 2, 3, 4], 1), ([5], 1)]),
        ([7, 2], [([0, 1], 1)]),  # the last takes the one before
        ([4, 14], [([0, 1], 2)]),  # too long: in pieces
        ([40], [([0], 4)]),
        ([2, 1], []),
    ],
)
def test_groups(seconds, groups):
    skipped = []
    items = [utterance(f"u{number:02d}", value) for number, value in enumerate(seconds)]
    found = group_utterances(items[::-1], 5.0, 15.0, skipped)
    members = [[int(item.id[1:]) for item in group.members] for group in found]
    assert members == [indices for indices, _ in groups]
    for group, (indices, pieces) in zip(found, groups, strict=True):
        total = sum(seconds[index] for index in indices) + 0.2 * (len(indices) - 1)
        assert sum(map(len, group.windows)) == round(total * RATE)
        assert all(5 * RATE <= len(window) <= 15 * RATE for window in group.windows)
        assert len(group.windows) == pieces or pieces > 2
    left_out = set(range(len(seconds))) - {index for indices in members for index in indices}
    assert {int(item["id"][1:]) for item in skipped} == left_out


def test_passages_and_splits_are_not_mixed():
    items = [
        utterance("a1", 3, "train", "a"),
        utterance("a2", 3, "test", "a"),
        utterance("b1", 3, "train", "b"),
        utterance("a3", 3, "train", "a"),
    ]
    groups = group_utterances(items, 5.0, 15.0, skipped := [])
    assert [[item.id for item in group.members] for group in groups] == [["a1", "a3"]]
    assert {item["id"] for item in skipped} == {"a2", "b1"}


def write(folder, items):
    write_speech_manifests(folder, "mine", items, 5.0, 15.0)
    skipped = [json.loads(line) for line in (folder / "manifests" / "skipped.jsonl").open()]
    cuts = list(CutSet.from_file(folder / "manifests" / "cuts_all.jsonl.gz"))
    return cuts, {item["id"]: item["reason"] for item in skipped}


def test_a_repeated_sentence_stays_where_it_is_heard_last(tmp_path):
    sentences = [
        ("train", "Yes."),
        ("validation", "yes"),
        ("validation", "No!"),
        ("train", "no"),
        ("test", "YES"),
    ]
    items = [
        utterance(f"u{number}", 6, split, text=text, folder=tmp_path)
        for number, (split, text) in enumerate([*sentences, ("train", " … ")])
    ]
    cuts, skipped = write(tmp_path / "data", items)
    assert {cut.id for cut in cuts if cut.custom["kind"] == "utterance"} == {"u2", "u4"}
    assert {cut.id for cut in cuts if cut.custom["kind"] == "audio"} == {f"u{n}-audio" for n in range(6)}
    assert set(skipped) == {"u0", "u1", "u3", "u5"} and skipped["u5"] == "no text"
    assert "in test too" in skipped["u0"] and "in validation too" in skipped["u3"]


def test_a_file_that_cannot_be_read_costs_its_group_only(tmp_path):
    items = [
        utterance("a1", 3, folder=tmp_path),
        utterance("a2", 3, folder=tmp_path),
        utterance("b1", 3, passage="q", folder=tmp_path),
        utterance("b2", 3, passage="q", folder=tmp_path),
        utterance("c", 6, "validation", folder=tmp_path),
        utterance("d", 6, "test", folder=tmp_path),
    ]
    Path(items[0].recording.sources[0].source).write_bytes(b"no sound")
    cuts, skipped = write(tmp_path / "data", items)
    assert {cut.id for cut in cuts if cut.custom["kind"] == "audio"} == {
        "b1-2-joined-audio",
        "c-audio",
        "d-audio",
    }
    assert set(skipped) == {"a1", "a2"} and "a1.flac" in skipped["a2"]


def test_joined_files_are_made_anew_for_other_recordings_only(tmp_path):
    items = [utterance(name, 3, folder=tmp_path) for name in ("a1", "a2")]
    items += [utterance(split, 6, split, folder=tmp_path) for split in ("validation", "test")]

    def joined():
        write(tmp_path / "data", items)
        (path,) = (tmp_path / "data" / "joined").rglob("*.flac")
        return path, path.stat().st_mtime_ns, path.read_bytes()

    before = joined()
    assert joined() == before
    wav = np.zeros((1, 3 * RATE))
    write_audio(tmp_path / "a2.flac", wav, RATE)  # as long as the old one
    assert joined()[2] != before[2]


def test_every_split_must_be_there(tmp_path):
    with pytest.raises(UserError, match="mine: 1 utterances, but none for validation"):
        write(tmp_path, [utterance("a", 6, folder=tmp_path)])


def test_what_lhotse_cannot_read_is_one_line(tmp_path):
    def prepare():
        raise AssertionError("No such file: metadata.csv")

    with pytest.raises(UserError, match=r"cannot be read \(AssertionError: No such file: metadata.csv\)"):
        list(read_with_lhotse(prepare, tmp_path))
