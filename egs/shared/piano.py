"""Performances with their MIDI, to FLAC and lhotse cuts on one clock: stage 1 of the piano recipes.

A recipe lists its `Piece`s; `prepare` converts each recording, or plays the MIDI where there is none, and cuts both
into segments. Time 0 of a recording is time 0 of its MIDI file, so a cut from `start` to `start + duration` takes the
notes of that stretch of the file in `cut.custom["midi"]`.

Each piece leaves a small record beside its audio (data/audio/<id>.json): a killed run goes on where it stopped, and a
changed file, codec or SoundFont is converted anew.
"""

import json
import logging
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from lhotse import Recording, SupervisionSegment
from lhotse.cut import Cut
from lhotse.utils import fastcopy

from valle.codecs import load_codec
from valle.codecs.spectral_codec import SpectralCodecConfig
from valle.data.manifests import (
    SPLITS,
    assign_splits,
    cut_windows,
    file_id,
    make_cut,
    make_recording,
    make_supervision,
    position_of,
    write_audio,
    write_cuts,
    write_jsonl,
    write_manifests,
)
from valle.data.midi import read_notes, sustained
from valle.data.rendering import RATE, Renderer
from valle.utils.audio import convert_audio, load_audio
from valle.utils.errors import UserError
from valle.utils.files import write_json
from valle.utils.progress import progress

logger = logging.getLogger("valle.egs.shared.piano")

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac", ".aif", ".aiff", ".webm")
TAIL = 3.0  # seconds behind the last note that are kept; applause begins later
MAX_SHORTFALL = 2.0  # seconds by which a recording may end before its MIDI file's last note begins
MAX_LAG = 0.1  # seconds between a recording's onsets and its MIDI's
SEARCHED_LAG = 5.0  # seconds to either side in which a recording's own clock is looked for
# Standard deviations by which the best lag must stand out. 32 recordings of a Disklavier have 4.8 to 22 against their
# own MIDI, and 2 to 3.6 played backwards.
CLEAR_LAG = 4.2
ENOUGH_NOTES = 100  # with fewer, no lag stands out
PAUSE = 1.0  # seconds; a cut is longer
HOP = 0.01  # seconds between two onset values
SPLIT_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "dev": "validation"}
SPLIT_NAMES["test"] = "test"
CODEC_SECONDS = {"train": 36000.0, "validation": 900.0}  # at most so much trains the recipe's own codec


@dataclass(frozen=True)
class Piece:
    """One performance.

    Attributes:
        id: identifier that may name a file.
        midi: its MIDI file.
        audio: its recording; None: to be played from the MIDI.
        composition: what every performance of the same piece shares.
        split: train, validation or test; None until assigned.
        performer: pianist, or None.
        custom: what else the cuts shall carry (strings).
    """

    id: str
    midi: Path
    audio: Path | None
    composition: str
    split: str | None
    performer: str | None
    custom: Mapping[str, str]


@dataclass(frozen=True)
class Format:
    """What recordings are converted to, and how long cuts are, in seconds.

    With `check_clock`, recordings whose onsets do not fit their MIDI's are left out.
    """

    sample_rate: int
    channels: int
    min_duration: float
    max_duration: float
    check_clock: bool = True


def audio_format(
    codec: str, train_codec: bool, min_duration: float, max_duration: float, check_clock: bool
) -> Format:
    """The format of a codec's input; with `train_codec`, of the codec that the recipe is going to train.

    Raises:
        UserError: durations that cannot be, or a codec that cannot be had.
    """
    if not PAUSE < min_duration <= max_duration:
        raise UserError(
            f"--min-duration {min_duration:g} and --max-duration {max_duration:g}: expected"
            f" {PAUSE:g} < minimum <= maximum, in seconds"
        )
    if train_codec:
        return Format(SpectralCodecConfig().sample_rate, 1, min_duration, max_duration, check_clock)
    try:
        loaded = load_codec(codec)
    except UserError as error:
        raise UserError(
            f"{error}; or let the recipe train a codec on its own recordings: --train-codec true"
        ) from error
    return Format(loaded.sample_rate, loaded.channels, min_duration, max_duration, check_clock)


