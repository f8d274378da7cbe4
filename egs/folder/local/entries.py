"""What there is to prepare: the recordings in a folder with the files beside them, or the rows of a manifest.

A manifest is a table (CSV with a line of column names) or JSON lines, with the columns of `COLUMNS`. Relative paths
count from the manifest's own folder.
"""

import csv
import io
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from valle.data.manifests import SPLITS
from valle.utils.errors import UserError

COLUMNS = ("path", "duration", "text", "speaker", "start", "language", "split", "midi")
SPLIT_NAMES = {**{split: split for split in SPLITS}, "dev": "validation", "valid": "validation"}
SUFFIXES = (
    *(
        ".wav",
        ".flac",
        ".ogg",
        ".oga",
        ".opus",
        ".mp3",
        ".m4a",
        ".aac",
        ".aif",
        ".aiff",
        ".aifc",
        ".caf",
        ".w64",
    ),
    *(".wma", ".amr", ".webm", ".mka", ".mp4"),
)
MIDI_SUFFIXES = (".mid", ".midi", ".MID", ".MIDI")
Skipped = dict[str, str | int]  # path, reason, and of a manifest's row its line


@dataclass(frozen=True)
class Entry:
    """One recording, or a stretch of one, and what is known about it."""

    path: Path
    name: str  # as manifests and messages call it
    text: str | None = None
    speaker: str | None = None
    language: str | None = None
    split: str | None = None
    midi: Path | None = None  # its time 0 is the file's first sample
    start: float = 0.0  # seconds
    duration: float | None = None  # seconds; None: to the end
    line: int | None = None  # of the manifest


class _UnusableRow(Exception):
    """One row cannot be used; the others can."""


def clean(text: str) -> str:
    """Text that can be written as UTF-8: a file name may hold bytes that are none."""
    return text.encode("utf-8", "backslashreplace").decode()


def skipped_entry(entry: Entry, reason: str) -> Skipped:
    """A line of skipped.jsonl."""
    line: Skipped = {} if entry.line is None else {"line": entry.line}
    return {"path": entry.name, "reason": clean(reason), **line}


def folder_entries(audio_dir: Path, data_dir: Path) -> list[Entry]:
    """Every recording below a folder: clip.txt beside clip.wav is its transcript, clip.mid or clip.midi its score.

    Raises:
        UserError: no such folder, or no recording in it.
    """
    entries = []
    for path in list_audio(audio_dir, data_dir):
        candidates = (path.with_suffix(suffix) for suffix in MIDI_SUFFIXES)
        midi = next((candidate for candidate in candidates if candidate.is_file()), None)
        name = clean(path.relative_to(audio_dir).as_posix())
        entries.append(Entry(path, name, text=_read_text(path.with_suffix(".txt")), midi=midi))
    return entries


def list_audio(audio_dir: Path, data_dir: Path) -> list[Path]:
    """Audio files below `audio_dir`, in order, without hidden ones and without the recipe's own output.

    Links to folders are followed. Folders that are named like a recording or cannot be searched are listed too, so
    that whoever reads them says what is wrong.

    Raises:
        UserError: no such folder, or no audio file in it.
    """
    if not audio_dir.is_dir():
        raise UserError(f"--audio-dir '{audio_dir}' is not a folder")
    output = data_dir.resolve()
    files: list[Path] = []
    folders: list[Path] = []
    visited: set[str] = set()  # a link may lead back
    unreadable: list[OSError] = []
    for folder, subfolders, names in os.walk(audio_dir, onerror=unreadable.append, followlinks=True):
        place = os.path.realpath(folder)
        if place in visited or Path(place) == output:
            subfolders.clear()
            continue
        visited.add(place)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        folders += [Path(folder) / name for name in subfolders if _has_audio_suffix(name)]
        files += [
            Path(folder) / name for name in names if not name.startswith(".") and _has_audio_suffix(name)
        ]
    if not files:
        raise UserError(f"--audio-dir '{audio_dir}' holds no audio file ({', '.join(SUFFIXES)})")
    return sorted({*files, *folders, *(Path(error.filename) for error in unreadable)})


def manifest_entries(manifest: Path) -> tuple[list[Entry], list[Skipped]]:
    """The rows of a CSV or JSON-lines manifest.

    Returns:
        Rows, and those that are unusable with the reason. Whether the files are there is not looked at.

    Raises:
        UserError: no such file, it is no text, it has unknown columns or no `path`, or no usable row.
    """
    try:
        content = manifest.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"--manifest '{manifest}' cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"--manifest '{manifest}' is no UTF-8 text ({error.reason}); save it as UTF-8"
        ) from error
    json_lines = manifest.suffix.lower() in (".jsonl", ".json", ".ndjson") or content.lstrip()[:1] == "{"
    entries: list[Entry] = []
    skipped: list[Skipped] = []
    for line, row in _json_rows(content) if json_lines else _csv_rows(manifest, content):
        try:
            if isinstance(row, str):
                raise _UnusableRow(row)
            _check_columns(manifest, row, line)
            entries.append(_entry(manifest.parent, row, line))
        except _UnusableRow as problem:
            path = row.get("path") if isinstance(row, dict) else None
            skipped.append({"path": clean(str(path or "")), "reason": clean(str(problem)), "line": line})
    if not entries:
        first = f"; line {skipped[0]['line']}: {skipped[0]['reason']}" if skipped else "; it is empty"
        raise UserError(f"--manifest '{manifest}' has no usable row{first}")
    return entries, skipped


