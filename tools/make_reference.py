"""Make a recipe's reference: the band in which its runs lay, for `--reference` and the curves that it draws.

    python tools/make_reference.py egs/asterisk/exp/audiolm/log/metrics.jsonl --output egs/asterisk/conf/reference.json

Of several runs, the band reaches from the lowest to the highest at each step of a stage; `--margin` widens it. The
settings for which it holds are those in the checkpoints beside the log; runs with different settings make no band.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from valle.config import option, parse
from valle.engine.checkpoint import load_checkpoint
from valle.engine.metrics import read_metrics
from valle.engine.reference import MARGIN, Reference, draw_curves, make_bands, settings, write_reference
from valle.utils.command import run
from valle.utils.errors import UserError
from valle.utils.log import setup_logger

log = logging.getLogger("valle.tools.make_reference")


@dataclass
class ReferenceConfig:
    """Runs and what becomes of them."""

    runs: tuple[str, ...] = option(
        (), "metrics.jsonl of each reference run", positional=True, metavar="METRICS.jsonl"
    )
    output: str = option("conf/reference.json", "file to write")
    margin: float = option(
        MARGIN, "by how much the band is wider than the runs: a share of a loss, so much of an accuracy"
    )
    about: str = option("", "which runs these are: machine, commit, command")
    picture: str | None = option(None, "also draw the first run's curves in the band, as this PNG file")


def settings_beside(metrics: Path) -> dict[str, Any]:
    """What a run was trained with, from any checkpoint of its folder; nothing where there is none."""
    for path in sorted(metrics.resolve().parent.parent.glob("*.pt")):
        try:
            return settings(load_checkpoint(path))
        except UserError:
            continue
    log.warning("no checkpoint beside '%s': the reference will not say for which settings it holds", metrics)
    return {}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    (config,) = parse(__doc__ or "", [ReferenceConfig], argv)
    setup_logger()
    if not config.runs:
        raise UserError("no run is named; give the metrics.jsonl of one or more")
    if not 0 <= config.margin < 1:
        raise UserError(f"--margin is {config.margin}, expected a share from 0 to below 1, such as 0.02")
    runs = []
    for path in config.runs:
        records = read_metrics(path)
        if not records:
            raise UserError(f"'{path}' does not exist, or has no line of a training")
        runs.append(records)
    used = [settings_beside(Path(path)) for path in config.runs]
    for path, other in zip(config.runs[1:], used[1:], strict=True):
        differences = Reference({}, used[0]).differences(
            {"config": {"": other}, "codec": {"name": other.get("codec")}}
        )
        if differences:
            raise UserError(f"'{path}' is no run of the same settings: {', '.join(differences)}")
    bands = make_bands(runs, config.margin)
    wider = f"on either side wider by {config.margin:g} of a loss, {config.margin:g} in accuracy"
    about = "; ".join([*filter(None, [config.about]), f"{len(runs)} run(s), lowest to highest", wider])
    write_reference(config.output, about, bands, used[0])
    log.info("wrote '%s': %d curves", config.output, len(bands))
    if config.picture and not draw_curves(runs[0], Reference(bands, used[0]), Path(config.picture)):
        raise UserError("--picture needs matplotlib: pip install valle[report]")


if __name__ == "__main__":
    run(main)
