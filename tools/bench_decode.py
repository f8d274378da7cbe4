"""How fast an AudioLM decodes on this CPU, beside what its matrix products alone take and beside MusicGen.

    python tools/bench_decode.py --batch 1,4,16 --dtype fp32,bf16,int8 --threads 2 --output bench.json

Speed does not depend on what the weights are, so they are random. For every number format and batch:

    bare loop   the AR decoder's linear layers and nothing else, one frame; the fastest of several libraries' kernels
    floor       the bytes of those weights over the bandwidth of a copy: no decoder that reads them is faster
    ours        `AudioLM.generate`, prompt to codes, then the codec; `AudioLM.stream` to the first audio
    step alone  the AR decoder's step without sampling, from code to logits, beside a bare loop every few frames
    MusicGen    transformers' decoder of the same size with the same weights, driven step by step

A machine's speed drifts, so bare loop, ours and MusicGen take turns, and ratios compare neighbours; what is printed
is the median over the rounds. The peak memory is that of a process of its own, which only generates.
"""

import os

# before torch loads OpenMP: threads that wait must not keep a core busy
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import logging
import math
import multiprocessing
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from valle import native
from valle.codecs import load_codec
from valle.codecs.spectral_codec import SpectralCodec
from valle.config import option, parse, to_dict
from valle.models.audio_lm import AudioLM
from valle.modules.packing import NativeLinear, packed
from valle.utils.command import run
from valle.utils.errors import UserError
from valle.utils.files import write_json
from valle.utils.log import setup_logger
from valle.utils.threads import ThreadTuner

logger = logging.getLogger("valle.tools.bench_decode")

SEED = 0
EARLY_FRAME = 50  # the frame that the last one is compared with
WINDOW = 21  # steps whose median stands for the one in the middle
FINALISTS = 3  # bare loops that take turns with the decoder, of all that were tried
EVERY = 4  # steps alone between two bare loops
COPY_BYTES = 1 << 28  # far beyond any cache
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
MUSICGEN_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

MUSICGEN_EQUAL = [
    "width, heads, layers, feed-forward width, GELU, pre-norm with a final normalization",
    "weights of query, key, value, output, both feed-forward layers, all normalizations, the embedding of codes and "
    "end, and the output rows of the codes",
    "prompt length (processed in one pass, into the cache), number of single steps, batch, number format, threads",
]
MUSICGEN_DIFFERENT = [
    "MusicGen has no biases; ours has one in every linear layer but the last: a little more work for ours",
    "MusicGen has no row of the output layer for the end of the audio",
    "MusicGen adds sinusoids once, ours turns queries and keys in every layer: more work for ours",
    "MusicGen's prompt is causal, ours sees all of itself: the same number of operations in the linear layers",
    "MusicGen takes the likeliest code; ours draws from the 50 likeliest and keeps log-probabilities: more for ours",
    "MusicGen reads one codebook and gets no encoder states, so that its cross-attention is skipped; ours sums all "
    "of them, in the prompt only",
    "MusicGen's cache is transformers' default (DynamicCache), called through forward() with past_key_values",
]


@dataclass
class BenchConfig:
    """What is measured."""

    decoder_dim: int = option(1024, "width of both decoders")
    nhead: int = option(16, "attention heads")
    num_decoder_layers: int = option(12, "layers of each decoder")
    num_quantizers: int = option(4, "quantizers; at most those of the project's own codec")
    prompt_frames: int = option(150, "frames of the prompt")
    new_frames: int = option(500, "frames to generate")
    threads: int = option(2, "threads; bare loops are tried with 1 as well")
    batch: str = option("1,4,16", "comma list of batch sizes")
    dtype: str = option("fp32,bf16,int8", "comma list of number formats")
    rounds: int = option(3, "times that bare loop, decoder and MusicGen take turns")
    bare_seconds: float = option(0.3, "seconds that one measurement of a bare loop goes on, at least 5 loops")
    musicgen: bool = option(True, "compare with transformers' MusicgenForCausalLM in fp32 and bf16")
    output: str | None = option(None, "JSON file for everything that was measured (default: none)")


# ---------------------------------------------------------------- bare loops of linear layers

