"""What is in a folder of cuts, and whether it may be trained on: stage 4 of every recipe."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lhotse.cut import Cut

from valle.data.dataset import load_codes, read_codec_info
from valle.data.manifests import SPLITS, normalize_text, read_manifest
from valle.utils.errors import UserError

PERCENTILES = (0, 10, 50, 90, 100)
PREFIXES = ("cuts", "utterances")


def read_split_cuts(folder: Path) -> dict[str, list[Cut]]:
    """The split manifests of a folder by name, e.g. "cuts_train"; utterances only where there are any.

    Raises:
        UserError: the folder or one of its cuts_<split>.jsonl.gz is missing.
    """
    if not folder.is_dir():
        raise UserError(f"manifest folder '{folder}' does not exist; run prepare.sh --stage 0")
    paths = {
        f"{prefix}_{split}": folder / f"{prefix}_{split}.jsonl.gz" for prefix in PREFIXES for split in SPLITS
    }
    return {
        name: list(read_manifest(path)) for name, path in paths.items() if path.is_file() or "cuts" in name
    }


def has_codes(cut: Cut) -> bool:
    """Whether a cut carries codec tokens."""
    return "audio_features" in (cut.custom or {}) or getattr(cut, "features", None) is not None


def speaker_of(cut: Cut) -> str:
    """The first supervision's speaker, or "-"."""
    speakers = [supervision.speaker for supervision in cut.supervisions if supervision.speaker]
    return speakers[0] if speakers else "-"


def duration_table(manifests: Mapping[str, Sequence[Cut]]) -> str:
    """Count, hours and duration percentiles of every manifest and of each of its speakers."""
    rows = [["manifest", "speaker", "cuts", "hours", *(f"p{percentile}" for percentile in PERCENTILES)]]
    for name, cuts in manifests.items():
        by_speaker: dict[str, list[float]] = defaultdict(list)
        for cut in cuts:
            by_speaker[speaker_of(cut)].append(cut.duration)
        everyone = {"all": [cut.duration for cut in cuts]}
        for speaker, durations in [*everyone.items(), *sorted(by_speaker.items())]:
            percentiles = [f"{value:.2f}" for value in np.percentile(durations, PERCENTILES)]
            rows.append([name, speaker, str(len(durations)), f"{sum(durations) / 3600:.3f}", *percentiles])
    return "durations in seconds: shortest (p0), percentiles, longest (p100)\n" + format_table(rows)


def codebook_table(manifests: Mapping[str, Sequence[Cut]], codebook_size: int | None) -> str:
    """Codes used and unigram entropy of each quantizer, per manifest. "" when no cut carries codes."""
    rows = [["manifest", "quantizer", "frames", "codes used", "entropy (nats)"]]
    for name, cuts in manifests.items():
        counts: list[np.ndarray] = []
        for cut in cuts:
            if not has_codes(cut):
                continue
            codes = load_codes(cut)  # (T, Q)
            while len(counts) < codes.shape[1]:
                counts.append(np.zeros(codebook_size or 0, dtype=np.int64))
            for index in range(codes.shape[1]):
                column = np.bincount(codes[:, index], minlength=len(counts[index]))
                counts[index] = np.pad(counts[index], (0, len(column) - len(counts[index]))) + column
        for index, count in enumerate(counts):
            used = f"{np.count_nonzero(count)}" + (f"/{codebook_size}" if codebook_size else "")
            rows.append([name, str(index), str(count.sum()), used, f"{entropy(count):.2f}"])
    return format_table(rows) if len(rows) > 1 else ""


def entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution that `counts` estimates."""
    total = counts.sum()
    if total == 0:
        return 0.0
    shares = counts[counts > 0] / total
    return float(max(0.0, -(shares * np.log(shares)).sum()))


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest entry; names to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    pads: list[Callable[[str, int], str]] = [str.ljust, str.ljust, *[str.rjust] * len(widths)]
    return "\n".join(
        "  ".join(pad(cell, w) for pad, cell, w in zip(pads, row, widths, strict=False)) for row in rows
    )


def check_manifests(folder: Path) -> None:
    """Stage 4: nothing is in two splits, and all codes are what codec.json says.

    Raises:
        UserError: the first fault found.
    """
    manifests = read_split_cuts(folder)
    check_disjoint(manifests)
    info = read_codec_info(folder)
    if info is None:
        raise UserError(f"'{folder}/codec.json' does not exist; run prepare.sh --stage 2")
    for cuts in manifests.values():
        for cut in cuts:
            check_codes(cut, info)


def check_disjoint(manifests: Mapping[str, Sequence[Cut]]) -> None:
    """No cut, stretch of a recording, joined clip or sentence is in two splits.

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


def check_codes(cut: Cut, info: Mapping[str, Any]) -> None:
    """A cut's codes have the codec's quantizers and range, and as many frames as its duration asks for, ±1.

    Raises:
        UserError: they do not.
    """
    if not has_codes(cut):
        raise UserError(f"cut '{cut.id}' has no codes; run prepare.sh --stage 2")
    again = "run prepare.sh --stage 2 again"
    codes = load_codes(cut, codebook_size=info["codebook_size"])  # (T, Q)
    if codes.shape[1] != info["num_quantizers"]:
        raise UserError(
            f"cut '{cut.id}': {codes.shape[1]} quantizers, but codec '{info['name']}' has {info['num_quantizers']};"
            f" {again}"
        )
    expected = cut.duration * info["frame_rate"]
    if abs(codes.shape[0] - np.ceil(expected - 1e-6)) > 1:
        raise UserError(
            f"cut '{cut.id}': {codes.shape[0]} frames, expected {expected:.1f} for {cut.duration:.2f} s"
            f" at {info['frame_rate']:g} frames/s; {again}"
        )
