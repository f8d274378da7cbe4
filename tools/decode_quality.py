"""What the faster ways of decoding cost: number formats and chunks, measured on a trained checkpoint and held-out cuts.

    python tools/decode_quality.py --checkpoint exp/audio-lm/best-valid-loss.pt \\
        --manifest data/tokenized/cuts_test.jsonl.gz --output quality.json

Every cut is split into prompt and target as in validation, and the target's true quantizer 0 is given, so that all ways
are asked the same questions:

    number formats   packed copies step by step, as they generate, against the unpacked model's float32 forward pass
                     over the whole target; then the NAR decoder. The fp32 copy tells whether stepping itself is exact
    chunks           quantizers 1 … Q-1 piece by piece, as a stream makes them, against the whole target at once; and
                     the sound of both against that of the true codes

A figure is the mean over cuts, weighted by their target frames, with its 95 % bootstrap interval over cuts. A quantizer
that differs changes what the next ones are given: their shares hold what was passed on to them, too.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from valle.codecs import Codec, matching_codec
from valle.config import option, parse, to_dict
from valle.data.checks import check_codec
from valle.data.dataset import load_codes, read_codec_info
from valle.data.manifests import read_manifest
from valle.data.packed import prompt_mark
from valle.data.split import PromptRule
from valle.evaluation.audio import log_mel_distance
from valle.evaluation.statistics import Interval, bootstrap_ci
from valle.generation.chunks import CHUNK_SECONDS, CONTEXT_SECONDS, LOOKAHEAD_SECONDS, Chunks
from valle.models import AudioLM, load_audio_lm
from valle.models.generating import ArSession, make_prompts, refine, refine_in_chunks
from valle.modules.packing import FORMATS, packed
from valle.utils.command import run
from valle.utils.errors import UserError
from valle.utils.files import write_json
from valle.utils.log import setup_logger
from valle.utils.progress import progress

logger = logging.getLogger("valle.tools.decode_quality")

# Seconds: every chunk with every lookahead at the default context, then the other contexts at the default chunk.
CHUNK_GRID = (0.25, 0.5, 1.0, 2.0)
LOOKAHEAD_GRID = (0.0, 0.1, 0.2, 0.5)
CONTEXT_GRID = (0.5, 1.0, 2.0, 3.0)

Figures = dict[str, float]  # of one cut, by name
Means = dict[str, Interval]  # over the cuts


@dataclass
class QualityConfig:
    """What is measured, on which cuts."""

    checkpoint: str = option("", "the model's checkpoint, e.g. exp/audio-lm/best-valid-loss.pt")
    manifest: str = option("", "held-out cuts, e.g. data/tokenized/cuts_test.jsonl.gz")
    max_cuts: int = option(0, "measure only the first so many cuts; 0: all")
    codec: str | None = option(
        None, "the same codec in another place (default: where the checkpoint says it is)"
    )
    seed: int = option(42, "seed of the intervals")
    output: str | None = option(None, "JSON file for the results (default: none)")


class CutCodes(NamedTuple):
    """A held-out cut.

    Attributes:
        prompt: (S, Q) int64.
        target: (T, Q) int64.
    """

    prompt: Tensor
    target: Tensor


def _row(codes: Tensor) -> tuple[Tensor, Tensor]:
    """(T, …) as a batch of one: (1, T, …) and its length (1,)."""
    return codes[None], torch.tensor([len(codes)])


def summarize(figures: Sequence[Figures], weights: Sequence[int], seed: int) -> Means:
    """The mean of every figure over the cuts, each weighted by its frames."""
    return {name: bootstrap_ci([row[name] for row in figures], seed, weights) for name in figures[0]}


def equal_shares(codes: Tensor, reference: Tensor) -> Figures:
    """The share of equal codes of each quantizer but 0; both (T, Q)."""
    shares = (codes == reference).double().mean(0)
    return {f"equal_q{quantizer}": float(shares[quantizer]) for quantizer in range(1, codes.shape[1])}


# ------------------------------------------------------------------------------ number formats


@torch.inference_mode()
def whole_logits(model: AudioLM, cut: CutCodes) -> Tensor:
    """(T, V + 1): what a model expects at each target frame, all frames in one pass."""
    return model.ar_logits(*_row(cut.prompt), *_row(cut.target[:, 0]))[0, :-1]


def stepped_logits(copy: AudioLM, cut: CutCodes) -> Tensor:
    """(T, V + 1): the same from a packed copy that generates, but is given the true code at every step."""
    session = ArSession(copy, make_prompts([cut.prompt]), len(cut.target))
    logits = [session.logits]
    for token in cut.target[:-1, :1]:
        session.step(token)
        logits.append(session.logits)
    return torch.cat(logits)


def compare_logits(logits: Tensor, reference: Tensor, codes: Tensor) -> Figures:
    """How far logits are from the reference's, both (T, V + 1).

    Args:
        codes: (T,) what came.

    Returns:
        top1: share of frames with the same likeliest code; kl_mean and kl_p99: mean and 99th percentile over the
        frames of KL(reference ‖ logits) in nats; nll: mean negative log-likelihood of `codes` in nats a frame;
        nll_change: how much higher than the reference's that is.
    """
    found, expected = (part.double().log_softmax(-1) for part in (logits, reference))
    divergence = (expected.exp() * (expected - found)).sum(-1).numpy()
    likelihoods, references = (part.gather(-1, codes[:, None]) for part in (found, expected))
    return {
        "top1": float((found.argmax(-1) == expected.argmax(-1)).double().mean()),
        "kl_mean": float(divergence.mean()),
        "kl_p99": float(np.quantile(divergence, 0.99)),
        "nll": -float(likelihoods.mean()),
        "nll_change": float((references - likelihoods).mean()),
    }


def measure_formats(model: AudioLM, cuts: Sequence[CutCodes], seed: int) -> dict[str, Means]:
    """Every number format against the unpacked model: format -> figures of `compare_logits` and `equal_shares`."""
    copies = {dtype: packed(model, dtype) for dtype in FORMATS}
    figures: dict[str, list[Figures]] = {dtype: [] for dtype in FORMATS}
    for cut in progress(cuts, desc="number formats", unit="cut"):
        tokens = _row(cut.target[:, 0])
        logits, codes = whole_logits(model, cut), refine(model, make_prompts([cut.prompt]), *tokens)[0]
        for dtype, copy in copies.items():
            found = refine(copy, make_prompts([cut.prompt]), *tokens)[0]
            compared = compare_logits(stepped_logits(copy, cut), logits, cut.target[:, 0])
            figures[dtype].append(compared | equal_shares(found, codes))
    frames = [len(cut.target) for cut in cuts]
    return {dtype: summarize(rows, frames, seed) for dtype, rows in figures.items()}


# -------------------------------------------------------------------------------------- chunks


class Setting(NamedTuple):
    """Chunks, and what they were asked for in seconds."""

    chunk: float
    lookahead: float
    context: float
    chunks: Chunks


def settings(frame_rate: float) -> list[Setting]:
    """All that are measured; without those whose chunk is not longer than its lookahead."""

    def frames(seconds: float) -> int:
        return max(1, int(seconds * frame_rate)) if seconds else 0

    asked = [(chunk, lookahead, CONTEXT_SECONDS) for chunk in CHUNK_GRID for lookahead in LOOKAHEAD_GRID]
    asked += [(CHUNK_SECONDS, LOOKAHEAD_SECONDS, context) for context in CONTEXT_GRID]
    return [
        Setting(chunk, lookahead, context, Chunks(frames(chunk), frames(lookahead), frames(context)))
        for chunk, lookahead, context in dict.fromkeys(asked)
        if frames(chunk) > frames(lookahead)
    ]


@torch.inference_mode()
def decode_target(codec: Codec, prompt: Tensor, target: Tensor) -> np.ndarray:
    """(C, T · hop): how a target (T, Q) sounds behind its prompt (S, Q)."""
    wav = codec.decode(torch.cat([prompt, target])[None])[0]
    return wav[:, len(prompt) * codec.hop_length :].numpy()


def measure_chunks(
    model: AudioLM, codec: Codec, cuts: Sequence[CutCodes], asked: Sequence[Setting], seed: int
) -> tuple[Means, list[Means]]:
    """Refining in chunks against refining the whole target.

    Returns:
        - of the whole target, and of each setting: log-mel distance to the sound of the true codes, `to_truth`;
        - of each setting also `equal_shares`, the distance to the whole's sound, `to_whole`, and by how much it is
          farther from the truth than the whole, `added`, paired by cut.
    """
    copy = packed(model, "fp32")
    whole_figures: list[Figures] = []
    figures: list[list[Figures]] = [[] for _ in asked]
    for cut in progress(cuts, desc="chunks", unit="cut"):
        tokens = cut.target[:, 0]
        whole = refine(copy, make_prompts([cut.prompt]), *_row(tokens))[0]
        truth, sound = (decode_target(codec, cut.prompt, codes) for codes in (cut.target, whole))
        distance = log_mel_distance(truth, sound, codec.sample_rate)
        whole_figures.append({"to_truth": distance})
        for setting, rows in zip(asked, figures, strict=True):
            # The length was asked for: the last piece is what is left when it is reached.
            codes = refine_in_chunks(copy, make_prompts([cut.prompt]), tokens, False, setting.chunks)
            wav = decode_target(codec, cut.prompt, codes)
            from_truth = log_mel_distance(truth, wav, codec.sample_rate)
            rows.append(
                {
                    **equal_shares(codes, whole),
                    "to_truth": from_truth,
                    "added": from_truth - distance,
                    "to_whole": log_mel_distance(sound, wav, codec.sample_rate),
                }
            )
    frames = [len(cut.target) for cut in cuts]
    return summarize(whole_figures, frames, seed), [summarize(rows, frames, seed) for rows in figures]


# -------------------------------------------------------------------------------- input, output


def read_cuts(config: QualityConfig, model: AudioLM, checkpoint: dict[str, Any]) -> list[CutCodes]:
    """The held-out cuts, split as the training's validation splits them.

    Raises:
        UserError: no cuts, a cut of one frame, or codes that are not of the checkpoint's codec.
    """
    path = Path(config.manifest)
    check_codec(checkpoint["codec"], read_codec_info(path.parent), config.checkpoint, path.parent)
    rule = PromptRule.of(
        checkpoint["config"].get("data", {}), checkpoint["codec"].get("frame_rate"), fixed=True
    )
    cuts = []
    for cut in list(read_manifest(path))[: config.max_cuts or None]:
        codes = torch.from_numpy(load_codes(cut, model.num_quantizers, model.codebook_size))
        if len(codes) < 2:
            raise UserError(
                f"cut '{cut.id}': 1 frame, expected 2 or more: a prompt and a target; leave it out"
            )
        frames = rule.frames(len(codes), cut.id, prompt_mark(cut))
        cuts.append(CutCodes(codes[:frames], codes[frames:]))
    if not cuts:
        raise UserError(f"'{path}' holds no cuts")
    return cuts


def measure(config: QualityConfig) -> dict[str, Any]:
    """Both tables; gives what `--output` writes.

    Raises:
        UserError: a file is missing, or cuts, checkpoint and codec do not fit together.
    """
    for name in ("checkpoint", "manifest"):
        if not getattr(config, name):
            raise UserError(f"--{name} is missing (see --help)")
    if config.max_cuts < 0:
        raise UserError(f"--max-cuts is {config.max_cuts}, expected 0 or more")
    if config.output is not None and Path(config.output).is_dir():
        raise UserError(f"--output is '{config.output}', a folder, expected a file to write")
    model, checkpoint = load_audio_lm(config.checkpoint)
    info = checkpoint["codec"] | ({"name": config.codec} if config.codec else {})
    codec = matching_codec(info, num_quantizers=model.num_quantizers)
    cuts = read_cuts(config, model, checkpoint)
    frames = sum(len(cut.target) for cut in cuts)
    logger.info("%d cuts, %.1f s of targets", len(cuts), frames / codec.frame_rate)

    formats = measure_formats(model, cuts, config.seed)
    asked = settings(codec.frame_rate)
    whole, chunked = measure_chunks(model, codec, cuts, asked, config.seed)
    return {
        "settings": to_dict(config),
        "checkpoint": {key: checkpoint.get(key) for key in ("step", "epoch", "train_stage")},
        # which kernels a format runs on, and so what it rounds, depends on both
        "machine": {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()},
        "cuts": len(cuts),
        "target_frames": frames,
        "frame_rate": codec.frame_rate,
        "formats": [{"dtype": dtype} | _plain(means) for dtype, means in formats.items()],
        "whole": _plain(whole),
        "chunks": [
            {"chunk_seconds": setting.chunk, "lookahead_seconds": setting.lookahead, "context_seconds": setting.context}
            | _plain(means)
            for setting, means in zip(asked, chunked, strict=True)
        ],
    }  # fmt: skip


def _plain(means: Means) -> dict[str, Any]:
    return {name: interval.to_dict() for name, interval in means.items()}


class Column(NamedTuple):
    """A column of a table: its heading, its key in the results, and how a number is shown."""

    heading: str
    key: str
    factor: float = 1.0
    style: str = ".2f"


def table(columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> str:
    """One line a row, as Markdown; intervals in brackets, "-" for what a row does not have."""

    def shown(value: Any, column: Column) -> str:
        if value is None:
            return "-"
        if isinstance(value, str):
            return value
        if not isinstance(value, dict):
            return format(value * column.factor, column.style)
        mean, low, high = (
            None if value[name] is None else format(value[name] * column.factor, column.style)
            for name in ("mean", "low", "high")
        )
        return f"{mean}" if low is None else f"{mean} [{low}, {high}]"

    cells = [[column.heading for column in columns]]
    cells += [[shown(row.get(column.key), column) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "\n".join(
        f"| {' | '.join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))} |"
        for row in cells
    )


def describe(results: dict[str, Any]) -> str:
    """The results as text: both tables."""
    quantizers = sorted(
        key.removeprefix("equal_q") for key in results["formats"][0] if key.startswith("equal_q")
    )
    shares = [Column(f"equal q{quantizer} %", f"equal_q{quantizer}", 100.0) for quantizer in quantizers]
    formats = [
        Column("format", "dtype"),
        Column("same top 1 %", "top1", 100.0),
        Column("mean KL, nats", "kl_mean", 1.0, ".1e"),
        Column("99 % KL, nats", "kl_p99", 1.0, ".1e"),
        Column("NLL", "nll", 1.0, ".3f"),
        Column("change of NLL, nats", "nll_change", 1.0, "+.1e"),
    ]
    chunks = [
        Column("chunk s", "chunk_seconds"),
        Column("lookahead s", "lookahead_seconds", 1.0, ".1f"),
        Column("context s", "context_seconds", 1.0, ".1f"),
        *shares,
        Column("log-mel to truth", "to_truth", 1.0, ".4f"),
        Column("more than whole", "added", 1.0, "+.4f"),
        Column("log-mel to whole", "to_whole", 1.0, ".4f"),
    ]
    seconds = results["target_frames"] / results["frame_rate"]
    return "\n".join(
        [
            f"{results['cuts']} cuts, {results['target_frames']} target frames ({seconds:.1f} s); means per frame, "
            "95 % intervals over cuts",
            "",
            "number formats, stepping, against the unpacked float32 model:",
            table([*formats, *shares], results["formats"]),
            "",
            "chunks against the whole target at once (last line):",
            table(chunks, [*results["chunks"], results["whole"]]),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    (config,) = parse("Measure what the faster ways of decoding cost.", [QualityConfig], argv)
    setup_logger()
    results = measure(config)
    if config.output is not None:
        write_json(config.output, results)
    print(describe(results))


if __name__ == "__main__":
    run(main)
