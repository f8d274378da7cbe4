"""A training of several processes that hangs says which rank is stuck in which step, and ends.

Where one process waits forever for data, or its machine is gone, the others wait for its message: without a word, and
for days. So every process keeps in mind where it is, a thread of it tells the others once a second through the store
at which they met, and when a process has not moved on for `--stuck-timeout` seconds, its thread looks who is behind.

The training itself only writes down a tuple: 2 µs a phase, whatever the number of processes.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

from valle.utils import distributed

INTERVAL = 1.0  # seconds between two looks
BEATS = 3  # looks until a rank that has not told again is taken to be gone
SHOWN = 8  # ranks that are named; there may be hundreds


class Place(NamedTuple):
    """Where a process is; the least is furthest behind.

    Attributes:
        step: of the optimizer, over all stages.
        number: of the phases begun in this step.
        phase: as the clock names it: data, forward_backward, exchange, optimizer, validation, samples, checkpoint.
    """

    step: int
    number: int
    phase: str

    def __str__(self) -> str:
        return f"step {self.step} ({self.phase})"


Told = tuple[int, Place]  # how often a rank has told its place, and the last one


class Watchdog:
    """`with Watchdog(seconds) as watchdog:` ends the process, with code 2, when ranks do not move on.

    Moving on is `watchdog.enter(step, phase)`. A phase may last as long as it likes below the timeout, on one rank as
    on all: the others wait no longer for rank 0 writing samples than for one that is stuck. One process is not watched.

    Args:
        timeout: seconds without moving on that are too many.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout, self.interval = timeout, min(INTERVAL, timeout / 10)
        self._place, self._since = Place(0, 0, "start"), time.monotonic()
        self._done = threading.Event()
        self._store: Any = distributed.notes() if distributed.world_size() > 1 else None
        self._rank, self._ranks = distributed.rank(), distributed.world_size()

    def __enter__(self) -> "Watchdog":
        self._since = time.monotonic()
        if self._store is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()

    def enter(self, step: int, phase: str) -> None:
        """This process begins a phase of a step."""
        number = self._place.number + 1 if step == self._place.step else 0
        # First the time: the thread may look in between, and must not find a new place with the old time.
        self._since = time.monotonic()
        self._place = Place(step, number, phase)

    def _watch(self) -> None:
        beat, failed = 0, 0.0  # of this thread; since when another process is known to have failed
        # What was told, and at which beat, when this rank had just waited too long: who is alive tells again.
        earlier: dict[int, Told] = {}
        looked = 0
        while not self._done.wait(self.interval):
            beat += 1
            try:
                self._store.set(f"place/{self._rank}", json.dumps([beat, *self._place]))
                failed = failed or (time.monotonic() if self._store.check([distributed.FAILURE]) else 0.0)
            except RuntimeError:  # the process that held the store is gone, and has said why
                failed = failed or time.monotonic()
            if failed and time.monotonic() - failed > distributed.GRACE:
                self._end()
            waited = time.monotonic() - self._since
            with contextlib.suppress(RuntimeError):
                if waited <= self.timeout or failed:
                    looked = 0
                elif not looked:
                    earlier, looked = self._told(), beat
                elif beat - looked >= BEATS:
                    self._judge(waited, earlier)

    def _judge(self, waited: float, earlier: dict[int, Told]) -> None:
        """Say who is stuck, if it is this rank's turn to."""
        told = self._told()
        places = {rank: place for rank, (_, place) in told.items()} | {self._rank: self._place}
        silent = {rank for rank, (beat, _) in told.items() if rank in earlier and earlier[rank][0] == beat}
        patience = self.timeout + 2 * BEATS * self.interval + distributed.GRACE
        if self._rank != speaker(places) and waited < patience:
            return
        if self._done.is_set() or time.monotonic() - self._since < self.timeout:
            return  # it has moved on while we looked
        message = describe(self._rank, places, silent, self._ranks, waited)
        if distributed.first_to_fail("shown", message, self._store):
            print(f"error: {message}", file=sys.stderr)
        self._end()

    def _told(self) -> dict[int, Told]:
        """Of the other ranks, as far as they have told: how often, and the last place."""
        found = {}
        for rank in range(self._ranks):
            key = f"place/{rank}"
            if rank != self._rank and self._store.check([key]):
                beat, *place = json.loads(self._store.get(key))
                found[rank] = beat, Place(*place)
        return found

    def _end(self) -> None:
        if self._done.is_set():
            return
        # No other way leads out of a message that is waited for in C++.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)


def speaker(places: dict[int, Place]) -> int:
    """The one rank that speaks first, so that not hundreds say the same: the first of those that wait."""
    front = max(places.values())
    return min(rank for rank, place in places.items() if place == front)


def describe(rank: int, places: dict[int, Place], silent: set[int], ranks: int, waited: float) -> str:
    """One line: who waits for whom, and where.

    Args:
        rank: who speaks.
        places: of the ranks that have told.
        silent: ranks that tell no more, not even that they wait: stopped, or their machine is gone.
        ranks: how many there are.
        waited: seconds that the speaker has not moved on.
    """
    mine, front, seconds = places[rank], max(places.values()), f"{waited:.0f} s"
    groups: dict[tuple[Place, bool], list[int]] = {}
    for number, place in sorted(places.items()):
        if number != rank and (place < front or number in silent):
            groups.setdefault((place, number in silent), []).append(number)
    stuck = []
    for (place, quiet), who in sorted(groups.items()):
        verb = "is" if len(who) == 1 else "are"
        stuck.append(
            f"{_ranks(who)} no longer answers, last heard of in {place}" if quiet else
            f"{_ranks(who)} {verb} still in {place}"
        )  # fmt: skip
    missing = [number for number in range(ranks) if number not in places]
    if missing:
        stuck.append(f"{_ranks(missing)} not yet heard of")
    advice = "; ended, as --stuck-timeout says. The same command goes on from the last checkpoint"
    if mine < front:
        others = f" ({'; '.join(stuck)})" if stuck else ""
        return (
            f"rank {rank} has been stuck for {seconds} in {mine}{others}, and the others wait for it{advice}"
        )
    if not stuck:
        return f"all {ranks} ranks have waited {seconds} for each other in {mine}: their messages do not arrive{advice}"
    return f"rank {rank} has waited {seconds} for the others in {mine}; {'; '.join(stuck)}{advice}"


def _ranks(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:SHOWN]))
    if len(numbers) > SHOWN:
        shown += f" and {len(numbers) - SHOWN} more"
    return f"rank {shown}" if len(numbers) == 1 else f"ranks {shown}"
