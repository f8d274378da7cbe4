"""How many threads a short, often repeated piece of work runs on fastest: measured while it runs.

One frame's products take tens of microseconds each. Waking a second thread for them can cost more than it brings, the
more so where other programs run, and nothing known beforehand tells which it is.
"""

import time
from types import TracebackType

import torch

TRIAL = 3  # runs with each number of threads; the first is left out
HOLD = 100  # runs with the best number until the others are tried again


class ThreadTuner:
    """`with tuner:` around each run: changes torch's number of threads for it, and back.

    Tries all, then keeps the fastest, and tries the others again from time to time. The number of threads does not
    change what the products of this package's packed layers give.
    """

    def __init__(self) -> None:
        self.most = torch.get_num_threads()
        powers = [2**power for power in range(self.most.bit_length()) if 2**power < self.most]
        self.numbers = [self.most, *reversed(powers)]
        self.seconds = dict.fromkeys(self.numbers, 0.0)
        self.best = self.most
        self._plan = self._trials()

    def _trials(self) -> list[tuple[int, bool]]:
        """(threads, whether the run counts) of the coming runs, the next one last."""
        runs = [(number, run > 0) for number in self.numbers for run in range(TRIAL)]
        return runs[::-1]

    def __enter__(self) -> None:
        if len(self.numbers) == 1:
            return
        if not self._plan:
            self.best = min(self.numbers, key=lambda number: self.seconds[number])
            self._plan = self._trials() + [(self.best, False)] * HOLD
        self._number, self._counts = self._plan.pop()
        if self._number != self.most:
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
        if self._number != self.most:
            torch.set_num_threads(self.most)
        if self._counts:
            # The first counted run replaces the former figure, the others may only lower it.
            first = len(self._plan) % TRIAL == TRIAL - 2
            self.seconds[self._number] = elapsed if first else min(elapsed, self.seconds[self._number])
