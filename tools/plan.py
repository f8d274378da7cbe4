"""What a training will take: parameters, memory, operations, days, batch flags and storage, before any GPU is rented.

    python tools/plan.py --hours 1000 --gpus 8 --gpu a100-80gb --optimizer-name AdamW --dtype bfloat16
    python tools/plan.py --config egs/asterisk/conf/audiolm.yaml --hours 0.33 --gpus 1 --gpu rtx4090
    python tools/plan.py --hours 1000 --json true > plan.json

It takes the trainer's own flags and files (--config), and besides them the hours of audio and the GPUs. Everything is
computed by the formulas of valle/engine/planning.py, which the tests compare with what small models count. Nothing is
measured: the days rest on --utilization, the share of the GPUs' peak that a training reaches, which is an assumption
until tools/bench_train.py has measured it on the machine in question.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from valle.codecs import DEFAULT_CODEC, load_codec
from valle.config import DataConfig, ModelConfig, TrainConfig, option, parse
from valle.data.dataset import read_codec_info
from valle.engine import planning
from valle.engine.memory import USABLE
from valle.engine.planning import GB, GPUS, Architecture, Setup
from valle.utils.command import run
from valle.utils.errors import UserError

SAMPLE_BYTES = 2  # of a recording on disk, 16 bits
ENOUGH_CUTS = 4  # in a batch: fewer keep a GPU busy no better than computing layers twice does
CHINCHILLA = 20  # tokens a parameter, arXiv 2203.15556
MEGA = 1e6


@dataclass
class PlanConfig:
    """What is planned."""

    hours: float = option(1000.0, "hours of audio to train on")
    codec: str | None = option(
        None, "codec of the codes (default: what codec.json in --manifest-dir says, else the project's own)"
    )
    cut_seconds: float = option(0.0, "length of a typical cut; 0: --filter-max-duration, the most expensive")
    gpus: int = option(8, "GPUs that train together")
    gpu: str = option("a100-80gb", "their kind", list(GPUS))
    utilization: float = option(0.4, "share of the GPUs' peak that is reached: an assumption")
    target_batch: float = option(1280.0, "seconds of audio in one step of all GPUs")
    shard_megabytes: float = option(256.0, "size of a shard of codes")
    gpu_sizes: str = option("8,12,16,24,40,80", "comma list of memory sizes in GB, to show flags for")
    json: bool = option(False, "print JSON in the place of tables")


class Variant(NamedTuple):
    """A way to make room: flags of the trainer, and what they do."""

    checkpointing: bool
    sharded: bool
    flags: str


VARIANTS = [
    Variant(False, False, ""),
    Variant(True, False, "--activation-checkpointing true"),
    Variant(False, True, "--parallel fsdp"),
    Variant(True, True, "--parallel fsdp --activation-checkpointing true"),
]


class Plan:
    """A training's figures, one method a group of them.

    Args:
        model, data, train: the trainer's configuration.
        config: what is planned.
        codec: see `Codec.info`.
    """

    def __init__(
        self,
        model: ModelConfig,
        data: DataConfig,
        train: TrainConfig,
        config: PlanConfig,
        codec: dict[str, Any],
    ) -> None:
        self.model, self.data, self.train, self.config, self.codec = model, data, train, config, codec
        self.architecture = Architecture.of(model, int(codec["codebook_size"]))
        self.sizes = planning.parameter_sizes(model, int(codec["codebook_size"]))
        self.frame_rate = float(codec["frame_rate"])
        self.seconds = config.hours * 3600
        self.cut_seconds = config.cut_seconds or data.filter_max_duration
        self.row = planning.split_row(max(2, round(self.cut_seconds * self.frame_rate)), data.prompt_ratio)
        self.stages = [1, 2] if train.train_stage == "auto" else [int(train.train_stage)]
        if self.architecture.num_quantizers == 1:
            self.stages = [1]

    def setup(self, stage: int, variant: Variant) -> Setup:
        """How a stage is trained."""
        return Setup(
            stage, self.train.dtype, self.train.optimizer_name, self.train.average_period > 0,
            variant.checkpointing, self.config.gpus if variant.sharded else 1,
        )  # fmt: skip

    def parameters(self) -> dict[str, Any]:
        """Numbers of parameters, and the size of a checkpoint."""
        ar, nar = (sum(planning.stage_sizes(self.sizes, stage)) for stage in (1, 2))
        checkpoint = max(
            planning.checkpoint_bytes(
                self.sizes, stage, self.train.optimizer_name, self.train.average_period > 0
            )
            for stage in self.stages
        )
        return {"ar": ar, "nar": nar, "total": ar + nar, "checkpoint_bytes": checkpoint}

    def storage(self) -> dict[str, Any]:
        """Frames, codes, and what they take on a disk."""
        quantizers = int(self.codec["num_quantizers"])
        frames = self.seconds * self.frame_rate
        codes = planning.codes_bytes(self.seconds, self.frame_rate, quantizers)
        shard = self.config.shard_megabytes * MEGA
        cut = planning.codes_bytes(self.cut_seconds, self.frame_rate, quantizers)
        audio = self.seconds * SAMPLE_BYTES * int(self.codec["sample_rate"]) * int(self.codec["channels"])
        modelled = frames * self.architecture.num_quantizers
        parameters = self.parameters()
        return {
            "hours": self.config.hours,
            "frames": frames,
            "codes": modelled,
            "codes_bytes": codes,
            "audio_bytes": audio,
            "shards": max(1, math.ceil(codes / shard)),
            "cuts_per_shard": max(1, round(shard / cut)),
            "frames_per_ar_parameter": frames / parameters["ar"],
            "codes_per_parameter": modelled / parameters["total"],
        }

    def work(self, stage: int) -> dict[str, Any]:
        """Operations of a stage, and the days that they take."""
        config, row = self.config, self.row
        work = planning.forward_work(self.architecture, int(row.prompt), int(row.target), stage)
        forward = sum(work) / (row.prompt + row.target)
        epoch = 3 * forward * self.seconds * self.frame_rate
        total = epoch * self.train.num_epochs
        peak = GPUS[config.gpu].peak
        return {
            "forward_per_frame": forward,
            "backward_per_frame": 2 * forward,
            "attention_share": work.attention / sum(work),
            "epoch": epoch,
            "total": total,
            "days": planning.days(total, config.gpus, peak, config.utilization),
            "days_checkpointing": planning.days(
                planning.RECOMPUTING * total, config.gpus, peak, config.utilization
            ),
        }

    def room(self, stage: int, variant: Variant, memory: float) -> dict[str, Any]:
        """The batch that fits into so many bytes of a GPU, and what takes them; `max_duration` 0: none does."""
        setup, cut, longest = self.setup(stage, variant), self.cut_seconds, self.data.filter_max_duration
        rows = planning.fitting_rows(self.architecture, self.sizes, setup, self.row, USABLE * memory)
        fitting, share = rows * cut, self.config.target_batch / self.config.gpus
        accumulate = max(1, math.ceil(share / fitting)) if fitting >= longest else 0
        duration = max(longest, _two_digits(share / accumulate)) if accumulate else 0.0
        used = planning.gpu_memory(
            self.architecture, self.sizes, setup, self.row._replace(number=duration / cut)
        )
        step = duration * self.config.gpus * accumulate
        return {
            "flags": variant.flags,
            "largest_max_duration": fitting,
            "max_duration": duration,
            "accumulate_grad_steps": accumulate,
            "steps": self.seconds * self.train.num_epochs / step if step else 0.0,
            "memory": {**used._asdict(), "total": used.total},
        }

    def choose(self, memory: float) -> dict[str, Any] | None:
        """Flags for GPUs of so many bytes, the same in all stages: those of the stage that takes most.

        The first way of making room for `ENOUGH_CUTS`, or for the whole step; else the one for the largest batch.
        """
        found = []
        for variant in self.variants():
            rooms = [self.room(stage, variant, memory) for stage in self.stages]
            found.append(min(rooms, key=lambda room: room["largest_max_duration"]))
        found = [room for room in found if room["accumulate_grad_steps"]]
        for room in found:
            enough = room["largest_max_duration"] >= ENOUGH_CUTS * self.data.filter_max_duration
            if enough or room["accumulate_grad_steps"] == 1:
                return room
        return max(found, key=lambda room: room["largest_max_duration"], default=None)

    def variants(self) -> list[Variant]:
        """One GPU has nobody to share with, and ScaledAdam needs whole tensors."""
        sharding = self.config.gpus > 1 and self.train.optimizer_name == "AdamW"
        return [variant for variant in VARIANTS if sharding or not variant.sharded]

    def report(self) -> dict[str, Any]:
        """Everything."""
        config = self.config
        gpu = GPUS[config.gpu]
        sizes = _listed(config.gpu_sizes)
        return {
            "model": {
                "decoder_dim": self.architecture.dim, "nar_dim": self.architecture.nar_dim,
                "nhead": self.architecture.heads, "num_decoder_layers": self.architecture.num_layers,
            },
            "codec": {key: self.codec.get(key) for key in ("name", "frame_rate", "num_quantizers", "codebook_size")},
            "num_quantizers": self.architecture.num_quantizers,
            "parameters": self.parameters(),
            "data": self.storage(),
            "assumed": {
                "cut_seconds": self.cut_seconds, "utilization": config.utilization, "usable_memory": USABLE,
                "gpus": config.gpus, "gpu": config.gpu, "peak": gpu.peak, "gpu_memory": gpu.memory,
                "num_epochs": self.train.num_epochs, "dtype": self.train.dtype,
                "optimizer": self.train.optimizer_name, "target_batch": config.target_batch,
            },
            "stages": [
                {
                    "stage": stage,
                    "work": self.work(stage),
                    "rooms": [self.room(stage, variant, gpu.memory) for variant in self.variants()],
                }
                for stage in self.stages
            ],
            "gpu_sizes": [
                {"gigabytes": size, "room": self.choose(size * GB)}
                for size in sizes
            ],
        }  # fmt: skip


def _two_digits(seconds: float) -> float:
    """Rounded down to two digits."""
    unit = 10 ** max(0, math.floor(math.log10(seconds)) - 1)
    return float(int(seconds / unit) * unit)


def _listed(text: str) -> list[float]:
    """The numbers of a comma list."""
    try:
        sizes = [float(part) for part in text.split(",") if part]
    except ValueError:
        sizes = [0.0]
    if any(size <= 0 for size in sizes):
        raise UserError(f"--gpu-sizes is '{text}', expected sizes in GB, separated by commas")
    return sizes


# ------------------------------------------------------------------------------------------ as a table


def describe(report: dict[str, Any]) -> str:
    """The report as text."""
    model, codec, parameters = report["model"], report["codec"], report["parameters"]
    data, assumed = report["data"], report["assumed"]
    parts = [
        part
        for part in (*planning.Memory._fields, "total")
        if any(room["memory"][part] for stage in report["stages"] for room in stage["rooms"])
    ]
    lines = [
        f"model        width {model['decoder_dim']} (NAR {model['nar_dim']}), {model['nhead']} heads, "
        f"{model['num_decoder_layers']} layers each; {report['num_quantizers']} quantizers x {codec['codebook_size']} "
        f"codes, {codec['frame_rate']:g} Hz ({codec['name']})",
        f"parameters   AR {_count(parameters['ar'])}, NAR {_count(parameters['nar'])}, "
        f"total {_count(parameters['total'])}; a checkpoint {_bytes(parameters['checkpoint_bytes'])}",
        f"data         {data['hours']:,g} h: {_count(data['frames'])} frames, {_count(data['codes'])} codes; "
        f"{data['frames_per_ar_parameter']:.2g} frames an AR parameter, {data['codes_per_parameter']:.2g} codes a "
        f"parameter (for text, about {CHINCHILLA} tokens are best)",
        f"storage      codes {_bytes(data['codes_bytes'])} in {data['shards']:,} shards of {data['cuts_per_shard']:,} "
        f"cuts; recordings of 16 bits {_bytes(data['audio_bytes'])}",
        f"assumed      cuts of {assumed['cut_seconds']:g} s, {assumed['num_epochs']} epochs, {assumed['gpus']} x "
        f"{assumed['gpu']} ({assumed['peak'] / 1e12:g} TFLOP/s, {_bytes(assumed['gpu_memory'])}) at "
        f"{assumed['utilization']:.0%} of the peak, {assumed['usable_memory']:.0%} of the memory, {assumed['dtype']}, "
        f"{assumed['optimizer']}",
        "",
        _table(
            ["stage", "FLOP a frame: forward", "backward", "in attention", "an epoch", "all", "time", "recomputing"],
            [
                [
                    _stage(stage["stage"]), _count(work["forward_per_frame"]), _count(work["backward_per_frame"]),
                    f"{work['attention_share']:.0%}", f"{work['epoch']:.2e}", f"{work['total']:.2e}",
                    _days(work["days"]), _days(work["days_checkpointing"]),
                ]
                for stage in report["stages"]
                for work in [stage["work"]]
            ],
        ),
        "",
        f"memory of one GPU, at --max-duration and --accumulate-grad-steps for {assumed['target_batch']:,g} s a step:",
        _table(
            ["stage", "flags", "fits up to", "max-duration", "accumulate", "steps", *parts],
            [
                [_stage(stage["stage"]), room["flags"] or "-", *_batch(room),
                 *(_bytes(room["memory"][part]) if room["accumulate_grad_steps"] else "-" for part in parts)]
                for stage in report["stages"]
                for room in stage["rooms"]
            ],
        ),
        "",
        f"flags by the size of a GPU, {assumed['gpus']} of them:",
        _table(
            ["GPU", "flags", "takes"],
            [[f"{size['gigabytes']:g} GB", *_flags(size["room"])] for size in report["gpu_sizes"]],
        ),
    ]  # fmt: skip
    return "\n".join(lines)


def _flags(room: dict[str, Any] | None) -> list[str]:
    if room is None:
        return [
            "does not fit: smaller --decoder-dim, --num-decoder-layers or --filter-max-duration, or more GPUs",
            "-",
        ]
    said = f"--max-duration {room['max_duration']:g} --accumulate-grad-steps {room['accumulate_grad_steps']}"
    return [f"{said} {room['flags']}".strip(), _bytes(room["memory"]["total"])]


def _batch(room: dict[str, Any]) -> list[str]:
    if not room["accumulate_grad_steps"]:
        return [f"{room['largest_max_duration']:.0f} s", "does not fit", "-", "-"]
    return [
        f"{room['largest_max_duration']:.0f} s", f"{room['max_duration']:g}", str(room["accumulate_grad_steps"]),
        f"{room['steps']:,.0f}",
    ]  # fmt: skip


def _stage(stage: int) -> str:
    return {0: "0 AR + NAR", 1: "1 AR", 2: "2 NAR"}[stage]


def _table(headings: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    lines = [headings, ["-" * width for width in widths], *rows]
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |"
        for line in lines
    )


def _count(number: float) -> str:
    """`156.4 M`."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f}"


