"""The transformer of every decoder here: self-attention with a cache, feed-forward, pre- or post-norm.

Parameter names and shapes are those of PyTorch's `nn.TransformerEncoderLayer`, which the open VALL-Es share.
Sources: "Attention is all you need" (arXiv 1706.03762); adaptive normalization by the stage from VALL-E
(arXiv 2301.02111, section 4.2.2).
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from valle import native
from valle.modules import cpu
from valle.modules.bags import BagCache, BagLayer
from valle.modules.cache import Cache, GraphCache, KVCache, LayerCache, Memory
from valle.modules.embeddings import RotaryPositions, rotate
from valle.modules.masks import lengths_to_mask

Rotation = tuple[Tensor, Tensor]


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class Linear(nn.Linear):
    """`nn.Linear`, by the CPU's fastest products where there are such."""

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.weight, self.bias)


class Dropout(nn.Dropout):
    """`nn.Dropout`, by the CPU's fastest way to draw where there is one."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and cpu.serves(x):
            return cpu.drop(x, self.p)
        return super().forward(x)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return cpu.linear(x, weight, bias) if cpu.serves(x) else F.linear(x, weight, bias)


class SelfAttention(nn.Module):
    """Multi-head self-attention, (B, T, D) -> (B, T, D), or packed rows (N, D) -> (N, D).

    Args:
        dim, nhead: width and heads.
        dropout: of attention's weights; what comes out has its own.
        qk_norm: normalize queries and keys by their root-mean-square before they turn, which keeps scores from growing
            (arXiv 2302.05442, section 2, with RMS in the place of layer normalization).
    """

    def __init__(self, dim: int, nhead: int, dropout: float, qk_norm: bool) -> None:
        super().__init__()
        self.dropout = dropout
        self.nhead = nhead
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = Linear(dim, dim)
        self.query_norm = nn.RMSNorm(dim // nhead, eps=1e-6) if qk_norm else None
        self.key_norm = nn.RMSNorm(dim // nhead, eps=1e-6) if qk_norm else None
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)
        self.scale = (dim // nhead) ** -0.5
        self.project_in: nn.Module | None = None  # set in packed copies, in the place of in_proj_*

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        rotation: Rotation | None,
        cache: LayerCache | BagLayer | None,
        rows: cpu.Rows | None = None,
        read: cpu.Read | None = None,
    ) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        if rows is not None:  # x (N, D), rotation (N, d) each
            out = cpu.attend_rows(self._project(x), rotation, rows, self.scale, dropout)
            return self.out_proj(out if read is None else out.index_select(0, read.frames))
        batch, time, dim = x.shape
        query, key, value = self._project(x).permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, d)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        if cache is not None:
            key, value = cache.append(key, value)
        if self.project_in is not None and query.dtype == torch.bfloat16 and x.device.type == "cpu":
            # Packed copies: oneDNN's bfloat16 products take half the time of PyTorch's fused attention.
            scores = query @ key.transpose(2, 3)  # scaled by the weights
            if mask is not None:
                scores.masked_fill_(~mask, -torch.inf)
            out = scores.softmax(-1) @ value
            return self.out_proj(out.transpose(1, 2).reshape(batch, time, dim))
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=self.scale
        )
        return self.out_proj(out.transpose(1, 2).reshape(batch, time, dim))

    def _project(self, x: Tensor) -> Tensor:
        """(…, D) -> queries, keys and values, (…, 3, H, d)."""
        if self.project_in is not None:
            qkv = self.project_in(x)
        else:
            qkv = _linear(x, self.in_proj_weight, self.in_proj_bias)
        qkv = qkv.view(*x.shape[:-1], 3, self.nhead, x.shape[-1] // self.nhead)
        if self.query_norm is None or self.key_norm is None:
            return qkv
        query, key, value = qkv.unbind(-3)
        query, key = (
            norm(part.float()).to(qkv.dtype)
            for norm, part in ((self.query_norm, query), (self.key_norm, key))
        )
        return torch.stack([query, key, value], -3)


class CrossAttention(nn.Module):
    """Multi-head attention to a memory, (B, T, D) and (B, M, D) -> (B, T, D).

    Args:
        dim, nhead: width and heads.
        dropout: of attention's weights.
    """

    def __init__(self, dim: int, nhead: int, dropout: float) -> None:
        super().__init__()
        self.nhead, self.dropout = nhead, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def read(self, memory: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """(B, M, D) -> keys, turned by the memory's positions, and values, (B, H, M, d)."""
        dim = memory.shape[-1]
        both = _linear(memory, self.in_proj_weight[dim:], self.in_proj_bias[dim:])
        key, value = both.view(*memory.shape[:-1], 2, self.nhead, dim // self.nhead).permute(2, 0, 3, 1, 4)
        return (key if rotation is None else rotate(key, rotation)), value

    def forward(self, x: Tensor, memory: Memory, rotation: Rotation | None) -> Tensor:
        batch, time, dim = x.shape
        query = _linear(x, self.in_proj_weight[:dim], self.in_proj_bias[:dim])
        query = query.view(batch, time, self.nhead, dim // self.nhead).transpose(1, 2)
        if rotation is not None:
            query = rotate(query, rotation)
        out = F.scaled_dot_product_attention(
            query, memory.key, memory.value, memory.mask, self.dropout if self.training else 0.0
        )
        return self.out_proj(out.transpose(1, 2).reshape(batch, time, dim))


class AdaptiveLayerNorm(nn.Module):
    """Layer normalization whose weight and bias come from a condition (B, 1, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.project_layer = nn.Linear(dim, 2 * dim)
        nn.init.zeros_(self.project_layer.weight)
        with torch.no_grad():
            self.project_layer.bias.copy_(torch.cat([torch.ones(dim), torch.zeros(dim)]))

    def forward(self, x: Tensor, condition: Tensor | None, rows: cpu.Rows | None = None) -> Tensor:
        weight, bias = self.project_layer(condition).chunk(2, -1)
        if rows is None:
            return weight * self.norm(x) + bias
        return cpu.scale_rows(self.norm(x), weight[:, 0], bias[:, 0], rows)

    def split(self, x: Tensor, condition: Tensor | None, rows: cpu.Rows) -> tuple[Tensor, Tensor]:
        """`cpu.normalize` of packed rows."""
        weight, bias = self.project_layer(condition)[:, 0].float().chunk(2, -1)
        bias = torch.addcmul(bias, weight, self.norm.bias)
        return cpu.normalize(x, weight * self.norm.weight, bias, self.norm.eps, rows)


class PlainLayerNorm(nn.LayerNorm):
    """Layer normalization with the signature of the adaptive one."""

    def forward(  # type: ignore[override]
        self, x: Tensor, condition: Tensor | None = None, rows: cpu.Rows | None = None
    ) -> Tensor:
        return super().forward(x)

    def split(self, x: Tensor, condition: Tensor | None, rows: cpu.Rows) -> tuple[Tensor, Tensor]:
        """`cpu.normalize` of packed rows."""
        return cpu.normalize(x, self.weight[None], self.bias[None], self.eps)


class TransformerLayer(nn.Module):
    """Self-attention and feed-forward network with their normalizations."""

    packed = False  # True in packed copies (valle/modules/packing.py)

    def __init__(
        self,
        dim: int,
        nhead: int,
        dropout: float,
        norm_first: bool,
        adaptive: bool,
        activation: str,
        qk_norm: bool,
        attention_dropout: float,
        cross_attention: bool = False,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.activation_name, self.activation = activation, ACTIVATIONS[activation]
        self.self_attn = SelfAttention(dim, nhead, attention_dropout, qk_norm)
        self.linear1 = Linear(dim, 4 * dim)
        self.linear2 = Linear(4 * dim, dim)
        self.dropout = Dropout(dropout)
        norm = AdaptiveLayerNorm if adaptive else PlainLayerNorm
        self.norm1, self.norm2 = norm(dim), norm(dim)
        self.multihead_attn: CrossAttention | None = None
        if cross_attention:
            self.multihead_attn, self.norm3 = CrossAttention(dim, nhead, attention_dropout), norm(dim)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        rotation: Rotation | None,
        cache: LayerCache | BagLayer | None,
        condition: Tensor | None,
        rows: cpu.Rows | None = None,
        memory: Memory | None = None,
        read: cpu.Read | None = None,
    ) -> Tensor:
        """Of packed rows with `read`, only the output at the frames that it names."""
        y = x
        if self.norm_first:
            x, y = self._normalize(self.norm1, x, condition, rows)
        y = self.self_attn(y, mask, rotation, cache, rows, read)
        if read is not None:
            x, rows = x.index_select(0, read.frames), read.rows
        x = self._add(x, y)
        if self.norm_first:
            if self.multihead_attn is not None:
                x = self._add(x, self.multihead_attn(self.norm2(x, condition), memory, rotation))
                return self._add(x, self._feed_forward(self.norm3(x, condition)))
            x, y = self._normalize(self.norm2, x, condition, rows)
            return self._add(x, self._feed_forward(y))
        x = self.norm1(x, condition, rows)
        if self.multihead_attn is not None:
            x = self.norm2(self._add(x, self.multihead_attn(x, memory, rotation)), condition)
            return self.norm3(self._add(x, self._feed_forward(x)), condition)
        return self.norm2(self._add(x, self._feed_forward(x)), condition, rows)

    @staticmethod
    def _normalize(
        norm: "AdaptiveLayerNorm | PlainLayerNorm", x: Tensor, condition: Tensor | None, rows: cpu.Rows | None
    ) -> tuple[Tensor, Tensor]:
        """x, and its normalization."""
        if rows is not None and cpu.normalizes(x):
            return norm.split(x, condition, rows)
        return x, norm(x, condition, rows)

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + dropout(y)."""
        if self.training and cpu.serves(x):
            return cpu.drop_and_add(y, self.dropout.p, x)
        return x + self.dropout(y)

    def _feed_forward(self, x: Tensor) -> Tensor:
        if self.packed:
            return self.linear2(cast(Any, self.linear1).activated(x, self.activation_name))
        hidden = self.linear1(x)
        if self.training and cpu.serves(hidden):
            return self.linear2(cpu.activate_and_drop(hidden, self.activation_name, self.dropout.p))
        return self.linear2(self.dropout(self.activation(hidden)))


class Transformer(nn.Module):
    """A stack of layers over (B, T, D).

    Args:
        dim, nhead, num_layers: width, heads, depth.
        dropout: of embeddings, attention's output and feed-forward.
        norm_first: pre-norm, with a final normalization.
        adaptive: normalizations take a condition (B, 1, D).
        position: "rope" turns queries and keys; with "none", positions are in the input already.
        activation: "gelu" or "relu".
        qk_norm: normalize queries and keys.
        attention_dropout: of attention's weights.
        cross_attention: between self-attention and feed-forward, layers read a memory.
    """

    # In training: compute each layer's activations a second time, in backward, instead of keeping them.
    checkpoint_layers = False
    by_rows = True  # whether training on a CPU goes over rows without padding; compiled layers want one shape

    def __init__(
        self,
        dim: int,
        nhead: int,
        num_layers: int,
        dropout: float = 0.1,
        norm_first: bool = True,
        adaptive: bool = False,
        position: str = "rope",
        activation: str = "gelu",
        qk_norm: bool = False,
        attention_dropout: float = 0.0,
        cross_attention: bool = False,
    ) -> None:
        super().__init__()
        if dim % nhead or (position == "rope" and dim // nhead % 2):
            raise ValueError(f"width {dim} must be a multiple of nhead {nhead}, with an even width per head")
        self.nhead, self.head_dim, self.adaptive = nhead, dim // nhead, adaptive
        # Set in packed copies (valle/modules/packing.py): their number format, and what computes a single frame.
        self.packed_dtype: str | None = None
        self.stepper: Callable[[Tensor, Tensor, BagCache], Tensor]
        self.rotary = RotaryPositions(self.head_dim) if position == "rope" else None
        self.cross_attention = cross_attention
        self.dropout = Dropout(dropout)
        # Each layer draws its own weights: a list of copies would start them all identical.
        self.layers: Sequence[TransformerLayer] = nn.ModuleList(  # type: ignore[assignment]
            TransformerLayer(
                dim,
                nhead,
                dropout,
                norm_first,
                adaptive,
                activation,
                qk_norm,
                attention_dropout,
                cross_attention,
            )
            for _ in range(num_layers)
        )
        self.norm = (AdaptiveLayerNorm if adaptive else PlainLayerNorm)(dim) if norm_first else None

    def compile_layers(self) -> None:
        """Let `torch.compile` make one program of each layer, when it runs first."""
        self.by_rows = False
        for layer in self.layers:
            layer.compile(dynamic=True)

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for `capacity` columns."""
        sizes = (len(self.layers), batch, self.nhead, capacity, self.head_dim)
        like = next(self.parameters())
        if self.packed_dtype is None or self.cross_attention or like.device.type not in ("cpu", "cuda"):
            return KVCache(*sizes, like)
        if like.device.type == "cuda":
            return GraphCache(*sizes, like.to(torch.bfloat16 if self.packed_dtype == "bf16" else like.dtype))
        return BagCache(*sizes, torch.float32 if self.packed_dtype == "fp32" else torch.float16)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor | Callable[[], Tensor | None] | None = None,
        cache: Cache | None = None,
        condition: Tensor | None = None,
        rows: tuple[Tensor, Tensor, Tensor] | None = None,
        memory: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Tensor:
        """(B, T, D) at `positions` (B, T) or (T,) -> (B, T, D); with a cache, T new frames behind those it holds.

        Args:
            mask: who may attend to whom, True, broadcast to (B, H, T, T); or what makes it when it is needed.
            condition: (B, 1, D) for adaptive normalization.
            rows: frames of each row from column 0 on, how many of them see one another, the same as the mask says, and
                the first whose output is read, (B,) each. With it, what trains on a CPU computes no padding, and of the
                last layer only what is read; other outputs are zeros.
            memory: for cross-attention, (B, M, D), its lengths (B,) and positions (B, M); a cache keeps what layers
                read of it.
        """
        if isinstance(cache, BagCache) and cache.length > 0:
            return self.stepper(x, positions, cache)
        if (
            rows is not None
            and cache is None
            and (self.packed_dtype is None or (self.packed_dtype == "bf16" and native.available()))
            and self.by_rows
            and not self.cross_attention
            and cpu.serves(x)
        ):
            lens, prompts, firsts = (part.tolist() for part in rows)
            return self._over_rows(x, positions, condition, cpu.Rows(lens, prompts), firsts)
        rotation = self.rotary(positions) if self.rotary is not None else None
        x = self.dropout(x)
        mask = mask() if callable(mask) else mask
        memories = self._memories(memory, cache) if self.cross_attention else [None] * len(self.layers)
        for index, layer in enumerate(self.layers):
            kept = cache.layers[index] if cache else None
            x = self._run(layer, x, mask, rotation, kept, condition, None, memories[index])
        return x if self.norm is None else self.norm(x, condition)

    def _memories(
        self, memory: tuple[Tensor, Tensor, Tensor] | None, cache: Cache | None
    ) -> Sequence[Memory | None]:
        """What each layer reads of the memory, from the cache where that has it."""
        if memory is None:
            if cache is None or cache.memories is None:
                raise ValueError("cross-attention needs a memory, or a cache that keeps one")
            return cache.memories
        x, lens, positions = memory
        rotation = self.rotary(positions) if self.rotary is not None else None
        mask = None
        if int(lens.min()) < x.shape[1]:
            mask = lengths_to_mask(lens, x.shape[1])[:, None, None]
        found = []
        for layer in self.layers:
            assert layer.multihead_attn is not None
            found.append(Memory(*layer.multihead_attn.read(x, rotation), mask))
        if cache is not None:
            cache.memories = found
        return found

    def _over_rows(
        self, x: Tensor, positions: Tensor, condition: Tensor | None, rows: cpu.Rows, firsts: list[int]
    ) -> Tensor:
        """`forward` over the valid frames alone, (N, D), one row behind the other."""
        batch, time, dim = x.shape
        padded = sum(rows.lens) < batch * time
        if padded:
            index = torch.cat([torch.arange(n) + row * time for row, n in enumerate(rows.lens)])
        packed = x.reshape(-1, dim)
        packed = packed.index_select(0, index) if padded else packed
        rotation = None
        if self.rotary is not None:
            positions = positions.expand(batch, time).reshape(-1)
            cosine, sine = self.rotary(positions[index] if padded else positions)
            rotation = cosine[0, 0], sine[0, 0]
        packed = self.dropout(packed)
        for layer in self.layers[:-1]:
            packed = self._run(layer, packed, None, rotation, None, condition, rows)
        read = rows.read_from(firsts)
        packed = self._run(self.layers[-1], packed, None, rotation, None, condition, rows, None, read)
        if read is not None:
            rows, index = read.rows, index[read.frames] if padded else read.frames
        if self.norm is not None:
            packed = self.norm(packed, condition, rows)
        if padded or read is not None:
            packed = packed.new_zeros(batch * time, dim).index_copy(0, index, packed)
        return packed.view(batch, time, dim)

    def _run(self, layer: nn.Module, *inputs: Any) -> Tensor:
        if self.checkpoint_layers and self.training:
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)
