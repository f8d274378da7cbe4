"""When the symbols of a text are said: given in training, worked out from averages and the prompt in generation."""

from dataclasses import replace

import pytest
import torch
from synthetic import TINY_CODEBOOK
from test_audio_lm import make_model as make_audio_lm
from test_clock import CASES, IDS, ar_call, seen
from test_valle import TEXT, Q, V, codec, make_batch, make_model, prompts_of  # noqa: F401  # a fixture

from valle.generation.chunks import Chunks
from valle.models import VALLE
from valle.models.prompts import make_prompts
from valle.models.valle import MOST_HURRY
from valle.modules.packing import packed

FRAMES = [0.0, 1.0, 2.0, 3.0, 4.0, 0.5, 6.0, 7.0, 8.0, 0.0, 10.0]  # of symbols 0 … 10


def timed(kind="valle", mode=1, **changes):
    return make_model(kind, mode, symbol_frames=FRAMES, **changes)


def ready(frames, text, own=None, model=None):
    """The times of one text behind a prompt of so many frames, of which it names `own` symbols."""
    codes, x = torch.zeros(frames, Q, dtype=torch.long), torch.tensor(text)
    prompts = make_prompts([codes], [x], None if own is None else [own])
    return (model or timed()).ready(prompts).text_times[0].tolist()


# ---------------------------------------------------------------------------------- generation: ready


def test_no_text_ends_before_half_of_its_time():
    codes = [torch.zeros(n, Q, dtype=torch.long) for n in (9, 0)]
    prompts = make_prompts(codes, [torch.tensor([3, 6, 0, 4, 2]), torch.tensor([8, 8, 1])], [2, 0])
    model = timed()
    found = model.ready(prompts).least.tolist()
    assert found == [int(0.5 * 4), 8], "until the last symbol begins: 4 frames behind the prompt, and 16"
    with torch.no_grad():
        model.ar_predict_layer.weight.zero_()
        model.ar_predict_layer.weight[model.eos] = (
            1.0  # whatever is said, the end is the likeliest or all are alike
        )
    for row, own in ((0, 2), (1, 0)):
        prompt = codes[row][None] if len(codes[row]) else None
        text = prompts.text[row, : int(prompts.text_lens[row])]
        made = model.generate(
            text, None, prompt, None, 40, temperature=0, prompt_text_lens=torch.tensor([own])
        )
        assert len(made.codes[0]) - made.prompt_lens[0] >= found[row]


@pytest.mark.parametrize("own", [None, 0, 2])
def test_without_a_prompt_a_text_is_read_at_its_usual_speed(own):
    assert ready(0, [3, 6, 0, 4, 2], own) == [0, 3, 9, 9, 13]


@pytest.mark.parametrize("own", [None, 0])
def test_behind_a_prompt_without_a_text_too(own):
    assert ready(7, [3, 6, 0, 4, 2], own) == [7, 10, 16, 16, 20]


@pytest.mark.parametrize(
    "frames,rate", [(9, 1.0), (10, 10 / 9), (8, 8 / 9), (12, 12 / 9), (7, 7 / 9), (1, 1 / 9), (30, 30 / 9)]
)
def test_the_prompts_text_fills_the_prompt_and_its_speed_goes_on(frames, rate):
    times = ready(frames, [3, 6, 0, 4, 2], 2)
    assert times[:2] == pytest.approx([0, 3 * rate])
    goes_on = min(max(rate, 1 / MOST_HURRY), MOST_HURRY)
    assert times[2:] == pytest.approx([frames, frames, frames + 4 * goes_on])
    assert (goes_on == rate) == (frames in (7, 8, 9, 10, 12)), "within bounds"


def test_prompts_whose_text_lasts_next_to_nothing():
    assert ready(5, [0, 9, 3, 4], 2) == [0, 0, 5, 8], "no time, no speed"
    assert ready(5, [0, 5, 3, 4], 2) == pytest.approx([0, 0, 5, 5 + 3 * MOST_HURRY])
    assert ready(5, [5, 0, 3, 4], 2) == pytest.approx([0, 2.5, 5, 5 + 3 * MOST_HURRY]), "at least one frame"
    assert ready(5, [5, 5, 1, 3], 3) == pytest.approx([0, 1.25, 2.5, 5])
    assert ready(5, [3, 4], 2) == pytest.approx([0, 15 / 7]), "all of it is the prompt's"


