"""Stage 0: AISHELL-1 -> DATA_DIR/download/aishell/data_aishell: a link, its archive unpacked, or downloaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lhotse.recipes.aishell import download_aishell

from valle.config import option, parse
from valle.data.downloads import CorpusPart, provide
from valle.utils.command import run
from valle.utils.log import setup_logger

AISHELL = CorpusPart(
    folder="aishell/data_aishell",
    content=(
        "transcript/aishell_transcript_v0.8.txt",
        *(f"wav/{split}/*/*.wav" for split in ("train", "dev", "test")),
    ),
    archives=("data_aishell.tgz",),
    url="http://www.openslr.org/resources/33/data_aishell.tgz",
    nested="wav/*.tar.gz",  # one a speaker
)


@dataclass
class DownloadConfig:
    """Stage 0 of egs/aishell1"""

    corpus_dir: str = option("", "folder with data_aishell, or with its archive; empty: download it")
    data_dir: str = option("data", "folder of the recipe's output")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    (config,) = parse("Provide AISHELL-1.", [DownloadConfig], argv)
    setup_logger()
    corpus_dir = Path(config.corpus_dir) if config.corpus_dir else None
    provide(AISHELL, Path(config.data_dir) / "download", corpus_dir, download_aishell)


if __name__ == "__main__":
    run(main)
