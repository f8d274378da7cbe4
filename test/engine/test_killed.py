"""Kill -9 anywhere, run the same command again: the end is bit-equal to that of a training nobody disturbed."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from valle.engine.checkpoint import load_checkpoint

FLAGS = (
    "--decoder-dim 32 --nhead 4 --num-decoder-layers 2 --max-duration 8 --num-buckets 2 --log-interval 1 "
    "--optimizer-name AdamW --scheduler-name cosine --base-lr 1e-3 --warmup-steps 2 --tensorboard false "
    "--dropout 0.1 --prompt-ratio-range 0.2,0.6 --infill-prob 0.3 --num-epochs 1000 --save-every-n 3 "
    "--valid-interval 7 --average-period 2 --train-stage 1"
).split()


def command(tokenized, exp_dir, steps):
    program = [sys.executable, "-m", "valle.bin.trainer_audiolm"]
    where = ["--manifest-dir", str(tokenized), "--exp-dir", str(exp_dir), "--max-steps", str(steps)]
    return [*program, *FLAGS, *where]


def run(arguments, **settings):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **settings
    )


def kill_once(arguments, draw, longest):
    """Start, wait until the loop runs, and for a moment more, then kill; whether there was something to kill."""
    process = run(arguments)
    for line in process.stderr:
        if "trains" in line:
            break
    time.sleep(draw.uniform(0.0, longest))
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    return alive


def lines(exp_dir):
    """metrics.jsonl without what depends on the machine's speed."""
    found = [json.loads(line) for line in (exp_dir / "log" / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("time", "speed")} for line in found]


def same(one, other):
    """Equal, also where tensors lie inside."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize(
    "kills,steps,longest", [(4, 40, 0.8), pytest.param(20, 200, 0.8, marks=pytest.mark.slow)]
)
def test_a_training_killed_again_and_again_ends_bit_equal(tokenized, tmp_path, kills, steps, longest):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    undisturbed = run(command(tokenized, whole, steps))
    assert undisturbed.wait() == 0, undisturbed.stderr.read()[-2000:]
    draw = random.Random(0)
    alive = [kill_once(command(tokenized, broken, steps), draw, longest) for _ in range(kills)]
    assert any(alive), "every process was done before it was killed"
    (broken / ".checkpoint-3-abcdefgh.pt").write_bytes(
        b"half a checkpoint"
    )  # a kill while writing leaves such
    final = run(command(tokenized, broken, steps))
    assert final.wait() == 0, final.stderr.read()[-2000:]
    first, second = (load_checkpoint(folder / f"checkpoint-{steps}.pt") for folder in (whole, broken))
    for part in ("model", "model_avg"):
        for name, value in first[part].items():
            assert torch.equal(value, second[part][name]), f"{part}: {name}"
    for number, state in first["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, second["optimizer"]["state"][number][name]), f"optimizer: {name}"
    for name in ("best_valid_loss", "stale_validations", "totals", "current", "step", "epoch"):
        assert same(first[name], second[name]), name
    assert lines(whole) == lines(broken)
    assert not [path for path in broken.rglob(".*") if path.is_file() and path.suffix == ".pt"], "leftovers"
    print(f"{sum(alive)} of {kills} kills hit a running training")
