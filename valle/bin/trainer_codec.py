"""Train the project's own codec: `--train-stage 1` everything, then `2` the decoder against a discriminator; or `auto`.

Stage 2 keeps encoder and codebooks, so language models trained on the codes of stage 1 stay valid. `--init-from CODEC`
(valle_16khz, or a codec's folder) starts from its weights instead of random ones. `--export DIR` writes the newest
weights as a codec folder, for `--codec DIR`.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from valle.codecs import load_codec
from valle.codecs.spectral_codec import SpectralCodec, SpectralCodecConfig
from valle.codecs.training import CodecTraining
from valle.config import TrainConfig, chosen_by_user, option, parse, to_dict
from valle.data.manifests import read_manifest
from valle.data.waveforms import RandomSegments
from valle.engine import stages
from valle.engine.checkpoint import load_checkpoint, numbered_checkpoints
from valle.engine.trainer import Trainer
from valle.utils import distributed
from valle.utils.command import run
from valle.utils.errors import UserError
from valle.utils.log import setup_logger


@dataclass
class CodecDataConfig:
    """What the codec is trained on."""

    manifest: str = option(
        "data/manifests/cuts_all.jsonl.gz",
        "cuts with custom 'split' (train and validation are read), as stage 1 of a recipe writes; comma list",
        path=True,
    )
    segment: float = option(1.28, "seconds of a training piece")
    batch_size: int = option(24, "pieces in a batch")
    export: str | None = option(None, "write the newest codec of --exp-dir as a folder, and stop")


def split_paths(manifests: str, split: str) -> list[Path]:
    """Audio files of one split; of a recipe's joined and single cuts, the joined ones (the same audio)."""
    paths: dict[Path, None] = {}
    for manifest in manifests.split(","):
        cuts = [
            cut for cut in read_manifest(Path(manifest.strip())) if (cut.custom or {}).get("split") == split
        ]
        kinds = {(cut.custom or {}).get("kind") for cut in cuts}
        for cut in cuts:
            if "audio" not in kinds or (cut.custom or {}).get("kind") == "audio":
                paths[Path(cut.recording.sources[0].source)] = None
    return list(paths)


def export(exp_dir: Path, folder: Path) -> None:
    """Write the newest codec in `exp_dir` as a folder for `load_codec`.

    The newest, not the best: validation measures spectral distance alone, which the discriminator's training of
    stage 2 gives up a little of for a voice that does not buzz.
    """
    numbered = [item for kind in ("epoch", "checkpoint") for item in numbered_checkpoints(exp_dir, kind)]
    if not numbered:
        raise UserError(f"no epoch-N.pt or checkpoint-N.pt in '{exp_dir}'; train the codec first")
    contents = max((load_checkpoint(path) for _, path in numbered), key=lambda c: (c["step"], c["epoch"]))
    codec = SpectralCodec(SpectralCodecConfig(**contents["config"]["codec"]))
    prefix = "codec."
    weights = {k[len(prefix) :]: v for k, v in contents["model"].items() if k.startswith(prefix)}
    codec.load_state_dict(weights)
    codec.save(folder)
    print(f"wrote {folder} from step {contents['step']}, stage {contents['train_stage']}")


def start_codec(name: str) -> SpectralCodec:
    """The codec that a training starts from.

    Raises:
        UserError: there is none of that name, or it is of another kind.
    """
    codec = load_codec(name)
    if not isinstance(codec, SpectralCodec):
        raise UserError(
            f"--init-from '{name}' is not of the project's own kind of codec; expected valle_16khz or a folder"
        )
    return codec


def settle_architecture(asked: SpectralCodecConfig, config: TrainConfig) -> SpectralCodecConfig:
    """The architecture of a training: of what it goes on from, of `--init-from`, or what is asked for.

    Raises:
        UserError: flags ask for another one than there is.
    """
    begun = stages.find_begun(config)
    if begun is not None:
        if "codec" not in begun.contents["config"]:
            raise UserError(
                f"'{begun.path}' is no codec's checkpoint; give the codec an --exp-dir of its own"
            )
        found = SpectralCodecConfig(**begun.contents["config"]["codec"])
        whose, else_ = f"'{begun.path}' was trained with", "leave it out, or use another --exp-dir"
    elif config.init_from is not None:
        found = start_codec(config.init_from).config
        whose, else_ = f"--init-from '{config.init_from}' has", "leave one of them out"
    else:
        return asked
    for field in sorted(chosen_by_user(asked)):
        if getattr(asked, field) != getattr(found, field):
            flag = f"--{field.replace('_', '-')}"
            raise UserError(
                f"{flag} is {getattr(asked, field)}, but {whose} {getattr(found, field)}; {else_}"
            )
    return found


def train(data: CodecDataConfig, config: TrainConfig, architecture: SpectralCodecConfig) -> None:
    """The stage, or both one after the other."""
    numbers = (1, 2) if config.train_stage == "auto" else (config.train_stage,)
    for number in numbers:
        train_stage(data, dataclasses.replace(config, train_stage=number), architecture)


def train_stage(data: CodecDataConfig, config: TrainConfig, architecture: SpectralCodecConfig) -> None:
    """One stage of the training."""
    setup_logger(Path(config.exp_dir) / "log" / f"train-stage{config.train_stage}.log")
    torch.manual_seed(config.seed + distributed.rank())
    rate = architecture.sample_rate
    sources = [
        RandomSegments(split_paths(data.manifest, split), rate, data.segment, data.batch_size, seed)
        for split, seed in (("train", config.seed + 1000 * distributed.rank()), ("validation", 0))
    ]
    codec = SpectralCodec(architecture)
    if config.init_from is not None and stages.find_begun(config) is None:
        codec.load_state_dict(start_codec(config.init_from).state_dict())
    model = CodecTraining(codec)
    saved = {
        "config": {"codec": dataclasses.asdict(architecture), "data": to_dict(data), "train": to_dict(config)}
    }
    trainer = Trainer(model, config, sources[0], sources[1], saved)
    trainer.resume()
    trainer.run()


def main(argv: Sequence[str] | None = None, defaults: Path | None = None) -> None:
    """Entry point; `defaults` is a recipe's YAML file."""
    data, architecture, config = parse(
        __doc__ or "", [CodecDataConfig, SpectralCodecConfig, TrainConfig], argv, defaults
    )
    if data.export:
        return export(Path(config.exp_dir), Path(data.export))
    if config.train_stage not in (1, 2, "auto"):
        raise UserError(
            "--train-stage must be 1 (everything), 2 (decoder, adversarial) or auto for the codec"
        )
    stages.check_flags(config)
    architecture = settle_architecture(architecture, config)
    distributed.launch(
        train,
        (data, config, architecture),
        config.world_size,
        config.master_port,
        config.stuck_timeout,
    )


if __name__ == "__main__":
    run(main)
