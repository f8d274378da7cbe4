"""How each kind of model is asked: what it is given of a held-out cut, and how it answers.

An AudioLM is given the cut's first seconds and goes on. A VALL-E that reads notes is given these seconds too, and the
notes of the whole cut. One that reads text is given another held-out cut of the same speaker with its text as prompt,
and the cut's own text, since nobody knows which words the first seconds hold. What came after the prompt is then what
really came: of the same cut, or all of it.

Models that read are asked once more, with what another cut says behind the same prompt: who listens to the text does
worse then.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from lhotse.cut import Cut

from valle.data.alignment import Aligner
from valle.data.midi import crop, join_notes, make_midi_tokenizer
from valle.data.packed import prompt_mark
from valle.data.packed_texts import CutNotes, CutSymbols
from valle.data.split import PromptRule
from valle.data.symbols import SymbolTable, join_symbols
from valle.evaluation.clips import MIN_REST_SECONDS, Continuation, Question
from valle.evaluation.likelihood import pad_codes
from valle.evaluation.scores import SplitCodes
from valle.models import VALLE, AudioLM, CodecLM
from valle.models.prompts import make_prompts
from valle.utils.errors import UserError

READ_RATIO = 0.25  # of a cut that stands before what is scored, for models that read
PROMPTS_TO_DRAW = 8  # prompts are drawn among so many, those of the length that is nearest


class Asker(Protocol):
    """One kind of model.

    Attributes:
        manifests: how the names of its manifests begin.
        prompt: how long a prompt is where losses are measured, in words.
        shortest: seconds of a cut to be asked about, at least.
    """

    manifests: str
    prompt: str
    shortest: float

    def splits(self, cuts: Sequence[Cut], codes: Sequence[np.ndarray]) -> list[SplitCodes]:
        """Of each cut what is given and what is scored, as the training's validation splits them."""

    def questions(
        self, cuts: Sequence[Cut], codes: dict[str, np.ndarray], others: Sequence[Cut], seed: int
    ) -> list[Question]:
        """What the model is asked about each cut.

        Args:
            cuts: held-out ones.
            codes: cut -> (T, Q).
            others: cuts that prompts may come from.
            seed: of what is drawn.
        """

    def answer(
        self, questions: Sequence[Question], most: Sequence[int], seed: int, temperature: float, top_k: int
    ) -> list[Continuation]:
        """The model's continuations of the prompts of a batch.

        Args:
            questions: with their texts.
            most: frames that each may get.
            seed, temperature, top_k: of the sampling.
        """


def make_asker(model: CodecLM, checkpoint: dict[str, Any], frame_rate: float, prompt_seconds: float) -> Asker:
    """Who asks a model.

    Args:
        model: and its checkpoint.
        frame_rate: of its codes, Hz.
        prompt_seconds: of prompts; where they are whole cuts, about so many.
    """
    if isinstance(model, VALLE):
        return _AskToRead(model, checkpoint["text"], frame_rate, prompt_seconds)
    rule = PromptRule.of(checkpoint.get("config", {}).get("data", {}), frame_rate, fixed=True)
    return _AskToContinue(model, rule, frame_rate, prompt_seconds)


