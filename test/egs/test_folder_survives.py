"""egs/folder on a folder as people have them: many files, some odd, some broken, none of which may stop a run."""

import base64
import io
import json
import os
import zipfile
from collections import defaultdict

import av
import numpy as np
import pytest
import soundfile
from lhotse import CutSet

SECONDS = 1.2
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
LATIN_1 = os.fsdecode(b"caf\xe9.wav")  # a name that is no UTF-8, as old archives have


def write_wav(path, wav, sample_rate, **settings):
    # By an open file: soundfile would choose the format by the suffix, and encode the name.
    with open(path, "wb") as file:
        soundfile.write(file, wav.T, sample_rate, **{"format": "WAV", **settings})


def write_with_av(path, wav, sample_rate, codec, container, bit_rate=64000, **options):
    with av.open(str(path), "w", format=container, options=options) as output:
        stream = output.add_stream(codec, rate=sample_rate, layout="mono")
        stream.bit_rate = bit_rate
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wav), format="fltp", layout="mono")
        frame.sample_rate = sample_rate
        resampler = av.AudioResampler(
            stream.codec_context.format, "mono", sample_rate, stream.codec_context.frame_size
        )
        for part in [*resampler.resample(frame), *resampler.resample(None), None]:
            output.mux(stream.encode(part))


def write_good(folder, number, make_speech):
    """Some 140 of these: nothing is wrong with them."""
    name = f"good-{number:03d}" + (".wav", ".flac")[number % 2]
    soundfile.write(folder / name, make_speech(SECONDS, 16000, seed=1000 + number).T, 16000)
    return name


