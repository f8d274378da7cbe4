"""The project's own codec: its parts against references, its shapes, its training stages, the shipped weights."""

import numpy as np
import pytest
import torch

from valle.codecs import load_codec
from valle.codecs.spectral_codec import SpectralCodec, SpectralCodecConfig
from valle.codecs.training import CodecTraining
from valle.modules.quantizer import ResidualQuantizer
from valle.modules.spectral import InverseSpectrogram, Spectrogram, mel_filterbank
from valle.utils.errors import UserError

SMALL = SpectralCodecConfig(
    codebook_size=16, latent_dim=8, encoder_dim=16, encoder_depth=2, decoder_dim=16, decoder_depth=2
)


def small_codec():
    torch.manual_seed(0)
    codec = SpectralCodec(SMALL)
    with torch.no_grad():
        for codebook in codec.quantizer.codebooks:
            codebook.entries.normal_()
    return codec.eval()


def test_spectrogram_and_inverse_are_inverses():
    torch.manual_seed(0)
    wav = torch.randn(2, 3200)
    forward, inverse = Spectrogram(640, 160), InverseSpectrogram(640, 160)
    pad = 640 - 160
    frames = torch.nn.functional.pad(wav, (pad // 2, pad - pad // 2)).unfold(-1, 640, 160) * forward.window
    spectrum = torch.fft.rfft(frames)
    torch.testing.assert_close(forward(wav), spectrum.abs())
    torch.testing.assert_close(inverse(spectrum), wav, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sample_rate,n_fft,n_mels", [(16000, 640, 80), (24000, 1024, 100), (16000, 400, 80)])
def test_mel_filters_equal_transformers(sample_rate, n_fft, n_mels):
    audio_utils = pytest.importorskip("transformers.audio_utils")
    expected = audio_utils.mel_filter_bank(
        n_fft // 2 + 1, n_mels, 0.0, sample_rate / 2, sample_rate, norm="slaney", mel_scale="slaney"
    )
    np.testing.assert_allclose(mel_filterbank(sample_rate, n_fft, n_mels).numpy(), expected.T, atol=1e-5)


def test_residual_quantizer_takes_the_nearest_entries():
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(4, 3, 7).eval()
    for codebook in quantizer.codebooks:
        codebook.entries.normal_()
    x = torch.randn(2, 5, 4)
    codes = quantizer.encode(x)
    for b in range(2):
        for t in range(5):
            residual = x[b, t]
            for q, codebook in enumerate(quantizer.codebooks):
                distances = ((codebook.entries - residual) ** 2).sum(1)
                assert int(distances.argmin()) == int(codes[b, t, q])
                residual = residual - codebook.entries[codes[b, t, q]]
            torch.testing.assert_close(quantizer.decode(codes)[b, t], x[b, t] - residual)
    quantized = quantizer(x)
    assert torch.equal(quantized.codes, codes)
    torch.testing.assert_close(quantized.values, quantizer.decode(codes))


def test_codebooks_learn_clusters_and_gradients_pass_straight_through():
    torch.manual_seed(0)
    centres = torch.randn(4, 8) * 5
    quantizer = ResidualQuantizer(8, 1, 4).train()
    for _ in range(60):
        x = (centres[torch.randint(4, (2, 50))] + 0.1 * torch.randn(2, 50, 8)).requires_grad_()
        quantized = quantizer(x)
    assert float((quantized.values - x).square().mean()) < 0.05
    quantized.values.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("num_samples", [1, 319, 320, 321, 6400, 6401])
def test_shapes(num_samples):
    codec = small_codec()
    codes = codec.encode(torch.randn(2, 1, num_samples) * 0.1)
    assert codes.shape == (2, codec.num_frames(num_samples), 4) and codes.dtype == torch.int64
    assert codec.decode(codes).shape == (2, 1, codes.shape[1] * 320)


def test_fewer_quantizers_are_the_first_ones(tmp_path):
    small_codec().save(tmp_path / "codec")
    whole, two = load_codec(tmp_path / "codec"), load_codec(tmp_path / "codec", num_quantizers=2)
    wav = torch.randn(1, 1, 3200) * 0.1
    assert torch.equal(two.encode(wav), whole.encode(wav)[..., :2])
    assert two.decode(two.encode(wav)).shape == (1, 1, 3200) and two.info()["num_quantizers"] == 2
    assert two.codebooks().shape == (2, 16, 8)


def test_a_batch_gives_what_one_by_one_gives():
    codec = small_codec()
    wav = torch.randn(3, 1, 6400) * 0.1
    together = codec.encode(wav)
    assert torch.equal(together, torch.cat([codec.encode(row[None]) for row in wav]))
    torch.testing.assert_close(
        codec.decode(together), torch.cat([codec.decode(row[None]) for row in together])
    )


def test_saving_and_loading_keeps_codes_and_fingerprint(tmp_path):
    codec = small_codec().half().float()  # files hold half precision
    codec.save(tmp_path / "codec")
    loaded = load_codec(tmp_path / "codec")
    wav = torch.randn(1, 1, 6400) * 0.1
    assert torch.equal(codec.encode(wav), loaded.encode(wav))
    assert codec.fingerprint() == loaded.fingerprint() != small_codec().fingerprint()[::-1]
    assert loaded.info()["num_quantizers"] == 4 and loaded.info()["frame_rate"] == 50.0
    (tmp_path / "codec" / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="do not fit"):
        load_codec(tmp_path / "codec")


def test_bad_codes_and_names_are_named():
    codec = small_codec()
    with pytest.raises(UserError, match="0 to 15"):
        codec.decode(torch.full((1, 3, 4), 16))
    with pytest.raises(UserError, match="up to 4"):
        codec.decode(torch.zeros(1, 3, 5, dtype=torch.long))
    with pytest.raises(UserError, match="unknown codec 'nonsense'"):
        load_codec("nonsense")
    with pytest.raises(UserError, match="4 quantizers, 9"):
        load_codec(num_quantizers=9)


def test_stage_one_learns_and_stage_two_keeps_the_codes():
    torch.manual_seed(0)
    model = CodecTraining(SpectralCodec(SMALL))
    time = torch.arange(6400) / 16000
    pitch = torch.tensor([220.0, 440.0, 660.0, 880.0])[:, None]
    batch = {"wav": (0.3 * torch.sin(2 * torch.pi * pitch * time))[:, None]}
    optimizer = torch.optim.AdamW([p for _, p in model.stage_parameters(1)], 3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        result = model.train().compute_loss(batch, 1)
        (result.loss / result.num_targets).backward()
        optimizer.step()
        losses.append(result.metrics["mel"][0] / result.metrics["mel"][1])
    assert losses[-1] < 0.6 * losses[0]
    names = {name for name, _ in model.stage_parameters(2)}
    assert names and not any("encoder" in n or "quantizer" in n or "to_latent" in n for n in names)
    before = model.codec.eval().encode(batch["wav"])
    optimizer = torch.optim.AdamW([p for _, p in model.stage_parameters(2)], 1e-3)
    for _ in range(3):
        model.zero_grad()
        result = model.train().compute_loss(batch, 2)
        (result.loss / result.num_targets).backward()
        optimizer.step()
    assert {"adversarial", "features", "discriminator"} <= set(result.metrics)
    assert torch.equal(model.codec.eval().encode(batch["wav"]), before)


def test_generator_and_discriminator_get_their_own_gradients():
    """One backward pass for both: each side's weights only feel its own loss."""
    torch.manual_seed(0)
    model = CodecTraining(SpectralCodec(SMALL))
    wav, estimate = torch.randn(2, 4096) * 0.1, (torch.randn(2, 4096) * 0.1).requires_grad_()
    fool, features, judge = model._adversarial(estimate, wav)
    weights = list(model.discriminators.parameters())
    assert all(
        g is None for g in torch.autograd.grad(fool + features, weights, retain_graph=True, allow_unused=True)
    )
    assert torch.autograd.grad(judge, [estimate], retain_graph=True, allow_unused=True)[0] is None
    assert torch.autograd.grad(fool, [estimate], retain_graph=True)[0].abs().sum() > 0
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(judge, [weights[1], weights[4]]))


def test_the_shipped_codec_codes_speech_like_sound():
    """Real weights: the resynthesis of a vowel-like sound is less than half as far from it as silence is."""
    codec = load_codec()
    assert (codec.sample_rate, codec.hop_length, codec.num_quantizers, codec.codebook_size) == (
        16000,
        320,
        4,
        1024,
    )
    time = np.arange(32000) / 16000
    pitch = 2 * np.pi * np.cumsum(180 + 20 * np.sin(2 * np.pi * 3 * time)) / 16000
    wav = sum(np.sin(k * pitch) * a for k, a in ((1, 0.5), (2, 0.4), (3, 0.3), (4, 0.35), (5, 0.2), (8, 0.1)))
    wav = torch.tensor(0.2 * wav * (0.3 + 0.7 * np.abs(np.sin(2 * np.pi * 2 * time))), dtype=torch.float32)[
        None, None
    ]
    codes = codec.encode(wav)
    out = codec.decode(codes)
    distance = CodecTraining(codec).mel_distance
    assert codes.shape == (1, 100, 4) and torch.isfinite(out).all() and float(out.abs().max()) <= 1.5
    assert float(distance(out[:, 0], wav[:, 0])) < 0.5 * float(
        distance(torch.zeros_like(wav[:, 0]), wav[:, 0])
    )
