"""Checkpoints: one file with everything that going on, or generating, needs. Loads weights-only, written atomically.

Names: `epoch-N.pt`, `checkpoint-<step>.pt`, `best-valid-loss.pt`, `best-train-loss.pt`; each stage's best is kept as
`best-valid-loss-stage<S>.pt` as well, for the next stage to start from.
"""

import re
from pathlib import Path
from typing import Any

import torch

from valle.utils.checkpoints import load_checkpoint
from valle.utils.files import atomic_path

__all__ = ["load_checkpoint", "numbered_checkpoints", "remove_old", "save_checkpoint"]
NUMBERED = {"epoch": re.compile(r"^epoch-(\d+)\.pt$"), "checkpoint": re.compile(r"^checkpoint-(\d+)\.pt$")}


def save_checkpoint(path: Path, contents: dict[str, Any]) -> None:
    """Write `contents` (tensors and plain Python values) to `path`, atomically."""
    with atomic_path(path) as temporary:
        torch.save(contents, temporary)


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
