"""Sampling against naive references."""

import math

import pytest
import torch

from valle.generation.decoding import decode
from valle.generation.sampling import Sampling, filter_logits, make_streams, sample
from valle.utils.errors import UserError


def naive_probabilities(logits, temperature, top_k, top_p):
    weights = [math.exp(value / temperature) for value in logits]
    order = sorted(range(len(weights)), key=lambda index: -weights[index])
    if top_k > 0:
        order = order[:top_k]
    total = sum(weights[index] for index in order)
    kept, mass = [], 0.0
    for index in order:
        if mass >= top_p:
            break
        kept.append(index)
        mass += weights[index] / total
    total = sum(weights[index] for index in kept)
    return {index: weights[index] / total for index in kept}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 3, 100])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
def test_filters_equal_a_naive_reference(temperature, top_k, top_p):
    torch.manual_seed(0)
    logits = torch.randn(4, 12)
    got = filter_logits(logits, Sampling(temperature, top_k, top_p)).softmax(-1)
    for row in range(4):
        expected = naive_probabilities(logits[row].tolist(), temperature, top_k, top_p)
        for index in range(12):
            assert float(got[row, index]) == pytest.approx(expected.get(index, 0.0), abs=1e-6)


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    streams = make_streams(1, 0)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[sample(logits, Sampling(1.0, 0), streams)] += 1
    assert (counts / 4000 - logits[0].softmax(-1)).abs().max() < 0.03


def test_a_seeded_row_draws_the_same_in_any_batch():
    torch.manual_seed(0)
    logits = torch.randn(3, 20)
    together = sample(logits, Sampling(), make_streams(3, 5))
    for row in range(3):
        assert sample(logits[row : row + 1], Sampling(), make_streams(1, 5)) == together[row]


def test_greedy_takes_the_likeliest():
    logits = torch.randn(5, 9)
    for sampling in (Sampling(temperature=0), Sampling(top_k=1)):
        assert torch.equal(sample(logits, sampling, make_streams(5, 0)), logits.argmax(-1))


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.5}]
)
def test_bad_settings_are_named(options):
    with pytest.raises(UserError, match=next(iter(options))):
        Sampling(**options)


def scripted(script, vocabulary=6):
    """Logits and a step that make row i draw script[i], frame by frame."""
    frame = [0]

    def logits_of(number):
        out = torch.full((len(script), vocabulary), -50.0)
        for row, codes in enumerate(script):
            out[row, codes[min(number, len(codes) - 1)]] = 50.0
        return out

    def step(drawn):
        frame[0] += 1
        return logits_of(frame[0])

    return logits_of(0), step


def test_rows_end_each_on_its_own():
    end = 5
    logits, step = scripted([[1, 2, end], [3, 3, 3, 3], [end]])
    result = decode(logits, step, end, Sampling(temperature=0), make_streams(3, 0), max_new_tokens=4)
    assert result.lens.tolist() == [2, 4, 0]
    assert result.finish_reasons == ["eos", "length", "eos"]
    assert result.tokens.tolist() == [[1, 2, 0, 0], [3, 3, 3, 3], [0, 0, 0, 0]]
    assert result.log_probs[0, 2:].eq(0).all() and result.log_probs[2].eq(0).all()


def test_no_row_ends_before_the_minimum():
    logits, step = scripted([[5]])
    result = decode(logits, step, 5, Sampling(temperature=0), make_streams(1, 0), 6, min_new_tokens=4)
    assert result.lens.tolist() == [4] and 5 not in result.tokens


def test_all_rows_may_end_at_once():
    logits, step = scripted([[5], [5]])
    result = decode(logits, step, 5, Sampling(temperature=0), make_streams(2, 0), 6)
    assert result.tokens.shape == (2, 0) and result.finish_reasons == ["eos", "eos"]
