"""How much memory there is, what fits, what is said when it runs out."""

import mmap
import time

import pytest
import torch

from valle.bin.trainer_audiolm import main
from valle.engine import memory
from valle.engine.checkpoint import load_checkpoint
from valle.engine.trainer import Trainer
from valle.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
GB = 1e9


class Source:
    """100 frames a second; batches of any duration."""

    seconds = 1e6

    def largest(self, epoch, max_duration=None):
        rows = max(1, int((max_duration or 80) / 4))
        return {
            "x": torch.zeros(rows, 100),
            "y": torch.zeros(rows, 300),
            "ids": [f"c{i}" for i in range(rows)],
        }

    def epoch(self, epoch, skip=0):
        yield self.largest(epoch, 40)
        yield self.largest(epoch)


class FakeMeter:
    """Peaks as they would be on a machine where 400 numbers of a batch take 100 MB, beside 1 GB."""

    def __init__(self, device):
        self.peak = 1e9

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.peak += taken[-1] / 400 * 0.1 * GB


taken: list[int] = []


def take_step(batch):
    taken.append(memory.size_of(batch))


@pytest.fixture
def machine(monkeypatch):
    """Sets how many GB the fake machine has."""
    taken.clear()
    monkeypatch.setattr(memory, "PeakMeter", FakeMeter)
    return lambda size: monkeypatch.setattr(memory, "capacity", lambda device: size * GB)


# ---------------------------------------------------------------------------------------- what there is


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_available_ram_is_what_the_containers_leave(tmp_path):
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    write(proc / "meminfo", "MemTotal: 9000 kB\nMemAvailable:   8000 kB\n")
    assert memory.available_ram(proc, groups) == 8000 * 1024
    # Version 2: the limit of the group above counts too; cached files can be given back.
    write(proc / "self" / "cgroup", "0::/job/task\n")
    write(groups / "job" / "task" / "memory.max", "max\n")
    write(groups / "job" / "memory.max", "5000000\n")
    write(groups / "job" / "memory.current", "3000000\n")
    write(groups / "job" / "memory.stat", "anon 1\ninactive_file 400000\n")
    assert memory.available_ram(proc, groups) == 2400000
    # Version 1, as seen from inside a container: its own folder is not there, the root is.
    write(proc / "self" / "cgroup", "5:cpu:/x\n4:memory:/docker/abc\n")
    write(groups / "memory" / "memory.limit_in_bytes", "1000000\n")
    write(groups / "memory" / "memory.usage_in_bytes", "700000\n")
    write(groups / "memory" / "memory.stat", "total_inactive_file 0\n")
    assert memory.available_ram(proc, groups) == 300000
    write(groups / "memory" / "memory.limit_in_bytes", f"{2**63}\n")
    assert memory.available_ram(proc, groups) == 8000 * 1024, "no limit"


def test_processes_on_one_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(memory, "available_ram", lambda: 8 * GB)
    monkeypatch.setattr(memory, "resident", lambda: 1 * GB)
    assert memory.capacity(CPU) == 9 * GB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.capacity(CPU) == 3 * GB


def test_the_peak_is_that_of_what_was_held_and_given_back():
    before = memory.resident()
    with memory.PeakMeter(CPU) as meter:
        block = mmap.mmap(-1, 200_000_000)
        block.write(b"x" * 200_000_000)
        time.sleep(0.02)
        block.close()
    assert 150e6 < meter.peak - before < 600e6
    assert memory.resident() - before < 300e6


# ------------------------------------------------------------------------------------------ what would fit


@pytest.mark.parametrize("limit", [0.9, 3.0, 80.0, 81.0, 500.0, 4096.0])
def test_the_largest_that_fits_is_found_in_few_tries(limit):
    tries = []

    def fits(duration):
        tries.append(duration)
        return duration <= limit

    found = memory.largest_fitting(fits, 80.0)
    if limit < 80 / 64:
        assert found is None
    else:
        assert limit / 1.1 <= found <= limit
    assert len(tries) <= 12 and (found is None or found in tries)


