"""What a training costs, by formula: parameters, operations, memory, time, storage.

Pure functions of an architecture and of lengths; nothing here trains. A multiplication and an addition are two
operations, and only matrix products count, as is usual. `tools/plan.py` shows what comes out, `tools/bench_train.py`
compares it with the clock, and the tests with what small models count: see `test/test_plan.py`.

Sources:
    operations   6 N D for forward and backward, plus attention by length: "Scaling Laws for Neural Language Models"
                 (arXiv 2001.08361, section 2.1 and table 1); utilization without what is computed twice: PaLM
                 (arXiv 2204.02311, appendix B)
    activations  counted tensor by tensor, as "Reducing Activation Recomputation in Large Transformer Models" does
                 (arXiv 2205.05198, section 4), for this model's own layers
    shards       ZeRO (arXiv 1910.02054, section 3) and PyTorch FSDP (arXiv 2304.11277): weights, gradients and
                 optimizer state over N, one layer gathered at a time
    data         about 20 tokens a parameter for text, "Training Compute-Optimal Large Language Models"
                 (arXiv 2203.15556, table 3)
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from valle.config import ModelConfig
from valle.data.split import prompt_length
from valle.models.builder import build_model

PRENET_DIM = 256  # width inside the network before the decoder


@dataclass(frozen=True)
class Architecture:
    """What decides about an AudioLM's cost.

    Attributes:
        dim, nar_dim: widths of the AR and the NAR decoder.
        heads, nar_heads: attention heads of each.
        num_layers: of each decoder.
        num_quantizers: Q.
        codebook_size: V.
        norm_first: normalizations stand before each block, and one more at the end.
        add_prenet: embeddings pass through a small network first.
        prepend_bos: a begin symbol stands between prompt and target.
        qk_norm: queries and keys are normalized.
        dropout: whether there is any.
    """

    dim: int
    nar_dim: int
    heads: int
    nar_heads: int
    num_layers: int
    num_quantizers: int
    codebook_size: int
    norm_first: bool = True
    add_prenet: bool = False
    prepend_bos: bool = False
    qk_norm: bool = False
    dropout: bool = True

    @classmethod
    def of(cls, config: ModelConfig, codebook_size: int) -> "Architecture":
        """From a model's configuration, whose `num_quantizers` is set, and its codec's V."""
        if config.num_quantizers is None:
            raise ValueError("num_quantizers is not set; it comes from the codec")
        return cls(
            config.decoder_dim,
            int(config.decoder_dim * config.scale_factor),
            config.nhead,
            max(1, int(config.nhead * config.scale_factor)),
            config.num_decoder_layers,
            config.num_quantizers,
            codebook_size,
            config.norm_first,
            config.add_prenet,
            config.prepend_bos,
            config.qk_norm,
            config.dropout > 0,
        )


class Work(NamedTuple):
    """Operations of one forward pass.

    Attributes:
        linear: of matrix products with weights.
        attention: of queries with keys and of weights with values.
    """

    linear: float
    attention: float


def attention_pairs(prompt: int, target: int, stage: int, dense: bool = False) -> int:
    """(query, key) pairs that a row's attention needs.

    Args:
        prompt: positions of the prompt, a begin symbol included.
        target: frames of the target.
        stage: 1 AR: all of the prompt, and causal in the target; 2 NAR: all pairs.
        dense: count hidden pairs too, as a kernel computes them that skips none.
    """
    if dense or stage == 2:
        return (prompt + target) ** 2
    return prompt**2 + prompt * target + target * (target + 1) // 2


def forward_work(
    architecture: Architecture, prompt: int, target: int, stage: int, dense: bool = False, unread: bool = True
) -> Work:
    """Operations of one row's forward pass.

    Args:
        architecture: of the model.
        prompt, target: frames.
        stage: 1 AR, 2 NAR with one quantizer, as in training, 0 both.
        dense: see `attention_pairs`.
        unread: count the last layer's outputs that nothing reads, those of the prompt: GPUs compute them, CPUs do not.
    """
    if stage == 0:
        parts = [forward_work(architecture, prompt, target, part, dense, unread) for part in (1, 2)]
        return Work(sum(part.linear for part in parts), sum(part.attention for part in parts))
    vocabulary = architecture.codebook_size
    if stage == 1:
        dim, predicted, adaptive = architecture.dim, target + 1, 0
        vocabulary += 1  # the end
        prompt += int(architecture.prepend_bos)
    elif architecture.num_quantizers > 1:
        dim, predicted = architecture.nar_dim, target
        # Normalizations that take their weights from the stage, once a row.
        adaptive = 2 * architecture.num_layers + architecture.norm_first
    else:
        return Work(0.0, 0.0)
    frames = prompt + target
    # A layer's weights: query, key, value 3 D², output D², feed-forward 8 D².
    products = frames * architecture.num_layers * 12 * dim**2
    if not unread:
        products -= max(0, frames - predicted) * 9 * dim**2
    products += predicted * dim * vocabulary + adaptive * 2 * dim**2
    if architecture.add_prenet:
        products += frames * (2 * dim * PRENET_DIM + PRENET_DIM**2)
    pairs = attention_pairs(prompt, target, stage, dense) * architecture.num_layers
    return Work(2.0 * products, 2.0 * pairs * 2 * dim)


def train_flops(
    architecture: Architecture,
    prompt_lens: Iterable[int],
    target_lens: Iterable[int],
    stage: int,
    unread: bool = True,
) -> float:
    """Operations that forward and backward of a batch need: no padding, no hidden pairs, nothing computed twice.

    Divided by seconds and by the machine's peak this is the model FLOP utilization. The backward pass has two products
    (gradient of the input, gradient of the weight) for each one of the forward pass, in attention too.

    Args:
        architecture: of the model.
        prompt_lens, target_lens: frames of each row; a tensor (B,) will do.
        stage: 0 both decoders, 1 AR, 2 NAR.
        unread: see `forward_work`.
    """
    total = 0.0
    for prompt, target in zip(prompt_lens, target_lens, strict=True):
        total += 3 * sum(forward_work(architecture, int(prompt), int(target), stage, unread=unread))
    return total


# ------------------------------------------------------------------------------------ parameters and states


def parameter_sizes(config: ModelConfig, codebook_size: int) -> dict[str, int]:
    """Numbers in each parameter, by name: of the model itself, built without memory."""
    with torch.device("meta"):
        model = build_model(config, codebook_size)
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


def stage_sizes(sizes: Mapping[str, int], stage: int) -> list[int]:
    """Those that a stage trains: 0 all, 1 `ar_*`, 2 `nar_*`."""
    prefix = {0: ("ar_", "nar_"), 1: ("ar_",), 2: ("nar_",)}[stage]
    return [size for name, size in sizes.items() if name.startswith(prefix)]


# Numbers (float32) that an optimizer keeps for each number of a parameter, and for each parameter besides.
OPTIMIZER_STATE = {"AdamW": (2, 1), "ScaledAdam": (2, 2)}
LAYERS = "_decoder.layers."  # in the names of parameters that shards gather layer by layer
FULL_BYTES = 4  # of a float32 number: weights, gradients and optimizer state always are


def optimizer_bytes(optimizer: str, sizes: Iterable[int]) -> int:
    """Bytes of an optimizer's state after its first step."""
    each, besides = OPTIMIZER_STATE[optimizer]
    return sum(FULL_BYTES * (each * size + besides) for size in sizes)


