"""Generation with a language model over codes: AR frame by frame, NAR over what the AR gave, whole or in chunks.

    prompt (S, Q) ──► ArSession: prefill, then one step a frame ──► FrameLoop draws quantizer 0
                  ──► refine: quantizers 1 … Q-1
                  ──► Generation, or audio piece by piece (Stream)

Everything here works on a packed copy of the model (valle/modules/packing.py), by its `prefill`, `next_logits` and
`refine_logits`, which are `ar_logits` and `nar_logits`. What else than codes a row is given (a VALL-E's text) goes with
the row, as its `Prompts`.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from valle.codecs import Codec
from valle.codecs.streaming import StreamDecoder
from valle.generation.chunks import Chunks, default_chunks
from valle.generation.decoding import Decoded, FrameLoop, GuidedSession
from valle.generation.graphs import GraphedStep
from valle.generation.patterns import PatternSession, new_frames
from valle.generation.sampling import Sampling, make_streams
from valle.models.prompts import Prompts, make_prompts
from valle.modules.cache import GraphCache
from valle.modules.packing import packed
from valle.utils.errors import UserError
from valle.utils.threads import ThreadTuner

if TYPE_CHECKING:
    from valle.models.codec_lm import CodecLM

WINDOW_PROMPT = 0.4  # part of a window that is prompt, when a continuation is longer than the window


@dataclass
class Generation:
    """What `generate` returns, one entry a row.

    With several samples a prompt, the rows of prompt i are i · n … i · n + n - 1, the best first: the one whose codes
    have the highest mean log-probability.

    Attributes:
        codes: (S_i + new_i, Q) int64 each: prompt and continuation; in-filled: everything in its place.
        prompt_lens: S_i.
        finish_reasons: "length", "eos" or "repetition".
        log_probs: (new_i,) each: log-probability of quantizer 0's codes under the model.
        timings: seconds spent in "pack" (laying out weights, once a model), "prefill", "ar" and "nar".
        frame_seconds: seconds of each AR step, for all rows together.
    """

    codes: list[Tensor]
    prompt_lens: list[int]
    finish_reasons: list[str]
    log_probs: list[Tensor]
    timings: dict[str, float] = field(default_factory=dict)
    frame_seconds: list[float] = field(default_factory=list)

    @property
    def scores(self) -> list[float]:
        """Mean log-probability of each row's codes, in nats; a row without any comes last."""
        return [float(row.mean()) if len(row) else -math.inf for row in self.log_probs]

    def ranked(self, num_samples: int) -> "Generation":
        """The same, with each prompt's rows in the order of their scores."""
        scores, groups = self.scores, range(0, len(self.codes), num_samples)
        order = [
            row
            for first in groups
            for row in sorted(range(first, first + num_samples), key=scores.__getitem__, reverse=True)
        ]
        return Generation(
            [self.codes[row] for row in order],
            [self.prompt_lens[row] for row in order],
            [self.finish_reasons[row] for row in order],
            [self.log_probs[row] for row in order],
            self.timings,
            self.frame_seconds,
        )


class ArSession:
    """A model's AR decoder in the middle of generating: the `Session` of the decoding loop.

    Args:
        model: a packed copy.
        prompts: what is continued.
        frames: at most so many will follow.
    """

    def __init__(self, model: "CodecLM", prompts: Prompts, frames: int) -> None:
        self._model = model
        self.frame_seconds: list[float] = []
        codes = prompts.codes
        pattern = model.pattern
        capacity = prompts.columns + int(model.prepend_bos) + frames
        if not pattern.plain:
            capacity += pattern.steps(frames + codes.shape[1]) + 2
        self._cache = model.ar_decoder.new_cache(codes.shape[0], capacity)
        with torch.inference_mode():
            self.logits = model.prefill(prompts, self._cache)  # (B, V + 1), or (B, heads, V + 1)
        self._run: Callable[[Tensor], Tensor] = self._step
        if isinstance(self._cache, GraphCache):
            self._run = GraphedStep(self._step, self._cache)
        self._tuner = ThreadTuner() if codes.device.type == "cpu" else contextlib.nullcontext()

    def _step(self, tokens: Tensor) -> Tensor:
        return self._model.next_logits(tokens[:, None], self._cache)[:, -1]

    def step(self, tokens: Tensor) -> None:
        """One more frame of each row: codes (A,)."""
        started = time.perf_counter()
        with torch.inference_mode(), self._tuner:
            self.logits = self._run(tokens)
        self.frame_seconds.append(time.perf_counter() - started)

    def drop(self, row: int) -> None:
        """A row leaves, the last one takes its place."""
        with torch.inference_mode():
            self._cache.drop(row)
            self.logits[row] = self.logits[-1]  # a graph writes them anew at its next step
            self.logits = self.logits[:-1]


