"""egs/ljspeech, egs/libritts and egs/aishell1 from the corpus as it is distributed to codes, with made-up sound."""

import itertools
import json
import re
import shutil
import tarfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, RecordingSet, SupervisionSet

from valle.data.manifests import normalize_text
from valle.utils.audio import load_audio

SPLITS = ("train", "validation", "test")
SECONDS = [1.5, 6.0, 7.0, 2.0, 2.5, 9.0, 4.0, 1.0]


class Corpus:
    """What one made-up corpus holds: texts and passages by utterance, sentences that are in two splits."""

    def __init__(self, options=(), repeated=()):
        self.options = list(options)
        self.repeated = set(repeated)
        self.texts, self.splits, self.durations, self.speakers = {}, {}, {}, {}

    def add(self, path, utterance, split, speaker, text, seconds, wav, rate):
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, wav.T, rate, subtype="PCM_16")
        self.texts[utterance], self.splits[utterance] = text, split
        self.durations[utterance], self.speakers[utterance] = seconds, speaker


def pack(archive, folder, mode):
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, mode) as tar:
        tar.add(folder, arcname=folder.name)


def make_ljspeech(root, data_dir, make_speech):
    """LJSpeech-1.1.tar.bz2 in the user's folder."""
    corpus = Corpus(["--corpus-dir", root / "mine"], repeated={"LJ001-0001"})
    folder, lines = root / "LJSpeech-1.1", []
    for chapter, split in (
        ("LJ001", "train"),
        ("LJ002", "train"),
        ("LJ049", "validation"),
        ("LJ050", "test"),
    ):
        for number, seconds in enumerate(SECONDS, start=1):
            clip = f"{chapter}-{number:04d}"
            text = f"Chapter {chapter[2:]}, page {number}."
            normalized = f"Chapter «{chapter}», page the {number}th."
            if clip in ("LJ001-0001", "LJ050-0001"):
                text = normalized = "The same sentence."
            lines.append(f"{clip}|{text}|{normalized}")
            wav = make_speech(seconds, 22050, seed=len(lines))
            corpus.add(
                folder / "wavs" / f"{clip}.wav", clip, split, "linda-johnson", normalized, seconds, wav, 22050
            )
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    (folder / "README").write_text("The LJ Speech Dataset\n")
    pack(root / "mine" / "LJSpeech-1.1.tar.bz2", folder, "w:bz2")
    shutil.rmtree(folder)
    return corpus


def make_libritts(root, data_dir, make_speech):
    """Unpacked in the user's folder, with one sentence of 33 s."""
    corpus = Corpus(
        ["--corpus-dir", root / "mine", "--text-extractor", "characters"],
        repeated={"103_1240_000000_000000", "84_121123_000000_000000"},
    )
    folder = root / "mine" / "LibriTTS"
    folder.mkdir(parents=True)
    (folder / "SPEAKERS.txt").write_text(
        "; ID|SEX| SUBSET |MINUTES| NAME\n103 | F | train-clean-100 | 25 | A\n"
    )
    places = [
        ("train-clean-100", 103, 1240, "train"),
        ("train-clean-100", 103, 1241, "train"),
        ("train-clean-100", 1034, 121119, "train"),
        ("dev-clean", 84, 121123, "validation"),
        ("test-clean", 121, 127105, "test"),
    ]
    for part, speaker, chapter, split in places:
        place, trans, book = folder / part / str(speaker) / str(chapter), [], []
        for number, seconds in enumerate([*SECONDS, 33.0] if chapter == 1241 else SECONDS):
            clip = f"{speaker}_{chapter}_{number:06d}_000000"
            text = f"Mr. {number} of {chapter}?"
            normalized = f"Mister {number} of {chapter}?"
            if number == 0 and chapter in (1240, 121123, 127105):
                text = normalized = "Yes."
            trans.append(f"{clip}\t{text}\t{normalized}")
            book.append(f"{clip}\t{text}\t{normalized}\t12.5")
            wav = make_speech(seconds, 24000, seed=number + chapter)
            corpus.add(
                place / f"{clip}.wav", clip, split, f"libritts-{speaker}", normalized, seconds, wav, 24000
            )
            (place / f"{clip}.normalized.txt").write_text(normalized)
            (place / f"{clip}.original.txt").write_text(text)
        (place / f"{speaker}_{chapter}.trans.tsv").write_text("\n".join(trans) + "\n")
        (place / f"{speaker}_{chapter}.book.tsv").write_text("\n".join(book) + "\n")
    return corpus


