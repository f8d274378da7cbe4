"""How fast this machine trains an AudioLM, beside the fastest matrix product it has.

    python tools/bench_train.py --stage 1,2,0 --dtype bfloat16 --optimizer-name AdamW,ScaledAdam --output bench.json

The training engine itself runs, on random codes held in memory: masks, embeddings, losses, metrics, optimizer and all.
Every case is a process of its own, so that its peak memory is its own. Before each step the same process measures the
matrix peak, and utilization compares neighbours, since a machine's speed drifts:

    frames/s     frames of prompts and targets over the time of a step
    utilization  operations that forward and backward need over their time and the peak; nothing that a mask hides
                 and nothing computed twice counts (`valle.engine.planning.train_flops`)
    peak         the fastest of square products, by PyTorch, oneDNN and valle/native, in the same number format
    other        part of a step that is neither forward, backward nor optimizer: batches, sums, what is logged

What is printed is the median over the steps; the first steps warm up. `--bare true` also times a stack of PyTorch's own
`nn.TransformerEncoderLayer` (causal, no embeddings, no loss but a sum) of the same size under autocast and fused AdamW.
"""

import os

# before torch loads OpenMP: threads that wait must not keep a core busy
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import contextlib
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from valle import native
from valle.config import ModelConfig, TrainConfig, option, parse, to_dict
from valle.engine.devices import peak_memory, pick_device
from valle.engine.planning import Architecture, train_flops
from valle.engine.trainer import DTYPES, Trainer
from valle.models import build_model
from valle.utils.command import run
from valle.utils.errors import UserError
from valle.utils.files import write_json

SEED = 0
WARM_UP = 3
PEAK_SIZE, PEAK_TRIES = 2048, 5
RATES = {"AdamW": 1e-4, "ScaledAdam": 0.01}


@dataclass
class BenchConfig:
    """What is measured."""

    decoder_dim: str = option("1024", "widths, with commas")
    nhead: str = option("16", "attention heads of each width")
    num_decoder_layers: str = option("12", "layers of each width")
    num_quantizers: int = option(4, "quantizers")
    codebook_size: int = option(2048, "codes of a quantizer")
    dropout: float = option(0.1, "dropout")
    clips: int = option(4, "recordings in a batch")
    frames: int = option(500, "frames of each")
    prompt_ratio: float = option(0.4, "part of each that is the prompt")
    stage: str = option("1,2,0", "stages, with commas")
    dtype: str = option("bfloat16", "number formats, with commas: float32, bfloat16, float16")
    optimizer_name: str = option("AdamW", "optimizers, with commas: AdamW, ScaledAdam")
    steps: int = option(5, "steps of each case that count")
    threads: int = option(1, "CPU threads")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    bare: bool = option(False, "also time PyTorch's own layers of the same size")
    output: str | None = option(None, "write the figures as JSON")
    case: str | None = option(None, "one case as JSON, in this process: what the command starts by itself")


class Measured(Exception):
    """All steps are done: the rest of a training, its checkpoints, is not wanted."""


class MemoryBatches:
    """One batch again and again; keeps when each step began, and measures the peak in between.

    Args:
        batch: of the model.
        config: of the benchmark.
        steps: batches to give.
    """

    def __init__(self, batch: dict[str, Any], steps: int, dtype: torch.dtype, device: torch.device) -> None:
        self.batch, self.steps, self.dtype, self.device = batch, steps, dtype, device
        self.marks: list[dict[str, float]] = []
        self.peaks: list[float] = []
        self.trainer: Trainer | None = None

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[dict[str, Any]]:
        """The batch, `steps` times; a mark is set at the end of each step and at the beginning of the next."""
        for _ in range(self.steps):
            self._mark()
            self.peaks.append(matrix_peak(self.dtype, self.device))
            self._mark()
            yield self.batch
        self._mark()
        raise Measured

    def _mark(self) -> None:
        assert self.trainer is not None
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.marks.append({"time": time.perf_counter(), **self.trainer.clock.parts})

    def step_times(self) -> list[dict[str, float]]:
        """Seconds of each step, in all and by part."""
        pairs = zip(self.marks[1::2], self.marks[2::2], strict=True)
        return [
            {name: after[name] - before.get(name, 0.0) for name in after if name != "data"}
            for before, after in pairs
        ]


