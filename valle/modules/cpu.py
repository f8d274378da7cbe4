"""What training on a CPU spends its time on, in the form that a CPU does fastest; every function has its own backward.

    linear       oneDNN's products for all three of forward and backward: PyTorch takes MKL's for float32, which on AMD
                 are half as fast, and for bfloat16 its own way to add the bias
    drop         8 random bits an element instead of a draw from a Bernoulli distribution
    attend_rows  attention row by row, over its own frames only: no padding, no mask, and no product where causality
                 leaves nothing. In bfloat16 plain products take half the time of PyTorch's fused kernel
    scale_rows   adaptive normalization's weights, one set a row
    normalize    a layer's normalization, for bfloat16 products
    read_from    (of `Rows`) the frames whose output is read: the last layer computes no others

In bfloat16 the kernels in C of `valle/native` do it where they are there; what is said above is what runs elsewhere.

Where a function does not serve (a GPU, another number format), it says so by `serves`, and callers use PyTorch's.
"""

import platform
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from valle import native

QUERY_BLOCK = 256  # queries that share one product over the keys up to the last of them
KEPT_BYTES = 64 << 20  # attention weights of a row beyond this are computed again in backward instead of kept
LEAST_ROWS = 32  # below which laying out the weights costs more than the product
LEVELS = 256  # dropout's probability is a multiple of 1 / LEVELS
_pointwise: Any = torch.ops.mkldnn._linear_pointwise.default


class Rows(NamedTuple):
    """Rows of a packed batch, (N, …) without padding: row i is the frames starts[i] … starts[i] + lens[i] - 1.

    Attributes:
        lens: frames of each row.
        prompts: the first frames of each, which see one another; those behind see what is before them. Equal to
            `lens` where all see all.
    """

    lens: list[int]
    prompts: list[int]

    def spans(self) -> list[tuple[int, int, int]]:
        """(start, prompt, length) of each row."""
        spans, start = [], 0
        for prompt, length in zip(self.prompts, self.lens, strict=True):
            spans.append((start, prompt, length))
            start += length
        return spans

    def read_from(self, firsts: list[int]) -> "Read | None":
        """Of each row the frames from its own first on; None where these are all."""
        if not any(firsts):
            return None
        index = [
            torch.arange(start + first, start + n)
            for (start, _, n), first in zip(self.spans(), firsts, strict=True)
        ]
        lens = [n - first for n, first in zip(self.lens, firsts, strict=True)]
        return Read(torch.cat(index), Rows(lens, lens))


class Read(NamedTuple):
    """Frames of a packed batch whose output is read.

    Attributes:
        frames: where each is in the batch.
        rows: that they make up themselves.
    """

    frames: Tensor
    rows: Rows


def serves(x: Tensor) -> bool:
    """Whether the functions here take this input: an x86 CPU, float32 or bfloat16 (also by autocast)."""
    if torch.compiler.is_compiling():
        return False
    return _ON_X86 and x.device.type == "cpu" and compute_dtype(x) in (torch.float32, torch.bfloat16)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What products are made in: autocast's number format where it is on."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """(N, I), (O, I) -> a bᵀ, (N, O)."""
    return _pointwise(a, b, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(dtype).contiguous()
        ctx.kinds = x.dtype, weight.dtype, bias.dtype if bias is not None else None
        ctx.shape = x.shape
        ctx.native = _native_serves(flat, weight)
        if ctx.native:
            y = native.product(flat, weight, bias.float() if bias is not None else None)
        else:
            weight = weight.to(dtype)
            y = product(flat, weight, bias.to(dtype) if bias is not None else None)
        ctx.save_for_backward(flat, weight)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1]).to(x.dtype)
        grad_x = grad_weight = grad_bias = None
        if ctx.native:
            grad = grad if grad.stride(-1) == 1 else grad.contiguous()
            if ctx.needs_input_grad[0]:
                grad_x = native.product(grad, weight, dtype=ctx.kinds[0], by_rows=True).view(ctx.shape)
            if ctx.needs_input_grad[1]:
                grad_weight, sums = native.product_of_columns(grad, x, ctx.kinds[1], ctx.needs_input_grad[2])
                grad_bias = None if sums is None else sums.to(ctx.kinds[2])
            elif ctx.needs_input_grad[2]:
                grad_bias = grad.sum(0, dtype=torch.float32).to(ctx.kinds[2])
            return grad_x, grad_weight, grad_bias, None
        if ctx.needs_input_grad[0]:
            grad_x = product(grad, weight.t()).view(ctx.shape).to(ctx.kinds[0])
        if ctx.needs_input_grad[1]:
            # In bfloat16 PyTorch's own product is oneDNN's already, and takes transposed factors without a copy.
            by_torch = x.dtype == torch.bfloat16
            grad_weight = torch.mm(grad.t(), x) if by_torch else product(grad.t(), x.t())
            grad_weight = grad_weight.to(ctx.kinds[1])
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0).to(ctx.kinds[2])
        return grad_x, grad_weight, grad_bias, None


