"""egs/maestro on a corpus laid out as MAESTRO v3, with made-up performances; no network."""

import csv
import json
from collections import defaultdict

import numpy as np
import pytest
from lhotse import CutSet
from piano_corpus import onset_errors, performance, write_midi, write_recording

COLUMNS = [
    *(
        "canonical_composer",
        "canonical_title",
        "split",
        "year",
        "midi_filename",
        "audio_filename",
        "duration",
    ),
]
SPLITS = ["train", "train", "train", "validation", "test", "train"]


def rows():
    return [
        {
            "canonical_composer": "Alban Berg",
            "canonical_title": f"Sonata Op. {number // 2}",
            "split": split,
            "year": 2004 + number % 2,
            "midi_filename": f"{2004 + number % 2}/Disklavier_R{number}_ORIG.midi",
            "audio_filename": f"{2004 + number % 2}/Disklavier_R{number}_ORIG.wav",
            "duration": 20.0 + number,
        }
        for number, split in enumerate(SPLITS)
    ]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """maestro-v3.0.0 as the archive has it; the last recording is missing."""
    folder = tmp_path_factory.mktemp("maestro archive") / "maestro-v3.0.0"
    for number, row in enumerate(rows()):
        notes = performance(100 + number, 20.0 + number)
        write_midi(folder / row["midi_filename"], notes)
        if number < 5:
            write_recording(folder / row["audio_filename"], notes)
    with open(folder / "maestro-v3.0.0.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows())
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, corpus, tiny_codec, run_prepare):
    data_dir = tmp_path_factory.mktemp("maestro") / "my data"
    options = ("--corpus-dir", corpus.name, "--data-dir", data_dir, "--codec", tiny_codec)
    result = run_prepare("maestro", *options, cwd=corpus.parent)
    assert result.returncode == 0, result.stderr
    return data_dir, result


def all_cuts(data_dir, name="manifests/cuts_all.jsonl.gz"):
    return list(CutSet.from_file(data_dir / name))


def test_recordings_with_their_midi_in_the_corpus_splits(prepared, corpus):
    data_dir, result = prepared
    assert "5 of 6 recordings" in result.stdout
    found = defaultdict(set)
    for cut in all_cuts(data_dir):
        assert 5.0 <= cut.duration <= 15.0
        found[cut.custom["split"]].add(cut.custom["midi"])
        assert cut.custom["composer"] == "Alban Berg" and not cut.custom["rendered"]
    expected = defaultdict(set)
    for row in rows()[:5]:
        expected[row["split"]].add(str((corpus / row["midi_filename"]).resolve()))
    assert found == expected
    (skipped,) = map(json.loads, (data_dir / "manifests" / "skipped.jsonl").read_text().splitlines())
    assert skipped["reason"] == "no file '2005/Disklavier_R5_ORIG.wav'"


def test_audio_and_midi_of_a_cut_share_the_clock(prepared):
    data_dir, _ = prepared
    cuts = [cut for cut in all_cuts(data_dir) if cut.custom["kind"] == "utterance"]
    errors = np.concatenate([onset_errors(cut) for cut in cuts])
    assert len(errors) > 100
    assert np.mean(np.abs(errors) <= 0.03) > 0.97, np.percentile(errors, [1, 50, 99])


def test_codes_for_both_kinds_of_model(prepared):
    data_dir, result = prepared
    assert "checked: splits are disjoint" in result.stdout
    for kind in ("cuts", "utterances"):
        for split in ("train", "validation", "test"):
            for cut in all_cuts(data_dir, f"tokenized/{kind}_{split}.jsonl.gz"):
                codes = cut.load_audio_features()
                assert codes.dtype == np.uint16 and abs(codes.shape[0] - cut.duration * 50) <= 1


def test_run_twice_or_with_the_json_table_changes_nothing(
    prepared, corpus, tiny_codec, run_prepare, take_snapshot
):
    data_dir, _ = prepared
    before = take_snapshot(data_dir)
    table = corpus / "maestro-v3.0.0.csv"
    content = table.read_bytes()
    columns = {name: {str(n): row[name] for n, row in enumerate(rows())} for name in COLUMNS}
    try:
        for kind in ("csv", "json"):
            if kind == "json":
                (corpus / "maestro-v3.0.0.json").write_text(json.dumps(columns))
                table.unlink()
            # the folder above is found, too
            options = ("--corpus_dir", corpus.parent, "--data_dir", data_dir, "--codec", tiny_codec)
            result = run_prepare("maestro", *options)
            assert result.returncode == 0, result.stderr
            assert take_snapshot(data_dir) == before, kind
    finally:
        table.write_bytes(content)
        (corpus / "maestro-v3.0.0.json").unlink(missing_ok=True)


def test_compositions_stay_together_on_request(corpus, tmp_path, tiny_codec, run_prepare):
    options = ("--corpus-dir", corpus, "--data-dir", tmp_path, "--codec", tiny_codec, "--stop-stage", 1)
    result = run_prepare("maestro", *options, "--split-by", "composition")
    assert result.returncode == 0, result.stderr
    splits = defaultdict(set)
    for cut in all_cuts(tmp_path):
        splits[cut.custom["composition"]].add(cut.custom["split"])
    assert len(splits) == 3 and all(len(names) == 1 for names in splits.values())


def test_errors_are_one_line_that_says_what_to_do(tmp_path, corpus, tiny_codec, run_prepare):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "maestro-v3.0.0.csv").write_text("a,b\n1,2\n")
    (tmp_path / "midi only").mkdir()
    (tmp_path / "midi only" / "maestro-v3.0.0.csv").write_bytes((corpus / "maestro-v3.0.0.csv").read_bytes())
    for folder, words in (
        (None, "--corpus-dir is missing"),
        ("nowhere", "is not a folder; expected maestro-v3.0.0.zip (101 GB) from"),
        ("empty", "holds no maestro-v3.0.0.csv or .json"),
        ("other", "has no column canonical_composer"),
        ("midi only", "holds none of the 6 recordings of its table"),
    ):
        options = () if folder is None else ("--corpus-dir", tmp_path / folder)
        result = run_prepare("maestro", "--data-dir", tmp_path / "data", "--codec", tiny_codec, *options)
        assert result.returncode == 2, folder
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ") and words in last, result.stderr
        assert "Traceback" not in result.stderr
