"""egs/folder on files of many kinds, whole and broken."""

import itertools
import json
import time
from collections import defaultdict

import av
import numpy as np
import pytest
import soundfile
from lhotse import CutSet

from valle.utils.audio import load_audio


def write_m4a(path, wav, sample_rate):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=sample_rate, layout="stereo" if len(wav) == 2 else "mono")
        layout = "stereo" if len(wav) == 2 else "mono"
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wav), format="fltp", layout=layout)
        frame.sample_rate = sample_rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


@pytest.fixture(scope="session")
def recordings(tmp_path_factory, make_speech):
    folder = tmp_path_factory.mktemp("my recordings")
    (folder / "talks one").mkdir()
    soundfile.write(folder / "long.wav", make_speech(70, 44100, 2, seed=1).T, 44100)
    soundfile.write(folder / "long.flac", make_speech(6, 8000, seed=2).T, 8000)  # an id that occurs twice
    soundfile.write(folder / "talks one" / "été.ogg", make_speech(31, 48000, 2, seed=3).T, 48000)
    soundfile.write(folder / "talks one" / "b.MP3", make_speech(9, 22050, seed=4).T, 22050, format="MP3")
    soundfile.write(folder / "surround.wav", make_speech(7, 11025, 6, seed=5).T, 11025)
    write_m4a(folder / "talks one" / "c.m4a", make_speech(12, 44100, 2, seed=6), 44100)
    for number in range(3):
        soundfile.write(
            folder / f"spoken-{number}.wav", make_speech(6 + number, 16000, seed=7 + number).T, 16000
        )
        (folder / f"spoken-{number}.txt").write_text("\ufeffHello  there\n" if number else "Good-bye")
    soundfile.write(folder / "word.wav", make_speech(1.5, 16000, seed=20).T, 16000)
    (folder / "word.txt").write_text("Word.")
    # What cannot be used:
    (folder / "text.wav").write_text("this is no sound")
    (folder / "empty.mp3").touch()
    with_nan = make_speech(8, 16000, seed=11)
    with_nan[0, 77] = np.nan
    soundfile.write(folder / "nan.wav", with_nan.T, 16000, subtype="FLOAT")
    soundfile.write(folder / "short.wav", make_speech(0.1, 16000).T, 16000)
    soundfile.write(folder / "silent.wav", np.zeros(160000), 16000)
    whole = (folder / "surround.wav").read_bytes()
    (folder / "torn.flac").write_bytes((folder / "long.flac").read_bytes()[:30])
    (folder / "copy.wav").write_bytes(whole)
    (folder / "gone.wav").symlink_to(folder / "not there.wav")
    (folder / ".hidden.wav").write_bytes(whole)
    (folder / "notes.txt").write_text("no audio")
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, recordings, tiny_codec, run_prepare):
    data_dir = tmp_path_factory.mktemp("folder") / "my data"
    options = ("--audio-dir", recordings.name, "--data-dir", data_dir, "--codec", tiny_codec)
    result = run_prepare("folder", *options, cwd=recordings.parent)
    assert result.returncode == 0, result.stderr
    return data_dir, result


def all_cuts(data_dir):
    return list(CutSet.from_file(data_dir / "manifests" / "cuts_all.jsonl.gz"))


def skipped_files(data_dir):
    lines = (data_dir / "manifests" / "skipped.jsonl").read_text().splitlines()
    return {item["path"]: item["reason"] for item in map(json.loads, lines)}


def test_every_kind_of_file_is_used(prepared):
    data_dir, _ = prepared
    assert {cut.custom["source"] for cut in all_cuts(data_dir)} == {
        *("long.wav", "long.flac", "talks one/été.ogg", "talks one/b.MP3", "talks one/c.m4a"),
        *("spoken-0.wav", "spoken-1.wav", "spoken-2.wav", "word.wav"),
        *({"surround.wav", "copy.wav"} - set(skipped_files(data_dir))),
    }
    for cut in all_cuts(data_dir):
        wav, sample_rate = load_audio(cut.recording.sources[0].source)
        assert (sample_rate, wav.shape) == (16000, (1, cut.num_samples))


