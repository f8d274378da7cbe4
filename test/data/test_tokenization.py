"""Tokenization: right codes in the right place, resumable, the same bytes twice; statistics and checks of stage 4."""

import json

import numpy as np
import pytest
from lhotse import CutSet

from valle.bin import display_manifest_statistics, split_manifest, tokenizer
from valle.data.dataset import load_codes
from valle.data.manifests import read_manifest, write_cuts
from valle.data.statistics import check_disjoint, check_manifests, entropy
from valle.data.tokenization import tokenize_manifest
from valle.utils.errors import UserError

SPLITS = ["train", "train", "validation", "test"]


def snapshot(folder):
    """Every file with its content and time stamp."""
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def contents(folder):
    return {name: content for name, (content, _) in snapshot(folder).items()}


@pytest.fixture
def corpus(tmp_path, write_corpus):
    write_corpus(tmp_path / "manifests", SPLITS)
    return tmp_path / "manifests" / "cuts_all.jsonl.gz"


def test_cuts_carry_the_codes_that_the_codec_gives(tmp_path, corpus, codec):
    import torch

    result = tokenize_manifest(corpus, tmp_path / "out", codec)
    assert (result.encoded, result.reused, result.skipped) == (8, 0, 0)
    info = json.loads((tmp_path / "out" / "codec.json").read_text())
    assert info == codec.info()
    for cut in CutSet.from_file(tmp_path / "out" / "cuts_all.jsonl.gz"):
        codes = load_codes(cut)
        expected = codec.encode(torch.from_numpy(cut.load_audio())[None])[0].numpy()
        np.testing.assert_array_equal(codes, expected)
        assert codes.shape[0] == codec.num_frames(cut.num_samples)
        array = cut.audio_features
        assert array.array.storage_type == "numpy_files" and array.temporal_dim == 0
        assert array.frame_shift == codec.hop_length / codec.sample_rate
        assert cut.load_audio_features().dtype == np.uint16
    assert (tmp_path / "out" / "skipped.jsonl").read_text() == ""


def test_twice_changes_nothing_and_encodes_nothing(tmp_path, corpus, codec):
    tokenize_manifest(corpus, tmp_path / "out", codec)
    before, calls = snapshot(tmp_path / "out"), codec.calls
    result = tokenize_manifest(corpus, tmp_path / "out", codec)
    assert snapshot(tmp_path / "out") == before
    assert (result.encoded, result.reused, codec.calls) == (0, 8, calls)


def test_killed_half_way_and_run_again_equals_undisturbed(tmp_path, corpus, make_codec):
    class Killed(make_codec):
        def encode(self, wav):
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().encode(wav)

    tokenize_manifest(corpus, tmp_path / "whole", make_codec())
    with pytest.raises(KeyboardInterrupt):
        tokenize_manifest(corpus, tmp_path / "out", Killed())
    assert not (tmp_path / "out" / "cuts_all.jsonl.gz").exists()
    again = make_codec()
    assert tokenize_manifest(corpus, tmp_path / "out", again).reused == 3
    assert again.calls == 5
    whole, out = contents(tmp_path / "whole"), contents(tmp_path / "out")
    assert {name: out[name] for name in out if name.endswith(".npy")} == {
        name: whole[name] for name in whole if name.endswith(".npy")
    }
    assert set(whole) == set(out) and whole["codec.json"] == out["codec.json"]


def test_a_torn_file_is_made_again(tmp_path, corpus, codec):
    tokenize_manifest(corpus, tmp_path / "out", codec)
    before = contents(tmp_path / "out")
    torn, wrong, *_ = sorted((tmp_path / "out" / "codes").rglob("*.npy"))
    torn.write_bytes(torn.read_bytes()[:-7])
    np.save(wrong, np.zeros((5, 1), dtype=np.uint16))
    assert tokenize_manifest(corpus, tmp_path / "out", codec).encoded == 2
    assert contents(tmp_path / "out") == before


def test_a_changed_codec_or_recording_is_tokenized_anew(tmp_path, corpus, make_codec, caplog):
    tokenize_manifest(corpus, tmp_path / "out", make_codec())
    old = {path.name for path in (tmp_path / "out").rglob("*.npy")}
    caplog.set_level("INFO")
    result = tokenize_manifest(corpus, tmp_path / "out", make_codec(0.5))
    assert (result.encoded, result.reused) == (8, 0)
    assert sum("codec changed" in record.message for record in caplog.records) == 1
    new = {path.name for path in (tmp_path / "out").rglob("*.npy")}
    assert len(new) == 8 and not new & old  # nothing of the old codec is left
    (tmp_path / "manifests" / "audio" / "clip-0.flac").write_bytes(
        (tmp_path / "manifests" / "audio" / "clip-1.flac").read_bytes()
    )
    assert (
        tokenize_manifest(corpus, tmp_path / "out", make_codec(0.5)).encoded == 2
    )  # its audio and utterance cut


@pytest.mark.parametrize(("rate", "channels"), [(44100, 2), (16000, 1), (7999, 1)])
def test_other_rates_and_channels(tmp_path, write_corpus, codec, rate, channels):
    cuts = write_corpus(tmp_path / "manifests", SPLITS, rate, channels)
    tokenize_manifest(tmp_path / "manifests" / "cuts_all.jsonl.gz", tmp_path / "out", codec)
    for cut, tokens in zip(cuts, read_manifest(tmp_path / "out" / "cuts_all.jsonl.gz"), strict=True):
        frames = load_codes(tokens).shape[0]
        assert abs(frames - cut.duration * codec.frame_rate) <= 1


