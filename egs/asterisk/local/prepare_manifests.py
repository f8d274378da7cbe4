"""Stage 1: G.722 clips -> 16 kHz FLAC, clips joined to 5-15 s, and lhotse manifests with splits.

Equal sentences of a language fall in one split, also when they were recorded twice; so do byte-equal recordings.
"""

import gzip
import hashlib
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lhotse import Recording, SupervisionSegment
from lhotse.cut import Cut

from valle.config import option, parse
from valle.data.manifests import (
    SPLITS,
    cut_windows,
    file_id,
    join_groups,
    make_cut,
    make_recording,
    make_supervision,
    normalize_text,
    position_of,
    write_audio,
    write_jsonl,
    write_manifests,
)
from valle.utils.audio import convert_audio, load_audio
from valle.utils.command import run
from valle.utils.errors import UserError
from valle.utils.log import setup_logger
from valle.utils.progress import progress

logger = logging.getLogger("valle.egs.asterisk.manifests")

SPEAKERS = {
    "en": "allison-smith",
    "es": "allison-smith",
    "fr": "june-wallack",
    "it": "carlo-flora",
    "ru": "ivrvoice-ru",
}
SAMPLE_RATE = 16000  # Hz, of every G.722 stream
# Sounds that are no speech but, in some language, lack the bracketed transcript that says so.
NO_SPEECH = {
    "ascending-2tone",
    "beep",
    "beeperr",
    "confbridge-join",
    "confbridge-leave",
    "descending-2tone",
    "tt-monkeys",
}
NO_TEXT = "no transcript: no utterance with text, audio only"
HELD_OUT_PART = 0.12  # of the seconds, for validation and for test each
MIN_LEVEL = -50.0  # dBFS, RMS over a clip
MIN_CLIP_DURATION = 0.1  # seconds
PAUSE = 0.2  # seconds of silence between joined clips; some clips begin and end without any


@dataclass
class ManifestConfig:
    """Stage 1 of egs/asterisk"""

    lang: str = option("en", "languages, with commas")
    data_dir: str = option("data", "folder of the recipe's output")
    min_duration: float = option(5.0, "shortest joined cut, in seconds")
    max_duration: float = option(15.0, "longest joined cut, in seconds")


@dataclass
class Clip:
    """One sound prompt: audio (1, N) at SAMPLE_RATE."""

    id: str
    path: Path
    text: str | None
    wav: np.ndarray
    split: str = ""

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.wav.shape[1] / SAMPLE_RATE


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    (config,) = parse("Manifests of the Asterisk core sounds.", [ManifestConfig], argv)
    setup_logger()
    data_dir = Path(config.data_dir)
    recordings: list[Recording] = []
    supervisions: list[SupervisionSegment] = []
    cuts: list[Cut] = []
    skipped: list[dict[str, str]] = []
    for language in [name for name in config.lang.replace(" ", ",").split(",") if name]:
        clips = read_clips(language, data_dir / "download" / language, skipped)
        assign_clip_splits(language, clips)
        for clip in clips:
            recording, supervision = write_clip(clip, language, data_dir)
            recordings.append(recording)
            supervisions.append(supervision)
            if clip.text:
                cuts.append(make_cut(recording, supervision, "utterance"))
            else:
                skipped.append({"id": f"{language}/{clip.id}", "reason": NO_TEXT})
        for split in SPLITS:
            members = [clip for clip in clips if clip.split == split]
            cuts.extend(join_clips(members, language, split, data_dir, config, skipped))
        log_language(language, clips, cuts)
    for reason, count in sorted(Counter(item["reason"] for item in skipped).items()):
        logger.info("left out: %d clips, %s", count, reason)
    write_jsonl(data_dir / "manifests" / "skipped.jsonl", skipped)
    write_manifests(data_dir / "manifests", "asterisk", recordings, supervisions, cuts)


