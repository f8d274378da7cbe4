"""The modes of `infer.py` for models that read: text to speech, MIDI to piano, one or a list of many.

    line (id, text or midi, prompt, …) ──► Reader: tokens of the prompt's text and the text ──► Job of one or more legs
        ──► VALLE.generate, leg after leg, many jobs at once ──► the best of the takes ──► <id>.wav

A long piece has several legs, divided at its pauses (valle/data/passages.py): each continues the last seconds of the
one before, whose notes stand before its own on one clock, and lasts exactly as long as its stretch of the piece, the
last one until the model ends it. The codes of all legs are decoded as one recording.
"""

import json
import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from valle.bin.inference import Setup, check_target, decode, flag, play, read_prompt, write
from valle.config import option
from valle.data.midi import (
    Notes,
    crop,
    join_notes,
    make_midi_tokenizer,
    make_notes,
    read_notes,
    sustained,
)
from valle.data.passages import divide
from valle.data.symbols import UNK, WORD_BORDER, SymbolTable
from valle.data.text import make_text_tokenizer
from valle.evaluation.metrics import METRICS, Case, Excerpt, Metric
from valle.models import VALLE, Generation
from valle.models.builder import PROMPT_SECONDS
from valle.models.valle import FRAMES_PER_SYMBOL
from valle.utils.errors import UserError
from valle.utils.progress import progress

SPEECH = "speech"  # the output's name, where nobody gives one
BEGIN, END = 1, 2  # ids of a text's own begin and end, where it has them
SLOWER, PAUSE = 1.5, 1.0  # how much slower than its prompt a text may be read, and seconds beside
LONGEST_STRETCH, SHORTEST_STRETCH = 15.0, 2.0  # seconds of a piece that are played at once, at most
TAIL = 3.0  # seconds that a piece may sound on
FIELDS = ("id", "text", "prompt", "prompt_text", "midi", "prompt_midi")  # of a list's line
# What --rank calls it -> the metric, its figure, and what it needs. Takes that a metric has chosen flatter it: score
# them by another one.
RANKS = {
    "logprob": None,
    "asr": ("wer", "wer", "text"),
    "speaker": ("speaker", "speaker_prompt", "prompt"),
    "onset-f1": ("notes", "onset_f1", "midi"),
}


@dataclass
class ReadConfig:
    """What a VALL-E reads"""

    text: str | None = option(None, f"what is to be said: {SPEECH}.wav")
    prompt_text: str | None = option(None, "what --prompt says; its voice then comes out better")
    language: str | None = option(None, "of the text, as espeak-ng calls it (default: as trained)")
    midi: str | None = option(None, "piece to be played: <piece>.wav", metavar="FILE.mid")
    prompt_midi: str | None = option(None, "notes of --prompt, from its beginning on", metavar="FILE.mid")
    list: str | None = option(
        None,
        f"many texts or pieces: lines of JSON or cells with tabs ({', '.join(FIELDS)}), paths from the list's folder "
        "on: <id>.wav each",
        metavar="FILE",
    )
    batch_size: int = option(8, "lines of --list that are generated at once")
    output_name: str | None = option(None, "name of the result, without .wav")
    rank: str = option("logprob", "which of --num-samples is the best", tuple(RANKS))

    @property
    def asked(self) -> str | None:
        """The flag that says what to read."""
        return next((name for name in ("text", "midi", "list") if getattr(self, name) is not None), None)


@dataclass(frozen=True)
class Line:
    """One thing to read.

    Attributes:
        number: in the list.
        id: name of the result.
    """

    number: int
    id: str
    text: str | None = None
    prompt: Path | None = None
    prompt_text: str | None = None
    midi: Path | None = None
    prompt_midi: Path | None = None


@dataclass(frozen=True)
class Leg:
    """What is generated in one go.

    Attributes:
        tokens: (L,) symbols or (L, F) notes, those of what is continued first.
        own: how many of them are of what is continued.
        context: frames that are continued.
        frames: at most so many new ones.
        exact: not fewer either.
    """

    tokens: Tensor
    own: int
    context: int
    frames: int
    exact: bool = False