Weights = list[tuple[Tensor, Tensor | None]]  # (out, in) and bias (out,)
Kernel = Callable[[Tensor], Tensor]  # (B, in) -> (B, out)


class BareLoop(NamedTuple):
    """All linear layers once, one after the other, as one kernel computes them.

    Attributes:
        kernel: name of the kernel.
        threads: how many it uses.
        run: computes all layers for one frame of B rows; gives their outputs.
    """

    kernel: str
    threads: int
    run: Callable[[], list[Tensor]]


def linear_layers(model: AudioLM) -> Weights:
    """What one AR step multiplies with: of each layer qkv, out, both feed-forward layers; the output layer."""
    weights: Weights = []
    for layer in model.ar_decoder.layers:
        attention = layer.self_attn
        weights.append((attention.in_proj_weight, attention.in_proj_bias))
        for linear in (attention.out_proj, layer.linear1, layer.linear2):
            weights.append((linear.weight, linear.bias))
    weights.append((model.ar_predict_layer.weight, None))
    return [(weight.detach(), None if bias is None else bias.detach()) for weight, bias in weights]


def _stock(weight: Tensor, bias: Tensor | None, batch: int) -> Kernel:
    return lambda x: F.linear(x, weight, bias)


def _packed(weight: Tensor, bias: Tensor | None, batch: int) -> Kernel:
    ops = torch.ops.mkldnn
    reordered = ops._reorder_linear_weight(weight, batch)
    return lambda x: ops._linear_pointwise(x, reordered, bias, "none", [], "")


def _packed_for_16(weight: Tensor, bias: Tensor | None, batch: int) -> Kernel:
    return _packed(weight, bias, 16)


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 by output channel: integers (out, in), scales (out,)."""
    scales = weight.float().abs().amax(1).clamp(min=1e-12) / 127
    return (weight.float() / scales[:, None]).round().to(torch.int8), scales


def _weight_only(weight: Tensor, bias: Tensor | None, batch: int) -> Kernel:
    integers, scales = _rounded(weight)
    scales = scales.to(weight.dtype)
    if bias is None:
        return lambda x: torch._weight_int8pack_mm(x, integers, scales)
    return lambda x: torch._weight_int8pack_mm(x, integers, scales).add_(bias)


def _dynamic(engine: str) -> Callable[[Tensor, Tensor | None, int], Kernel]:
    def build(weight: Tensor, bias: Tensor | None, batch: int) -> Kernel:
        integers, scales = _rounded(weight)
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = engine  # decides how the weight is packed, and so which kernel runs
        try:
            with warnings.catch_warnings():
                # quantized tensors are deprecated, but the packing takes nothing else
                warnings.simplefilter("ignore")
                zeros = torch.zeros(len(scales), dtype=torch.long)
                quantized = torch._make_per_channel_quantized_tensor(integers, scales.double(), zeros, 0)
            packed = torch.ops.quantized.linear_prepack(quantized, bias)
        finally:
            torch.backends.quantized.engine = before
        return lambda x: torch.ops.quantized.linear_dynamic(x, packed, False)

    return build


def _native(dtype: str) -> Callable[[Tensor, Tensor | None, int], Kernel]:
    def build(weight: Tensor, bias: Tensor | None, batch: int) -> Kernel:
        if not native.available():
            raise RuntimeError(native.state())
        return NativeLinear(weight.float(), bias, dtype).forward

    return build


class Candidate(NamedTuple):
    """A kernel: the format of its inputs, and what prepares a weight for a batch size."""

    inputs: torch.dtype
    build: Callable[[Tensor, Tensor | None, int], Kernel]


CANDIDATES: dict[str, dict[str, Candidate]] = {
    "fp32": {
        "F.linear": Candidate(torch.float32, _stock),
        "oneDNN pre-packed": Candidate(torch.float32, _packed),
        "oneDNN pre-packed for 16 rows": Candidate(torch.float32, _packed_for_16),
        "valle/native": Candidate(torch.float32, _native("fp32")),
    },
    "bf16": {
        "F.linear": Candidate(torch.bfloat16, _stock),
        "oneDNN pre-packed": Candidate(torch.bfloat16, _packed),
        "oneDNN pre-packed for 16 rows": Candidate(torch.bfloat16, _packed_for_16),
        "valle/native": Candidate(torch.bfloat16, _native("bf16")),
    },
    "int8": {
        "int8 weights only, bf16 inputs": Candidate(torch.bfloat16, _weight_only),
        "dynamic int8, x86": Candidate(torch.float32, _dynamic("x86")),
        "dynamic int8, onednn": Candidate(torch.float32, _dynamic("onednn")),
        "valle/native": Candidate(torch.float32, _native("int8")),
    },
}


def bare_loop(kernel: str, candidate: Candidate, weights: Weights, batch: int, threads: int) -> BareLoop:
    """Prepare every weight for one kernel.

    Raises:
        RuntimeError: this build of torch or this processor does not have the kernel.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)  # oneDNN chooses a weight's layout by it
    try:
        kind = candidate.inputs
        widths = sorted({weight.shape[1] for weight, _ in weights})
        inputs = {width: torch.randn(batch, width).to(kind) for width in widths}
        steps = [
            (
                candidate.build(weight.to(kind), None if bias is None else bias.to(kind), batch),
                inputs[weight.shape[1]],
            )
            for weight, bias in weights
        ]
    finally:
        torch.set_num_threads(before)
    return BareLoop(kernel, threads, lambda: [step(x) for step, x in steps])


