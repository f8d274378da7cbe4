"""What codes alone tell of a continuation: how much it repeats itself, and whether it ends where it should.

- repetition: share of stretches of 0.2 s of quantizer 0 that came before in the same continuation. Pauses repeat too,
  so the recording's own figure is what to hold it against: more is a loop, less is noise.
- longest_run: seconds of the longest stretch with one code of quantizer 0, to be held against the recording's.
- early_stop: 1 where a continuation ended by itself before half of the recording's rest, else 0.
- length_error: how far the continuation's length is from the recording's rest, as a share of that.
"""

from collections.abc import Mapping, Sequence

import numpy as np

STRETCH_SECONDS = 0.2
EARLY = 0.5  # of the recording's rest

# "recording": nearer to the recording's figure is better
KEYS = {
    "repetition": "recording",
    "longest_run": "recording",
    "early_stop": "lower",
    "length_error": "lower",
}


def repetition(codes: np.ndarray, frame_rate: float) -> float | None:
    """Share of stretches of 0.2 s that came before; None where there are less than two.

    Args:
        codes: (T,) of one quantizer.
        frame_rate: Hz.
    """
    size = max(2, round(STRETCH_SECONDS * frame_rate))
    if len(codes) < size + 1:
        return None
    stretches = np.lib.stride_tricks.sliding_window_view(codes, size)
    return 1.0 - len(np.unique(stretches, axis=0)) / len(stretches)


def longest_run(codes: np.ndarray, frame_rate: float) -> float | None:
    """Seconds of the longest stretch of one code in (T,) codes; None where there are none."""
    if not len(codes):
        return None
    starts = np.flatnonzero(np.concatenate([[True], codes[1:] != codes[:-1], [True]]))
    return float(np.diff(starts).max() / frame_rate)


def generation_figures(
    codes: Mapping[str, np.ndarray], finish_reasons: Sequence[str], rest: int, frame_rate: float
) -> dict[str, dict[str, float | None]]:
    """Figures of a cut: condition -> key of `KEYS` -> value; None where it says nothing.

    Args:
        codes: condition -> (T, Q) codes after the prompt; those of "resynthesis" are the recording's.
        finish_reasons: of model-0, model-1 ...
        rest: frames of the recording after the prompt.
        frame_rate: Hz.
    """
    figures: dict[str, dict[str, float | None]] = {}
    for name, part in codes.items():
        figures[name] = {
            "repetition": repetition(part[:, 0], frame_rate),
            "longest_run": longest_run(part[:, 0], frame_rate),
            "early_stop": None,
            "length_error": None,
        }
    for number, reason in enumerate(finish_reasons):
        new = len(codes[f"model-{number}"])
        figures[f"model-{number}"] |= {
            "early_stop": float(reason == "eos" and new < EARLY * rest),
            "length_error": abs(new - rest) / rest,
        }
    figures["recording"] = figures.pop("resynthesis") | {"early_stop": 0.0, "length_error": 0.0}
    return figures
