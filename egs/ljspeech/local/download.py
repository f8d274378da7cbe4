"""Stage 0: LJSpeech-1.1 -> DATA_DIR/download/LJSpeech-1.1: a link, its archive unpacked, or downloaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lhotse.recipes.ljspeech import download_ljspeech

from valle.config import option, parse
from valle.data.downloads import CorpusPart, provide
from valle.utils.command import run
from valle.utils.log import setup_logger

LJSPEECH = CorpusPart(
    folder="LJSpeech-1.1",
    content=("metadata.csv", "wavs/*.wav"),
    archives=("LJSpeech-1.1.tar.bz2",),
    url="http://data.keithito.com/data/speech/LJSpeech-1.1.tar.bz2",
)


@dataclass
class DownloadConfig:
    """Stage 0 of egs/ljspeech"""

    corpus_dir: str = option("", "folder with LJSpeech-1.1, or with its archive; empty: download it")
    data_dir: str = option("data", "folder of the recipe's output")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    (config,) = parse("Provide LJSpeech.", [DownloadConfig], argv)
    setup_logger()
    corpus_dir = Path(config.corpus_dir) if config.corpus_dir else None
    provide(LJSPEECH, Path(config.data_dir) / "download", corpus_dir, download_ljspeech)


if __name__ == "__main__":
    run(main)
