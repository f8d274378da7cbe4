"""Manifests: from audio files to lhotse recordings, supervisions and cuts. Stage 1 of every recipe, and stage 3.

Nothing here knows a corpus. What is written again with the same content is left alone, byte and time stamp, so that
running a stage twice changes nothing.
"""

import gzip
import hashlib
import io
import json
import logging
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from lhotse import CutSet, Recording, RecordingSet, SupervisionSegment, SupervisionSet
from lhotse.audio import AudioSource
from lhotse.cut import Cut
from lhotse.qa import validate_recordings_and_supervisions
from lhotse.utils import fastcopy

from valle.utils.errors import UserError
from valle.utils.files import atomic_path

log = logging.getLogger(__name__)
SPLITS = ("train", "validation", "test")
VALIDATION_PART = 0.1
TEST_PART = 0.1
TEXT_TOKENS_FILE = "text_tokens.jsonl.gz"  # of valle.data.text
MAX_ID_BYTES = 150  # of the 255 that a file name may have: a digest and suffixes are added


def split_of(key: str) -> str:
    """The split that `key` falls in: always the same one, about 80 % train, 10 % validation, 10 % test."""
    place = position_of(key)
    if place < 1.0 - VALIDATION_PART - TEST_PART:
        return "train"
    return "validation" if place < 1.0 - TEST_PART else "test"


def position_of(key: str) -> float:
    """A number in [0, 1) that depends on `key` only, evenly spread over keys (SHA-1)."""
    return int(hashlib.sha1(key.encode()).hexdigest()[:12], 16) / 16**12


def assign_splits(keys: Sequence[str]) -> dict[str, str]:
    """`split_of` for every key, but with three keys or more no split stays empty.

    An empty split takes the key that sorts first (by its hash) from the fullest one.
    """
    splits = {key: split_of(key) for key in keys}
    if len(splits) < len(SPLITS):
        return splits
    for split in SPLITS:
        counts = Counter(splits.values())
        if counts[split] == 0:
            fullest = max(SPLITS, key=lambda name: counts[name])
            moved = min((key for key in splits if splits[key] == fullest), key=position_of)
            splits[moved] = split
    return splits


