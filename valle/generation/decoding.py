"""The autoregressive loop: one step a frame, for a batch of rows that stop each on its own.

Knows no model: it is given the logits of the first frame and a function that takes the drawn codes and gives the
logits of the next one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from valle.generation.sampling import Sampling, sample
from valle.utils.errors import UserError


@dataclass
class Decoded:
    """What the loop gives for B rows of at most N frames.

    Attributes:
        tokens: (B, N) int64; behind a row's end, 0.
        lens: (B,) frames before the row's end.
        finish_reasons: "eos" or "length", one a row.
        log_probs: (B, N) natural log of the probability that the model (before any filter) gave each code; behind
            a row's end, 0.
    """

    tokens: Tensor
    lens: Tensor
    finish_reasons: list[str]
    log_probs: Tensor


@torch.no_grad()
def decode(
    logits: Tensor,
    step: Callable[[Tensor], Tensor],
    eos: int,
    sampling: Sampling,
    streams: Sequence[torch.Generator],
    max_new_tokens: int,
    min_new_tokens: int = 0,
    on_frame: Callable[[int], object] | None = None,
) -> Decoded:
    """Draw up to `max_new_tokens` codes a row.

    Args:
        logits: (B, V + 1) for the first new frame.
        step: codes (B,) -> logits (B, V + 1) of the frame behind them.
        eos: index of the end symbol. A row ends when it is *drawn*, and it is not part of the result.
        sampling, streams: how codes are drawn, see `sample`.
        max_new_tokens: exactly so many frames unless the row ends before.
        min_new_tokens: the end symbol is not drawn before so many frames.
        on_frame: called with the number of frames done, for progress bars.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}, expected 1 or more")
    batch = logits.shape[0]
    tokens = torch.zeros(batch, max_new_tokens, dtype=torch.long, device=logits.device)
    log_probs = torch.zeros(batch, max_new_tokens, device=logits.device)
    lens = torch.full((batch,), max_new_tokens, device=logits.device)
    running = torch.ones(batch, dtype=torch.bool, device=logits.device)
    for frame in range(max_new_tokens):
        logits = logits.float()
        allowed = logits
        if frame < min_new_tokens:
            allowed = logits.clone()
            allowed[:, eos] = -torch.inf
        drawn = sample(allowed, sampling, streams)
        ended = running & (drawn == eos)
        lens[ended] = frame
        running &= ~ended
        drawn = drawn.masked_fill(~running, 0)
        tokens[:, frame] = drawn
        chosen = logits.log_softmax(-1).gather(-1, drawn[:, None])[:, 0]
        log_probs[:, frame] = chosen * running
        if on_frame is not None:
            on_frame(frame + 1)
        if frame + 1 == max_new_tokens or not bool(running.any()):
            break
        logits = step(drawn)
    reasons = ["length" if flag else "eos" for flag in running.tolist()]
    longest = int(lens.max())
    return Decoded(tokens[:, :longest], lens, reasons, log_probs[:, :longest])
