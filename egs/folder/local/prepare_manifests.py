"""Stage 1: any audio files -> FLAC at the codec's rate, and lhotse manifests with splits.

Splits are disjoint by speaker where three or more are known; else by recording and sentence. One or two recordings are
split by time, with a gap between the splits. See entries.py for what is read and convert.py for how.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from convert import Format, Source, converted, piece_path, survey, whole_if_labelled, windows_of, write_piece
from entries import Entry, Skipped, folder_entries, manifest_entries, midi_problem, skipped_entry
from lhotse import Recording, SupervisionSegment
from lhotse.cut import Cut

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
    write_jsonl,
    write_manifests,
)
from valle.utils.command import run
from valle.utils.errors import UserError
from valle.utils.log import setup_logger
from valle.utils.progress import progress

logger = logging.getLogger("valle.egs.folder.manifests")

GAP = 1.0  # seconds left out between two splits of one recording
TIME_PART = 0.1  # of a recording that is split by time: validation, and test


@dataclass
class ManifestConfig:
    """Stage 1 of egs/folder"""

    audio_dir: str | None = option(None, "folder with recordings, searched with all folders below it")
    manifest: str | None = option(
        None, "CSV or JSON-lines file that names recordings, instead of --audio-dir"
    )
    data_dir: str = option("data", "folder of the recipe's output")
    codec: str = option(DEFAULT_CODEC, "codec, for its sample rate and channels")
    min_duration: float = option(5.0, "shortest cut, in seconds")
    max_duration: float = option(15.0, "longest cut, in seconds")
    num_jobs: int = option(2, "recordings that are converted at the same time")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    (config,) = parse("Manifests of your own recordings.", [ManifestConfig], argv)
    setup_logger()
    if not 0 < config.min_duration <= config.max_duration:
        raise UserError(
            f"--min-duration {config.min_duration:g} and --max-duration {config.max_duration:g}:"
            " expected 0 < minimum <= maximum, in seconds"
        )
    if config.num_jobs < 1:
        raise UserError(f"--num-jobs is {config.num_jobs}, expected 1 or more")
    if (config.audio_dir is None) == (config.manifest is None):
        raise UserError("expected either --audio-dir or --manifest")
    data_dir = Path(config.data_dir)
    if config.manifest is not None:
        entries, skipped = manifest_entries(Path(config.manifest))
        origin = f"--manifest '{config.manifest}'"
    else:
        entries, skipped = folder_entries(Path(config.audio_dir), data_dir), []
        origin = f"'{config.audio_dir}'"
    codec = load_codec(config.codec)
    target = Format(codec.sample_rate, codec.channels, config.min_duration, config.max_duration)
    try:
        prepare(entries, skipped, origin, data_dir, target, config.num_jobs)
    except OSError as error:  # what goes wrong with an input is listed and does not come here
        raise UserError(f"--data-dir '{data_dir}' cannot be written: {error.strerror or error}") from error


def prepare(
    entries: Sequence[Entry],
    skipped: list[Skipped],
    origin: str,
    data_dir: Path,
    target: Format,
    num_jobs: int,
) -> None:
    """Convert, split and describe; what cannot be used joins `skipped` and is listed."""
    output, listed = data_dir / "audio", len(entries) + len(skipped)
    entries = without_bad_midi(entries, skipped)
    ids = make_ids(entries)
    sources = convert_all(entries, ids, output, target, skipped, origin, num_jobs)
    by_time = assign(sources, target)
    write_jsonl(data_dir / "manifests" / "skipped.jsonl", skipped)
    recordings, supervisions, cuts = build(sources, output, target, by_time)
    write_manifests(data_dir / "manifests", "folder", recordings, supervisions, cuts)
    remove_stale(output, ids, recordings)
    for split in SPLITS:
        durations = [
            cut.duration for cut in cuts if cut.custom["split"] == split and cut.custom["kind"] == "audio"
        ]
        logger.info("%s: %d cuts, %.1f min", split, len(durations), sum(durations) / 60)
    if len(sources) < listed:
        logger.warning(
            "left out %d of %d files; reasons in %s",
            *(listed - len(sources), listed, data_dir / "manifests" / "skipped.jsonl"),
        )


def without_bad_midi(entries: Sequence[Entry], skipped: list[Skipped]) -> list[Entry]:
    """The entries, those with unusable MIDI without it: the sound is still good."""
    checked = []
    for entry in entries:
        problem = None if entry.midi is None else midi_problem(entry.midi)
        if problem is not None:
            reason = f"MIDI '{entry.midi}' {problem}; the recording is used without it"
            skipped.append(skipped_entry(entry, reason))
            logger.warning("%s: %s", entry.name, reason)
            entry = dataclasses.replace(entry, midi=None)
        checked.append(entry)
    return checked


def make_ids(entries: Sequence[Entry]) -> list[str]:
    """An identifier for each entry: its name, and start; where two would be equal, its suffix and a number."""
    ids: dict[str, None] = {}
    for entry in entries:
        stretch = f"-{round(1000 * entry.start)}ms" if entry.start else ""
        stem = entry.name[: len(entry.name) - len(entry.path.suffix)]
        candidate = file_id(stem + stretch)
        if candidate in ids:
            candidate = file_id(entry.name + stretch)
        number = 2
        unnumbered = candidate
        while candidate in ids:
            candidate = f"{unnumbered}-{number}"
            number += 1
        ids[candidate] = None
    return list(ids)


def convert_all(
    entries: Sequence[Entry],
    ids: Sequence[str],
    output: Path,
    target: Format,
    skipped: list[Skipped],
    origin: str,
    num_jobs: int,
) -> list[Source]:
    """Read every file once, and write its pieces; what cannot be used goes to `skipped`."""
    sources: list[Source] = []
    seen: dict[str, str] = {}
    records = progress(
        survey_all(entries, ids, output, target, num_jobs), desc="convert", unit="file", total=len(entries)
    )
    for entry, source_id, record in zip(entries, ids, records, strict=True):
        reason = record["reason"]
        if reason is None and record["content"] in seen:
            reason = f"same content as '{seen[record['content']]}'"
        if reason is None:
            source = Source(source_id, entry, record["num_samples"], record["content"])
            if not windows_of(source, target) and not whole_if_labelled(source):
                duration = source.num_samples / target.sample_rate
                reason = f"{duration:.2f} s, shorter than --min-duration {target.min_duration:g}"
        if reason is not None:
            skipped.append(skipped_entry(entry, reason))
            continue
        seen[record["content"]] = entry.name
        sources.append(source)
    if not sources:
        raise UserError(
            f"none of the {len(entries)} files in {origin} can be used; the first: '{skipped[0]['path']}':"
            f" {skipped[0]['reason']}"
        )
    return sources


def survey_all(
    entries: Sequence[Entry], ids: Sequence[str], output: Path, target: Format, num_jobs: int
) -> Iterator[dict[str, Any]]:
    """The records in order, however many are made at once. Decoding, resampling and FLAC leave Python's lock."""
    executor = ThreadPoolExecutor(num_jobs)
    try:
        yield from executor.map(lambda entry, name: survey(entry, name, output, target), entries, ids)
    finally:
        executor.shutdown(cancel_futures=True)


