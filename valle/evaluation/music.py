"""How well the notes of piano audio are those that were played: transcription, and F1 of onsets, offsets, velocities.

`transcribe` hears notes with Basic Pitch (Bittner et al., arXiv 2203.09893), a small network whose weights come in the
PyPI package `basic-pitch` (Apache-2.0). Only these are used, run by onnxruntime: the package itself would need
TensorFlow. What becomes of the network's two maps (a key is heard; a key is struck) is decided here, more simply than
there: peaks of the second are onsets, and a note lasts while the first stays up. On 30 s each of 32 recordings of a
real piano (MAPS) that gives F1 .76 of onsets and .33 with offsets. So a perfect recording is far from 1, and a figure
means something only beside those of the recording and of its resynthesis.

`NoteF1` (package `mir_eval`: Raffel et al., ISMIR 2014; with velocities: Hawthorne et al., arXiv 1710.11153) asks note
by note, and so suits audio that should be the same performance. `NoteProfile` asks whether a continuation plays notes
of the same kind, whenever they come (shared areas of histograms, as Yang & Lerch, Neural Computing and Applications 32,
2020, compare sets of pieces).
"""

import importlib.util
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from valle.data.midi import Notes, make_notes, sustained
from valle.evaluation.metrics import Case, Excerpt, install_hint
from valle.evaluation.signal import converted
from valle.utils.errors import UserError

RATE = 22050  # Hz that the network hears
HOP = 256  # samples a frame
WINDOW = 43844  # samples that it hears at once: 172 frames, centred on multiples of HOP
KEPT, MARGIN = 140, 16  # frames of a window that are used, and those before them that are not
LOWEST = 21  # MIDI key of the first of 88 columns

ONSET = 0.6  # of the onset map at a peak
SOUNDING = 0.3  # of the note map while a note lasts
GAP = 5  # frames below it that end a note
SHORTEST = 5  # frames of a note that counts; 58 ms
OCTAVE = 0.75  # of a note's mean in the note map: an octave above it, struck with it, must reach so much
TOGETHER = 2  # frames that notes struck together begin apart
LOUDNESS_SECONDS = 0.1  # from an onset on, in which its loudest frame gives the velocity

CHORD = 0.03  # seconds between onsets that are one chord
MOST_OCTAVES = 10.0  # of a difference in density: silence has no end

F1_KEYS = {"onset_f1": "higher", "offset_f1": "higher", "velocity_f1": "higher"}
PROFILE_KEYS = {
    "pitch_class_overlap": "higher",
    "pitch_overlap": "higher",
    "ioi_overlap": "higher",
    "density_error": "lower",
}


def notes_missing() -> str | None:
    """None where notes can be heard and compared, else what to install."""
    hint = install_hint("note F1", ("onnxruntime", "mir_eval"), "'valle[eval]'")
    # without what the package depends on: only its weights are used
    return hint or install_hint("transcription", ("basic_pitch",), "--no-deps basic-pitch")


def transcribe(audio: Excerpt) -> Notes:
    """The notes that are heard in piano audio.

    Onsets and offsets are on a grid of 11.6 ms, of a long recording as well. Velocities are coarse: the loudness of the
    whole audio at the onset, 127 · (RMS of full scale)^½ as if velocity v played at 40 log10(v / 127) dB.

    Args:
        audio: (C, N) at any rate; mixed to mono.

    Returns:
        no pedal: offsets are where a note is no longer heard.

    Raises:
        UserError: a package is not installed.
    """
    return _transcribed(converted(audio, RATE, 1).tobytes())


@lru_cache(maxsize=16)  # the same audio is asked for by each metric, and the reference under each condition
def _transcribed(data: bytes) -> Notes:
    """Mono float32 samples at `RATE` -> notes."""
    wav = np.frombuffer(data, np.float32)
    columns = note_spans(*_activations(wav))  # (N, 3)
    onset, offset = columns[:, 0] * HOP, columns[:, 1] * HOP  # samples
    velocity = [_velocity(wav[start : start + round(LOUDNESS_SECONDS * RATE)]) for start in onset]
    return make_notes(onset / RATE, offset / RATE, columns[:, 2], velocity)