def make_aishell1(root, data_dir, make_speech):
    """data_aishell.tgz with an archive a speaker in it, put into DATA/download by hand."""
    corpus = Corpus(repeated={"BAC009S0002W0122"})
    folder, lines = root / "data_aishell", []
    for number, (part, speaker, split) in enumerate(
        [
            ("train", "S0002", "train"),
            ("train", "S0003", "train"),
            ("dev", "S0724", "validation"),
            ("test", "S0764", "test"),
        ]
    ):
        for index, seconds in enumerate(SECONDS):
            clip = f"BAC009{speaker}W{122 + index:04d}"
            words = ["而", "对", "楼市" * (number + 1), "成交" * (index + 1), "ｂ"]
            if clip in ("BAC009S0002W0122", "BAC009S0764W0122"):
                words = ["也", "成为"]
            lines.append(f"{clip} {' '.join(words)}")
            text = "".join(words).replace("ｂ", "B")
            path = root / part / speaker / f"{clip}.wav"
            corpus.add(
                path, clip, split, speaker, text, seconds, make_speech(seconds, 16000, seed=index), 16000
            )
        (folder / "wav").mkdir(parents=True, exist_ok=True)
        with tarfile.open(folder / "wav" / f"{speaker}.tar.gz", "w:gz") as tar:
            tar.add(root / part / speaker, arcname=f"{part}/{speaker}")
    (folder / "transcript").mkdir()
    (folder / "transcript" / "aishell_transcript_v0.8.txt").write_text("\n".join(lines) + "\n")
    pack(data_dir / "download" / "data_aishell.tgz", folder, "w:gz")
    return corpus


CORPORA = {"ljspeech": make_ljspeech, "libritts": make_libritts, "aishell1": make_aishell1}


@pytest.fixture(scope="module", params=CORPORA)
def prepared(request, tmp_path_factory, make_speech, tiny_codec, run_prepare):
    """A recipe run from beginning to end: its name, the corpus, its output, what it said."""
    root = tmp_path_factory.mktemp(request.param)
    data_dir = root / "my data"
    corpus = CORPORA[request.param](root, data_dir, make_speech)
    result = run_prepare(
        request.param, "--data-dir", "my data", "--codec", tiny_codec, *corpus.options, cwd=root
    )
    assert result.returncode == 0, result.stderr
    return request.param, corpus, data_dir, result


def read(data_dir, name="manifests/cuts_all.jsonl.gz"):
    return list(CutSet.from_file(data_dir / name))


def test_utterances_have_the_corpus_text_speaker_and_split(prepared):
    recipe, corpus, data_dir, _ = prepared
    found = {
        cut.id: (split, cut)
        for split in SPLITS
        for cut in read(data_dir / "tokenized", f"utterances_{split}.jsonl.gz")
    }
    assert set(found) == set(corpus.texts) - corpus.repeated
    for clip, (split, cut) in found.items():
        (supervision,) = cut.supervisions
        assert split == corpus.splits[clip] == cut.custom["split"]
        assert supervision.text == corpus.texts[clip]
        assert supervision.speaker == corpus.speakers[clip]
        assert supervision.language == ("zh" if recipe == "aishell1" else "en")
        assert supervision.custom["tokens"]["text"]
        assert cut.duration == pytest.approx(corpus.durations[clip], abs=1e-3)
        source = Path(cut.recording.sources[0].source)  # used where it lies
        assert source.suffix == ".wav" and not source.is_symlink()
        assert (data_dir / "joined").resolve() not in source.parents
    sentences = defaultdict(set)
    for split, cut in found.values():
        sentences[normalize_text(cut.supervisions[0].text)].add(split)
    assert all(len(splits) == 1 for splits in sentences.values())
    reasons = [json.loads(line) for line in (data_dir / "manifests" / "skipped.jsonl").open()]
    assert {
        item["id"] for item in reasons if "its sentence is in test too" in item["reason"]
    } == corpus.repeated


def test_audio_cuts_last_5_to_15_seconds_and_hold_each_clip_once(prepared):
    recipe, corpus, data_dir, _ = prepared
    cuts = [cut for cut in read(data_dir) if cut.custom["kind"] == "audio"]
    assert all(5.0 <= cut.duration <= 15.0 for cut in cuts)
    wavs = {
        recording.id: load_audio(recording.sources[0].source)[0]
        for recording in RecordingSet.from_file(data_dir / "manifests" / f"{recipe}_recordings.jsonl.gz")
    }
    used = defaultdict(float)  # seconds of each clip, or of the joined ones
    for cut in cuts:
        members = cut.custom.get("clips", [cut.recording.id])
        assert {corpus.splits[clip] for clip in members} == {cut.custom["split"]}
        assert len({(corpus.speakers[clip], re.split("[-_W]0", clip)[0]) for clip in members}) == 1
        assert cut.supervisions[0].speaker == corpus.speakers[members[0]]
        used[tuple(members)] += cut.duration
        rate = cut.sampling_rate
        silence = np.zeros((1, round(0.2 * rate)), dtype=np.float32)
        whole = np.concatenate([part for clip in members for part in (silence, wavs[clip])][1:], axis=1)
        start = round(cut.start * rate)
        np.testing.assert_allclose(cut.load_audio(), whole[:, start : start + cut.num_samples], atol=1e-4)
        if cut.duration == cut.recording.duration:
            assert cut.supervisions[0].text == " ".join(corpus.texts[clip] for clip in members)
        else:
            assert cut.supervisions[0].text is None
    assert sorted(itertools.chain(*used)) == sorted(corpus.texts)
    for members, seconds in used.items():
        assert seconds == pytest.approx(
            sum(corpus.durations[clip] for clip in members) + 0.2 * (len(members) - 1)
        )
    assert any(len(members) > 1 for members in used) and any(len(members) == 1 for members in used)
    assert any(seconds > 15 for seconds in used.values()) == (recipe == "libritts")


