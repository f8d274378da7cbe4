"""Sampling against naive references in plain Python."""

import math
from random import Random

import pytest
import torch

from valle.generation.sampling import Sampling, make_streams, sample, uniforms
from valle.utils.errors import UserError

CODES = 12
NO_HISTORY = torch.zeros(0, 1, dtype=torch.long)
HISTORY = [3, 0, 3, 7, 7, 7, 1, 3]  # codes of earlier frames, the latest last


def normalized(weights):
    total = sum(weights.values())
    return {code: weight / total for code, weight in weights.items()}


def naive_scores(logits, sampling, history):
    """Logits after the repetition penalty."""
    window = history if sampling.repetition_window == 0 else history[-sampling.repetition_window :]
    scores = dict(enumerate(logits))
    for code in set(window):
        if scores[code] > 0:
            scores[code] /= sampling.repetition_penalty
        else:
            scores[code] *= sampling.repetition_penalty
    return scores


def naive_filters(scores, sampling):
    """Code -> probability, by one loop an option."""
    if sampling.greedy:
        return {max(scores, key=scores.__getitem__): 1.0}
    kept = normalized({code: math.exp(score / sampling.temperature) for code, score in scores.items()})
    order = sorted(kept, key=lambda code: -kept[code])
    if sampling.top_k > 0:
        kept = normalized({code: kept[code] for code in order[: sampling.top_k]})
    mass, nucleus = 0.0, {}
    for code in order[: len(kept)]:
        if mass >= sampling.top_p:
            break
        nucleus[code] = kept[code]
        mass += kept[code]
    best = max(nucleus.values())
    return normalized({code: p for code, p in nucleus.items() if p >= sampling.min_p * best})


def naive_probabilities(logits, sampling, history=()):
    """Code -> probability of the whole draw, a second draw included."""
    scores = naive_scores(logits, sampling, list(history))
    first = naive_filters(scores, sampling)
    if not sampling.repetition_aware:
        return first
    again = normalized({code: math.exp(score / sampling.temperature) for code, score in scores.items()})
    out = dict.fromkeys(range(len(logits)), 0.0)
    for code, probability in first.items():
        recent = list(history)[-sampling.aware_window :]
        if sum(earlier == code for earlier in recent) / sampling.aware_window > sampling.aware_threshold:
            for other, share in again.items():
                out[other] += probability * share
        else:
            out[code] += probability
    return out


def drawn_shares(logits, sampling, history=()):
    """How often each code is drawn when the random numbers go evenly over all they can be."""
    per_draw = 400 if sampling.draws < 2 else 100
    grid = (torch.arange(per_draw, dtype=torch.float64) + 0.5) / per_draw
    if sampling.draws < 2:
        numbers = grid[:, None].expand(-1, sampling.draws)
    else:
        numbers = torch.cartesian_prod(grid, grid)
    rows = len(numbers)
    past = torch.tensor(list(history), dtype=torch.long)[:, None].expand(-1, rows)
    drawn = sample(logits.expand(rows, -1), sampling, numbers, past)
    return (drawn.bincount(minlength=logits.shape[-1]) / rows).tolist(), 1 / per_draw


def check(logits, sampling, history=()):
    shares, resolution = drawn_shares(logits, sampling, history)
    expected = naive_probabilities(logits.tolist(), sampling, history)
    for code, share in enumerate(shares):
        assert share == pytest.approx(expected.get(code, 0.0), abs=2.5 * resolution), code
        if code not in expected:  # what is left out is never drawn, not even rarely
            assert share == 0
    return shares


@pytest.fixture
def logits():
    return 2 * torch.randn(CODES, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("temperature", [0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 3, 100])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.2, 1.0])
def test_filters_equal_a_naive_reference(logits, temperature, top_k, top_p, min_p):
    check(logits, Sampling(temperature, top_k, top_p, min_p))


@pytest.mark.parametrize("penalty", [0.7, 1.5, 4.0])
@pytest.mark.parametrize("window", [0, 2, 5, 100])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_repetition_penalty_equals_a_naive_reference(logits, penalty, window, temperature):
    sampling = Sampling(temperature, 0, repetition_penalty=penalty, repetition_window=window)
    shares = check(logits, sampling, HISTORY)
    if temperature > 0:
        assert shares != drawn_shares(logits, Sampling(temperature, 0), HISTORY)[0]


def test_repetition_penalty_of_nothing_yet(logits):
    check(logits, Sampling(top_k=0, repetition_penalty=4.0))


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_k": 3}, {"top_k": 0, "top_p": 0.5}, {"min_p": 0.3}])
@pytest.mark.parametrize("aware", [{}, {"aware_window": 3}, {"aware_threshold": 0.25}, {"aware_window": 4}])
@pytest.mark.parametrize("penalty", [1.0, 2.0])
@pytest.mark.parametrize("history", [(), (3,), HISTORY])
def test_repetition_aware_sampling_equals_a_naive_reference(logits, options, aware, penalty, history):
    logits[3], logits[7] = 4.0, 3.5  # both likely, and drawn before
    sampling = Sampling(
        0.9, repetition_aware=True, repetition_penalty=penalty, **{"top_k": 5} | options | aware
    )
    check(logits, sampling, history)


def test_repetition_aware_sampling_needs_more_than_the_threshold(logits):
    """One of ten frames is the threshold itself; two are above."""
    logits[4] = 50.0
    sampling = Sampling(20.0, 1, repetition_aware=True)  # greedy, but drawing again gives every code
    once, twice = [4, *[0] * 9], [4, 4, *[0] * 8]
    assert drawn_shares(logits, sampling, once)[0][4] == 1
    assert drawn_shares(logits, sampling, twice)[0][4] < 0.9
    assert drawn_shares(logits, sampling, [*twice, 1])[0][4] == 1  # one of the two has left the window


