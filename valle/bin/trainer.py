"""Train a VALL-E: text, or the notes of MIDI files, to audio. `--train-stage auto` AR, then NAR; `1`, `2`, or `0` both.

Stage 2 starts from stage 1's best checkpoint in --exp-dir. Run again with the same flags, a training goes on where
it stopped. Manifests are those that a recipe's prepare.sh writes (utterances_train and utterances_validation.jsonl.gz).
`--model-name vallf` reads the text by cross-attention, `midi-valle` notes in the place of text.
"""

from collections.abc import Sequence
from pathlib import Path

from valle.config import DataConfig, TrainConfig, ValleConfig, parse
from valle.engine.tasks import train
from valle.utils import distributed
from valle.utils.command import run


def main(argv: Sequence[str] | None = None, defaults: Path | None = None) -> None:
    """Entry point; `defaults` is a recipe's YAML file."""
    parts = parse(__doc__ or "", [ValleConfig, DataConfig, TrainConfig], argv, defaults)
    config = parts[2]
    distributed.launch(train, tuple(parts), config.world_size, config.master_port, config.stuck_timeout)


if __name__ == "__main__":
    run(main)
