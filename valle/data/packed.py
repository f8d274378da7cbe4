"""Codes of one cut, and of a whole manifest in one file that is mapped into memory.

Trainings read the latter: no lhotse cuts in memory, no file to open a cut.

    <manifest's folder>/packed/<manifest's name>-<digest>-<Q>x<V>/
        codes.u16      (F, Q) little-endian uint16, cut after cut in the manifest's order
        ends.npy       (N,) int64: the frame behind each cut's last
        durations.npy  (N,) float64 seconds
        prompt_durations.npy  (N,) float64 seconds that a cut's custom field `prompt_duration` names, NaN without
        ids.npy        uint8: all ids as UTF-8, one after the other
        id_ends.npy    (N,) int64: the byte behind each id's last
        pack.json      what it holds, and the time stamps of what it was read from

Whichever process needs a pack first builds it while others wait, and again when manifest or code files have changed.
"""

import contextlib
import fcntl
import gzip
import hashlib
import io
import json
import logging
import os
import re
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from lhotse.array import seconds_to_frames
from lhotse.cut import Cut
from lhotse.serialization import deserialize_item

from valle.data.manifests import stream_manifest
from valle.utils.errors import UserError
from valle.utils.progress import progress

log = logging.getLogger(__name__)
FORMAT = 2
CUT_MARK = "prompt_duration"  # the field of `cut.custom` that names the length of a cut's prompt, in seconds
LARGEST_CODEBOOK = 65536  # that uint16 holds
WATCHED_FILES = 64  # about so many code files, spread over the manifest, are watched besides their folders
UNFINISHED = ".unfinished-"


class Pack(Protocol):
    """Something packed: `sources` are the files and folders it was made of, with their time stamps."""

    sources: dict[str, list[int]]


P = TypeVar("P", bound=Pack)


def stored_codes(cut: Cut) -> np.ndarray:
    """A cut's codec tokens as they are stored, of whatever shape and type.

    They are the custom array `audio_features`, or `cut.features` as older VALL-E recipes write them.

    Raises:
        UserError: no codes, or they cannot be read.
    """
    custom = getattr(cut, "custom", None) or {}
    try:
        if "audio_features" in custom:
            return np.asarray(cut.load_audio_features())
        if cut.has_features:
            return np.asarray(cut.load_features())
    except (OSError, ValueError, AssertionError) as error:
        raise UserError(
            f"cut '{cut.id}': its codes cannot be read ({error}); run prepare.sh --stage 2"
        ) from error
    raise UserError(f"cut '{cut.id}' has no codes; run prepare.sh --stage 2")


def load_codes(
    cut: Cut,
    num_quantizers: int | None = None,
    codebook_size: int | None = None,
    stored: np.ndarray | None = None,
) -> np.ndarray:
    """A cut's codec tokens, checked.

    Args:
        cut: with codes.
        num_quantizers: read the first so many (default: all).
        codebook_size: codes must be below it.
        stored: its `stored_codes`, where they have been read.

    Returns:
        (T, Q) int64.

    Raises:
        UserError: no codes, unreadable, too few quantizers, or codes out of range.
    """
    codes = stored_codes(cut) if stored is None else stored
    if codes.ndim != 2 or codes.shape[0] == 0:
        raise UserError(f"cut '{cut.id}': codes of shape {codes.shape}, expected (frames, quantizers)")
    if num_quantizers is not None:
        if codes.shape[1] < num_quantizers:
            raise UserError(
                f"cut '{cut.id}': {codes.shape[1]} quantizers, but {num_quantizers} are to be modelled; "
                "run prepare.sh --stage 2 again, or lower --num-quantizers"
            )
        codes = codes[:, :num_quantizers]
    if np.issubdtype(codes.dtype, np.floating) and not np.array_equal(codes, np.round(codes)):
        raise UserError(f"cut '{cut.id}': its features are no codec tokens (they have fractions)")
    codes = codes.astype(np.int64)
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or (codebook_size is not None and high >= codebook_size):
        raise UserError(
            f"cut '{cut.id}': codes from {low} to {high}, expected 0 to {(codebook_size or 65536) - 1}; "
            "were they made with another codec? run prepare.sh --stage 2 again"
        )
    return codes


