"""The loop, with sessions that follow a script or a table in the place of a model."""

import math

import pytest
import torch

from valle.generation.decoding import FrameLoop, GuidedSession, decode
from valle.generation.sampling import Sampling, make_streams
from valle.utils.errors import UserError

GREEDY = Sampling(temperature=0)


class Rows:
    """What every fake session does: rows of state, and the last takes the place of who leaves."""

    def __init__(self, rows, logits_of):
        self.rows = list(rows)
        self.logits_of = logits_of
        self.steps = []  # how many rows each step had
        self.update()

    def update(self):
        self.logits = torch.stack([self.logits_of(row) for row in self.rows])

    def step(self, tokens):
        assert tokens.shape == (len(self.rows),) and tokens.dtype == torch.long
        self.steps.append(len(self.rows))
        self.rows = [[*row, token] for row, token in zip(self.rows, tokens.tolist(), strict=True)]
        self.update()

    def drop(self, row):
        last, last_logits = self.rows.pop(), self.logits[-1].clone()
        self.logits = self.logits[:-1].clone()
        if row < len(self.rows):
            self.rows[row], self.logits[row] = last, last_logits


def scripted(script, vocabulary=6):
    """Row i draws script[i], frame by frame, its last code for ever. A row's state: its number, then its codes."""

    def logits_of(row):
        number, done = row[0], len(row) - 1
        codes = script[number]
        assert row[1:] == [codes[min(frame, len(codes) - 1)] for frame in range(done)], (
            "a row got foreign codes"
        )
        out = torch.full((vocabulary,), -50.0)
        out[codes[min(done, len(codes) - 1)]] = 50.0
        return out

    return Rows([[number] for number in range(len(script))], logits_of)


EOS = 20


def chaotic(numbers, steepness=2.0, eos_bias=1.0):
    """Logits that hang on all of the row's codes: one foreign code changes everything after it."""

    def logits_of(row):
        generator = torch.Generator().manual_seed(hash(tuple(row)) % 2**31)
        out = steepness * torch.randn(EOS + 1, generator=generator)
        out[EOS] += eos_bias
        return out

    return Rows([[number] for number in numbers], logits_of)


SAMPLINGS = [
    GREEDY,
    Sampling(),
    Sampling(0.8, 0, 0.9, min_p=0.02),
    Sampling(repetition_penalty=1.3, repetition_window=6),
    Sampling(top_k=4, repetition_aware=True, aware_window=5, repetition_penalty=1.1),
    Sampling(top_k=2, temperature=0.3, stop_repetition=2),
]


def test_rows_end_each_on_its_own():
    end = 5
    session = scripted([[1, 2, end], [3, 3, 3, 3], [end]])
    result = decode(session, end, GREEDY, make_streams(3, 0), max_new_tokens=4)
    assert result.lens.tolist() == [2, 4, 0]
    assert result.finish_reasons == ["eos", "length", "eos"]
    assert result.tokens.tolist() == [[1, 2, 0, 0], [3, 3, 3, 3], [0, 0, 0, 0]]
    assert result.log_probs[0, 2:].eq(0).all() and result.log_probs[2].eq(0).all()
    assert session.steps == [2, 2, 1], (
        "rows that have ended are not computed, and nothing is behind the last frame"
    )


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_row_is_the_same_in_any_batch_and_whoever_leaves(sampling):
    """Rows that end at different frames, in the order of no slot, equal rows alone."""
    batch, limits = 9, [30, 4, 17, 30, 1, 30, 11, 30, 30]
    together = decode(chaotic(range(batch)), EOS, sampling, make_streams(batch, 3), limits)
    reasons = set()
    for row in range(batch):
        alone = decode(chaotic([row]), EOS, sampling, make_streams(1, 3), limits[row])
        length = int(alone.lens)
        assert together.lens[row] == length
        assert together.finish_reasons[row] == alone.finish_reasons[0]
        assert torch.equal(together.tokens[row, :length], alone.tokens[0])
        torch.testing.assert_close(together.log_probs[row, :length], alone.log_probs[0])
        assert together.tokens[row, length:].eq(0).all() and together.log_probs[row, length:].eq(0).all()
        reasons.add(alone.finish_reasons[0])
    assert len(set(together.lens.tolist())) >= 4 and len(reasons) >= 2, "the test needs rows that differ"