def normalized(path: str) -> str:
    """A relative path as names are compared: `/` between folders, composed letters (macOS writes them apart)."""
    return unicodedata.normalize("NFC", path.replace("\\", "/")).strip("/")


class FileIndex:
    """Files below a folder, found by their relative path, by its end, or by their name.

    Args:
        folder: searched with all folders below it.
        suffixes: of the files, in lower case.
    """

    def __init__(self, folder: Path, suffixes: Sequence[str]) -> None:
        self.folder = folder
        self._by_end: dict[str, list[Path]] = defaultdict(list)
        self.count = 0
        for path in sorted(folder.rglob("*")):
            parts = Path(normalized(path.relative_to(folder).as_posix())).with_suffix("").parts
            if path.suffix.lower() in suffixes and not any(part.startswith(".") for part in parts):
                self.count += 1
                for depth in range(len(parts)):
                    self._by_end["/".join(parts[depth:])].append(path)

    def find(self, *names: str) -> list[Path]:
        """The files that the first of `names` with any finds; a name is a path, or its end, without the suffix."""
        for name in names:
            found = self._by_end.get(normalized(name), [])
            if found:
                return found
        return []


def assign_piece_splits(pieces: Sequence[Piece], by: str) -> list[Piece]:
    """Every piece with its split.

    Args:
        by: "metadata": the split that each piece has; "composition": all performances of a composition in one split,
            about 80 / 10 / 10 %; "auto": the metadata's where all pieces have one.

    Raises:
        UserError: "metadata" where a piece has none, or a split of another name.
    """
    named = [piece for piece in pieces if piece.split]
    if by == "metadata" and len(named) < len(pieces):
        lacking = next(piece for piece in pieces if not piece.split)
        raise UserError(
            f"--split-by metadata: piece '{lacking.id}' has no split in the metadata; take --split-by composition"
        )
    if by == "metadata" or (by == "auto" and len(named) == len(pieces)):
        for piece in pieces:
            if str(piece.split).lower() not in SPLIT_NAMES:
                raise UserError(
                    f"piece '{piece.id}': split '{piece.split}' in the metadata, expected one of"
                    f" {', '.join(SPLIT_NAMES)}"
                )
        return [replace(piece, split=SPLIT_NAMES[str(piece.split).lower()]) for piece in pieces]
    splits = assign_splits(sorted({piece.composition for piece in pieces}))
    return [replace(piece, split=splits[piece.composition]) for piece in pieces]


def limit_pieces(pieces: Sequence[Piece], limit: int) -> list[Piece]:
    """`limit` pieces, about a tenth of them (one at least) from validation and from test; all for 0.

    Raises:
        UserError: fewer than one a split.
    """
    if limit == 0:
        return list(pieces)
    if limit < len(SPLITS):
        raise UserError(
            f"--limit is {limit}, expected 0 (no limit) or at least {len(SPLITS)}: one piece a split"
        )
    held_out = max(1, round(limit / 10))
    quota = {"train": limit - 2 * held_out, "validation": held_out, "test": held_out}
    chosen = set()
    for split, count in quota.items():
        members = sorted(
            (piece.id for piece in pieces if piece.split == split), key=lambda name: position_of(name)
        )
        chosen.update(members[:count])
    return [piece for piece in pieces if piece.id in chosen]


