"""`infer.py` end to end on a tiny codec and model: any prompt works, bad input is one line and exit code 2."""

import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import torch
from synthetic import save_tiny_codec, write_tokenized

from valle.bin import infer, inference, trainer_audiolm
from valle.codecs import load_codec
from valle.generation.chunks import Chunks
from valle.generation.sampling import Sampling
from valle.models import AudioLM, Generation
from valle.utils.errors import UserError


def train(root, *flags):
    """A checkpoint of a barely trained model on a tiny codec of 30 codes."""
    save_tiny_codec(root / "tiny")
    tokenized = write_tokenized(root / "tokenized")
    (tokenized / "codec.json").write_text(json.dumps(load_codec(root / "tiny").info()))
    trainer_audiolm.main(
        ["--manifest-dir", str(tokenized), "--exp-dir", str(root / "exp"), "--decoder-dim", "16", "--nhead", "2",
         "--num-decoder-layers", "1", "--max-steps", "2", "--tensorboard", "false", "--num-buckets", "1", *flags]
    )  # fmt: skip
    return root


@pytest.fixture(scope="module")
def exp(tmp_path_factory):
    """Trained for continuations alone."""
    return train(tmp_path_factory.mktemp("exp"))


@pytest.fixture(scope="module")
def versatile(tmp_path_factory):
    """Trained to fill gaps and to be guided too, on up to 3 s; and a clip of 3 s."""
    flags = ["--infill-prob", "0.5", "--drop-prompt-prob", "0.5", "--filter-max-duration", "3"]
    root = train(tmp_path_factory.mktemp("versatile"), *flags)
    soundfile.write(root / "clip.wav", sine(3.0, 16000), 16000)
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
    yield "good.wav", ["--checkpoint", str(folder / "bare.pt")], "no AudioLM or VALL-E configuration"
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


@pytest.fixture
def spy(monkeypatch):
    """Calls of AudioLM.generate, infill and stream: (name, positional arguments, named arguments)."""
    calls = []
    for name in ("generate", "infill", "stream"):
        real = getattr(AudioLM, name)

        def called(self, *args, _real=real, _name=name, **kwargs):
            calls.append((_name, args, kwargs))
            return _real(self, *args, **kwargs)

        monkeypatch.setattr(AudioLM, name, called)
    return calls


def read(path):
    return soundfile.read(path, dtype="int16")[0]


def test_a_clip_without_a_flag_is_a_prompt(versatile):
    flags = ["--checkpoint", str(versatile / "exp" / "best-valid-loss.pt"), "--max-new-tokens", "5"]
    infer.main([*flags, "--output-dir", str(versatile / "a"), str(versatile / "clip.wav")])
    infer.main([*flags, "--output-dir", str(versatile / "b"), "--prompt", str(versatile / "clip.wav")])
    assert (versatile / "a" / "clip_full.wav").read_bytes() == (
        versatile / "b" / "clip_full.wav"
    ).read_bytes()
    soundfile.write(versatile / "other.wav", sine(1.0, 16000), 16000)
    infer.main([*flags, "--output-dir", str(versatile / "a"), str(versatile / "clip.wav"), "--seed", "1",
                str(versatile / "other.wav")])  # fmt: skip
    assert len(read(versatile / "a" / "other_full.wav")) == 55 * 320


def test_flags_reach_the_model(versatile, spy):
    run(versatile, versatile / "clip.wav", *(
        "--temperature 0.9 --top-k 20 --top-p 0.9 --min-p 0.05 --repetition-penalty 1.2 --repetition-window 0.5 "
        "--repetition-aware true --stop-repetition 1 --min-new-tokens 3 --max-new-tokens 8 --guidance-scale 2 "
        "--num-samples 2 --dtype bf16 --seed 7 --chunk 0.2"
    ).split())  # fmt: skip
    ((name, args, named),) = spy
    assert name == "generate" and args[2] == 8
    assert named["sampling"] == Sampling(0.9, 20, 0.9, 0.05, 1.2, 25, True, stop_repetition=50)
    expected = {
        "min_new_tokens": 3, "guidance_scale": 2.0, "num_samples": 2, "dtype": "bf16", "seed": 7, "window": None,
        "chunks": Chunks(10, 5, 100),
    }  # fmt: skip
    assert {key: named[key] for key in expected} == expected


