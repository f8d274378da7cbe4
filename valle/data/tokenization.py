"""Codec tokens for every cut of a manifest: stage 2 of every recipe, between recordings and training.

A cut's codes lie in a file whose name ends in a digest of what they were made from: the audio file's bytes, the cut's
place in it, and the codec's weights. A file of that name is right and whole, so a killed run is taken up where it
stopped, and a changed recording or codec is computed anew.

Threads read, hash and resample the coming batches while the codec works on one. A batch of which any codes are missing
is encoded whole: it is put together as it was the first time, so that not even rounding tells a run that was killed
from one that was not.
"""

import gzip
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lhotse.array import Array, TemporalArray
from lhotse.cut import Cut, MixedCut
from torch import Tensor

from valle.codecs.base import LONG_SECONDS, Codec
from valle.data.manifests import file_id, stream_manifest, with_codes, write_jsonl
from valle.data.shards import (
    UNFINISHED,
    WINDOW,
    Note,
    Notes,
    Place,
    only_one,
    plan_windows,
    read_ahead,
    shard_key,
)
from valle.utils.audio import convert_audio
from valle.utils.errors import UserError
from valle.utils.files import atomic_path, write_json
from valle.utils.progress import progress

logger = logging.getLogger(__name__)

BATCH_DURATION = 120.0  # seconds
READERS = 2
BLOCK_SECONDS = 60.0  # a long cut is read in blocks
SEEKABLE = (".wav", ".flac")  # every sample can be reached directly
HASHED_FILES = 1 << 16  # whose digests are kept


@dataclass(frozen=True)
class TokenizationResult:
    """What a run did: numbers of cuts, and seconds of audio that it encoded."""

    encoded: int
    reused: int
    skipped: int
    encoded_duration: float


@dataclass
class _Read:
    """A cut on its way: where its codes go, then one of: their frames if they are there, its samples, an error."""

    place: Place
    path: Path | None = None
    frames: int | None = None
    wav: Tensor | None = None  # (C, N) at the codec's rate
    error: str | None = None
    encoded: bool = False  # in this run


def tokenize_manifest(
    manifest: Path,
    output_dir: Path,
    codec: Codec,
    max_skipped: int = -1,
    batch_duration: float = BATCH_DURATION,
    readers: int = READERS,
) -> TokenizationResult:
    """Encode every cut of `manifest`.

    Writes into `output_dir`: codes/<split>/<cut>.<digest>.npy, (T, Q) uint16 each; cuts_all.jsonl.gz, the cuts with
    their codes as the temporal array `audio_features`; codec.json; skipped.jsonl, cuts left out with the reason.

    Args:
        manifest: lhotse cuts of any sample rate and channel count.
        codec: is asked for its rate, channels, hop and number of quantizers.
        max_skipped: more cuts left out than this is an error; -1 is no limit.
        batch_duration: seconds of audio that are encoded together, padding included.
        readers: threads that read ahead.

    Raises:
        UserError: no manifest, no cut that could be encoded, or more than `max_skipped` that could not.
    """
    result = tokenize_shard(manifest, output_dir, codec, 0, 1, max_skipped, batch_duration, readers)
    skipped = merge_shards(manifest, output_dir, codec, 1, max_skipped, batch_duration)
    return replace(result, skipped=result.skipped if skipped is None else skipped)