class _AskToContinue:
    """See `make_asker`; `model` is an AudioLM, `rule` says how its training's validation splits cuts."""

    manifests = "cuts"

    def __init__(self, model: Any, rule: PromptRule, frame_rate: float, prompt_seconds: float) -> None:
        self.model: AudioLM = model
        self.rule, self.prompt = rule, rule.describe()
        self.prompt_frames = round(prompt_seconds * frame_rate)
        self.shortest = prompt_seconds + MIN_REST_SECONDS

    def splits(self, cuts: Sequence[Cut], codes: Sequence[np.ndarray]) -> list[SplitCodes]:
        """See `Asker`."""
        out = []
        for cut, of_cut in zip(cuts, codes, strict=True):
            _check_length(cut, of_cut)
            frames = self.rule.frames(len(of_cut), cut.id, prompt_mark(cut))
            out.append(SplitCodes(cut.id, of_cut[:frames], of_cut[frames:]))
        return out

    def questions(
        self, cuts: Sequence[Cut], codes: dict[str, np.ndarray], others: Sequence[Cut], seed: int
    ) -> list[Question]:
        """See `Asker`."""
        return [Question(cut, codes[cut.id], self.prompt_frames) for cut in cuts]

    def answer(
        self, questions: Sequence[Question], most: Sequence[int], seed: int, temperature: float, top_k: int
    ) -> list[Continuation]:
        """See `Asker`."""
        x, x_lens = pad_codes([question.prompt for question in questions], _device(self.model))
        made = self.model.generate(x, x_lens, max(most), temperature, top_k, seed=seed)
        return _continuations(made, most)


class _AskToRead:
    """See `make_asker`; `text` is what a checkpoint says about what its model reads."""

    manifests = "utterances"
    prompt = f"{READ_RATIO:.0%} of it"

    def __init__(self, model: VALLE, text: dict[str, Any], frame_rate: float, prompt_seconds: float) -> None:
        self.model, self.text, self.frame_rate, self.prompt_seconds = model, text, frame_rate, prompt_seconds
        if not model.reads_notes and not (text.get("symbols") and text.get("tokenizer")):
            raise UserError(
                "the checkpoint does not say what its text symbols are; convert it again, with --text-tokens"
            )
        self.notes = CutNotes(make_midi_tokenizer(text["tokenizer"])) if model.reads_notes else None
        self.table = SymbolTable(text["symbols"]) if self.notes is None else SymbolTable()
        self.symbols = CutSymbols(self.table, text["tokenizer"])
        self.shortest = MIN_REST_SECONDS + (prompt_seconds if model.reads_notes else 0.0)
        self.aligner = Aligner.of(text["aligner"]) if text.get("aligner") else None

    def splits(self, cuts: Sequence[Cut], codes: Sequence[np.ndarray]) -> list[SplitCodes]:
        """See `Asker`."""
        out = []
        texts = [self._of_cut(cut) for cut in cuts]
        for row, (cut, of_cut) in enumerate(zip(cuts, codes, strict=True)):
            _check_length(cut, of_cut)
            frames = max(1, round(READ_RATIO * len(of_cut)))
            wrong = texts[(row + 1) % len(texts)] if len(texts) > 1 else None
            times, wrong_times = self._times(texts[row], of_cut), self._times(wrong, of_cut)
            split = SplitCodes(
                cut.id, of_cut[:frames], of_cut[frames:], texts[row], wrong, times, wrong_times
            )
            out.append(split)
        return out

    def _times(self, text: np.ndarray | None, codes: np.ndarray) -> np.ndarray | None:
        """(L,) when a text is said in codes, where the model was trained to know."""
        if text is None or self.aligner is None:
            return None
        return self.aligner.align([text], [codes])[0]

    def questions(
        self, cuts: Sequence[Cut], codes: dict[str, np.ndarray], others: Sequence[Cut], seed: int
    ) -> list[Question]:
        """See `Asker`."""
        make = self._read_text if self.notes is None else self._read_notes
        generator = np.random.default_rng(seed)
        # Another cut that is asked about, or, where there is one alone, any other.
        pool = cuts if len(cuts) > 1 else [*cuts, *(other for other in others if other.id != cuts[0].id)]
        asked = [
            make(cut, pool[(row + 1) % len(pool)], codes, others, generator) for row, cut in enumerate(cuts)
        ]
        return asked if len(pool) > 1 else [replace(question, wrong=None) for question in asked]

    def answer(
        self, questions: Sequence[Question], most: Sequence[int], seed: int, temperature: float, top_k: int
    ) -> list[Continuation]:
        """See `Asker`."""
        prompts = make_prompts(
            [torch.from_numpy(question.prompt.astype(np.int64)) for question in questions],
            [torch.from_numpy(question.text) for question in questions if question.text is not None],
            [question.own for question in questions],
        )
        assert prompts.text is not None
        made = self.model.generate(
            prompts.text, prompts.text_lens, prompts.codes, prompts.lens, list(most), temperature, top_k,
            seed=seed, prompt_text_lens=prompts.prompt_text_lens,
        )  # fmt: skip
        return _continuations(made, most)

    def _of_cut(self, cut: Cut) -> np.ndarray:
        """(L,) or (L, F) ids of what a cut says or plays."""
        if self.notes is not None:
            return self.notes.tokens(cut)
        return join_symbols(self.symbols.tokens(cut)[:, 0], None, self.table, bool(self.text.get("ends")))[0]

    def _read_text(
        self,
        cut: Cut,
        wrong: Cut,
        codes: dict[str, np.ndarray],
        others: Sequence[Cut],
        generator: np.random.Generator,
    ) -> Question:
        """Another cut is the prompt."""
        prompt = choose_prompt(cut, others, self.prompt_seconds, generator)
        ends = bool(self.text.get("ends"))
        first = self.symbols.tokens(prompt)[:, 0]
        read, own = join_symbols(self.symbols.tokens(cut)[:, 0], first, self.table, ends)
        other, _ = join_symbols(self.symbols.tokens(wrong)[:, 0], first, self.table, ends)
        frames = len(codes[prompt.id])
        both = np.concatenate([codes[prompt.id], codes[cut.id]])
        return Question(cut, both, frames, prompt, read, own, other)

    def _read_notes(
        self,
        cut: Cut,
        wrong: Cut,
        codes: dict[str, np.ndarray],
        others: Sequence[Cut],
        generator: np.random.Generator,
    ) -> Question:
        """The cut's own beginning is the prompt."""
        assert self.notes is not None
        frames = round(self.prompt_seconds * self.frame_rate)
        begin = frames / self.frame_rate
        notes, other = self.notes.notes(cut), self.notes.notes(wrong)
        first = crop(notes, 0.0, begin)
        tokenizer, ends = self.notes.tokenizer, bool(self.text.get("ends"))
        read = tokenizer(notes, add_special=ends)
        instead = tokenizer(join_notes(first, crop(other, begin, cut.duration), begin), add_special=ends)
        own = int((notes.onset < begin).sum()) + 2 * ends
        return Question(cut, codes[cut.id], frames, None, read, own, instead)