@pytest.mark.parametrize(
    "flags,least", [([], 8), (["--stop-at-eos", "true"], 0), (["--min-new-tokens", "2"], 2)]
)
def test_the_model_may_end_only_where_it_is_told_that_it_may(versatile, spy, flags, least):
    run(versatile, versatile / "clip.wav", "--max-new-tokens", "8", *flags)
    assert spy[0][2]["min_new_tokens"] == least and spy[0][2]["chunks"] is None


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_every_number_format_gives_sound(versatile, spy, dtype):
    wav = read(
        run(versatile, versatile / "clip.wav", "--duration", "1", "--dtype", dtype) / "clip_continuation.wav"
    )
    assert spy[0][2]["dtype"] == dtype and len(wav) == 16000 and np.abs(wav).max() > 100


def test_samples_are_ranked(versatile, capsys):
    alone = read(run(versatile, versatile / "clip.wav", "--duration", "1") / "clip_continuation.wav")
    capsys.readouterr()
    out = run(versatile, versatile / "clip.wav", "--duration", "1", "--num-samples", "3")
    shown = capsys.readouterr().out
    scores = [float(score) for score in re.findall(r"score (-[\d.]+) nats", shown)]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True) and len(set(scores)) == 3
    names = ["clip_continuation.wav", "clip_continuation_2.wav", "clip_continuation_3.wav"]
    assert [line.split()[0] for line in shown.splitlines() if "score" in line] == [
        str(out / n) for n in names
    ]
    wavs = [read(out / name) for name in names]
    np.testing.assert_array_equal(wavs[0], read(out / "clip_full.wav")[-16000:])
    # sample 1 of 3 is the one that is drawn alone; its full decode differs in rounding at most
    assert min(np.abs(wav.astype(int) - alone).max() for wav in wavs) <= 1
    assert len({wav.tobytes() for wav in wavs}) == 3


def test_the_last_line_says_how_fast_it_was(versatile, capsys):
    run(versatile, versatile / "clip.wav", "--duration", "1")
    line = capsys.readouterr().out.splitlines()[-1]
    number = r"([\d.]+)"
    found = re.search(
        rf"checkpoint .*best-valid-loss.pt, {number} frames/s, {number} x real time: pack {number} s, "
        rf"prefill {number} s, AR {number} s, NAR {number} s, codec {number} s$",
        line,
    )
    assert found, line
    speed, real_time, *parts = map(float, found.groups())
    assert 50 * real_time == pytest.approx(speed, rel=0.1)
    assert 50 / speed == pytest.approx(sum(parts), rel=0.2, abs=0.03), "the parts are all there is"


def stream_command(root, target, *flags):
    return [
        sys.executable, "-m", "valle.bin.infer", "--checkpoint", str(root / "exp" / "best-valid-loss.pt"),
        "--stream", str(target), str(root / "clip.wav"), *flags,
    ]  # fmt: skip


def test_a_stream_is_the_continuation_made_in_the_same_chunks(versatile, spy, capsys):
    target = versatile / "new" / "stream.wav"
    run(versatile, versatile / "clip.wav", "--duration", "2", "--stream", str(target), "--chunk", "0.3")
    shown = capsys.readouterr().out
    found = re.search(r"2\.0 s added to 3\.0 s \(ended by length\), first audio after ([\d.]+) s", shown)
    assert found and 0 < float(found[1]) < 5 and "codec" in shown.splitlines()[-1]
    out = run(versatile, versatile / "clip.wav", "--duration", "2", "--chunk", "0.3")
    assert [call[2]["chunks"] for call in spy] == [Chunks(15, 5, 100)] * 2
    streamed, whole = (read(path).astype(float) for path in (target, out / "clip_continuation.wav"))
    # the stream's decoder sees a little less of the future
    assert len(streamed) == len(whole) == 32000
    assert 10 * np.log10((whole**2).sum() / ((streamed - whole) ** 2).sum()) > 30
    run(versatile, versatile / "clip.wav", "--duration", "2", "--stream", str(target), "--chunk", "0.3")
    np.testing.assert_array_equal(read(target), streamed)