def checkpoint_bytes(sizes: Mapping[str, int], stage: int, optimizer: str, averaged: bool) -> int:
    """Bytes of a checkpoint: all weights, their running average, and the state of the stage's optimizer."""
    weights = FULL_BYTES * sum(sizes.values()) * (2 if averaged else 1)
    return weights + optimizer_bytes(optimizer, stage_sizes(sizes, stage))


# --------------------------------------------------------------------------------------------- activations


class Rows(NamedTuple):
    """A batch without padding.

    Attributes:
        number: of rows.
        prompt, target: frames of each.
    """

    number: float
    prompt: float
    target: float


@dataclass(frozen=True)
class Kept:
    """What a layer keeps from forward to backward, for each frame, with PyTorch's own kernels, as on GPUs.

    Counted in this model's layers; (frames, D) tensors unless said otherwise.

    Attributes:
        low: in the arithmetic's format: what enters the four products (1 + 1 + 1 + 4), queries, keys and values (3),
            queries and keys when they have turned (2), what enters the activation function (4).
        full: float32: what both normalizations see.
        adaptive: float32, where normalizations take their weights from the stage: what both give before that.
        qk_norm: float32, where queries and keys are normalized: both before and after (fused kernels keep less).
        dropped: what dropout keeps: of attention (1), inside the feed-forward network (4) and behind it (1); bytes.
        heads: float32 for each head: the softmax's normalizer.
        mask: in the arithmetic's format for each frame of the row: who sees whom in the AR decoder.
    """

    low: float = 16.0
    full: float = 2.0
    adaptive: float = 2.0
    qk_norm: float = 4.0
    dropped: float = 6.0
    heads: float = 1.0
    mask: float = 1.0


