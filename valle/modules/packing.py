"""Models packed for generation: linear layers in fp32, bf16 or int8, in the form that the machine multiplies fastest.

`packed(model, "bf16")` is a copy of the model that shares its embeddings and norms; its linear layers hold packed
weights and no parameters. The same code runs it (`ar_logits`, `nar_logits`); docs/generation.md has the figures by
which the kernels were chosen:

    fp32  oneDNN with weights laid out once
    bf16  oneDNN with weights laid out once, bfloat16 products summed in float32; the residual stream stays float32
    int8  weights by output channel, inputs by frame (LLM.int8(), arXiv 2208.07339, section 2.1, "row-wise"); FBGEMM

Where `valle/native` has kernels, these take the place of all three, and a frame's whole step is one call. Where neither
is there (no x86 CPU, a GPU), PyTorch's own products run in the same number formats.
"""

import copy
import platform
import warnings
import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from valle import native
from valle.modules.stepping import Stepper
from valle.modules.transformer import AdaptiveLayerNorm, SelfAttention, Transformer, TransformerLayer
from valle.native.generation import PackedWeight
from valle.utils.errors import UserError

# The batch for which oneDNN lays out weights: the layout for 16 rows is read as fast as any at every batch, the one for
# a single row takes half as long again in float32.
LAYOUT_ROWS = 16
SMALLEST_SCALE = 6.1e-5  # of 8-bit inputs, in FBGEMM
FORMATS = ("fp32", "bf16", "int8")


class PackedLinear(nn.Module):
    """y = x Wᵀ + b with PyTorch's own products, in one number format.

    Args:
        weight: (O, I) float32.
        bias: (O,) or None.
        dtype: one of `FORMATS`; int8 keeps the weights in 8 bits and multiplies in float32.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: str) -> None:
        super().__init__()
        self.scale: Tensor | None = None
        if dtype == "int8":
            self.weight, self.scale = quantize_rows(weight)
        else:
            self.weight = weight.to(torch.bfloat16) if dtype == "bf16" else weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) -> (…, O)."""
        if self.scale is None:
            bias = self.bias.to(self.weight.dtype) if self.bias is not None else None
            return F.linear(x.to(self.weight.dtype), self.weight, bias)
        y = F.linear(x.float(), self.weight.float()) * self.scale
        return y if self.bias is None else y + self.bias

    def activated(self, x: Tensor, activation: str) -> Tensor:
        """The layer with "relu" or "gelu" behind it."""
        y = self.forward(x)
        return F.gelu(y) if activation == "gelu" else F.relu(y)

    def added(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + the layer."""
        return residual + self.forward(x)


class OneDnnLinear(PackedLinear):
    """float32, or bfloat16 weights and products with float32 sums and a bfloat16 result; laid out once."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.dtype = dtype
        self.blocked = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), LAYOUT_ROWS)
        self.bias = bias.to(dtype) if bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        return _pointwise(x.to(self.dtype), self.blocked, self.bias, "none", [], "")

    def activated(self, x: Tensor, activation: str) -> Tensor:
        return _pointwise(
            x.to(self.dtype), self.blocked, self.bias, activation, [None], _algorithm(activation)
        )

    def added(self, x: Tensor, residual: Tensor) -> Tensor:
        if self.dtype != residual.dtype:
            return residual + self.forward(x)
        return _pointwise_binary(x.to(self.dtype), residual, self.blocked, self.bias, "add")


