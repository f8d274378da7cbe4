"""When symbols are said: found from texts and codes alone, and kept beside them."""

import json
import shutil
from functools import cache
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
from lhotse import CutSet, SupervisionSegment
from synthetic import write_tokenized

from valle.data import packed_times
from valle.data.alignment import LEFT_OUT, Aligner, train_aligner
from valle.data.packed import open_packed
from valle.data.packed_texts import CutSymbols, open_packed_texts
from valle.data.packed_times import PackedTimes, open_packed_times
from valle.data.symbols import SymbolTable

SYMBOLS, CODES = 10, 64
LASTING = np.array([2, 3, 4, 5, 6, 7, 8, 9, 10, 5])  # frames of each symbol on average
SILENCE = SYMBOLS


def spoken(text, lasting, draw, silence=(0, 0), noise=0.1):
    """Codes (T, 3) of an utterance: 5 codes a symbol, each quantizer its own, some of which are others by chance."""
    states = np.repeat([SILENCE, *text, SILENCE], [silence[0], *lasting, silence[1]])
    codes = (states[:, None] * np.array([5, 3, 1]) + draw.integers(0, 5, (len(states), 3))) % CODES
    wrong = draw.random(codes.shape) < noise
    codes[wrong] = draw.integers(0, CODES, wrong.sum())
    return codes.astype(np.uint16)


def say(number, seed, longest=14, never=()):
    """Texts, codes and the true frames at which symbols begin; `never` are symbols that last no frame."""
    draw = np.random.default_rng(seed)
    texts, codes, begins = [], [], []
    for _ in range(number):
        text = draw.integers(0, SYMBOLS, draw.integers(3, longest + 1))
        around = LASTING[text] * draw.uniform(0.5, 1.5, len(text))
        lasting = np.where(np.isin(text, never), 0, np.maximum(1, np.round(around).astype(int)))
        if not lasting.any():
            continue
        silence = draw.integers(0, 8, 2)
        texts.append(text)
        codes.append(spoken(text, lasting, draw, silence))
        begins.append(silence[0] + np.cumsum(lasting) - lasting)
    return texts, codes, begins


@cache
def learned(never=()):
    texts, codes, _ = say(150, 1, never=never)
    return train_aligner(texts, codes, SYMBOLS, CODES)


def same(first, second):
    return len(first) == len(second) and all(map(np.array_equal, first, second))


