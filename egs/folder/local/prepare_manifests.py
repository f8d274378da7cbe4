"""Stage 1: any audio files -> FLAC pieces at the codec's rate, and lhotse manifests with splits.

Each file leaves a small record beside its pieces (data/audio/<id>.json), so a killed run goes on where it stopped and
a changed file is converted anew. With three recordings or more, a recording is wholly in one split; one or two are
split by time, with a gap between the splits.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from lhotse import Recording, SupervisionSegment
from lhotse.cut import Cut
from list_audio import list_audio

from valle.codecs import DEFAULT_CODEC, load_codec
from valle.config import option, parse
from valle.data.manifests import (
    SPLITS,
    assign_splits,
    cut_windows,
    file_id,
    make_cut,
    make_recording,
    make_supervision,
    normalize_text,
    split_of,
    write_audio,
    write_jsonl,
    write_manifests,
)
from valle.utils.audio import convert_audio, load_audio
from valle.utils.command import run
from valle.utils.errors import UserError
from valle.utils.files import write_json
from valle.utils.log import setup_logger
from valle.utils.progress import progress

logger = logging.getLogger("valle.egs.folder.manifests")

GAP = 1.0  # seconds left out between two splits of one recording
TIME_PART = 0.1  # of a recording that is split by time: validation, and test
MIN_LEVEL = -90.0  # dBFS, RMS over a file; below it there is nothing but dither


@dataclass
class ManifestConfig:
    """Stage 1 of egs/folder"""

    audio_dir: str = option("audio", "folder with recordings, searched with all folders below it")
    data_dir: str = option("data", "folder of the recipe's output")
    codec: str = option(DEFAULT_CODEC, "codec, for its sample rate and channels")
    min_duration: float = option(5.0, "shortest cut, in seconds")
    max_duration: float = option(15.0, "longest cut, in seconds")


@dataclass
class Format:
    """What every piece is converted to, and how long it may be."""

    sample_rate: int
    channels: int
    min_duration: float
    max_duration: float


@dataclass
class Source:
    """One readable file."""

    id: str
    path: Path
    name: str  # relative to the audio folder
    num_samples: int  # at the target rate
    sha1: str
    text: str | None
    pieces: list[tuple[range, str]] = field(default_factory=list)  # samples, split


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    (config,) = parse("Manifests of a folder of recordings.", [ManifestConfig], argv)
    setup_logger()
    if not 0 < config.min_duration <= config.max_duration:
        raise UserError(
            f"--min-duration {config.min_duration:g} and --max-duration {config.max_duration:g}:"
            " expected 0 < minimum <= maximum, in seconds"
        )
    audio_dir, data_dir = Path(config.audio_dir), Path(config.data_dir)
    paths = list_audio(audio_dir, data_dir)
    codec = load_codec(config.codec)
    target = Format(codec.sample_rate, codec.channels, config.min_duration, config.max_duration)
    skipped: list[dict[str, str]] = []
    sources = convert_all(paths, audio_dir, data_dir / "audio", target, skipped)
    long_enough = [source for source in sources if windows_of(source, target)]
    by_time = len({split_key(source, target) for source in long_enough}) < len(SPLITS)
    if by_time:
        split_by_time(long_enough, target)
    else:
        split_by_recording(sources, long_enough, target)
    write_jsonl(data_dir / "manifests" / "skipped.jsonl", skipped)
    recordings, supervisions, cuts = build(sources, data_dir / "audio", target, by_time)
    write_manifests(data_dir / "manifests", "folder", recordings, supervisions, cuts)
    remove_stale(data_dir / "audio", sources, recordings)
    for split in SPLITS:
        durations = [
            cut.duration for cut in cuts if cut.custom["split"] == split and cut.custom["kind"] == "audio"
        ]
        logger.info("%s: %d cuts, %.1f min", split, len(durations), sum(durations) / 60)
    if skipped:
        logger.warning(
            "left out %d of %d files; reasons in %s",
            *(len(skipped), len(paths), data_dir / "manifests" / "skipped.jsonl"),
        )


def convert_all(
    paths: Sequence[Path], audio_dir: Path, output: Path, target: Format, skipped: list[dict[str, str]]
) -> list[Source]:
    """Read every file once, and write its pieces; what cannot be used goes to `skipped`."""
    sources: list[Source] = []
    seen: dict[str, str] = {}
    for path, source_id in progress(
        list(zip(paths, make_ids(paths, audio_dir), strict=True)), desc="convert", unit="file"
    ):
        name = path.relative_to(audio_dir).as_posix()
        record = survey(path, name, source_id, output, target)
        reason = record["reason"]
        text = read_text(path)
        if reason is None and record["sha1"] in seen:
            reason = f"same content as '{seen[record['sha1']]}'"
        if (
            reason is None
            and record["num_samples"] < target.min_duration * target.sample_rate
            and text is None
        ):
            duration = record["num_samples"] / target.sample_rate
            reason = f"{duration:.2f} s, shorter than --min-duration {target.min_duration:g}"
        if reason is not None:
            skipped.append({"path": name, "reason": reason})
            continue
        seen[record["sha1"]] = name
        sources.append(Source(source_id, path, name, record["num_samples"], record["sha1"], text))
    if not sources:
        raise UserError(
            f"none of the {len(paths)} files in '{audio_dir}' can be used; the first: '{skipped[0]['path']}':"
            f" {skipped[0]['reason']}"
        )
    return sources


def make_ids(paths: Sequence[Path], audio_dir: Path) -> list[str]:
    """An identifier for each file: its relative path; where two would be equal, with its suffix and a number."""
    ids: list[str] = []
    for path in paths:
        relative = path.relative_to(audio_dir)
        candidate = file_id(relative.with_suffix("").as_posix())
        if candidate in ids:
            candidate = file_id(relative.as_posix())
        number = 2
        unnumbered = candidate
        while candidate in ids:
            candidate = f"{unnumbered}-{number}"
            number += 1
        ids.append(candidate)
    return ids


def survey(path: Path, name: str, source_id: str, output: Path, target: Format) -> dict[str, Any]:
    """A file's record: num_samples at the target rate and sha1 of its bytes, or the reason why it cannot be used.

    Reads the file only when there is no record of it as it is now; then writes its pieces, too.
    """
    record_path = output / f"{source_id}.json"
    try:
        status = path.stat()
    except OSError as error:  # a link that leads nowhere
        return {"reason": f"cannot be read ({error.strerror})"}
    now = {"source": name, "size": status.st_size, "mtime_ns": status.st_mtime_ns, "format": vars(target)}
    try:
        record = json.loads(record_path.read_text())
        if all(record[key] == value for key, value in now.items()):
            return record
    except (OSError, ValueError, KeyError, TypeError):
        pass
    record_path.unlink(missing_ok=True)
    shutil.rmtree(output / source_id, ignore_errors=True)
    try:
        wav = read_source(path, target)
    except UserError as error:
        record = {**now, "reason": str(error)}
    else:
        source = Source(source_id, path, name, wav.shape[1], "", None)
        for window in windows_of(source, target):
            write_piece(source, window, wav, output, target, by_time=False)
        record = {**now, "reason": None, "num_samples": wav.shape[1], "sha1": file_sha1(path)}
    write_json(record_path, record)
    return record


def read_source(path: Path, target: Format) -> np.ndarray:
    """(C, N) at the target rate; UserError when there is nothing to use."""
    wav, sample_rate = load_audio(path)
    wav = convert_audio(wav, sample_rate, target.sample_rate, target.channels)
    level = 20 * np.log10(np.sqrt(np.mean(np.square(wav, dtype=np.float64))) + 1e-12) if wav.size else -np.inf
    if level < MIN_LEVEL:
        raise UserError("silent")
    return wav


def read_text(path: Path) -> str | None:
    """The transcript in the text file of the same name, or None."""
    try:
        text = path.with_suffix(".txt").read_text(encoding="utf-8-sig", errors="replace")
    except OSError:
        return None
    return " ".join(text.split()) or None


def file_sha1(path: Path) -> str:
    """Digest of a file's bytes."""
    digest = hashlib.sha1()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def windows_of(source: Source, target: Format) -> list[range]:
    """The pieces of a whole recording."""
    limits = (target.min_duration, target.max_duration)
    return cut_windows(source.num_samples, target.sample_rate, *limits, key=source.id)


