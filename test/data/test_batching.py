"""An epoch's batches: every cut once, budgets kept, steps that do not depend on how many processes share them."""

import time

import numpy as np
import pytest

from valle.data.batching import BatchPlan

SETUPS = [(1, 1), (1, 3), (2, 1), (2, 2), (3, 4), (8, 1)]  # world_size, accumulate_grad_steps


def lengths(count, seed=0):
    """Seconds, log-normal as speech corpora have them, 0.5 to 20."""
    draw = np.random.default_rng(seed)
    return np.clip(draw.lognormal(np.log(6), 0.6, count), 0.5, 20.0).round(2)


def plans(durations, world_size, accumulate=1, max_duration=40.0, **options):
    return [
        BatchPlan(
            durations, max_duration, rank=rank, world_size=world_size, accumulate_grad_steps=accumulate, **options
        )
        for rank in range(world_size)
    ]  # fmt: skip


def steps(durations, world_size, accumulate, epoch=1, **options):
    """What each step of all ranks trains on: a set of batches, fillers left out."""
    found = []
    for plan in plans(durations, world_size, accumulate, **options):
        epoch_plan = plan.epoch(epoch)
        batches = [epoch_plan[number] for number in range(len(epoch_plan))]
        for step, start in enumerate(range(0, len(batches), accumulate)):
            if step == len(found):
                found.append(set())
            for batch in batches[start : start + accumulate]:
                if not batch.filler:
                    found[step].add(tuple(batch.cuts.tolist()))
    return found


@pytest.mark.parametrize("world_size,accumulate", SETUPS)
@pytest.mark.parametrize("count", [1, 5, 200, 301])
@pytest.mark.parametrize("options", [{}, {"shuffle": False}, {"num_buckets": 0}])
def test_every_cut_is_in_one_batch_and_all_ranks_have_as_many(world_size, accumulate, count, options):
    durations = lengths(count)
    for epoch in (1, 2):
        ranks = [plan.epoch(epoch) for plan in plans(durations, world_size, accumulate, **options)]
        assert len({len(rank) for rank in ranks}) == 1 and len(ranks[0]) > 0
        batches = [rank[number] for rank in ranks for number in range(len(rank))]
        counted = np.concatenate([batch.cuts for batch in batches if not batch.filler])
        assert sorted(counted) == list(range(count))
        fillers = [batch for batch in batches if batch.filler]
        assert len(fillers) < world_size, "no more than the last round needs"
        assert all(batch.cuts.tolist() == [durations.argmin()] for batch in fillers), (
            "as little work as can be"
        )


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_fillers_come_last(world_size):
    for plan in plans(lengths(301), world_size):
        epoch = plan.epoch(1)
        assert not any(epoch[number].filler for number in range(len(epoch) - 1))


@pytest.mark.parametrize("options", [{}, {"shuffle": False}, {"num_buckets": 0}])
def test_batches_keep_to_the_budget_padding_included(options):
    durations = np.append(lengths(500), [90.0, 41.0])
    plan = BatchPlan(durations, 40.0, **options).epoch(1)
    alone = 0
    for number in range(len(plan)):
        batch = durations[plan[number].cuts]
        if batch.max() > 40:
            assert len(batch) == 1, "a cut longer than the budget is a batch of its own"
            alone += 1
        else:
            assert batch.max() * len(batch) <= 40
    assert alone == 2
    for number in range(len(plan.starts) - 2):
        more = durations[[*plan.cuts(number), plan.cuts(number + 1)[0]]]
        assert more.max() * len(more) > 40, "and use it: the next cut would not have fitted"


def test_cuts_that_are_all_longer_than_the_budget_are_batches_one_by_one():
    plan = BatchPlan(np.array([90.0, 50.0, 45.0]), 40.0).epoch(1)
    assert sorted(plan[number].cuts.tolist() for number in range(len(plan))) == [[0], [1], [2]]


def test_a_budget_that_fits_exactly_is_used():
    plan = BatchPlan(np.full(12, 2.0), 8.0).epoch(1)
    assert [len(plan[number].cuts) for number in range(len(plan))] == [4, 4, 4]


@pytest.mark.parametrize("options", [{}, {"drop_last": True}, {"shuffle": False}, {"num_buckets": 0}])
@pytest.mark.parametrize("count", [203, 211, 400])
def test_a_step_does_not_depend_on_how_ranks_and_accumulation_share_it(count, options):
    durations = lengths(count)
    for epoch in (1, 2):
        expected = steps(durations, 1, 4, epoch, **options)
        assert sum(map(len, expected)) > 20
        for world_size, accumulate in ((4, 1), (2, 2)):
            assert steps(durations, world_size, accumulate, epoch, **options) == expected
    assert steps(durations, 2, 1, **options) == steps(durations, 1, 2, **options)


