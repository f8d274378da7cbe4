"""egs/atepp from a zip archive laid out as ATEPP's to codes, on made-up performances; no network."""

import csv
import gzip
import json
import shutil
import stat
import time
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from lhotse import CutSet
from piano_corpus import onset_errors, performance, write_midi, write_recording

from valle.data.midi import read_notes
from valle.data.rendering import make_renderer
from valle.utils.errors import UserError

COLUMNS = [
    *(
        "artist",
        "artist_id",
        "track",
        "track_duration",
        "composer",
        "composition_id",
        "score_path",
        "midi_path",
    ),
    *("youtube_links", "quality", "perf_id", "album", "album_date", "repetition", "split"),
]
SPLIT = {7: "validation", 8: "test", 9: "validation", 10: "test"}


def midi_path(number):
    return f"Johann_Écrit/Suite,_Op._{number // 2}:_Prélude/{number:05d}.mid"


def row(number, **changes):
    return {
        **dict.fromkeys(COLUMNS, ""),
        "artist": f"Pianist {number % 3}",
        "track": f"Suite: No. {number}",
        "composer": "Johann Écrit",
        "composition_id": str(number // 2),
        "midi_path": midi_path(number),
        "perf_id": f"{number:05d}",
        "split": SPLIT.get(number, "train"),
        **changes,
    }


def write_metadata(path, rows, columns=COLUMNS):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """ATEPP-1.2.zip, metadata.csv and a folder with recordings; numbers 1 to 10 are whole."""
    folder = tmp_path_factory.mktemp("my atepp")
    with zipfile.ZipFile(folder / "ATEPP-1.2.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(1, 15):
            write_midi(folder / "x.mid", performance(number, 62.0 if number == 12 else 20.0 + number))
            archive.write(folder / "x.mid", f"ATEPP-1.2/{midi_path(number)}")
        archive.writestr("__MACOSX/ATEPP-1.2/._00001.mid", b"junk")
        archive.writestr("ATEPP-1.2/.DS_Store", b"junk")
        archive.writestr(f"ATEPP-1.2/{midi_path(16)}", b"this is no MIDI file")
    audio = folder / "audio"
    for number in range(1, 15):
        notes = performance(number, 62.0 if number == 12 else 20.0 + number)
        if number == 11:
            write_recording(audio / "00011.wav", notes, delay=1.2)
        elif number == 12:
            write_recording(audio / "00012.wav", performance(999, 62.0))  # of another performance
        elif number == 13:
            write_recording(audio / "00013.wav", performance(13, 12.0))  # ends too early
        elif number % 2:
            write_recording(audio / Path(midi_path(number)).with_suffix(".flac"), notes)
        elif number != 14:
            write_recording(audio / f"{number:05d}.wav", notes)
    write_recording(audio / "00016.wav", performance(16))
    rows = [row(number) for number in range(1, 15)]
    rows[1]["quality"] = "high quality"
    # no performance, but in the metadata
    rows += [row(15), row(16)]
    rows += [row(4, perf_id="00104", quality="low quality"), row(6, perf_id="00106", quality="applause")]
    write_metadata(folder / "metadata.csv", rows)
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, corpus, tiny_codec, run_prepare):
    """All stages, from another folder, into a path with a space."""
    data_dir = tmp_path_factory.mktemp("atepp") / "my data"
    result = run_prepare(
        *(
            "atepp",
            "--data-dir",
            "my data",
            "--codec",
            tiny_codec,
            "--midi-archive",
            corpus / "ATEPP-1.2.zip",
        ),
        *("--metadata", corpus / "metadata.csv", "--audio-dir", corpus / "audio"),
        cwd=data_dir.parent,
    )
    assert result.returncode == 0, result.stderr
    return data_dir, result


def all_cuts(data_dir, name="manifests/cuts_all.jsonl.gz"):
    return list(CutSet.from_file(data_dir / name))


def skipped_pieces(data_dir):
    lines = (data_dir / "manifests" / "skipped.jsonl").read_text().splitlines()
    return {item["id"].removeprefix("atepp-"): item["reason"] for item in map(json.loads, lines)}


def performances(data_dir):
    return {int(cut.custom["performance"]) for cut in all_cuts(data_dir)}


def test_every_performance_with_its_recording_is_used_and_others_say_why_not(prepared):
    data_dir, result = prepared
    assert performances(data_dir) == set(range(1, 11))
    reasons = skipped_pieces(data_dir)
    assert set(reasons) == {"00011", "00012", "00013", "00014", "00015", "00016", "00104", "00106"}
    for name, words in {
        "00011": "s behind its MIDI; cut or pad its beginning",
        "00012": "another performance?",
        "00013": "but the last note of its MIDI begins at",
        "00014": "no recording",
        "00015": "no MIDI file",
        "00016": "no MIDI file that can be read",
        "00104": "quality: low quality",
        "00106": "quality: applause",
    }.items():
        assert words in reasons[name], reasons[name]
    assert "left out 8 pieces" in result.stderr


def test_each_segment_is_there_for_both_kinds_of_model(prepared):
    data_dir, _ = prepared
    segments = defaultdict(dict)
    for cut in all_cuts(data_dir):
        assert 5.0 <= cut.duration <= 15.0
        segments[cut.recording.id, cut.start, cut.duration][cut.custom["kind"]] = cut
    for kinds in segments.values():
        assert set(kinds) == {"audio", "utterance"}
        midi = {Path(cut.custom["midi"]) for cut in kinds.values()}
        assert len(midi) == 1 and midi.pop().is_absolute()
        assert kinds["audio"].supervisions[0].speaker.startswith("Pianist ")
    # The segments follow each other, up to the end of the music.
    for number in range(1, 11):
        mine = sorted(key for key in segments if key[0] == f"atepp-{number:05d}")
        assert mine[0][1] == 0.0
        for before, after in zip(mine, mine[1:], strict=False):
            assert after[1] == pytest.approx(before[1] + before[2], abs=1e-6)
        cut = next(iter(segments[mine[-1]].values()))
        assert cut.end >= read_notes(cut.custom["midi"]).onset[-1]


def test_audio_and_midi_of_a_cut_share_the_clock(prepared):
    data_dir, _ = prepared
    cuts = [cut for cut in all_cuts(data_dir) if cut.custom["kind"] == "utterance" and cut.start > 0]
    errors = np.concatenate([onset_errors(cut) for cut in cuts])
    assert len(errors) > 200
    assert np.mean(np.abs(errors) <= 0.03) > 0.97, np.percentile(errors, [1, 50, 99])


def test_the_metadata_splits(prepared):
    data_dir, result = prepared
    for cut in all_cuts(data_dir):
        assert cut.custom["split"] == SPLIT.get(int(cut.custom["performance"]), "train")
    assert "checked: splits are disjoint" in result.stdout


def test_codes_of_every_cut(prepared):
    data_dir, _ = prepared
    tokens = [
        cut
        for kind in ("cuts", "utterances")
        for split in ("train", "validation", "test")
        for cut in all_cuts(data_dir, f"tokenized/{kind}_{split}.jsonl.gz")
    ]
    assert sorted(cut.id for cut in tokens) == sorted(cut.id for cut in all_cuts(data_dir))
    for cut in tokens:
        codes = cut.load_audio_features()
        assert codes.dtype == np.uint16 and abs(codes.shape[0] - cut.duration * 50) <= 1


def test_run_twice_changes_nothing(prepared, corpus, tiny_codec, run_prepare, take_snapshot):
    data_dir, _ = prepared
    before = take_snapshot(data_dir)
    archive = ("--midi_archive", corpus / "ATEPP-1.2.zip", "--metadata", corpus / "metadata.csv")
    for download in (archive, ()):  # what was unpacked need not be given again
        result = run_prepare(
            *("atepp", "--data_dir", data_dir, "--codec", tiny_codec, "--audio-dir", corpus / "audio"),
            *download,
        )
        assert result.returncode == 0, result.stderr
        assert take_snapshot(data_dir) == before


def stage_1(run_prepare, tiny_codec, corpus, data_dir, *options, metadata=None):
    return run_prepare(
        *("atepp", "--data-dir", data_dir, "--codec", tiny_codec, "--stop-stage", 1),
        *("--midi-archive", corpus / "ATEPP-1.2.zip", "--metadata", metadata or corpus / "metadata.csv"),
        *("--audio-dir", corpus / "audio"),
        *options,
    )


def test_composition_splits_where_the_metadata_has_none_and_all_qualities(
    corpus, tmp_path, tiny_codec, run_prepare
):
    rows = [row(number, quality="low quality" if number < 4 else "") for number in range(1, 11)]
    write_metadata(tmp_path / "meta.csv", rows, [name for name in COLUMNS if name != "split"])
    data_dir = tmp_path / "data"
    result = stage_1(
        *(run_prepare, tiny_codec, corpus, data_dir, "--quality", "all"), metadata=tmp_path / "meta.csv"
    )
    assert result.returncode == 0, result.stderr
    assert performances(data_dir) == set(range(1, 11))
    splits = defaultdict(set)
    for cut in all_cuts(data_dir):
        splits[cut.custom["composition"]].add(cut.custom["split"])
    assert len(splits) == 6 and all(len(names) == 1 for names in splits.values())
    assert set.union(*splits.values()) == {"train", "validation", "test"}


def test_limit_takes_pieces_of_every_split_and_leaves_the_others_audio(
    prepared, corpus, tmp_path, tiny_codec, run_prepare
):
    whole, _ = prepared
    data_dir = tmp_path / "data"
    shutil.copytree(whole, data_dir)
    result = stage_1(run_prepare, tiny_codec, corpus, data_dir, "--limit", 4)
    assert result.returncode == 0, result.stderr
    assert len(performances(data_dir)) == 4
    assert {cut.custom["split"] for cut in all_cuts(data_dir)} == {"train", "validation", "test"}
    assert len(list((data_dir / "audio").glob("*.flac"))) == 10


def test_killed_in_stage_1_and_run_again_equals_undisturbed(
    prepared, corpus, tmp_path, tiny_codec, start_program, run_prepare, take_snapshot
):
    undisturbed, _ = prepared
    data_dir = tmp_path / "data"
    assert stage_1(run_prepare, tiny_codec, corpus, data_dir, "--stop-stage", 0).returncode == 0
    options = ("--data-dir", data_dir, "--codec", tiny_codec, "--audio-dir", corpus / "audio")
    process = start_program("atepp/local/prepare_manifests.py", *options)
    deadline = time.monotonic() + 60
    while len(list(data_dir.glob("audio/[!.]*.json"))) < 4 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()
    # whole files only: a name with a dot is one that the kill caught half written
    kept = {path: path.stat().st_mtime_ns for path in data_dir.glob("audio/[!.]*.json")}
    assert stage_1(run_prepare, tiny_codec, corpus, data_dir, "--stage", 1).returncode == 0
    assert kept and all(path.stat().st_mtime_ns == when for path, when in kept.items())
    expected, found = take_snapshot(undisturbed / "audio"), take_snapshot(data_dir / "audio")
    assert {n: f[0] for n, f in found.items() if n.endswith(".flac")} == {
        n: f[0] for n, f in expected.items() if n.endswith(".flac")
    }
    manifests = [
        gzip.decompress((root / "manifests" / "cuts_all.jsonl.gz").read_bytes()).replace(
            str(root.resolve()).encode(), b""
        )
        for root in (undisturbed, data_dir)
    ]
    assert manifests[0] == manifests[1]


def test_names_in_an_old_encoding_and_a_metadata_file_in_the_archive(corpus, tmp_path, run_prepare):
    """macOS writes UTF-8 names, letters apart, without saying so."""
    archive = tmp_path / "ATEPP-1.2.zip"
    write_midi(tmp_path / "x.mid", performance(1))
    with zipfile.ZipFile(archive, "w") as contents:
        contents.write(tmp_path / "x.mid", "ATEPP-1.2/Pre\u0301lude/00001.mid")
        contents.write(corpus / "metadata.csv", "ATEPP-1.2/ATEPP-metadata-1.2.csv")
    # clear the flag that says UTF-8, in the local headers and in the central directory
    data = bytearray(archive.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.find(signature)
        while at >= 0:
            data[at + offset + 1] &= ~0x08
            at = data.find(signature, at + 4)
    archive.write_bytes(bytes(data))
    result = run_prepare(
        "atepp", "--data-dir", tmp_path / "data", "--midi-archive", archive, "--stop-stage", 0
    )
    assert result.returncode == 0, result.stderr
    download = tmp_path / "data" / "download"
    assert [path.relative_to(download).as_posix() for path in download.rglob("*.mid")] == [
        "midi/ATEPP-1.2/Prélude/00001.mid"
    ]
    assert (download / "metadata.csv").read_bytes() == (corpus / "metadata.csv").read_bytes()


@pytest.mark.parametrize("kind", ["parent", "absolute", "link", "backslash"])
def test_an_archive_that_leads_elsewhere_is_not_unpacked(kind, tmp_path, run_prepare):
    archive = tmp_path / "bad.zip"
    with zipfile.ZipFile(archive, "w") as contents:
        contents.writestr("ATEPP-1.2/00001.mid", b"MThd")
        outside = tmp_path / "outside.mid"
        name = {
            "parent": "../../../outside.mid",
            "absolute": str(outside),
            "backslash": "..\\..\\..\\outside.mid",
            "link": "ATEPP-1.2/link.mid",
        }[kind]
        item = zipfile.ZipInfo(name)
        if kind == "link":
            item.create_system = 3
            item.external_attr = (stat.S_IFLNK | 0o777) << 16
        contents.writestr(item, str(outside))
    data_dir = tmp_path / "a" / "data"
    result = run_prepare("atepp", "--data-dir", data_dir, "--midi-archive", archive, "--stop-stage", 0)
    assert result.returncode == 2
    assert "would be written outside of the folder" in result.stderr and "Traceback" not in result.stderr
    assert not outside.exists() and not list(tmp_path.rglob("*.mid"))
    assert not (data_dir / "download" / "midi").exists()


def test_errors_are_one_line_that_says_what_to_do(corpus, tmp_path, tiny_codec, run_prepare, monkeypatch):
    broken = tmp_path / "torn.zip"
    broken.write_bytes((corpus / "ATEPP-1.2.zip").read_bytes()[:5000])
    monkeypatch.setitem(run_prepare.__globals__["ENVIRONMENT"], "HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(run_prepare.__globals__["ENVIRONMENT"], "HF_HOME", str(tmp_path / "no hub"))
    zip_and_csv = ("--midi-archive", corpus / "ATEPP-1.2.zip", "--metadata", corpus / "metadata.csv")
    for options, words in (
        ((), "--midi-archive is missing: the link to version 1.2"),
        (("--midi-archive", tmp_path / "nothing.zip"), "does not exist; the link to version 1.2"),
        (("--midi-archive", broken), "is no whole zip archive"),
        (("--midi-archive", corpus / "ATEPP-1.2.zip"), "--metadata is missing"),
        (
            (*zip_and_csv, "--audio-dir", corpus / "audio"),
            "train a codec on its own recordings: --train-codec true",
        ),
        (
            (*zip_and_csv, "--codec", tiny_codec, "--audio-dir", corpus / "audio", "--quality", "excellent"),
            "--quality 'excellent' keeps nothing; the labels are applause, high quality, low quality, unlabelled",
        ),
        (
            (*zip_and_csv, "--codec", tiny_codec, "--soundfont", corpus / "metadata.csv"),
            "is no SoundFont: expected an .sf2 or .sf3 file",
        ),
        (("--train-codec", "true", "--codec", tiny_codec), "leave out --codec"),
    ):
        result = run_prepare("atepp", "--data-dir", tmp_path / "data", "--stop-stage", 1, *options)
        assert result.returncode == 2, options
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ") and words in last, result.stderr
        assert "Traceback" not in result.stderr


@pytest.fixture(params=["fluidsynth", "tinysoundfont"])
def engine(request):
    try:
        make_renderer(engine=request.param)
    except UserError as error:
        pytest.skip(str(error))
    return request.param


def test_played_midi_shares_the_clock(engine, corpus, tmp_path, tiny_codec, run_prepare, take_snapshot):
    options = (
        "atepp",
        "--data-dir",
        tmp_path / "data",
        "--codec",
        tiny_codec,
        "--engine",
        engine,
        "--limit",
        3,
    )
    first = ("--midi-archive", corpus / "ATEPP-1.2.zip", "--metadata", corpus / "metadata.csv")
    result = run_prepare(*options, *first)
    assert result.returncode == 0, result.stderr
    cuts = [cut for cut in all_cuts(tmp_path / "data") if cut.custom["kind"] == "utterance"]
    assert all(cut.custom["rendered"] for cut in cuts)
    errors = np.concatenate([onset_errors(cut) for cut in cuts])
    assert len(errors) > 60
    assert np.mean(np.abs(errors) <= 0.03) > 0.9, np.percentile(errors, [5, 50, 95])
    before = take_snapshot(tmp_path / "data")
    assert run_prepare(*options).returncode == 0
    assert take_snapshot(tmp_path / "data") == before


@pytest.mark.slow
def test_the_recipes_own_codec(corpus, tmp_path, run_prepare, take_snapshot):
    data_dir = tmp_path / "data"
    options = ("atepp", "--data-dir", data_dir, "--audio-dir", corpus / "audio", "--train-codec", "true")
    result = run_prepare(
        *(*options, "--codec-minutes", 0.02),
        *("--midi-archive", corpus / "ATEPP-1.2.zip", "--metadata", corpus / "metadata.csv"),
    )
    assert result.returncode == 0, result.stderr
    assert (data_dir / "codec" / "config.json").is_file()
    info = json.loads((data_dir / "tokenized" / "codec.json").read_text())
    assert info["name"] == str(data_dir / "codec") and info["sample_rate"] == 16000
    used = {cut.recording.id for cut in all_cuts(data_dir, "manifests/cuts_codec.jsonl.gz")}
    splits = {cut.recording.id: cut.custom["split"] for cut in all_cuts(data_dir)}
    assert {splits[name] for name in used} == {"train", "validation"}
    before = take_snapshot(data_dir)
    assert run_prepare(*options).returncode == 0
    assert take_snapshot(data_dir) == before
