"""Keys and values of a decoder, kept while it generates: allocated once, read only up to what is filled."""

import torch
from torch import Tensor


class Cache:
    """Where each row of a cache stands.

    Rows are right-aligned: a row whose prompt is shorter begins at a later column, `starts` (B,), so that every new
    frame lands in the same column of all rows. New frames stand at position column - starts - `position_shift`, (B,):
    the frames of a row's prompt that come later than they, in in-filling.

    Attributes:
        rows: rows that are still in, at first B.
        length: columns filled so far.
        starts, prompt_lens, position_shift: (rows,) int64.
        ragged: whether rows begin at different columns.
        masks: whether the cache itself hides the columns before a row's start.
    """

    layers: list
    masks = False

    def __init__(self, batch: int, device: torch.device) -> None:
        self.rows = batch
        self.length = 0
        self.starts = torch.zeros(batch, dtype=torch.long, device=device)
        self.prompt_lens = torch.zeros(batch, dtype=torch.long, device=device)
        self.position_shift = torch.zeros(batch, dtype=torch.long, device=device)
        self.ragged = False

    def drop(self, row: int) -> None:
        """Take a row out; the last one takes its place."""
        last = self.rows - 1
        if row != last:
            for layer in self.layers:
                layer.move(last, row)
        for name in ("starts", "prompt_lens", "position_shift"):
            values = getattr(self, name)
            values[row] = values[last]
            setattr(self, name, values[:last])
        self.rows = last


class LayerCache:
    """One layer's keys and values, (B, H, capacity, D // H)."""

    def __init__(self, owner: Cache, shape: tuple[int, int, int, int], like: Tensor) -> None:
        self.owner = owner
        self.keys = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add (rows, H, T, d) behind what is there; returns everything so far, (rows, H, length, d) views."""
        rows, end = keys.shape[0], self.length + keys.shape[2]
        self.keys[:rows, :, self.length : end] = keys
        self.values[:rows, :, self.length : end] = values
        self.length = self.owner.length = end
        return self.keys[:rows, :, :end], self.values[:rows, :, :end]

    def move(self, source: int, target: int) -> None:
        """Copy a row's frames onto another row."""
        self.keys[target, :, : self.length] = self.keys[source, :, : self.length]
        self.values[target, :, : self.length] = self.values[source, :, : self.length]


class KVCache(Cache):
    """Keys and values side by side, for PyTorch's attention: any device, any number of frames at once."""

    def __init__(
        self, num_layers: int, batch: int, nhead: int, capacity: int, head_dim: int, like: Tensor
    ) -> None:
        super().__init__(batch, like.device)
        shape = (batch, nhead, capacity, head_dim)
        self.layers = [LayerCache(self, shape, like) for _ in range(num_layers)]