def test_a_filled_texts_times_fill_the_whole_recording():
    prompts = make_prompts(
        [torch.zeros(12, Q, dtype=torch.long)] * 3, list(map(torch.tensor, ([3, 6, 4], [2, 4], [0, 9])))
    )
    sides = {"prefix_lens": torch.tensor([5, 0, 3]), "gap_lens": torch.tensor([14, 6, 1])}
    times = timed().ready(replace(prompts, **sides)).text_times
    assert times[0].tolist() == pytest.approx([0, 6, 18]), "26 frames for 13"
    assert times[1, :2].tolist() == pytest.approx([0, 6]), "18 frames for 6"
    assert times[2, :2].tolist() == [0, 0], "no time to divide"


def ragged(seed=0, rows=5, own=True):
    """Prompts of 0 to 30 frames with texts of 3 to 9 symbols, of which the prompts have 0 to 3; row by row."""
    draw = torch.Generator().manual_seed(seed)
    lens = [int(torch.randint(0, 31, (1,), generator=draw)) for _ in range(rows)]
    lens[0] = 0
    codes = [torch.randint(V, (n, Q), generator=draw) for n in lens]
    texts = [
        torch.randint(TEXT, (int(torch.randint(3, 10, (1,), generator=draw)),), generator=draw) for _ in lens
    ]
    number = [int(torch.randint(0, 4, (1,), generator=draw)) for _ in lens]
    return codes, texts, number if own else None


@pytest.mark.parametrize("seed", range(4))
def test_times_of_ragged_rows(seed):
    """Rows are what they are alone, whatever stands in the padding; times go up, and the new is behind the prompt."""
    model = timed()
    codes, texts, own = ragged(seed)
    prompts = make_prompts(codes, texts, own)
    padded = prompts.text.clone()
    for row, text in enumerate(texts):
        padded[row, len(text) :] = 10
    for given in (prompts, replace(prompts, text=padded)):
        times = model.ready(given).text_times
        for row, text in enumerate(texts):
            found = times[row, : len(text)]
            assert found.tolist() == pytest.approx(ready(len(codes[row]), text.tolist(), own[row], model))
            assert bool((found.diff() >= 0).all()) and found[0] >= 0
            if len(codes[row]):
                assert bool((found[: own[row]] <= len(codes[row])).all())
                assert bool((found[own[row] :] >= len(codes[row])).all())
    ready_again = model.ready(model.ready(prompts)).text_times
    assert torch.equal(ready_again, model.ready(prompts).text_times)


def test_a_row_of_prompts_is_all_of_the_row():
    codes, texts, own = ragged(1)
    prompts = replace(timed().ready(make_prompts(codes, texts, own)), begin=4)
    prompts = replace(prompts, prefix_lens=torch.arange(5), gap_lens=torch.arange(5) + 3)
    row = prompts.row(2)
    assert row.begin == 4
    for name, part in vars(prompts).items():
        if name != "begin":
            assert torch.equal(getattr(row, name), part[2:3]), name


def test_models_without_a_clock_of_averages_leave_prompts_as_they_are():
    codes, texts, own = ragged(2)
    prompts = make_prompts(codes, texts, own)
    assert make_model("valle").ready(prompts) is prompts and not make_model("valle").has_clock
    notes = make_model("notes-on-time")
    assert notes.ready(prompts) is prompts and notes.has_clock
    audio = make_prompts(codes)
    assert make_audio_lm().ready(audio) is audio and timed().ready(audio) is audio


def test_a_packed_model_has_the_same_times():
    codes, texts, own = ragged(3)
    prompts, model = make_prompts(codes, texts, own), timed()
    expected = model.ready(prompts).text_times
    for dtype in ("fp32", "bf16", "int8"):
        assert torch.equal(packed(model, dtype).ready(prompts).text_times, expected)
    assert "symbol_frames" not in model.state_dict(), "the checkpoint's `text` has them"


# ---------------------------------------------------------------------------------- training: x_times


def times_of(x_lens, seed=0):
    """(B, 7) times as an aligner says: whole frames that go up, some of them twice."""
    draw = torch.Generator().manual_seed(seed)
    steps = torch.randint(0, 4, (len(x_lens), 7), generator=draw)
    return (torch.randint(0, 3, (len(x_lens), 1), generator=draw) + steps.cumsum(1) - steps[:, :1]).float()


