"""Several processes train as one does: DDP and FSDP2 over gloo, their checkpoints, how a run of several ends.

All trainings of several ranks run in one set of processes (`two_ranks`): starting them takes longer than the trainings.
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from valle.config import TrainConfig
from valle.engine.checkpoint import load_checkpoint, newest_checkpoint, numbered_checkpoints
from valle.engine.metrics import read_metrics
from valle.engine.parallel import DataParallel, FullySharded
from valle.engine.trainer import Trainer
from valle.models import AudioLM
from valle.utils import distributed
from valle.utils.errors import Unfinished, UserError

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_checkpoint.py"
pytestmark = pytest.mark.usefixtures("one_thread")
RATES = {"AdamW": 1e-3, "ScaledAdam": 0.05}
# What one process trains in groups of batches, two ranks train as well; --save-every-n for those that are gone on from.
CASES = {
    "AdamW-0": {"save_every_n": 2},
    "AdamW-1": {"train_stage": 1},
    "AdamW-2": {"train_stage": 2},
    "ScaledAdam-0": {"optimizer_name": "ScaledAdam"},
    "ScaledAdam-1": {"optimizer_name": "ScaledAdam", "train_stage": 1, "save_every_n": 2},
    "ScaledAdam-2": {"optimizer_name": "ScaledAdam", "train_stage": 2},
    "accumulated": {"group": 4},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
}
RUNS = [
    (kind, case) for kind in ("ddp", "fsdp") for case in CASES if kind == "ddp" or "ScaledAdam" not in case
]
BATCHES, STEPS = 7, 4  # of 2 ranks: in the last step, rank 1 has a filler
ROWS, FILLER_SEED = (1, 1, 1, 2, 2, 3, 1), 7


class SeededLM(AudioLM):
    """Draws the same quantizers for a batch wherever it is computed."""

    scale = 1.0

    def compute_loss(self, batch, stage):
        if self.training:
            torch.manual_seed(batch["seed"])
        result = super().compute_loss(batch, stage)
        return result._replace(loss=self.scale * result.loss)


class Source:
    """Batches in memory, shared out among the ranks; those of one row train a single quantizer's output layer."""

    def __init__(self, count, first_seed):
        self.batches = [self._batch(first_seed + number, ROWS[number]) for number in range(count)]

    @staticmethod
    def _batch(seed, rows):
        draw = torch.Generator().manual_seed(seed)
        lens = torch.randint(6, 12, (2, rows), generator=draw)
        x, y = (torch.randint(0, 30, (rows, int(n.max()), 4), generator=draw) for n in lens)
        return {"x": x, "x_lens": lens[0], "y": y, "y_lens": lens[1], "seed": seed}

    def epoch(self, epoch, skip=0):
        rank, ranks = distributed.rank(), distributed.world_size()
        for start in range(skip * ranks, len(self.batches), ranks):
            if start + rank < len(self.batches):
                yield self.batches[start + rank]
            else:  # it draws another quantizer than the one batch that counts in this step
                yield {**self._batch(FILLER_SEED, 1), "filler": True}


def train(exp, kind="auto", group=2, resume=True, source=None, **settings):
    """Train to the end of one epoch, `group` batches of all ranks a step."""
    torch.manual_seed(0)
    model = SeededLM(32, 4, 1, codebook_size=30, dropout=0.0)
    optimizer = settings.pop("optimizer_name", "AdamW")
    config = TrainConfig(
        exp_dir=str(exp), parallel=kind, optimizer_name=optimizer, base_lr=RATES[optimizer], num_epochs=1,
        scheduler_name="constant", warmup_steps=1, accumulate_grad_steps=group // distributed.world_size(),
        log_interval=1, average_period=1, clip_grad_norm=0.1, tensorboard=False, device="cpu", **settings,
    )  # fmt: skip
    trainer = Trainer(model, config, source or Source(BATCHES, 0), Source(3, 100), {"config": {}})
    if resume:
        trainer.resume()
    with mock.patch("valle.engine.metrics.draw_curves"):  # takes longer than the training
        trainer.run()
    return trainer


