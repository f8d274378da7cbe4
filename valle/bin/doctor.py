"""What this machine has, what is missing, and which settings suit it: `valle doctor`, with the trainer's flags.

    valle doctor
    valle doctor --config egs/asterisk/conf/audiolm.yaml --manifest-dir egs/asterisk/data/tokenized

Nothing is downloaded and nothing is trained. The memory of a training is that of its parameters, which are counted, and
of what a forward pass keeps for its backward pass, which is measured on a model of one and of two layers.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import platform
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from valle import __version__, native
from valle.codecs import ASSETS, BUILDERS, DEFAULT_CODEC, load_codec
from valle.codecs.hf import HUB_IDS
from valle.config import DataConfig, ModelConfig, TrainConfig, chosen_by_user, parse
from valle.data.dataset import describe_codes
from valle.engine import memory, planning
from valle.engine.devices import pick_device, rng_state, set_rng_state
from valle.engine.trainer import DTYPES
from valle.models.builder import build_model
from valle.utils.command import run
from valle.utils.errors import UserError

PACKAGES = ("torch", "lhotse", "numpy", "soundfile", "soxr", "av", "safetensors")
# Extra -> its modules, and what they are for.
EXTRAS = {
    "hub": (("transformers",), "EnCodec, DAC and Mimi"),
    "tensorboard": (("tensorboard",), "curves in TensorBoard"),
    "report": (("matplotlib",), "the evaluation's report"),
    "eval": (("speechmos", "onnxruntime"), "DNSMOS"),
    "lora": (("peft",), "--lora-rank"),
    "wandb": (("wandb",), "--wandb-project"),
}
LEAST_MEMORY = 1.5e9  # bytes, for the smallest trainings
LEAST_DISK = 2e9
PROBE_FRAMES = 256
FASTER = 1.3  # times, for a number format to be worth it
PEAK_PARTS = 1.3  # what is held for a moment in backward, beside what is kept
GB = memory.GB


class Report:
    """Lines of `name  text`, and the problems among them."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def line(self, name: str, text: str) -> None:
        """Print one."""
        print(f"{name:<12}{text}", flush=True)

    def problem(self, name: str, text: str) -> None:
        """Print one that stands in the way of a training."""
        self.problems.append(f"{name}: {text}")
        self.line(name, f"PROBLEM: {text}")


def cpu_name() -> str:
    """The processor's name and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {usable_cores()} of {os.cpu_count()} cores usable"


def usable_cores() -> int:
    """Cores that the system lets this process use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def speeds(device: torch.device) -> dict[str, float]:
    """Operations per second of a matrix product, by number format."""
    size = 4096 if device.type == "cuda" else 768
    found = {}
    for name, dtype in DTYPES.items():
        if device.type == "cpu" and dtype == torch.float16:
            continue  # by far the slowest on most, and no other reason for it
        matrix = torch.ones(size, size, dtype=dtype, device=device)
        seconds = math.inf
        for _ in range(4):
            started = time.perf_counter()
            product = matrix @ matrix
            float(product[0, 0])  # waits for the device
            seconds = min(seconds, time.perf_counter() - started)
        found[name] = 2 * size**3 / seconds
    return found


def best_dtype(found: dict[str, float]) -> str:
    """The number format to train in: bfloat16 where it is fast, float16 where only that is, else float32."""
    plain = found["float32"]
    for name in ("bfloat16", "float16"):
        if found.get(name, 0.0) > FASTER * plain:
            return name
    return "float32"