@pytest.mark.parametrize("name,size,steps", CASES, ids=IDS)
def test_the_positions_of_a_text_are_its_times(name, size, steps):
    model = timed(pattern=name, group_size=size)
    x, x_lens, y, y_lens = make_batch(model)
    times = times_of(x_lens)
    call = lambda: model.ar_logits(x, x_lens, *model._steps(y, y_lens), times=times)  # noqa: E731
    positions = seen(model.ar_decoder, call)
    assert not positions.equal(seen(model.ar_decoder, ar_call(model, x, x_lens, y, y_lens)))
    for row, s in enumerate(x_lens.tolist()):
        said = int(model._steps(y, y_lens)[1][row])
        expected = torch.cat([times[row, :s] * steps, torch.arange(said)])
        assert positions[row, : s + said].allclose(expected)


@pytest.mark.parametrize("kind", ["valle", "vallf", "bos"])
@pytest.mark.parametrize("mode", [0, 1, 2, 4])
def test_a_training_reads_a_text_at_its_times(kind, mode):
    """Behind a prompt that is not the beginning, so much later; by default all symbols last as usual."""
    model = timed(kind, mode)
    x, x_lens, y, y_lens = make_batch(model)
    (x, x_lens), (y, y_lens) = (
        model.check_text(x, x_lens),
        model.check_codes(y, y_lens, "y"),
    )  # without padding
    times, others = times_of(x_lens), prompts_of(y)
    given = (x, x_lens, y, y_lens, "sum", 0, *others)
    with torch.no_grad():
        found = model(*given, x_times=times).predictions
        assert found["ar"].equal(model.ar_logits(x, x_lens, y[..., 0], y_lens, times=times))
        prompt, prompt_lens, target, target_lens, _ = model._draw_prompts(y, y_lens, *others)
        behind = times + prompt_lens[:, None] if mode in (2, 4) else times
        nar = model.nar_logits(x, x_lens, target, target_lens, Q - 1, prompt, prompt_lens, times=behind)
        assert found["nar"].equal(nar)
        usual, plain = model(*given, x_times=model.clock(x)), model(*given)
        assert usual.loss.equal(plain.loss) and usual.predictions["nar"].equal(plain.predictions["nar"])
        assert not plain.predictions["nar"].allclose(found["nar"], atol=1e-4)
        assert not plain.predictions["ar"].allclose(found["ar"], atol=1e-4)


@pytest.mark.parametrize("mode", [0, 1, 2, 4])
def test_where_a_text_stands_in_training_by_hand(mode):
    model = timed("valle", mode, num_quantizers=2)
    x, x_lens, y, y_lens = make_batch(model)
    y = y[..., :2]
    times, (other, other_lens) = times_of(x_lens), prompts_of(y)
    call = lambda: model(x, x_lens, y, y_lens, "sum", 2, other, other_lens, x_times=times)  # noqa: E731
    positions = seen(model.nar_decoder, call)
    lens = {0: [0, 0, 0], 1: [6, 3, 4], 2: [4, 2, 3], 4: [5, 2, 4]}[mode]
    for row, (s, t, p) in enumerate(zip(x_lens.tolist(), y_lens.tolist(), lens, strict=True)):
        text = times[row, :s] + (p if mode in (2, 4) else 0)
        frames = t if mode == 1 else p + t
        expected = torch.cat([text, torch.arange(frames)])
        assert positions[row, : s + frames].tolist() == expected.tolist()
    positions = seen(model.ar_decoder, lambda: model(x, x_lens, y, y_lens, "sum", 1, x_times=times))
    for row, (s, t) in enumerate(zip(x_lens.tolist(), y_lens.tolist(), strict=True)):
        assert positions[row, : s + t].tolist() == [*times[row, :s].tolist(), *range(t)]


@pytest.mark.parametrize("mode", [0, 1, 2, 4])
def test_notes_are_moved_behind_a_prompt_as_symbols_are(mode):
    model = make_model("notes-on-time", mode, num_quantizers=2)
    x, x_lens, y, y_lens = make_batch(model)
    others = prompts_of(y[..., :2])
    clock = model.clock(x)
    assert clock.allclose(50.0 * ((x[..., 5] - 4).clamp(min=0) + (x[..., 4] - 4).clamp(min=0) / 200))
    for given in (None, clock, times_of(x_lens)):
        expected = clock if given is None else given
        call = lambda: model(x, x_lens, y[..., :2], y_lens, "sum", 2, *others, x_times=given)  # noqa: B023, E731
        positions = seen(model.nar_decoder, call)
        for row, p in enumerate({2: [4, 2, 3], 4: [5, 2, 4]}.get(mode, [0, 0, 0])):
            s = int(x_lens[row])
            assert positions[row, :s].allclose(expected[row, :s] + p)


