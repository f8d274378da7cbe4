"""The training engine through its command: stages, resume, optimizers, what is written."""

import json
import subprocess
import sys

import pytest
import torch

from valle.bin.trainer_audiolm import main
from valle.config import DataConfig, TrainConfig
from valle.data.dataset import CutBatches, PromptTargetDataset
from valle.engine.checkpoint import load_checkpoint
from valle.engine.optimizers import ScaledAdam
from valle.engine.schedules import SCHEDULES
from valle.engine.trainer import Trainer
from valle.models import AudioLM, load_model
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


def test_loss_falls_and_everything_is_written(tokenized, tmp_path):
    exp = run(tokenized, tmp_path / "exp", "--num-epochs", 3, "--tensorboard", "true")
    valid = records(exp, "valid")
    assert valid[-1]["loss"] < valid[0]["loss"] < 3.6
    for name in (
        "epoch-1.pt",
        "epoch-3.pt",
        "best-valid-loss.pt",
        "best-valid-loss-stage0.pt",
        "best-train-loss.pt",
    ):
        assert (exp / name).is_file()
    assert list((exp / "tensorboard").glob("events*"))
    contents = torch.load(exp / "best-valid-loss.pt", weights_only=True)
    expected = {
        "model",
        "optimizer",
        "scheduler",
        "sampler",
        "grad_scaler",
        "config",
        "codec",
        "text_symbols",
        "version",
    }
    assert expected <= set(contents)
    model, _ = load_model(exp / "best-valid-loss.pt")
    assert model.inference(torch.zeros(1, 5, 4, dtype=torch.long), max_new_tokens=3).shape == (1, 8, 4)


def test_a_training_shorter_than_the_validation_interval_is_validated(tokenized, tmp_path):
    exp = run(tokenized, tmp_path / "exp", "--num-epochs", 1, "--valid-interval", 1000)
    assert len(records(exp, "valid")) == 1 and (exp / "best-valid-loss.pt").is_file()


def test_stages_leave_the_other_half_bit_equal_and_hand_over(tokenized, tmp_path):
    exp = run(tokenized, tmp_path / "exp", "--num-epochs", 2, "--train-stage", 1)
    after_ar = load_checkpoint(exp / "best-valid-loss-stage1.pt")["model"]
    run(tokenized, exp, "--num-epochs", 1, "--train-stage", 2)
    contents = load_checkpoint(exp / "best-valid-loss.pt")
    assert contents["train_stage"] == 2
    for name, value in contents["model"].items():
        if name.startswith("ar_"):
            assert torch.equal(value, after_ar[name]), (
                f"{name}: stage 2 starts from stage 1's best and keeps it"
            )
    assert any(not torch.equal(v, after_ar[n]) for n, v in contents["model"].items() if n.startswith("nar_"))
    # Stage 1 left the NAR half as it was drawn.
    torch.manual_seed(42)
    fresh = run(tokenized, tmp_path / "fresh", "--max-steps", 1, "--train-stage", 2)
    first = load_checkpoint(fresh / "checkpoint-1.pt")["model"]
    untouched = [n for n in after_ar if n.startswith("ar_") and torch.equal(first[n], after_ar[n])]
    assert len(untouched) < sum(n.startswith("ar_") for n in after_ar), "stage 1 moved ar_*"
    # Files of stage 1 are not overwritten by stage 2.
    assert load_checkpoint(exp / "epoch-1.pt")["train_stage"] == 1


@pytest.mark.parametrize("dropout", [0.1])
def test_a_resumed_training_equals_an_uninterrupted_one(tokenized, tmp_path, dropout):
    flags = ("--dropout", dropout, "--prompt-ratio-range", "0.2,0.6", "--save-every-n", 5, "--num-epochs", 50)
    whole = run(tokenized, tmp_path / "whole", *flags, "--max-steps", 12)
    broken = run(tokenized, tmp_path / "broken", *flags, "--max-steps", 5)
    run(tokenized, broken, *flags, "--max-steps", 12)
    one = [(r["step"], r["loss"]) for r in records(whole, "train")]
    two = [(r["step"], r["loss"]) for r in records(broken, "train")]
    assert one == two and len(one) == 12
    first, second = (load_checkpoint(d / "checkpoint-12.pt") for d in (whole, broken))
    assert all(torch.equal(v, second["model"][n]) for n, v in first["model"].items())
    # A third call finds everything done and changes nothing.
    before = (broken / "checkpoint-12.pt").stat().st_mtime_ns
    run(tokenized, broken, *flags, "--max-steps", 12)
    assert (broken / "checkpoint-12.pt").stat().st_mtime_ns == before