def test_borders_are_found_from_nothing():
    texts, codes, begins = say(60, 2)  # others than it has learned from
    found = learned().align(texts, codes)
    assert [len(row) for row in found] == [len(text) for text in texts]
    errors = np.abs(np.concatenate(found) - np.concatenate(begins))
    assert np.median(errors) == 0 and np.mean(errors <= 1) > 0.9
    even = [np.arange(len(text)) * len(part) // len(text) for text, part in zip(texts, codes, strict=True)]
    assert np.median(np.abs(np.concatenate(even) - np.concatenate(begins))) >= 3, "it has something to find"


def test_how_long_symbols_last_on_average():
    texts, codes, begins = say(150, 1)
    ends = [np.append(row[1:], row[-1]) for row in begins]  # of a text's last symbol, silence hides the end
    true = np.zeros(SYMBOLS)
    for symbol in range(SYMBOLS):
        pairs = zip(texts, begins, ends, strict=True)
        lasting = [(e - b)[:-1][text[:-1] == symbol] for text, b, e in pairs]
        true[symbol] = np.concatenate(lasting).mean()
    found = learned().frames
    assert found.shape == (SYMBOLS + 1,)
    assert np.abs(found[:-1] / true - 1).max() < 0.1
    said = [row[-1] - row[0] for row in begins]
    assert found[:-1].max() / found[:-1].min() > 4 and len(said) == len(texts)
    assert 2 < found[SILENCE] < 5, "0 to 7 frames on either side"


def test_what_is_never_said_is_left_out():
    never = (0, 9)
    texts, codes, begins = say(60, 3, never=never)
    aligner = learned(never)
    found = aligner.align(texts, codes)
    assert aligner.frames[list(never)].max() < 0.5 < 1.5 < aligner.frames[1:9].min()
    assert np.exp(aligner.skip[list(never)]).min() > 0.6 > 0.1 > np.exp(aligner.skip[1:9]).max()
    paths = aligner.paths(texts, codes)
    left_out = 0
    for text, path, row in zip(texts, paths, found, strict=True):
        for place in range(1, len(text) + 1):
            frames = int((path == place).sum())
            if not frames:
                left_out += 1
                following = row[place] if place < len(text) else np.searchsorted(path, place)
                assert row[place - 1] == following, "the time of the next"
            else:
                assert path[row[place - 1]] == place and (path[: row[place - 1]] < place).all()
        assert (np.diff(row) >= 0).all()
    assert left_out > 0.6 * sum(int(np.isin(text, never).sum()) for text in texts)
    errors = np.abs(np.concatenate(found) - np.concatenate(begins))
    assert np.median(errors) <= 1


@pytest.mark.parametrize("number", range(LEFT_OUT + 2))
def test_so_many_may_be_left_out_in_a_row(number):
    """One more than that must last a frame, although it is nowhere to be heard."""
    draw = np.random.default_rng(0)
    text = np.array([4, *[9] * number, 6])
    codes = spoken(text, [10, *[0] * number, 10], draw, noise=0)
    path = learned().paths([text], [codes])[0]
    assert (path == 1).sum() in (9, 10) and (path == len(text)).sum() in (9, 10)
    assert len(np.setdiff1d(np.arange(1, number + 2), path)) == min(number, LEFT_OUT)
    assert (learned().align([text], [codes])[0][1:-1] >= 9).all()


def test_first_and_last_symbols_may_be_left_out_with_the_silence_there():
    """Silence counts as one of those in a row."""
    draw = np.random.default_rng(0)
    text = np.array([9] * (LEFT_OUT - 1) + [4, 6] + [9] * (LEFT_OUT - 1))
    lasting = [0] * (LEFT_OUT - 1) + [10, 10] + [0] * (LEFT_OUT - 1)
    codes = spoken(text, lasting, draw, noise=0)
    path = learned().paths([text], [codes])[0]
    assert path.tolist() == [LEFT_OUT] * 10 + [LEFT_OUT + 1] * 10
    behind = learned().align([text], [codes])[0][-1]
    assert behind == 20, "what is left out at the end begins at the end"


def test_rows_in_a_batch_are_the_rows_alone(monkeypatch):
    texts, codes, _ = say(25, 4)
    texts.append(np.zeros(0, np.int64))
    codes.append(codes[0][:7])
    texts.append(np.array([3]))
    codes.append(codes[1][:1])
    longer = say(6, 5, longest=150)
    texts, codes = texts + longer[0], codes + longer[1]
    assert max(map(len, codes)) > 8 * min(map(len, codes))
    aligner = learned()
    done = []
    together = aligner.align(texts, codes, done.append)
    assert sum(done) == len(texts)
    alone = [aligner.align([text], [part])[0] for text, part in zip(texts, codes, strict=True)]
    assert same(together, alone)
    monkeypatch.setattr("valle.data.alignment.BATCH_FRAMES", 300)
    done.clear()
    assert same(together, aligner.align(texts, codes, done.append)) and len(done) > 8
    order = np.random.default_rng(0).permutation(len(texts))
    moved = aligner.align([texts[row] for row in order], [codes[row] for row in order])
    assert same(moved, [together[row] for row in order])
    assert aligner.align([], []) == []


def test_learning_twice_is_the_same():
    texts, codes, _ = say(20, 6)
    rounds = []
    first = train_aligner(texts, codes, SYMBOLS, CODES, rounds.append)
    second = train_aligner(texts, codes, SYMBOLS, CODES)
    assert rounds == list(range(10))
    for name in Aligner.__dataclass_fields__:
        assert np.array_equal(getattr(first, name), getattr(second, name)) and getattr(first, name).ndim
    for table in first.emissions.reshape(-1, CODES):
        assert np.exp(table).sum() == pytest.approx(1)


@pytest.mark.parametrize(
    "length,frames",
    [(0, 1), (0, 9), (1, 1), (1, 2), (1, 30), (3, 1), (4, 4), (9, 4), (20, 4), (40, 3), (300, 1)],
)
def test_every_text_has_times_in_its_recording(length, frames):
    """Also one that is too long for it: with no way to say it, its symbols divide the recording evenly."""
    draw = np.random.default_rng(length)
    text = draw.integers(0, SYMBOLS, length)
    codes = draw.integers(0, CODES, (frames, 2)).astype(np.uint16)
    path = learned().paths([text], [codes])[0]
    assert path.shape == (frames,) and path.min() >= 0 and path.max() <= length + 1
    assert (np.diff(path) >= 0).all()
    times = learned().align([text], [codes])[0]
    assert times.shape == (length,) and times.dtype == np.int64
    assert (np.diff(times) >= 0).all() and (not length or 0 <= times[0] <= times[-1] <= frames)
    if length > 4 * (frames + 2):
        assert path.tolist() == [1 + frame * length // frames for frame in range(frames)]


def test_learning_from_odd_utterances():
    """No text, one symbol, one frame, more symbols than frames, one quantizer: none of it is a number that is none."""
    draw = np.random.default_rng(0)
    texts, codes, _ = say(10, 7)
    for length, frames in ((0, 5), (1, 1), (1, 9), (30, 2)):
        texts.append(draw.integers(0, SYMBOLS - 1, length))
        codes.append(draw.integers(0, CODES, (frames, 3)))
    aligner = train_aligner(texts, [part[:, :1] for part in codes], SYMBOLS + 2, CODES)
    assert aligner.emissions.shape == (1, SYMBOLS + 3, CODES)
    for name in Aligner.__dataclass_fields__:
        assert np.isfinite(getattr(aligner, name)).all()
    assert (aligner.frames[SYMBOLS : SYMBOLS + 2] > 0).all(), "in no text"
    assert aligner.frames.min() >= 0 and (aligner.stay < 0).all() and (aligner.skip < 0).all()


# ------------------------------------------------------------------------------------------------ packed

TABLE = SymbolTable.build("abcdefghij")


def write_corpus(folder, seed=0, texts=None):
    """Cuts whose codes are random, with texts of 3 to 9 symbols."""
    write_tokenized(folder, {"train": 7, "validation": 3}, num_quantizers=2, seed=seed)
    for split in ("train", "validation"):
        write_texts(folder, split, texts or (lambda number: "abcdefghij"[number % 4 : 7 + number % 3]))
    return folder


def write_texts(folder, split, texts):
    cuts = list(CutSet.from_file(folder / f"cuts_{split}.jsonl.gz"))
    for number, cut in enumerate(cuts):
        said = SupervisionSegment(cut.id, cut.recording.id, 0.0, cut.duration, text="")
        said.custom = {"tokens": {"text": [*texts(number)]}}
        cut.supervisions = [said]
    CutSet.from_cuts(cuts).to_file(str(folder / f"utterances_{split}.jsonl.gz"))


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "tokenized")


def parts(folder, split="train"):
    manifest = folder / f"utterances_{split}.jsonl.gz"
    return manifest, open_packed_texts(manifest, CutSymbols(TABLE, {})), open_packed(manifest, 2, 30)


def opened(folder, split="train", aligner=None):
    return open_packed_times(*parts(folder, split), len(TABLE), 30, aligner)


def by_hand(folder, split="train"):
    """What the aligner of the training cuts says of a split."""
    _, texts, codes = parts(folder)
    number = range(len(texts))
    learned_from = [texts[row].astype(np.int64) for row in number], [codes[row] for row in number]
    aligner = train_aligner(*learned_from, len(TABLE), 30)
    _, texts, codes = parts(folder, split)
    number = range(len(texts))
    return aligner.align([texts[row].astype(np.int64) for row in number], [codes[row] for row in number])


@pytest.fixture
def builds(monkeypatch):
    """How often times were looked for."""
    calls, real = [], packed_times._build
    monkeypatch.setattr(packed_times, "_build", lambda *args: (calls.append(args[0].name), real(*args)))
    return calls


def rows(times):
    return [times[row] for row in range(len(times.texts))]


def test_packed_times_are_those_of_the_aligner(corpus):
    times = opened(corpus)
    assert same(rows(times), by_hand(corpus)) and times[0].dtype == np.uint16
    assert len({tuple(row) for row in rows(times)}) > 3 and min(len(row) for row in rows(times)) > 2


def test_they_are_looked_for_once(corpus, builds):
    first = rows(opened(corpus))
    again = opened(corpus)
    assert builds == ["utterances_train.jsonl.gz"] and same(rows(again), first)
    assert isinstance(again.aligner(), Aligner)


def test_validation_has_the_aligner_of_the_training(corpus, builds):
    aligner = opened(corpus).aligner()
    valid = opened(corpus, "validation", aligner)
    assert same(rows(valid), by_hand(corpus, "validation"))
    for name in Aligner.__dataclass_fields__:
        assert np.array_equal(getattr(valid.aligner(), name), getattr(aligner, name))
    opened(corpus, "validation", opened(corpus).aligner())
    assert len(builds) == 2
    own = opened(corpus, "validation")
    assert len(builds) == 3 and own.folder != valid.folder
    assert not np.array_equal(own.aligner().emissions, aligner.emissions)


def test_other_texts_have_other_times(corpus, builds):
    before = opened(corpus).folder
    write_texts(corpus, "train", lambda number: "jihgfedcba"[number % 3 :])
    after = opened(corpus)
    assert len(builds) == 2 and same(rows(after), by_hand(corpus)) and len(after[0]) == 10
    assert not before.exists() and after.folder.exists(), "what nobody can use any more is removed"


def test_other_codes_have_other_times(corpus, builds):
    """Overwritten in their place: texts, manifest and the names of all packs stay what they were."""
    before = opened(corpus)
    first, folder = [row.copy() for row in rows(before)], before.folder
    for path in (corpus / "codes").glob("train-*.npy"):
        codes = np.load(path)
        path.unlink()
        np.save(path, codes[::-1].copy())
    after = opened(corpus)
    assert after.folder == folder and len(builds) == 2
    assert same(rows(after), by_hand(corpus)) and not same(rows(after), first)


@pytest.mark.parametrize("name", ["starts.npy", "aligner.npz", "pack.json"])
@pytest.mark.parametrize("how", ["gone", "cut short", "another"])
def test_a_damaged_pack_is_made_anew(corpus, builds, name, how):
    times = opened(corpus)
    first, path = [row.copy() for row in rows(times)], times.folder / name
    del times
    if how == "gone":
        path.unlink()
    elif how == "cut short":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif name == "starts.npy":
        np.save(path, np.zeros(3, np.uint16))
    elif name == "aligner.npz":
        np.savez(path, stay=np.zeros(3))
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))
    again = opened(corpus)
    assert len(builds) == 2 and same(rows(again), first)
    again.aligner()


