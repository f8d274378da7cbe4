"""Attention of one frame over cached keys and values, as sums over the rows of a table ("bags").

Generating one frame for one row is bound by memory: every cached key and value is read once. PyTorch's
`embedding_bag` (FBGEMM's kernel: weighted sums of table rows, with prefetch) comes near the speed of the memory where
general products and fused attention, made for many queries, do not; docs/generation.md has the figures.

    (q K)_t       = sum_i q_i · K[i, t]      rows of the transposed keys, a chunk of columns each
    softmax(qK) V = sum_t p_t · V[t]         rows of the values

Source: embedding bags, Naumov et al. (arXiv 1906.00091, section 3).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from valle.modules.cache import Cache

CHUNK = 64  # columns of the transposed keys that lie together


def weighted_sums(table: Tensor, rows: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Sums of weighted table rows.

    Args:
        table: (R, D).
        rows: (n,) int32, the rows of all bags, one bag behind the other.
        starts: (bags,) int32, where each bag begins in `rows`.
        weights: (n,), of the table's dtype.

    Returns:
        (bags, D), of the table's dtype.
    """
    return torch.embedding_bag(table, rows, starts, False, 0, False, weights, False)[0]


class BagCache(Cache):
    """Keys and values laid out for attention by bags, for one new frame a row at a time, on a CPU.

    Args:
        num_layers, batch, nhead, capacity, head_dim: sizes; room is taken for whole chunks.
        dtype: float32, or float16 for half the memory (finer than bfloat16 at the sizes that keys and values have).
    """

    def __init__(
        self, num_layers: int, batch: int, nhead: int, capacity: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        super().__init__(batch, torch.device("cpu"))
        self.nhead, self.head_dim, self.dtype = nhead, head_dim, dtype
        self.chunks = -(-capacity // CHUNK)
        self.layers = [BagLayer(self) for _ in range(num_layers)]
        self._built = (0, 0)
        self.table: Any = None  # where it lies, for `valle.native.generation`
        self._first = torch.zeros(0, 1)  # (rows, 1) position of column 0, for as many rows as it was made for

    def mask(self, count: int) -> None:
        """None: `BagLayer.attend` hides by itself what a row must not see."""
        return None

    def positions(self, count: int) -> Tensor:
        if count != 1:
            raise RuntimeError(f"{count} frames at once: behind the prompt, this cache takes one at a time")
        if len(self._first) != self.rows:
            self._first = -(self.starts + self.position_shift)[:, None]
        return self._first + self.length

    def take_column(self) -> int:
        """One more column, which whoever takes it fills in every layer."""
        column = self.length
        if column >= self.chunks * CHUNK:
            raise RuntimeError(f"the cache has room for {self.chunks * CHUNK} frames, all taken")
        self.length = column + 1
        return column

    def make_room(self) -> None:
        """Take one more column; `BagLayer.attend` of every layer then fills and reads it."""
        column = self.take_column()
        needed = column // CHUNK + 1
        if self._built != (needed, self.rows):
            self._build(needed)
        self.bias[:, 0, column] = 0.0
        self.column, self.offset = column, column % CHUNK

    def _build(self, chunks: int) -> None:
        """Which table rows belong to which bag, for all layers: changes with the chunks and the rows only."""
        bags, dim, columns = self.rows * self.nhead, self.head_dim, chunks * CHUNK
        first = torch.arange(bags, dtype=torch.int32)[:, None]
        key_rows = first * (self.chunks * dim) + torch.arange(chunks * dim, dtype=torch.int32)
        self.key_rows = key_rows.view(-1)
        self.key_starts = torch.arange(0, bags * chunks * dim, dim, dtype=torch.int32)
        value_rows = first * (self.chunks * CHUNK) + torch.arange(columns, dtype=torch.int32)
        self.value_rows = value_rows.view(-1)
        self.value_starts = torch.arange(0, bags * columns, columns, dtype=torch.int32)
        self.queries = torch.empty(self.rows, self.nhead, chunks, dim, dtype=self.dtype)
        self.query_weights = self.queries.view(-1)
        column = torch.arange(columns)
        hidden = (column >= self.length) | (column < self.starts[:, None])
        self.bias = torch.zeros(self.rows, 1, columns, dtype=self.dtype)
        self.bias.masked_fill_(hidden[:, None], -torch.inf)
        self.score_shape = (self.rows, self.nhead, columns)
        self.out_shape = (self.rows, self.nhead * dim)
        for layer in self.layers:
            layer.open_chunk = layer.keys[: self.rows, :, chunks - 1]
            layer.open_values = layer.values[: self.rows]
        self._built = (chunks, self.rows)

    def drop(self, row: int) -> None:
        super().drop(row)
        self._built, self._first = (0, 0), self._first[:0]


class BagLayer:
    """One layer's keys (B, H, chunks, d, CHUNK) and values (B, H, chunks · CHUNK, d)."""

    def __init__(self, owner: BagCache) -> None:
        self.owner = owner
        batch, heads, dim = owner.rows, owner.nhead, owner.head_dim
        # Zeros, because what is not filled yet is read too, with weight 0.
        self.keys = torch.zeros(batch, heads, owner.chunks, dim, CHUNK, dtype=owner.dtype)
        self.values = torch.zeros(batch, heads, owner.chunks * CHUNK, dim, dtype=owner.dtype)
        self.key_table, self.value_table = self.keys.view(-1, CHUNK), self.values.view(-1, dim)
        self.open_chunk, self.open_values = self.keys, self.values

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Fill an empty cache with the prompt, (rows, H, T, d); returns what was given."""
        rows, heads, time, dim = keys.shape
        chunks = -(-time // CHUNK)
        padded = F.pad(keys, (0, 0, 0, chunks * CHUNK - time)).to(self.keys.dtype)
        self.keys[:rows, :, :chunks] = padded.view(rows, heads, chunks, CHUNK, dim).transpose(3, 4)
        self.values[:rows, :, :time] = values
        self.owner.length = time
        return keys, values

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of the newest frame over all columns.

        Args:
            query: (rows, H, d), already scaled.
            key, value: (rows, H, d), kept.

        Returns:
            (rows, H · d) of the cache's dtype.
        """
        owner = self.owner
        self.open_chunk.select(3, owner.offset).copy_(key)
        self.open_values.select(2, owner.column).copy_(value)
        owner.queries.copy_(query.unsqueeze(2))
        scores = weighted_sums(self.key_table, owner.key_rows, owner.key_starts, owner.query_weights)
        scores = scores.view(owner.score_shape).add_(owner.bias)
        weights = scores.softmax(-1).view(-1)
        out = weighted_sums(self.value_table, owner.value_rows, owner.value_starts, weights)
        return out.view(owner.out_shape)

    def move(self, source: int, target: int) -> None:
        """Copy a row onto another row."""
        used = -(-self.owner.length // CHUNK)
        self.keys[target, :, :used] = self.keys[source, :, :used]
        self.values[target, :, : used * CHUNK] = self.values[source, :, : used * CHUNK]
