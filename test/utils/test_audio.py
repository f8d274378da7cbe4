"""Reading audio piece by piece."""

import tracemalloc

import av
import numpy as np
import pytest
import soundfile

from valle.utils import audio
from valle.utils.audio import AudioReader, convert_audio, convert_blocks, load_audio
from valle.utils.errors import UserError


def noise(seconds, sample_rate, channels=1, seed=0):
    shape = (int(seconds * sample_rate), channels)
    return (0.1 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def read(path, *stretch):
    with AudioReader(path, *stretch) as reader:
        return np.concatenate(list(reader), axis=1)


def write_m4a(path, samples, sample_rate):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=sample_rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), format="fltp", layout="mono")
        frame.sample_rate = sample_rate
        for part in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(part)


@pytest.mark.parametrize(("rate", "target"), [(48000, 16000), (44100, 16000), (8000, 24000), (16000, 16000)])
@pytest.mark.parametrize("channels", [(2, 1), (1, 2), (2, 2)])
def test_converted_piece_by_piece_is_bit_equal_to_converted_whole(rate, target, channels):
    wav = noise(1.5, rate, channels[0]).T
    whole = convert_audio(wav, rate, target, channels[1])
    pieces = [wav[:, start : start + 997] for start in range(0, wav.shape[1], 997)]
    joined = np.concatenate(list(convert_blocks(pieces, rate, target, channels[1])), axis=1)
    assert joined.shape == whole.shape and (joined == whole).all()


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a"])
def test_blocks_and_stretches_are_parts_of_the_whole(suffix, tmp_path, monkeypatch):
    path = tmp_path / f"a{suffix}"
    if suffix == ".m4a":
        write_m4a(path, noise(3, 24000), 24000)
    else:
        settings = {"format": "OGG", "subtype": "OPUS"} if suffix == ".opus" else {}
        soundfile.write(path, noise(3, 24000), 24000, **settings)
    whole, rate = load_audio(path)
    assert rate == 24000 and abs(whole.shape[1] - 72000) < 3000
    if suffix != ".m4a":
        assert np.allclose(soundfile.read(path, dtype="float32")[0], whole[0], atol=1e-6)
    monkeypatch.setattr(audio, "BLOCK", 1000)
    assert (read(path) == whole).all()
    assert (read(path, 0.7, 1.1) == whole[:, 16800 : 16800 + 26400]).all()
    assert (read(path, 2.5) == whole[:, 60000:]).all()
    assert read(path, 2.5, 100.0).shape == whole[:, 60000:].shape
    with pytest.raises(UserError, match="no samples from 4 s on"):
        read(path, 4.0)


@pytest.mark.parametrize("suffix", [".wav", ".m4a"])
def test_memory_does_not_grow_with_the_length(suffix, tmp_path):
    path = tmp_path / f"long{suffix}"
    seconds, rate = 200, 44100
    if suffix == ".m4a":
        write_m4a(path, noise(seconds, rate), rate)
    else:
        soundfile.write(path, noise(seconds, rate), rate)
    tracemalloc.start()
    try:
        with AudioReader(path) as reader:
            num_samples = sum(part.shape[1] for part in convert_blocks(reader, rate, 16000, 1))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert abs(num_samples - seconds * 16000) < 2000
    assert peak < 4e6 < seconds * rate * 4 / 8  # bytes; an eighth of the samples


def test_a_file_that_ends_before_its_header_says_is_an_error(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(2, 16000), 16000)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 8000])  # a quarter of a second: encoders are that far off
    assert load_audio(path)[0].shape == (1, 28000)
    path.write_bytes(content[: len(content) - 32000])
    with pytest.raises(UserError, match=r"header says 2\.00 s, 1\.00 s are there"):
        load_audio(path)
    assert read(path, 0.25, 0.5).shape == (1, 8000)  # what is there can be asked for


def test_bad_samples_are_told_with_their_place(tmp_path):
    path = tmp_path / "a.wav"
    samples = noise(20, 16000)
    samples[300000] = np.inf
    soundfile.write(path, samples, 16000, subtype="FLOAT")
    with pytest.raises(UserError, match=r"has 1 NaN or infinite samples from 16\.38 s on"):
        load_audio(path)