def test_stdout_carries_sound_alone(versatile):
    run(versatile, versatile / "clip.wav", "--duration", "1", "--stream", str(versatile / "same.wav"))
    command = stream_command(versatile, "-", "--duration", "1")
    done = subprocess.run(command, capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stdout == read(versatile / "same.wav").astype("<i2").tobytes()
    said = done.stderr.decode()
    assert "s16le, 16000 Hz, 1 channel" in said and "| aplay -f S16_LE -r 16000 -c 1" in said
    assert "ffplay -f s16le -ar 16000" in said and "first audio after" in said and "x real time" in said


def test_a_listener_may_go(versatile):
    command = stream_command(versatile, "-", "--duration", "600", "--long", "true")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1000)
        process.stdout.close()
        said = process.stderr.read().decode()
    assert process.returncode == 0 and "Traceback" not in said and "ended by the listener" in said


def test_an_interrupted_stream_keeps_what_it_has(versatile):
    target = versatile / "interrupted.wav"
    command = stream_command(versatile, target, "--duration", "600", "--long", "true")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and (not target.exists() or target.stat().st_size < 50_000):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        try:
            shown, said = process.communicate(timeout=10)
        except (
            subprocess.TimeoutExpired
        ):  # dropped, which was seen once and not explained: again, as one would
            process.send_signal(signal.SIGINT)
            shown, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in said and "Traceback" not in said
    seconds = len(read(target)) / 16000
    assert 1.5 < seconds < 590 and f"holds the first {seconds:.1f} s" in shown


def test_a_stream_does_not_overwrite_its_clip(versatile):
    before = (versatile / "clip.wav").read_bytes()
    with pytest.raises(UserError, match="would overwrite"):
        run(versatile, versatile / "clip.wav", "--stream", str(versatile / "out" / ".." / "clip.wav"))
    assert (versatile / "clip.wav").read_bytes() == before


