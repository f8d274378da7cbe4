"""Stage 0: the user's download of ATEPP, unpacked: data/download/midi and data/download/metadata.csv."""

import json
import shutil
import stat
import tempfile
import unicodedata
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from valle.config import option, parse
from valle.data.rendering import MIDI_SUFFIXES
from valle.utils.command import run
from valle.utils.errors import UserError
from valle.utils.files import atomic_path, write_json
from valle.utils.progress import progress

WHERE = (
    "the link to version 1.2 (212 MB) is in disclaimer.md of https://github.com/tangjjbetsy/ATEPP, together with"
    " ATEPP-metadata-1.2.csv"
)


@dataclass
class UnpackConfig:
    """Stage 0 of egs/atepp"""

    midi_archive: str | None = option(None, "ATEPP-1.2.zip, or the folder that it was unpacked in")
    metadata: str | None = option(None, "ATEPP-metadata-1.2.csv (default: the one in the archive)")
    data_dir: str = option("data", "folder of the recipe's output")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    (config,) = parse("Unpack the ATEPP download.", [UnpackConfig], argv)
    folder = Path(config.data_dir) / "download"
    midi, metadata = folder / "midi", folder / "metadata.csv"
    if config.midi_archive:
        place(Path(config.midi_archive), midi)
    elif not midi.is_dir():
        raise UserError(f"--midi-archive is missing: {WHERE}")
    if config.metadata:
        source = Path(config.metadata)
        if not source.is_file():
            raise UserError(f"--metadata '{source}' does not exist; {WHERE}")
        copy(source, metadata)
    elif config.midi_archive or not metadata.is_file():
        found = sorted(midi.rglob("ATEPP-metadata*.csv"))
        if not found:
            raise UserError(f"--metadata is missing, and the archive holds no ATEPP-metadata CSV; {WHERE}")
        copy(found[-1], metadata)
    count = sum(path.suffix.lower() in MIDI_SUFFIXES for path in midi.rglob("*"))
    print(f"{count} MIDI files in {midi}")


def place(source: Path, target: Path) -> None:
    """Unpack an archive as `target`, or link a folder there, unless that was done."""
    done = target.parent / "unpacked.json"
    if source.is_dir():
        if target.is_symlink() and target.resolve() == source.resolve():
            return
        _remove(target)
        done.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source.resolve(), target_is_directory=True)
        return
    if not source.is_file():
        raise UserError(f"--midi-archive '{source}' does not exist; {WHERE}")
    status = source.stat()
    now = {"archive": source.name, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    try:
        if target.is_dir() and json.loads(done.read_text()) == now:
            return
    except (OSError, ValueError):
        pass
    done.unlink(missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(".unpacking-*"):  # of a run that was killed
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=target.parent) as folder:
        unpack(source, Path(folder) / "midi")
        _remove(target)
        (Path(folder) / "midi").rename(target)
    write_json(done, now)


def copy(source: Path, target: Path) -> None:
    """Copy a small file, unless `target` has its content already."""
    content = source.read_bytes()
    if not target.is_file() or target.read_bytes() != content:
        with atomic_path(target) as temporary:
            temporary.write_bytes(content)


def unpack(archive: Path, target: Path) -> None:
    """Unpack the MIDI and CSV files of a zip archive.

    Raises:
        UserError: no zip archive, a damaged one, one without MIDI files, or one with names that lead elsewhere.
    """
    wanted = (*MIDI_SUFFIXES, ".csv")
    count = 0
    try:
        with zipfile.ZipFile(archive) as contents:
            for item in progress(contents.infolist(), desc="unpack", unit="file"):
                name = member_name(item, archive)
                if item.is_dir() or name.suffix.lower() not in wanted or _hidden(name):
                    continue
                path = target / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with contents.open(item) as source, open(path, "wb") as output:
                    shutil.copyfileobj(source, output)
                count += name.suffix.lower() in MIDI_SUFFIXES
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"'{archive}' is no whole zip archive ({error}); download it again: {WHERE}"
        ) from error
    if count == 0:
        raise UserError(f"'{archive}' holds no MIDI file; {WHERE}")


def member_name(item: zipfile.ZipInfo, archive: Path) -> PurePosixPath:
    """The relative path of an archive's member, its letters composed.

    Raises:
        UserError: it leads out of the folder that the archive is unpacked in, or is a link.
    """
    name = item.filename
    if not item.flag_bits & 0x800:
        # zip's old encoding; macOS and unzip write UTF-8 without saying so
        try:
            name = name.encode("cp437").decode("utf-8")
        except UnicodeError:
            pass
    path = PurePosixPath(unicodedata.normalize("NFC", name.replace("\\", "/")))
    link = stat.S_ISLNK(item.external_attr >> 16)
    drive = len(path.parts) > 0 and len(path.parts[0]) == 2 and path.parts[0].endswith(":")
    if path.is_absolute() or ".." in path.parts or link or drive or "\0" in name:
        raise UserError(
            f"'{archive}': its member '{item.filename}' would be written outside of the folder; this is no archive"
            f" of ATEPP: {WHERE}"
        )
    return path


def _hidden(name: PurePosixPath) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.parts)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


if __name__ == "__main__":
    run(main)