def normalize_text(text: str) -> str:
    """Sentence identity: case, punctuation and spaces do not count. May be empty."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded))


def cut_windows(
    num_samples: int, sample_rate: int, min_duration: float, max_duration: float, key: str
) -> list[range]:
    """Cut a long recording into consecutive pieces.

    Args:
        num_samples: length of the recording, in samples.
        sample_rate: Hz.
        min_duration: no piece is shorter, in seconds.
        max_duration: no piece is longer, in seconds.
        key: seed of the random lengths, which are spread evenly between the two.

    Returns:
        Sample ranges in order. They cover the recording; only where that cannot be done (shorter than
        `min_duration`, or `max_duration` below twice the minimum) its end is left out. [] when it is too short.
    """
    shortest = int(np.ceil(min_duration * sample_rate))
    longest = int(np.floor(max_duration * sample_rate))
    draw = random.Random(key)
    windows = []
    start = 0
    while num_samples - start > longest:
        # The rest must still hold one whole piece.
        length = draw.randint(shortest, max(shortest, min(longest, num_samples - start - shortest)))
        windows.append(range(start, start + length))
        start += length
    if num_samples - start >= shortest:
        windows.append(range(start, num_samples))
    return windows


def join_groups(
    durations: Sequence[float],
    min_duration: float,
    max_duration: float,
    pause: float,
    key: str,
    spread: bool = True,
) -> list[list[int]]:
    """Group neighbouring clips so that each group, joined, lasts `min_duration` to `max_duration` seconds.

    Group lengths are drawn evenly between the two (seed `key`); without `spread`, a group ends as soon as it is long
    enough, so that a long clip stays alone where no short one stands before it. Every clip is in exactly one group, in
    order. Where clip borders do not allow it (one clip is longer than `max_duration`), a group lasts longer and is to
    be cut with `cut_windows`; when all clips together are too short, the only group is.

    Args:
        durations: seconds of each clip.
        pause: seconds of silence between two clips of a group.

    Returns:
        Indices of each group's clips.
    """

    def total(group: Sequence[int]) -> float:
        return sum(durations[index] for index in group) + pause * (len(group) - 1)

    draw = random.Random(key)
    longest = max_duration if spread else min_duration
    groups: list[list[int]] = []
    current: list[int] = []
    wanted = draw.uniform(min_duration, longest)
    for index in range(len(durations)):
        if current and total(current) >= min_duration and total([*current, index]) > max_duration:
            groups.append(current)
            current, wanted = [], draw.uniform(min_duration, longest)
        current.append(index)
        if total(current) >= wanted:
            groups.append(current)
            current, wanted = [], draw.uniform(min_duration, longest)
    if current and groups and total(current) < min_duration:
        rest = groups.pop() + current
        borders = [
            at for at in range(1, len(rest)) if min(total(rest[:at]), total(rest[at:])) >= min_duration
        ]
        fitting = [at for at in borders if max(total(rest[:at]), total(rest[at:])) <= max_duration]
        if total(rest) > max_duration and fitting:
            groups.extend([rest[: fitting[0]], rest[fitting[0] :]])
        else:
            groups.append(rest)
    elif current:
        groups.append(current)
    return groups


def file_id(name: str) -> str:
    """A relative path without its suffix as an identifier that may name a file: letters of any script, digits, .-_"""
    clean = re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFC", name)).strip("_.") or "_"
    if len(clean.encode()) <= MAX_ID_BYTES:
        return clean
    start = clean.encode()[: MAX_ID_BYTES - 9].decode(errors="ignore")
    return f"{start}-{hashlib.sha1(clean.encode()).hexdigest()[:8]}"


def write_audio(path: Path, wav: np.ndarray, sample_rate: int) -> None:
    """Write (C, N) audio, float or int16, as 16-bit FLAC, atomically, unless the same audio is there already."""
    buffer = io.BytesIO()
    samples = wav if wav.dtype == np.int16 else np.clip(wav, -1.0, 1.0)
    soundfile.write(buffer, samples.T, sample_rate, format="FLAC", subtype="PCM_16")
    write_bytes(path, buffer.getvalue())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically, unless it has this content already."""
    if path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
        return
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_jsonl(path: Path, items: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines, gzipped when the name ends so; the same items give the same bytes."""
    lines = "".join(json.dumps(item, ensure_ascii=False, allow_nan=False) + "\n" for item in items)
    content = lines.encode()
    # No time stamp in the gzip header.
    write_bytes(path, gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def write_cuts(path: Path, cuts: Iterable[Cut]) -> None:
    """Write cuts as a lhotse manifest that `CutSet.from_file` reads."""
    write_jsonl(path, (cut.to_dict() for cut in cuts))


def read_manifest(path: Path) -> CutSet:
    """Read cuts into memory.

    Raises:
        UserError: no such file, or it holds something else.
    """
    return CutSet.from_cuts(stream_manifest(path))


def stream_manifest(path: Path) -> Iterator[Cut]:
    """Read cuts one after the other, for manifests that memory would not hold.

    Raises:
        UserError: no such file, or it holds something else.
    """
    if not path.is_file():
        raise UserError(f"manifest '{path}' does not exist; run the stage of prepare.sh that writes it")
    try:
        for cut in CutSet.from_file(path) or ():  # lhotse gives None for a file without lines
            if not isinstance(cut, Cut):
                raise TypeError(f"it holds a {type(cut).__name__}")
            yield cut
    except Exception as error:  # lhotse and gzip raise a dozen kinds for what is not a manifest
        raise UserError(
            f"'{path}' is no manifest of lhotse cuts ({type(error).__name__}: {error})"
        ) from error


def make_recording(recording_id: str, path: Path, wav_shape: tuple[int, ...], sample_rate: int) -> Recording:
    """A recording of one file.

    Args:
        wav_shape: (C, N) of the file.
    """
    channels, num_samples = wav_shape
    return Recording(
        id=recording_id,
        sources=[AudioSource(type="file", channels=list(range(channels)), source=str(path.resolve()))],
        sampling_rate=sample_rate,
        num_samples=num_samples,
        duration=num_samples / sample_rate,
    )


def make_supervision(
    recording: Recording, text: str | None, speaker: str | None, language: str | None, split: str
) -> SupervisionSegment:
    """A supervision over a whole recording, with the recording's id."""
    channels = recording.channel_ids or [0]
    return SupervisionSegment(
        id=recording.id,
        recording_id=recording.id,
        start=0.0,
        duration=recording.duration,
        channel=channels[0] if len(channels) == 1 else channels,
        text=text,
        speaker=speaker,
        language=language,
        custom={"split": split},
    )


def make_cut(
    recording: Recording,
    supervision: SupervisionSegment,
    kind: str,
    cut_id: str | None = None,
    custom: Mapping[str, Any] | None = None,
) -> Cut:
    """A cut over a whole recording. `kind` is "audio" (for AudioLM) or "utterance" (one clip and its text)."""
    cut = recording.to_cut()
    cut.id = cut_id or recording.id
    cut.supervisions = [supervision]
    split = (supervision.custom or {})["split"]
    cut.custom = {"split": split, "kind": kind, **(custom or {})}
    return cut


def write_manifests(
    folder: Path,
    corpus: str,
    recordings: Sequence[Recording],
    supervisions: Sequence[SupervisionSegment],
    cuts: Sequence[Cut],
) -> None:
    """Validate and write <corpus>_recordings, <corpus>_supervisions and cuts_all (.jsonl.gz)."""
    validate_recordings_and_supervisions(
        RecordingSet.from_recordings(recordings), SupervisionSet.from_segments(supervisions)
    )
    for what, ids in (("recording", [item.id for item in recordings]), ("cut", [item.id for item in cuts])):
        repeated = [item_id for item_id, count in Counter(ids).items() if count > 1]
        if repeated:
            raise UserError(f"{what} id '{repeated[0]}' occurs twice; rename one of its source files")
    write_jsonl(folder / f"{corpus}_recordings.jsonl.gz", (item.to_dict() for item in recordings))
    write_jsonl(folder / f"{corpus}_supervisions.jsonl.gz", (item.to_dict() for item in supervisions))
    # Last: a run that was killed before leaves no manifest that stage 2 would take for whole.
    write_cuts(folder / "cuts_all.jsonl.gz", cuts)


def split_manifest(folder: Path) -> dict[str, int]:
    """Stage 3: cuts_all.jsonl.gz -> cuts_<split>.jsonl.gz (kind audio), utterances_<split>.jsonl.gz (kind utterance).

    Where text_tokens.jsonl.gz lies beside, utterances get their text symbols; those in which there is nothing to read,
    neither symbols nor MIDI, are left out.

    Returns:
        Number of cuts by file name.

    Raises:
        UserError: a cut without a valid split or kind, a split without cuts, or text symbols of other texts.
    """
    tokens = read_text_tokens(folder / TEXT_TOKENS_FILE)
    prefixes = {"audio": "cuts", "utterance": "utterances"}
    files: dict[str, list[Cut]] = {f"cuts_{split}.jsonl.gz": [] for split in SPLITS}
    silent: list[str] = []
    for cut in read_manifest(folder / "cuts_all.jsonl.gz"):
        custom = cut.custom or {}
        split, kind = custom.get("split"), custom.get("kind")
        if split not in SPLITS or kind not in prefixes:
            raise UserError(
                f"cut '{cut.id}': split is {split!r} and kind is {kind!r}, expected one of {', '.join(SPLITS)} and"
                f" one of {', '.join(prefixes)}; run prepare.sh --stage 1 again"
            )
        if tokens and kind == "utterance":
            text, symbols = tokens.get(cut.id, ("", []))
            if text != cut_text(cut):
                raise UserError(
                    f"cut '{cut.id}': its text is not the one in '{folder / TEXT_TOKENS_FILE}';"
                    " run python -m valle.bin.text_tokens again"
                )
            if symbols:
                cut = with_tokens(cut, symbols)
            elif not custom.get("midi"):
                silent.append(cut.id)
                continue
        files.setdefault(f"{prefixes[kind]}_{split}.jsonl.gz", []).append(cut)
    empty = [name for name, cuts in files.items() if not cuts]
    if empty:
        raise UserError(f"'{folder}': no cut for {', '.join(empty)}; more recordings are needed")
    for name, cuts in files.items():
        write_cuts(folder / name, cuts)
    if silent:
        log.warning(
            "left out %d utterances without a text that can be read, such as '%s'", len(silent), silent[0]
        )
    for split in SPLITS:
        name = f"utterances_{split}.jsonl.gz"
        if name not in files:
            (folder / name).unlink(missing_ok=True)
    return {name: len(cuts) for name, cuts in files.items()}


def with_codes(cut: Cut, codes: Any) -> Cut:
    """A copy of the cut that carries `codes`, a lhotse TemporalArray, as `audio_features`."""
    return fastcopy(cut, custom={**(cut.custom or {}), "audio_features": codes})


def cut_text(cut: Cut) -> str:
    """The text of all supervisions of a cut, in order of time; "" where there is none."""
    supervisions = sorted(cut.supervisions, key=lambda supervision: supervision.start)
    return " ".join(supervision.text for supervision in supervisions if supervision.text)


def with_tokens(cut: Cut, symbols: Sequence[str]) -> Cut:
    """A copy of the cut that carries text symbols in its first supervision, as custom["tokens"]["text"]."""
    first, *rest = cut.supervisions
    custom = {**(first.custom or {}), "tokens": {"text": list(symbols)}}
    return fastcopy(cut, supervisions=[fastcopy(first, custom=custom), *rest])


def read_text_tokens(path: Path) -> dict[str, tuple[str, list[str]]]:
    """What valle.data.text has written: text and its symbols by cut id; {} where there is no such file.

    Raises:
        UserError: it is damaged.
    """
    if not path.is_file():
        return {}
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            items = [json.loads(line) for line in file]
        return {item["id"]: (item["text"], item["tokens"]) for item in items}
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"'{path}' is damaged ({error}); run python -m valle.bin.text_tokens again"
        ) from error
