"""From logits to a code: temperature, top-k, top-p, and a draw that each row makes from its own stream.

Sources: top-k from Fan et al. 2018 (arXiv 1805.04833, section 5.4); nucleus (top-p) from Holtzman et al.
(arXiv 1904.09751, section 3.1).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from valle.utils.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How a code is drawn.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest code.
        top_k: keep the k likeliest codes; 0 or less keeps all, 1 takes the likeliest.
        top_p: then keep the likeliest codes that together reach this probability; 1 keeps all.
    """

    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"temperature is {self.temperature}, expected 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}, expected more than 0 and at most 1")

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0 or self.top_k == 1


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """(B, V) -> (B, V) with what may not be drawn at -inf. Ties at the k-th place are all kept."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        probabilities = ordered.softmax(-1)
        before = (
            probabilities.cumsum(-1) - probabilities
        )  # probability of all likelier codes; 0 for the first
        ordered = ordered.masked_fill(before >= sampling.top_p, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, order, ordered)
    return logits


def sample(logits: Tensor, sampling: Sampling, streams: Sequence[torch.Generator]) -> Tensor:
    """Draw one code a row.

    Each row draws from its own stream (the exponential race: argmax p / e, e exponential, is a draw from p), so a
    row's result does not depend on its neighbours.

    Args:
        logits: (B, V).
        sampling: how.
        streams: B generators, on the CPU.

    Returns:
        (B,) int64.
    """
    if sampling.greedy:
        return logits.argmax(-1)
    probabilities = filter_logits(logits.float(), sampling).softmax(-1)
    size = logits.shape[-1]
    noise = torch.stack([torch.empty(size).exponential_(generator=stream) for stream in streams])
    return (probabilities / noise.clamp(min=1e-30).to(probabilities.device)).argmax(-1)


def make_streams(batch: int, seed: int | None) -> list[torch.Generator]:
    """One generator a row: all from `seed`, so that a row gives the same in any batch, or each from torch's state."""
    seeds = [seed] * batch if seed is not None else torch.randint(2**62, (batch,)).tolist()
    return [torch.Generator().manual_seed(value) for value in seeds]
