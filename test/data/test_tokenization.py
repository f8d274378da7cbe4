"""Tokenization: right codes in the right place, resumable, the same bytes twice; statistics and checks of stage 4."""

import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet
from synthetic import save_tiny_codec

from valle.bin import display_manifest_statistics, split_manifest, tokenizer
from valle.data import shards, tokenization
from valle.data.checks import check_disjoint, check_manifests
from valle.data.dataset import load_codes
from valle.data.manifests import read_manifest, write_cuts
from valle.data.shar import write_shar
from valle.data.shards import plan_windows
from valle.data.statistics import entropy
from valle.data.tokenization import merge_shards, tokenize_manifest, tokenize_shard
from valle.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
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


def same_outcome(one, other):
    """Equal files; of manifests, which name their folder, equal but for that."""
    first, second = contents(one), contents(other)
    assert set(first) == set(second)
    for name, content in first.items():
        if name == "cuts_all.jsonl.gz":
            lines = [gzip.decompress(files[name]).decode() for files in (first, second)]
            assert lines[0].replace(str(one.resolve()), "") == lines[1].replace(str(other.resolve()), "")
        else:
            assert content == second[name], name


def test_interrupted_and_run_again_equals_undisturbed(tmp_path, corpus, make_codec):
    class Interrupted(make_codec):
        def encode(self, wav):
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().encode(wav)

    tokenize_manifest(corpus, tmp_path / "whole", make_codec(), batch_duration=1.0)
    with pytest.raises(KeyboardInterrupt):
        tokenize_manifest(corpus, tmp_path / "out", Interrupted(), batch_duration=1.0)
    assert not (tmp_path / "out" / "cuts_all.jsonl.gz").exists()
    again = make_codec()
    assert tokenize_manifest(corpus, tmp_path / "out", again, batch_duration=1.0).reused == 3
    assert again.calls == 5
    same_outcome(tmp_path / "whole", tmp_path / "out")


def run_until_killed(work, renames, after):
    """Run `work` in a process that kills itself (SIGKILL) at its `renames`-th rename, before or after it is done."""
    child = os.fork()
    if child == 0:
        import torch

        torch.set_num_threads(1)
        replace, count = os.replace, iter(range(1, 1 << 30))

        def counted(source, target):
            last = next(count) == renames
            if last and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = counted
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("seed", range(4))
def test_killed_five_times_equals_undisturbed(tmp_path, write_corpus, make_codec, seed):
    write_corpus(tmp_path / "manifests", SPLITS * 2)
    (tmp_path / "manifests" / "audio" / "clip-2.flac").write_text("no sound")
    manifest = tmp_path / "manifests" / "cuts_all.jsonl.gz"

    def tokenize(folder="out"):
        tokenize_manifest(manifest, tmp_path / folder, make_codec(), batch_duration=5.0)

    tokenize("whole")
    draw = random.Random(seed)
    # The last of the five is killed in between writing the manifests.
    kills = [run_until_killed(tokenize, draw.randint(1, 3), draw.random() < 0.5) for _ in range(4)]
    assert all(kills)
    left = 14 - len(list((tmp_path / "out" / "codes").glob("*/clip*.npy")))
    assert left > 0
    assert run_until_killed(tokenize, left + 3, draw.random() < 0.5)
    tokenize()
    same_outcome(tmp_path / "whole", tmp_path / "out")


