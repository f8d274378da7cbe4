"""EnCodec, DAC and Mimi through transformers: tiny models with random weights, loaded as a user loads a folder."""

import itertools
from pathlib import Path

import pytest
import torch

from valle.codecs import load_codec
from valle.codecs.hf import HUB_IDS, NORMALIZED_RMS
from valle.utils.errors import UserError

transformers = pytest.importorskip("transformers")

KINDS = ["encodec", "encodec_noncausal", "encodec_stereo", "dac", "dac_odd_stride", "mimi"]


def _encodec(**changes):
    config = dict(
        sampling_rate=2400, upsampling_ratios=[4, 3, 2], num_filters=4, hidden_size=16, codebook_size=32,
        num_lstm_layers=1, target_bandwidths=[0.5, 1.0, 2.0],
    )  # fmt: skip
    return transformers.EncodecModel(transformers.EncodecConfig(**{**config, **changes}))


def _dac(**changes):
    config = dict(
        sampling_rate=1600, downsampling_ratios=[2, 4, 2], encoder_hidden_size=4, decoder_hidden_size=32,
        n_codebooks=3, codebook_size=32, codebook_dim=4,
    )  # fmt: skip
    return transformers.DacModel(transformers.DacConfig(**{**config, **changes}))


def _mimi():
    config = transformers.MimiConfig(
        sampling_rate=2400, upsampling_ratios=[4, 3], num_filters=4, hidden_size=16, codebook_size=32, codebook_dim=8,
        vector_quantization_hidden_dimension=8, num_quantizers=10, upsample_groups=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, intermediate_size=32, head_dim=8,
    )  # fmt: skip
    return transformers.MimiModel(config)