LAYER = Kept()
GATHERED = 2  # float32 (frames, D): prompt and target where they are joined, and all that a decoder gives
FORMAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Activations(NamedTuple):
    """Bytes that are kept from forward to backward.

    Attributes:
        layers: inside all layers; with activation checkpointing, what enters each of them.
        again: with activation checkpointing, inside the one layer that is being computed again.
        weights: copies of the weights in the arithmetic's format, whatever the batch.
        ends: embeddings, the last normalization, the output layer and the loss.
    """

    layers: float
    again: float
    weights: float
    ends: float


def activation_bytes(
    architecture: Architecture, rows: Rows, stage: int, dtype: str, checkpointing: bool = False
) -> Activations:
    """Bytes kept for the backward pass.

    Args:
        architecture: of the model.
        rows: the batch.
        stage: 0 both decoders, 1 AR, 2 NAR.
        dtype: of the arithmetic.
        checkpointing: layers are computed again in the backward pass.
    """
    if stage == 0:
        parts = [activation_bytes(architecture, rows, part, dtype, checkpointing) for part in (1, 2)]
        return Activations(*map(sum, zip(*parts, strict=True)))
    nar = stage == 2
    if nar and architecture.num_quantizers == 1:
        return Activations(0.0, 0.0, 0.0, 0.0)
    dim, heads = (
        (architecture.nar_dim, architecture.nar_heads) if nar else (architecture.dim, architecture.heads)
    )
    low, masks, layers = FORMAT_BYTES[dtype], float(architecture.dropout), architecture.num_layers
    length = rows.prompt + rows.target + (architecture.prepend_bos and not nar)
    frames, targets = rows.number * length, rows.number * (rows.target + (not nar))
    vocabulary = architecture.codebook_size + (not nar)

    full = LAYER.full + LAYER.adaptive * nar + LAYER.qk_norm * architecture.qk_norm
    layer = frames * (
        dim * (low * LAYER.low + FULL_BYTES * full + masks * LAYER.dropped)
        + FULL_BYTES * LAYER.heads * heads
        + low * LAYER.mask * length * (not nar)
    )
    ends = frames * dim * (masks + FULL_BYTES * (GATHERED + (1 + nar) * architecture.norm_first))
    ends += targets * (low * dim + FULL_BYTES * vocabulary)
    if nar:
        ends += rows.number * low * dim * vocabulary  # each row's output layer
    else:
        ends += frames * 2 * FULL_BYTES * dim / heads  # cosines and sines of each row's positions
    if architecture.add_prenet:
        ends += frames * (low * (dim + 4 * PRENET_DIM) + 2 * PRENET_DIM)  # with dropout of its own
    copies = 0.0
    if low < FULL_BYTES:
        copies = low * (layers * (12 + 4 * nar) * dim**2 + dim * vocabulary)
    if checkpointing:
        return Activations(frames * FULL_BYTES * dim * layers, layer, copies, ends)
    return Activations(layer * layers, 0.0, copies, ends)


# ------------------------------------------------------------------------------------------- memory of a GPU


class Setup(NamedTuple):
    """How a stage is trained.

    Attributes:
        stage: 0 both decoders, 1 AR, 2 NAR.
        dtype: of the arithmetic.
        optimizer: its name.
        averaged: whether a running average of the weights is kept.
        checkpointing: whether layers are computed again in the backward pass.
        shards: processes that weights, gradients and states are divided over (FSDP); 1: each has all of them (DDP).
    """

    stage: int
    dtype: str
    optimizer: str
    averaged: bool = False
    checkpointing: bool = False
    shards: int = 1


class Memory(NamedTuple):
    """Bytes in one GPU.

    Attributes:
        weights: float32, of both decoders; with shards, also what is gathered: all outside the layers, one layer, and
            the next one on its way.
        gradients: of what the stage trains.
        optimizer: its state.
        average: of the weights.
        copies: of the weights in the arithmetic's format.
        activations: kept for the backward pass, and what the loss needs beside them.
    """

    weights: float
    gradients: float
    optimizer: float
    average: float
    copies: float
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


