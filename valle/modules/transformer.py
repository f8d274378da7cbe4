"""The transformer of every decoder here: self-attention with a cache, feed-forward, pre- or post-norm.

Parameter names and shapes are those of PyTorch's `nn.TransformerEncoderLayer`, which the open VALL-Es share.
Sources: "Attention is all you need" (arXiv 1706.03762); adaptive normalization by the stage from VALL-E
(arXiv 2301.02111, section 4.2.2).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from valle.modules.bags import BagCache, BagLayer
from valle.modules.cache import Cache, GraphCache, KVCache, LayerCache
from valle.modules.embeddings import RotaryPositions, SinePositions, rotate

Rotation = tuple[Tensor, Tensor]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class SelfAttention(nn.Module):
    """Multi-head self-attention, (B, T, D) -> (B, T, D)."""

    def __init__(self, dim: int, nhead: int, dropout: float) -> None:
        super().__init__()
        self.nhead, self.dropout = nhead, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)
        self.scale = (dim // nhead) ** -0.5
        self.project_in: nn.Module | None = None  # set in packed copies, in the place of in_proj_*

    def forward(
        self, x: Tensor, mask: Tensor | None, rotation: Rotation | None, cache: LayerCache | BagLayer | None
    ) -> Tensor:
        batch, time, dim = x.shape
        if self.project_in is not None:
            qkv = self.project_in(x)
        else:
            qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        qkv = qkv.view(batch, time, 3, self.nhead, dim // self.nhead).permute(
            2, 0, 3, 1, 4
        )  # (3, B, H, T, d)
        query, key, value = qkv.unbind(0)
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
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=self.scale
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

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        weight, bias = self.project_layer(condition).chunk(2, -1)
        return weight * self.norm(x) + bias


class PlainLayerNorm(nn.LayerNorm):
    """Layer normalization with the signature of the adaptive one."""

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class TransformerLayer(nn.Module):
    """Self-attention and feed-forward network with their normalizations."""

    def __init__(
        self, dim: int, nhead: int, dropout: float, norm_first: bool, adaptive: bool, activation: str
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.activation_name, self.activation = activation, ACTIVATIONS[activation]
        self.self_attn = SelfAttention(dim, nhead, dropout)
        self.linear1 = nn.Linear(dim, 4 * dim)
        self.linear2 = nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(dropout)
        norm = AdaptiveLayerNorm if adaptive else PlainLayerNorm
        self.norm1, self.norm2 = norm(dim), norm(dim)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        rotation: Rotation | None,
        cache: LayerCache | BagLayer | None,
        condition: Tensor | None,
    ) -> Tensor:
        if self.norm_first:
            x = x + self.dropout(self.self_attn(self.norm1(x, condition), mask, rotation, cache))
            return x + self._feed_forward(self.norm2(x, condition))
        x = self.norm1(x + self.dropout(self.self_attn(x, mask, rotation, cache)), condition)
        return self.norm2(x + self._feed_forward(x), condition)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear2(self.dropout(self.activation(self.linear1(x)))))


class Transformer(nn.Module):
    """A stack of layers over (B, T, D).

    Args:
        dim, nhead, num_layers: width, heads, depth.
        dropout: of embeddings, attention and feed-forward.
        norm_first: pre-norm, with a final normalization.
        adaptive: normalizations take a condition (B, 1, D).
        position: "rope" turns queries and keys, "sine" adds sinusoids to the input.
        activation: "gelu" or "relu".
    """

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
    ) -> None:
        super().__init__()
        if dim % nhead or (position == "rope" and dim // nhead % 2):
            raise ValueError(f"width {dim} must be a multiple of nhead {nhead}, with an even width per head")
        self.nhead, self.head_dim, self.adaptive = nhead, dim // nhead, adaptive
        # Set in packed copies (valle/modules/packing.py): their number format, and what computes a single frame.
        self.packed_dtype: str | None = None
        self.stepper: Callable[[Tensor, Tensor, BagCache], Tensor]
        self.rotary = RotaryPositions(self.head_dim) if position == "rope" else None
        self.sine = SinePositions(dim) if position == "sine" else None
        self.dropout = nn.Dropout(dropout)
        # Each layer draws its own weights: a list of copies would start them all identical.
        self.layers: Sequence[TransformerLayer] = nn.ModuleList(  # type: ignore[assignment]
            TransformerLayer(dim, nhead, dropout, norm_first, adaptive, activation) for _ in range(num_layers)
        )
        self.norm = (AdaptiveLayerNorm if adaptive else PlainLayerNorm)(dim) if norm_first else None

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for `capacity` columns."""
        sizes = (len(self.layers), batch, self.nhead, capacity, self.head_dim)
        like = next(self.parameters())
        if self.packed_dtype is None or like.device.type not in ("cpu", "cuda"):
            return KVCache(*sizes, like)
        if like.device.type == "cuda":
            return GraphCache(*sizes, like.to(torch.bfloat16 if self.packed_dtype == "bf16" else like.dtype))
        return BagCache(*sizes, torch.float32 if self.packed_dtype == "fp32" else torch.float16)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D) at `positions` (B, T) or (T,) -> (B, T, D); with a cache, T new frames behind those it holds."""
        if self.sine is not None:
            x = self.sine(x, positions)
        if isinstance(cache, BagCache) and cache.length > 0:
            return self.stepper(x, positions, cache)
        rotation = self.rotary(positions) if self.rotary is not None else None
        x = self.dropout(x)
        for index, layer in enumerate(self.layers):
            x = layer(x, mask, rotation, cache.layers[index] if cache is not None else None, condition)
        return x if self.norm is None else self.norm(x, condition)
