"""Devices: which one a process trains on, what is moved there, how much memory it took."""

import ctypes
import resource
from typing import Any

import torch

from valle.utils import distributed
from valle.utils.errors import UserError

# Of glibc's malloc.h: all blocks from the heap (M_MMAP_MAX), which never shrinks (M_TRIM_THRESHOLD, -1 is the largest
# number there) and grows by 64 MiB (M_TOP_PAD).
MALLOC_OPTIONS = {-4: 0, -1: -1, -2: 64 << 20}


def pick_device(name: str) -> torch.device:
    """`auto` is this process's GPU where there is one, else the CPU."""
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        name = f"cuda:{distributed.local_rank() % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device '{name}' is unknown; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device '{name}': this PyTorch sees no GPU; use --device cpu")
    return device


def keep_freed_memory() -> None:
    """Let this process keep the RAM that it frees, for its next step, instead of giving it back to the system.

    The system clears each page that it hands out, which takes longer than many an operation of a step does. Does
    nothing where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for option, value in MALLOC_OPTIONS.items():
        mallopt(option, value)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }


def peak_memory(device: torch.device) -> float:
    """Bytes: the most that PyTorch held on a GPU, or that this process held in RAM."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def rng_state() -> dict[str, Any]:
    """PyTorch's random states of this process, for checkpoints."""
    state: dict[str, Any] = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """What `rng_state` gave."""
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