def test_what_cannot_be_used_is_listed_with_the_reason(prepared):
    data_dir, result = prepared
    skipped = skipped_files(data_dir)
    assert set(skipped) == {
        *(
            "text.wav",
            "empty.mp3",
            "nan.wav",
            "short.wav",
            "silent.wav",
            "torn.flac",
            "gone.wav",
            "surround.wav",
        ),
    }
    for name, word in {
        "empty.mp3": "0 bytes",
        "nan.wav": "NaN",
        "short.wav": "0.10 s",
        "silent.wav": "silent",
    }.items():
        assert word in skipped[name]
    assert skipped["surround.wav"] == "same content as 'copy.wav'"
    assert "left out 8 of 18 files" in result.stderr


def test_pieces_last_5_to_15_seconds_and_cover_their_recording(prepared, make_speech):
    data_dir, _ = prepared
    pieces = sorted(
        (cut.custom["source_start"], cut.duration, cut.id)
        for cut in all_cuts(data_dir)
        if cut.custom["source"] == "long.wav"
    )
    assert all(5.0 <= duration <= 15.0 for _, duration, _ in pieces)
    for left, right in itertools.pairwise(pieces):
        assert left[0] + left[1] == pytest.approx(right[0])
    assert pieces[0][0] == 0 and pieces[-1][0] + pieces[-1][1] == pytest.approx(70, abs=0.01)
    wav = np.concatenate(
        [next(cut for cut in all_cuts(data_dir) if cut.id == name).load_audio() for *_, name in pieces],
        axis=1,
    )
    # The same sound as before: compare levels in tenths of a second.
    expected = make_speech(70, 44100, seed=1)
    levels = [
        np.sqrt(np.mean(array[0, : 700 * step].reshape(700, step) ** 2, axis=1))
        for array, step in ((wav, 1600), (expected, 4410))
    ]
    assert np.corrcoef(*levels)[0, 1] > 0.98


def test_splits_are_disjoint_by_recording_and_sentence(prepared):
    data_dir, result = prepared
    splits = defaultdict(set)
    for cut in all_cuts(data_dir):
        splits[cut.custom["source"]].add(cut.custom["split"])
    assert all(len(names) == 1 for names in splits.values())
    assert splits["spoken-1.wav"] == splits["spoken-2.wav"]  # "Hello there" twice
    for split in ("train", "validation", "test"):
        cuts = list(CutSet.from_file(data_dir / "tokenized" / f"cuts_{split}.jsonl.gz"))
        assert cuts and all(cut.custom["split"] == split and cut.has("audio_features") for cut in cuts)
    assert "checked: splits are disjoint" in result.stdout


def test_transcripts_become_supervisions(prepared):
    data_dir, _ = prepared
    texts = {
        cut.custom["source"]: cut.supervisions[0].text
        for cut in all_cuts(data_dir)
        if cut.custom["kind"] == "utterance"
    }
    assert texts == {
        "spoken-0.wav": "Good-bye",
        "spoken-1.wav": "Hello there",
        "spoken-2.wav": "Hello there",
        "word.wav": "Word.",
    }
    assert [cut.custom["kind"] for cut in all_cuts(data_dir) if cut.custom["source"] == "word.wav"] == [
        "utterance"
    ]


def test_run_twice_changes_nothing(prepared, recordings, tiny_codec, run_prepare, take_snapshot, tmp_path):
    data_dir, _ = prepared
    before = take_snapshot(data_dir)
    options = ("--audio_dir", recordings, "--data_dir", data_dir, "--codec", tiny_codec, "--stop_stage", 2)
    assert run_prepare("folder", *options, cwd=tmp_path).returncode == 0
    assert take_snapshot(data_dir) == before


def test_a_killed_stage_1_is_taken_up_again(
    prepared, recordings, tiny_codec, run_prepare, start_program, tmp_path
):
    data_dir = tmp_path / "data"
    options = ("--audio-dir", recordings, "--data-dir", data_dir, "--codec", tiny_codec)
    process = start_program("folder/local/prepare_manifests.py", *options)
    deadline = time.monotonic() + 60
    while len(list(data_dir.rglob("*.flac"))) < 2 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert run_prepare("folder", *options, "--stage", 1, "--stop-stage", 1).returncode == 0

    def described(folder):
        return [(cut.id, cut.duration, cut.custom, cut.load_audio().tobytes()) for cut in all_cuts(folder)]

    assert described(data_dir) == described(prepared[0])
    assert skipped_files(data_dir).keys() == skipped_files(prepared[0]).keys()


