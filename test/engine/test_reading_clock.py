"""How long symbols last is measured where a training begins, and stays what it is while its weights are used."""

import json

import numpy as np
import pytest
from lhotse import CutSet, SupervisionSegment
from synthetic import TINY_CODEBOOK, write_tokenized

from valle.bin.trainer import main
from valle.data.alignment import train_aligner
from valle.data.symbols import SymbolTable
from valle.engine.checkpoint import load_checkpoint, save_checkpoint
from valle.models import load_model

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = (
    "--decoder-dim 16 --nhead 2 --num-decoder-layers 1 --max-duration 8 --num-buckets 1 --optimizer-name AdamW "
    "--scheduler-name constant --base-lr 1e-3 --tensorboard false --device cpu --num-quantizers 2"
).split()
PLAIN = SMALL[6:-2]  # no architecture


def corpus(folder, symbols_per_cut):
    """Texts of so many symbols in training; much longer ones in validation, which do not count."""
    write_tokenized(folder, {"train": 6, "validation": 2}, num_quantizers=2)
    for split in ("train", "validation"):
        cuts = list(CutSet.from_file(folder / f"cuts_{split}.jsonl.gz"))
        for number, cut in enumerate(cuts):
            length = (symbols_per_cut + number % 3) if split == "train" else 90
            said = SupervisionSegment(cut.id, cut.recording.id, 0.0, cut.duration, text="hello")
            said.custom = {"tokens": {"text": (["h", "e", "l", "o"] * 30)[:length]}}
            cut.supervisions = [said]
        CutSet.from_cuts(cuts).to_file(str(folder / f"utterances_{split}.jsonl.gz"))
    (folder / "text_tokenizer.json").write_text(
        json.dumps({"name": "espeak", "language": "en-us", "lower": True})
    )
    SymbolTable.build("helo").write(folder / "unique_text_tokens.k2symbols")
    return folder


def clock_of(folder):
    """By hand: frames of each symbol, as the training cuts alone teach."""
    cuts = list(CutSet.from_file(folder / "utterances_train.jsonl.gz"))
    table = SymbolTable.build("helo")
    texts = [np.array(table.encode(cut.supervisions[0].custom["tokens"]["text"])) for cut in cuts]
    codes = [cut.load_audio_features() for cut in cuts]
    frames = train_aligner(texts, codes, len(table), TINY_CODEBOOK).frames[:-1]
    return [round(float(lasting), 2) for lasting in frames]


@pytest.fixture
def short(tmp_path):
    return corpus(tmp_path / "short", 5)


@pytest.fixture
def long(tmp_path):
    return corpus(tmp_path / "long", 40)


def train(manifests, exp, *flags, small=SMALL):
    main([*small, "--manifest-dir", str(manifests), "--exp-dir", str(exp), *map(str, flags)])
    newest = max(exp.glob("checkpoint-*.pt"), key=lambda path: int(path.stem.split("-")[1]))
    model, contents = load_model(newest)
    clock = contents["text"]["symbol_frames"]
    assert model.audio_from_zero == model.has_clock == (clock is not None)
    assert clock is None or model.symbol_frames.tolist() == pytest.approx(clock)
    return clock


@pytest.mark.parametrize("name", ["valle", "vallf"])
def test_it_is_measured_on_the_training_cuts(short, long, tmp_path, name):
    assert sum(clock_of(short)) > 2 * sum(clock_of(long)) > 0
    flags = ("--max-steps", 1, "--model-name", name, "--prepend-bos", name == "vallf")
    for manifests in (short, long):
        assert train(manifests, tmp_path / "exp" / manifests.name, *flags) == clock_of(manifests)


def test_without_a_clock_symbols_are_counted(short, tmp_path):
    assert train(short, tmp_path / "exp", "--max-steps", 1, "--time-aligned", "false") is None


def test_stage_2_and_what_goes_on_keep_it(short, long, tmp_path):
    """Also where the manifests have other texts by then: the weights know the clock that they were trained with."""
    exp, clock = tmp_path / "exp", clock_of(short)
    assert train(short, exp, "--train-stage", 1, "--max-steps", 1) == clock
    assert train(long, exp, "--train-stage", 1, "--max-steps", 2) == clock
    assert train(long, exp, "--train-stage", 2, "--max-steps", 3) == clock
    for path in exp.glob("checkpoint-*.pt"):
        path.unlink()
    assert train(long, exp, "--train-stage", 2, "--max-steps", 4) == clock, "of the best checkpoints"
    for path in exp.glob("checkpoint-*.pt"):
        path.unlink()
    assert train(long, exp, "--resume", "false", "--max-steps", 1) == clock_of(long), "a new training"


def test_what_has_begun_without_a_clock_goes_on_without_one(short, tmp_path):
    exp = tmp_path / "exp"
    train(short, exp, "--train-stage", 1, "--max-steps", 1, "--time-aligned", "false")
    for path in exp.glob("*.pt"):  # as they were before there was a clock
        contents = load_checkpoint(path)
        del contents["text"]["symbol_frames"]
        save_checkpoint(exp, [path.name], contents)
    assert train(short, exp, "--train-stage", 1, "--max-steps", 2) is None
    assert train(short, exp, "--train-stage", 2, "--max-steps", 3) is None


@pytest.mark.parametrize("aligned", ["true", "false"])
def test_a_fine_tuning_keeps_that_of_its_start(short, long, tmp_path, aligned):
    clock = train(short, tmp_path / "base", "--max-steps", 1, "--time-aligned", aligned)
    assert clock == (clock_of(short) if aligned == "true" else None)
    start = ("--init-from", tmp_path / "base" / "checkpoint-1.pt")
    assert train(long, tmp_path / "tuned", *start, "--max-steps", 1, small=PLAIN) == clock
    assert train(long, tmp_path / "tuned", *start, "--max-steps", 2, small=PLAIN) == clock
