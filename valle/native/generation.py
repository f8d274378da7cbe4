"""Packed linear layers, and a decoder's whole step for one new frame a row, in C; see the ends of kernels.c.

A layer's weights are laid out once, in panels of 64 outputs; inputs are rounded to the weights' format row by row,
so that a row's result depends on nothing beside it, and sums are taken in one order whatever the number of threads.
Needs `valle.native.available()`.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from valle import native

FLOATS, BFLOATS, BYTES = range(3)
KINDS = {torch.float32: FLOATS, torch.bfloat16: BFLOATS, torch.int8: BYTES}
NUMBERS = {FLOATS: 1, BFLOATS: 2, BYTES: 4}  # of a row that 4 bytes hold
PANEL, ALIGNED = 64, 64  # outputs of a panel; bytes
_int, _pointer = ctypes.c_int64, ctypes.c_void_p


class _Packed(ctypes.Structure):
    _fields_ = [
        *((name, _int) for name in ("kind", "inner", "outer")),
        *((name, _pointer) for name in ("panels", "scale", "sums", "bias")),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Packed) for name in ("project_in", "project_out", "widen", "narrow")),
        *((name, _pointer) for name in ("norm1", "bias1", "norm2", "bias2", "query_norm", "key_norm")),
        *((name, _pointer) for name in ("keys", "values")),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *(
            (name, _int)
            for name in ("layers", "rows", "dim", "heads", "size", "norm_first", "activation", "half")
        ),
        *((name, _int) for name in ("chunks", "column")),
        *((name, _pointer) for name in ("starts", "turns", "norm", "bias")),
        *((name, ctypes.c_float) for name in ("eps", "head_eps")),
    ]


class PackedWeight:
    """The weights of a linear layer, laid out.

    Args:
        weight: (O, I) float32, bfloat16 or int8, whose format the products are made in.
        bias: (O,) float32, or None.
        scale: (O,) float32 of int8 weights: what they count.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> None:
        self.kind = KINDS[weight.dtype]
        self.outer, self.inner = weight.shape
        steps = -(-self.inner // NUMBERS[self.kind])
        size = -(-self.outer // PANEL) * PANEL * steps * 4
        self.memory = torch.empty(size + ALIGNED, dtype=torch.uint8)
        start = -self.memory.data_ptr() % ALIGNED
        self.panels = self.memory[start : start + size]
        weight = (weight.float() if self.kind == BFLOATS else weight).contiguous()
        native.library().valle_pack(
            self.kind,
            weight.data_ptr(),
            self.outer,
            self.inner,
            self.panels.data_ptr(),
            torch.get_num_threads(),
        )
        self.bias = None if bias is None else bias.float().contiguous()
        self.scale = None if scale is None else scale.float().contiguous()
        self.sums = None if scale is None else weight.sum(1, dtype=torch.int32)
        self.address = _Packed(
            self.kind, self.inner, self.outer,
            *(None if x is None else x.data_ptr() for x in (self.panels, self.scale, self.sums, self.bias)),
        )  # fmt: skip

    def product(self, x: Tensor, dtype: torch.dtype, activation: str | None = None) -> Tensor:
        """(…, I) -> (…, O), float32 or bfloat16, with "relu" or "gelu" behind it."""
        x = x if x.dtype == torch.bfloat16 else x.float()
        flat = x.reshape(-1, self.inner).contiguous()
        out = torch.empty(len(flat), self.outer, dtype=dtype)
        code = native.ACTIVATIONS[activation] if activation else 0
        failed = native.library().valle_packed_product(
            ctypes.byref(self.address), flat.data_ptr(), flat.dtype == torch.float32, len(flat), out.data_ptr(),
            dtype == torch.float32, code, torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError("no memory for a product's inputs")
        return out.view(*x.shape[:-1], self.outer)


class StepLayer(NamedTuple):
    """A decoder's layer, as a step needs it.

    Attributes:
        project_in, project_out, widen, narrow: its weights: to queries, keys and values, and back; feed-forward.
        norm1, norm2: weight and bias of its normalizations, (D,) float32.
        query_norm, key_norm: (d,) float32, root-mean-square normalization of queries and keys; or None.
    """

    project_in: PackedWeight
    project_out: PackedWeight
    widen: PackedWeight
    narrow: PackedWeight
    norm1: tuple[Tensor, Tensor]
    norm2: tuple[Tensor, Tensor]
    query_norm: Tensor | None
    key_norm: Tensor | None


class NativeStep:
    """Computes one new frame of each row through all layers.

    Args:
        layers: of the decoder.
        norm: weight and bias of the last normalization; None: layers normalize behind themselves.
        heads: of attention.
        activation: "gelu" or "relu".
        eps, head_eps: of the normalizations, and of those of queries and keys.
    """

    def __init__(
        self,
        layers: Sequence[StepLayer],
        norm: tuple[Tensor, Tensor] | None,
        heads: int,
        activation: str,
        eps: float,
        head_eps: float,
    ) -> None:
        self.layers, self.norm, self.heads = list(layers), norm, heads
        self.dim = layers[0].project_out.outer
        self.activation, self.eps, self.head_eps = activation, eps, head_eps

    def table(self, caches: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """What `run` needs of a cache: each layer's keys (B, H, chunks, d, 64) and values (B, H, chunks · 64, d)."""
        rows = []
        for layer, (keys, values) in zip(self.layers, caches, strict=True):
            others = (*layer.norm1, *layer.norm2, layer.query_norm, layer.key_norm, keys, values)
            addresses = (None if x is None else x.data_ptr() for x in others)
            rows.append(_Layer(*(weight.address for weight in layer[:4]), *addresses))
        return (_Layer * len(rows))(*rows)

    def run(
        self,
        x: Tensor,
        table: Any,
        chunks: int,
        column: int,
        half: bool,
        starts: Tensor,
        turns: Tensor | None,
    ) -> None:
        """x (rows, D) float32, contiguous, goes through the layers in place.

        Args:
            table: of the cache, which gains a column.
            chunks: that the cache has.
            column: where the new frame goes.
            half: whether the cache is float16, not float32.
            starts: (rows,) int64, the first column that each row sees.
            turns: cosines, and sines, of which the second half is read: (rows, 2, d) float32, contiguous.
        """
        angles = None if turns is None else turns.data_ptr()
        last = [part.data_ptr() for part in self.norm] if self.norm is not None else [None, None]
        step = _Step(
            len(self.layers), len(x), self.dim, self.heads, self.dim // self.heads, self.norm is not None,
            native.ACTIVATIONS[self.activation], half, chunks, column, starts.data_ptr(), angles, *last, self.eps,
            self.head_eps,
        )  # fmt: skip
        if native.library().valle_step(ctypes.byref(step), table, x.data_ptr(), torch.get_num_threads()):
            raise MemoryError("no memory for a decoder's step")