@dataclass(frozen=True)
class Job:
    """A line as the model is given it.

    Attributes:
        prompt: (P, Q) codes; P may be 0.
        legs: one after the other.
        notes: of the piece.
    """

    line: Line
    prompt: Tensor
    legs: list[Leg]
    notes: Notes | None = None

    @property
    def frames(self) -> int:
        """New frames, at most."""
        return sum(leg.frames for leg in self.legs)


@dataclass
class Take:
    """What came of a job.

    Attributes:
        new: (T, Q) codes, without the prompt.
        log_probs: of the legs' frames.
        finish_reason: of the last leg.
        figure: what --rank judges it by, where that is not its likelihood.
    """

    new: Tensor
    log_probs: list[Tensor] = field(default_factory=list)
    finish_reason: str = "length"
    figure: float | None = None

    @property
    def score(self) -> float:
        """Mean log-probability of a frame, nats."""
        joined = torch.cat(self.log_probs) if self.log_probs else torch.zeros(0)
        return float(joined.mean()) if len(joined) else -math.inf


# --------------------------------------------------------------------------------------------- what is read


def read_list(path: Path, config: ReadConfig, prompt: Path | None) -> dict[int, Line | UserError]:
    """The lines of a list by their numbers; or what is wrong with them.

    A list is lines of JSON objects, or of cells between tabs, with the names of the columns in a first line that
    begins with `id` or else in the order of `FIELDS`. Blank lines do not count. Paths start from the list's folder.

    Args:
        path: UTF-8.
        config: `prompt_text` and `prompt_midi` belong to `prompt`.
        prompt: of lines that name none.

    Raises:
        UserError: no list that can be read, or columns that are not known.
    """
    try:
        rows = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"list '{path}' cannot be read ({error})") from error
    numbered = [(number, row.rstrip("\r")) for number, row in enumerate(rows, 1) if row.strip()]
    columns: Sequence[str] = FIELDS
    if numbered and numbered[0][1].split("\t")[0].strip() == "id":
        columns = [name.strip() for name in numbered.pop(0)[1].split("\t")]
        if unknown := sorted(set(columns) - set(FIELDS)):
            raise UserError(f"list '{path}' has a column '{unknown[0]}', expected {', '.join(FIELDS)}")
    if not numbered:
        raise UserError(f"list '{path}' has no line; expected {', '.join(FIELDS)}")
    lines: dict[int, Line | UserError] = {}
    taken: dict[str, int] = {}
    for number, row in numbered:
        try:
            cells = _json_cells(row) if row.lstrip().startswith("{") else _tab_cells(row, columns)
            line = _line(number, cells, path.parent)
            if line.id in taken:
                raise UserError(
                    f"id '{line.id}' is that of line {taken[line.id]} too; both would write {line.id}.wav"
                )
        except UserError as error:
            lines[number] = error
            continue
        taken[line.id] = number
        if line.prompt is None and prompt is not None:
            given = None if config.prompt_midi is None else Path(config.prompt_midi)
            line = replace(line, prompt=prompt, prompt_text=config.prompt_text, prompt_midi=given)
        lines[number] = line
    return lines


def _tab_cells(row: str, columns: Sequence[str]) -> dict[str, str]:
    cells = row.split("\t")
    if len(cells) > len(columns):
        raise UserError(f"{len(cells)} cells, expected at most {len(columns)} ({', '.join(columns)})")
    return dict(zip(columns, cells, strict=False))


def _json_cells(row: str) -> dict[str, str]:
    try:
        cells = json.loads(row)
    except ValueError as error:
        raise UserError(f"no JSON object ({error})") from error
    if unknown := sorted(set(cells) - set(FIELDS)):
        raise UserError(f"'{unknown[0]}' is not known, expected {', '.join(FIELDS)}")
    for name, value in cells.items():
        if not isinstance(value, str | None):
            raise UserError(f"{name} is {value!r}, expected text")
    return {name: value for name, value in cells.items() if value is not None}


