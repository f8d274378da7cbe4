"""From a checkpoint and held-out cuts to `results.json`, wavs and `report.html`: what the evaluation command does.

Order: read the cuts -> count the baselines (train, validation) -> score model and baselines on the same frames
(test) -> continue some clips -> distances and DNSMOS -> write.
"""

import logging
import math
import platform
import subprocess
import time
from collections.abc import Sequence
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
from valle.data.dataset import load_codes, read_codec_info
from valle.data.manifests import read_manifest
from valle.data.split import prompt_length
from valle.engine.devices import pick_device
from valle.engine.stages import trained_in
from valle.evaluation.audio import DNSMOS_HINT, dnsmos_available
from valle.evaluation.baselines import fit_baselines, score_baseline
from valle.evaluation.clips import choose_cuts, dnsmos_table, make_clip, mel_table, save_clips
from valle.evaluation.likelihood import score_model
from valle.evaluation.report import build_report
from valle.evaluation.scores import SplitCodes, TokenScores
from valle.evaluation.statistics import Interval
from valle.evaluation.summary import checks_of, report_sections, report_summary
from valle.models import load_model
from valle.utils.errors import UserError
from valle.utils.files import write_json

log = logging.getLogger(__name__)
METRICS = ("loss", "top1", "top10")
DEFAULT_PROMPT_RATIO = 0.4


@dataclass
class EvaluateConfig:
    """What is evaluated, on which cuts, and where the results go."""

    checkpoint: str = option("", "the model's checkpoint, e.g. exp/audio-lm/best-valid-loss.pt")
    manifest: str = option("", "held-out cuts, e.g. data/tokenized/cuts_test.jsonl.gz")
    output_dir: str = option("", "folder for results.json, report.html and clips/")
    train_manifest: str | None = option(
        None, "cuts that the baselines count (default: cuts_train beside --manifest)"
    )
    valid_manifest: str | None = option(
        None, "cuts that choose the baselines' smoothing (default: cuts_validation beside --manifest)"
    )
    max_cuts: int = option(0, "score only so many held-out cuts; 0: all")
    num_clips: int = option(8, "clips to continue and listen to; 0: none")
    prompt_seconds: float = option(3.0, "seconds of each clip that the model continues")
    temperature: float = option(1.0, "sampling temperature of the continuations")
    top_k: int = option(50, "sample among the k likeliest codes")
    seed: int = option(42, "seed of clips, sampling and intervals")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    report: bool = option(True, "write report.html")
    metrics_file: str | None = option(
        None, "the training's metrics.jsonl, for the curves (default: log/metrics.jsonl beside --checkpoint)"
    )


