"""What the cuts of a manifest say, or which notes they have, in one file that is mapped into memory; beside the codes.

<manifest's folder>/packed/<manifest's name>-<digest>-text-<key>/
    tokens.npy      (L, F) uint16, cut after cut in the manifest's order; F is 1 for symbols
    ends.npy        (N,) int64: the row behind each cut's last
    neighbours.npy  (N,) int64: another cut of the same recording or reader, -1 where there is none
    pack.json       what it was made with, and the time stamps of the MIDI files
"""

import hashlib
import json
from array import array
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from lhotse.cut import Cut

from valle.data.manifests import stream_manifest
from valle.data.midi import MidiTokenizer, Notes, crop, read_notes
from valle.data.packed import WATCHED_FILES, open_pack, stamp_of, unfinished_pack
from valle.data.symbols import ENDS, SymbolTable
from valle.utils.errors import UserError
from valle.utils.progress import progress

FORMAT = 1
MIDI_FILES = 64  # kept in memory while a manifest is packed


class TextSource(Protocol):
    """What turns a cut into tokens."""

    @property
    def sizes(self) -> int | tuple[int, ...]:
        """Ids of a symbol; or of each field of a note."""

    def config(self) -> dict[str, Any]:
        """What makes the same one: for checkpoints and names of packs."""

    def tokens(self, cut: Cut) -> np.ndarray:
        """(L, F) int64."""

    def file(self, cut: Cut) -> str:
        """The file that the tokens come from; "" where it is the manifest."""


class CutSymbols:
    """Ids of the symbols that stage 3 has put into the cuts.

    Args:
        table: their ids.
        tokenizer: how they were made, as `TextTokenizer.config` says.
        ends: put the table's begin and end symbol around a text.
        size: ids that the model has embeddings for (default: those of the table).
    """

    def __init__(
        self, table: SymbolTable, tokenizer: dict[str, Any], ends: bool = False, size: int | None = None
    ) -> None:
        self.table, self.tokenizer, self.ends = table, tokenizer, ends
        self.sizes = size or len(table)

    def config(self) -> dict[str, Any]:
        """See `TextSource`."""
        return {
            "kind": "symbols",
            "symbols": list(self.table),
            "tokenizer": self.tokenizer,
            "ends": self.ends,
        }

    def tokens(self, cut: Cut) -> np.ndarray:
        """(L, 1).

        Raises:
            UserError: the cut has no symbols, or some that the table does not hold.
        """
        first = cut.supervisions[0] if cut.supervisions else None
        found = ((getattr(first, "custom", None) or {}).get("tokens") or {}).get("text")
        if not found:
            raise UserError(
                f"cut '{cut.id}' has no text symbols; run python -m valle.bin.text_tokens, then split_manifest"
            )
        if self.ends:
            found = [ENDS[0], *found, ENDS[1]]
        return np.array(self.table.encode(found), dtype=np.int64)[:, None]

    def file(self, cut: Cut) -> str:
        """See `TextSource`."""
        return ""


class CutNotes:
    """Tokens of the notes that sound in a cut, from its MIDI file.

    Args:
        tokenizer: makes them.
    """

    def __init__(self, tokenizer: MidiTokenizer) -> None:
        self.tokenizer = tokenizer
        self.sizes = tokenizer.vocab_sizes
        self._read = lru_cache(maxsize=MIDI_FILES)(read_notes)

    def config(self) -> dict[str, Any]:
        """See `TextSource`."""
        return {"kind": "notes", "tokenizer": self.tokenizer.config(), "ends": True}

    def notes(self, cut: Cut) -> Notes:
        """The notes of a cut, on its own clock.

        Raises:
            UserError: it names no MIDI file, or one that cannot be read.
        """
        path = self.file(cut)
        if not path:
            raise UserError(f"cut '{cut.id}' names no MIDI file: expected its path as custom[\"midi\"]")
        return crop(self._read(path), cut.start, cut.start + cut.duration)

    def tokens(self, cut: Cut) -> np.ndarray:
        """(L, 6), between a begin and an end row."""
        return self.tokenizer(self.notes(cut), add_special=True)

    def file(self, cut: Cut) -> str:
        """See `TextSource`."""
        return str((cut.custom or {}).get("midi") or "")