def _line(number: int, cells: dict[str, str], folder: Path) -> Line:
    found = {name: value.strip() for name, value in cells.items() if value.strip()}
    name = found.get("id", "")
    if not name or name in (".", "..") or "/" in name or "\\" in name:
        raise UserError(f"id is '{name}', expected a name for its .wav file")
    if ("text" in found) == ("midi" in found):
        given = "both text and midi are" if "text" in found else "neither text nor midi is"
        raise UserError(f"{given} given for '{name}', expected one of them")
    for own in ("prompt_text", "prompt_midi"):
        if own in found and "prompt" not in found:
            raise UserError(f"'{name}' has a {own}, but no prompt")
    paths = {own: folder / found[own] if own in found else None for own in ("prompt", "midi", "prompt_midi")}
    return Line(number, name, found.get("text"), prompt_text=found.get("prompt_text"), **paths)


class Reader(ABC):
    """Turns lines into jobs for one model.

    Args:
        setup: with the codec.
        model: reads.
        info: what the checkpoint says about that.
    """

    def __init__(self, setup: Setup, model: VALLE, info: dict[str, Any]) -> None:
        self.setup, self.model, self.info = setup, model, info
        self.ends = bool(info.get("ends"))
        self.what = "notes" if model.reads_notes else "text"
        self._clips: dict[Path, tuple[Tensor, float]] = {}
        self.hints: set[str] = set()

    def job(self, line: Line) -> Job:
        """What the model is given.

        Raises:
            UserError: what is wrong with the line.
        """
        wanted, other = ("midi", "text") if self.model.reads_notes else ("text", "midi")
        if getattr(line, wanted) is None:
            raise UserError(f"the model reads {self.what}: give {wanted}, not {other}")
        if getattr(line, f"prompt_{other}") is not None:
            raise UserError(f"the model reads {self.what}: give prompt_{wanted}, not prompt_{other}")
        if line.prompt is None and not self.model.first_frame:
            raise UserError("this model has no begin symbol and predicts nothing without a prompt; give one")
        return self.make(line)

    @abstractmethod
    def make(self, line: Line) -> Job:
        """See `job`."""

    @abstractmethod
    def tokens(self, config: ReadConfig, frames: int, first: int, last: int) -> Tensor:
        """(L,) symbols or (L, F) notes of a stretch of a clip whose gap is to be filled.

        Args:
            config: `text` or `midi` of the whole clip.
            frames: of the clip.
            first, last: frames of the stretch, the last one not in it.

        Raises:
            UserError: what is wrong with text or notes.
        """

    def prompt(self, line: Line) -> tuple[Tensor, float]:
        """(P, Q) codes of the prompt's end, none without one; and the second of the clip at which they begin."""
        if line.prompt is None:
            return torch.zeros(0, self.model.num_quantizers, dtype=torch.long), 0.0
        if line.prompt not in self._clips:
            if not line.prompt.exists():
                raise UserError(f"prompt '{line.prompt}' does not exist")
            self._clips[line.prompt] = read_prompt(
                line.prompt,
                self.setup.codec,
                self.model.num_quantizers,
                self.setup.config.max_prompt_duration,
            )
        return self._clips[line.prompt]

    def hint(self, text: str) -> None:
        """Say something once."""
        if text not in self.hints:
            self.hints.add(text)
            print(f"hint: {text}", file=sys.stderr)


