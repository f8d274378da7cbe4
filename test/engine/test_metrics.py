"""What is reported: sums over batches and ranks, records, their tags, and files that a killed training leaves."""

import importlib.util
import io
import json
import math
import re
import subprocess
import sys
import types

import pytest
import torch

from valle.bin.trainer_audiolm import main
from valle.engine.metrics import MetricSums, MetricWriter, describe, read_metrics, tags
from valle.engine.trainer import Clock, Trainer
from valle.utils import distributed
from valle.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = (
    "--decoder-dim 32 --nhead 4 --num-decoder-layers 2 --max-duration 8 --num-buckets 2 --log-interval 1 "
    "--optimizer-name AdamW --scheduler-name constant --base-lr 1e-3 --warmup-steps 2 --tensorboard false"
).split()
RUN = ("--save-every-n", 3, "--valid-interval", 2, "--max-steps", 10, "--num-epochs", 50)


@pytest.fixture(autouse=True)
def files_in_order(monkeypatch):
    """TensorBoard reads files by name: second, process, and a counter, of which 10 comes before 9."""
    if importlib.util.find_spec("tensorboard"):
        writer = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        monkeypatch.setattr(writer, "_global_uid", writer.AtomicCounter(0))


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the training's own handles it."""


def train(tokenized, exp_dir, *flags):
    main([*SMALL, "--manifest-dir", str(tokenized), "--exp-dir", str(exp_dir), *map(str, flags)])
    return exp_dir


def lines(exp_dir):
    """The records without what depends on the machine."""
    text = (exp_dir / "log" / "metrics.jsonl").read_text()
    records = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in text.splitlines()]
    for record in records:
        assert record.pop("time") >= 0
        record.pop("speed", None)
    return records


