"""Train an AudioLM on codec tokens: `--train-stage 1` AR, then `2` NAR, or `0` both at once.

Stage 2 starts from stage 1's best checkpoint in --exp-dir. Run again with the same flags, a training goes on where
it stopped. Manifests are those that a recipe's prepare.sh writes (cuts_train and cuts_validation.jsonl.gz).
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from valle.codecs import load_codec
from valle.config import DataConfig, ModelConfig, TrainConfig, parse, to_dict
from valle.data.dataset import CutBatches, PromptTargetDataset, describe_codes
from valle.engine.trainer import Trainer
from valle.models import AudioLM, build_model
from valle.utils import distributed
from valle.utils.command import run
from valle.utils.errors import UserError
from valle.utils.log import setup_logger

log = logging.getLogger(__name__)


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
    if model_config.codebook_embedding:
        start_embeddings(model, codec)
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


def start_embeddings(model: AudioLM, info: dict[str, Any]) -> None:
    """Start the model's tables from the codec's vectors; where that cannot be, say so and go on with random ones."""
    reason = "its vectors do not add up"
    try:
        codec = load_codec(info["name"], num_quantizers=model.num_quantizers) if info.get("name") else None
        codebooks = codec.codebooks() if codec is not None else None
    except UserError as error:
        codebooks, reason = None, str(error)
    if codebooks is None:
        log.info("embeddings start at random: codec %s: %s", info.get("name"), reason)
    else:
        model.start_from_codebooks(codebooks)


def main(argv: Sequence[str] | None = None, defaults: Path | None = None) -> None:
    """Entry point; `defaults` is a recipe's YAML file."""
    parts = parse(__doc__ or "", [ModelConfig, DataConfig, TrainConfig], argv, defaults)
    config = parts[2]
    distributed.launch(train, tuple(parts), config.world_size, config.master_port)


if __name__ == "__main__":
    run(main)
