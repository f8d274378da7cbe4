"""egs/asterisk from archive to codes, on G.722 clips made on the spot, packed as the real archives are."""

import gzip
import json
import shutil
import subprocess
import tarfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import av
import numpy as np
import pytest
from lhotse import CutSet, RecordingSet, SupervisionSet

from valle.data.manifests import normalize_text
from valle.utils.audio import load_audio

RATE = 16000
SENTENCES = ["Goodbye.", "goodbye", "Please hold", "please  hold!", "Thank you.", "One"]


def write_g722(path: Path, wav: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="g722") as container:
        stream = container.add_stream("g722", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray((wav * 32767).astype(np.int16), format="s16", layout="mono")
        frame.sample_rate = RATE
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


@pytest.fixture(scope="session")
def sounds(tmp_path_factory, make_speech):
    """Flat as the release tarball: clips, folders of clips, core-sounds-en.txt."""
    folder = tmp_path_factory.mktemp("sounds")
    lines = ["\ufeff; Core Asterisk Sounds in English", ""]
    for number in range(60):
        name = f"digits/{number}" if number % 4 == 0 else f"clip-{number:02d}"
        write_g722(folder / f"{name}.g722", make_speech(0.5 + number % 7 * 0.7, RATE, seed=number))
        text = SENTENCES[number % 6] if number < 18 else f"Sentence number {number}."
        if number != 59:
            lines.append(f"{name}: {text}")
    write_g722(folder / "demo-long.g722", make_speech(33.0, RATE, seed=99))
    lines.append("demo-long: A very long story: it does not end")
    write_g722(folder / "beep.g722", make_speech(0.5, RATE))
    lines.append("beep: [a tone]")
    write_g722(folder / "silence" / "1.g722", np.zeros((1, RATE)))
    write_g722(folder / "faint.g722", 1e-4 * make_speech(1.0, RATE))
    (folder / "nothing.g722").touch()
    (folder / "core-sounds-en.txt").write_text("\n".join(lines) + "\n")
    return folder


def place_tarball(sounds, data_dir):
    packages = data_dir / "download" / "packages"
    packages.mkdir(parents=True)
    with tarfile.open(packages / "asterisk-core-sounds-en-g722-1.6.1.tar.gz", "w:gz") as tar:
        for path in sorted(sounds.iterdir()):
            tar.add(path, arcname=path.name)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, sounds, tiny_codec, run_prepare):
    """The recipe run from beginning to end, from another folder, into a path with a space."""
    data_dir = tmp_path_factory.mktemp("asterisk") / "my data"
    place_tarball(sounds, data_dir)
    result = run_prepare("asterisk", "--data-dir", "my data", "--codec", tiny_codec, cwd=data_dir.parent)
    assert result.returncode == 0, result.stderr
    return data_dir, result


def all_cuts(data_dir, name="manifests/cuts_all.jsonl.gz"):
    return list(CutSet.from_file(data_dir / name))


def test_every_clip_is_used_once(prepared):
    data_dir, _ = prepared
    clips = [cut.id for cut in all_cuts(data_dir) if cut.custom["kind"] == "utterance"]
    assert len(clips) == len(set(clips)) == 60
    joined = Counter(clip for cut in all_cuts(data_dir) for clip in cut.custom.get("clips", []))
    assert set(joined) == {*clips, "asterisk-en-clip-59"}  # which has no text: it is heard, not read
    in_pieces = {clip for clip, count in joined.items() if count > 1}
    assert "asterisk-en-demo-long" in in_pieces
    for cut in all_cuts(data_dir):  # only groups longer than 15 s are cut, and their pieces carry no text
        assert not (in_pieces & set(cut.custom.get("clips", [])) and cut.supervisions[0].text)
    skipped = [
        json.loads(line) for line in (data_dir / "manifests" / "skipped.jsonl").read_text().splitlines()
    ]
    reasons = {item["id"].split("/", 1)[1]: item["reason"] for item in skipped}
    assert set(reasons) == {"beep", "silence/1", "faint", "nothing", "asterisk-en-clip-59"}
    assert reasons["asterisk-en-clip-59"].startswith("no transcript")
    assert reasons["nothing"] == "empty" and "dBFS" in reasons["faint"]


def test_cuts_last_5_to_15_seconds_and_hold_their_clips(prepared):
    data_dir, _ = prepared
    cuts = [cut for cut in all_cuts(data_dir) if cut.custom["kind"] == "audio"]
    assert all(5.0 <= cut.duration <= 15.0 for cut in cuts)
    recordings = RecordingSet.from_file(data_dir / "manifests" / "asterisk_recordings.jsonl.gz")
    wavs = {recording.id: recording.load_audio() for recording in recordings}
    supervisions = SupervisionSet.from_file(data_dir / "manifests" / "asterisk_supervisions.jsonl.gz")
    texts = {supervision.recording_id: supervision.text for supervision in supervisions}
    whole = [cut for cut in cuts if cut.supervisions[0].text]
    assert whole
    for cut in whole:
        parts = [wavs[clip] for clip in cut.custom["clips"]]
        silence = np.zeros((1, int(0.2 * RATE)), dtype=np.float32)
        expected = np.concatenate([part for wav in parts for part in (silence, wav)][1:], axis=1)
        np.testing.assert_allclose(cut.load_audio(), expected, atol=1e-4)
        assert cut.supervisions[0].text == " ".join(texts[c] for c in cut.custom["clips"] if texts[c])
        assert cut.supervisions[0].speaker == cut.custom["speaker"] == "allison-smith"