BUILD = {
    "encodec": _encodec,
    "encodec_noncausal": lambda: _encodec(use_causal_conv=False, target_bandwidths=[2.0]),
    "encodec_stereo": lambda: _encodec(
        audio_channels=2,
        normalize=True,
        chunk_length_s=1.0,
        overlap=0.01,
        norm_type="time_group_norm",
        use_causal_conv=False,
    ),  # fmt: skip
    "dac": _dac,
    "dac_odd_stride": lambda: _dac(downsampling_ratios=[2, 5, 2]),
    "mimi": _mimi,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One folder a kind, as `save_pretrained` writes it, with codebooks that are not all zero."""
    root = tmp_path_factory.mktemp("codecs")
    torch.manual_seed(0)
    for kind, build in BUILD.items():
        model = build()
        for name, buffer in itertools.chain(model.named_buffers(), model.named_parameters()):
            if name.endswith((".embed", ".embed_sum", "codebook.weight")):
                buffer.data.normal_(std=0.05)  # about the size of what these encoders give
        model.save_pretrained(root / kind)
    return {kind: root / kind for kind in BUILD}


def _wav(codec, num_samples: int, batch: int = 1) -> torch.Tensor:
    torch.manual_seed(1)
    return 0.1 * torch.randn(batch, codec.channels, num_samples)


@pytest.mark.parametrize("kind", KINDS)
def test_frames_match_num_frames_at_every_length(folders, kind):
    codec = load_codec(folders[kind])
    for hops, rest in itertools.product(range(1, 6), (-1, 0, 1)):
        num_samples = max(codec.hop_length, hops * codec.hop_length + rest)
        codes = codec.encode(_wav(codec, num_samples))
        assert codes.shape == (1, codec.num_frames(num_samples), codec.num_quantizers), num_samples
        assert codes.dtype == torch.int64
        assert 0 <= codes.min() and codes.max() < codec.codebook_size
        wav = codec.decode(codes)
        assert wav.shape == (1, codec.channels, codes.shape[1] * codec.hop_length)
        assert torch.isfinite(wav).all()


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_come_from_the_config(folders, kind):
    codec = load_codec(folders[kind])
    expected = {
        "encodec": (2400, 1, 24, 4, 100.0),
        "encodec_noncausal": (2400, 1, 24, 4, 100.0),
        "encodec_stereo": (2400, 2, 24, 4, 100.0),
        "dac": (1600, 1, 16, 3, 100.0),
        "dac_odd_stride": (1600, 1, 20, 3, 80.0),
        "mimi": (2400, 1, 24, 8, 100.0),
    }[kind]
    assert (
        codec.sample_rate,
        codec.channels,
        codec.hop_length,
        codec.num_quantizers,
        codec.frame_rate,
    ) == expected
    assert codec.codebook_size == 32
    assert codec.info()["fingerprint"] == load_codec(folders[kind]).info()["fingerprint"]
    assert not any(parameter.requires_grad for parameter in codec.parameters())


def test_codes_differ_between_sounds(folders):
    for kind in KINDS:
        codec = load_codec(folders[kind])
        assert len(torch.unique(codec.encode(_wav(codec, 100 * codec.hop_length)))) > 3, kind


def test_encodec_equals_transformers(folders):
    codec = load_codec(folders["encodec"])
    model = transformers.EncodecModel.from_pretrained(folders["encodec"]).eval()
    wav = _wav(codec, 1000)
    with torch.no_grad():
        reference = model.encode(wav, bandwidth=2.0)
        sound = model.decode(reference.audio_codes, reference.audio_scales).audio_values
    codes = codec.encode(wav)
    assert torch.equal(codes, reference.audio_codes[0].transpose(1, 2))
    torch.testing.assert_close(codec.decode(codes), sound)


def test_dac_equals_transformers(folders):
    codec = load_codec(folders["dac"])
    model = transformers.DacModel.from_pretrained(folders["dac"]).eval()
    wav = _wav(codec, 64 * codec.hop_length)
    with torch.no_grad():
        reference = model.encode(wav).audio_codes
        sound = model.decode(audio_codes=reference).audio_values
    codes = codec.encode(wav)
    assert torch.equal(codes, reference.transpose(1, 2))
    torch.testing.assert_close(codec.decode(codes)[:, 0, : sound.shape[-1]], sound)


def test_mimi_equals_transformers(folders):
    codec = load_codec(folders["mimi"])
    model = transformers.MimiModel.from_pretrained(folders["mimi"]).eval()
    wav = _wav(codec, 1000)
    with torch.no_grad():
        reference = model.encode(wav, num_quantizers=8).audio_codes
        sound = model.decode(reference).audio_values
    codes = codec.encode(wav)
    assert torch.equal(codes, reference.transpose(1, 2))
    torch.testing.assert_close(codec.decode(codes), sound)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_equals_one_by_one(folders, kind):
    codec = load_codec(folders[kind])
    wav = _wav(codec, 30 * codec.hop_length, batch=3)
    codes = codec.encode(wav)
    assert torch.equal(codes, torch.cat([codec.encode(row[None]) for row in wav]))
    torch.testing.assert_close(codec.decode(codes), torch.cat([codec.decode(row[None]) for row in codes]))


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_quantizers_are_the_first_ones(folders, kind):
    every = load_codec(folders[kind])
    two = load_codec(folders[kind], num_quantizers=2)
    wav = _wav(every, 20 * every.hop_length)
    codes = two.encode(wav)
    assert two.num_quantizers == 2
    assert torch.equal(codes, every.encode(wav)[..., :2])
    assert two.decode(codes).shape == every.decode(every.encode(wav)).shape
    assert two.info()["fingerprint"] != every.info()["fingerprint"]
    with pytest.raises(ValueError, match="takes"):
        two.decode(every.encode(wav))


def test_normalized_codec_ignores_the_level(folders):
    """The 48 kHz EnCodec's loudness scale is no code: same codes at any level, one level coming back."""
    codec = load_codec(folders["encodec_stereo"])
    wav = _wav(codec, 4000)  # longer than its chunk of one second
    codes = codec.encode(wav)
    assert torch.equal(codes, codec.encode(0.25 * wav))
    assert codes.shape == (1, codec.num_frames(4000), 4)
    direct = codec.model.decode(codes.transpose(1, 2)[None], [None]).audio_values
    torch.testing.assert_close(codec.decode(codes), direct * NORMALIZED_RMS)


def test_moved_codec_forgets_cached_codebooks(folders):
    codec = load_codec(folders["mimi"])
    codec.encode(_wav(codec, 100))
    codec.to("cpu")
    caches = [module._embed for module in codec.model.modules() if hasattr(module, "_embed")]
    assert caches and all(cache is None for cache in caches)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_quantizers", [0, 33])
def test_wrong_number_of_quantizers(folders, kind, num_quantizers):
    with pytest.raises(UserError, match=f"{num_quantizers} were asked for"):
        load_codec(folders[kind], num_quantizers=num_quantizers)


def test_wrong_channels(folders):
    codec = load_codec(folders["encodec_stereo"])
    with pytest.raises(ValueError, match=r"takes \(B, 2"):
        codec.encode(torch.zeros(1, 1, 100))


def test_folder_without_weights(folders, tmp_path):
    (tmp_path / "config.json").write_text((folders["dac"] / "config.json").read_text())
    with pytest.raises(UserError, match="cannot be loaded"):
        load_codec(tmp_path)


def test_weights_not_complete(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_text((folders["dac"] / "config.json").read_text())
    state = load_file(folders["dac"] / "model.safetensors")
    state.pop("decoder.conv1.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights missing or misshapen, the first: decoder\.conv1\.weight"):
        load_codec(tmp_path)


@pytest.mark.parametrize("content", ["no json", '{"model_type": "llama"}'])
def test_folder_of_something_else(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="config.json|model_type"):
        load_codec(tmp_path)


def test_weights_that_cannot_be_had(monkeypatch):
    """Offline, with nothing in the cache: one line with the hub id, the variable and the way out."""

    def offline(*arguments, **options):
        raise OSError("We couldn't connect to the hub.\nSecond line.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    for name, hub_id in HUB_IDS.items():
        with pytest.raises(UserError) as raised:
            load_codec(name)
        message = str(raised.value)
        assert hub_id in message and "HF_HUB_OFFLINE" in message and "local folder" in message
        assert "\n" not in message


def test_transformers_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'valle\[hub\]'"):
        load_codec("mimi")


def test_encodec_vectors_add_up_to_its_latents(folders):
    codec = load_codec(folders["encodec"])
    codes = codec.encode(_wav(codec, 10 * codec.hop_length))  # (B, T, Q)
    expected = codec.model.quantizer.decode(codes.permute(2, 0, 1))  # (B, D, T)
    vectors = codec.codebooks()
    added = sum(vectors[q][codes[..., q]] for q in range(codec.num_quantizers))
    torch.testing.assert_close(added.transpose(1, 2), expected)
    assert load_codec(folders["dac"]).codebooks() is None