def test_rows_in_another_order_draw_the_same():
    streams = make_streams(3, 7, num_samples=2)
    order = [4, 0, 5, 2, 1, 3]
    first = decode(chaotic(range(6)), EOS, Sampling(), streams, 25)
    streams = make_streams(3, 7, num_samples=2)
    second = decode(chaotic(order), EOS, Sampling(), [streams[row] for row in order], 25)
    for place, row in enumerate(order):
        assert torch.equal(second.tokens[place], first.tokens[row])
        assert second.lens[place] == first.lens[row]


def test_samples_of_a_prompt_differ():
    result = decode(chaotic([0] * 4, eos_bias=-50.0), EOS, Sampling(), make_streams(1, 0, num_samples=4), 10)
    assert len({tuple(row) for row in result.tokens.tolist()}) == 4


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("pieces", [[1] * 40, [3, 1, 7, 40], [0, 5, None]])
def test_pieces_equal_all_at_once(sampling, pieces):
    limits = [30, 4, 17, 30, 1]
    whole = decode(chaotic(range(5)), EOS, sampling, make_streams(5, 1), limits)
    loop = FrameLoop(chaotic(range(5)), EOS, sampling, make_streams(5, 1), limits)
    for piece in pieces:
        before = loop.done
        running = loop.advance(piece)
        assert running == (None in loop.finish_reasons)
        if running and piece is not None:
            assert loop.done == before + piece
        assert loop.tokens.shape == (5, loop.done)
        for row in range(5):  # what is drawn so far stays
            shared = min(loop.done, int(whole.lens[row]))
            assert torch.equal(loop.tokens[row, :shared], whole.tokens[row, :shared])
            if loop.finish_reasons[row] is None:
                assert loop.lens[row] == loop.done
            else:
                assert loop.lens[row] == whole.lens[row]
                assert loop.tokens[row, int(whole.lens[row]) :].eq(0).all()
    result = loop.result()
    assert torch.equal(result.tokens, whole.tokens) and torch.equal(result.lens, whole.lens)
    assert torch.equal(result.log_probs, whole.log_probs) and result.finish_reasons == whole.finish_reasons


def test_the_step_behind_a_piece_is_made_when_the_next_begins():
    session = scripted([[1, 2, 3, 4]])
    loop = FrameLoop(session, 5, GREEDY, make_streams(1, 0), 4)
    assert loop.advance(2) and len(session.steps) == 1
    assert loop.advance(1) and len(session.steps) == 2
    assert not loop.advance() and len(session.steps) == 3
    assert not loop.advance() and len(session.steps) == 3, "the end stays the end"
    assert loop.tokens.tolist() == [[1, 2, 3, 4]]


def test_no_result_while_rows_run():
    loop = FrameLoop(scripted([[1], [2]]), 5, GREEDY, make_streams(2, 0), 4)
    loop.advance(2)
    assert loop.finish_reasons == [None, None] and loop.lens.tolist() == [2, 2]
    with pytest.raises(RuntimeError, match="2 of 2 rows"):
        loop.result()


def test_every_row_may_have_its_own_length():
    session = scripted([[1], [2], [3, 5]])
    result = decode(session, 5, GREEDY, make_streams(3, 0), [2, 5, 9])
    assert result.lens.tolist() == [2, 5, 1]
    assert result.finish_reasons == ["length", "length", "eos"]
    assert result.tokens.tolist() == [[1, 1, 0, 0, 0], [2, 2, 2, 2, 2], [3, 0, 0, 0, 0]]
    assert session.steps == [3, 1, 1, 1]


def test_no_row_ends_before_the_minimum():
    result = decode(scripted([[5]]), 5, GREEDY, make_streams(1, 0), 6, min_new_tokens=0)
    assert result.lens.tolist() == [0]
    free = Rows([[0]], lambda row: torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 9.0]))
    result = decode(free, 5, GREEDY, make_streams(1, 0), 6, min_new_tokens=4)
    assert result.lens.tolist() == [4] and result.tokens.tolist() == [[1, 1, 1, 1]]
    assert result.finish_reasons == ["eos"]


def test_every_row_may_have_its_own_minimum():
    ends = torch.tensor([0.0, 0, 0, 0, 0, 9])
    free = Rows([[0], [0], [0]], lambda row: ends)
    result = decode(free, 5, GREEDY, make_streams(3, 0), 6, min_new_tokens=[0, 4, 2])
    assert result.lens.tolist() == [0, 4, 2] and result.finish_reasons == ["eos"] * 3


