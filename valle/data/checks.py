"""Whether tokenized cuts may be trained on: faults are named before a training meets them.

`check_manifests` looks at a folder of cuts (stage 4 of every recipe), cut by cut, so that a large corpus need not fit
into memory; `check_codec` compares the codec of a folder with a checkpoint's.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lhotse.cut import Cut

from valle.data.dataset import read_codec_info
from valle.data.manifests import SPLITS, normalize_text, stream_manifest
from valle.data.packed import load_codes, stored_codes
from valle.utils.errors import UserError
from valle.utils.progress import progress

PREFIXES = ("cuts", "utterances")
AGAIN = "run prepare.sh --stage 2 again"
RATE_TOLERANCE = 1e-4  # relative: manifests round the seconds of a frame


def find_manifests(folder: Path) -> dict[str, Path]:
    """The split manifests of a folder by name, e.g. "cuts_train": cuts, utterances, or both, of all three splits.

    Raises:
        UserError: the folder or one of its manifests is missing.
    """
    if not folder.is_dir():
        raise UserError(f"manifest folder '{folder}' does not exist; run prepare.sh --stage 0")
    found: dict[str, Path] = {}
    for prefix in PREFIXES:
        paths = {f"{prefix}_{split}": folder / f"{prefix}_{split}.jsonl.gz" for split in SPLITS}
        there = [path.is_file() for path in paths.values()]
        # Utterances are for some recipes only, and some have nothing else.
        if any(there) or (prefix == "cuts" and not (folder / "utterances_train.jsonl.gz").is_file()):
            # Beside cuts, utterances may lack a split: a folder of recordings has transcripts for a few.
            if not all(there) and "cuts_train" not in found:
                raise UserError(
                    f"manifest '{list(paths.values())[there.index(False)]}' does not exist; "
                    "run prepare.sh --stage 3"
                )
            found |= {name: path for name, path in paths.items() if path.is_file()}
    return found


def check_manifests(folder: Path) -> None:
    """Stage 4: nothing is in two splits, no split is empty, and all codes are what codec.json says.

    Raises:
        UserError: the first fault found.
    """
    manifests = find_manifests(folder)
    info = read_codec_info(folder)
    if info is None:
        raise UserError(f"'{folder}/codec.json' does not exist; run prepare.sh --stage 2")
    check_codec_info(info, folder / "codec.json")

    def checked(name: str, path: Path) -> Iterator[Cut]:
        cut = None
        with progress(stream_manifest(path), desc=f"checking {path.name}", unit="cut") as cuts:
            for cut in cuts:
                check_codes(cut, info)
                yield cut
        if cut is None:
            raise UserError(f"'{path}' holds no cut; run prepare.sh --stage 3, with more recordings")

    check_disjoint({name: checked(name, path) for name, path in manifests.items()})


def check_codec_info(info: Mapping[str, Any], path: Path) -> None:
    """What codec.json says is whole, and its numbers fit together.

    Raises:
        UserError: they do not.
    """
    for name in ("sample_rate", "hop_length", "frame_rate", "num_quantizers", "codebook_size"):
        value = info.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise UserError(f"'{path}': {name} is {value!r}, expected a number above 0; {AGAIN}")
    expected = info["sample_rate"] / info["hop_length"]
    if abs(info["frame_rate"] - expected) > RATE_TOLERANCE * expected:
        raise UserError(
            f"'{path}': frame_rate is {info['frame_rate']:g} Hz, but {info['sample_rate']:g} Hz in hops of "
            f"{info['hop_length']:g} samples are {expected:g} frames/s; {AGAIN}"
        )


def check_disjoint(manifests: Mapping[str, Iterable[Cut]]) -> None:
    """No cut, stretch of a recording, joined clip or sentence is in two splits.

    Args:
        manifests: cuts by name, e.g. "cuts_train"; each is read once.

    Raises:
        UserError: one is.
    """
    keys: dict[str, tuple[str, str]] = {}
    spans: dict[str, list[tuple[float, float, str, str]]] = defaultdict(list)
    for name, cuts in manifests.items():
        split = name.rsplit("_", 1)[1]
        for cut in cuts:
            for key in _keys(cut):
                other, other_id = keys.setdefault(key, (split, cut.id))
                if other != split:
                    raise _overlap(cut.id, split, other_id, other, key)
            for source, start, end in _spans(cut):
                spans[source].append((start, end, split, cut.id))
    for source, stretches in spans.items():
        stretches.sort()
        reach: dict[str, tuple[float, str]] = {}  # split -> furthest end so far, and whose it is
        for start, end, split, cut_id in stretches:
            for other, (other_end, other_id) in reach.items():
                if other != split and other_end > start + 1e-6:
                    raise _overlap(cut_id, split, other_id, other, f"recording '{source}' at {start:.2f} s")
            reach[split] = max(reach.get(split, (-1.0, "")), (end, cut_id))


def _overlap(cut_id: str, split: str, other_id: str, other: str, what: str) -> UserError:
    return UserError(
        f"splits overlap: cut '{cut_id}' of {split} and cut '{other_id}' of {other} share {what};"
        " run prepare.sh --stage 1 again"
    )


def _keys(cut: Cut) -> Iterator[str]:
    yield f"id '{cut.id}'"
    if (cut.custom or {}).get("kind") == "utterance":
        for supervision in cut.supervisions:
            sentence = normalize_text(supervision.text or "")
            if sentence:
                yield f"sentence '{sentence}' ({supervision.language})"


def _spans(cut: Cut) -> Iterable[tuple[str, float, float]]:
    """Stretches of source recordings, in seconds, that a cut was made from."""
    custom = cut.custom or {}
    if "clips" in custom:
        yield from ((clip, 0.0, float("inf")) for clip in custom["clips"])
    elif "source" in custom:
        start = float(custom.get("source_start", 0.0)) + cut.start
        yield custom["source"], start, start + cut.duration
    else:
        members = [track.cut for track in cut.tracks] if hasattr(cut, "tracks") else [cut]
        for member in members:
            recording = getattr(member, "recording", None)
            if recording is not None:
                yield recording.id, member.start, member.start + member.duration


def has_codes(cut: Cut) -> bool:
    """Whether a cut carries codec tokens."""
    return "audio_features" in (cut.custom or {}) or getattr(cut, "features", None) is not None


def check_codes(cut: Cut, info: Mapping[str, Any]) -> None:
    """A cut's codes have the codec's quantizers, range and frame rate, and as many frames as its duration asks for, ±1.

    Args:
        cut: with codes.
        info: the codec's, see `Codec.info`.

    Raises:
        UserError: they do not.
    """
    if not (math.isfinite(cut.duration) and cut.duration > 0):
        raise UserError(
            f"cut '{cut.id}' is empty: its duration is {cut.duration:g} s; run prepare.sh --stage 1 again"
        )
    if not has_codes(cut):
        raise UserError(f"cut '{cut.id}' has no codes; run prepare.sh --stage 2")
    _check_storage(cut, info)
    stored = stored_codes(cut)  # (T, Q)
    if stored.ndim == 2 and len(stored) == 0:
        raise UserError(f"cut '{cut.id}' is empty: its codes have no frame; {AGAIN}")
    if stored.ndim == 2 and stored.shape[1] != info["num_quantizers"]:
        raise UserError(
            f"cut '{cut.id}': {stored.shape[1]} quantizers, but codec '{info.get('name')}' has "
            f"{info['num_quantizers']}; {AGAIN}"
        )
    # Recipes that keep codes as features store floats; what is called audio_features is ours.
    if "audio_features" in (cut.custom or {}) and stored.dtype != np.uint16:
        raise UserError(f"cut '{cut.id}': its codes are {stored.dtype}, expected uint16; {AGAIN}")
    load_codes(cut, codebook_size=int(info["codebook_size"]), stored=stored)
    expected = cut.duration * info["frame_rate"]
    for frames in (len(stored), _frames_of_all(cut)):
        if frames is not None and abs(frames - math.ceil(expected - 1e-6)) > 1:
            raise UserError(
                f"cut '{cut.id}': {frames} frames, expected {expected:.1f} for {cut.duration:.2f} s"
                f" at {info['frame_rate']:g} frames/s; {AGAIN}"
            )


def _frames_of_all(cut: Cut) -> int | None:
    """Frames of the array under a cut that is a whole recording; None for another cut.

    lhotse reads no more of an array than a cut lasts, so frames too many would not be seen.
    """
    recording = getattr(cut, "recording", None)
    carrier = (cut.custom or {}).get("audio_features")
    if recording is None or carrier is None or abs(recording.duration - cut.duration) > 1e-6:
        return None
    return int(carrier.shape[0])


def _check_storage(cut: Cut, info: Mapping[str, Any]) -> None:
    """The seconds of a frame that the manifest tells are the codec's."""
    carrier = (cut.custom or {}).get("audio_features") or getattr(cut, "features", None)
    shift = getattr(carrier, "frame_shift", None)
    if shift is not None and abs(shift * info["frame_rate"] - 1) > RATE_TOLERANCE:
        raise UserError(
            f"cut '{cut.id}': its codes are said to have {1 / shift if shift > 0 else 0:g} frames/s, but codec "
            f"'{info.get('name')}' has {info['frame_rate']:g}; {AGAIN}"
        )


