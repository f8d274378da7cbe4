"""Prompt and target: where each recording is split. Per row, so no row depends on its neighbours.

How long a prompt is, is decided in one of four ways (`PromptRule`): a share of the recording, a share drawn anew for
each row and epoch, so many seconds, or what each cut itself says. A row may fill a gap instead (`draw_split`).
"""

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from valle.config import DataConfig, chosen_by_user
from valle.data.packed import CUT_MARK
from valle.utils.errors import UserError

DEFAULT_RATIO = 0.4  # of checkpoints that do not say theirs
# What decides about the prompt in place of --prompt-ratio; no two of them together.
MODES: dict[str, Any] = {"prompt_ratio_range": None, "prompt_seconds": None, "prompt_from_cut": False}


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


@dataclass(frozen=True)
class PromptRule:
    """How many frames of a recording are its prompt.

    Attributes:
        ratio: share of the recording, where nothing else is said.
        ratio_range: the share is drawn between the two instead, for each cut and epoch.
        seconds: so long instead.
        from_cut: as long as the cut's own mark says instead.
        frame_rate: of the codes in Hz; seconds and marks need it.
    """

    ratio: float = DEFAULT_RATIO
    ratio_range: tuple[float, float] | None = None
    seconds: float | None = None
    from_cut: bool = False
    frame_rate: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise UserError(f"--prompt-ratio is {self.ratio}, expected more than 0 and less than 1")
        if self.seconds is not None and not 0 < self.seconds < float("inf"):
            raise UserError(f"--prompt-seconds is {self.seconds:g}, expected more than 0")
        if self.in_seconds and not self.frame_rate:
            raise UserError(
                f"{'--prompt-from-cut' if self.from_cut else '--prompt-seconds'} needs the codec's frame rate, which "
                "codec.json in --manifest-dir would tell; run prepare.sh --stage 2 again, or use --prompt-ratio"
            )

    @property
    def in_seconds(self) -> bool:
        """Whether a prompt's length is given in seconds."""
        return self.from_cut or self.seconds is not None

    @classmethod
    def of(cls, settings: Mapping[str, Any], frame_rate: float | None, fixed: bool = False) -> "PromptRule":
        """The rule of a `DataConfig` as a dict, or of a checkpoint's, which may be older than a field.

        Args:
            settings: its fields.
            frame_rate: of the codes, in Hz.
            fixed: as validation splits: nothing is drawn.
        """
        given = settings.get("prompt_ratio_range")
        return cls(
            float(settings.get("prompt_ratio", DEFAULT_RATIO)),
            None if fixed else parse_ratio_range(given),
            settings.get("prompt_seconds"),
            bool(settings.get("prompt_from_cut", False)),
            frame_rate,
        )

    def describe(self) -> str:
        """How long a prompt is, as one says it: `40% of it`, `3 s`, `as long as each cut says`."""
        if self.from_cut:
            return "as long as each cut says"
        return f"{self.seconds:g} s" if self.seconds is not None else f"{self.ratio:.0%} of it"

    def frames(
        self, num_frames: int, cut_id: str, mark: float | None = None, epoch: int = 0, seed: int = 0
    ) -> int:
        """Frames of the prompt of one recording; depends on nothing but the arguments.

        Args:
            num_frames: of the recording, 2 or more.
            cut_id: its name.
            mark: what the cut itself says, in seconds; None or NaN where it says nothing.
            epoch: number of the epoch.
            seed: of the training.

        Raises:
            UserError: the cut is too short for the prompt asked for, or has no mark.
        """
        if self.frame_rate is None or not self.in_seconds:
            ratio = self.ratio
            if self.ratio_range is not None:
                ratio = drawn_ratio(*self.ratio_range, cut_id, epoch, seed)
            return prompt_length(num_frames, ratio)
        seconds = mark if self.from_cut else self.seconds
        if seconds is None or math.isnan(seconds):
            raise UserError(
                f"cut '{cut_id}' has no custom field '{CUT_MARK}', but --prompt-from-cut true expects the seconds of "
                "the prompt there in every cut; write it in stage 1, or use --prompt-seconds"
            )
        frames = round(seconds * self.frame_rate)
        if not 1 <= frames < num_frames:
            said = f"its '{CUT_MARK}'" if self.from_cut else "--prompt-seconds"
            advice = "correct it in stage 1" if self.from_cut else "raise --filter-min-duration"
            raise UserError(
                f"cut '{cut_id}': {said} is {seconds:g} s, {frames} frames, but it has {num_frames}, and prompt and "
                f"target need 1 or more each; {advice}"
            )
        return frames


def settle_prompt(config: DataConfig) -> DataConfig:
    """The configuration with one way to decide about the prompt.

    What the user has set wins over what the recipe's own YAML says.

    Raises:
        UserError: two that contradict each other.
    """
    active = [name for name, off in MODES.items() if getattr(config, name) not in (off, None)]
    chosen = [name for name in active if name in chosen_by_user(config)]
    left = chosen or active
    if left and left[0] != "prompt_ratio_range" and "prompt_ratio" in chosen_by_user(config):
        left = ["prompt_ratio", *left]
    if len(left) > 1:
        one, other = (f"--{name.replace('_', '-')}" for name in left[:2])
        raise UserError(f"{one} and {other} both say how long prompts are; leave one of them out")
    return dataclasses.replace(config, **{name: off for name, off in MODES.items() if name not in left})


def draw_split(
    num_frames: int,
    prompt: int,
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
        prompt: frames of the prompt that is continued.
    """

    def drawn(what: str) -> float:
        return uniform(f"{what} {seed} {epoch} {cut_id}")

    if num_frames >= 3 and drawn("infill") < infill_prob:
        length = min(num_frames - prompt, num_frames - 2)
        return RowSplit(0, 1 + int(drawn("place") * (num_frames - 1 - length)), length)
    if drawn("drop") < drop_prompt_prob:
        return RowSplit(prompt - 1, prompt, num_frames - prompt)
    return RowSplit(0, prompt, num_frames - prompt)


def drawn_ratio(low: float, high: float, cut_id: str, epoch: int, seed: int) -> float:
    """A ratio between `low` and `high` that depends on cut, epoch and seed alone, not on the batch."""
    return low + (high - low) * uniform(f"{seed} {epoch} {cut_id}")


def uniform(key: str) -> float:
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