def read_clips(language: str, folder: Path, skipped: list[dict[str, str]]) -> list[Clip]:
    """Decode the speech clips of a language, in id order; what is left out goes to `skipped`."""
    if not (folder / ".done").is_file():
        raise UserError(
            f"'{folder}' does not hold the downloaded recordings; run prepare.sh --stage 0 --lang {language}"
        )
    sounds = sound_root(folder)
    texts = read_transcripts(language, folder)
    lowered = {name.lower(): text for name, text in texts.items()}
    clips = []
    for path in progress(sorted(sounds.rglob("*.g722")), desc=f"decode {language}", unit="clip"):
        name = path.relative_to(sounds).with_suffix("").as_posix()
        text = texts.get(name, lowered.get(name.lower()))
        reason = no_speech(name, text)
        if reason is None:
            try:
                wav, sample_rate = load_audio(path)
                wav = convert_audio(wav, sample_rate, SAMPLE_RATE, channels=1)
                reason = too_little(wav)
            except UserError as error:
                reason = "empty" if path.stat().st_size == 0 else f"unreadable ({error})"
        if reason is not None:
            skipped.append({"id": f"{language}/{name}", "reason": reason})
            continue
        clips.append(Clip(f"asterisk-{language}-{file_id(name)}", path, clean_text(text), wav))
    if not clips:
        raise UserError(
            f"'{folder}' holds no speech clip; delete it and run prepare.sh --stage 0 --lang {language}"
        )
    return clips


def sound_root(folder: Path) -> Path:
    """The folder below which a clip's path is its id: deepest one that holds every clip.

    Tarballs are flat; the Debian packages have them in usr/share/asterisk/sounds/<language>_<country>_<sex>_<voice>.
    """
    parents = {path.parent for path in folder.rglob("*.g722")}
    if not parents:
        raise UserError(f"'{folder}' holds no .g722 file; delete it and run prepare.sh --stage 0 again")
    shallowest = min(parents, key=lambda parent: len(parent.parts))
    while not all(parent.is_relative_to(shallowest) for parent in parents):
        shallowest = shallowest.parent
    return shallowest


def read_transcripts(language: str, folder: Path) -> dict[str, str]:
    """core-sounds-<language>.txt (`id: text` lines, `;` comments, perhaps gzipped, perhaps with a byte-order mark)."""
    found = sorted(folder.rglob(f"core-sounds-{language}.txt*"))
    if not found:
        logger.warning("%s: no core-sounds-%s.txt; the clips get no transcripts", language, language)
        return {}
    content = found[0].read_bytes()
    if found[0].suffix == ".gz":
        content = gzip.decompress(content)
    texts: dict[str, str] = {}
    for line in content.decode("utf-8-sig", errors="replace").splitlines():
        name, colon, text = line.partition(":")
        if colon and not line.lstrip().startswith(";"):
            texts.setdefault(name.strip(), text.strip())
    return texts


def no_speech(name: str, text: str | None) -> str | None:
    """Why a clip is no speech, told from its name and transcript, or None."""
    if name.startswith("silence/"):
        return "silence"
    if name in NO_SPEECH or re.fullmatch(r"\[[^\]]*\]|\([^)]*\)", text or ""):
        return "a tone or another sound without speech"
    return None


def too_little(wav: np.ndarray) -> str | None:
    """Why a clip's audio (1, N) is too little to use, or None."""
    if wav.shape[1] < MIN_CLIP_DURATION * SAMPLE_RATE:
        return "empty"
    level = 20 * np.log10(np.sqrt(np.mean(np.square(wav, dtype=np.float64))) + 1e-9)
    return f"quieter than {MIN_LEVEL:.0f} dBFS" if level < MIN_LEVEL else None


def clean_text(text: str | None) -> str | None:
    """Drop annotations like `[@]` or `[ ]`; words in brackets are spoken and stay. None when nothing is left."""
    if text is None:
        return None
    text = re.sub(r"\[[^\]\w]*\]", " ", text)
    return " ".join(re.sub(r"[\[\]]", " ", text).split()) or None


def assign_clip_splits(language: str, clips: Sequence[Clip]) -> None:
    """Set each clip's split: one for all clips that share a sentence or, byte for byte, a recording."""
    groups: dict[str, str] = {}

    def leader(name: str) -> str:
        while groups.setdefault(name, name) != name:
            name = groups[name]
        return name

    keys = []
    for clip in clips:
        sentence = normalize_text(clip.text or "")
        key = f"text {sentence}" if sentence else f"clip {clip.id}"
        audio = f"~audio {hashlib.sha1(clip.path.read_bytes()).hexdigest()}"
        # '~' sorts behind letters: a group goes by a sentence or clip of its own, never by its audio.
        first, second = sorted((leader(key), leader(audio)))
        groups[second] = first
        keys.append(key)
    # The corpus is small: whole sentences go to the held-out splits, in the order of their hash, until these have
    # their part of the seconds. A hash against a threshold alone gave 1.7 minutes of English to test.
    seconds: dict[str, float] = {}
    for clip, key in zip(clips, keys, strict=True):
        seconds[leader(key)] = seconds.get(leader(key), 0.0) + clip.duration
    total, held_out, splits = sum(seconds.values()), 0.0, {}
    for group in sorted(seconds, key=lambda name: position_of(f"{language} {name}")):
        part = held_out / total
        if part >= 2 * HELD_OUT_PART or seconds[group] > HELD_OUT_PART * total:
            # Nor may one long clip take the place of all the others in a split.
            splits[group] = "train"
            continue
        splits[group] = "test" if part < HELD_OUT_PART else "validation"
        held_out += seconds[group]
    for clip, key in zip(clips, keys, strict=True):
        clip.split = splits[leader(key)]


