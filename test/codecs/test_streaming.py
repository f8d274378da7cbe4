"""Decoding in pieces against decoding at once: the same length, the same sound, no click at a seam. And the sink."""

import io
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from valle.codecs import Codec, load_codec
from valle.codecs.spectral_codec import SpectralCodec, SpectralCodecConfig
from valle.codecs.streaming import StreamDecoder
from valle.utils.audio import AudioSink, convert_audio, load_audio, save_audio
from valle.utils.errors import UserError

RECORDINGS = Path(__file__).resolve().parents[3] / "shared" / "data" / "maps"


def cut(codes: Tensor, sizes: list[int]) -> list[Tensor]:
    """(T, Q) in pieces of these sizes, the last size repeated to the end."""
    pieces, start = [], 0
    while start < len(codes):
        size = sizes[min(len(pieces), len(sizes) - 1)]
        pieces.append(codes[start : start + size])
        start += size
    return pieces


def stream(decoder: StreamDecoder, codes: Tensor, *sizes: int) -> list[Tensor]:
    return [decoder.push(piece) for piece in cut(codes, list(sizes))] + [decoder.flush()]


def snr(estimate: Tensor, reference: Tensor) -> float:
    """Decibels."""
    return float(10 * torch.log10(reference.square().sum() / (estimate - reference).square().sum()))


def clicks(wav: Tensor, seams: list[int], sample_rate: int) -> float:
    """Share of the seams that stand out as a click does.

    A click bends the waveform far more than what is around it. Measured at a place: the largest second difference
    within 2 ms, over the mean within 40 ms. A seam stands out if this is more than at 99 of 100 places that are no
    seams, so of seams that cannot be heard about 1 % do.

    Args:
        wav: (1, N).
        seams: samples at which something may have been joined.
        sample_rate: Hz.
    """
    bend = torch.nn.functional.pad(wav.diff(n=2).abs(), (1, 1))
    near, around = round(0.002 * sample_rate), round(0.04 * sample_rate)
    peak = torch.nn.functional.max_pool1d(bend, 2 * near + 1, 1, near)[0]
    mean = torch.nn.functional.avg_pool1d(bend, 2 * around + 1, 1, around, count_include_pad=False)[0]
    measure = peak / (mean + 1e-5)
    elsewhere = torch.ones(len(measure), dtype=torch.bool)
    for seam in seams:
        elsewhere[max(0, seam - around) : seam + around] = False
    usual = torch.quantile(measure[elsewhere][::16], 0.99)
    return float((measure[torch.tensor(seams)] > usual).float().mean())


def seams_of(pieces: list[Tensor]) -> list[int]:
    """Where each piece that follows sound begins, and where its blending ends: 10 ms later, at 16 kHz."""
    ends = np.cumsum([piece.shape[-1] for piece in pieces])
    return [int(place) for end in ends[:-1] if end for place in (end, end + 160) if place < ends[-1]]


def small_codec(**changes: int) -> SpectralCodec:
    torch.manual_seed(0)
    config = dict(
        codebook_size=16, latent_dim=8, encoder_dim=8, encoder_depth=1, decoder_dim=8, decoder_depth=2
    )
    codec = SpectralCodec(SpectralCodecConfig(**{**config, **changes})).eval()
    with torch.no_grad():
        for codebook in codec.quantizer.codebooks:
            codebook.entries.normal_()
    return codec


