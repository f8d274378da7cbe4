"""How results are told: checks against what was asked, lines for the terminal, Markdown, and the report's sections.

Everything here is a function of what `results.json` holds, so that an old file can be told again; a table, a plot or
a line appears only where the file has its figures.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from valle.config import DataConfig, ModelConfig, TrainConfig, ValleConfig
from valle.engine.metrics import read_metrics
from valle.engine.stages import trained_in
from valle.evaluation.clips import Clip
from valle.evaluation.distances import KERNEL_SCALE
from valle.evaluation.figures import LINE_COLOURS, MODEL_COLOUR, Curve, Histogram, Plot, training_plot
from valle.evaluation.report import (
    Block,
    ReportAudio,
    ReportCell,
    ReportCheck,
    ReportClip,
    ReportFigures,
    ReportSection,
    ReportTable,
    ReportText,
)
from valle.evaluation.tables import (
    ARROWS,
    TASK_LABELS,
    Figure,
    aligned,
    as_interval,
    bounds,
    column_order,
    condition_label,
    conditions_of,
    figures_of,
    is_model,
    markdown_rows,
    number,
)

MAX_CLIPS = 20  # to listen to in one page
FEW_FRAMES = 0.05  # of those of the first position: what fewer tell is noise
# What a model that has learnt something reaches on held-out cuts; smaller than that is called short.
GAIN_OVER_UNIGRAM = 0.7  # nats per frame, AR loss
TOP10_OVER_UNIGRAM = 2.0  # times, AR top-10 accuracy


def checks_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures that were asked for, each with `passed` (None: not measured) and one line of numbers."""
    ar, *nar = results["likelihood"]
    gain, top10 = ar["gain"], ar["model"]["top10"]["mean"]
    checks = [
        _check(
            f"AR loss at least {GAIN_OVER_UNIGRAM} nat per frame below the unigram",
            gain["unigram"]["mean"] >= GAIN_OVER_UNIGRAM,
            f"{_below(gain['unigram'])}: {_mean(ar['model']['loss'])} against {_mean(ar['unigram']['loss'])}",
        ),
        _check(
            "AR loss below the interpolated bigram",
            gain["bigram"]["mean"] > 0,
            f"{_below(gain['bigram'])}: {_mean(ar['model']['loss'])} against {_mean(ar['bigram']['loss'])}",
        ),
        _check(
            f"AR top-10 accuracy at least {TOP10_OVER_UNIGRAM:g} times the unigram's",
            top10 >= TOP10_OVER_UNIGRAM * ar["unigram"]["top10"]["mean"],
            f"{top10 / max(ar['unigram']['top10']['mean'], 1e-9):.2f} times: {_mean(ar['model']['top10'])} against "
            f"{_mean(ar['unigram']['top10'])}",
        ),
    ]
    if nar:
        better = all(entry["model"]["top10"]["mean"] > entry["unigram"]["top10"]["mean"] for entry in nar)
        shown = ", ".join(
            f"quantizer {entry['quantizer']}: {_mean(entry['model']['top10'])} against "
            f"{_mean(entry['unigram']['top10'])}"
            for entry in nar
        )
        untrained = 2 not in trained_in(results["checkpoint"])
        note = " (this checkpoint's NAR decoder is not trained yet: stage 1)" if untrained else ""
        checks.append(_check("NAR top-10 accuracies above the unigrams'", better, shown + note))
    if results.get("reads"):
        checks += _listening_checks(results)
    scores = results["audio"].get("dnsmos")
    parts = [
        scores and scores.get(name, {}).get("continuation") for name in ("model", "unigram", "resynthesis")
    ]
    name = "DNSMOS of the continuations above that of codes drawn from the unigrams"
    if all(parts):
        model, unigram, ceiling = (part["ovrl"] for part in parts)
        detail = f"{_mean(model)} against {_mean(unigram)}; the codec's ceiling is {_mean(ceiling)}"
        checks.append(_check(name, model["mean"] > unigram["mean"], detail))
    else:
        checks.append(
            _check(name, None, "no clips, no task quality, or speechmos and onnxruntime are not installed")
        )
    return checks