def single(source: Source, target: Format) -> bool:
    """Whether the recording is one clip, with its transcript, of at most the longest duration."""
    short = source.num_samples <= target.max_duration * target.sample_rate
    return source.entry.text is not None and short


def sentence_of(source: Source, target: Format) -> str:
    """What is said, where that is known and the clip is used with it; else ""."""
    return normalize_text(source.entry.text or "") if single(source, target) else ""


def grouping(sources: Sequence[Source], target: Format) -> Callable[[Source], str] | None:
    """What falls together in one split: the first that gives three groups or more of the recordings.

    A speaker's recordings; equal sentences and the stretches of a file; each stretch of its own.

    Returns:
        A source's group, or None: one or two recordings that are no stretches.
    """
    stretches = Counter(source.entry.name for source in sources)

    def by_file(source: Source) -> str:
        return f"file {source.entry.name}"

    def by_speaker(source: Source) -> str:
        return f"speaker {source.entry.speaker}" if source.entry.speaker else by_file(source)

    def by_content(source: Source) -> str:
        sentence = sentence_of(source, target) if stretches[source.entry.name] == 1 else ""
        return f"text {sentence}" if sentence else by_file(source)

    def by_stretch(source: Source) -> str:
        return f"{by_file(source)} from {source.entry.start:g} s on"

    long_enough = [source for source in sources if windows_of(source, target)]
    speakers = {source.entry.speaker for source in long_enough if source.entry.speaker}
    choices = [by_speaker] if len(speakers) >= len(SPLITS) else []
    for choice in [*choices, by_content, by_stretch]:
        if len({choice(source) for source in long_enough}) >= len(SPLITS):
            if choice is not by_stretch or len(stretches) < len(sources):
                return choice
    return by_content if any(source.entry.split for source in sources) else None


