"""The autoregressive loop: one step a frame, for a batch of rows that stop each on its own.

Knows no model: it is given a `Session`, a model in the middle of generating. A row that has ended leaves the session
at once, so that what comes after costs less; what a row draws depends neither on its neighbours nor on who leaves.

Shapes: B rows at the beginning, A rows that are still in, V codebook size, N frames.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

import torch
from torch import Tensor

from valle.generation.sampling import Sampling, sample, uniforms
from valle.utils.errors import UserError
from valle.utils.threads import one_thread

LONGEST_PERIOD = 8  # frames, of what counts as a repetition


class Session(Protocol):
    """A model in the middle of generating, for A rows that are still in."""

    @property
    def logits(self) -> Tensor:
        """(A, V + 1) of the next frame of each row."""

    def step(self, tokens: Tensor) -> None:
        """Take the codes (A,) int64 that were drawn; `logits` are then those of the frame behind them."""

    def drop(self, row: int) -> None:
        """Row `row` leaves and the last row takes its place (in `logits` too); A gets smaller by one."""


class GuidedSession:
    """Classifier-free guidance: what the prompt changes in the model's answer is made stronger.

    With c the log-probabilities given the prompt and u those without it, codes are drawn from u + scale · (c - u).
    Source: Ho & Salimans (arXiv 2207.12598, equation 6, with scale = 1 + w), as MusicGen (arXiv 2306.05284) does it
    for codes.

    Args:
        session: 2A rows: row 2i with its prompt, row 2i + 1 without.
        scale: 1 leaves the model as it is, more follows the prompt more closely, 0 forgets it.

    Raises:
        UserError: a scale that is no number or negative.
    """

    def __init__(self, session: Session, scale: float) -> None:
        if not 0 <= scale < math.inf:
            raise UserError(f"guidance scale is {scale}, expected 0 or more (1: no guidance)")
        if session.logits.shape[0] % 2 != 0:
            raise ValueError(f"{session.logits.shape[0]} rows, expected two for each one to guide")
        self._session = session
        self._scale = scale

    @property
    def logits(self) -> Tensor:
        """(A, V + 1), up to a constant the log-probabilities of the guided distribution."""
        given, without = self._session.logits.float().log_softmax(-1).unflatten(0, (-1, 2)).unbind(1)
        return without + self._scale * (given - without)

    def step(self, tokens: Tensor) -> None:
        """Both rows of a pair take the same code."""
        self._session.step(tokens.repeat_interleave(2))

    def drop(self, row: int) -> None:
        """Both rows of the pair leave, the second one first: then the last pair takes their place in order."""
        self._session.drop(2 * row + 1)
        self._session.drop(2 * row)


@dataclass
class Decoded:
    """What the loop gives for B rows of at most N frames.

    Attributes:
        tokens: (B, N) int64; behind a row's end, 0.
        lens: (B,) int64 frames before the row's end.
        finish_reasons: "eos", "length" or "repetition", one a row.
        log_probs: (B, N) natural log of the probability that the model itself (guided, if it is; before temperature
            and filters) gave each code; behind a row's end, 0.
    """

    tokens: Tensor
    lens: Tensor
    finish_reasons: list[str]
    log_probs: Tensor


class FrameLoop:
    """Draws frame after frame, in as many pieces as the caller likes: the pieces do not change the result.

    Rows of the session (slots) change places when one leaves; everything kept by slot is moved with them, and
    whatever the caller sees is in the original order.

    Args:
        session: its `logits` are those of the first new frame of B rows.
        eos: index of the end symbol. A row ends when it is *drawn*, and it is not part of the result.
        sampling: how codes are drawn.
        streams: B streams of random numbers, from `make_streams`.
        max_new_tokens: a row ends with so many frames ("length"); one number, or one a row.
        min_new_tokens: no row ends with fewer frames, unless its `max_new_tokens` are fewer: the end symbol is not
            drawn before, and no repetition shortens the row below; one number, or one a row.
        on_frame: called with the number of frames done after each, for progress bars.

    Raises:
        UserError: a number of frames that cannot be.
    """

    def __init__(
        self,
        session: Session,
        eos: int,
        sampling: Sampling,
        streams: Sequence[Random],
        max_new_tokens: int | Sequence[int],
        min_new_tokens: int | Sequence[int] = 0,
        on_frame: Callable[[int], object] | None = None,
    ) -> None:
        logits = session.logits
        batch, self._device = logits.shape[0], logits.device
        limits = [max_new_tokens] * batch if isinstance(max_new_tokens, int) else list(max_new_tokens)
        if min(limits) < 1:
            raise UserError(f"max_new_tokens is {min(limits)}, expected 1 or more")
        least = [min_new_tokens] * batch if isinstance(min_new_tokens, int) else list(min_new_tokens)
        if min(least) < 0:
            raise UserError(f"min_new_tokens is {min(least)}, expected 0 or more")
        if not len(streams) == len(limits) == len(least) == batch:
            raise ValueError(f"{batch} rows, {len(streams)} streams, {len(limits)} max_new_tokens")
        self._session, self._eos, self._sampling, self._on_frame = session, eos, sampling, on_frame
        self._least, self._most_least = least, max(least)
        self.done = 0  # frames drawn so far
        # by row
        self._limits = limits
        self._lens: list[int | None] = [None] * batch
        self._reasons: list[str | None] = [None] * batch
        self._repetitions = [_Repetition(sampling.stop_repetition) for _ in range(batch)]
        # by slot: the first `_running` are in the session, the others have ended
        self._running = batch
        self._rows = list(range(batch))  # which row it is
        self._streams = list(streams)
        self._tokens = torch.zeros(max(limits), batch, dtype=torch.long, device=self._device)
        self._log_probs = torch.zeros(max(limits), batch, device=self._device)

    @torch.no_grad()
    @one_thread()
    def advance(self, frames: int | None = None) -> bool:
        """Draw `frames` more frames, fewer if all rows end before; None: to the end.

        A step of the session stands between two frames, and none is made that no frame follows.

        Returns:
            whether any row still runs.
        """
        last = math.inf if frames is None else self.done + frames
        while self._running > 0 and self.done < last:
            # before the step: on a GPU this copy then waits for nothing, as the loop has just read the last codes
            numbers = uniforms(self._streams[: self._running], self._sampling, self._device)
            if self.done > 0:
                self._session.step(self._tokens[self.done - 1, : self._running])
            self._draw(numbers)
            if self._on_frame is not None:
                self._on_frame(self.done)
        return self._running > 0

    @property
    def tokens(self) -> Tensor:
        """(B, done) int64 codes so far; behind a row's end, 0."""
        return self._by_row(self._tokens)

    @property
    def lens(self) -> Tensor:
        """(B,) int64 frames so far. A row that ends for repetition becomes shorter by all periods but the first."""
        return torch.tensor([self.done if n is None else n for n in self._lens], device=self._device)

    @property
    def finish_reasons(self) -> list[str | None]:
        """Why each row ended; None: it still runs."""
        return list(self._reasons)

    def result(self) -> Decoded:
        """All of it, once every row has ended.

        Raises:
            RuntimeError: a row still runs.
            FloatingPointError: the model gave not-a-number for a code's probability.
        """
        reasons = [reason for reason in self._reasons if reason is not None]
        if self._running > 0:
            raise RuntimeError(f"{self._running} of {len(self._rows)} rows still run: call advance() first")
        bad = self._log_probs[: self.done].isnan()  # those of end symbols too
        if bool(bad.any()):
            frame, slot = bad.nonzero()[0].tolist()
            raise FloatingPointError(
                f"row {self._rows[slot]}, new frame {frame}: the model's logits are not numbers"
            )
        lens, log_probs = self.lens, self._by_row(self._log_probs)
        longest = int(lens.max())
        return Decoded(self.tokens[:, :longest], lens, reasons, log_probs[:, :longest])

    def _draw(self, numbers: Tensor) -> None:
        """One frame, from the session's logits; rows that end with it leave."""
        frame, slots = self.done, slice(0, self._running)
        logits = self._session.logits.float()
        allowed = logits
        if frame < self._most_least:
            early = [slot for slot in range(self._running) if frame < self._least[self._rows[slot]]]
            allowed = logits.clone()
            allowed[early, self._eos] = -torch.inf
        drawn = sample(allowed, self._sampling, numbers, self._tokens[:frame, slots])
        self._tokens[frame, slots] = drawn
        self._log_probs[frame, slots] = logits.log_softmax(-1).gather(-1, drawn[:, None])[:, 0]
        self.done += 1
        codes = drawn.tolist()  # the only place that waits for a GPU
        ended = [slot for slot, code in enumerate(codes) if self._ends(self._rows[slot], code)]
        if len(ended) == self._running:
            self._running = 0  # nothing is asked of the session any more
        else:
            for slot in reversed(ended):  # the last first: what moves into a slot is then a row that goes on
                self._drop(slot)

    def _ends(self, row: int, code: int) -> bool:
        """Whether the row ends with the code just drawn; if so, note how."""
        if code == self._eos:
            self._lens[row], self._reasons[row] = self.done - 1, "eos"
        elif (surplus := self._repetitions[row].add(code)) > 0 and self.done >= self._least[row]:
            self._lens[row] = max(self.done - surplus, self._least[row])
            self._reasons[row] = "repetition"
        elif self.done == self._limits[row]:
            self._lens[row], self._reasons[row] = self.done, "length"
        return self._reasons[row] is not None

    def _drop(self, slot: int) -> None:
        """The row in `slot` leaves the session, and changes places with the last that is in it."""
        self._session.drop(slot)
        self._running -= 1
        last = self._running
        if slot != last:
            rows, streams = self._rows, self._streams
            rows[slot], rows[last] = rows[last], rows[slot]
            streams[slot], streams[last] = streams[last], streams[slot]
            for values in (self._tokens[: self.done], self._log_probs[: self.done]):
                leaving = values[:, slot].clone()
                values[:, slot] = values[:, last]
                values[:, last] = leaving

    def _by_row(self, values: Tensor) -> Tensor:
        """(max N, slots) -> (B, done) in the order of the rows, 0 behind each row's end."""
        slot_of = sorted(range(len(self._rows)), key=self._rows.__getitem__)
        values = values[: self.done, slot_of].T
        behind = torch.arange(self.done, device=self._device) >= self.lens[:, None]
        return values.masked_fill(behind, 0)


