"""Where a continuation is cut when it is given out while it is still being generated."""

from dataclasses import dataclass

from valle.utils.errors import UserError


@dataclass(frozen=True)
class Chunks:
    """How the NAR decoder follows the AR decoder piece by piece.

    After every `frames` AR frames, the NAR decoder fills in those that are not yet done, but the last `lookahead`
    ones: it would have to judge them without what follows. Before them it sees `context` finished frames.

    Args:
        frames: AR frames between two pieces, more than `lookahead`.
        lookahead: frames behind a piece that the NAR decoder sees without deciding on them.
        context: finished frames (prompt or continuation) before a piece that it sees.

    Raises:
        UserError: numbers that cannot be.
    """

    frames: int
    lookahead: int
    context: int

    def __post_init__(self) -> None:
        if self.lookahead < 0 or self.context < 1 or self.frames <= self.lookahead:
            raise UserError(
                f"chunks of {self.frames} frames with {self.lookahead} frames of lookahead and {self.context} of "
                "context: expected lookahead >= 0, context >= 1, and chunks longer than the lookahead"
            )

    def ends(self, length: int, ended_by_itself: bool) -> list[int]:
        """Where the pieces of a finished continuation of `length` frames end, as they did while it grew.

        Args:
            length: frames.
            ended_by_itself: whether the model drew the end behind the last frame; until then it went on.
        """
        last = length if ended_by_itself else length - 1
        ends = [done - self.lookahead for done in range(self.frames, last + 1, self.frames)]
        return [*ends, length]


CHUNK_SECONDS, LOOKAHEAD_SECONDS, CONTEXT_SECONDS = 0.5, 0.1, 2.0


def default_chunks(frame_rate: float) -> Chunks:
    """Pieces of half a second, with a tenth of lookahead and two seconds of context (docs/generation.md)."""
    seconds = (CHUNK_SECONDS, LOOKAHEAD_SECONDS, CONTEXT_SECONDS)
    return Chunks(*(max(1, int(value * frame_rate)) for value in seconds))
