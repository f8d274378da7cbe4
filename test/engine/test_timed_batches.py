"""Trainings read when each symbol is said, and learn to say texts that they have not seen."""

import difflib
import json

import numpy as np
import pytest
import torch
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.array import Array, TemporalArray
from lhotse.audio import AudioSource
from synthetic import TINY_CODEBOOK, write_tokenized
from test_reading_clock import SMALL, corpus

from valle.bin.trainer import main
from valle.data.midi import make_notes, write_notes
from valle.data.packed import open_packed
from valle.data.packed_texts import CutSymbols, open_packed_texts
from valle.data.packed_times import open_packed_times
from valle.data.symbols import SymbolTable
from valle.data.text import load_text_tokenizer
from valle.models import VALLE, load_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def seen(monkeypatch):
    """The rows of all losses: id -> times, or None; by whether the model is in training."""
    calls, real = {True: {}, False: {}}, VALLE.compute_loss

    def compute_loss(self, batch, stage):
        times = batch.get("x_times")
        for row, name in enumerate(batch["ids"]):
            length = int(batch["x_lens"][row])
            calls[self.training][name] = None if times is None else times[row, :length].tolist()
        return real(self, batch, stage)

    monkeypatch.setattr(VALLE, "compute_loss", compute_loss)
    return calls


def train(folder, exp, *flags, small=SMALL):
    main([*small, "--manifest-dir", str(folder), "--exp-dir", str(exp), *map(str, flags)])


def true_times(folder):
    """Cut by cut, as the packs have them; `aligner` of the training cuts."""
    found, aligner = {True: {}, False: {}}, None
    tokenizer, table = load_text_tokenizer(folder)
    for split in ("train", "validation"):
        manifest = folder / f"utterances_{split}.jsonl.gz"
        texts, codes = (
            open_packed_texts(manifest, CutSymbols(table, tokenizer.config())),
            open_packed(manifest, 2, TINY_CODEBOOK),
        )
        times = open_packed_times(manifest, texts, codes, len(table), TINY_CODEBOOK, aligner)
        aligner = times.aligner()
        found[split == "train"] = {codes.id(row): times[row].tolist() for row in range(len(texts))}
    return found


@pytest.mark.parametrize("flags", [(), ("--num-workers", 1), ("--prefix-mode", 4, "--infill-prob", 0.5)])
def test_batches_have_the_times_of_their_texts(tmp_path, seen, flags):
    folder = corpus(tmp_path / "data", 5)
    train(folder, tmp_path / "exp", "--num-epochs", 2, *flags)
    assert seen == true_times(folder)
    assert len(seen[True]) == 6 and len(seen[False]) == 2
    assert all(row == sorted(row) and row[0] < row[-1] for rows in seen.values() for row in rows.values())


@pytest.mark.parametrize("stage", [1, 2])
def test_a_stage_alone_has_them_too(tmp_path, seen, stage):
    folder = corpus(tmp_path / "data", 5)
    train(folder, tmp_path / "exp", "--num-epochs", 2, "--train-stage", stage)
    assert seen == true_times(folder)


def test_without_a_clock_there_are_none(tmp_path, seen):
    folder = corpus(tmp_path / "data", 5)
    train(folder, tmp_path / "exp", "--num-epochs", 2, "--time-aligned", "false")
    assert {*seen[True].values()} == {*seen[False].values()} == {None}
    assert not list((folder / "packed").glob("*-times-*")), "nothing is looked for either"


def test_notes_have_their_own_times(tmp_path, seen):
    folder = write_tokenized(tmp_path / "data", {"train": 4, "validation": 2}, num_quantizers=2)
    write_notes(tmp_path / "piece.mid", make_notes([0.1, 0.5], [0.4, 0.9], [60, 64], [70, 80]))
    for split in ("train", "validation"):
        cuts = list(CutSet.from_file(folder / f"cuts_{split}.jsonl.gz"))
        for cut in cuts:
            cut.midi = str(tmp_path / "piece.mid")
        CutSet.from_cuts(cuts).to_file(str(folder / f"utterances_{split}.jsonl.gz"))
    train(folder, tmp_path / "exp", "--max-steps", 1, "--model-name", "midi-valle")
    assert {*seen[True].values()} == {*seen[False].values()} == {None}
    contents = load_model(tmp_path / "exp" / "best-valid-loss.pt")[1]
    assert contents["text"]["symbol_frames"] is None