def test_a_pack_goes_to_a_worker_as_a_path(corpus):
    times = opened(corpus)
    sent = ForkingPickler.dumps(times)
    arrived = ForkingPickler.loads(sent)
    assert len(sent) < 2000 and isinstance(arrived, PackedTimes) and same(rows(arrived), rows(times))


def test_a_corpus_too_large_to_learn_from_is_learned_from_in_part(corpus, monkeypatch):
    seen, real = [], packed_times.train_aligner
    monkeypatch.setattr(
        packed_times, "train_aligner", lambda *args: (seen.append([*map(len, args[1])]), real(*args))[1]
    )
    frames = parts(corpus)[2].frames
    monkeypatch.setattr(packed_times, "TRAINING_FRAMES", int(frames.sum() * 3 / 7) + 1)
    monkeypatch.setattr(packed_times, "AT_ONCE", 2)
    times = opened(corpus)
    assert seen == [[int(frames[row]) for row in (0, 3, 6)]], "spread over all of it"
    _, texts, codes = parts(corpus)
    whole = times.aligner().align(
        [texts[row].astype(np.int64) for row in range(7)], [codes[row] for row in range(7)]
    )
    assert same(rows(times), whole), "but all have times"


def test_times_that_16_bits_cannot_hold_stay_at_the_last_that_they_can(corpus, monkeypatch):
    """An utterance of more than 65,535 frames, 22 min at 50 Hz."""
    monkeypatch.setattr(Aligner, "align", lambda *args: [np.array([0, 65534, 65535, 65536, 200_000])] * 7)
    write_texts(corpus, "train", lambda number: "abcde")
    assert opened(corpus)[3].tolist() == [0, 65534, 65535, 65535, 65535]


def test_where_nothing_can_be_written_another_folder_is_used(corpus, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    shutil.rmtree(corpus / "packed", ignore_errors=True)
    (corpus / "packed").write_text("a file")
    times = opened(corpus)
    assert times.folder.is_relative_to(tmp_path / "temporary") and same(rows(times), by_hand(corpus))


def test_a_symbol_that_was_never_met_lasts_as_long_as_any():
    texts, codes, _ = say(20, 5)
    lasting = train_aligner(texts, codes, SYMBOLS + 1, CODES).frames
    met = np.bincount(np.concatenate(texts), minlength=SYMBOLS)
    assert lasting[SYMBOLS] == pytest.approx((lasting[:SYMBOLS] * met).sum() / met.sum())
