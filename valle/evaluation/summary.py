"""How results are told: checks against what was asked, lines for the terminal, and the sections of the report."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from valle.config import DataConfig, ModelConfig, TrainConfig
from valle.engine.metrics import read_metrics
from valle.engine.stages import trained_in
from valle.evaluation.clips import CONDITIONS, Clip
from valle.evaluation.figures import Plot, training_plot
from valle.evaluation.report import (
    Block,
    ReportAudio,
    ReportCheck,
    ReportClip,
    ReportFigures,
    ReportSection,
    ReportTable,
    ReportText,
)

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
        checks.append(_check(name, None, "no clips, or speechmos and onnxruntime are not installed"))
    return checks


def format_results(results: dict[str, Any]) -> str:
    """The figures as text for the terminal."""
    test = results["data"]["test"]
    lines = [
        f"held-out: {test['cuts']} cuts, {test['seconds']:.0f} s; per target frame, end symbol not counted"
    ]
    lines += _aligned([list(LOSS_COLUMNS), *_loss_rows(results)])
    lines += _aligned([list(ACCURACY_COLUMNS), *_accuracy_rows(results)])
    for name, interval in results["audio"]["log_mel_distance"].items():
        lines.append(f"log-mel distance to the recording, {name}: {_interval(interval)}")
    for condition, parts in (results["audio"].get("dnsmos") or {}).items():
        shown = ", ".join(f"{part} {_interval(scores['ovrl'], 2)}" for part, scores in parts.items())
        lines.append(f"DNSMOS, {CONDITIONS[condition]}: {shown}")
    for check in results["checks"]:
        lines.append(f"{_word(check['passed'])}: {check['name']} ({check['detail']})")
    return "\n".join(lines)


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
        "version": f"valle {results['valle']}"
        + (f", commit {results['commit'][:12]}" if results["commit"] else "")
        + f", seed {results['seed']}",
    }
    return {name: value for name, value in summary.items() if value}


def training_command(config: dict[str, Any]) -> str:
    """The training command that a checkpoint's configuration stands for: every flag that is not at its default."""
    flags = []
    for key, kind in (("model", ModelConfig), ("data", DataConfig), ("train", TrainConfig)):
        saved = config.get(key, {})
        for field in dataclasses.fields(kind):
            value = saved.get(field.name, field.default)
            if value != field.default:
                shown = str(value).lower() if isinstance(value, bool) else value
                flags.append(f"--{field.name.replace('_', '-')} {shown}")
    return " ".join(["python -m valle.bin.trainer_audiolm", *flags])


def report_sections(
    results: dict[str, Any], clips: Sequence[Clip], metrics_file: Path
) -> list[ReportSection]:
    """The report's content; a part for which there is nothing (no metrics file, no clips) is left out."""
    checks: list[Block] = [
        ReportCheck(check["name"], check["passed"], check["detail"]) for check in results["checks"]
    ]
    sections = [
        ReportSection("Was it worth training?", checks),
        ReportSection("Predicting held-out codes", _likelihood_tables(results)),
    ]
    audio = _audio_tables(results)
    if audio:
        sections.append(ReportSection("How it sounds, in numbers", audio))
    plots = _training_plots(results, metrics_file)
    if plots:
        text = (
            "Over the training steps. Dashed: the baselines on the held-out cuts. "
            "The curves count the end symbol, the table does not."
        )
        sections.append(ReportSection("Training", [ReportFigures(plots, text)]))
    if clips:
        sections.append(ReportSection("Listen", [_listening_text(results, clips), *map(_clip, clips)]))
    return sections


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
PREDICTORS = ("model", "unigram", "bigram")