def note_spans(sounding: np.ndarray, beginning: np.ndarray) -> np.ndarray:
    """What the network's maps say, as notes.

    Args:
        sounding: (T, K) 0 to 1, that a key is heard.
        beginning: (T, K) 0 to 1, that it was struck in this frame.

    Returns:
        (N, 3) int64 first frame, frame after the last, MIDI key. A key's notes do not overlap: one ends when the next
        begins, or where it is not heard for `GAP` frames.
    """
    struck = np.zeros(beginning.shape, bool)
    middle = beginning[1:-1]
    struck[1:-1] = (middle > beginning[:-2]) & (middle >= beginning[2:]) & (middle >= ONSET)
    spans: list[tuple[int, int, int]] = []
    for key in np.flatnonzero(struck.any(axis=0)):
        starts = np.flatnonzero(struck[:, key])
        for start, stop in zip(starts, [*starts[1:], len(sounding)], strict=True):
            heard = np.flatnonzero(sounding[start:stop, key] >= SOUNDING)  # frames after the onset
            breaks = np.flatnonzero(np.diff(heard, prepend=-1) > GAP)
            heard = heard[: breaks[0]] if len(breaks) else heard
            if len(heard) and heard[-1] + 1 >= SHORTEST:
                spans.append((int(start), int(start + heard[-1] + 1), LOWEST + int(key)))
    return _without_overtones(np.array(spans, np.int64).reshape(-1, 3), sounding)


def _without_overtones(spans: np.ndarray, sounding: np.ndarray) -> np.ndarray:
    """Notes without those that are the second harmonic of another, as `note_spans`. On MAPS: onset F1 .757 -> .766."""
    means = np.array([sounding[start:stop, key - LOWEST].mean() for start, stop, key in spans])
    kept = []
    for (start, _, key), mean in zip(spans, means, strict=True):
        below = (spans[:, 2] == key - 12) & (np.abs(spans[:, 0] - start) <= TOGETHER)
        kept.append(not (means[below] * OCTAVE > mean).any())
    return spans[np.array(kept, bool)]


def _activations(wav: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) at `RATE` -> the maps `sounding` and `beginning`, (T, 88); frame t is centred on sample t · HOP."""
    session = _session()
    frames = len(wav) // HOP + 1
    maps: list[list[np.ndarray]] = []
    for first in range(0, frames, KEPT):
        # Whole frames from window to window: no drift, as there would be with windows of a length of their own.
        begin = (first - MARGIN) * HOP
        window = np.zeros(WINDOW, np.float32)
        inside = slice(max(begin, 0), min(begin + WINDOW, len(wav)))
        window[inside.start - begin : inside.stop - begin] = wav[inside]
        names = ["StatefulPartitionedCall:1", "StatefulPartitionedCall:2"]
        outputs = session.run(
            names, {"serving_default_input_2:0": window[None, :, None]}
        )  # (1, 172, 88) each
        maps.append([output[0, MARGIN : MARGIN + KEPT] for output in outputs])
    sounding, beginning = (np.concatenate(parts)[:frames] for parts in zip(*maps, strict=True))
    return sounding, beginning


def _velocity(wav: np.ndarray) -> int:
    """MIDI velocity of a note from the samples after its onset."""
    blocks = wav[: max(len(wav) // HOP, 1) * HOP].reshape(-1, HOP) if len(wav) >= HOP else wav[None]
    loudness = float(np.sqrt((blocks.astype(np.float64) ** 2).mean(axis=1).max())) if wav.size else 0.0
    return int(np.clip(round(127 * loudness**0.5), 1, 127))


@cache
def _session() -> Any:
    hint = notes_missing()
    if hint:
        raise UserError(hint)
    import onnxruntime

    # Found without importing the package, which would warn about each engine it misses.
    spec = importlib.util.find_spec("basic_pitch")
    assert spec is not None and spec.origin is not None
    weights = Path(spec.origin).parent / "saved_models" / "icassp_2022" / "nmp.onnx"
    options = onnxruntime.SessionOptions()
    # One thread: enough for 60 times real time, and the sums are then always taken in the same order.
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(weights), options, providers=["CPUExecutionProvider"])


def note_f1(reference: Notes, estimate: Notes) -> dict[str, float | None]:
    """How many notes of two lists are the same: F1 of three kinds, 0 to 1.

    Args:
        reference: what was played; its pedal lengthens notes.
        estimate: what is judged.

    Returns:
        `onset_f1`: same key, onset within 50 ms; `offset_f1`: also the offset, within 50 ms or a fifth of the note's
        length; `velocity_f1`: also the velocity, within a tenth of the reference's range after the best linear
        scaling. All None where the reference has no notes.
    """
    from mir_eval import transcription, transcription_velocity

    if not len(reference) or not len(estimate):
        return dict.fromkeys(F1_KEYS, 0.0 if len(reference) else None)
    true, found = _columns(reference), _columns(estimate)
    timed = (true[0], true[1], found[0], found[1])
    scores = [
        transcription.precision_recall_f1_overlap(*timed, offset_ratio=None),
        transcription.precision_recall_f1_overlap(*timed),
        transcription_velocity.precision_recall_f1_overlap(*true, *found),
    ]
    return {key: float(score[2]) for key, score in zip(F1_KEYS, scores, strict=True)}


def _columns(notes: Notes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Notes as mir_eval takes them: (N, 2) seconds, (N,) Hz, (N,) velocity."""
    notes = sustained(notes)
    onset = np.maximum(notes.onset, 0.0)
    offset = np.maximum(notes.offset, onset + 0.01)  # it refuses notes of no length
    return np.stack([onset, offset], axis=1), 440.0 * 2.0 ** ((notes.pitch - 69) / 12.0), notes.velocity