def some_codes(codec: Codec, frames: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(codec.codebook_size, (frames, codec.num_quantizers), generator=generator)


@pytest.fixture(scope="module")
def shipped() -> Codec:
    return load_codec()


def _vowels() -> np.ndarray:
    """20 s at 16 kHz of a voice-like sound whose pitch and loudness move."""
    time = np.arange(20 * 16000) / 16000
    pitch = 2 * np.pi * np.cumsum(180 + 60 * np.sin(2 * np.pi * 0.31 * time)) / 16000
    wav = sum(np.sin(k * pitch) * a for k, a in ((1, 0.5), (2, 0.4), (3, 0.3), (4, 0.35), (5, 0.2), (8, 0.1)))
    return (0.2 * wav * (0.3 + 0.7 * np.abs(np.sin(2 * np.pi * 0.9 * time))))[None].astype(np.float32)


def _piano() -> np.ndarray:
    paths = sorted(RECORDINGS.glob("*.flac"))
    if not paths:
        pytest.skip(f"no recordings in {RECORDINGS}")
    wav, sample_rate = load_audio(paths[0])
    return convert_audio(wav[:, 20 * sample_rate : 40 * sample_rate], sample_rate, 16000, 1)


@pytest.fixture(scope="module", params=[_vowels, _piano])
def sound(request, shipped) -> tuple[Tensor, Tensor]:
    """codes (T, Q) of 20 s and what the codec makes of them at once, (1, N)."""
    codes = shipped.encode(torch.from_numpy(request.param())[None])[0]
    return codes, shipped.decode(codes[None])[0]


@pytest.mark.parametrize(
    "changes", [{}, {"decoder_kernel": 3}, {"decoder_depth": 3}, {"n_fft": 1280}, {"hop_length": 640}]
)
def test_context_is_the_reach_of_the_own_codec(changes):
    codec = small_codec(**changes)
    reach = codec.context_frames
    latents = torch.randn(1, 2 * reach + 9, 8, requires_grad=True)
    frame = reach + 4
    wav = codec.synthesize(latents)[0, 0].view(-1, codec.hop_length)[frame]
    wav.abs().sum().backward()
    seen = latents.grad.abs().sum(-1)[0].nonzero()[:, 0]
    assert (frame - int(seen.min()), int(seen.max()) - frame) == (reach, reach)


@pytest.mark.parametrize("sizes", [(1,), (7,), (60,), (3, 1, 40, 2, 2, 9), (500,)])
def test_with_whole_context_the_stream_is_the_whole(sizes):
    codec = small_codec()
    codes = some_codes(codec, 200)
    whole = codec.decode(codes[None])[0]
    for lookahead in (codec.context_frames, codec.context_frames + 5):
        joined = torch.cat(stream(StreamDecoder(codec, lookahead), codes, *sizes), 1)
        torch.testing.assert_close(joined, whole, atol=1e-5, rtol=0)
    shorter = torch.cat(stream(StreamDecoder(codec, 0), codes, 7), 1)
    assert (shorter - whole).abs().max() > 1e-3  # so the equality above is not by chance


@pytest.mark.parametrize("lookahead", [0, 1, 5, None])
@pytest.mark.parametrize("frames", [0, 1, 2, 30])
def test_pieces_come_as_soon_as_they_are_final_and_none_is_lost(lookahead, frames):
    codec = small_codec()
    codes = some_codes(codec, frames)
    decoder = StreamDecoder(codec, lookahead)
    assert decoder.delay == (5 if lookahead is None else lookahead) * 320 + 160
    given = 0
    for received, piece in enumerate(codes[:, None], 1):
        given += decoder.push(piece).shape[1]
        assert given == max(0, received * 320 - decoder.delay)
        assert decoder.push(piece[:0]).shape == (1, 0)
    rest = decoder.flush()
    assert rest.shape == (1, frames * 320 - given)
    assert decoder.flush().shape == (1, 0)


def test_a_window_is_the_context_what_is_held_back_and_the_piece(monkeypatch):
    codec = small_codec()
    windows = []
    decode = codec.decode
    monkeypatch.setattr(codec, "decode", lambda codes: windows.append(codes.shape[1]) or decode(codes))
    decoder = StreamDecoder(codec, 5)
    decoder.prime(some_codes(codec, 70))
    stream(decoder, some_codes(codec, 60), 20)
    context, held = codec.context_frames, 6  # 5 frames and 160 samples
    assert windows == [context + 20, *[context + held + 20] * 2, context + held]


def test_the_same_pieces_give_the_same_samples_and_a_flushed_decoder_is_as_new(one_thread):
    codec = small_codec()
    codes = some_codes(codec, 90)
    decoder = StreamDecoder(codec, 1)
    first = torch.cat(stream(decoder, codes, 9, 30, 1), 1)
    assert torch.equal(first, torch.cat(stream(decoder, codes, 9, 30, 1), 1))
    assert not torch.equal(first, torch.cat(stream(decoder, codes, 10), 1))


def test_a_primed_stream_begins_as_within_the_whole():
    codec = small_codec()
    codes = some_codes(codec, 120)
    whole = codec.decode(codes[None])[0]
    for prompt in (3, 50):
        decoder = StreamDecoder(codec, codec.context_frames)
        decoder.prime(codes[:prompt])
        joined = torch.cat(stream(decoder, codes[prompt:], 8), 1)
        torch.testing.assert_close(joined, whole[:, prompt * 320 :], atol=1e-5, rtol=0)
    decoder = StreamDecoder(codec)
    unprimed = torch.cat(stream(decoder, codes[50:], 8), 1)
    assert (unprimed - whole[:, 50 * 320 :])[:, :320].abs().max() > 1e-3
    decoder.push(codes[:1])
    with pytest.raises(ValueError, match="comes first"):
        decoder.prime(codes)


def test_no_seam_clicks(shipped, sound):
    codes, whole = sound
    pieces = stream(StreamDecoder(shipped), codes, 10)
    joined = torch.cat(pieces, 1)
    assert joined.shape == whole.shape
    assert snr(joined, whole) > 30
    assert clicks(joined, seams_of(pieces), 16000) <= 0.05
    hasty = stream(StreamDecoder(shipped, lookahead=0), codes, 10)  # not the same sound, but no clicks either
    assert snr(torch.cat(hasty, 1), whole) < 25
    assert clicks(torch.cat(hasty, 1), seams_of(hasty), 16000) <= 0.1


def test_the_measure_hears_what_pieces_without_context_do(shipped, sound):
    codes, whole = sound
    pieces = [shipped.decode(piece[None])[0] for piece in cut(codes, [10])]
    places = seams_of(pieces)[::2]
    assert clicks(torch.cat(pieces, 1), places, 16000) > 0.5
    assert clicks(whole, places, 16000) <= 0.05


KINDS = ["encodec", "encodec_noncausal", "encodec_stereo", "dac", "dac_odd_stride", "mimi"]


@pytest.fixture(scope="module", params=KINDS)
def hub_codec(request) -> Codec:
    """Those of test_hf, tiny and with random weights."""
    pytest.importorskip("transformers")
    import test_hf

    from valle.codecs.hf import WRAPPERS

    torch.manual_seed(0)
    model = test_hf.BUILD[request.param]().requires_grad_(False).eval()
    for name, values in [*model.named_buffers(), *model.named_parameters()]:
        if name.endswith((".embed", ".embed_sum", "codebook.weight")):
            values.normal_()
    return WRAPPERS[model.config.model_type][1](request.param, model, None)


def test_every_codec_streams(hub_codec):
    codes = some_codes(hub_codec, 260)
    whole = hub_codec.decode(codes[None])[0]
    for sizes in ((1, 2, 50), (25,)):
        joined = torch.cat(stream(StreamDecoder(hub_codec), codes, *sizes), 1)
        assert joined.shape == whole.shape and torch.isfinite(joined).all()
        if hub_codec.name != "encodec_stereo":  # normalizes over time: every window has its own level
            assert snr(joined, whole) > 25, sizes


def test_reach_and_causality_are_the_models(hub_codec):
    codes = some_codes(hub_codec, 200)
    other = codes.clone()
    other[100] = (other[100] + 1) % hub_codec.codebook_size
    difference = (hub_codec.decode(codes[None]) - hub_codec.decode(other[None]))[0].abs().amax(0)
    frames = difference.view(200, hub_codec.hop_length).amax(1)
    assert hub_codec.causal == (hub_codec.name in ("encodec", "mimi"))
    lookahead = 0 if hub_codec.causal else math.ceil(0.1 * hub_codec.frame_rate)
    blend = min(hub_codec.hop_length, round(0.01 * hub_codec.sample_rate))
    assert StreamDecoder(hub_codec).delay == lookahead * hub_codec.hop_length + blend
    assert (float(frames[:100].max()) < 1e-7) == hub_codec.causal
    if hub_codec.name.startswith("dac"):
        latents = torch.randn(1, hub_codec.model.config.hidden_size, 200, requires_grad=True)
        wav = hub_codec.model.decoder(latents)[0, 0, 100 * hub_codec.hop_length :][: hub_codec.hop_length]
        wav.abs().sum().backward()
        seen = latents.grad.abs().sum(1)[0].nonzero()[:, 0]
        reach = max(100 - int(seen.min()), int(seen.max()) - 100)
        assert reach <= hub_codec.context_frames <= reach + 1
        joined = torch.cat(stream(StreamDecoder(hub_codec, hub_codec.context_frames), codes, 30), 1)
        torch.testing.assert_close(joined, hub_codec.decode(codes[None])[0], atol=1e-5, rtol=0)
    else:
        assert hub_codec.context_frames == 100  # one second


def test_misuse_is_named():
    codec = small_codec()
    with pytest.raises(UserError, match="lookahead of -1 frames"):
        StreamDecoder(codec, -1)
    decoder = StreamDecoder(codec)
    with pytest.raises(ValueError, match=r"\(1, 5, 4\), expected \(T, Q\)"):
        decoder.push(some_codes(codec, 5)[None])
    decoder.push(some_codes(codec, 1))
    with pytest.raises(ValueError, match=r"\(1, 3\), expected \(T, 4\)"):
        decoder.push(some_codes(codec, 1)[:, :3])
    codec.decode = lambda codes: torch.zeros(1, 1, 7)
    with pytest.raises(ValueError, match="7 samples of 9 frames"):
        decoder.push(some_codes(codec, 8))


def _noise(channels: int, samples: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.5, (channels, samples)).astype(np.float32)  # some beyond 1


@pytest.mark.parametrize("channels", [1, 2])
def test_sink_writes_what_save_audio_writes(tmp_path, channels):
    wav = _noise(channels, 1000)
    save_audio(tmp_path / "at_once.wav", wav, 16000)
    with AudioSink(tmp_path / "new" / "pieces.wav", 16000, channels) as sink:
        assert all(sink.write(piece) for piece in np.split(wav, [0, 1, 400, 999], axis=1))
    assert sink.write(wav) is False  # closed
    header = soundfile.info(tmp_path / "new" / "pieces.wav")
    assert (header.samplerate, header.channels, header.subtype) == (16000, channels, "PCM_16")
    expected, _ = soundfile.read(tmp_path / "at_once.wav", dtype="int16")
    found, _ = soundfile.read(tmp_path / "new" / "pieces.wav", dtype="int16")
    assert found.shape[0] == 1000 and np.array_equal(found, expected)


def test_sink_leaves_a_whole_file_behind_every_piece(tmp_path):
    path = tmp_path / "cut_short.wav"
    sink = AudioSink(path, 16000, 1)
    for written in (0, 300, 1000):
        sink.write(_noise(1, written - soundfile.info(path).frames))
        content = path.read_bytes()  # as a process killed here leaves it
        assert len(content) == 44 + 2 * written
        assert soundfile.read(io.BytesIO(content))[0].shape == (written,)
    sink.close()
    assert path.read_bytes() == content


def test_sink_writes_raw_samples_to_stdout(capsysbinary):
    with AudioSink("-", 16000, 2) as sink:
        assert sink.write(np.array([[0.5, -1.5], [0.0, -0.25]], np.float32))
    assert capsysbinary.readouterr().out == np.array([16384, 0, -32768, -8192], "<i2").tobytes()


def test_sink_ends_cleanly_when_the_reader_of_stdout_goes():
    program = """
import numpy, sys
from valle.utils.audio import AudioSink
with AudioSink("-", 16000, 1) as sink:
    for pieces in range(1000):
        if not sink.write(numpy.zeros((1, 10000), numpy.float32)):
            break
print("to nobody")
print(pieces, file=sys.stderr)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.read(40000) == bytes(40000)
    process.stdout.close()
    message = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 0
    assert 1 <= int(message) < 100  # one line: no traceback


def test_sink_names_what_it_cannot_write(tmp_path):
    with pytest.raises(UserError, match=r"a\.flac': expected a \.wav file"):
        AudioSink(tmp_path / "a.flac", 16000, 1)
    (tmp_path / "folder.wav").mkdir()
    with pytest.raises(UserError, match=r"folder\.wav' cannot be written: Is a directory"):
        AudioSink(tmp_path / "folder.wav", 16000, 1)
    with pytest.raises(ValueError, match=r"takes \(2, n\), got \(1, 3\)"), AudioSink("-", 16000, 2) as sink:
        sink.write(_noise(1, 3))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("target", ["file", "stdout"])
def test_sink_says_once_that_the_disk_is_full(tmp_path, target):
    (tmp_path / "full.wav").symlink_to("/dev/full")
    path = "-" if target == "stdout" else str(tmp_path / "full.wav")
    program = f"""
import numpy
from valle.utils.audio import AudioSink
from valle.utils.command import run
def main(argv):
    with AudioSink({path!r}, 16000, 1) as sink:
        sink.write(numpy.zeros((1, 10), numpy.float32))
run(main, [])
"""
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert process.returncode == 2
    assert process.stderr == f"error: audio stream '{path}' cannot be written: No space left on device\n"
