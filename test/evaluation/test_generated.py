"""What codes alone tell of a continuation."""

import numpy as np
import pytest

from valle.evaluation.generated import generation_figures, longest_run, repetition


def test_a_loop_repeats_and_a_count_does_not():
    rate = 10.0  # stretches of 2 frames
    assert repetition(np.arange(50), rate) == 0
    # 0 1 2 0 1 2 ...: three stretches of two are new, of 29
    assert repetition(np.arange(30) % 3, rate) == pytest.approx(1 - 3 / 29)
    assert repetition(np.zeros(11, dtype=int), rate) == pytest.approx(0.9)
    assert repetition(np.arange(2), rate) is None


def test_longest_run_in_seconds():
    assert longest_run(np.array([1, 1, 2, 2, 2, 2, 3]), 50.0) == pytest.approx(4 / 50)
    assert longest_run(np.array([7]), 50.0) == pytest.approx(1 / 50)
    assert longest_run(np.array([], dtype=int), 50.0) is None


def test_ends_and_lengths_are_held_against_the_recordings_rest():
    def codes(frames: int) -> np.ndarray:
        return np.arange(2 * frames).reshape(frames, 2)

    made = {
        "resynthesis": codes(40),
        "model-0": codes(19),
        "model-1": codes(20),
        "model-2": codes(60),
        "loop": codes(40),
    }
    figures = generation_figures(made, ["eos", "eos", "length"], 40, 50.0)
    assert [figures[f"model-{n}"]["early_stop"] for n in range(3)] == [1, 0, 0]
    assert [figures[f"model-{n}"]["length_error"] for n in range(3)] == pytest.approx([21 / 40, 0.5, 0.5])
    assert figures["recording"]["length_error"] == 0 and figures["loop"]["early_stop"] is None
    assert "resynthesis" not in figures  # its codes are the recording's


def test_a_continuation_cut_short_by_the_limit_is_no_early_stop():
    made = {"resynthesis": np.zeros((40, 1), int), "model-0": np.zeros((5, 1), int)}
    assert generation_figures(made, ["length"], 40, 50.0)["model-0"]["early_stop"] == 0
