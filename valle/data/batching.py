"""Which cuts form which batch: an epoch's batches, planned at once from the durations of all cuts.

A plan is a function of durations, settings, seed and epoch. Batch k is reached by indexing, so a training that was
killed goes on there at once, and every rank knows how many batches all of them have.

It stands where lhotse's samplers stood. As of 1.33 those stream over the cuts: they find their place again by drawing
every batch before it, and each process learns only at its own last batch that there are no more.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

# Pools are of one group, or of MIN_POOL batches if that is more. Sorting them takes the padding of 1,000 cuts of
# log-normal length in batches of 80 s from 8 to 3 %. A bucket is 8 pools in a large corpus and 4 in a small one, so
# that a cut's company changes from epoch to epoch.
MIN_POOL, POOLS_PER_BUCKET, FEWEST_POOLS = 4, 8, 4
MAX_BUCKETS = 1000


class PlannedBatch(NamedTuple):
    """One batch.

    Attributes:
        cuts: (B,) indices into the plan's durations.
        filler: it stands in for a batch that other ranks have and this one has not; its loss does not count.
    """

    cuts: np.ndarray
    filler: bool


@dataclass(frozen=True)
class EpochPlan:
    """The batches of one epoch; `plan[k]` is batch k of this rank.

    Attributes:
        order: (N,) indices of cuts. Batch b of all ranks is order[starts[b] : starts[b + 1]].
        starts: (batches of all ranks + 1,).
        sequence: (batches of this rank,) which of them this rank has; -1 for a filler.
        filler: (1,) index of the cut that fillers are made of.
    """

    order: np.ndarray
    starts: np.ndarray
    sequence: np.ndarray
    filler: np.ndarray

    def __len__(self) -> int:
        return len(self.sequence)

    def __getitem__(self, index: int) -> PlannedBatch:
        number = int(self.sequence[index])
        return PlannedBatch(self.filler, True) if number < 0 else PlannedBatch(self.cuts(number), False)

    def cuts(self, number: int) -> np.ndarray:
        """(B,) indices of a batch's cuts, by its number among the batches of all ranks."""
        return self.order[self.starts[number] : self.starts[number + 1]]

    def padded(self, lengths: np.ndarray) -> np.ndarray:
        """What each batch of all ranks takes with padding: its longest row times its rows.

        Args:
            lengths: (N,) of each cut, in any unit.
        """
        return np.maximum.reduceat(lengths[self.order], self.starts[:-1]) * np.diff(self.starts)


