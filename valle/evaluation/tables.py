"""The figures of `results.json` as rows of text: names, arrows, digits, and which of the competitors is best.

One row a figure, one column a condition: the recording, its resynthesis by the codec (the ceiling of any model of this
codec), the model, and the baselines that know nothing. Report, terminal and Markdown show the same rows.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

# What is judged, and how a column is called; the order is the columns' order. `model-0`, `model-1` ... follow `model`.
CONDITION_LABELS = {
    "recording": "recording",
    "resynthesis": "codec's resynthesis",
    "model": "model",
    "wrong": "model, wrong text or notes",
    "loop": "loop of the prompt",
    "unigram": "unigram codes",
    "silence": "silence",
    "noise": "white noise",
}
TRUE = ("recording", "resynthesis")  # made from what really came: no competitors
ARROWS = {"lower": "↓", "higher": "↑", "recording": "≈"}  # the last: nearer to the recording's is better
DISTANCE_LABELS = {"frechet": "Fréchet distance", "kernel": "kernel distance"}
# Tasks of metrics in the report's order, and the headings of their tables.
TASK_LABELS = {
    "quality": "quality, heard alone",
    "similarity": "likeness to prompt and recording",
    "speech": "speech",
    "music": "music",
    "codec": "codec, sample by sample",
    "distance": "distance of all clips to all recordings",
    "generation": "how it goes on",
}
# How tables call a metric's figure; one that is not here is called by its key.
FIGURE_LABELS = {
    "ovrl": "DNSMOS, overall",
    "sig": "DNSMOS, speech",
    "bak": "DNSMOS, background",
    "wer": "word error rate",
    "cer": "character error rate",
    "speaker_prompt": "speaker's likeness to the prompt",
    "speaker_reference": "speaker's likeness to the recording",
    "spectrum_prompt": "spectrum's distance to the prompt",
    "spectrum_reference": "spectrum's distance to the recording",
    "harmony_prompt": "harmony's distance to the prompt",
    "harmony_reference": "harmony's distance to the recording",
    "mel_distance": "log-mel distance",
    "stft_distance": "multi-scale STFT distance",
    "chroma_distance": "chroma distance",
    "si_sdr": "SI-SDR (dB)",
    "stoi": "STOI",
    "pesq": "PESQ",
    "onset_f1": "onset F1",
    "offset_f1": "onset and offset F1",
    "velocity_f1": "onset, offset and velocity F1",
    "ioi_overlap": "overlap of times between onsets",
    "repetition": "stretches that came before (share)",
    "longest_run": "longest run of one code (s)",
    "early_stop": "ends before half the recording (share)",
    "length_error": "length error (share)",
}


@dataclass(frozen=True)
class Figure:
    """One measured thing over all conditions.

    Attributes:
        name, key: where it stands in `results["metrics"]`, or embedding and kind of a distance.
        task: of the metric; a key of `TASK_LABELS`, or anything else.
        label: how a table calls it.
        better: a key of `ARROWS`, or "" where none is known to be better.
        values: condition -> interval as a dict (`mean`, `low`, `high`), without conditions that were not measured.
    """

    name: str
    key: str
    task: str
    label: str
    better: str
    values: dict[str, dict[str, Any]]

    @property
    def heading(self) -> str:
        """Label and arrow."""
        return f"{self.label} {ARROWS[self.better]}" if self.better else self.label

    def best(self) -> str | None:
        """The best of those that did not see what came; None without a model and another to compete."""
        values = {name: value["mean"] for name, value in self.values.items() if name not in TRUE}
        if not self.better or len(values) < 2 or not any(is_model(name) for name in values):
            return None
        if self.better == "recording":
            if "recording" not in self.values:
                return None
            values = {name: abs(value - self.values["recording"]["mean"]) for name, value in values.items()}
        ranked = sorted(values, key=lambda name: values[name], reverse=self.better == "higher")
        return None if values[ranked[0]] == values[ranked[1]] else ranked[0]


def figures_of(results: dict[str, Any]) -> list[Figure]:
    """All measured figures, in the order of `TASK_LABELS`; empty for results that have none.

    `results["metrics"]` and `results["generation"]["statistics"]` have the values, `results["metric_info"]` the task
    and which way is better.
    """
    found = []
    statistics = results["generation"].get("statistics") or {}
    for name, keys in ((results.get("metrics") or {}) | {"generation": statistics}).items():
        info = (results.get("metric_info") or {}).get(name, {})
        whole = " (whole cuts)" if info.get("whole") else ""
        for key, values in keys.items():
            label = FIGURE_LABELS.get(key, key.replace("_", " ")) + whole
            better = info.get("keys", {}).get(key, "")
            found.append(Figure(name, key, info.get("task", ""), label, better, _measured(values)))
    for name, kinds in (results.get("distances") or {}).items():
        for kind, values in kinds.items():
            label = f"{DISTANCE_LABELS.get(kind, kind)}, {name}"
            found.append(Figure(name, kind, "distance", label, "lower", _measured(values)))
    order = list(TASK_LABELS)
    found = [figure for figure in found if figure.values]
    return sorted(found, key=lambda figure: order.index(figure.task) if figure.task in order else len(order))


def conditions_of(figures: Iterable[Figure]) -> list[str]:
    """The conditions that any of them was measured in, in the columns' order."""
    return sorted({name for figure in figures for name in figure.values}, key=column_order)


def is_model(condition: str) -> bool:
    """Whether the condition is the model's own: `model`, or one of its seeded continuations `model-0` ..."""
    return condition == "model" or condition.startswith("model-")


def column_order(condition: str) -> tuple[int, int, str]:
    """What to sort conditions by."""
    order = list(CONDITION_LABELS)
    if condition.startswith("model-"):
        return order.index("model"), 1 + int(condition.removeprefix("model-")), ""
    return (order.index(condition), 0, "") if condition in order else (len(order), 0, condition)


def condition_label(condition: str) -> str:
    """How a table calls a condition."""
    if condition.startswith("model-"):
        return f"model, continuation {int(condition.removeprefix('model-')) + 1}"
    return CONDITION_LABELS.get(condition, condition)


def number(value: float) -> str:
    """A figure with about three digits that count: 0.165, 2.64, 26.4, 1643."""
    size = abs(value)
    if size and size < 0.01:
        return f"{value:.2g}"
    return f"{value:.{3 if size < 1 else 2 if size < 10 else 1 if size < 100 else 0}f}"


def bounds(interval: dict[str, Any]) -> str:
    """Its bounds in brackets, "" where there are none."""
    if interval.get("low") is None or interval.get("high") is None:
        return ""
    return f"[{number(interval['low'])}, {number(interval['high'])}]"


def as_interval(value: Any) -> dict[str, Any] | None:
    """An `Interval`, its dict or a bare number as a dict; None where nothing finite was measured."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, int | float):
        value = {"mean": float(value), "low": None, "high": None}
    if not isinstance(value, dict) or value.get("mean") is None or not math.isfinite(value["mean"]):
        return None
    return value


def markdown_rows(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head, and figures stand to the right."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "|" + "|".join(["---", *["---:"] * (len(rows[0]) - 1)]) + "|")
    return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of text with the columns under one another, for the terminal."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _measured(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    intervals = {condition: as_interval(value) for condition, value in values.items()}
    return {condition: value for condition, value in intervals.items() if value is not None}
