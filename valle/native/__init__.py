"""Kernels in C for what PyTorch's libraries leave on the table on a CPU; see kernels.c.

Everything here takes bfloat16 (weights also float32) and needs `available()`. Sums are kept in float32 and taken in one
order, so results do not depend on the number of threads.
"""

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from valle.native.building import load

_BFLOAT16 = torch.bfloat16
_library: Any = None


def available() -> bool:
    """Whether the kernels are there; the first call may compile them, in a few seconds."""
    global _library
    if _library is None:
        _library = _declared(load()[0]) or False
    return bool(_library)


def library() -> Any:
    """The kernels themselves, where they are `available`."""
    return _library


def state() -> str:
    """Where the kernels lie, or why there are none."""
    return load()[1]


def product(
    a: Tensor, b: Tensor, bias: Tensor | None = None, dtype: torch.dtype = _BFLOAT16, by_rows: bool = False
) -> Tensor:
    """a bᵀ + bias: (N, I) bfloat16, (O, I), (O,) float32 -> (N, O); with `by_rows` a b, for b (I, O).

    Args:
        b: bfloat16 or float32; float32 is rounded to bfloat16 first.
        dtype: of the result, bfloat16 or float32.
    """
    rows, inner, columns = a.shape[0], a.shape[1], b.shape[1] if by_rows else b.shape[0]
    out = a.new_empty(rows, columns, dtype=dtype)
    _check(
        _library.valle_product(
            a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0), b.dtype != _BFLOAT16, by_rows,
            None if bias is None else bias.data_ptr(), out.data_ptr(), columns, dtype != _BFLOAT16,
            rows, columns, inner, torch.get_num_threads(),
        )
    )  # fmt: skip
    return out


def product_of_columns(
    a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32, with_sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    """aᵀ b: (N, O), (N, I) bfloat16 -> (O, I); and the sums of a's columns, (O,) float32, or None."""
    rows, columns = a.shape[1], b.shape[1]
    out = a.new_empty(rows, columns, dtype=dtype)
    sums = a.new_empty(rows, dtype=torch.float32) if with_sums else None
    _check(
        _library.valle_product_of_columns(
            a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0), out.data_ptr(), columns,
            dtype != _BFLOAT16, None if sums is None else sums.data_ptr(), rows, columns, a.shape[0],
            torch.get_num_threads(),
        )
    )  # fmt: skip
    return out, sums


