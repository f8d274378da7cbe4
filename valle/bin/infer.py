"""Continue a recording: `infer.py --prompt clip.wav` writes <clip>_full.wav and <clip>_continuation.wav.

The prompt may have any sample rate and channel count, or be codec tokens (.npy, frames x quantizers). Architecture and
codec come from the checkpoint.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from valle.codecs import Codec, load_codec
from valle.config import option, parse
from valle.engine.trainer import pick_device
from valle.models import load_model
from valle.models.builder import find_checkpoint
from valle.utils.audio import convert_audio, load_audio, save_audio
from valle.utils.command import run
from valle.utils.errors import UserError
from valle.utils.progress import progress

MIN_PROMPT = 0.5  # seconds; less tells nothing about the sound to continue


@dataclass
class InferConfig:
    """What is continued, and how."""

    prompt: str | None = option(
        None, "recording (wav, flac, ogg, mp3, m4a, …) or codes (.npy) to continue; comma list"
    )
    checkpoint: str | None = option(
        None, "checkpoint (default: the newest best-valid-loss.pt in the recipe's exp/)"
    )
    output_dir: str = option(".", "where the results go")
    max_new_tokens: int | None = option(None, "frames to add (default: 500)")
    duration: float | None = option(None, "seconds to add, instead of --max-new-tokens")
    max_prompt_duration: float = option(10.0, "of a longer prompt, the last so many seconds are continued")
    top_k: int = option(50, "codes to draw from; 0: all")
    top_p: float = option(1.0, "probability mass to draw from")
    temperature: float = option(1.0, "0: always the likeliest code; higher: more surprising")
    seed: int = option(0, "of the draw; the same seed gives the same result")
    stop_at_eos: bool = option(False, "end where the model draws the end, even before the asked length")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")


def read_prompt(path: Path, codec: Codec, num_quantizers: int, max_seconds: float) -> Tensor:
    """A recording or .npy file as prompt codes.

    Returns:
        (S, Q) int64, the last `max_seconds` of it.

    Raises:
        UserError: not readable, shorter than MIN_PROMPT, or codes that do not fit the codec.
    """
    if path.suffix.lower() == ".npy":
        codes = _read_codes(path, codec, num_quantizers)
        seconds = len(codes) / codec.frame_rate
    else:
        wav, sample_rate = load_audio(path)
        seconds = wav.shape[1] / sample_rate
        if seconds >= MIN_PROMPT:
            wav = wav[:, -round(max_seconds * sample_rate) :]
            converted = torch.from_numpy(convert_audio(wav, sample_rate, codec.sample_rate, codec.channels))
            codes = codec.encode(converted[None].to(codec.device))[0, :, :num_quantizers].cpu()
    if seconds < MIN_PROMPT:
        raise UserError(
            f"prompt '{path}' lasts {seconds:.2f} s, expected at least {MIN_PROMPT} s (3 to 5 s work best)"
        )
    return codes[-round(max_seconds * codec.frame_rate) :]


def _read_codes(path: Path, codec: Codec, num_quantizers: int) -> Tensor:
    if not path.is_file():
        raise UserError(f"prompt '{path}' does not exist")
    try:
        codes = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"prompt '{path}' is not a NumPy array: {error}") from error
    if codes.ndim != 2 or codes.shape[1] != num_quantizers or not np.issubdtype(codes.dtype, np.integer):
        raise UserError(
            f"prompt '{path}': {codes.dtype} array {codes.shape}, "
            f"expected integers (frames, {num_quantizers} quantizers)"
        )
    if codes.size and (codes.min() < 0 or codes.max() >= codec.codebook_size):
        raise UserError(
            f"prompt '{path}': codes from {codes.min()} to {codes.max()}, expected 0 to {codec.codebook_size - 1}"
        )
    return torch.from_numpy(codes.astype(np.int64))


def matching_codec(info: dict[str, object], device: torch.device) -> Codec:
    """The codec that made a checkpoint's training codes.

    Raises:
        UserError: it has other weights now.
    """
    name = info.get("name")
    if not name:
        raise UserError("the checkpoint does not name its codec; its training manifest had no codec.json")
    codec = load_codec(str(name), device, int(str(info["num_quantizers"])))
    if info.get("fingerprint") and codec.fingerprint() != info["fingerprint"]:
        raise UserError(
            f"codec '{name}' has fingerprint {codec.fingerprint()}, but the checkpoint was trained on codes of "
            f"{info['fingerprint']}: other weights; use the checkpoint with the version it was trained with"
        )
    return codec


def infer(config: InferConfig, recipe: Path | None = None) -> list[Path]:
    """Continue every prompt; returns the files written."""
    if not config.prompt:
        raise UserError("--prompt clip.wav is required: the recording to continue")
    if config.max_new_tokens is not None and config.duration is not None:
        raise UserError("--max-new-tokens and --duration say the same thing; give one of them")
    prompts = [Path(part.strip()) for part in config.prompt.split(",")]
    for path in prompts:
        if not path.exists():
            raise UserError(f"prompt '{path}' does not exist")
    device = pick_device(config.device)
    checkpoint = Path(config.checkpoint) if config.checkpoint else find_checkpoint(recipe)
    model, contents = load_model(checkpoint, device)
    codec = matching_codec(contents["codec"], device)
    frames = config.max_new_tokens if config.max_new_tokens is not None else 500
    if config.duration is not None:
        frames = round(config.duration * codec.frame_rate)
    if frames < 1:
        raise UserError(f"{frames} frames are to be added, expected 1 or more (--max-new-tokens, --duration)")
    codes = [read_prompt(path, codec, model.num_quantizers, config.max_prompt_duration) for path in prompts]
    lens = torch.tensor([len(row) for row in codes])
    padded = torch.nn.utils.rnn.pad_sequence(codes, batch_first=True)
    started = time.monotonic()
    with progress(total=frames, desc="generating", unit="frame") as bar:
        result = model.generate(
            padded, lens, frames, config.temperature, config.top_k, config.top_p, config.seed,
            min_new_tokens=0 if config.stop_at_eos else frames, on_frame=lambda done: bar.update(1),
        )  # fmt: skip
    elapsed = time.monotonic() - started
    written = []
    for path, row, prompt_len, reason in zip(
        prompts, result.codes, result.prompt_lens, result.finish_reasons, strict=True
    ):
        wav = codec.decode(row[None].to(device))[0].cpu().numpy()
        added = (len(row) - prompt_len) / codec.frame_rate
        start = round(prompt_len * codec.hop_length)
        full, continuation = (
            Path(config.output_dir) / f"{path.stem}_{part}.wav" for part in ("full", "continuation")
        )
        save_audio(full, wav, codec.sample_rate)
        if added == 0:
            raise UserError(f"the model ended '{path}' at once; try another --seed, or --stop-at-eos false")
        save_audio(continuation, wav[:, start:], codec.sample_rate)
        print(
            f"{continuation}  {added:.1f} s added to {prompt_len / codec.frame_rate:.1f} s (ended by {reason})"
        )
        print(f"{full}")
        written += [full, continuation]
    total = sum(len(row) for row in result.codes) - int(lens.sum())
    print(
        f"checkpoint {checkpoint}, {total / elapsed:.0f} frames/s, {total / codec.frame_rate / elapsed:.1f} x real time"
    )
    return written


def main(argv: Sequence[str] | None = None, defaults: Path | None = None, recipe: Path | None = None) -> None:
    """Entry point; without --checkpoint, looks in the recipe's exp/, else in ./exp and ./egs/*/exp."""
    (config,) = parse(__doc__ or "", [InferConfig], argv, defaults)
    infer(config, recipe)


if __name__ == "__main__":
    run(main)
