"""What to expect of a training: the band in which a recipe's reference runs lay, drawn beside a run's own curves.

`tools/make_reference.py` makes a recipe's `conf/reference.json` from the metrics.jsonl of one or more runs;
`--reference` reads it. A band is given by the step, counted from the beginning of the stage, as the number of updates
decides about the loss more than anything else: a slower or faster machine takes the same steps at other times. Where
a limit in minutes ends the training, the learning rate falls at other steps on such a machine. A slower one is then
somewhat below the band, not above it, and stops early; a faster one may be slightly above it, and goes on behind it.

The file: `curves` is a list of {stage, split, metric, steps, low, high}; `config` the settings it holds for.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from valle.config import DataConfig, ModelConfig, TrainConfig
from valle.utils.errors import UserError
from valle.utils.files import atomic_path

log = logging.getLogger(__name__)

MARGIN = 0.02  # by how much the band is wider than the runs: a share of a loss, so much of an accuracy
MOST_POINTS = 200  # of a curve
# Settings without which two runs cannot be compared; what is not here does not move the curves.
COMPARED = (
    "decoder_dim", "nhead", "num_decoder_layers", "num_quantizers", "scale_factor", "norm_first", "add_prenet",
    "share_embedding", "codebook_embedding", "prepend_bos", "dropout", "attention_dropout", "qk_norm",
    "max_duration", "filter_min_duration", "filter_max_duration", "prompt_ratio", "prompt_ratio_range",
    "prompt_seconds", "prompt_from_cut", "infill_prob", "drop_prompt_prob", "base_lr", "optimizer_name",
    "scheduler_name", "warmup_steps", "weight_decay", "clip_grad_norm", "accumulate_grad_steps", "world_size",
    "init_from", "codec",
)  # fmt: skip
NAMES = {"train": "training", "valid": "validation"}
Key = tuple[int, str, str]  # stage, split, metric


@dataclass(frozen=True)
class Band:
    """Where a curve lies: low and high by steps of the stage."""

    steps: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]

    def at(self, step: float) -> tuple[float, float] | None:
        """(low, high), between two points on the line from one to the other; None outside."""
        if not self.steps[0] <= step <= self.steps[-1]:
            return None
        return float(np.interp(step, self.steps, self.low)), float(np.interp(step, self.steps, self.high))


class Reference:
    """Bands by stage, split ("train", "valid") and metric."""

    def __init__(self, bands: dict[Key, Band], config: dict[str, Any]) -> None:
        self.bands, self.config = bands, config
        self.warned = False

    @classmethod
    def load(cls, path: str | Path) -> "Reference":
        """Read what `write_reference` wrote.

        Raises:
            UserError: no such file, or not of this kind.
        """
        try:
            content = json.loads(Path(path).read_text())
            bands = {}
            for curve in content["curves"]:
                band = Band(curve["steps"], curve["low"], curve["high"])
                if not len(band.steps) == len(band.low) == len(band.high) > 0:
                    raise ValueError("steps, low and high differ in length")
                bands[int(curve["stage"]), str(curve["split"]), str(curve["metric"])] = band
            return cls(bands, dict(content.get("config", {})))
        except OSError as error:
            raise UserError(f"--reference '{path}' cannot be read: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--reference '{path}' is no reference ({error}); tools/make_reference.py makes them"
            ) from error

    def curves(self, stage: int | None = None) -> list[tuple[str, str]]:
        """(split, metric) of what is known about a stage, or about any."""
        return list(dict.fromkeys(key[1:] for key in self.bands if stage in (None, key[0])))

    def expected(self, stage: int, split: str, stage_step: int) -> dict[str, list[float]]:
        """Metric -> [low, high] at a step of the stage, where the reference runs have something to say."""
        found = {
            metric: band.at(stage_step)
            for (of_stage, of_split, metric), band in self.bands.items()
            if (of_stage, of_split) == (stage, split)
        }
        return {metric: list(bounds) for metric, bounds in found.items() if bounds is not None}

    def warn_once(self, record: dict[str, Any]) -> None:
        """Say so, the first time, when a loss lies above its band."""
        expected = record.get("expected", {}).get("loss")
        if expected and not self.warned and not record["loss"] <= expected[1]:
            self.warned = True
            log.warning(
                "the %s loss %.4g is above the reference run's %.3g–%.3g at step %d of this stage: other data or "
                "settings, or something is wrong",
                NAMES[record["split"]], record["loss"], *expected, record["stage_step"],
            )  # fmt: skip

    def differences(self, saved: dict[str, Any]) -> list[str]:
        """What a run's settings have other than the reference's, in words; see `settings`."""
        if not self.config:
            return []
        own = settings(saved)
        # What the file does not name, its runs were trained with the default of.
        theirs = settings({"config": {"reference": self.config}, "codec": {"name": self.config.get("codec")}})
        return [
            f"{name} {own[name]} instead of {value}" for name, value in theirs.items() if own[name] != value
        ]


def open_reference(path: str | None, saved: dict[str, Any]) -> Reference | None:
    """The reference for a training with these settings; None, saying why, where they are others than its own.

    Args:
        path: of the file; None or empty: no reference.
        saved: `config` and `codec`, as checkpoints keep them.
    """
    if not path:
        return None
    reference = Reference.load(path)
    differences = reference.differences(saved)
    if differences:
        log.info("not compared with the reference run: %s", ", ".join(differences))
        return None
    return reference


def settings(saved: dict[str, Any]) -> dict[str, Any]:
    """Of a checkpoint, what decides about the curves."""
    parts = [part for part in saved.get("config", {}).values() if isinstance(part, dict)]
    known = [field for part in (ModelConfig, DataConfig, TrainConfig) for field in dataclasses.fields(part)]
    flat = {field.name: field.default for field in known}
    flat |= {name: value for part in parts for name, value in part.items()}
    flat["codec"] = saved.get("codec", {}).get("name")
    return {name: flat[name] for name in COMPARED if name in flat}


def stage_steps(records: Sequence[dict[str, Any]]) -> list[int]:
    """Each record's step, counted from the beginning of its stage (older files do not say)."""
    starts: dict[int, int] = {}
    latest, found = 0, []
    for record in records:
        start = starts.setdefault(record.get("stage", 0), latest)
        found.append(record.get("stage_step", record["step"] - start))
        latest = max(latest, record["step"])
    return found