def write_clip(clip: Clip, language: str, data_dir: Path) -> tuple[Recording, SupervisionSegment]:
    """Write one clip as FLAC and describe it."""
    path = data_dir / "audio" / language / f"{clip.id}.flac"
    write_audio(path, clip.wav, SAMPLE_RATE)
    recording = make_recording(clip.id, path, clip.wav.shape, SAMPLE_RATE)
    return recording, make_supervision(recording, clip.text, SPEAKERS[language], language, clip.split)


def join_clips(
    clips: Sequence[Clip],
    language: str,
    split: str,
    data_dir: Path,
    config: ManifestConfig,
    skipped: list[dict[str, str]],
) -> list[Cut]:
    """Join neighbouring clips of one split to cuts of kind "audio", each a FLAC of its own."""
    folder = data_dir / "joined" / split
    prefix = f"asterisk-{language}-{split}"
    limits = (config.min_duration, config.max_duration)
    silence = np.zeros((1, round(PAUSE * SAMPLE_RATE)), dtype=np.float32)
    cuts: list[Cut] = []
    for group in join_groups([clip.duration for clip in clips], *limits, PAUSE, key=prefix):
        members = [clips[index] for index in group]
        parts = [part for clip in members for part in (silence, clip.wav)][1:]
        wav = np.concatenate(parts, axis=1)  # (1, N)
        windows = cut_windows(wav.shape[1], SAMPLE_RATE, *limits, key=f"{prefix} {members[0].id}")
        if not windows:
            reason = f"all clips of its split together are shorter than {config.min_duration:g} s"
            skipped.extend({"id": f"{prefix}: {clip.id}", "reason": reason} for clip in members)
        # A piece of a group that had to be cut has no transcript: nobody knows where in the text the border is.
        text = " ".join(clip.text for clip in members if clip.text) if len(windows) == 1 else None
        for window in windows:
            cut_id = f"{prefix}-{len(cuts) + 1:04d}"
            path = folder / f"{cut_id}.flac"
            piece = wav[:, window.start : window.stop]
            write_audio(path, piece, SAMPLE_RATE)
            recording = make_recording(cut_id, path, piece.shape, SAMPLE_RATE)
            supervision = make_supervision(recording, text or None, SPEAKERS[language], language, split)
            custom = {
                "clips": clips_in(members, window),
                "speaker": SPEAKERS[language],
                "language": language,
            }
            cuts.append(make_cut(recording, supervision, "audio", custom=custom))
    written = {cut.id for cut in cuts}
    for path in folder.glob(f"{prefix}-[0-9][0-9][0-9][0-9].flac"):
        if path.stem not in written:  # from a run with other options
            path.unlink()
    return cuts


def clips_in(members: Sequence[Clip], window: range) -> list[str]:
    """Ids of the joined clips that have samples inside `window`."""
    ids = []
    start = 0
    for clip in members:
        if start < window.stop and start + clip.wav.shape[1] > window.start:
            ids.append(clip.id)
        start += clip.wav.shape[1] + round(PAUSE * SAMPLE_RATE)
    return ids


def log_language(language: str, clips: Sequence[Clip], cuts: Sequence[Cut]) -> None:
    """One line a split."""
    joined: dict[str, list[float]] = defaultdict(list)
    for cut in cuts:
        custom = cut.custom or {}
        if custom["kind"] == "audio" and custom["language"] == language:
            joined[custom["split"]].append(cut.duration)
    for split in SPLITS:
        durations = [clip.duration for clip in clips if clip.split == split]
        logger.info(
            "%s %s: %d clips, %.1f min; joined to %d cuts, %.1f min",
            *(
                language,
                split,
                len(durations),
                sum(durations) / 60,
                len(joined[split]),
                sum(joined[split]) / 60,
            ),
        )


if __name__ == "__main__":
    run(main)
