"""Print what is in a folder of cuts: hours, durations, speakers, codebook use. With --check: whether it is sound."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from valle.config import option, parse
from valle.data.dataset import read_codec_info
from valle.data.manifests import read_manifest
from valle.data.statistics import check_manifests, codebook_table, duration_table, read_split_cuts
from valle.utils.command import run


@dataclass
class StatisticsConfig:
    """Statistics"""

    manifest_dir: str = option("data/tokenized", "folder with cuts_{train,validation,test}.jsonl.gz")
    manifest: str | None = option(None, "look at this one manifest of cuts instead")
    check: bool = option(False, "fail when splits overlap or codes are not valid")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    description = "Print hours, durations and codebook use of cuts."
    (config,) = parse(description, [StatisticsConfig], argv, prog="display_manifest_statistics.py")
    folder = Path(config.manifest_dir)
    if config.manifest is not None:
        path = Path(config.manifest)
        manifests = {path.name.removesuffix(".gz").removesuffix(".jsonl"): list(read_manifest(path))}
        folder = path.parent
    else:
        manifests = read_split_cuts(folder)
    info = read_codec_info(folder)
    print(duration_table(manifests))
    codes = codebook_table(manifests, info["codebook_size"] if info else None)
    if codes:
        print(f"\n{codes}")
    if config.check:
        check_manifests(folder)
        print(
            "\nchecked: splits are disjoint; codes are in range, of the codec's width, and as long as their cuts"
        )


if __name__ == "__main__":
    run(main)