def test_all_rows_may_end_at_once():
    session = scripted([[5], [5]])
    result = decode(session, 5, GREEDY, make_streams(2, 0), 6)
    assert result.tokens.shape == (2, 0) and result.finish_reasons == ["eos", "eos"]
    assert session.steps == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_are_the_models_own(dtype):
    """Before temperature, filters, penalty and the minimum length."""
    logits = torch.tensor([0.3, 1.0, -0.5, 2.0]).to(dtype)
    sampling = Sampling(0.5, 2, repetition_penalty=1.5)
    result = decode(Rows([[0]], lambda row: logits), 3, sampling, make_streams(1, 0), 8, min_new_tokens=8)
    total = sum(math.exp(value) for value in logits.tolist())
    for code, log_prob in zip(result.tokens[0].tolist(), result.log_probs[0].tolist(), strict=True):
        assert log_prob == pytest.approx(math.log(math.exp(float(logits[code])) / total), abs=1e-5)
    assert result.log_probs.dtype == torch.float32


def naive_stop(codes, frames, minimum=0):
    """(frame it ends at, frames it keeps) or None, by trying every frame, period and start."""
    for done in range(max(frames, minimum), len(codes) + 1):
        for period in range(1, min(8, frames // 2) + 1):
            tail = codes[done - frames : done]
            if all(tail[place] == tail[place - period] for place in range(period, frames)):
                start = done - frames
                while start > 0 and codes[start - 1] == codes[start - 1 + period]:
                    start -= 1
                return done, max(minimum, start + period)
    return None


@pytest.mark.parametrize(
    "codes, frames, kept",
    [
        ([1, 2, 3, 3, 3, 3, 3, 3], 4, 3),  # 1 2 (3)
        ([1, 2, 3, 2, 3, 2, 3, 2, 3], 6, 3),  # 1 (2 3)
        ([0, 0, 1, 0, 0, 1, 0, 0, 1], 9, 3),
        ([4, 1, 2, 3, 4, 1, 2, 3], 8, 4),
        ([1, 2, 3, 4, 1, 2, 3, 4], 7, None),  # seven frames do not hold a period of four twice
        ([1, 1, 1, 2, 1, 1, 1, 2], 4, None),
        (list(range(9)) * 3, 18, None),  # a period of nine is none
        (list(range(8)) * 3, 16, 8),
    ],
)
def test_a_row_that_repeats_itself_ends(codes, frames, kept):
    eos, sampling = 10, Sampling(temperature=0, stop_repetition=frames)
    session = scripted([[*codes, eos]], vocabulary=11)
    result = decode(session, eos, sampling, make_streams(1, 0), 100)
    if kept is None:
        assert result.finish_reasons == ["eos"] and result.tokens[0].tolist() == codes
    else:
        assert result.finish_reasons == ["repetition"] and result.tokens[0].tolist() == codes[:kept]
        assert result.log_probs.shape == (1, kept)
        ends_at, naively = naive_stop(codes, frames)
        assert naively == kept
        assert len(session.steps) == ends_at - 1, "it ends with the frame that makes it repeat"


@pytest.mark.parametrize("frames", [2, 5, 6, 16, 20])
@pytest.mark.parametrize("minimum", [0, 13])
def test_repetition_equals_a_naive_search(frames, minimum):
    generator = torch.Generator().manual_seed(frames)
    reasons = set()
    for _ in range(40):
        codes = torch.randint(3, (8,), generator=generator).tolist()
        period = int(torch.randint(1, 10, (), generator=generator))
        codes = (codes + codes[-period:] * 30)[:40]
        session = scripted([[*codes, 3]], vocabulary=4)
        sampling = Sampling(temperature=0, stop_repetition=frames)
        result = decode(session, 3, sampling, make_streams(1, 0), 60, min_new_tokens=minimum)
        expected = naive_stop(codes, frames, minimum)
        reasons.add(expected is None)
        assert result.finish_reasons == ["eos" if expected is None else "repetition"]
        assert result.tokens[0].tolist() == codes[: 40 if expected is None else expected[1]]
    assert False in reasons


def test_without_the_option_a_row_may_repeat_itself():
    result = decode(scripted([[1]]), 5, GREEDY, make_streams(1, 0), 50)
    assert result.finish_reasons == ["length"] and result.lens.tolist() == [50]


class TestGuidance:
    def pairs(self, numbers):
        """Rows 2i and 2i + 1 have the same codes but not the same logits."""
        return chaotic([number * 2 + side for number in numbers for side in (0, 1)])

    def test_mixes_log_probabilities(self):
        inner = self.pairs([0, 1])
        log_probs = inner.logits.log_softmax(-1)
        for scale in (0.0, 0.5, 1.0, 3.0):
            got = GuidedSession(inner, scale).logits
            expected = log_probs[1::2] + scale * (log_probs[0::2] - log_probs[1::2])
            torch.testing.assert_close(got, expected)

    @pytest.mark.parametrize("scale, side", [(1.0, 0), (0.0, 1)])
    def test_the_ends_of_the_scale_are_the_rows_themselves(self, scale, side):
        numbers = [0, 1, 2]
        guided = decode(GuidedSession(self.pairs(numbers), scale), EOS, Sampling(), make_streams(3, 2), 20)
        plain = decode(chaotic([n * 2 + side for n in numbers]), EOS, Sampling(), make_streams(3, 2), 20)
        assert torch.equal(guided.tokens, plain.tokens) and guided.finish_reasons == plain.finish_reasons
        torch.testing.assert_close(guided.log_probs, plain.log_probs)

    def test_more_guidance_follows_the_prompt_more(self):
        logits = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        share = []
        for scale in (0, 1, 2, 4):
            session = Rows([[0], [1]], lambda row: logits[row[0]])
            share.append(float(GuidedSession(session, scale).logits.softmax(-1)[0, 0]))
        assert share == sorted(share) and share[0] < share[1] < share[3]

    def test_pairs_leave_together(self):
        numbers, limits = list(range(6)), [20, 3, 20, 1, 9, 20]
        inner = self.pairs(numbers)
        together = decode(GuidedSession(inner, 2.0), EOS, Sampling(), make_streams(6, 4), limits)
        for row in numbers:
            alone = decode(
                GuidedSession(self.pairs([row]), 2.0), EOS, Sampling(), make_streams(1, 4), limits[row]
            )
            length = int(alone.lens)
            assert together.lens[row] == length
            assert torch.equal(together.tokens[row, :length], alone.tokens[0])
        assert len(set(together.lens.tolist())) >= 4
        assert all(rows % 2 == 0 for rows in inner.steps) and inner.steps[-1] < inner.steps[0]

    @pytest.mark.parametrize("scale", [-1.0, math.nan, math.inf])
    def test_bad_scale(self, scale):
        with pytest.raises(UserError, match="guidance scale"):
            GuidedSession(self.pairs([0]), scale)

    def test_odd_rows(self):
        with pytest.raises(ValueError, match="3 rows"):
            GuidedSession(chaotic([0, 1, 2]), 2.0)


def test_progress():
    seen = []
    decode(scripted([[1], [2, 5]]), 5, GREEDY, make_streams(2, 0), 4, on_frame=seen.append)
    assert seen == [1, 2, 3, 4]


def test_logits_that_are_no_numbers_are_named():
    def logits_of(row):
        return torch.full((6,), math.nan if row[0] == 1 and len(row) == 3 else 0.0)

    for sampling in (Sampling(), Sampling(top_k=0), Sampling(top_k=2), GREEDY):
        session = Rows([[0], [1]], logits_of)
        with pytest.raises(FloatingPointError, match="row 1, new frame 2"):
            decode(session, 5, sampling, make_streams(2, 0), 6, min_new_tokens=6)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": [3, -1]}, "max_new_tokens is -1"),
        ({"max_new_tokens": 3, "min_new_tokens": -2}, "min_new_tokens is -2"),
    ],
)
def test_bad_numbers_of_frames(options, named):
    with pytest.raises(UserError, match=named):
        FrameLoop(scripted([[1], [2]]), 5, GREEDY, make_streams(2, 0), **options)


@pytest.mark.parametrize("streams, limits", [(1, 3), (2, [3]), (3, 3)])
def test_one_stream_and_one_length_a_row(streams, limits):
    with pytest.raises(ValueError, match="2 rows"):
        FrameLoop(scripted([[1], [2]]), 5, GREEDY, make_streams(streams, 0), limits)
