"""Stage 1: AISHELL-1 -> lhotse manifests in the corpus' own splits. Everything shared is in valle/data/speech.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from lhotse.recipes.aishell import prepare_aishell

from valle.config import option, parse
from valle.data.speech import Utterance, read_with_lhotse, write_speech_manifests
from valle.utils.command import run
from valle.utils.errors import UserError
from valle.utils.log import setup_logger

PARTS = {"train": "train", "dev": "validation", "test": "test"}


@dataclass
class ManifestConfig:
    """Stage 1 of egs/aishell1"""

    data_dir: str = option("data", "folder of the recipe's output")
    min_duration: float = option(5.0, "shortest cut for AudioLM, in seconds")
    max_duration: float = option(15.0, "longest cut for AudioLM, in seconds")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    (config,) = parse("Manifests of AISHELL-1.", [ManifestConfig], argv)
    setup_logger()
    data_dir = Path(config.data_dir)
    corpus = data_dir / "download" / "aishell"
    if not (corpus / "data_aishell").is_dir():
        raise UserError(f"'{corpus}/data_aishell' does not exist; run prepare.sh --stage 0")
    utterances = [
        Utterance(
            recording=recording,
            text=supervision.text or "",
            speaker=supervision.speaker or "",
            language="zh",
            split=split,
            # A speaker's sentences follow each other in articles.
            passage=supervision.speaker or "",
        )
        for part, split in PARTS.items()
        for recording, supervision in read_with_lhotse(partial(read, corpus, part), corpus)
    ]
    write_speech_manifests(data_dir, "aishell1", utterances, config.min_duration, config.max_duration)


def read(corpus: Path, part: str) -> dict[str, Any]:
    """lhotse's manifests of one part."""
    return read_all(corpus)[part]


@cache
def read_all(corpus: Path) -> dict[str, Any]:
    """lhotse reads all parts at once."""
    return prepare_aishell(corpus)


if __name__ == "__main__":
    run(main)
