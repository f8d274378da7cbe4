"""Encode every cut of a manifest with a codec: recordings -> codes. See valle/data/tokenization.py."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from valle.codecs import DEFAULT_CODEC, load_codec
from valle.config import option, parse
from valle.data.shar import SHARD_SIZE, write_shar
from valle.data.tokenization import BATCH_DURATION, READERS, merge_shards, tokenize_shard
from valle.utils import distributed
from valle.utils.command import run
from valle.utils.errors import UserError
from valle.utils.log import setup_logger

logger = logging.getLogger("valle.bin.tokenizer")

PATIENCE = 30 * 86400.0  # seconds: a rank that is done waits for the last one, however long that takes


@dataclass
class TokenizerConfig:
    """Tokenizer"""

    manifest: str = option("data/manifests/cuts_all.jsonl.gz", "lhotse cuts to encode")
    output_dir: str = option("data/tokenized", "where codes and cuts with codes go")
    codec: str = option(DEFAULT_CODEC, "codec name, folder, or hub name")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    num_quantizers: int | None = option(None, "quantizers to store (default: all that the codec has)")
    max_skipped: int = option(-1, "end with an error when more cuts cannot be encoded; -1: no limit")
    batch_duration: float = option(
        BATCH_DURATION, "seconds of audio that are encoded together, padding included"
    )
    readers: int = option(READERS, "threads that read and resample audio while the codec works")
    world_size: int = option(1, "processes, a shard each; torchrun starts them on several machines")
    num_shards: int | None = option(
        None, "divide the work for so many runs, started by hand or by a scheduler"
    )
    shard: int | None = option(
        None, "which of --num-shards this run does, from 0; the last to end merges all"
    )
    shar: str | None = option(None, "write cuts and codes as lhotse Shar into this folder as well")
    shar_size: int = option(SHARD_SIZE, "cuts in a file of --shar")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    (config,) = parse(
        "Encode every cut of a manifest with a codec.", [TokenizerConfig], argv, prog="tokenizer.py"
    )
    setup_logger()
    if not Path(config.manifest).is_file():
        raise UserError(f"manifest '{config.manifest}' does not exist; run prepare.sh --stage 1")
    if (config.num_shards is None) != (config.shard is None):
        raise UserError("--num-shards and --shard belong together: --num-shards 4 --shard 0, … --shard 3")
    distributed.launch(tokenize, (config,), config.world_size, timeout=PATIENCE)


def tokenize(config: TokenizerConfig) -> None:
    """One process's shard, and what comes after the last shard.

    Raises:
        UserError: --num-shards in several processes that know of each other; see also `tokenize_manifest`.
    """
    manifest, output_dir = Path(config.manifest), Path(config.output_dir)
    shard, num_shards = distributed.rank(), distributed.world_size()
    if config.num_shards is not None and config.shard is not None:
        if num_shards > 1:
            raise UserError(f"--num-shards with {num_shards} processes: each of them is a shard already")
        shard, num_shards = config.shard, config.num_shards
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    codec = load_codec(config.codec, device, config.num_quantizers)
    result = tokenize_shard(
        manifest,
        output_dir,
        codec,
        shard,
        num_shards,
        config.max_skipped,
        config.batch_duration,
        config.readers,
        show=distributed.rank() == 0,
    )
    results = distributed.all_gather_objects(result)  # waits for all
    if distributed.rank() > 0:
        return
    logger.info(
        "%d cuts encoded (%.2f h), %d were there already, %d left out",
        sum(result.encoded for result in results),
        sum(result.encoded_duration for result in results) / 3600,
        sum(result.reused for result in results),
        sum(result.skipped for result in results),
    )
    merged = merge_shards(manifest, output_dir, codec, num_shards, config.max_skipped, config.batch_duration)
    if merged is not None and config.shar is not None:
        write_shar(output_dir / "cuts_all.jsonl.gz", Path(config.shar), config.shar_size)


if __name__ == "__main__":
    run(main)
