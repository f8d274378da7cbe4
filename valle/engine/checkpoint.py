"""Checkpoints: one file with everything that going on, or generating, needs. Loads weights-only, written atomically.

Names: `epoch-N.pt`, `checkpoint-<step>.pt`, `best-valid-loss.pt`, `best-train-loss.pt`; each stage's best is kept as
`best-valid-loss-stage<S>.pt` as well, for the next stage to start from.
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

__all__ = [
    "NumberedCheckpoint",
    "load_checkpoint",
    "newest_checkpoint",
    "numbered_checkpoints",
    "remove_old",
    "save_checkpoint",
]
log = logging.getLogger(__name__)
NUMBERED = {"epoch": re.compile(r"^epoch-(\d+)\.pt$"), "checkpoint": re.compile(r"^checkpoint-(\d+)\.pt$")}


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


def newest_checkpoint(folder: Path, stage: int | None = None) -> NumberedCheckpoint | None:
    """The newest numbered checkpoint that can be read (of a stage); damaged ones are named."""
    found = []
    for path in (path for kind in NUMBERED for _, path in numbered_checkpoints(folder, kind)):
        try:
            contents = load_checkpoint(path)
        except UserError as error:
            log.warning("%s; the one before it is used", error)
            continue
        found.append(NumberedCheckpoint(contents["step"], contents["epoch"], path, contents["train_stage"]))
    return max((entry for entry in found if stage in (None, entry.stage)), default=None)


def numbered_checkpoints(folder: Path, kind: str) -> list[tuple[int, Path]]:
    """(number, path) of `epoch-N.pt` or `checkpoint-N.pt` files, ascending."""
    found = []
    for path in folder.glob(f"{kind}-*.pt"):
        match = NUMBERED[kind].match(path.name)
        if match:
            found.append((int(match.group(1)), path))
    return sorted(found)


def remove_old(folder: Path, kind: str, keep: int, since: int) -> None:
    """Keep the newest `keep` numbered checkpoints of a kind, and all with a number below `since`.

    Numbers go on from stage to stage: what is below belongs to an earlier stage, which could else not tell, when it is
    called again, that it is done.
    """
    if keep > 0:
        mine = [path for number, path in numbered_checkpoints(folder, kind) if number >= since]
        for path in mine[:-keep]:
            path.unlink()
