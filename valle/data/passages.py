"""Where a long performance can be divided: in its pauses. Between MIDI files and generation.

A model plays some ten seconds at a time. Each stretch begins just before a note, best where nothing sounds any more,
else where no note has begun for longest.
"""

import math

import numpy as np

from valle.data.midi import Notes, sustained

SHORTEST = 2 / 3  # of the longest stretch: where a pause is looked for
LEAD = 0.05  # seconds before a note that a stretch begins at, at most


def divide(notes: Notes, longest: float, frame_rate: float) -> list[int]:
    """The frames at which the stretches of a performance begin; the first is 0.

    All but the last are from two thirds of `longest` to `longest`; the last ends with the performance.

    Args:
        notes: of the whole performance.
        longest: seconds of a stretch.
        frame_rate: of the codes, Hz.
    """
    starts, sounding = [0], sustained(notes)
    end = sounding.duration
    ended = np.maximum.accumulate(sounding.offset)  # when the notes up to this one are silent
    while end - starts[-1] / frame_rate > longest:
        start = starts[-1] / frame_rate
        low, high = start + SHORTEST * longest, start + longest
        best, begin = None, start
        # A note that begins behind the window may end a pause that begins inside it.
        last = min(len(notes), int(np.searchsorted(sounding.onset, high, side="right")) + 1)
        for index in range(max(1, int(np.searchsorted(sounding.onset, low, side="right"))), last):
            until = min(float(sounding.onset[index]), high)
            before = max(float(sounding.onset[index - 1]), start)
            found = (max(0.0, until - max(float(ended[index - 1]), start)), until - before)
            if best is None or found > best:
                best, begin = found, until - min(LEAD, (until - before) / 2)
        # A hair more: 0.3 s at 50 Hz is frame 15, and not 14.999...
        frame = math.floor(begin * frame_rate + 1e-6)
        if best is None or frame <= starts[-1]:
            break  # nothing begins any more: what is left is the end of what sounds
        starts.append(frame)
    return starts
