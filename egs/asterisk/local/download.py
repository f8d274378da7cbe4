"""Stage 0: fetch and unpack the Asterisk core sounds of each language into DATA_DIR/download/<lang>.

Tries, in this order: archives that already lie in DATA_DIR/download/packages, the release tarball of the Asterisk
project, the Debian packages (downloaded and unpacked with dpkg-deb, never installed). `<lang>` appears only when
complete, with a `.done` marker in it, so a killed run is taken up where it stopped.
"""

import logging
import os
import shutil
import subprocess
import tarfile
import threading
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from valle.config import option, parse
from valle.utils.command import run
from valle.utils.errors import UserError
from valle.utils.files import atomic_path, write_json
from valle.utils.log import setup_logger

logger = logging.getLogger("valle.egs.asterisk.download")

LANGUAGES = ("en", "es", "fr", "it", "ru")
RELEASE = "1.6.1"
RELEASE_URL = "https://downloads.asterisk.org/pub/telephony/sounds/releases"
CONNECT_SECONDS = 10.0
READ_SECONDS = 300.0


@dataclass
class DownloadConfig:
    """Stage 0 of egs/asterisk"""

    lang: str = option("en", "languages, with commas: " + ",".join(LANGUAGES))
    data_dir: str = option("data", "folder of the recipe's output")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    (config,) = parse("Fetch the Asterisk core sounds.", [DownloadConfig], argv)
    setup_logger()
    download_dir = Path(config.data_dir) / "download"
    for language in parse_languages(config.lang):
        download_language(language, download_dir)


def parse_languages(text: str) -> list[str]:
    """`en,es` -> ["en", "es"], each one known and named once."""
    languages = [name.strip() for name in text.replace(" ", ",").split(",") if name.strip()]
    unknown = [name for name in languages if name not in LANGUAGES]
    if unknown or not languages:
        raise UserError(f"--lang is '{text}', expected a comma list of {', '.join(LANGUAGES)}")
    return list(dict.fromkeys(languages))


def download_language(language: str, download_dir: Path) -> None:
    """Leave the unpacked sounds of one language in `download_dir`/<language>, with a `.done` marker."""
    target = download_dir / language
    if (target / ".done").is_file():
        logger.info("%s: already downloaded", language)
        return
    packages = download_dir / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    partial = download_dir / f".{language}.partial"
    for find in (find_archives, fetch_tarball, fetch_packages):
        archives = find(language, packages)
        if not archives:
            continue
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            for archive in archives:
                unpack(archive, partial)
            count = sum(1 for _ in partial.rglob("*.g722"))
            if count == 0:
                raise UserError(f"{[archive.name for archive in archives]} hold no .g722 file")
        except UserError as error:
            logger.warning("%s: %s; deleted, trying the next source", language, error)
            for archive in archives:
                archive.unlink(missing_ok=True)
            continue
        write_json(
            partial / ".done", {"archives": sorted(archive.name for archive in archives), "clips": count}
        )
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        logger.info("%s: %d clips from %s", language, count, ", ".join(archive.name for archive in archives))
        return
    shutil.rmtree(partial, ignore_errors=True)
    tarball, (sounds, texts) = tarball_name(language), package_names(language)
    raise UserError(
        f"the recordings for '{language}' could not be downloaded (neither {RELEASE_URL} nor a Debian mirror answers);"
        f" fetch {RELEASE_URL}/{tarball}, or the Debian packages {sounds} and {texts}, on another machine,"
        f" put them in {packages} and run this again"
    )


def tarball_name(language: str) -> str:
    """File name of the release tarball."""
    return f"asterisk-core-sounds-{language}-g722-{RELEASE}.tar.gz"


def package_names(language: str) -> tuple[str, str]:
    """Debian packages: the sounds, the transcripts and licence."""
    return f"asterisk-core-sounds-{language}-g722", f"asterisk-core-sounds-{language}"


def find_archives(language: str, packages: Path) -> list[Path]:
    """A tarball, or both Debian packages, that lie in `packages` already."""
    tarballs = sorted(packages.glob(f"asterisk-core-sounds-{language}-g722-*.tar.gz"))
    if tarballs:
        return tarballs[-1:]
    debs = [sorted(packages.glob(f"{name}_*.deb")) for name in package_names(language)]
    return [found[-1] for found in debs] if all(debs) else []