def matrix_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of the fastest square matrix product."""
    a, b = (torch.randn(PEAK_SIZE, PEAK_SIZE, device=device).to(dtype) for _ in range(2))
    products = [lambda: torch.mm(a, b)]
    if device.type == "cpu" and dtype != torch.float16 and torch.backends.mkldnn.is_available():
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
        if dtype == torch.bfloat16 and native.available():
            products.append(lambda: native.product(a, b))
    best = 0.0
    for product in products:
        for _ in range(PEAK_TRIES):
            begun = time.perf_counter()
            product()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * PEAK_SIZE**3 / (time.perf_counter() - begun))
    return best


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """One case, in this process."""
    torch.set_num_threads(case["threads"])
    torch.manual_seed(SEED)
    device = pick_device(case["device"])
    if case["kind"] == "bare":
        return measure_bare(case, device)
    config = ModelConfig(
        decoder_dim=case["decoder_dim"], nhead=case["nhead"], num_decoder_layers=case["num_decoder_layers"],
        num_quantizers=case["num_quantizers"], dropout=case["dropout"],
    )  # fmt: skip
    model = build_model(config, case["codebook_size"])
    clips, frames = case["clips"], case["frames"]
    prompt = int(frames * case["prompt_ratio"])
    codes = torch.randint(case["codebook_size"], (clips, frames, case["num_quantizers"]))
    batch = {
        "x": codes[:, :prompt], "x_lens": torch.full((clips,), prompt),
        "y": codes[:, prompt:], "y_lens": torch.full((clips,), frames - prompt),
        "ids": [f"clip-{row}" for row in range(clips)],
    }  # fmt: skip
    source = MemoryBatches(batch, WARM_UP + case["steps"], DTYPES[case["dtype"]], device)
    with tempfile.TemporaryDirectory() as folder:
        train = TrainConfig(
            exp_dir=folder, train_stage=case["stage"], dtype=case["dtype"], optimizer_name=case["optimizer_name"],
            base_lr=RATES[case["optimizer_name"]], tensorboard=False, num_epochs=1, log_interval=1, device=str(device),
        )  # fmt: skip
        trainer = Trainer(model, train, source, None, {})
        source.trainer = trainer
        with contextlib.suppress(Measured):
            trainer.run()
    steps, peaks = source.step_times()[WARM_UP:], source.peaks[WARM_UP:]
    flops = train_flops(
        Architecture.of(config, case["codebook_size"]),
        [prompt] * clips,
        [frames - prompt] * clips,
        case["stage"],
        unread=device.type != "cpu",
    )
    parameters = sum(parameter.numel() for parameter in trainer.parameters)
    times = [step["time"] for step in steps]
    return {
        "seconds": median(times),
        "frames_per_second": clips * frames / median(times),
        "utilization": median(
            flops / step["forward_backward"] / peak for step, peak in zip(steps, peaks, strict=True)
        ),
        "peak_gflops": median(peaks) / 1e9,
        "optimizer_share": median(step["optimizer"] / step["time"] for step in steps),
        "other_share": median(
            1 - (step["forward_backward"] + step["optimizer"]) / step["time"] for step in steps
        ),
        "peak_memory_gb": peak_memory(device) / 1e9,
        "tflops_a_step": flops / 1e12,
        "parameters": parameters,
        "spread_seconds": [min(times), max(times)],
    }


def measure_bare(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """PyTorch's own layers of the same size, with nothing around them."""
    dim, clips, frames = case["decoder_dim"], case["clips"], case["frames"]
    layer = nn.TransformerEncoderLayer(
        dim, case["nhead"], 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True, device=device
    )
    stack = nn.TransformerEncoder(layer, case["num_decoder_layers"], enable_nested_tensor=False).train()
    optimizer = torch.optim.AdamW(stack.parameters(), lr=1e-4, fused=True)
    x = torch.randn(clips, frames, dim, device=device)
    mask = nn.Transformer.generate_square_subsequent_mask(frames, device=device)
    times = []
    for _ in range(WARM_UP + case["steps"]):
        begun = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, DTYPES[case["dtype"]], enabled=case["dtype"] != "float32"):
            loss = stack(x, mask=mask, is_causal=True).float().square().sum()
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    times = times[WARM_UP:]
    return {
        "seconds": median(times),
        "frames_per_second": clips * frames / median(times),
        "peak_memory_gb": peak_memory(device) / 1e9,
        "spread_seconds": [min(times), max(times)],
    }


