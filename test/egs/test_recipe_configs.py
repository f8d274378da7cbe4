"""conf/valle*.yaml of the recipes: known flags, models that can be built, batches that fit their GPU."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from valle.config import DataConfig, TrainConfig, ValleConfig, parse
from valle.data.midi import MidiTokenizer
from valle.engine import planning
from valle.engine.memory import USABLE
from valle.models import build_model

EGS = Path(__file__).resolve().parents[2] / "egs"
FRAME_RATE = 50.0
CPU, SPEECH, PIANO = ("asterisk", "piper"), ("ljspeech", "libritts", "aishell1"), ("atepp", "maestro")
SIZES = (8, 24, 80)  # GB
# Symbols of English phonemes, with stress, marks and word borders; the notes of a fast piece.
READ_A_SECOND = {"valle": 20, "midi-valle": 25}
LONGEST = 15.0  # seconds: the most expensive cuts


def configuration(recipe, name):
    """As the recipe's trainer reads it: its default, and the named file over it."""
    folder = EGS / recipe / "conf"
    default = folder / ("valle.yaml" if recipe in CPU else "valle_8gb.yaml")
    over = [] if name == default.stem else ["--config", str(folder / f"{name}.yaml")]
    return parse("", [ValleConfig, DataConfig, TrainConfig], over, default)


def built(config, recipe):
    """The model for the recipe's default codec, on no device; and the size of the codec's codebooks."""
    config.num_quantizers, codebook_size = 4, 2048 if recipe in PIANO else 1024
    sizes = MidiTokenizer().vocab_sizes if config.model_name == "midi-valle" else 100
    with torch.device("meta"):
        return build_model(config, codebook_size, {"sizes": sizes}, FRAME_RATE), codebook_size


@pytest.mark.parametrize("recipe", CPU + PIANO)
def test_a_model_for_cpus_is_small(recipe):
    config, data, train = configuration(recipe, "valle" if recipe in CPU else "valle_cpu")
    model, _ = built(config, recipe)
    assert sum(weight.numel() for weight in model.parameters()) < 12e6
    assert config.model_name == ("midi-valle" if recipe in PIANO else "valle") and config.time_aligned
    assert train.dtype == "float32" and train.accumulate_grad_steps == 1 and config.prefix_mode == 1
    assert Path(data.manifest_dir) == EGS / recipe / "data/tokenized"
    assert Path(train.exp_dir) == EGS / recipe / "exp/valle"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("recipe", SPEECH + PIANO)
def test_a_model_for_a_gpu_is_what_it_says_and_fits(recipe, size):
    config, data, train = configuration(recipe, f"valle_{size}gb")
    assert config.model_name == ("midi-valle" if recipe in PIANO else "valle")
    assert config.time_aligned and config.prefix_mode == 1 and train.dtype == "bfloat16"
    assert Path(data.manifest_dir) == EGS / recipe / "data/tokenized"
    model, codebook_size = built(config, recipe)
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    said = re.search(
        r"of (\d+) M parameters \(AR (\d+) M, NAR (\d+) M\), on a GPU of (\d+) GB",
        (EGS / recipe / "conf" / f"valle_{size}gb.yaml").read_text(),
    )
    ar = sum(number for name, number in sizes.items() if name.startswith("ar_"))
    counted = [sum(sizes.values()), ar, sum(sizes.values()) - ar]
    assert said is not None and int(said[4]) == size
    for number, written in zip(counted, said.groups(), strict=False):
        assert abs(number / 1e6 - int(written)) <= 1, counted
    # What is read stands before the frames, as a prompt does.
    read = READ_A_SECOND[config.model_name] * LONGEST
    rows = planning.Rows(data.max_duration / LONGEST, read, FRAME_RATE * LONGEST)
    architecture = planning.Architecture.of(config, codebook_size)
    for stage in (1, 2):
        setup = planning.Setup(stage, train.dtype, train.optimizer_name)
        taken = planning.gpu_memory(architecture, sizes, setup, rows).total
        assert taken < USABLE * size * 1e9, f"stage {stage} takes {taken / 1e9:.1f} GB"
        assert taken > 0.6 * size * 1e9, f"stage {stage} takes only {taken / 1e9:.1f} GB"
    assert 1200 <= data.max_duration * train.accumulate_grad_steps <= 1300  # seconds a step, on any GPU


@pytest.mark.parametrize("recipe", CPU + SPEECH + PIANO)
def test_the_recipes_trainer_reads_its_file(recipe, monkeypatch, capsys, tmp_path):
    path = EGS / recipe / "bin" / "trainer.py"
    name = "valle.yaml" if recipe in CPU else "valle_8gb.yaml"
    assert f'"conf" / "{name}"' in path.read_text() and f"conf/{name};" in path.read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(path), "--manifest-dir", "nowhere", "--exp-dir", "exp"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 2 and "'nowhere" in capsys.readouterr().err
