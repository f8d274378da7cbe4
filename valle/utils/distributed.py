"""Several processes that train together, by `torchrun` or `--world-size N`. One process needs none of it."""

import contextlib
import json
import multiprocessing.connection
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from torch import distributed as dist

from valle.utils.errors import Unfinished, UserError
from valle.utils.signals import SIGNALS

STUCK_TIMEOUT = 1800.0  # seconds
# The watchdog (valle/engine/watchdog.py) can tell who is stuck where; PyTorch's own timeout, which cannot, comes later.
MARGIN = 60.0
GRACE = 3.0  # seconds that the other processes have to end by themselves when one has failed
FAILURE, ENDED = "failure", "ended"  # notes: what the first process to fail says; why all have ended early
_store: Any = None  # where the processes leave notes for each other


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
    total = torch.tensor(numbers, dtype=torch.float64, device=device if device.type == "cuda" else "cpu")
    dist.all_reduce(total)
    return total.tolist()


def gather_objects(value: Any) -> list[Any]:
    """What every rank gave, in order, on rank 0; elsewhere a list that means nothing."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.gather_object(value, gathered if rank() == 0 else None)
    return gathered


def all_gather_objects(value: Any) -> list[Any]:
    """What every rank gave, in order, on every rank."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def barrier() -> None:
    """Wait until every rank is here."""
    sum_over_ranks([0.0], torch.device("cpu"))


# ------------------------------------------------------------------------------------------------ notes


def notes() -> Any:
    """A store of its own connection, for another thread to leave notes in; None for processes not of `launch`."""
    if _store is None:
        return None
    return _store.clone() if hasattr(_store, "clone") else _store


def first_to_fail(kind: str, message: str, store: Any = None) -> bool:
    """Note down that this process fails and why; false if another one has before, and so has brought this one down.

    Args:
        kind: "UserError", "shown" (the message is on stderr already), or another exception's name.
        message: one line, or a traceback.
        store: from `notes`, in another thread than the main one.
    """
    store = _store if store is None else store
    mine = json.dumps({"rank": rank(), "kind": kind, "message": message})
    try:
        return store.compare_set(FAILURE, "", mine).decode() == mine
    except (RuntimeError, AttributeError):  # the process that held the store is gone: it was the first
        return False


# ----------------------------------------------------------------------------------------------- launch


def launch(
    work: Callable[..., object],
    args: tuple[Any, ...],
    processes: int,
    port: int = 0,
    timeout: float = STUCK_TIMEOUT,
) -> None:
    """Run `work(*args)` in this process, under torchrun, or in `processes` new ones on this machine.

    When one process fails, all end, and what the first one said is raised or, under torchrun, shown by that one.

    Args:
        work: a function of a module, for new processes to find.
        args: of it; pickled for new processes.
        processes: how many, where torchrun has started none.
        port: for new processes to meet at; 0: any that is free.
        timeout: seconds after which PyTorch gives up on a message between processes, give or take.

    Raises:
        UserError: a process has raised it, or was killed.
        Unfinished: all have.
        SystemExit: code 2, a process has failed and said why.
    """
    if not timeout > 0:
        raise UserError(f"--stuck-timeout is {timeout:g}, expected seconds, more than 0")
    if "RANK" in os.environ:
        number, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if "MASTER_ADDR" not in os.environ:
            raise UserError(
                "RANK is set but not MASTER_ADDR: start with torchrun, or unset RANK for one process"
            )
        _join(work, args, number, processes, timeout, None)
    elif processes > 1:
        _spawn(work, args, processes, port, timeout)
    else:
        work(*args)


