"""When the symbols of a manifest's texts are said, in a file beside the packed texts and codes; see `alignment`.

<manifest's folder>/packed/<manifest's name>-<digest>-times-<key>/
    starts.npy    (L,) uint16, cut after cut as the texts: the frame at which each symbol begins
    aligner.npz   what found them
    pack.json     the format, and the time stamps of what texts and codes were read from
"""

import hashlib
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from valle.data.alignment import ROUNDS, Aligner, train_aligner
from valle.data.packed import PackedCodes, open_pack, unfinished_pack
from valle.data.packed_texts import PackedTexts
from valle.utils.progress import progress

FORMAT = 1
TRAINING_FRAMES = 400_000  # the aligner learns from at most so many, spread over the corpus
AT_ONCE = 2000  # cuts whose codes are in memory
LAST_FRAME = 65535  # that uint16 holds: what is said later (22 min at 50 Hz) is said then


class PackedTimes:
    """The times of all cuts of a manifest: `times[i]` is cut i's, (L,) uint16.

    Args:
        folder: a pack.
        texts: of the same manifest.

    Raises:
        OSError, ValueError, KeyError: it is not whole.
    """

    def __init__(self, folder: Path, texts: PackedTexts) -> None:
        self.folder, self.texts = folder, texts
        info = json.loads((folder / "pack.json").read_text())
        if info["format"] != FORMAT:
            raise ValueError(f"format {info['format']}, expected {FORMAT}")
        self.sources: dict[str, list[int]] = info["sources"]
        self._starts = np.load(folder / "starts.npy", mmap_mode="r").view(np.ndarray)
        self._ends = np.cumsum(texts.lens)
        if len(self._starts) != self._ends[-1]:
            raise ValueError(f"{len(self._starts)} times for {self._ends[-1]} symbols")
        try:
            with np.load(folder / "aligner.npz", allow_pickle=False) as stored:
                whole = set(stored.files) == set(Aligner.__dataclass_fields__)
        except zipfile.BadZipFile:
            whole = False
        if not whole:
            raise ValueError("no whole aligner.npz")

    def __getitem__(self, index: int) -> np.ndarray:
        end = self._ends[index]
        return self._starts[end - self.texts.lens[index] : end]

    def aligner(self) -> Aligner:
        """What found them."""
        with np.load(self.folder / "aligner.npz", allow_pickle=False) as stored:
            return Aligner(*(stored[name] for name in Aligner.__dataclass_fields__))

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedTimes, (self.folder, self.texts)  # a worker process maps the files itself


def open_packed_times(
    manifest: Path,
    texts: PackedTexts,
    codes: PackedCodes,
    num_symbols: int,
    codebook_size: int,
    aligner: Aligner | None = None,
) -> PackedTimes:
    """The times of a manifest's texts; they are looked for first where that has not been done.

    Args:
        manifest: cuts with codes and texts of symbols.
        texts, codes: its own.
        num_symbols, codebook_size: what ids and codes are below.
        aligner: finds them (default: one that learns from these cuts themselves).

    Raises:
        UserError: no folder that can be written.
    """
    made_by = b"itself" if aligner is None else aligner.emissions.tobytes()
    parts = [str(FORMAT), texts.folder.name, codes.folder.name, hashlib.sha1(made_by).hexdigest()]
    key = hashlib.sha1("|".join(parts).encode()).hexdigest()[:12]
    return open_pack(
        manifest,
        f"times-{key}",
        lambda folder: PackedTimes(folder, texts),
        lambda folder: _build(manifest, folder, texts, codes, num_symbols, codebook_size, aligner),
    )


def _build(
    manifest: Path,
    folder: Path,
    texts: PackedTexts,
    codes: PackedCodes,
    num_symbols: int,
    codebook_size: int,
    aligner: Aligner | None,
) -> None:
    def read(rows: Sequence[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        return [texts[row].astype(np.int64) for row in rows], [np.asarray(codes[row]) for row in rows]

    number = len(texts)
    with unfinished_pack(folder) as unfinished:
        if aligner is None:
            used = max(1, min(number, round(number * TRAINING_FRAMES / max(1, int(codes.frames.sum())))))
            chosen = np.unique(np.linspace(0, number - 1, used).round().astype(int)).tolist()
            with progress(
                total=ROUNDS, desc=f"learning when symbols are said ({manifest.name})", unit="round"
            ) as bar:
                aligner = train_aligner(*read(chosen), num_symbols, codebook_size, lambda _: bar.update())
        starts = []
        with progress(total=number, desc=f"times of {manifest.name}", unit="cut") as bar:
            for first in range(0, number, AT_ONCE):
                rows = range(first, min(first + AT_ONCE, number))
                starts += aligner.align(*read(rows), lambda done: bar.update(done))
        np.save(unfinished / "starts.npy", np.concatenate(starts).clip(max=LAST_FRAME).astype(np.uint16))
        np.savez(
            unfinished / "aligner.npz",
            **{name: getattr(aligner, name) for name in Aligner.__dataclass_fields__},
        )
        info = {
            "format": FORMAT,
            "manifest": str(manifest.resolve()),
            "sources": texts.sources | codes.sources,
        }
        (unfinished / "pack.json").write_text(json.dumps(info, indent=1) + "\n")