def test_no_more_than_there_is_to_try():
    assert memory.largest_fitting(lambda duration: True, 80.0, most=300.0) == 300.0
    assert memory.largest_fitting(lambda duration: True, 80.0, most=50.0) == 50.0
    assert memory.largest_fitting(lambda duration: duration < 200, 80.0, most=300.0) > 180


def test_a_line_needs_two_sizes():
    assert memory.line_through([(1.0, 5.0), (3.0, 9.0)]) == (3.0, 2.0)
    assert memory.line_through([(1.0, 5.0), (1.1, 9.0)]) is None
    assert memory.line_through([(1.0, 5.0), (3.0, 5.0)]) is None


def test_what_fits_is_told_with_room_to_spare(machine):
    # 80 s are 20 rows of 400: 1 GB + 20 * 0.1 GB. Of 24 GB, 92 % are planned for: (22.08 - 1) / 0.1 rows of 4 s.
    machine(24)
    said = memory.check_largest(take_step, Source(), 1, 80.0, CPU)
    assert said == "the largest batch fits: 3.0 of 24.0 GB; --max-duration up to about 840 would"
    small = Source()
    small.seconds = 300.0
    assert memory.check_largest(take_step, small, 1, 80.0, CPU).endswith("up to about 300 would"), (
        "all there is"
    )
    machine(3.6)
    said = memory.check_largest(take_step, Source(), 1, 80.0, CPU)
    assert said == "the largest batch fits: 3.0 of 3.6 GB; --max-duration up to about 92 would"
    machine(3.5)
    with pytest.raises(UserError, match="does not fit"):
        memory.check_largest(take_step, Source(), 1, 80.0, CPU)


def test_on_a_cpu_what_would_not_fit_is_not_tried(machine):
    machine(2.0)
    with pytest.raises(UserError) as error:
        memory.check_largest(take_step, Source(), 1, 80.0, CPU)
    assert max(taken) == 10 * 400, "half of the largest"
    said = str(error.value)
    assert "(about 3.0 GB) does not fit into 2.0 GB with --max-duration 80" in said
    assert "x (20, 100), y (20, 300), cuts c0" in said and "up to about 28 does" in said


def test_batches_that_go_by_nothing_are_only_tried(machine):
    machine(24)
    assert memory.check_largest(take_step, Source(), 1, None, CPU) == "the largest batch fits: 3.0 of 24.0 GB"
    assert taken == [8000]


def test_on_a_gpu_the_answer_is_found_by_trying(machine, monkeypatch):
    """With a device that says it is one: what is larger than 130 rows runs out of memory."""
    machine(24)
    monkeypatch.setattr(memory, "release", lambda: None)

    def limited(rows):
        def take(batch):
            if memory.size_of(batch) > 400 * rows:
                raise torch.OutOfMemoryError("CUDA out of memory")
            take_step(batch)

        return take

    said = memory.check_largest(limited(130), Source(), 1, 80.0, torch.device("cuda"))
    found = float(said.rpartition("about ")[2].split()[0])
    assert 520 / 1.2 <= found <= 520
    with pytest.raises(UserError, match="does not fit") as error:
        memory.check_largest(limited(9), Source(), 1, 80.0, torch.device("cuda"))
    found = float(str(error.value).rpartition("about ")[2].split()[0])
    assert 36 / 1.2 <= found < 40

    def broken(batch):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        memory.check_largest(broken, Source(), 1, 80.0, torch.device("cuda"))


# ------------------------------------------------------------------------------------------ in the training

SMALL = (
    "--decoder-dim 32 --nhead 4 --num-decoder-layers 2 --max-duration 8 --num-buckets 2 --log-interval 1 "
    "--scheduler-name constant --warmup-steps 2 --tensorboard false --num-epochs 9"
).split()


