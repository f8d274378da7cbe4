"""The report's drawings: curves, histograms and spectrograms as inline SVG in the page's light or dark colours.

Text and axes are drawn in `currentColor`; identifiers get a prefix of their own, so that many drawings live in one
page; nothing in them refers to the network.
"""

import base64
import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from valle.evaluation.audio import HOP_SECONDS, log_mel, mel_frequencies

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#010203"  # drawn with this, then replaced by the page's text colour
TRAIN_COLOUR, VALID_COLOUR, LINE_COLOURS = "#7aa6d8", "#d9622b", ("#2f9e6e", "#a05fc0")
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "valle",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
}
MODEL_COLOUR = VALID_COLOUR
DYNAMIC_RANGE = 4.0  # of a spectrogram's colours, in powers of ten of magnitude: 80 dB
SHADES = 64  # of a spectrogram, 1.25 dB each: a palette image is a third of one in full colours
MAX_COLUMNS = 800  # of a spectrogram, more than the page has pixels for it
_numbers = itertools.count()


@dataclass(frozen=True)
class Curve:
    """One line of a plot: y over x."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    emphasis: bool = False


@dataclass(frozen=True)
class Plot:
    """A plot of curves with horizontal lines to compare with (label -> value)."""

    title: str
    y_label: str
    curves: Sequence[Curve]
    lines: dict[str, float] = field(default_factory=dict)
    x_label: str = "training step"
    whole_x: bool = False  # x counts things, so no tick stands between two of them


@dataclass(frozen=True)
class Histogram:
    """How often values occur: label -> values, drawn over the same bins."""

    title: str
    x_label: str
    series: Mapping[str, Sequence[float]]
    y_label: str = "continuations"
    bins: int = 20


def draw_plot(plot: Plot) -> str:
    """A plot as SVG."""
    with _style():
        figure, axes = _figure(4.8, 2.9)
        for curve in plot.curves:
            marker = "o" if len(curve.x) < 30 and curve.emphasis else None
            axes.plot(curve.x, curve.y, color=curve.colour, label=curve.label, marker=marker, markersize=3,
                      linewidth=1.8 if curve.emphasis else 1.1)  # fmt: skip
        for (label, value), colour in zip(plot.lines.items(), itertools.cycle(LINE_COLOURS)):
            axes.axhline(value, color=colour, linestyle="--", linewidth=1.3, label=f"{label} {value:.3g}")
        axes.set_xlabel(plot.x_label)
        axes.set_ylabel(plot.y_label)
        if plot.whole_x:
            axes.set_xticks(sorted({x for curve in plot.curves for x in curve.x}))
        axes.grid(True, color="#888888", alpha=0.25, linewidth=0.6)
        axes.margins(x=0.01)
        _legend(figure, len(plot.curves) + len(plot.lines))
        return _to_svg(figure, plot.title)


def draw_histogram(histogram: Histogram) -> str:
    """A histogram as SVG: the first series filled, the others as outlines over it."""
    values = np.concatenate([np.asarray(part, dtype=float) for part in histogram.series.values()])
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    edges = np.linspace(low, high if high > low else low + 1.0, histogram.bins + 1)
    with _style():
        figure, axes = _figure(4.8, 2.9)
        colours = itertools.cycle((MODEL_COLOUR, *LINE_COLOURS))
        for number, ((label, part), colour) in enumerate(
            zip(histogram.series.items(), colours, strict=False)
        ):
            kind = "step" if number else "stepfilled"
            axes.hist(part, bins=edges, histtype=kind, color=colour, label=label, linewidth=1.6,
                      alpha=1.0 if number else 0.7)  # fmt: skip
        axes.set_xlabel(histogram.x_label)
        axes.set_ylabel(histogram.y_label)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.grid(True, axis="y", color="#888888", alpha=0.25, linewidth=0.6)
        if len(histogram.series) > 1:
            _legend(figure, len(histogram.series))
        return _to_svg(figure, histogram.title)


def draw_spectrogram(
    wav: np.ndarray,
    sample_rate: int,
    label: str,
    top: float,
    duration: float | None = None,
    boundary: float | None = None,
) -> str:
    """A log-mel spectrogram as SVG: time in s, frequency in kHz on the mel scale.

    Args:
        wav: (C, N); the mean over channels is drawn.
        sample_rate: Hz.
        label: what it shows, for screen readers.
        top: log10 magnitude of the brightest colour; the darkest is `DYNAMIC_RANGE` below. Use one for all.
        duration: length of the time axis in seconds, so that drawings can be compared; default: the audio's.
        boundary: second at which a line is drawn (the end of the prompt).
    """
    with _style():
        figure, axes = _figure(4.4, 1.75)
        _draw_mel(axes, wav, sample_rate, top, duration)
        if boundary is not None:
            axes.axvline(boundary, color="#ffffff", linewidth=1.4)
            axes.axvline(boundary, color="#18b6a0", linewidth=1.4, linestyle=(0, (3, 2)))
        return _with_palette(_to_svg(figure, label))


def spectrograms_png(wavs: Sequence[tuple[str, np.ndarray, int]], title: str) -> bytes:
    """Log-mel spectrograms one above the other, on one colour scale and time axis, as a PNG file's bytes.

    Args:
        wavs: (label, (C, N) audio, sample rate in Hz) from top to bottom.
        title: above all of them.
    """
    from matplotlib.figure import Figure

    top = brightest([(wav, sample_rate) for _, wav, sample_rate in wavs])
    duration = max(wav.shape[-1] / sample_rate for _, wav, sample_rate in wavs)
    with _style():
        figure = Figure(figsize=(8.0, 0.4 + 2.2 * len(wavs)), layout="constrained", facecolor="white")
        figure.suptitle(title, fontsize=9)
        grid = figure.subplots(len(wavs), 1, sharex=True, squeeze=False)
        for axes, (label, wav, sample_rate) in zip(grid[:, 0], wavs, strict=True):
            _draw_mel(axes, wav, sample_rate, top, duration)
            axes.set_title(label, fontsize=9, loc="left")
            axes.label_outer()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
        return buffer.getvalue()


def _draw_mel(axes: Any, wav: np.ndarray, sample_rate: int, top: float, duration: float | None) -> None:
    mel = log_mel(wav, sample_rate).mean(axis=0).T  # (80, T)
    seconds = mel.shape[1] * HOP_SECONDS
    step = -(-mel.shape[1] // MAX_COLUMNS)
    if step > 1:
        mel = np.maximum.reduceat(mel, np.arange(0, mel.shape[1], step), axis=1)
    axes.imshow(mel, origin="lower", aspect="auto", cmap="magma", vmin=top - DYNAMIC_RANGE, vmax=top,
                extent=(0, seconds, -0.5, mel.shape[0] - 0.5), interpolation="none")  # fmt: skip
    axes.set_xlim(0, duration or seconds)
    axes.set_ylim(-0.5, mel.shape[0] - 0.5)
    centres = mel_frequencies(sample_rate)
    ticks = [khz for khz in (0.5, 1, 2, 4, 8, 16) if centres[0] < khz * 1000 <= centres[-1]]
    axes.set_yticks([float(np.interp(khz * 1000, centres, np.arange(len(centres)))) for khz in ticks])
    axes.set_yticklabels([f"{khz:g}" for khz in ticks])
    axes.set_xlabel("time (s)", labelpad=1)
    axes.set_ylabel("kHz", labelpad=2)


def brightest(wavs: Sequence[tuple[np.ndarray, int]]) -> float:
    """Largest log10-mel magnitude over (wav, sample rate) pairs: the common `top` of their spectrograms."""
    return max((float(log_mel(wav, sample_rate).max()) for wav, sample_rate in wavs), default=0.0)


def training_plot(
    records: Sequence[dict[str, Any]], metric: str, stages: Sequence[int], title: str, y_label: str,
    lines: dict[str, float] | None = None,
) -> Plot | None:  # fmt: skip
    """A metric over the training steps of some stages, training and validation; None where nothing was logged.

    A training that was resumed wrote some steps twice: the last line counts.
    """
    curves = []
    for split, label, colour in (("train", "training", TRAIN_COLOUR), ("valid", "validation", VALID_COLOUR)):
        points = {
            record["step"]: record[metric]
            for record in records
            if record.get("split") == split
            and record.get("stage", 0) in stages
            and isinstance(record.get(metric), int | float)
            and math.isfinite(record[metric])
        }
        if points:
            steps = sorted(points)
            curves.append(Curve(label, steps, [points[step] for step in steps], colour, split == "valid"))
    return Plot(title, y_label, curves, lines or {}) if curves else None


def _style() -> Any:
    # Imported where it draws: evaluation without a report does not need it.
    import matplotlib

    return matplotlib.rc_context(STYLE)


def _figure(width: float, height: float) -> tuple["Figure", Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    return figure, axes


def _legend(figure: "Figure", entries: int) -> None:
    """Under the axes, where it hides no line."""
    columns = entries if entries < 4 else 2
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def _with_palette(svg: str) -> str:
    """The drawing with its embedded image in `SHADES` colours."""
    from PIL import Image

    def shrink(match: re.Match[str]) -> str:
        image = Image.open(io.BytesIO(base64.b64decode(match[1]))).convert("RGB")
        buffer = io.BytesIO()
        image.quantize(SHADES, dither=Image.Dither.NONE).save(buffer, format="PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")

    return re.sub(r"data:image/png;base64,\s*([A-Za-z0-9+/=\s]+)", shrink, svg)


def _to_svg(figure: "Figure", label: str) -> str:
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", metadata={"Creator": None, "Date": None, "Format": None, "Type": None}
    )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)  # inline SVG needs none
    prefix = f"d{next(_numbers)}-"
    svg = re.sub(r'(\bid=")', rf"\1{prefix}", svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\1{prefix}", svg)
    svg = svg.replace(INK, "currentColor")
    svg = re.sub(r'(<svg\b[^>]*?)\swidth="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?)\sheight="[^"]*"', r"\1", svg, count=1)
    safe = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{safe}"', 1)