def test_of_ties_at_the_kth_place_only_k_are_drawn():
    shares, _ = drawn_shares(torch.zeros(CODES), Sampling(top_k=5))
    assert sorted(shares, reverse=True) == pytest.approx([0.2] * 5 + [0.0] * 7)


def test_codes_without_probability_are_never_drawn():
    logits = torch.full((1, 4), -torch.inf)
    logits[0, 1] = 0.0
    for number in (0.0, 0.5, 1 - 2**-53):  # the least and the largest that a stream gives
        for top_k in (0, 3):
            numbers = torch.tensor([[number]], dtype=torch.float64)
            assert sample(logits, Sampling(top_k=top_k), numbers, NO_HISTORY).tolist() == [1]


def test_draws_follow_the_probabilities():
    """With the real streams, not an even grid."""
    logits, sampling = torch.tensor([[0.0, 1.0, 2.0, -1.0]]), Sampling(top_k=0)
    numbers = torch.cat([uniforms(make_streams(1, 0), sampling, logits.device) for _ in range(2)])
    assert numbers[0] == numbers[1]  # a stream begins with its seed
    stream = make_streams(1, 0)
    numbers = torch.cat([uniforms(stream, sampling, logits.device) for _ in range(4000)])
    drawn = sample(logits.expand(4000, -1), sampling, numbers, NO_HISTORY)
    assert (drawn.bincount(minlength=4) / 4000 - logits[0].softmax(-1)).abs().max() < 0.03


def test_small_probabilities_behind_a_large_one_are_not_rounded_away():
    """1000 codes of 1e-9 each stand behind one that has nearly everything: together 1e-6."""
    logits = torch.full((1, 1001), math.log(1e-9))
    logits[0, 0] = 0.0
    numbers = [torch.tensor([[1 - 1e-9 * n]], dtype=torch.float64) for n in range(5, 995, 10)]
    drawn = {int(sample(logits, Sampling(top_k=0), number, NO_HISTORY)) for number in numbers}
    assert len(drawn) == 99


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 0}, {"top_k": 0, "top_p": 0.8}, {"repetition_aware": True}]
)
def test_a_row_draws_the_same_in_any_batch(options):
    torch.manual_seed(0)
    logits, history, sampling = torch.randn(16, 200), torch.randint(200, (20, 16)), Sampling(**options)
    numbers = torch.rand(16, sampling.draws, dtype=torch.float64)
    together = sample(logits, sampling, numbers, history)
    for row in range(16):
        one = slice(row, row + 1)
        assert sample(logits[one], sampling, numbers[one], history[:, one]) == together[row]


def test_streams():
    def first(streams):
        return [stream.random() for stream in streams]

    alone, many = first(make_streams(1, 5)), first(make_streams(3, 5, num_samples=4))
    assert many[0] == many[4] == many[8] == alone[0], "sample 0 of each prompt is that of num_samples=1"
    assert many[:4] == many[4:8] == many[8:], "a prompt's samples are the same in any batch"
    assert many[:2] == first(make_streams(1, 5, num_samples=2)), "and for any number of samples"
    assert len(set(many)) == 4, "each sample has its own"
    assert not set(many) & set(first(make_streams(1, 6, num_samples=4)) + first(make_streams(1, -5)))
    assert isinstance(make_streams(1, 5)[0], Random)


def test_streams_without_a_seed_come_from_the_state_of_torch():
    def first():
        return [stream.random() for stream in make_streams(2, None, num_samples=2)]

    torch.manual_seed(1)
    once, again = first(), first()
    assert len({*once, *again}) == 8
    torch.manual_seed(1)
    assert first() == once


@pytest.mark.parametrize("top_k", [0, 3])
def test_the_lowest_temperature_takes_the_likeliest(top_k):
    logits, sampling = 100 * torch.randn(5, 9), Sampling(1e-6, top_k)
    numbers = uniforms(make_streams(5, 0), sampling, logits.device)
    assert torch.equal(sample(logits, sampling, numbers, torch.zeros(0, 5).long()), logits.argmax(-1))


def test_greedy_takes_the_likeliest_and_no_random_number():
    logits = torch.randn(5, 9)
    for sampling in (Sampling(temperature=0), Sampling(top_k=1)):
        numbers = uniforms(make_streams(5, 0), sampling, logits.device)
        assert numbers.shape == (5, 0)
        assert torch.equal(sample(logits, sampling, numbers, torch.zeros(0, 5).long()), logits.argmax(-1))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1}, {"temperature": 1e-40}, {"temperature": math.nan}, {"temperature": math.inf},
        {"top_p": 0}, {"top_p": 1.5},
        {"top_p": math.nan}, {"min_p": -0.1}, {"min_p": 1.1}, {"min_p": math.nan}, {"repetition_penalty": 0},
        {"repetition_penalty": math.inf}, {"repetition_window": -1}, {"aware_window": 0}, {"aware_threshold": 1.0},
        {"aware_threshold": -0.1}, {"stop_repetition": -1}, {"stop_repetition": 1},
        {"repetition_aware": True, "temperature": 0},
    ],
)  # fmt: skip
def test_bad_settings_are_named(options):
    with pytest.raises(UserError, match=next(iter(options))):
        Sampling(**options)
