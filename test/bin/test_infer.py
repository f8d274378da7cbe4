"""`infer.py` end to end on a tiny codec and model: any prompt works, bad input is one line and exit code 2."""

import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

from valle.bin import infer, trainer_audiolm
from valle.codecs import load_codec
from valle.utils.errors import UserError


@pytest.fixture(scope="module")
def exp(tmp_path_factory):
    """A checkpoint of a barely trained model on a tiny codec of 30 codes."""
    from synthetic import save_tiny_codec, write_tokenized

    root = tmp_path_factory.mktemp("exp")
    save_tiny_codec(root / "tiny")
    tokenized = write_tokenized(root / "tokenized")
    (tokenized / "codec.json").write_text(json.dumps(load_codec(root / "tiny").info()))
    trainer_audiolm.main(
        ["--manifest-dir", str(tokenized), "--exp-dir", str(root / "exp"), "--decoder-dim", "16", "--nhead", "2",
         "--num-decoder-layers", "1", "--max-steps", "2", "--tensorboard", "false", "--num-buckets", "1"]
    )  # fmt: skip
    return root


def sine(seconds, rate, channels=1):
    time = np.arange(int(seconds * rate)) / rate
    return np.stack([0.3 * np.sin(2 * np.pi * 220 * (c + 1) * time) for c in range(channels)], 1).astype(
        np.float32
    )


def run(exp, prompt, *flags):
    out = exp / "out"
    infer.main(
        [
            "--prompt",
            str(prompt),
            "--checkpoint",
            str(exp / "exp" / "best-valid-loss.pt"),
            "--output-dir",
            str(out),
            *flags,
        ]
    )
    return out


@pytest.mark.parametrize(
    "rate,channels,suffix", [(16000, 1, "wav"), (44100, 2, "wav"), (48000, 1, "flac"), (8000, 2, "ogg")]
)
def test_a_prompt_of_any_rate_and_channels_is_continued(exp, rate, channels, suffix, capsys):
    path = exp / f"clip{rate}.{suffix}"
    soundfile.write(path, sine(2.0, rate, channels), rate)
    out = run(exp, path, "--max-new-tokens", "25", "--seed", "3")
    full, continuation = (soundfile.read(out / f"clip{rate}_{part}.wav") for part in ("full", "continuation"))
    assert full[1] == continuation[1] == 16000
    assert abs(len(full[0]) - (2.0 + 0.5) * 16000) <= 320 and len(continuation[0]) == 25 * 320
    np.testing.assert_array_equal(full[0][-len(continuation[0]) :], continuation[0])
    assert "0.5 s added to 2.0 s" in capsys.readouterr().out


def test_the_seed_decides_and_duration_is_in_seconds(exp):
    path = exp / "seeded.wav"
    soundfile.write(path, sine(1.0, 16000), 16000)
    reads = []
    for seed in ("1", "1", "2"):
        out = run(exp, path, "--duration", "1.5", "--seed", seed)
        reads.append(soundfile.read(out / "seeded_continuation.wav")[0])
    assert len(reads[0]) == 1.5 * 16000
    assert np.array_equal(reads[0], reads[1]) and not np.array_equal(reads[0], reads[2])


def test_several_prompts_and_codes(exp):
    np.save(exp / "codes.npy", np.random.default_rng(0).integers(0, 30, (40, 4)).astype(np.uint16))
    soundfile.write(exp / "one.wav", sine(3.0, 16000), 16000)
    together = run(exp, f"{exp / 'codes.npy'},{exp / 'one.wav'}", "--max-new-tokens", "10")
    first = soundfile.read(together / "codes_full.wav")[0]
    alone = soundfile.read(run(exp, exp / "codes.npy", "--max-new-tokens", "10") / "codes_full.wav")[0]
    assert len(first) == 50 * 320 and np.abs(first - alone).max() < 1e-3