def gpu_memory(architecture: Architecture, sizes: Mapping[str, int], setup: Setup, rows: Rows) -> Memory:
    """What a training step takes at its peak, between forward and backward.

    Args:
        architecture, sizes: of the model; see `parameter_sizes`.
        setup: how it is trained.
        rows: the batch.
    """
    every, trained = sum(sizes.values()), stage_sizes(sizes, setup.stage)
    kept = activation_bytes(architecture, rows, setup.stage, setup.dtype, setup.checkpointing)
    layer = outside = trained_outside = 0
    if setup.shards > 1:
        layer = max(_layer_size(architecture, stage) for stage in (1, 2) if setup.stage in (0, stage))
        loose = {name: size for name, size in sizes.items() if LAYERS not in name}
        outside, trained_outside = sum(loose.values()), sum(stage_sizes(loose, setup.stage))
    # Logits as float32, and their gradient.
    loss = 2 * FULL_BYTES * rows.number * (rows.target + 1) * (architecture.codebook_size + 1)
    return Memory(
        weights=FULL_BYTES * (every / setup.shards + outside + 2 * layer),
        gradients=FULL_BYTES * (sum(trained) / setup.shards + trained_outside + layer),
        optimizer=optimizer_bytes(setup.optimizer, trained) / setup.shards,
        average=FULL_BYTES * every / setup.shards if setup.averaged else 0.0,
        copies=kept.weights,
        activations=kept.layers + kept.again + kept.ends + loss,
    )


def fitting_rows(
    architecture: Architecture, sizes: Mapping[str, int], setup: Setup, row: Rows, capacity: float
) -> float:
    """Rows in the largest batch that fits; 0 where not even the weights do.

    Memory is a straight line over the rows of a batch.

    Args:
        architecture, sizes, setup: see `gpu_memory`.
        row: prompt and target of every row; the number is not read.
        capacity: bytes that may be used.
    """
    empty, one = (
        gpu_memory(architecture, sizes, setup, row._replace(number=number)).total for number in (0, 1)
    )
    return max(0.0, (capacity - empty) / (one - empty))


def _layer_size(architecture: Architecture, stage: int) -> int:
    """Numbers in the weights of one layer's products."""
    return 12 * architecture.dim**2 if stage == 1 else 16 * architecture.nar_dim**2


# --------------------------------------------------------------------------------------------- time on GPUs


class Gpu(NamedTuple):
    """A kind of GPU.

    Attributes:
        peak: operations a second in dense bfloat16 products with float32 sums, from the vendor's data sheet.
        memory: bytes, as the vendor counts them.
    """

    peak: float
    memory: float


GB, TERA = 1e9, 1e12
GPUS = {
    "t4": Gpu(65 * TERA, 16 * GB),
    "v100-32gb": Gpu(125 * TERA, 32 * GB),
    "rtx3090": Gpu(71 * TERA, 24 * GB),
    "rtx4090": Gpu(165.2 * TERA, 24 * GB),
    "rtx5090": Gpu(209.5 * TERA, 32 * GB),
    "a10": Gpu(125 * TERA, 24 * GB),
    "l4": Gpu(121 * TERA, 24 * GB),
    "a40": Gpu(149.7 * TERA, 48 * GB),
    "l40s": Gpu(362 * TERA, 48 * GB),
    "a100-40gb": Gpu(312 * TERA, 40 * GB),
    "a100-80gb": Gpu(312 * TERA, 80 * GB),
    "h100-pcie": Gpu(756 * TERA, 80 * GB),
    "h100": Gpu(989 * TERA, 80 * GB),
    "h200": Gpu(989 * TERA, 141 * GB),
    "b200": Gpu(2250 * TERA, 180 * GB),
    "mi300x": Gpu(1307 * TERA, 192 * GB),
}
"""Dense peaks; data sheets of newer GPUs print twice as much, "with sparsity".

NVIDIA data sheets "T4 Tensor Core GPU", "V100" (these two have float16 but no bfloat16: --dtype float16), "A10", "L4",
"A40", "L40S", "A100", "H100" (SXM and PCIe), "H200", "DGX B200"; NVIDIA architecture whitepapers "Ampere GA102" (RTX
3090), "Ada" (RTX 4090) and "RTX Blackwell" (RTX 5090); AMD data sheet "Instinct MI300X".
"""


RECOMPUTING = 4 / 3  # operations with activation checkpointing: the forward pass once more, of 1 + 2


def days(flops: float, gpus: int, peak: float, utilization: float) -> float:
    """Days that so many operations take.

    Args:
        flops: operations that the model needs.
        gpus: how many share them.
        peak: operations a second of each.
        utilization: share of the peak that is reached, over the whole training (an assumption until it is measured).
    """
    return flops / (gpus * peak * utilization) / 86400


def split_row(frames: int, prompt_ratio: float) -> Rows:
    """One recording of so many frames, split as in training."""
    prompt = prompt_length(frames, prompt_ratio)
    return Rows(1, prompt, frames - prompt)


# -------------------------------------------------------------------------------------------- data on a disk

CODE_BYTES = 2  # uint16


def codes_bytes(seconds: float, frame_rate: float, num_quantizers: int) -> float:
    """Bytes of the codes of so much audio."""
    return seconds * frame_rate * num_quantizers * CODE_BYTES