def _native_serves(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels in C take this product."""
    return (
        x.dtype == torch.bfloat16
        and weight.dtype in (torch.float32, torch.bfloat16)
        and x.shape[1] % 2 == weight.shape[0] % 2 == 0
        and x.shape[0] >= LEAST_ROWS
        and weight.stride(1) == 1
        and native.available()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(…, I) -> (…, O), as `F.linear`, under autocast too; for inputs that this module `serves`."""
    return _Linear.apply(x, weight, bias, compute_dtype(x))


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, level: int) -> Tensor:
        ctx.level, ctx.seed = level, None
        if native.available():
            ctx.seed = _draw_seed()
            return native.drop(x.contiguous(), level, ctx.seed)
        drawn = _draw_bytes(x)
        ctx.save_for_backward(drawn)
        return _masked(x, drawn, level)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        if ctx.seed is not None:
            return native.drop(grad.contiguous(), ctx.level, ctx.seed), None
        return _masked(grad, ctx.saved_tensors[0], ctx.level), None


class _DropAndAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, level: int, other: Tensor) -> Tensor:
        ctx.level, ctx.seed, ctx.kinds = level, _draw_seed() if level else 0, (x.dtype, other.dtype)
        dtype = torch.promote_types(x.dtype, other.dtype)
        return native.drop(x.contiguous(), level, ctx.seed, other.contiguous(), dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        dropped, other = ctx.kinds
        return native.drop(grad.contiguous(), ctx.level, ctx.seed, dtype=dropped), None, grad.to(other)


class _ActivateAndDrop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, level: int) -> Tensor:
        x = x.contiguous()
        ctx.name, ctx.level, ctx.seed = name, level, _draw_seed() if level else 0
        ctx.save_for_backward(x)
        return native.activate_and_drop(name, x, level, ctx.seed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return native.activate_and_drop(ctx.name, grad.contiguous(), ctx.level, ctx.seed, x), None, None


def _draw_seed() -> int:
    """What a kernel draws its bytes from, from PyTorch's generator."""
    return int(torch.empty((), dtype=torch.int64).random_())


def _draw_bytes(x: Tensor) -> Tensor:
    """A random byte for each element."""
    return torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)