def _bytes(number: float) -> str:
    return f"{number / 1e12:.1f} TB" if number >= 1e12 else f"{number / GB:.{1 if number >= GB else 2}f} GB"


def _days(number: float) -> str:
    return (
        f"{24 * 60 * number:.1f} min"
        if number < 1 / 24
        else f"{24 * number:.1f} h"
        if number < 1
        else f"{number:.1f}"
    )


# ------------------------------------------------------------------------------------------ the command


def make_plan(model: ModelConfig, data: DataConfig, train: TrainConfig, config: PlanConfig) -> dict[str, Any]:
    """The report, of checked settings.

    Raises:
        UserError: a value that cannot be planned with, or a codec that cannot be had.
    """
    for name, value in (
        ("hours", config.hours), ("gpus", config.gpus), ("target-batch", config.target_batch),
        ("shard-megabytes", config.shard_megabytes), ("num-epochs", train.num_epochs),
        ("filter-max-duration", data.filter_max_duration), ("decoder-dim", model.decoder_dim),
    ):  # fmt: skip
        if value <= 0:
            raise UserError(f"--{name} is {value:g}, expected more than 0")
    if not 0 < config.utilization <= 1:
        raise UserError(
            f"--utilization is {config.utilization:g}, expected a share of the peak, more than 0 up to 1"
        )
    if not 0 < data.prompt_ratio < 1:
        raise UserError(f"--prompt-ratio is {data.prompt_ratio:g}, expected more than 0 and less than 1")
    if not 0 <= config.cut_seconds <= data.filter_max_duration:
        raise UserError(
            f"--cut-seconds is {config.cut_seconds:g}, expected 0 to --filter-max-duration {data.filter_max_duration:g}"
        )
    codec = read_codec_info(Path(data.manifest_dir)) if config.codec is None else None
    if codec is None or "frame_rate" not in codec or "sample_rate" not in codec:
        codec = load_codec(config.codec or DEFAULT_CODEC).info()
    available = int(codec["num_quantizers"])
    if not 1 <= (model.num_quantizers or available) <= available:
        raise UserError(
            f"--num-quantizers is {model.num_quantizers}, but codec '{codec['name']}' has {available}"
        )
    model = replace(model, num_quantizers=model.num_quantizers or available)
    return Plan(model, data, train, config, codec).report()


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    parts = parse("Plan a training.", [PlanConfig, ModelConfig, DataConfig, TrainConfig], argv)
    config, model, data, train = parts
    report = make_plan(model, data, train, config)
    print(json.dumps(report, indent=2) if config.json else describe(report))


if __name__ == "__main__":
    run(main)
