"""Symbols for the texts of cuts, for text-to-speech: between stage 2 and the splits. See valle/data/text.py."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from valle.config import option, parse
from valle.data.text import DEFAULT_LANGUAGE, TEXT_TOKENIZERS, make_text_tokenizer, tokenize_texts
from valle.utils.command import run
from valle.utils.log import setup_logger

logger = logging.getLogger("valle.bin.text_tokens")


@dataclass
class TextTokensConfig:
    """Texts"""

    manifest_dir: str = option("data/tokenized", "folder with cuts_all.jsonl.gz; the symbols go there too")
    text_extractor: str = option("phonemes", "what a text becomes", TEXT_TOKENIZERS)
    language: str = option(DEFAULT_LANGUAGE, "of the phonemes, as espeak-ng calls it: en-us, de, fr-fr, cmn")
    lower: bool = option(True, "characters and bytes: capital letters become small ones")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    (config,) = parse(
        "Make text symbols and their table; then run split_manifest.py, which puts them into the cuts.",
        [TextTokensConfig],
        argv,
        prog="text_tokens.py",
    )
    setup_logger()
    tokenizer = make_text_tokenizer(config.text_extractor, config.language, config.lower)
    counts = tokenize_texts(Path(config.manifest_dir), tokenizer)
    logger.info("%d texts, %d different symbols", counts["texts"], counts["symbols"])


if __name__ == "__main__":
    run(main)
