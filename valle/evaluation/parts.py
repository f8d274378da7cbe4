"""What an evaluation keeps of each cut, so that it goes on where it stopped: continuations, figures, embeddings.

Each part's file is named after its cut and a digest of all that decides what is in it (weights, settings, codes,
versions of packages), so that nothing old is ever read for something new.
"""

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from valle.evaluation.clips import Continuation, file_stem
from valle.utils.files import atomic_path, write_json

Figures = dict[str, dict[str, dict[str, float | None]]]  # condition -> metric -> key -> value


def digest(value: Any) -> str:
    """Of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_digest(path: str | Path) -> str:
    """Of a file's contents."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def array_digest(array: np.ndarray) -> str:
    """Of an array's values and shape."""
    return digest([array.shape, hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()])


class Parts:
    """The folder of one cut's parts.

    Args:
        folder: of all cuts.
        cut_id: of this one.
        made_by: all that decides about the continuations.
        judged_by: what decides about figures and embeddings besides.
    """

    def __init__(self, folder: Path, cut_id: str, made_by: Any, judged_by: Any) -> None:
        stem = file_stem(cut_id)
        judged = digest([made_by, judged_by])
        self._codes = folder / f"{stem}-{digest(made_by)}.codes.npz"
        self._figures = folder / f"{stem}-{judged}.json"
        self._embeddings = folder / f"{stem}-{judged}.npz"

    def continuations(self) -> list[Continuation] | None:
        """One a seed; None where they are not made yet."""
        stored = _load(self._codes)
        if not stored:
            return None
        reasons = stored.pop("finish_reasons").tolist()
        return [Continuation(stored[f"codes{i}"], reason) for i, reason in enumerate(reasons)]

    def keep_continuations(self, parts: list[Continuation]) -> None:
        """Write them."""
        arrays = {f"codes{number}": part.codes for number, part in enumerate(parts)}
        _save(self._codes, arrays | {"finish_reasons": np.array([part.finish_reason for part in parts])})

    def figures(self) -> Figures:
        """What is known so far."""
        try:
            return json.loads(self._figures.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    def keep_figures(self, figures: Figures) -> None:
        """Write them."""
        write_json(self._figures, figures)

    def embeddings(self) -> dict[tuple[str, str], np.ndarray]:
        """(embedding, condition) -> (windows, D): what is known so far."""
        return {
            (name.split("|")[0], name.split("|")[1]): rows for name, rows in _load(self._embeddings).items()
        }

    def keep_embeddings(self, embeddings: dict[tuple[str, str], np.ndarray]) -> None:
        """Write them."""
        _save(
            self._embeddings, {f"{name}|{condition}": rows for (name, condition), rows in embeddings.items()}
        )


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (FileNotFoundError, zipfile.BadZipFile, ValueError):  # a damaged one is made again
        return {}


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