class TextReader(Reader):
    """Of text: one leg.

    Args:
        setup, model, info: see `Reader`.
        language: other than that of the training.
    """

    def __init__(self, setup: Setup, model: VALLE, info: dict[str, Any], language: str | None = None) -> None:
        super().__init__(setup, model, info)
        if not info.get("symbols") or not info.get("tokenizer"):
            raise UserError(
                f"'{setup.checkpoint}' does not say what its text symbols are; convert it again, with --text-tokens"
            )
        config = {**info["tokenizer"], **({} if language is None else {"language": language})}
        self.language = str(config.get("language", ""))
        self.tokenizer, self.table = make_text_tokenizer(**config), SymbolTable(info["symbols"])

    def make(self, line: Line) -> Job:
        """See `Reader.job`."""
        assert line.text is not None
        prompt, begin = self.prompt(line)
        alone = self.readable(line.text)
        both, own = alone, 0
        if line.prompt_text is not None:
            if begin > 0:
                raise UserError(
                    f"prompt '{line.prompt}' lasts more than the {self.setup.config.max_prompt_duration} s of "
                    "--max-prompt-duration, so its text would say more than is heard; cut both"
                )
            both = self.symbols(f"{line.prompt_text} {line.text}")
            if both[-len(alone) :] != alone:  # read differently beside each other
                first = self.symbols(line.prompt_text)
                both = [*first, *([WORD_BORDER] if WORD_BORDER in self.table else []), *alone]
            own = len(both) - len(alone)
        elif line.prompt is not None:
            self.hint("a prompt without --prompt-text, what it says, is not followed as well")
        spoken = len(prompt) / own if own else None
        leg = Leg(self.encode(both), own + 2 * self.ends, len(prompt), self.limit(len(alone), spoken))
        return Job(line, prompt, [leg])

    def tokens(self, config: ReadConfig, frames: int, first: int, last: int) -> Tensor:
        """See `Reader`."""
        if last - first < frames:
            raise UserError(
                "--infill with --text sees the whole clip, but before or behind the gap it lasts more than the "
                f"{self.setup.config.max_prompt_duration} s of --max-prompt-duration; cut clip and text, or raise it"
            )
        return self.encode(self.readable(str(config.text)))

    def readable(self, text: str) -> list[str]:
        """As `symbols`.

        Raises:
            UserError: there are none.
        """
        found = self.symbols(text)
        if not found:
            raise UserError(f"nothing in the text '{text}' can be read")
        return found

    def symbols(self, text: str) -> list[str]:
        """Of a text, without begin and end."""
        return self.tokenizer(text)

    def encode(self, symbols: list[str]) -> Tensor:
        """(L,) ids, with begin and end where the model has them.

        Raises:
            UserError: symbols that the model was not trained with.
        """
        lenient = UNK in self.table
        if not lenient and (lacking := sorted({symbol for symbol in symbols if symbol not in self.table})):
            named = ", ".join(map(repr, lacking))
            raise UserError(
                f"the text has symbols that the model's {len(self.table)} do not hold: {named}; write it without them, "
                "or check --language"
            )
        ids = self.table.encode(symbols, unknown=lenient)
        return torch.tensor([BEGIN, *ids, END] if self.ends else ids)

    def limit(self, symbols: int, spoken: float | None) -> int:
        """New frames at most, where the user does not say.

        Args:
            symbols: of the text.
            spoken: frames a symbol in the prompt.
        """
        config, rate = self.setup.config, self.setup.codec.frame_rate
        if config.max_new_tokens is not None or config.duration is not None:
            return self.setup.new_frames[0]
        frames = FRAMES_PER_SYMBOL * symbols
        if spoken is not None:
            frames = math.ceil(SLOWER * spoken * symbols + PAUSE * rate)
        return max(frames, config.min_new_tokens or 0)


