"""Stage 1 of recipes for read speech: what lhotse's recipe of a corpus gives -> our manifests.

An utterance is one cut of kind "utterance", its file referred to where it lies. For AudioLM, neighbours of one passage
(a chapter, or what a speaker read) that are too short are joined, with a pause between, into files under DATA/joined;
the others are referred to in place, the longest in pieces.
"""

import contextlib
import hashlib
import io
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lhotse import Recording, RecordingSet, SupervisionSegment, SupervisionSet
from lhotse.cut import Cut, MonoCut

from valle.data.manifests import (
    SPLITS,
    cut_windows,
    file_id,
    join_groups,
    make_cut,
    make_recording,
    make_supervision,
    normalize_text,
    write_audio,
    write_jsonl,
    write_manifests,
)
from valle.utils.audio import load_audio
from valle.utils.errors import UserError
from valle.utils.progress import progress

logger = logging.getLogger(__name__)

PAUSE = 0.2  # seconds of silence between joined utterances, which are trimmed to the speech
WORKERS = 4  # threads that read and write joined files: they wait for disks and run outside of Python's lock


@dataclass(frozen=True)
class Utterance:
    """One recorded sentence.

    Args:
        recording: its file, wholly.
        passage: utterances of one passage follow each other, in the order of their ids.
    """

    recording: Recording
    text: str
    speaker: str
    language: str
    split: str
    passage: str

    @property
    def id(self) -> str:
        """The recording's."""
        return self.recording.id


@dataclass(frozen=True)
class Group:
    """Neighbouring utterances of a passage that make one stretch of sound, and its pieces in samples."""

    members: list[Utterance]
    windows: list[range]


def read_with_lhotse(
    prepare: Callable[[], dict[str, Any]], place: Path
) -> Iterator[tuple[Recording, SupervisionSegment]]:
    """Call a recipe of lhotse; each recording with its one supervision, in the order of the ids.

    Args:
        prepare: gives {"recordings": RecordingSet, "supervisions": SupervisionSet}.
        place: the corpus, for error messages.

    Raises:
        UserError: lhotse cannot read the corpus.
    """
    try:
        # Its progress bars would stand between ours.
        with contextlib.redirect_stderr(io.StringIO()):
            manifests = prepare()
    except Exception as error:  # whatever it meets in a corpus that is not whole
        raise UserError(
            f"'{place}' cannot be read ({type(error).__name__}: {error}); a part may be missing: unpack it again,"
            " and run prepare.sh --stage 0"
        ) from error
    recordings: RecordingSet = manifests["recordings"]
    supervisions: SupervisionSet = manifests["supervisions"]
    by_id = {supervision.recording_id: supervision for supervision in supervisions}
    for recording in sorted(recordings, key=lambda item: item.id):
        if recording.id in by_id:
            recording.sources[0].source = str(Path(recording.sources[0].source).resolve())
            yield recording, by_id[recording.id]


def write_speech_manifests(
    data_dir: Path, corpus: str, utterances: Sequence[Utterance], min_duration: float, max_duration: float
) -> None:
    """Write DATA/manifests, and DATA/joined.

    A sentence that is in several splits stays a labelled utterance only in the one where it is heard last: test, then
    validation. What is left out is listed in manifests/skipped.jsonl with the reason.

    Args:
        min_duration: shortest cut of kind "audio", in seconds.
        max_duration: longest.

    Raises:
        UserError: the limits contradict each other, or a split has no utterance.
    """
    if not 0 < min_duration <= max_duration:
        raise UserError(
            f"--min-duration {min_duration:g} and --max-duration {max_duration:g}:"
            " expected 0 < minimum <= maximum, in seconds"
        )
    counts = Counter(item.split for item in utterances)
    for split in SPLITS:
        if not counts[split]:
            raise UserError(
                f"{corpus}: {len(utterances)} utterances, but none for {split}; is all of it unpacked?"
            )
    skipped: list[dict[str, str]] = []
    kept = one_split_a_sentence(utterances, skipped)
    supervisions = [
        make_supervision(item.recording, item.text, item.speaker, item.language, item.split)
        for item in utterances
    ]
    cuts = [
        make_cut(item.recording, supervision, "utterance", custom={"passage": item.passage})
        for item, supervision in zip(utterances, supervisions, strict=True)
        if item.id in kept
    ]
    groups = group_utterances(utterances, min_duration, max_duration, skipped)
    folder = data_dir / "joined"
    audio: list[Cut] = []
    with ThreadPoolExecutor(WORKERS) as pool:
        found = pool.map(partial(cuts_of_group, folder=folder), groups)
        for group, outcome in zip(progress(groups, desc="join", unit="cut"), found, strict=True):
            if isinstance(outcome, UserError):
                skipped.extend({"id": item.id, "reason": str(outcome)} for item in group.members)
            else:
                audio.extend(outcome)
    write_jsonl(data_dir / "manifests" / "skipped.jsonl", skipped)
    recordings = [item.recording for item in utterances]
    write_manifests(data_dir / "manifests", corpus, recordings, supervisions, [*cuts, *audio])
    remove_stale(folder, audio)
    log_splits(cuts, audio)
    for reason, count in sorted(Counter(item["reason"] for item in skipped).items()):
        logger.info("left out: %d times: %s", count, reason)