class NativeLinear(PackedLinear):
    """The kernels of `valle/native`: float32, bfloat16 with float32 sums, or 8-bit weights by output channel.

    8-bit inputs are quantized row by row, each by its own range. The result is float32, or bfloat16 from such weights.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: str) -> None:
        nn.Module.__init__(self)
        scale = None
        if dtype == "int8":
            weight, scale = quantize_rows(weight)
        self.packed = PackedWeight(weight.to(torch.bfloat16) if dtype == "bf16" else weight, bias, scale)
        self.dtype = torch.bfloat16 if dtype == "bf16" else torch.float32

    def forward(self, x: Tensor) -> Tensor:
        return self.packed.product(x, self.dtype)

    def activated(self, x: Tensor, activation: str) -> Tensor:
        return self.packed.product(x, self.dtype, activation)


class DynamicInt8(PackedLinear):
    """8-bit weights by output channel, 8-bit inputs by frame, products in integers; float32 in and out.

    A single frame goes through FBGEMM's kernel, which quantizes its input by itself. More frames are quantized here,
    each by its own range and by the same rule, so that a frame's result does not depend on its neighbours.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        whole, scale = quantize_rows(weight)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "creation of quantized tensors will be removed"
            table = torch._make_per_channel_quantized_tensor(
                whole, scale, torch.zeros(len(scale), dtype=torch.long), 0
            )
        self.bias = bias
        self.weight = torch.ops.quantized.linear_prepack(table, bias)
        self.column_sums = whole.sum(1, dtype=torch.float32) * scale  # (O,)
        # Without VNNI, pairs of 8-bit products are summed in 16 bits: one bit less keeps them from overflowing.
        self.reduced = not torch.cpu._is_vnni_supported()

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        if x.numel() == x.shape[-1]:
            return torch.ops.quantized.linear_dynamic.default(x, self.weight, self.reduced)
        steps = 127 if self.reduced else 255
        low, high = x.amin(-1, keepdim=True).clamp_(max=0.0), x.amax(-1, keepdim=True).clamp_(min=0.0)
        scale = ((high - low) / steps).clamp_(min=1e-30)
        zero = (-low / scale).round_()
        scale = scale.clamp(min=SMALLEST_SCALE)
        # The inputs as 0 … steps.
        whole = torch.round(torch.addcmul(zero, x, scale.reciprocal())).clamp_(0, steps)
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default(
            whole, 1.0, 0, self.weight
        )
        # That is W · whole + b, and W · (whole - zero) · scale + b is wanted.
        if self.bias is None:
            return (y - zero * self.column_sums).mul_(scale)
        return y.sub_(torch.addcmul(self.bias, zero, self.column_sums)).mul_(scale).add_(self.bias)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(O, I) -> int8 (O, I) and the scale of each row, (O,) float32: largest value at 127."""
    scale = weight.detach().abs().amax(1).clamp(min=1e-12) / 127
    return (weight.detach() / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def on_x86(device: torch.device) -> bool:
    """Whether oneDNN's and FBGEMM's kernels for x86 CPUs are there."""
    return (
        device.type == "cpu"
        and platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()
        and "fbgemm" in torch.backends.quantized.supported_engines
    )


def pack_linear(weight: Tensor, bias: Tensor | None, dtype: str) -> PackedLinear:
    """The fastest kernel for a weight (O, I) in a number format, on the weight's device."""
    weight = weight.detach()
    bias = bias.detach() if bias is not None else None
    if weight.device.type == "cpu" and native.available():
        return NativeLinear(weight, bias, dtype)
    if on_x86(weight.device):
        if dtype == "int8":
            return DynamicInt8(weight, bias)
        if dtype == "fp32":
            return OneDnnLinear(weight, bias, torch.float32)
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return OneDnnLinear(weight, bias, torch.bfloat16)
    return PackedLinear(weight, bias, dtype)


def pack(model: nn.Module, dtype: str) -> Any:
    """A copy of a model for generation, see the head of this file. Later changes of the model do not reach it.

    Args:
        model: a model of this package; its `PACKING` says which number format each of its parts takes.
        dtype: one of `FORMATS`.

    Raises:
        UserError: unknown format, or a model whose weights are not float32.
    """
    if dtype not in FORMATS:
        raise UserError(f"dtype is '{dtype}', expected one of {', '.join(FORMATS)}")
    other = {item.dtype for item in model.parameters()} - {torch.float32}
    if other:
        raise UserError(f"the model's weights are {other.pop()}; keep them in float32 and give dtype='bf16'")
    formats = cast(Any, model).PACKING[dtype]
    with torch.inference_mode(False), torch.no_grad():
        shared: dict[int, Any] = {id(item): item for item in [*model.parameters(), *model.buffers()]}
        twin = copy.deepcopy(model, shared).eval()
        for name, child in list(twin.named_children()):
            _replace(twin, name, child, formats.get(name, "fp32"))
    return twin


def _replace(parent: nn.Module, name: str, module: nn.Module, dtype: str) -> None:
    if isinstance(module, nn.Linear):
        setattr(parent, name, pack_linear(module.weight, module.bias, dtype))
        return
    if isinstance(module, AdaptiveLayerNorm):  # its one row a sequence is not worth packing
        return
    for inner, child in list(module.named_children()):
        _replace(module, inner, child, dtype)
    if isinstance(module, SelfAttention):
        weight, bias = module.in_proj_weight, module.in_proj_bias
        # The scores' scale goes into the queries' weights, or into those of their norm, once instead of at every step.
        factor = torch.ones_like(bias)
        if module.query_norm is None:
            factor[: weight.shape[1]] = module.scale
        else:
            scaled = nn.RMSNorm(module.query_norm.normalized_shape, module.query_norm.eps)
            scaled.weight = nn.Parameter(module.query_norm.weight * module.scale, requires_grad=False)
            module.query_norm = scaled
        module.project_in = pack_linear(weight * factor[:, None], bias * factor, dtype)
        module.scale = 1.0
        module.register_parameter("in_proj_weight", None)
        module.register_parameter("in_proj_bias", None)
    if isinstance(module, TransformerLayer):
        module.packed = True
    if isinstance(module, Transformer):
        module.packed_dtype, module.stepper = dtype, Stepper(module)


_COPIES: "weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[Any, Any]]]" = weakref.WeakKeyDictionary()


def packed(model: nn.Module, dtype: str) -> Any:
    """`pack`, kept until the model's weights change."""
    state = [(item.data_ptr(), 0 if item.is_inference() else item._version) for item in model.parameters()]
    copies = _COPIES.setdefault(model, {})
    kept = copies.get(dtype)
    if kept is None or kept[0] != state:
        kept = copies[dtype] = (state, pack(model, dtype))
    return kept[1]


def forget(model: nn.Module) -> None:
    """Let go of what `packed` keeps of a model: while it trains, each copy is used once."""
    _COPIES.pop(model, None)


def _algorithm(activation: str) -> str:
    return "none" if activation == "gelu" else ""  # "none": the exact GELU, by erf


_pointwise: Any = torch.ops.mkldnn._linear_pointwise.default
_pointwise_binary: Any = torch.ops.mkldnn._linear_pointwise.binary
