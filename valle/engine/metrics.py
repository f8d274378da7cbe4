"""What a training reports, and where it is written.

    MetricSums, over batches and ranks ──► a record ──► log/metrics.jsonl
                                                    ──► the same numbers under TensorBoard's and W&B's tags
    samples, validations               ──► samples/step-N/*.wav, curves.png, and the same in TensorBoard and W&B

A record's keys: `step`, `epoch`, `stage`, `stage_step` (steps of this stage) and `split` say where it stands; then
metrics, with `tot_` in front those of the epoch so far; `expected` is the reference run's band (metric -> [low, high]);
`time` (seconds of training) and `speed` depend on the machine. Everything else is the same in a training that was
killed and went on as in one that was not.
"""

import json
import logging
import math
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from valle.engine.reference import Reference, draw_curves
from valle.engine.samples import draw_spectrograms
from valle.utils import distributed
from valle.utils.audio import save_audio
from valle.utils.errors import UserError
from valle.utils.files import atomic_path

log = logging.getLogger(__name__)
PLACE = ("step", "epoch", "stage", "stage_step", "split", "time")
TAGS = {"lr": "train/learning_rate", "grad_scale": "train/grad_scale"}  # the others: see `tags`
DRAWING_SHARE = 0.02  # of the time, at most, goes into drawing curves again and again


class MetricSums:
    """Running (sum, count) of named figures.

    A sum is a number or a tensor, which is read only when it is asked for. A sum that is a vector says how often each
    of its values occurred; its average is the share of the values that occurred at all. A name with a star stands for
    many: the sum and the count of `codes_used_q*` have one more dimension, over the quantizers.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}
        self.counts: dict[str, Any] = {}

    def add(self, metrics: dict[str, tuple[Any, Any]]) -> None:
        """Add one batch's figures: name -> (sum, count), numbers or tensors on any device."""
        for name, (total, count) in metrics.items():
            self.sums[name] = _plus(self.sums.get(name), total)
            self.counts[name] = _plus(self.counts.get(name), count)

    def merge(self, other: "MetricSums") -> None:
        """Add what another has summed up."""
        self.add({name: (other.sums[name], other.counts[name]) for name in other.sums})

    def over_ranks(self, device: torch.device) -> "MetricSums":
        """The sums of all ranks, read from the device. Every rank calls it; one that had no batch may lack names."""
        sums = {
            f"{name} {part}": torch.as_tensor(value, dtype=torch.float64).cpu()
            for part, values in (("sum", self.sums), ("count", self.counts))
            for name, value in values.items()
        }
        shapes: dict[str, tuple[int, ...]] = {}
        for of_rank in distributed.all_gather_objects({name: tuple(t.shape) for name, t in sums.items()}):
            shapes.update(of_rank)
        result, names = MetricSums(), sorted(shapes)
        if not names:
            return result
        own = [sums.get(name, torch.zeros(shapes[name], dtype=torch.float64)).reshape(-1) for name in names]
        total = torch.tensor(distributed.sum_over_ranks(torch.cat(own).tolist(), device), dtype=torch.float64)
        for name, values in zip(names, total.split([len(part) for part in own]), strict=True):
            plain, kind = name.rsplit(" ", 1)
            into = result.sums if kind == "sum" else result.counts
            into[plain] = values.reshape(shapes[name]) if shapes[name] else float(values)
        return result

    def average(self) -> dict[str, float]:
        """Name -> sum / count, or the share of values that occurred, for what was counted at all."""
        found: dict[str, float] = {}
        for name, total in self.sums.items():
            if "*" not in name:
                rows = [(name, total, self.counts[name])]
            else:
                pairs = zip(total, self.counts[name], strict=True)
                rows = [(name.replace("*", str(index)), *pair) for index, pair in enumerate(pairs)]
            for plain, row, count in rows:
                if float(count) > 0:
                    occurred = isinstance(row, Tensor) and row.dim() > 0
                    found[plain] = float((row > 0).double().mean()) if occurred else float(row) / float(count)
        return found

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """For checkpoints."""
        return {"sums": _plain(self.sums), "counts": _plain(self.counts)}

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """From checkpoints."""
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers as numbers, other tensors on the CPU."""
    return {
        name: value.cpu() if isinstance(value, Tensor) and value.dim() > 0 else float(value)
        for name, value in values.items()
    }


def _plus(before: Any, value: Any) -> Any:
    """The sum, in double precision and on the device of what is added."""
    if isinstance(value, Tensor):
        value = value.detach().double()
        if isinstance(before, Tensor):
            before = before.to(value.device)
    return value if before is None else before + value


def tags(record: dict[str, Any]) -> dict[str, float]:
    """A record's numbers under their tags: the metric `loss` of a log line is `train/current_loss`, and so on."""
    split = record["split"]
    front = "train/valid_" if split == "valid" else "train/current_"
    named: dict[str, float] = {}
    for name, value in record.items():
        if name in PLACE:
            continue
        if name == "expected":
            for metric, (low, high) in value.items():
                named[f"reference/{split}_{metric}_low"] = low
                named[f"reference/{split}_{metric}_high"] = high
        elif name == "speed":
            named.update({f"speed/{part}": number for part, number in value.items()})
        elif split == "train" and name.startswith(("tot_", "codes_")):
            named[f"train/{name}"] = value
        else:
            named[TAGS.get(name, front + name)] = value
    if split == "train":
        named["train/epoch"] = float(record["epoch"])
    return named


