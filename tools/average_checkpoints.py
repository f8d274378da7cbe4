"""Average checkpoints: the last epochs, the last steps, or the running average that a training kept.

    python tools/average_checkpoints.py --exp-dir exp/audio-lm --epoch 20 --avg 5
    python tools/average_checkpoints.py --exp-dir exp/audio-lm --iter 4000 --avg 4
    python tools/average_checkpoints.py --exp-dir exp/audio-lm --epoch 20 --avg 5 --use-averaged-model true
    python tools/average_checkpoints.py exp/a/best-valid-loss.pt exp/a/epoch-9.pt --output exp/a/mean.pt

    --epoch N --avg K       mean of epoch-(N-K+1).pt … epoch-N.pt -> epoch-N-avg-K.pt
    --iter N --avg K        mean of the last K checkpoint-<step>.pt up to checkpoint-N.pt -> checkpoint-N-avg-K.pt
    --use-averaged-model    mean over all steps behind epoch-(N-K).pt (or behind the last K checkpoints) up to N, from
                            the two files' running averages: the training ran with --average-period
    files                   their mean; with --use-averaged-model two files, start and end

Sharded checkpoints (folders) are read as files are. What is written is one file with everything but the training's own
state: infer.py and evaluate.py take it as it is.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from valle.config import option, parse
from valle.engine.averaging import (
    average_between,
    average_files,
    before_epochs,
    epochs_to_average,
    save_average,
    steps_to_average,
)
from valle.utils.command import run
from valle.utils.errors import UserError
from valle.utils.log import setup_logger

logger = logging.getLogger("valle.tools.average_checkpoints")


@dataclass
class AverageConfig:
    """Which checkpoints are averaged, and how."""

    files: tuple[str, ...] = option((), "checkpoints, in the place of --epoch or --iter", positional=True)
    exp_dir: str = option("exp/audio-lm", "folder of the checkpoints that --epoch or --iter names")
    epoch: int = option(0, "last epoch of the average: epoch-N.pt")
    iter: int = option(0, "last step of the average: checkpoint-N.pt")
    avg: int = option(5, "how many epochs or checkpoints")
    use_averaged_model: bool = option(
        False, "over all steps in between, from the running averages of --average-period"
    )
    output: str | None = option(None, "file to write (default: named as above, beside the checkpoints)")


def average(config: AverageConfig) -> Path:
    """Write the average; returns its file."""
    folder = Path(config.exp_dir)
    given = [bool(config.files), config.epoch > 0, config.iter > 0]
    if sum(given) != 1:
        raise UserError("give one of --epoch N, --iter N, or files to average")
    if config.avg < 1:
        raise UserError(f"--avg is {config.avg}, expected 1 or more")
    if config.files:
        paths = [Path(name) for name in config.files]
        twice = {
            path.name for path in paths if [other.resolve() for other in paths].count(path.resolve()) > 1
        }
        if twice:
            raise UserError(f"{', '.join(sorted(twice))} given twice; each file counts once")
        name = f"average-of-{len(paths)}"
        folder = paths[-1].parent
    elif not folder.is_dir():
        raise UserError(f"--exp-dir '{folder}' is not there")
    else:
        name = f"epoch-{config.epoch}" if config.epoch else f"checkpoint-{config.iter}"
        name += f"-avg-{config.avg}"
    start: Path | None
    if not config.use_averaged_model:
        if not config.files:
            paths = (
                epochs_to_average(folder, config.epoch, config.avg)
                if config.epoch
                else steps_to_average(folder, config.iter, config.avg)
            )
        contents = average_files(paths)
        said = f"the mean of {', '.join(path.name for path in paths)}"
    else:
        name += "-use-averaged-model"  # as icefall names it
        if config.files:
            if len(paths) != 2:
                raise UserError(f"{len(paths)} file(s) with --use-averaged-model, expected 2: start and end")
            start, end = paths
        elif config.epoch:
            start = before_epochs(folder, config.epoch, config.avg)
            (end,) = epochs_to_average(folder, config.epoch, 1)
        else:
            start, *_, end = steps_to_average(folder, config.iter, config.avg + 1)
        contents = average_between(start, end)
        behind = f"behind {start.name}" if start is not None else "of the stage"
        said = f"the mean over all steps {behind} up to {end.name}"
    output = Path(config.output) if config.output else folder / f"{name}.pt"
    if output.is_dir():
        raise UserError(f"--output is '{output}', a folder, expected a file to write")
    save_average(output, contents)
    logger.info("'%s' is %s", output, said)
    return output


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    (config,) = parse("Average checkpoints of one training.", [AverageConfig], argv)
    setup_logger()
    print(average(config))


if __name__ == "__main__":
    run(main)