def test_a_stage_that_is_done_stays_done_when_called_again(tokenized, tmp_path):
    """Also after the next stage has written, and pruned, its own checkpoints."""
    flags = ("--num-epochs", 3, "--keep-last-k", 1, "--save-every-n", 2)
    exp = tmp_path / "exp"
    for stage in (1, 2):
        run(tokenized, exp, *flags, "--train-stage", stage)
    before = {path.name: path.stat().st_mtime_ns for path in exp.glob("*.pt")}
    for stage in (1, 2):
        run(tokenized, exp, *flags, "--train-stage", stage)
    assert {path.name: path.stat().st_mtime_ns for path in exp.glob("*.pt")} == before
    kept = [path.name for path in exp.glob("epoch-*.pt")]
    assert sorted(kept) == ["epoch-3.pt", "epoch-6.pt"], "one of each stage"


def test_a_truncated_checkpoint_is_named_and_the_one_before_used(tokenized, tmp_path, capfd):
    exp = run(tokenized, tmp_path / "exp", "--save-every-n", 2, "--max-steps", 4, "--num-epochs", 9)
    last = exp / "checkpoint-4.pt"
    last.write_bytes(last.read_bytes()[:1000])
    run(tokenized, exp, "--save-every-n", 2, "--max-steps", 5, "--num-epochs", 9)
    said = capfd.readouterr().err
    assert "checkpoint-4.pt' is not a checkpoint, or it is damaged" in said
    assert "checkpoint-2.pt': epoch" in said


def test_accumulation_does_not_change_the_gradient(tokenized, tmp_path):
    """One step over many batches has the gradient of their union, whatever their sizes."""
    data = DataConfig(max_duration=4, num_buckets=2, shuffle=False)
    dataset = PromptTargetDataset(data, 4, 30, 0, draw=False)
    manifest = tokenized / "cuts_train.jsonl.gz"
    small = list(CutBatches(manifest, data, dataset, 0, training=True).epoch(1))
    whole = DataConfig(max_duration=1000, bucketing_sampler=False, shuffle=False)
    large = list(CutBatches(manifest, whole, dataset, 0, training=True).epoch(1))
    assert len(small) > 5 and len(large) == 1
    grads = []
    for batches in (small, large):
        torch.manual_seed(0)
        model = AudioLM(32, 4, 2, codebook_size=30, dropout=0.0)
        config = TrainConfig(exp_dir=str(tmp_path), train_stage=1, optimizer_name="AdamW", clip_grad_norm=0.0)
        trainer = Trainer(model, config, None, None, {})
        trainer._train_step(batches)
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(
    "optimizer,schedule", [("ScaledAdam", "Eden"), ("AdamW", "cosine"), ("AdamW", "constant")]
)
def test_every_optimizer_and_stage_takes_a_step(tokenized, tmp_path, stage, optimizer, schedule):
    rate = 0.05 if optimizer == "ScaledAdam" else 1e-3
    exp = run(tokenized, tmp_path / "exp", "--optimizer-name", optimizer, "--scheduler-name", schedule,
              "--base-lr", rate, "--train-stage", stage, "--max-steps", 3, "--average-period", 1)  # fmt: skip
    contents = load_checkpoint(exp / "checkpoint-3.pt")
    assert contents["step"] == 3 and "model_avg" in contents
    assert all(bool(torch.isfinite(v).all()) for v in contents["model"].values() if v.is_floating_point())


def test_the_averaged_model_is_the_mean_over_steps(tokenized, tmp_path):
    flags = (
        "--average-period",
        1,
        "--save-every-n",
        1,
        "--max-steps",
        4,
        "--num-epochs",
        9,
        "--keep-last-k",
        0,
    )
    exp = run(tokenized, tmp_path / "exp", *flags)
    files = [load_checkpoint(exp / f"checkpoint-{step}.pt") for step in (1, 2, 3, 4)]
    for name, average in files[-1]["model_avg"].items():
        torch.testing.assert_close(average, torch.stack([file["model"][name] for file in files]).mean(0))
    # What icefall's tools compute from two files: the mean over the steps between them.
    start, end = files[1], files[3]
    first, last = start["batch_idx_train"], end["batch_idx_train"]
    assert (first, last, end["average_period"]) == (2, 4, 1)
    for name in end["model_avg"]:
        between = (end["model_avg"][name] * last - start["model_avg"][name] * first) / (last - first)
        expected = (files[2]["model"][name] + files[3]["model"][name]) / 2
        torch.testing.assert_close(between, expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_trains(tokenized, tmp_path):
    exp = run(tokenized, tmp_path / "exp", "--dtype", "bfloat16", "--max-steps", 3, "--oom-check", "true")
    assert records(exp, "train")[-1]["loss"] < 4


def test_scaled_adam_is_scale_free_and_learns():
    """The step is relative to the tensor's size, so a problem scaled by 100 follows the same path, scaled."""
    paths = []
    for scale in (1.0, 100.0):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(
            torch.randn(8, 8) * 0.3 * min(scale, 1.0) if scale == 1.0 else torch.randn(8, 8) * 0.3
        )
        target = torch.ones(8, 8) * 0.3
        optimizer = ScaledAdam([weight], lr=0.03)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = scale * (weight - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()) / scale)
        paths.append(losses)
    assert paths[0][-1] < 0.1 * paths[0][0]
    assert paths[0] == pytest.approx(paths[1], rel=1e-3)