def describe(record: dict[str, Any], unit: str) -> list[str]:
    """A record's loss in its unit and what was expected of it; then, in training, its accuracies, else all metrics."""
    shown, valid = [], record["split"] == "valid"
    for name in sorted(record, key=lambda name: name != "loss"):
        if name == "loss":
            expected = record.get("expected", {}).get("loss")
            band = f" (expected {expected[0]:.3g}–{expected[1]:.3g})" if expected else ""
            shown.append(f"loss {record[name]:.4g} {unit}{band}")
        elif name.endswith("Accuracy") or (
            valid and name not in (*PLACE, "expected") and "codes_" not in name
        ):
            shown.append(f"{name} {record[name]:.4g}" if valid else f"{name} {record[name]:.3f}")
    return shown


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a training's `metrics.jsonl`; a half-written line is left out, no file gives none."""
    path = Path(path)
    return [record for _, record in _lines(path.read_bytes())] if path.is_file() else []


class MetricWriter:
    """Writes what one stage reports; on one rank only.

    A training that goes on from a checkpoint takes back what was written after it, and writes no line twice.

    Args:
        exp_dir: the training's folder.
        tensorboard: write TensorBoard's events too, where it is installed.
        stage: which stage is trained.
        step, stage_step: after which it begins or goes on; the latter counts in the stage.
        wandb_project: send everything to this project of Weights & Biases too.
        config: what W&B shows about the run.
        reference: whose band is drawn into the curves.

    Raises:
        UserError: W&B is asked for and not installed.
    """

    def __init__(
        self,
        exp_dir: Path,
        tensorboard: bool,
        stage: int = 0,
        step: int = 0,
        stage_step: int = 0,
        wandb_project: str | None = None,
        config: dict[str, Any] | None = None,
        reference: Reference | None = None,
    ) -> None:
        self.exp_dir, self.reference = exp_dir, reference
        self.wandb: Any = None
        self.run: Any = None
        if wandb_project:
            self.wandb, self.run = start_wandb(wandb_project, exp_dir, config or {})
        self.path = exp_dir / "log" / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.records = _take_back(self.path, stage, step, stage_step)
        self.there = {_identity(record) for record in self.records if record.get("stage_step") == stage_step}
        self.file = self.path.open("a", encoding="utf-8")
        self.events: Any = None
        self._drawn, self._drawing_seconds, self._stale = -math.inf, 0.0, False
        if tensorboard:
            # Imported here: only the process that writes needs it, and a training runs without it.
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            # Events of another stage with later steps stay.
            later = any(record["step"] > step for record in self.records)
            self.events = SummaryWriter(
                str(exp_dir / "tensorboard"), purge_step=None if later else step + 1, flush_secs=30
            )
            if reference is not None:
                self.events.add_custom_scalars(_margin_charts(reference))

    def write(self, record: dict[str, Any]) -> None:
        """One line of the JSON-lines file, and its numbers under TensorBoard's and W&B's tags."""
        if _identity(record) in self.there:
            return  # the same figures, computed again
        self.records.append(_strict(record))
        self.file.write(json.dumps(self.records[-1], allow_nan=False) + "\n")
        self.file.flush()
        named, step = tags(record), record["step"]
        if self.events is not None:
            for tag, value in named.items():
                self.events.add_scalar(tag, value, step)
        if self.run is not None:
            self.run.log({**named, "step": step})
        if record["split"] == "valid":
            self._stale = True
            if time.monotonic() - self._drawn > self._drawing_seconds / DRAWING_SHARE:
                self._draw_curves()

    def write_samples(self, step: int, audio: dict[str, Tensor], sample_rate: int) -> None:
        """Waveforms (C, N) by tag: as files, to listen to in TensorBoard and W&B, and as spectrograms."""
        folder = self.exp_dir / "samples" / f"step-{step}"
        picture = draw_spectrograms(audio, sample_rate, folder / "spectrogram.png")
        for tag, wav in audio.items():
            save_audio(folder / f"{tag.rpartition('/')[2]}.wav", wav.float().cpu().numpy(), sample_rate)
        if self.events is not None:
            for tag, wav in audio.items():
                self.events.add_audio(tag, wav.float().mean(0).clamp(-1, 1), step, sample_rate)
            if picture is not None:
                self.events.add_image("samples/spectrogram", picture, step, dataformats="HWC")
            self.events.flush()
        if self.run is not None:
            media: dict[str, Any] = {
                tag: self.wandb.Audio(wav.float().cpu().numpy().T, sample_rate=sample_rate)
                for tag, wav in audio.items()
            }
            if picture is not None:
                media["samples/spectrogram"] = self.wandb.Image(picture)
            self.run.log({**media, "step": step})

    def close(self) -> None:
        """Draw the curves a last time and close everything."""
        self._draw_curves()
        self.file.close()
        if self.events is not None:
            self.events.close()
        if self.run is not None:
            self.run.finish()

    def _draw_curves(self) -> None:
        if self._stale:
            begun = time.monotonic()
            draw_curves(self.records, self.reference, self.exp_dir / "curves.png")
            self._drawn = time.monotonic()
            self._drawing_seconds, self._stale = self._drawn - begun, False


