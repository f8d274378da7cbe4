"""Train an AudioLM on codec tokens: `--train-stage auto` AR, then NAR; `1` AR, `2` NAR, or `0` both at once.

Stage 2 starts from stage 1's best checkpoint in --exp-dir. Run again with the same flags, a training goes on where
it stopped. Manifests are those that a recipe's prepare.sh writes (cuts_train and cuts_validation.jsonl.gz).
`--init-from CKPT` fine-tunes another model's checkpoint, with `--lora-rank N` by small adapters beside its weights.
"""

from collections.abc import Sequence
from pathlib import Path

from valle.config import DataConfig, ModelConfig, TrainConfig, parse
from valle.engine.tasks import train
from valle.utils import distributed
from valle.utils.command import run


def main(argv: Sequence[str] | None = None, defaults: Path | None = None) -> None:
    """Entry point; `defaults` is a recipe's YAML file."""
    parts = parse(__doc__ or "", [ModelConfig, DataConfig, TrainConfig], argv, defaults)
    config = parts[2]
    distributed.launch(train, tuple(parts), config.world_size, config.master_port, config.stuck_timeout)


if __name__ == "__main__":
    run(main)
