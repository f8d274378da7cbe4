"""What a model that reads is asked about a held-out cut: its prompt, its text, and another cut's text in its place."""

import dataclasses

import numpy as np
import pytest
import torch
from lhotse import MonoCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource

from valle.data.midi import FIELDS, NUM_SPECIAL, MidiTokenizer, make_notes, write_notes
from valle.data.symbols import SymbolTable
from valle.evaluation.asking import choose_prompt, make_asker
from valle.models import VALLE
from valle.utils.errors import UserError

RATE = 50.0
TABLE = SymbolTable.build("_abcdef")
ENDED = SymbolTable(["<eps>", "<bos>", "<eos>", *"_abcdef"])


def make_cut(name, seconds=2.0, speaker=None, symbols="abc", midi=None, start=0.0):
    recording = Recording(name, [AudioSource("file", [0], f"{name}.wav")], 8000, 800_000, 100.0)
    said = SupervisionSegment(name, name, 0.0, seconds, text=symbols, speaker=speaker)
    said.custom = {"tokens": {"text": list(symbols)}}
    custom = {"midi": str(midi)} if midi else {}
    return MonoCut(name, start, seconds, 0, [said], recording=recording, custom=custom)


def codes_of(cuts):
    """Codes that tell which cut and frame they are of."""
    return {
        cut.id: np.stack(
            [np.arange(round(cut.duration * RATE)) % 12, np.full(round(cut.duration * RATE), n)], 1
        )
        for n, cut in enumerate(cuts)
    }


def model_of(sizes, ends=False):
    torch.manual_seed(0)
    return VALLE(16, 2, 1, num_quantizers=2, codebook_size=12, text_sizes=sizes, text_ends=ends).eval()


def text_asker(table=TABLE, ends=False, seconds=3.0):
    tokenizer = {"name": "espeak", "language": "en-us", "lower": True}
    text = {"symbols": list(table), "tokenizer": tokenizer, "ends": ends, "sizes": len(table)}
    return make_asker(model_of(len(table), ends), {"text": text}, RATE, seconds)


# ---------------------------------------------------------------------------------------------- prompts


def draw(cut, others, seconds=3.0, times=200):
    return [choose_prompt(cut, others, seconds, np.random.default_rng(seed)) for seed in range(times)]


def test_a_prompt_is_another_cut_of_the_same_speaker():
    cuts = [make_cut(f"{who}{n}", 3.0, who) for who in ("x", "y") for n in range(3)]
    drawn = draw(cuts[1], cuts)
    assert {cut.id for cut in drawn} == {"x0", "x2"}
    lonely = make_cut("z0", 3.0, "z")
    assert {cut.id for cut in draw(lonely, [*cuts, lonely])} == {cut.id for cut in cuts}, "or of anyone"
    unnamed = [make_cut(f"n{n}", 3.0) for n in range(2)]
    assert {cut.id for cut in draw(unnamed[0], [*cuts, *unnamed])} == {"n1"}, "unnamed ones are alike"


def test_a_prompt_is_about_as_long_as_asked_for():
    cuts = [make_cut(f"c{n:02d}", 0.5 + n / 4, "x") for n in range(40)]  # 0.5 … 10.25 s
    for seconds in (1.0, 3.0, 9.0):
        nearest = sorted(cuts[1:], key=lambda cut: abs(cut.duration - seconds))[:7]  # the 8th may be a tie
        found = {cut.id for cut in draw(cuts[0], cuts, seconds)}
        assert {cut.id for cut in nearest} <= found and len(found) == 8


def test_a_prompt_is_drawn_from_the_seed_whatever_the_order():
    cuts = [make_cut(f"c{n}", 1 + n % 3, "x") for n in range(12)]
    found = [cut.id for cut in draw(cuts[0], cuts, times=20)]
    assert found == [cut.id for cut in draw(cuts[0], cuts[::-1], times=20)] and len(set(found)) > 3


def test_a_lonely_cut_has_no_prompt():
    cut = make_cut("one")
    with pytest.raises(UserError, match="cut 'one' is the only one; a prompt is another held-out cut"):
        choose_prompt(cut, [cut], 3.0, np.random.default_rng(0))