def bad_prompts(folder):
    yield "missing.wav", None, "does not exist"
    (folder / "text.wav").write_text("this is no sound")
    yield "text.wav", None, "not an audio file"
    (folder / "empty.wav").write_bytes(b"")
    yield "empty.wav", None, "empty"
    soundfile.write(folder / "nothing.wav", np.zeros((0, 1), np.float32), 16000)
    yield "nothing.wav", None, "no samples"
    soundfile.write(folder / "short.wav", sine(0.1, 16000), 16000)
    yield "short.wav", None, "0.10 s, expected at least 0.5 s"
    nan = sine(1.0, 16000)
    nan[100] = np.nan
    soundfile.write(folder / "nan.wav", nan, 16000, subtype="FLOAT")
    yield "nan.wav", None, "1 NaN or infinite"
    yield ".", None, "folder"
    np.save(folder / "narrow.npy", np.zeros((40, 2), np.int64))
    yield "narrow.npy", None, "4 quantizers"
    np.save(folder / "range.npy", np.full((40, 4), 30))
    yield "range.npy", None, "expected 0 to 29"
    np.save(folder / "float.npy", np.zeros((40, 4)))
    yield "float.npy", None, "integers"
    np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    yield "objects.npy", None, "not a NumPy array"
    soundfile.write(folder / "good.wav", sine(1.0, 16000), 16000)
    (folder / "junk.pt").write_bytes(b"not a checkpoint")
    yield "good.wav", ["--checkpoint", str(folder / "junk.pt")], "not a checkpoint"
    torch.save({"weights": 1}, folder / "other.pt")
    yield "good.wav", ["--checkpoint", str(folder / "other.pt")], "no 'model' entry"
    torch.save({"model": {}}, folder / "bare.pt")
    yield "good.wav", ["--checkpoint", str(folder / "bare.pt")], "no AudioLM configuration"
    yield "good.wav", ["--checkpoint", str(folder / "absent.pt")], "does not exist"
    yield "good.wav", ["--max-new-tokens", "0"], "expected 1 or more"
    yield "good.wav", ["--max-new-tokens", "5", "--duration", "1"], "give one of them"
    yield "good.wav", ["--temperature", "-1"], "temperature"
    yield "good.wav", ["--top-k", "many"], "top-k"


def test_bad_input_is_named(exp, tmp_path):
    count = 0
    for name, flags, message in bad_prompts(tmp_path):
        with pytest.raises(UserError, match=message):
            run(exp, tmp_path / name, *(flags or []))
        count += 1
    assert count == 19


def test_a_checkpoint_with_code_in_it_is_not_run(exp, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "was-run"), "w"))

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    soundfile.write(tmp_path / "good.wav", sine(1.0, 16000), 16000)
    with pytest.raises(UserError, match="not a checkpoint"):
        run(exp, tmp_path / "good.wav", "--checkpoint", str(tmp_path / "evil.pt"))
    assert not (tmp_path / "was-run").exists()


def test_a_codec_with_other_weights_is_refused(exp, tmp_path):
    contents = torch.load(exp / "exp" / "best-valid-loss.pt", weights_only=True)
    contents["codec"]["fingerprint"] = "f" * 16
    torch.save(contents, tmp_path / "moved.pt")
    soundfile.write(tmp_path / "good.wav", sine(1.0, 16000), 16000)
    with pytest.raises(UserError, match="other weights"):
        run(exp, tmp_path / "good.wav", "--checkpoint", str(tmp_path / "moved.pt"))


@pytest.mark.parametrize(
    "flags,code", [(["--prompt", "missing.wav"], 2), ([], 2), (["--help"], 0), (["--nonsense"], 2)]
)
def test_the_command_ends_with_one_line(flags, code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "valle.bin.infer", *flags],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == code
    if code == 2:
        assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("error: ")
        shown = subprocess.run(
            [sys.executable, "-m", "valle.bin.infer", *flags, "--debug"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert shown.returncode == 2 and "Traceback" in shown.stderr
