"""Threads: independent pieces of work at once, and how many threads a short, often repeated one runs on fastest.

One frame's products take tens of microseconds each. Waking a second thread for them can cost more than it brings, the
more so where other programs run, and nothing known beforehand tells which it is.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch

from valle.utils.progress import progress

T = TypeVar("T")
R = TypeVar("R")

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


def in_threads(work: Callable[[T], R], items: Sequence[T], desc: str, unit: str) -> list[R]:
    """Do independent pieces of work at once, each in one thread; as many as torch has threads.

    The first is done alone, so that what all of them need is loaded once. An error in one ends all.

    Args:
        work: called with each item.
        items: what there is to do.
        desc, unit: of the progress bar.

    Returns:
        What `work` gave, in the order of the items.
    """
    most = torch.get_num_threads()
    done: list[R] = []
    with progress(total=len(items), desc=desc, unit=unit) as bar, one_thread():
        for item in items[:1]:
            done.append(work(item))
            bar.update()
        with ThreadPoolExecutor(most, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            futures = [pool.submit(work, item) for item in items[1:]]
            try:
                for future in futures:
                    done.append(future.result())
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return done


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
