"""Stage 0 of recipes whose corpus is one archive or several: link what the user has, unpack it, or download it.

A part of a corpus is either whole under its folder or not there: it is unpacked beside it first, then renamed.
"""

import logging
import os
import shutil
import socket
import tarfile
import threading
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from valle.utils.errors import UserError

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0


@dataclass(frozen=True)
class CorpusPart:
    """What comes in one archive.

    Args:
        folder: where it lies below the download folder, as "LibriTTS/dev-clean".
        content: files and folders in `folder` by which it is known; `*` stands for any name.
        archives: file names that the archive may have.
        url: where it can be downloaded.
        nested: pattern of archives inside, which are unpacked where they lie; "" for none.
        alike: whether other parts have the same content, so that only its name tells which one a folder is.
    """

    folder: str
    content: tuple[str, ...]
    archives: tuple[str, ...]
    url: str
    nested: str = ""
    alike: bool = False

    def is_whole(self, folder: Path) -> bool:
        """Whether `folder` is this part, unpacked."""
        return all(next(folder.glob(pattern), None) is not None for pattern in self.content)


def provide(
    part: CorpusPart, download_dir: Path, corpus_dir: Path | None, fetch: Callable[[Path], object]
) -> None:
    """Leave `part` in `download_dir`/<part.folder>: a link to the user's folder, or the unpacked archive.

    Args:
        corpus_dir: the user's folder, with the part as it is or its archive, or the archive itself; None: look for
            the archive in `download_dir`, then download it.
        fetch: downloads and unpacks into the folder it is given, below which `part.folder` is then found.

    Raises:
        UserError: it is nowhere, is not whole, or could not be downloaded.
    """
    target = download_dir / part.folder
    if corpus_dir is not None:
        unpacked = find_unpacked(part, corpus_dir)
        if unpacked is not None:
            link(target, unpacked)
            return
    archive = find_archive(part, corpus_dir or download_dir)
    if corpus_dir is not None and archive is None:
        raise UserError(
            f"--corpus-dir '{corpus_dir}' holds neither the folder {part.folder} ({', '.join(part.content)}) nor"
            f" {' or '.join(part.archives)}" + nested_hint(part, corpus_dir)
        )
    if part.is_whole(target):
        logger.info("%s: already there", part.folder)
        return
    if target.is_symlink():
        target.unlink()
    partial = download_dir / f".{part.folder.replace('/', '-')}.partial"
    if archive is not None:
        logger.info("%s: unpacking %s", part.folder, archive)
        shutil.rmtree(partial, ignore_errors=True)
        unpack(archive, partial)
        adopt(part, partial, target, archive)
    else:
        download(part, download_dir, partial, fetch)
        adopt(part, partial, target, Path(part.archives[0]))
    shutil.rmtree(partial, ignore_errors=True)


def find_unpacked(part: CorpusPart, corpus_dir: Path) -> Path | None:
    """The part in the user's folder, or in a folder of the part's own name (and of what holds it) below that."""
    candidates = places(part, corpus_dir)
    if part.alike and corpus_dir.name != Path(part.folder).name:
        candidates.remove(corpus_dir)
    return next((candidate for candidate in candidates if part.is_whole(candidate)), None)


def places(part: CorpusPart, corpus_dir: Path) -> list[Path]:
    """For "LibriTTS/dev-clean": DIR/LibriTTS/dev-clean, DIR/dev-clean, DIR."""
    names = part.folder.split("/")
    return [corpus_dir.joinpath(*names[start:]) for start in range(len(names) + 1)]


def find_archive(part: CorpusPart, place: Path) -> Path | None:
    """The part's archive: `place` itself, or a file in it."""
    candidates = [place, *(place / name for name in part.archives)]
    return next((path for path in candidates if path.name in part.archives and path.is_file()), None)


def nested_hint(part: CorpusPart, corpus_dir: Path) -> str:
    """What to do when the outer archive was unpacked, but not those inside."""
    if not part.nested:
        return ""
    for folder in places(part, corpus_dir):
        inside = next(folder.glob(part.nested), None)
        if inside is not None:
            return f"; archives like '{inside}' are not unpacked yet: unpack each where it lies"
    return ""


def link(target: Path, unpacked: Path) -> None:
    """Make `target` a link to the user's folder."""
    unpacked = unpacked.resolve()
    if target.is_symlink() or target.exists():
        if target.resolve() == unpacked:
            return
        if not target.is_symlink():
            raise UserError(f"'{target}' was downloaded before; delete it to use '{unpacked}' in its place")
        target.unlink()
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(unpacked, target_is_directory=True)
    logger.info("%s -> %s", target, unpacked)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar archive into `folder`.

    Raises:
        UserError: it is not a whole one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"'{archive}' is no whole tar archive ({error}); download it again") from error


def adopt(part: CorpusPart, unpacked: Path, target: Path, archive: Path) -> None:
    """Move the part out of what was unpacked, the archives inside it unpacked too.

    Raises:
        UserError: the part is not in it.
    """
    if part.nested:
        for inner in sorted(unpacked.rglob(part.nested)):
            unpack(inner, inner.parent)
            inner.unlink()
    below = [path for pattern in ("*", "*/*") for path in sorted(unpacked.glob(pattern)) if path.is_dir()]
    found = next((folder for folder in [unpacked, *below] if part.is_whole(folder)), None)
    if found is None:
        shutil.rmtree(unpacked, ignore_errors=True)
        raise UserError(
            f"'{archive}' does not hold {part.folder} ({', '.join(part.content)}); download {part.url} again"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(found, target)


def download(part: CorpusPart, download_dir: Path, partial: Path, fetch: Callable[[Path], object]) -> None:
    """Call `fetch`, which takes up a partial download where it stopped.

    Raises:
        UserError: the network does not allow it; says where to get the archive and where to put it.
    """
    reason = unreachable(part.url)
    if reason is None:
        partial.mkdir(parents=True, exist_ok=True)
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(READ_SECONDS)
        try:
            fetch(partial)
        except (tarfile.TarError, EOFError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            reason = f"what came is no whole tar archive: {error}"
        except (OSError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
        finally:
            socket.setdefaulttimeout(timeout)
    if reason is not None:
        raise UserError(
            f"{part.folder} could not be downloaded ({reason}); fetch {part.url} on another machine, put it in"
            f" '{download_dir}' and run this again, or name the folder where it lies with --corpus-dir"
        )


def unreachable(url: str) -> str | None:
    """Why nobody answers at `url`, or None when someone does."""
    outcome: list[Exception | None] = []

    def connect() -> None:
        try:
            with urllib.request.urlopen(url, timeout=CONNECT_SECONDS):
                outcome.append(None)
        except (OSError, ValueError) as error:
            outcome.append(error)

    # In a thread of its own, since looking up a host name knows no timeout.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS + 1)
    if not outcome:
        return f"no answer within {CONNECT_SECONDS:.0f} s"
    return None if outcome[0] is None else str(outcome[0])
