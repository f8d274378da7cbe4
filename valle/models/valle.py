"""VALL-E: text, or the notes of a MIDI performance, to audio, on neural-codec tokens.

    text (B, S) ──► AR decoder: [text | quantizer 0 of prompt and target], frame by frame; full attention inside the
                    text, causal behind it, the first frame predicted from the text
                ──► NAR decoder: [text | prompt | target], quantizer q = 1 … Q-1 of all target frames at once

A prompt is a recording whose voice, or whose piano and room, is to be gone on with; its own text stands before the text
to be said. Decoders, losses and generation are those of `CodecLM`.

Sources: VALL-E (arXiv 2301.02111, section 4.2 and, for prompts in training, 5.1); MIDI-VALLE (arXiv 2507.08530) for
notes in the place of text. VALL-F, of the open implementations, reads the text by cross-attention.

Shapes: B batch, S symbols or notes, F fields of a note, P prompt frames, T frames, Q quantizers, V codebook size, D
width.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from valle.codecs import Codec
from valle.generation.chunks import Chunks, default_chunks
from valle.generation.sampling import Sampling, make_streams
from valle.models.codec_lm import (
    CodecLM,
    LossOutput,
    Metrics,
    Part,
    StageLoss,
    around,
    check_reduction,
    new_embedding,
)
from valle.models.generating import Generation, Generator, Stream
from valle.models.prompts import Prompts, make_prompts
from valle.models.rows import NarRows, fill_gaps, join_codes, take, without_prompt_text
from valle.modules.cache import Cache
from valle.modules.embeddings import FieldEmbedding
from valle.modules.masks import lengths_to_mask
from valle.utils.errors import UserError

PREFIX_MODES = (0, 1, 2, 4)
FRAMES_PER_SYMBOL = 16  # at most, where nobody says how long a text may last
LEAST_SAID = 0.5  # of the time until the last symbol: no text is read faster
MOST_HURRY = 1.4  # how much faster or slower than usual a text is read where its prompt is


class VALLE(CodecLM):
    """Text or notes to audio, with an autoregressive and a non-autoregressive decoder.

    What the NAR decoder is given as prompt in training (`prefix_mode`): 0 nothing; 1 the utterance's own beginning; 2 a
    stretch of the utterance, which is then no target; 4 another utterance of the same recording (`y_prompts_codes`).

    Args:
        d_model, nhead, num_layers, norm_first, add_prenet, share_embedding, nar_scale_factor, prepend_bos,
            num_quantizers, dropout, position, activation, qk_norm, attention_dropout, codebook_size, audio_from_zero,
            nar_num_layers, pattern, group_size: see `AudioLM`.
        prefix_mode: see above.
        text_sizes: ids of the text's symbols, one number; of notes, one number a field.
        field_dims: of notes: widths of the fields' embeddings, which are then put side by side and projected, as
            MIDI-VALLE does (default: all have width D and are added up).
        prefix_frames: longest prompt in training.
        text_ends: texts begin and end with a symbol, or a row, of their own.
        time_fields: of notes: which fields say when a note begins, as (column, first id, steps a second); their sum is
            its place in time.
        frame_rate: of the codes in Hz. With `time_fields`, notes and audio then share one clock: both have positions in
            frames from the beginning of the recording on.
        symbol_frames: how many frames each symbol of the text lasts on average. Text and audio then share a clock as
            notes and audio do: in training by the times given (`x_times`), in generation by these averages. None:
            positions count symbols.
    """

    reads = "prefix"
    symbol_frames: Tensor | None

    def __init__(
        self,
        d_model: int,
        nhead: int,
        num_layers: int,
        norm_first: bool = True,
        add_prenet: bool = False,
        prefix_mode: int = 0,
        share_embedding: bool = True,
        nar_scale_factor: float = 1.0,
        prepend_bos: bool = False,
        num_quantizers: int = 8,
        *,
        text_sizes: int | Sequence[int] = 512,
        codebook_size: int = 1024,
        dropout: float = 0.1,
        position: str = "rope",
        activation: str = "gelu",
        qk_norm: bool = False,
        attention_dropout: float = 0.0,
        audio_from_zero: bool = False,
        nar_num_layers: int | None = None,
        field_dims: Sequence[int] | None = None,
        prefix_frames: int = 225,
        text_ends: bool = False,
        time_fields: Sequence[tuple[int, int, float]] = (),
        frame_rate: float | None = None,
        symbol_frames: Sequence[float] | None = None,
        pattern: str = "valle",
        group_size: int = 1,
    ) -> None:
        if prefix_mode not in PREFIX_MODES:
            raise ValueError(f"prefix_mode is {prefix_mode}, expected one of {PREFIX_MODES}")
        if bool(time_fields) != (frame_rate is not None):
            raise ValueError("time_fields and frame_rate belong together")
        if symbol_frames is not None and (time_fields or [len(symbol_frames)] != [text_sizes]):
            raise ValueError(f"{len(symbol_frames)} symbol_frames, expected one for each symbol of a text")
        if symbol_frames is not None and (min(symbol_frames) < 0 or max(symbol_frames) == 0):
            raise ValueError("symbol_frames: expected 0 or more each, and not 0 for all")
        super().__init__(
            d_model, nhead, num_layers, norm_first, add_prenet, num_quantizers, nar_scale_factor, prepend_bos,
            codebook_size, share_embedding and not prepend_bos, dropout, position, activation, qk_norm,
            attention_dropout, audio_from_zero or bool(time_fields or symbol_frames is not None), nar_num_layers,
            self.reads == "memory", pattern, group_size,
        )  # fmt: skip
        self.prefix_mode, self.prefix_frames, self.text_ends = prefix_mode, prefix_frames, text_ends
        self.time_fields, self.note_rate = tuple(time_fields), frame_rate
        lasting = None if symbol_frames is None else torch.tensor(symbol_frames, dtype=torch.float32)
        self.register_buffer("symbol_frames", lasting, persistent=False)
        self.text_sizes = (text_sizes,) if isinstance(text_sizes, int) else tuple(text_sizes)
        self.reads_notes = not isinstance(text_sizes, int)
        self.ar_text_embedding = _text_embedding(text_sizes, d_model, field_dims)
        self.ar_text_prenet = TextPrenet(d_model) if add_prenet else None
        if self.pattern.has_nar:
            self.nar_text_embedding = _text_embedding(text_sizes, self.nar_dim, field_dims)
            self.nar_text_prenet = TextPrenet(self.nar_dim) if add_prenet else None

    # ------------------------------------------------------------------ logits

    def _text(self, x: Tensor, x_lens: Tensor, decoder: str, times: Tensor | None = None) -> Part:
        """The text as a part of a decoder's input; `times` see `ar_logits`."""
        embedding, prenet, position = (
            getattr(self, f"{decoder}_{name}")
            for name in ("text_embedding", "text_prenet", "prefix_position")
        )
        positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        # Where audio goes on in steps of another length than a frame, so does what is read by the same clock.
        steps = self.pattern.steps_per_frame if decoder == "ar" else 1.0
        if self.has_clock:
            positions = (self.clock(x) if times is None else times) * steps
        text = embedding(x)
        if prenet is not None:
            text = prenet(text, x_lens)
        return Part(text if position is None else position(text, positions), x_lens, positions)

    @property
    def has_clock(self) -> bool:
        """Whether what is read and the audio have positions in frames of one recording."""
        return self.note_rate is not None or self.symbol_frames is not None

    def clock(self, x: Tensor) -> Tensor:
        """(B, S, F) notes -> (B, S), the frame at which each begins; (B, S) text -> the same if all symbols lasted as
        long as they do on average."""
        if self.symbol_frames is not None:
            lasting = self.symbol_frames[x]
            return lasting.cumsum(1) - lasting
        assert self.note_rate is not None
        seconds = torch.zeros(x.shape[:2], device=x.device)
        for column, first, rate in self.time_fields:
            seconds = seconds + (x[..., column] - first).clamp(min=0) / rate
        return seconds * self.note_rate

    def ready(self, prompts: Prompts) -> Prompts:
        """See `CodecLM`: with the times of the text, where text and audio share a clock.

        A prompt's own text fills the prompt, and what follows is read at the prompt's speed, within bounds; the end
        does not come before half of the time that this takes. Where a gap is filled, the text fills the recording.
        """
        if self.symbol_frames is None or prompts.text is None or prompts.text_lens is None:
            return prompts
        clock = self.clock(prompts.text)
        whole = F.pad(
            clock + self.symbol_frames[prompts.text], (1, 0)
        )  # (B, S + 1): until when each beginning lasts
        known = prompts.lens.to(clock.dtype)[:, None]
        if prompts.gap_lens is not None:
            total = whole.gather(1, prompts.text_lens[:, None]).clamp(min=1.0)
            return replace(prompts, text_times=clock * (known + prompts.gap_lens[:, None]) / total)
        own = torch.zeros_like(prompts.lens) if prompts.prompt_text_lens is None else prompts.prompt_text_lens
        own = own * (prompts.lens > 0)  # without a prompt, nothing has been said
        spoken = whole.gather(1, own[:, None])
        rate = torch.where(spoken > 0, known / spoken.clamp(min=1.0), 1.0)
        behind = known + (clock - spoken) * rate.clamp(1 / MOST_HURRY, MOST_HURRY)
        columns = torch.arange(clock.shape[1], device=clock.device)
        times = torch.where(columns < own[:, None], clock * rate, behind)
        # Behind a prompt that ends in silence it may seem that all has been said.
        last = times.gather(1, (prompts.text_lens - 1)[:, None])
        least = (LEAST_SAID * (last - known)).clamp(min=0)[:, 0].long()
        return replace(prompts, text_times=times, least=least)

    def ar_logits(
        self,
        x: Tensor,
        x_lens: Tensor,
        y: Tensor,
        y_lens: Tensor | None = None,
        cache: Cache | None = None,
        suffix: Tensor | None = None,
        suffix_lens: Tensor | None = None,
        suffix_starts: Tensor | None = None,
        *,
        times: Tensor | None = None,
    ) -> Tensor:
        """Logits of quantizer 0 for each frame, given the text and the frames before it.

        In-filling (order suffix, prefix, middle of arXiv 2207.14255, section 3): what stands behind a gap goes with the
        text, and text and suffix see each other; prefix and gap are `y`. All frames keep their place in time.

        Args:
            x: (B, S) text or (B, S, F) notes.
            x_lens: (B,).
            y: (B, T) codes of quantizer 0, or (B, T, K) ids of the pattern's steps, those of the prompt first; T may be
                0. With a filled cache, new ones only.
            y_lens: (B,) frames (default: T each).
            cache: where keys and values are kept, from `new_cache`.
            suffix: (B, U) codes of quantizer 0 behind a gap (default: none). Not read with a filled cache.
            suffix_lens: (B,), 0 for rows without a gap; needed with `suffix`.
            suffix_starts: (B,) the frame at which each suffix begins; needed with `suffix`.
            times: (B, S) the frame at which each symbol begins (default: see `clock`). Of models with a clock.

        Returns:
            (B, T + 1, V + 1): for frame 0 … T, the last one what follows y; index V is the end. With an empty cache the
            last of these only, with a filled one (B, T, V + 1): what follows each new frame.
        """
        if cache is not None and cache.length > 0:
            return self.next_logits(y, cache)
        text = self._text(x, x_lens, "ar", times)
        prefix, first, first_from = [self._prefix(text)], None, None
        if suffix is not None:
            assert suffix_lens is not None and suffix_starts is not None
            lens = prefix[0].lens
            first, first_from = torch.zeros_like(lens) if self.audio_from_zero else lens, lens - 1
            begin = first + suffix_starts + int(self.prepend_bos)
            positions = begin[:, None] + torch.arange(suffix.shape[1], device=suffix.device)
            prefix.append(Part(self._ar_embed(suffix, positions), suffix_lens, positions))
        return self._run_ar(prefix, y, y_lens, cache, first, first_from, self._memory(text))

    def nar_logits(
        self,
        x: Tensor,
        x_lens: Tensor,
        y: Tensor,
        y_lens: Tensor,
        quantizer: int | Tensor,
        prompt: Tensor | None = None,
        prompt_lens: Tensor | None = None,
        prefix_lens: Tensor | None = None,
        *,
        times: Tensor | None = None,
        begin: int = 0,
    ) -> Tensor:
        """Logits of one quantizer for all target frames, given text, prompt and the target's lower quantizers.

        Args:
            x, x_lens: text, as for `ar_logits`.
            y: (B, T, Q' ≤ Q) target codes; only quantizers below `quantizer` are read.
            y_lens: (B,).
            quantizer: 1 … Q-1, or one a row, (B,).
            prompt: (B, P, Q) codes that stand around the target (default: none).
            prompt_lens: (B,).
            prefix_lens: (B,) prompt frames before the target; the others stand behind it (default: all before).
            times: as for `ar_logits`.
            begin: the frame of the recording at which the prompt begins, where text and audio share a clock.

        Returns:
            (B, T, V).
        """
        text = self._text(x, x_lens, "nar", times)
        prefix = self._prefix(text)
        first = torch.zeros_like(y_lens) if self.audio_from_zero else prefix.lens
        if self.has_clock:
            first = first + begin
        parts = [prefix]
        if prompt is not None and prompt_lens is not None:
            columns = torch.arange(prompt.shape[1], device=y.device)
            if prefix_lens is not None:
                columns = around(columns, prefix_lens, y_lens)
            parts.append(self._nar_prompt(prompt, prompt_lens, first[:, None] + columns))
            first = first + (prompt_lens if prefix_lens is None else prefix_lens)
        positions = first[:, None] + torch.arange(y.shape[1], device=y.device)
        return self._run_nar(parts, y, y_lens, positions, quantizer, self._memory(text))

    def _prefix(self, text: Part) -> Part:
        """What stands before the audio."""
        return text

    def _memory(self, text: Part) -> Part | None:
        """What cross-attention reads."""
        return None

    def prefill(self, prompts: Prompts, cache: Cache) -> Tensor:
        """Fill a cache with texts and prompts -> (B, V + 1) of the first new frame."""
        assert prompts.text is not None and prompts.text_lens is not None
        tokens, lens = prompts.codes[..., 0], prompts.lens
        if prompts.prefix_lens is not None:
            assert prompts.gap_lens is not None
            before = prompts.prefix_lens
            behind = take(prompts.codes, before, lens - before)[..., 0]
            return self.ar_logits(
                prompts.text, prompts.text_lens, tokens[:, : int(before.max())], before, cache,
                behind, lens - before, before + prompts.gap_lens, times=prompts.text_times,
            )[:, -1]  # fmt: skip
        if not self.pattern.plain:
            tokens = self.pattern.inputs(*self.pattern.targets(prompts.codes, lens))
            lens = self.pattern.whole_steps(lens)
            tokens = tokens[:, : int(lens.max())]
        return self.ar_logits(prompts.text, prompts.text_lens, tokens, lens, cache, times=prompts.text_times)[
            :, -1
        ]

    def refine_logits(self, prompts: Prompts, y: Tensor, y_lens: Tensor, quantizer: int) -> Tensor:
        """(B, T, V) of one quantizer of what was generated behind prompts."""
        assert prompts.text is not None and prompts.text_lens is not None
        text, text_lens, times = prompts.text, prompts.text_lens, prompts.text_times
        if prompts.prefix_lens is not None:
            return self.nar_logits(
                text,
                text_lens,
                y,
                y_lens,
                quantizer,
                prompts.codes,
                prompts.lens,
                prompts.prefix_lens,
                times=times,
            )
        if self.prefix_mode == 0:
            # Training has shown the NAR decoder no prompt: it is a beginning whose lower quantizers are known.
            known = prompts.codes[..., : y.shape[2]]
            both = join_codes(known, prompts.lens, y, y_lens)
            logits = self.nar_logits(
                text, text_lens, both, prompts.lens + y_lens, quantizer, times=times, begin=prompts.begin
            )
            frames = prompts.lens[:, None] + torch.arange(y.shape[1], device=y.device)
            frames = frames.clamp(max=logits.shape[1] - 1)
            return logits.gather(1, frames[..., None].expand(-1, -1, logits.shape[-1]))
        if self.prefix_mode in (2, 4) and prompts.prompt_text_lens is not None:
            # The prompt's own text is not read then: in training, there was none.
            own = prompts.prompt_text_lens
            text, short = without_prompt_text(text, text_lens, own, self.text_ends)
            if times is not None:
                times, _ = without_prompt_text(times, text_lens, own, self.text_ends)
            text_lens = short
        return self.nar_logits(
            text,
            text_lens,
            y,
            y_lens,
            quantizer,
            prompts.codes,
            prompts.lens,
            times=times,
            begin=prompts.begin,
        )

    def said_logits(self, prompts: Prompts, y: Tensor, y_lens: Tensor) -> tuple[Tensor, Tensor]:
        """See `CodecLM`."""
        assert prompts.text is not None and prompts.text_lens is not None
        lens = prompts.lens + y_lens
        codes = join_codes(prompts.codes, prompts.lens, y, y_lens)
        codes = codes.masked_fill(~lengths_to_mask(lens, codes.shape[1])[..., None], 0)
        logits = self.ar_logits(
            prompts.text, prompts.text_lens, *self._steps(codes, lens), times=prompts.text_times
        )
        return logits, prompts.lens

    # ---------------------------------------------------------------- training

    def forward(
        self,
        x: Tensor,
        x_lens: Tensor,
        y: Tensor,
        y_lens: Tensor,
        reduction: str = "sum",
        train_stage: int = 0,
        y_prompts_codes: Tensor | None = None,
        y_prompts_lens: Tensor | None = None,
        prefix_lens: Tensor | None = None,
        suffix_lens: Tensor | None = None,
        x_times: Tensor | None = None,
    ) -> LossOutput:
        """Loss of a batch.

        In training, the NAR stage draws a quantizer and a prompt for each row; in evaluation it goes through all
        quantizers and takes prompts of fixed length, so that a validation loss does not depend on a draw.

        Args:
            x: (B, S) text or (B, S, F) notes.
            x_lens: (B,).
            y: (B, T, Q) codes of the utterance, any integer type.
            y_lens: (B,).
            reduction: "sum", "mean" over targets, or "none" for one sum a row, (B,).
            train_stage: 0 both decoders, 1 AR only, 2 NAR only.
            y_prompts_codes: (B, P, Q) of other utterances of the same recordings, for prefix_mode 4.
            y_prompts_lens: (B,) (default: P each).
            prefix_lens: (B,) for in-filling: frames of each utterance before its gap; needed with `suffix_lens`.
            suffix_lens: (B,) frames behind it, 0 for rows without a gap (default: none has one). Of a row with one,
                what is in the gap is learned, and no end, as its length is given.
            x_times: (B, S) the frame at which each symbol begins (default: see `clock`); see `symbol_frames`.

        Raises:
            UserError: codes or text of the wrong shape or range, lengths that do not fit, no prompts in prefix_mode 4,
                in-filling with another pattern.
        """
        check_reduction(reduction)
        x, x_lens = self.check_text(x, x_lens)
        y, y_lens = self.check_codes(y, y_lens, "target y")
        if x_times is None and self.has_clock:
            x_times = self.clock(x)
        spoken_lens, ends = y_lens, torch.ones_like(y_lens)
        firsts = torch.full_like(y_lens, int(not self.first_frame))
        behind: tuple[Tensor, ...] = ()
        if suffix_lens is not None:
            prefix_lens, suffix_lens = self._check_gaps(y_lens, prefix_lens, suffix_lens)
            spoken_lens, ends = y_lens - suffix_lens, (suffix_lens == 0).long()
            firsts = torch.maximum(firsts, prefix_lens)
            behind = (take(y, spoken_lens, suffix_lens)[..., 0], suffix_lens, spoken_lens)
        rows = torch.zeros(x.shape[0], device=x.device)
        predictions: dict[str, Tensor] = {}
        metrics: Metrics = {}
        count = 0
        if train_stage in (0, 1):
            logits, losses, number = self._ar_stage(
                lambda tokens, lens: self.ar_logits(x, x_lens, tokens, lens, None, *behind, times=x_times),
                *(y, spoken_lens, ends, firsts, metrics),
            )
            predictions["ar"], rows, count = logits, rows + losses, count + number
        if train_stage in (0, 2) and self.pattern.has_nar:
            before: Tensor | None = None
            drawn = self._draw_prompts(y, y_lens, y_prompts_codes, y_prompts_lens)
            if prefix_lens is not None and suffix_lens is not None:
                drawn, before = fill_gaps(drawn, y, y_lens, prefix_lens, suffix_lens)
            prompt, prompt_lens, target, target_lens, valid = drawn
            if x_times is not None and prompt_lens is not None and self.prefix_mode in (2, 4):
                # The whole utterance stands behind the prompt, but where there is a gap.
                drawn_lens = prompt_lens if suffix_lens is None else prompt_lens * (suffix_lens == 0)
                x_times = x_times + drawn_lens[:, None]
            for quantizer in self._nar_quantizers(x.shape[0], x.device):
                logits = self.nar_logits(
                    x, x_lens, target, target_lens, quantizer, prompt, prompt_lens, before, times=x_times
                )
                losses, number = self._nar_loss(logits, target, valid, quantizer, metrics)
                predictions["nar"], rows, count = logits, rows + losses, count + number
        return self._output(predictions, rows, count, metrics, reduction, train_stage)

    @property
    def first_frame(self) -> bool:
        """Whether something stands before the first frame that it can be predicted from."""
        return True

    def _draw_prompts(
        self, y: Tensor, y_lens: Tensor, other: Tensor | None, other_lens: Tensor | None
    ) -> NarRows:
        """Prompts and targets of the NAR decoder, as `prefix_mode` says."""
        valid = lengths_to_mask(y_lens, y.shape[1])
        if self.prefix_mode == 0:
            return NarRows(None, None, y, y_lens, valid)
        if self.prefix_mode == 4:
            if other is None:
                raise UserError(
                    "prefix_mode 4 takes a prompt from another utterance: y_prompts_codes is missing"
                )
            if other_lens is None:
                other_lens = torch.full_like(y_lens, other.shape[1])
            prompt, prompt_lens = self.check_codes(other, other_lens, "y_prompts_codes")
            return NarRows(prompt, prompt_lens, y, y_lens, valid)
        draw = (torch.rand(2, len(y_lens)) if self.training else torch.full((2, len(y_lens)), 0.5)).to(
            y.device
        )
        if self.prefix_mode == 1:  # from a quarter to a half of it
            lens = (y_lens * (0.25 + 0.25 * draw[0])).long().clamp(max=self.prefix_frames)
            lens = torch.minimum(lens, y_lens - 1)
            prompt, target = take(y, torch.zeros_like(lens), lens), take(y, lens, y_lens - lens)
            return NarRows(
                prompt, lens, target, y_lens - lens, lengths_to_mask(y_lens - lens, target.shape[1])
            )
        lens = (y_lens // 4).clamp(max=self.prefix_frames)
        starts = ((y_lens - lens + 1) * draw[1]).long()
        columns = torch.arange(y.shape[1], device=y.device)
        inside = (columns >= starts[:, None]) & (columns < (starts + lens)[:, None])
        return NarRows(take(y, starts, lens), lens, y, y_lens, valid & ~inside)

    def _check_gaps(
        self, y_lens: Tensor, prefix_lens: Tensor | None, suffix_lens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Frames before and behind each gap as int64, 0 where there is none; a clear error on what cannot be."""
        self._check_fills()
        if prefix_lens is None or not prefix_lens.shape == suffix_lens.shape == y_lens.shape:
            raise UserError(f"prefix_lens and suffix_lens: expected both, {len(y_lens)} numbers each")
        suffix_lens = suffix_lens.long()
        prefix_lens = prefix_lens.long() * (suffix_lens > 0)
        if int(torch.stack([prefix_lens, suffix_lens, y_lens - prefix_lens - suffix_lens - 1]).min()) < 0:
            raise UserError(
                f"prefix_lens {prefix_lens.tolist()[:8]} and suffix_lens {suffix_lens.tolist()[:8]}: expected 0 or "
                f"more, and together less than the {y_lens.tolist()[:8]} frames of each row"
            )
        return prefix_lens, suffix_lens

    def _check_fills(self) -> None:
        if not self.pattern.plain:
            raise UserError(
                f"a {type(self).__name__} fills gaps with pattern valle and groups of 1 alone, this one has pattern "
                f"{self.pattern.name} and groups of {self.pattern.group_size}"
            )

    def compute_loss(self, batch: dict[str, Any], stage: int) -> StageLoss:
        """For the engine: batch with x, x_lens, y and y_lens; for prefix_mode 4, prompts and prompts_lens; where gaps
        are filled, prefix_lens and suffix_lens.
        """
        _, loss, metrics = self(
            batch["x"], batch["x_lens"], batch["y"], batch["y_lens"], "sum", stage,
            batch.get("prompts"), batch.get("prompts_lens"), batch.get("prefix_lens"), batch.get("suffix_lens"),
            batch.get("x_times"),
        )  # fmt: skip
        count = sum(metrics[name][1] for name in ("ArLoss", "NarLoss") if name in metrics)
        return StageLoss(loss, count, metrics)

    def check_text(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Text as int64 with its padding set to 0; a clear error on what is none."""
        shape = f"(batch, notes, {len(self.text_sizes)} fields)" if self.reads_notes else "(batch, symbols)"
        if x.dim() != 2 + self.reads_notes or (self.reads_notes and x.shape[2] != len(self.text_sizes)):
            raise UserError(f"text x: shape {tuple(x.shape)}, expected {shape}")
        x, x_lens = x.long(), x_lens.long()
        if x_lens.shape != (x.shape[0],) or int(x_lens.min()) < 1 or int(x_lens.max()) > x.shape[1]:
            raise UserError(
                f"text x: lengths {x_lens.tolist()[:8]}, expected {x.shape[0]} numbers from 1 to {x.shape[1]}"
            )
        inside = lengths_to_mask(x_lens, x.shape[1])
        x = x.masked_fill(~(inside[..., None] if self.reads_notes else inside), 0)
        fields = x if self.reads_notes else x[..., None]
        for column, size in enumerate(self.text_sizes):
            low, high = int(fields[..., column].min()), int(fields[..., column].max())
            if low < 0 or high >= size:
                field = f" in field {column}" if self.reads_notes else ""
                raise UserError(f"text x: ids from {low} to {high}{field}, expected 0 to {size - 1}")
        return x, x_lens

    # -------------------------------------------------------------- generation

    @torch.no_grad()
    def inference(
        self,
        x: Tensor,
        x_lens: Tensor,
        y: Tensor,
        enroll_x_lens: Tensor | None = None,
        top_k: int = -100,
        temperature: float = 1.0,
        *,
        max_new_tokens: int | None = None,
        seed: int | None = None,
        dtype: str = "fp32",
    ) -> Tensor:
        """The audio of a text, as one tensor; for rows of different length, `generate`.

        Args:
            x: (1, S) text or (1, S, F) notes: what the prompt says, then what is to be said.
            x_lens: (1,).
            y: (1, P, Q) codes of the prompt.
            enroll_x_lens: (1,) symbols of the prompt's own text, `prompt_text_lens` of `generate`.
            top_k: codes to draw from; 0 or less for all.
            temperature: 0 is greedy.
            max_new_tokens: frames (default: 16 a symbol).
            seed, dtype: see `generate`.

        Returns:
            (1, T, Q) int64: what was generated, without the prompt.
        """
        if x.shape[0] != 1:
            raise UserError(f"{x.shape[0]} texts, expected 1; `generate` takes a batch")
        result = self.generate(
            x, x_lens, y, None, max_new_tokens, temperature, top_k, seed=seed, dtype=dtype,
            prompt_text_lens=enroll_x_lens,
        )  # fmt: skip
        return result.codes[0][None, result.prompt_lens[0] :]

    @torch.no_grad()
    def generate(
        self,
        x: Tensor,
        x_lens: Tensor | None = None,
        prompts: Tensor | None = None,
        prompts_lens: Tensor | None = None,
        max_new_tokens: int | Sequence[int] | None = None,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        seed: int | None = None,
        min_new_tokens: int = 0,
        dtype: str = "fp32",
        *,
        prompt_text_lens: Tensor | None = None,
        sampling: Sampling | None = None,
        num_samples: int = 1,
        chunks: Chunks | None = None,
        on_frame: Callable[[int], object] | None = None,
    ) -> Generation:
        """Say each text, or play each performance; rows do not influence each other.

        Args:
            x: (B, S) text or (B, S, F) notes, those of the prompt first; without B for one.
            x_lens: (B,) (default: S each).
            prompts: (B, P, Q) codes (default: none; the model then chooses a voice itself).
            prompts_lens: (B,) (default: P each).
            max_new_tokens: frames to generate at most, one number or one a row (default: 16 for each symbol of the
                longest text).
            prompt_text_lens: (B,) how much of each text is the prompt's; read with prefix_mode 2 and 4, and where text
                and audio share a clock. Where texts have symbols for begin and end, these two are counted, as if the
                prompt's text stood alone.
            temperature, top_k, top_p, seed, min_new_tokens, dtype, sampling, num_samples, chunks, on_frame: see
                `AudioLM.generate`.

        Raises:
            UserError: text or codes of the wrong shape or range, or settings that cannot be.
        """
        most = max(max_new_tokens) if isinstance(max_new_tokens, Sequence) else max_new_tokens
        rows, texts, limit = self._rows(x, x_lens, prompts, prompts_lens, most)
        limits = list(max_new_tokens) if isinstance(max_new_tokens, Sequence) else [limit] * len(rows)
        if len(limits) != len(rows):
            raise UserError(f"max_new_tokens: {len(limits)} numbers for {len(rows)} texts, expected as many")
        if num_samples < 1:
            raise UserError(f"num_samples is {num_samples}, expected 1 or more")
        streams = make_streams(len(rows), seed, num_samples)
        own = None if prompt_text_lens is None else prompt_text_lens.tolist()

        def repeated(items: Sequence[Any]) -> list[Any]:
            return [item for item in items for _ in range(num_samples)]

        generator = Generator(self, dtype, sampling or Sampling(temperature, top_k, top_p), on_frame=on_frame)
        result = generator.run(
            repeated(rows), streams, repeated(limits), min_new_tokens, chunks=chunks, texts=repeated(texts),
            prompt_text_lens=None if own is None else repeated(own),
        )  # fmt: skip
        return result if num_samples == 1 else result.ranked(num_samples)

    @torch.no_grad()
    def infill(
        self,
        x: Tensor,
        y: Tensor,
        start: int | Sequence[int],
        end: int | Sequence[int],
        x_lens: Tensor | None = None,
        y_lens: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        seed: int | None = None,
        dtype: str = "fp32",
        *,
        sampling: Sampling | None = None,
        num_samples: int = 1,
        new_frames: int | Sequence[int] | None = None,
        on_frame: Callable[[int], object] | None = None,
    ) -> Generation:
        """Say frames start … end - 1 of a recording anew, given what is before and behind them and what all of it says.

        For models trained with --infill-prob.

        Args:
            x: (B, S) text or (B, S, F) notes of the whole result; without B for one.
            y: (B, T, Q) codes of the recordings, or (T, Q); what stands in the gap is not read.
            start, end: the gap, 0 ≤ start < end ≤ T, with something left outside; one number or one a row.
            x_lens: (B,) (default: S each).
            y_lens: (B,) (default: T each).
            new_frames: that take its place, one number or one a row (default: as many).
            temperature, top_k, top_p, seed, dtype, sampling, num_samples, on_frame: see `AudioLM.generate`.

        Returns:
            codes (T - (end - start) + new_frames, Q) each, prompt_lens T - (end - start).

        Raises:
            UserError: a gap that does not lie in the recording, text or codes of the wrong shape or range, or a model
                with another pattern.
        """
        self._check_fills()
        texts = self._texts(x, x_lens)
        if len(texts) != (rows := len(y) if y.dim() == 3 else 1):
            raise UserError(f"{len(texts)} texts and {rows} recordings, expected as many")
        if not self.first_frame and 0 in (start if isinstance(start, Sequence) else [start]):
            raise UserError(
                "this model has no begin symbol and fills no gap at the beginning; leave a frame before it"
            )
        generator = Generator(self, dtype, sampling or Sampling(temperature, top_k, top_p), on_frame=on_frame)
        return generator.infill(y, y_lens, start, end, new_frames, seed, num_samples, texts)

    @torch.no_grad()
    def stream(
        self,
        x: Tensor,
        codec: Codec,
        prompt: Tensor | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        seed: int | None = None,
        min_new_tokens: int = 0,
        dtype: str = "fp32",
        *,
        prompt_text_lens: Tensor | None = None,
        sampling: Sampling | None = None,
        chunks: Chunks | None = None,
        on_frame: Callable[[int], object] | None = None,
    ) -> Stream:
        """Say one text as audio that can be played while it is generated; see `AudioLM.stream`.

        Args:
            x: (S,) or (1, S) text, (S, F) or (1, S, F) notes, those of the prompt first.
            codec: turns codes into audio.
            prompt: (P, Q) or (1, P, Q) codes.
            max_new_tokens, temperature, top_k, top_p, seed, min_new_tokens, dtype, prompt_text_lens, sampling, chunks,
                on_frame: see `generate`.
        """
        if prompt is not None and prompt.dim() == 2:
            prompt = prompt[None]
        rows, texts, limit = self._rows(x, None, prompt, None, max_new_tokens)
        if len(rows) != 1:
            raise UserError(f"{len(rows)} texts, expected 1: a stream is one utterance")
        generator = Generator(self, dtype, sampling or Sampling(temperature, top_k, top_p), on_frame=on_frame)
        own = None if prompt_text_lens is None else prompt_text_lens.tolist()
        return Stream(
            generator, codec, make_prompts(rows, texts, own), make_streams(1, seed)[0], limit, min_new_tokens, None,
            chunks or default_chunks(codec.frame_rate),
        )  # fmt: skip

    def _texts(self, x: Tensor, x_lens: Tensor | None) -> list[Tensor]:
        """Each row's text, checked, on the model's device."""
        if x.dim() == 1 + self.reads_notes:
            x = x[None]
        if x_lens is None:
            x_lens = torch.full((x.shape[0],), x.shape[1] if x.dim() > 1 else 0)
        x, x_lens = self.check_text(x.to(self.device), x_lens.to(self.device))
        return [row[:n] for row, n in zip(x, x_lens.tolist(), strict=True)]

    def _rows(
        self,
        x: Tensor,
        x_lens: Tensor | None,
        prompts: Tensor | None,
        prompts_lens: Tensor | None,
        max_new_tokens: int | None,
    ) -> tuple[list[Tensor], list[Tensor], int]:
        """Codes (P_i, Q) and text of each row on the model's device, and the number of new frames."""
        texts = self._texts(x, x_lens)
        limit = FRAMES_PER_SYMBOL * max(map(len, texts)) if max_new_tokens is None else max_new_tokens
        if prompts is None:
            if not self.first_frame:
                raise UserError(
                    "this model has no begin symbol and predicts nothing without a prompt; give one"
                )
            return [row.new_zeros(0, self.num_quantizers) for row in texts], texts, limit
        if prompts_lens is None:
            prompts_lens = torch.full((prompts.shape[0],), prompts.shape[1] if prompts.dim() == 3 else 0)
        codes, lens = self.check_codes(prompts.to(self.device), prompts_lens.to(self.device), "prompts")
        if len(codes) != len(texts):
            raise UserError(f"{len(texts)} texts and {len(codes)} prompts, expected as many")
        return [row[:n] for row, n in zip(codes, lens.tolist(), strict=True)], texts, limit


class VALLF(VALLE):
    """VALL-E whose decoders read the text by cross-attention instead of having it before the audio.

    Without a begin symbol (`prepend_bos`), nothing stands before the first frame, and it is not predicted.
    """

    reads = "memory"

    def _prefix(self, text: Part) -> Part:
        none = torch.zeros_like(text.lens)
        return Part(text.x[:, :0], none, text.positions[:, :0])

    def _memory(self, text: Part) -> Part | None:
        return text

    @property
    def first_frame(self) -> bool:
        return self.prepend_bos


class TextPrenet(nn.Module):
    """Three convolutions over a text, and a projection, (B, S, D) -> (B, S, D): the open VALL-Es' text prenet."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv1d(dim, dim, 5, padding=2) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm1d(dim) for _ in range(3))
        self.dropout = nn.Dropout(0.5)
        self.projection = nn.Linear(dim, dim)

    def forward(self, x: Tensor, lens: Tensor) -> Tensor:
        """Symbols from `lens` (B,) on are padding; the others are as if there were none."""
        inside = lengths_to_mask(lens, x.shape[1])[:, None]  # (B, 1, S)
        x = x.transpose(1, 2)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = self.dropout(F.relu(norm(convolution(x * inside))))
        return self.projection(x.transpose(1, 2))


def _text_embedding(sizes: int | Sequence[int], dim: int, field_dims: Sequence[int] | None) -> nn.Module:
    return new_embedding(sizes, dim) if isinstance(sizes, int) else FieldEmbedding(sizes, dim, field_dims)
