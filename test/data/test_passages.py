"""Long performances are divided where they pause."""

import numpy as np
import pytest

from valle.data.midi import make_notes
from valle.data.passages import divide

RATE = 50.0


def notes(onsets, length=0.2, pedal=()):
    onsets = np.asarray(onsets, float)
    return make_notes(onsets, onsets + length, np.full(len(onsets), 60), np.full(len(onsets), 64), pedal)


def seconds(*arguments):
    return [frame / RATE for frame in divide(*arguments, RATE)]


def test_a_short_piece_stays_whole():
    assert divide(notes(np.arange(0, 14.5, 0.5)), 15.0, RATE) == [0]
    assert divide(notes([]), 15.0, RATE) == [0]


def test_the_longest_pause_of_the_window_is_taken():
    """Pauses of 1 s before 11 s and of 2 s before 13 s; one of 3 s before 8 s is too early."""
    onsets = [t for t in np.arange(0, 20, 0.25) if not (5 < t < 8 or 10 < t < 11 or 11 < t < 13)]
    assert seconds(notes(onsets), 15.0) == [0, pytest.approx(12.95, abs=0.02)]


def test_silence_goes_before_mere_distance():
    """2 s without an onset but under the pedal, and half a second of silence."""
    onsets = [t for t in np.arange(0, 18, 0.25) if not 10.75 < t < 12.75 and t != 13.75]
    piece = notes(onsets, 0.1, [(10.5, 12.9)])
    assert seconds(piece, 15.0)[1] == pytest.approx(13.95, abs=0.02)
    assert seconds(notes(onsets, 0.1), 15.0)[1] == pytest.approx(12.70, abs=0.02)


def test_a_pause_may_end_behind_the_window():
    onsets = [*np.arange(0, 14, 0.5), *np.arange(16, 20, 0.5)]
    assert seconds(notes(onsets), 15.0) == [0, pytest.approx(14.95, abs=0.06)]


@pytest.mark.parametrize("longest", [6.0, 12.0, 15.0])
def test_stretches_have_their_length_and_all_notes(longest):
    draw = np.random.default_rng(0)
    onsets = np.cumsum(draw.exponential(0.2, 600))
    piece = notes(onsets, 0.5)
    starts = seconds(piece, longest)
    lengths = np.diff([*starts, piece.duration])
    assert lengths.max() <= longest + 1e-6 and lengths[:-1].min() >= 2 / 3 * longest - 0.1
    assert starts == sorted(set(starts))
    for before, start in zip(starts, starts[1:], strict=False):  # just before a note, or as late as may be
        assert onsets[onsets >= start][0] - start < 0.05 + 1.5 / RATE or start - before > longest - 0.1


def test_what_only_sounds_on_is_not_divided():
    assert divide(notes([0.0, 1.0], 40.0), 15.0, RATE) == [0]
    assert divide(notes([0.0, 60.0]), 15.0, RATE)[-1] / RATE < 60.0
