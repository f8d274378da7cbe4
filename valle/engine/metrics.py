"""Sums and counts of what a training reports, and where they are written: a JSON-lines file and TensorBoard."""

import json
from pathlib import Path
from typing import Any


class MetricSums:
    """Running (sum, count) of named figures; `average()` divides."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, float] = {}

    def add(self, metrics: dict[str, tuple[float, int]]) -> None:
        """Add one batch's figures."""
        for name, (total, count) in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(total)
            self.counts[name] = self.counts.get(name, 0.0) + count

    def average(self) -> dict[str, float]:
        """Name -> sum / count, for what was counted at all."""
        return {name: self.sums[name] / self.counts[name] for name in self.sums if self.counts[name] > 0}

    def state_dict(self) -> dict[str, dict[str, float]]:
        """For checkpoints."""
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

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

    def close(self) -> None:
        """Flush and close both."""
        self.file.close()
        if self.events is not None:
            self.events.close()
