"""Prompt and target: where each recording is split. Per row, so no row depends on its neighbours."""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from valle.utils.errors import UserError


class PromptTarget(NamedTuple):
    """Prompts and targets of a batch, right-padded with 0.

    Attributes:
        prompt: (B, S, Q): what stands before the target, directly followed by what stands behind it, if anything.
        prompt_lens: (B,).
        target: (B, T, Q).
        target_lens: (B,).
        prefix_lens: (B,) frames of the prompt that stand before the target; all, where the target continues it.
    """

    prompt: Tensor
    prompt_lens: Tensor
    target: Tensor
    target_lens: Tensor
    prefix_lens: Tensor


class RowSplit(NamedTuple):
    """Where one recording is split, in frames.

    Attributes:
        prompt_start: first frame of the prompt; what is before it is left out.
        target_start: first frame of the target.
        target_len: frames of the target; what is behind it belongs to the prompt.
    """

    prompt_start: int
    target_start: int
    target_len: int


def split_prompt_target(
    codes: Tensor,
    codes_lens: Tensor,
    target_starts: int | Tensor,
    target_lens: Tensor | None = None,
    prompt_starts: int | Tensor = 0,
) -> PromptTarget:
    """Split every recording into a target and the prompt around it.

    Args:
        codes: (B, T, Q) int64, right-padded.
        codes_lens: (B,) valid frames.
        target_starts: first frame of every target, or of each, (B,).
        target_lens: (B,) frames of each target (default: to the recording's end, so that it continues the prompt).
        prompt_starts: first frame of every prompt, or of each, (B,).

    Raises:
        ValueError: a prompt or a target is empty or not inside its recording.
    """
    starts, begins = (
        torch.as_tensor(frames, device=codes.device).expand(codes.shape[0]).long()
        for frames in (target_starts, prompt_starts)
    )
    if target_lens is None:
        target_lens = codes_lens - starts
    prefix_lens = starts - begins
    suffix_lens = codes_lens - starts - target_lens
    prompt_lens = prefix_lens + suffix_lens
    least = torch.stack([begins, prefix_lens, suffix_lens, prompt_lens - 1, target_lens - 1]).amin(0)
    if int(least.min()) < 0:
        row = int((least < 0).nonzero()[0])
        raise ValueError(
            f"row {row}: {int(codes_lens[row])} frames cannot be split into a target of {int(target_lens[row])} from "
            f"frame {int(starts[row])} on and a prompt from frame {int(begins[row])} on, of at least 1 each"
        )
    return PromptTarget(
        _window(codes, begins, prompt_lens, (prefix_lens, target_lens)),
        prompt_lens,
        _window(codes, starts, target_lens),
        target_lens,
        prefix_lens,
    )


def _window(codes: Tensor, starts: Tensor, lens: Tensor, gap: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """lens_i frames of each row from starts_i on, right-padded with 0.

    A gap (behind so many of them, frames left out), (B,) each, is jumped over.
    """
    columns = torch.arange(int(lens.max()), device=codes.device)
    source = starts[:, None] + columns
    if gap is not None:
        source = source + gap[1][:, None] * (columns >= gap[0][:, None])
    source = source.clamp(max=codes.shape[1] - 1)
    window = codes.gather(1, source[..., None].expand(-1, -1, codes.shape[2]))
    return window.masked_fill((columns >= lens[:, None])[..., None], 0)


def prompt_length(num_frames: int, ratio: float) -> int:
    """Frames of the prompt: the ratio's share, but at least one frame on either side."""
    return min(max(1, int(num_frames * ratio)), num_frames - 1)


def draw_split(
    num_frames: int,
    ratio: float,
    infill_prob: float,
    drop_prompt_prob: float,
    cut_id: str,
    epoch: int,
    seed: int,
) -> RowSplit:
    """How one recording is used in one epoch; depends on cut, epoch and seed alone, not on the batch.

    - A gap to fill (fill-in-the-middle, arXiv 2207.14255), in a share `infill_prob` of the recordings of 3 frames or
      more: as long as the continuation would be, anywhere with 1 frame or more on either side.
    - A continuation of the last frame alone, in a share `drop_prompt_prob` of the others: what classifier-free
      guidance (arXiv 2207.12598) holds against the model's view of the prompt.
    - A continuation of the prompt.

    Args:
        num_frames: of the recording, 2 or more.
        ratio: part of it that is the prompt.
    """

    def drawn(what: str) -> float:
        return _uniform(f"{what} {seed} {epoch} {cut_id}")

    prompt = prompt_length(num_frames, ratio)
    if num_frames >= 3 and drawn("infill") < infill_prob:
        length = min(num_frames - prompt, num_frames - 2)
        return RowSplit(0, 1 + int(drawn("place") * (num_frames - 1 - length)), length)
    if drawn("drop") < drop_prompt_prob:
        return RowSplit(prompt - 1, prompt, num_frames - prompt)
    return RowSplit(0, prompt, num_frames - prompt)


def drawn_ratio(low: float, high: float, cut_id: str, epoch: int, seed: int) -> float:
    """A ratio between `low` and `high` that depends on cut, epoch and seed alone, not on the batch."""
    return low + (high - low) * _uniform(f"{seed} {epoch} {cut_id}")


def _uniform(key: str) -> float:
    """A number from 0 to (not including) 1 drawn by a text."""
    return int.from_bytes(hashlib.sha1(key.encode()).digest()[:6], "big") / 2**48


def parse_ratio_range(text: str | None) -> tuple[float, float] | None:
    """`LOW,HIGH` -> two numbers.

    Raises:
        UserError: not two numbers with 0 < LOW ≤ HIGH < 1.
    """
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--prompt-ratio-range is '{text}', expected LOW,HIGH as in 0.2,0.6") from error
    if not 0 < low <= high < 1:
        raise UserError(f"--prompt-ratio-range is '{text}', expected 0 < LOW <= HIGH < 1")
    return low, high
