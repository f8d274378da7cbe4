"""Prompt and target: where each recording is cut in two. Per row, so no row depends on its neighbours."""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from valle.utils.errors import UserError


class PromptTarget(NamedTuple):
    """prompt (B, S, Q), prompt_lens (B,), target (B, T, Q), target_lens (B,); right-padded with 0."""

    prompt: Tensor
    prompt_lens: Tensor
    target: Tensor
    target_lens: Tensor


def split_prompt_target(codes: Tensor, codes_lens: Tensor, prompt_frames: int | Tensor) -> PromptTarget:
    """Split every recording into a prompt and the target that continues it.

    Args:
        codes: (B, T, Q) int64, right-padded.
        codes_lens: (B,) valid frames.
        prompt_frames: frames of every prompt, or of each, (B,).

    Raises:
        ValueError: a prompt is empty, or a recording ends inside its prompt.
    """
    prompt_lens = torch.as_tensor(prompt_frames, device=codes.device).expand(codes.shape[0]).long()
    target_lens = codes_lens - prompt_lens
    if int(prompt_lens.min()) < 1 or int(target_lens.min()) < 1:
        row = int(((prompt_lens < 1) | (target_lens < 1)).nonzero()[0])
        raise ValueError(
            f"row {row}: {int(codes_lens[row])} frames cannot be split into a prompt of {int(prompt_lens[row])} "
            "frames and a target of at least 1"
        )
    return PromptTarget(
        _window(codes, torch.zeros_like(prompt_lens), prompt_lens),
        prompt_lens,
        _window(codes, prompt_lens, target_lens),
        target_lens,
    )


def _window(codes: Tensor, starts: Tensor, lens: Tensor) -> Tensor:
    """Frames starts_i … starts_i + lens_i - 1 of each row, right-padded with 0."""
    columns = torch.arange(int(lens.max()), device=codes.device)
    source = (starts[:, None] + columns).clamp(max=codes.shape[1] - 1)
    window = codes.gather(1, source[..., None].expand(-1, -1, codes.shape[2]))
    return window.masked_fill((columns >= lens[:, None])[..., None], 0)


def prompt_length(num_frames: int, ratio: float) -> int:
    """Frames of the prompt: the ratio's share, but at least one frame on either side."""
    return min(max(1, int(num_frames * ratio)), num_frames - 1)


def drawn_ratio(low: float, high: float, cut_id: str, epoch: int, seed: int) -> float:
    """A ratio between `low` and `high` that depends on cut, epoch and seed alone, not on the batch."""
    digest = hashlib.sha1(f"{seed} {epoch} {cut_id}".encode()).digest()
    return low + (high - low) * int.from_bytes(digest[:6], "big") / 2**48


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
