"""Several processes that train together, by `torchrun` or `--world-size N`. One process needs none of it."""

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", rank()))


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(values: Iterable[float], device: torch.device) -> list[float]:
    """Add up a list of numbers over all processes."""
    numbers = list(values)
    if world_size() == 1:
        return numbers
    total = torch.tensor(
        numbers, dtype=torch.float64, device="cpu" if dist.get_backend() == "gloo" else device
    )
    dist.all_reduce(total)
    return total.tolist()


def gather_objects(value: Any) -> list[Any]:
    """What every rank gave, in order, on rank 0; elsewhere a list that means nothing."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.gather_object(value, gathered if rank() == 0 else None)
    return gathered


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Add up gradients over all processes, in one message."""
    if world_size() == 1:
        return
    members = [p for p in parameters if p.requires_grad]
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).reshape(-1) for p in members])
    dist.all_reduce(flat)
    offset = 0
    for parameter in members:
        size = parameter.numel()
        parameter.grad = flat[offset : offset + size].view_as(parameter).clone()
        offset += size


def launch(work: Callable[..., object], args: tuple[Any, ...], processes: int, port: int) -> None:
    """Run `work(*args)` in this process, under torchrun, or in `processes` new ones on this machine."""
    if "RANK" in os.environ:
        _join(work, args, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    elif processes > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        torch.multiprocessing.spawn(_spawned, (work, args, processes), nprocs=processes)
    else:
        work(*args)


def _spawned(number: int, work: Callable[..., object], args: tuple[Any, ...], processes: int) -> None:
    os.environ.update(RANK=str(number), WORLD_SIZE=str(processes), LOCAL_RANK=str(number))
    _join(work, args, number, processes)


def _join(work: Callable[..., object], args: tuple[Any, ...], number: int, processes: int) -> None:
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo", rank=number, world_size=processes
    )
    try:
        work(*args)
    finally:
        dist.destroy_process_group()