# -------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("ends", [False, True])
def test_a_text_is_read_behind_the_prompts(ends):
    table = ENDED if ends else TABLE
    asker = text_asker(table, ends)
    cuts = [
        make_cut("one", 2.0, "x", "abc"),
        make_cut("two", 3.0, "x", "de"),
        make_cut("three", 1.5, "x", "ffff"),
    ]
    codes = codes_of(cuts)
    questions = asker.questions(cuts, codes, cuts, 0)
    assert [question.cut.id for question in questions] == ["one", "two", "three"]

    def said(*texts):
        symbols = [*"_".join(texts)]
        return ["<bos>", *symbols, "<eos>"] if ends else symbols

    for question, wrong in zip(questions, [*cuts[1:], cuts[0]], strict=True):
        prompt, own, other = (cut.supervisions[0].text for cut in (question.prompt_cut, question.cut, wrong))
        assert question.prompt_cut.id != question.cut.id
        assert table.decode(question.text.tolist()) == said(prompt, own)
        assert table.decode(question.wrong.tolist()) == said(prompt, other)
        assert question.own == len(prompt) + 1 + 2 * ends
        assert question.text.dtype == np.int64
        before = question.own - ends  # the end symbol is counted too, but stands behind all
        assert question.text[:before].tolist() == question.wrong[:before].tolist()
        first = codes[question.prompt_cut.id]
        assert question.prompt_frames == len(first) and np.array_equal(question.prompt, first)
        assert np.array_equal(question.codes[len(first) :], codes[question.cut.id])
        assert question.rest == len(codes[question.cut.id])
        again = question.with_wrong_text()
        assert (
            np.array_equal(again.text, question.wrong) and again.own == question.own and again.wrong is None
        )


def test_the_seed_decides_about_prompts():
    asker = text_asker()
    cuts = [make_cut(f"c{n}", 3.0, "x") for n in range(9)]
    asked = {
        seed: [question.prompt_cut.id for question in asker.questions(cuts, codes_of(cuts), cuts, seed)]
        for seed in (0, 1)
    }
    assert asked[0] == [q.prompt_cut.id for q in asker.questions(cuts, codes_of(cuts), cuts, 0)] != asked[1]


def test_prompts_come_from_cuts_that_are_not_asked_about_too():
    cuts = [make_cut("one", 2.0, "x"), make_cut("two", 2.0, "y"), make_cut("more", 2.0, "x", "ff")]
    question, _ = text_asker().questions(cuts[:2], codes_of(cuts), cuts, 0)
    assert question.prompt_cut.id == "more"


@pytest.mark.parametrize("ends", [False, True])
def test_what_is_scored_is_three_quarters_of_a_cut(ends):
    table = ENDED if ends else TABLE
    asker = text_asker(table, ends)
    cuts = [make_cut("one", 2.0, symbols="abc"), make_cut("two", 3.02, symbols="de"), make_cut("three", 0.04)]
    codes = list(codes_of(cuts).values())
    splits = asker.splits(cuts, codes)
    assert asker.prompt == "25% of it" and [len(split.prompt) for split in splits] == [25, 38, 1]
    for split, cut, of_cut, wrong in zip(splits, cuts, codes, [*cuts[1:], cuts[0]], strict=True):
        assert split.cut_id == cut.id
        assert np.array_equal(np.concatenate([split.prompt, split.target]), of_cut)
        for text, of in ((split.text, cut), (split.wrong, wrong)):
            symbols = [*of.supervisions[0].text]
            assert table.decode(text.tolist()) == (["<bos>", *symbols, "<eos>"] if ends else symbols)
    with pytest.raises(UserError, match="cut 'short': 1 frame cannot be split"):
        asker.splits([make_cut("short")], [np.zeros((1, 2), np.int64)])


def test_an_answer_is_of_the_codes_behind_the_prompt_and_no_longer_than_asked():
    asker = text_asker()
    cuts = [make_cut("one", 2.0, "x", "abc"), make_cut("two", 1.0, "x", "de")]
    questions = asker.questions(cuts, codes_of(cuts), cuts, 0)
    answers = asker.answer(questions, [7, 4], 3, 1.0, 5)
    assert all(answer.codes.shape[1:] == (2,) and len(answer.codes) <= most
               for answer, most in zip(answers, (7, 4), strict=True))  # fmt: skip
    assert {answer.finish_reason for answer in answers} <= {"eos", "length"}
    for row, most in enumerate((7, 4)):
        (alone,) = asker.answer([questions[row]], [most], 3, 1.0, 5)
        assert np.array_equal(alone.codes, answers[row].codes)
    other = asker.answer([question.with_wrong_text() for question in questions], [7, 4], 3, 1.0, 5)
    assert any(not np.array_equal(one.codes, two.codes) for one, two in zip(answers, other, strict=True))


