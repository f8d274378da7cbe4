"""Reading checkpoints: weights only, so that a file which would run code on loading is refused.

Both who generates (models) and who trains (engine) read them; writing is the engine's.
"""

import pickle
from pathlib import Path
from typing import Any

import torch

from valle.utils.errors import UserError


def load_checkpoint(
    path: str | Path, map_location: str | torch.device = "cpu", mmap: bool = False
) -> dict[str, Any]:
    """Read a checkpoint, weights only: a file that would run code on loading is refused.

    Args:
        path: the file, or the folder of a sharded checkpoint, which is then read whole.
        map_location: where its tensors go.
        mmap: leave a file's tensors on the disk until they are read.

    Raises:
        UserError: missing, truncated, or no checkpoint of this toolkit.
    """
    path = Path(path)
    if path.is_dir():
        # Imported here: torch.distributed.checkpoint takes a while, and most checkpoints are files.
        from valle.utils.sharded import read_sharded

        return read_sharded(path, device=torch.device(map_location))
    if not path.is_file():
        raise UserError(f"checkpoint '{path}' does not exist")
    try:
        contents = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except (
        RuntimeError,
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        KeyError,
        OSError,
        IndexError,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"'{path}' is not a checkpoint, or it is damaged ({reason})") from error
    if not isinstance(contents, dict) or "model" not in contents:
        raise UserError(f"'{path}' is not a checkpoint of this toolkit: it has no 'model' entry")
    return contents