def cases(config: BenchConfig) -> list[dict[str, Any]]:
    """All that is asked for.

    Raises:
        UserError: a list that is no list of what it should be.
    """
    sizes = [numbers(getattr(config, name), name) for name in ("decoder_dim", "nhead", "num_decoder_layers")]
    if len({len(size) for size in sizes}) != 1:
        raise UserError("--decoder-dim, --nhead and --num-decoder-layers must be lists of the same length")
    for name, known in (("dtype", DTYPES), ("optimizer_name", RATES), ("stage", ("0", "1", "2"))):
        unknown = set(getattr(config, name).split(",")) - set(known)
        if unknown:
            raise UserError(
                f"--{name.replace('_', '-')} has '{unknown.pop()}', expected some of {', '.join(known)}"
            )
    found = []
    common = to_dict(config)
    for dim, heads, layers in zip(*sizes, strict=True):
        for dtype in config.dtype.split(","):
            case = common | {"decoder_dim": dim, "nhead": heads, "num_decoder_layers": layers, "dtype": dtype}
            if config.bare:
                found.append(case | {"kind": "bare", "stage": None, "optimizer_name": "AdamW"})
            for stage in numbers(config.stage, "stage"):
                for optimizer in config.optimizer_name.split(","):
                    found.append(case | {"kind": "valle", "stage": stage, "optimizer_name": optimizer})
    return found


def numbers(text: str, name: str) -> list[int]:
    """`1,2` -> [1, 2]."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(
            f"--{name.replace('_', '-')} is '{text}', expected whole numbers with commas"
        ) from error


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    (config,) = parse(__doc__ or "", [BenchConfig], argv)
    if config.case:
        print("result " + json.dumps(measure(json.loads(config.case))))
        return
    results = []
    print(f"{'size':>12} {'format':>9} {'stage':>5} {'optimizer':>10} {'s/step':>7} {'frames/s':>8} {'util.':>6} "
          f"{'peak':>9} {'optim.':>7} {'other':>6} {'memory':>7}")  # fmt: skip
    for case in cases(config):
        done = subprocess.run(
            [sys.executable, __file__, "--case", json.dumps(case)],
            capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(config.threads)},
        )  # fmt: skip
        lines = [line for line in done.stdout.splitlines() if line.startswith("result ")]
        if done.returncode or not lines:
            raise UserError(f"case {case} failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
        result = json.loads(lines[-1].removeprefix("result "))
        results.append({**case, **result})
        size = f"{case['decoder_dim']}x{case['nhead']}x{case['num_decoder_layers']}"
        name = "bare" if case["kind"] == "bare" else str(case["stage"])
        more = ""
        if case["kind"] == "valle":
            more = (
                f" {result['utilization']:6.2f} {result['peak_gflops']:5.0f}GF/s {result['optimizer_share']:7.1%}"
                f" {result['other_share']:6.1%}"
            )
        print(
            f"{size:>12} {case['dtype']:>9} {name:>5} {case['optimizer_name']:>10} {result['seconds']:7.2f} "
            f"{result['frames_per_second']:8.0f}{more or ' ' * 31} {result['peak_memory_gb']:4.1f} GB",
            flush=True,
        )
    if config.output:
        machine = {"torch": torch.__version__, "cpu": platform.processor() or platform.machine()}
        write_json(Path(config.output), {"machine": machine, "threads": config.threads, "results": results})


if __name__ == "__main__":
    run(main)
