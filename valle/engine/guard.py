"""What to do when a step cannot be taken: loss or gradient is not finite, or memory has run out.

After a step that is not finite the weights stay as they are, the batch is kept with its cut ids for a look
(tools/replay_batch.py), and a training that goes on failing stops.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from valle.config import TrainConfig
from valle.utils import distributed
from valle.utils.errors import UserError
from valle.utils.files import atomic_path

log = logging.getLogger(__name__)
FOLDER, MAX_FILES = "bad-batches", 20  # in --exp-dir
# float16: gradients are computed of the loss times a scale, which is halved when they overflow and doubled after 2000
# steps without. The usual first scale of a mean is 65536; ours are sums over some thousand targets.
FIRST_SCALE = 2.0**6
SMALLEST_SCALE = 2.0**-10  # what overflows even with this is broken, not large


class Guard:
    """Judges each step.

    Args:
        exp_dir: where bad batches are kept.
        trained: names and parameters.
        config: `--inf-check`, `--max-bad-steps`; stage and number format go into the files.
    """

    def __init__(self, exp_dir: Path, trained: list[tuple[str, nn.Parameter]], config: TrainConfig) -> None:
        self.folder, self.trained, self.config = exp_dir / FOLDER, trained, config
        self.bad_steps = 0  # in a row; part of checkpoints

    def allows(
        self, step: int, loss: float, norm: float, batches: list[dict[str, Any]], scale: float | None = None
    ) -> bool:
        """Whether to take the step; a loss or gradient norm over all ranks that is not finite is a bad one.

        Args:
            step: its number.
            loss, norm: over all ranks.
            batches: of this rank.
            scale: float16's gradient scale. Gradients alone that overflow are then the scaler's business: it takes no
                step and halves its scale, as it must in the beginning.

        Raises:
            UserError: too many bad steps in a row.
        """
        if _finite(loss) and _finite(norm):
            self.bad_steps = 0
            return True
        if _finite(loss) and scale is not None and scale > SMALLEST_SCALE:
            log.info("step %d skipped: gradients overflow float16 at scale %g, it is halved", step, scale)
            return False
        self.bad_steps += 1
        ids = [cut for batch in batches for cut in batch.get("ids", [])]
        broken = [name for name, p in self.trained if p.grad is not None and not _all_finite(p.grad)]
        kept = self._keep(step, loss, norm, batches)
        log.warning(
            "step %d skipped: loss %s, gradient norm %s, first broken gradient %s, cuts %s%s",
            step, loss, norm, broken[:1], ids[:8], f", kept as '{kept}'" if kept else "",
        )  # fmt: skip
        if self.config.inf_check or self.bad_steps >= self.config.max_bad_steps:
            other = "float32" if self.config.dtype == "bfloat16" else "bfloat16"
            dtype = "" if self.config.dtype == "float32" else f" or --dtype {other}"
            raise UserError(
                f"stopped at step {step}: {self.bad_steps} non-finite step(s) in a row (cuts {ids[:8]}); no weight "
                f"was changed by them. Try a lower --base-lr{dtype}; tools/replay_batch.py shows where a batch of "
                f"'{self.folder}' breaks"
            )
        return False

    def _keep(self, step: int, loss: float, norm: float, batches: list[dict[str, Any]]) -> Path | None:
        """Write this rank's batches; None: there are enough."""
        if len(list(self.folder.glob("step-*.pt"))) >= MAX_FILES:
            return None
        path = self.folder / f"step-{step}-rank{distributed.rank()}.pt"
        contents = {
            "batches": [{key: _plain(value) for key, value in batch.items()} for batch in batches],
            "step": step,
            "train_stage": self.config.train_stage,
            "dtype": self.config.dtype,
            "loss": loss,
            "grad_norm": norm,
        }
        with atomic_path(path) as temporary:
            torch.save(contents, temporary)
        return path


def _finite(number: float) -> bool:
    return abs(number) < float("inf")


def _all_finite(grad: torch.Tensor) -> bool:
    local = grad.to_local() if hasattr(grad, "to_local") else grad  # a shard
    return bool(torch.isfinite(local).all())


def _plain(value: Any) -> Any:
    # A copy: of a view, the whole storage would be written.
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value
