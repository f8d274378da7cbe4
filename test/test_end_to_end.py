"""The whole road on sound made on the spot: folder -> manifests -> codes -> AR -> NAR -> evaluation -> continuation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile
from synthetic import save_tiny_codec

ROOT = Path(__file__).resolve().parents[1]
MODEL = (
    "--decoder-dim 32 --nhead 2 --num-decoder-layers 1 --max-duration 40 --num-buckets 2 --num-epochs 2 "
    "--filter-max-duration 20 --tensorboard false"
).split()


def call(*command):
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, timeout=240
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_from_a_folder_of_recordings_to_a_continuation(tmp_path):
    sounds = tmp_path / "my sounds"
    sounds.mkdir()
    draw = np.random.default_rng(0)
    for number, (rate, channels) in enumerate(
        [(16000, 1), (44100, 2), (8000, 1), (22050, 1), (48000, 2), (16000, 1)] * 2
    ):
        time = np.arange(12 * rate) / rate
        tone = (
            0.3 * np.sin(2 * np.pi * (150 + 40 * number) * time) * (0.5 + 0.5 * np.sin(2 * np.pi * 2 * time))
        )
        noise = 0.01 * draw.standard_normal((len(time), channels))
        soundfile.write(sounds / f"clip {number}.wav", tone[:, None] + noise, rate)
    codec, data, exp = save_tiny_codec(tmp_path / "tiny"), tmp_path / "data", tmp_path / "exp"
    recipe = ROOT / "egs" / "folder"
    call("bash", recipe / "prepare.sh", "--audio-dir", sounds, "--data-dir", data, "--codec", codec)
    python = sys.executable
    trained = [
        python,
        recipe / "bin" / "trainer_audiolm.py",
        *MODEL,
        "--manifest-dir",
        data / "tokenized",
        "--exp-dir",
        exp,
    ]
    call(*trained, "--train-stage", 1)
    call(*trained, "--train-stage", 2)
    evaluated = call(
        python, recipe / "bin" / "evaluate.py", "--checkpoint", exp / "best-valid-loss.pt", "--num-clips", 1,
        "--manifest", data / "tokenized" / "cuts_test.jsonl.gz", "--output-dir", tmp_path / "evaluation",
    )  # fmt: skip
    assert "report.html" in evaluated
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert [entry["quantizer"] for entry in results["likelihood"]] == [0, 1, 2, 3]
    prompt = sounds / "clip 1.wav"
    call(
        python, recipe / "bin" / "infer.py", "--prompt", prompt, "--checkpoint", exp / "best-valid-loss.pt",
        "--output-dir", tmp_path / "out", "--duration", 1, "--max-prompt-duration", 3,
    )  # fmt: skip
    wav, rate = soundfile.read(tmp_path / "out" / "clip 1_continuation.wav")
    assert rate == 16000 and len(wav) == 16000 and np.isfinite(wav).all()
