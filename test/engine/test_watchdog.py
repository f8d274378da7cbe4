"""A training that hangs: who is stuck, and where, is said by one who waits, and the training ends."""

import os
import re
import signal
import time
from unittest import mock

import pytest
import torch

from valle.config import TrainConfig
from valle.engine.trainer import Clock, Trainer
from valle.engine.watchdog import Place, Watchdog, describe, speaker
from valle.models import AudioLM
from valle.utils import distributed

TIMEOUT = 3.0  # seconds


def test_one_line_says_who_waits_for_whom():
    data, gradients = Place(124, 0, "data"), Place(124, 2, "exchange")
    waits = "rank 0 has waited 30 s for the others in step 124 (exchange)"
    line = describe(0, {0: gradients, 1: data}, set(), 2, 30.2)
    assert line.startswith(f"{waits}; rank 1 is still in step 124 (data); ended")
    line = describe(0, {0: gradients, 1: gradients, 2: data}, {1}, 3, 30)
    assert line.startswith(
        f"{waits}; rank 2 is still in step 124 (data); rank 1 no longer answers, last heard of in step 124 (exchange)"
    )
    line = describe(1, {0: gradients, 1: data, 2: gradients}, set(), 3, 33)
    assert line.startswith(
        "rank 1 has been stuck for 33 s in step 124 (data), and the others wait for it; ended"
    )
    line = describe(0, {0: gradients, 1: gradients}, set(), 2, 30)
    assert line.startswith("all 2 ranks have waited 30 s for each other in step 124 (exchange)")
    behind = {rank: data for rank in range(1, 40)}
    line = describe(0, {0: gradients, **behind}, set(), 41, 30)
    assert (
        "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 31 more are still in step 124 (data); rank 40 not yet heard of"
        in line
    )


def test_the_first_of_those_that_wait_speaks():
    data, gradients, earlier = Place(9, 0, "data"), Place(9, 2, "exchange"), Place(8, 7, "checkpoint")
    assert speaker({0: data, 1: gradients, 2: gradients}) == 1
    assert speaker({0: gradients, 1: gradients}) == 0
    assert speaker({0: earlier, 1: data}) == 1, "a later phase of an earlier step is behind"


def test_one_process_is_not_watched_and_the_clock_tells_each_part():
    with Watchdog(0.05) as watchdog:
        clock = Clock()
        told = []
        clock.entered = lambda part: (told.append(part), watchdog.enter(3, part))
        for part in ("data", "exchange"):
            with clock.measure(part):
                pass
        time.sleep(0.2)
    assert told == ["data", "exchange"]


class Source:
    """In the third step, one rank never gets its batch."""

    def __init__(self, stuck):
        self.stuck = stuck
        draw = torch.Generator().manual_seed(0)
        codes = torch.randint(0, 30, (2, 8, 4), generator=draw)
        lens = torch.tensor([8, 8])
        self.batch = {"x": codes, "x_lens": lens, "y": codes, "y_lens": lens}

    def epoch(self, epoch, skip=0):
        for number in range(100):
            if number == 2 and distributed.rank() == 1 and self.stuck == "asleep":
                time.sleep(600)
            if number == 2 and distributed.rank() == 1 and self.stuck == "stopped":
                time.sleep(1)  # its place is told several times a second, with so short a timeout
                os.kill(os.getpid(), signal.SIGSTOP)
            yield self.batch


def train(exp, stuck):
    torch.set_num_threads(1)
    config = TrainConfig(exp_dir=str(exp), train_stage=1, optimizer_name="AdamW", tensorboard=False, device="cpu",
                         stuck_timeout=TIMEOUT, max_steps=5)  # fmt: skip
    source = Source(stuck)
    trainer = Trainer(AudioLM(32, 4, 1, codebook_size=30), config, source, None, {"config": {}})
    with mock.patch("valle.engine.metrics.draw_curves"):
        trainer.run()


@pytest.mark.parametrize(
    "stuck,how", [("asleep", "is still in"), ("stopped", "no longer answers, last heard of in")]
)
def test_a_rank_that_is_stuck_is_named_by_the_other(tmp_path, capfd, stuck, how):
    begun = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        distributed.launch(train, (tmp_path / "exp", stuck), 2, timeout=TIMEOUT)
    assert ended.value.code == 2
    assert time.monotonic() - begun < 60
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(said) == 1, said
    waits = r"error: rank 0 has waited \d+ s for the others in step 2 \(forward_backward\); "
    assert re.match(waits + rf"rank 1 {how} step 2 \(data\)", said[0]), said


def test_keeping_in_mind_where_a_process_is_costs_next_to_nothing():
    watchdog = Watchdog(1800)
    begun = time.process_time()  # of this process: neighbours do not count
    for number in range(10_000):
        watchdog.enter(number // 5, "data")
    assert (time.process_time() - begun) / 10_000 < 1e-4 / 5, "seconds a phase; a step has about five"