def open_session(
    model: "CodecLM", prompts: Prompts, frames: int, guidance_scale: float = 1.0
) -> tuple[ArSession, Any]:
    """The session, and what the loop is given: itself, or guided by prompts of one frame."""
    if guidance_scale == 1.0:
        session = ArSession(model, prompts, frames)
        return session, session
    if prompts.prefix_lens is not None or prompts.text is not None:
        what = "in-filling" if prompts.text is None else "text"
        raise UserError(f"guidance cannot be combined with {what}; leave guidance_scale at 1")
    # Without a prompt means: with its last frame alone, as --drop-prompt-prob trains it.
    x, x_lens = prompts.codes, prompts.lens
    last = x.gather(1, (x_lens - 1).view(-1, 1, 1).expand(-1, 1, x.shape[2]))
    pairs = torch.zeros(2 * x.shape[0], *x.shape[1:], dtype=x.dtype, device=x.device)
    pairs[0::2], pairs[1::2, :1] = x, last
    lens = torch.stack([x_lens, torch.ones_like(x_lens)], 1).view(-1)
    session = ArSession(model, Prompts(pairs, lens), frames)
    return session, GuidedSession(session, guidance_scale)


def refine(model: "CodecLM", prompts: Prompts, tokens: Tensor, lens: Tensor) -> Tensor:
    """Quantizers 1 … Q-1 of a continuation, the likeliest each.

    Args:
        model: a packed copy.
        prompts: what was continued.
        tokens: (B, N) quantizer 0 of the continuations.
        lens: (B,) their frames.

    Returns:
        (B, N, Q) int64.
    """
    target = tokens[..., None]
    with torch.inference_mode():
        for quantizer in range(1, model.num_quantizers):
            if tokens.shape[1] > 0:
                logits = model.refine_logits(prompts, target, lens, quantizer)
                codes = logits.argmax(-1, keepdim=True)
            else:
                codes = target[..., :1]
            target = torch.cat([target, codes], -1)
    return target.clone()


def refine_piece(
    model: "CodecLM", prompt: Prompts, history: Tensor, tokens: Tensor, count: int, chunks: Chunks
) -> Tensor:
    """`refine` for one row's next `count` frames.

    Args:
        model: a packed copy.
        prompt: the row's, for its text.
        history: (H, Q) finished frames before them.
        tokens: (n,) quantizer 0 from the piece's start on; behind `count`, the lookahead is read.
        count: frames to finish.
        chunks: how much is seen on either side.

    Returns:
        (count, Q) int64.
    """
    x = history[-chunks.context :][None]
    y = tokens[: count + chunks.lookahead][None]
    lens = [torch.tensor([part.shape[1]], device=x.device) for part in (x, y)]
    seen = replace(prompt.with_codes(x, lens[0]), begin=len(history) - x.shape[1])
    return refine(model, seen, y, lens[1])[0, :count]


