"""Checkpoints: one file with everything that going on, or generating, needs. Loads weights-only, written atomically.

Names: `epoch-N.pt`, `checkpoint-<step>.pt`, `best-valid-loss.pt`, `best-train-loss.pt`; each stage's best is kept as
`best-valid-loss-stage<S>.pt` as well, for the next stage to start from. With `--checkpoint-format sharded` the numbered
ones are folders, `epoch-N` and `checkpoint-<step>` (valle/utils/sharded.py); the best stay files, for who generates.
"""

import logging
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from valle.utils.checkpoints import load_checkpoint
from valle.utils.errors import UserError
from valle.utils.files import atomic_path
from valle.utils.sharded import read_header, remove_sharded, sweep

__all__ = [
    "NumberedCheckpoint",
    "is_numbered",
    "load_checkpoint",
    "newest_checkpoint",
    "numbered_checkpoint",
    "numbered_checkpoints",
    "remove_leftovers",
    "remove_old",
    "save_checkpoint",
]
log = logging.getLogger(__name__)
NUMBERED = {kind: re.compile(rf"^{kind}-(\d+)(\.pt)?$") for kind in ("epoch", "checkpoint")}


class NumberedCheckpoint(NamedTuple):
    """Where a checkpoint stands; the greatest is the newest."""

    step: int
    epoch: int
    path: Path
    stage: int


def save_checkpoint(folder: Path, names: Sequence[str], contents: dict[str, Any]) -> None:
    """Write `contents` (tensors and plain Python values) into `folder` under each name, atomically, and once."""
    first = folder / names[0]
    with atomic_path(first) as temporary:
        torch.save(contents, temporary)
    for name in names[1:]:
        with atomic_path(folder / name) as temporary:
            temporary.unlink()
            try:
                os.link(first, temporary)  # the same bytes: never written to again, only replaced
            except OSError:  # a file system without links
                shutil.copyfile(first, temporary)


def remove_leftovers(folder: Path) -> None:
    """Delete what processes that were killed while they wrote have left: `atomic_path`'s temporary files."""
    for path in folder.glob(".*-*.pt"):
        path.unlink(missing_ok=True)


def newest_checkpoint(folder: Path, stage: int | None = None) -> NumberedCheckpoint | None:
    """The newest numbered checkpoint that can be read (of a stage); damaged ones are named."""
    found = []
    for path in (path for kind in NUMBERED for _, path in numbered_checkpoints(folder, kind)):
        try:
            contents = read_header(path) if path.is_dir() else load_checkpoint(path, mmap=True)
        except UserError as error:
            log.warning("%s; the one before it is used", error)
            continue
        found.append(NumberedCheckpoint(contents["step"], contents["epoch"], path, contents["train_stage"]))
    return max((entry for entry in found if stage in (None, entry.stage)), default=None)


def is_numbered(name: str) -> bool:
    """Whether a name is `epoch-N.pt`, `checkpoint-N.pt`, or one of these without `.pt`."""
    return any(pattern.match(name) for pattern in NUMBERED.values())


def numbered_checkpoints(folder: Path, kind: str) -> list[tuple[int, Path]]:
    """(number, path) of `epoch-N.pt` or `checkpoint-N.pt` files, or folders without `.pt`, ascending."""
    found = []
    for path in folder.glob(f"{kind}-*"):
        match = NUMBERED[kind].match(path.name)
        if match and path.is_dir() == (match[2] is None):
            found.append((int(match[1]), path))
    return sorted(found)


def numbered_checkpoint(folder: Path, kind: str, number: int) -> Path:
    """The file, or else the folder, of a number; the file's name where there is neither."""
    path = folder / f"{kind}-{number}.pt"
    return path if path.exists() or not path.with_suffix("").is_dir() else path.with_suffix("")


def remove_old(folder: Path, kind: str, keep: int, since: int) -> None:
    """Keep the newest `keep` numbered checkpoints of a kind, and all with a number below `since`.

    Numbers go on from stage to stage: what is below belongs to an earlier stage, which could else not tell, when it is
    called again, that it is done.
    """
    sweep(folder, f"{kind}-*")
    if keep > 0:
        mine = [path for number, path in numbered_checkpoints(folder, kind) if number >= since]
        for path in mine[:-keep]:
            remove_sharded(path) if path.is_dir() else path.unlink()