def fetch_tarball(language: str, packages: Path) -> list[Path]:
    """Download the release tarball; [] when the network does not allow it."""
    name = tarball_name(language)
    outcome: list[object] = []

    def connect() -> None:
        try:
            outcome.append(urllib.request.urlopen(f"{RELEASE_URL}/{name}", timeout=CONNECT_SECONDS))
        except (OSError, ValueError) as error:
            outcome.append(error)

    # In a thread of its own, since looking up a host name knows no timeout.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS + 1)
    if not outcome or isinstance(outcome[0], Exception):
        reason = outcome[0] if outcome else f"no answer within {CONNECT_SECONDS:.0f} s"
        logger.info("%s: no release tarball (%s); trying the Debian packages", language, reason)
        return []
    try:
        with outcome[0] as response, atomic_path(packages / name) as temporary:  # type: ignore[attr-defined]
            with open(temporary, "wb") as file:
                shutil.copyfileobj(response, file)
            if not tarfile.is_tarfile(temporary):
                raise UserError("what came is no tar archive")
    except (OSError, UserError) as error:
        logger.info("%s: release tarball failed (%s); trying the Debian packages", language, error)
        return []
    return [packages / name]


def fetch_packages(language: str, packages: Path) -> list[Path]:
    """Download the Debian packages with apt-get, as any user; [] when that fails."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        logger.info("%s: apt-get or dpkg-deb is not installed", language)
        return []
    missing = [name for name in package_names(language) if not list(packages.glob(f"{name}_*.deb"))]
    if _apt_download(missing, packages, []):
        return find_archives(language, packages)
    # No package lists on this machine, or old ones: fetch lists of our own, leaving the system's untouched.
    state = packages.parent / "apt"
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (state / folder).mkdir(parents=True, exist_ok=True)
    own_lists = [
        *("-o", f"Dir::State={state / 'state'}"),
        *("-o", "Dir::State::status=/var/lib/dpkg/status"),
        *("-o", f"Dir::Cache={state / 'cache'}"),
        *("-o", "APT::Sandbox::User="),
    ]
    logger.info("%s: fetching the Debian package lists", language)
    _call(["apt-get", *own_lists, "update"], packages)
    downloaded = _apt_download(missing, packages, own_lists)
    shutil.rmtree(state, ignore_errors=True)
    return find_archives(language, packages) if downloaded else []


def _apt_download(names: Sequence[str], folder: Path, options: Sequence[str]) -> bool:
    """apt-get download into a folder of its own first: a .deb under its name is a whole one."""
    incoming = folder / ".incoming"
    incoming.mkdir(exist_ok=True)
    try:
        if not _call(["apt-get", *options, "download", *names], incoming):
            return False
        for deb in incoming.glob("*.deb"):
            os.replace(deb, folder / deb.name)
        return True
    finally:
        shutil.rmtree(incoming, ignore_errors=True)


def _call(command: Sequence[str], folder: Path) -> bool:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    timeouts = [f"Acquire::{scheme}::Timeout={READ_SECONDS / 10:.0f}" for scheme in ("http", "https")]
    flags = [part for value in [*timeouts, "Acquire::Retries=2"] for part in ("-o", value)]
    try:
        result = subprocess.run(
            [command[0], *flags, *command[1:]],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=READ_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.info("%s failed: %s", command[0], error)
        return False
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.startswith("E:")]
        logger.info("apt-get: %s", (lines or ["failed"])[0])
    return result.returncode == 0


def unpack(archive: Path, target: Path) -> None:
    """Unpack a tarball or a .deb into `target`."""
    if archive.suffix == ".deb":
        if not shutil.which("dpkg-deb"):
            raise UserError(f"'{archive.name}' needs dpkg-deb to be unpacked")
        result = subprocess.run(["dpkg-deb", "-x", str(archive), str(target)], capture_output=True, text=True)
        if result.returncode != 0:
            raise UserError(f"'{archive.name}' is no whole Debian package ({result.stderr.strip()})")
        return
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(target, filter="data")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"'{archive.name}' is no whole tar archive ({error})") from error


if __name__ == "__main__":
    run(main)
