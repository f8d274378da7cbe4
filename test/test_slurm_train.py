"""`tools/slurm_train.sh`: what it starts, and when it goes into the queue again; with stand-ins for Slurm."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parent.parent / "tools" / "slurm_train.sh"
STAND_INS = {
    "scontrol": 'if [[ $1 == show ]]; then printf "node7\\nnode8\\n"; else echo "$*" > "$OUT/scontrol"; fi',
    "scancel": 'echo "$*" > "$OUT/scancel"',
    # A training that ends when it is asked to, with another code than one that is done.
    "srun": 'echo "$*" > "$OUT/srun"; for _ in $(seq 200); do [[ -f $OUT/scancel ]] && exit "$CODE"; sleep 0.05; done',
}


@pytest.fixture
def start(tmp_path):
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in STAND_INS.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (commands / name).chmod(0o755)

    def start(code):
        environment = {
            **os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "OUT": str(tmp_path), "CODE": str(code),
            "SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2",
            "PYTHON": "python3",
        }  # fmt: skip
        job = subprocess.Popen(["bash", str(TOOL), "-m", "valle.bin.trainer_audiolm", "--exp-dir", "a b"],
                               env=environment, stdout=subprocess.PIPE, text=True)  # fmt: skip
        deadline = time.monotonic() + 20
        while not (tmp_path / "srun").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
        job.communicate(timeout=30)
        return job.returncode

    return start


def test_a_job_whose_time_is_over_goes_on_later(start, tmp_path):
    assert start(1) == 0
    assert (tmp_path / "scancel").read_text().split() == ["--signal=TERM", "123456"]
    assert (tmp_path / "scontrol").read_text() == "requeue 123456\n"
    started, given = (tmp_path / "srun").read_text().split("--shutdown-timeout 280 ")
    assert started.split() == [
        "--kill-on-bad-exit=1", "python3", "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "gpu",
        "--rdzv-backend", "c10d", "--rdzv-id", "123456", "--rdzv-endpoint", "node7:23456",
    ]  # fmt: skip
    assert given == "-m valle.bin.trainer_audiolm --exp-dir a b\n"


def test_a_training_that_is_done_does_not_go_on(start, tmp_path):
    assert start(0) == 0
    assert not (tmp_path / "scontrol").exists()


def test_outside_of_slurm_it_says_how_to_start_it():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    done = subprocess.run(["bash", str(TOOL), "-m", "x"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: not in a Slurm job; start it with: sbatch")