def test_splits_are_disjoint_also_by_sentence(prepared):
    data_dir, result = prepared
    splits = defaultdict(set)
    for cut in all_cuts(data_dir):
        for clip in cut.custom.get("clips", [cut.id]):
            splits[clip].add(cut.custom["split"])
        text = cut.supervisions[0].text
        if cut.custom["kind"] == "utterance" and text:
            splits[normalize_text(text)].add(cut.custom["split"])
    assert all(len(names) == 1 for names in splits.values())
    assert {name for names in splits.values() for name in names} == {"train", "validation", "test"}
    assert "goodbye" in splits and "please hold" in splits
    assert "checked: splits are disjoint" in result.stdout


def test_manifests_name_recordings_and_supervisions(prepared):
    data_dir, _ = prepared
    recordings = RecordingSet.from_file(data_dir / "manifests" / "asterisk_recordings.jsonl.gz")
    supervisions = SupervisionSet.from_file(data_dir / "manifests" / "asterisk_supervisions.jsonl.gz")
    assert len(list(recordings)) == len(list(supervisions)) == 61
    for recording in recordings:
        wav, sample_rate = load_audio(recording.sources[0].source)
        assert (sample_rate, wav.shape) == (RATE, (1, recording.num_samples))
    assert {item.language for item in supervisions} == {"en"}
    assert {item.custom["split"] for item in supervisions} == {"train", "validation", "test"}


def test_codes_of_every_cut_and_split(prepared):
    data_dir, _ = prepared
    tokenized = data_dir / "tokenized"
    tokens = [
        cut
        for kind in ("cuts", "utterances")
        for split in ("train", "validation", "test")
        for cut in all_cuts(tokenized, f"{kind}_{split}.jsonl.gz")
    ]
    assert sorted(cut.id for cut in tokens) == sorted(cut.id for cut in all_cuts(data_dir))
    for cut in tokens:
        codes = cut.load_audio_features()
        assert codes.dtype == np.uint16 and codes.shape[1] == 4
        assert abs(codes.shape[0] - cut.duration * 50) <= 1


def test_utterances_have_symbols_of_their_text(prepared):
    """Phonemes, since the development environment has them."""
    data_dir, result = prepared
    assert "text symbols: phonemes of en-us" in result.stderr
    tokens = {
        cut.supervisions[0].text: cut.supervisions[0].custom["tokens"]["text"]
        for split in ("train", "validation", "test")
        for cut in all_cuts(data_dir / "tokenized", f"utterances_{split}.jsonl.gz")
    }
    assert [symbol for symbol in tokens["One"] if symbol not in "ˈˌ"] == ["w", "ʌ", "n"]
    assert len(tokens) > 40 and all(tokens) and all(tokens.values())


def test_several_languages_have_characters(prepared, tiny_codec, tmp_path, run_prepare):
    data_dir = tmp_path / "data"
    (data_dir / "tokenized").mkdir(parents=True)
    shutil.copy(prepared[0] / "tokenized" / "cuts_all.jsonl.gz", data_dir / "tokenized")
    options = ["--data-dir", data_dir, "--lang", "en,es", "--stage", 3, "--stop-stage", 3]
    result = run_prepare("asterisk", *options)
    assert result.returncode == 0, result.stderr
    cuts = all_cuts(data_dir / "tokenized", "utterances_train.jsonl.gz")
    found = {cut.supervisions[0].text: cut.supervisions[0].custom.get("tokens") for cut in cuts}
    text = next(text for text in found if text and text.startswith("Sentence number"))
    assert found[text] == {"text": ["_" if letter == " " else letter for letter in text.lower()]}
    refused = run_prepare("asterisk", *options, "--text-extractor", "phonemes")
    assert refused.returncode == 2 and "is for one language, --lang is 'en,es'" in refused.stderr


def test_run_twice_changes_nothing(prepared, tiny_codec, run_prepare, take_snapshot):
    data_dir, _ = prepared
    before = take_snapshot(data_dir)
    result = run_prepare("asterisk", "--data_dir", data_dir, "--codec", tiny_codec, "--stop_stage=4")
    assert result.returncode == 0, result.stderr
    assert take_snapshot(data_dir) == before