def time_loop(loop: BareLoop, seconds: float) -> float:
    """Median seconds of one frame, over loops that together last `seconds`, and 5 at least."""
    before = torch.get_num_threads()
    torch.set_num_threads(loop.threads)
    try:
        taken: list[float] = []
        loop.run()  # other weights were in the cache
        while len(taken) < 5 or sum(taken) < seconds:
            start = time.perf_counter()
            loop.run()
            taken.append(time.perf_counter() - start)
        return median(taken)
    finally:
        torch.set_num_threads(before)


class Screening(NamedTuple):
    """The fastest loops, and what every one took: [{kernel, threads, ms} or {kernel, threads, missing}]."""

    finalists: list[BareLoop]
    tried: list[dict[str, Any]]


@torch.inference_mode()
def screen(dtype: str, weights: Weights, batch: int, threads: int, seconds: float) -> Screening:
    """Try every kernel of a format with one and with all threads.

    Raises:
        UserError: none of them runs here.
    """
    best: list[tuple[float, BareLoop]] = []
    tried: list[dict[str, Any]] = []
    for kernel, candidate in CANDIDATES[dtype].items():
        for used in sorted({1, threads}):
            entry: dict[str, Any] = {"kernel": kernel, "threads": used}
            tried.append(entry)
            try:
                loop = bare_loop(kernel, candidate, weights, batch, used)
                taken = time_loop(loop, seconds)
            except (RuntimeError, AttributeError) as error:
                entry["missing"] = str(error).splitlines()[0]
                continue
            entry["ms"] = 1e3 * taken
            best = sorted([*best, (taken, loop)], key=lambda found: found[0])[:FINALISTS]
    if not best:
        raise UserError(
            f"no kernel for {dtype} runs on this machine: {tried[0]['missing']}; leave it out of --dtype"
        )
    return Screening([loop for _, loop in best], tried)


def copy_bandwidth(threads: int, size: int = COPY_BYTES) -> float:
    """Bytes per second that a copy reads and writes, with one or with all threads, whichever is faster."""
    # Filled: pages that nobody has written to are all one and the same.
    source, target = (torch.full((size,), fill, dtype=torch.uint8) for fill in (1, 2))
    return max(
        2 * size / time_loop(BareLoop("copy", used, lambda: [target.copy_(source)]), 0.0)
        for used in {1, threads}
    )


# --------------------------------------------------------------------------------------- ours


class Generated(NamedTuple):
    """Seconds of one generation: the AR loop by frame, and every part in all."""

    steps: list[float]
    parts: dict[str, float]  # prefill, ar, nar, codec