def _identity(record: dict[str, Any]) -> tuple[Any, ...]:
    """What there is only once."""
    return record.get("stage"), record.get("stage_step"), record.get("split")


def _take_back(path: Path, stage: int, step: int, stage_step: int) -> list[dict[str, Any]]:
    """The lines that stay when a stage goes on after a step of its own; the file is left with these, whole."""
    before = path.read_bytes() if path.is_file() else b""
    kept = [
        (line, record)
        for line, record in _lines(before)
        if record.get("stage") != stage
        # Older files do not count in the stage.
        or (record["stage_step"] <= stage_step if "stage_step" in record else record["step"] <= step)
    ]
    after = b"".join(line + b"\n" for line, _ in kept)
    if after != before:
        with atomic_path(path) as temporary:
            temporary.write_bytes(after)
    return [record for _, record in kept]


def _lines(text: bytes) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines of a metrics.jsonl with their records, without what a killed process left half-written."""
    for line in text.split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            yield line, record


def _strict(value: Any) -> Any:
    """As JSON has it: what is no number becomes null; 9 digits, more than a float32 holds.

    Fewer digits than a double has make lines equal where ranks were added up in another order.
    """
    if isinstance(value, dict):
        return {name: _strict(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    return value


def _margin_charts(reference: Reference) -> dict[str, dict[str, list[Any]]]:
    """TensorBoard's layout: each curve in its band; of all stages, as it shows one layout a folder."""
    charts = {}
    for split, metric in reference.curves():
        front = "train/valid_" if split == "valid" else "train/current_"
        band = [f"reference/{split}_{metric}_{side}" for side in ("low", "high")]
        charts[f"{split} {metric}"] = ["Margin", [front + metric, *band]]
    return {"reference": charts}


def start_wandb(project: str, exp_dir: Path, config: dict[str, Any]) -> tuple[Any, Any]:
    """W&B's module and its run of this folder: the same one for all stages, and when a training goes on.

    WANDB_MODE=offline keeps it on disk, in `exp_dir/wandb`.

    Raises:
        UserError: the package is missing, or W&B refuses, as without a login.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError("--wandb-project needs the package wandb: pip install valle[wandb]") from error
    name = exp_dir / "log" / "wandb-run"
    if not name.is_file():
        with atomic_path(name) as temporary:
            temporary.write_text(uuid.uuid4().hex[:12])
    try:
        run = wandb.init(
            project=project, id=name.read_text(), resume="allow", name=exp_dir.name, dir=str(exp_dir), config=config
        )  # fmt: skip
    except (wandb.Error, OSError) as error:
        raise UserError(f"--wandb-project '{project}': {error}; WANDB_MODE=offline needs no login") from error
    # The x axis is the training's own step: W&B's counter would refuse steps that a resumed training repeats.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return wandb, run