# ---------------------------------------------------------------------------------- what it is for

LETTERS = "abcdef"
LASTING = {"a": 2, "b": 4, "c": 3, "d": 6, "e": 5, "f": 3}


def write_speech(folder, texts):
    """Each letter has two codes of its own, which it says by turns for about as many frames as LASTING says."""
    (folder / "codes").mkdir(parents=True)
    draw = np.random.default_rng(0)
    for split, said in texts.items():
        cuts = []
        for number, text in enumerate(said):
            name, speed = f"{split}-{number:03d}", draw.uniform(0.8, 1.3)
            lasting = [max(1, round(LASTING[letter] * speed)) for letter in text]
            letters = np.repeat([LETTERS.index(letter) for letter in text], lasting)
            codes = 2 * letters + np.arange(len(letters)) % 2
            np.save(folder / "codes" / f"{name}.npy", codes.astype(np.uint16)[:, None])
            duration = len(codes) / 50
            source = AudioSource("file", [0], f"{name}.wav")
            recording = Recording(name, [source], 16000, int(duration * 16000), duration)
            cut = MonoCut(name, 0.0, duration, 0, recording=recording)
            array = Array("numpy_files", str(folder / "codes"), f"{name}.npy", [len(codes), 1])
            cut.audio_features = TemporalArray(array, 0, 1 / 50, 0.0)
            words = SupervisionSegment(name, name, 0.0, duration, text=text)
            words.custom = {"tokens": {"text": [*text]}}
            cut.supervisions = [words]
            cuts.append(cut)
        CutSet.from_cuts(cuts).to_file(str(folder / f"utterances_{split}.jsonl.gz"))
    info = {
        "name": "letters", "sample_rate": 16000, "channels": 1, "hop_length": 320, "frame_rate": 50.0,
        "num_quantizers": 1, "codebook_size": 2 * len(LETTERS), "fingerprint": "0" * 16,
    }  # fmt: skip
    (folder / "codec.json").write_text(json.dumps(info))
    (folder / "text_tokenizer.json").write_text(
        json.dumps({"name": "espeak", "language": "en-us", "lower": True})
    )
    SymbolTable.build(LETTERS).write(folder / "unique_text_tokens.k2symbols")


def draw_texts(number, seed):
    """No letter twice in a row, so that what is heard can be read."""
    draw, texts = np.random.default_rng(seed), []
    for _ in range(number):
        text = [int(draw.integers(6))]
        for _ in range(int(draw.integers(3, 8))):
            text.append(int((text[-1] + draw.integers(1, 6)) % 6))
        texts.append("".join(LETTERS[n] for n in text))
    return texts


def heard(codes):
    """The letters of codes, each stretch once."""
    letters = [int(code) // 2 for code in codes]
    return "".join(LETTERS[n] for place, n in enumerate(letters) if place == 0 or letters[place - 1] != n)


def test_texts_that_no_training_has_seen_are_said(tmp_path):
    folder = tmp_path / "data"
    training, unseen = draw_texts(160, 0), draw_texts(20, 1)
    write_speech(folder, {"train": training, "validation": draw_texts(8, 2)})
    assert not set(training) & set(unseen)
    flags = (
        "--decoder-dim 48 --nhead 4 --num-decoder-layers 2 --max-duration 16 --num-buckets 2 --optimizer-name AdamW "
        "--scheduler-name constant --base-lr 3e-3 --tensorboard false --device cpu --num-quantizers 1 "
        "--train-stage 1 --max-steps 120 --warmup-steps 20 --filter-min-duration 0"
    ).split()
    train(folder, tmp_path / "exp", small=flags)
    model, contents = load_model(tmp_path / "exp" / "best-valid-loss.pt")
    table = SymbolTable(contents["text"]["symbols"])
    lasting = dict(zip(table, contents["text"]["symbol_frames"], strict=True))
    assert lasting.pop("<eps>") > 0, "in no text"
    for letter, frames in LASTING.items():  # at speeds from 0.8 to 1.3
        assert lasting[letter] == pytest.approx(1.05 * frames, rel=0.1)
    right = 0.0
    for text in unseen:
        x = torch.tensor(table.encode([*text]))
        said = heard(model.generate(x, temperature=0, max_new_tokens=80).codes[0][:, 0])
        right += difflib.SequenceMatcher(None, text, said, autojunk=False).ratio() / len(unseen)
    assert right > 0.85, "0.67 without a clock"