def write_odd(folder, make_speech, long_seconds):
    """30 files that are fine, but not what everybody has. Returns name -> seconds."""
    seeds = iter(range(1, 100))

    def speech(sample_rate, channels=1):
        return make_speech(SECONDS, sample_rate, channels, seed=next(seeds))

    for name, rate, channels, settings in [
        ("96k.wav", 96000, 1, {"subtype": "PCM_24"}),
        ("192k.flac", 192000, 2, {"format": "FLAC", "subtype": "PCM_24"}),
        ("8000.wav", 8000, 1, {}),
        ("eight channels.wav", 48000, 8, {}),
        ("extensible.wav", 44100, 6, {"format": "WAVEX", "subtype": "PCM_24"}),
        ("8 bit.wav", 16000, 1, {"subtype": "PCM_U8"}),
        ("32 bit.wav", 44100, 2, {"subtype": "PCM_32"}),
        ("float.wav", 22050, 1, {"subtype": "FLOAT"}),
        ("double.wav", 22050, 1, {"subtype": "DOUBLE"}),
        ("telephone.wav", 8000, 1, {"subtype": "ULAW"}),
        ("adpcm.wav", 16000, 1, {"subtype": "IMA_ADPCM"}),
        ("sound.aiff", 11025, 2, {"format": "AIFF"}),
        ("sound.w64", 16000, 1, {"format": "W64"}),
        ("LOUD.WAV", 16000, 1, {}),
        ("тест 録音 é.wav", 16000, 1, {}),
        (LATIN_1, 16000, 1, {}),
        (" two  spaces .wav", 16000, 1, {}),
        ('it\'s a "quote" `$(exit 3)` & 100%d.wav', 16000, 1, {}),
        ("two\nlines.wav", 16000, 1, {}),
        ("ö" * 125 + ".wav", 16000, 1, {}),
        ("-n.wav", 16000, 1, {}),
        ("vorbis.ogg", 44100, 2, {"format": "OGG", "subtype": "VORBIS"}),
        ("voice.opus", 48000, 1, {"format": "OGG", "subtype": "OPUS"}),
        ("really an mp3.wav", 44100, 1, {"format": "MP3"}),
        ("really a wav.mp3", 16000, 1, {}),
    ]:
        write_wav(folder / name, speech(rate, channels), rate, **settings)
    write_with_av(folder / "phone.m4a", speech(44100), 44100, "aac", "mp4")
    write_with_av(folder / "really an m4a.mp3", speech(44100), 44100, "aac", "mp4")
    # The first half at six times the bit rate of the second, and no table that tells the length:
    for bit_rate in (192000, 32000):
        write_with_av(
            folder / f"{bit_rate}.part", speech(48000), 48000, "libmp3lame", "mp3", bit_rate, write_xing="0"
        )
    parts = [folder / "192000.part", folder / "32000.part"]
    (folder / "variable.mp3").write_bytes(b"".join(part.read_bytes() for part in parts))
    for part in parts:
        part.unlink()
    # As a program writes that does not know yet how long it will be:
    write_wav(folder / "piped.wav", speech(16000), 16000)
    data = bytearray((folder / "piped.wav").read_bytes())
    data[4:8] = data[40:44] = b"\xff" * 4
    (folder / "piped.wav").write_bytes(data)
    block = make_speech(10, 8000, seed=50)[0]
    with soundfile.SoundFile(folder / "long.wav", "w", 8000, 1, "PCM_U8") as file:
        for _ in range(long_seconds // 10):
            file.write(block)
    lengths = dict.fromkeys([path.name for path in folder.iterdir() if path.name[:5] != "good-"], SECONDS)
    return lengths | {"long.wav": long_seconds, "variable.mp3": 2 * SECONDS}


def write_broken(folder, make_speech):
    """30 things that cannot be used. Returns name -> words of the reason."""
    wav = make_speech(SECONDS, 16000, seed=500)
    with_nan, with_inf = wav.copy(), wav.copy()
    with_nan[0, 7000], with_inf[0, 17000] = np.nan, np.inf
    write_wav(folder / "nan.wav", with_nan, 16000, subtype="FLOAT")
    write_wav(folder / "infinite.wav", with_inf, 16000, subtype="DOUBLE")
    write_wav(folder / "scaled.wav", wav * 20000, 16000, subtype="FLOAT")
    write_wav(folder / "header only.wav", wav[:, :0], 16000)
    write_wav(folder / "short.wav", wav[:, :1600], 16000)
    write_wav(folder / "silent.wav", 0 * wav, 16000)
    write_wav(folder / "dither.flac", 1e-5 * np.sign(wav), 16000, format="FLAC", subtype="PCM_24")
    reasons = {
        "nan.wav": "1 NaN or infinite",
        "infinite.wav": "1 NaN or infinite",
        "scaled.wav": "expected -1 to 1",
        "header only.wav": "no samples",
        "short.wav": "0.10 s, shorter than --min-duration 1",
        "silent.wav": "silent",
        "dither.flac": "silent",
    }
    for name, settings, words in [
        ("cut.wav", {}, "header says 1.20 s, 0.60 s are there"),
        ("cut.aiff", {"format": "AIFF"}, "header says 1.20 s, 0.60 s are there"),
        ("cut.flac", {"format": "FLAC"}, "damaged"),
        ("cut.mp3", {"format": "MP3"}, "cut off"),
        ("cut.ogg", {"format": "OGG"}, "cut off"),
    ]:
        write_wav(folder / name, wav, 16000, **settings)
        os.truncate(folder / name, 22 + (folder / name).stat().st_size // 2)
        reasons[name] = words
    write_with_av(folder / "cut.m4a", wav, 16000, "aac", "mp4")
    os.truncate(folder / "cut.m4a", 3000)
    write_wav(folder / "hit.flac", make_speech(SECONDS, 16000, seed=501), 16000, format="FLAC")
    data = bytearray((folder / "hit.flac").read_bytes())
    data[9000:9400] = bytes(400)
    (folder / "hit.flac").write_bytes(data)
    write_wav(folder / "one hertz.wav", wav, 16000)
    data = bytearray((folder / "one hertz.wav").read_bytes())
    data[24:28] = (1).to_bytes(4, "little")
    (folder / "one hertz.wav").write_bytes(data)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("sound.wav", bytes(1000))
    contents = {
        "empty.wav": b"",
        "text.wav": b"this is no sound, whatever its name says\n" * 50,
        "page.mp3": b"<html><body>404 Not Found</body></html>",
        "half a header.wav": (folder / "cut.wav").read_bytes()[:30],
        "picture.wav": base64.b64decode(PIXEL),
        "archive.flac": archive.getvalue(),
        "list.wav": b"ffconcat version 1.0\nfile good-000.wav\n",  # FFmpeg would play the other file
        "list.m4a": b"#EXTM3U\n#EXTINF:1,\ngood-000.wav\n",
        "zeros.ogg": bytes(60000),
        **{f"random.{suffix}": np.random.default_rng(1).bytes(60000) for suffix in ("wav", "mp3")},
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "gone.wav").symlink_to(folder / "not there.wav")
    (folder / "circle.wav").symlink_to(folder / "circle.wav")
    (folder / "folder.wav").mkdir()
    os.mkfifo(folder / "pipe.wav")
    unreadable = dict.fromkeys([*contents, "cut.m4a"], "not an audio file that can be read")
    return {
        **unreadable,
        **reasons,
        "empty.wav": "empty (0 bytes)",
        "picture.wav": "",
        "hit.flac": "damaged",
        "one hertz.wav": "1 Hz",
        "gone.wav": "cannot be read (No such file",
        "circle.wav": "cannot be read (Too many levels",
        "folder.wav": "is a folder",
        "pipe.wav": "no regular file",
    }


@pytest.mark.parametrize(
    ("good", "long_seconds"), [(6, 60), pytest.param(140, 2400, marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_what_is_sound_is_used_and_what_is_broken_is_listed(
    good, long_seconds, tiny_codec, run_prepare, make_speech, tmp_path
):
    audio, data_dir = tmp_path / "audio", tmp_path / "data"
    audio.mkdir()
    lengths = {write_good(audio, number, make_speech): SECONDS for number in range(good)}
    odd = write_odd(audio, make_speech, long_seconds)
    broken = write_broken(audio, make_speech)
    assert (len(odd), len(broken)) == (30, 30)
    odd[r"caf\udce9.wav"] = odd.pop(LATIN_1)
    lengths |= odd
    options = ("--audio-dir", audio, "--data-dir", data_dir, "--codec", tiny_codec, "--min-duration", 1)
    result = run_prepare("folder", *options, "--stop-stage", 3)
    assert result.returncode == 0, result.stderr
    lines = (data_dir / "manifests" / "skipped.jsonl").read_text().splitlines()
    skipped = {item["path"]: item["reason"] for item in map(json.loads, lines)}
    assert skipped.keys() == broken.keys()
    assert not [(name, skipped[name]) for name, words in broken.items() if words not in skipped[name]]
    assert f"left out 30 of {good + 60} files" in result.stderr

    cuts = defaultdict(list)
    for cut in CutSet.from_file(data_dir / "tokenized" / "cuts_all.jsonl.gz"):
        cuts[cut.custom["source"]].append(cut)
    assert cuts.keys() == lengths.keys()
    frame_rate = json.loads((data_dir / "tokenized" / "codec.json").read_text())["frame_rate"]
    for name, seconds in lengths.items():
        # An encoder may add a frame or two.
        assert sum(cut.duration for cut in cuts[name]) == pytest.approx(seconds, abs=0.2), name
        frames = sum(len(cut.load_audio_features()) for cut in cuts[name])
        assert frames == pytest.approx(frame_rate * seconds, abs=0.2 * frame_rate + len(cuts[name])), name
        wav = cuts[name][0].load_audio()
        assert wav.shape == (1, cuts[name][0].num_samples)
        assert 0.07 < np.sqrt(np.mean(wav**2)) < 0.25, name  # as loud as it was, whatever its sample format
    assert (data_dir / "tokenized" / "skipped.jsonl").read_text() == ""