class Ours:
    """An AudioLM with random weights and the project's codec: the only place where they are called."""

    def __init__(self, config: BenchConfig) -> None:
        torch.manual_seed(SEED)
        self.model = AudioLM(
            config.decoder_dim, config.nhead, config.num_decoder_layers, num_quantizers=config.num_quantizers
        ).eval()
        self.codec = _widened_codec(config.num_quantizers, self.model.codebook_size)
        self.prompt_frames = config.prompt_frames

    def prompt(self, batch: int) -> Tensor:
        """(B, S, Q) random codes, the same at every call."""
        shape = (batch, self.prompt_frames, self.model.num_quantizers)
        return torch.randint(self.model.codebook_size, shape, generator=torch.Generator().manual_seed(SEED))

    def generate(self, dtype: str, batch: int, frames: int) -> Generated:
        """Prompt to audio, at once."""
        result = self.model.generate(
            self.prompt(batch), max_new_tokens=frames, min_new_tokens=frames, seed=SEED, dtype=dtype
        )
        new = torch.stack([codes[-frames:] for codes in result.codes])  # (B, N, Q)
        start = time.perf_counter()
        with torch.inference_mode():
            self.codec.decode(new)
        codec = time.perf_counter() - start
        timings = result.timings
        parts = {name: float(timings[name]) for name in ("prefill", "ar", "nar")}
        return Generated([float(step) for step in result.frame_seconds], {**parts, "codec": codec})

    @torch.inference_mode()
    def steps_alone(
        self, dtype: str, batch: int, frames: int, between: Callable[[int], object]
    ) -> list[float]:
        """Seconds of each AR step from codes to logits, behind the prompt; `between` is called before each."""
        decoder = packed(self.model, dtype)
        cache = decoder.ar_decoder.new_cache(batch, self.prompt_frames + frames)
        prompt, tuner, taken = self.prompt(batch), ThreadTuner(), []
        lens = torch.full((batch,), self.prompt_frames)
        decoder.ar_logits(prompt, lens, prompt[:, :0, 0], cache=cache)
        codes = torch.randint(self.model.codebook_size, (frames, batch, 1))
        for frame in range(frames):
            between(frame)
            start = time.perf_counter()
            with tuner:
                decoder.ar_logits(prompt, lens, codes[frame], cache=cache)
            taken.append(time.perf_counter() - start)
        return taken

    def first_audio(self, dtype: str, frames: int) -> float:
        """Seconds until the first piece of a streamed continuation is there."""
        start = time.perf_counter()
        pieces = iter(
            self.model.stream(self.prompt(1), self.codec, max_new_tokens=frames, seed=SEED, dtype=dtype)
        )
        next(pieces)
        latency = time.perf_counter() - start
        pieces.close()
        return latency


def _widened_codec(num_quantizers: int, codebook_size: int) -> SpectralCodec:
    """The project's codec, reading codes modulo its own codebook size: its tables are repeated."""
    codec = load_codec(num_quantizers=num_quantizers)
    assert isinstance(codec, SpectralCodec)
    for codebook in codec.quantizer.codebooks:
        repeats = math.ceil(codebook_size / len(codebook.entries))
        codebook.entries = codebook.entries.repeat(repeats, 1)[:codebook_size]
    codec.codebook_size = codebook_size
    return codec


def generate_alone(config: BenchConfig, dtype: str, batch: int) -> float | None:
    """Generate once and give this process's peak resident memory in bytes; None where the system does not tell."""
    torch.set_num_threads(config.threads)
    Ours(config).generate(dtype, batch, config.new_frames)
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return 1024 * float(fields["VmHWM"].split()[0])  # "123 kB"


