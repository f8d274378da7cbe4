"""MIDI front end: a performance as tokens of six fields a note, on its recording's clock. Between MIDI and batches.

The fields follow Octuple (MusicBERT, https://arxiv.org/abs/2106.05630) as MIDI-VALLE uses it
(https://arxiv.org/abs/2507.08530: pitch, velocity, duration, inter-onset interval, position, bar), but in seconds:
performances have no metre that a file knows of, so beats, tempo and bars of a MIDI file only say when a note sounds,
and what is shared with the audio's frames is time. A "bar" here is a second.

    pitch     MIDI key, 0 to 127
    velocity  0 to 127, as in the file
    duration  finer for short notes: 5 ms steps to 0.64 s, 10 ms to 1.92 s, 20 ms to 4.48 s, 40 ms to 9.6 s,
              80 ms to 19.8 s; longer notes are shortened to that
    ioi       5 ms steps since the note before began, 0 for the first, at most 1.995 s (says nothing that position and
              second do not, and spares the model the subtraction)
    position  5 ms steps within the second, 0 to 199
    second    full seconds before the note begins

So a note comes back with its pitch and velocity, its onset within 2.5 ms (5 ms at the very end of the last second)
and its duration within half a step, but 5 ms at least.
Sustain pedal: a note that is let go while the pedal is down lasts until the pedal is up or its key is struck again
(`sustain=False`: until its key is up). The pedal itself is no field.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lhotse.cut import Cut

from valle.utils.errors import UserError
from valle.utils.files import atomic_path

FIELDS = ("pitch", "velocity", "duration", "ioi", "position", "second")
PAD, BOS, EOS, MASK = range(4)  # in every field; values come after them
NUM_SPECIAL = 4

STEPS_PER_SECOND = 200
STEP = 1.0 / STEPS_PER_SECOND  # seconds
MAX_IOI = 2 * STEPS_PER_SECOND  # steps
_LEVELS, _LEVEL_SIZE = 5, 128  # of durations; steps double from level to level
SUSTAIN_PEDAL = 64  # its controller number
PEDAL_DOWN = 64  # controller values from here on
_WRITTEN_TICKS = 5000  # a quarter note of files that are written: 0.1 ms a tick at 120 a minute


@dataclass(frozen=True)
class Notes:
    """Notes of a performance, by onset, then pitch, then offset.

    Attributes:
        onset: (N,) float64 seconds.
        offset: (N,) float64 seconds at which the key is let go; not before the onset.
        pitch: (N,) int64, 0 to 127.
        velocity: (N,) int64, 1 to 127.
        pedal: (P, 2) float64 seconds from and to which the sustain pedal is down, in order, apart from each other.
    """

    onset: np.ndarray
    offset: np.ndarray
    pitch: np.ndarray
    velocity: np.ndarray
    pedal: np.ndarray

    def __len__(self) -> int:
        return len(self.onset)

    @property
    def duration(self) -> float:
        """Seconds to the last offset."""
        return float(self.offset.max()) if len(self) else 0.0


def make_notes(
    onset: Sequence[float] | np.ndarray,
    offset: Sequence[float] | np.ndarray,
    pitch: Sequence[int] | np.ndarray,
    velocity: Sequence[int] | np.ndarray,
    pedal: Sequence[tuple[float, float]] | np.ndarray = (),
) -> Notes:
    """Notes in order. Pedal intervals that touch become one, and empty ones are left out.

    Raises:
        ValueError: arrays of different lengths, or a note that ends before it begins.
    """
    onsets, offsets = np.asarray(onset, np.float64), np.asarray(offset, np.float64)
    pitches, velocities = np.asarray(pitch, np.int64), np.asarray(velocity, np.int64)
    if not len(onsets) == len(offsets) == len(pitches) == len(velocities):
        raise ValueError("onsets, offsets, pitches and velocities of different numbers of notes")
    if (offsets < onsets).any():
        raise ValueError("a note ends before it begins")
    order = np.lexsort((offsets, pitches, onsets))
    return Notes(onsets[order], offsets[order], pitches[order], velocities[order], _joined(pedal))


def _joined(intervals: Sequence[tuple[float, float]] | np.ndarray) -> np.ndarray:
    """The union of (start, end) intervals as (P, 2) in order."""
    joined: list[list[float]] = []
    for start, end in sorted((float(start), float(end)) for start, end in intervals):
        if joined and start <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        elif end > start:
            joined.append([start, end])
    return np.array(joined, np.float64).reshape(-1, 2)


def read_notes(path: str | Path) -> Notes:
    """Read a MIDI file. Its time 0 is the recording's.

    The notes of all tracks are taken together, whatever their instrument; those of drums (channel 10) are left out. So
    are notes that are never let go. A pedal that stays down is down to the end. The file's tempo changes are followed.

    Raises:
        UserError: no such file, or it is no MIDI file that can be read.
    """
    symusic = _symusic()
    path = Path(path)
    try:
        score = symusic.Score.from_midi(path.read_bytes())
        ticks_per_quarter = int(score.ticks_per_quarter)
        tempos = [(int(tempo.time), int(tempo.mspq)) for tempo in score.tempos]
    except FileNotFoundError:
        raise UserError(f"MIDI file '{path}' does not exist") from None
    except Exception as error:  # symusic raises what its parser happens to meet
        message = " ".join(str(error).split())
        raise UserError(f"'{path}' is no MIDI file that can be read ({message})") from error
    if ticks_per_quarter <= 0 or any(mspq <= 0 for _, mspq in tempos):
        raise UserError(f"'{path}': a tempo or a time division of 0, in which no time passes")

    parts: list[tuple[np.ndarray, ...]] = []
    controls: list[tuple[np.ndarray, np.ndarray]] = []
    for track in score.tracks:
        if track.is_drum:
            continue
        notes = track.notes.numpy()
        start = notes["time"].astype(np.int64)
        end = start + np.maximum(notes["duration"].astype(np.int64), 0)
        parts.append((start, end, notes["pitch"].astype(np.int64), notes["velocity"].astype(np.int64)))
        control = track.controls.numpy()
        pedal = control["number"] == SUSTAIN_PEDAL
        controls.append((control["time"][pedal].astype(np.int64), control["value"][pedal]))
    starts, ends, pitches, velocities = (
        np.concatenate([part[column] for part in parts]) if parts else np.zeros(0, np.int64)
        for column in range(4)
    )
    last = max([0, *ends.tolist(), *(int(times.max()) for times, _ in controls if len(times))])
    intervals = [interval for times, values in controls for interval in _pedal_intervals(times, values, last)]
    pedals = np.array(intervals, np.int64).reshape(-1, 2)
    seconds = _Clock(tempos, ticks_per_quarter)
    return make_notes(seconds(starts), seconds(ends), pitches, velocities, seconds(pedals))


def _symusic() -> Any:
    try:
        import symusic
    except ImportError:
        raise UserError("MIDI files need symusic: pip install 'valle[midi]'") from None
    return symusic


def _pedal_intervals(times: np.ndarray, values: np.ndarray, last: int) -> list[tuple[int, int]]:
    """Ticks between which the pedal is down. `last`: where one ends that is never released."""
    order = np.argsort(times, kind="stable")
    down = values[order] >= PEDAL_DOWN
    changes = np.flatnonzero(np.diff(np.concatenate(([False], down))))
    ticks = [*times[order][changes].tolist(), last]
    return [(ticks[at], ticks[at + 1]) for at in range(0, len(ticks) - 1, 2)]


class _Clock:
    """Ticks -> seconds, in float64 (symusic's own conversion has single precision, 60 µs off after ten minutes)."""

    def __init__(self, tempos: list[tuple[int, int]], ticks_per_quarter: int) -> None:
        by_tick = {0: 500_000, **dict(sorted(tempos, key=lambda tempo: tempo[0]))}  # µs a quarter note
        self._ticks = np.array(sorted(by_tick), np.int64)
        self._rates = np.array([by_tick[tick] for tick in self._ticks]) * 1e-6 / ticks_per_quarter
        lengths = np.diff(self._ticks) * self._rates[:-1]
        self._seconds = np.concatenate(([0.0], np.cumsum(lengths)))

    def __call__(self, ticks: np.ndarray) -> np.ndarray:
        """Seconds of ticks, of any shape."""
        at = np.searchsorted(self._ticks, ticks, side="right") - 1
        return self._seconds[at] + (ticks - self._ticks[at]) * self._rates[at]


def write_notes(path: str | Path, notes: Notes) -> None:
    """Write a MIDI file of one piano track, times to 0.1 ms, with the pedal; atomically."""
    symusic = _symusic()
    score = symusic.Score(_WRITTEN_TICKS)
    score.tempos.append(symusic.Tempo(0, 120.0))
    track = symusic.Track("piano")

    def tick(second: float) -> int:
        return round(second * 2 * _WRITTEN_TICKS)

    for onset, offset, pitch, velocity in zip(
        notes.onset.tolist(),
        notes.offset.tolist(),
        notes.pitch.tolist(),
        notes.velocity.tolist(),
        strict=True,
    ):
        track.notes.append(symusic.Note(tick(onset), tick(offset) - tick(onset), pitch, velocity))
    for start, end in notes.pedal.tolist():
        track.controls.append(symusic.ControlChange(tick(start), SUSTAIN_PEDAL, 127))
        track.controls.append(symusic.ControlChange(tick(end), SUSTAIN_PEDAL, 0))
    score.tracks.append(track)
    with atomic_path(path) as temporary:
        temporary.write_bytes(score.dumps_midi())


def crop(notes: Notes, start: float, end: float) -> Notes:
    """The notes that begin in a stretch, with times counted from its start.

    What sounds on beyond the end is cut there. Notes that began before are left out: they are not struck in here.

    Args:
        notes: of a whole recording.
        start: seconds; `cut.start`.
        end: seconds, not in the stretch; `cut.end`.
    """
    inside = slice(*np.searchsorted(notes.onset, (start, end)))  # onsets are in order
    pedal = np.clip(notes.pedal - start, 0.0, end - start)
    return make_notes(
        notes.onset[inside] - start,
        np.minimum(notes.offset[inside], end) - start,
        notes.pitch[inside],
        notes.velocity[inside],
        pedal,
    )


def join_notes(first: Notes, second: Notes, seconds: float) -> Notes:
    """Two performances, the second `seconds` later."""
    return make_notes(
        np.concatenate([first.onset, second.onset + seconds]),
        np.concatenate([first.offset, second.offset + seconds]),
        np.concatenate([first.pitch, second.pitch]),
        np.concatenate([first.velocity, second.velocity]),
        np.concatenate([first.pedal, second.pedal + seconds]),
    )


def cut_notes(cut: Cut) -> Notes:
    """The notes of a cut, from the MIDI file that custom["midi"] names, on the cut's own clock.

    Raises:
        UserError: it names none, or one that cannot be read.
    """
    path = (cut.custom or {}).get("midi")
    if not path:
        raise UserError(f"cut '{cut.id}' names no MIDI file: expected its path as custom[\"midi\"]")
    return crop(read_notes(path), cut.start, cut.start + cut.duration)


def sustained(notes: Notes) -> Notes:
    """Notes that last as long as they sound: until the pedal is up too, or their key is struck again.

    The result has no pedal, as it has done its work.
    """
    offset = notes.offset.copy()
    if len(notes.pedal) and len(notes):
        before = np.searchsorted(notes.pedal[:, 0], offset, side="right") - 1  # the last pressed until then
        held = (before >= 0) & (offset < notes.pedal[before, 1])
        released = np.where(held, notes.pedal[before, 1], offset)
        # Per key, the next time it is struck.
        by_key = np.lexsort((notes.onset, notes.pitch))
        struck = np.full(len(notes), np.inf)
        same = notes.pitch[by_key][1:] == notes.pitch[by_key][:-1]
        struck[by_key[:-1][same]] = notes.onset[by_key[1:][same]]
        offset = np.maximum(offset, np.minimum(released, struck))
    return make_notes(notes.onset, offset, notes.pitch, notes.velocity)


class MidiTokenizer:
    """Notes <-> (L, 6) int64 tokens, one row a note in order of time, columns as in `FIELDS`.

    Each field has its own vocabulary: 0 padding, 1 begin, 2 end, 3 mask, then its values. A row is either a note or
    the same special symbol six times.

    Args:
        sustain: let notes last while the pedal is down (see the head of this file).
        max_duration: seconds; notes must begin before.
    """

    def __init__(self, sustain: bool = True, max_duration: int = 60) -> None:
        self.sustain = sustain
        self.max_duration = max_duration
        starts = 1 + _LEVEL_SIZE * (2 ** np.arange(_LEVELS) - 1)
        self._durations = np.concatenate(  # in steps: 1, 2, ... 128, 129, 131, 133, ...
            [start + 2**level * np.arange(_LEVEL_SIZE) for level, start in enumerate(starts)]
        )

    def config(self) -> dict[str, Any]:
        """The arguments that make the same one: for checkpoints."""
        return {"sustain": self.sustain, "max_duration": self.max_duration}

    @property
    def vocab_sizes(self) -> tuple[int, ...]:
        """Ids in each field, the special symbols included."""
        values = (128, 128, len(self._durations), MAX_IOI, STEPS_PER_SECOND, self.max_duration)
        return tuple(NUM_SPECIAL + size for size in values)

    def __call__(self, notes: Notes, add_special: bool = False) -> np.ndarray:
        """Notes -> tokens.

        Args:
            notes: of one cut, times counted from its start: see `crop`.
            add_special: put a begin row in front and an end row behind.

        Returns:
            (L, 6) int64; L is the number of notes, and two more with `add_special`.

        Raises:
            UserError: a note begins before 0 or at `max_duration` or later.
        """
        if self.sustain:
            notes = sustained(notes)
        if len(notes) and not 0 <= notes.onset.min() <= notes.onset.max() < self.max_duration:
            raise UserError(
                f"notes from {notes.onset.min():.2f} to {notes.onset.max():.2f} s, expected 0 to {self.max_duration} s;"
                " crop the performance to the stretch of the cut first"
            )
        tokens = NUM_SPECIAL + self._columns(notes)  # (L, 6)
        if add_special:
            row = np.ones((1, len(FIELDS)), np.int64)
            tokens = np.concatenate([BOS * row, tokens, EOS * row])
        return tokens

    def _columns(self, notes: Notes) -> np.ndarray:
        """Field values: (L, 6) int64, in order of time."""
        last = self.max_duration * STEPS_PER_SECOND - 1
        onset = np.minimum(np.round(notes.onset * STEPS_PER_SECOND).astype(np.int64), last)
        steps = (notes.offset - notes.onset) * STEPS_PER_SECOND
        middles = (self._durations[1:] + self._durations[:-1]) / 2
        duration = np.searchsorted(middles, steps)
        order = np.lexsort((duration, notes.pitch, onset))
        onset = onset[order]
        ioi = np.minimum(np.diff(onset, prepend=onset[:1]), MAX_IOI - 1)
        second, position = np.divmod(onset, STEPS_PER_SECOND)
        columns = (notes.pitch[order], notes.velocity[order], duration[order], ioi, position, second)
        return np.stack(columns, axis=1).astype(np.int64)

    def decode(self, tokens: np.ndarray) -> Notes:
        """Tokens -> notes; special rows are left out, and `ioi` is not looked at.

        Raises:
            UserError: tokens of another shape or out of range, or a row with special symbols and others.
        """
        values = self._values(tokens)
        values = values[values[:, 0] >= 0]
        pitch, velocity, duration, _, position, second = values.T
        onset = second + position * STEP
        return make_notes(onset, onset + self._durations[duration] * STEP, pitch, velocity)

    def times(self, tokens: np.ndarray) -> np.ndarray:
        """Seconds at which the notes begin, on the clock of the cut's audio: (L,) float64, NaN in special rows."""
        values = self._values(tokens)
        return np.where(values[:, 0] >= 0, values[:, 5] + values[:, 4] * STEP, np.nan)

    def frames(self, tokens: np.ndarray, frame_rate: float) -> np.ndarray:
        """The codec frame that each note begins in: (L,) int64, -1 in special rows.

        Args:
            tokens: (L, 6).
            frame_rate: of the codec, Hz.
        """
        times = self.times(tokens)
        # A hair more: 0.3 s at 50 Hz is frame 15, and not 14.999...
        return np.where(np.isnan(times), -1, np.floor(np.nan_to_num(times) * frame_rate + 1e-6)).astype(
            np.int64
        )

    def _values(self, tokens: np.ndarray) -> np.ndarray:
        """(L, 6) ids -> field values, below 0 in special rows; checked."""
        tokens = np.asarray(tokens, np.int64)
        if tokens.ndim != 2 or tokens.shape[1] != len(FIELDS):
            raise UserError(f"MIDI tokens of shape {tokens.shape}, expected (notes, {len(FIELDS)})")
        special = (tokens < NUM_SPECIAL).any(axis=1)
        if (tokens[special] != tokens[special][:, :1]).any():
            raise UserError("MIDI tokens: a row has special symbols and values, expected one or the other")
        wrong = (tokens < 0) | (tokens >= np.array(self.vocab_sizes))
        if wrong.any():
            row, field = np.argwhere(wrong)[0]
            raise UserError(
                f"MIDI tokens: {FIELDS[field]} {tokens[row, field]} in row {row}, expected 0 to"
                f" {self.vocab_sizes[field] - 1}"
            )
        return tokens - NUM_SPECIAL


class BeatTokenizer(MidiTokenizer):
    """The tokens that checkpoints of MIDI-VALLE (arXiv 2507.08530, section 3.1) read: ticks, beats and bars.

    Fields and special symbols are those of `FIELDS`, and their values, from id 4 on, are:

        pitch     MIDI key, 21 to 108; other notes are left out
        velocity  64 levels, two apart, the nearest one
        duration  1 to 1152 ticks, 192 of which are a second: 96 a beat, 120 beats a minute; longer notes are shortened
        ioi       ticks since the note before began, from -384 (never below 0 here) to 383
        position  ticks within the bar, 0 to 383
        second    the bar, of 4 beats: 2 s

    The pedal does not count. Notes are in order of their onsets before these become ticks, then of pitch, then of
    duration.

    Args:
        max_bars: that the model knows; notes must begin before the end of the last.
    """

    TICKS_PER_SECOND = 192
    TICKS_PER_BAR = 384
    MAX_DURATION = 1152  # ticks
    PITCHES = range(21, 109)
    VELOCITIES = np.linspace(0, 127, 65).astype(np.int64)[1:]  # 1, 3, 5, ... 125, 127

    def __init__(self, max_bars: int = 16) -> None:
        super().__init__(sustain=False, max_duration=max_bars * self.TICKS_PER_BAR // self.TICKS_PER_SECOND)
        self.max_bars = max_bars

    def config(self) -> dict[str, Any]:
        """See `make_midi_tokenizer`."""
        return {"name": "midi-valle", "max_bars": self.max_bars}

    @property
    def vocab_sizes(self) -> tuple[int, ...]:
        """Ids in each field, the special symbols included."""
        bar = self.TICKS_PER_BAR
        values = (len(self.PITCHES), len(self.VELOCITIES), self.MAX_DURATION, 2 * bar, bar, self.max_bars)
        return tuple(NUM_SPECIAL + size for size in values)

    def _columns(self, notes: Notes) -> np.ndarray:
        inside = (notes.pitch >= self.PITCHES.start) & (notes.pitch < self.PITCHES.stop)
        order = np.flatnonzero(inside)
        length = notes.offset - notes.onset
        order = order[np.lexsort((length[order], notes.pitch[order], notes.onset[order]))]
        last = self.max_bars * self.TICKS_PER_BAR - 1
        onset = np.minimum(_rounded(notes.onset[order] * self.TICKS_PER_SECOND), last)
        duration = np.clip(_rounded(length[order] * self.TICKS_PER_SECOND), 1, self.MAX_DURATION)
        ioi = np.minimum(np.diff(onset, prepend=onset[:1]), self.TICKS_PER_BAR - 1)
        bar, position = np.divmod(onset, self.TICKS_PER_BAR)
        middles = (self.VELOCITIES[1:] + self.VELOCITIES[:-1]) / 2
        velocity = np.searchsorted(middles, notes.velocity[order], side="right")
        pitch = notes.pitch[order] - self.PITCHES.start
        return np.stack((pitch, velocity, duration - 1, ioi + self.TICKS_PER_BAR, position, bar), axis=1)

    def decode(self, tokens: np.ndarray) -> Notes:
        """Tokens -> notes; special rows are left out, and `ioi` is not looked at.

        Raises:
            UserError: tokens of another shape or out of range, or a row with special symbols and others.
        """
        values = self._values(tokens)
        values = values[values[:, 0] >= 0]
        pitch, velocity, duration, _, position, bar = values.T
        onset = (bar * self.TICKS_PER_BAR + position) / self.TICKS_PER_SECOND
        offset = onset + (duration + 1) / self.TICKS_PER_SECOND
        return make_notes(onset, offset, pitch + self.PITCHES.start, self.VELOCITIES[velocity])

    def times(self, tokens: np.ndarray) -> np.ndarray:
        """Seconds at which the notes begin: (L,) float64, NaN in special rows."""
        values = self._values(tokens)
        ticks = values[:, 5] * self.TICKS_PER_BAR + values[:, 4]
        return np.where(values[:, 0] >= 0, ticks / self.TICKS_PER_SECOND, np.nan)


def _rounded(ticks: np.ndarray) -> np.ndarray:
    """The nearest whole number, the upper one of two; a hair more, as 111.5 may have become 111.4999 in seconds."""
    return np.floor(ticks + 0.5 + 1e-6).astype(np.int64)


def make_midi_tokenizer(config: dict[str, Any]) -> MidiTokenizer:
    """The tokenizer of a checkpoint.

    Args:
        config: what `MidiTokenizer.config` or `BeatTokenizer.config` gave.

    Raises:
        UserError: another one's.
    """
    arguments = {name: value for name, value in config.items() if name != "name"}
    kinds: dict[str, type[MidiTokenizer]] = {"seconds": MidiTokenizer, "midi-valle": BeatTokenizer}
    try:
        return kinds[config.get("name", "seconds")](**arguments)
    except (KeyError, TypeError):
        raise UserError(
            f"no MIDI tokenizer of configuration {config}; there are {', '.join(kinds)}"
        ) from None