@dataclass(frozen=True)
class BatchPlan:
    """Plans epochs over cuts of given durations.

    Cuts are sorted into buckets that hold the same total duration each and shuffled inside them. Small random pools of
    a bucket are sorted again, and all are filled one after the other into batches. G = world_size *
    accumulate_grad_steps batches that follow one another, so of like durations, form a group: the batches of one step
    of all ranks. Groups are shuffled. Of a group, rank r takes the batches r, r + world_size, …, so the set of batches
    in a step depends on G alone, not on how G came about.

    What is left for the last step is spread over the ranks; one that gets a batch less is given a filler, the shortest
    cut.

    Args:
        durations: (N,) seconds, N ≥ 1.
        max_duration: seconds in a batch, its padding included. A longer cut is a batch of its own.
        num_buckets: at least so many; a large corpus gets more. 0: none, cuts of all durations come together.
        shuffle: without it every epoch is the same, by duration, or with 0 buckets in the order of `durations`.
        drop_last: leave out the batches that do not fill a group.
        seed: of the order.
        rank, world_size: this process and their number.
        accumulate_grad_steps: batches that a rank sums up in a step.
    """

    durations: np.ndarray
    max_duration: float
    num_buckets: int = 10
    shuffle: bool = True
    drop_last: bool = False
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    accumulate_grad_steps: int = 1

    def epoch(self, epoch: int) -> EpochPlan:
        """The batches of one epoch."""
        # Any whole number is a seed; NumPy takes none below 0.
        draw = np.random.default_rng((self.seed % 2**63, epoch))
        order = self._order(draw)
        starts = _fill(self.durations[order], self.max_duration)
        filler = np.array([np.argmin(self.durations)])
        return EpochPlan(order, starts, self._sequence(len(starts) - 1, draw), filler)

    @property
    def group_size(self) -> int:
        """Batches in a step of all ranks."""
        return self.world_size * self.accumulate_grad_steps

    @cached_property
    def _by_duration(self) -> np.ndarray:
        """(N,) indices of cuts, the shortest first."""
        return np.argsort(self.durations, kind="stable")

    @cached_property
    def _micros(self) -> np.ndarray:
        """(N,) durations in microseconds: sums of whole numbers are the same on every machine of a training."""
        return np.maximum(np.rint(self.durations * 1e6), 1).astype(np.int64)

    @property
    def _pool(self) -> int:
        """Microseconds of a pool in a large corpus."""
        return max(1, int(max(self.group_size, MIN_POOL) * self.max_duration * 1e6))

    @cached_property
    def _bucket_count(self) -> int:
        wanted = int(self._micros.sum()) // (self._pool * POOLS_PER_BUCKET)
        return min(max(self.num_buckets, wanted), MAX_BUCKETS)

    @cached_property
    def _buckets(self) -> np.ndarray:
        """(N,) bucket of each cut: the one in which its middle lies, of all seconds in the order of durations."""
        ascending = self._micros[self._by_duration]
        middles = ascending.cumsum() - ascending // 2 - 1
        buckets = np.empty(len(ascending), dtype=np.int16)
        buckets[self._by_duration] = middles * self._bucket_count // ascending.sum()
        return buckets

    def _order(self, draw: np.random.Generator) -> np.ndarray:
        if not self.shuffle:
            return self._by_duration if self.num_buckets else np.arange(len(self.durations))
        order = draw.permutation(len(self.durations))
        if not self.num_buckets:
            return order
        order = order[np.argsort(self._buckets[order], kind="stable")]
        ends = self._micros[order].cumsum()
        pools = ends // max(1, min(self._pool, int(ends[-1]) // self._bucket_count // FEWEST_POOLS))
        durations = self.durations[order]
        # Up one pool, down the next: a batch across their border is of one length too.
        return order[np.lexsort((np.where(pools % 2 == 0, durations, -durations), pools))]

    def _sequence(self, batches: int, draw: np.random.Generator) -> np.ndarray:
        """The numbers of this rank's batches, in the order of its steps; -1 for a filler."""
        full, rest = divmod(batches, self.group_size)
        # The incomplete group is anywhere in the order of durations: it would else always be the longest cuts that
        # come last, or are left out.
        short = int(draw.integers(full + 1)) if self.shuffle else full
        firsts = np.arange(full) * self.group_size
        firsts[short:] += rest
        if self.shuffle:
            firsts = draw.permutation(firsts)
        inside = self.rank + self.world_size * np.arange(self.accumulate_grad_steps)
        sequence = (firsts[:, None] + inside).reshape(-1)
        if self.drop_last or not rest:
            return sequence
        rounds = -(-rest // self.world_size)
        last = np.full(rounds * self.world_size, -1)
        last[:rest] = short * self.group_size + np.arange(rest)
        return np.concatenate([sequence, last[self.rank :: self.world_size]])


def _fill(durations: np.ndarray, max_duration: float) -> np.ndarray:
    """Cut a sequence of durations into batches: (batches + 1,) where each begins, and the end.

    A plain loop: where a batch ends depends on where it began. A million cuts take 0.1 s.
    """
    starts = [0]
    longest, count = 0.0, 0
    for index, duration in enumerate(durations.tolist()):
        longest, count = max(longest, duration), count + 1
        if longest * count > max_duration and count > 1:
            starts.append(index)
            longest, count = duration, 1
    return np.array([*starts, len(durations)])