def one_split_a_sentence(utterances: Sequence[Utterance], skipped: list[dict[str, str]]) -> set[str]:
    """Ids of the utterances whose sentence is in no later split; short ones like "Yes." are in many a corpus' all."""
    splits: dict[tuple[str, str], str] = {}
    for item in utterances:
        key = (item.language, normalize_text(item.text))
        splits[key] = max(splits.get(key, item.split), item.split, key=SPLITS.index)
    kept = set()
    for item in utterances:
        sentence = normalize_text(item.text)
        split = splits[item.language, sentence]
        if not sentence:
            skipped.append({"id": item.id, "reason": "no text"})
        elif split != item.split:
            reason = f"its sentence is in {split} too; no utterance with text in {item.split}, audio only"
            skipped.append({"id": item.id, "reason": reason})
        else:
            kept.add(item.id)
    return kept


def group_utterances(
    utterances: Sequence[Utterance], min_duration: float, max_duration: float, skipped: list[dict[str, str]]
) -> list[Group]:
    """Join short neighbours, and cut what is too long; what stays too short goes to `skipped`."""
    passages: dict[tuple[str, str, int], list[Utterance]] = defaultdict(list)
    for item in utterances:
        passages[item.split, item.passage, item.recording.sampling_rate].append(item)
    groups = []
    for (_, passage, rate), items in sorted(passages.items()):
        items.sort(key=lambda item: item.id)
        durations = [item.recording.duration for item in items]
        for indices in join_groups(durations, min_duration, max_duration, PAUSE, passage, spread=False):
            members = [items[index] for index in indices]
            windows = cut_windows(
                joined_samples(members), rate, min_duration, max_duration, key=members[0].id
            )
            if windows:
                groups.append(Group(members, windows))
            else:
                reason = f"its passage is shorter than {min_duration:g} s; no cut for AudioLM"
                skipped.extend({"id": item.id, "reason": reason} for item in members)
    return groups


def joined_samples(members: Sequence[Utterance]) -> int:
    """Samples of a group with the pauses between."""
    pause = round(PAUSE * members[0].recording.sampling_rate)
    return sum(item.recording.num_samples for item in members) + pause * (len(members) - 1)


def cuts_of_group(group: Group, folder: Path) -> list[Cut] | UserError:
    """The cuts of kind "audio" of a group. What cannot be read is returned, since it must not end the others."""
    first = group.members[0]
    try:
        recording = first.recording if len(group.members) == 1 else join(group.members, folder)
    except UserError as error:
        return error
    if len(group.windows) == 1:
        # A piece of a group that had to be cut has no transcript: nobody knows where in the text the border is.
        text = " ".join(item.text for item in group.members)
    else:
        text = None
    custom: dict[str, Any] = {"passage": first.passage}
    if len(group.members) > 1:
        custom["clips"] = [item.id for item in group.members]
    cuts: list[Cut] = []
    for number, window in enumerate(group.windows, start=1):
        cut_id = f"{recording.id}-audio" + (f"-{number}" if len(group.windows) > 1 else "")
        supervision = make_supervision(recording, text, first.speaker, first.language, first.split)
        supervision.id = cut_id
        supervision.duration = len(window) / recording.sampling_rate
        cut = make_cut(recording, supervision, "audio", cut_id, custom)
        assert isinstance(cut, MonoCut)
        cut.start = window.start / recording.sampling_rate
        cut.duration = supervision.duration
        cuts.append(cut)
    return cuts


def join(members: Sequence[Utterance], folder: Path) -> Recording:
    """One file of all members, unless it is there already: its name says what it was made from.

    Raises:
        UserError: a member cannot be read, or is not as long as its header says.
    """
    first, rate, samples = members[0], members[0].recording.sampling_rate, joined_samples(members)
    joined_id = f"{first.id}-{len(members)}-joined"
    name = f"{file_id(joined_id)}.{sources_digest(members)}.flac"
    path = folder / first.split / file_id(first.passage) / name
    recording = make_recording(joined_id, path, (1, samples), rate)
    try:
        if Recording.from_file(path).num_samples == samples:
            return recording
    except Exception:  # not there, or not whole: lhotse raises many kinds
        pass
    silence = np.zeros((1, round(PAUSE * rate)), dtype=np.float32)
    parts: list[np.ndarray] = []
    for item in members:
        wav, _ = load_audio(item.recording.sources[0].source)  # (C, N)
        parts += [silence, wav[:1]]
    joined = np.concatenate(parts[1:], axis=1)  # (1, N)
    if joined.shape[1] != samples:
        raise UserError(f"'{joined_id}': {joined.shape[1]} samples can be read, the headers say {samples}")
    write_audio(path, joined, rate)
    return recording


def sources_digest(members: Sequence[Utterance]) -> str:
    """Other files under the same names, as LibriTTS-R's in the place of LibriTTS', give another one."""
    digest = hashlib.sha1(str(PAUSE).encode())
    for item in members:
        source = item.recording.sources[0].source
        try:
            status = Path(source).stat()
        except OSError as error:
            raise UserError(f"audio file '{source}' cannot be read: {error.strerror or error}") from error
        digest.update(f"{source} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:8]


def remove_stale(folder: Path, cuts: Sequence[Cut]) -> None:
    """Delete joined files that no cut names any more, from a run with other options."""
    used = {
        Path(cut.recording.sources[0].source) for cut in cuts if isinstance(cut, MonoCut) and cut.recording
    }
    for path in folder.rglob("*.flac"):
        if path.resolve() not in used:
            path.unlink()


def log_splits(utterances: Sequence[Cut], audio: Sequence[Cut]) -> None:
    """One line a split."""
    for split in SPLITS:
        numbers: list[float] = []
        for cuts in (utterances, audio):
            durations = [cut.duration for cut in cuts if (cut.custom or {})["split"] == split]
            numbers += [len(durations), sum(durations) / 3600]
        logger.info("%s: %d utterances, %.2f h; %d cuts for AudioLM, %.2f h", split, *numbers)
