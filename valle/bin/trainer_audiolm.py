"""Train an AudioLM on codec tokens: `--train-stage auto` AR, then NAR; `1` AR, `2` NAR, or `0` both at once.

Stage 2 starts from stage 1's best checkpoint in --exp-dir. Run again with the same flags, a training goes on where
it stopped. Manifests are those that a recipe's prepare.sh writes (cuts_train and cuts_validation.jsonl.gz).
`--init-from CKPT` fine-tunes another model's checkpoint, with `--lora-rank N` by small adapters beside its weights.
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from valle.codecs import load_codec, matching_codec
from valle.config import DataConfig, ModelConfig, TrainConfig, parse, to_dict
from valle.data.dataset import CutBatches, PromptTargetDataset, describe_codes
from valle.engine import stages
from valle.engine.adapters import Adapters
from valle.engine.samples import ContinuationSamples, choose
from valle.engine.trainer import Trainer
from valle.models import AudioLM, build_model
from valle.utils import distributed
from valle.utils.command import run
from valle.utils.errors import UserError
from valle.utils.log import setup_logger

log = logging.getLogger(__name__)


def train(model_config: ModelConfig, data: DataConfig, config: TrainConfig) -> dict[str, float]:
    """The stage, or the stages one after the other; returns the last validation's figures."""
    stages.check_flags(config)
    if config.train_stage != "auto":
        return train_stage(model_config, data, config)
    figures = train_stage(model_config, data, dataclasses.replace(config, train_stage=1))
    if model_config.num_quantizers == 1:
        log.info("one quantizer: there is no NAR decoder, and no stage 2")
        return figures
    return train_stage(model_config, data, dataclasses.replace(config, train_stage=2))


def train_stage(model_config: ModelConfig, data: DataConfig, config: TrainConfig) -> dict[str, float]:
    """One stage of the training; returns the last validation's figures."""
    folder = Path(data.manifest_dir)
    manifests = [folder / f"cuts_{split}.jsonl.gz" for split in ("train", "validation")]
    if not folder.is_dir():
        raise UserError(f"--manifest-dir '{folder}' is not there; run the recipe's prepare.sh first")
    setup_logger(Path(config.exp_dir) / "log" / f"train-stage{config.train_stage}.log")
    codec = describe_codes(folder, manifests[0])
    start = stages.find_start(config)
    if start is not None:
        stages.check_codec(start.contents["codec"], codec, start.path, folder)
        stages.take_architecture(model_config, start.path, start.contents, config.init_parts)
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
    trained: list[int] = []
    if start is not None and start.with_weights:
        trained = stages.load_parts(model, start.path, start.contents, config.init_parts)
    adapters = None
    if config.lora_rank > 0:
        adapters = Adapters(model, int(config.train_stage), config.lora_rank, config.lora_alpha)
    sources = []
    for manifest, training in zip(manifests, (True, False), strict=True):
        dataset = PromptTargetDataset(
            data, model_config.num_quantizers, int(codec["codebook_size"]), config.seed, draw=training
        )
        sources.append(
            CutBatches(manifest, data, dataset, config.seed, training, config.accumulate_grad_steps)
        )
    samples = make_samples(config, codec, sources[1], model_config.num_quantizers)
    # From here on, each rank draws its own dropout.
    torch.manual_seed(config.seed + distributed.rank())
    parts = {"model": to_dict(model_config), "data": to_dict(data), "train": to_dict(config)}
    saved = {"config": parts, "codec": codec, "text_symbols": [], "stages": trained}
    trainer = Trainer(model, config, sources[0], sources[1], saved, samples, adapters)
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


def make_samples(
    config: TrainConfig, info: dict[str, Any], valid: CutBatches, num_quantizers: int
) -> ContinuationSamples | None:
    """Audio of a few validation cuts every --sample-interval; where the codec is not at hand, say so and do without."""
    if not config.sample_interval:
        return None
    if config.parallel == "fsdp":
        log.warning("no audio samples: with --parallel fsdp, no process has the whole model")
        return None
    try:
        codec = matching_codec(info, num_quantizers=num_quantizers)
    except UserError as error:
        log.warning("no audio samples: %s", error)
        return None
    places = choose(valid.codes.durations[valid.kept].tolist(), config.seed)
    rows = [
        torch.from_numpy(valid.codes[valid.kept[place]][:, :num_quantizers].astype("int64"))
        for place in places
    ]
    log.info("audio samples every %d steps of %s", config.sample_interval,
             ", ".join(valid.codes.id(valid.kept[place]) for place in places))  # fmt: skip
    return ContinuationSamples(codec, rows, seed=config.seed)


def main(argv: Sequence[str] | None = None, defaults: Path | None = None) -> None:
    """Entry point; `defaults` is a recipe's YAML file."""
    parts = parse(__doc__ or "", [ModelConfig, DataConfig, TrainConfig], argv, defaults)
    config = parts[2]
    distributed.launch(train, tuple(parts), config.world_size, config.master_port, config.stuck_timeout)


if __name__ == "__main__":
    run(main)