def check_machine(report: Report, device: torch.device, exp_dir: Path) -> str:
    """Versions, devices, memory, disk; returns the number format that suits the device."""
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            report.problem("packages", f"{package} is not installed; run: pip install -r requirements.txt")
    report.line("versions", f"valle {__version__}, Python {platform.python_version()}, {', '.join(versions)}")
    report.line("system", platform.platform())
    report.line("cpu", cpu_name())
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(number)
            report.line(
                f"cuda:{number}",
                f"{facts.name}, {facts.total_memory / GB:.1f} GB, sm_{facts.major}{facts.minor}",
            )
    else:
        report.line("gpu", "none that this PyTorch sees; everything runs on the CPU")
    size = memory.capacity(device)
    report.line(
        "memory",
        f"{memory.available_ram() / GB:.1f} GB of RAM free; {size / GB:.1f} GB for a training on {device}",
    )
    if size < LEAST_MEMORY:
        report.problem(
            "memory",
            f"{size / GB:.1f} GB are less than the {LEAST_MEMORY / GB:.1f} GB that any training takes",
        )
    folder = next(place for place in [exp_dir, *exp_dir.resolve().parents] if place.is_dir())
    free = shutil.disk_usage(folder).free
    report.line("disk", f"{free / GB:.0f} GB free at '{folder}', where --exp-dir goes")
    if free < LEAST_DISK:
        report.problem("disk", f"{free / GB:.1f} GB free at '{folder}'; checkpoints fill that soon")
    if not os.access(folder, os.W_OK):
        report.problem("disk", f"'{folder}' cannot be written to; choose another --exp-dir")
    found = speeds(device)
    dtype = best_dtype(found)
    shown = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in found.items())
    report.line("speed", f"{shown} GFLOP/s in a matrix product; {dtype} suits {device}")
    if device.type == "cpu":
        there = "compiled, " if native.available() else "none: "
        report.line("kernels", f"{there}{native.state()}")
    check_threads(report)
    return dtype


def check_threads(report: Report) -> None:
    """Settings of OpenMP that cost speed."""
    report.line("threads", f"torch uses {torch.get_num_threads()}")
    cores = usable_cores()
    if torch.get_num_threads() > cores:
        report.line("", f"hint: more than the {cores} cores; export OMP_NUM_THREADS={cores}")
    if os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive" or os.environ.get("GOMP_SPINCOUNT") != "0":
        report.line(
            "", "hint: threads that wait keep cores busy; export OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0"
        )
    else:
        report.line(
            "", "OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0; valle's commands set them, other programs may not"
        )


def check_extras(report: Report) -> None:
    """Packages that only some commands need."""
    for extra, (modules, purpose) in EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        text = "installed" if not missing else f"{', '.join(missing)} missing: pip install 'valle[{extra}]'"
        report.line("extra", f"{extra} ({purpose}): {text}")


def check_codecs(report: Report) -> None:
    """Which codecs can be loaded without a network."""
    try:
        codec = load_codec(DEFAULT_CODEC)
        report.line(
            "codec",
            f"{DEFAULT_CODEC}: ready, {codec.frame_rate:g} frames/s, {codec.num_quantizers} quantizers",
        )
    except (UserError, OSError) as error:
        report.problem("codec", f"{DEFAULT_CODEC} in '{ASSETS}': {error}")
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        report.line("codec", "others need the extra hub")
        return
    here = [
        name
        for name, source in HUB_IDS.items()
        if isinstance(try_to_load_from_cache(source, "config.json"), str)
    ]
    absent = [name for name in BUILDERS if name not in here and name != DEFAULT_CODEC]
    for text, names in (("in the hub's cache", here), ("downloaded at the first use", absent)):
        if names:
            report.line("codec", f"{', '.join(names)}: {text}")


# ---------------------------------------------------------------------------------------------- a training


@dataclasses.dataclass(frozen=True)
class Needs:
    """Memory of a training, in bytes.

    Attributes:
        parameters: how many are trained.
        fixed: of weights, gradients and the optimizer.
        per_frame: of what is kept for the backward pass, for each frame of a batch, prompt and target.
    """

    parameters: int
    fixed: float
    per_frame: float


def measure(
    model: ModelConfig, config: TrainConfig, codebook_size: int, stage: int, device: torch.device
) -> Needs:
    """Count parameters, and measure activations on a model of one and of two layers."""
    sizes = planning.parameter_sizes(model, codebook_size)
    trained = planning.stage_sizes(sizes, stage)
    weights = planning.FULL_BYTES * (sum(sizes.values()) * (2 if config.average_period else 1) + sum(trained))
    each, once = [], []  # bytes for each frame, and for all (rounded copies of the weights), by layers
    for layers in (1, 2):
        small = build_model(dataclasses.replace(model, num_decoder_layers=layers), codebook_size)
        small.to(device).train()
        kept = []
        for rows in (1, 2):
            batch = probe_batch(rows, model.num_quantizers or 1, device)
            with torch.autocast(device.type, DTYPES[config.dtype], enabled=config.dtype != "float32"):
                kept.append(memory.kept_for_backward(small, batch, stage))
        each.append((kept[1] - kept[0]) / PROBE_FRAMES)
        once.append(2 * kept[0] - kept[1])
        del small
    more = model.num_decoder_layers - 1
    fixed = (
        weights
        + planning.optimizer_bytes(config.optimizer_name, trained)
        + once[0]
        + more * (once[1] - once[0])
    )
    return Needs(sum(trained), fixed, PEAK_PARTS * (each[0] + more * (each[1] - each[0])))


