"""Embeddings of codes and of positions.

Sources: sinusoids from "Attention is all you need" (arXiv 1706.03762, section 3.5), with a learned weight as in
VALL-E's open implementations; rotary positions from RoFormer (arXiv 2104.09864, section 3.2.2).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def sum_embeddings(tables: Sequence[nn.Module], codes: Tensor) -> Tensor:
    """codes (B, T, q) -> (B, T, D): each quantizer's code through its own table, added up."""
    total = tables[0](codes[..., 0])
    for index in range(1, codes.shape[-1]):
        total = total + tables[index](codes[..., index])
    return total


class FieldEmbedding(nn.Module):
    """Things of several fields, (B, S, F) ids -> (B, S, D).

    Args:
        sizes: ids of each field.
        dim: D.
        field_dims: widths of the fields' tables, which are put side by side and projected (default: all have width D
            and are added up).
    """

    def __init__(self, sizes: Sequence[int], dim: int, field_dims: Sequence[int] | None = None) -> None:
        super().__init__()
        dims = [dim] * len(sizes) if field_dims is None else list(field_dims)
        if len(dims) != len(sizes):
            raise ValueError(f"{len(sizes)} fields, but {len(dims)} widths")
        tables = [nn.Embedding(size, width) for size, width in zip(sizes, dims, strict=True)]
        for table in tables:
            nn.init.normal_(table.weight, std=0.02)
        self.tables = nn.ModuleList(tables)
        self.project = nn.Linear(sum(dims), dim) if field_dims is not None else None

    def forward(self, x: Tensor) -> Tensor:
        if self.project is None:
            return sum_embeddings(list(self.tables), x)
        return self.project(torch.cat([table(x[..., i]) for i, table in enumerate(self.tables)], -1))


class SinePositions(nn.Module):
    """Adds alpha · sinusoid(position) to (B, T, D); alpha is learned."""

    rates: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))
        rates = torch.exp(torch.arange(0, dim, 2) * -(math.log(10000.0) / dim))
        self.register_buffer("rates", rates, persistent=False)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """positions (B, T) or (T,)."""
        angles = positions[..., None] * self.rates
        table = torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)
        return x + self.alpha * table.to(x.dtype)


class RotaryPositions(nn.Module):
    """Cosines and sines by which attention turns queries and keys, (B or 1, 1, T, d)."""

    rates: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        rates = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
        self.register_buffer("rates", rates, persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions (B, T) or (T,)."""
        angles = positions[..., None] * self.rates
        angles = torch.cat([angles, angles], -1)
        if angles.dim() == 2:
            angles = angles[None]
        return angles.cos()[:, None], angles.sin()[:, None]


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn (B, H, T, d) by the rotation of each position."""
    cosine, sine = rotation
    first, second = x.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return (x * cosine + turned * sine).to(x.dtype)