def run(tokenized, exp_dir, *flags):
    main([*SMALL, "--manifest-dir", str(tokenized), "--exp-dir", str(exp_dir), *map(str, flags)])
    return exp_dir


@pytest.mark.parametrize("optimizer", ["AdamW", "ScaledAdam"])
def test_the_check_changes_nothing(tokenized, tmp_path, capfd, optimizer):
    """Also where a training goes on, with an optimizer that has its averages."""
    flags = ("--optimizer-name", optimizer, "--base-lr", 1e-3)
    with_check, without = tmp_path / "with", tmp_path / "without"
    for steps in (3, 6):
        run(tokenized, with_check, *flags, "--max-steps", steps, "--oom-check", "true")
        run(tokenized, without, *flags, "--max-steps", steps)
    assert capfd.readouterr().err.count("the largest batch fits: ") == 2
    one, two = (load_checkpoint(exp / "checkpoint-6.pt") for exp in (with_check, without))
    assert all(torch.equal(value, two["model"][name]) for name, value in one["model"].items())
    assert torch.equal(one["rng"][0]["torch"], two["rng"][0]["torch"])
    for number, state in one["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(
                torch.as_tensor(value), torch.as_tensor(two["optimizer"]["state"][number][name])
            )


def test_buffers_that_learn_are_put_back():
    """A codec's codebooks move with every forward pass."""
    from valle.modules.quantizer import ResidualQuantizer

    torch.manual_seed(0)
    quantizer = ResidualQuantizer(4, 2, 8).eval()
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    before = {name: value.clone() for name, value in quantizer.named_buffers()}
    random = torch.get_rng_state()
    with memory.unchanged(quantizer, optimizer) as step:
        quantizer.train()
        (quantizer(torch.randn(2, 9, 4) * weight).commitment * float("inf")).backward()
        assert not torch.equal(
            dict(quantizer.named_buffers())["codebooks.0.entries"], before["codebooks.0.entries"]
        )
        step()
        assert optimizer.state, "the memory of a step was taken"
    assert all(torch.equal(value, before[name]) for name, value in quantizer.named_buffers())
    assert torch.equal(weight.detach(), torch.ones(4)) and not optimizer.state and weight.grad is None
    assert torch.equal(torch.get_rng_state(), random) and not quantizer.training
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 9 bytes"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    ],
)
def test_a_step_that_runs_out_of_memory_ends_with_one_line(tokenized, tmp_path, monkeypatch, error):
    plain = Trainer._train_step

    def fail(self, batches):
        if self.step == 2:
            raise error
        plain(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", fail)
    with pytest.raises(UserError) as raised:
        run(tokenized, tmp_path / "exp", "--max-steps", 4)
    said = str(raised.value)
    assert said.startswith("out of memory on cpu at step 2, with the batch x (")
    assert "cuts train-0" in said and "lower --max-duration from 8 to about" in said
    advised = float(said.split("to about ")[1].split(",")[0])
    assert 3 < advised < 8


def test_other_errors_stay_what_they_are(tokenized, tmp_path, monkeypatch):
    def fail(self, batches):
        raise RuntimeError("a bug")

    monkeypatch.setattr(Trainer, "_train_step", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run(tokenized, tmp_path / "exp", "--max-steps", 1)


def test_the_advice_follows_what_has_fitted():
    fitted, source = memory.FittedBatches(CPU), Source()
    failed = source.largest(1, 80.0)
    assert "from 80 to about 40," in fitted.advice([failed], 0, 80.0), "nothing is known: half"
    fitted.note([source.largest(1, 20.0), source.largest(1, 60.0)])
    assert "from 80 to about 60," in fitted.advice([source.largest(1, 4.0), failed], 5, 80.0)
    fitted.note([failed])
    assert "from 80 to about 72," in fitted.advice([failed], 5, 80.0)
    assert "make batches smaller" in fitted.advice([{"wav": torch.zeros(4, 1, 9)}], 5, None)