def _masked(x: Tensor, drawn: Tensor, level: int) -> Tensor:
    """x / keep where the drawn byte, -128 … 127, is below the limit, else 0."""
    integer, bits = (torch.int16, 15) if x.element_size() == 2 else (torch.int32, 31)
    x = x.contiguous()
    mask = drawn.view(torch.int8)[: x.numel()].to(integer)
    # The sign of the difference, spread over all bits: -1 keeps, 0 does not.
    mask.sub_(LEVELS // 2 - level).bitwise_right_shift_(bits)
    mask &= x.view(integer).view(-1)
    return mask.view(x.dtype).view(x.shape).mul_(LEVELS / (LEVELS - level))


def drop(x: Tensor, p: float) -> Tensor:
    """Dropout with a probability rounded to 1/256, and scaled by what it is then; float32 or bfloat16."""
    level = round(p * LEVELS)
    if level == 0:
        return x
    return _Drop.apply(x, level) if level < LEVELS else x * 0.0


def drop_and_add(x: Tensor, p: float, other: Tensor) -> Tensor:
    """drop(x, p) + other, of one shape."""
    level = round(p * LEVELS)
    kinds = (torch.float32, torch.bfloat16)
    if level < LEVELS and native.available() and x.dtype in kinds and other.dtype in kinds:
        return _DropAndAdd.apply(x, level, other)
    return drop(x, p) + other


def activate_and_drop(x: Tensor, name: str, p: float) -> Tensor:
    """drop(f(x), p), for f "relu" or "gelu"."""
    level = round(p * LEVELS)
    if level < LEVELS and native.available() and x.dtype == torch.bfloat16:
        return _ActivateAndDrop.apply(x, name, level)
    return drop(F.relu(x) if name == "relu" else F.gelu(x), p)


def normalizes(x: Tensor) -> bool:
    """Whether `normalize` takes this input: float32 frames, (N, D), whose normalization bfloat16 products read."""
    return (
        x.dtype == torch.float32
        and x.dim() == 2
        and serves(x)
        and compute_dtype(x) == torch.bfloat16
        and native.available()
    )


def normalize(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, rows: Rows | None = None
) -> tuple[Tensor, Tensor]:
    """x (N, D), and its layer normalization in bfloat16, times weight, plus bias; for inputs that are `normalizes`.

    Who goes on with the x that comes back has gradients of both branches added in the normalization's own backward.

    Args:
        weight, bias: (R, D), one set for each row of `rows`; or (1, D) for all frames.
    """
    if rows is None:
        starts, lens = torch.tensor([0]), torch.tensor([len(x)])
    else:
        starts, _, lens = torch.tensor(rows.spans()).reshape(-1, 3).t().contiguous().unbind()
    return _Normalize.apply(x, weight.float().contiguous(), bias.float().contiguous(), starts, lens, eps)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor, lens: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        x = x.contiguous()
        out, stats = native.normalize(x, weight, bias, starts, lens, eps, torch.bfloat16)
        ctx.save_for_backward(x, weight, starts, lens, stats)
        return x.view_as(x), out

    @staticmethod
    def backward(ctx: Any, beside: Tensor | None, grad: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        if grad is None:
            return beside, None, None, None, None, None
        beside = None if beside is None else beside.contiguous()
        x, weight, starts, lens, stats = ctx.saved_tensors
        grads = native.normalize_backward(x, weight, starts, lens, stats, grad.contiguous(), beside)
        return *grads, None, None, None


class _ScaleRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        ctx.save_for_backward(x, weight)
        ctx.kind = bias.dtype
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        out = torch.empty_like(x)
        for row, (start, _, length) in enumerate(rows.spans()):
            part = slice(start, start + length)
            torch.addcmul(bias[row], x[part], weight[row], out=out[part])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grad_weight = torch.empty(weight.shape)
        grad_bias = torch.empty(weight.shape)
        scale = weight.to(x.dtype)
        for row, (start, _, length) in enumerate(ctx.rows.spans()):
            part = slice(start, start + length)
            torch.mul(grad[part], scale[row], out=grad_x[part])
            torch.sum(grad[part] * x[part], 0, out=grad_weight[row])
            torch.sum(grad[part], 0, out=grad_bias[row])
        return grad_x, grad_weight.to(weight.dtype), grad_bias.to(ctx.kind), None


def scale_rows(x: Tensor, weight: Tensor, bias: Tensor, rows: Rows) -> Tensor:
    """x (N, D) times each row's weight, plus its bias, (B, D) each."""
    return _ScaleRows.apply(x, weight, bias, rows)


def attend_rows(
    qkv: Tensor, rotation: tuple[Tensor, Tensor] | None, rows: Rows, scale: float, dropout: float = 0.0
) -> Tensor:
    """Attention inside each row.

    Args:
        qkv: (N, 3, H, d) queries, keys and values, float32 or bfloat16.
        rotation: cosines and sines, (N, d) float32, by which queries and keys turn (`embeddings.rotate`).
        rows: where rows begin and who sees whom.
        scale: of the scores.
        dropout: of the weights, rounded to 1/256.

    Returns:
        (N, H · d).
    """
    cosine, sine = rotation if rotation is not None else (None, None)
    level = min(round(dropout * LEVELS), LEVELS - 1)
    if qkv.dtype == torch.bfloat16 and qkv.shape[-1] % 2 == 0 and native.available():
        return _AttendNatively.apply(qkv, cosine, sine, rows, scale, level)
    return _AttendRows.apply(qkv, cosine, sine, rows, scale, level)


class _AttendNatively(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cosine: Tensor | None,
        sine: Tensor | None,
        rows: Rows,
        scale: float,
        level: int,
    ) -> Tensor:
        qkv = qkv.contiguous()
        if cosine is not None and sine is not None:
            cosine, sine = cosine.float().contiguous(), sine.float().contiguous()
        starts, prompts, lens = torch.tensor(rows.spans()).reshape(-1, 3).t().contiguous().unbind()
        seed = _draw_seed() if level else 0
        ctx.attention = native.Attention(cosine, sine, starts, prompts, lens, scale, level, seed)
        out, sums = ctx.attention.forward(qkv)
        ctx.save_for_backward(qkv, out, sums)
        return out.view(len(qkv), -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        qkv, out, sums = ctx.saved_tensors
        grad = grad.to(qkv.dtype).contiguous()
        return ctx.attention.backward(qkv, out, sums, grad), None, None, None, None, None


class _AttendRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cosine: Tensor | None,
        sine: Tensor | None,
        rows: Rows,
        scale: float,
        level: int,
    ) -> Tensor:
        frames, _, heads, size = qkv.shape
        out = qkv.new_empty(frames, heads, size)
        saved: list[Tensor] = []
        for start, prompt, length in rows.spans():
            part = slice(start, start + length)
            turned = _turn(qkv[part, :2], cosine, sine, part)  # (2, H, L, d)
            turned[0] *= scale
            # Contiguous by head: oneDNN has no fast kernel for all strides.
            value = qkv[part, 2].transpose(0, 1).contiguous()
            result = out[part].transpose(0, 1)
            saved += [turned, value]
            keep = _keeps(heads, length, qkv)
            for first, last, seen in _blocks(prompt, length):
                weights = _weights(turned[0, :, first:last], turned[1, :, :seen], first, last, prompt)
                used = weights
                if level:
                    drawn = _draw_bytes(weights)
                    used = _masked(weights, drawn, level)
                    saved.append(drawn)
                result[:, first:last] = _bmm(used, value[:, :seen])
                if keep:
                    saved.append(weights)
        ctx.level = level
        ctx.rows, ctx.scale, ctx.rotates, ctx.shape = rows, scale, cosine is not None, qkv.shape
        if cosine is not None and sine is not None:
            saved += [cosine, sine]
        ctx.save_for_backward(*saved)
        return out.view(frames, heads * size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        rest = ctx.saved_tensors
        cosine, sine = rest[-2:] if ctx.rotates else (None, None)
        saved = iter(rest)
        frames, _, heads, size = ctx.shape
        grad = grad.to(rest[0].dtype).view(frames, heads, size)
        grad_qkv = grad.new_empty(ctx.shape)
        for start, prompt, length in ctx.rows.spans():
            part = slice(start, start + length)
            turned, value = next(saved), next(saved)
            above = grad[part].transpose(0, 1).contiguous()
            keep = _keeps(heads, length, turned)
            # Later blocks see more keys: theirs first, the others' are added to their beginning.
            blocks = list(_blocks(prompt, length))
            each = [[next(saved) for _ in range(keep + (ctx.level > 0))] for _ in blocks]
            down = torch.empty_like(turned)
            grad_value = None
            for number in reversed(range(len(blocks))):
                first, last, seen = blocks[number]
                query, key = turned[0, :, first:last], turned[1, :, :seen]
                weights = each[number][-1] if keep else _weights(query, key, first, last, prompt)
                outer = above[:, first:last]
                scores = _bmm(outer, value[:, :seen].transpose(1, 2))
                used = weights
                if ctx.level:
                    used, scores = (_masked(x, each[number][0], ctx.level) for x in (weights, scores))
                scores = torch._softmax_backward_data(scores, weights, -1, weights.dtype)
                down[0, :, first:last] = _bmm(scores, key)
                to_key, to_value = _bmm(scores.transpose(1, 2), query), _bmm(used.transpose(1, 2), outer)
                if grad_value is None:
                    down[1], grad_value = to_key, to_value
                else:
                    down[1, :, :seen] += to_key
                    grad_value[:, :seen] += to_value
            down[0] *= ctx.scale
            grad_qkv[part, 2] = grad_value.transpose(0, 1)  # type: ignore[union-attr]
            grad_qkv[part, :2] = _turn_back(down, cosine, sine, part)
        return grad_qkv, None, None, None, None, None


def _keeps(heads: int, length: int, like: Tensor) -> bool:
    return heads * length * length * like.element_size() <= KEPT_BYTES


def _blocks(prompt: int, length: int) -> list[tuple[int, int, int]]:
    """(first query, last query + 1, keys seen by the last) of each block: the prompt, then the target in pieces."""
    blocks = [(0, prompt, prompt)]
    for first in range(prompt, length, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, length)
        blocks.append((first, last, last))
    return blocks if prompt else blocks[1:]


def _weights(query: Tensor, key: Tensor, first: int, last: int, prompt: int) -> Tensor:
    """Softmax of (H, Tq, d) · (H, Tk, d)ᵀ; behind the prompt, no query sees a later key."""
    scores = _bmm(query, key.transpose(1, 2))
    if first >= prompt:
        later = torch.ones(last - first, last - first, dtype=torch.bool).triu_(1)
        scores[:, :, first:last].masked_fill_(later, -torch.inf)
    return torch.softmax(scores, -1)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """(H, M, K), (H, K, N) -> (H, M, N); in float32 head by head, by oneDNN instead of MKL."""
    if a.dtype != torch.float32 or a.shape[1] * b.shape[2] < 4096:
        return torch.bmm(a, b)
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    for head in range(a.shape[0]):
        out[head] = product(a[head], b[head].t())
    return out


def _turn(x: Tensor, cosine: Tensor | None, sine: Tensor | None, part: slice) -> Tensor:
    """(L, 2, H, d) -> (2, H, L, d), turned in float32."""
    if cosine is None or sine is None:
        return x.permute(1, 2, 0, 3).clone(memory_format=torch.contiguous_format)
    half = x.shape[-1] // 2
    out = x.new_empty(x.shape[1], x.shape[2], x.shape[0], x.shape[3])
    c, s = cosine[part, None, None, :half], sine[part, None, None, :half]
    one, two = x[..., :half].float(), x[..., half:].float()
    out[..., :half] = (one * c).addcmul_(two, s, value=-1).permute(1, 2, 0, 3)
    out[..., half:] = (two * c).addcmul_(one, s).permute(1, 2, 0, 3)
    return out


def _turn_back(x: Tensor, cosine: Tensor | None, sine: Tensor | None, part: slice) -> Tensor:
    """(2, H, L, d) -> (L, 2, H, d), turned the other way."""
    x = x.permute(2, 0, 1, 3)
    if cosine is None or sine is None:
        return x
    half = x.shape[-1] // 2
    out = x.new_empty(x.shape)
    c, s = cosine[part, None, None, :half], sine[part, None, None, :half]
    one, two = x[..., :half].float(), x[..., half:].float()
    out[..., :half] = (one * c).addcmul_(two, s)
    out[..., half:] = (two * c).addcmul_(one, s, value=-1)
    return out


_ON_X86 = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
