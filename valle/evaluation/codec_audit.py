"""What a codec keeps of a corpus: the ceiling of every model that is trained on its codes. Stage 4 of every recipe.

All codes are counted, cut by cut: bits per second, codes in use, perplexity of each quantizer. A seeded sample of cuts
is decoded again and compared with the recordings: SI-SDR, log-mel and STFT distance (valle/evaluation/audio.py).

    <folder>/audit.json     the figures
    <folder>/audit.html     the same with players, on one page that needs no network
    <folder>/worst-NN.png   the clips that lose most: the recording's spectrogram above the resynthesis'

An audit of the same manifests, codec and settings that is there already is taken as it is.
"""

import hashlib
import heapq
import importlib.util
import json
import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lhotse.cut import Cut

from valle.codecs import Codec, load_codec
from valle.config import option
from valle.data.checks import check_codec_info, find_manifests
from valle.data.dataset import read_codec_info
from valle.data.manifests import stream_manifest, write_bytes
from valle.data.packed import load_codes
from valle.data.statistics import CodeCounts, CutSample, format_table
from valle.engine.devices import pick_device
from valle.evaluation.audio import log_mel_distance, si_sdr, stft_distance
from valle.evaluation.figures import spectrograms_png
from valle.evaluation.report import (
    ReportAudio,
    ReportClip,
    ReportSection,
    ReportTable,
    ReportText,
    build_report,
)
from valle.utils.audio import convert_audio
from valle.utils.errors import UserError
from valle.utils.progress import progress

log = logging.getLogger(__name__)
FORMAT = 1  # of audit.json and of what is measured
WORST = 10
MEASURES = {  # name in audit.json -> heading
    "si_sdr": "SI-SDR (dB)",
    "log_mel_distance": "log10-mel distance",
    "stft_distance": "STFT distance",
}
SI_SDR_NOTE = (
    "SI-SDR compares waveforms. A neural codec writes a waveform that sounds alike, not one that lies on top of the "
    "recording, so low figures, also far below 0 dB, are normal and no fault; judge by the mel and STFT distances, "
    "where lower is better, and by ear."
)


@dataclass
class AuditConfig:
    """Codec audit"""

    manifest_dir: str = option("data/tokenized", "folder with codec.json and cuts with codes, by split")
    output_dir: str | None = option(None, "where the audit goes (default: audit/ in --manifest-dir)")
    audit_cuts: int = option(40, "cuts to decode and compare, over all splits, drawn by chance; 0: none")
    audit_seconds: float = option(15.0, "of a longer cut, only so many seconds from its start on")
    seed: int = option(42, "seed of the draw")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")


@dataclass(frozen=True)
class ResynthesizedClip:
    """A recording and what is left of it.

    Attributes:
        split: where it is from.
        cut_id: its cut.
        original, decoded: (C, N) float32 at the codec's rate.
        scores: by name, see MEASURES; None where one is not defined.
    """

    split: str
    cut_id: str
    original: np.ndarray
    decoded: np.ndarray
    scores: dict[str, float | None]


def audit_codec(config: AuditConfig) -> tuple[dict[str, Any], Path]:
    """Audit a folder of tokenized cuts, unless that has been done.

    Where the codec cannot be loaded, only the codes are counted; where matplotlib is not installed, there are no
    spectrograms; either is said in one line.

    Returns:
        What audit.json holds, and its folder.

    Raises:
        UserError: the folder is not what stage 3 writes.
    """
    if config.audit_cuts < 0 or not 0 < config.audit_seconds < math.inf:
        raise UserError(
            f"--audit-cuts is {config.audit_cuts} and --audit-seconds {config.audit_seconds:g}, expected 0 or more and "
            "more than 0"
        )
    folder = Path(config.manifest_dir)
    manifests = {name: path for name, path in find_manifests(folder).items() if name.startswith("cuts_")}
    manifests = manifests or find_manifests(
        folder
    )  # utterances alone; else they are the same audio once more
    info = read_codec_info(folder)
    if info is None:
        raise UserError(f"'{folder}/codec.json' does not exist; run prepare.sh --stage 2")
    check_codec_info(info, folder / "codec.json")
    output_dir = Path(config.output_dir or folder / "audit")
    figures = importlib.util.find_spec("matplotlib") is not None
    inputs = _digest(config, [*manifests.values(), folder / "codec.json"], figures)
    finished = _read_finished(output_dir, inputs)
    if finished is not None:
        log.info("the audit of these manifests is there already")
        return finished, output_dir

    splits = {name.rsplit("_", 1)[1]: path for name, path in manifests.items()}
    counts, samples, seconds = count_codes(splits, info, config)
    results: dict[str, Any] = {
        "format": FORMAT,
        "inputs": inputs,
        "codec": info,
        "settings": {name: getattr(config, name) for name in ("audit_cuts", "audit_seconds", "seed")},
        "bits_per_second": bits_per_second(counts["all"], info),
        "splits": {name: _split_codes(part, seconds[name]) for name, part in counts.items()},
        "resynthesis": None,
        "left_out": None,
    }
    worst: list[ResynthesizedClip] = []
    if config.audit_cuts:
        try:
            codec = _load(info, pick_device(config.device))
        except UserError as error:
            results["left_out"] = str(error)
            log.warning("no resynthesis: %s", error)
        else:
            results["resynthesis"], worst = resynthesize(samples, codec, config.audit_seconds)
    _write(output_dir, results, worst, figures)
    return results, output_dir


