"""The project's own trainable codec: small enough to train on a laptop, fast enough to be free beside the LM.

    wav -> log-mel frames -> ConvNeXt blocks -> residual quantizer -> ConvNeXt blocks -> complex spectra -> wav

Everything runs at the frame rate (50 Hz); only the first and the last step touch samples. The head writes two
half-hop spectra a frame, so that pitch pulses keep their place in time.
Sources: Vocos (arXiv 2306.00814) for the spectral head; SoundStream (arXiv 2107.03312) for the quantizer.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from valle.codecs.base import Codec
from valle.config import option
from valle.modules.convolutions import ConvNeXtStack
from valle.modules.quantizer import ResidualQuantizer
from valle.modules.spectral import InverseSpectrogram, LogMel
from valle.utils.errors import UserError
from valle.utils.files import atomic_path, write_json

SUBFRAMES = 2  # spectra a frame, on both sides
TRAINING_ONLY = (".usage", ".sums", ".started")  # codebook state that inference does not need


@dataclass
class SpectralCodecConfig:
    """Architecture of the project's own codec."""

    sample_rate: int = option(16000, "of what it codes, in Hz")
    hop_length: int = option(320, "samples a frame")
    num_quantizers: int = option(4, "codebooks: bits a frame are so many times those of one")
    codebook_size: int = option(1024, "entries of a codebook")
    n_fft: int = option(
        640, "samples a spectrum sees: long ones tell notes that sound together, short ones keep the time"
    )
    n_mels: int = option(80, "mel bands that the encoder sees")
    latent_dim: int = option(64, "width of what is quantized")
    encoder_dim: int = option(256, "width of the encoder")
    encoder_depth: int = option(5, "blocks of the encoder")
    encoder_kernel: int = option(5, "frames that an encoder's block sees")
    decoder_dim: int = option(384, "width of the decoder")
    decoder_depth: int = option(7, "blocks of the decoder")
    decoder_kernel: int = option(7, "frames that a decoder's block sees")
    quantizer_dropout: float = option(
        0.25, "how often a training row has its last quantizers left out, so that fewer serve too"
    )


