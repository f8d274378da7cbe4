"""Keys and values of a decoder, kept while it generates: allocated once, read only up to what is filled."""

from typing import NamedTuple

import torch
from torch import Tensor

from valle.modules.masks import prefix_causal_mask

BUCKET = 128  # columns by which a `GraphCache` grows what it reads


class Memory(NamedTuple):
    """What a layer's cross-attention reads: keys and values (rows, H, M, d), and which of them there are."""

    key: Tensor
    value: Tensor
    mask: Tensor | None  # (rows, 1, 1, M)


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
        memories: what each layer's cross-attention reads, once there is any.
    """

    layers: list

    def __init__(self, batch: int, device: torch.device) -> None:
        self.rows = batch
        self.length = 0
        self.starts = torch.zeros(batch, dtype=torch.long, device=device)
        self.prompt_lens = torch.zeros(batch, dtype=torch.long, device=device)
        self.position_shift = torch.zeros(batch, dtype=torch.long, device=device)
        self.ragged = False
        self.memories: list[Memory] | None = None

    def place(self, starts: Tensor, prompt_lens: Tensor) -> None:
        """Say where rows begin and how long their prompts are, (rows,) each."""
        # Copies: they change when rows leave, and what is given may be the caller's.
        self.starts, self.prompt_lens = starts.clone(), prompt_lens.clone()
        self.ragged = bool((starts > 0).any())

    def columns(self, count: int) -> Tensor:
        """(count,) columns of the next frames."""
        return self.length + torch.arange(count, device=self.starts.device)

    def positions(self, count: int) -> Tensor:
        """(rows, count) places in time of the next frames."""
        return self.columns(count) - (self.starts + self.position_shift)[:, None]

    def mask(self, count: int) -> Tensor | None:
        """Who may be seen from the next frames, (rows, 1, count, keys); None: everything."""
        if not self.ragged and count == 1:
            return None
        keys = torch.arange(self.length + count, device=self.starts.device)
        return prefix_causal_mask(self.starts, self.prompt_lens, self.columns(count), keys)

    def drop(self, row: int) -> None:
        """Take a row out; the last one takes its place."""
        last = self.rows - 1
        if row != last:
            for layer in self.layers:
                layer.move(last, row)
        order = list(range(last))
        if row != last:
            order[row] = last
        for name in ("starts", "prompt_lens", "position_shift"):
            values = getattr(self, name)
            setattr(self, name, values[order])
        if self.memories is not None:
            self.memories = [
                Memory(key[order], value[order], None if mask is None else mask[order])
                for key, value, mask in self.memories
            ]
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

    layer_type: type[LayerCache] = LayerCache

    def __init__(
        self, num_layers: int, batch: int, nhead: int, capacity: int, head_dim: int, like: Tensor
    ) -> None:
        super().__init__(batch, like.device)
        shape = (batch, nhead, capacity, head_dim)
        self.layers = [self.layer_type(self, shape, like) for _ in range(num_layers)]


class GraphLayerCache(LayerCache):
    """A layer of a `GraphCache`."""

    owner: "GraphCache"

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As `LayerCache.append`; a single frame behind the prompt goes where `owner.column` says."""
        if self.owner.bucket == 0:
            return super().append(keys, values)
        self.keys.index_copy_(2, self.owner.column, keys)
        self.values.index_copy_(2, self.owner.column, values)
        return self.keys[:, :, : self.owner.bucket], self.values[:, :, : self.owner.bucket]

    def move(self, source: int, target: int) -> None:
        used = self.owner.length
        self.keys[target, :, :used] = self.keys[source, :, :used]
        self.values[target, :, :used] = self.values[source, :, :used]


class GraphCache(KVCache):
    """A cache whose steps can be recorded once and replayed, as CUDA graphs are: addresses and shapes stay.

    The column of the new frame is a number on the device; what is read grows by whole buckets, and a mask hides what
    is not filled yet. Rows that leave stay in the shapes, behind the others.
    """

    layer_type = GraphLayerCache

    def __init__(
        self, num_layers: int, batch: int, nhead: int, capacity: int, head_dim: int, like: Tensor
    ) -> None:
        capacity = -(-capacity // BUCKET) * BUCKET
        super().__init__(num_layers, batch, nhead, capacity, head_dim, like)
        for layer in self.layers:  # read before they are filled, with weight 0
            layer.keys.zero_(), layer.values.zero_()
        self.column = torch.zeros(1, dtype=torch.long, device=like.device)
        self.bucket = 0  # columns that a step reads; 0 before the first

    def advance(self) -> None:
        """Make room for one more frame; the step itself follows."""
        self.column.fill_(self.length)
        self.length += 1
        self.bucket = -(-self.length // BUCKET) * BUCKET

    def columns(self, count: int) -> Tensor:
        return self.column

    def mask(self, count: int) -> Tensor:
        keys = torch.arange(self.bucket, device=self.column.device)
        return prefix_causal_mask(self.starts, self.prompt_lens, self.column, keys)

    def drop(self, row: int) -> None:
        last = self.rows - 1
        if row != last:
            for layer in self.layers:
                layer.move(last, row)
            for values in (self.starts, self.prompt_lens, self.position_shift):
                values[row] = values[last]
        self.rows = last
