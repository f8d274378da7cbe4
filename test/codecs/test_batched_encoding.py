"""Recordings encoded together, or in pieces, get the codes that each gets alone and whole."""

import pytest
import torch
from test_hf import KINDS, folders  # noqa: F401 - a fixture

from valle.codecs import base, load_codec

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def own():
    return load_codec()


def _noise(codec, lengths):
    generator = torch.Generator().manual_seed(2)
    levels = torch.linspace(0.05, 0.6, len(lengths))
    return [
        level * torch.randn(codec.channels, length, generator=generator)
        for level, length in zip(levels, lengths, strict=True)
    ]


def _check(codec, wavs):
    together = codec.encode_batch(wavs)
    assert len(together) == len(wavs)
    for wav, codes in zip(wavs, together, strict=True):
        alone = codec.encode(wav[None])[0]
        assert codes.shape == (codec.num_frames(wav.shape[-1]), codec.num_quantizers)
        assert torch.equal(codes, alone), wav.shape


def test_own_codec_pads_and_nobody_can_tell(own, one_thread):
    hop = own.hop_length
    lengths = [1, hop - 1, hop, hop + 1, 3 * hop, 20 * hop + 7, 100 * hop, 100 * hop, 64000]
    _check(own, _noise(own, lengths))
    _check(own, _noise(own, lengths[::-1]))
    # Beside other rows, in another order, the same.
    wavs = _noise(own, [5000, 30000])
    first = own.encode_batch(wavs)
    second = own.encode_batch([torch.ones(1, 80000), wavs[1], wavs[0]])
    assert torch.equal(first[0], second[2]) and torch.equal(first[1], second[1])


def test_own_codec_encodes_lengths_together(own, monkeypatch):
    calls = []
    latents = own.latents
    monkeypatch.setattr(own, "latents", lambda wav, mask=None: calls.append(len(wav)) or latents(wav, mask))
    own.encode_batch(_noise(own, [1000, 3000, 2000]))
    assert calls == [3]


def test_own_codec_keeps_to_fewer_quantizers(own):
    codec = load_codec(num_quantizers=2)
    wavs = _noise(codec, [4000, 9000])
    for few, every in zip(codec.encode_batch(wavs), own.encode_batch(wavs), strict=True):
        assert torch.equal(few, every[:, :2])


@pytest.mark.parametrize("kind", KINDS)
def test_codecs_of_transformers(folders, kind):  # noqa: F811
    codec = load_codec(folders[kind])
    hop = codec.hop_length
    _check(codec, _noise(codec, [30 * hop, 30 * hop + 5, 7 * hop - 1, 30 * hop, 12 * hop, 7 * hop - 1]))


@pytest.mark.parametrize("kind", KINDS)
def test_codecs_of_transformers_never_pad(folders, kind, monkeypatch):  # noqa: F811
    codec = load_codec(folders[kind])
    shapes = []
    encode = codec.encode
    monkeypatch.setattr(codec, "encode", lambda wav: shapes.append(tuple(wav.shape[::2])) or encode(wav))
    codec.encode_batch(_noise(codec, [500, 700, 500]))
    assert shapes == [(2, 500), (1, 700)]


def _shorten(monkeypatch, long, piece, context=10.0):
    monkeypatch.setattr(base, "LONG_SECONDS", long)
    monkeypatch.setattr(base, "PIECE_SECONDS", piece)
    monkeypatch.setattr(base, "CONTEXT_SECONDS", context)


def _pieces_of(codec, monkeypatch):
    """Lengths in seconds of what is encoded at once."""
    lengths = []
    encode = codec._encode_piece
    monkeypatch.setattr(
        codec, "_encode_piece", lambda wav: lengths.append(wav.shape[-1] / codec.sample_rate) or encode(wav)
    )
    return lengths


def test_a_long_recording_in_pieces_equals_the_whole(own, monkeypatch, one_thread):
    wav = _noise(own, [16000 * 9 + 77])[0]
    whole = own.encode(wav[None])[0]
    lengths = _pieces_of(own, monkeypatch)
    _shorten(monkeypatch, 4.0, 2.0)
    short = wav[:, :16000]
    pieces, other = own.encode_batch([wav, short])
    assert torch.equal(pieces, whole)
    assert torch.equal(other, own.encode(short[None])[0])
    assert len(lengths) == 5 and max(lengths) <= 2.0 + 2 * own.encode_reach / own.frame_rate


@pytest.mark.parametrize("kind", ["dac", "dac_odd_stride"])
def test_dac_in_pieces_equals_the_whole(folders, kind, monkeypatch):  # noqa: F811
    codec = load_codec(folders[kind])
    wav = _noise(codec, [codec.sample_rate * 9 + 5])[0]
    whole = codec.encode(wav[None])[0]
    _shorten(monkeypatch, 4.0, 1.0)
    assert codec.encode_reach < 1.0 * codec.frame_rate
    assert torch.equal(codec.encode_batch([wav])[0], whole)


@pytest.mark.parametrize("kind", ["encodec", "encodec_noncausal", "mimi"])
def test_unbounded_reach_in_pieces_comes_close(folders, kind, monkeypatch):  # noqa: F811
    """A recurrent layer and attention forget what is far off."""
    codec = load_codec(folders[kind])
    assert codec.encode_reach is None
    wav = _noise(codec, [codec.sample_rate * 12 + 5])[0]
    whole = codec.encode(wav[None])[0]
    _shorten(monkeypatch, 8.0, 4.0, 4.0)
    pieces = codec.encode_batch([wav])[0]
    assert pieces.shape == whole.shape
    assert (pieces == whole).float().mean() > 0.99


def test_pieces_have_one_level(folders, monkeypatch):  # noqa: F811
    """A codec that normalizes does so over the recording: a quiet part is not made loud because it is a piece."""
    codec = load_codec(folders["encodec_stereo"])
    wav = _noise(codec, [codec.sample_rate * 12])[0]
    wav[:, : codec.sample_rate * 6] *= 0.01
    levels = []
    encode = codec._encode_piece
    monkeypatch.setattr(
        codec, "_encode_piece", lambda wav: levels.append(float(wav.pow(2).mean().sqrt())) or encode(wav)
    )
    _shorten(monkeypatch, 4.0, 3.0, 0.0)
    codes = codec.encode_batch([wav])[0]
    assert codes.shape == (codec.num_frames(wav.shape[-1]), codec.num_quantizers)
    assert levels[0] == pytest.approx(0.01 * levels[-1], rel=0.1)
    assert torch.equal(codes, codec.encode_batch([0.25 * wav])[0])
