"""Sums and counts of what a training reports, and where they are written: a JSON-lines file and TensorBoard."""

import json
from pathlib import Path
from typing import Any

import torch

from valle.utils import distributed


class MetricSums:
    """Running (sum, count) of named figures; `average()` divides."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}
        self.counts: dict[str, float] = {}

    def add(self, metrics: dict[str, tuple[Any, int]]) -> None:
        """Add one batch's figures; sums may be tensors, which are read when they are asked for."""
        for name, (total, count) in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + total
            self.counts[name] = self.counts.get(name, 0.0) + count

    def merge(self, other: "MetricSums") -> None:
        """Add what another has summed up."""
        self.add({name: (other.sums[name], other.counts[name]) for name in other.sums})  # type: ignore[misc]

    def over_ranks(self, device: torch.device) -> "MetricSums":
        """The sums of all ranks, as plain numbers; every rank calls it with the same names."""
        names = sorted(self.sums)
        values = [float(self.sums[name]) for name in names] + [self.counts[name] for name in names]
        values = distributed.sum_over_ranks(values, device)
        total = MetricSums()
        total.sums = dict(zip(names, values[: len(names)], strict=True))
        total.counts = dict(zip(names, values[len(names) :], strict=True))
        return total

    def average(self) -> dict[str, float]:
        """Name -> sum / count, for what was counted at all."""
        return {
            name: float(self.sums[name]) / self.counts[name] for name in self.sums if self.counts[name] > 0
        }

    def state_dict(self) -> dict[str, dict[str, float]]:
        """For checkpoints."""
        sums = {name: float(value) for name, value in self.sums.items()}
        return {"sums": sums, "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        """From checkpoints."""
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])


class MetricWriter:
    """Writes `log/metrics.jsonl` and, where TensorBoard is installed and wanted, its events."""

    def __init__(self, exp_dir: Path, tensorboard: bool) -> None:
        path = exp_dir / "log" / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a")
        self.events: Any = None
        if tensorboard:
            # Imported here: only the process that writes needs it, and a training runs without it.
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            self.events = SummaryWriter(str(exp_dir / "tensorboard"))

    def write(self, record: dict[str, Any], tags: dict[str, float]) -> None:
        """One line of the JSON-lines file, and scalars under TensorBoard's tags."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.events is not None:
            for tag, value in tags.items():
                self.events.add_scalar(tag, value, record["step"])

    def write_audio(self, step: int, audio: dict[str, torch.Tensor], sample_rate: int) -> None:
        """Waveforms (C, N) by tag, to listen to in TensorBoard."""
        if self.events is not None:
            for tag, wav in audio.items():
                self.events.add_audio(tag, wav.float().mean(0), step, sample_rate)

    def close(self) -> None:
        """Flush and close both."""
        self.file.close()
        if self.events is not None:
            self.events.close()