def test_the_model_is_told_which_part_of_a_text_is_the_prompts(monkeypatch):
    asker, told = text_asker(), []
    cuts = [make_cut("one", 2.0, "x", "abc"), make_cut("two", 1.0, "x", "de")]
    questions = asker.questions(cuts, codes_of(cuts), cuts, 0)
    generate = asker.model.generate
    monkeypatch.setattr(
        asker.model, "generate",
        lambda *args, **named: (told.append(named["prompt_text_lens"].tolist()), generate(*args, **named))[1],
    )  # fmt: skip
    asker.answer(questions, [2, 2], 3, 1.0, 5)
    assert told == [[3, 4]]  # "de_" before "abc", "abc_" before "de"


# ------------------------------------------------------------------------------------------------- notes


@pytest.fixture
def pieces(tmp_path):
    """Two pieces: a note each 0.4 s, the first with long ones that sound across 1 s."""
    onsets = np.arange(0.1, 4.0, 0.4)
    cuts = []
    for n, (pitch, length) in enumerate(((60, 0.7), (80, 0.2))):
        notes = make_notes(onsets, onsets + length, pitch + np.arange(len(onsets)), np.full(len(onsets), 64))
        write_notes(tmp_path / f"{n}.mid", notes)
        cuts.append(make_cut(f"piece-{n}", 4.0, midi=tmp_path / f"{n}.mid"))
    return cuts


def note_asker(seconds):
    tokenizer = MidiTokenizer()
    text = {"tokenizer": tokenizer.config(), "ends": True, "sizes": tokenizer.vocab_sizes}
    return make_asker(model_of(tokenizer.vocab_sizes, True), {"text": text}, RATE, seconds)


def test_a_piece_begins_with_its_prompt(pieces):
    asker = note_asker(1.0)
    codes = codes_of(pieces)
    questions = asker.questions(pieces, codes, pieces, 0)
    assert asker.shortest == 2.0  # a second of prompt, and one to say
    tokenizer = MidiTokenizer()
    columns = [FIELDS.index(name) for name in ("position", "second")]
    for question, base, other in zip(questions, (60, 80), (80, 60), strict=True):
        assert question.prompt_cut is None and question.prompt_frames == 50
        assert np.array_equal(question.codes, codes[question.cut.id])
        first = 3  # notes at 0.1, 0.5 and 0.9 s
        assert question.own == first + 2
        right, wrong = (tokenizer.decode(tokens[1:-1]) for tokens in (question.text, question.wrong))
        assert right.pitch.tolist() == [base + n for n in range(10)]
        assert wrong.pitch.tolist() == [base + n for n in range(first)] + [
            other + n for n in range(first, 10)
        ]
        kept = np.array_equal(question.text[: first + 1][:, columns], question.wrong[: first + 1][:, columns])
        assert kept and np.allclose(wrong.onset, right.onset, atol=0.011), "as they are, and in time"
        for tokens in (question.text, question.wrong):
            assert (tokens[0] == 1).all() and (tokens[-1] == 2).all() and (tokens[1:-1] >= NUM_SPECIAL).all()


def test_a_stretch_of_a_piece_counts_from_its_start(pieces):
    cut = dataclasses.replace(pieces[0], start=1.0, duration=3.0)
    question, _ = note_asker(0.5).questions([cut, pieces[1]], codes_of([cut, pieces[1]]), pieces, 0)
    notes = MidiTokenizer().decode(question.text[1:-1])
    assert notes.pitch[0] == 63 and notes.onset[0] == pytest.approx(0.3, abs=0.011)
    assert question.own == 1 + 2 and question.prompt_frames == 25


def test_what_is_scored_of_pieces(pieces):
    one, two = note_asker(1.0).splits(pieces, list(codes_of(pieces).values()))
    assert len(one.prompt) == 50 and len(one.target) == 150
    assert np.array_equal(one.text, two.wrong) and np.array_equal(one.wrong, two.text)
    assert not np.array_equal(one.text, one.wrong) and one.text.shape == (12, len(FIELDS))


def test_a_piece_is_answered(pieces):
    asker = note_asker(1.0)
    questions = asker.questions(pieces, codes_of(pieces), pieces, 0)
    answers = asker.answer(questions, [3, 5], 0, 1.0, 5)
    for answer, most in zip(answers, (3, 5), strict=True):
        assert len(answer.codes) <= most and (len(answer.codes) == most or answer.finish_reason == "eos")