def refine_in_chunks(
    model: "CodecLM", prompt: Prompts, tokens: Tensor, ended_by_itself: bool, chunks: Chunks
) -> Tensor:
    """`refine` for one row, in the same pieces as a `Stream` would.

    Args:
        model: a packed copy.
        prompt: one row.
        tokens: (N,) quantizer 0 of the whole continuation.
        ended_by_itself: whether the model drew the end.
        chunks: the pieces.

    Returns:
        (N, Q) int64.
    """
    length = int(prompt.lens[0])
    history, start = prompt.codes[0, :length], 0
    for end in chunks.ends(len(tokens), ended_by_itself):
        if end > start:
            piece = refine_piece(model, prompt, history, tokens[start:], end - start, chunks)
            history, start = torch.cat([history, piece]), end
    return history[length:]


@dataclass
class Leg:
    """Rows generated in one go."""

    targets: list[Tensor]  # (new_i, Q) each
    finish_reasons: list[str]
    log_probs: list[Tensor]


class Generator:
    """One call of `generate`: holds what stays the same over its legs, and the clock.

    Args:
        model: the model itself; its packed copy is used.
        dtype: number format.
        sampling: how codes are drawn.
        guidance_scale: 1 for none.
        on_frame: called with the number of frames done.
    """

    def __init__(
        self,
        model: "CodecLM",
        dtype: str,
        sampling: Sampling,
        guidance_scale: float = 1.0,
        on_frame: Callable[[int], object] | None = None,
    ) -> None:
        started = time.perf_counter()
        self.model: CodecLM = packed(model, dtype)
        self.timings = {"pack": time.perf_counter() - started, "prefill": 0.0, "ar": 0.0, "nar": 0.0}
        self.frame_seconds: list[float] = []
        self.sampling, self.guidance_scale, self.on_frame = sampling, guidance_scale, on_frame
        self.frames_done = 0

    def open_loop(
        self, prompts: Prompts, streams: Sequence[Random], frames: int | Sequence[int], min_frames: int
    ) -> FrameLoop:
        """Prefill; the loop then draws."""
        longest = frames if isinstance(frames, int) else max(frames)
        check_frames(longest, min_frames)
        with self.clock("prefill"):
            session, guided = open_session(self.model, prompts, longest, self.guidance_scale)
        session.frame_seconds = self.frame_seconds
        before, pattern = self.frames_done, self.model.pattern
        if pattern.plain:
            least: int | list[int] = min_frames
            if prompts.least is not None:
                least = [max(min_frames, own) for own in prompts.least.tolist()]
            return FrameLoop(
                guided, self.model.eos, self.sampling, streams, frames, least,
                lambda done: self._count(before + done),
            )  # fmt: skip
        self._check_pattern(prompts)
        limits = [frames] * len(streams) if isinstance(frames, int) else list(frames)
        drawn = PatternSession(session, pattern, self.spoken_prompts(prompts), limits, min_frames)
        share = longest / max(drawn.draws(row) for row in range(len(limits)))
        return FrameLoop(
            drawn, drawn.eos, self.sampling, streams, [drawn.draws(row) for row in range(len(limits))], 0,
            lambda done: self._count(before + min(longest, round(done * share))),
        )  # fmt: skip

    def spoken_prompts(self, prompts: Prompts) -> list[Tensor]:
        """(P, Q) of each row: the codes that the AR decoder has said already, as steps."""
        if prompts.text is None:  # an AudioLM's stand in the prefix
            return [prompts.codes[0, :0] for _ in prompts.lens]
        return [row[:n] for row, n in zip(prompts.codes, prompts.lens.tolist(), strict=True)]

    def _check_pattern(self, prompts: Prompts) -> None:
        """Raises a UserError for what is not there with several codes a step."""
        name, sampling = self.model.pattern.name, self.sampling
        if self.guidance_scale != 1.0:
            raise UserError(f"guidance needs a model with pattern valle and groups of 1, this one has {name}")
        repeats = sampling.repetition_penalty != 1.0 or sampling.repetition_aware or sampling.stop_repetition
        if repeats and name != "valle":
            raise UserError(f"what looks at repetition needs a model with pattern valle, this one has {name}")

    def _count(self, done: int) -> None:
        self.frames_done = done
        if self.on_frame is not None:
            self.on_frame(done)

    @contextlib.contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Adds what happens inside to a timing."""
        started = time.perf_counter()
        yield
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        self.timings[part] += time.perf_counter() - started

    def leg(
        self,
        prompts: Prompts,
        streams: Sequence[Random],
        frames: int | Sequence[int],
        min_frames: int,
        chunks: Chunks | None = None,
    ) -> Leg:
        """Continue prompts by up to `frames` frames."""
        if prompts.prefix_lens is not None:
            gap_lens = torch.as_tensor(frames, device=prompts.lens.device).expand(len(prompts.lens))
            prompts = replace(prompts, gap_lens=gap_lens)
        prompts = self.model.ready(prompts)
        loop = self.open_loop(prompts, streams, frames, min_frames)
        with self.clock("ar"):
            loop.advance()
            first = loop.result()
        if not self.model.pattern.plain:
            return self._unfold(prompts, first, frames)
        lens = first.lens.tolist()
        with self.clock("nar"):
            if chunks is None:
                whole = refine(self.model, prompts, first.tokens, first.lens)
                targets = [row[:n] for row, n in zip(whole, lens, strict=True)]
            else:
                targets = [
                    refine_in_chunks(self.model, prompts.row(i), first.tokens[i, :n], reason == "eos", chunks)
                    for i, (n, reason) in enumerate(zip(lens, first.finish_reasons, strict=True))
                ]
        log_probs = [row[:n].clone() for row, n in zip(first.log_probs, lens, strict=True)]
        return Leg(targets, first.finish_reasons, log_probs)

    def _unfold(self, prompts: Prompts, first: Decoded, frames: int | Sequence[int]) -> Leg:
        """A leg of the draws of steps."""
        pattern = self.model.pattern
        limits = [frames] * len(first.finish_reasons) if isinstance(frames, int) else list(frames)
        targets, log_probs, reasons = [], [], []
        for row, prompt in enumerate(self.spoken_prompts(prompts)):
            n = int(first.lens[row])
            draws, chances = first.tokens[row, :n], first.log_probs[row, :n]
            codes, probs = new_frames(pattern, prompt, draws, chances, limits[row])
            targets.append(codes)
            log_probs.append(probs)
            cut = len(codes) == limits[row] and first.finish_reasons[row] != "repetition"
            reasons.append("length" if cut else first.finish_reasons[row])
        if pattern.has_nar:
            with self.clock("nar"):
                lens = torch.tensor([len(codes) for codes in targets], device=prompts.lens.device)
                tokens = pad_sequence([codes[:, 0] for codes in targets], batch_first=True)
                whole = refine(self.model, prompts, tokens, lens)
                targets = [row[:n] for row, n in zip(whole, lens.tolist(), strict=True)]
        return Leg(targets, reasons, log_probs)

    def run(
        self,
        prompts: list[Tensor],
        streams: Sequence[Random],
        frames: int | Sequence[int],
        min_frames: int,
        window: int | None = None,
        chunks: Chunks | None = None,
        texts: Sequence[Tensor] | None = None,
        prompt_text_lens: Sequence[int] | None = None,
    ) -> Generation:
        """Continue prompts (S_i, Q), in one leg, or in as many as the window asks for.

        Args:
            frames: at most so many new ones; with texts, also one number a row.
            texts: what each row reads, (L_i,) or (L_i, F); then there is no window.
            prompt_text_lens: how much of each is the prompt's.
        """
        most = frames if isinstance(frames, int) else max(frames)
        check_frames(most, min_frames)
        rows = list(range(len(prompts)))
        codes, reasons = list(prompts), ["length"] * len(prompts)
        log_probs = [torch.zeros(0, device=self.model.device) for _ in prompts]
        done = 0
        for room, new in legs(most, window):
            parts = [codes[row] if room is None else codes[row][-room:] for row in rows]
            leg = self.leg(
                make_prompts(parts, texts, prompt_text_lens),
                [streams[row] for row in rows], new if isinstance(frames, int) else frames,
                max(0, min(new, min_frames - done)), chunks=chunks,
            )  # fmt: skip
            for index, row in enumerate(rows):
                codes[row] = torch.cat([codes[row], leg.targets[index]])
                log_probs[row] = torch.cat([log_probs[row], leg.log_probs[index]])
                reasons[row] = leg.finish_reasons[index]
            rows = [row for row in rows if reasons[row] == "length"]
            done += new
            if not rows:
                break
        return Generation(
            codes, [len(prompt) for prompt in prompts], reasons, log_probs, self.timings, self.frame_seconds
        )

    def infill(
        self,
        codes: Tensor,
        lens: Tensor | None,
        start: int | Sequence[int],
        end: int | Sequence[int],
        frames: int | Sequence[int] | None,
        seed: int | None,
        num_samples: int,
        texts: Sequence[Tensor] | None = None,
    ) -> Generation:
        """Frames start … end - 1 of recordings anew; what stands there is not read.

        Args:
            codes: (B, T, Q), or (T, Q) of one.
            lens: (B,) (default: T each).
            start, end: of the gap, one number or one a row.
            frames: that take its place, one number or one a row (default: as many).
            texts: what each row reads of the result as a whole, (L_i,) or (L_i, F).

        Returns:
            codes of the whole recordings.

        Raises:
            UserError: a gap that does not lie in its recording, or codes of the wrong shape or range.
        """
        if codes.dim() < 3:
            codes = codes[None]
        totals = _each(codes.shape[1] if lens is None else lens.tolist(), len(codes), "lengths")
        if max(totals) > codes.shape[1]:
            raise UserError(f"lengths {totals[:8]}, but the codes have {codes.shape[1]} frames")
        starts, ends = (_each(gap, len(codes), "gaps") for gap in (start, end))
        for first, last, total in zip(starts, ends, totals, strict=True):
            if not 0 <= first < last <= total or last - first == total:
                raise UserError(
                    f"gap {first} to {last} in {total} frames: expected 0 <= start < end <= {total}, not all"
                )
        if num_samples < 1:
            raise UserError(f"num_samples is {num_samples}, expected 1 or more")
        widths = [last - first for first, last in zip(starts, ends, strict=True)]
        news = widths if frames is None else _each(frames, len(codes), "new_frames")
        check_frames(min(news), 0)
        known = [
            torch.cat([row[:first], row[last:total]])
            for row, first, last, total in zip(codes, starts, ends, totals, strict=True)
        ]
        prompts = make_prompts(known)
        model = self.model
        checked, known_lens = model.check_codes(
            prompts.codes.to(model.device), prompts.lens.to(model.device), "codes"
        )
        order = [row for row in range(len(codes)) for _ in range(num_samples)]
        known = [checked[row, : int(known_lens[row])] for row in order]
        starts, news = ([numbers[row] for row in order] for numbers in (starts, news))
        prompts = replace(
            make_prompts(known, None if texts is None else [texts[row] for row in order]),
            prefix_lens=torch.tensor(starts, device=model.device),
        )
        streams = make_streams(len(codes), seed, num_samples)
        # The length is given: no row ends before.
        leg = self.leg(prompts, streams, news, max(news))
        result = Generation(
            [
                torch.cat([row[:first], middle, row[first:]])
                for row, first, middle in zip(known, starts, leg.targets, strict=True)
            ],
            [len(row) for row in known], leg.finish_reasons, leg.log_probs, self.timings, self.frame_seconds,
        )  # fmt: skip
        return result if num_samples == 1 else result.ranked(num_samples)


def _each(numbers: int | Sequence[int], rows: int, what: str) -> list[int]:
    """One number for each row.

    Raises:
        UserError: numbers for another number of rows.
    """
    each = [numbers] * rows if isinstance(numbers, int) else list(numbers)
    if len(each) != rows:
        raise UserError(f"{what}: {len(each)} numbers for {rows} recordings, expected as many")
    return each


def legs(frames: int, window: int | None) -> Iterator[tuple[int | None, int]]:
    """How a continuation is divided so that no leg spans more than `window` frames. Does not depend on the prompt.

    Yields:
        frames of what is there that the leg continues at most (None: all of it), and frames that it adds.

    Raises:
        UserError: the window has no room for a prompt and a frame.
    """
    if window is None:
        yield None, frames
        return
    if window < 2:
        raise UserError(f"window is {window} frames, expected 2 or more: a prompt and what is added")
    most = window - max(1, int(WINDOW_PROMPT * window))
    while frames > 0:
        new = min(frames, most)
        yield window - new, new
        frames -= new


def check_frames(frames: int, least: int) -> None:
    """Raises a UserError for numbers of frames that cannot be."""
    if frames < 1:
        raise UserError(f"max_new_tokens is {frames}, expected 1 or more")
    if least < 0:
        raise UserError(f"min_new_tokens is {least}, expected 0 or more")


class Stream:
    """A continuation as audio, piece by piece, while it is being generated: iterate over it.

    Args:
        generator: settings and clock.
        codec: turns codes into audio.
        prompt: one row.
        stream: the row's random numbers.
        frames, min_frames: at most and at least so many new frames.
        window: see `AudioLM.generate`; for prompts without text.
        chunks: the pieces.

    Attributes:
        generation: the result, once the last piece was given out.
    """

    def __init__(
        self,
        generator: Generator,
        codec: Codec,
        prompt: Prompts,
        stream: Random,
        frames: int,
        min_frames: int,
        window: int | None,
        chunks: Chunks,
    ) -> None:
        if generator.sampling.stop_repetition:
            raise UserError("stop_repetition takes back frames, which a stream cannot; leave it at 0")
        if not generator.model.pattern.plain:
            raise UserError("a stream needs a model with pattern valle and groups of 1")
        check_frames(frames, min_frames)
        self._generator, self._codec, self._prompt, self._stream = generator, codec, prompt, stream
        self._frames, self._min_frames, self._window, self._chunks = frames, min_frames, window, chunks
        self.generation: Generation | None = None

    def __iter__(self) -> Iterator[Tensor]:
        """Yields (C, n) float32 samples at the codec's sample rate; joined, they are the continuation."""
        decoder = StreamDecoder(self._codec)
        given = self._prompt.codes[0]
        if len(given):
            decoder.prime(given)
        codes, log_probs, reason, done = given, [], "length", 0
        generator, chunks = self._generator, self._chunks
        ready = generator.model.ready(self._prompt)
        for room, new in legs(self._frames, self._window):
            part = codes if room is None else codes[-room:]
            prompt = ready.with_codes(part[None], torch.tensor([len(part)], device=part.device))
            least = max(0, min(new, self._min_frames - done))
            loop = generator.open_loop(prompt, [self._stream], new, least)
            running, start, history = True, 0, part
            while running:
                with generator.clock("ar"):
                    running = loop.advance(chunks.frames)
                end = loop.done - chunks.lookahead if running else int(loop.lens[0])
                if end <= start:
                    continue
                with generator.clock("nar"):
                    known = loop.done if running else end  # behind the end is nothing
                    tokens = loop.tokens[0, start:known]
                    piece = refine_piece(generator.model, prompt, history, tokens, end - start, chunks)
                codes, history, start = torch.cat([codes, piece]), torch.cat([history, piece]), end
                wav = decoder.push(piece)
                if wav.shape[1]:
                    yield wav
            result = loop.result()
            log_probs.append(result.log_probs[0])
            reason, done = result.finish_reasons[0], done + new
            if reason != "length":
                break
        self.generation = Generation(
            [codes], [len(given)], [reason], [torch.cat(log_probs)], generator.timings, generator.frame_seconds
        )  # fmt: skip
        rest = decoder.flush()
        if rest.shape[1]:
            yield rest


__all__ = [
    "ArSession", "Chunks", "Generation", "Generator", "Prompts", "Stream", "default_chunks", "legs", "make_prompts",
    "refine",
]  # fmt: skip
