"""Between waveforms and spectra: mel features, and the inverse STFT that ends the project's own codec.

Shapes: N samples, T frames of `hop_length` samples, F = n_fft // 2 + 1 frequency bins, M mel bands.
Sources: O'Shaughnessy's mel scale in Slaney's variant (linear below 1 kHz); overlap-add synthesis after
Griffin & Lim 1984, eq. 6, as used in Vocos (arXiv 2306.00814, section 3.3).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def mel_filterbank(
    sample_rate: int, n_fft: int, n_mels: int, fmin: float = 0.0, fmax: float | None = None
) -> Tensor:
    """Triangular filters of equal area on Slaney's mel scale.

    Returns:
        (n_mels, n_fft // 2 + 1) float32.
    """
    low, high = _hz_to_mel(fmin), _hz_to_mel(fmax or sample_rate / 2)
    edges = torch.tensor([_mel_to_hz(low + (high - low) * i / (n_mels + 1)) for i in range(n_mels + 2)])
    bins = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1)
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising = (bins - left) / (centre - left)
    falling = (right - bins) / (right - centre)
    return torch.minimum(rising, falling).clamp(min=0) * 2.0 / (right - left)


def _hz_to_mel(hz: float) -> float:
    return hz * 3 / 200 if hz < 1000 else 15 + math.log(hz / 1000) * 27 / math.log(6.4)


def _mel_to_hz(mel: float) -> float:
    return mel * 200 / 3 if mel < 15 else 1000 * math.exp((mel - 15) * math.log(6.4) / 27)


class Spectrogram(nn.Module):
    """Magnitudes (B, N) -> (B, N // hop_length, F): frame t is centred on samples t·hop … (t+1)·hop."""

    window: Tensor

    def __init__(self, n_fft: int, hop_length: int) -> None:
        super().__init__()
        self.n_fft, self.hop_length = n_fft, hop_length
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

    def forward(self, wav: Tensor) -> Tensor:
        pad = self.n_fft - self.hop_length
        wav = F.pad(wav, (pad // 2, pad - pad // 2))
        frames = wav.unfold(-1, self.n_fft, self.hop_length) * self.window  # (B, T, n_fft)
        return torch.fft.rfft(frames).abs()


class LogMel(nn.Module):
    """Natural-log mel spectrum (B, N) -> (B, N // hop_length, n_mels)."""

    filters: Tensor

    def __init__(
        self, sample_rate: int, n_fft: int, hop_length: int, n_mels: int, floor: float = 1e-5
    ) -> None:
        super().__init__()
        self.spectrogram = Spectrogram(n_fft, hop_length)
        self.floor = floor
        self.register_buffer(
            "filters", mel_filterbank(sample_rate, n_fft, n_mels).T.contiguous(), persistent=False
        )

    def forward(self, wav: Tensor) -> Tensor:
        return (self.spectrogram(wav) @ self.filters).clamp(min=self.floor).log()


class InverseSpectrogram(nn.Module):
    """Complex spectra (B, T, F) -> waveform (B, T · hop_length) by windowed overlap-add."""

    window: Tensor

    def __init__(self, n_fft: int, hop_length: int) -> None:
        super().__init__()
        self.n_fft, self.hop_length = n_fft, hop_length
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

    def forward(self, spectrum: Tensor) -> Tensor:
        frames = torch.fft.irfft(spectrum, self.n_fft) * self.window  # (B, T, n_fft)
        batch, num_frames, _ = frames.shape
        total = (num_frames - 1) * self.hop_length + self.n_fft
        pad = self.n_fft - self.hop_length
        wav = self._overlap_add(frames, total)
        envelope = self._overlap_add((self.window**2).expand(1, num_frames, -1), total)
        start = pad // 2
        end = start + num_frames * self.hop_length
        return wav[:, start:end] / envelope[:, start:end].clamp(min=1e-4)

    def _overlap_add(self, frames: Tensor, total: int) -> Tensor:
        folded = F.fold(
            frames.transpose(1, 2), (1, total), kernel_size=(1, self.n_fft), stride=(1, self.hop_length)
        )
        return folded[:, 0, 0]