@pytest.mark.slow
def test_command_killed_at_random_times(tmp_path, write_corpus):
    """Five SIGKILLs at random times, then one run to the end; and two ranks of torchrun."""
    write_corpus(tmp_path / "manifests", SPLITS * 40, sample_rate=16000)
    folder = save_tiny_codec(tmp_path / "codec")
    options = [
        "--manifest",
        tmp_path / "manifests" / "cuts_all.jsonl.gz",
        "--codec",
        folder,
        "--device",
        "cpu",
    ]
    options = [*map(str, options), "--batch-duration", "10"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def start(out, *launcher):
        command = [*(launcher or [sys.executable]), "-m", "valle.bin.tokenizer"]
        return subprocess.Popen([*command, *options, "--output-dir", str(tmp_path / out)], env=environment)

    started = time.monotonic()
    assert start("whole").wait() == 0
    whole_time = time.monotonic() - started
    draw = random.Random(0)
    for _ in range(5):
        process = start("out")
        time.sleep(draw.uniform(0.6, 1.0) * whole_time)
        process.kill()
        process.wait()
    assert start("out").wait() == 0
    same_outcome(tmp_path / "whole", tmp_path / "out")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert start("ranks", *torchrun).wait() == 0
    same_outcome(tmp_path / "whole", tmp_path / "ranks")


@pytest.mark.parametrize("num_shards", [2, 5])
def test_shards_give_what_one_run_gives(tmp_path, write_corpus, make_codec, num_shards):
    write_corpus(tmp_path / "manifests", SPLITS * 2)
    (tmp_path / "manifests" / "audio" / "clip-2.flac").write_text("no sound")
    manifest = tmp_path / "manifests" / "cuts_all.jsonl.gz"
    tokenize_manifest(manifest, tmp_path / "whole", make_codec(), batch_duration=5.0)
    results = []
    for shard in reversed(range(num_shards)):
        out = tmp_path / "out"
        assert merge_shards(manifest, out, make_codec(), num_shards, batch_duration=5.0) is None
        assert not (out / "cuts_all.jsonl.gz").exists()
        results.append(tokenize_shard(manifest, out, make_codec(), shard, num_shards, batch_duration=5.0))
    assert merge_shards(manifest, out, make_codec(), num_shards, batch_duration=5.0) == 2
    same_outcome(tmp_path / "whole", tmp_path / "out")
    assert sum(result.encoded for result in results) == 14
    assert all(0 < result.encoded < 14 for result in results)


def test_command_with_shards(tmp_path, write_corpus):
    write_corpus(tmp_path / "manifests", SPLITS, sample_rate=16000)
    options = ["--manifest", str(tmp_path / "manifests" / "cuts_all.jsonl.gz"), "--device", "cpu"]
    options += ["--codec", str(save_tiny_codec(tmp_path / "codec")), "--batch-duration", "5"]
    tokenizer.main([*options, "--output-dir", str(tmp_path / "whole")])
    for shard in ("1", "0"):
        assert not (tmp_path / "out" / "cuts_all.jsonl.gz").exists()
        shards = ["--num-shards", "2", "--shard", shard]
        tokenizer.main([*options, "--output-dir", str(tmp_path / "out"), *shards])
    same_outcome(tmp_path / "whole", tmp_path / "out")
    for wrong in (
        ["--shard", "0"],
        ["--num-shards", "2"],
        ["--num-shards", "2", "--shard", "2"],
        ["--readers", "0"],
    ):
        with pytest.raises(UserError, match=r"--shard|--readers"):
            tokenizer.main([*options, "--output-dir", str(tmp_path / "out"), *wrong])


def test_notes_of_another_run_are_not_used(tmp_path, corpus, make_codec):
    """A shard's notes hold for one manifest, codec and number of shards."""
    out = tmp_path / "out"
    tokenize_shard(corpus, out, make_codec(), 0, 2)
    tokenize_shard(corpus, out, make_codec(0.5), 1, 2)
    assert merge_shards(corpus, out, make_codec(), 2) is None
    assert merge_shards(corpus, out, make_codec(0.5), 2) is None
    cuts = list(read_manifest(corpus))
    tokenize_shard(corpus, out, make_codec(), 1, 2)
    write_cuts(corpus, cuts[::-1])
    assert merge_shards(corpus, out, make_codec(), 2) is None


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


def test_whatever_is_wrong_with_one_cut_is_said_and_does_not_stop(tmp_path, write_corpus, make_codec):
    cuts = write_corpus(tmp_path / "manifests", ["train"] * 8)[::2]  # one a recording
    audio = tmp_path / "manifests" / "audio"

    class Choosy(make_codec):
        def encode(self, wav):
            if (wav.abs().amax(-1) > 0.9).any():
                raise IndexError("too loud for me")
            codes = super().encode(wav)
            codes[(wav.abs().amax(-1) < 0.01)[:, 0]] = 99
            return codes

    def rewrite(number, change):
        wav, rate = soundfile.read(audio / f"clip-{number}.flac", dtype="float32")
        path = audio / f"clip-{number}.wav"
        soundfile.write(path, change(wav), rate, subtype="FLOAT")
        cuts[number].recording.sources[0].source = str(path)

    def with_nan(wav):
        wav[100] = np.nan
        return wav

    rewrite(0, with_nan)
    rewrite(1, lambda wav: wav[:0])
    rewrite(2, lambda wav: 3 * wav + 0.2)
    rewrite(3, lambda wav: 0.001 * wav)
    (audio / "clip-4.flac").write_bytes((audio / "clip-4.flac").read_bytes()[:3000])
    (audio / "clip-5.flac").unlink()
    (audio / "clip-5.flac").mkdir()
    mixed = cuts[6].pad(duration=4.0)
    manifest = tmp_path / "manifests" / "wrong.jsonl.gz"
    write_cuts(manifest, [*cuts[:6], mixed, cuts[7]])
    result = tokenize_manifest(manifest, tmp_path / "out", Choosy())
    assert (result.encoded, result.skipped) == (1, 7)
    assert [cut.id for cut in read_manifest(tmp_path / "out" / "cuts_all.jsonl.gz")] == ["clip-7"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [*(f"clip-{number}" for number in range(6)), mixed.id]
    parts = [
        "NaN",
        "clip-1",
        "too loud for me",
        "from 99 to 99",
        "clip-4",
        "clip-5.flac' cannot be read",
        "mixed",
    ]
    for line, part in zip(lines, parts, strict=True):
        assert part in line["reason"] and "\n" not in line["reason"], line


def test_lost_device_is_not_the_cuts_fault(tmp_path, corpus, make_codec):
    class Lost(make_codec):
        def encode(self, wav):
            raise RuntimeError("CUDA error: unspecified launch failure")

    with pytest.raises(RuntimeError, match="CUDA error"):
        tokenize_manifest(corpus, tmp_path / "out", Lost())


def test_batches_are_of_similar_duration_and_bounded(write_corpus, tmp_path, monkeypatch):
    cuts = write_corpus(tmp_path, ["train"] * 12)
    monkeypatch.setattr(shards, "WINDOW", 10)
    read = []
    windows = plan_windows((read.append(cut) or cut for cut in cuts), 10.0)
    first = next(windows)
    assert len(read) == 10  # no more of the manifest than the window
    all_windows = [first, *windows]
    assert sorted(place.number for window in all_windows for batch in window for place in batch) == list(
        range(24)
    )
    for window in all_windows:
        lengths = [[place.cut.duration for place in batch] for batch in window]
        flat = [length for batch in lengths for length in batch]
        assert flat == sorted(flat, reverse=True)
        assert all(len(batch) * max(batch) <= 10.0 for batch in lengths)
        assert max(len(batch) for batch in lengths) > 2
    alone = next(plan_windows(cuts, 0.5))
    assert all(len(batch) == 1 for batch in alone)


def test_reading_is_ahead_but_not_far(tmp_path):
    started = []
    ready = threading.Event()

    def read(item):
        started.append(item)
        if item == 1:
            ready.set()
        return item * item

    results = shards.read_ahead(iter(range(20)), read, threads=2)
    assert next(results) == 0
    assert ready.wait(5)  # read while nobody asked for it
    assert list(islice(results, 3)) == [1, 4, 9]
    time.sleep(0.05)
    assert max(started) <= 3 + 2
    results.close()
    with pytest.raises(ZeroDivisionError):
        list(shards.read_ahead([1, 0], lambda item: 1 // item, threads=2))


def test_long_cuts_are_read_in_blocks(tmp_path, write_corpus, codec, monkeypatch):
    """44.1 kHz stereo, and a cut that begins inside: in blocks as at once."""
    cut = write_corpus(tmp_path, ["train"], sample_rate=44100, channels=2)[0]
    late = cut.truncate(offset=0.25, duration=1.5)
    at_once = [tokenization.load_wav(part, codec) for part in (cut, late)]
    loaded = []
    samples = tokenization._samples
    monkeypatch.setattr(tokenization, "LONG_SECONDS", 1.0)
    monkeypatch.setattr(tokenization, "BLOCK_SECONDS", 0.4)
    monkeypatch.setattr(
        tokenization, "_samples", lambda part, name: loaded.append(part.duration) or samples(part, name)
    )
    for part, expected in zip((cut, late), at_once, strict=True):
        wav = tokenization.load_wav(part, codec)
        assert wav.shape == expected.shape
        np.testing.assert_allclose(wav.numpy(), expected.numpy(), atol=1e-4)
    assert len(loaded) == 5 + 4 and max(loaded) <= 0.4


def test_progress_tells_audio_hours_per_hour(tmp_path, corpus, codec, capsys, monkeypatch):
    monkeypatch.setattr("valle.utils.progress.FILE_INTERVAL", 0.0)
    tokenize_manifest(corpus, tmp_path / "out", codec)
    assert re.search(r"8/8 .*\d audio-hours/hour", capsys.readouterr().err)


def test_shar_holds_the_same_codes(tmp_path, corpus, codec):
    cuts = list(read_manifest(corpus))
    cuts[0] = cuts[0].truncate(offset=0.5, duration=1.0)  # begins inside its recording
    write_cuts(corpus, cuts)
    tokenize_manifest(corpus, tmp_path / "out", codec)
    manifest, folder = tmp_path / "out" / "cuts_all.jsonl.gz", tmp_path / "shar"
    assert write_shar(manifest, folder, 3)
    stored = list(read_manifest(manifest))
    assert len(list(folder.glob("cuts.*.jsonl.gz"))) == len(list(folder.glob("audio_features.*.tar"))) == 3
    streamed = list(CutSet.from_shar(in_dir=str(folder)))
    assert len(streamed) == 8
    for one, other in zip(stored, streamed, strict=True):
        assert (one.id, one.duration, one.supervisions) == (other.id, other.duration, other.supervisions)
        np.testing.assert_array_equal(load_codes(one), load_codes(other))
        assert other.load_audio_features().dtype == np.uint16
    assert streamed[0].custom["recording_start"] == 0.5
    before = snapshot(folder)
    assert not write_shar(manifest, folder, 3)
    assert snapshot(folder) == before
    assert write_shar(manifest, folder, 8) and len(list(folder.glob("*.tar"))) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifests", "out", "shar"]
    with pytest.raises(UserError, match="name a new folder"):
        write_shar(manifest, tmp_path / "manifests")
    with pytest.raises(UserError, match="--shar-size is 0"):
        write_shar(manifest, folder, 0)


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