class _Repetition:
    """Watches a row's codes for a stretch that repeats itself.

    The last `frames` codes have the period p (p at most LONGEST_PERIOD and half of `frames`) when each but the first
    p equals the one p before it. Counting, for each p, how long that has been so takes a few comparisons a code.
    """

    def __init__(self, frames: int) -> None:
        self._frames = frames
        periods = min(LONGEST_PERIOD, frames // 2)
        self._last: deque[int] = deque(maxlen=periods)  # the latest first
        self._equal = [0] * periods  # by p - 1: so many last codes equal the one p before them

    def add(self, code: int) -> int:
        """How many of the last codes repeat the (shortest) period before them; 0: the row does not repeat itself."""
        equal = self._equal
        for index, earlier in enumerate(self._last):
            equal[index] = equal[index] + 1 if code == earlier else 0
        self._last.appendleft(code)
        for index, count in enumerate(equal):
            if count + index + 1 >= self._frames:
                return count
        return 0


def decode(
    session: Session,
    eos: int,
    sampling: Sampling,
    streams: Sequence[Random],
    max_new_tokens: int | Sequence[int],
    min_new_tokens: int | Sequence[int] = 0,
    on_frame: Callable[[int], object] | None = None,
) -> Decoded:
    """A `FrameLoop` from its first frame to its last; its arguments, and what it raises."""
    loop = FrameLoop(session, eos, sampling, streams, max_new_tokens, min_new_tokens, on_frame)
    loop.advance()
    return loop.result()
