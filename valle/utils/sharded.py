"""Checkpoints as folders, which every process writes its own part of: for models whose state one process cannot hold.

A folder holds what the single file does: `training.pt`, all but the large tensors (in their places stand tensors
without data), and the tensors of `model`, `optimizer` and `model_avg` as `torch.distributed.checkpoint` writes them.
It gets its name when all is written, so a folder with that name is whole; `training.pt` lists the sizes of all files,
so that one which was copied in part is known too. Nothing in it is pickled code: what could be is refused.

PyTorch's module is imported where it is used: it takes a second, and most trainings do without.
"""

import contextlib
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from valle.utils import distributed
from valle.utils.errors import UserError

LARGE = ("model", "optimizer", "model_avg")  # entries whose tensors the processes share out
REST = "training.pt"
PARTIAL = ".partial"
TORCH_METADATA = ".metadata"
# The classes in PyTorch's index of a folder, which is a pickle. With these alone, reading it runs no code.
INDEX_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
}  # fmt: skip
Like = Callable[[tuple[Any, ...], Tensor], Tensor | None]
CPU = torch.device("cpu")


def write_sharded(folder: Path, contents: dict[str, Any]) -> None:
    """Write a checkpoint as a folder; every rank calls it, with tensors that are whole on every rank, or shards.

    Args:
        folder: on a file system that all ranks see. One of that name is replaced.
        contents: as for a single file; what is not large counts on rank 0 only.
    """
    from torch.distributed import checkpoint as dcp

    partial = folder.with_name(f".{folder.name}{PARTIAL}")
    if distributed.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)  # of a training that was killed while it wrote
        partial.mkdir(parents=True)
    distributed.barrier()
    large: dict[str, Tensor] = {}
    rest = {
        key: _map(value, (key,), lambda path, tensor: _note_down(large, path, tensor)) if key in LARGE else value
        for key, value in contents.items()
    }  # fmt: skip
    with _quietly():
        dcp.save(large, storage_writer=dcp.FileSystemWriter(partial), no_dist=distributed.world_size() == 1)
    if distributed.rank() == 0:
        rest["files"] = {path.name: path.stat().st_size for path in partial.iterdir()}
        with (partial / REST).open("wb") as file:
            torch.save(rest, file)
            file.flush()
            os.fsync(file.fileno())
        remove_sharded(folder)
        partial.rename(folder)
    distributed.barrier()


def remove_sharded(folder: Path) -> None:
    """Remove a folder if there is one; killed in the midst of it, none is left under that name."""
    with contextlib.suppress(FileNotFoundError):
        going = folder.with_name(f".{folder.name}-old{PARTIAL}")
        shutil.rmtree(going, ignore_errors=True)
        folder.rename(going)
        shutil.rmtree(going)


def sweep(folder: Path, pattern: str) -> None:
    """Remove what trainings that were killed have left in a folder; `pattern` is of the checkpoints' names."""
    for left in folder.glob(f".{pattern}{PARTIAL}"):
        shutil.rmtree(left, ignore_errors=True)


def read_header(folder: Path) -> dict[str, Any]:
    """A folder's contents, the large tensors without data; all files are there as they were written.

    Raises:
        UserError: it is no checkpoint, or not whole.
    """
    try:
        contents = torch.load(folder / REST, map_location="cpu", weights_only=True)
        files = contents.pop("files")
    except (
        RuntimeError,
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        KeyError,
        OSError,
        AttributeError,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"'{folder}' is not a checkpoint, or it is not whole ('{REST}': {reason})") from error
    for name, size in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes"
            raise UserError(f"'{folder}' is not a whole checkpoint: '{name}' {what}, expected {size} bytes")
    return contents


def read_sharded(folder: Path, like: Like | None = None, device: torch.device = CPU) -> dict[str, Any]:
    """A folder's contents, as of a single file.

    Args:
        folder: from `write_sharded`.
        like: gives for the path and the shape of each large tensor a sharded one to read it into, of which each rank
            reads its own part; None for a tensor to be read whole (default: all).
        device: of whole tensors.

    Raises:
        UserError: it is no checkpoint, or not whole.
    """
    large: dict[str, Tensor] = {}

    def place(path: tuple[Any, ...], shape: Tensor) -> Tensor:
        target = None if like is None else like(path, shape)
        target = torch.empty(shape.shape, dtype=shape.dtype, device=device) if target is None else target
        large[_key(path)] = target
        return target

    header = read_header(folder)
    contents = {key: _map(value, (key,), place) if key in LARGE else value for key, value in header.items()}
    _load(folder, large)
    return contents


def _load(folder: Path, large: dict[str, Tensor]) -> None:
    """Read into the tensors of `large`, whole ones or shards, by their keys."""
    from torch.distributed import checkpoint as dcp

    path = folder / TORCH_METADATA
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise UserError(f"'{path}' is not the index of a checkpoint ({error})") from error

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            index.storage_meta.load_id = self.load_id
            return index

    with _quietly():
        # Each rank reads by itself what it needs: nothing has to be agreed upon.
        dcp.load(large, storage_reader=Reader(folder), no_dist=True)


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or name in INDEX_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def _map(value: Any, path: tuple[Any, ...], change: Callable[[tuple[Any, ...], Tensor], Tensor]) -> Any:
    """Nested dicts and lists with their tensors changed."""
    if isinstance(value, Tensor):
        return change(path, value)
    if isinstance(value, dict):
        return {key: _map(part, (*path, key), change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map(part, (*path, number), change) for number, part in enumerate(value))
    return value


def _note_down(large: dict[str, Tensor], path: tuple[Any, ...], tensor: Tensor) -> Tensor:
    large[_key(path)] = tensor.detach()
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _key(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the warning that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled, unavailable.*")
        yield