def prepare(
    pieces: Sequence[Piece],
    corpus: str,
    data_dir: Path,
    target: Format,
    renderer: Renderer | None,
    jobs: int,
    skipped: list[dict[str, str]],
    known: Collection[str],
) -> None:
    """Write data/audio and data/manifests.

    Args:
        pieces: with splits.
        corpus: begins the manifests' names.
        target: of the recordings and cuts.
        renderer: plays what has no recording; None where every piece has one.
        jobs: pieces that are converted at the same time.
        skipped: {"id", "reason"} of what was left out before; what is left out here is added.
        known: ids of all pieces of the corpus: the audio of others is deleted.

    Raises:
        UserError: no piece can be used.
    """
    repeated = [name for name, count in Counter(piece.id for piece in pieces).items() if count > 1]
    if repeated:
        raise UserError(f"piece id '{repeated[0]}' occurs twice in the metadata")
    made_by = renderer.signature() if renderer else {}
    output = data_dir / "audio"
    output.mkdir(parents=True, exist_ok=True)

    def convert(piece: Piece) -> dict[str, Any]:
        return survey(piece, output, target, renderer, made_by)

    recordings: list[Recording] = []
    supervisions: list[SupervisionSegment] = []
    cuts: list[Cut] = []
    first = len(skipped)
    pool = ThreadPoolExecutor(max(1, jobs))
    try:
        for piece, record in progress(
            zip(pieces, pool.map(convert, pieces), strict=True),
            desc="pieces",
            unit="piece",
            total=len(pieces),
        ):
            if record["reason"] is not None:
                skipped.append({"id": piece.id, "reason": record["reason"]})
                continue
            recording, supervision = describe(piece, record, output, target)
            recordings.append(recording)
            supervisions.append(supervision)
            cuts += segments(piece, record, recording, supervision, target)
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupted run must not go on with thousands of pieces
    write_jsonl(data_dir / "manifests" / "skipped.jsonl", skipped)
    if not cuts:
        reason = f"; the first: {skipped[first]['id']}: {skipped[first]['reason']}" if skipped[first:] else ""
        raise UserError(f"none of the {len(pieces)} pieces can be used{reason}")
    write_cuts(data_dir / "manifests" / "cuts_codec.jsonl.gz", codec_cuts(recordings, supervisions))
    write_manifests(data_dir / "manifests", corpus, recordings, supervisions, cuts)
    remove_stale(output, known)
    log_splits(cuts)
    if skipped:
        logger.warning(
            "left out %d pieces; reasons in %s", len(skipped), data_dir / "manifests" / "skipped.jsonl"
        )


def survey(
    piece: Piece, output: Path, target: Format, renderer: Renderer | None, made_by: Mapping[str, str]
) -> dict[str, Any]:
    """A piece's record: its length in samples, lag and note times, or the reason why it cannot be used.

    Converts or plays it only when there is no record of it as it is now.
    """
    record_path, audio_path = output / f"{piece.id}.json", output / f"{piece.id}.flac"
    try:
        now = {
            "midi": _state(piece.midi),
            "audio": _state(piece.audio) if piece.audio else dict(made_by),
            "sample_rate": target.sample_rate,
            "channels": target.channels,
            "check_clock": target.check_clock,
        }
    except OSError as error:
        return {"reason": f"cannot be read ({error.strerror})"}
    try:
        record = json.loads(record_path.read_text())
        if all(record[key] == value for key, value in now.items()) and (
            record["reason"] is not None or audio_path.is_file()
        ):
            return record
    except (OSError, ValueError, KeyError, TypeError):
        pass
    record_path.unlink(missing_ok=True)
    try:
        onsets, end = note_times(piece.midi)
        if piece.audio is None:
            if renderer is None:
                raise UserError("has no recording")
            wav, sample_rate = renderer.render(piece.midi), RATE
        else:
            wav, sample_rate = load_audio(piece.audio)
        wav = convert_audio(wav, sample_rate, target.sample_rate, target.channels)  # (C, N)
        if not wav.any():
            raise UserError("the recording is silent")
        kept = min(wav.shape[1], round((end + TAIL) * target.sample_rate))
        wav = wav[:, :kept]
        checked = piece.audio is not None and target.check_clock
        lag = checked_lag(wav, target.sample_rate, onsets) if checked else None
        write_audio(audio_path, wav, target.sample_rate)
    except UserError as error:
        record = {**now, "reason": str(error)}
        audio_path.unlink(missing_ok=True)
    else:
        record = {
            **now,
            "reason": None,
            "num_samples": wav.shape[1],
            "lag": lag,
            # what the cuts need of the notes, so that a second run reads no MIDI
            "played": played_stretches(onsets),
        }
    write_json(record_path, record)
    return record


