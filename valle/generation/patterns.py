"""Steps of several codes, drawn one code at a time: what stands between a `FrameLoop` and a model with a `Pattern`.

To the loop, each draw is a frame: rows end, leave and are counted as ever. Codes of a step that are known (the rest of
a prompt), or that are none (before the first frame and behind the last one of a delayed quantizer), are drawn with
certainty.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from valle.modules.patterns import Pattern

NONE = -1  # instead of a code


class StepSession(Protocol):
    """A model in the middle of generating, for A rows that are still in; as `Session`, but with K codes a step."""

    @property
    def logits(self) -> Tensor:
        """(A, K, V + 1) of the next step; of flatten, K is Q and the quantizer's that is said."""

    def step(self, tokens: Tensor) -> None:
        """Take the ids (A, K) of a step."""

    def drop(self, row: int) -> None:
        """Row `row` leaves and the last row takes its place."""


class _Row:
    """Where a row is.

    Attributes:
        known: (P, Q) codes of its prompt.
        first: the first step that is not wholly known.
        frames: at most so many new ones.
        end: frame before which it has ended, once it has; of delay alone.
        ids: of the step that is being drawn.
    """

    def __init__(self, known: list[list[int]], first: int, frames: int) -> None:
        self.known, self.first, self.frames = known, first, frames
        self.end: int | None = None
        self.ids: list[int] = []


class PatternSession:
    """The `Session` that a loop is given.

    Args:
        session: the model.
        pattern: its order of codes.
        prompts: (P_i, Q) codes that stand before what is generated, of each row.
        frames: at most so many new frames, of each row.
        min_frames: before so many, the end is not drawn.
    """

    def __init__(
        self,
        session: StepSession,
        pattern: Pattern,
        prompts: Sequence[Tensor],
        frames: Sequence[int],
        min_frames: int,
    ) -> None:
        self._session, self._pattern, self._min_frames = session, pattern, min_frames
        firsts = pattern.whole_steps(torch.tensor([len(prompt) for prompt in prompts])).tolist()
        self._rows = [
            _Row(prompt.tolist(), first, limit)
            for prompt, first, limit in zip(prompts, firsts, frames, strict=True)
        ]
        self._step, self._slot = 0, 0  # steps since the prompt, and slot of the draw to come
        size = pattern.codebook_size
        self.end, self.eos = size, size + 1  # of the model, and of the loop

    def draws(self, row: int) -> int:
        """Draws of row `row`, at most, before the loop's end; to be asked before the first one."""
        state, pattern = self._rows[row], self._pattern
        total = len(state.known) + state.frames
        if pattern.name == "delay":  # and the step in which quantizer 0 says that it has ended
            return (max(pattern.steps(total), total + 1) - state.first) * pattern.slots + 1
        if pattern.name == "flatten":
            return state.frames * pattern.num_quantizers
        return total - state.first * pattern.group_size

    @property
    def logits(self) -> Tensor:
        """(A, V + 2) of the next draw: codes, the model's end, the loop's end."""
        given = self._session.logits
        size = self._pattern.codebook_size
        if self._pattern.name == "flatten":
            quantizer = self._step % self._pattern.num_quantizers
            found = given[:, quantizer]
        else:
            found = given[:, self._slot]
        out = torch.full((len(self._rows), size + 2), -math.inf, device=given.device)
        out[:, : size + 1] = found.float()
        for number, row in enumerate(self._rows):
            forced, may_end = self._wish(row)
            if forced is not None:
                out[number] = -math.inf
                out[number, max(forced, 0)] = 0.0
                continue
            if self._pattern.name != "delay":  # an end is the loop's at once
                out[number, self.eos] = out[number, self.end]
                out[number, self.end] = -math.inf
            if not may_end:
                out[number, self.end] = out[number, self.eos] = -math.inf
        return out

    def _wish(self, row: _Row) -> tuple[int | None, bool]:
        """The code that is certain (`NONE`: none, or an end), and whether the row may end with this draw."""
        pattern, step = self._pattern, row.first + self._step
        frame, quantizer = (int(part) for part in pattern.place(step, self._slot))
        new = frame - len(row.known)
        if pattern.name == "delay":
            if (
                row.end is not None
                and self._slot == 0
                and step >= max(row.end + pattern.slots - 1, row.end + 1)
            ):
                return self.eos, False
            if frame < 0 or (row.end is not None and frame >= row.end):
                return NONE, False
            if quantizer == 0 and new == row.frames:
                return self.end, False
        if new < 0:
            return row.known[frame][quantizer], False
        return None, quantizer == 0 and new >= self._min_frames

    def step(self, tokens: Tensor) -> None:
        """Take the codes (A,) that were drawn; when a step is complete, the model goes on."""
        pattern, size = self._pattern, self._pattern.codebook_size
        for row, token in zip(self._rows, tokens.tolist(), strict=True):
            forced, _ = self._wish(row)
            code = size if forced == NONE or token >= size else token
            if token == self.end and row.end is None:
                row.end = int(pattern.place(row.first + self._step, 0)[0])
            if pattern.name == "flatten":
                code += ((row.first + self._step) % pattern.num_quantizers) * size
            row.ids.append(code)
        self._slot += 1
        if self._slot == pattern.slots:
            ids = torch.tensor([row.ids for row in self._rows], device=tokens.device)
            for row in self._rows:
                row.ids = []
            self._slot, self._step = 0, self._step + 1
            self._session.step(ids)

    def drop(self, row: int) -> None:
        """Row `row` leaves and the last row takes its place."""
        self._session.drop(row)
        self._rows[row] = self._rows[-1]
        self._rows.pop()


def new_frames(
    pattern: Pattern, prompt: Tensor, tokens: Tensor, log_probs: Tensor, limit: int
) -> tuple[Tensor, Tensor]:
    """What a row's draws have said behind its prompt.

    Args:
        pattern: their order.
        prompt: (P, Q) codes.
        tokens: (n,) draws, without the loop's end.
        log_probs: (n,) of each.
        limit: at most so many frames were asked for.

    Returns:
        (F, Q) codes, or (F, 1) of "valle", and their log-probabilities (F,), those of a frame's codes added up.
    """
    first = int(pattern.whole_steps(torch.tensor(len(prompt))))
    slots, size = pattern.slots, pattern.codebook_size
    if pattern.name == "valle":
        known = len(prompt) - first * slots
        return tokens[known:, None], log_probs[known:]
    if pattern.name == "flatten":
        frames = len(tokens) // pattern.num_quantizers
        whole = frames * pattern.num_quantizers
        shape = (frames, pattern.num_quantizers)
        return tokens[:whole].view(shape), log_probs[:whole].view(shape).sum(1)
    steps = len(tokens) // slots
    table, chances = (part[: steps * slots].view(steps, slots) for part in (tokens, log_probs))
    ends = (table[:, 0] >= size).nonzero()[:, 0]
    frames = min(int(ends[0]) if len(ends) else steps - (slots - 1), limit)
    # Step s of these is step `first` + s; frame f of the prompt's end on is said in steps f … f + Q - 1.
    codes = pattern.frames(table, frames) if frames else table[:0]
    return codes, pattern.frames(chances, frames).sum(1) if frames else log_probs[:0]
