"""Small synthetic data for the tests: tokenized cuts as a recipe writes them, and an untrained codec."""

import json

import numpy as np
import torch
from lhotse import CutSet, MonoCut, Recording
from lhotse.array import Array, TemporalArray
from lhotse.audio import AudioSource

from valle.codecs.spectral_codec import SpectralCodec, SpectralCodecConfig

TINY_CODEBOOK = 30
FRAME_RATE = 50


def write_tokenized(folder, counts=None, codebook_size=TINY_CODEBOOK, num_quantizers=4, seed=0):
    """cuts_{train,validation,test}.jsonl.gz with random-walk codes of 1 to 2 s, and codec.json."""
    draw = np.random.default_rng(seed)
    codes_dir = folder / "codes"
    codes_dir.mkdir(parents=True)
    for split, count in (counts or {"train": 24, "validation": 4, "test": 4}).items():
        cuts = []
        for number in range(count):
            name = f"{split}-{number:03d}"
            frames = int(draw.integers(50, 100))
            steps = draw.integers(0, 3, (frames, num_quantizers))
            codes = (steps.cumsum(0) % codebook_size).astype(np.uint16)
            np.save(codes_dir / f"{name}.npy", codes)
            duration = frames / FRAME_RATE
            recording = Recording(
                name, [AudioSource("file", [0], f"{name}.wav")], 16000, int(duration * 16000), duration
            )
            cut = MonoCut(name, 0.0, duration, 0, recording=recording)
            array = Array("numpy_files", str(codes_dir), f"{name}.npy", list(codes.shape))
            cut.audio_features = TemporalArray(array, 0, 1 / FRAME_RATE, 0.0)
            cuts.append(cut)
        CutSet.from_cuts(cuts).to_file(str(folder / f"cuts_{split}.jsonl.gz"))
    info = {
        "name": "tiny", "sample_rate": 16000, "channels": 1, "hop_length": 320, "frame_rate": 50.0,
        "num_quantizers": num_quantizers, "codebook_size": codebook_size, "fingerprint": "0" * 16,
    }  # fmt: skip
    (folder / "codec.json").write_text(json.dumps(info))
    return folder


def save_tiny_codec(folder):
    """An untrained codec of 30 codes, as a folder for `load_codec`."""
    torch.manual_seed(0)
    codec = SpectralCodec(
        SpectralCodecConfig(
            codebook_size=TINY_CODEBOOK,
            latent_dim=8,
            encoder_dim=16,
            encoder_depth=1,
            decoder_dim=16,
            decoder_depth=1,
        )
    )
    with torch.no_grad():
        for codebook in codec.quantizer.codebooks:
            codebook.entries.normal_()
    codec.save(folder)
    return folder
