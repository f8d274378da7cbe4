"""Memory: how much there is, how much a step takes, what to say when it runs out, and which batches would fit.

On a GPU a batch that is too large is an error that can be caught, so the largest one is found by trying. On a CPU it
would end the process, or another one: there the memory of smaller batches is measured, and the rest is a straight line.
A longer batch has more rows, not longer ones, so a line is what it is.
"""

import contextlib
import gc
import logging
import os
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from valle.engine.devices import rng_state, set_rng_state
from valle.utils import distributed
from valle.utils.errors import UserError

log = logging.getLogger(__name__)
USABLE = 0.92  # share of the memory that is planned for; the rest is for pieces that no tensor fits into
CAREFUL = (
    0.85  # the same, as long as only smaller batches were measured: they tell up to a seventh too little
)
GB = 1e9
Batch = dict[str, Any]


class Largest(Protocol):
    """A source of batches that gives the largest batch of an epoch, as it would be with another `--max-duration`."""

    def largest(self, epoch: int, max_duration: float | None = None) -> Batch: ...


# --------------------------------------------------------------------------------------------- what there is


def available_ram(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes of RAM that this process could still take, within the limits of its container."""
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        values = {
            line.split(":")[0]: float(line.split()[1]) * 1024 for line in lines if len(line.split()) > 1
        }
        free = values["MemAvailable"]
    except (OSError, KeyError, ValueError):
        free = float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return max(0.0, min([free, *_cgroup_rooms(proc, cgroups)]))


def _cgroup_rooms(proc: Path, cgroups: Path) -> Iterator[float]:
    """What each control group that this process is in has left; both versions of Linux's groups."""
    try:
        groups = [line.split(":", 2) for line in (proc / "self" / "cgroup").read_text().splitlines()]
    except OSError:
        return
    for number, controllers, place in groups:
        if number == "0" and not controllers:
            root, limit, used, cache = cgroups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, used = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        folder = root / place.strip("/")
        # A group has the limits of all groups above it. Seen from inside a container, its own folder is the root.
        for group in [folder, *folder.parents]:
            if group == root.parent:
                break
            with contextlib.suppress(OSError, ValueError):
                size = float((group / limit).read_text())  # "max": no number, no limit
                if size < 2**60:
                    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                    yield size - float((group / used).read_text()) + float(stat.get(cache, 0))


def resident() -> float:
    """Bytes of RAM that this process holds."""
    try:
        return float(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def capacity(device: torch.device) -> float:
    """Bytes that this process could hold in all: on its GPU, or its share of the RAM."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size()))
    return resident() + available_ram() / processes


class PeakMeter:
    """`with PeakMeter(device) as meter:` measures the most bytes held inside: `meter.peak`."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.peak = device, 0.0
        self._done = threading.Event()

    def __enter__(self) -> "PeakMeter":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.peak = resident()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.peak = max(self.peak, resident())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self.peak = float(torch.cuda.max_memory_allocated(self.device))
        else:
            self._done.set()
            self._thread.join()


# ------------------------------------------------------------------------------------------ when it runs out


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory has run out, on a GPU or in RAM."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    signs = (
        "not enough memory",
        "can't allocate memory",
        "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
    )
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def size_of(batch: Batch) -> int:
    """Numbers in a batch, padding included: what its memory is proportional to."""
    return sum(value.numel() for value in batch.values() if isinstance(value, torch.Tensor))


def describe(batch: Batch) -> str:
    """`x (24, 150, 4), y (24, 400, 4), cuts a, b, … (24)`."""
    shapes = [
        f"{name} {tuple(value.shape)}"
        for name, value in batch.items()
        if isinstance(value, torch.Tensor) and value.dim() > 1
    ]
    ids = batch.get("ids", [])
    shown = ", ".join(map(str, ids[:6])) + (f", … ({len(ids)})" if len(ids) > 6 else "")
    return ", ".join([*shapes, f"cuts {shown}"] if ids else shapes)


class FittedBatches:
    """Remembers the largest batch that a step was taken with, for an estimate when a larger one does not fit."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.size, self.peak = device, 0, 0.0
        self.rest = 0.0  # bytes held before the first step

    def note(self, batches: list[Batch]) -> None:
        """After a step."""
        size = max(map(size_of, batches))
        if size > self.size:
            self.size = size
            if self.device.type == "cuda":
                self.peak = float(torch.cuda.max_memory_allocated(self.device))

    def advice(self, batches: list[Batch], step: int, max_duration: float | None) -> str:
        """What to tell a user whose step ran out of memory.

        Args:
            batches: of the step.
            step: its number.
            max_duration: seconds in a batch, where the data goes by that.
        """
        batch = max(batches, key=size_of)
        said = f"out of memory on {self.device} at step {step}, with the batch {describe(batch)}"
        if self.device.type == "cuda":
            said += f"; {self.peak / GB:.1f} of {capacity(self.device) / GB:.1f} GB held by the largest step before"
        if max_duration is None:
            return f"{said}; make batches smaller"
        share = self.size / max(1, size_of(batch))
        share = min(share, 0.9) if share >= 0.1 else 0.5  # else nothing of its kind was tried
        return (
            f"{said}; lower --max-duration from {max_duration:g} to about {max_duration * share:.0f}, with "
            "--accumulate-grad-steps for the same sum of targets (--oom-check true finds the largest that fits)"
        )


# ---------------------------------------------------------------------------------------------- what would fit


@contextlib.contextmanager
def unchanged(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Callable[[], None]]:
    """Try steps inside, and leave everything that decides about a training as it was.

    Yields:
        To be called after each backward, in the place of the optimizer's step: takes the memory that it would take.
    """
    random, training, fresh = rng_state(), model.training, not optimizer.state
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    rates = [group["lr"] for group in optimizer.param_groups]

    def step() -> None:
        if fresh:  # a resumed optimizer has its memory already, and a step would move its averages
            # Of gradients 0 at rate 0, no parameter moves, and none can become infinite.
            for group in optimizer.param_groups:
                group["lr"] = 0.0
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.zero_()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    try:
        yield step
    finally:
        optimizer.zero_grad(set_to_none=True)
        if fresh:
            optimizer.state.clear()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        with torch.no_grad():
            for name, value in model.named_buffers():
                if name in buffers:
                    value.copy_(buffers[name])
        model.train(training)
        set_rng_state(random)
        release()


def release() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def kept_for_backward(model: Any, batch: Batch, stage: int) -> int:
    """Bytes that `model.compute_loss` keeps for its backward pass, parameters aside, each storage once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.compute_loss(batch, stage)  # holds on to all of them: no place in memory is used twice
    total = sum(storages.values())
    del loss
    return total


def line_through(points: list[tuple[float, float]]) -> tuple[float, float] | None:
    """(start, slope) of bytes over size, from the smallest and the largest; None where they tell no slope."""
    (low, low_bytes), (high, high_bytes) = min(points), max(points)
    if high < 1.2 * low or high_bytes <= low_bytes:
        return None
    slope = (high_bytes - low_bytes) / (high - low)
    return low_bytes - slope * low, slope


def largest_fitting(
    fits: Callable[[float], bool], start: float, most: float = float("inf"), precision: float = 0.1
) -> float | None:
    """The largest number that fits, by trying: doubled or halved until the answer changes, then bisected.

    Args:
        fits: whether a number does; what is smaller than one that fits, fits.
        start: first try.
        most: no more is of use.
        precision: end when the next one known not to fit is so near, relatively.

    Returns:
        None where not even a 64th of `start` fits.
    """
    low, high, duration = 0.0, 0.0, min(start, most)
    while not (low and high):
        if fits(duration):
            low = duration
            if low >= most:
                return most
            duration = high or min(2 * low, most)
        else:
            high = duration
            duration = high / 2
            if not low and duration < start / 64:
                return None
    while high > (1 + precision) * low:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def check_largest(
    take_step: Callable[[Batch], None],
    source: Any,
    epoch: int,
    max_duration: float | None,
    device: torch.device,
) -> str:
    """Take a step with the epoch's largest batch, and say what would fit.

    Args:
        take_step: forward, backward and what the optimizer needs; changes nothing.
        source: of batches, `Largest` if `--max-duration` is what its batches go by.
        epoch: whose batches are tried.
        max_duration: seconds in a batch, or None.
        device: where the step is taken.

    Returns:
        The line to show.

    Raises:
        UserError: the largest batch does not fit.
    """

    def measure(batch: Batch) -> tuple[float, float]:
        with PeakMeter(device) as meter:
            take_step(batch)
        release()
        return float(size_of(batch)), meter.peak

    whole = capacity(device)
    if max_duration is None or not hasattr(source, "largest"):
        known = hasattr(source, "largest")
        batch = source.largest(epoch) if known else max(source.epoch(epoch), key=size_of)
        try:
            _, peak = measure(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"the largest batch does not fit into {whole / GB:.1f} GB: {describe(batch)}; make batches smaller"
            ) from error
        return f"the largest batch fits: {peak / GB:.1f} of {whole / GB:.1f} GB"

    def try_batch(batch: Batch) -> tuple[float, float] | None:
        try:
            return measure(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        release()  # behind the handler, which holds on to the tensors of the failed step
        return None

    batch = source.largest(epoch)
    points = []
    for part in (4, 4, 2):  # the first takes what is taken once: optimizer state, workspaces
        points.append(try_batch(source.largest(epoch, max_duration / part)))
    line = line_through([point for point in points[1:] if point is not None]) if all(points) else None
    too_large = line is not None and line[0] + line[1] * size_of(batch) > CAREFUL * whole
    tried = None
    if all(points) and not (too_large and device.type != "cuda"):
        tried = try_batch(batch)
    fitting = _estimate(line, batch, max_duration, CAREFUL * whole)
    if tried is not None:
        points.append(tried)
        line = line_through([point for point in points[1:] if point is not None])
        fitting = max(max_duration, _estimate(line, batch, max_duration, USABLE * whole) or 0.0)
    most = getattr(source, "seconds", float("inf"))
    if device.type == "cuda" and distributed.world_size() == 1:
        # With several processes, one that fails would leave the others waiting.
        fitting = largest_fitting(
            lambda duration: try_batch(source.largest(epoch, duration)) is not None,
            fitting or max_duration / 2, most,
        )  # fmt: skip
    if tried is None:
        needs = "" if line is None else f" (about {(line[0] + line[1] * size_of(batch)) / GB:.1f} GB)"
        advice = (
            "; not even a small one does"
            if not fitting
            else f"; --max-duration up to about {_round(fitting)} does"
        )
        raise UserError(
            f"the largest batch{needs} does not fit into {whole / GB:.1f} GB with --max-duration {max_duration:g}: "
            f"{describe(batch)}{advice}"
        )
    said = f"the largest batch fits: {tried[1] / GB:.1f} of {whole / GB:.1f} GB"
    fitting = min(fitting or 0.0, most)  # more than the corpus has is of no use
    if fitting > 1.1 * max_duration:
        said += f"; --max-duration up to about {_round(fitting)} would"
    return said


def _estimate(
    line: tuple[float, float] | None, batch: Batch, max_duration: float, limit: float
) -> float | None:
    """The `--max-duration` whose largest batch takes `limit` bytes."""
    if line is None:
        return None
    return max(0.0, (limit - line[0]) / line[1] / size_of(batch) * max_duration)


def _round(duration: float) -> str:
    """Down, to two digits: more were not measured."""
    unit = 10 ** max(0, len(str(int(duration))) - 2)
    return f"{int(duration) // unit * unit}"