def single(source: Source, target: Format) -> bool:
    """Whether the recording is one clip, with its transcript, of at most the longest duration."""
    return source.text is not None and source.num_samples <= target.max_duration * target.sample_rate


def split_key(source: Source, target: Format) -> str:
    """What decides on the split: the sentence, where it is known, so that equal ones fall together; else the file."""
    sentence = normalize_text(source.text or "") if single(source, target) else ""
    return f"text {sentence}" if sentence else f"file {source.name}"


def split_by_recording(sources: Sequence[Source], long_enough: Sequence[Source], target: Format) -> None:
    """Every piece of a recording in one split; no split without a recording that is long enough."""
    splits = assign_splits([split_key(source, target) for source in long_enough])
    for source in sources:
        key = split_key(source, target)
        split = splits.setdefault(key, split_of(key))
        whole = [range(source.num_samples)] if single(source, target) else []
        source.pieces = [(window, split) for window in windows_of(source, target) or whole]


def split_by_time(sources: Sequence[Source], target: Format) -> None:
    """Train, validation and test follow each other in each recording, with a gap between."""
    rate, shortest = target.sample_rate, int(np.ceil(target.min_duration * target.sample_rate))
    gap = round(GAP * rate)
    limits = (target.min_duration, target.max_duration)
    for source in sources:
        held_out = max(shortest, round(TIME_PART * source.num_samples))
        train = source.num_samples - 2 * held_out - 2 * gap
        lengths = dict(zip(SPLITS, (train, held_out, held_out), strict=True))
        if train < shortest:
            lengths = {"train": source.num_samples}
        start = 0
        for split, length in lengths.items():
            windows = cut_windows(length, rate, *limits, key=f"{source.id} {split}")
            source.pieces += [(range(start + window.start, start + window.stop), split) for window in windows]
            start += length + gap
    if {split for source in sources for _, split in source.pieces} != set(SPLITS):
        longest = max((source.num_samples / rate for source in sources), default=0.0)
        raise UserError(
            f"{len(sources)} usable recordings, the longest of {longest:.1f} s: too little for a train, validation and"
            f" test split; expected 3 recordings of at least {target.min_duration:g} s, or one of at least"
            f" {3 * target.min_duration + 2 * GAP:g} s"
        )
    logger.info("%d recordings: split by time, with %.0f s left out between the splits", len(sources), GAP)


