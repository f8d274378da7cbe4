"""What to do when a step cannot be taken: loss or gradient is not finite.

The weights stay as they are, the batch is kept with its cut ids for a look, and a training that goes on failing stops.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from valle.utils.errors import UserError

log = logging.getLogger(__name__)
MAX_BAD_STEPS = 10  # non-finite steps in a row that end a training


class Guard:
    """Judges each step.

    Args:
        exp_dir: where bad batches are kept.
        trained: names and parameters.
        stop_at_first: `--inf-check`.
    """

    def __init__(self, exp_dir: Path, trained: list[tuple[str, nn.Parameter]], stop_at_first: bool) -> None:
        self.exp_dir, self.trained, self.stop_at_first = exp_dir, trained, stop_at_first
        self.bad_steps = 0  # in a row; part of checkpoints

    def allows(self, step: int, loss: float, norm: float, batches: list[dict[str, Any]]) -> bool:
        """Whether to take the step; a loss or gradient norm over all ranks that is not finite is a bad one.

        Raises:
            UserError: too many bad steps in a row.
        """
        if all(abs(value) < float("inf") for value in (loss, norm)):
            self.bad_steps = 0
            return True
        self.bad_steps += 1
        ids = [cut for batch in batches for cut in batch.get("ids", [])]
        broken = [name for name, p in self.trained if p.grad is not None and not torch.isfinite(p.grad).all()]
        log.warning(
            "step %d skipped: loss %s, gradient norm %s, first broken gradient %s, cuts %s",
            step, loss, norm, broken[:1], ids[:8],
        )  # fmt: skip
        if self.stop_at_first or self.bad_steps >= MAX_BAD_STEPS:
            raise UserError(
                f"stopped at step {step}: {self.bad_steps} non-finite step(s) in a row; "
                f"try a lower --base-lr or --dtype float32 (cuts {ids[:8]})"
            )
        return False