def test_a_terminal_gets_no_raw_samples(versatile, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with pytest.raises(UserError, match=r"pipe them: \| aplay"):
        run(versatile, versatile / "clip.wav", "--stream", "-")


def test_a_gap_is_made_anew_and_the_rest_stays(versatile, capsys):
    out = run(versatile, versatile / "clip.wav", "--infill", "1", "1.6")
    assert "1.00 to 1.60 s of 3.00 s made anew" in capsys.readouterr().out
    filled = read(out / "clip_infilled.wav").astype(int)
    codec = load_codec(versatile / "tiny")
    wav = torch.from_numpy(soundfile.read(versatile / "clip.wav", dtype="float32")[0])
    same = (codec.decode(codec.encode(wav[None, None]))[0, 0].numpy() * 32768).round()
    reach = codec.context_frames * codec.hop_length
    start, end = 16000 - reach, round(1.6 * 16000) + reach
    assert len(filled) == len(same) == 48000
    assert np.abs(filled[:start] - same[:start]).max() <= 1 and np.abs(filled[end:] - same[end:]).max() <= 1
    assert np.abs(filled[16000:25600] - same[16000:25600]).max() > 100
    assert len(read(run(versatile, versatile / "clip.wav", *("--infill 1 1.6 --num-samples 2".split()))
                    / "clip_infilled_2.wav")) == 48000  # fmt: skip


@pytest.mark.parametrize("seconds", [0.3, 1.0])
def test_what_takes_the_gaps_place_may_have_another_length(versatile, spy, capsys, seconds):
    out = run(versatile, versatile / "clip.wav", "--infill", "1", "1.6", "--duration", str(seconds))
    assert f"1.00 to 1.60 s of 3.00 s made anew in {seconds:.2f} s" in capsys.readouterr().out
    assert spy[0][2]["new_frames"] == round(50 * seconds)
    assert len(read(out / "clip_infilled.wav")) == round((2.4 + seconds) * 16000)


@pytest.mark.parametrize(
    "gap,context,expected", [("1 1.6", "0.5", (80, 25, 55)), ("0.2 2.9", "0.5", (150, 10, 145))]
)
def test_a_gap_is_filled_from_what_is_near(versatile, spy, gap, context, expected):
    out = run(versatile, versatile / "clip.wav", "--infill", *gap.split(), "--max-prompt-duration", context)
    ((name, (codes, start, end), _),) = spy
    assert name == "infill" and (len(codes), start, end) == expected
    assert len(read(out / "clip_infilled.wav")) == 48000, "all of the clip is in the result"


@pytest.mark.parametrize(
    "gap,message",
    [
        ("2 1", "not a part of .*clip.wav"), ("1 1", "not a part"), ("-1 1", "not a part"), ("1 3.5", "< 3.00 s"),
        ("nan 1", "not a part"), ("1 1.005", "less than a frame of 0.02 s"), ("0 1", "nothing before the gap"),
        ("1 3", "nothing behind the gap"), ("0 3", "nothing before"), ("1", "expected 2 arguments"),
    ],
)  # fmt: skip
def test_a_gap_that_cannot_be_filled_is_named(versatile, gap, message):
    with pytest.raises(UserError, match=message):
        run(versatile, versatile / "clip.wav", "--infill", *gap.split())


@pytest.mark.parametrize(
    "flags,needed", [("--infill 1 2", "--infill-prob"), ("--guidance-scale 2", "--drop-prompt-prob")]
)
def test_what_a_model_was_not_trained_for_is_refused(exp, versatile, flags, needed):
    with pytest.raises(UserError, match=f"best-valid-loss.pt' was not trained for that; .* {needed}"):
        run(exp, versatile / "clip.wav", *flags.split())


def test_guidance_changes_the_result(versatile):
    wavs = [
        read(run(versatile, versatile / "clip.wav", "--duration", "1", *flags) / "clip_continuation.wav")
        for flags in ([], ["--guidance-scale", "1"], ["--guidance-scale", "4"])
    ]
    assert np.array_equal(wavs[0], wavs[1]) and not np.array_equal(wavs[0], wavs[2])


def test_long_continuations_see_a_window(versatile, spy, capsys):
    clip = versatile / "clip.wav"
    out = run(versatile, clip, "--duration", "2", "--long", "true")
    assert len(read(out / "clip_continuation.wav")) == 32000
    run(versatile, clip, "--duration", "2", "--long", "true", "--window", "1.5")
    assert "hint" not in capsys.readouterr().err
    run(versatile, clip, "--duration", "2")
    said = capsys.readouterr().err
    assert "hint: the model works on 5.0 s at once, but was trained on up to 3.0 s; --long true" in said
    run(versatile, clip, "--duration", "1", "--max-prompt-duration", "2")
    assert "hint" not in capsys.readouterr().err
    assert [call[2]["window"] for call in spy] == [150, 75, None, None]


def test_a_long_result_is_decoded_in_pieces_with_the_same_result(versatile, monkeypatch):
    flags = ["--duration", "4", "--long", "true", "--num-samples", "2"]
    whole = [
        read(run(versatile, versatile / "clip.wav", *flags) / f"clip_{part}.wav")
        for part in ("full", "continuation", "continuation_2")
    ]
    monkeypatch.setattr(inference, "WHOLE_SECONDS", 2.0)
    monkeypatch.setattr(inference, "PIECE_SECONDS", 0.5)
    decoded = []
    codec_type = type(load_codec(versatile / "tiny"))
    real = codec_type.decode
    monkeypatch.setattr(
        codec_type, "decode", lambda codec, codes: decoded.append(codes.shape[1]) or real(codec, codes)
    )
    out = run(versatile, versatile / "clip.wav", *flags)
    context = load_codec(versatile / "tiny").context_frames
    assert len(decoded) >= 2 * 14 and max(decoded) <= 25 + 3 * context
    for wav, part in zip(whole, ("full", "continuation", "continuation_2"), strict=True):
        assert np.abs(read(out / f"clip_{part}.wav").astype(int) - wav).max() <= 1


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--infill 1 2 --stream a.wav", "--infill and --stream do not go together"),
        ("--infill 1 2 --max-new-tokens 9", "--infill and --max-new-tokens"),
        ("--infill 1 2 --guidance-scale 2", "--infill and --guidance-scale"),
        ("--stream a.wav --num-samples 2", "--stream and --num-samples"),
        ("--stream a.wav --stop-repetition 1 --stop-at-eos true", "--stream and --stop-repetition"),
        ("--stop-at-eos true --min-new-tokens 1", "--stop-at-eos and --min-new-tokens"),
        ("--window 2", "--window needs --long"),
        ("--stop-repetition 1", "--stop-repetition needs --stop-at-eos or --min-new-tokens"),
        ("--repetition-window 1", "--repetition-window needs --repetition-penalty"),
        ("--min-new-tokens 9 --max-new-tokens 8", "--min-new-tokens is 9, expected 0 to 8"),
        ("--max-prompt-duration 0", "--max-prompt-duration is 0.0 s"),
        ("--max-prompt-duration inf", "--max-prompt-duration is inf s"),
        ("--duration nan", "--duration is nan s"),
        ("--duration 0.001", "--duration is 0.001 s, expected at least a frame of 0.02 s"),
        ("--chunk 0.1", "--chunk is 0.1 s, expected more than its lookahead of 0.1 s"),
        ("--num-samples 0", "num_samples is 0"),
        ("--min-p 2", "min_p is 2.0"),
        ("--dtype fp8", "dtype"),
        ("--stream a.flac", "expected a .wav file"),
        ("other/clip.wav", "2 clips are called 'clip'"),
        ("other.wav --stream a.wav", "--stream takes one clip, but 2"),
        ("other.wav --infill 1 2", "--infill takes one clip, but 2"),
    ],
)
def test_flags_that_make_no_sense_are_named(versatile, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    for name in ("other.wav", "other/clip.wav"):
        soundfile.write(tmp_path / name, sine(1.0, 16000), 16000)
    with pytest.raises(UserError, match=message):
        run(versatile, versatile / "clip.wav", *flags.split())
    assert not list(tmp_path.glob("a.*"))


def test_a_clip_that_ends_at_once_does_not_cost_the_others(versatile, monkeypatch):
    soundfile.write(versatile / "second.wav", sine(1.0, 16000), 16000)

    def generate(self, x, x_lens, *args, **kwargs):
        first, second = x[0, : int(x_lens[0])], x[1, : int(x_lens[1])]
        return Generation([first, torch.cat([second, second[:10]])], x_lens.tolist(), ["eos", "length"],
                          [torch.zeros(0), torch.zeros(10)])  # fmt: skip

    monkeypatch.setattr(AudioLM, "generate", generate)
    folder = versatile / "ended"
    with pytest.raises(UserError, match="ended '.*clip.wav' at once"):
        run(versatile, f"{versatile / 'clip.wav'},{versatile / 'second.wav'}", "--output-dir", str(folder))
    assert sorted(path.name for path in folder.iterdir()) == [
        "clip_full.wav", "second_continuation.wav", "second_full.wav",
    ]  # fmt: skip
    assert len(read(folder / "second_continuation.wav")) == 10 * 320