def events(exp_dir):
    """TensorBoard's view of a folder: what it shows after all its files are read."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(exp_dir / "tensorboard"), size_guidance={"scalars": 0})
    return found.Reload()


def scalars(exp_dir):
    found = events(exp_dir)
    return {tag: [(item.step, item.value) for item in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def kill_at(monkeypatch, step):
    after_step = Trainer._after_step

    def dying(self):
        if self.step == step:
            self._log_train()  # written, but no checkpoint holds it
            raise Killed
        after_step(self)

    monkeypatch.setattr(Trainer, "_after_step", dying)


def test_averages_of_numbers_and_tensors_are_the_same():
    plain, tensors = MetricSums(), MetricSums()
    for total, count in ((3.5, 2), (1.25, 1), (-8.0, 5)):
        plain.add({"loss": (total, count), "never": (0.0, 0)})
        tensors.add({"loss": (torch.tensor(total), torch.tensor(count)), "never": (torch.zeros(()), 0)})
    assert plain.average() == tensors.average() == {"loss": pytest.approx(-3.25 / 8)}


def test_small_numbers_are_not_lost_beside_a_large_sum():
    sums = MetricSums()
    for number in (2.0**24, 1.0, 1.0, 1.0, 1.0):
        sums.add({"loss": (torch.tensor(number), 1)})
    assert sums.average()["loss"] == (2**24 + 4) / 5


def test_a_vector_is_the_share_of_values_that_occurred_and_a_star_stands_for_each_quantizer():
    sums = MetricSums()
    first = torch.tensor([[2, 0, 0, 1], [0, 0, 0, 0], [0, 4, 0, 0]])  # (Q, V)
    rows = torch.tensor([3, 0, 4])
    sums.add({"codes_used_q*": (first, rows), "Top_q*": (torch.tensor([1, 0, 3]), rows)})
    sums.add({"codes_used_q*": (torch.tensor([[0, 1, 0, 0]] * 3), torch.tensor([1, 0, 1]))})
    assert sums.average() == {
        "codes_used_q0": 0.75, "codes_used_q2": 0.25, "Top_q0": pytest.approx(1 / 3), "Top_q2": 0.75
    }  # fmt: skip


def test_sums_go_on_from_a_checkpoint_as_if_they_had_not_stopped():
    def batch(seed):
        draw = torch.Generator().manual_seed(seed)
        return {
            "loss": (torch.rand((), generator=draw) * 1e4, 7),
            "used_q*": (torch.randint(0, 2, (2, 5), generator=draw), torch.tensor([3, 4])),
        }

    whole, half = MetricSums(), MetricSums()
    for seed in range(6):
        whole.add(batch(seed))
    for seed in range(3):
        half.add(batch(seed))
    buffer = io.BytesIO()
    torch.save(half.over_ranks(torch.device("cpu")).state_dict(), buffer)
    buffer.seek(0)
    resumed = MetricSums()
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    for seed in range(3, 6):
        resumed.add(batch(seed))
    assert resumed.average() == whole.average()


def two_ranks(folder):
    """Rank 1 has had no batch, as when only fillers were left for it."""
    sums = MetricSums()
    if distributed.rank() == 0:
        sums.add({"loss": (4.0, 2), "used_q*": (torch.tensor([[1, 0], [0, 0]]), torch.tensor([1, 0]))})
    total = sums.over_ranks(torch.device("cpu"))
    other = MetricSums()
    other.add({"loss": (1.0 + distributed.rank(), 1), "used": (torch.eye(2)[distributed.rank()], 1)})
    found = {"one": total.average(), "both": other.over_ranks(torch.device("cpu")).average()}
    (folder / f"{distributed.rank()}.json").write_text(json.dumps(found))


def test_ranks_add_up_also_where_one_had_no_batch(tmp_path):
    distributed.launch(two_ranks, (tmp_path,), 2, 12471)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["one"] == {"loss": 2.0, "used_q0": 0.5}
        assert found["both"] == {"loss": 1.5, "used": 1.0}


def test_a_killed_training_leaves_the_same_lines_as_one_that_was_not(tokenized, tmp_path, monkeypatch):
    whole = train(tokenized, tmp_path / "whole", *RUN, "--tensorboard", "true")
    broken = tmp_path / "broken"
    for step in (2, 8):  # before the first checkpoint, and after the second
        with monkeypatch.context() as patch:
            kill_at(patch, step)
            with pytest.raises(Killed):
                train(tokenized, broken, *RUN, "--tensorboard", "true")
        with (broken / "log" / "metrics.jsonl").open("a") as file:
            file.write('{"step": 9, "epoch": 3, "sta')
    assert lines_left(broken) == [*range(1, 9)], "the killed run had gone beyond its checkpoint"
    train(tokenized, broken, *RUN, "--tensorboard", "true")
    assert lines(broken) == lines(whole)
    one, two = scalars(whole), scalars(broken)
    assert {tag for tag in one if not tag.startswith("speed/")} <= set(two)
    for tag, values in one.items():
        if not tag.startswith("speed/"):
            assert two[tag] == values, tag


def lines_left(exp_dir):
    """Steps of the training lines that a killed run left behind."""
    return [r["step"] for r in read_metrics(exp_dir / "log" / "metrics.jsonl") if r["split"] == "train"]


def test_a_validation_behind_the_last_checkpoint_is_written_once(tokenized, tmp_path, monkeypatch):
    """An epoch's end is validated between two checkpoints of the same step."""
    flags = ("--save-every-n", 1, "--num-epochs", 2)
    whole = train(tokenized, tmp_path / "whole", *flags)
    save = Trainer.save

    def dying(self, *names):
        if any(name.startswith("epoch-") for name in names):
            raise Killed
        save(self, *names)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", dying)
        with pytest.raises(Killed):
            train(tokenized, tmp_path / "broken", *flags)
    assert lines(tmp_path / "broken")[-1]["split"] == "valid"
    train(tokenized, tmp_path / "broken", *flags)
    assert lines(tmp_path / "broken") == lines(whole)


def test_what_another_stage_has_written_stays(tokenized, tmp_path):
    exp = train(tokenized, tmp_path / "exp", "--max-steps", 3, "--train-stage", 1, "--tensorboard", "true")
    train(tokenized, exp, "--max-steps", 4, "--train-stage", 2, "--tensorboard", "true")
    before, shown = lines(exp), scalars(exp)["train/current_loss"]
    assert [(r["stage"], r["stage_step"]) for r in before if r["split"] == "train"] == [
        *((1, step) for step in (1, 2, 3)), *((2, step) for step in (1, 2, 3, 4))
    ]  # fmt: skip
    for stage in (1, 2):  # both are done: nothing is left to do, nothing is taken back
        train(tokenized, exp, "--max-steps", stage + 2, "--train-stage", stage, "--tensorboard", "true")
    assert lines(exp) == before and len(list((exp / "tensorboard").glob("events*"))) == 2
    train(tokenized, exp, "--max-steps", 5, "--train-stage", 1, "--tensorboard", "true")
    after = lines(exp)
    assert after[: len(before)] == before
    new = [(r["stage"], r["stage_step"]) for r in after[len(before) :] if r["split"] == "train"]
    assert new == [(1, 4), (1, 5)]
    assert scalars(exp)["train/current_loss"][: len(shown)] == shown


def test_older_files_without_steps_of_the_stage_are_kept(tmp_path):
    path = tmp_path / "log" / "metrics.jsonl"
    path.parent.mkdir()
    old = [{"step": step, "stage": 2, "split": "train", "loss": 6.25} for step in (1800, 1900, 2000)]
    path.write_text("".join(json.dumps(record) + "\n" for record in old))
    MetricWriter(tmp_path, False, stage=2, step=1900, stage_step=126).close()
    assert read_metrics(path) == old[:2]