def assign(sources: Sequence[Source], target: Format) -> bool:
    """Give every source its pieces, each in a split.

    Where nothing can be grouped, train, validation and test follow each other within the recordings.

    Returns:
        Whether it was split by time.
    """
    group_of = grouping(sources, target)
    long_enough = [source for source in sources if windows_of(source, target)]
    if group_of is None:
        split_by_time(long_enough, target)
        return True
    # Rows that say their split decide on it, and on that of what falls together with them.
    given = {group_of(source): source.entry.split for source in sources if source.entry.split}
    assigned = {} if given else assign_splits([group_of(source) for source in long_enough])
    for source in sources:
        group = group_of(source)
        split = source.entry.split or given.get(group) or assigned.get(group) or split_of(group)
        pieces = windows_of(source, target) or whole_if_labelled(source)
        source.pieces = [(window, split) for window in pieces]
    for split in SPLITS:
        if not any(split in splits_of(source) for source in long_enough):
            raise UserError(
                f"the manifest's column split leaves no recording of at least {target.min_duration:g} s for {split};"
                " name some, or leave the column out"
            )
    return False


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
            f" test split; expected 3 recordings of at least {target.min_duration:g} s (--min-duration), or one of at"
            f" least {3 * target.min_duration + 2 * GAP:g} s"
        )
    logger.info("%d recordings: split by time, with %.0f s left out between the splits", len(sources), GAP)


def build(
    sources: Sequence[Source], output: Path, target: Format, by_time: bool
) -> tuple[list[Recording], list[SupervisionSegment], list[Cut]]:
    """Describe all pieces; write those that are not there yet."""
    recordings: dict[str, Recording] = {}
    supervisions: list[SupervisionSegment] = []
    cuts: list[Cut] = []
    lost_texts = shared_sentences = 0
    trained = {sentence_of(source, target) for source in sources if ("train" in splits_of(source))} - {""}
    for source in sources:
        missing = [
            window for window, _ in source.pieces if not piece_path(source, window, output, by_time).is_file()
        ]
        if missing:
            with converted(source.entry, output / source.id, target) as wav:
                for window in missing:
                    write_piece(source, window, wav, output, target, by_time)
        whole = single(source, target) and len(source.pieces) == 1
        lost_texts += source.entry.text is not None and not whole
        shared = whole and "train" not in splits_of(source) and sentence_of(source, target) in trained
        shared_sentences += shared
        for number, (window, split) in enumerate(source.pieces, start=1):
            cut_id = f"{source.id}-{number:04d}"
            path = piece_path(source, window, output, by_time)
            recording, supervision, custom = describe(source, cut_id, path, window, split, whole, target)
            recordings[recording.id] = recording
            supervisions.append(supervision)
            kinds = ["audio"] if len(window) >= target.min_duration * target.sample_rate else []
            kinds += ["utterance"] if (whole and not shared) or source.entry.midi is not None else []
            for kind in kinds:
                name = cut_id if kind == "audio" else f"{cut_id}-utterance"
                cuts.append(placed(make_cut(recording, supervision, kind, name, custom)))
    if lost_texts:
        logger.warning("%d transcripts not used: their recordings are cut in pieces", lost_texts)
    if shared_sentences:
        logger.warning(
            "%d held-out transcripts not used: a recording in train says the same", shared_sentences
        )
    return list(recordings.values()), supervisions, cuts


def splits_of(source: Source) -> set[str]:
    """The splits that a source's pieces are in."""
    return {split for _, split in source.pieces}


def describe(
    source: Source, cut_id: str, path: Path, window: range, split: str, whole: bool, target: Format
) -> tuple[Recording, SupervisionSegment, dict[str, Any]]:
    """The recording that a piece lies in, the piece's supervision in it, and what its cuts are to carry."""
    entry = source.entry
    custom: dict[str, Any] = {"source": entry.name}
    if entry.midi is None:
        recording = make_recording(cut_id, path, (target.channels, len(window)), target.sample_rate)
        custom["source_start"] = entry.start + window.start / target.sample_rate
    else:
        # The notes are timed from the recording's first sample: cuts point into it.
        recording = make_recording(source.id, path, (target.channels, source.num_samples), target.sample_rate)
        custom |= {"source_start": 0.0, "midi": str(entry.midi.absolute())}
    text = entry.text if whole else None
    supervision = make_supervision(recording, text, entry.speaker, entry.language, split)
    if entry.midi is not None:
        supervision.id = cut_id
        supervision.start, supervision.duration = (
            window.start / target.sample_rate,
            len(window) / target.sample_rate,
        )
    return recording, supervision, custom


def placed(cut: Cut) -> Cut:
    """A cut over a whole recording, narrowed to its supervision, where that is a part of it."""
    (supervision,) = cut.supervisions
    if supervision.start or supervision.duration != cut.duration:
        cut.start, cut.duration = supervision.start, supervision.duration
        cut.supervisions = [supervision.with_offset(-supervision.start)]
    return cut


def remove_stale(output: Path, ids: Sequence[str], recordings: Sequence[Recording]) -> None:
    """Delete pieces that no manifest names any more, and the records of files that are gone."""
    used = {Path(recording.sources[0].source) for recording in recordings}
    for path in output.glob("*/*.flac"):
        if path.resolve() not in used:
            path.unlink()
    known = set(ids)
    for path in output.glob("*.json"):
        if path.name.removesuffix(".json") not in known:
            path.unlink()
    for path in output.glob("*"):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


if __name__ == "__main__":
    run(main)