def test_an_epoch_is_a_function_of_seed_and_number():
    durations = lengths(300)

    def batches(seed, epoch):
        plan = BatchPlan(durations, 40.0, seed=seed).epoch(epoch)
        return [tuple(plan[number].cuts) for number in range(len(plan))]

    assert batches(1, 5) == batches(1, 5)
    assert batches(1, 5) != batches(1, 6) and batches(1, 5) != batches(2, 5)
    assert set(batches(1, 5)) != set(batches(1, 6)), "other batches, not only another order"
    assert batches(-1, 0) == batches(-1, 0) != batches(1, 0)


def test_cuts_change_their_company():
    """Of the pairs that were in one batch, few are again: sorting has not undone the shuffling."""
    durations = lengths(2000)
    plan = BatchPlan(durations, 80.0)

    def pairs(epoch):
        found = set()
        for number in range(len(epoch)):
            cuts = sorted(epoch[number].cuts.tolist())
            found.update((one, two) for at, one in enumerate(cuts) for two in cuts[at + 1 :])
        return found

    first, second = pairs(plan.epoch(1)), pairs(plan.epoch(2))
    assert len(first & second) < 0.25 * len(first)


def test_lengths_are_spread_over_the_epoch():
    """Long and short batches come in any order; the incomplete step is not always of the longest cuts."""
    durations = lengths(1000)
    halves, last = [], []
    for number in range(1, 21):
        plan = BatchPlan(durations, 40.0, world_size=4).epoch(number)
        longest = [durations[plan[k].cuts].max() for k in range(len(plan))]
        halves.append(np.mean(longest[: len(longest) // 2]) / np.mean(longest[len(longest) // 2 :]))
        last.append(longest[-1])
    assert 0.9 < np.mean(halves) < 1.1
    assert min(last) < np.median(durations) < max(last)


def padding(durations, **options):
    plan = BatchPlan(durations, **options).epoch(1)
    padded = sum(durations[cuts].max() * len(cuts) for cuts in map(plan.cuts, range(len(plan.starts) - 1)))
    assert plan.padded(durations).sum() == pytest.approx(padded)
    return 1 - durations.sum() / padded


def test_little_is_padding():
    """4 % where an epoch has 100 batches, 1 % where it has 1000; a third and more without buckets."""
    assert padding(lengths(1000), max_duration=80.0) < 0.045
    assert padding(lengths(15000), max_duration=80.0) < 0.01
    assert padding(lengths(15000), max_duration=320.0, world_size=4) < 0.035
    assert padding(lengths(5000), max_duration=40.0, shuffle=False) < 0.01
    assert padding(lengths(1000), max_duration=80.0, num_buckets=0) > 0.3


def test_the_ranks_of_a_step_do_alike_work():
    durations = lengths(3000)
    ranks = [plan.epoch(1) for plan in plans(durations, 4)]
    longest = np.array([[durations[rank[k].cuts].max() for k in range(len(rank) - 1)] for rank in ranks])
    assert np.quantile(longest.max(0) / longest.min(0), 0.9) < 1.3


def test_what_does_not_fill_a_step_can_be_left_out():
    durations = lengths(203)
    left_out = []
    for epoch in range(1, 9):
        trained = steps(durations, 3, 2, epoch, drop_last=True)
        assert all(len(step) == 6 for step in trained)
        assert len(trained) == sum(map(len, steps(durations, 3, 2, epoch))) // 6
        left_out.append(set(range(203)) - {cut for step in trained for batch in step for cut in batch})
    assert len(set.union(*left_out)) > 2 * max(map(len, left_out)) > 0, "not always the same"


def test_without_shuffling_every_epoch_is_the_same():
    durations = lengths(100)
    for buckets, expected in ((10, np.sort(durations)), (0, durations)):
        plan = BatchPlan(durations, 40.0, buckets, shuffle=False)
        for epoch in (plan.epoch(1), plan.epoch(2)):
            assert np.array_equal(durations[epoch.order], expected)
            assert np.array_equal(np.concatenate([epoch[k].cuts for k in range(len(epoch))]), epoch.order)


def test_a_large_corpus_is_planned_in_a_moment():
    durations = lengths(300_000)
    begun = time.process_time()
    plan = BatchPlan(durations, 80.0, world_size=8).epoch(1)
    assert time.process_time() - begun < 10, "0.2 s on a free core"
    begun = time.process_time()
    assert len(plan[len(plan) - 1].cuts) >= 1 and time.process_time() - begun < 0.1