def normalize(
    x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor, lens: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Layer normalization of x (N, D), weight and bias (R, D), all float32; row r is lens[r] frames from starts[r].

    Returns:
        (N, D) in `dtype`, and the mean and one over the deviation of each frame, (N, 2).
    """
    out, stats = torch.empty_like(x, dtype=dtype), x.new_empty(len(x), 2)
    _check(
        _library.valle_normalize(
            x.data_ptr(), weight.data_ptr(), bias.data_ptr(), starts.data_ptr(), lens.data_ptr(), len(weight),
            x.shape[1], eps, out.data_ptr(), dtype != _BFLOAT16, stats.data_ptr(), torch.get_num_threads(),
        )
    )  # fmt: skip
    return out, stats


def normalize_backward(
    x: Tensor,
    weight: Tensor,
    starts: Tensor,
    lens: Tensor,
    stats: Tensor,
    grad: Tensor,
    beside: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients at x (plus `beside`, float32), weight and bias from that at `normalize`'s result."""
    to_x, to_weight, to_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    _check(
        _library.valle_normalize_backward(
            x.data_ptr(), weight.data_ptr(), starts.data_ptr(), lens.data_ptr(), len(weight), x.shape[1],
            stats.data_ptr(), grad.data_ptr(), grad.dtype != _BFLOAT16,
            None if beside is None else beside.data_ptr(), to_x.data_ptr(), to_weight.data_ptr(), to_bias.data_ptr(),
            torch.get_num_threads(),
        )
    )  # fmt: skip
    return to_x, to_weight, to_bias


def drop(
    x: Tensor, level: int, seed: int, other: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """x / (1 - level / 256), where the byte drawn from seed and place is at least level, else 0; plus `other`.

    Args:
        x: contiguous, bfloat16 or float32, as is `other`, of the same size.
        dtype: of the result, as x where none is given.
    """
    dtype = dtype or x.dtype
    out = torch.empty_like(x, dtype=dtype)
    _library.valle_drop(
        x.data_ptr(), x.dtype != _BFLOAT16, None if other is None else other.data_ptr(),
        other is not None and other.dtype != _BFLOAT16, out.data_ptr(), dtype != _BFLOAT16, x.numel(), level, seed,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


ACTIVATIONS = {"relu": 1, "gelu": 2}


def activate_and_drop(name: str, x: Tensor, level: int, seed: int, into: Tensor | None = None) -> Tensor:
    """`drop` of an activation of x, contiguous and bfloat16; with `into`, the gradient there from that behind, x."""
    out = torch.empty_like(x)
    _library.valle_activate(
        ACTIVATIONS[name], x.data_ptr(), None if into is None else into.data_ptr(), out.data_ptr(), x.numel(), level,
        seed, torch.get_num_threads(),
    )  # fmt: skip
    return out


class Attention(NamedTuple):
    """What attention inside the rows of a packed batch needs, forward and backward.

    Attributes:
        cosine, sine: (N, d) float32, by which queries and keys turn; or None.
        starts, prompts, lens: (R,) int64: each row's first frame, how many see one another, and all its frames.
        scale: of the scores.
        level, seed: dropout of the weights, as in `drop`.
    """

    cosine: Tensor | None
    sine: Tensor | None
    starts: Tensor
    prompts: Tensor
    lens: Tensor
    scale: float
    level: int
    seed: int

    def _arguments(self, qkv: Tensor) -> tuple[Any, ...]:
        return (
            qkv.data_ptr(), *(None if x is None else x.data_ptr() for x in self[:5]), self.lens.numel(),
            *qkv.shape[2:], self.scale, self.level, self.seed,
        )  # fmt: skip

    def forward(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, H, d) bfloat16, contiguous -> (N, H, d), and what backward needs, (H, N)."""
        frames, _, heads, size = qkv.shape
        out, sums = qkv.new_empty(frames, heads, size), qkv.new_empty(heads, frames, dtype=torch.float32)
        threads = torch.get_num_threads()
        _check(_library.valle_attend(*self._arguments(qkv), out.data_ptr(), sums.data_ptr(), frames, threads))
        return out, sums

    def backward(self, qkv: Tensor, out: Tensor, sums: Tensor, grad: Tensor) -> Tensor:
        """The gradient at qkv from that at out, (N, H, d) bfloat16, contiguous."""
        into = torch.empty_like(qkv)
        _check(
            _library.valle_attend_backward(
                *self._arguments(qkv),
                out.data_ptr(),
                sums.data_ptr(),
                grad.data_ptr(),
                into.data_ptr(),
                qkv.shape[0],
                torch.get_num_threads(),
            )  # fmt: skip
        )
        return into


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for a matrix product's buffers")


def _declared(library: ctypes.CDLL | None) -> ctypes.CDLL | None:
    """The library with its functions' types: p address, n count, b flag or small
    number, s seed, f number."""
    if library is None:
        return None
    types = {
        "p": ctypes.c_void_p,
        "n": ctypes.c_int64,
        "b": ctypes.c_int,
        "s": ctypes.c_uint64,
        "f": ctypes.c_float,
    }
    for name, arguments in (
        ("product", "pnpnbbppnbnnnb"),
        ("product_of_columns", "pnpnpnbpnnnb"),
        ("normalize", "pppppnnfpbpb"),
        ("normalize_backward", "ppppnnppbppppb"),
        ("drop", "pbpbpbnbsb"),
        ("activate", "bpppnbsb"),
        ("pack", "npnnpb"),
        ("packed_product", "ppbnpbbb"),
        ("step", "pppb"),
        ("attend", "ppppppnnnfbsppnb"),
        ("attend_backward", "ppppppnnnfbsppppnb"),
    ):
        getattr(library, f"valle_{name}").argtypes = [types[kind] for kind in arguments]
    return library
