"""Stage 0: the recordings that a user has. There is nothing to download; where there is none, it is an error."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from entries import list_audio, manifest_entries

from valle.config import option, parse
from valle.utils.command import run
from valle.utils.errors import UserError


@dataclass
class ListConfig:
    """Stage 0 of egs/folder"""

    audio_dir: str | None = option(None, "folder with recordings, searched with all folders below it")
    manifest: str | None = option(
        None, "CSV or JSON-lines file that names recordings, instead of --audio-dir"
    )
    data_dir: str = option("data", "folder of the recipe's output; not searched")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    (config,) = parse("Count the recordings of a folder or a manifest.", [ListConfig], argv)
    if (config.audio_dir is None) == (config.manifest is None):
        raise UserError("expected either --audio-dir or --manifest")
    if config.manifest is not None:
        entries, skipped = manifest_entries(Path(config.manifest))
        missing = sum(not entry.path.is_file() for entry in entries)
        print(f"{len(entries)} rows; {missing} of their files missing, {len(skipped)} rows not usable")
        return
    paths = list_audio(Path(config.audio_dir), Path(config.data_dir))
    kinds = Counter(path.suffix.lower() for path in paths if not path.is_dir())
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    print(f"{sum(kinds.values())} recordings: {counts}")


if __name__ == "__main__":
    run(main)