def prompt_mark(cut: Cut) -> float:
    """Seconds of its beginning that a cut names as its prompt; NaN where it names none.

    Raises:
        UserError: what it says is no number.
    """
    mark = (getattr(cut, "custom", None) or {}).get(CUT_MARK)
    if mark is None:
        return float("nan")
    if isinstance(mark, bool) or not isinstance(mark, int | float):
        raise UserError(f"cut '{cut.id}': its '{CUT_MARK}' is {mark!r}, expected a number of seconds")
    return float(mark)


class PackedCodes:
    """The codes of all cuts of a manifest: `codes[i]` is cut i's, (T, Q) uint16, a view into the file.

    Args:
        folder: a pack.

    Attributes:
        frames: (N,) int64 of each cut.
        durations: (N,) float64 seconds.
        prompt_durations: (N,) float64 seconds that each cut names as its prompt, NaN where it does not.

    Raises:
        OSError, ValueError, KeyError: it is not whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        info = json.loads((folder / "pack.json").read_text())
        shape = (int(info["frames"]), int(info["num_quantizers"]))
        if info["format"] != FORMAT:
            raise ValueError(f"format {info['format']}, expected {FORMAT}")
        self.sources: dict[str, list[int]] = info["sources"]
        self._codes = np.memmap(folder / "codes.u16", dtype="<u2", mode="r", shape=shape).view(np.ndarray)
        self._ends, self.durations, self.prompt_durations, self._ids, self._id_ends = (
            np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray)
            for name in ("ends", "durations", "prompt_durations", "ids", "id_ends")
        )
        self.frames = np.diff(self._ends, prepend=0)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> np.ndarray:
        end = self._ends[index]
        return self._codes[end - self.frames[index] : end]

    def id(self, index: int) -> str:
        """A cut's id."""
        start = self._id_ends[index - 1] if index else 0
        return self._ids[start : self._id_ends[index]].tobytes().decode()

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps the file itself.
        return PackedCodes, (self.folder,)


def open_packed(manifest: Path, num_quantizers: int, codebook_size: int) -> PackedCodes:
    """The codes of a manifest; they are packed first, and checked, where that has not been done.

    A pack is kept beside the manifest, or where nothing can be written there, in the folder for temporary files. Packs
    of what the manifest was before are removed. A code file that is overwritten in place is noticed by chance only, as
    no more than `WATCHED_FILES` of them are looked at; those of this package have a digest of their content's origin in
    their name.

    Args:
        manifest: cuts with codes.
        num_quantizers: the first so many are packed.
        codebook_size: codes must be below it.

    Raises:
        UserError: what `load_codes` says of a cut; no manifest; no folder that can be written.
    """
    return open_pack(
        manifest,
        f"{num_quantizers}x{codebook_size}",
        PackedCodes,
        lambda folder: _build(manifest, folder, num_quantizers, codebook_size),
    )


def open_pack(manifest: Path, kind: str, open_it: Callable[[Path], P], build: Callable[[Path], object]) -> P:
    """What was made of a manifest; made first where it is not there.

    Args:
        manifest: what it is made of.
        kind: what is made, and how, as the end of a file name: `4x1024`, `text-` and a digest.
        open_it: opens a folder of it; what it gives has `sources`, see `PackedCodes`.
        build: makes the folder.

    Raises:
        UserError: no manifest; no folder that can be written; what `build` raises.
    """
    name = re.sub(r"\.jsonl(\.gz)?$", "", manifest.name)
    pack = f"{name}-{_digest(manifest)}-{kind}"
    place = hashlib.sha1(str(manifest.resolve().parent).encode()).hexdigest()[:12]
    folders = [
        manifest.parent / "packed",
        Path(tempfile.gettempdir()) / f"valle-packed-{os.getuid()}" / place,
    ]
    for folder in folders:
        if (found := _opened(folder / pack, open_it)) is not None:
            return found
    reasons = []
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _alone(folder) as alone:
                # Another process may have packed them while this one waited.
                if (found := _opened(folder / pack, open_it)) is None:
                    build(folder / pack)
                    found = open_it(folder / pack)
                if alone:
                    _remove_stale(folder, name, pack)
                return found
        except OSError as error:
            reasons.append(f"'{folder}': {error.strerror or error}")
            log.warning("codes cannot be packed in %s", reasons[-1])
    raise UserError(
        f"'{manifest}': its codes cannot be packed ({'; '.join(reasons)}); free space, or set TMPDIR to a folder that "
        "can be written"
    )