def _spawn(
    work: Callable[..., object], args: tuple[Any, ...], processes: int, port: int, timeout: float
) -> None:
    try:
        # Held by this process, which outlives the others: their last words are read from it.
        store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    except RuntimeError as error:
        raise UserError(f"--master-port {port} is in use; leave the flag out to take a free one") from error
    # Each process with as many threads as there are cores would slow down all.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(max(1, cores // processes))
    with _environment(OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", threads)):
        context = torch.multiprocessing.spawn(
            _spawned, (work, args, processes, store.port, timeout), nprocs=processes, join=False
        )
    said = dist.PrefixStore("valle", store)
    killed: list[str] = []
    try:
        with _forwarding_signals(context.processes):
            done = False
            while not done:
                for sentinel in multiprocessing.connection.wait(context.sentinels):
                    context.processes[context.sentinels[sentinel]].join()
                # Looked at before `join` ends those that are left.
                killed = [_signal(number, process) for number, process in enumerate(context.processes)
                          if (process.exitcode or 0) < 0]  # fmt: skip
                done = context.join(grace_period=GRACE)
    except (
        torch.multiprocessing.ProcessExitedException,
        torch.multiprocessing.ProcessRaisedException,
    ) as error:
        _raise_failure(said, killed, error)
    finally:
        for process in context.processes:  # still there only after Ctrl-C
            process.kill()
    if said.check([ENDED]):
        raise Unfinished(said.get(ENDED).decode())


def _spawned(
    number: int, work: Callable[..., object], args: tuple[Any, ...], processes: int, port: int, timeout: float
) -> None:
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number))
    os.environ.update(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    with contextlib.suppress(Unfinished):  # the parent raises it, when all have ended
        _join(work, args, number, processes, timeout, store)


def _join(
    work: Callable[..., object],
    args: tuple[Any, ...],
    number: int,
    processes: int,
    timeout: float,
    store: Any,
) -> None:
    """Run `work` as one of several processes.

    Args:
        work, args: see `launch`.
        number, processes: this process and how many there are.
        timeout: see `launch`.
        store: where they meet; None: as torchrun's environment variables say.
    """
    global _store
    limit = timedelta(seconds=timeout + MARGIN)
    if store is None:
        store, number, processes = next(dist.rendezvous("env://", number, processes, timeout=limit))
    _store = dist.PrefixStore("valle", store)
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    dist.init_process_group(backend, store=store, rank=number, world_size=processes, timeout=limit)
    ended = None
    try:
        work(*args)
    except Unfinished as reason:
        ended = reason
        _store.set(ENDED, str(reason))
    except BaseException as error:
        # No goodbye to the others: they may be waiting for a message that never comes.
        kind = type(error).__name__ if not isinstance(error, UserError) else "UserError"
        text = str(error) if isinstance(error, UserError) else traceback.format_exc()
        if not first_to_fail(kind, text):
            raise SystemExit(2) from error
        raise
    barrier()  # one that ends early would take its connections away from the others
    _store = None
    dist.destroy_process_group()
    if ended is not None:
        raise ended


def _signal(number: int, process: Any) -> str:
    """How a process was ended from outside."""
    name = signal.Signals(-process.exitcode).name
    return f"rank {number} was ended by {name}" + (" (as when memory runs out)" if name == "SIGKILL" else "")


def _raise_failure(store: Any, killed: list[str], error: Exception) -> None:
    """Raise what the first process to fail said, or else what ended it."""
    if killed:  # what others say is that they miss it
        raise UserError("; ".join(killed)) from None
    if not store.check([FAILURE]):
        raise error
    failure = json.loads(store.get(FAILURE))
    if failure["kind"] == "UserError":
        raise UserError(failure["message"]) from None
    if failure["kind"] == "KeyboardInterrupt":
        raise KeyboardInterrupt
    if failure["kind"] in ("shown", "SystemExit"):
        raise SystemExit(2)
    raise RuntimeError(f"rank {failure['rank']} failed:\n{failure['message']}") from None


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Environment variables for the processes that are started inside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _forwarding_signals(processes: list[Any]) -> Iterator[None]:
    """Hand on to the processes that do the work that they are asked to end."""

    def hand_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, number)

    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, hand_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