class NoteReader(Reader):
    """Of notes: a leg for each stretch of a piece."""

    def __init__(self, setup: Setup, model: VALLE, info: dict[str, Any]) -> None:
        super().__init__(setup, model, info)
        for name in ("max_new_tokens", "duration", "min_new_tokens"):
            if getattr(setup.config, name) is not None:
                raise UserError(f"{flag(name)}: a piece lasts as long as its notes; leave it out")
        self.tokenizer = make_midi_tokenizer(info["tokenizer"])

    def make(self, line: Line) -> Job:
        """See `Reader.job`."""
        assert line.midi is not None
        notes, rate = self.notes(line.midi), self.setup.codec.frame_rate
        prompt, begin = self.prompt(line)
        seconds = len(prompt) / rate
        played = make_notes([], [], [], [])
        if line.prompt_midi is not None:
            played = crop(read_notes(line.prompt_midi), begin, begin + seconds)
            if not len(played):
                raise UserError(
                    f"MIDI file '{line.prompt_midi}' has no notes from {begin:.1f} to {begin + seconds:.1f} s, "
                    "where the prompt is"
                )
        elif line.prompt is not None:
            self.hint("a prompt without --prompt-midi, its notes, is not followed as well")
        starts = divide(notes, self.longest(seconds), rate)
        context = round(PROMPT_SECONDS * rate)
        end = max(notes.duration, sustained(notes).duration)
        legs = []
        for number, start in enumerate(starts):
            until = starts[number + 1] if number + 1 < len(starts) else math.ceil((end + TAIL) * rate)
            if number == 0:
                read, own = join_notes(played, crop(notes, 0.0, until / rate), seconds), len(played)
                seen = len(prompt)
            else:
                seen = min(context, start)
                read = crop(notes, (start - seen) / rate, until / rate)
                own = int((read.onset < seen / rate).sum())
            exact = number + 1 < len(starts)
            legs.append(Leg(self.encode(read), own + 2 * self.ends, seen, until - start, exact))
        return Job(line, prompt, legs, notes)

    def tokens(self, config: ReadConfig, frames: int, first: int, last: int) -> Tensor:
        """See `Reader`."""
        path, rate = Path(str(config.midi)), self.setup.codec.frame_rate
        notes = crop(self.notes(path), first / rate, last / rate)
        if not len(notes):
            raise UserError(
                f"MIDI file '{path}' has no notes from {first / rate:.1f} to {last / rate:.1f} s, what the model sees "
                "of the clip"
            )
        return self.encode(notes)

    def notes(self, path: Path) -> Notes:
        """Of a MIDI file.

        Raises:
            UserError: there are none.
        """
        notes = read_notes(path)
        if not len(notes):
            raise UserError(f"MIDI file '{path}' has no notes")
        return notes

    def encode(self, notes: Notes) -> Tensor:
        """(L, F) ids, with begin and end where the model has them."""
        return torch.from_numpy(self.tokenizer(notes, add_special=self.ends))

    def longest(self, prompt_seconds: float) -> float:
        """Seconds of a stretch: with what it continues, not more than the model was trained on, or has numbers for."""
        trained = self.setup.training_data.get("filter_max_duration")
        most = float(self.tokenizer.max_duration)
        room = (most if trained is None else min(most, float(trained))) - max(prompt_seconds, PROMPT_SECONDS)
        return min(LONGEST_STRETCH, max(SHORTEST_STRETCH, room))


# -------------------------------------------------------------------------------------------- what is made of it