def probe_batch(rows: int, num_quantizers: int, device: torch.device) -> dict[str, Any]:
    """Rows of `PROBE_FRAMES` frames, half of them prompt."""
    codes = torch.zeros(rows, PROBE_FRAMES // 2, num_quantizers, dtype=torch.long, device=device)
    lens = torch.full((rows,), PROBE_FRAMES // 2, device=device)
    return {"x": codes, "x_lens": lens, "y": codes, "y_lens": lens}


def suggest(report: Report, model: ModelConfig, data: DataConfig, config: TrainConfig, dtype: str) -> None:
    """Settings that fit the memory, for the flags given."""
    device = pick_device(config.device)
    folder = Path(data.manifest_dir)
    codec: dict[str, Any] = {"num_quantizers": 4, "codebook_size": 2048, "frame_rate": 50.0}
    if (folder / "cuts_train.jsonl.gz").is_file():
        codec |= describe_codes(folder, folder / "cuts_train.jsonl.gz")
        report.line("data", f"'{folder}': codec {codec.get('name')}, {codec['num_quantizers']} quantizers")
    else:
        report.line(
            "data", f"no cuts in --manifest-dir '{folder}'; taking 4 quantizers of 2048 codes, 50 frames/s"
        )
    model.num_quantizers = model.num_quantizers or int(codec["num_quantizers"])
    config = dataclasses.replace(config, dtype=dtype)
    wanted_stages = [1, 2] if config.train_stage == "auto" else [int(config.train_stage)]
    stages = [stage for stage in wanted_stages if stage != 2 or model.num_quantizers > 1] or [1]
    state = rng_state()
    needs = max(
        (measure(model, config, int(codec["codebook_size"]), stage, device) for stage in stages),
        key=lambda needs: needs.fixed + needs.per_frame * data.max_duration * codec["frame_rate"],
    )
    set_rng_state(state)
    rest = memory.resident() if device.type == "cpu" else 0.0
    size = memory.capacity(device)
    per_second = needs.per_frame * codec["frame_rate"]
    fits = (memory.CAREFUL * size - rest - needs.fixed) / per_second
    report.line(
        "training",
        f"{needs.parameters / 1e6:.1f} M parameters in {dtype}: {needs.fixed / GB:.2f} GB, and "
        f"{per_second / 1e6:.1f} MB for each second of audio in a batch, of {size / GB:.1f} GB",
    )
    longest = data.filter_max_duration
    if fits < longest:
        report.problem(
            "training",
            f"batches of {max(0.0, fits):.0f} s fit, but one recording may last {longest:g} s; lower "
            "--filter-max-duration or --decoder-dim, or train on a larger device",
        )
        return
    wanted = data.max_duration * config.accumulate_grad_steps
    duration = min(data.max_duration, math.floor(fits))
    steps = math.ceil(wanted / duration)
    report.line("fits", f"--max-duration up to about {math.floor(fits)}")
    report.line("suggestion", f"--max-duration {duration:g} --dtype {dtype} --accumulate-grad-steps {steps}")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; takes the trainer's flags.

    Raises:
        UserError: something stands in the way of a training.
    """
    model, data, config = parse(__doc__ or "", [ModelConfig, DataConfig, TrainConfig], argv)
    report = Report()
    device = pick_device(config.device)
    dtype = check_machine(report, device, Path(config.exp_dir))
    check_extras(report)
    check_codecs(report)
    suggest(report, model, data, config, config.dtype if "dtype" in chosen_by_user(config) else dtype)
    if report.problems:
        raise UserError(f"{len(report.problems)} problem(s): {'; '.join(report.problems)}")


if __name__ == "__main__":
    run(main)