def _digest(manifest: Path) -> str:
    try:
        with open(manifest, "rb") as file:
            return hashlib.file_digest(file, "sha1").hexdigest()[:12]
    except FileNotFoundError:
        raise UserError(
            f"manifest '{manifest}' does not exist; run the stage of prepare.sh that writes it"
        ) from None


def _opened(folder: Path, open_it: Callable[[Path], P]) -> P | None:
    """A pack that is there, whole, and of files that have not changed since."""
    if not folder.is_dir():
        return None
    try:
        found = open_it(folder)
    except (OSError, ValueError, KeyError) as error:
        log.warning("'%s' is damaged (%s): it is packed anew", folder, error)
        return None
    for path, stamp in found.sources.items():
        if stamp_of(path) not in (stamp, None):  # what is gone contradicts nothing
            log.info("'%s' has changed: what is packed of it is made anew", path)
            return None
    return found


def stamp_of(path: str) -> list[int] | None:
    """What changes when a file or the list of a folder's files does; None: there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_mtime_ns] if os.path.isdir(path) else [status.st_mtime_ns, status.st_size]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Wait until no other process packs in a folder; the lock of one that dies is freed by the system.

    Yields whether that is certain: some network file systems have no locks. Work is then done twice at worst.
    """
    with open(folder / ".lock", "w") as file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("another process packs codes in '%s': waiting for it", folder)
                fcntl.flock(file, fcntl.LOCK_EX)
            alone = True
        except OSError:
            alone = False
        yield alone