@pytest.mark.parametrize("mode", [0, 1, 2, 4])
def test_where_it_stands_beside_a_gap(mode):
    """Rows with a gap have no other prompt than themselves, so nothing moves; the row without one is as ever."""
    model = timed("valle", mode, num_quantizers=2)
    x, x_lens, y, y_lens = make_batch(model)
    y = y[..., :2]
    times, (other, other_lens) = times_of(x_lens), prompts_of(y)
    before, behind = torch.tensor([5, 0, 2]), torch.tensor([4, 0, 7])
    given = (x, x_lens, y, y_lens, "sum")
    sides = {"prefix_lens": before, "suffix_lens": behind, "x_times": times}
    positions = seen(model.nar_decoder, lambda: model(*given, 2, other, other_lens, **sides))
    for row in (0, 2):
        s, t, b, e = int(x_lens[row]), int(y_lens[row]), int(before[row]), int(behind[row])
        expected = [*times[row, :s].tolist(), *range(b), *range(t - e, t), *range(b, t - e)]
        assert positions[row, : s + t].tolist() == expected
    moved = {0: 0, 1: 0, 2: 2, 4: 2}[mode]
    frames = range(9 + moved)
    assert positions[1, : 3 + len(frames)].tolist() == [*(times[1, :3] + moved).tolist(), *frames]
    positions = seen(model.ar_decoder, lambda: model(*given, 1, **sides))
    for row, s in enumerate(x_lens.tolist()):
        assert positions[row, :s].equal(times[row, :s])


def test_what_stands_behind_a_rows_text_does_not_matter():
    model = timed("valle", 4)
    x, x_lens, y, y_lens = make_batch(model)
    times = times_of(x_lens)
    changed = times.masked_fill(torch.arange(7) >= x_lens[:, None], 500.0)
    assert not changed.equal(times)
    with torch.no_grad():
        losses = [
            model(x, x_lens, y, y_lens, "none", 0, *prompts_of(y), x_times=found).loss
            for found in (times, changed)
        ]
    assert losses[0].allclose(losses[1], rtol=1e-5)


def test_compute_loss_reads_the_times_of_a_batch():
    model = timed()
    x, x_lens, y, y_lens = make_batch(model)
    batch = {"x": x, "x_lens": x_lens, "y": y, "y_lens": y_lens}
    with torch.no_grad():
        plain, found = (
            model.compute_loss(batch, 0),
            model.compute_loss(batch | {"x_times": times_of(x_lens)}, 0),
        )
        expected = model(x, x_lens, y, y_lens, "sum", 0, x_times=times_of(x_lens))
    assert found.loss.equal(expected.loss) and not found.loss.allclose(plain.loss)


# ---------------------------------------------------------------------------------- generation

OWN = torch.tensor([2, 1, 2])


@pytest.mark.parametrize("kind", ["valle", "vallf"])
@pytest.mark.parametrize("mode", [0, 1, 2, 4])
def test_generation_is_what_the_whole_sequence_says(kind, mode):
    """Frame by frame from a cache, in a batch of prompts of different length: as all at once, row by row."""
    model = timed(kind, mode)
    x, x_lens, y, _ = make_batch(model)
    prompt, prompt_lens = prompts_of(y)
    options = {"temperature": 0, "min_new_tokens": 8, "prompt_text_lens": OWN}
    result = model.generate(x, x_lens, prompt, prompt_lens, 8, **options)
    for row, (s, p, own) in enumerate(zip(x_lens.tolist(), prompt_lens.tolist(), OWN.tolist(), strict=True)):
        one, lens, target = slice(row, row + 1), x_lens[row : row + 1], torch.tensor([8])
        text, known, codes = x[one, :s], prompt[one, :p], result.codes[row][None]
        times = torch.tensor([ready(p, text[0].tolist(), own, model)])
        logits = model.ar_logits(text, lens, codes[..., 0], times=times)
        assert torch.equal(codes[0, p:, 0], logits[0, p : p + 8, :V].argmax(-1))
        plain = model.ar_logits(text, lens, codes[..., 0])
        assert not plain.allclose(logits, atol=1e-3)
        kept = own if mode in (2, 4) else 0
        read = (text[:, kept:], lens - kept)
        for quantizer in range(1, Q):
            if mode == 0:
                logits = model.nar_logits(*read, codes, torch.tensor([p + 8]), quantizer, times=times)[:, p:]
            else:
                logits = model.nar_logits(
                    *read, codes[:, p:], target, quantizer, known, torch.tensor([p]), times=times[:, kept:]
                )
            assert torch.equal(codes[0, p:, quantizer], logits[0, :8].argmax(-1))