class Performer:
    """Generates jobs, many at once, and keeps the clock.

    Args:
        setup: how codes are drawn.
        model: reads.
    """

    def __init__(self, setup: Setup, model: VALLE) -> None:
        self.setup, self.model = setup, model
        self.timings: dict[str, float] = {}
        self.frames = 0

    def perform(
        self, jobs: Sequence[Job], on_frame: Callable[[int], object] | None = None
    ) -> list[list[Take]]:
        """The takes of each job; none depends on the other jobs.

        Args:
            on_frame: called with each leg's frames so far.
        """
        takes: list[list[Take]] = [[] for _ in jobs]
        for number in range(max(len(job.legs) for job in jobs)):
            here = [index for index, job in enumerate(jobs) if number < len(job.legs)]

            def alike(index: int, number: int = number) -> tuple[bool, bool]:
                leg = jobs[index].legs[number]
                return leg.context > 0, leg.exact

            for _, group in groupby(sorted(here, key=alike), alike):
                self._leg(jobs, takes, list(group), number, on_frame)
        return takes

    def _leg(
        self,
        jobs: Sequence[Job],
        takes: list[list[Take]],
        group: list[int],
        number: int,
        on_frame: Callable[[int], object] | None,
    ) -> None:
        """One leg of some jobs, added to their takes; they are alike in having a prompt and in being exact."""
        if number == 0:
            rows = [(jobs[index].legs[0], jobs[index].prompt) for index in group]
            result = self._generate(rows, number, self.setup.draw.num_samples, on_frame)
            places = [index for index in group for _ in range(self.setup.draw.num_samples)]
            for index in places:
                takes[index].append(Take(jobs[index].prompt[:0]))
            targets = [take for index in group for take in takes[index]]
        else:
            targets = [take for index in group for take in takes[index]]
            places = [index for index in group for _ in takes[index]]
            rows = [(jobs[index].legs[number], take.new) for index, take in zip(places, targets, strict=True)]
            result = self._generate(rows, number, 1, on_frame)
        for row, take in enumerate(targets):
            new = result.codes[row][result.prompt_lens[row] :].cpu()
            take.new = torch.cat([take.new, new])
            take.log_probs.append(result.log_probs[row].cpu())
            take.finish_reason = result.finish_reasons[row]
        self.count(result)

    def _generate(
        self,
        rows: Sequence[tuple[Leg, Tensor]],
        number: int,
        num_samples: int,
        on_frame: Callable[[int], object] | None,
    ) -> Generation:
        legs = [leg for leg, _ in rows]
        prompts = [codes[len(codes) - leg.context :] for leg, codes in rows]
        prompted = legs[0].context > 0
        setup, limits = self.setup, [leg.frames for leg in legs]
        return self.model.generate(
            pad_sequence([leg.tokens for leg in legs], batch_first=True),
            torch.tensor([len(leg.tokens) for leg in legs]),
            pad_sequence(prompts, batch_first=True) if prompted else None,
            torch.tensor([len(codes) for codes in prompts]) if prompted else None,
            limits, seed=setup.draw.seed + number, dtype=setup.config.dtype, sampling=setup.sampling,
            min_new_tokens=self.least(legs[0], max(limits)), num_samples=num_samples,
            prompt_text_lens=torch.tensor([leg.own for leg in legs]),
            chunks=None if setup.config.chunk is None else setup.chunks, on_frame=on_frame,
        )  # fmt: skip

    def stream(self, job: Job, take: Take, on_frame: Callable[[int], object]) -> Iterator[Tensor]:
        """The sound of a job, (C, n) samples at a time; `take` grows with it."""
        setup, codes = self.setup, job.prompt
        for number, leg in enumerate(job.legs):
            stream = self.model.stream(
                leg.tokens, setup.codec, codes[len(codes) - leg.context :] if leg.context else None, leg.frames,
                seed=setup.draw.seed + number, dtype=setup.config.dtype, sampling=setup.sampling,
                min_new_tokens=self.least(leg, leg.frames), chunks=setup.chunks, on_frame=on_frame,
                prompt_text_lens=torch.tensor([leg.own]),
            )  # fmt: skip
            yield from stream
            result = stream.generation
            assert result is not None
            take.new = torch.cat([take.new, result.codes[0][result.prompt_lens[0] :].cpu()])
            take.finish_reason = result.finish_reasons[0]
            codes = take.new
            self.count(result)

    def least(self, leg: Leg, frames: int) -> int:
        """New frames at least; a row's limit goes before it."""
        return frames if leg.exact else self.setup.config.min_new_tokens or 0

    def count(self, result: Generation) -> None:
        """Add a generation to what the last line says."""
        self.frames += sum(map(len, result.codes)) - sum(result.prompt_lens)
        for part, seconds in result.timings.items():
            self.timings[part] = self.timings.get(part, 0.0) + seconds


class Rank:
    """Orders takes, the best first: by likelihood, or by a metric, then by likelihood.

    Args:
        name: one of `RANKS`.
        setup: with the codec.
        language: of the text.

    Raises:
        UserError: the metric's packages are not installed.
    """

    def __init__(self, name: str, setup: Setup, language: str | None) -> None:
        self.name, self.setup, self.language = name, setup, language
        chosen = RANKS[name]
        self.metric: Metric | None = None
        if chosen is not None:
            self.metric = METRICS[chosen[0]]()
            self.figure, self.needs = chosen[1:]
            if (hint := self.metric.missing()) is not None:
                raise UserError(f"--rank {name}: {hint}")

    def case(self, job: Job) -> Case:
        """What takes of a job are compared with.

        Raises:
            UserError: they cannot be.
        """
        rate, channels = self.setup.codec.sample_rate, self.setup.codec.channels
        nothing = Excerpt(np.zeros((channels, 0), np.float32), rate)
        prompt = Excerpt(sound(self.setup, job.prompt, 0), rate) if len(job.prompt) else None
        line = job.line
        case = Case(line.id, nothing, prompt, line.text, self.language if line.text else None, job.notes)
        if self.metric is not None and (getattr(line, self.needs) is None or not self.metric.applies(case)):
            what = {"text": "English text", "prompt": "a prompt", "midi": "notes"}[self.needs]
            raise UserError(f"--rank {self.name} needs {what}")
        return case

    def order(self, job: Job, takes: list[Take]) -> list[Take]:
        """The takes, each with its figure."""
        best = 1.0
        if self.metric is not None and len(takes) > 1:
            case = self.case(job)
            best = 1.0 if self.metric.keys[self.figure] == "higher" else -1.0
            for take in takes:
                if len(take.new):
                    wav = sound(self.setup, torch.cat([job.prompt, take.new]), len(job.prompt))
                    take.figure = self.metric(Excerpt(wav, self.setup.codec.sample_rate), case)[self.figure]

        def worth(take: Take) -> tuple[bool, float, float]:
            return len(take.new) > 0, -math.inf if take.figure is None else best * take.figure, take.score

        return sorted(takes, key=worth, reverse=True)

    def describe(self, take: Take) -> str:
        """What a take is ordered by."""
        judged = "" if take.figure is None else f", {self.figure} {take.figure:.3f}"
        return f"{judged}, score {take.score:.3f} nats/frame" if self.setup.draw.num_samples > 1 else ""


