"""Averages of checkpoints: the mean of several files, or the mean over all steps between two.

The mean of the last epochs is usually a little better than the last one. With `--average-period` a training keeps the
mean of its weights over all steps so far; two of these give the mean over the steps in between, without their files.

Sums are in float64, and one checkpoint is read at a time; of a file's other contents (the optimizer's state above all)
nothing is.
Source of the second way: icefall's `average_checkpoints_with_averaged_model`, with the same entries in the files.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from valle.engine.checkpoint import (
    load_checkpoint,
    numbered_checkpoint,
    numbered_checkpoints,
    save_checkpoint,
)
from valle.engine.stages import NOT_ARCHITECTURE
from valle.utils.errors import UserError
from valle.utils.sharded import read_header

# What only the training that wrote a checkpoint can use.
TRAINING_STATE = {
    "optimizer", "scheduler", "sampler", "grad_scaler", "rng", "current", "totals", "model_avg", "batch_idx_train",
    "average_period", "best_valid_loss", "best_train_loss", "stale_validations", "validated_step", "bad_steps", "lora",
}  # fmt: skip
# Parts of a configuration that may differ between checkpoints of one architecture.
NO_MODEL = {"data", "train"}


class Source(NamedTuple):
    """A checkpoint, and how often it counts.

    Attributes:
        path: its file or folder.
        contents: all of it; the tensors are still on the disk, or, of a folder, without data.
        entry: which weights count, "model" or "model_avg".
        weight: how often they do.
    """

    path: Path
    contents: dict[str, Any]
    entry: str
    weight: int

    def weights(self) -> dict[str, Tensor]:
        """To be read."""
        return (load_checkpoint(self.path) if self.path.is_dir() else self.contents)[self.entry]


def average_files(paths: Sequence[Path]) -> dict[str, Any]:
    """The mean of checkpoints, as a checkpoint to generate from.

    Raises:
        UserError: a file that is missing or damaged, of another architecture or stage, or with weights that are not
            finite.
    """
    sources = [Source(path, _open(path), "model", 1) for path in paths]
    return _average(sources)


def average_between(start: Path | None, end: Path) -> dict[str, Any]:
    """The mean over all steps between two checkpoints with running averages, as a checkpoint to generate from.

    Args:
        start: steps up to here do not count (default: all steps of the stage do).
        end: the last one.

    Raises:
        UserError: as `average_files`; a file without a running average; `start` is not before `end`.
    """
    sources = []
    for path in (start, end):
        if path is None:
            continue
        contents = _open(path)
        if "model_avg" not in contents:
            raise UserError(
                f"'{path}' has no running average; train with --average-period, or average without "
                "--use-averaged-model"
            )
        period = int(contents["average_period"])
        steps = int(contents["batch_idx_train"]) // period * period  # as far as the average goes
        sources.append(Source(path, contents, "model_avg", steps if path == end else -steps))
    total = sum(source.weight for source in sources)
    if total < 1:
        raise UserError(
            f"'{start}' and '{end}': their running averages are {total} steps apart, expected 1 or more; "
            "give the earlier checkpoint first, and two that are an --average-period apart"
        )
    return _average(sources)


def epochs_to_average(folder: Path, epoch: int, count: int) -> list[Path]:
    """`epoch-N.pt` (or the folders `epoch-N`) of the last `count` epochs up to `epoch`.

    Raises:
        UserError: one of them is missing, or there are not so many epochs.
    """
    if count > epoch:
        raise UserError(f"--avg is {count}, but --epoch {epoch} has only {epoch} epoch(s) up to it")
    wanted = [numbered_checkpoint(folder, "epoch", number) for number in range(epoch - count + 1, epoch + 1)]
    missing = [path.name for path in wanted if not path.exists()]
    if missing:
        raise UserError(
            f"{_missing(folder, missing, 'epoch')}; lower --avg, or train with another --keep-last-k"
        )
    return wanted


def steps_to_average(folder: Path, step: int, count: int) -> list[Path]:
    """The last `count` files `checkpoint-<step>.pt` up to `step`, which has one.

    Raises:
        UserError: there are not so many.
    """
    found = [path for number, path in numbered_checkpoints(folder, "checkpoint") if number <= step]
    last = numbered_checkpoint(folder, "checkpoint", step)
    if last not in found:
        raise UserError(f"{_missing(folder, [last.name], 'checkpoint')}; give the step of one that is there")
    if len(found) < count:
        raise UserError(
            f"--avg is {count}, but '{folder}' has {len(found)} checkpoint(s) up to step {step}: "
            f"{_names(found)}; lower --avg, or train with another --save-every-n and --keep-last-k"
        )
    return found[-count:]


def before_epochs(folder: Path, epoch: int, count: int) -> Path | None:
    """The checkpoint behind which the last `count` epochs up to `epoch` begin; None: the stage begins there.

    Raises:
        UserError: it is missing, or the stage has not so many epochs.
    """
    (end,) = epochs_to_average(folder, epoch, 1)
    first = int(_open(end)["scheduler"]["stage_start"][1])  # number of the stage's first epoch
    if epoch - count < first - 1:
        raise UserError(
            f"--avg is {count}, but the stage of '{end}' has only {epoch - first + 1} epoch(s) up to it, from "
            f"epoch {first} on"
        )
    if epoch - count == first - 1:
        return None
    return epochs_to_average(folder, epoch - count, 1)[0]


def save_average(path: Path, contents: dict[str, Any]) -> None:
    """Write a checkpoint, atomically."""
    save_checkpoint(path.parent, [path.name], contents)


def _open(path: Path) -> dict[str, Any]:
    """A checkpoint without the data of its tensors, or with tensors that stay on the disk until they are read."""
    return read_header(path) if path.is_dir() else load_checkpoint(path, mmap=True)


def _average(sources: list[Source]) -> dict[str, Any]:
    _check_alike(sources)
    last = max(sources, key=lambda source: int(source.contents["step"]))
    tied = _tied(last.contents["model"])
    names = [name for name in last.contents["model"] if name not in tied]
    means: dict[str, Tensor] = {}
    for source in sources:
        weights = source.weights()
        for name in names:
            value = weights[name]
            if not value.is_floating_point():
                if source is last:
                    means[name] = value.clone()
                continue
            if not bool(torch.isfinite(value).all()):
                raise UserError(f"'{source.path}': weight '{name}' is not finite; leave this checkpoint out")
            if name not in means:
                means[name] = torch.zeros(value.shape, dtype=torch.float64)
            means[name].add_(value.double(), alpha=source.weight)
    total = sum(source.weight for source in sources)
    for name in names:
        if means[name].is_floating_point():
            means[name] = (means[name] / total).to(last.contents[last.entry][name].dtype)
    kept = {key: value for key, value in last.contents.items() if key not in TRAINING_STATE}
    model = {name: means[tied.get(name, name)] for name in last.contents["model"]}
    averaged = [{"file": source.path.name, "weight": source.weight} for source in sources]
    return {**kept, "model": model, "averaged": averaged}


def _tied(weights: dict[str, Tensor]) -> dict[str, str]:
    """Names of weights that are one tensor with another's: the name -> the first name of it."""
    first: dict[tuple[int, torch.Size], str] = {}
    tied = {}
    for name, value in weights.items():
        if not value.is_meta and first.setdefault((value.data_ptr(), value.shape), name) != name:
            tied[name] = first[value.data_ptr(), value.shape]
    return tied


