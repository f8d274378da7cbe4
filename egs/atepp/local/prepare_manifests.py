"""Stage 1: ATEPP's MIDI with the user's recordings, or played with a SoundFont -> FLAC, manifests with splits."""

import csv
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from egs.shared.piano import (
    AUDIO_SUFFIXES,
    FileIndex,
    Piece,
    assign_piece_splits,
    audio_format,
    limit_pieces,
    piece_id,
    prepare,
)
from valle.config import option, parse
from valle.data.rendering import MIDI_SUFFIXES, make_renderer
from valle.utils.command import run
from valle.utils.errors import UserError
from valle.utils.log import setup_logger

logger = logging.getLogger("valle.egs.atepp.manifests")

UNLABELLED = "unlabelled"  # what a studio recording without remarks is called in --quality
NEEDED = ("midi_path", "composer", "composition_id")


@dataclass
class ManifestConfig:
    """Stage 1 of egs/atepp"""

    data_dir: str = option("data", "folder of the recipe's output")
    audio_dir: str | None = option(None, "your recordings; without it, the MIDI is played with a SoundFont")
    soundfont: str | None = option(None, ".sf2 or .sf3 file (default: one that is installed)")
    engine: str | None = option(
        None, "what plays MIDI (default: fluidsynth if installed)", ["fluidsynth", "tinysoundfont"]
    )
    quality: str = option(
        f"{UNLABELLED},high quality",
        "the metadata's quality labels to keep, with commas; all: whatever it is",
    )
    split_by: str = option(
        "auto",
        "metadata: its split column; composition: a composition in one split; auto: the column if there is one",
        ["auto", "metadata", "composition"],
    )
    limit: int = option(0, "so many pieces, for a quick look; 0: all")
    codec: str = option("encodec_32khz", "codec, for its sample rate and channels")
    train_codec: bool = option(False, "the codec is the recipe's own, which is trained later")
    min_duration: float = option(5.0, "shortest cut, in seconds")
    max_duration: float = option(15.0, "longest cut, in seconds")
    check_clock: bool = option(True, "leave out recordings whose onsets do not fit their MIDI's")
    jobs: int = option(2, "pieces that are converted at the same time")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    (config,) = parse("Manifests of ATEPP.", [ManifestConfig], argv)
    setup_logger()
    data_dir = Path(config.data_dir)
    target = audio_format(
        *(config.codec, config.train_codec, config.min_duration, config.max_duration, config.check_clock)
    )
    recordings = None
    if config.audio_dir:
        folder = Path(config.audio_dir)
        if not folder.is_dir():
            raise UserError(f"--audio-dir '{folder}' is not a folder")
        recordings = FileIndex(folder, AUDIO_SUFFIXES)
        if recordings.count == 0:
            raise UserError(f"--audio-dir '{folder}' holds no audio file ({', '.join(AUDIO_SUFFIXES)})")
    renderer = None if recordings else make_renderer(config.soundfont, config.engine)
    if renderer:
        logger.info("playing the MIDI files with %s and '%s'", renderer.engine, renderer.soundfont)
    rows = read_metadata(data_dir / "download" / "metadata.csv")
    skipped: list[dict[str, str]] = []
    kept = list(keep_quality(rows, config.quality, skipped))
    midi = FileIndex(data_dir / "download" / "midi", MIDI_SUFFIXES)
    pieces = list(pair(kept, midi, recordings, skipped))
    if not pieces:
        raise UserError(
            f"none of the {len(kept)} performances of the metadata has its files; the first:"
            f" {skipped[-len(kept)]['id']}: {skipped[-len(kept)]['reason']}"
        )
    known = {piece.id for piece in pieces}
    pieces = limit_pieces(assign_piece_splits(pieces, config.split_by), config.limit)
    prepare(pieces, "atepp", data_dir, target, renderer, config.jobs, skipped, known)


def read_metadata(path: Path) -> list[dict[str, str]]:
    """The rows of ATEPP-metadata-1.x.csv.

    Raises:
        UserError: no file, no table of this layout, or an empty one.
    """
    if not path.is_file():
        raise UserError(f"'{path}' does not exist; run prepare.sh --stage 0")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"metadata '{path}' is no CSV table in UTF-8 ({error})") from error
    lacking = [name for name in NEEDED if name not in (reader.fieldnames or [])]
    if lacking or not rows:
        what = f"no column {', '.join(lacking)}" if lacking else "no rows"
        raise UserError(f"metadata '{path}' has {what}; expected ATEPP-metadata-1.2.csv")
    return [{key: value or "" for key, value in row.items() if isinstance(key, str)} for row in rows]


def performance(row: dict[str, str]) -> str:
    """The identifier of a performance: perf_id, which is also its MIDI file's name."""
    return row.get("perf_id", "").strip() or Path(row["midi_path"]).stem


def keep_quality(
    rows: Sequence[dict[str, str]], wanted: str, skipped: list[dict[str, str]]
) -> Iterator[dict[str, str]]:
    """The rows all of whose labels are `wanted`; the others go to `skipped`.

    Raises:
        UserError: a label that no row has, or nothing is left.
    """
    labels = [[label.strip() for label in row.get("quality", "").split(",") if label.strip()] for row in rows]
    labels = [found or [UNLABELLED] for found in labels]
    counts = Counter(label for found in labels for label in found)
    keep = {name.strip() for name in wanted.split(",") if name.strip()}
    logger.info("quality labels: %s", ", ".join(f"{name} {count}" for name, count in counts.most_common()))
    if keep == {"all"}:
        keep = set(counts)
    elif not keep & set(counts):
        raise UserError(f"--quality '{wanted}' keeps nothing; the labels are {', '.join(sorted(counts))}")
    for row, found in zip(rows, labels, strict=True):
        if set(found) <= keep:
            yield row
        else:
            skipped.append({"id": performance(row), "reason": f"quality: {', '.join(found)}"})


def pair(
    rows: Sequence[dict[str, str]],
    midi: FileIndex,
    recordings: FileIndex | None,
    skipped: list[dict[str, str]],
) -> Iterator[Piece]:
    """The performances whose files are there; the others go to `skipped`."""
    seen: set[str] = set()
    for row in rows:
        name, path = performance(row), str(Path(row["midi_path"]).with_suffix(""))
        scores = midi.find(path, name)
        reason = _why_not(scores, "MIDI file", row["midi_path"])
        audio = None
        if reason is None and recordings is not None:
            found = recordings.find(path, name, Path(path).name)
            reason = _why_not(found, "recording", f"{path} or {name}, of any audio suffix")
            audio = found[0] if found else None
        if reason is None and name in seen:
            reason = "occurs twice in the metadata"
        if reason is not None:
            skipped.append({"id": name, "reason": reason})
            continue
        seen.add(name)
        custom = {"composer": row["composer"], "title": row.get("track", ""), "performance": name}
        yield Piece(
            id=piece_id("atepp", name),
            midi=scores[0],
            audio=audio,
            composition=f"{row['composer']} {row['composition_id']}",
            split=row.get("split", "").strip() or None,
            performer=row.get("artist", "").strip() or None,
            custom=custom,
        )


def _why_not(found: Sequence[Path], what: str, name: str) -> str | None:
    if not found:
        return f"no {what} ({name})"
    return f"{len(found)} {what}s fit: {found[0]}, {found[1]}" if len(found) > 1 else None


if __name__ == "__main__":
    run(main)