class SpectralCodec(Codec):
    """Mel frames in, quantized latents between, spectra and phases out."""

    channels = 1

    def __init__(self, config: SpectralCodecConfig, name: str = "spectral") -> None:
        super().__init__()
        self.config, self.name = config, name
        self.sample_rate, self.hop_length = config.sample_rate, config.hop_length
        self.num_quantizers, self.codebook_size = config.num_quantizers, config.codebook_size
        half_hop = config.hop_length // SUBFRAMES
        self.num_bins = config.n_fft // 2 + 1
        self.features = LogMel(config.sample_rate, config.n_fft, half_hop, config.n_mels)
        self.encoder = ConvNeXtStack(
            SUBFRAMES * config.n_mels, config.encoder_dim, config.encoder_depth, config.encoder_kernel
        )
        self.to_latent = nn.Linear(config.encoder_dim, config.latent_dim)
        self.quantizer = ResidualQuantizer(
            config.latent_dim, config.num_quantizers, config.codebook_size, config.quantizer_dropout
        )
        self.decoder = ConvNeXtStack(
            config.latent_dim, config.decoder_dim, config.decoder_depth, config.decoder_kernel
        )
        self.head = nn.Linear(config.decoder_dim, SUBFRAMES * 2 * self.num_bins)
        self.synthesis = InverseSpectrogram(config.n_fft, half_hop)

    @property
    def context_frames(self) -> int:
        """Reach of the decoder's convolutions (the input's and one a block) and of the overlapping spectra."""
        convolutions = (self.config.decoder_depth + 1) * (self.config.decoder_kernel // 2)
        half_overlap = (self.config.n_fft - self.config.hop_length // SUBFRAMES) / 2  # samples
        return convolutions + math.ceil(half_overlap / self.hop_length)

    @property
    def encode_reach(self) -> int:
        """Reach of the encoder's convolutions (the input's and one a block) and of the overlapping spectra."""
        convolutions = (self.config.encoder_depth + 1) * (self.config.encoder_kernel // 2)
        half_overlap = (self.config.n_fft - self.config.hop_length // SUBFRAMES) / 2  # samples
        return convolutions + math.ceil(half_overlap / self.hop_length)

    def latents(self, wav: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, 1, N) -> (B, T, latent_dim), before quantization; frames where `mask` (B, T, 1) is 0 are padding."""
        missing = -wav.shape[-1] % self.hop_length
        mel = self.features(nn.functional.pad(wav[:, 0], (0, missing)))  # (B, 2T, n_mels)
        batch, num, n_mels = mel.shape
        stacked = mel.reshape(batch, num // SUBFRAMES, SUBFRAMES * n_mels)
        return self.to_latent(self.encoder(0.25 * stacked + 1.0, mask))  # log-mel lies in about -11.5 … 3

    def synthesize(self, latents: Tensor) -> Tensor:
        """(B, T, latent_dim) -> (B, 1, T · hop_length)."""
        out = self.head(self.decoder(latents))
        batch, num_frames, _ = out.shape
        out = out.view(batch, num_frames * SUBFRAMES, 2, self.num_bins)
        magnitude = out[:, :, 0].clamp(max=6.0).exp()
        spectrum = torch.polar(magnitude, out[:, :, 1])
        return self.synthesis(spectrum)[:, None]

    @torch.no_grad()
    def encode(self, wav: Tensor) -> Tensor:
        return self.quantizer.encode(self.latents(wav))[..., : self.num_quantizers]

    @torch.no_grad()
    def _encode_rows(self, wavs: Sequence[Tensor]) -> list[Tensor]:
        # One padded batch of any lengths: every convolution sees zeros beyond a row's last frame, as it does alone.
        frames = [self.num_frames(wav.shape[-1]) for wav in wavs]
        padded = torch.zeros(len(wavs), self.channels, max(frames) * self.hop_length, device=self.device)
        for row, wav in zip(padded, wavs, strict=True):
            row[:, : wav.shape[-1]] = wav
        mask = None
        if min(frames) < max(frames):
            inside = torch.arange(max(frames)) < torch.tensor(frames)[:, None]  # (B, T)
            mask = inside[..., None].to(self.device, padded.dtype)
        codes = self.quantizer.encode(self.latents(padded, mask))[..., : self.num_quantizers]
        return [row[:length] for row, length in zip(codes, frames, strict=True)]

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        if codes.dim() != 3 or not 1 <= codes.shape[-1] <= self.num_quantizers:
            raise UserError(
                f"codec '{self.name}' decodes codes (B, T, up to {self.num_quantizers}), found {tuple(codes.shape)}"
            )
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= self.codebook_size):
            raise UserError(
                f"codec '{self.name}': codes from {int(codes.min())} to {int(codes.max())}, "
                f"expected 0 to {self.codebook_size - 1}"
            )
        return self.synthesize(self.quantizer.decode(codes.long()))

    def codebooks(self) -> Tensor:
        return torch.stack([codebook.entries for codebook in self.quantizer.codebooks])[: self.num_quantizers]

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` (half precision, inference only) into `folder`."""
        from safetensors.torch import save_file

        folder = Path(folder)
        weights = {
            key: (value.half() if value.is_floating_point() else value).contiguous().cpu()
            for key, value in self.state_dict().items()
            if not key.endswith(TRAINING_ONLY)
        }
        with atomic_path(folder / "model.safetensors") as temporary:
            save_file(weights, temporary)
        write_json(
            folder / "config.json", {"model_type": "valle_spectral", **dataclasses.asdict(self.config)}
        )

    @classmethod
    def load(cls, folder: str | Path, name: str | None = None) -> "SpectralCodec":
        """Read what `save` wrote.

        Raises:
            UserError: a file is missing or does not fit.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        for file in ("config.json", "model.safetensors"):
            if not (folder / file).is_file():
                raise UserError(f"codec folder '{folder}' has no {file}")
        settings = json.loads((folder / "config.json").read_text())
        settings.pop("model_type", None)
        codec = cls(SpectralCodecConfig(**settings), name or str(folder))
        try:
            weights = {key: value.float() for key, value in load_file(folder / "model.safetensors").items()}
            codec.load_inference_weights(weights)
        except Exception as error:
            raise UserError(f"codec weights '{folder / 'model.safetensors'}' do not fit: {error}") from error
        return codec.eval()

    def load_inference_weights(self, weights: dict[str, Tensor]) -> None:
        """Load strictly all but the codebooks' training state."""
        state = {key: value for key, value in self.state_dict().items() if key.endswith(TRAINING_ONLY)}
        self.load_state_dict({**state, **weights}, strict=True)

    def fingerprint(self) -> str:
        """As `Codec.fingerprint`, over what decides the codes: a decoder trained on keeps it."""
        kept = {
            key: value
            for key, value in self.state_dict().items()
            if key.startswith(("encoder.", "to_latent.", "quantizer.")) and not key.endswith(TRAINING_ONLY)
        }
        return self._digest(kept)