def test_changed_files_and_options_are_prepared_anew(
    recordings, tiny_codec, run_prepare, make_speech, tmp_path
):
    audio, data_dir = tmp_path / "audio", tmp_path / "data"
    audio.mkdir()
    for number in range(3):
        soundfile.write(audio / f"{number}.wav", make_speech(20, 16000, seed=number).T, 16000)
    options = ("--audio-dir", audio, "--data-dir", data_dir, "--codec", tiny_codec, "--stop-stage", 1)
    assert run_prepare("folder", *options).returncode == 0
    assert {cut.custom["split"] for cut in all_cuts(data_dir)} == {"train", "validation", "test"}
    soundfile.write(audio / "1.wav", make_speech(6, 16000, seed=9).T, 16000)
    assert run_prepare("folder", *options, "--max-duration", 12).returncode == 0
    cuts = all_cuts(data_dir)
    assert sum(cut.duration for cut in cuts if cut.custom["source"] == "1.wav") == 6
    assert max(cut.duration for cut in cuts) <= 12
    used = {cut.recording.sources[0].source for cut in cuts}
    assert {
        str(path.resolve()) for path in data_dir.rglob("*.flac")
    } == used  # nothing of the first run is left


def test_one_recording_is_split_by_time_with_a_gap(
    tiny_codec, run_prepare, make_speech, tmp_path, take_snapshot
):
    audio, data_dir = tmp_path / "audio", tmp_path / "audio" / "data"  # output inside the input folder
    audio.mkdir()
    soundfile.write(audio / "only.wav", make_speech(60, 16000).T, 16000)
    for number in range(2):  # files, but no recordings
        (audio / f"broken-{number}.wav").write_text("x")
    options = ("--audio-dir", audio, "--data-dir", data_dir, "--codec", tiny_codec)
    result = run_prepare("folder", *options)
    assert result.returncode == 0, result.stderr
    assert "split by time" in result.stderr
    spans = defaultdict(list)
    for cut in all_cuts(data_dir):
        spans[cut.custom["split"]].append(
            (cut.custom["source_start"], cut.custom["source_start"] + cut.duration)
        )
    assert set(spans) == {"train", "validation", "test"}
    for earlier, later in itertools.pairwise(("train", "validation", "test")):
        assert min(spans[later])[0] - max(spans[earlier])[1] >= 1.0 - 1e-6
    before = take_snapshot(data_dir)
    assert run_prepare("folder", *options, "--stop-stage", 1).returncode == 0
    assert take_snapshot(data_dir) == before


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("missing", [], "is not a folder"),
        ("empty", [], "holds no audio file"),
        ("broken", [], "none of the 2 files"),
        ("tiny", [], "too little for a train, validation and test split"),
        ("tiny", ["--min-duration", "9", "--max-duration", "3"], "expected 0 < minimum <= maximum"),
        ("tiny", ["--min-duration", "many"], "--min-duration"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    name, options, message, tiny_codec, run_prepare, make_speech, tmp_path
):
    audio = tmp_path / name
    if name != "missing":
        audio.mkdir()
    if name == "broken":
        (audio / "a.wav").touch()
        (audio / "b.mp3").write_text("no sound")
    if name == "tiny":
        soundfile.write(audio / "a.wav", make_speech(6, 8000).T, 8000)
    result = run_prepare(
        "folder", "--audio-dir", audio, "--data-dir", tmp_path / "data", "--codec", tiny_codec, *options
    )
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 2 and len(errors) == 1 and message in errors[0], result.stderr
    assert "Traceback" not in result.stderr


def test_audio_dir_is_required_and_help_lists_the_stages(run_prepare, tmp_path):
    result = run_prepare("folder", "--data-dir", tmp_path)
    assert result.returncode == 2 and "--audio-dir is missing" in result.stderr
    result = run_prepare("folder", "--help")
    assert result.returncode == 0 and "--audio-dir DIR" in result.stdout and "4  checks" in result.stdout