def test_killed_in_stage_1_and_run_again_equals_undisturbed(
    prepared, sounds, tmp_path, start_program, run_prepare, take_snapshot
):
    undisturbed, _ = prepared
    data_dir = tmp_path / "data"
    place_tarball(sounds, data_dir)
    assert run_prepare("asterisk", "--data-dir", data_dir, "--stop-stage", 0).returncode == 0
    process = start_program("asterisk/local/prepare_manifests.py", "--data-dir", data_dir)
    deadline = time.monotonic() + 60
    while len(list((data_dir / "audio").rglob("asterisk-*.flac"))) < 5 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert run_prepare("asterisk", "--data-dir", data_dir, "--stage", 1, "--stop-stage", 1).returncode == 0
    for folder in ("audio", "joined", "manifests"):
        expected, found = take_snapshot(undisturbed / folder), take_snapshot(data_dir / folder)
        found = {name: item for name, item in found.items() if not Path(name).name.startswith(".")}
        assert set(found) == set(expected)
        for name in expected:
            contents = []
            for root, (content, _) in ((undisturbed, expected[name]), (data_dir, found[name])):
                content = gzip.decompress(content) if name.endswith(".gz") else content
                contents.append(content.replace(str(root.resolve()).encode(), b""))
            assert contents[0] == contents[1], name


def test_debian_packages_give_the_same_manifests(prepared, sounds, tmp_path, run_prepare):
    if not shutil.which("dpkg-deb"):
        pytest.skip("needs dpkg-deb")
    packages = tmp_path / "data" / "download" / "packages"
    packages.mkdir(parents=True)
    for name in ("asterisk-core-sounds-en-g722", "asterisk-core-sounds-en"):
        root = tmp_path / name
        (root / "DEBIAN").mkdir(parents=True)
        (root / "DEBIAN" / "control").write_text(
            f"Package: {name}\nVersion: 1.6.1-1\nArchitecture: all\nMaintainer: nobody\nDescription: test\n"
        )
        if name.endswith("g722"):
            target = root / "usr" / "share" / "asterisk" / "sounds" / "en_US_f_Allison"
            shutil.copytree(sounds, target, ignore=shutil.ignore_patterns("*.txt"))
        else:
            target = root / "usr" / "share" / "doc" / name
            target.mkdir(parents=True)
            (target / "core-sounds-en.txt.gz").write_bytes(
                gzip.compress((sounds / "core-sounds-en.txt").read_bytes())
            )
        subprocess.run(
            ["dpkg-deb", "-b", str(root), str(packages / f"{name}_1.6.1-1_all.deb")],
            check=True,
            capture_output=True,
        )
    result = run_prepare("asterisk", "--data-dir", tmp_path / "data", "--stop-stage", 1)
    assert result.returncode == 0, result.stderr
    undisturbed, _ = prepared

    def described(data_dir):
        return [(cut.id, cut.duration, cut.custom, cut.supervisions[0].text) for cut in all_cuts(data_dir)]

    assert described(tmp_path / "data") == described(undisturbed)


def test_a_half_downloaded_archive_is_not_taken(sounds, tmp_path, run_prepare, monkeypatch):
    data_dir = tmp_path / "data"
    place_tarball(sounds, data_dir)
    archive = next((data_dir / "download" / "packages").iterdir())
    archive.write_bytes(archive.read_bytes()[:20000])
    # Neither network nor apt: nothing listens on the proxy's port, and there is no apt-get on the path.
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname", "basename", "date"):
        (tools / tool).symlink_to(shutil.which(tool))
    environment = {
        "PATH": str(tools),
        "https_proxy": "http://127.0.0.1:9",
        "HTTPS_PROXY": "http://127.0.0.1:9",
    }
    for name, value in environment.items():
        monkeypatch.setitem(run_prepare.__globals__["ENVIRONMENT"], name, value)
    result = run_prepare("asterisk", "--data-dir", data_dir, "--stop-stage", 0)
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: the recordings for 'en' could not be downloaded") and str(data_dir) in last
    assert "Traceback" not in result.stderr
    assert not (data_dir / "download" / "en").exists() and not archive.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lang", "xx"], "--lang is 'xx', expected a comma list of en, es, fr, it, ru"),
        (["--stage", "one"], "--stage is 'one', expected a number"),
        (["--speed", "3"], "unknown option '--speed'"),
        (["--lang"], "option '--lang' needs a value"),
        (["now"], "unexpected argument 'now'"),
        (["--stage", "1"], "run prepare.sh --stage 0 --lang en"),
        (["--stage", "3"], "does not exist"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(tmp_path, run_prepare, options, message):
    # Before the others: an option that lacks its value stands last.
    result = run_prepare("asterisk", "--data-dir", tmp_path / "none", *options)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 2 and len(errors) == 1 and message in errors[0]
    assert "Traceback" not in result.stderr


def test_help_lists_the_stages(run_prepare, tmp_path):
    result = run_prepare("asterisk", "--help", cwd=tmp_path)
    assert result.returncode == 0
    for word in ("--stop-stage", "--lang", "--codec", "0  download", "4  checks"):
        assert word in result.stdout


@pytest.mark.slow
def test_real_download(tmp_path, run_prepare):
    result = run_prepare("asterisk", "--data-dir", tmp_path, "--stop-stage", 1)
    if "could not be downloaded" in result.stderr:
        pytest.skip("no network")
    assert result.returncode == 0, result.stderr
    clips = [cut for cut in all_cuts(tmp_path) if cut.custom["kind"] == "utterance"]
    assert len(clips) == 551