def test_unreadable_recordings_are_listed_and_do_not_stop(tmp_path, corpus, codec):
    (tmp_path / "manifests" / "audio" / "clip-0.flac").write_text("no sound")
    (tmp_path / "manifests" / "audio" / "clip-1.flac").unlink()
    assert tokenize_manifest(corpus, tmp_path / "out", codec).skipped == 4
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["clip-0", "clip-0-utterance", "clip-1", "clip-1-utterance"]
    assert "No such file" in lines[2]["reason"]
    with pytest.raises(UserError, match="--max-skipped is 3"):
        tokenize_manifest(corpus, tmp_path / "out", codec, max_skipped=3)
    for number in (2, 3):
        (tmp_path / "manifests" / "audio" / f"clip-{number}.flac").unlink()
    with pytest.raises(UserError, match="no cut could be tokenized"):
        tokenize_manifest(corpus, tmp_path / "other", codec)


@pytest.fixture
def tokenized_corpus(tmp_path, corpus, codec):
    tokenize_manifest(corpus, tmp_path / "out", codec)
    split_manifest.main(["--manifest-dir", str(tmp_path / "out")])
    return tmp_path / "out"


def test_statistics_are_printed(tokenized_corpus, capsys):
    display_manifest_statistics.main(["--manifest-dir", str(tokenized_corpus), "--check", "true"])
    printed = capsys.readouterr().out
    assert "cuts_train" in printed and "someone" in printed and "checked: splits are disjoint" in printed
    assert "/32" in printed  # codes used, of the codebook's size
    display_manifest_statistics.main(["--manifest", str(tokenized_corpus / "cuts_test.jsonl.gz")])
    assert "cuts_test" in capsys.readouterr().out


def test_entropy_of_a_uniform_and_of_a_constant_code():
    assert entropy(np.array([5, 5, 5, 5])) == pytest.approx(np.log(4))
    assert entropy(np.array([0, 7])) == 0.0


def rewrite_codes(folder, change):
    """Change the codes of the one test cut."""
    cut = next(iter(read_manifest(folder / "cuts_test.jsonl.gz")))
    path = next((folder / "codes" / "test").glob(cut.audio_features.array.storage_key))
    codes = change(np.load(path))
    np.save(path, codes)
    cut.audio_features.array.shape = list(codes.shape)
    write_cuts(folder / "cuts_test.jsonl.gz", [cut])
    return cut


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda codes: codes + 32, "expected 0 to 31"),
        (lambda codes: codes[:, :2], "2 quantizers, but codec 'level' has 3"),
        (lambda codes: codes[:-3], "frames, expected"),
    ],
)
def test_check_finds_wrong_codes(tokenized_corpus, change, message):
    cut = rewrite_codes(tokenized_corpus, change)
    with pytest.raises(UserError, match=message) as caught:
        check_manifests(tokenized_corpus)
    assert f"'{cut.id}'" in str(caught.value)


def test_check_finds_overlapping_splits(tokenized_corpus):
    train = list(read_manifest(tokenized_corpus / "cuts_train.jsonl.gz"))
    test = list(read_manifest(tokenized_corpus / "cuts_test.jsonl.gz"))
    with pytest.raises(UserError, match="splits overlap"):
        check_disjoint({"cuts_train": train, "cuts_test": [*test, train[0]]})
    renamed = train[0].with_id("other")
    with pytest.raises(UserError, match="share recording 'clip-0' at 0.00 s"):
        check_disjoint({"cuts_train": train, "cuts_test": [*test, renamed]})
    # The same sentence, spoken again.
    utterances = list(read_manifest(tokenized_corpus / "utterances_test.jsonl.gz"))
    utterances[0].supervisions[0].text = "Sentence 0!"
    spoken = {"utterances_train": list(read_manifest(tokenized_corpus / "utterances_train.jsonl.gz"))}
    with pytest.raises(UserError, match="share sentence 'sentence 0'"):
        check_disjoint({**spoken, "utterances_test": utterances})
    joined = train[0].with_id("joined")
    joined.recording.id, joined.custom["clips"] = "joined", ["clip-3"]
    with pytest.raises(UserError, match="share recording 'clip-3'"):
        check_disjoint({"cuts_train": [joined], "cuts_test": test})


def test_check_knows_stretches_of_one_recording(tokenized_corpus):
    train = next(iter(read_manifest(tokenized_corpus / "cuts_train.jsonl.gz")))
    test = next(iter(read_manifest(tokenized_corpus / "cuts_test.jsonl.gz")))
    train.custom.update(source="talk", source_start=0.0)
    test.custom.update(source="talk", source_start=train.duration + 1)
    check_disjoint({"cuts_train": [train], "cuts_test": [test]})
    test.custom.update(source_start=train.duration - 0.5)
    with pytest.raises(UserError, match="share recording 'talk'"):
        check_disjoint({"cuts_train": [train], "cuts_test": [test]})


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (tokenizer, ["--manifest", "nowhere.jsonl.gz"], "'nowhere.jsonl.gz' does not exist"),
        (split_manifest, ["--manifest-dir", "nowhere"], "does not exist"),
        (display_manifest_statistics, ["--manifest-dir", "nowhere"], "'nowhere' does not exist"),
        (display_manifest_statistics, ["--manifest", "nowhere.jsonl"], "'nowhere.jsonl' does not exist"),
        (display_manifest_statistics, ["--manifest-dir", "."], "cuts_train.jsonl.gz' does not exist"),
        (tokenizer, ["--wrong", "1"], "--wrong"),
    ],
)
def test_commands_name_what_is_missing(tmp_path, monkeypatch, command, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        command.main(arguments)


@pytest.mark.parametrize("command", [tokenizer, split_manifest, display_manifest_statistics])
def test_commands_have_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(["--help"])
    assert caught.value.code == 0
    assert "--manifest" in capsys.readouterr().out
