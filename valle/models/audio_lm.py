"""AudioLM: audio continued by audio, on neural-codec tokens alone.

    prompt (B, S, Q) ──► AR decoder: quantizer 0 of the target, frame by frame; full attention inside the prompt,
                         causal in the target, the first target frame predicted from the prompt
                     ──► NAR decoder: quantizer q = 1 … Q-1 of all target frames at once, from the prompt and the
                         sum of the target's quantizers below q; attention both ways

Source: VALL-E (arXiv 2301.02111, sections 4.2.1 and 4.2.2), with audio in the place of text.

Shapes: B batch, S prompt frames, T target frames, Q quantizers, V codebook size, D width.
"""

from collections.abc import Callable, Sequence
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
    new_prenet,
)
from valle.models.generating import Generation, Generator, Stream
from valle.models.prompts import Prompts
from valle.modules.cache import Cache
from valle.modules.embeddings import sum_embeddings
from valle.modules.masks import lengths_to_mask
from valle.utils.errors import UserError


class AudioLM(CodecLM):
    """Audio language model with an autoregressive and a non-autoregressive decoder.

    Args:
        d_model: width D of the AR decoder.
        nhead: attention heads.
        num_layers: layers of each decoder.
        norm_first: normalize before each block.
        add_prenet: pass embeddings through a small network first.
        num_quantizers: Q.
        nar_scale_factor: width of the NAR decoder relative to D.
        prepend_bos: put a begin symbol between prompt and target.
        codebook_size: V.
        share_embedding: tie each output layer to the table of the codes it predicts.
        dropout: in both decoders.
        qk_norm: normalize queries and keys in attention, which keeps long trainings in bfloat16 stable.
        position: "rope" or "sine".
        activation: "gelu" or "relu".
        attention_dropout: of attention's weights.
        audio_from_zero: positions of the target begin at 0, as the prompt's do, instead of going on from them.
        nar_num_layers: of the NAR decoder (default: num_layers).
        separate_prompts: a prompt's codes have tables, and a prenet, of their own.
        pattern: order in which the AR decoder says codes: "valle" quantizer 0 alone, "delay" or "flatten" all of them,
            without a NAR decoder; see `valle.modules.patterns`.
        group_size: frames of a step, with "valle".
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        num_layers: int,
        norm_first: bool = True,
        add_prenet: bool = False,
        num_quantizers: int = 4,
        nar_scale_factor: float = 1.0,
        prepend_bos: bool = False,
        codebook_size: int = 2048,
        share_embedding: bool = False,
        dropout: float = 0.1,
        position: str = "rope",
        activation: str = "gelu",
        qk_norm: bool = False,
        attention_dropout: float = 0.0,
        audio_from_zero: bool = False,
        nar_num_layers: int | None = None,
        separate_prompts: bool = False,
        pattern: str = "valle",
        group_size: int = 1,
    ) -> None:
        super().__init__(
            d_model, nhead, num_layers, norm_first, add_prenet, num_quantizers, nar_scale_factor, prepend_bos,
            codebook_size, share_embedding, dropout, position, activation, qk_norm, attention_dropout,
            audio_from_zero, nar_num_layers, pattern=pattern, group_size=group_size,
        )  # fmt: skip
        # Codes of quantizer 0 have one table wherever they stand, unless prompts have their own.
        self.separate_prompts = separate_prompts
        self.ar_prompt_embeddings = nn.ModuleList(
            new_embedding(codebook_size, d_model) for _ in range(num_quantizers - (not separate_prompts))
        )
        if separate_prompts:
            self.ar_prompt_prenet = new_prenet(d_model) if add_prenet else nn.Identity()
            if self.pattern.has_nar:
                self.nar_prompt_embeddings = nn.ModuleList(
                    new_embedding(codebook_size, self.nar_dim) for _ in range(num_quantizers)
                )
                self.nar_prompt_prenet = new_prenet(self.nar_dim) if add_prenet else nn.Identity()

    def code_tables(self) -> list[list[nn.Embedding]]:
        (first, *_), *nar = super().code_tables()
        prompts: list[Any] = [*self.ar_prompt_embeddings]
        if not self.separate_prompts:
            return [[first, *prompts], *nar]
        more: list[Any] = [*self.nar_prompt_embeddings] if self.pattern.has_nar else []
        return [[first], prompts, *nar, *([more] if more else [])]

    # ------------------------------------------------------------------ logits

    def ar_logits(
        self,
        x: Tensor,
        x_lens: Tensor,
        y: Tensor,
        y_lens: Tensor | None = None,
        cache: Cache | None = None,
        prefix_lens: Tensor | None = None,
        gap_lens: Tensor | None = None,
    ) -> Tensor:
        """Logits of quantizer 0 for each target frame, given the prompt and the frames before it.

        In-filling (order prefix, suffix, middle of arXiv 2207.14255, section 3): the first `prefix_lens` frames of a
        row's prompt stand before its target, the others behind it. All frames keep their place in time.

        Args:
            x: (B, S, Q) prompt codes. With a cache that already holds the prompt, ignored.
            x_lens: (B,) prompt frames, at least 1.
            y: (B, T) target codes of quantizer 0, or (B, T, K) ids of the pattern's steps; T may be 0. With a filled
                cache, the new frames only.
            y_lens: (B,) target frames, only needed where the padding of `y` is not a code.
            cache: where keys and values are kept, from `new_cache`; rows are then right-aligned.
            prefix_lens: (B,) prompt frames before the target, 0 … x_lens (default: all). Not read with a filled cache.
            gap_lens: (B,) frames that the whole target will have; needed with `prefix_lens`.

        Returns:
            (B, T + 1, V + 1): for target frame 0 … T, the last one what follows y; index V is the end. With an empty
            cache the last of these only, with a filled one (B, T, V + 1): what follows each new frame.

        Raises:
            ValueError: `prefix_lens` without `gap_lens`.
        """
        if cache is not None and cache.length > 0:
            return self.next_logits(y, cache)
        positions, first, first_from = torch.arange(x.shape[1], device=x.device), None, None
        if prefix_lens is not None:
            if gap_lens is None:
                raise ValueError("prefix_lens needs gap_lens: the frames between prefix and suffix")
            positions = around(positions, prefix_lens, gap_lens + int(self.prepend_bos))
            first = torch.zeros_like(prefix_lens) if self.audio_from_zero else prefix_lens
            # The frame before the gap, if there is one, is the prefix's last.
            first_from = torch.where(prefix_lens > 0, prefix_lens - 1, x_lens - 1)
        if self.separate_prompts:
            prompt = self.ar_prompt_prenet(sum_embeddings(list(self.ar_prompt_embeddings), x))
        else:
            tables = [self.ar_audio_embedding, *self.ar_prompt_embeddings]
            prompt = self.ar_audio_prenet(sum_embeddings(tables, x))
        if self.ar_prefix_position is not None:
            prompt = self.ar_prefix_position(prompt, positions)
        return self._run_ar([Part(prompt, x_lens, positions)], y, y_lens, cache, first, first_from)

    def nar_logits(
        self,
        x: Tensor,
        x_lens: Tensor,
        y: Tensor,
        y_lens: Tensor,
        quantizer: int | Tensor,
        prefix_lens: Tensor | None = None,
    ) -> Tensor:
        """Logits of one quantizer for all target frames, given the prompt and the target's lower quantizers.

        Args:
            x: (B, S, Q) prompt codes.
            x_lens: (B,).
            y: (B, T, Q' ≤ Q) target codes; only quantizers below `quantizer` are read.
            y_lens: (B,).
            quantizer: 1 … Q-1, or one a row, (B,).
            prefix_lens: (B,) prompt frames before the target; the others stand behind it (default: all before).

        Returns:
            (B, T, V).
        """
        positions, first = torch.arange(x.shape[1], device=x.device), x_lens
        if prefix_lens is not None:
            positions, first = around(positions, prefix_lens, y_lens), prefix_lens
        if self.audio_from_zero:
            first = torch.zeros_like(first)
        if self.separate_prompts:
            prompt = self.nar_prompt_prenet(sum_embeddings(list(self.nar_prompt_embeddings), x))
        else:
            prompt = sum_embeddings(list(self.nar_audio_embeddings), x)
            prompt = self.nar_audio_prenet(prompt + self.nar_segment_embedding.weight[0])
        if self.nar_prefix_position is not None:
            prompt = self.nar_prefix_position(prompt, positions)
        behind = first[:, None] + torch.arange(y.shape[1], device=x.device)
        return self._run_nar([Part(prompt, x_lens, positions)], y, y_lens, behind, quantizer)

    def prefill(self, prompts: Prompts, cache: Cache) -> Tensor:
        """Fill a cache with prompts -> (B, V + 1) of the first new frame."""
        y = prompts.codes.new_zeros(prompts.codes.shape[0], 0)
        if not self.pattern.plain:
            y = y[..., None].expand(-1, -1, self.pattern.slots)
        return self.ar_logits(
            prompts.codes, prompts.lens, y, None, cache, prompts.prefix_lens, prompts.gap_lens
        )[:, -1]

    def refine_logits(self, prompts: Prompts, y: Tensor, y_lens: Tensor, quantizer: int) -> Tensor:
        """(B, T, V) of one quantizer of what was generated behind prompts."""
        return self.nar_logits(prompts.codes, prompts.lens, y, y_lens, quantizer, prompts.prefix_lens)

    def said_logits(self, prompts: Prompts, y: Tensor, y_lens: Tensor) -> tuple[Tensor, Tensor]:
        """See `CodecLM`."""
        logits = self.ar_logits(prompts.codes, prompts.lens, *self._steps(y, y_lens))
        return logits, torch.zeros_like(y_lens)

    # ---------------------------------------------------------------- training

    def forward(
        self,
        x: Tensor,
        x_lens: Tensor,
        y: Tensor,
        y_lens: Tensor,
        reduction: str = "sum",
        train_stage: int = 0,
        prefix_lens: Tensor | None = None,
    ) -> LossOutput:
        """Loss of a batch.

        In training, the NAR stage draws one quantizer a row; in evaluation it goes through all of them, so that a
        validation loss does not depend on a draw.

        Args:
            x: (B, S, Q) prompt, any integer type.
            x_lens: (B,).
            y: (B, T, Q) target.
            y_lens: (B,).
            reduction: "sum", "mean" over targets, or "none" for one sum a row, (B,).
            train_stage: 0 both decoders, 1 AR only, 2 NAR only.
            prefix_lens: (B,) frames of each prompt that stand before its target; the others stand behind it, and the
                row has no end to learn, as its length is given (default: all before).

        Raises:
            UserError: codes of the wrong shape or range, lengths that do not fit.
        """
        check_reduction(reduction)
        x, x_lens = self.check_codes(x, x_lens, "prompt x")
        y, y_lens = self.check_codes(y, y_lens, "target y")
        ends = torch.ones_like(y_lens)  # whether a row ends by itself
        if prefix_lens is not None:
            prefix_lens = _check_prefix_lens(prefix_lens, x_lens)
            ends = (prefix_lens == x_lens).long()
        rows = torch.zeros(x.shape[0], device=x.device)
        predictions: dict[str, Tensor] = {}
        metrics: Metrics = {}
        count = 0
        if train_stage in (0, 1):

            def logits_of(tokens: Tensor, lens: Tensor) -> Tensor:
                return self.ar_logits(x, x_lens, tokens, lens, prefix_lens=prefix_lens, gap_lens=y_lens)

            logits, losses, number = self._ar_stage(
                logits_of, y, y_lens, ends, torch.zeros_like(ends), metrics
            )
            predictions["ar"], rows, count = logits, rows + losses, count + number
        if train_stage in (0, 2) and self.pattern.has_nar:
            valid = lengths_to_mask(y_lens, y.shape[1])
            for quantizer in self._nar_quantizers(x.shape[0], x.device):
                logits = self.nar_logits(x, x_lens, y, y_lens, quantizer, prefix_lens)
                losses, number = self._nar_loss(logits, y, valid, quantizer, metrics)
                predictions["nar"], rows, count = logits, rows + losses, count + number
        return self._output(predictions, rows, count, metrics, reduction, train_stage)

    def compute_loss(self, batch: dict[str, Any], stage: int) -> StageLoss:
        """For the engine: batch with x, x_lens, y, y_lens and, where gaps are filled, prefix_lens."""
        _, loss, metrics = self(
            batch["x"], batch["x_lens"], batch["y"], batch["y_lens"], "sum", stage, batch.get("prefix_lens")
        )
        count = sum(metrics[name][1] for name in ("ArLoss", "NarLoss") if name in metrics)
        return StageLoss(loss, count, metrics)

    # -------------------------------------------------------------- generation

    @torch.no_grad()
    def inference(
        self,
        x: Tensor,
        x_lens: Tensor | None = None,
        max_new_tokens: int = 500,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_at_eos: bool = False,
        dtype: str = "fp32",
    ) -> Tensor:
        """Prompt and continuation as one tensor.

        Args:
            x: (B, S, Q) prompt codes; (S, Q) is taken as one row.
            x_lens: (B,) frames of each prompt (default: S each).
            max_new_tokens: frames to add, exactly so many unless `stop_at_eos`.
            temperature, top_k, top_p, seed, dtype: see `generate`.
            stop_at_eos: let rows end where the model draws the end.

        Returns:
            (B, S + new, Q) int64. Row i is its x_lens[i] prompt frames, directly its continuation, then zeros.
        """
        result = self.generate(
            x,
            x_lens,
            max_new_tokens,
            temperature,
            top_k,
            top_p,
            seed,
            0 if stop_at_eos else max_new_tokens,
            dtype,
        )
        longest = max(len(codes) for codes in result.codes)
        if not stop_at_eos:
            longest = (x.shape[0] if x.dim() == 2 else x.shape[1]) + max_new_tokens
        return torch.stack([F.pad(codes, (0, 0, 0, longest - len(codes))) for codes in result.codes])

    @torch.no_grad()
    def generate(
        self,
        x: Tensor,
        x_lens: Tensor | None = None,
        max_new_tokens: int = 500,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        seed: int | None = None,
        min_new_tokens: int = 0,
        dtype: str = "fp32",
        *,
        sampling: Sampling | None = None,
        guidance_scale: float = 1.0,
        num_samples: int = 1,
        window: int | None = None,
        chunks: Chunks | None = None,
        on_frame: Callable[[int], object] | None = None,
    ) -> Generation:
        """Continue each prompt; rows do not influence each other.

        Args:
            x: (B, S, Q) prompt codes of any integer type; (S, Q) is taken as one row.
            x_lens: (B,) frames of each prompt (default: S each).
            max_new_tokens: frames to add at most.
            temperature: 0 is greedy.
            top_k: codes to draw from; 0 or less for all.
            top_p: probability mass to draw from.
            seed: of each row's own draw; the same seed gives the same result in any batch.
            min_new_tokens: frames before which no row ends.
            dtype: number format of the weights: "fp32", "bf16" or "int8" (docs/generation.md has speed and quality).
            sampling: all settings of the draw, in the place of temperature, top_k and top_p.
            guidance_scale: classifier-free guidance, for models trained with --drop-prompt-prob; 1 for none.
            num_samples: continuations of each prompt, ranked by their mean log-probability.
            window: frames that the model sees and adds at most at once; what is longer goes on from its own last part
                (penalties for repetition look back to the beginning of that).
            chunks: refine piece by piece, as `stream` does (default: the whole at once, which sees what follows).
            on_frame: called with the number of frames done.

        Raises:
            UserError: codes of the wrong shape or range, or settings that cannot be.
        """
        x, x_lens = self._prompts(x, x_lens)
        if num_samples < 1:
            raise UserError(f"num_samples is {num_samples}, expected 1 or more")
        streams = make_streams(x.shape[0], seed, num_samples)
        prompts = [x[i, :n] for i, n in enumerate(x_lens.tolist()) for _ in range(num_samples)]
        generator = Generator(
            self, dtype, sampling or Sampling(temperature, top_k, top_p), guidance_scale, on_frame
        )
        result = generator.run(prompts, streams, max_new_tokens, min_new_tokens, window, chunks)
        return result if num_samples == 1 else result.ranked(num_samples)

    @torch.no_grad()
    def infill(
        self,
        x: Tensor,
        start: int | Sequence[int],
        end: int | Sequence[int],
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
        """Generate frames start … end - 1 of a recording anew, given what is before and behind them.

        For models trained with --infill-prob.

        Args:
            x: (T, Q) codes of the recording, or (B, T, Q) of several; what stands in the gap is not read.
            start, end: the gap, 0 ≤ start < end ≤ T, with something left outside; one number or one a row.
            new_frames: that take its place, one number or one a row (default: as many).
            temperature, top_k, top_p, seed, dtype, sampling, num_samples, on_frame: see `generate`.

        Returns:
            codes (T - (end - start) + new_frames, Q) each, prompt_lens T - (end - start).

        Raises:
            UserError: a gap that does not lie in the recording, or codes of the wrong shape or range.
        """
        generator = Generator(self, dtype, sampling or Sampling(temperature, top_k, top_p), on_frame=on_frame)
        return generator.infill(x, None, start, end, new_frames, seed, num_samples)

    @torch.no_grad()
    def stream(
        self,
        x: Tensor,
        codec: Codec,
        max_new_tokens: int = 500,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        seed: int | None = None,
        min_new_tokens: int = 0,
        dtype: str = "fp32",
        *,
        sampling: Sampling | None = None,
        guidance_scale: float = 1.0,
        window: int | None = None,
        chunks: Chunks | None = None,
        on_frame: Callable[[int], object] | None = None,
    ) -> Stream:
        """Continue one prompt as audio that can be played while it is generated.

            for wav in model.stream(codes, codec):  # (C, n) at codec.sample_rate
                play(wav)

        Args:
            x: (S, Q) or (1, S, Q) prompt codes.
            codec: turns codes into audio.
            chunks: how often audio comes, and what the NAR decoder sees (default: every half second).
            max_new_tokens, temperature, top_k, top_p, seed, min_new_tokens, dtype, sampling, guidance_scale, window,
                on_frame: see `generate`, which gives the same codes with the same `chunks`.

        Returns:
            to be iterated over once; `generation` holds the result afterwards.

        Raises:
            UserError: more than one prompt, codes of the wrong shape or range, or settings that cannot be.
        """
        x, x_lens = self._prompts(x, None)
        if x.shape[0] != 1:
            raise UserError(f"{x.shape[0]} prompts, expected 1: a stream is one continuation")
        generator = Generator(
            self, dtype, sampling or Sampling(temperature, top_k, top_p), guidance_scale, on_frame
        )
        return Stream(
            generator, codec, Prompts(x, x_lens), make_streams(1, seed)[0], max_new_tokens, min_new_tokens, window,
            chunks or default_chunks(codec.frame_rate),
        )  # fmt: skip

    def _prompts(self, x: Tensor, x_lens: Tensor | None) -> tuple[Tensor, Tensor]:
        """Checked prompts (B, S, Q) and (B,) on the model's device; (S, Q) is taken as one row."""
        if x.dim() == 2:
            x = x[None]
        if x_lens is None:
            x_lens = torch.full((x.shape[0],), x.shape[1] if x.dim() == 3 else 0)
        return self.check_codes(x.to(self.device), x_lens.to(self.device), "prompt x")


def _check_prefix_lens(prefix_lens: Tensor, x_lens: Tensor) -> Tensor:
    """As int64; a clear error where a prefix is longer than its prompt."""
    prefix_lens = prefix_lens.long()
    fits = prefix_lens.shape == x_lens.shape and bool(((prefix_lens >= 0) & (prefix_lens <= x_lens)).all())
    if not fits:
        raise UserError(
            f"prefix_lens: {prefix_lens.tolist()[:8]}, expected {len(x_lens)} numbers, each from 0 to its prompt's "
            f"{x_lens.tolist()[:8]} frames"
        )
    return prefix_lens
