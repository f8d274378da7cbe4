"""From logits to a code: what may be drawn, how likely, and the draw itself, which each row makes from its own stream.

A draw turns one uniform number into a code by the inverse of the cumulative distribution, over the kept codes alone,
likeliest first where they had to be ordered. So a row costs one random number a frame, and its result depends on
nothing but its own logits, past codes and stream.

Order of what is applied: repetition penalty, temperature, top-k, top-p, min-p, as in Hugging Face's transformers.
Sources: top-k from Fan et al. 2018 (arXiv 1805.04833, section 5.4); nucleus (top-p) from Holtzman et al.
(arXiv 1904.09751, section 3.1); min-p from Nguyen et al. (arXiv 2407.01082, section 3); repetition penalty from CTRL
(arXiv 1909.05858, section 4.1); repetition-aware sampling from VALL-E 2 (arXiv 2406.05370, section 3).

Shapes: A rows, V choices (codes and the end symbol), K kept ones, T frames so far.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from valle.utils.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How a code is drawn, and when a row that only repeats itself is stopped.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest code.
        top_k: keep the k likeliest codes; 0 or less keeps all, 1 takes the likeliest.
        top_p: then keep the likeliest codes that together reach this probability; 1 keeps all.
        min_p: then keep the codes of at least min_p × the likeliest one's probability; 0 keeps all.
        repetition_penalty: logits of codes that the row has drawn before are divided by it where positive, multiplied
            where negative; 1 does nothing, more makes repeating rarer.
        repetition_window: the penalty looks at the codes of so many last frames; 0: of all.
        repetition_aware: a code that makes up more than `aware_threshold` of the last `aware_window` frames (frames
            before the first count as different) is drawn again, without top-k, top-p and min-p.
        aware_window: frames, 10 in the paper.
        aware_threshold: share from 0 to below 1, 0.1 in the paper.
        stop_repetition: a row ends when its last so many frames have a period of 1 to 8 frames, and hold that period
            at least twice; of the repetition, the result keeps one period. 0: never.
    """

    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_window: int = 0
    repetition_aware: bool = False
    aware_window: int = 10
    aware_threshold: float = 0.1
    stop_repetition: int = 0

    def __post_init__(self) -> None:
        good = {  # each also false for not-a-number
            # less would overflow float32, and is as good as greedy
            "temperature": (
                self.temperature == 0 or 1e-6 <= self.temperature < math.inf,
                "0 (greedy) or from 1e-6",
            ),
            "top_p": (0 < self.top_p <= 1, "more than 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "0 to 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "more than 0 (1: no penalty)"),
            "repetition_window": (self.repetition_window >= 0, "0 (all) or a number of frames"),
            "aware_window": (self.aware_window >= 1, "1 frame or more"),
            "aware_threshold": (0 <= self.aware_threshold < 1, "at least 0 and less than 1"),
            "stop_repetition": (
                self.stop_repetition == 0 or self.stop_repetition >= 2,
                "0 (never) or 2 frames or more",
            ),
        }
        for name, (is_good, expected) in good.items():
            if not is_good:
                raise UserError(f"{name} is {getattr(self, name)}, expected {expected}")
        if self.repetition_aware and self.temperature == 0:
            raise UserError(
                "repetition_aware with temperature 0: drawing again gives the same code, expected more than 0"
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest code is taken (if repetition-aware, another one may be drawn in its place)."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def draws(self) -> int:
        """Random numbers that a row needs for each frame."""
        return int(not self.greedy) + int(self.repetition_aware)


def make_streams(prompts: int, seed: int | None, num_samples: int = 1) -> list[Random]:
    """One stream of random numbers for each sample of each prompt, the samples of a prompt side by side.

    Args:
        prompts: how many.
        seed: sample j of any prompt has the stream number j of this seed, whatever `prompts` and `num_samples`: a
            prompt gives the same in any batch. None: a seed for each prompt from torch's state.
        num_samples: for each prompt.

    Returns:
        prompts × num_samples streams.
    """
    seeds = [seed] * prompts if seed is not None else torch.randint(2**62, (prompts,)).tolist()
    # Random takes a hash of text, so that seeds and numbers next to each other give unrelated streams
    return [Random(f"{seed} {sample}") for seed in seeds for sample in range(num_samples)]


def uniforms(streams: Sequence[Random], sampling: Sampling, device: torch.device) -> Tensor:
    """The random numbers of the next frame: (A, sampling.draws) float64, at least 0 and less than 1."""
    numbers = [[stream.random() for _ in range(sampling.draws)] for stream in streams]
    return torch.tensor(numbers, dtype=torch.float64).to(device, non_blocking=True)


def sample(logits: Tensor, sampling: Sampling, numbers: Tensor, history: Tensor) -> Tensor:
    """Draw one code a row.

    Args:
        logits: (A, V) float32.
        sampling: how.
        numbers: (A, sampling.draws) from `uniforms`.
        history: (T, A) int64 codes that the rows have drawn so far.

    Returns:
        (A,) int64.
    """
    if sampling.repetition_penalty != 1 and len(history) > 0:
        recent = history[-sampling.repetition_window :]  # -0: all
        logits = _penalize(logits, sampling.repetition_penalty, recent)
    if sampling.greedy:
        drawn = logits.argmax(-1)
    else:
        weights, codes = keep(logits, sampling)
        drawn = _draw(weights, codes, numbers[:, 0])
    if sampling.repetition_aware and len(history) > 0:
        again = _draw((logits / sampling.temperature).softmax(-1), None, numbers[:, -1])
        repeats = (history[-sampling.aware_window :] == drawn).sum(0, dtype=torch.float64)
        drawn = torch.where(repeats / sampling.aware_window > sampling.aware_threshold, again, drawn)
    return drawn


def keep(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """What may be drawn, by temperature, top-k, top-p and min-p.

    Args:
        logits: (A, V).
        sampling: not greedy.

    Returns:
        weights (A, K), proportional to the probabilities, 0 for what the filters leave out, and the codes (A, K)
        that they belong to, likeliest first; None: codes 0 to V - 1 as they stand. Of codes that tie at the k-th
        place, as many are kept as make k.
    """
    codes = None
    if 0 < sampling.top_k < logits.shape[-1]:
        logits, codes = logits.topk(sampling.top_k, -1)
    elif sampling.top_p < 1:
        logits, codes = logits.sort(-1, descending=True)
    weights = (logits / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        likelier = weights.cumsum(-1) - weights  # probability of all likelier codes; 0 for the first
        weights = weights.masked_fill(likelier >= sampling.top_p, 0.0)
    if sampling.min_p > 0:
        weights = weights.masked_fill(weights < sampling.min_p * weights.amax(-1, keepdim=True), 0.0)
    return weights, codes


def _draw(weights: Tensor, codes: Tensor | None, number: Tensor) -> Tensor:
    """Inverse of the cumulative distribution of weights (A, K) at number (A,): codes (A,).

    Float64, because float32 would round small weights away behind large ones. A weight of 0 is never drawn: number
    is less than 1, so the place is the first whose sum goes above it.
    """
    edges = weights.cumsum(-1, dtype=torch.float64)
    place = torch.searchsorted(edges, number[:, None] * edges[:, -1:], right=True)
    place = place.clamp(max=weights.shape[-1] - 1)  # not-a-number has no place; `FrameLoop.result` reports it
    return (place if codes is None else codes.gather(-1, place))[:, 0]


def _penalize(logits: Tensor, penalty: float, history: Tensor) -> Tensor:
    """(A, V) with the codes in history (T, A) made less likely by `penalty`, each once."""
    seen = history.T
    scores = logits.gather(-1, seen)
    return logits.scatter(-1, seen, torch.where(scores > 0, scores / penalty, scores * penalty))
