"""A manifest divided for tokenizing: batches of similar duration, shards, and what each shard has done.

The batches depend on the manifest alone: not on the number of shards, nor on what an earlier run has done. Batch b
belongs to shard b % N. A shard notes what became of its cuts in a file of its own,

    <output>/unfinished/<key>/00001-of-00004.jsonl      [number, "codes file", frames] or [number, null, "reason"]

sorted by the cut's place in the manifest, so that all shards are merged in one pass, in little memory. `key` stands
for the manifest, the codec and the way of batching; notes for another key are worth nothing.
"""

import contextlib
import fcntl
import hashlib
import heapq
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lhotse.cut import Cut

from valle.data.manifests import stream_manifest
from valle.utils.errors import UserError

log = logging.getLogger(__name__)
WINDOW = (
    4096  # cuts in memory at a time: batches are made of cuts of similar duration among so many neighbours
)
UNFINISHED = "unfinished"
T = TypeVar("T")
R = TypeVar("R")


class Place(NamedTuple):
    """A cut, and how many stand before it in the manifest."""

    number: int
    cut: Cut


class Note(NamedTuple):
    """What became of a cut: the name of its codes' file and their frames, or the reason why there are none."""

    number: int
    name: str | None
    result: int | str


def plan_windows(cuts: Iterable[Cut], batch_duration: float) -> Iterator[list[list[Place]]]:
    """Batches of cuts of similar duration, longest first, window by window.

    Args:
        cuts: of a manifest; read as far as needed.
        batch_duration: seconds of a batch, its padding included; a longer cut is a batch of its own.
    """
    places = (Place(number, cut) for number, cut in enumerate(cuts))
    while window := list(islice(places, WINDOW)):
        window.sort(key=lambda place: (-place.cut.duration, place.number))
        batches: list[list[Place]] = [[]]
        for place in window:
            batch = batches[-1]
            if batch and (len(batch) + 1) * batch[0].cut.duration > batch_duration:
                batches.append(batch := [])
            batch.append(place)
        yield batches


def read_ahead(items: Iterable[T], read: Callable[[T], R], threads: int) -> Iterator[R]:
    """`read(item)` for every item, in order, by threads that are at most one item each ahead of what is used."""
    with ThreadPoolExecutor(threads, thread_name_prefix="read") as pool:
        pending: deque[Future[R]] = deque()
        rest = iter(items)
        try:
            for item in islice(rest, threads):
                pending.append(pool.submit(read, item))
            while pending:
                result = pending.popleft().result()
                for item in islice(rest, 1):
                    pending.append(pool.submit(read, item))
                yield result
        finally:
            for future in pending:
                future.cancel()


def shard_key(manifest: Path, *parts: object) -> str:
    """Stands for a manifest's content and `parts`."""
    with open(manifest, "rb") as file:
        digest = hashlib.file_digest(file, "sha1")
    digest.update(repr(parts).encode())
    return digest.hexdigest()[:16]


class Notes:
    """What all shards of a run have noted.

    Args:
        output_dir: of the run.
        key: see `shard_key`.
        num_shards: of the run.
    """

    def __init__(self, output_dir: Path, key: str, num_shards: int) -> None:
        self.folder = output_dir / UNFINISHED / key
        self.paths = [self.folder / f"{number:05d}-of-{num_shards:05d}.jsonl" for number in range(num_shards)]

    @contextlib.contextmanager
    def writing(self, shard: int) -> Iterator[Callable[[list[Note]], None]]:
        """Gives a function that takes the notes of one window. The file gets its name when all are in."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.paths[shard]
        path.unlink(missing_ok=True)
        growing = path.with_suffix(f".{os.getpid()}")
        with open(growing, "w", encoding="utf-8") as file:

            def add(notes: list[Note]) -> None:
                for note in sorted(notes, key=lambda note: note.number):
                    file.write(json.dumps(note, ensure_ascii=False) + "\n")

            yield add
        os.replace(growing, path)

    def missing(self) -> list[int]:
        """Shards that are not done."""
        return [number for number, path in enumerate(self.paths) if not path.is_file()]

    def with_cuts(self, manifest: Path) -> Iterator[tuple[Cut, Note]]:
        """Every cut of the manifest with its note, in order.

        Raises:
            UserError: they do not fit together.
        """
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(path, encoding="utf-8")) for path in self.paths]
            streams = [(Note(*json.loads(line)) for line in file) for file in files]
            merged: Iterator[Any] = heapq.merge(*streams, key=lambda note: note.number)
            for number, cut in enumerate(stream_manifest(manifest)):
                note = next(merged, None)
                if note is None or note.number != number:
                    raise UserError(
                        f"'{self.folder}' does not fit '{manifest}' at cut '{cut.id}'; delete it and run again"
                    )
                yield cut, note


@contextlib.contextmanager
def only_one(output_dir: Path) -> Iterator[None]:
    """Wait until no other process is inside, as far as the file system has locks."""
    output_dir.mkdir(parents=True, exist_ok=True)
    handle = os.open(output_dir, os.O_RDONLY)  # the folder itself: no file is left behind
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