def _digest(config: AuditConfig, files: Sequence[Path], figures: bool) -> str:
    """Of all that decides about the result."""
    digest = hashlib.sha1(
        f"{FORMAT} {config.audit_cuts} {config.audit_seconds} {config.seed} {figures}".encode()
    )
    for path in files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha1").digest())
    return digest.hexdigest()[:16]


def _read_finished(folder: Path, inputs: str) -> dict[str, Any] | None:
    """The audit in a folder, if it is of these inputs and nothing was left out."""
    try:
        results = json.loads((folder / "audit.json").read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(results, dict) or results.get("inputs") != inputs or results.get("left_out"):
        return None
    figures = [clip.get("figure") for clip in (results.get("resynthesis") or {}).get("worst", [])]
    there = all((folder / name).is_file() for name in ["audit.html", *filter(None, figures)])
    return results if there else None


def _load(info: Mapping[str, Any], device: torch.device) -> Codec:
    """The codec that made the codes.

    Raises:
        UserError: it cannot be had, or has other weights now.
    """
    name = info.get("name")
    if not name:
        raise UserError("codec.json does not name the codec")
    codec = load_codec(name, device, int(info["num_quantizers"]))
    if info.get("fingerprint") not in (None, codec.fingerprint()):
        raise UserError(
            f"codec '{name}' has fingerprint {codec.fingerprint()}, but codec.json says {info['fingerprint']}; "
            "run prepare.sh --stage 2 again"
        )
    return codec


# ------------------------------------------------------------------------------------------------ codes


def count_codes(
    splits: Mapping[str, Path], info: Mapping[str, Any], config: AuditConfig
) -> tuple[dict[str, CodeCounts], dict[str, list[Cut]], dict[str, float]]:
    """Read every split's codes once.

    Returns:
        By split, and under "all": the counts; the cuts to decode; seconds of audio.
    """
    size = int(info["codebook_size"])
    counts, drawn, seconds = {"all": CodeCounts(size)}, {}, {"all": 0.0}
    for split, path in splits.items():
        counts[split], sample, seconds[split] = (
            CodeCounts(size),
            CutSample(config.audit_cuts, config.seed),
            0.0,
        )
        with progress(stream_manifest(path), desc=f"counting codes of {path.name}", unit="cut") as cuts:
            for cut in cuts:
                codes = load_codes(cut, int(info["num_quantizers"]), size)
                for name in ("all", split):
                    counts[name].add(codes)
                    seconds[name] += cut.duration
                sample.offer(cut)
        drawn[split] = sample.cuts()
        if not counts[split].frames:
            raise UserError(f"'{path}' holds no cut; run prepare.sh --stage 3, with more recordings")
    shares = share_out(config.audit_cuts, {split: len(cuts) for split, cuts in drawn.items()})
    return counts, {split: drawn[split][:share] for split, share in shares.items()}, seconds


def share_out(total: int, available: Mapping[str, int]) -> dict[str, int]:
    """Divide `total` as evenly as may be; what one cannot give, the others do."""
    shares, left = dict.fromkeys(available, 0), total
    for done, name in enumerate(sorted(available, key=lambda name: available[name])):
        shares[name] = min(available[name], left // (len(available) - done))
        left -= shares[name]
    return shares


def bits_per_second(counts: CodeCounts, info: Mapping[str, Any]) -> dict[str, float]:
    """What a second of codes costs: stored as it is, and by the entropy of the single codes.

    The latter is what is left if each quantizer's codes were written by their frequencies; a model that knows what
    came before needs fewer.
    """
    rate = float(info["frame_rate"])
    nominal = rate * int(info["num_quantizers"]) * math.log2(int(info["codebook_size"]))
    return {
        "nominal": round(nominal, 2),
        "entropy": round(rate * sum(counts.entropies()) / math.log(2), 2),
    }


def _split_codes(counts: CodeCounts, seconds: float) -> dict[str, Any]:
    return {
        "frames": counts.frames,
        "hours": round(seconds / 3600, 4),
        "quantizers": [
            {
                "used": used,
                "share_used": round(used / (counts.codebook_size or used), 4),
                "entropy_bits": round(nats / math.log(2), 4),
                "perplexity": round(math.exp(nats), 2),
            }
            for used, nats in zip(counts.used(), counts.entropies(), strict=True)
        ],
    }


# ------------------------------------------------------------------------------------------ resynthesis


def resynthesize(
    samples: Mapping[str, Sequence[Cut]], codec: Codec, seconds: float
) -> tuple[dict[str, Any], list[ResynthesizedClip]]:
    """Decode the codes of some cuts and compare with their recordings.

    Args:
        samples: by split.
        codec: made their codes.
        seconds: of each, from its start on, at most.

    Returns:
        Figures for audit.json, and the clips of the largest log-mel distance, largest first.
    """
    rows: list[dict[str, Any]] = []
    unread: list[dict[str, str]] = []
    worst: list[tuple[float, int, ResynthesizedClip]] = []
    every = [(split, cut) for split, cuts in samples.items() for cut in cuts]
    for split, cut in progress(every, desc="resynthesis", unit="cut"):
        try:
            clip = _compare(split, cut, codec, seconds)
        except UserError as error:
            unread.append({"id": cut.id, "reason": str(error)})
            continue
        rows.append({"id": cut.id, "split": split, "seconds": round(_seconds(clip, codec), 3), **clip.scores})
        # The number decides between equal distances; audio of no more than ten clips is kept.
        entry = (float(clip.scores["log_mel_distance"] or 0.0), -len(rows), clip)
        (heapq.heappush if len(worst) < WORST else heapq.heappushpop)(worst, entry)
    if unread:
        log.warning(
            "%d of %d cuts are left out of the resynthesis; the first: %s",
            *(len(unread), len(every), unread[0]["reason"]),
        )
    clips = [clip for *_, clip in sorted(worst, key=lambda entry: entry[:2], reverse=True)]
    by_split = {"all": rows} | {split: [row for row in rows if row["split"] == split] for split in samples}
    figures = {
        "splits": {name: _averages(part) for name, part in by_split.items()},
        "clips": rows,
        "unread": unread,
        "worst": [{"id": clip.cut_id, "figure": None} for clip in clips],
    }
    return figures, clips


def _compare(split: str, cut: Cut, codec: Codec, seconds: float) -> ResynthesizedClip:
    if cut.duration > seconds:
        cut = cut.truncate(duration=seconds)
    codes = load_codes(cut, codec.num_quantizers, codec.codebook_size)  # (T, Q)
    try:
        wav = cut.load_audio()  # (C, N)
    except Exception as error:  # lhotse raises whatever its many readers do
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cut '{cut.id}': audio cannot be read ({reason})") from error
    if wav is None or wav.shape[-1] == 0:
        raise UserError(f"cut '{cut.id}' has no samples")
    original = convert_audio(np.atleast_2d(wav), cut.sampling_rate, codec.sample_rate, codec.channels)
    with torch.inference_mode():
        decoded = codec.decode(torch.from_numpy(codes)[None].to(codec.device))[0].float().cpu().numpy()
    length = min(original.shape[1], decoded.shape[1])  # the last frame reaches beyond the recording's end
    original, decoded = original[:, :length], decoded[:, :length]
    scores = {
        "si_sdr": si_sdr(original, decoded),
        "log_mel_distance": log_mel_distance(original, decoded, codec.sample_rate),
        "stft_distance": stft_distance(original, decoded, codec.sample_rate),
    }
    rounded = {name: None if value is None else round(value, 5) for name, value in scores.items()}
    return ResynthesizedClip(split, cut.id, original, decoded, rounded)


def _seconds(clip: ResynthesizedClip, codec: Codec) -> float:
    return clip.original.shape[1] / codec.sample_rate


def _averages(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and worst of each measure over some clips; None where there is none."""
    out: dict[str, Any] = {"cuts": len(rows)}
    for name in MEASURES:
        values = [row[name] for row in rows if row[name] is not None]
        worst = min if name == "si_sdr" else max
        out[name] = {
            "mean": round(sum(values) / len(values), 5) if values else None,
            "worst": worst(values) if values else None,
        }
    return out


# ---------------------------------------------------------------------------------------------- results


def _write(folder: Path, results: dict[str, Any], worst: Sequence[ResynthesizedClip], figures: bool) -> None:
    """audit.html, worst-NN.png, and last audit.json: an audit that was killed leaves none."""
    rate = int(results["codec"]["sample_rate"])
    pictures: dict[str, bytes] = {}
    if worst and not figures:
        log.warning("no spectrograms: matplotlib is not installed (pip install 'valle[report]')")
    for number, clip in enumerate(worst, 1) if figures else []:
        name = f"worst-{number:02d}.png"
        wavs = [("recording", clip.original, rate), ("resynthesis", clip.decoded, rate)]
        pictures[name] = spectrograms_png(wavs, f"{clip.cut_id}: {_scores(clip)}")
        results["resynthesis"]["worst"][number - 1]["figure"] = name
        write_bytes(folder / name, pictures[name])
    for old in folder.glob("worst-*.png"):
        if old.name not in pictures:
            old.unlink()
    codec = results["codec"]
    summary = {
        "codec": f"{codec.get('name')} ({codec.get('fingerprint')}), {codec['num_quantizers']} quantizers x "
        f"{codec['codebook_size']} codes, {codec['frame_rate']:g} frames/s, {rate} Hz",
        "bits per second": _bits(results),
        "audio": f"{results['splits']['all']['hours']:.2f} h",
    }
    sections = _sections(results, worst, list(pictures.values()))
    with tempfile.TemporaryDirectory() as place:
        page = build_report(
            Path(place) / "audit.html", f"Codec audit: {codec.get('name')}", summary, sections
        )
        write_bytes(folder / "audit.html", page.read_bytes())
    text = json.dumps(results, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_bytes(folder / "audit.json", text.encode())


def _bits(results: Mapping[str, Any]) -> str:
    bits = results["bits_per_second"]
    share = bits["entropy"] / bits["nominal"]
    return f"{bits['nominal']:.0f} as stored, {bits['entropy']:.0f} ({share:.0%}) by the entropy of the codes"


def _scores(clip: ResynthesizedClip) -> str:
    return ", ".join(f"{MEASURES[name]} {_number(name, value)}" for name, value in clip.scores.items())


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if name == "si_sdr" else f"{value:.3f}"


def _code_rows(results: Mapping[str, Any]) -> list[list[str]]:
    size = results["codec"]["codebook_size"]
    rows = [["split", "quantizer", "frames", "codes used", "share", "perplexity", "entropy (bits)"]]
    for split, part in results["splits"].items():
        for index, quantizer in enumerate(part["quantizers"]):
            rows.append(
                [
                    split, str(index), str(part["frames"]), f"{quantizer['used']}/{size}",
                    f"{quantizer['share_used']:.0%}", f"{quantizer['perplexity']:.0f}",
                    f"{quantizer['entropy_bits']:.2f}",
                ]
            )  # fmt: skip
    return rows


def _resynthesis_rows(results: Mapping[str, Any]) -> list[list[str]]:
    heads = [f"{name}{part}" for name in MEASURES.values() for part in ("", ", worst")]
    rows = [["split", "cuts", *heads]]
    for split, part in results["resynthesis"]["splits"].items():
        cells = [_number(name, part[name][what]) for name in MEASURES for what in ("mean", "worst")]
        rows.append([split, str(part["cuts"]), *cells])
    return rows


def format_audit(results: Mapping[str, Any]) -> str:
    """The figures as lines for the terminal."""
    lines = [f"codec {results['codec'].get('name')}: bits per second: {_bits(results)}", ""]
    lines.append(format_table(_code_rows(results)))
    if results["resynthesis"] is not None:
        lines += ["", format_table(_resynthesis_rows(results)), SI_SDR_NOTE]
    return "\n".join(lines)


def _sections(
    results: Mapping[str, Any], worst: Sequence[ResynthesizedClip], pictures: Sequence[bytes]
) -> list[ReportSection]:
    head, *rows = _code_rows(results)
    caption = (
        "All codes of all cuts. Perplexity: so many codes, equally frequent, would have the same entropy. A quantizer "
        "that uses few of its codes wastes bits; the codec was trained on something else than this corpus."
    )
    sections = [ReportSection("Codes", [ReportTable(head, rows, caption)])]
    if results["resynthesis"] is None:
        reason = results["left_out"] or "--audit-cuts is 0"
        return [*sections, ReportSection("Resynthesis", [ReportText(f"Left out: {reason}")])]
    head, *rows = _resynthesis_rows(results)
    caption = f"Codes decoded again, against the recording. Means, and the worst clip. {SI_SDR_NOTE}"
    sections.append(ReportSection("Resynthesis", [ReportTable(head, rows, caption)]))
    rate = int(results["codec"]["sample_rate"])
    clips = [
        ReportClip(
            clip.cut_id,
            [
                ReportAudio("recording", clip.original, rate),
                ReportAudio("resynthesis", clip.decoded, rate),
            ],
            {"split": clip.split}
            | {MEASURES[name]: _number(name, value) for name, value in clip.scores.items()},
            picture=picture,
        )
        for clip, picture in zip(worst, pictures or [b""] * len(worst), strict=True)
    ]
    unread = results["resynthesis"]["unread"]
    missing = (
        [ReportText(f"{len(unread)} cuts could not be read, e.g. {unread[0]['reason']}")] if unread else []
    )
    title = f"The {len(clips)} clips of largest mel distance"
    return [*sections, ReportSection(title, [*missing, *clips])]
