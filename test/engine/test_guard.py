"""Steps that cannot be taken: what is not finite, float16's overflow, batches kept and replayed."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from valle.bin.trainer_audiolm import main
from valle.config import TrainConfig
from valle.engine.checkpoint import load_checkpoint
from valle.engine.guard import MAX_FILES, SMALLEST_SCALE, Guard
from valle.models import AudioLM
from valle.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = (
    "--decoder-dim 32 --nhead 4 --num-decoder-layers 2 --max-duration 8 --num-buckets 2 --log-interval 1 "
    "--optimizer-name AdamW --scheduler-name constant --base-lr 1e-3 --warmup-steps 2 --tensorboard false"
).split()


def run(tokenized, exp_dir, *flags):
    main([*SMALL, "--manifest-dir", str(tokenized), "--exp-dir", str(exp_dir), *map(str, flags)])
    return exp_dir


def records(exp_dir, split):
    lines = [json.loads(line) for line in (exp_dir / "log" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def breaking(monkeypatch, *numbers):
    """The model's loss is not a number in these calls while training."""
    calls, plain = [], AudioLM.compute_loss

    def compute_loss(self, batch, stage):
        result = plain(self, batch, stage)
        if self.training:
            calls.append(batch)
            if len(calls) in numbers:
                return result._replace(loss=result.loss * float("nan"))
        return result

    monkeypatch.setattr(AudioLM, "compute_loss", compute_loss)
    return calls


def test_a_bad_step_is_skipped_and_its_batch_kept(tokenized, tmp_path, monkeypatch):
    calls = breaking(monkeypatch, 3)
    exp = run(tokenized, tmp_path / "exp", "--max-steps", 4, "--save-every-n", 1, "--num-epochs", 9)
    before, after, later = (load_checkpoint(exp / f"checkpoint-{step}.pt") for step in (2, 3, 4))
    assert all(torch.equal(value, after["model"][name]) for name, value in before["model"].items())
    assert any(not torch.equal(value, later["model"][name]) for name, value in before["model"].items())
    assert (after["bad_steps"], later["bad_steps"]) == (1, 0)
    (kept,) = (exp / "bad-batches").iterdir()
    assert kept.name == "step-2-rank0.pt"
    contents = torch.load(kept, weights_only=True)
    (batch,) = contents["batches"]
    assert batch["ids"] == calls[2]["ids"] and torch.equal(batch["y"], calls[2]["y"])
    assert contents["step"] == 2 and contents["train_stage"] == 0 and contents["loss"] != contents["loss"]