def note_profile(
    reference: Notes, estimate: Notes, reference_seconds: float, estimate_seconds: float
) -> dict[str, float | None]:
    """Whether two performances play notes of the same kind.

    Args:
        reference: what was played.
        estimate: what is judged.
        reference_seconds, estimate_seconds: durations of the two.

    Returns:
        `pitch_class_overlap`, `pitch_overlap` and `ioi_overlap`: the part that two histograms share, 0 to 1, of the
        twelve pitch classes, of the keys (four a bin), and of the seconds from a chord to the next (half an octave a
        bin); 0 where nothing is heard. `density_error`: how many more or fewer notes a second, in octaves: 1 is twice
        or half as many; at most `MOST_OCTAVES`. All None where the reference has no notes, and the third where it has
        but one chord.
    """
    if not len(reference):
        return dict.fromkeys(PROFILE_KEYS)
    density_error = MOST_OCTAVES
    if len(estimate):
        counts = len(estimate) / len(reference), estimate_seconds / reference_seconds
        density_error = min(abs(float(np.log2(counts[0] / counts[1]))), MOST_OCTAVES)
    gaps = _gaps(reference)
    return {
        "pitch_class_overlap": _overlap(reference.pitch % 12, estimate.pitch % 12),
        "pitch_overlap": _overlap(reference.pitch // 4, estimate.pitch // 4),
        "ioi_overlap": _overlap(gaps, _gaps(estimate)) if len(gaps) else None,
        "density_error": density_error,
    }


def _gaps(notes: Notes) -> np.ndarray:
    """Bins of the seconds between chords, half an octave each."""
    seconds = np.diff(notes.onset)
    return np.floor(2 * np.log2(seconds[seconds > CHORD])).astype(np.int64)


def _overlap(one: np.ndarray, two: np.ndarray) -> float:
    """Shared part of the histograms of two lists of bins."""
    if not len(one) or not len(two):
        return 0.0
    bins = np.union1d(one, two)
    shares = [(values[:, None] == bins).mean(axis=0) for values in (one, two)]
    return float(np.minimum(*shares).sum())


class NoteF1:
    """Note by note, against the notes that are known, or else against those heard in the true recording."""

    name, task, keys = "notes", "music", F1_KEYS

    def missing(self) -> str | None:
        return notes_missing()

    def applies(self, case: Case) -> bool:
        return case.notes is not None or case.text is None

    def __call__(self, audio: Excerpt, case: Case) -> dict[str, float | None]:
        reference = transcribe(case.reference) if case.notes is None else case.notes
        return note_f1(reference, transcribe(audio))


class NoteProfile:
    """Kinds of notes and their density, as heard in the audio, against those heard in the true recording.

    Both are transcribed, also where the notes are known: so what the transcription misses, it misses in both.
    """

    name, task, keys = "note_profile", "music", PROFILE_KEYS

    def missing(self) -> str | None:
        return notes_missing()

    def applies(self, case: Case) -> bool:
        return case.notes is not None or case.text is None

    def __call__(self, audio: Excerpt, case: Case) -> dict[str, float | None]:
        durations = (max(part.wav.shape[-1], 1) / part.sample_rate for part in (case.reference, audio))
        return note_profile(transcribe(case.reference), transcribe(audio), *durations)
