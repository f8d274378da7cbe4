"""Rows of codes and texts as a VALL-E needs them: cut out, put behind one another, with gaps filled in.

Shapes: B batch, T frames, P frames of a prompt, Q quantizers, S symbols or notes, F fields of a note.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from valle.data.split import split_prompt_target
from valle.modules.masks import lengths_to_mask


class NarRows(NamedTuple):
    """What the NAR decoder is given in training.

    Attributes:
        prompt: (B, P, Q); None: nothing.
        prompt_lens: (B,).
        target: (B, T, Q).
        target_lens: (B,).
        valid: (B, T), which target frames are learned.
    """

    prompt: Tensor | None
    prompt_lens: Tensor | None
    target: Tensor
    target_lens: Tensor
    valid: Tensor


def take(y: Tensor, starts: Tensor, lens: Tensor) -> Tensor:
    """(B, T, Q) -> (B, longest, Q): of each row the frames from `starts` (B,) on, `lens` (B,) of them, then 0."""
    columns = torch.arange(int(lens.max()), device=y.device)
    index = (starts[:, None] + columns).clamp(max=y.shape[1] - 1)
    taken = y.gather(1, index[..., None].expand(-1, -1, y.shape[2]))
    return taken.masked_fill((columns >= lens[:, None])[..., None], 0)


def join_codes(first: Tensor, first_lens: Tensor, second: Tensor, second_lens: Tensor) -> Tensor:
    """(B, P, Q) and (B, T, Q) -> (B, longest, Q), each row's frames without a gap, then anything."""
    both = torch.cat([first, second], 1)
    columns = torch.arange(int((first_lens + second_lens).max()), device=both.device)
    shift = (first.shape[1] - first_lens)[:, None]
    index = torch.where(columns < first_lens[:, None], columns, columns + shift).clamp(max=both.shape[1] - 1)
    return both.gather(1, index[..., None].expand(-1, -1, both.shape[2]))


def fill_gaps(
    drawn: NarRows, y: Tensor, y_lens: Tensor, prefix_lens: Tensor, suffix_lens: Tensor
) -> tuple[NarRows, Tensor | None]:
    """Where there is a gap, what is around it and in it in the place of what was drawn.

    Returns:
        the rows, and (B,) how many frames of each prompt stand before the target; None: all.
    """
    rows = suffix_lens.nonzero()[:, 0]
    if not len(rows):
        return drawn, None
    split = split_prompt_target(
        y[rows], y_lens[rows], prefix_lens[rows], (y_lens - prefix_lens - suffix_lens)[rows]
    )
    prompt, prompt_lens = drawn.prompt, drawn.prompt_lens
    if prompt is None or prompt_lens is None:
        prompt, prompt_lens = y[:, :0], torch.zeros_like(y_lens)
    learned = lengths_to_mask(split.target_lens, split.target.shape[1])
    filled = NarRows(
        _with_rows(prompt, rows, split.prompt),
        prompt_lens.index_copy(0, rows, split.prompt_lens),
        _with_rows(drawn.target, rows, split.target),
        drawn.target_lens.index_copy(0, rows, split.target_lens),
        _with_rows(drawn.valid[..., None], rows, learned[..., None])[..., 0],
    )
    return filled, prompt_lens.index_copy(0, rows, split.prefix_lens)


def _with_rows(x: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    """(B, T, Q) with some rows (R,) replaced by those of (R, U, Q), as wide as the wider one."""
    width = max(x.shape[1], new.shape[1])
    x, new = (F.pad(part, (0, 0, 0, width - part.shape[1])) for part in (x, new))
    return x.index_copy(0, rows, new)


def without_prompt_text(x: Tensor, lens: Tensor, prompt_lens: Tensor, ends: bool) -> tuple[Tensor, Tensor]:
    """Texts (B, S) or (B, S, F) without what is the prompt's, and their lengths; see `VALLE.generate`.

    Args:
        prompt_lens: (B,).
        ends: texts have symbols for begin and end; they stay.
    """
    dropped = (prompt_lens - 2 * ends).clamp(min=0)
    columns = torch.arange(x.shape[1], device=x.device)
    index = torch.where(columns < int(ends), columns, dropped[:, None] + columns).clamp(max=x.shape[1] - 1)
    if x.dim() == 3:
        return x.gather(1, index[..., None].expand(-1, -1, x.shape[2])), lens - dropped
    return x.gather(1, index), lens - dropped