@dataclass(frozen=True)
class _Codes:
    """Cuts with their codes (T, Q), cut to the model's quantizers."""

    cuts: list[Cut]
    codes: list[np.ndarray]

    def splits(self, prompt_ratio: float) -> list[SplitCodes]:
        """Prompt and target of each cut, as the training's validation splits them."""
        out = []
        for cut, codes in zip(self.cuts, self.codes, strict=True):
            if len(codes) < 2:
                raise UserError(
                    f"cut '{cut.id}': 1 frame cannot be split into prompt and target; leave it out"
                )
            frames = prompt_length(len(codes), prompt_ratio)
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
    model, checkpoint = load_model(config.checkpoint, device)
    codec = matching_codec(checkpoint["codec"], device, model.num_quantizers)
    manifests = {"test": Path(config.manifest), **_siblings(config)}
    _check_codec(manifests["test"], checkpoint["codec"])
    data = {
        name: _read(path, model, config.max_cuts if name == "test" else 0) for name, path in manifests.items()
    }
    _check_disjoint(data)

    ratio = float(checkpoint.get("config", {}).get("data", {}).get("prompt_ratio", DEFAULT_PROMPT_RATIO))
    splits = data["test"].splits(ratio)
    baselines = fit_baselines(data["train"].codes, data["validation"].splits(ratio), model.codebook_size)
    scores = {
        "model": score_model(model, splits, device),
        "unigram": score_baseline([pair.unigram for pair in baselines], splits),
        "bigram": score_baseline([pair.bigram for pair in baselines], splits),
    }
    likelihood = [_likelihood(scores, quantizer, config.seed) for quantizer in range(model.num_quantizers)]
    for entry, pair in zip(likelihood, baselines, strict=True):
        entry["unigram"]["k"] = pair.unigram.k
        entry["bigram"].update(rule=pair.bigram.rule, value=pair.bigram.value)
    scored = time.monotonic()

    prompt_frames = round(config.prompt_seconds * codec.frame_rate)
    by_id = dict(zip([cut.id for cut in data["test"].cuts], data["test"].codes, strict=True))
    chosen = choose_cuts(data["test"].cuts, config.num_clips, config.prompt_seconds, config.seed)
    unigrams = [pair.unigram for pair in baselines]
    clips = []
    for number, cut in enumerate(chosen):
        log.info("clip %d/%d: continuing %s", number + 1, len(chosen), cut.id)
        clips.append(make_clip(cut, by_id[cut.id], model, codec, unigrams, prompt_frames,
                               config.seed + number, config.temperature, config.top_k))  # fmt: skip
    output_dir = Path(config.output_dir)
    save_clips(clips, output_dir / "clips")
    generated = time.monotonic()

    audio: dict[str, Any] = {
        "log_mel_distance": mel_table(data["test"].cuts, data["test"].codes, codec, config.seed)
    }
    if not dnsmos_available():
        audio["dnsmos"] = None
        log.warning("DNSMOS is left out: %s", DNSMOS_HINT)
    elif clips:
        audio["dnsmos"] = dnsmos_table(clips, config.seed)
    listened = time.monotonic()

    results: dict[str, Any] = {
        "valle": __version__,
        "commit": _commit(),
        "packages": _packages(),
        "checkpoint": {key: checkpoint.get(key) for key in ("version", "step", "epoch", "train_stage")}
        | {
            "stages": trained_in(checkpoint),
            "path": config.checkpoint,
            "parameters": sum(weights.numel() for weights in model.parameters()),
        },
        "config": checkpoint.get("config", {}),
        "codec": checkpoint["codec"],
        "seed": config.seed,
        "data": {
            name: {
                "manifest": str(manifests[name]),
                "cuts": len(part.cuts),
                "frames": sum(len(codes) for codes in part.codes),
                "seconds": round(sum(len(codes) for codes in part.codes) / codec.frame_rate, 2),
            }
            for name, part in data.items()
        },
        "prompt_ratio": ratio,
        "likelihood": likelihood,
        "audio": audio,
        "generation": {
            "prompt_seconds": config.prompt_seconds,
            "temperature": config.temperature,
            "top_k": config.top_k,
            "clips": [
                {"id": clip.cut_id, "asked_frames": clip.asked_frames, "new_frames": clip.new_frames}
                for clip in clips
            ],
        },
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
    return results


def _likelihood(scores: dict[str, TokenScores], quantizer: int, seed: int) -> dict[str, Any]:
    """One quantizer's figures: model, baselines, and the loss gained over each baseline (paired by cut)."""
    entry: dict[str, Any] = {"quantizer": quantizer, "decoder": "nar" if quantizer else "ar"}
    for name, part in scores.items():
        entry[name] = {metric: part.interval(metric, quantizer, seed) for metric in METRICS}
    entry["gain"] = {
        name: scores[name].difference(scores["model"], "loss", quantizer, seed)
        for name in ("unigram", "bigram")
    }
    return entry


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


def _check_codec(manifest: Path, expected: dict[str, Any]) -> None:
    """Codes of another codec have other meanings, even where their shape fits."""
    found = read_codec_info(manifest.parent)
    if found and found.get("fingerprint") and expected.get("fingerprint") not in (None, found["fingerprint"]):
        raise UserError(
            f"the codes of '{manifest}' were made with codec '{found.get('name')}' ({found['fingerprint']}), but the "
            f"checkpoint was trained on '{expected['name']}' ({expected['fingerprint']}); run prepare.sh --stage 2 "
            f"--codec {expected['name']}"
        )


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
    for name in ("torch", "numpy", "lhotse", "transformers", "speechmos", "onnxruntime"):
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