def test_speakers_are_in_one_split(prepared):
    recipe, _, data_dir, result = prepared
    splits = defaultdict(set)
    for item in SupervisionSet.from_file(data_dir / "manifests" / f"{recipe}_supervisions.jsonl.gz"):
        splits[item.speaker].add(item.custom["split"])
    if recipe == "ljspeech":
        assert set(splits) == {"linda-johnson"}
    else:
        assert len(splits) == 4 and all(len(names) == 1 for names in splits.values())
    assert "checked: splits are disjoint" in result.stdout


def test_hours_and_codes(prepared):
    _, corpus, data_dir, result = prepared
    tokenized = data_dir / "tokenized"
    for split in SPLITS:
        expected = sum(
            seconds
            for clip, seconds in corpus.durations.items()
            if corpus.splits[clip] == split and clip not in corpus.repeated
        )
        cuts = read(tokenized, f"utterances_{split}.jsonl.gz")
        assert sum(cut.duration for cut in cuts) == pytest.approx(expected, abs=0.01)
        assert f"{len(cuts)} utterances, {expected / 3600:.2f} h" in result.stderr
        for cut in [*cuts, *read(tokenized, f"cuts_{split}.jsonl.gz")]:
            codes = cut.load_audio_features()
            assert codes.dtype == np.uint16 and codes.shape[1] == 4
            assert abs(codes.shape[0] - cut.duration * 50) <= 1
    table = (tokenized / "unique_text_tokens.k2symbols").read_text()
    assert table.startswith("<eps> 0\n")


def test_run_twice_changes_nothing(prepared, tiny_codec, run_prepare, take_snapshot):
    recipe, corpus, data_dir, _ = prepared
    before = take_snapshot(data_dir)
    result = run_prepare(recipe, "--data_dir", data_dir, f"--codec={tiny_codec}", *corpus.options)
    assert result.returncode == 0, result.stderr
    assert take_snapshot(data_dir) == before


def test_other_limits_leave_no_stale_files(prepared, tmp_path, run_prepare):
    recipe, corpus, data_dir, _ = prepared
    if recipe != "ljspeech":
        pytest.skip("the same code")
    other = tmp_path / "data"
    other.mkdir()
    shutil.copytree(data_dir / "download", other / "download", symlinks=True)
    limits = ["--min-duration", "7", "--max-duration", "14", "--stage", "1", "--stop-stage", "1"]
    shutil.copytree(data_dir / "joined", other / "joined")
    assert run_prepare(recipe, "--data-dir", other, *limits).returncode == 0
    cuts = [cut for cut in read(other) if cut.custom["kind"] == "audio"]
    assert all(7 <= cut.duration <= 14 for cut in cuts)
    used = {cut.recording.sources[0].source for cut in cuts}
    assert {str(path.resolve()) for path in (other / "joined").rglob("*.flac")} <= used


@pytest.mark.parametrize("recipe", CORPORA)
def test_no_network_says_what_to_do(recipe, tmp_path, run_prepare, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):  # nothing listens there
        monkeypatch.setitem(run_prepare.__globals__["ENVIRONMENT"], name, "http://127.0.0.1:9")
    data_dir = tmp_path / "data"
    result = run_prepare(recipe, "--data-dir", data_dir, "--stop-stage", 0)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2 and last.startswith("error: ") and "Traceback" not in result.stderr
    assert "http://" in last and f"'{data_dir}/download'" in last and "--corpus-dir" in last
    result = run_prepare(recipe, "--data-dir", data_dir, "--stop-stage", 0, "--corpus-dir", tmp_path)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2 and f"--corpus-dir '{tmp_path}' holds neither" in last


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("libritts", ["--parts", "train-clean-100,dev-tidy"], "'dev-tidy' is no part of LibriTTS"),
        ("libritts", ["--parts", "train-clean-100,dev-clean"], "none for test; add one of test-clean"),
        ("ljspeech", ["--stage", "1"], "run prepare.sh --stage 0"),
        ("aishell1", ["--text-extractor", "runes"], "runes"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(recipe, options, message, tmp_path, run_prepare):
    result = run_prepare(recipe, "--data-dir", tmp_path, *options)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2 and message in last and "Traceback" not in result.stderr


@pytest.mark.parametrize("recipe", CORPORA)
def test_help_lists_the_stages(recipe, run_prepare):
    result = run_prepare(recipe, "--help")
    assert result.returncode == 0 and "--corpus-dir DIR" in result.stdout and "4  checks" in result.stdout