def _loss_rows(results: dict[str, Any]) -> list[list[str]]:
    return [
        [_quantizer(entry), *(_mean(entry[name]["loss"]) for name in PREDICTORS)]
        + [_interval(entry["gain"][name]) for name in ("unigram", "bigram")]
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


def _quantizer(entry: dict[str, Any]) -> str:
    return f"{entry['quantizer']} ({entry['decoder'].upper()})"


def _likelihood_tables(results: dict[str, Any]) -> list[Block]:
    frames = sum(cut["frames"] for cut in results["per_cut"])
    text = (
        f"Over {frames} target frames of {results['data']['test']['cuts']} held-out cuts, each after a prompt of "
        f"{results['prompt_ratio']:.0%} of it. All three are scored on the same frames; the end symbol is not counted. "
        "Quantizer 0 is predicted from the frames before it (AR), the others from the prompt and the true lower "
        "quantizers of the whole recording (NAR), which unigram and bigram do not see. Gains with 95 % bootstrap "
        "intervals over cuts. The baselines count the training cuts; the validation cuts choose their smoothing."
    )
    return [
        ReportTable(LOSS_COLUMNS, _loss_rows(results), best=(1,)),
        ReportTable(ACCURACY_COLUMNS, _accuracy_rows(results), text, best=(1, 4)),
    ]


def _audio_tables(results: dict[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    scores = results["audio"].get("dnsmos")
    if scores:
        rows = []
        for condition, label in CONDITIONS.items():
            if condition in scores:
                full, rest = scores[condition].get("full"), scores[condition].get("continuation")
                cells = [
                    _interval(full["ovrl"], 2) if full else "–",
                    _interval(rest["ovrl"], 2) if rest else "–",
                ]
                cells += [f"{rest[name]['mean']:.2f}" if rest else "–" for name in ("sig", "bak")]
                rows.append([label, *cells])
        count = len(results["generation"]["clips"])
        caption = (
            f"DNSMOS P.835, a network's guess of listeners' opinions, 1 (bad) to 5 (excellent), over {count} clips "
            "with 95 % bootstrap intervals. The codec's resynthesis is the ceiling of any model of this codec. "
            "'After the prompt' scores only what comes after it, so that a good prompt does not lift the figure."
        )
        columns = ("DNSMOS", "whole clip, overall", "after the prompt, overall", "speech", "background")
        blocks.append(ReportTable(columns, rows, caption, best=(2,)))
    distances = results["audio"]["log_mel_distance"]
    if distances:
        labels = {"resynthesis": "codec resynthesis", "silence": "silence"}
        mel_rows = [[labels[name], _interval(interval)] for name, interval in distances.items()]
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
    return ReportText(
        f"{len(clips)} held-out recordings, drawn at random (seed {results['seed']}), not picked by ear. The model "
        f"hears the first {generation['prompt_seconds']:g} s and goes on as long as the recording does (top-k "
        f"{generation['top_k']}, temperature {generation['temperature']:g}). The dashed line is where the prompt ends. "
        "Spectrograms: log-mel, one colour scale of 80 dB for the whole page."
    )


def _clip(clip: Clip) -> ReportClip:
    seconds = clip.boundary / clip.sample_rate

    def large(condition: str, label: str, note: str) -> list[ReportAudio]:
        if condition not in clip.wavs:
            return []
        return [ReportAudio(label, clip.wavs[condition], clip.sample_rate, note, True, seconds)]

    source = "recording" if "recording" in clip.wavs else "resynthesis"
    audios = large("model", "Prompt + continuation", "the model's, from its own codes")
    audios += large("resynthesis", "Codec resynthesis", "of the true recording: the ceiling")
    audios += large("recording", "True recording", "what really came")
    audios += [
        ReportAudio("Prompt", clip.part(source, "prompt"), clip.sample_rate),
        ReportAudio("Continuation alone", clip.part("model", "continuation"), clip.sample_rate),
        ReportAudio("True continuation", clip.part(source, "continuation"), clip.sample_rate),
    ]
    facts = {"prompt": f"{seconds:.1f} s", "new frames": f"{clip.new_frames} of {clip.asked_frames}"}
    return ReportClip(clip.cut_id, audios, facts, clip.text)


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]


def _check(name: str, passed: bool | None, detail: str) -> dict[str, Any]:
    return {"name": name, "passed": passed, "detail": detail}


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