def _check_alike(sources: list[Source]) -> None:
    """Raises a UserError unless all are checkpoints of one architecture, codec and stage."""
    stages: dict[int, list[Path]] = {}
    for source in sources:
        stages.setdefault(int(source.contents.get("train_stage", 0)), []).append(source.path)
    if len(stages) > 1:
        shown = "; ".join(f"stage {stage}: {_names(paths)}" for stage, paths in sorted(stages.items()))
        raise UserError(
            f"an average over two training stages is of no use: {shown}; lower --avg, or give files of one stage"
        )
    first = sources[0]
    for other in sources[1:]:
        found = _difference(first.contents, other.contents)
        weights, expected = other.contents[other.entry], first.contents[first.entry]
        for name in sorted(expected.keys() | weights.keys()) if found is None else ():
            shapes = [tuple(part[name].shape) if name in part else None for part in (expected, weights)]
            if shapes[0] != shapes[1]:
                found = f"weight '{name}': shape {shapes[0]} and {shapes[1]}"
                break
        if found is not None:
            raise UserError(
                f"'{first.path}' and '{other.path}' cannot be averaged, they differ in {found}; "
                "give checkpoints of one training"
            )


def _difference(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """The first thing that makes two checkpoints those of different models, with both values; None: nothing does."""
    parts = [
        *((f"config's {part} ", one["config"][part], other.get("config", {}).get(part))
          for part in one.get("config", {}) if part not in NO_MODEL),
        ("codec's ", one.get("codec"), other.get("codec")),
    ]  # fmt: skip
    for what, mine, theirs in parts:
        mine, theirs = mine or {}, theirs or {}
        for key in sorted(
            mine.keys() & theirs.keys() - NOT_ARCHITECTURE
        ):  # a version may know keys that another does not
            if mine[key] != theirs[key]:
                return f"{what}{key}: {mine[key]} and {theirs[key]}"
    return None


def _missing(folder: Path, names: Sequence[str], kind: str) -> str:
    there = [path for _, path in numbered_checkpoints(folder, kind)]
    return f"'{folder}' has no {', '.join(names)}, but {_names(there) or f'no {kind}-*.pt at all'}"


def _names(paths: Sequence[Path]) -> str:
    """Names of files; of many, the first and the last."""
    names = [path.name for path in paths]
    return ", ".join(names) if len(names) <= 6 else f"{names[0]} … {names[-1]} ({len(names)} files)"