def sound(setup: Setup, codes: Tensor, first: int) -> np.ndarray:
    """(C, N) samples of codes from a frame on."""
    return np.concatenate(list(decode(setup.codec, codes)), 1)[:, first * setup.codec.hop_length :]


def make_reader(setup: Setup, config: ReadConfig, model: VALLE, info: dict[str, Any]) -> Reader:
    """The reader of a model; `info` is what its checkpoint says about what it reads."""
    if model.reads_notes:
        return NoteReader(setup, model, info)
    return TextReader(setup, model, info, config.language)


def read_aloud(setup: Setup, config: ReadConfig, reader: Reader) -> list[Path]:
    """Say a text, play a piece, or do all that a list names; returns the files written."""
    model = reader.model
    if setup.draw.num_samples < 1:
        raise UserError(f"num_samples is {setup.draw.num_samples}, expected 1 or more")
    rank = Rank(config.rank, setup, getattr(reader, "language", None))
    prompt = setup.clips[0] if setup.clips else None
    if config.list is not None:
        return read_many(setup, config, reader, rank, prompt)
    prompt_midi = None if config.prompt_midi is None else Path(config.prompt_midi)
    midi = None if config.midi is None else Path(config.midi)
    name = config.output_name or (SPEECH if midi is None else midi.stem)
    if "/" in name or "\\" in name:
        raise UserError(f"--output-name is '{name}', expected a name without a folder; that is --output-dir")
    line = Line(0, name.removesuffix(".wav"), config.text, prompt, config.prompt_text, midi, prompt_midi)
    job = reader.job(line)
    if setup.config.stream is not None:
        return stream_one(setup, model, job)
    check_output(setup, job)
    if setup.draw.num_samples > 1:
        rank.case(job)
    performer, started, finished = Performer(setup, model), time.perf_counter(), 0
    with progress(total=job.frames, desc="generating", unit="frame") as bar:

        def on_frame(done: int) -> None:
            nonlocal finished
            if done < bar.n - finished:  # the first of another leg
                finished = int(bar.n)
            bar.update(finished + done - bar.n)

        takes = performer.perform([job], on_frame)[0]
    written = finish(setup, reader, rank, job, takes)
    summarize(setup, performer, time.perf_counter() - started)
    return written


def read_many(
    setup: Setup, config: ReadConfig, reader: Reader, rank: Rank, prompt: Path | None
) -> list[Path]:
    """All lines of a list; the others are done where one fails.

    Raises:
        UserError: lines that failed.
    """
    if config.batch_size < 1:
        raise UserError(f"--batch-size is {config.batch_size}, expected 1 or more")
    path = Path(str(config.list))
    lines = read_list(path, config, prompt)
    failed: dict[int, str] = {}
    jobs: list[Job] = []
    taken: dict[Path, int] = {}

    def fail(number: int, message: str) -> None:
        failed[number] = message
        print(f"line {number} of '{path}': {message}", file=sys.stderr)

    for number, found in lines.items():
        try:
            if isinstance(found, UserError):
                raise found
            job = reader.job(found)
            check_output(setup, job)
            if setup.draw.num_samples > 1:
                rank.case(job)
            for target in outputs(setup, job):
                if target in taken:
                    raise UserError(
                        f"its {target.name} is also written by line {taken[target]}; change the id"
                    )
            taken |= dict.fromkeys(outputs(setup, job), number)
            jobs.append(job)
        except UserError as error:
            fail(number, str(error))
    # Alike in length, so that none waits for long for another.
    jobs.sort(key=lambda job: (len(job.legs), job.frames))
    performer, started, written = Performer(setup, reader.model), time.perf_counter(), []
    with progress(total=len(jobs), desc=path.name, unit="line") as bar:
        for first in range(0, len(jobs), config.batch_size):
            batch = jobs[first : first + config.batch_size]
            for job, takes in zip(batch, performer.perform(batch), strict=True):
                try:
                    written += finish(setup, reader, rank, job, takes)
                except UserError as error:
                    fail(job.line.number, str(error))
                bar.update()
    if performer.frames:
        summarize(setup, performer, time.perf_counter() - started)
    if failed:
        numbers = ", ".join(map(str, sorted(failed)))
        raise UserError(
            f"{len(failed)} of the {len(lines)} lines of '{path}' failed ({numbers}); the others are done"
        )
    return written