def test_lines_are_taken_back_by_the_steps_of_their_stage(tmp_path):
    """Stage 2 went on from its third step, when the folder had seen 103; stage 1 was there before and stays."""
    path = tmp_path / "log" / "metrics.jsonl"
    path.parent.mkdir()
    first = [{"step": step, "stage": 1, "stage_step": step, "split": "train"} for step in (99, 100)]
    second = [{"step": 100 + step, "stage": 2, "stage_step": step, "split": "train"} for step in range(1, 7)]
    path.write_text("".join(json.dumps(record) + "\n" for record in first + second))
    MetricWriter(tmp_path, False, stage=2, step=103, stage_step=3).close()
    assert read_metrics(path) == first + second[:3]


def test_events_of_another_stage_stay_when_one_goes_back(tmp_path):
    """As with --start-batch: stage 1 goes on from its tenth step, stage 2 was trained behind it."""
    place = {"epoch": 1, "split": "train", "loss": 2.0}
    for stage, step in ((1, 10), (1, 20), (2, 50)):
        writer = MetricWriter(tmp_path, True, stage, step - 1, step - 1)
        writer.write({**place, "step": step, "stage": stage, "stage_step": step})
        writer.close()
    MetricWriter(tmp_path, True, 1, 10, 10).close()
    assert 50 in [step for step, _ in scalars(tmp_path)["train/current_loss"]]
    assert [record["step"] for record in read_metrics(tmp_path / "log" / "metrics.jsonl")] == [10, 50]


def test_every_number_of_a_line_has_its_tag(tokenized, tmp_path):
    exp = train(tokenized, tmp_path / "exp", "--max-steps", 4, "--valid-interval", 2, "--tensorboard", "true")
    shown = scalars(exp)
    records = read_metrics(exp / "log" / "metrics.jsonl")
    for record in records:
        for tag, value in tags(record).items():
            assert (record["step"], pytest.approx(value, rel=1e-6)) in shown[tag], tag
    assert sum(len(values) for values in shown.values()) == sum(len(tags(record)) for record in records)
    expected = {
        "train/current_loss", "train/current_ArTop10Accuracy", "train/current_NarTop10Accuracy_q3",
        "train/current_grad_norm", "train/tot_loss", "train/tot_NarTop10Accuracy", "train/learning_rate", "train/epoch",
        "train/valid_loss", "train/valid_NarTop10Accuracy_q1",
        "train/codes_used_q0", "train/codes_predicted_q3", "train/tot_codes_used_q1", "train/valid_codes_predicted_q2",
        "speed/tokens_per_second", "speed/memory_gb", "speed/share_data", "speed/share_optimizer",
        "speed/share_forward_backward", "speed/share_exchange", "speed/share_other",
    }  # fmt: skip
    assert expected <= set(shown)
    train_line = next(record for record in records if record["split"] == "train")
    parts = [value for name, value in train_line["speed"].items() if name.startswith("share_")]
    assert sum(parts) == pytest.approx(1.0, abs=0.01) and train_line["speed"]["share_forward_backward"] > 0.2


def test_tags_of_code_use_and_of_the_scaler():
    record = {
        "step": 5,
        "epoch": 1,
        "stage": 0,
        "stage_step": 5,
        "split": "train",
        "codes_used_q0": 0.5,
        "grad_scale": 8.0,
    }
    assert tags(record) == {"train/codes_used_q0": 0.5, "train/grad_scale": 8.0, "train/epoch": 1.0}
    assert tags({**record, "split": "valid"})["train/valid_codes_used_q0"] == 0.5


