"""How the project's own codec learns, in two stages.

Stage 1 trains everything on spectral distances. Stage 2 freezes encoder and codebooks, so that the codes stay what
they are and language models trained on them stay valid, and trains the decoder on, against a discriminator that
looks at complex spectra in three resolutions: spectral distances alone leave the phase, and so the voice, buzzing.

Sources: least-squares adversarial and feature-matching loss as in HiFi-GAN (arXiv 2010.05646, eqs. 1-4);
spectral discriminators as in UnivNet and DAC (arXiv 2306.06546, section 3.4).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from valle.codecs.spectral_codec import SpectralCodec
from valle.modules.spectral import LogMel

MEL_SCALES = (
    (128, 32, 10),
    (256, 64, 20),
    (512, 128, 40),
    (1024, 256, 80),
    (2048, 512, 120),
)  # n_fft, hop, bands
DISCRIMINATOR_SCALES = ((1024, 256), (512, 128), (256, 64))  # n_fft, hop
WEIGHTS = {"mel": 15.0, "commitment": 3.0, "adversarial": 1.0, "features": 2.0}


class CodecLoss(NamedTuple):
    """Loss sum over the batch's frames, number of frames, and metrics name -> (sum, count)."""

    loss: Tensor
    num_targets: int
    metrics: dict[str, tuple[float, int]]


class MelDistance(nn.Module):
    """Mean absolute difference of natural-log mel spectra, averaged over five resolutions."""

    def __init__(self, sample_rate: int) -> None:
        super().__init__()
        self.scales = nn.ModuleList(LogMel(sample_rate, *scale, floor=1e-4) for scale in MEL_SCALES)

    def forward(self, estimate: Tensor, target: Tensor) -> Tensor:
        total = torch.zeros((), device=estimate.device)
        for scale in self.scales:
            total = total + (scale(estimate) - scale(target)).abs().mean()
        return total / len(self.scales)


class SpectralDiscriminator(nn.Module):
    """Judges real and imaginary parts of one short-time spectrum, patch by patch."""

    window: Tensor

    def __init__(self, n_fft: int, hop_length: int, width: int = 16) -> None:
        super().__init__()
        self.n_fft, self.hop_length = n_fft, hop_length
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        norm = nn.utils.parametrizations.weight_norm
        self.layers = nn.ModuleList(
            [
                norm(nn.Conv2d(2, width, (3, 8), stride=(1, 4), padding=(1, 2))),
                norm(nn.Conv2d(width, 2 * width, (3, 8), stride=(2, 4), padding=(1, 2))),
                norm(nn.Conv2d(2 * width, 2 * width, (3, 3), stride=(1, 2), padding=(1, 1))),
            ]
        )
        self.judge = norm(nn.Conv2d(2 * width, 1, (3, 3), padding=(1, 1)))

    def forward(self, wav: Tensor) -> list[Tensor]:
        """(B, N) -> features of each layer, the judgement last."""
        frames = wav.unfold(-1, self.n_fft, self.hop_length) * self.window
        spectrum = torch.fft.rfft(frames, norm="ortho")
        x = torch.stack([spectrum.real, spectrum.imag], 1)  # (B, 2, T, F)
        x = x * (x.square().sum(1, keepdim=True) + 1e-6).pow(-0.35)  # compress to magnitude^0.3
        features = []
        for layer in self.layers:
            x = nn.functional.leaky_relu(layer(x), 0.1)
            features.append(x)
        features.append(self.judge(x))
        return features


class CodecTraining(nn.Module):
    """The codec with its losses, as the training engine wants a model."""

    loss_unit = "weighted distance/frame"

    def __init__(self, codec: SpectralCodec) -> None:
        super().__init__()
        self.codec = codec
        self.mel_distance = MelDistance(codec.sample_rate)
        self.discriminators = nn.ModuleList(SpectralDiscriminator(*scale) for scale in DISCRIMINATOR_SCALES)

    def stage_parameters(self, stage: int) -> Iterator[tuple[str, nn.Parameter]]:
        """What a stage trains: 1 the codec, 2 its decoder and the discriminators."""
        for name, parameter in self.named_parameters():
            decoder = name.startswith(("codec.decoder.", "codec.head."))
            if (stage == 1 and name.startswith("codec.")) or (
                stage == 2 and (decoder or name.startswith("discriminators."))
            ):
                yield name, parameter

    def compute_loss(self, batch: dict[str, Any], stage: int) -> CodecLoss:
        """batch["wav"] (B, 1, N) -> loss summed over frames, frames, metrics."""
        wav = batch["wav"]
        frames = wav.shape[0] * self.codec.num_frames(wav.shape[-1])
        parts: dict[str, Tensor] = {}
        if stage == 1:
            quantized = self.codec.quantizer(self.codec.latents(wav))
            parts["commitment"] = quantized.commitment
            values, codes = quantized.values, quantized.codes
        else:
            with torch.no_grad():
                codes = self.codec.encode(wav)
                values = self.codec.quantizer.decode(codes)
        estimate = self.codec.synthesize(values)[:, 0, : wav.shape[-1]]
        parts["mel"] = self.mel_distance(estimate, wav[:, 0])
        discriminator_loss = torch.zeros((), device=wav.device)
        if stage == 2 and self.training:
            parts["adversarial"], parts["features"], discriminator_loss = self._adversarial(
                estimate, wav[:, 0]
            )
        loss = discriminator_loss
        for name, value in parts.items():
            loss = loss + WEIGHTS[name] * value
        metrics = {name: (float(value.detach()) * frames, frames) for name, value in parts.items()}
        if stage == 2:
            metrics["discriminator"] = (float(discriminator_loss.detach()) * frames, frames)
        used = sum(torch.unique(codes[..., q]).numel() for q in range(codes.shape[-1]))
        metrics["codes_used"] = (float(used) / codes.shape[-1], 1)
        return CodecLoss(loss * frames, frames, metrics)

    def _adversarial(self, estimate: Tensor, wav: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Generator's adversarial and feature-matching loss, and the discriminators' own loss.

        Both are differentiated in one backward pass: the generator sees the discriminators with detached weights,
        and they see the detached estimate.
        """
        fool = features = judge = torch.zeros((), device=wav.device)
        for discriminator in self.discriminators:
            real = discriminator(wav)
            fake = discriminator(estimate.detach())
            judge = judge + ((1 - real[-1]) ** 2).mean() + (fake[-1] ** 2).mean()
            frozen = {name: value.detach() for name, value in discriminator.named_parameters()}
            seen = functional_call(discriminator, frozen, (estimate,))
            fool = fool + ((1 - seen[-1]) ** 2).mean()
            for ours, theirs in zip(seen[:-1], real[:-1], strict=True):
                theirs = theirs.detach()
                features = features + (ours - theirs).abs().mean() / theirs.abs().mean().clamp(min=1e-3)
        count = len(self.discriminators)
        return fool / count, features / count, judge / count
