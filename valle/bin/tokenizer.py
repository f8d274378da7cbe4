"""Encode every cut of a manifest with a codec: recordings -> codes. See valle/data/tokenization.py."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from valle.codecs import DEFAULT_CODEC, load_codec
from valle.config import option, parse
from valle.data.tokenization import tokenize_manifest
from valle.utils.command import run
from valle.utils.errors import UserError
from valle.utils.log import setup_logger

logger = logging.getLogger("valle.bin.tokenizer")


@dataclass
class TokenizerConfig:
    """Tokenizer"""

    manifest: str = option("data/manifests/cuts_all.jsonl.gz", "lhotse cuts to encode")
    output_dir: str = option("data/tokenized", "where codes and cuts with codes go")
    codec: str = option(DEFAULT_CODEC, "codec name, folder, or hub name")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    num_quantizers: int | None = option(None, "quantizers to store (default: all that the codec has)")
    max_skipped: int = option(-1, "end with an error when more cuts cannot be encoded; -1: no limit")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    (config,) = parse(
        "Encode every cut of a manifest with a codec.", [TokenizerConfig], argv, prog="tokenizer.py"
    )
    setup_logger()
    manifest = Path(config.manifest)
    if not manifest.is_file():
        raise UserError(f"manifest '{manifest}' does not exist; run prepare.sh --stage 1")
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    codec = load_codec(config.codec, device, config.num_quantizers)
    result = tokenize_manifest(manifest, Path(config.output_dir), codec, config.max_skipped)
    logger.info(
        "%d cuts encoded (%.2f h), %d were there already, %d left out",
        *(result.encoded, result.encoded_duration / 3600, result.reused, result.skipped),
    )


if __name__ == "__main__":
    run(main)
