"""How many threads a short, often repeated piece of work runs on fastest: measured while it runs.

One frame's products take tens of microseconds each. Waking a second thread for them can cost more than it brings, the
more so where other programs run, and nothing known beforehand tells which it is.
"""

import contextlib
import time
from collections.abc import Iterator
from types import TracebackType

import torch

TRIAL = 3  # runs with each number of threads; the first is left out
HOLD = 100  # runs with the best number until the others are tried again; doubles while it stays the best
LONGEST_HOLD = 800
HOPELESS = 1.5  # a number whose first run takes so many times the best one's time is not tried further


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For operations so small that a second thread only costs the time to wake it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class ThreadTuner:
    """`with tuner:` around each run: changes torch's number of threads for it, and back.

    Tries all numbers up to the one at its making, then keeps the fastest, and tries the others again from time to
    time. The number of threads does not change what the products of this package's packed layers give.
    """

    def __init__(self) -> None:
        most = torch.get_num_threads()
        powers = [2**power for power in range(most.bit_length()) if 2**power < most]
        self.numbers = [most, *reversed(powers)]
        self.seconds: dict[int, float] = {}  # of the fastest counted run of the last trial
        self.best = most
        self._hold = HOLD // 2
        self._plan = self._trials(self.numbers)

    def _trials(self, numbers: list[int]) -> list[tuple[int, int]]:
        """(threads, run of the trial) of the coming runs, the next one last."""
        return [(number, run) for number in numbers for run in range(TRIAL)][::-1]

    def _next_plan(self) -> list[tuple[int, int]]:
        """The best for a while, then the others again."""
        best = min(self.seconds, key=lambda number: self.seconds[number])
        self._hold = min(2 * self._hold, LONGEST_HOLD) if best == self.best else HOLD
        self.best = best
        others = [number for number in self.numbers if number != best]
        # The trial of the best is the end of its hold.
        return self._trials([best, *others]) + [(best, 0)] * self._hold

    def __enter__(self) -> None:
        if len(self.numbers) == 1:
            return
        if not self._plan:
            self._plan = self._next_plan()
        self._number, self._run = self._plan.pop()
        self._before = torch.get_num_threads()
        torch.set_num_threads(self._number)
        self._started = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if len(self.numbers) == 1:
            return
        elapsed = time.perf_counter() - self._started
        torch.set_num_threads(self._before)
        number = self._number
        if self._run == 1:
            self.seconds[number] = elapsed
        elif self._run > 1:
            self.seconds[number] = min(elapsed, self.seconds[number])
        elif number != self.best and elapsed > HOPELESS * self.seconds.get(self.best, elapsed):
            self.seconds[number] = elapsed
            while self._plan and self._plan[-1][0] == number:
                self._plan.pop()