def check_codec(
    theirs: Mapping[str, Any], ours: Mapping[str, Any] | None, checkpoint: str | Path, folder: Path
) -> None:
    """Refuse codes of another codec than those that a checkpoint was trained on, even where their shape fits.

    Args:
        theirs: what the checkpoint says of its codec, see `Codec.info`.
        ours: what the manifests' codec.json says; None where there is none: nothing to compare.
        checkpoint: its path.
        folder: of the manifests.

    Raises:
        UserError: they differ.
    """
    if ours is None:
        return
    facts = ["codebook_size", "sample_rate", "frame_rate"]
    # A fingerprint covers the number of quantizers that were stored: with another number it says nothing.
    exact = theirs.get("num_quantizers") == ours.get("num_quantizers")
    both = bool(theirs.get("fingerprint") and ours.get("fingerprint"))
    facts.append("fingerprint" if exact and both else "name")
    for fact in facts:
        found, expected = ours.get(fact), theirs.get(fact)
        if found is not None and expected is not None and found != expected:
            raise UserError(
                f"checkpoint '{checkpoint}' was trained on codes of codec {_named(theirs, fact)}, but the codes in "
                f"'{folder}' are of {_named(ours, fact)}; run prepare.sh --stage 2 --codec {theirs.get('name')}"
            )


def _named(info: Mapping[str, Any], fact: str) -> str:
    """A codec's name and fingerprint, and what else is in question about it."""
    facts = dict.fromkeys(["fingerprint", fact] if fact != "name" else ["fingerprint"])
    return f"'{info.get('name')}' ({', '.join(f'{name} {info.get(name)}' for name in facts)})"