def piece_path(source: Source, window: range, output: Path, by_time: bool) -> Path:
    """Where a piece lies. Its name tells its place: first sample and length."""
    mark = "t" if by_time else ""
    return output / source.id / f"{source.id}-{mark}{window.start}-{len(window)}.flac"


def write_piece(
    source: Source, window: range, wav: np.ndarray, output: Path, target: Format, by_time: bool
) -> None:
    """Write samples `window` of a recording (C, N)."""
    path = piece_path(source, window, output, by_time)
    write_audio(path, wav[:, window.start : window.stop], target.sample_rate)


def build(
    sources: Sequence[Source], output: Path, target: Format, by_time: bool
) -> tuple[list[Recording], list[SupervisionSegment], list[Cut]]:
    """Describe all pieces; write those that are not there yet."""
    recordings: list[Recording] = []
    supervisions: list[SupervisionSegment] = []
    cuts: list[Cut] = []
    lost_texts = 0
    for source in sources:
        missing = [
            window for window, _ in source.pieces if not piece_path(source, window, output, by_time).is_file()
        ]
        if missing:
            wav = read_source(source.path, target)
            for window in missing:
                write_piece(source, window, wav, output, target, by_time)
        whole = single(source, target) and len(source.pieces) == 1
        lost_texts += source.text is not None and not whole
        for number, (window, split) in enumerate(source.pieces, start=1):
            path = piece_path(source, window, output, by_time)
            shape = (target.channels, len(window))
            recording = make_recording(f"{source.id}-{number:04d}", path, shape, target.sample_rate)
            supervision = make_supervision(recording, source.text if whole else None, None, None, split)
            custom = {"source": source.name, "source_start": window.start / target.sample_rate}
            recordings.append(recording)
            supervisions.append(supervision)
            if len(window) >= target.min_duration * target.sample_rate:
                cuts.append(make_cut(recording, supervision, "audio", custom=custom))
            if whole:
                cuts.append(
                    make_cut(recording, supervision, "utterance", f"{recording.id}-utterance", custom)
                )
    if lost_texts:
        logger.warning("%d transcripts not used: their recordings are cut in pieces", lost_texts)
    return recordings, supervisions, cuts


def remove_stale(output: Path, sources: Sequence[Source], recordings: Sequence[Recording]) -> None:
    """Delete pieces that no manifest names any more."""
    used = {Path(recording.sources[0].source) for recording in recordings}
    for path in output.glob("*/*.flac"):
        if path.resolve() not in used:
            path.unlink()


if __name__ == "__main__":
    run(main)
