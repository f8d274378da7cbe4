"""Generation as users call it: in batches, in pieces, guided, in a window, into a gap."""

import threading

import pytest
import torch
from synthetic import TINY_CODEBOOK, save_tiny_codec
from test_audio_lm import VARIANTS, Q, V, make_batch, make_model

from valle.codecs import load_codec
from valle.codecs.streaming import StreamDecoder
from valle.generation.chunks import Chunks
from valle.generation.decoding import GuidedSession, decode
from valle.generation.sampling import Sampling, make_streams
from valle.models import generating
from valle.models.generating import ArSession, Generator, Prompts, legs, make_prompts, open_session
from valle.modules.cache import GraphCache
from valle.modules.packing import FORMATS, packed
from valle.modules.transformer import Transformer
from valle.utils.errors import UserError

CHUNKS = Chunks(frames=8, lookahead=2, context=20)


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return load_codec(save_tiny_codec(tmp_path_factory.mktemp("codec")))


@pytest.fixture(scope="module")
def model():
    return make_model(codebook_size=TINY_CODEBOOK)


@pytest.fixture
def prompt():
    return torch.randint(TINY_CODEBOOK, (11, Q), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def ends(monkeypatch):
    """`ends(5)`: the next session to be opened draws the end as its new frame 5 (from 0); else nobody draws it."""

    class Ending(ArSession):
        opened = 0
        frame = None

        def __init__(self, model, *args, **kwargs):
            super().__init__(model, *args, **kwargs)
            self.number, self.done, self.eos = Ending.opened, 0, model.eos
            Ending.opened += 1
            self.force()

        def step(self, tokens):
            super().step(tokens)
            self.done += 1
            self.force()

        def force(self):
            self.logits = self.logits.clone()
            now = self.number == 0 and self.done == Ending.frame
            self.logits[:, self.eos] = 1000.0 if now else -1000.0

    monkeypatch.setattr(generating, "ArSession", Ending)

    def set_end(frame):
        Ending.frame, Ending.opened = frame, 0

    return set_end


def same(found, expected):
    """Two results hold the same, to the bit."""
    assert found.prompt_lens == expected.prompt_lens
    assert found.finish_reasons == expected.finish_reasons
    assert len(found.codes) == len(expected.codes)
    for name in ("codes", "log_probs"):
        for one, other in zip(getattr(found, name), getattr(expected, name), strict=True):
            assert torch.equal(one, other), name
    return True


# ---------------------------------------------------------------- a row and its neighbours

PROMPTS = (7, 4, 5, 31, 7)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_rows_that_end_at_different_frames_are_as_alone(changes):
    model = make_model(**changes)
    x, x_lens, _, _ = make_batch(prompt_lens=PROMPTS, target_lens=(1,) * 5)
    given, frames = x_lens.clone(), []
    for seed in range(4):
        together = model.generate(x, x_lens, 40, seed=seed)
        assert torch.equal(x_lens, given), "the caller's lengths stay"
        for row, s in enumerate(PROMPTS):
            alone = model.generate(x[row, :s], None, 40, seed=seed)
            assert torch.equal(together.codes[row], alone.codes[0])
            assert together.finish_reasons[row] == alone.finish_reasons[0]
            torch.testing.assert_close(together.log_probs[row], alone.log_probs[0], atol=1e-4, rtol=1e-4)
            frames.append(len(alone.codes[0]) - s)
    assert len(set(frames)) >= 3, "the test needs rows that end at different frames"


def errors_of_log_probs(model, result, x, prompt_lens):
    """What a result says of its codes' log-probabilities, less what one forward pass of the model gives them."""
    errors = []
    for row, s in enumerate(prompt_lens):
        new = result.codes[row][s:]
        assert result.codes[row].dtype == torch.int64 and torch.equal(result.codes[row][:s], x[row, :s])
        with torch.no_grad():
            logits = model.ar_logits(x[row : row + 1, :s], torch.tensor([s]), new[None, :, 0])[0, :-1]
        expected = logits.log_softmax(-1).gather(-1, new[:, :1])[:, 0]
        errors.append(result.log_probs[row] - expected)
        assert result.scores[row] == pytest.approx(float(result.log_probs[row].mean()), rel=1e-6)
    return torch.cat(errors)


NEAR = {"fp32": 1e-4, "bf16": 0.25, "int8": 0.4}  # root mean square of these errors, nats


@pytest.mark.parametrize("dtype", FORMATS)
def test_codes_have_the_probabilities_that_the_model_gives_them(dtype):
    """Also behind rows that leave: what each row has drawn fits what it has drawn before."""
    model = make_model()
    x, x_lens, _, _ = make_batch(prompt_lens=PROMPTS, target_lens=(1,) * 5)
    result = model.generate(x, x_lens, 40, seed=1, dtype=dtype)
    assert set(result.finish_reasons) == {"eos", "length"}
    errors = errors_of_log_probs(model, result, x, PROMPTS)
    assert float(errors.square().mean().sqrt()) < NEAR[dtype]


@pytest.mark.parametrize("dtype", FORMATS)
def test_results_are_plain_tensors(dtype, model, prompt, codec):
    results = [
        model.generate(prompt, None, 4, dtype=dtype),
        model.generate(prompt, None, 9, dtype=dtype, chunks=CHUNKS, num_samples=2),
        model.infill(prompt, 3, 6, dtype=dtype),
    ]
    stream = model.stream(prompt, codec, 12, dtype=dtype, chunks=CHUNKS)
    sounds = list(stream)
    for tensor in [*sounds, *(t for r in [*results, stream.generation] for t in [*r.codes, *r.log_probs])]:
        assert not tensor.is_inference() and not tensor.requires_grad


@pytest.mark.parametrize("dtype", FORMATS)
def test_threads_change_nothing(dtype):
    """Nothing at all: codes and log-probabilities are equal to the bit, in a batch and alone."""
    model = make_model(d_model=64, nhead=2)
    x, x_lens, _, _ = make_batch(prompt_lens=(40, 70, 9), target_lens=(1,) * 3)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append([
                model.generate(x, x_lens, 40, seed=0, dtype=dtype),
                model.generate(x[1], None, 40, seed=0, dtype=dtype),
            ])  # fmt: skip
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(same(two, one) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", FORMATS)
def test_two_at_once_do_not_disturb_each_other(dtype):
    """As in a server: generations of one model in several threads, each with codes of its own."""
    model = make_model(d_model=128, codebook_size=TINY_CODEBOOK)
    x = torch.randint(TINY_CODEBOOK, (20, Q))

    def generate(seed):
        return model.generate(x, None, 60, seed=seed, min_new_tokens=60, dtype=dtype).codes[0]

    expected, found = [generate(seed) for seed in range(3)], {}
    workers = [
        threading.Thread(target=lambda seed=seed: found.update({seed: generate(seed)})) for seed in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(found[seed], expected[seed]) for seed in range(3))


def test_two_streams_in_turn_do_not_disturb_each_other(model, prompt, codec):
    options = {"seed": 1, "chunks": CHUNKS, "min_new_tokens": 20}
    streams = [model.stream(part, codec, 40, **options) for part in (prompt, prompt[:6])]
    expected = [torch.cat(list(stream), 1) for stream in streams]
    streams = [model.stream(part, codec, 40, **options) for part in (prompt, prompt[:6])]
    pieces, running = ([], []), [iter(stream) for stream in streams]
    while any(running):
        for number, source in enumerate(running):
            if source is not None:
                piece = next(source, None)
                if piece is None:
                    running[number] = None
                else:
                    pieces[number].append(piece)
    assert all(torch.equal(torch.cat(one, 1), other) for one, other in zip(pieces, expected, strict=True))


@pytest.fixture
def fixed_shapes(monkeypatch):
    """Packed copies take the cache that graphs are recorded over, here unrecorded; the caches made so far."""
    caches = []

    def new_cache(decoder, batch, capacity):
        kind = torch.bfloat16 if decoder.packed_dtype == "bf16" else torch.float32
        sizes = (len(decoder.layers), batch, decoder.nhead, capacity, decoder.head_dim)
        caches.append(GraphCache(*sizes, torch.empty(0, dtype=kind)))
        return caches[-1]

    def use():
        monkeypatch.setattr(Transformer, "new_cache", new_cache)
        return caches

    return use


@pytest.mark.parametrize("changes", [{}, {"position": "sine"}, {"prepend_bos": True}], ids=str)
def test_steps_of_fixed_shapes_are_the_same(fixed_shapes, changes):
    """Rows that leave, guidance, a gap, and columns beyond a bucket."""
    model = make_model(**changes)
    x, x_lens, _, _ = make_batch(prompt_lens=(100, 7, 31), target_lens=(1,) * 3)
    calls = [
        lambda: model.generate(x, x_lens, 40, seed=3),
        lambda: model.generate(x, x_lens, 40, seed=5),
        lambda: model.generate(x, x_lens, 10, seed=1, guidance_scale=2.0),
        lambda: model.infill(x, 20, 60, seed=1),
    ]
    expected = [call() for call in calls]
    caches = fixed_shapes()
    for call, before in zip(calls, expected, strict=True):
        result = call()
        assert result.finish_reasons == before.finish_reasons
        for row in range(3):
            assert torch.equal(result.codes[row], before.codes[row])
            torch.testing.assert_close(result.log_probs[row], before.log_probs[row], atol=1e-4, rtol=1e-4)
    assert len(caches) == 4 and max(cache.bucket for cache in caches) == 256
    assert min(cache.rows for cache in caches) < 3, "the test needs a row that leaves"


@pytest.mark.parametrize("dtype", FORMATS)
def test_fixed_shapes_in_every_format(fixed_shapes, dtype):
    model, prompt_lens = make_model(), (100, 7, 31)
    x, x_lens, _, _ = make_batch(prompt_lens=prompt_lens, target_lens=(1,) * 3)
    caches = fixed_shapes()
    result = model.generate(x, x_lens, 40, seed=3, min_new_tokens=40, dtype=dtype)
    assert caches[0].bucket == 256
    errors = errors_of_log_probs(model, result, x, prompt_lens)
    assert float(errors.square().mean().sqrt()) < NEAR[dtype]


# ---------------------------------------------------------------- lengths, timings


def test_min_and_max_and_progress(model, prompt):
    counted = []
    x = torch.stack([prompt, prompt.flip(0)])
    result = model.generate(x, None, 30, seed=2, min_new_tokens=20, on_frame=counted.append)
    lens = [len(codes) - 11 for codes in result.codes]
    assert all(20 <= n <= 30 for n in lens)
    assert all((n == 30) == (why == "length") for n, why in zip(lens, result.finish_reasons, strict=True))
    assert counted == list(range(1, len(counted) + 1)) and len(counted) in (max(lens), max(lens) + 1)
    assert set(result.timings) == {"pack", "prefill", "ar", "nar"}
    assert all(seconds >= 0 for seconds in result.timings.values())
    assert len(result.frame_seconds) == len(counted) - 1
    assert 0 < sum(result.frame_seconds) <= result.timings["ar"]


def test_a_row_may_end_with_nothing(model, prompt, ends, codec):
    ends(0)
    result = model.generate(prompt, None, 30)
    assert torch.equal(result.codes[0], prompt) and result.finish_reasons == ["eos"]
    assert len(result.log_probs[0]) == 0 and result.scores == [-float("inf")], "it is never the best sample"
    ends(0)
    stream = model.stream(prompt, codec, 30, chunks=CHUNKS)
    assert list(stream) == [] and same(stream.generation, result)


def test_the_nar_decoder_may_see_the_whole_or_pieces(model, prompt):
    """Pieces equal the whole where they see all of it, and differ where not."""
    whole = model.generate(prompt, None, 30, seed=0, min_new_tokens=30)
    assert same(model.generate(prompt, None, 30, seed=0, min_new_tokens=30, chunks=Chunks(40, 2, 20)), whole)
    pieces = model.generate(prompt, None, 30, seed=0, min_new_tokens=30, chunks=CHUNKS)
    assert torch.equal(pieces.codes[0][:, 0], whole.codes[0][:, 0])
    assert not torch.equal(pieces.codes[0], whole.codes[0])


def test_a_piece_is_refined_from_its_context_and_lookahead(model, prompt):
    """Chunks by hand: 6 frames, then 8, then 8, then what is left, each with 2 to come and 20 before it."""
    codes = model.generate(prompt, None, 30, seed=0, min_new_tokens=30, chunks=CHUNKS).codes[0]
    first, done = codes[:, 0], 11
    for end in (11 + 6, 11 + 14, 11 + 22, 11 + 30):
        context, target = codes[max(0, done - 20) : done], first[done : min(end + 2, 41), None]
        for quantizer in range(1, Q):
            with torch.no_grad():
                logits = model.nar_logits(
                    context[None], torch.tensor([len(context)]), target[None], torch.tensor([len(target)]), quantizer
                )[0]  # fmt: skip
            target = torch.cat([target, logits.argmax(-1, keepdim=True)], 1)
        assert torch.equal(codes[done:end], target[: end - done])
        done = end


# ---------------------------------------------------------------- streams


def streamed(model, prompt, codec, frames=30, **options):
    """The pieces and the result; checks what holds for every stream."""
    options.setdefault("chunks", CHUNKS)
    stream = model.stream(prompt, codec, frames, **options)
    pieces = list(stream)
    expected = model.generate(prompt, None, frames, **options)
    assert same(stream.generation, expected)
    new = expected.codes[0][len(prompt) :]
    joined = torch.cat([torch.zeros(1, 0), *pieces], 1)
    assert joined.shape == (1, len(new) * codec.hop_length)
    assert all(piece.shape[1] > 0 for piece in pieces)
    return pieces, new


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("frames", [1, 5, 7, 8, 9, 10, 16, 30])
def test_a_stream_is_the_same_codes_and_the_same_sound(model, prompt, codec, dtype, frames):
    pieces, new = streamed(model, prompt, codec, frames, seed=4, min_new_tokens=frames, dtype=dtype)
    decoder = StreamDecoder(codec)
    decoder.prime(prompt)
    sound, start = [], 0
    for end in CHUNKS.ends(frames, ended_by_itself=False):
        sound.append(decoder.push(new[start:end]))
        start = end
    sound.append(decoder.flush())
    assert torch.equal(torch.cat(pieces, 1), torch.cat(sound, 1))


@pytest.mark.parametrize("lookahead", [0, 2])
@pytest.mark.parametrize("end", [1, 5, 6, 7, 8, 9, 13, 14, 15, 16, 17, 23, 24, 29, 30])
def test_a_stream_that_ends_before_at_and_behind_a_piece(model, prompt, codec, ends, end, lookahead):
    """Pieces of 8 frames: where the model draws the end must not change what the last frames are made of."""
    options = dict(seed=4, chunks=Chunks(8, lookahead, 20))
    ends(end)
    stream = model.stream(prompt, codec, 30, **options)
    pieces = list(stream)
    ends(end)
    expected = model.generate(prompt, None, 30, **options)
    assert expected.finish_reasons == ["eos" if end < 30 else "length"]
    assert len(expected.codes[0]) == 11 + end
    assert sum(piece.shape[1] for piece in pieces) == end * codec.hop_length
    assert same(stream.generation, expected)


def test_sound_comes_before_the_end_is_known(model, prompt, codec):
    """The first piece after one chunk of frames, and then one a chunk."""
    chunks = Chunks(20, 2, 20)
    done, when = [], []
    for _ in model.stream(prompt, codec, 70, seed=0, min_new_tokens=70, chunks=chunks, on_frame=done.append):
        when.append(done[-1])
    assert when == [20, 40, 60, 70, 70]
    assert done == list(range(1, 71))


def test_a_stream_left_early_costs_no_more(model, prompt, codec):
    done = []
    for _ in model.stream(
        prompt, codec, 500, seed=0, min_new_tokens=500, chunks=CHUNKS, on_frame=done.append
    ):
        break
    assert len(done) <= 16


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_variant_streams(changes, codec):
    model = make_model(**{"codebook_size": TINY_CODEBOOK, **changes})
    prompt = torch.randint(TINY_CODEBOOK, (6, Q), generator=torch.Generator().manual_seed(1))
    streamed(model, prompt, codec, 20, seed=0)


def test_a_guided_stream(model, prompt, codec):
    streamed(model, prompt, codec, 20, seed=0, guidance_scale=2.0)


# ---------------------------------------------------------------- longer than the model was trained for


@pytest.mark.parametrize(
    ("frames", "window", "expected"),
    [
        (30, None, [(None, 30)]),
        (20, 40, [(20, 20)]),
        (24, 40, [(16, 24)]),
        (25, 40, [(16, 24), (39, 1)]),
        (50, 40, [(16, 24), (16, 24), (38, 2)]),
        (5, 2, [(1, 1)] * 5),
        (8, 5, [(2, 3), (2, 3), (3, 2)]),
    ],
)
def test_how_a_long_continuation_is_divided(frames, window, expected):
    found = list(legs(frames, window))
    assert found == expected
    assert sum(new for _, new in found) == frames
    assert window is None or all(room + new <= window for room, new in found)


@pytest.mark.parametrize(
    "changes", [{}, {"position": "sine", "activation": "relu"}, {"prepend_bos": True}], ids=str
)
def test_in_a_window_every_leg_continues_the_last_part(changes):
    model = make_model(**changes)
    x = torch.randint(V, (20, Q), generator=torch.Generator().manual_seed(0))
    counted = []
    result = model.generate(x, None, 70, temperature=0, min_new_tokens=70, window=40, on_frame=counted.append)
    codes = x
    for keep, new in [(16, 24), (16, 24), (18, 22)]:
        leg = model.generate(codes[-keep:], None, new, temperature=0, min_new_tokens=new).codes[0]
        codes = torch.cat([codes, leg[keep:]])
    assert torch.equal(result.codes[0], codes) and result.prompt_lens == [20]
    assert result.finish_reasons == ["length"] and len(result.log_probs[0]) == 70
    assert counted == list(range(1, 71)) and len(result.frame_seconds) == 70 - 3
    inside = model.generate(x, None, 20, seed=0, window=40)
    assert same(inside, model.generate(x, None, 20, seed=0)), "what fits the window is not divided"


def test_no_session_is_longer_than_the_window(model, prompt, monkeypatch):
    seen = []
    original = ArSession.__init__

    def keep(self, model, prompts, frames):
        seen.append(int(prompts.lens.max()) + frames)
        original(self, model, prompts, frames)

    monkeypatch.setattr(ArSession, "__init__", keep)
    model.generate(prompt, None, 60, seed=0, min_new_tokens=60, window=25)
    assert len(seen) == 4 and max(seen) <= 25


@pytest.mark.parametrize("end", [None, 3, 8, 13, 14])
def test_a_stream_in_a_window(model, prompt, codec, ends, end):
    """With the end drawn in the first leg, of 15 frames, and without."""
    options = dict(seed=4, window=25, chunks=CHUNKS)
    ends(end)
    stream = model.stream(prompt, codec, 50, **options)
    pieces = list(stream)
    ends(end)
    expected = model.generate(prompt, None, 50, **options)
    frames = 50 if end is None else end
    assert len(expected.codes[0]) == 11 + frames
    assert same(stream.generation, expected)
    assert sum(piece.shape[1] for piece in pieces) == frames * codec.hop_length


def test_in_a_window_rows_are_as_alone_too():
    """Prompts of which some fit the window with what is asked and some do not; rows end in the first leg and later."""
    model = make_model(seed=3, codebook_size=TINY_CODEBOOK)
    with torch.no_grad():
        model.ar_predict_layer.weight[model.eos] *= 1.5
    torch.manual_seed(3)
    prompt_lens, x = (6, 35, 20, 13), torch.randint(TINY_CODEBOOK, (4, 35, Q))
    lens = set()
    for seed in range(3):
        together = model.generate(x, torch.tensor(prompt_lens), 30, seed=seed, window=40)
        for row, s in enumerate(prompt_lens):
            alone = model.generate(x[row, :s], None, 30, seed=seed, window=40)
            assert torch.equal(together.codes[row], alone.codes[0]), f"row {row}"
            assert together.finish_reasons[row] == alone.finish_reasons[0]
            lens.add(len(alone.codes[0]) - s)
    assert len(lens) >= 4 and 30 in lens, "the test needs rows that end at different frames"


@pytest.mark.parametrize("least", [10, 20])
def test_min_new_tokens_count_over_all_legs(prompt, codec, least):
    """Legs of 14 and 15 frames, of a model that ends early: just behind the least, not a whole leg behind it."""
    model = make_model(seed=5, codebook_size=TINY_CODEBOOK)
    lens = []
    for seed in range(6):
        options = dict(seed=seed, min_new_tokens=least, window=25, chunks=CHUNKS)
        result = model.generate(prompt, None, 60, **options)
        stream = model.stream(prompt, codec, 60, **options)
        assert sum(piece.shape[1] for piece in stream) == (len(result.codes[0]) - 11) * codec.hop_length
        assert torch.equal(stream.generation.codes[0][:, 0], result.codes[0][:, 0])
        lens.append(len(result.codes[0]) - 11)
    assert least <= min(lens) <= least + 7


# ---------------------------------------------------------------- several samples


def test_samples_are_ranked_and_the_first_stream_is_the_single_one(model):
    torch.manual_seed(1)
    x, x_lens = torch.randint(TINY_CODEBOOK, (2, 9, Q)), torch.tensor([9, 5])
    single = model.generate(x, x_lens, 20, seed=5)
    several = model.generate(x, x_lens, 20, seed=5, num_samples=4)
    assert several.prompt_lens == [9] * 4 + [5] * 4 and len(several.codes) == 8
    scores = several.scores
    for row in range(2):
        group = range(4 * row, 4 * row + 4)
        assert [scores[i] for i in group] == sorted((scores[i] for i in group), reverse=True)
        assert sum(torch.equal(several.codes[i], single.codes[row]) for i in group) == 1
        assert len({tuple(several.codes[i][:, 0].tolist()) for i in group}) == 4
        for i in group:  # everything was put in order together
            s = several.prompt_lens[i]
            assert torch.equal(several.codes[i][:s], x[row, :s])
            assert len(several.log_probs[i]) == len(several.codes[i]) - s
            assert (several.finish_reasons[i] == "length") == (len(several.log_probs[i]) == 20)
    again = model.generate(x[1, :5], None, 20, seed=5, num_samples=2)
    assert all(any(torch.equal(row, other) for other in several.codes[4:]) for row in again.codes)


def test_samples_of_a_gap(model, prompt):
    single = model.infill(prompt, 4, 9, seed=1)
    several = model.infill(prompt, 4, 9, seed=1, num_samples=3)
    assert several.scores == sorted(several.scores, reverse=True)
    assert any(torch.equal(codes, single.codes[0]) for codes in several.codes)
    assert len({tuple(codes[:, 0].tolist()) for codes in several.codes}) == 3


# ---------------------------------------------------------------- guidance


def test_guidance_is_what_two_sessions_give_by_hand(model):
    """Ragged prompts and rows that end at different frames, against two sessions of their own for each row."""
    torch.manual_seed(2)
    x, x_lens, scale = torch.randint(TINY_CODEBOOK, (3, 12, Q)), torch.tensor([12, 5, 8]), 2.5
    result = model.generate(x, x_lens, 40, seed=3, guidance_scale=scale, top_k=8)
    twin, lens = packed(model, "fp32"), []
    for row, s in enumerate(x_lens.tolist()):
        both = [ArSession(twin, make_prompts([part]), 40) for part in (x[row, :s], x[row, s - 1 : s])]

        class Guided:
            sessions = both

            @property
            def logits(self):
                given, without = (session.logits.log_softmax(-1) for session in self.sessions)
                return without + scale * (given - without)

            def step(self, tokens):
                for session in self.sessions:
                    session.step(tokens)

        expected = decode(Guided(), model.eos, Sampling(top_k=8), make_streams(1, 3), 40)
        n = int(expected.lens)
        assert torch.equal(result.codes[row][s:, 0], expected.tokens[0, :n])
        torch.testing.assert_close(result.log_probs[row], expected.log_probs[0, :n], atol=1e-4, rtol=1e-4)
        assert result.finish_reasons[row] == expected.finish_reasons[0]
        lens.append(n)
    assert len(set(lens)) > 1


def test_the_scale_of_guidance(model, prompt):
    plain = model.generate(prompt, None, 20, seed=0)
    assert same(model.generate(prompt, None, 20, seed=0, guidance_scale=1.0), plain)
    for scale in (0.0, 0.5, 3.0):
        guided = model.generate(prompt, None, 20, seed=0, guidance_scale=scale)
        assert not torch.equal(guided.codes[0], plain.codes[0])
    last = [
        model.generate(part, None, 20, temperature=0, guidance_scale=0.0) for part in (prompt, prompt[-1:])
    ]
    assert torch.equal(last[0].codes[0][11:, 0], last[1].codes[0][1:, 0]), (
        "at 0, the prompt is its last frame"
    )


# ---------------------------------------------------------------- gaps


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a_gap_is_filled_and_nothing_else(changes, dtype):
    model = make_model(**changes)
    x = torch.randint(V, (3, 40, Q), generator=torch.Generator().manual_seed(0))
    gaps = ((10, 22), (0, 5), (39, 40), (1, 39)) if dtype == "fp32" else ((10, 16),)
    for start, end in gaps:
        result = model.infill(x, start, end, seed=2, dtype=dtype)
        assert result.prompt_lens == [40 - (end - start)] * 3 and result.finish_reasons == ["length"] * 3
        for row in range(3):
            codes = result.codes[row]
            assert codes.shape == (40, Q) and 0 <= int(codes.min()) <= int(codes.max()) < V
            assert torch.equal(codes[:start], x[row, :start]) and torch.equal(codes[end:], x[row, end:])
            assert len(result.log_probs[row]) == end - start
        assert same(model.infill(x, start, end, seed=2, dtype=dtype), result)
    if dtype == "fp32":
        result = model.infill(x, 10, 22, seed=2)
        for row in range(3):
            assert torch.equal(model.infill(x[row], 10, 22, seed=2).codes[0], result.codes[row])


def test_a_gap_follows_from_both_sides_and_not_from_what_was_in_it(model):
    x = torch.randint(TINY_CODEBOOK, (30, Q), generator=torch.Generator().manual_seed(0))
    filled = model.infill(x, 12, 20, seed=2).codes[0]
    inside, before, behind = x.clone(), x.clone(), x.clone()
    inside[12:20] = 0
    before[5], behind[25] = (before[5] + 1) % TINY_CODEBOOK, (behind[25] + 1) % TINY_CODEBOOK
    assert torch.equal(model.infill(inside, 12, 20, seed=2).codes[0], filled)
    for other in (before, behind):
        assert not torch.equal(model.infill(other, 12, 20, seed=2).codes[0][12:20], filled[12:20])


def test_a_gap_is_filled_by_what_the_model_thinks_likeliest_there(model):
    """Greedy, frame by frame with the whole forward pass; then the other quantizers."""
    x = torch.randint(TINY_CODEBOOK, (1, 20, Q), generator=torch.Generator().manual_seed(0))
    known, lens = torch.cat([x[:, :8], x[:, 13:]], 1), torch.tensor([15])
    infill = dict(prefix_lens=torch.tensor([8]), gap_lens=torch.tensor([5]))
    y = torch.zeros(1, 0, dtype=torch.long)
    with torch.no_grad():
        for _ in range(5):
            logits = model.ar_logits(known, lens, y, **infill)[:, -1, : model.eos]
            y = torch.cat([y, logits.argmax(-1, keepdim=True)], 1)
        target = y[..., None]
        for quantizer in range(1, Q):
            logits = model.nar_logits(
                known, lens, target, torch.tensor([5]), quantizer, infill["prefix_lens"]
            )
            target = torch.cat([target, logits.argmax(-1, keepdim=True)], -1)
    assert torch.equal(model.infill(x, 8, 13, temperature=0).codes[0][8:13], target[0])


def test_what_stands_in_the_gap_may_be_no_code_at_all(model):
    x = torch.randint(TINY_CODEBOOK, (30, Q), generator=torch.Generator().manual_seed(0))
    marked = x.clone()
    marked[12:20] = -1
    assert same(model.infill(marked, 12, 20, seed=2), model.infill(x, 12, 20, seed=2))


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_new_tokens=0), "max_new_tokens is 0, expected 1 or more"),
        (dict(max_new_tokens=0, window=5), "max_new_tokens is 0, expected 1 or more"),
        (dict(max_new_tokens=-3, window=5), "max_new_tokens is -3, expected 1 or more"),
        (dict(min_new_tokens=-1), "min_new_tokens is -1, expected 0 or more"),
        (dict(dtype="fp64"), "dtype is 'fp64', expected one of fp32, bf16, int8"),
        (dict(window=1), "window is 1 frames, expected 2 or more"),
        (dict(window=0), "window is 0 frames, expected 2 or more"),
        (dict(guidance_scale=-1.0), "guidance scale is -1.0"),
        (dict(guidance_scale=float("nan")), "guidance scale is nan"),
        (dict(top_p=0.0), "top_p is 0.0"),
        (dict(temperature=-1.0), "temperature is -1.0"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_named_by_both(model, prompt, codec, options, message):
    with pytest.raises(UserError, match=message):
        model.generate(prompt, **{"max_new_tokens": 9, **options})
    with pytest.raises(UserError, match=message):
        list(model.stream(prompt, codec, **{"max_new_tokens": 9, **options}))


def test_other_errors_are_named(model, prompt, codec):
    with pytest.raises(UserError, match="num_samples is 0, expected 1 or more"):
        model.generate(prompt, num_samples=0)
    with pytest.raises(UserError, match="num_samples is 0, expected 1 or more"):
        model.infill(prompt, 1, 2, num_samples=0)
    with pytest.raises(UserError, match="stop_repetition"):
        model.stream(prompt, codec, sampling=Sampling(stop_repetition=20))
    with pytest.raises(UserError, match="2 prompts, expected 1"):
        model.stream(torch.stack([prompt, prompt]), codec)
    with pytest.raises(UserError, match=f"expected 0 to {TINY_CODEBOOK - 1}"):
        model.stream(prompt + TINY_CODEBOOK, codec)
    with pytest.raises(UserError, match="chunks of 3 frames with 3 frames of lookahead"):
        Chunks(3, 3, 5)
    for start, end in ((-1, 3), (3, 3), (5, 3), (3, 12), (0, 11), (11, 12)):
        with pytest.raises(UserError, match=f"gap {start} to {end} in 11 frames"):
            model.infill(prompt, start, end)
    with pytest.raises(UserError, match="guidance"):
        lens = torch.tensor([5])
        prompts = Prompts(prompt[None, :5], lens, prefix_lens=lens, gap_lens=lens)
        open_session(packed(model, "fp32"), prompts, 3, 2.0)


def test_guidance_needs_pairs(model, prompt):
    generator = Generator(model, "fp32", Sampling())
    with pytest.raises(ValueError, match="1 rows, expected two"):
        GuidedSession(ArSession(generator.model, make_prompts([prompt]), 3), 2.0)