def curve_points(records: Sequence[dict[str, Any]]) -> dict[Key, dict[int, float]]:
    """Losses and accuracies of a metrics.jsonl: step of the stage -> value; what was written twice counts last."""
    points: dict[Key, dict[int, float]] = {}
    for record, step in zip(records, stage_steps(records), strict=True):
        for metric, value in record.items():
            plain = metric == "loss" or (metric.endswith("Accuracy") and not metric.startswith("tot_"))
            if plain and isinstance(value, int | float) and math.isfinite(value):
                key = (record.get("stage", 0), record.get("split", ""), metric)
                points.setdefault(key, {})[step] = value
    return {key: dict(sorted(curve.items())) for key, curve in points.items()}


def make_bands(runs: Sequence[Sequence[dict[str, Any]]], margin: float = MARGIN) -> dict[Key, Band]:
    """The band of one or more runs: lowest and highest at each step, widened by a margin.

    Args:
        runs: the records of each run.
        margin: a share of a loss; of an accuracy, which lies between 0 and 1, so much itself.

    Returns:
        a band for every curve that all runs have, over the steps that all of them reached.

    Raises:
        UserError: nothing is common to all runs.
    """
    curves = [curve_points(records) for records in runs]
    bands = {}
    for key in curves[0]:
        if not all(key in of_run for of_run in curves):
            continue
        found = [of_run[key] for of_run in curves]
        start, end = max(min(points) for points in found), min(max(points) for points in found)
        steps = [
            step for step in sorted({step for points in found for step in points}) if start <= step <= end
        ]
        if not steps:
            continue
        if len(steps) > MOST_POINTS:
            steps = [steps[round(place)] for place in np.linspace(0, len(steps) - 1, MOST_POINTS)]
        values = np.array(
            [np.interp(steps, list(points), list(points.values())) for points in found]
        )  # (R, P)
        low, high = values.min(0), values.max(0)
        if key[2] == "loss":
            low, high = low * (1 - margin), high * (1 + margin)
        else:
            low, high = (low - margin).clip(0), (high + margin).clip(max=1)
        bands[key] = Band(steps, [round(float(x), 4) for x in low], [round(float(x), 4) for x in high])
    if not bands:
        raise UserError(
            "the runs have no curve in common: losses of the same stage and split at the same steps"
        )
    return bands


def write_reference(path: str | Path, about: str, bands: dict[Key, Band], config: dict[str, Any]) -> None:
    """A reference file, a curve a line.

    Args:
        path: of the file.
        about: which runs, and by how much the band is wider.
        bands: of `make_bands`.
        config: of `settings`.
    """
    curves = [
        json.dumps({"stage": stage, "split": split, "metric": metric, "steps": list(band.steps),
                    "low": list(band.low), "high": list(band.high)}, allow_nan=False)
        for (stage, split, metric), band in bands.items()
    ]  # fmt: skip
    text = (
        f'{{\n"about": {json.dumps(about)},\n"config": {json.dumps(config)},\n"curves": [\n'
        + ",\n".join(curves)
        + "\n]\n}\n"
    )
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def draw_curves(records: Sequence[dict[str, Any]], reference: Reference | None, path: Path) -> bool:
    """Loss and accuracy of each stage over its steps, in the band of the reference runs, as a PNG file.

    Returns:
        whether it was drawn: not without matplotlib, and not before a curve has two points.
    """
    points = curve_points(records)
    if all(len(curve) < 2 for curve in points.values()):
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    panels = sorted({(metric != "loss", stage, metric) for stage, _, metric in points})
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.8 * columns, 3.1 * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for number, (_, stage, metric) in enumerate(panels, 1):
        _draw_panel(figure.add_subplot(rows, columns, number), points, reference, stage, metric)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)
    return True


def _draw_panel(
    axes: Any, points: dict[Key, dict[int, float]], reference: Reference | None, stage: int, metric: str
) -> None:
    colours = {"train": "#7aa6d8", "valid": "#d9622b"}
    values: list[float] = []
    for split, colour in colours.items():
        band = reference.bands.get((stage, split, metric)) if reference is not None else None
        if band is not None:
            axes.fill_between(
                band.steps,
                band.low,
                band.high,
                color=colour,
                alpha=0.22,
                linewidth=0,
                label=f"{NAMES[split]}, expected",
            )
            values += [*band.low, *band.high]
        curve = points.get((stage, split, metric), {})
        if curve:
            marker = "o" if split == "valid" and len(curve) < 30 else None
            axes.plot(list(curve), list(curve.values()), color=colour, linewidth=1.6, marker=marker, markersize=3,
                      label=NAMES[split])  # fmt: skip
            values += curve.values()
    axes.set_title(f"stage {stage}: {metric}", fontsize=10)
    axes.set_xlabel("step of the stage", fontsize=9)
    axes.grid(True, color="#888888", alpha=0.25, linewidth=0.6)
    axes.margins(x=0.02)
    axes.legend(fontsize=8, frameon=False)
