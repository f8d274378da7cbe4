"""Pieces of work at once; and the tuner, with a clock that stands still but for what the work itself takes."""

import threading
import time

import pytest
import torch

from valle.utils import threads
from valle.utils.threads import HOLD, TRIAL, ThreadTuner, in_threads


class Machine:
    """Threads, a clock, and work that takes a time for each number of threads."""

    def __init__(self, monkeypatch, most, seconds):
        self.threads, self.now, self.seconds = most, 0.0, seconds
        monkeypatch.setattr(threads.torch, "get_num_threads", lambda: self.threads)
        monkeypatch.setattr(threads.torch, "set_num_threads", self.set)
        monkeypatch.setattr(threads.time, "perf_counter", lambda: self.now)
        self.changes = 0

    def set(self, number):
        self.threads = number
        self.changes += 1

    def work(self, tuner, runs):
        """How many threads each run had."""
        used, before = [], self.threads
        for _ in range(runs):
            with tuner:
                used.append(self.threads)
                self.now += self.seconds[self.threads]
            assert self.threads == before, "between the runs, everything is as it was"
        return used


@pytest.mark.parametrize("fastest", [1, 2, 4, 6])
def test_the_fastest_number_is_kept(monkeypatch, fastest):
    seconds = {number: 1.0 + abs(number - fastest) / 20 for number in (1, 2, 4, 6)}
    machine = Machine(monkeypatch, 6, seconds)
    tuner = ThreadTuner()
    used = machine.work(tuner, 4 * TRIAL + HOLD)
    assert used == [6] * TRIAL + [4] * TRIAL + [2] * TRIAL + [1] * TRIAL + [fastest] * HOLD


def test_a_hopeless_number_costs_one_run(monkeypatch):
    machine = Machine(monkeypatch, 4, {4: 1.0, 2: 9.0, 1: 1.1})
    assert machine.work(ThreadTuner(), 2 * TRIAL + 3) == [4] * TRIAL + [2] + [1] * TRIAL + [4] * 2


def test_the_longer_a_number_is_the_best_the_less_is_tried(monkeypatch):
    machine = Machine(monkeypatch, 2, {2: 1.0, 1: 1.1})
    used = machine.work(ThreadTuner(), 6000)
    tried = [run for run in range(1, 6000) if used[run] == 1 and used[run - 1] == 2]
    gaps = [later - earlier - 2 * TRIAL for earlier, later in zip(tried, tried[1:], strict=False)]
    assert gaps[:5] == [HOLD, 2 * HOLD, 4 * HOLD, 8 * HOLD, 8 * HOLD]


@pytest.mark.parametrize("most", [1, 2, 3, 8])
def test_what_is_tried(monkeypatch, most):
    machine = Machine(monkeypatch, most, dict.fromkeys(range(1, 9), 1.0))
    used = machine.work(ThreadTuner(), 60)
    assert set(used) == {1: {1}, 2: {1, 2}, 3: {1, 2, 3}, 8: {1, 2, 4, 8}}[most]


def test_the_first_run_of_a_trial_does_not_count(monkeypatch):
    """It pays for waking the threads, and for caches that another number has left behind."""
    machine = Machine(monkeypatch, 2, {2: 100.0, 1: 100.0})
    tuner = ThreadTuner()
    machine.work(tuner, 1)
    machine.seconds = {2: 1.0, 1: 0.001}
    machine.work(tuner, TRIAL)
    machine.seconds = {2: 1.0, 1: 2.0}
    machine.work(tuner, TRIAL - 1)
    assert set(machine.work(tuner, HOLD)) == {2}


@pytest.mark.parametrize("slow", range(1, TRIAL))
def test_one_slow_run_does_not_decide(monkeypatch, slow):
    machine = Machine(monkeypatch, 2, {2: 1.0, 1: 3.0})
    tuner = ThreadTuner()
    for run in range(2 * TRIAL):
        machine.seconds[2] = 50.0 if run == slow else 1.0  # another program came between
        machine.work(tuner, 1)
    assert set(machine.work(tuner, HOLD)) == {2}


def test_a_machine_that_changes_is_noticed(monkeypatch):
    machine = Machine(monkeypatch, 2, {2: 1.0, 1: 2.0})
    tuner = ThreadTuner()
    for slower, best in (({2: 5.0, 1: 2.0}, 1), ({2: 1.0, 1: 2.0}, 2)):
        machine.work(tuner, HOLD)
        machine.seconds = slower  # the figures of before are forgotten, also where they were better
        machine.work(tuner, 10 * HOLD)
        assert tuner.best == best


def test_the_number_is_restored_when_the_work_fails(monkeypatch):
    machine = Machine(monkeypatch, 4, {4: 1.0, 2: 1.0, 1: 1.0})
    tuner = ThreadTuner()
    seen = set()
    for _ in range(3 * TRIAL + 1):
        with pytest.raises(ZeroDivisionError), tuner:
            seen.add(machine.threads)
            1 / 0  # noqa: B018
        assert machine.threads == 4
    assert seen == {1, 2, 4}


def test_one_thread_is_left_alone(monkeypatch):
    machine = Machine(monkeypatch, 1, {1: 1.0})
    monkeypatch.setattr(threads.time, "perf_counter", lambda: pytest.fail("nothing to measure"))
    tuner = ThreadTuner()
    for _ in range(20):
        with tuner:
            assert machine.threads == 1
    assert machine.changes == 0


# ---------------------------------------------------------------------------------------- in_threads


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3, "as it was"
    torch.set_num_threads(before)


@pytest.fixture(params=[1, 2, 5])
def any_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param, "as it was"
    torch.set_num_threads(before)


@pytest.mark.parametrize("number", [0, 1, 2, 9])
def test_results_are_those_of_a_plain_loop(any_threads, number):
    items = list(torch.randn(number, 40, 40, generator=torch.Generator().manual_seed(0)))

    def work(item):
        assert torch.get_num_threads() == 1
        return item @ item.T

    found = in_threads(work, items, "multiplying", "matrix")
    assert len(found) == number
    for one, item in zip(found, items, strict=True):
        assert one.allclose(item @ item.T, atol=1e-4)


def test_work_is_done_at_once_and_kept_in_order(three_threads):
    """Items 1, 2 and 3 end in the opposite order, which they cannot unless all are at work."""
    done = {number: threading.Event() for number in range(5)}

    def work(number):
        if number in (1, 2):
            assert done[number + 1].wait(10), "the next one is not at work"
        done[number].set()
        return number * 10

    assert in_threads(work, range(5), "waiting", "item") == [0, 10, 20, 30, 40]


def test_the_first_is_done_alone(three_threads):
    began, ended = {}, {}

    def work(number):
        began[number] = time.monotonic()
        time.sleep(0.02)
        ended[number] = time.monotonic()

    in_threads(work, range(6), "waiting", "item")
    assert all(began[number] >= ended[0] for number in range(1, 6))


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("bad", [0, 2])
def test_an_error_ends_all(three_threads, bad, error):
    begun = []

    def work(number):
        begun.append(number)
        if number == bad:
            raise error(f"item {number}")
        time.sleep(0.02)
        return number

    with pytest.raises(error, match=f"item {bad}"):
        in_threads(work, range(200), "failing", "item")
    assert bad in begun and len(begun) < 20, "what is not begun is left out"
    before = len(begun)
    time.sleep(0.05)
    assert len(begun) == before, "and nothing goes on behind one's back"
    assert begun == [0] or bad