def _listening_checks(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Whether a model that reads does better with a cut's own text than with another one's."""
    ar = results["likelihood"][0]
    gain = ar["gain"]["wrong"]
    checks = [
        _check(
            "AR loss below that with another cut's text or notes",
            gain["low"] is not None and gain["low"] > 0,
            f"{_below(gain)}: {_mean(ar['model']['loss'])} against {_mean(ar['wrong']['loss'])}",
        )
    ]
    for metric, key, name in (("wer", "wer", "word error rate"), ("notes", "onset_f1", "onset F1")):
        found = (results.get("listening") or {}).get(key)
        if found is None:
            continue
        values = results["metrics"][metric][key]
        sign = 1 if key == "wer" else -1
        ends = [sign * found[end] for end in ("low", "high") if found[end] is not None]
        shown = ", ".join(
            f"{label} {_mean(values[condition])}"
            for condition, label in (
                ("model", "its own"), ("wrong", "another's"), ("resynthesis", "codec's resynthesis"),
                ("recording", "recording"),
            )
            if condition in values
        )  # fmt: skip
        passed = min(ends) > 0 if ends else sign * found["mean"] > 0
        checks.append(
            _check(f"{name} better with a cut's own text or notes than with another's", passed, shown)
        )
    return checks


def format_results(results: dict[str, Any]) -> str:
    """The figures as text for the terminal."""
    test = results["data"]["test"]
    lines = [
        f"held-out: {test['cuts']} cuts, {test['seconds']:.0f} s; per target frame, end symbol not counted"
    ]
    lines += aligned([_loss_columns(results), *_loss_rows(results)])
    lines += aligned([list(ACCURACY_COLUMNS), *_accuracy_rows(results)])
    lines += aligned([list(BITS_COLUMNS), *_bits_rows(results)])
    figures = figures_of(results)
    if figures:
        lines += aligned(_figure_rows(figures))
    measured = results.get("metrics") or {}  # what the lines above tell is not said again
    mel = {} if "mel" in measured else results["audio"].get("log_mel_distance") or {}
    for name, interval in mel.items():
        lines.append(f"log-mel distance to the recording, {name}: {_interval(interval)}")
    scores = {} if "dnsmos" in measured else results["audio"].get("dnsmos") or {}
    for condition, parts in scores.items():
        shown = ", ".join(f"{part} {_interval(scores['ovrl'], 2)}" for part, scores in parts.items())
        lines.append(f"DNSMOS, {condition_label(condition)}: {shown}")
    for check in results["checks"]:
        lines.append(f"{_word(check['passed'])}: {check['name']} ({check['detail']})")
    return "\n".join(lines)


def markdown_table(results: dict[str, Any]) -> str:
    """What to paste into a RESULTS.md: one row for the checkpoint, then the tables, each only where it was measured.

    The row's columns depend on what was measured, so that rows of models evaluated with the same tasks fit under one
    head.
    """
    figures = figures_of(results)
    ar, *nar = results["likelihood"]
    head = ["checkpoint", "parameters", "AR loss (nats/frame) ↓", "AR perplexity ↓", "AR top-10 ↑"]
    row = [
        Path(results["checkpoint"]["path"]).name,
        f"{results['checkpoint']['parameters'] / 1e6:.1f} M",
        _interval(ar["model"]["loss"]),
        number(math.exp(ar["model"]["loss"]["mean"])),
        _mean(ar["model"]["top10"]),
    ]
    if nar:
        head += ["NAR loss ↓", "NAR top-10 ↑"]
        row += [
            f"{sum(entry['model'][key]['mean'] for entry in nar) / len(nar):.3f}" for key in ("loss", "top10")
        ]
    head.append("bits/s ↓")
    total = (results.get("totals") or {}).get("model", {}).get("bits_per_second")
    row.append(_plain_cell(total or {"mean": _bits_per_second(results, "model")}))
    for figure in figures:
        models = [name for name in conditions_of([figure]) if is_model(name)]
        if models and figure.key in HEADLINES:
            head.append(figure.heading)
            row.append(_plain_cell(figure.values[models[0]]))
    test = results["data"]["test"]
    parts = [
        markdown_rows([head, row]),
        f"{test['cuts']} held-out cuts, {test['seconds']:.0f} s, prompts of {_prompt(results)}; {_version(results)}. "
        f"In brackets 95 % intervals: {INTERVALS}.",
        markdown_rows([_loss_columns(results), *_loss_rows(results)]),
        markdown_rows([ACCURACY_COLUMNS, *_accuracy_rows(results)]),
    ]
    if figures:
        parts += [markdown_rows(_figure_rows(figures, bold="**")), BEST_NOTE]
    return "\n\n".join(parts) + "\n"


def report_summary(results: dict[str, Any]) -> dict[str, str]:
    """The head of the report: what was trained, with which command, on what."""
    model, codec = results["config"].get("model", {}), results["codec"]
    checkpoint, data = results["checkpoint"], results["data"]
    summary = {
        "model": f"{model.get('model_name', 'audio-lm')}, {checkpoint['parameters'] / 1e6:.1f} M parameters, "
        f"step {checkpoint['step']}, epoch {checkpoint['epoch']}",
        "trained with": training_command(results["config"]),
        "codec": f"{codec['name']}: {codec['num_quantizers']} quantizers of {codec['codebook_size']} codes, "
        f"{codec['frame_rate']:g} frames per second, {codec['sample_rate']} Hz",
        "trained on": f"{data['train']['cuts']} cuts, {data['train']['seconds'] / 60:.1f} minutes",
        "held out": f"{data['test']['cuts']} cuts, {data['test']['seconds'] / 60:.1f} minutes, in no training cut",
        "checkpoint": checkpoint["path"],
        "tasks": ", ".join(results.get("tasks") or []),
        "version": _version(results),
    }
    return {name: value for name, value in summary.items() if value}


def training_command(config: dict[str, Any]) -> str:
    """The training command that a checkpoint's configuration stands for: every flag that is not at its default."""
    flags = []
    reads = config.get("model", {}).get("model_name", "audio-lm") != "audio-lm"
    kinds = {"model": ValleConfig if reads else ModelConfig, "data": DataConfig, "train": TrainConfig}
    for key, kind in kinds.items():
        saved = config.get(key, {})
        for field in dataclasses.fields(kind):
            value = saved.get(field.name, field.default)
            if value != field.default:
                shown = str(value).lower() if isinstance(value, bool) else value
                flags.append(f"--{field.name.replace('_', '-')} {shown}")
    return " ".join([f"python -m valle.bin.{'trainer' if reads else 'trainer_audiolm'}", *flags])


def report_sections(
    results: dict[str, Any], clips: Sequence[Clip], metrics_file: Path
) -> list[ReportSection]:
    """The report's content; a part for which there is nothing (no metrics file, no clips) is left out."""
    checks: list[Block] = [
        ReportCheck(check["name"], check["passed"], check["detail"]) for check in results["checks"]
    ]
    sections = [
        ReportSection("Was it worth training?", checks),
        ReportSection("Predicting held-out codes", [*_likelihood_tables(results), *_accuracy_plots(results)]),
        ReportSection("How it sounds, in numbers", [*_metric_tables(results), *_audio_tables(results)]),
        ReportSection("How it goes on", _generation_blocks(results)),
    ]
    plots = _training_plots(results, metrics_file)
    if plots:
        text = (
            "Over the training steps. Dashed: the baselines on the held-out cuts. "
            "The curves count the end symbol, the table does not."
        )
        sections.append(ReportSection("Training", [ReportFigures(plots, text)]))
    shown = list(clips[:MAX_CLIPS])
    extremes = _extremes(results)
    sections.append(
        ReportSection("Best and worst", _extreme_table(extremes, {clip.cut_id for clip in shown}))
    )
    if shown:
        sections.append(
            ReportSection(
                "Listen", [_listening_text(results, shown), *(_clip(clip, extremes) for clip in shown)]
            )
        )
    return [section for section in sections if section.blocks]


def comparison_sections(
    comparison: dict[str, dict[str, Any]], labels: tuple[str, str] = ("a", "b")
) -> list[ReportSection]:
    """The page of a comparison of two results: what is better, worse, or cannot be told, and by how much.

    Args:
        comparison: figure -> `a` and `b` (intervals or numbers), `difference` (interval of b minus a, paired by cut
            and seed) and `verdict` ("better", "worse" or "cannot tell", of b), and `better` ("lower" or "higher")
            where it is known.
        labels: how a and b are called.
    """
    if not comparison:
        return [ReportSection("Verdict", [ReportText("The two have no figure in common.")])]
    marks = {"better": "pass", "worse": "short"}
    rows: list[list[str | ReportCell]] = []
    for name, part in comparison.items():
        verdict = part["verdict"]
        cells = [_cell(part[key]) for key in ("a", "b")]
        rows.append([_comparison_name(name, part), *cells, _cell(part["difference"], signed=True),
                     ReportCell(verdict, mark=marks.get(verdict, "open"))])  # fmt: skip
    columns = ("figure", *labels, f"{labels[1]} minus {labels[0]}", f"{labels[1]} is")
    caption = (
        "Differences are paired: of the same cuts, prompts and seeds. Under each figure is its 95 % "
        f"interval: {INTERVALS}. Where the interval of a difference holds 0, it cannot be told which is better."
    )
    return [
        ReportSection("Verdict", [ReportText(_comparison_line(comparison, labels))]),
        ReportSection("Figure by figure", [ReportTable(columns, rows, caption)]),
    ]


def format_comparison(comparison: dict[str, dict[str, Any]], labels: tuple[str, str] = ("a", "b")) -> str:
    """What `comparison_sections` tells, as text for the terminal."""
    if not comparison:
        return "the two have no figure in common"
    rows = [["figure", *labels, f"{labels[1]} minus {labels[0]}", f"{labels[1]} is"]]
    for name, part in comparison.items():
        values = [_plain_cell(as_interval(part[key])) for key in ("a", "b")]
        difference = _plain_cell(as_interval(part["difference"]), signed=True)
        rows.append([_comparison_name(name, part), *values, difference, part["verdict"]])
    return "\n".join([*aligned(rows), _comparison_line(comparison, labels)])


def _comparison_name(name: str, part: dict[str, Any]) -> str:
    arrow = ARROWS.get(part.get("better") or "", "")
    return f"{name} {arrow}" if arrow else name


def _comparison_line(comparison: dict[str, dict[str, Any]], labels: tuple[str, str]) -> str:
    """Both sides of the verdict in one line: in how many figures, and in which."""
    parts = []
    for verdict in ("better", "worse"):
        names = [name for name, part in comparison.items() if part["verdict"] == verdict]
        parts.append(f"{verdict} in {len(names)}" + (f" ({'; '.join(names)})" if names else ""))
    open_ones = sum(part["verdict"] not in ("better", "worse") for part in comparison.values())
    return f"{labels[1]} against {labels[0]}: {', '.join(parts)}, cannot tell in {open_ones}."


LOSS_COLUMNS = (
    "quantizer",
    "loss (nats/frame)",
    "unigram",
    "bigram",
    "gain over unigram",
    "gain over bigram",
)
ACCURACY_COLUMNS = (
    "quantizer",
    "top-10 accuracy",
    "unigram",
    "bigram",
    "top-1 accuracy",
    "unigram",
    "bigram",
)
BITS_COLUMNS = (
    "quantizer",
    "perplexity",
    "unigram",
    "bigram",
    "bits per frame",
    "unigram",
    "bigram",
    "bits per second",
    "unigram",
    "bigram",
)
PREDICTORS = ("model", "unigram", "bigram")
# Figures for the one row of a model.
HEADLINES = (
    "ovrl",
    "wer",
    "speaker_prompt",
    "harmony_reference",
    "onset_f1",
    "frechet",
)
DNSMOS_LABELS = {
    "model": "prompt + continuation by the model",
    "unigram": "prompt + codes drawn from the unigrams",
    "noise": "white noise, as loud as the recording",
}
DISTANCE_NOTE = (
    f"Kernel distances are times {KERNEL_SCALE:g}. Each embedding has a scale of its own, so that a figure "
    "compares only with the others of its row."
)
INTERVALS = "bootstrap over cuts and seeds; of distances between sets, jackknife over cuts"
BEST_NOTE = (
    "Bold: the best of those that did not see what came. ↓ less is better, ↑ more is better, ≈ nearer to the "
    "recording's figure is better."
)


def _loss_columns(results: dict[str, Any]) -> list[str]:
    return [*LOSS_COLUMNS, *(["with another cut's text"] if results.get("reads") else [])]


def _loss_rows(results: dict[str, Any]) -> list[list[str]]:
    return [
        [_quantizer(entry), *(_mean(entry[name]["loss"]) for name in PREDICTORS)]
        + [_interval(entry["gain"][name]) for name in ("unigram", "bigram")]
        + ([_mean(entry["wrong"]["loss"])] if results.get("reads") else [])
        for entry in results["likelihood"]
    ]


def _accuracy_rows(results: dict[str, Any]) -> list[list[str]]:
    return [
        [
            _quantizer(entry),
            *(_mean(entry[name][metric]) for metric in ("top10", "top1") for name in PREDICTORS),
        ]
        for entry in results["likelihood"]
    ]


def _bits_rows(results: dict[str, Any]) -> list[list[str]]:
    """Perplexity exp(loss) and loss in bits, with a last row for all quantizers together."""
    rate = results["codec"]["frame_rate"]

    def row(name: str, losses: list[float], mean: list[float]) -> list[str]:
        bits = [loss / math.log(2) for loss in losses]
        cells = [number(math.exp(loss)) for loss in mean] + [f"{value:.2f}" for value in bits]
        return [name, *cells, *(number(value * rate) for value in bits)]

    losses = [[entry[name]["loss"]["mean"] for name in PREDICTORS] for entry in results["likelihood"]]
    rows = [
        row(_quantizer(entry), loss, loss) for entry, loss in zip(results["likelihood"], losses, strict=True)
    ]
    if len(losses) > 1:
        sums = [sum(column) for column in zip(*losses, strict=True)]
        rows.append(row("all", sums, [total / len(losses) for total in sums]))
    return rows


def _bits_per_second(results: dict[str, Any], name: str) -> float:
    """Of all quantizers together."""
    nats = sum(entry[name]["loss"]["mean"] for entry in results["likelihood"])
    return nats / math.log(2) * results["codec"]["frame_rate"]


def _quantizer(entry: dict[str, Any]) -> str:
    return f"{entry['quantizer']} ({entry['decoder'].upper()})"


def _likelihood_tables(results: dict[str, Any]) -> list[Block]:
    frames = sum(cut["frames"] for cut in results["per_cut"])
    text = (
        f"Over {frames} target frames of {results['data']['test']['cuts']} held-out cuts, each after a prompt of "
        f"{_prompt(results)}. All three are scored on the same frames; the end symbol is not counted. "
        "Quantizer 0 is predicted from the frames before it (AR), the others from the prompt and the true lower "
        "quantizers of the whole recording (NAR), which unigram and bigram do not see. Gains with 95 % bootstrap "
        "intervals over cuts. The baselines count the training cuts; the validation cuts choose their smoothing."
    )
    bits = (
        "Perplexity is exp(loss): among how many equally likely codes the predictor hesitates. Bits: what coding the "
        "frames with this predictor would cost; per second, at the codec's frame rate. The perplexity of all "
        "quantizers together is that of their mean loss."
    )
    return [
        ReportTable(_loss_columns(results), _loss_rows(results), best=(1,)),
        ReportTable(ACCURACY_COLUMNS, _accuracy_rows(results), text, best=(1, 4)),
        ReportTable(BITS_COLUMNS, _bits_rows(results), bits, best=(1, 4, 7)),
    ]


def _accuracy_plots(results: dict[str, Any]) -> list[Block]:
    """Accuracy by quantizer, and by the target frame's place where it was counted."""
    colours = dict(zip(PREDICTORS, (MODEL_COLOUR, *LINE_COLOURS), strict=True))
    entries = results["likelihood"]
    plots = []
    for metric, title in (("top10", "Top-10 accuracy by quantizer"), ("top1", "Top-1 accuracy by quantizer")):
        curves = [
            Curve(name, [entry["quantizer"] for entry in entries],
                  [entry[name][metric]["mean"] for entry in entries], colours[name], True)
            for name in PREDICTORS
        ]  # fmt: skip
        plots.append(Plot(title, "part of frames", curves, x_label="quantizer", whole_x=True))
    plots += _position_plots(results, colours)
    return [ReportFigures(plots)] if len(entries) > 1 or len(plots) > 2 else []


def _position_plots(results: dict[str, Any], colours: dict[str, str]) -> list[Plot]:
    """Top-10 accuracy over the seconds since the target began; bins that few cuts reach are left out."""
    positions = results.get("positions")
    if not positions:
        return []
    counts = positions["frames"]
    bins = [row for row, count in enumerate(counts) if count >= FEW_FRAMES * counts[0]]
    rate = results["codec"]["frame_rate"]
    seconds = [(positions["start"][row] + positions["end"][row]) / 2 / rate for row in bins]
    plots = []
    for decoder in ("ar", "nar"):
        curves = [
            Curve(name, seconds, [values[row] for row in bins], colours[name], name == "model")
            for name, values in positions[decoder].items()
            if name in PREDICTORS
        ]
        if curves and len(bins) > 1:
            title = f"{decoder.upper()} top-10 accuracy by position"
            plots.append(Plot(title, "part of frames", curves, x_label="seconds after the prompt"))
    return plots


def _metric_tables(results: dict[str, Any]) -> list[Block]:
    """A table for each task: one row a figure, one column a condition."""
    figures = [figure for figure in figures_of(results) if figure.task != "generation"]
    tables: list[Block] = []
    for task in dict.fromkeys(figure.task for figure in figures):
        caption = DISTANCE_NOTE if task == "distance" else ""
        tables.append(_figure_table([figure for figure in figures if figure.task == task], caption))
    if tables:
        text = (
            f"{BEST_NOTE} Under each figure is its 95 % interval: {INTERVALS}. Unless it says otherwise, a figure "
            "is of what comes after the prompt. The recording shows what it says of real audio; the codec's "
            "resynthesis is the ceiling of any model of this codec; loop, unigram codes and silence show what it gives "
            "away for nothing."
        )
        tables.insert(0, ReportText(text))
    left_out = results.get("left_out") or {}
    if left_out:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        tables.append(ReportText(f"Not measured: {reasons}."))
    return tables


def _figure_table(figures: Sequence[Figure], caption: str = "") -> ReportTable:
    """Figures of one task: a row each, a column for each condition."""
    conditions = conditions_of(figures)
    rows: list[list[str | ReportCell]] = []
    for figure in figures:
        best = figure.best()
        cells = [_cell(figure.values.get(name), "best" if name == best else "") for name in conditions]
        rows.append([figure.heading, *cells])
    title = TASK_LABELS.get(figures[0].task, "other figures")
    return ReportTable([title, *map(condition_label, conditions)], rows, caption)


def _figure_rows(figures: Sequence[Figure], bold: str = "") -> list[list[str]]:
    """The same as text: figure, then a column for each condition; the best between `bold` marks."""
    conditions = conditions_of(figures)
    rows = [["figure", *map(condition_label, conditions)]]
    for figure in figures:
        best = figure.best()
        cells = [_plain_cell(figure.values.get(name)) for name in conditions]
        marked = [
            f"{bold}{cell}{bold}" if name == best else cell
            for name, cell in zip(conditions, cells, strict=True)
        ]
        rows.append([figure.heading, *marked])
    return rows


def _generation_blocks(results: dict[str, Any]) -> list[Block]:
    """What the continuations do: how long they are, and whether they end or repeat themselves."""
    figures = [figure for figure in figures_of(results) if figure.task == "generation"]
    blocks: list[Block] = [_figure_table(figures)] if figures else []
    clips = results["generation"]["clips"]
    asked = [clip["asked_frames"] for clip in clips]
    new = [frames for clip in clips for frames in clip.get("all_new_frames", [clip["new_frames"]])]
    reasons = [reason for clip in clips for reason in clip.get("finish_reasons", [])]
    if reasons:
        ended = f"{reasons.count('eos')} of {len(reasons)} continuations ended by themselves"
        caption = f"{ended}; the others were stopped."
    else:
        short = sum(clip["new_frames"] < clip["asked_frames"] for clip in clips)
        caption = f"{short} of {len(new)} continuations ended before they were as long as asked."
    if len(new) > 1:
        rate = results["codec"]["frame_rate"]
        lengths = {
            "continuations": [frames / rate for frames in new],
            "recordings after the prompt": [frames / rate for frames in asked],
        }
        blocks.append(ReportFigures([Histogram("Lengths", "seconds", lengths, "how many")], caption))
    return blocks


def _audio_tables(results: dict[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    measured = results.get("metrics") or {}  # what stands in the tables above is not said again
    scores = results["audio"].get("dnsmos")
    if scores and "dnsmos" not in measured:
        rows = []
        for condition in sorted(scores, key=column_order):
            if scores[condition]:
                full, rest = scores[condition].get("full"), scores[condition].get("continuation")
                cells = [
                    _interval(full["ovrl"], 2) if full else "–",
                    _interval(rest["ovrl"], 2) if rest else "–",
                ]
                cells += [f"{rest[name]['mean']:.2f}" if rest else "–" for name in ("sig", "bak")]
                rows.append([DNSMOS_LABELS.get(condition, condition_label(condition)), *cells])
        count = len(results["generation"]["clips"])
        caption = (
            f"DNSMOS P.835, a network's guess of listeners' opinions, 1 (bad) to 5 (excellent), over {count} clips "
            "with 95 % bootstrap intervals. The codec's resynthesis is the ceiling of any model of this codec. "
            "'After the prompt' scores only what comes after it, so that a good prompt does not lift the figure."
        )
        columns = ("DNSMOS", "whole clip, overall", "after the prompt, overall", "speech", "background")
        blocks.append(ReportTable(columns, rows, caption))
    distances = results["audio"].get("log_mel_distance")
    if distances and "mel" not in measured:
        mel_rows = [[condition_label(name), _interval(interval)] for name, interval in distances.items()]
        caption = (
            "Mean absolute difference of log10-mel spectra (80 bands, 64 ms windows), over all held-out cuts; "
            "0 is identical."
        )
        blocks.append(ReportTable(("log-mel distance to the recording", "distance"), mel_rows, caption))
    return blocks


def _training_plots(results: dict[str, Any], metrics_file: Path) -> list[Plot]:
    records = read_metrics(metrics_file)
    ar, *nar = results["likelihood"]

    def lines(metric: str, entries: Sequence[dict[str, Any]]) -> dict[str, float]:
        if not entries:
            return {}
        return {
            name: sum(entry[name][metric]["mean"] for entry in entries) / len(entries)
            for name in PREDICTORS[1:]
        }

    nats, part = "nats per frame", "part of frames"
    plots = [
        training_plot(records, "ArLoss", (0, 1), "AR loss", nats, lines("loss", [ar])),
        training_plot(records, "ArTop10Accuracy", (0, 1), "AR top-10 accuracy", part, lines("top10", [ar])),
        training_plot(records, "NarLoss", (0, 2), "NAR loss, mean over quantizers", nats, lines("loss", nar)),
        training_plot(
            records,
            "NarTop10Accuracy",
            (0, 2),
            "NAR top-10 accuracy, mean over quantizers",
            part,
            lines("top10", nar),
        ),
    ]
    return [plot for plot in plots if plot is not None]


def _listening_text(results: dict[str, Any], clips: Sequence[Clip]) -> ReportText:
    generation = results["generation"]
    asked = f"The model hears the first {generation['prompt_seconds']:g} s and goes on from there"
    if results.get("reads"):
        asked = "The model hears a prompt, with what it says or plays, and then reads what is below"
    return ReportText(
        f"{len(clips)} held-out recordings: best and worst of the figures, the others drawn at random (seed "
        f"{results['seed']}), none picked by ear. {asked} (top-k "
        f"{generation['top_k']}, temperature {generation['temperature']:g}). The dashed line "
        "is where the prompt ends. "
        "Spectrograms: log-mel, one colour scale of 80 dB for the whole page."
    )


@dataclasses.dataclass(frozen=True)
class _Extreme:
    """The best and the worst cut of one figure, with its values there."""

    label: str
    best: tuple[str, float]
    worst: tuple[str, float]


def _extremes(results: dict[str, Any]) -> list[_Extreme]:
    """Best and worst cut of the model: by AR loss, and by every figure of the clips whose better way is known."""
    found = []
    by_figure: list[tuple[str, str, dict[str, float]]] = [
        ("AR loss (nats/frame) ↓", "lower", {cut["id"]: cut["model"][0] for cut in results["per_cut"]})
    ]
    figures = {(figure.name, figure.key): figure for figure in figures_of(results)}
    for (name, key), values in _model_values(results).items():
        figure = figures.get((name, key))
        if figure is not None and figure.better in ("lower", "higher"):
            by_figure.append((figure.heading, figure.better, values))
    for label, better, values in by_figure:
        ranked = sorted(values.items(), key=lambda item: (item[1], item[0]), reverse=better == "higher")
        if len(ranked) > 1 and ranked[0][1] != ranked[-1][1]:
            found.append(_Extreme(label, ranked[0], ranked[-1]))
    return found


def extreme_cuts(results: dict[str, Any]) -> list[str]:
    """Cuts that are best or worst in a figure, those of most figures first."""
    counts = Counter(end[0] for extreme in _extremes(results) for end in (extreme.best, extreme.worst))
    return sorted(counts, key=lambda cut_id: (-counts[cut_id], cut_id))


def _model_values(results: dict[str, Any]) -> dict[tuple[str, str], dict[str, float]]:
    """(metric, figure) -> cut -> mean over the model's continuations of it."""
    sums: dict[tuple[str, str], dict[str, list[float]]] = {}
    for cut_id, conditions in (results.get("clips_table") or {}).items():
        for condition, metrics in conditions.items():
            if not is_model(condition):
                continue
            for name, figures in metrics.items():
                for key, value in figures.items():
                    if value is not None:
                        sums.setdefault((name, key), {}).setdefault(cut_id, []).append(value)
    return {
        key: {cut_id: sum(values) / len(values) for cut_id, values in cuts.items()}
        for key, cuts in sums.items()
    }


def _extreme_table(extremes: Sequence[_Extreme], shown: set[str]) -> list[Block]:
    def cell(end: tuple[str, float]) -> ReportCell:
        cut_id, value = end
        return ReportCell(cut_id, number(value), link=cut_id if cut_id in shown else "")

    if not extremes:
        return []
    rows: list[list[str | ReportCell]] = [
        [extreme.label, cell(extreme.best), cell(extreme.worst)] for extreme in extremes
    ]
    caption = (
        "Of each figure the cut where the model does best and worst, over its continuations of that cut."
    )
    return [ReportTable(("figure", "best cut", "worst cut"), rows, caption)]


def _clip(clip: Clip, extremes: Sequence[_Extreme]) -> ReportClip:
    """The model, the codec and the truth large; other continuations and baselines as players alone."""
    seconds = clip.boundary / clip.sample_rate
    models = [name for name in clip.wavs if is_model(name)]

    def audio(condition: str, label: str, note: str = "", large: bool = False) -> list[ReportAudio]:
        if condition not in clip.wavs:
            return []
        return [
            ReportAudio(
                label, clip.wavs[condition], clip.sample_rate, note, large, seconds if large else None
            )
        ]

    audios = (
        audio(models[0], "Prompt + continuation", "the model's, from its own codes", True) if models else []
    )
    audios += audio("resynthesis", "Codec resynthesis", "of the true recording: the ceiling", True)
    audios += audio("recording", "True recording", "what really came", True)
    for number_, name in enumerate(models[1:], 2):
        audios += audio(name, f"Prompt + continuation {number_}", "another seed")
    audios += audio("wrong", "Wrong text or notes", "behind the same prompt: another recording's")
    audios += audio("loop", "Loop of the prompt", "a baseline")
    audios += audio("unigram", "Prompt + unigram codes", "a baseline")
    facts = {
        "prompt": f"{seconds:.1f} s",
        "new frames": f"{clip.new_frames}, the recording has {clip.asked_frames} more",
    }
    if clip.prompt_id is not None:
        facts["prompt"] += f", of {clip.prompt_id}"
    for end in ("best", "worst"):
        labels = [extreme.label for extreme in extremes if getattr(extreme, end)[0] == clip.cut_id]
        if labels:
            facts[f"{end} in"] = ", ".join(labels)
    return ReportClip(clip.cut_id, audios, facts, clip.text)


def _check(name: str, passed: bool | None, detail: str) -> dict[str, Any]:
    return {"name": name, "passed": passed, "detail": detail}


def _prompt(results: dict[str, Any]) -> str:
    """How long the prompts were, in words; older results only have the ratio."""
    return results.get("prompt") or f"{results['prompt_ratio']:.0%} of it"


def _version(results: dict[str, Any]) -> str:
    parts = [f"valle {results['valle']}"]
    if results.get("commit"):
        parts.append(f"commit {results['commit'][:12]}")
    if results.get("config_hash"):
        parts.append(f"configuration {results['config_hash'][:12]}")
    return ", ".join([*parts, f"seed {results['seed']}"])


def _cell(value: Any, mark: str = "", signed: bool = False) -> ReportCell:
    interval = as_interval(value)
    if interval is None:
        return ReportCell("–")
    sign = "+" if signed and interval["mean"] > 0 else ""
    return ReportCell(sign + number(interval["mean"]), bounds(interval), mark)


def _plain_cell(interval: dict[str, Any] | None, signed: bool = False) -> str:
    cell = _cell(interval, signed=signed)
    return f"{cell.text} {cell.detail}" if cell.detail else cell.text


def _word(passed: bool | None) -> str:
    return {True: "PASS", False: "SHORT", None: "NOT MEASURED"}[passed]


def _below(gain: dict[str, Any]) -> str:
    return f"{abs(gain['mean']):.3f} {'below' if gain['mean'] >= 0 else 'above'}"


def _mean(interval: dict[str, Any]) -> str:
    return f"{interval['mean']:.3f}"


def _interval(interval: dict[str, Any], digits: int = 3) -> str:
    if interval["low"] is None:
        return f"{interval['mean']:.{digits}f}"
    return f"{interval['mean']:.{digits}f} [{interval['low']:.{digits}f}, {interval['high']:.{digits}f}]"
