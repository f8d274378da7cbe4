"""A packed transformer's forward pass for one new frame, with as few operations as it takes.

For a small model, what Python and PyTorch do around the products costs more than the products. This is
`Transformer.forward` again for the case of one frame a row over a `BagCache` (tests hold the two together): layers
unrolled into plain lists, scale folded into the weights, residuals and activations left to the packed layers.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from valle.modules.bags import CHUNK, BagCache
from valle.native.generation import NativeStep, PackedWeight, StepLayer

if TYPE_CHECKING:
    from valle.modules.transformer import Transformer

Norm = tuple[tuple[int, ...], Tensor, Tensor, float]


class _Layer(NamedTuple):
    norm1: Norm
    project_in: Callable[[Tensor], Tensor]
    project_out: Callable[[Tensor, Tensor], Tensor]
    norm2: Norm
    widen: Callable[[Tensor, str], Tensor]
    narrow: Callable[[Tensor, Tensor], Tensor]
    head_norm: Callable[[Tensor], Tensor] | None


class Stepper:
    """Computes single frames of a packed `Transformer` without a condition; where its layers are `valle/native`'s, all
    of them in one call.

    Args:
        transformer: its layers are packed.
    """

    native: NativeStep | None = None

    def __init__(self, transformer: "Transformer") -> None:
        self.nhead, self.head_dim = transformer.nhead, transformer.head_dim
        self.rotary = transformer.rotary
        self.table = torch.zeros(0, 2, self.head_dim)  # (positions, 2, d) cosines and sines
        self.layers: list[_Layer] = []
        self.norm: Norm | None = None
        if transformer.adaptive:
            return  # the NAR decoder's: never steps
        for layer in transformer.layers:
            attention: Any = layer.self_attn
            widen: Any = layer.linear1
            narrow: Any = layer.linear2
            self.layers.append(
                _Layer(
                    _norm(layer.norm1),
                    attention.project_in.forward,
                    attention.out_proj.added,
                    _norm(layer.norm2),
                    widen.activated,
                    narrow.added,
                    _head_norm(attention),
                )
            )
        self.norm_first = transformer.norm is not None
        self.norm = _norm(transformer.norm) if transformer.norm is not None else None
        self.activation = transformer.layers[0].activation_name
        self.native = self._native(transformer)

    def _native(self, transformer: "Transformer") -> NativeStep | None:
        """All layers for `valle/native`, if they are packed by it."""
        layers = []
        for layer in cast(Any, transformer.layers):
            attention = layer.self_attn
            parts = (attention.project_in, attention.out_proj, layer.linear1, layer.linear2)
            weights = [getattr(part, "packed", None) for part in parts]
            if not all(isinstance(weight, PackedWeight) for weight in weights):
                return None
            norms = [(norm.weight.detach(), norm.bias.detach()) for norm in (layer.norm1, layer.norm2)]
            heads = attention.query_norm, attention.key_norm
            layers.append(
                StepLayer(*weights, *norms, *(norm and norm.weight.detach() for norm in heads))  # type: ignore[arg-type]
            )
        norm = self.norm[1:3] if self.norm is not None else None
        head_eps = heads[0].eps if heads[0] is not None else 0.0
        return NativeStep(layers, norm, self.nhead, self.activation, self.layers[0].norm1[3], head_eps)

    def _run_natively(self, native: NativeStep, x: Tensor, positions: Tensor, cache: BagCache) -> Tensor:
        column = cache.take_column()
        if cache.table is None:
            cache.table = native.table([(layer.keys, layer.values) for layer in cache.layers])
        rows, _, dim = x.shape
        out = x.reshape(rows, dim).to(torch.float32, copy=True)
        turns = self._rotations(positions, cache.chunks * CHUNK) if self.rotary is not None else None
        half = cache.dtype == torch.float16
        native.run(out, cache.table, cache.chunks, column, half, cache.starts, turns)
        return out[:, None]

    def _rotations(self, positions: Tensor, columns: int) -> Tensor:
        """Cosines, and sines with the first half negative, of positions (rows, 1) < columns: (rows, 2, d)."""
        if len(self.table) < columns:
            assert self.rotary is not None
            cosine, sine = self.rotary(torch.arange(columns))
            half = self.head_dim // 2
            sine = torch.cat([-sine[..., :half], sine[..., half:]], -1)
            self.table = torch.stack([cosine[0, 0], sine[0, 0]], 1)
        return self.table.index_select(0, positions.view(-1))

    def __call__(self, x: Tensor, positions: Tensor, cache: BagCache) -> Tensor:
        """(rows, 1, D) float32 at `positions` (rows, 1) -> (rows, 1, D); the cache grows by one column."""
        if self.native is not None:
            return self._run_natively(self.native, x, positions, cache)
        cache.make_room()
        rows, _, dim = x.shape
        x = x.view(rows, dim)
        heads, half, pre, activation = self.nhead, self.head_dim // 2, self.norm_first, self.activation
        split = (rows, 3 * heads, self.head_dim)
        layer_norm, addcmul = torch.layer_norm, torch.addcmul
        if self.rotary is not None:
            turns = self._rotations(positions, cache.chunks * CHUNK)
            cosine, sine = turns.narrow(1, 0, 1), turns.narrow(1, 1, 1)
        for layer, store in zip(self.layers, cache.layers, strict=True):
            norm1, project_in, project_out, norm2, widen, narrow, head_norm = layer
            qkv = project_in(layer_norm(x, *norm1) if pre else x).view(split)
            if head_norm is not None:
                qkv = head_norm(qkv)
            if self.rotary is not None:
                turned = qkv.narrow(1, 0, 2 * heads)
                turned = addcmul(turned * cosine, turned.roll(half, -1), sine)
            else:
                turned = qkv
            query, key = turned.narrow(1, 0, heads), turned.narrow(1, heads, heads)
            x = project_out(store.attend(query, key, qkv.narrow(1, 2 * heads, heads)), x)
            if pre:
                x = narrow(widen(layer_norm(x, *norm2), activation), x)
            else:
                x = layer_norm(x, *norm1)
                x = layer_norm(narrow(widen(x, activation), x), *norm2)
        return (x if self.norm is None else layer_norm(x, *self.norm))[:, None]


def _head_norm(attention: Any) -> Callable[[Tensor], Tensor] | None:
    """Normalizes queries and keys in (rows, 3 · H, d), where the model does."""
    if attention.query_norm is None:
        return None
    heads = attention.nhead
    weight = torch.stack([attention.query_norm.weight, attention.key_norm.weight]).detach()
    weight = weight.repeat_interleave(heads, 0)  # (2 · H, d)
    eps = attention.query_norm.eps

    def normalize(qkv: Tensor) -> Tensor:
        both = qkv.narrow(1, 0, 2 * heads).float()
        both = torch.rms_norm(both, both.shape[-1:], None, eps).mul_(weight).to(qkv.dtype)
        return torch.cat([both, qkv.narrow(1, 2 * heads, heads)], 1)

    return normalize


def _norm(module: Any) -> Norm:
    return tuple(module.normalized_shape), module.weight, module.bias, module.eps