def test_lines_are_strict_json(tmp_path):
    writer = MetricWriter(tmp_path, False)
    place = {"step": 1, "epoch": 1, "stage": 0, "stage_step": 1, "split": "train"}
    writer.write({**place, "loss": math.nan, "grad_norm": math.inf, "lr": 0.1, "speed": {"a": -math.inf}})
    writer.close()
    (line,) = (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()
    found = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (found["loss"], found["grad_norm"], found["speed"]["a"], found["lr"]) == (None, None, None, 0.1)


def test_shares_of_time_add_up_and_begin_anew_at_each_line():
    clock = Clock()
    clock.parts = {"data": 2.0, "optimizer": 1.0}
    assert clock.shares(10.0) == {"data": 0.2, "optimizer": 0.1, "other": 0.7}
    clock.parts["data"] = 5.0
    assert clock.shares(4.0) == {"data": 0.75, "other": 0.25}


def test_the_progress_line_has_its_units(tokenized, tmp_path, capfd):
    train(tokenized, tmp_path / "exp", "--max-steps", 2, "--train-stage", 1)
    said = capfd.readouterr().err
    number = r"\d[\d.]*"
    assert re.search(
        rf"epoch 1 \| step 1/2 \| loss {number} nats/token \| ArTop10Accuracy 0\.\d+ \| lr 5\.0e-04 \| "
        rf"{number}k? tokens/s \| {number} GB \| eta {number} (s|min)",
        said,
    ), said
    assert re.search(rf"step 2/2 \| validation \| loss {number} nats/token \| ArLoss {number}", said), said
    train(tokenized, tmp_path / "other", "--num-epochs", 1, "--train-stage", 1)
    assert re.search(r"step 1 \| loss", capfd.readouterr().err), "an unknown number of steps is not promised"


def test_the_log_line_leaves_out_what_only_curves_show():
    record = {
        "step": 3, "epoch": 1, "stage": 0, "stage_step": 3, "split": "valid", "ArLoss": 3.0, "loss": 4.5,
        "codes_used_q0": 0.5, "time": 1.0, "expected": {"loss": [3.61234, 3.8]},
    }  # fmt: skip
    assert describe(record, "nats/token") == ["loss 4.5 nats/token (expected 3.61–3.8)", "ArLoss 3"]


def test_training_goes_on_without_tensorboard(tokenized, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    exp = train(tokenized, tmp_path / "exp", "--max-steps", 2, "--tensorboard", "true")
    assert len(lines(exp)) == 3 and not (exp / "tensorboard").exists()


def test_nothing_optional_is_imported_before_it_is_needed():
    names = ("tensorboard", "torch.utils.tensorboard", "matplotlib", "wandb")
    code = f"import sys, valle.bin.trainer_audiolm; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


class FakeRun:
    def __init__(self, settings):
        self.settings, self.logged, self.axes, self.finished = settings, [], [], False

    def log(self, values):
        self.logged.append(values)

    def define_metric(self, name, step_metric=None):
        self.axes.append((name, step_metric))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A module that notes down what W&B would be given."""
    fake = types.ModuleType("wandb")
    fake.runs = []
    fake.Error = type("Error", (Exception,), {})

    def init(**settings):
        fake.runs.append(FakeRun(settings))
        return fake.runs[-1]

    fake.init = init
    fake.Audio = lambda wav, sample_rate: ("audio", wav.shape, sample_rate)
    fake.Image = lambda picture: ("image", picture.shape)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_is_given_the_same_numbers_in_one_run_of_the_folder(tokenized, tmp_path, wandb):
    flags = ("--wandb-project", "voices", "--save-every-n", 2)
    exp = train(tokenized, tmp_path / "exp", *flags, "--max-steps", 2)
    train(tokenized, exp, *flags, "--max-steps", 3)
    first, second = wandb.runs
    assert first.settings["project"] == "voices" and first.settings["dir"] == str(exp)
    assert first.settings["config"]["model"]["decoder_dim"] == 32
    assert first.settings["id"] == second.settings["id"] and second.settings["resume"] == "allow"
    assert ("*", "step") in first.axes and first.finished and second.finished
    records = read_metrics(exp / "log" / "metrics.jsonl")
    logged = [*first.logged, *second.logged]
    assert [values["step"] for values in logged] == [record["step"] for record in records]
    for values, record in zip(logged, records, strict=True):
        assert values == pytest.approx({**tags(record), "step": record["step"]}, rel=1e-6)
    other = train(tokenized, tmp_path / "other", *flags, "--max-steps", 1)
    assert (
        other.name == wandb.runs[2].settings["name"] and wandb.runs[2].settings["id"] != first.settings["id"]
    )


def test_wandb_hears_and_sees_samples(tmp_path, wandb):
    pytest.importorskip("matplotlib")
    writer = MetricWriter(tmp_path, False, wandb_project="voices")
    writer.write_samples(7, {"samples/ar": torch.zeros(2, 1600)}, 16000)
    (values,) = wandb.runs[0].logged
    assert values["samples/ar"] == ("audio", (1600, 2), 16000) and values["step"] == 7
    assert values["samples/spectrogram"][0] == "image"


def test_wandb_missing_or_refusing_is_one_line_before_the_training(tokenized, tmp_path, monkeypatch, wandb):
    def refuse(**settings):
        raise wandb.Error("no API key")

    wandb.init = refuse
    with pytest.raises(UserError, match="--wandb-project 'voices': no API key; WANDB_MODE=offline"):
        train(tokenized, tmp_path / "exp", "--wandb-project", "voices", "--max-steps", 1)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install valle\[wandb\]"):
        train(tokenized, tmp_path / "exp", "--wandb-project", "voices", "--max-steps", 1)
    assert not lines(tmp_path / "exp") if (tmp_path / "exp" / "log" / "metrics.jsonl").exists() else True