def test_schedules_follow_their_formulas():
    config = TrainConfig(base_lr=0.05, warmup_steps=200)
    eden = SCHEDULES["Eden"](config)
    assert eden(0, 0, 0.0) == pytest.approx(0.025)
    assert eden(5000, 4, 0.0) == pytest.approx(0.05 * 2**-0.25 * 2**-0.25)
    cosine = SCHEDULES["cosine"](config)
    assert cosine(500, 0, 0.0) == pytest.approx(0.05) and cosine(500, 0, 1.0) == pytest.approx(0.001)
    assert SCHEDULES["constant"](config)(99, 0, 0.5) == pytest.approx(0.025)


def test_bad_input_is_one_clear_line(tokenized, tmp_path):
    cases = [
        (["--manifest-dir", str(tmp_path / "nowhere")], "is not there; run the recipe's prepare.sh"),
        (["--num-quantizers", "8"], "--num-quantizers is 8"),
        (["--filter-min-duration", "100"], "none of its 24 cuts lasts"),
        (["--prompt-ratio", "1.5"], "--prompt-ratio is 1.5"),
        (["--prompt-ratio-range", "0.6,0.2"], "0 < LOW <= HIGH < 1"),
        (["--decoder-dim", "33"], "multiple of nhead"),
        (["--no-such-flag", "1"], "no-such-flag"),
        (["--train-stage", "7"], "train-stage"),
        (["--start-epoch", "9"], "epoch-8.pt' does not exist"),
        (["--device", "cuda"], "sees no GPU"),
    ]
    for flags, message in cases:
        if flags == ["--device", "cuda"] and torch.cuda.is_available():
            continue
        with pytest.raises(UserError, match=message):
            run(tokenized, tmp_path / "exp", "--max-steps", 1, *flags)
    (tokenized / "codec.json").write_text(
        json.dumps({"name": "tiny", "num_quantizers": 4, "codebook_size": 5})
    )
    with pytest.raises(UserError, match="expected 0 to 4; were they made with another codec"):
        run(tokenized, tmp_path / "other", "--max-steps", 1)


def test_another_architecture_in_the_same_folder_is_refused(tokenized, tmp_path):
    exp = run(tokenized, tmp_path / "exp", "--max-steps", 1)
    with pytest.raises(UserError, match="another architecture"):
        run(tokenized, exp, "--max-steps", 2, "--decoder-dim", 64)


def test_a_non_finite_loss_stops_with_the_cuts_named(tokenized, tmp_path):
    with pytest.raises(UserError, match="non-finite step"):
        run(tokenized, tmp_path / "exp", "--inf-check", "true", "--base-lr", 1e30, "--max-steps", 20)


def test_two_processes_sum_the_gradients_of_all_targets(tokenized, tmp_path):
    """Two ranks validate alike, end together, and their step is that of all targets; gloo on one machine."""
    flags = ["--num-epochs", "1", "--train-stage", "1", "--dropout", "0", "--world-size", "2"]
    exp = tmp_path / "two"
    command = [
        *SMALL,
        "--manifest-dir",
        str(tokenized),
        "--exp-dir",
        str(exp),
        *flags,
        "--master-port",
        "12399",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "valle.bin.trainer_audiolm", *command],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    two = records(exp, "valid")[-1]
    # Every validation cut was counted once, whatever rank it went to.
    model, _ = load_model(exp / "epoch-1.pt")
    data = DataConfig(max_duration=8, num_buckets=2)
    dataset = PromptTargetDataset(data, 4, 30, 0, draw=False)
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in CutBatches(
            tokenized / "cuts_validation.jsonl.gz", data, dataset, 0, training=False
        ).epoch(0):
            result = model.compute_loss(batch, 1)
            total, count = total + float(result.loss), count + result.num_targets
    assert two["loss"] == pytest.approx(total / count, rel=1e-4)
