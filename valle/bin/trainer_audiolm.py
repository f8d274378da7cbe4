"""Train an AudioLM on codec tokens: `--train-stage 1` AR, then `2` NAR, or `0` both at once.

Stage 2 starts from stage 1's best checkpoint in --exp-dir. Run again with the same flags, a training goes on where
it stopped. Manifests are those that a recipe's prepare.sh writes (cuts_train and cuts_validation.jsonl.gz).
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from valle.config import DataConfig, ModelConfig, TrainConfig, parse, to_dict
from valle.data.dataset import CutBatches, PromptTargetDataset, describe_codes
from valle.engine.trainer import Trainer
from valle.models.builder import build_model
from valle.utils import distributed
from valle.utils.command import run
from valle.utils.errors import UserError
from valle.utils.log import setup_logger


def train(model_config: ModelConfig, data: DataConfig, config: TrainConfig) -> dict[str, float]:
    """One stage of the training; returns the last validation's figures."""
    folder = Path(data.manifest_dir)
    manifests = [folder / f"cuts_{split}.jsonl.gz" for split in ("train", "validation")]
    if not folder.is_dir():
        raise UserError(f"--manifest-dir '{folder}' is not there; run the recipe's prepare.sh first")
    setup_logger(Path(config.exp_dir) / "log" / f"train-stage{config.train_stage}.log")
    codec = describe_codes(folder, manifests[0])
    if model_config.num_quantizers is None:
        model_config.num_quantizers = int(codec["num_quantizers"])
    if model_config.num_quantizers > int(codec["num_quantizers"]):
        raise UserError(
            f"--num-quantizers is {model_config.num_quantizers}, but the codes in '{folder}' have "
            f"{codec['num_quantizers']}; lower it, or run prepare.sh --stage 2 with another codec"
        )
    torch.manual_seed(config.seed)
    model = build_model(model_config, int(codec["codebook_size"]))
    sources = []
    for manifest, training in zip(manifests, (True, False), strict=True):
        dataset = PromptTargetDataset(
            data, model_config.num_quantizers, int(codec["codebook_size"]), config.seed, draw=training
        )
        sources.append(CutBatches(manifest, data, dataset, config.seed, training))
    # From here on, each rank draws its own dropout.
    torch.manual_seed(config.seed + distributed.rank())
    parts = {"model": to_dict(model_config), "data": to_dict(data), "train": to_dict(config)}
    saved = {"config": parts, "codec": codec, "text_symbols": []}
    trainer = Trainer(model, config, sources[0], sources[1], saved)
    trainer.resume()
    return trainer.run()


def main(argv: Sequence[str] | None = None, defaults: Path | None = None) -> None:
    """Entry point; `defaults` is a recipe's YAML file."""
    parts = parse(__doc__ or "", [ModelConfig, DataConfig, TrainConfig], argv, defaults)
    config = parts[2]
    distributed.launch(train, tuple(parts), config.world_size, config.master_port)


if __name__ == "__main__":
    run(main)
