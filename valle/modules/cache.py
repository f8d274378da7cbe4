"""Keys and values of a decoder, kept while it generates: allocated once, read only up to what is filled."""

import torch
from torch import Tensor


class LayerCache:
    """One layer's keys and values, (B, H, capacity, D // H)."""

    def __init__(self, batch: int, nhead: int, capacity: int, head_dim: int, like: Tensor) -> None:
        shape = (batch, nhead, capacity, head_dim)
        self.keys = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add (B, H, T, d) behind what is there; returns everything so far, (B, H, length, d) views."""
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """All layers' caches, and where each row begins.

    Rows are right-aligned: a row whose prompt is shorter begins at a later column, `starts` (B,), so that every new
    frame lands in the same column of all rows.
    """

    def __init__(
        self, num_layers: int, batch: int, nhead: int, capacity: int, head_dim: int, like: Tensor
    ) -> None:
        self.layers = [LayerCache(batch, nhead, capacity, head_dim, like) for _ in range(num_layers)]
        self.starts = torch.zeros(batch, dtype=torch.long, device=like.device)
        self.prompt_lens = torch.zeros(batch, dtype=torch.long, device=like.device)
        self.ragged = False  # whether rows begin at different columns

    @property
    def length(self) -> int:
        """Columns filled so far."""
        return self.layers[0].length