def check_output(setup: Setup, job: Job) -> None:
    """Raises a UserError where a result would overwrite its prompt."""
    clip = job.line.prompt
    for path in outputs(setup, job):
        if clip is not None and path.exists() and path.samefile(clip):
            raise UserError(f"'{path}' would overwrite the prompt; give another {flag('output_dir')}")


def outputs(setup: Setup, job: Job) -> list[Path]:
    """<id>.wav, <id>_2.wav, … for as many samples as there will be."""
    names = [job.line.id, *(f"{job.line.id}_{number}" for number in range(2, setup.draw.num_samples + 1))]
    return [Path(setup.config.output_dir) / f"{name}.wav" for name in names]


def finish(setup: Setup, reader: Reader, rank: Rank, job: Job, takes: list[Take]) -> list[Path]:
    """Order a job's takes and write them; returns the files.

    Raises:
        UserError: the model ended all of them at once.
    """
    written = []
    for path, take in zip(outputs(setup, job), rank.order(job, takes), strict=True):
        if not len(take.new):
            continue
        write(setup.codec, torch.cat([job.prompt, take.new]), {path: len(job.prompt)})
        setup.say(
            f"{path}  {setup.seconds(len(take.new)):.1f} s (ended by {take.finish_reason}){rank.describe(take)}"
        )
        written.append(path)
    if not written:
        raise UserError(f"the model ended '{job.line.id}' at once; try another --seed")
    check_length(setup, reader, job, max(len(take.new) for take in takes))
    return written


def check_length(setup: Setup, reader: Reader, job: Job, frames: int) -> None:
    """A hint where a text took longer than what the model was trained on."""
    trained, seconds = setup.training_data.get("filter_max_duration"), setup.seconds(len(job.prompt) + frames)
    if trained is not None and len(job.legs) == 1 and seconds > trained + TAIL * (job.notes is not None):
        reader.hint(
            f"'{job.line.id}' and its prompt last {seconds:.1f} s, but the model was trained on up to {trained:.1f} s; "
            "give shorter texts, one a line of --list"
        )


def summarize(setup: Setup, performer: Performer, elapsed: float) -> None:
    """The last line, of all that was generated."""
    everything = torch.zeros(performer.frames, 0)
    setup.summarize(Generation([everything], [0], [""], [], performer.timings), elapsed)


def stream_one(setup: Setup, model: VALLE, job: Job) -> list[Path]:
    """A text or a piece as --stream, written while it is being made."""
    target = str(setup.config.stream)
    line = job.line
    check_target(setup, [path for path in (line.prompt, line.midi, line.prompt_midi) if path is not None])
    performer, take, started = Performer(setup, model), Take(job.prompt[:0]), time.perf_counter()
    with progress(total=job.frames, desc="streaming", unit="frame") as bar:
        played = play(setup, performer.stream(job, take, lambda done: bar.update()), started)
    if played.first_audio is None:
        raise UserError(f"the model ended '{line.id}' at once; try another --seed")
    ended = "by the listener" if played.stopped else f"by {take.finish_reason}"
    setup.say(
        f"{target}  {played.samples / setup.codec.sample_rate:.1f} s (ended {ended}), "
        f"first audio after {played.first_audio:.2f} s"
    )
    if not played.stopped:
        summarize(setup, performer, played.elapsed)
    return [] if target == "-" else [Path(target)]
