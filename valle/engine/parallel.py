"""How one model is trained by several processes. One process is the case of one.

A `Parallel` runs the model's loss, exchanges gradients, and gathers and hands out states. The trainer knows no other
way to any of it, so that a single process, DDP and FSDP2 share one loop. All give the same gradients: sums over the
ranks, and None for a parameter that no rank has used.
"""

import contextlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from valle.config import TrainConfig
from valle.engine.checkpoint import load_checkpoint
from valle.modules.transformer import TransformerLayer
from valle.utils import distributed
from valle.utils.errors import UserError
from valle.utils.sharded import read_sharded

log = logging.getLogger(__name__)
State = dict[str, Tensor]


class Nothing(NamedTuple):
    """The loss of a batch that does not count."""

    loss: Tensor
    num_targets: int = 0
    metrics: dict[str, tuple[Any, int]] = {}  # never written to


class Parallel:
    """A model in one process.

    Args:
        model: with `requires_grad` set; moved to `device`.
        device: of this process.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model.to(device), device

    def loss(self, batch: dict[str, Any], stage: int) -> Any:
        """The model's `compute_loss`, as training calls it; every rank calls it equally often."""
        return self.model.compute_loss(batch, stage)

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around loss and backward of one batch; before the `last` of a step, gradients need not be exchanged."""
        yield

    def finish_gradients(self, parameters: list[nn.Parameter]) -> None:
        """After the step's last backward: `grad` becomes the sum over all ranks."""

    def norm(self, grads: list[Tensor]) -> Tensor:
        """The 2-norm of all gradients, over all shards."""
        return torch.nn.utils.get_total_norm(grads)

    def model_state(self, whole: bool = True) -> State:
        """The model's state dict; every rank calls it. Whole, it is on rank 0 at least, else each has its shards."""
        state = self.model.state_dict()
        return self.gathered(state) if whole else state

    def load_model_state(self, state: State) -> None:
        """Strictly, from a state dict with whole tensors or shards; every rank calls it."""
        self.model.load_state_dict(state, strict=True)

    def optimizer_state(self, optimizer: torch.optim.Optimizer, whole: bool = True) -> dict[str, Any]:
        """The optimizer's state, if whole as a single process would save it; every rank calls it."""
        return optimizer.state_dict()

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """From what `optimizer_state` gave, whatever number of ranks gave it."""
        optimizer.load_state_dict(state)

    def gathered(self, state: State) -> State:
        """A state dict of the model with whole tensors, on rank 0 at least."""
        return state

    def handed_out(self, state: State) -> State:
        """A state dict of the model with whole tensors or shards, as this rank keeps it."""
        return {name: value.to(self.device) for name, value in state.items()}

    def read(self, path: Path, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """A checkpoint, of which each rank reads what it needs."""
        return load_checkpoint(path)


# ------------------------------------------------------------------------------------- whole on every rank


class DataParallel(Parallel):
    """The whole model on every rank; gradients are added up in buckets while the backward pass goes on.

    A NAR stage draws quantizers, so ranks use different parameters. `find_unused_parameters` makes DDP agree on which
    were used at all (one small message), and keeps its buckets in one order from the first step on, so that a resumed
    training adds up in the same order as one that was not interrupted.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        super().__init__(model, device)
        warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified.*")
        # Buffers are not sent before every forward pass. PyTorch before 2.13 has another name for that.
        known = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        no_broadcast = {"forward_sync_buffers" if known else "broadcast_buffers": False}
        # Not told its device: batches are there already. Parameters and buffers start as rank 0 has them.
        self.replica = DistributedDataParallel(
            _LossOrNothing(self.model).to(device),
            find_unused_parameters=True,
            gradient_as_bucket_view=True,
            **no_broadcast,  # type: ignore[arg-type]
        )
        self.replica.register_comm_hook(None, _add_up)
        saved = self.model.state_dict(keep_vars=True).values()
        self.learned_buffers = [value for value in saved if not isinstance(value, nn.Parameter)]

    def loss(self, batch: dict[str, Any], stage: int) -> Any:
        if torch.is_grad_enabled():
            return self.replica(batch, stage)
        # Nothing is exchanged in validation, and a filler costs nothing.
        if batch.get("filler", False):
            return Nothing(torch.zeros((), device=self.device))
        return self.model.compute_loss(batch, stage)

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        with contextlib.nullcontext() if last else self.replica.no_sync():
            yield

    def finish_gradients(self, parameters: list[nn.Parameter]) -> None:
        # DDP has added up. A codec's codebooks are moving averages, which each rank has moved by its own batch.
        for buffer in self.learned_buffers:
            dist.broadcast(buffer, 0)


class _Loss(nn.Module):
    """The loss as a forward pass, which is what PyTorch knows to wrap."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Any], stage: int) -> Any:
        return self.model.compute_loss(batch, stage)


class _LossOrNothing(_Loss):
    """Takes no time for fillers."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        # What a filler's loss is of: it uses no parameter of the model, as if it were not there.
        self.nothing = nn.Parameter(torch.zeros(()))

    def forward(self, batch: dict[str, Any], stage: int) -> Any:
        return Nothing(0.0 * self.nothing) if batch.get("filler", False) else super().forward(batch, stage)


def _add_up(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The sum over ranks: DDP by itself divides it by their number."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


# ------------------------------------------------------------------------------------- shards on every rank


class FullySharded(Parallel):
    """FSDP2: each rank keeps its part of every parameter, gradient and optimizer state.

    The parameters of a `TransformerLayer` are gathered while it computes, all others during the whole pass. They are
    gathered as they are, in float32, and autocast rounds them in the products, as in one process: gathering bfloat16
    would halve the messages, and round normalizations and embeddings too. Gradients are added up after every batch,
    not after the last of a step: they would else be held whole.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        # Imported here: DTensor takes a second, and most trainings do without.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        layers: list[Any] = [module for module in model.modules() if isinstance(module, TransformerLayer)]
        if not layers:
            raise UserError(
                "--parallel fsdp shards transformer layers, this model has none; use --parallel ddp"
            )
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # left as it is
        self.model, self.device = model, device
        for tensor in [*model.parameters(), *model.buffers()]:  # start as rank 0 has them, as in DDP
            dist.broadcast(tensor.detach(), 0)
        inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
        mesh = init_device_mesh(device.type, (distributed.world_size(),))
        names = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside]
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        self.root: Any = fully_shard(_Loss(model), mesh=mesh, reshard_after_forward=False)
        if not hasattr(self.root, "set_reduce_scatter_unused_params"):
            raise UserError(f"--parallel fsdp needs PyTorch 2.13 or newer, this is {torch.__version__}")
        for module in (*layers, self.root):
            module.set_gradient_divide_factor(1.0)  # sums
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
        # Ranks use different parameters (see DataParallel): all are exchanged, and flags say which were used. Inside a
        # layer all are, whenever the layer is.
        self.root.set_reduce_scatter_unused_params(True, recurse=False)
        self.sometimes = [_Owned(model, name, index) for index, name in enumerate(names)]
        self.used = torch.zeros(len(names), device=device)
        self.counts = True

    def loss(self, batch: dict[str, Any], stage: int) -> Any:
        result = self.root(batch, stage)  # a filler too: every rank gathers equally often
        if torch.is_grad_enabled():
            self.counts = not batch.get("filler", False)
            for owned in self.sometimes:
                owned.watch(self._note_use)
        return result

    def _note_use(self, index: int) -> None:
        if self.counts:
            self.used[index] = 1

    def finish_gradients(self, parameters: list[nn.Parameter]) -> None:
        dist.all_reduce(self.used)
        unused = {
            id(owned.shard)
            for owned, used in zip(self.sometimes, self.used.tolist(), strict=True)
            if not used
        }
        for parameter in parameters:
            if id(parameter) in unused:
                parameter.grad = None
        self.used.zero_()

    def norm(self, grads: list[Tensor]) -> Tensor:
        return _whole(super().norm(grads))

    def model_state(self, whole: bool = True) -> State:
        self.root.reshard()  # after validation, parameters of the root are whole
        return super().model_state(whole)

    def load_model_state(self, state: State) -> None:
        super().load_model_state(self.handed_out(state))

    def optimizer_state(self, optimizer: torch.optim.Optimizer, whole: bool = True) -> dict[str, Any]:
        state = optimizer.state_dict()
        if whole:
            state["state"] = {index: self.gathered(values) for index, values in state["state"].items()}
        return state

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        shards = dict(enumerate(_in_order(optimizer)))
        held = {
            index: {name: _shard_as(shards[index], value) for name, value in values.items()}
            for index, values in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": held})

    def gathered(self, state: dict[str, Any]) -> dict[str, Any]:
        whole = {}
        for name, value in state.items():
            value = _whole(value)  # a message: on every rank
            if distributed.rank() == 0:
                whole[name] = value.cpu() if isinstance(value, Tensor) else value
        return whole

    def handed_out(self, state: State) -> State:
        shards = self.model_state(whole=False)
        return {name: _shard_as(shards.get(name), value.to(self.device)) for name, value in state.items()}

    def read(self, path: Path, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        if not path.is_dir():
            return load_checkpoint(path, mmap=True)  # all ranks of a machine share the pages that they read
        weights, parameters = self.model_state(whole=False), dict(enumerate(_in_order(optimizer)))

        def like(where: tuple[Any, ...], shape: Tensor) -> Tensor | None:
            target = parameters.get(where[2]) if where[0] == "optimizer" else weights.get(where[1])
            # Others are no shards, as a count of steps, or of another architecture, which loading will say.
            if target is None or target.shape != shape.shape:
                return None
            return torch.empty_like(target.detach(), dtype=shape.dtype)

        return read_sharded(path, like)


class _Owned:
    """A trained parameter of the root, whose place in the model holds a shard or the whole, by turns."""

    def __init__(self, model: nn.Module, name: str, index: int) -> None:
        module, _, self.name = name.rpartition(".")
        self.module, self.index = model.get_submodule(module), index
        self.shard = getattr(self.module, self.name)
        self.whole: Any = None

    def watch(self, used: Callable[[int], None]) -> None:
        """Have the gradient of the whole parameter reported; FSDP2 makes it once, at the first pass."""
        whole = getattr(self.module, self.name)
        if whole is not self.whole:
            if hasattr(whole, "to_local"):
                raise RuntimeError(f"parameter '{self.name}' is a shard behind the forward pass, not whole")
            whole.register_post_accumulate_grad_hook(lambda parameter: used(self.index))
            self.whole = whole


def _in_order(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters as an optimizer's state dict numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _whole(value: Any) -> Any:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _shard_as(shard: Any, value: Any) -> Any:
    """This rank's part of a whole tensor, split as `shard` is; what is no whole tensor of its shape stays."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(shard, DTensor) or not isinstance(value, Tensor) or isinstance(value, DTensor):
        return value
    if value.shape != shard.shape:
        return value
    # Every rank has the value: nothing is sent.
    return distribute_tensor(value.to(shard.device), shard.device_mesh, shard.placements, src_data_rank=None)


# ------------------------------------------------------------------------------------------------- choice

KINDS: dict[str, type[Parallel]] = {"ddp": DataParallel, "fsdp": FullySharded}


def make_parallel(model: Any, device: torch.device, config: TrainConfig) -> Parallel:
    """What `--parallel` says; with one process, nothing.

    Sharding puts other parameters in the place of the model's: take them afterwards.

    Args:
        model: with `requires_grad` set.
        device: of this process.
        config: the training's settings.

    Raises:
        UserError: flags that do not go together.
    """
    if config.parallel == "fsdp":
        refused = {
            f"--optimizer-name {config.optimizer_name}": (
                config.optimizer_name != "AdamW",
                "its step is relative to the size of whole tensors, and a rank has shards; use --optimizer-name AdamW",
            ),
            "--sample-interval": (
                config.sample_interval > 0,
                "generation needs the whole model in one place; leave it out, infer.py generates from a checkpoint",
            ),
            "--lora-rank": (config.lora_rank > 0, "adapters are small; use --parallel ddp"),
        }
        for flag, (given, reason) in refused.items():
            if given:
                raise UserError(f"--parallel fsdp and {flag} do not go together: {reason}")
    if distributed.world_size() == 1:
        return Parallel(model, device)
    kind = "ddp" if config.parallel == "auto" else config.parallel
    log.info("%d processes train together: %s", distributed.world_size(), kind)
    return KINDS[kind](model, device)
