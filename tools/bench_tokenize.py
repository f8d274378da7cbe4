"""How fast a codec tokenizes a corpus, beside the codec's bare forward on the same audio held in memory.

    python tools/bench_tokenize.py --codec valle_16khz --clips 300 --threads 2

Clips are made on the spot. A machine's speed drifts, so both take turns, and their ratio compares neighbours; what is
printed is the median over the rounds. The bare forward encodes batches, or clip by clip, whichever is faster. What
tokenizing does besides: read the manifest and the files (from the system's cache), hash, decode, mix and resample
them, write the codes and the new manifest.
"""

import os

# before torch loads OpenMP: threads that wait must not keep a core busy
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from valle.codecs import DEFAULT_CODEC, load_codec
from valle.codecs.base import Codec
from valle.config import option, parse
from valle.data.manifests import make_cut, make_recording, make_supervision, write_audio, write_cuts
from valle.data.shards import plan_windows
from valle.data.tokenization import BATCH_DURATION, READERS, load_wav, tokenize_manifest
from valle.utils.command import run
from valle.utils.errors import UserError
from valle.utils.files import write_json
from valle.utils.log import setup_logger

logger = logging.getLogger("valle.tools.bench_tokenize")


@dataclass
class BenchConfig:
    """What is measured."""

    codec: str = option(DEFAULT_CODEC, "codec name, folder, or hub name")
    device: str = option("cpu", "cpu, cuda or cuda:N")
    clips: int = option(300, "clips of the corpus")
    min_duration: float = option(2.0, "seconds of the shortest clip")
    max_duration: float = option(15.0, "seconds of the longest clip")
    sample_rate: int = option(16000, "Hz of the files")
    channels: int = option(1, "channels of the files")
    batch_duration: float = option(BATCH_DURATION, "see tokenizer.py")
    readers: int = option(READERS, "see tokenizer.py")
    threads: int = option(2, "threads of the codec")
    rounds: int = option(3, "times that both take turns")
    output: str | None = option(None, "JSON file for everything that was measured (default: none)")


def make_corpus(config: BenchConfig, folder: Path) -> tuple[Path, list[Any]]:
    """FLAC files of tones and noise, and their manifest."""
    draw = np.random.default_rng(0)
    cuts = []
    for number in range(config.clips):
        length = int(draw.uniform(config.min_duration, config.max_duration) * config.sample_rate)
        clock = np.arange(length) / config.sample_rate  # seconds
        tone = 0.3 * np.sin(2 * np.pi * (100 + 7 * number % 300) * clock + 3 * np.sin(5 * clock))
        wav = tone + 0.05 * draw.standard_normal((config.channels, length))
        path = folder / "audio" / f"clip-{number:05d}.flac"
        write_audio(path, wav, config.sample_rate)
        recording = make_recording(path.stem, path, wav.shape, config.sample_rate)
        supervision = make_supervision(recording, None, "nobody", None, "train")
        cuts.append(make_cut(recording, supervision, "audio"))
    manifest = folder / "cuts_all.jsonl.gz"
    write_cuts(manifest, cuts)
    return manifest, cuts


def bench(config: BenchConfig) -> dict[str, Any]:
    """Seconds that each way took in each round, the audio's length, and the medians."""
    for name in ("clips", "rounds", "threads"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} is {getattr(config, name)}, expected 1 or more")
    torch.set_num_threads(config.threads)
    codec = load_codec(config.codec, config.device)
    with tempfile.TemporaryDirectory(prefix="bench-tokenize-") as name:
        manifest, cuts = make_corpus(config, Path(name))
        batches = [
            [load_wav(place.cut, codec) for place in batch]
            for window in plan_windows(cuts, config.batch_duration)
            for batch in window
        ]
        runs: dict[str, Callable[[int], object]] = {
            "bare_batches": lambda number: _forward(codec, batches),
            "bare_clips": lambda number: _forward(codec, [[wav] for batch in batches for wav in batch]),
            "tokenizing": lambda number: tokenize_manifest(
                manifest, Path(name) / f"out-{number}", codec, 0, config.batch_duration, config.readers
            ),
        }
        _forward(codec, batches[-1:])
        seconds: dict[str, list[float]] = {way: [] for way in runs}
        for number in range(config.rounds):
            for way, work in runs.items():
                start = time.perf_counter()
                work(number)
                seconds[way].append(time.perf_counter() - start)
    audio = sum(cut.duration for cut in cuts)
    bare = [min(pair) for pair in zip(seconds["bare_batches"], seconds["bare_clips"], strict=True)]
    ratios = [whole / alone for whole, alone in zip(seconds["tokenizing"], bare, strict=True)]
    return {
        "codec": codec.name,
        "threads": config.threads,
        "clips": config.clips,
        "audio_seconds": audio,
        "seconds": seconds,
        "bare_speed": audio / median(bare),
        "tokenizing_speed": audio / median(seconds["tokenizing"]),
        "ratio": median(ratios),
    }


def _forward(codec: Codec, batches: Sequence[Sequence[Tensor]]) -> None:
    with torch.inference_mode():
        for wavs in batches:
            codes = codec.encode_batch(wavs)
    codes[-1].cpu()  # waits for the device


def describe(result: dict[str, Any]) -> str:
    """What is printed."""
    return (
        f"{result['codec']}, {result['clips']} clips, {result['audio_seconds'] / 60:.1f} min, {result['threads']}"
        f" threads: bare forward {result['bare_speed']:.0f} x real time, tokenizing"
        f" {result['tokenizing_speed']:.0f} x real time, {result['ratio']:.2f} x the bare forward's time"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    (config,) = parse("Measure how fast a codec tokenizes.", [BenchConfig], argv)
    setup_logger()
    result = bench(config)
    if config.output is not None:
        write_json(Path(config.output), result)
    print(describe(result))


if __name__ == "__main__":
    run(main)
