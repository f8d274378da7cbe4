"""How one model is trained by several processes. One process is the case of one.

A `Parallel` runs the model's loss, exchanges gradients, and gathers and hands out states. The trainer knows no other
way to any of it, so that DDP, FSDP2 and a single process share one loop.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from valle.utils import distributed


class Parallel:
    """A model in one process, or in several that add up gradients after each step.

    Args:
        model: on its device, with `requires_grad` set.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def loss(self, batch: dict[str, Any], stage: int) -> Any:
        """The model's `compute_loss`, as training calls it; every rank calls it equally often."""
        return self.model.compute_loss(batch, stage)

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around loss and backward of one batch; before the `last` of a step, gradients are not exchanged."""
        yield

    def finish_gradients(self, parameters: list[nn.Parameter]) -> None:
        """After the step's last backward: `grad` becomes the sum over all ranks."""
        distributed.sum_gradients(parameters)

    def norm(self, grads: list[Tensor]) -> Tensor:
        """The 2-norm of all gradients, over all shards."""
        return torch.nn.utils.get_total_norm(grads)

    def model_state(self) -> dict[str, Tensor]:
        """The whole model's state dict, on rank 0 at least; every rank calls it."""
        return self.model.state_dict()

    def load_model_state(self, state: dict[str, Tensor]) -> None:
        """Strictly, from a whole state dict; every rank calls it."""
        self.model.load_state_dict(state, strict=True)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The whole optimizer's state, as a single process would save it; every rank calls it."""
        return optimizer.state_dict()

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """From what `optimizer_state` gave, whatever number of ranks gave it."""
        optimizer.load_state_dict(state)
