"""Convert recordings to FLAC at the codec's rate, in pieces, without ever holding one in memory.

A file is decoded and resampled block by block into a temporary file of 16-bit samples beside its pieces, and cut from
there: only at its end is it known whether it is sound, and how long it is. Each leaves a small record
(data/audio/<id>.json), so a killed run goes on where it stopped and a changed file is converted anew.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from entries import Entry, clean

from valle.data.manifests import cut_windows, write_audio
from valle.utils.audio import AudioReader, convert_blocks
from valle.utils.errors import UserError
from valle.utils.files import write_json

MIN_LEVEL = -90.0  # dBFS, RMS over a recording; below it there is nothing but dither
MAX_PEAK = 16.0  # of float files, where 1 is full scale: 24 dB above it nothing is left but noise
SHORTFALL = 0.5  # seconds that a stretch of a manifest may reach beyond its file's end
FULL_SCALE = 32767


@dataclass
class Format:
    """What every piece is converted to, and how long it may be."""

    sample_rate: int
    channels: int
    min_duration: float
    max_duration: float


@dataclass
class Source:
    """One usable recording."""

    id: str
    entry: Entry
    num_samples: int  # at the target rate
    content: str  # digest of its bytes, and the stretch: equal for equal sound
    pieces: list[tuple[range, str]] = field(default_factory=list)  # samples, split


def survey(entry: Entry, source_id: str, output: Path, target: Format) -> dict[str, Any]:
    """A recording's record: num_samples at the target rate and content, or the reason why it cannot be used.

    Reads the file only when there is no record of it as it is now; then writes its pieces, too.
    """
    record_path = output / f"{source_id}.json"
    try:
        status = entry.path.stat()
    except OSError as error:  # a link that leads nowhere
        return {"reason": f"cannot be read ({error.strerror or error})"}
    now = {
        "source": entry.name,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "stretch": [entry.start, entry.duration],
        "midi": entry.midi is not None,
        "format": vars(target),
    }
    try:
        record = json.loads(record_path.read_text())
        if all(record[key] == value for key, value in now.items()):
            return record
    except (OSError, ValueError, KeyError, TypeError):
        pass
    record_path.unlink(missing_ok=True)
    shutil.rmtree(output / source_id, ignore_errors=True)
    try:
        with converted(entry, output / source_id, target) as wav:
            source = Source(source_id, entry, wav.shape[1], "")
            for window in windows_of(source, target) or whole_if_labelled(source):
                write_piece(source, window, wav, output, target, by_time=False)
            content = f"{file_sha1(entry.path, status.st_mtime_ns)} {entry.start} {entry.duration}"
            record = {**now, "reason": None, "num_samples": wav.shape[1], "content": content}
    except UserError as error:
        reason = str(error).removeprefix("audio file ").removeprefix(f"'{entry.path}' ")
        record = {**now, "reason": clean(reason)}
    write_json(record_path, record)
    return record


@contextlib.contextmanager
def converted(entry: Entry, folder: Path, target: Format) -> Iterator[np.ndarray]:
    """(C, N) int16 samples of a recording at the target's rate and channels, mapped from a temporary file.

    Raises:
        UserError: it cannot be read, or there is nothing to use in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".converted"
    squares, peak, num_samples = 0.0, 0.0, 0
    try:
        with AudioReader(entry.path, entry.start, entry.duration) as reader, open(path, "wb") as file:
            for block in convert_blocks(reader, reader.sample_rate, target.sample_rate, target.channels):
                if block.size == 0:
                    continue
                peak = max(peak, float(np.abs(block).max()))
                squares += float(np.square(block, dtype=np.float64).sum())
                num_samples += block.shape[1]
                samples = np.rint(np.clip(block, -1.0, 1.0) * FULL_SCALE).astype(np.int16)
                file.write(np.ascontiguousarray(samples.T))
        _check_sound(
            entry, num_samples / target.sample_rate, squares / max(num_samples * target.channels, 1), peak
        )
        yield np.memmap(path, np.int16, "r", shape=(num_samples, target.channels)).T
    finally:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # there are pieces in it
            folder.rmdir()


def _check_sound(entry: Entry, seconds: float, power: float, peak: float) -> None:
    if seconds == 0:
        raise UserError("no samples are left at the codec's sample rate")
    if peak > MAX_PEAK:
        raise UserError(f"samples up to {peak:.4g}, expected -1 to 1; export it again")
    if 10 * np.log10(power + 1e-24) < MIN_LEVEL:
        raise UserError("silent")
    if entry.duration is not None and seconds < entry.duration - SHORTFALL:
        raise UserError(
            f"the manifest says {entry.duration:g} s from {entry.start:g} s on, but only {seconds:.2f} s are there"
        )


def windows_of(source: Source, target: Format) -> list[range]:
    """The pieces of a whole recording."""
    limits = (target.min_duration, target.max_duration)
    return cut_windows(source.num_samples, target.sample_rate, *limits, key=source.id)


def whole_if_labelled(source: Source) -> list[range]:
    """A recording that is too short for a piece is one if it has a transcript or a score."""
    labelled = source.entry.text is not None or source.entry.midi is not None
    return [range(source.num_samples)] if labelled else []


def piece_path(source: Source, window: range, output: Path, by_time: bool) -> Path:
    """Where a piece lies. Its name tells its place: first sample and length.

    A recording with MIDI is one file: its notes are timed from its first sample, and cuts only point into it.
    """
    if source.entry.midi is not None:
        return output / source.id / f"{source.id}.flac"
    mark = "t" if by_time else ""
    return output / source.id / f"{source.id}-{mark}{window.start}-{len(window)}.flac"


def write_piece(
    source: Source, window: range, wav: np.ndarray, output: Path, target: Format, by_time: bool
) -> None:
    """Write samples `window` of a recording (C, N), or all of it where it has MIDI."""
    path = piece_path(source, window, output, by_time)
    if source.entry.midi is None:
        write_audio(path, wav[:, window.start : window.stop], target.sample_rate)
    elif not path.is_file():
        write_audio(path, wav, target.sample_rate)


@lru_cache(maxsize=64)
def file_sha1(path: Path, mtime_ns: int) -> str:
    """Digest of a file's bytes; once for all stretches of a file that stays as it is."""
    digest = hashlib.sha1()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror or error})") from error
    return digest.hexdigest()