def midi_problem(path: Path) -> str | None:
    """Why a MIDI file cannot be used, or None."""
    try:
        with open(path, "rb") as file:
            start = file.read(12)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    if start[:4] != b"MThd" and (start[:4], start[8:]) != (b"RIFF", b"RMID"):
        return "is no MIDI file"
    if clean(str(path.absolute())) != str(path.absolute()):
        return "its name is no UTF-8 text; rename it"
    return None


def _has_audio_suffix(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES


def _csv_rows(manifest: Path, content: str) -> Iterator[tuple[int, dict[str, str] | str]]:
    """(line, row or what is wrong with it) of a table whose columns are parted by comma, tab or semicolon."""
    header = content.split("\n", 1)[0]
    delimiter = max(",\t;", key=header.count)
    rows = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, skipinitialspace=True)
    columns: list[str] | None = None
    try:
        for row in rows:
            if not any(row):
                continue
            if columns is None:
                columns = [name.strip().lower() for name in row]
                _check_columns(manifest, dict.fromkeys(columns, ""), rows.line_num)
                if len(set(columns)) < len(columns):
                    raise UserError(f"--manifest '{manifest}': a column occurs twice in '{header.strip()}'")
            elif len(row) != len(columns):
                yield (
                    rows.line_num,
                    f"{len(row)} fields, expected {len(columns)}; text with '{delimiter}' needs quotes",
                )
            else:
                yield rows.line_num, dict(zip(columns, row, strict=True))
    except csv.Error as error:
        raise UserError(f"--manifest '{manifest}', line {rows.line_num}: {error}") from error


def _json_rows(content: str) -> Iterator[tuple[int, dict[str, object] | str]]:
    """(line, row or what is wrong with it) of JSON lines."""
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, f"no JSON ({error})"
            continue
        yield number, row if isinstance(row, dict) else "no JSON object"


def _check_columns(manifest: Path, row: dict[str, object], line: int) -> None:
    unknown = [name for name in row if name not in COLUMNS]
    known = f"known are {', '.join(COLUMNS)}"
    if unknown:
        raise UserError(
            f"--manifest '{manifest}', line {line}: unknown column '{unknown[0]}'; {known}; rename or remove it"
        )
    if "path" not in row:
        raise UserError(f"--manifest '{manifest}', line {line}: no column 'path'; {known}")


def _entry(folder: Path, row: dict[str, object], line: int) -> Entry:
    fields = {name: _text(row, name) for name in COLUMNS if name not in ("start", "duration")}
    path, midi, split = fields["path"], fields["midi"], fields["split"]
    if path is None:
        raise _UnusableRow("path is empty")
    if "\0" in path + (midi or ""):
        raise _UnusableRow("a path holds a zero byte")
    if split is not None and split.lower() not in SPLIT_NAMES:
        raise _UnusableRow(f"split is '{split}', expected {', '.join(SPLITS)}")
    start, duration = _seconds(row, "start") or 0.0, _seconds(row, "duration")
    if duration == 0:
        raise _UnusableRow("duration is 0 s")
    if midi is not None and start:
        raise _UnusableRow(
            "start and midi together: MIDI times count from the file's first sample; leave out start"
        )
    return Entry(
        path=folder / path,
        name=clean(path),
        text=_words(fields["text"]),
        speaker=_words(fields["speaker"]),
        language=_words(fields["language"]),
        split=None if split is None else SPLIT_NAMES[split.lower()],
        midi=None if midi is None else folder / midi,
        start=start,
        duration=duration,
        line=line,
    )


def _text(row: dict[str, object], name: str) -> str | None:
    """A field as text; None where it is absent or empty. JSON may have numbers, as in `"speaker": 17`."""
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _UnusableRow(f"{name} is {json.dumps(value)[:50]}, expected text")
    return str(value).strip() or None


def _seconds(row: dict[str, object], name: str) -> float | None:
    value = row.get(name)
    if value is None or value == "":
        return None
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise _UnusableRow(f"{name} is {value!r}, expected seconds, 0 or more")
    return seconds


def _read_text(path: Path) -> str | None:
    """The words of a text file, or None where it is absent or holds none."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError:
        return None
    return _words(text)


def _words(text: str | None) -> str | None:
    """Text with single spaces; None where there is no word."""
    return " ".join(clean(text or "").split()) or None