@contextlib.contextmanager
def unfinished_pack(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which gets the name `folder` when all has gone well."""
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=folder.parent) as name:
        unfinished = Path(name) / folder.name  # with the usual permissions, which the one around it has not
        unfinished.mkdir()
        yield unfinished
        if folder.exists():  # damaged, or of other files
            os.rename(folder, Path(name) / "old")
        os.rename(unfinished, folder)


def _build(manifest: Path, folder: Path, num_quantizers: int, codebook_size: int) -> None:
    """Write a pack: under another name, then renamed."""
    limit = min(codebook_size, LARGEST_CODEBOOK)
    ends, durations, marks, id_ends, ids = array("q"), array("d"), array("d"), array("q"), bytearray()
    sources: set[str] = set()
    watched: list[str] = []
    stride, frames = 1, 0
    with unfinished_pack(folder) as unfinished:
        rows = progress(_rows(manifest, num_quantizers, limit), desc=f"packing {manifest.name}", unit="cut")
        with open(unfinished / "codes.u16", "wb") as file, rows:
            for number, (name, duration, mark, path, codes) in enumerate(rows):
                file.write(codes.tobytes())
                frames += len(codes)
                ids += name.encode()
                ends.append(frames)
                durations.append(duration)
                marks.append(mark)
                id_ends.append(len(ids))
                sources.add(os.path.dirname(path))
                if number % stride == 0:
                    watched.append(path)
                    if len(watched) == 2 * WATCHED_FILES:
                        watched, stride = watched[::2], 2 * stride
        if not ends:
            raise UserError(f"'{manifest}' holds no cut; run prepare.sh --stage 3, with more recordings")
        parts = {
            "ends": ends,
            "durations": durations,
            "prompt_durations": marks,
            "id_ends": id_ends,
            "ids": np.frombuffer(ids, np.uint8),
        }
        for part, values in parts.items():
            np.save(unfinished / f"{part}.npy", np.asarray(values))
        stamps = {path: stamp_of(path) for path in sorted({*sources, *watched} - {""})}
        info = {
            "format": FORMAT,
            "manifest": str(manifest.resolve()),
            "cuts": len(ends),
            "frames": frames,
            "num_quantizers": num_quantizers,
            "sources": {path: stamp for path, stamp in stamps.items() if stamp is not None},
        }
        (unfinished / "pack.json").write_text(json.dumps(info, indent=1) + "\n")
    log.info(
        "packed the codes of %d cuts (%.0f MB) in '%s'", len(ends), frames * num_quantizers * 2e-6, folder
    )


def _rows(
    manifest: Path, num_quantizers: int, limit: int
) -> Iterator[tuple[str, float, float, str, np.ndarray]]:
    """Of each cut id, seconds, prompt's seconds, code file, and codes (T, Q) "<u2", as lhotse and `load_codes` give.

    What this package writes, whole arrays in files of NumPy, is read without lhotse's objects, several times as fast.
    """
    reader = _CodeReader()
    for item in _items(manifest):
        found = reader.read(item, num_quantizers, limit) if isinstance(item, dict) else None
        if found is None:
            cut = deserialize_item(item) if isinstance(item, dict) else item
            codes = load_codes(cut, num_quantizers, limit)
            found = (cut.id, cut.duration, prompt_mark(cut), _code_file(cut), codes.astype("<u2"))
        yield found


def _items(manifest: Path) -> Iterator[Any]:
    """The cuts of a manifest: as dicts where its lines are JSON, else as lhotse has them."""
    if not re.search(r"\.jsonl(\.gz)?$", manifest.name) or not manifest.is_file():
        yield from stream_manifest(manifest)
        return
    try:
        with gzip.open(manifest, "rb") if manifest.suffix == ".gz" else open(manifest, "rb") as file:
            for line in file:
                item = json.loads(line)
                if item.get("type") not in ("MonoCut", "MultiCut", "MixedCut", "PaddingCut"):
                    raise TypeError(f"it holds a {item.get('type', 'line that is no cut')}")
                yield item
    except (OSError, EOFError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"'{manifest}' is no manifest of lhotse cuts ({type(error).__name__}: {error})"
        ) from error


class _CodeReader:
    """Reads codes that lie in files of NumPy; remembers the headers, of which there are few."""

    def __init__(self) -> None:
        self._headers: dict[bytes, tuple[int, int] | None] = {}

    def read(
        self, item: dict[str, Any], num_quantizers: int, limit: int
    ) -> tuple[str, float, float, str, np.ndarray] | None:
        """See `_rows`; None where it takes lhotse, or where something is wrong, which `load_codes` then names."""
        custom = item.get("custom") or {}
        stored = custom.get("audio_features")
        mark = custom.get(CUT_MARK, float("nan"))
        if item.get("type") != "MonoCut" or not isinstance(stored, dict) or not isinstance(mark, float):
            return None
        array = stored.get("array", {})
        if array.get("storage_type") != "numpy_files" or stored.get("start") != item["start"]:
            return None
        path = os.path.join(array["storage_path"], array["storage_key"])
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError:
            return None
        size = 10 + int.from_bytes(data[8:10], "little")  # version 1.0 of the format
        shape = self._shape(data[:size])
        if shape is None or len(data) != size + 2 * shape[0] * shape[1]:
            return None
        frames = seconds_to_frames(item["duration"], stored["frame_shift"], max_index=array["shape"][0])
        codes = np.frombuffer(data, "<u2", offset=size).reshape(shape)[:frames, :num_quantizers]
        if codes.shape[1] != num_quantizers or not len(codes) or int(codes.max()) >= limit:
            return None
        return item["id"], item["duration"], mark, path, np.ascontiguousarray(codes)

    def _shape(self, header: bytes) -> tuple[int, int] | None:
        if header not in self._headers:
            try:
                file = io.BytesIO(header)
                version = np.lib.format.read_magic(file)
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
                good = version == (1, 0) and not fortran and dtype == np.dtype("<u2") and len(shape) == 2
                self._headers[header] = (int(shape[0]), int(shape[1])) if good else None
            except ValueError:
                self._headers[header] = None
        return self._headers[header]


def _code_file(cut: Cut) -> str:
    """The file that a cut's codes are in, or a place in it; "" where they are in the manifest itself."""
    custom = getattr(cut, "custom", None) or {}
    stored: Any = custom.get("audio_features") or getattr(cut, "features", None)
    stored = getattr(stored, "array", stored)  # a TemporalArray's, while Features are their own
    path = getattr(stored, "storage_path", None)
    return os.path.join(str(path), str(stored.storage_key)) if path else ""


def _remove_stale(folder: Path, name: str, pack: str) -> None:
    """Delete packs of the manifest as it was, and what builds that were killed have left."""
    digest = pack.removeprefix(f"{name}-")[:12]
    for other in folder.iterdir():
        match = re.fullmatch(
            re.escape(name) + r"-([0-9a-f]{12})-(?:\d+x\d+|(?:text|times)-[0-9a-f]+)", other.name
        )
        if other.name.startswith(UNFINISHED) or (match and match[1] != digest):
            shutil.rmtree(other, ignore_errors=True)
