"""Print what is in a folder of cuts: hours, durations, speakers, codebook use. With --check: whether it is sound."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from valle.config import option, parse
from valle.data.checks import check_manifests, find_manifests
from valle.data.dataset import read_codec_info
from valle.data.statistics import codebook_table, duration_table, measure_manifest
from valle.utils.command import run
from valle.utils.errors import UserError


@dataclass
class StatisticsConfig:
    """Statistics"""

    manifest_dir: str = option("data/tokenized", "folder with cuts_{train,validation,test}.jsonl.gz")
    manifest: str | None = option(None, "look at this one manifest of cuts instead")
    max_speakers: int = option(20, "rows for speakers or pianists a manifest; the others share one")
    max_code_cuts: int = option(1000, "cuts a manifest whose codes are counted, drawn by chance; 0: none")
    seed: int = option(42, "seed of that draw")
    check: bool = option(False, "fail when splits overlap or codes are not valid; reads every cut's codes")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    description = "Print hours, durations and codebook use of cuts."
    (config,) = parse(description, [StatisticsConfig], argv, prog="display_manifest_statistics.py")
    for name in ("max_speakers", "max_code_cuts"):
        if getattr(config, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(config, name)}, expected 0 or more")
    folder = Path(config.manifest_dir)
    if config.manifest is not None:
        path = Path(config.manifest)
        manifests = {path.name.removesuffix(".gz").removesuffix(".jsonl"): path}
        folder = path.parent
    else:
        manifests = find_manifests(folder)
    # First: a fault is better told by what was found than by a table of it.
    if config.check:
        check_manifests(folder)
    info = read_codec_info(folder)
    measured = {
        name: measure_manifest(path, config.max_code_cuts, config.seed) for name, path in manifests.items()
    }
    print(duration_table(measured, config.max_speakers))
    codes = codebook_table(measured, info["codebook_size"] if info else None)
    if codes:
        print(f"\n{codes}")
    if config.check:
        print(
            "\nchecked: splits are disjoint and not empty; codes are uint16, in range, of the codec's width and frame "
            "rate, and as long as their cuts"
        )


if __name__ == "__main__":
    run(main)