@pytest.fixture(scope="module")
def convert_checkpoint():
    spec = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["convert_checkpoint"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["convert_checkpoint"]


def take(source, target, *names):
    """A folder with some of another one's checkpoints."""
    target.mkdir()
    for entry in names:
        (shutil.copytree if (source / entry).is_dir() else shutil.copy)(source / entry, target / entry)
    return target


def in_two_ranks(folder):
    """What runs in each of two ranks."""
    torch.set_num_threads(1)
    for kind, case in RUNS:
        train(folder / f"{kind}-{case}", kind, **CASES[case])
    # From one process's checkpoint in the midst of the epoch.
    for kind in ("ddp", "fsdp"):
        if distributed.rank() == 0:
            take(folder / "one-AdamW-0", folder / f"from-one-{kind}", "checkpoint-2.pt")
        distributed.barrier()
        train(folder / f"from-one-{kind}", kind)
    # Folders: written, gone on from in both ways, and mended where one is not whole.
    for kind in ("ddp", "fsdp"):
        train(folder / f"sharded-{kind}", kind, checkpoint_format="sharded", save_every_n=2)
        if distributed.rank() == 0:
            take(folder / f"sharded-{kind}", folder / f"half-{kind}", "checkpoint-2")
        distributed.barrier()
        other = {"ddp": "fsdp", "fsdp": "ddp"}[kind]
        train(folder / f"half-{kind}", other, checkpoint_format="sharded")
    # A gradient norm that is not finite on one rank is seen on both, and the step is skipped.
    for kind in ("ddp", "fsdp"):
        trainer = train(folder / f"weights-{kind}", kind, resume=False)
        before = {n: v.clone() for n, v in trainer.parallel.model_state(whole=False).items()}
        batch = next(trainer.train_source.epoch(1))
        if distributed.rank() == 1:
            trainer.model.scale = float("nan")
        trainer._train_step([batch])
        after = trainer.parallel.model_state(whole=False)
        assert all(bool((_local(v) == _local(before[n])).all()) for n, v in after.items()), kind
        assert trainer.guard.bad_steps == 1
    for kind in (DataParallel, FullySharded):
        start_alike(kind)


def start_alike(kind):
    """Ranks that have drawn other weights train those of rank 0; a moving average is everywhere that of rank 0."""

    class Moving(SeededLM):
        def __init__(self):
            super().__init__(32, 4, 1, codebook_size=30, dropout=0.0)
            self.register_buffer("moved", torch.zeros(3))

        def compute_loss(self, batch, stage):
            self.moved += 1 + distributed.rank()
            return super().compute_loss(batch, stage)

    torch.manual_seed(distributed.rank())
    model = Moving()
    drawn = {name: value.clone() for name, value in model.state_dict().items()}
    parallel = kind(model, torch.device("cpu"))
    state = parallel.gathered(parallel.model_state(whole=False))
    if distributed.rank() == 0:
        assert all(torch.equal(value, drawn[name]) for name, value in state.items())
    if kind is DataParallel:
        with parallel.accumulating(True):
            parallel.loss(Source(2, 0).batches[0], 1).loss.backward()
        parallel.finish_gradients([])
        state = parallel.model_state()
        assert model.moved.tolist() == [1.0, 1.0, 1.0]
    sums = distributed.all_gather_objects(
        {name: float(value.double().sum()) for name, value in state.items()}
    )
    assert kind is FullySharded or sums[0] == sums[1]


def _local(value):
    return value.to_local() if hasattr(value, "to_local") else value


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """A folder with the trainings of two ranks, and those of one with twice the accumulation."""
    folder = tmp_path_factory.mktemp("parallel")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for case, settings in CASES.items():
        train(folder / f"one-{case}", **settings)
    distributed.launch(in_two_ranks, (folder,), 2, timeout=120)
    torch.set_num_threads(threads)
    return folder


def assert_same(one, two, rtol=1e-5, atol=1e-5):
    assert one.keys() == two.keys()
    for entry, value in one.items():
        torch.testing.assert_close(
            two[entry], value, rtol=rtol, atol=atol, msg=lambda m, e=entry: f"{e}: {m}"
        )


@pytest.mark.parametrize("kind,case", RUNS)
def test_two_ranks_are_one_with_twice_the_accumulation(two_ranks, kind, case):
    one, two = (load_checkpoint(two_ranks / f"{k}-{case}" / "epoch-1.pt") for k in ("one", kind))
    assert one["step"] == two["step"] == (2 if case == "accumulated" else STEPS)
    start = SeededLM(32, 4, 1, codebook_size=30).state_dict()
    moved = [n for n, v in one["model"].items() if (v - start[n]).abs().max() > 1e-3]
    assert len(moved) > 10, "there is something to compare"
    # Half precision rounds an accumulated gradient, so other bits come of adding it up in another order.
    atol = 1e-4 if "float16" in case else 1e-5
    assert_same(one["model"], two["model"], atol=atol)
    assert_same(one["model_avg"], two["model_avg"], atol=atol)
    # The same parameters have a state: those that no rank has used have none.
    assert one["optimizer"]["state"].keys() == two["optimizer"]["state"].keys()
    for number, state in one["optimizer"]["state"].items():
        assert float(state["step"]) == float(two["optimizer"]["state"][number]["step"]), "equally many steps"
    # What is logged: losses, accuracies, the gradient's norm, validation. Fillers are not counted.
    one, two = (read_metrics(two_ranks / f"{k}-{case}" / "log" / "metrics.jsonl") for k in ("one", kind))
    assert len(one) == len(two) and {"train", "valid"} == {record["split"] for record in one}
    assert "grad_norm" in one[0]
    for first, second in zip(one, two, strict=True):
        for record in (first, second):
            assert record.pop("split") and record.pop("time") and record.pop("speed", True)
        assert first == pytest.approx(second, rel=5e-3 if "float16" in case else 1e-4)


def test_some_step_had_parameters_that_only_some_batches_use(two_ranks):
    """Otherwise the test above would say nothing about them."""
    states = load_checkpoint(two_ranks / "one-AdamW-2" / "epoch-1.pt")["optimizer"]["state"]
    assert len({float(state["step"]) for state in states.values()}) > 1


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_checkpoint_of_one_process_goes_on_in_two(two_ranks, kind):
    whole = load_checkpoint(two_ranks / "one-AdamW-0" / "epoch-1.pt")
    gone_on = load_checkpoint(two_ranks / f"from-one-{kind}" / "epoch-1.pt")
    assert_same(whole["model"], gone_on["model"])
    assert_same(whole["model_avg"], gone_on["model_avg"])


@pytest.mark.parametrize(
    "source", ["ddp-AdamW-0", "fsdp-AdamW-0", "ddp-ScaledAdam-1", "sharded-fsdp", "sharded-ddp"]
)
def test_a_checkpoint_of_two_processes_goes_on_in_one(two_ranks, tmp_path, source):
    sharded = source.startswith("sharded")
    exp = take(two_ranks / source, tmp_path / "exp", "checkpoint-2" if sharded else "checkpoint-2.pt")
    case = "AdamW-0" if sharded else source.partition("-")[2]
    train(exp, **CASES[case])
    whole = load_checkpoint(two_ranks / f"one-{case}" / "epoch-1.pt")
    gone_on = load_checkpoint(exp / "epoch-1.pt")
    assert_same(whole["model"], gone_on["model"])
    assert_same(whole["model_avg"], gone_on["model_avg"])


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_sharded_checkpoint_holds_what_the_file_does(two_ranks, tmp_path, convert_checkpoint, kind):
    folder = two_ranks / f"sharded-{kind}" / "epoch-1"
    files = sorted(path.name for path in folder.glob("*.distcp"))
    assert any(f.startswith("__0_") for f in files) and any(f.startswith("__1_") for f in files), files
    convert_checkpoint.main([str(folder), str(tmp_path / "epoch-1.pt")])
    converted = torch.load(tmp_path / "epoch-1.pt", weights_only=True)
    single = load_checkpoint(two_ranks / f"{kind}-AdamW-0" / "epoch-1.pt")
    assert_equal(converted, single)
    convert_checkpoint.main([str(tmp_path / "epoch-1.pt"), str(tmp_path / "back")])
    assert_equal(load_checkpoint(tmp_path / "back"), single)
    # The best stay files, for who generates.
    assert (two_ranks / f"sharded-{kind}" / "best-valid-loss.pt").is_file()


def assert_equal(one, two, path=""):
    """Bit by bit, but for times."""
    if isinstance(one, dict):
        assert one.keys() == two.keys(), path
        for key in one.keys() - {"seconds"}:
            assert_equal(one[key], two[key], f"{path}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(two), path
        for number, (first, second) in enumerate(zip(one, two, strict=True)):
            assert_equal(first, second, f"{path}/{number}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype and torch.equal(one, two), path
    else:
        assert one == two, path


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_sharded_checkpoint_goes_on_in_the_other_kind(two_ranks, kind):
    whole = load_checkpoint(two_ranks / f"sharded-{kind}" / "epoch-1")
    gone_on = load_checkpoint(two_ranks / f"half-{kind}" / "epoch-1")
    assert_same(whole["model"], gone_on["model"])
    assert_same(whole["model_avg"], gone_on["model_avg"])


def damaged(folder, how):
    shards = sorted(folder.glob("*.distcp"))
    if how == "truncated":
        shards[-1].write_bytes(shards[-1].read_bytes()[:-1])
        return f"'{shards[-1].name}' has"
    if how == "lacks a shard":
        shards[0].unlink()
        return f"'{shards[0].name}' is missing"
    (folder / "training.pt").unlink()
    return "'training.pt'"


@pytest.mark.parametrize("how", ["truncated", "lacks a shard", "lacks the rest"])
def test_a_folder_that_is_not_whole_is_named_and_the_one_before_used(
    two_ranks, tmp_path, convert_checkpoint, how, caplog
):
    exp = take(two_ranks / "sharded-fsdp", tmp_path / "exp", "checkpoint-2", "checkpoint-4")
    message = damaged(exp / "checkpoint-4", how)
    found = newest_checkpoint(exp)
    assert found.path == exp / "checkpoint-2" and found.step == 2
    assert "checkpoint-4'" in caplog.text and message in caplog.text
    with pytest.raises(UserError, match="not a whole checkpoint|not whole"):
        convert_checkpoint.main([str(exp / "checkpoint-4"), str(tmp_path / "out.pt")])


def test_what_a_killed_process_was_writing_is_ignored_and_swept_away(two_ranks, tmp_path):
    exp = take(two_ranks / "sharded-ddp", tmp_path / "exp", "checkpoint-2")
    shutil.copytree(exp / "checkpoint-2", exp / ".checkpoint-3.partial")
    assert [number for number, _ in numbered_checkpoints(exp, "checkpoint")] == [2]
    train(exp, checkpoint_format="sharded", save_every_n=2, keep_last_k=1)
    assert [path.name for path in exp.glob("*checkpoint-*")] == ["checkpoint-4"]
    assert not list(exp.glob(".*"))


def test_a_folder_with_code_in_its_index_is_refused(two_ranks, tmp_path):
    # What unpickling does with it: call os.mkdir.
    evil = f"cos\nmkdir\n(V{tmp_path / 'made'}\ntR.".encode()
    exp = take(two_ranks / "sharded-ddp", tmp_path / "exp", "checkpoint-2")
    index = exp / "checkpoint-2" / ".metadata"
    sizes = torch.load(exp / "checkpoint-2" / "training.pt", weights_only=True)
    index.write_bytes(evil)
    sizes["files"][".metadata"] = index.stat().st_size
    torch.save(sizes, exp / "checkpoint-2" / "training.pt")
    with pytest.raises(UserError, match="not the index of a checkpoint"):
        load_checkpoint(exp / "checkpoint-2")
    assert not (tmp_path / "made").exists()


def test_flags_that_do_not_go_together_are_refused(tmp_path):
    for settings, message in (
        ({"optimizer_name": "ScaledAdam"}, "--optimizer-name AdamW"),
        ({"sample_interval": 5}, "--sample-interval do not go together"),
        ({"lora_rank": 4}, "--lora-rank do not go together"),
    ):
        with pytest.raises(UserError, match=message):
            train(tmp_path / "exp", "fsdp", **settings)
    with pytest.raises(UserError, match="--stuck-timeout is 0"):
        distributed.launch(train, (), 2, timeout=0)


# ------------------------------------------------------------------------------------------------ how a run ends


def one_fails(error, message):
    """Rank 1 fails while rank 0 waits for it."""
    if distributed.rank() == 1:
        time.sleep(0.5)
        raise error(message)
    distributed.sum_over_ranks([1.0], torch.device("cpu"))


def test_a_rank_that_raises_ends_the_others_and_is_heard(tmp_path):
    begun = time.monotonic()
    with pytest.raises(UserError, match="^cut 'a' is broken$"):
        distributed.launch(one_fails, (UserError, "cut 'a' is broken"), 2)
    with pytest.raises(RuntimeError, match="rank 1 failed(.|\n)*in one_fails(.|\n)*ZeroDivisionError: oh"):
        distributed.launch(one_fails, (ZeroDivisionError, "oh"), 2)
    assert time.monotonic() - begun < 60


def is_killed():
    if distributed.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.sum_over_ranks([1.0], torch.device("cpu"))


class Signalling(Source):
    """The process that has started the ranks gets a signal in step 2, as from a cluster."""

    def epoch(self, epoch, skip=0):
        for number, batch in enumerate(super().epoch(epoch, skip)):
            if number == 2 and distributed.rank() == 0:
                os.kill(os.getppid(), signal.SIGTERM)
                time.sleep(0.5)
            yield batch


def asked_to_end(exp):
    train(exp, "ddp", source=Signalling(BATCHES, 0))


def test_signals(tmp_path):
    with pytest.raises(UserError, match="^rank 1 was ended by SIGKILL"):
        distributed.launch(is_killed, (), 2)
    with pytest.raises(Unfinished, match="ended at step 3 on SIGTERM"):
        distributed.launch(asked_to_end, (tmp_path / "exp",), 2)
    assert newest_checkpoint(tmp_path / "exp").step == 3
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_under_torchrun_one_rank_speaks_for_all(tmp_path):
    """Its line is on stderr once, and those that missed it are silent about that."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import torch
        from valle.utils import command, distributed
        from valle.utils.errors import UserError

        def work():
            assert distributed.world_size() == 2
            total = distributed.sum_over_ranks([1.0 + distributed.rank()], torch.device("cpu"))
            if distributed.rank() == 1:
                raise UserError(f"cut 'a' is broken, {total}")
            distributed.barrier()

        command.run(lambda argv: distributed.launch(work, (), 1))
        """)
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode != 0
    assert done.stderr.count("error: cut 'a' is broken, [3.0]\n") == 1, done.stderr
    assert "Connection" not in done.stderr and "RuntimeError" not in done.stderr, done.stderr