def _state(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"path": str(path.resolve()), "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def note_times(midi: Path) -> tuple[np.ndarray, float]:
    """Onsets in seconds, (L,), in order; and the second at which the last note, held by the pedal, ends.

    Raises:
        UserError: no MIDI file, or one without notes.
    """
    notes = sustained(read_notes(midi))
    if not len(notes):
        raise UserError(f"MIDI file '{midi.name}' has no notes")
    return notes.onset, notes.duration


def played_stretches(onsets: np.ndarray) -> list[tuple[float, float]]:
    """From which onset to which there is no pause of over `PAUSE` seconds, to milliseconds.

    A window of more than `PAUSE` seconds that touches a stretch has an onset.
    """
    ends = np.flatnonzero(np.diff(onsets) > PAUSE)
    first, last = np.append(0, ends + 1), np.append(ends, len(onsets) - 1)
    return [
        (round(float(onsets[a]), 3), round(float(onsets[b]), 3)) for a, b in zip(first, last, strict=True)
    ]


def checked_lag(wav: np.ndarray, sample_rate: int, onsets: np.ndarray) -> float | None:
    """Seconds by which a recording (C, N) runs behind its MIDI's onsets; None where too few notes tell.

    Raises:
        UserError: the recording ends too early, or runs on another clock: it is of another performance, or cut
            otherwise.
    """
    duration = wav.shape[1] / sample_rate
    if duration < onsets[-1] - MAX_SHORTFALL:
        raise UserError(
            f"the recording lasts {duration:.1f} s, but the last note of its MIDI begins at {onsets[-1]:.1f} s:"
            " another performance?"
        )
    lag, clearness = find_lag(wav, sample_rate, onsets)
    if clearness < CLEAR_LAG:
        if len(onsets) < ENOUGH_NOTES:
            return None
        raise UserError(
            f"the recording's onsets do not fit its MIDI's, shifted by up to {SEARCHED_LAG:g} s either way: another"
            " performance?"
        )
    if abs(lag) > MAX_LAG:
        raise UserError(
            f"the recording runs {abs(lag):.2f} s {'behind' if lag > 0 else 'ahead of'} its MIDI; cut or pad its"
            " beginning so that both start together"
        )
    return round(lag, 3)


def find_lag(wav: np.ndarray, sample_rate: int, onsets: np.ndarray) -> tuple[float, float]:
    """Where a recording's onsets fit its MIDI's best.

    The rise of the spectrum (log magnitudes, summed over frequency) every 10 ms, correlated with a pulse at each
    onset.

    Args:
        wav: (C, N).
        onsets: (L,) seconds.

    Returns:
        The lag of the recording behind the MIDI in seconds, and by how many standard deviations of the correlation
        over all searched lags it stands out.
    """
    rise = onset_strength(wav, sample_rate)  # (F,)
    reach = round(SEARCHED_LAG / HOP)
    pulses = np.zeros(len(rise) + 2 * reach)
    places = np.round(onsets / HOP).astype(int) + reach
    np.add.at(pulses, places[places < len(pulses)], 1.0)
    pulses = np.minimum(pulses, 3.0)
    size = 1 << int(np.ceil(np.log2(len(pulses) + len(rise))))
    centered = rise - rise.mean()
    product = np.fft.rfft(pulses, size).conj() * np.fft.rfft(np.pad(centered, (reach, 0)), size)
    around = np.roll(np.fft.irfft(product, size), reach)[: 2 * reach + 1]  # lags -reach .. reach
    best = int(around.argmax())
    clearness = (around[best] - around.mean()) / (around.std() + 1e-12)
    return (best - reach) * HOP, float(clearness)


def onset_strength(wav: np.ndarray, sample_rate: int) -> np.ndarray:
    """(C, N) -> (F,): how much the spectrum rises at time f · HOP."""
    mono = wav.mean(axis=0)
    hop = round(HOP * sample_rate)
    window = np.hanning(4 * hop).astype(np.float32)
    padded = np.pad(mono, (2 * hop, 4 * hop))
    rises = []
    previous = None
    block = 8192  # frames at a time: an hour's spectrogram would take gigabytes
    frames = len(mono) // hop + 1
    for first in range(0, frames, block):
        count = min(block, frames - first)
        view = np.lib.stride_tricks.sliding_window_view(padded[first * hop :], len(window))[::hop][:count]
        levels = np.log1p(1000 * np.abs(np.fft.rfft(view * window, axis=1)) / len(window))
        before = levels[:1] if previous is None else previous
        rises.append(np.maximum(np.diff(np.concatenate([before, levels]), axis=0), 0).sum(axis=1))
        previous = levels[-1:]
    return np.concatenate(rises)


def describe(
    piece: Piece, record: Mapping[str, Any], output: Path, target: Format
) -> tuple[Recording, SupervisionSegment]:
    """The recording of a whole performance."""
    shape = (target.channels, record["num_samples"])
    recording = make_recording(piece.id, output / f"{piece.id}.flac", shape, target.sample_rate)
    return recording, make_supervision(recording, None, piece.performer, None, str(piece.split))


def segments(
    piece: Piece,
    record: Mapping[str, Any],
    recording: Recording,
    supervision: SupervisionSegment,
    target: Format,
) -> Iterator[Cut]:
    """Each segment twice: as "audio" for an AudioLM, as "utterance" for a model that reads its MIDI."""
    limits = (target.min_duration, target.max_duration)
    windows = cut_windows(record["num_samples"], target.sample_rate, *limits, key=piece.id)
    custom = {
        "midi": str(piece.midi.resolve()),
        "composition": piece.composition,
        "rendered": piece.audio is None,
        **piece.custom,
    }
    for number, window in enumerate(windows, start=1):
        start, duration = window.start / target.sample_rate, len(window) / target.sample_rate
        if not any(first < start + duration and last >= start for first, last in record["played"]):
            continue  # nobody strikes a key
        for kind, suffix in (("audio", ""), ("utterance", "-midi")):
            cut = make_cut(recording, supervision, kind, f"{piece.id}-{number:04d}{suffix}", custom)
            segment = fastcopy(supervision, id=cut.id, start=0.0, duration=duration)
            yield fastcopy(cut, start=start, duration=duration, supervisions=[segment])


def codec_cuts(recordings: Sequence[Recording], supervisions: Sequence[SupervisionSegment]) -> Iterator[Cut]:
    """Whole recordings of train and validation, as much as a codec's training holds in memory."""
    taken: Counter[str] = Counter()
    pairs = sorted(
        zip(recordings, supervisions, strict=True), key=lambda pair: position_of(f"codec {pair[0].id}")
    )
    for recording, supervision in pairs:
        split = (supervision.custom or {})["split"]
        if split in CODEC_SECONDS and taken[split] < CODEC_SECONDS[split]:
            taken[split] += recording.duration
            yield make_cut(recording, supervision, "audio")


def remove_stale(output: Path, known: Collection[str]) -> None:
    """Delete audio and records of pieces that the corpus does not have. Those beyond a --limit stay for later."""
    for path in [*output.glob("*.flac"), *output.glob("*.json")]:
        if path.stem not in known:
            path.unlink()


def log_splits(cuts: Sequence[Cut]) -> None:
    """One line a split."""
    for split in SPLITS:
        mine = [cut for cut in cuts if (cut.custom or {})["split"] == split and cut.custom["kind"] == "audio"]
        logger.info(
            "%s: %d compositions, %d cuts, %.1f min",
            *(split, len({cut.custom["composition"] for cut in mine}), len(mine)),
            sum(cut.duration for cut in mine) / 60,
        )


def piece_id(corpus: str, name: str) -> str:
    """An identifier for a piece of a corpus."""
    return f"{corpus}-{file_id(name)}"