def tokenize_shard(
    manifest: Path,
    output_dir: Path,
    codec: Codec,
    shard: int,
    num_shards: int,
    max_skipped: int = -1,
    batch_duration: float = BATCH_DURATION,
    readers: int = READERS,
    show: bool = True,
) -> TokenizationResult:
    """Encode one shard's cuts; `merge_shards` writes the manifest when all shards are done.

    Args:
        shard: number of the shard, from 0.
        num_shards: how many there are.
        show: a progress bar.
        manifest, output_dir, codec, max_skipped, batch_duration, readers: see `tokenize_manifest`.

    Raises:
        UserError: no manifest, or more than `max_skipped` cuts that could not be encoded.
    """
    for name, value, least in (("batch-duration", batch_duration, 0.001), ("readers", readers, 1)):
        if not value >= least:
            raise UserError(f"--{name} is {value}, expected {least:g} or more")
    if not 0 <= shard < num_shards:
        raise UserError(
            f"--shard is {shard}, expected 0 to {num_shards - 1}, as there are {num_shards} shards"
        )
    total = _count_lines(manifest)
    info = codec.info()
    if shard == 0:
        _announce_change(output_dir / "codec.json", info)
    work = _Work(output_dir, codec, info["fingerprint"])
    notes = Notes(output_dir, _key(manifest, info, batch_duration), num_shards)
    counts = {"encoded": 0, "reused": 0, "skipped": 0}
    encoded_duration = 0.0
    start = time.monotonic()
    bar = progress(desc="tokenize", unit="cut", total=-(-total // num_shards), disable=not show)
    with bar, notes.writing(shard) as add:
        gathered: list[Note] = []
        batches = _batches_of(manifest, batch_duration, shard, num_shards)
        for batch in read_ahead(batches, work.read, readers):
            if batch is None:  # the end of a window
                add(gathered)
                gathered.clear()
                continue
            for item, outcome in work.finish(batch):
                counts[outcome] += 1
                encoded_duration += item.place.cut.duration if outcome == "encoded" else 0.0
                gathered.append(_note(item))
                if 0 <= max_skipped < counts["skipped"]:
                    raise _too_many(manifest, counts["skipped"], max_skipped, str(item.error))
            speed = encoded_duration / max(time.monotonic() - start, 1e-9)
            bar.set_postfix_str(f"{speed:.1f} audio-hours/hour", refresh=False)
            bar.update(len(batch))
    return TokenizationResult(**counts, encoded_duration=encoded_duration)


def merge_shards(
    manifest: Path,
    output_dir: Path,
    codec: Codec,
    num_shards: int,
    max_skipped: int = -1,
    batch_duration: float = BATCH_DURATION,
) -> int | None:
    """Write the manifest of all shards' codes, once all are done, and remove what nothing refers to.

    Returns:
        Number of cuts left out in all shards; None: some shard is not done yet, or another process has merged them.

    Raises:
        UserError: no cut could be encoded, or more than `max_skipped` could not.
    """
    info = codec.info()
    with only_one(output_dir):
        notes = Notes(output_dir, _key(manifest, info, batch_duration), num_shards)
        if missing := notes.missing():
            logger.info("%d of %d shards are not done yet", len(missing), num_shards)
            return None
        skipped: list[dict[str, str]] = []
        used: set[tuple[str, str]] = set()
        growing = notes.folder / "cuts_all.jsonl.gz"
        # No name and no time stamp in the gzip header: the same cuts give the same bytes.
        with open(growing, "wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
            for cut, note in notes.with_cuts(manifest):
                if note.name is None:
                    skipped.append({"id": cut.id, "reason": str(note.result)})
                    continue
                folder = output_dir / "codes" / _split(cut)
                used.add((folder.name, note.name))
                array = _temporal_array(cut, folder / note.name, int(note.result), codec)
                line = json.dumps(with_codes(cut, array).to_dict(), ensure_ascii=False, allow_nan=False)
                file.write(line.encode() + b"\n")
        # Made inside the folder that goes at the end, so that a run that is killed leaves nothing behind.
        write_jsonl(notes.folder / "skipped.jsonl", skipped)
        write_json(notes.folder / "codec.json", info)
        _replace_if_new(notes.folder / "skipped.jsonl", output_dir / "skipped.jsonl")
        if not used:
            shutil.rmtree(output_dir / UNFINISHED)
            first = skipped[0]["reason"] if skipped else "it is empty"
            raise UserError(f"'{manifest}': no cut could be tokenized; the first: {first}")
        if 0 <= max_skipped < len(skipped):
            raise _too_many(manifest, len(skipped), max_skipped, skipped[-1]["reason"])
        if skipped:
            count = len(skipped) + len(used)
            logger.warning(
                "left out %d of %d cuts; reasons in %s", len(skipped), count, output_dir / "skipped.jsonl"
            )
        _replace_if_new(notes.folder / "codec.json", output_dir / "codec.json")
        _replace_if_new(growing, output_dir / "cuts_all.jsonl.gz")
        _remove_stale(output_dir / "codes", used)
        shutil.rmtree(output_dir / UNFINISHED)
        return len(skipped)


# --------------------------------------------------------------------------------------------- one batch


class _Work:
    """Reads a batch (in a thread), then encodes it."""

    def __init__(self, output_dir: Path, codec: Codec, fingerprint: str) -> None:
        self.output_dir, self.codec, self.fingerprint = output_dir, codec, fingerprint

    def read(self, batch: list[Place] | None) -> list[_Read] | None:
        """Find the codes of a batch, or else load its audio."""
        if batch is None:
            return None
        items = [_Read(place) for place in batch]
        for item in items:
            self._attempt(item, self._find)
        if any(item.frames is None and item.error is None for item in items):
            for item in items:
                if item.error is None:
                    self._attempt(item, self._load)
        return items

    def _attempt(self, item: _Read, step: Any) -> None:
        try:
            step(item)
        except UserError as error:
            item.error = str(error)
        except Exception as error:  # whatever lhotse, soundfile or soxr may raise for this one
            item.error = f"cut '{item.place.cut.id}': {type(error).__name__}: {_one_line(error)}"

    def _find(self, item: _Read) -> None:
        cut = item.place.cut
        item.path = self.output_dir / "codes" / _split(cut) / _file_name(cut, self.fingerprint)
        item.frames = _stored_frames(item.path, self.codec)

    def _load(self, item: _Read) -> None:
        item.wav = load_wav(item.place.cut, self.codec)

    def finish(self, batch: list[_Read]) -> Iterator[tuple[_Read, str]]:
        """Encode and store what is missing; gives each cut and what became of it: encoded, reused or skipped."""
        loaded = [item for item in batch if item.wav is not None]
        if loaded:
            for item, codes in zip(loaded, self._encode(loaded), strict=True):
                item.wav = None
                if item.frames is not None:
                    continue  # its codes were there, and it only keeps the others company
                if isinstance(codes, str):
                    item.error = codes
                    continue
                assert item.path is not None
                _store(item.path, codes)
                item.frames, item.encoded = len(codes), True
        for item in batch:
            if item.frames is None:
                yield item, "skipped"
            else:
                yield item, "encoded" if item.encoded else "reused"

    def _encode(self, items: Sequence[_Read]) -> list[np.ndarray | str]:
        """(T, Q) uint16 codes of each cut, or why there are none."""
        try:
            with torch.inference_mode():
                codes = self.codec.encode_batch([item.wav for item in items if item.wav is not None])
        except Exception as error:  # a codec may fail in any way at what it is given
            if "CUDA error" in str(error):
                raise  # the device is gone: the cut is not at fault
            if len(items) > 1:
                return [result for item in items for result in self._encode([item])]
            return [f"cut '{items[0].place.cut.id}': codec '{self.codec.name}' failed: {_one_line(error)}"]
        return [self._checked(item, rows) for item, rows in zip(items, codes, strict=True)]

    def _checked(self, item: _Read, codes: Tensor) -> np.ndarray | str:
        assert item.wav is not None
        codec, expected = self.codec, self.codec.num_frames(item.wav.shape[1])
        if abs(len(codes) - expected) > 1 or codes.shape[1] != codec.num_quantizers:
            return (
                f"cut '{item.place.cut.id}': codec '{codec.name}' gave {tuple(codes.shape)} codes, expected"
                f" ({expected}, {codec.num_quantizers})"
            )
        rows = codes.cpu().numpy()
        if rows.min() < 0 or rows.max() >= codec.codebook_size:
            return (
                f"cut '{item.place.cut.id}': codec '{codec.name}' gave codes from {rows.min()} to {rows.max()},"
                f" expected 0 to {codec.codebook_size - 1}"
            )
        return rows.astype(np.uint16)


def _batches_of(
    manifest: Path, batch_duration: float, shard: int, num_shards: int
) -> Iterator[list[Place] | None]:
    """A shard's batches, and None at the end of each window."""
    number = 0
    for batches in plan_windows(stream_manifest(manifest), batch_duration):
        for batch in batches:
            if number % num_shards == shard:
                yield batch
            number += 1
        yield None


def _note(item: _Read) -> Note:
    if item.frames is None:
        # A file name need not be Unicode.
        return Note(item.place.number, None, str(item.error).encode(errors="backslashreplace").decode())
    assert item.path is not None
    return Note(item.place.number, item.path.name, item.frames)


def _key(manifest: Path, info: dict[str, Any], batch_duration: float) -> str:
    return shard_key(manifest, info["fingerprint"], batch_duration, WINDOW)


def _count_lines(manifest: Path) -> int:
    """Cuts of a manifest, for the progress bar."""
    if not manifest.is_file():
        raise UserError(f"manifest '{manifest}' does not exist; run the stage of prepare.sh that writes it")
    try:
        with (gzip.open if manifest.suffix == ".gz" else open)(manifest, "rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    except (OSError, EOFError):  # reading it will tell
        return 0


def _too_many(manifest: Path, count: int, max_skipped: int, reason: str) -> UserError:
    return UserError(
        f"'{manifest}': {count} cuts could not be tokenized, --max-skipped is {max_skipped}; the last: {reason}"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# ------------------------------------------------------------------------------------------------- codec


def _announce_change(path: Path, info: dict[str, Any]) -> None:
    """Say it when the folder holds another codec's codes."""
    old = _read_info(path)
    if old is not None and old.get("fingerprint") != info["fingerprint"]:
        logger.info(
            "codec changed: %s (%s) -> %s (%s); all cuts are tokenized anew",
            *(old.get("name"), old.get("fingerprint"), info["name"], info["fingerprint"]),
        )


def _read_info(path: Path) -> dict[str, Any] | None:
    try:
        old = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return old if isinstance(old, dict) else None


# ------------------------------------------------------------------------------------------------- names


def _split(cut: Cut) -> str:
    return file_id(str((cut.custom or {}).get("split", "all")))


def _file_name(cut: Cut, fingerprint: str) -> str:
    digest = hashlib.sha1(f"{cut.id}\n{cut.start}\n{cut.duration}\n{fingerprint}".encode())
    for source in _sources(cut):
        digest.update(source.encode())
    return f"{file_id(cut.id)}.{digest.hexdigest()[:16]}.npy"


def _sources(cut: Cut) -> list[str]:
    """A digest of each audio file under the cut."""
    if isinstance(cut, MixedCut):
        raise UserError(
            f"cut '{cut.id}' is mixed of {len(cut.tracks)} tracks, and such a cut cannot carry codes; write the"
            " mix to an audio file"
        )
    if getattr(cut, "recording", None) is None:
        raise UserError(f"cut '{cut.id}' has no recording")
    return [
        _file_digest(source.source) if source.type == "file" else f"{source.type} {source.source}"
        for source in cut.recording.sources
    ]


def _file_digest(path: str) -> str:
    try:
        status = Path(path).stat()
        return _cached_digest(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise UserError(f"audio file '{path}' cannot be read: {error.strerror or error}") from error


@lru_cache(maxsize=HASHED_FILES)
def _cached_digest(path: str, size: int, mtime_ns: int) -> str:
    """Many cuts may lie in one recording: read it once, as long as it is as it was."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha1").hexdigest()


# ------------------------------------------------------------------------------------------------- audio


def load_wav(cut: Cut, codec: Codec) -> Tensor:
    """(C, N) at the codec's rate.

    Raises:
        UserError: unreadable, empty, NaN or infinite.
    """
    try:
        wav = _load_blocks(cut, codec) if _is_long(cut) else _load_whole(cut, codec)
    except UserError:
        raise
    except Exception as error:  # lhotse raises whatever its many readers do
        raise UserError(f"cut '{cut.id}': audio cannot be read ({_one_line(error)})") from error
    return torch.from_numpy(wav)


def _load_whole(cut: Cut, codec: Codec) -> np.ndarray:
    wav = _samples(cut, cut.id)
    return convert_audio(wav, cut.sampling_rate, codec.sample_rate, codec.channels)


def _is_long(cut: Cut) -> bool:
    sources = cut.recording.sources
    return cut.duration > LONG_SECONDS and all(
        source.type == "file" and Path(source.source).suffix.lower() in SEEKABLE for source in sources
    )


def _load_blocks(cut: Cut, codec: Codec) -> np.ndarray:
    """As `_load_whole`, without ever holding all of the recording's own channels and rate in memory."""
    import soxr

    stream = None
    if cut.sampling_rate != codec.sample_rate:
        stream = soxr.ResampleStream(
            cut.sampling_rate, codec.sample_rate, codec.channels, dtype="float32", quality="HQ"
        )
    bare = cut.drop_supervisions()
    blocks = []
    starts = np.arange(0.0, cut.duration, BLOCK_SECONDS).tolist()
    for start in starts:
        block = bare.truncate(offset=start, duration=min(BLOCK_SECONDS, cut.duration - start))
        wav = convert_audio(
            _samples(block, cut.id), codec.sample_rate, codec.sample_rate, codec.channels
        )  # channels only
        if stream is not None:
            wav = stream.resample_chunk(np.ascontiguousarray(wav.T), last=start == starts[-1]).T
        blocks.append(wav)
    return np.ascontiguousarray(np.concatenate(blocks, axis=1))


def _samples(cut: Cut, name: str) -> np.ndarray:
    """(C, N) at the recording's rate."""
    wav = cut.load_audio()
    if wav is None or wav.shape[-1] == 0:
        raise UserError(f"cut '{name}' has no samples")
    if not np.isfinite(wav).all():
        raise UserError(f"cut '{name}' has NaN or infinite samples")
    return np.atleast_2d(wav)


# ------------------------------------------------------------------------------------------------- files


def _stored_frames(path: Path, codec: Codec) -> int | None:
    """T of codes that are there already and whole, or None."""
    try:
        codes = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return None
    if codes.dtype != np.uint16 or codes.ndim != 2 or codes.shape[1] != codec.num_quantizers:
        return None
    return len(codes)


def _store(path: Path, codes: np.ndarray) -> None:
    with atomic_path(path) as temporary:
        np.save(temporary, codes, allow_pickle=False)


def _temporal_array(cut: Cut, path: Path, frames: int, codec: Codec) -> TemporalArray:
    return TemporalArray(
        array=Array(
            storage_type="numpy_files",
            storage_path=str(path.parent.resolve()),
            storage_key=path.name,
            shape=[frames, codec.num_quantizers],
        ),
        temporal_dim=0,
        frame_shift=codec.hop_length / codec.sample_rate,
        start=cut.start,
    )


def _replace_if_new(new: Path, path: Path) -> None:
    """Give a file its name, unless one with the same content has it."""
    if path.is_file() and path.stat().st_size == new.stat().st_size and _same(new, path):
        new.unlink()
    else:
        os.replace(new, path)


def _same(one: Path, other: Path) -> bool:
    with open(one, "rb") as first, open(other, "rb") as second:
        return hashlib.file_digest(first, "sha1").digest() == hashlib.file_digest(second, "sha1").digest()


def _remove_stale(folder: Path, used: set[tuple[str, str]]) -> None:
    """Delete codes that no cut refers to: of another codec, of recordings that are gone, of writes cut off."""
    for split in os.scandir(folder):
        for entry in os.scandir(split):
            if entry.name.endswith(".npy") and (split.name, entry.name) not in used:
                os.unlink(entry)
