"""Stage 0: the recordings in a user's folder. There is nothing to download; a folder without any is an error."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from valle.config import option, parse
from valle.utils.command import run
from valle.utils.errors import UserError

SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac", ".aif", ".aiff")


@dataclass
class ListConfig:
    """Stage 0 of egs/folder"""

    audio_dir: str = option("audio", "folder with recordings, searched with all folders below it")
    data_dir: str = option("data", "folder of the recipe's output; not searched")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    (config,) = parse("Count the recordings in a folder.", [ListConfig], argv)
    paths = list_audio(Path(config.audio_dir), Path(config.data_dir))
    kinds = Counter(path.suffix.lower() for path in paths)
    print(
        f"{len(paths)} recordings: " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    )


def list_audio(audio_dir: Path, data_dir: Path) -> list[Path]:
    """Audio files below `audio_dir`, in order, without hidden ones and without the recipe's own output.

    Raises:
        UserError: no such folder, or no audio file in it.
    """
    if not audio_dir.is_dir():
        raise UserError(f"--audio-dir '{audio_dir}' is not a folder")
    output = data_dir.resolve()
    found = []
    for folder, subfolders, names in os.walk(audio_dir):
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(".") and (Path(folder) / name).resolve() != output
        ]
        found += [
            Path(folder) / name
            for name in names
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
        ]
    if not found:
        raise UserError(f"--audio-dir '{audio_dir}' holds no audio file ({', '.join(SUFFIXES)})")
    return sorted(found)


if __name__ == "__main__":
    run(main)
