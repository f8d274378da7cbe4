"""What is in manifests of cuts: hours, durations, speakers, use of the codes. Stage 4 of every recipe prints it.

Manifests are read cut by cut, and codes of a bounded, seeded sample alone, so that memory does not grow with a corpus.
"""

import hashlib
import heapq
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from lhotse.cut import Cut

from valle.data.checks import has_codes
from valle.data.manifests import stream_manifest
from valle.data.packed import load_codes
from valle.utils.errors import UserError
from valle.utils.progress import progress

PERCENTILES = (0, 10, 50, 90, 100)
PERFORMERS = ("speaker", "performer", "pianist", "artist")  # custom fields that say who is heard


def speaker_of(cut: Cut) -> str:
    """Who is heard: the first supervision's speaker, else what a custom field says (a pianist), or "-"."""
    speakers = [supervision.speaker for supervision in cut.supervisions if supervision.speaker]
    custom = cut.custom or {}
    return str(next(iter([*speakers, *(custom[name] for name in PERFORMERS if custom.get(name))]), "-"))


class CutSample:
    """A sample of so many cuts that depends on their ids and the seed alone, not on their order.

    Args:
        size: cuts to keep, of all that are offered.
        seed: of the draw.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self._heap: list[tuple[int, str, Cut]] = []  # the first is the one to give up next
        self._offered = 0

    def offer(self, cut: Cut) -> None:
        """Look at one cut."""
        self._offered += 1
        place = int.from_bytes(hashlib.sha1(f"{self.seed} {cut.id}".encode()).digest()[:8], "big")
        # The number decides between cuts of one id, which a heap could not compare.
        entry = (-place, f"{cut.id} {self._offered}", cut)
        if len(self._heap) < self.size:
            heapq.heappush(self._heap, entry)
        elif self.size and entry[:2] > self._heap[0][:2]:
            heapq.heapreplace(self._heap, entry)

    def cuts(self) -> list[Cut]:
        """What was drawn, in an order of its own: the first n are a sample of n."""
        return [cut for *_, cut in sorted(self._heap, key=lambda entry: entry[:2], reverse=True)]


@dataclass
class ManifestStatistics:
    """What one manifest holds.

    Attributes:
        durations: seconds of every cut, by speaker.
        with_codes: number of cuts that carry codes.
        sample: some of these.
    """

    durations: dict[str, array] = field(default_factory=lambda: defaultdict(lambda: array("d")))
    with_codes: int = 0
    sample: list[Cut] = field(default_factory=list)


def measure_manifest(path: Path, sample_size: int, seed: int) -> ManifestStatistics:
    """Read a manifest once.

    Args:
        path: of the manifest.
        sample_size: cuts with codes to keep.
        seed: of the sample.

    Raises:
        UserError: no such file, it is no manifest, or it is empty.
    """
    statistics, sample = ManifestStatistics(), CutSample(sample_size, seed)
    with progress(stream_manifest(path), desc=f"reading {path.name}", unit="cut") as cuts:
        for cut in cuts:
            statistics.durations[speaker_of(cut)].append(cut.duration)
            if has_codes(cut):
                statistics.with_codes += 1
                sample.offer(cut)
    if not statistics.durations:
        raise UserError(f"'{path}' holds no cut; run prepare.sh --stage 3, with more recordings")
    statistics.sample = sample.cuts()
    return statistics


def duration_table(manifests: Mapping[str, ManifestStatistics], max_speakers: int = 20) -> str:
    """Cuts, hours and duration percentiles of every manifest and of its speakers, most hours first.

    Args:
        manifests: by name.
        max_speakers: rows a manifest; the speakers behind them share one.
    """
    rows = [["manifest", "speaker", "cuts", "hours", *(f"p{percentile}" for percentile in PERCENTILES)]]
    for name, statistics in manifests.items():
        by_speaker = {speaker: np.frombuffer(times) for speaker, times in statistics.durations.items()}
        ordered = sorted(by_speaker, key=lambda speaker: (-by_speaker[speaker].sum(), speaker))
        shown, rest = ordered[:max_speakers], ordered[max_speakers:]
        rows.append(_duration_row(name, f"all {len(ordered)}", by_speaker.values()))
        rows += [_duration_row(name, speaker, [by_speaker[speaker]]) for speaker in shown]
        if rest:
            rows.append(_duration_row(name, f"{len(rest)} more", [by_speaker[speaker] for speaker in rest]))
    return "durations in seconds: shortest (p0), percentiles, longest (p100)\n" + format_table(rows)


def _duration_row(name: str, speaker: str, durations: Iterable[np.ndarray]) -> list[str]:
    joined = np.concatenate(list(durations))
    percentiles = [f"{value:.2f}" for value in np.percentile(joined, PERCENTILES)]
    return [name, speaker, str(len(joined)), f"{joined.sum() / 3600:.3f}", *percentiles]


class CodeCounts:
    """How often each code occurs, by quantizer.

    Args:
        codebook_size: V; None: whatever occurs.

    Attributes:
        frames: counted so far.
        counts: Q arrays (V,) int64.
    """

    def __init__(self, codebook_size: int | None) -> None:
        self.codebook_size = codebook_size
        self.frames = 0
        self.counts: list[np.ndarray] = []

    def add(self, codes: np.ndarray) -> None:
        """Count the codes of one cut, (T, Q)."""
        self.frames += len(codes)
        while len(self.counts) < codes.shape[1]:
            self.counts.append(np.zeros(self.codebook_size or 0, dtype=np.int64))
        for index in range(codes.shape[1]):
            column = np.bincount(codes[:, index], minlength=len(self.counts[index]))
            self.counts[index] = np.pad(self.counts[index], (0, len(column) - len(self.counts[index])))
            self.counts[index] += column

    def used(self) -> list[int]:
        """Codes that occur, by quantizer."""
        return [int(np.count_nonzero(counts)) for counts in self.counts]

    def entropies(self) -> list[float]:
        """Unigram entropy in nats, by quantizer; its exponential is the perplexity."""
        return [entropy(counts) for counts in self.counts]


def codebook_table(manifests: Mapping[str, ManifestStatistics], codebook_size: int | None) -> str:
    """Codes used and unigram entropy of each quantizer over the sampled cuts. "" when no cut carries codes."""
    rows = [["manifest", "quantizer", "cuts", "frames", "codes used", "entropy (nats)"]]
    for name, statistics in manifests.items():
        counts = CodeCounts(codebook_size)
        for cut in statistics.sample:
            counts.add(load_codes(cut))
        size = f"/{codebook_size}" if codebook_size else ""
        cuts = f"{len(statistics.sample)}/{statistics.with_codes}"
        for index, (used, nats) in enumerate(zip(counts.used(), counts.entropies(), strict=True)):
            rows.append([name, str(index), cuts, str(counts.frames), f"{used}{size}", f"{nats:.2f}"])
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