def choose_prompt(
    cut: Cut, others: Sequence[Cut], prompt_seconds: float, generator: np.random.Generator
) -> Cut:
    """A prompt for a cut: another one, of the same speaker if there is any, of about the length asked for.

    Raises:
        UserError: there is no other cut.
    """
    others = [other for other in others if other.id != cut.id]
    alike = [other for other in others if _speaker(other) == _speaker(cut)] or others
    if not alike:
        raise UserError(
            f"cut '{cut.id}' is the only one; a prompt is another held-out cut, so give two or more"
        )
    ranked = sorted(alike, key=lambda other: (abs(other.duration - prompt_seconds), other.id))
    return ranked[int(generator.integers(min(len(ranked), PROMPTS_TO_DRAW)))]


def _speaker(cut: Cut) -> str | None:
    return next((part.speaker for part in cut.supervisions if part.speaker), None)


def _continuations(made: Any, most: Sequence[int]) -> list[Continuation]:
    out = []
    for codes, start, limit, reason in zip(
        made.codes, made.prompt_lens, most, made.finish_reasons, strict=True
    ):
        new = codes[start:].cpu().numpy()
        out.append(Continuation(new[:limit], reason if len(new) <= limit else "length"))
    return out


def _check_length(cut: Cut, codes: np.ndarray) -> None:
    if len(codes) < 2:
        raise UserError(f"cut '{cut.id}': 1 frame cannot be split into prompt and target; leave it out")


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device