@pytest.mark.parametrize("mode", [0, 1, 2, 4])
@pytest.mark.parametrize("kind", ["clock", "vallf-clock", "notes-on-time"])
def test_a_stream_is_what_the_same_chunks_give_at_once(codec, kind, mode):  # noqa: F811
    model = make_model(kind, mode, codebook_size=TINY_CODEBOOK)
    x, _, y, _ = make_batch(model)
    options = {
        "seed": 2, "min_new_tokens": 22, "chunks": Chunks(4, 1, 6), "prompt_text_lens": torch.tensor([2]),
    }  # fmt: skip
    stream = model.stream(x[0], codec, y[:1, :5], 22, **options)
    for _ in stream:
        pass
    whole = model.generate(x[:1], None, y[:1, :5], None, 22, **options)
    assert torch.equal(stream.generation.codes[0], whole.codes[0])


@pytest.fixture
def placed(monkeypatch):
    """Of each call of the NAR decoder, the positions of text, of the codes before the target, and of the target."""
    calls, real = [], VALLE._run_nar

    def run(self, parts, y, y_lens, positions, quantizer, memory=None):
        text = (memory or parts[0]).positions[0]
        prompt = [n for part in parts[1:] for n in part.positions[0, : int(part.lens[0])].tolist()]
        calls.append((text.tolist(), prompt, positions[0, : int(y_lens[0])].tolist()))
        return real(self, parts, y, y_lens, positions, quantizer, memory)

    monkeypatch.setattr(VALLE, "_run_nar", run)
    return calls


@pytest.mark.parametrize("mode", [0, 1, 2, 4])
@pytest.mark.parametrize("kind", ["clock", "vallf-clock", "notes-on-time"])
def test_later_pieces_keep_their_place_in_the_recording(codec, placed, kind, mode):  # noqa: F811
    """The NAR decoder sees 6 frames before each piece of 4: text and audio still stand where they did at once."""
    model = make_model(kind, mode, codebook_size=TINY_CODEBOOK, num_quantizers=2)
    x, _, y, _ = make_batch(model)
    y = y[..., :2]
    options = {"seed": 2, "min_new_tokens": 22, "prompt_text_lens": torch.tensor([2])}
    model.generate(x[:1], None, y[:1, :5], None, 22, **options)
    ((text, *_),) = placed
    placed.clear()
    model.generate(x[:1], None, y[:1, :5], None, 22, chunks=Chunks(4, 1, 6), **options)
    # Pieces end at frames 3, 7, 11 … of the continuation; a lookahead of 1 follows, but for the last.
    starts, ends = [0, 3, 7, 11, 15, 19], [4, 8, 12, 16, 20, 22]
    assert len(placed) == len(starts)
    expected = []
    for start, end in zip(starts, ends, strict=True):
        before = list(range(max(0, 5 + start - 6), 5 + start))
        piece = list(range(5 + start, 5 + end))
        expected.append(([], before + piece) if mode == 0 else (before, piece))
    assert [tuple(call[1:]) for call in placed] == expected
    assert all(call[0] == text for call in placed)
    assert len(text) > 3 and max(text) > 5
    chunked = list(placed)
    placed.clear()
    wav = list(model.stream(x[0], codec, y[:1, :5], 22, chunks=Chunks(4, 1, 6), **options))
    assert wav and placed == chunked


def test_without_a_clock_pieces_begin_anew(placed):
    """As in training: where the text does not say when, positions count what is read."""
    model = make_model("valle", 1, num_quantizers=2)
    x, _, y, _ = make_batch(model)
    model.generate(x[:1], None, y[:1, :5, :2], None, 12, seed=2, min_new_tokens=12, chunks=Chunks(4, 1, 6))
    assert [call[2][0] for call in placed] == [7 + 5, 7 + 6, 7 + 6]


@pytest.mark.parametrize("kind", ["clock", "vallf-clock"])
def test_a_gap_is_filled_at_the_times_of_the_whole(placed, kind):
    model = make_model(kind, 1, num_quantizers=2, symbol_frames=FRAMES)
    x, y = torch.tensor([[3, 6, 4]]), torch.zeros(1, 20, 2, dtype=torch.long)
    model.infill(x, y, 6, 10, new_frames=10, seed=0)
    ((text, before, target),) = placed
    assert text == pytest.approx([0, 6, 18]), "26 frames for 13"
    assert before == [*range(6), *range(16, 26)] and target == list(range(6, 16))
