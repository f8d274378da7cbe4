"""Runs recipes as a user does, with a tiny codec and sound made on the spot; no network."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from valle.codecs.spectral_codec import SpectralCodec, SpectralCodecConfig

EGS = Path(__file__).resolve().parents[2] / "egs"
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def prepare(recipe: str, *options: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a recipe's prepare.sh to its end."""
    command = ["bash", str(EGS / recipe / "prepare.sh"), *map(str, options)]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


def start_python(script: str, *options: object) -> subprocess.Popen[bytes]:
    """Start one of a recipe's programs, to be killed."""
    environment = {**ENVIRONMENT, "PYTHONPATH": str(EGS.parent)}
    command = [sys.executable, str(EGS / script), *map(str, options)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def speech(seconds: float, sample_rate: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    """(C, N): a buzz whose pitch and level change, with some noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * sample_rate)) / sample_rate
    buzz = np.sin(2 * np.pi * (120 + 40 * seed % 200) * time + 3 * np.sin(5 * time))
    mono = 0.3 * buzz * (1 + np.sin(7 * time)) / 2 + 0.02 * rng.standard_normal(len(time))
    return np.repeat(mono[None], channels, axis=0).astype(np.float32)


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file with its content and time stamp."""
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="session")
def tiny_codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a codec of random weights."""
    torch.manual_seed(0)
    config = SpectralCodecConfig(
        n_mels=20,
        latent_dim=8,
        encoder_dim=16,
        encoder_depth=1,
        decoder_dim=16,
        decoder_depth=1,
        codebook_size=64,
    )
    folder = tmp_path_factory.mktemp("tiny codec")
    SpectralCodec(config).save(folder)
    return folder


@pytest.fixture(scope="session")
def run_prepare() -> Callable[..., subprocess.CompletedProcess[str]]:
    return prepare


@pytest.fixture(scope="session")
def start_program() -> Callable[..., subprocess.Popen[bytes]]:
    return start_python


@pytest.fixture(scope="session")
def make_speech() -> Callable[..., np.ndarray]:
    return speech


@pytest.fixture(scope="session")
def take_snapshot() -> Callable[[Path], dict[str, tuple[bytes, int]]]:
    return snapshot