@pytest.fixture
def replay():
    path = Path(__file__).resolve().parents[2] / "tools" / "replay_batch.py"
    spec = importlib.util.spec_from_file_location("replay_batch", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["replay_batch"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module.main
    del sys.modules["replay_batch"]


def test_a_kept_batch_is_replayed(tokenized, tmp_path, monkeypatch, capsys, replay):
    with monkeypatch.context() as patch:
        breaking(patch, 3)
        exp = run(tokenized, tmp_path / "exp", "--max-steps", 3, "--num-epochs", 9)
    kept, checkpoint = exp / "bad-batches" / "step-2-rank0.pt", exp / "checkpoint-3.pt"
    replay([str(kept), "--checkpoint", str(checkpoint), "--dropout", "false"])
    said = capsys.readouterr().out
    (batch,) = torch.load(kept, weights_only=True)["batches"]
    assert all(f"{cut}: loss " in said for cut in batch["ids"])
    assert "step 2, loss nan" in said and "stage 0" in said
    assert "first output that is not finite: none" in said and "gradients that are not finite: 0" in said
    # Weights that are broken are found where they are.
    contents = load_checkpoint(checkpoint)
    contents["model"]["nar_decoder.layers.1.linear1.weight"][3, 4] = float("inf")
    torch.save(contents, exp / "broken.pt")
    replay([str(kept), "--checkpoint", str(exp / "broken.pt"), "--train-stage", "2"])
    said = capsys.readouterr().out
    assert "weights that are not finite: 1, first nar_decoder.layers.1.linear1.weight" in said
    assert "first output that is not finite: nar_decoder.layers.1.linear1 (Linear)" in said
    assert "gradients that are not finite: 0" not in said and ": loss nan nats, prompt " in said
    with pytest.raises(UserError, match="is not a file of bad-batches/"):
        replay([str(checkpoint), "--checkpoint", str(checkpoint)])


def test_so_many_in_a_row_end_the_training_and_say_what_to_do(tokenized, tmp_path, monkeypatch):
    breaking(monkeypatch, *range(2, 100))
    with pytest.raises(UserError) as error:
        run(tokenized, tmp_path / "exp", "--max-bad-steps", 3, "--num-epochs", 99, "--dtype", "bfloat16")
    said = str(error.value)
    assert "stopped at step 3: 3 non-finite step(s) in a row (cuts ['train-" in said
    assert "--base-lr or --dtype float32" in said and "bad-batches" in said and "replay_batch.py" in said
    assert len(list((tmp_path / "exp" / "bad-batches").iterdir())) == 3


def test_bad_steps_count_only_in_a_row_and_files_are_few(tmp_path):
    guard = Guard(tmp_path, [], TrainConfig(max_bad_steps=2))
    batches = [{"x": torch.zeros(1000, 10)[:2], "ids": ["a", "b"]}]
    nan, inf = float("nan"), float("inf")
    for step in range(0, 60, 2):
        assert not guard.allows(step, *((nan, 1.0) if step % 4 else (1.0, inf)), batches)
        assert guard.allows(step + 1, 1.0, 1.0, batches)
    files = list((tmp_path / "bad-batches").iterdir())
    assert len(files) == MAX_FILES and max(path.stat().st_size for path in files) < 4000, (
        "the rows, not their storage"
    )
    guard.allows(90, nan, 1.0, batches)
    with pytest.raises(UserError, match="2 non-finite"):
        guard.allows(91, nan, 1.0, batches)


def test_overflow_of_float16_is_the_scalers_business(tmp_path):
    guard = Guard(tmp_path, [], TrainConfig(max_bad_steps=2, dtype="float16"))
    inf = float("inf")
    for step in range(20):
        assert not guard.allows(step, 5.0, inf, [{}], scale=64.0)
    assert guard.bad_steps == 0 and not (tmp_path / "bad-batches").exists()
    # A loss that is not finite is not; and a scale as small as this is no help.
    assert not guard.allows(20, inf, inf, [{}], scale=64.0) and guard.bad_steps == 1
    with pytest.raises(UserError, match="--dtype bfloat16"):
        guard.allows(21, 5.0, inf, [{}], scale=SMALLEST_SCALE)


def test_float16_trains_from_a_scale_that_is_far_too_large(tokenized, tmp_path, monkeypatch):
    """Steps without an update in the beginning, then the loss falls, and going on is exact."""
    monkeypatch.setattr("valle.engine.trainer.FIRST_SCALE", 2.0**30)
    flags = ("--dtype", "float16", "--num-epochs", 99, "--max-bad-steps", 2, "--base-lr", 3e-3)
    whole = run(tokenized, tmp_path / "whole", *flags, "--max-steps", 40)
    shown = records(whole, "train")
    scales = [line["grad_scale"] for line in shown]
    assert scales[0] == 2.0**29 and min(scales) < 2.0**24
    assert shown[-1]["loss"] < 0.9 * shown[0]["loss"]
    assert not (whole / "bad-batches").exists()
    broken = run(tokenized, tmp_path / "broken", *flags, "--max-steps", 7)
    run(tokenized, broken, *flags, "--max-steps", 40)
    one, two = (load_checkpoint(exp / "checkpoint-40.pt") for exp in (whole, broken))
    assert all(torch.equal(value, two["model"][name]) for name, value in one["model"].items())
    assert one["grad_scaler"] == two["grad_scaler"]


@pytest.mark.parametrize("optimizer,rate", [("AdamW", 1e-3), ("ScaledAdam", 0.05)])
def test_float16_warms_up_quickly_by_itself(tokenized, tmp_path, optimizer, rate):
    exp = run(tokenized, tmp_path / "exp", "--dtype", "float16", "--max-steps", 12, "--num-epochs", 9,
              "--optimizer-name", optimizer, "--base-lr", rate)  # fmt: skip
    updates = [line for line in records(exp, "train") if "grad_norm" in line]
    assert len(updates) >= 10
