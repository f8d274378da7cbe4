"""Made-up piano performances for the tests of egs/atepp and egs/maestro: notes, their MIDI file, and their sound."""

import numpy as np
import soundfile

from valle.data.midi import crop, make_notes, read_notes, write_notes

RATE = 22050


def performance(seed, seconds=30.0):
    """Notes from 0.3 s on, two or three a second, unevenly."""
    draw = np.random.default_rng(seed)
    onsets = 0.3 + np.cumsum(draw.uniform(0.2, 0.6, int(seconds / 0.4)))
    onsets = onsets[onsets < seconds - 1]
    count = len(onsets)
    return make_notes(
        onsets,
        onsets + draw.uniform(0.1, 0.5, count),
        draw.integers(48, 84, count),
        draw.integers(50, 110, count),
    )


def sound(notes, delay=0.0, rate=RATE):
    """(N,): each note a tone of a few partials that begins at once and dies away."""
    wav = np.zeros(int((notes.duration + 2 + delay) * rate))
    for onset, pitch, velocity in zip(notes.onset, notes.pitch, notes.velocity, strict=True):
        time = np.arange(int(1.2 * rate)) / rate
        frequency = 440 * 2 ** ((pitch - 69) / 12)
        tone = sum(np.sin(2 * np.pi * frequency * partial * time) / partial for partial in (1, 2, 3))
        start = round((onset + delay) * rate)
        tone = (velocity / 127 * np.exp(-6 * time) * tone)[: len(wav) - start]
        wav[start : start + len(tone)] += tone
    return 0.5 * wav / np.abs(wav).max()


def write_midi(path, notes):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_notes(path, notes)


def write_recording(path, notes, delay=0.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, sound(notes, delay), RATE)


def onset_errors(cut):
    """How far the cut's audio rises from the onsets of its MIDI stretch, in seconds; for notes that stand alone."""
    notes = crop(read_notes(cut.custom["midi"]), cut.start, cut.end)
    wav = cut.load_audio().mean(axis=0)
    hop = cut.sampling_rate // 200  # 5 ms
    level = np.sqrt(np.mean(wav[: len(wav) // hop * hop].reshape(-1, hop) ** 2, axis=1))
    rise = np.diff(np.log(level + 1e-4), prepend=0.0)
    errors = []
    alone = np.diff(notes.onset, prepend=-1.0) > 0.25
    for onset in notes.onset[alone]:
        place = round(onset * 200)
        first, last = place - 24, place + 24  # 120 ms to either side
        if first >= 1 and last < len(rise):
            errors.append((first + int(np.argmax(rise[first:last])) - place) / 200)
    return np.array(errors)
