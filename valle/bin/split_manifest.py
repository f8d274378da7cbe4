"""Divide cuts_all.jsonl.gz into one manifest a split: stage 3 of every recipe. See valle/data/manifests.py."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from valle.config import option, parse
from valle.data.manifests import split_manifest
from valle.utils.command import run
from valle.utils.log import setup_logger

logger = logging.getLogger("valle.bin.split_manifest")


@dataclass
class SplitConfig:
    """Splits"""

    manifest_dir: str = option(
        "data/tokenized", "folder with cuts_all.jsonl.gz; the split manifests go there too"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    (config,) = parse("Divide cuts_all.jsonl.gz by split.", [SplitConfig], argv, prog="split_manifest.py")
    setup_logger()
    for name, count in split_manifest(Path(config.manifest_dir)).items():
        logger.info("%s: %d cuts", name, count)


if __name__ == "__main__":
    run(main)
