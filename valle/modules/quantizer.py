"""Residual vector quantization: each quantizer codes what the ones before it left over.

Sources: SoundStream (arXiv 2107.03312, section III-C) for the residual chain, k-means start and the replacement of
unused entries; VQ-VAE (arXiv 1711.00937, appendix A.1) for codebooks as moving averages.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Quantized(NamedTuple):
    """What a quantizer gives: values (B, T, D), codes (B, T, Q) int64, and the commitment loss (mean per value)."""

    values: Tensor
    codes: Tensor
    commitment: Tensor


class Codebook(nn.Module):
    """One table of V entries of width D, moved towards the mean of the vectors it stands for."""

    entries: Tensor
    usage: Tensor
    sums: Tensor
    started: Tensor

    def __init__(self, codebook_size: int, dim: int, decay: float = 0.99, min_usage: float = 0.1) -> None:
        super().__init__()
        self.decay, self.min_usage = decay, min_usage
        self.register_buffer("entries", torch.zeros(codebook_size, dim))
        self.register_buffer(
            "usage", torch.ones(codebook_size)
        )  # moving count of vectors per entry and batch
        self.register_buffer("sums", torch.zeros(codebook_size, dim))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def nearest(self, x: Tensor) -> Tensor:
        """Index of the nearest entry: (..., D) -> (...) int64."""
        flat = x.reshape(-1, x.shape[-1])
        # ||x - e||² without ||x||², which is the same for every entry
        distance = (self.entries**2).sum(1) - 2 * flat @ self.entries.T
        return distance.argmin(1).view(x.shape[:-1])

    @torch.no_grad()
    def update(self, x: Tensor, codes: Tensor) -> None:
        """Move the entries towards the vectors (M, D) that were coded by them."""
        size = self.entries.shape[0]
        counts = torch.bincount(codes, minlength=size).to(x.dtype)
        sums = torch.zeros_like(self.sums).index_add_(0, codes, x)
        self.usage.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        self.entries.copy_(self.sums / self.usage.clamp(min=1e-3)[:, None])
        unused = self.usage < self.min_usage
        if unused.any():
            chosen = x[torch.randint(x.shape[0], (int(unused.sum()),))]
            self.entries[unused] = chosen
            self.usage[unused] = 2 * self.min_usage
            self.sums[unused] = 2 * self.min_usage * chosen

    @torch.no_grad()
    def start(self, x: Tensor, iterations: int = 10) -> None:
        """k-means over the first vectors (M, D)."""
        size = self.entries.shape[0]
        repeats = -(-size // x.shape[0])
        pool = x.repeat(repeats, 1)
        self.entries.copy_(pool[torch.randperm(pool.shape[0])[:size]])
        for _ in range(iterations):
            codes = self.nearest(x)
            counts = torch.bincount(codes, minlength=size).to(x.dtype)
            sums = torch.zeros_like(self.sums).index_add_(0, codes, x)
            used = counts > 0
            self.entries[used] = sums[used] / counts[used, None]
        self.usage.copy_(torch.full_like(self.usage, x.shape[0] / size))
        self.sums.copy_(self.entries * self.usage[:, None])
        self.started.fill_(True)


class ResidualQuantizer(nn.Module):
    """A chain of codebooks, (B, T, D) -> codes (B, T, Q) and back.

    Args:
        dim: width D of the vectors.
        num_quantizers: length Q of the chain.
        codebook_size: entries V of each codebook.
        dropout: share of training rows coded with only the first 1 … Q - 1 quantizers, so that the first ones
            carry what matters most.
    """

    def __init__(self, dim: int, num_quantizers: int, codebook_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.codebooks: Sequence[Codebook] = nn.ModuleList(  # type: ignore[assignment]
            Codebook(codebook_size, dim) for _ in range(num_quantizers)
        )
        self.dropout = dropout

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """(B, T, D) -> codes (B, T, Q) int64."""
        codes, residual = [], x
        for codebook in self.codebooks:
            index = codebook.nearest(residual)
            residual = residual - F.embedding(index, codebook.entries)
            codes.append(index)
        return torch.stack(codes, -1)

    def decode(self, codes: Tensor) -> Tensor:
        """codes (B, T, q), q ≤ Q -> (B, T, D): the sum of the entries."""
        return torch.stack(
            [F.embedding(codes[..., i], self.codebooks[i].entries) for i in range(codes.shape[-1])]
        ).sum(0)

    def forward(self, x: Tensor) -> Quantized:
        """Quantize with gradients straight through to `x`; in training, the codebooks learn as well."""
        batch, _, dim = x.shape
        num_quantizers = len(self.codebooks)
        depth = torch.full((batch,), num_quantizers, device=x.device)
        if self.training and self.dropout > 0 and num_quantizers > 1:
            shortened = torch.rand(batch, device=x.device) < self.dropout
            depth = torch.where(shortened, torch.randint(1, num_quantizers, (batch,), device=x.device), depth)
        total, residual = torch.zeros_like(x), x.detach()
        codes, commitment = [], x.new_zeros(())
        for level, codebook in enumerate(self.codebooks):
            flat = residual.reshape(-1, dim)
            if self.training and not bool(codebook.started):
                codebook.start(flat)
            index = codebook.nearest(residual)
            value = F.embedding(index, codebook.entries)
            active = (depth > level).view(-1, 1, 1)
            total = total + value * active
            commitment = commitment + ((x - total.detach()) ** 2 * active).mean()
            if self.training:
                codebook.update(flat, index.reshape(-1))
            residual = residual - value
            codes.append(index)
        return Quantized(x + (total - x).detach(), torch.stack(codes, -1), commitment / num_quantizers)
