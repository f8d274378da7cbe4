"""Fails at stage 0, not hours later, where the text front end that stage 3 will ask for is not installed."""

from collections.abc import Sequence
from dataclasses import dataclass

from valle.config import option, parse
from valle.data.text import TEXT_TOKENIZERS, make_text_tokenizer
from valle.utils.command import run


@dataclass
class CheckConfig:
    """Text front end"""

    text_extractor: str = option("phonemes", "what a text becomes", TEXT_TOKENIZERS)
    language: str = option("en-us", "of the phonemes, as espeak-ng calls it")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    (config,) = parse("Try the text front end.", [CheckConfig], argv)
    make_text_tokenizer(config.text_extractor, config.language)("a 一")


if __name__ == "__main__":
    run(main)