class PackedTexts:
    """The tokens of all cuts of a manifest: `texts[i]` is cut i's, (L,) or (L, F) uint16, a view into the file.

    Args:
        folder: a pack.

    Attributes:
        neighbours: (N,) int64, see the head of this file.

    Raises:
        OSError, ValueError, KeyError: it is not whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        info = json.loads((folder / "pack.json").read_text())
        if info["format"] != FORMAT:
            raise ValueError(f"format {info['format']}, expected {FORMAT}")
        self.sources: dict[str, list[int]] = info["sources"]
        self._tokens, self._ends, self.neighbours = (
            np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray)
            for name in ("tokens", "ends", "neighbours")
        )
        self.lens = np.diff(self._ends, prepend=0)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> np.ndarray:
        end = self._ends[index]
        found = self._tokens[end - self.lens[index] : end]
        return found[:, 0] if found.shape[1] == 1 else found

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedTexts, (self.folder,)  # a worker process maps the files itself


def open_packed_texts(manifest: Path, source: TextSource) -> PackedTexts:
    """The tokens of a manifest's cuts; they are packed first where that has not been done.

    Raises:
        UserError: what `source.tokens` says of a cut; no manifest; no folder that can be written.
    """
    key = hashlib.sha1(json.dumps([FORMAT, source.config()], sort_keys=True).encode()).hexdigest()[:12]
    return open_pack(manifest, f"text-{key}", PackedTexts, lambda folder: _build(manifest, folder, source))


def _build(manifest: Path, folder: Path, source: TextSource) -> None:
    ends, rows, groups = array("q"), [], []
    files: dict[str, None] = {}
    with unfinished_pack(folder) as unfinished:
        with progress(stream_manifest(manifest), desc=f"texts of {manifest.name}", unit="cut") as cuts:
            for cut in cuts:
                tokens = source.tokens(cut)
                rows.append(tokens.astype(np.uint16))
                ends.append((ends[-1] if ends else 0) + len(tokens))
                groups.append(_group(cut))
                files[source.file(cut)] = None
        if not rows:
            raise UserError(f"'{manifest}' holds no cut; run prepare.sh --stage 3, with more recordings")
        np.save(unfinished / "tokens.npy", np.concatenate(rows))
        np.save(unfinished / "ends.npy", np.asarray(ends))
        np.save(unfinished / "neighbours.npy", find_neighbours(groups))
        names = [name for name in files if name]
        stamps = {name: stamp_of(name) for name in names[:: max(1, len(names) // WATCHED_FILES)]}
        info = {
            "format": FORMAT,
            "manifest": str(manifest.resolve()),
            "source": source.config(),
            "sources": {name: stamp for name, stamp in stamps.items() if stamp is not None},
        }
        (unfinished / "pack.json").write_text(json.dumps(info, indent=1) + "\n")


def _group(cut: Cut) -> str:
    """What is heard in one room and voice: a chapter or a performance, else what one reader says."""
    custom = cut.custom or {}
    recording = getattr(cut, "recording", None)
    if custom.get("passage") or custom.get("source"):
        return str(custom.get("passage") or custom["source"])
    if recording is not None and cut.duration < recording.duration - 1e-3:  # one of several of its stretches
        return str(recording.id)
    speakers = [supervision.speaker for supervision in cut.supervisions if supervision.speaker]
    return str(speakers[0] if speakers else getattr(recording, "id", cut.id))


def find_neighbours(groups: Sequence[str]) -> np.ndarray:
    """For each item the nearest earlier one of its group, for a group's first the next one; -1 if it is alone."""
    found = np.full(len(groups), -1, dtype=np.int64)
    last: dict[str, int] = {}
    for index, group in enumerate(groups):
        before = last.get(group)
        if before is not None:
            found[index] = before
            if found[before] < 0:
                found[before] = index
        last[group] = index
    return found
