"""When each symbol of a text is said, learned from nothing but texts and the codes of their recordings.

A hidden Markov model whose states are the symbols of an utterance from left to right, with silence that may stand
before and behind them. A state says one code of each of the first quantizers a frame, each drawn from the symbol's own
table; it may last any number of frames, and any symbol may be left out, as a stress mark or a silent letter is. Tables
and transitions are learned by turns with the best path through each utterance (Viterbi training), from an even division
on.

Sources: Rabiner 1989, "A tutorial on hidden Markov models" (sections III-B and V-A); the flat start is that of HTK and
Kaldi's monophone training.

Shapes: B utterances, T frames, Q quantizers, L symbols, S symbols of the table, V codebook size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

QUANTIZERS = 2  # that are looked at
ROUNDS = 10
PRIOR = 20.0  # frames of what any symbol sounds like that each table starts with
LEFT_OUT = 3  # symbols that may be left out in a row
LEAST = 1e-4  # probability of anything a symbol may do
BATCH_FRAMES = 40_000  # utterances times frames that are aligned at once
NEVER = -1e30


@dataclass(frozen=True)
class Aligner:
    """What is known of each symbol; the last of the S + 1 is silence.

    Attributes:
        emissions: (Q, S + 1, V) log-probabilities of codes.
        stay: (S + 1,) log-probability of lasting another frame.
        skip: (S + 1,) log-probability of being left out.
        frames: (S + 1,) how long a symbol lasts on average, counting 0 where it is left out; of one that was never met,
            as long as any.
    """

    emissions: np.ndarray
    stay: np.ndarray
    skip: np.ndarray
    frames: np.ndarray

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> "Aligner":
        """From what `stored` gave."""
        return cls(*(np.asarray(stored[name], dtype=np.float64) for name in cls.__dataclass_fields__))

    def stored(self) -> dict[str, Tensor]:
        """For checkpoints, in half precision."""
        return {name: torch.from_numpy(getattr(self, name)).half() for name in self.__dataclass_fields__}

    def align(
        self,
        texts: Sequence[np.ndarray],
        codes: Sequence[np.ndarray],
        on_done: Callable[[int], object] | None = None,
    ) -> list[np.ndarray]:
        """The frame at which each symbol begins, (L,) int64; one that is left out begins with the next.

        Args:
            texts: (L,) ids of symbols; L may be 0.
            codes: (T, Q') codes, T ≥ 1 and Q' ≥ Q.
            on_done: called with the number of utterances of each batch.
        """
        paths = self.paths(texts, codes, on_done)
        return [
            np.searchsorted(path, np.arange(1, len(text) + 1))
            for path, text in zip(paths, texts, strict=True)
        ]

    def paths(
        self,
        texts: Sequence[np.ndarray],
        codes: Sequence[np.ndarray],
        on_done: Callable[[int], object] | None = None,
    ) -> list[np.ndarray]:
        """The state of each frame, (T,) int64: 0 silence, 1 … L the symbols, L + 1 silence."""
        found: list[np.ndarray] = [np.zeros(0, np.int64)] * len(texts)
        order = sorted(range(len(texts)), key=lambda row: len(codes[row]))
        while order:
            size = max(1, BATCH_FRAMES // len(codes[order[-1]]))
            rows, order = order[-size:], order[:-size]
            batch = self._batch_paths([texts[row] for row in rows], [codes[row] for row in rows])
            for row, path in zip(rows, batch, strict=True):
                found[row] = path
            if on_done is not None:
                on_done(len(rows))
        return found

    def _batch_paths(self, texts: Sequence[np.ndarray], codes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """`paths` of utterances of similar length."""
        batch, longest = len(texts), max(len(row) for row in codes)
        lens = np.array([len(text) + 2 for text in texts])
        states = np.full((batch, lens.max()), len(self.stay) - 1)
        for row, text in enumerate(texts):
            states[row, 1 : len(text) + 1] = text
        said = np.zeros((batch, longest, len(self.emissions)), np.int64)
        for row, part in enumerate(codes):
            said[row, : len(part)] = part[:, : len(self.emissions)]
        stay, skip = self.stay[states], self.skip[states]  # (B, L + 2)
        leave = np.log1p(-np.exp(self.stay))[states]
        inside = np.arange(states.shape[1]) < lens[:, None]
        # What it costs to come to a state from the one before, or past some that are left out.
        steps = [leave[:, :-1]]
        for over in range(1, LEFT_OUT + 1):
            left_out = sum(skip[:, 1 + i : states.shape[1] - over + i] for i in range(over))
            steps.append(leave[:, : -1 - over] + left_out if states.shape[1] > over + 1 else leave[:, :0])
        score = np.full(states.shape, NEVER)
        begin = np.concatenate([np.zeros((batch, 1)), skip[:, :LEFT_OUT].cumsum(1)], 1)[:, : states.shape[1]]
        score[:, : begin.shape[1]] = begin
        back = np.zeros((longest, batch, states.shape[1]), np.uint8)
        ends = np.array([len(row) for row in codes])
        last = np.full(states.shape, NEVER)
        for frame in range(longest):
            if frame:
                best, came = score + stay, np.zeros(states.shape, np.uint8)
                for number, cost in enumerate(steps, 1):
                    if not cost.shape[1]:
                        continue
                    other = score[:, :-number] + cost
                    better = other > best[:, number:]
                    best[:, number:][better] = other[better]
                    came[:, number:][better] = number
                score, back[frame] = best, came
            emitted = sum(
                self.emissions[q][states, said[:, frame, q][:, None]] for q in range(len(self.emissions))
            )
            score = np.where(inside, score + emitted, NEVER)
            here = ends == frame + 1
            last[here] = score[here]
        # An utterance may end before its last symbols, which are then left out.
        for over in range(1, LEFT_OUT + 1):
            rows = np.flatnonzero(lens > over)
            final = lens[rows] - 1
            last[rows, final - over] += sum(skip[rows, final - i] for i in range(over))
        for row, length in enumerate(lens):
            last[row, : max(0, length - 1 - LEFT_OUT)] = NEVER
        paths = []
        for row, length in enumerate(ends):
            state = int(last[row].argmax())
            if last[row, state] <= NEVER / 2:  # too short for so many symbols
                paths.append(_even(len(texts[row]), length))
                continue
            path = np.zeros(length, np.int64)
            for frame in range(length - 1, -1, -1):
                path[frame] = state
                state -= int(back[frame, row, state])
            paths.append(path)
        return paths


def train_aligner(
    texts: Sequence[np.ndarray],
    codes: Sequence[np.ndarray],
    num_symbols: int,
    codebook_size: int,
    on_round: Callable[[int], object] | None = None,
) -> Aligner:
    """Learn when symbols are said.

    Args:
        texts: (L,) ids below `num_symbols`.
        codes: (T, Q) of their recordings.
        num_symbols: S.
        codebook_size: V.
        on_round: called after each of `ROUNDS` rounds.
    """
    quantizers = min(QUANTIZERS, codes[0].shape[1])
    paths = [_even(len(text), len(part)) for text, part in zip(texts, codes, strict=True)]
    aligner = _count(paths, texts, codes, num_symbols, codebook_size, quantizers)
    for number in range(ROUNDS):
        if number:
            paths = aligner.paths(texts, codes)
            aligner = _count(paths, texts, codes, num_symbols, codebook_size, quantizers)
        if on_round is not None:
            on_round(number)
    return aligner


def _even(symbols: int, frames: int) -> np.ndarray:
    """The path whose symbols last equally long, without silence."""
    return 1 + np.arange(frames) * symbols // frames if symbols else np.zeros(frames, np.int64)


def _count(
    paths: Sequence[np.ndarray],
    texts: Sequence[np.ndarray],
    codes: Sequence[np.ndarray],
    num_symbols: int,
    codebook_size: int,
    quantizers: int,
) -> Aligner:
    """The aligner that these paths speak for."""
    counts = np.zeros((quantizers, num_symbols + 1, codebook_size))
    frames, visits, places = (np.zeros(num_symbols + 1) for _ in range(3))
    for path, text, part in zip(paths, texts, codes, strict=True):
        states = np.concatenate([[num_symbols], text, [num_symbols]]).astype(np.int64)
        symbols = states[path]
        for quantizer in range(quantizers):
            np.add.at(counts[quantizer], (symbols, part[:, quantizer].astype(np.int64)), 1.0)
        np.add.at(frames, symbols, 1.0)
        np.add.at(visits, states[np.unique(path)], 1.0)
        np.add.at(places, states, 1.0)
    prior = counts.sum(1) / counts.sum((1, 2))[:, None]  # (Q, V)
    prior = (prior + 1e-6) / (prior + 1e-6).sum(1, keepdims=True)
    emissions = counts + PRIOR * prior[:, None]
    emissions /= emissions.sum(2, keepdims=True)
    stay = np.clip((frames - visits + 1) / (frames + 2), LEAST, 1 - LEAST)
    skip = np.clip((places - visits + 1) / (places + 2), LEAST, 1 - LEAST)
    usual = frames[:-1].sum() / max(places[:-1].sum(), 1)
    lasting = np.where(places > 0, frames / np.maximum(places, 1), usual)
    return Aligner(np.log(emissions), np.log(stay), np.log(skip), lasting)
