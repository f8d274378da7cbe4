"""The audit of a codec on a corpus: right figures, the worst clips found, the same files twice."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet
from lhotse.array import Array, TemporalArray
from synthetic import save_tiny_codec

import valle.evaluation.codec_audit as module
from valle.bin import audit_codec, cli
from valle.codecs import load_codec
from valle.data.manifests import (
    SPLITS,
    make_cut,
    make_recording,
    make_supervision,
    read_manifest,
    with_codes,
)
from valle.data.packed import load_codes
from valle.evaluation.audio import log_mel_distance, si_sdr, stft_distance
from valle.utils.errors import UserError

COUNTS = {"train": 9, "validation": 2, "test": 3}


def write_corpus(folder, codec, lossless=()):
    """Tokenized recordings; of those in `lossless`, the recording is what the codec decodes."""
    (folder / "codes").mkdir(parents=True)
    for split in SPLITS:
        cuts = []
        for number in range(COUNTS[split]):
            name = f"{split}-{number}"
            draw = np.random.default_rng([number, *name.encode()])
            codes = draw.integers(0, codec.codebook_size, (50 + 5 * number, codec.num_quantizers))
            wav = codec.decode(torch.from_numpy(codes)[None])[0].detach().numpy()
            if name not in lossless:
                wav = draw.uniform(-0.5, 0.5, wav.shape).astype(np.float32)
            path = folder / f"{name}.wav"  # in floats, since an untrained codec goes beyond full scale
            soundfile.write(path, wav.T, codec.sample_rate, subtype="FLOAT")
            recording = make_recording(name, path, wav.shape, codec.sample_rate)
            cut = make_cut(recording, make_supervision(recording, None, "someone", "en", split), "audio")
            np.save(folder / "codes" / f"{name}.npy", codes.astype(np.uint16))
            array = Array("numpy_files", str(folder / "codes"), f"{name}.npy", list(codes.shape))
            cuts.append(with_codes(cut, TemporalArray(array, 0, 1 / codec.frame_rate, 0.0)))
        CutSet.from_cuts(cuts).to_file(str(folder / f"cuts_{split}.jsonl.gz"))
    (folder / "codec.json").write_text(json.dumps(codec.info()))
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("audit")
    with torch.inference_mode():
        codec = load_codec(save_tiny_codec(root / "codec"))
        return write_corpus(root / "tokenized", codec, lossless=("train-4", "test-1"))


@pytest.fixture
def folder(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "tokenized")
    return tmp_path / "tokenized"


@pytest.fixture
def drawn():
    """For a test that needs true pictures: drawing takes longer than all else."""
    return pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def draw_no_pictures(request, monkeypatch):
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(module, "spectrograms_png", lambda wavs, title: title.encode())


def audit(folder, *flags):
    audit_codec.main(["--manifest-dir", str(folder), "--device", "cpu", *flags])
    return json.loads((folder / "audit" / "audit.json").read_text())


def warnings(capsys):
    """What follows each WARNING on stderr."""
    return re.findall("WARNING (.*)", capsys.readouterr().err)


def snapshot(folder):
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_bits_and_codebooks_are_those_of_all_codes(folder, capsys):
    results = audit(folder, "--audit-cuts", "0")
    every = np.concatenate(
        [load_codes(cut) for s in SPLITS for cut in read_manifest(folder / f"cuts_{s}.jsonl.gz")]
    )
    info, part = results["codec"], results["splits"]["all"]
    assert part["frames"] == len(every) and set(results["splits"]) == {"all", *SPLITS}
    assert part["hours"] == pytest.approx(len(every) / info["frame_rate"] / 3600, abs=1e-4)
    entropies = []
    for index, quantizer in enumerate(part["quantizers"]):
        shares = np.unique(every[:, index], return_counts=True)[1] / len(every)
        entropies.append(-(shares * np.log2(shares)).sum())
        assert quantizer["used"] == len(shares) and quantizer["entropy_bits"] == pytest.approx(
            entropies[-1], abs=1e-3
        )
        assert quantizer["perplexity"] == pytest.approx(2 ** entropies[-1], rel=1e-3)
    nominal = info["frame_rate"] * info["num_quantizers"] * math.log2(info["codebook_size"])
    assert results["bits_per_second"]["nominal"] == pytest.approx(nominal, abs=0.01)
    assert results["bits_per_second"]["entropy"] == pytest.approx(
        info["frame_rate"] * sum(entropies), abs=0.1
    )
    assert results["resynthesis"] is None and f"{nominal:.0f} as stored" in capsys.readouterr().out


def test_what_the_codec_keeps_scores_best_and_what_it_loses_is_shown(folder, capsys, drawn):
    results = audit(folder)
    clips = {clip["id"]: clip for clip in results["resynthesis"]["clips"]}
    assert len(clips) == sum(COUNTS.values()), "all: there are fewer than 40"
    for name, clip in clips.items():
        kept = name in ("train-4", "test-1")
        assert (clip["si_sdr"] > 30) == kept and (clip["log_mel_distance"] < 0.1) == kept
        assert (clip["stft_distance"] < 0.5) == kept
    worst = results["resynthesis"]["worst"]
    distances = [clips[clip["id"]]["log_mel_distance"] for clip in worst]
    assert distances == sorted((c["log_mel_distance"] for c in clips.values()), reverse=True)[:10]
    table = results["resynthesis"]["splits"]
    assert {name: part["cuts"] for name, part in table.items()} == {"all": 14, **COUNTS}
    in_test = [clip["si_sdr"] for clip in clips.values() if clip["split"] == "test"]
    assert table["test"]["si_sdr"] == {
        "mean": pytest.approx(np.mean(in_test), abs=1e-4),
        "worst": min(in_test),
    }
    pictures = sorted(path.name for path in (folder / "audit").glob("*.png"))
    assert pictures == [clip["figure"] for clip in worst] == [f"worst-{n:02d}.png" for n in range(1, 11)]
    assert (folder / "audit" / pictures[0]).read_bytes().startswith(b"\x89PNG")
    page = (folder / "audit" / "audit.html").read_text()
    assert page.count("<audio") == 20 and page.count("<img") == 10 and worst[0]["id"] in page
    assert "http://" not in page and "https://" not in page and "<script" not in page
    assert "normal and no fault" in page and "normal and no fault" in capsys.readouterr().out


def test_run_twice_changes_nothing_and_a_change_is_audited_anew(folder, monkeypatch):
    audit(folder)
    before = snapshot(folder)
    decoded = []
    original = module._compare
    monkeypatch.setattr(module, "_compare", lambda *given: decoded.append(given[1].id) or original(*given))
    audit(folder)
    assert snapshot(folder) == before and not decoded
    # Made anew, it is the same, byte for byte.
    (folder / "audit" / "audit.json").unlink()
    audit(folder)
    assert snapshot(folder).keys() == before.keys() and len(decoded) == 14
    assert {name: content for name, (content, _) in snapshot(folder).items()} == {
        name: content for name, (content, _) in before.items()
    }
    decoded.clear()
    results = audit(folder, "--audit-cuts", "4")
    assert len(decoded) == len(results["resynthesis"]["clips"]) == 4
    assert len(list((folder / "audit").glob("*.png"))) in (0, 4), "no picture of an audit before"
    cuts = list(read_manifest(folder / "cuts_train.jsonl.gz"))
    CutSet.from_cuts(cuts[:5]).to_file(str(folder / "cuts_train.jsonl.gz"))
    assert audit(folder, "--audit-cuts", "4")["splits"]["train"]["frames"] == sum(
        50 + 5 * n for n in range(5)
    )


def test_the_sample_is_shared_out_and_long_cuts_are_shortened(folder):
    results = audit(folder, "--audit-cuts", "7", "--audit-seconds", "0.5", "--seed", "3")
    clips = results["resynthesis"]["clips"]
    assert [sum(clip["split"] == split for clip in clips) for split in SPLITS] == [3, 2, 2]
    assert all(clip["seconds"] == pytest.approx(0.5, abs=0.03) for clip in clips)
    assert module.share_out(10, {"a": 100, "b": 2, "c": 100}) == {"a": 4, "b": 2, "c": 4}
    assert module.share_out(40, {"a": 1, "b": 2}) == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "nowhere/at/all"}, "unknown codec 'nowhere/at/all'"),
        ({"fingerprint": "f" * 16}, "has fingerprint .*, but codec.json says f{16}"),
    ],
)
def test_without_the_codec_the_codes_are_counted_and_it_says_so(folder, capsys, changes, message):
    info = json.loads((folder / "codec.json").read_text())
    (folder / "codec.json").write_text(json.dumps(info | changes))
    results = audit(folder)
    (line,) = warnings(capsys)
    assert line.startswith("no resynthesis: ")
    assert results["resynthesis"] is None and results["splits"]["all"]["frames"] > 0
    with pytest.raises(UserError, match=message):
        raise UserError(results["left_out"])
    before = snapshot(folder)
    audit(folder)  # tried again, with the same end
    assert snapshot(folder) == before
    (folder / "codec.json").write_text(json.dumps(info))
    assert audit(folder)["resynthesis"] is not None


def test_without_matplotlib_there_are_players_but_no_pictures(folder, monkeypatch, capsys):
    find = module.importlib.util.find_spec
    monkeypatch.setattr(
        module.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    results = audit(folder)
    (line,) = warnings(capsys)
    assert "pip install 'valle[report]'" in line
    assert not list((folder / "audit").glob("*.png"))
    assert (folder / "audit" / "audit.html").read_text().count("<audio") == 20
    assert all(clip["figure"] is None for clip in results["resynthesis"]["worst"])


def test_recordings_that_are_gone_are_counted_and_named(folder, capsys):
    cuts = list(read_manifest(folder / "cuts_test.jsonl.gz"))
    for cut in cuts:
        cut.recording.sources[0].source = str(folder / "gone.flac")
    CutSet.from_cuts(cuts).to_file(str(folder / "cuts_test.jsonl.gz"))
    results = audit(folder)
    assert {entry["id"] for entry in results["resynthesis"]["unread"]} == {cut.id for cut in cuts}
    assert results["resynthesis"]["splits"]["test"] == {
        "cuts": 0, **{name: {"mean": None, "worst": None} for name in module.MEASURES},
    }  # fmt: skip
    (line,) = warnings(capsys)
    assert line.startswith("3 of 14 cuts are left out of the resynthesis; the first: cut 'test-")


def test_bad_settings_and_folders_are_named(folder, tmp_path):
    for flags, message in (
        (["--audit-cuts", "-1"], "--audit-cuts is -1"),
        (["--audit-seconds", "0"], "--audit-seconds 0"),
        (["--manifest-dir", str(tmp_path / "nowhere")], "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            audit(folder, *flags)
    (folder / "codec.json").unlink()
    with pytest.raises(UserError, match="codec.json' does not exist; run prepare.sh --stage 2"):
        audit(folder)
    assert cli.COMMANDS["audit"][0] == "audit_codec"


def test_distances_of_known_signals():
    rng = np.random.default_rng(0)
    time = np.arange(16000) / 16000
    wav = np.stack([np.sin(2 * np.pi * 440 * time), np.sin(2 * np.pi * 660 * time)])
    noise = rng.standard_normal(wav.shape)
    for part in range(2):  # noise that has nothing of the signal
        noise[part] -= noise[part].mean()
        noise[part] -= wav[part] * (noise[part] @ wav[part]) / (wav[part] @ wav[part])
    noise *= np.sqrt((wav**2).sum(1) / (noise**2).sum(1))[:, None]
    assert si_sdr(wav, wav + 0.1 * noise) == pytest.approx(20, abs=0.05)
    assert si_sdr(wav, 5 * (wav + 0.1 * noise)) == pytest.approx(20, abs=0.05), "scale does not count"
    assert si_sdr(wav, wav) == 100 and si_sdr(wav, 0 * wav) == -100
    assert si_sdr(np.zeros_like(wav), wav) is None
    assert si_sdr(wav, -wav) == 100 and si_sdr(wav, np.roll(wav, 9, axis=1)) < 0, "the same sound, shifted"
    assert stft_distance(wav, wav, 16000) == 0 == log_mel_distance(wav, wav, 16000)
    assert stft_distance(wav, np.roll(wav, 9, axis=1), 16000) < 0.3 < stft_distance(wav, noise, 16000)
    louder = stft_distance(noise, 2 * noise, 16000)
    assert louder == pytest.approx(1 + math.log(2), rel=0.01), "convergence 1, log magnitudes ln 2 apart"
    assert stft_distance(wav[:, :7], wav[:, :9], 16000) == 0
    for function in (lambda a, b: si_sdr(a, b), lambda a, b: stft_distance(a, b, 16000)):
        with pytest.raises(ValueError, match="2 channels against 1"):
            function(wav, wav[:1])
