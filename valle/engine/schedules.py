"""Learning-rate schedules as pure functions of (step, epoch, progress).

Source of Eden: Zipformer (arXiv 2310.11230, section 3.4).
"""

import math
from collections.abc import Callable

from valle.config import TrainConfig

EDEN_STEPS, EDEN_EPOCHS = 5000, 4  # half-lives of Eden as the VALL-E recipes use it

Schedule = Callable[[int, int, float], float]


def eden(config: TrainConfig) -> Schedule:
    """Falls with the inverse square root of steps and of epochs, after a warm-up from one half."""

    def rate(step: int, epoch: int, progress: float) -> float:
        by_step = (1 + (step / EDEN_STEPS) ** 2) ** -0.25
        by_epoch = (1 + (epoch / EDEN_EPOCHS) ** 2) ** -0.25
        warmup = min(1.0, 0.5 + 0.5 * step / max(1, config.warmup_steps))
        return config.base_lr * by_step * by_epoch * warmup

    return rate


def cosine(config: TrainConfig) -> Schedule:
    """Linear warm-up, then half a cosine down to 2 % over the planned steps or minutes."""

    def rate(step: int, epoch: int, progress: float) -> float:
        warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
        return config.base_lr * warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))

    return rate


def constant(config: TrainConfig) -> Schedule:
    """Linear warm-up, then the base rate."""

    def rate(step: int, epoch: int, progress: float) -> float:
        return config.base_lr * min(1.0, (step + 1) / max(1, config.warmup_steps))

    return rate


SCHEDULES: dict[str, Callable[[TrainConfig], Schedule]] = {
    "Eden": eden,
    "cosine": cosine,
    "constant": constant,
}