def peak_memory(config: BenchConfig, dtype: str, batch: int) -> float | None:
    """`generate_alone` in a new process, which holds neither bare loops nor MusicGen."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(generate_alone, config, dtype, batch).result()


# ----------------------------------------------------------------------------------- MusicGen


def build_musicgen(model: AudioLM, positions: int) -> Any:
    """transformers' MusicGen decoder with the weights of our AR decoder, as far as they fit (`MUSICGEN_EQUAL`).

    Args:
        model: an AudioLM of any size, pre-norm.
        positions: frames that it must be able to count.

    Raises:
        UserError: transformers is not installed.
    """
    try:
        from transformers import MusicgenForCausalLM
        from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig
    except ImportError as error:
        raise UserError(
            f"--musicgen true needs transformers ({error}); install it or give --musicgen false"
        ) from error
    ours, size = model.ar_decoder, model.codebook_size
    assert ours.norm is not None
    musicgen = MusicgenForCausalLM(
        MusicgenDecoderConfig(
            vocab_size=size, hidden_size=model.ar_predict_layer.in_features,
            num_attention_heads=ours.nhead, num_hidden_layers=len(ours.layers),
            ffn_dim=ours.layers[0].linear1.out_features, max_position_embeddings=positions, num_codebooks=1,
            dropout=0.0, pad_token_id=model.eos, bos_token_id=model.eos,
        )
    ).eval()  # fmt: skip
    decoder = musicgen.model.decoder
    pairs = [
        (decoder.embed_tokens[0].weight, model.ar_audio_embedding.weight[: size + 1]),
        (decoder.layer_norm.weight, ours.norm.weight),
        (decoder.layer_norm.bias, ours.norm.bias),
        (musicgen.lm_heads[0].weight, model.ar_predict_layer.weight[:size]),
    ]
    for theirs, layer in zip(decoder.layers, ours.layers, strict=True):
        query, key, value = layer.self_attn.in_proj_weight.chunk(3)
        pairs += [
            (theirs.self_attn.q_proj.weight, query),
            (theirs.self_attn.k_proj.weight, key),
            (theirs.self_attn.v_proj.weight, value),
            (theirs.self_attn.out_proj.weight, layer.self_attn.out_proj.weight),
            (theirs.fc1.weight, layer.linear1.weight),
            (theirs.fc2.weight, layer.linear2.weight),
        ]
        for their_norm, norm in (
            (theirs.self_attn_layer_norm, layer.norm1),
            (theirs.final_layer_norm, layer.norm2),
        ):
            pairs += [(their_norm.weight, norm.weight), (their_norm.bias, norm.bias)]
    with torch.no_grad():
        for target, source in pairs:
            target.copy_(source)
    return musicgen


@torch.inference_mode()
def musicgen_steps(musicgen: Any, prompt: Tensor, frames: int) -> list[float]:
    """Seconds of each of `frames` single steps behind a prompt (B, S) that is in the cache.

    Raises:
        RuntimeError: the cache does not hold prompt and steps in the end: not all of them were processed.
    """
    out = musicgen(input_ids=prompt, use_cache=True)
    taken = []
    for _ in range(frames):
        start = time.perf_counter()
        drawn = out.logits[:, -1:].argmax(-1)
        out = musicgen(input_ids=drawn, past_key_values=out.past_key_values, use_cache=True)
        taken.append(time.perf_counter() - start)
    held = out.past_key_values.get_seq_length()
    if held != prompt.shape[1] + frames:
        raise RuntimeError(f"MusicGen's cache holds {held} frames, expected {prompt.shape[1] + frames}")
    return taken


# -------------------------------------------------------------------------------- measurement


def around(steps: Sequence[float], frame: int) -> float:
    """Median of the `WINDOW` steps around a frame, 1 the first; fewer at either end."""
    middle = min(frame, len(steps)) - 1
    return median(steps[max(0, middle - WINDOW // 2) : middle + WINDOW // 2 + 1])


def step_beside_bare(config: BenchConfig, ours: Ours, loop: BareLoop, dtype: str, batch: int) -> list[float]:
    """Median seconds of a step alone and of the bare loop, which runs every `EVERY` frames between the steps."""
    bare: list[float] = []

    def between(frame: int) -> None:
        if frame % EVERY == 0:
            before = torch.get_num_threads()
            torch.set_num_threads(loop.threads)
            start = time.perf_counter()
            loop.run()
            bare.append(time.perf_counter() - start)
            torch.set_num_threads(before)

    return [median(ours.steps_alone(dtype, batch, config.new_frames, between)), median(bare)]


def measure(config: BenchConfig, ours: Ours, musicgen: Any, dtype: str, batch: int) -> dict[str, Any]:
    """All numbers of one format and batch size. Times in ms where the name says so, else in seconds.

    Args:
        musicgen: from `build_musicgen`, in the format's type; None to leave it out.
    """
    memory = peak_memory(config, dtype, batch)
    weights = linear_layers(ours.model)
    size = WEIGHT_BYTES[dtype] * sum(weight.numel() for weight, _ in weights)
    finalists, tried = screen(dtype, weights, batch, config.threads, config.bare_seconds)
    ours.generate(dtype, batch, min(8, config.new_frames))  # weights are packed at the first call
    bare: list[list[float]] = []  # one a measurement: seconds of each finalist

    def take_bare() -> None:
        with torch.inference_mode():
            bare.append([time_loop(loop, config.bare_seconds) for loop in finalists])

    floors, runs, neighbours, latencies, theirs = [], [], [], [], []
    for _ in range(config.rounds):
        floors.append(size / copy_bandwidth(config.threads))
        take_bare()
        runs.append(ours.generate(dtype, batch, config.new_frames))
        take_bare()
        neighbours.append([fmean(pair) for pair in zip(*bare[-2:], strict=True)])
        if musicgen is not None:
            prompt = ours.prompt(batch)[..., 0]
            theirs.append(fmean(musicgen_steps(musicgen, prompt, config.new_frames)))
        if batch == 1:
            latencies.append(ours.first_audio(dtype, config.new_frames))

    # all of the loop's time, what is between the steps as well
    means = [run.parts["ar"] / len(run.steps) for run in runs]
    taken = [median(point[i] for point in bare) for i in range(len(finalists))]
    fastest = taken.index(min(taken))
    alone = [step_beside_bare(config, ours, finalists[fastest], dtype, batch) for _ in range(config.rounds)]
    return {
        "dtype": dtype,
        "batch": batch,
        "frames_per_second": batch / median(means),
        "frame_ms": 1e3 * median(means),
        "frame_ms_early": 1e3 * median(around(run.steps, EARLY_FRAME) for run in runs),
        "frame_ms_last": 1e3 * median(around(run.steps, len(run.steps)) for run in runs),
        "bare_ms": 1e3 * taken[fastest],
        "bare_kernel": finalists[fastest].kernel,
        "bare_threads": finalists[fastest].threads,
        "bare_tried": tried,
        "ratio_to_bare": median(mean / pair[fastest] for mean, pair in zip(means, neighbours, strict=True)),
        "step_alone_ms": 1e3 * median(step for step, _ in alone),
        "step_alone_ratio": median(step / loop for step, loop in alone),
        "outside_products_ms": 1e3
        * median(mean - pair[fastest] for mean, pair in zip(means, neighbours, strict=True)),
        "floor_ms": 1e3 * median(floors),
        "ratio_to_floor": median(mean / floor for mean, floor in zip(means, floors, strict=True)),
        "first_audio_seconds": median(latencies) if latencies else None,
        "all_in_seconds": median(sum(run.parts.values()) for run in runs),
        "parts_seconds": {name: median(run.parts[name] for run in runs) for name in runs[0].parts},
        "peak_memory_bytes": memory,
        "musicgen_frame_ms": 1e3 * median(theirs) if theirs else None,
        "times_musicgen": median(their / mean for their, mean in zip(theirs, means, strict=True))
        if theirs
        else None,
    }


# ------------------------------------------------------------------------------------- output

# heading, key, factor, decimals
COLUMNS: list[tuple[str, str, float, int]] = [
    ("format", "dtype", 1, 0),
    ("batch", "batch", 1, 0),
    ("frames/s", "frames_per_second", 1, 1),
    ("ms/frame", "frame_ms", 1, 2),
    (f"at {EARLY_FRAME}", "frame_ms_early", 1, 2),
    ("at last", "frame_ms_last", 1, 2),
    ("bare ms", "bare_ms", 1, 2),
    ("x bare", "ratio_to_bare", 1, 2),
    ("step ms", "step_alone_ms", 1, 2),
    ("step x bare", "step_alone_ratio", 1, 2),
    ("rest ms", "outside_products_ms", 1, 2),
    ("floor ms", "floor_ms", 1, 2),
    ("x floor", "ratio_to_floor", 1, 2),
    ("first audio s", "first_audio_seconds", 1, 2),
    ("all in s", "all_in_seconds", 1, 2),
    ("peak MiB", "peak_memory_bytes", 2**-20, 0),
    ("MusicGen ms", "musicgen_frame_ms", 1, 2),
    ("x MusicGen", "times_musicgen", 1, 2),
]


def table(results: Sequence[dict[str, Any]]) -> str:
    """One line a format and batch size, as Markdown; "-" where nothing was measured."""

    def shown(value: Any, factor: float, decimals: int) -> str:
        if value is None:
            return "-"
        return value if isinstance(value, str) else f"{value * factor:.{decimals}f}"

    rows = [[heading for heading, *_ in COLUMNS]]
    rows += [[shown(result[key], factor, places) for _, key, factor, places in COLUMNS] for result in results]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "\n".join(
        f"| {' | '.join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))} |"
        for row in rows
    )


def describe(report: dict[str, Any]) -> str:
    """The report as text: table, kernels of the bare loops, what MusicGen shares and does not."""
    lines = [table(report["results"]), "", "bare loops, ms a frame (kernel, threads):"]
    for result in report["results"]:
        tried = ", ".join(
            f"{entry['kernel']} x{entry['threads']} "
            + (f"{entry['ms']:.2f}" if "ms" in entry else f"missing: {entry['missing']}")
            for entry in result["bare_tried"]
        )
        lines.append(
            f"  {result['dtype']} batch {result['batch']}: {tried}; compared with {result['bare_kernel']} "
            f"x{result['bare_threads']}"
        )
    if "musicgen" in report:
        lines += ["", "MusicGen, equal to ours:", *(f"  {line}" for line in report["musicgen"]["equal"])]
        lines += ["MusicGen, not equal:", *(f"  {line}" for line in report["musicgen"]["different"])]
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    names = [
        line.partition(":")[2].strip()
        for line in (Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else [])
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def _listed(flag: str, text: str, known: Sequence[str] | None = None) -> list[str]:
    found = [part.strip() for part in text.split(",")]
    for part in found:
        valid = part in known if known is not None else part.isdecimal() and int(part) > 0
        if not valid:
            expected = f"some of {','.join(known)}" if known is not None else "whole numbers from 1"
            raise UserError(f"--{flag} is '{text}': '{part}' found, expected {expected}, separated by commas")
    return found


def check(config: BenchConfig) -> tuple[list[str], list[int]]:
    """Number formats and batch sizes that are asked for.

    Raises:
        UserError: a value that cannot be measured, before anything is.
    """
    for name in (
        "decoder_dim", "nhead", "num_decoder_layers", "num_quantizers",
        "prompt_frames", "new_frames", "threads", "rounds",
    ):  # fmt: skip
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(config, name)}, expected 1 or more")
    if config.decoder_dim % (2 * config.nhead):
        raise UserError(
            f"--decoder-dim is {config.decoder_dim}, expected an even multiple of --nhead {config.nhead}"
        )
    if config.output is not None and Path(config.output).is_dir():
        raise UserError(f"--output is '{config.output}', a folder, expected a file to write")
    dtypes = _listed("dtype", config.dtype, list(CANDIDATES))
    return dtypes, [int(part) for part in _listed("batch", config.batch)]


def bench(config: BenchConfig) -> dict[str, Any]:
    """Measure every format and batch size; gives what `--output` writes."""
    dtypes, batches = check(config)
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    report: dict[str, Any] = {"settings": to_dict(config), "machine": machine(), "results": []}
    try:
        for dtype in dtypes:
            ours, musicgen = Ours(config), None
            if config.musicgen and dtype in MUSICGEN_TYPES:
                musicgen = build_musicgen(ours.model, config.prompt_frames + config.new_frames)
                musicgen.to(MUSICGEN_TYPES[dtype])
                report["musicgen"] = {
                    "transformers": version("transformers"),
                    "equal": MUSICGEN_EQUAL,
                    "different": MUSICGEN_DIFFERENT,
                }
            for batch in batches:
                result = measure(config, ours, musicgen, dtype, batch)
                report["results"].append(result)
                logger.info(
                    "%s batch %d | %.1f frames/s | %.2f x bare loop",
                    dtype, batch, result["frames_per_second"], result["ratio_to_bare"],
                )  # fmt: skip
                # after each, so that what is measured is kept should the rest be interrupted
                if config.output is not None:
                    write_json(config.output, report)
    finally:
        torch.set_num_threads(before)
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    (config,) = parse("Measure how fast an AudioLM decodes on this CPU.", [BenchConfig], argv)
    setup_logger()
    print(describe(bench(config)))


if __name__ == "__main__":
    run(main)
