"""Stage 0: each part of LibriTTS -> DATA_DIR/download/LibriTTS/<part>: a link, its archive unpacked, or downloaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lhotse.recipes.libritts import download_libritts
from parts import DEFAULT_PARTS, parse_parts

from valle.config import option, parse
from valle.data.downloads import CorpusPart, provide
from valle.utils.command import run
from valle.utils.log import setup_logger


@dataclass
class DownloadConfig:
    """Stage 0 of egs/libritts"""

    corpus_dir: str = option("", "folder with the parts, or with their archives; empty: download them")
    data_dir: str = option("data", "folder of the recipe's output")
    parts: str = option(DEFAULT_PARTS, "parts, with commas, or all")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    (config,) = parse("Provide LibriTTS.", [DownloadConfig], argv)
    setup_logger()
    corpus_dir = Path(config.corpus_dir) if config.corpus_dir else None
    for name in parse_parts(config.parts):
        part = CorpusPart(
            folder=f"LibriTTS/{name}",
            content=("*/*/*.trans.tsv", "*/*/*.wav"),
            # LibriTTS-R, the same sentences cleaned, names its archives with underscores.
            archives=(f"{name}.tar.gz", f"{name.replace('-', '_')}.tar.gz"),
            url=f"http://www.openslr.org/resources/60/{name}.tar.gz",
            alike=True,
        )
        fetch = partial(download_libritts, dataset_parts=[name])
        provide(part, Path(config.data_dir) / "download", corpus_dir, fetch)


if __name__ == "__main__":
    run(main)
