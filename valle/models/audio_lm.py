"""AudioLM: audio continued by audio, on neural-codec tokens alone.

    prompt (B, S, Q) ──► AR decoder: quantizer 0 of the target, frame by frame; full attention inside the prompt,
                         causal in the target, the first target frame predicted from the prompt
                     ──► NAR decoder: quantizer q = 1 … Q-1 of all target frames at once, from the prompt and the
                         sum of the target's quantizers below q; attention both ways

`ar_logits` and `nar_logits` are the only places that compute logits; training and generation both call them.
Source: VALL-E (arXiv 2301.02111, sections 4.2.1 and 4.2.2), with audio in the place of text.

Shapes: B batch, S prompt frames, T target frames, Q quantizers, V codebook size, D width.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from valle.codecs import Codec
from valle.generation.chunks import Chunks, default_chunks
from valle.generation.sampling import Sampling, make_streams
from valle.models.generating import Generation, Generator, Stream
from valle.models.watched import code_metrics
from valle.modules.cache import Cache
from valle.modules.embeddings import sum_embeddings
from valle.modules.masks import lengths_to_mask, prefix_causal_mask
from valle.modules.transformer import Linear, Transformer
from valle.utils.errors import UserError

CODEBOOK_RMS = 0.05  # size of quantizer 0's embeddings when they start from the codec's vectors
Metrics = dict[str, tuple[Any, Any]]


class AudioLMOutput(NamedTuple):
    """What `forward` returns.

    Attributes:
        predictions: logits by name: "ar" (B, T + 1, V + 1), "nar" (B, T, V) of the last quantizer computed.
        loss: summed (or averaged, or per row) cross-entropy in nats.
        metrics: name -> (sum, count).
    """

    predictions: dict[str, Tensor]
    loss: Tensor
    metrics: Metrics


class StageLoss(NamedTuple):
    """What the training engine takes: loss sum in nats, number of targets, metrics."""

    loss: Tensor
    num_targets: int
    metrics: Metrics


class AudioLM(nn.Module):
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
    """

    loss_unit = "nats/token"
    # Which part takes which number format in a packed copy; the others stay in fp32. The AR decoder is bound by reading
    # its weights, the NAR decoder by multiplying, where 8 bits gain nothing. Logits in bfloat16 would tie.
    PACKING = {
        "fp32": {},
        "bf16": {"ar_decoder": "bf16", "nar_decoder": "bf16"},
        "int8": {"ar_decoder": "int8", "ar_predict_layer": "int8", "nar_decoder": "bf16"},
    }

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
    ) -> None:
        super().__init__()
        if num_quantizers < 1:
            raise ValueError(f"num_quantizers is {num_quantizers}, expected 1 or more")
        nar_dim, nar_heads = int(d_model * nar_scale_factor), max(1, int(nhead * nar_scale_factor))
        self.num_quantizers, self.codebook_size, self.prepend_bos = num_quantizers, codebook_size, prepend_bos
        self.eos, self.bos = codebook_size, codebook_size + 1

        # Table 0 holds the codes of quantizer 0, wherever they stand, then EOS and, if used, BOS.
        self.ar_audio_embedding = _embedding(codebook_size + 1 + int(prepend_bos), d_model)
        self.ar_prompt_embeddings = nn.ModuleList(
            _embedding(codebook_size, d_model) for _ in range(num_quantizers - 1)
        )
        self.ar_audio_prenet = _prenet(d_model) if add_prenet else nn.Identity()
        self.ar_decoder = Transformer(
            d_model,
            nhead,
            num_layers,
            dropout,
            norm_first,
            position=position,
            activation=activation,
            qk_norm=qk_norm,
            attention_dropout=attention_dropout,
        )
        self.ar_predict_layer = Linear(d_model, codebook_size + 1, bias=False)
        if share_embedding:
            if prepend_bos:
                raise ValueError(
                    "share_embedding cannot be combined with prepend_bos: the AR tables differ in size"
                )
            self.ar_predict_layer.weight = self.ar_audio_embedding.weight

        if num_quantizers > 1:
            self.nar_audio_embeddings = nn.ModuleList(
                _embedding(codebook_size, nar_dim) for _ in range(num_quantizers)
            )
            self.nar_segment_embedding = _embedding(2, nar_dim)  # prompt, target
            self.nar_stage_embeddings = nn.ModuleList(
                _embedding(1, nar_dim) for _ in range(num_quantizers - 1)
            )
            self.nar_audio_prenet = _prenet(nar_dim) if add_prenet else nn.Identity()
            self.nar_decoder = Transformer(
                nar_dim, nar_heads, num_layers, dropout, norm_first,
                adaptive=True, position=position, activation=activation, qk_norm=qk_norm,
                attention_dropout=attention_dropout,
            )  # fmt: skip
            self.nar_predict_layers = nn.ModuleList(
                Linear(nar_dim, codebook_size, bias=False) for _ in range(num_quantizers - 1)
            )
            if share_embedding:
                for index, layer in enumerate(self.nar_predict_layers):
                    layer.weight = self.nar_audio_embeddings[index + 1].weight

    @torch.no_grad()
    def start_from_codebooks(self, codebooks: Tensor) -> None:
        """Start the tables of codes from the codec's own vectors, so that codes which sound alike start alike.

        All quantizers go through one random projection with orthonormal rows: the sum of a frame's embeddings is
        then its quantized latent, as the codec adds it up, and a tied output layer measures the distance to each
        code. On little data this saves most of what random tables would have to learn first.

        Args:
            codebooks: (Q, V, C) from `Codec.codebooks`.
        """
        codebooks = codebooks[: self.num_quantizers].to(self.device)
        scaled = codebooks * (CODEBOOK_RMS / (codebooks[0] - codebooks[0].mean(0)).square().mean().sqrt())
        size = self.codebook_size
        decoders = [[self.ar_audio_embedding, *self.ar_prompt_embeddings]]
        if self.num_quantizers > 1:
            decoders.append([*self.nar_audio_embeddings])
        for tables in decoders:
            dim = tables[0].weight.shape[1]
            projection = torch.empty(dim, codebooks.shape[2], device=self.device)
            nn.init.orthogonal_(projection)
            for table, vectors in zip(tables, scaled, strict=True):
                table.weight[:size] = vectors @ projection.T * (dim / codebooks.shape[2]) ** 0.5

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
            y: (B, T) target codes of quantizer 0; T may be 0. With a filled cache, the new frames only.
            y_lens: (B,) target frames, only needed where the padding of `y` is not a code.
            cache: where keys and values are kept, from `new_cache`; rows are then right-aligned.
            prefix_lens: (B,) prompt frames before the target, 0 … x_lens (default: all). Not read with a filled cache.
            gap_lens: (B,) frames that the whole target will have; needed with `prefix_lens`.

        Returns:
            (B, T + 1, V + 1): for target frame 0 … T, the last one what follows y; index V is the end. With a
            filled cache (B, T, V + 1): what follows each new frame.

        Raises:
            ValueError: `prefix_lens` without `gap_lens`.
        """
        if y_lens is not None:
            y = y.masked_fill(~lengths_to_mask(y_lens, y.shape[1]), 0)
        if cache is not None and cache.length > 0:
            frames = y.shape[1]
            hidden = self.ar_decoder(self._ar_embed(y), cache.positions(frames), cache.mask(frames), cache)
            return self.ar_predict_layer(hidden)

        prompt = self.ar_audio_prenet(
            sum_embeddings([self.ar_audio_embedding, *self.ar_prompt_embeddings], x)
        )
        prompt_lens = x_lens
        if self.prepend_bos:
            prompt, prompt_lens = _append(
                prompt, x_lens, self._ar_embed(torch.full_like(x[:, 0, 0], self.bos))
            )
        longest = prompt.shape[1]
        starts = torch.zeros_like(prompt_lens) if cache is None else longest - prompt_lens
        sequence = _join(prompt, prompt_lens, self._ar_embed(y), starts)
        columns = torch.arange(sequence.shape[1], device=x.device)
        rows = (prompt_lens + (y.shape[1] if y_lens is None else y_lens), prompt_lens)
        if cache is None:  # prompts and targets of different rows are long: together they are not as long
            columns = columns[: int(rows[0].max())]
            sequence = sequence[:, : len(columns)]
        if cache is not None:
            cache.place(starts, prompt_lens)
        positions = (columns - starts[:, None]).clamp(min=0)
        # The frame behind the prompt is predicted at the prompt's last position.
        last = (starts + prompt_lens - 1)[:, None] + torch.arange(y.shape[1] + 1, device=x.device)
        if prefix_lens is not None:
            if gap_lens is None:
                raise ValueError("prefix_lens needs gap_lens: the frames between prefix and suffix")
            positions = _infill_positions(positions, x_lens, prefix_lens, gap_lens + int(self.prepend_bos))
            if cache is not None:
                cache.position_shift = x_lens - prefix_lens
            if not self.prepend_bos:  # the frame before the gap, if there is one, is the prefix's last
                last[:, 0] = torch.where(prefix_lens > 0, starts + prefix_lens - 1, last[:, 0])
        hidden = self.ar_decoder(
            sequence,
            positions,
            lambda: prefix_causal_mask(starts, prompt_lens, columns, columns),
            cache,
            rows=rows,
        )
        last = last.clamp(max=hidden.shape[1] - 1)
        hidden = hidden.gather(1, last[..., None].expand(-1, -1, hidden.shape[-1]))
        return self.ar_predict_layer(hidden)

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
        if isinstance(quantizer, int):
            quantizer = torch.full((x.shape[0],), quantizer, device=x.device)
        segments = self.nar_segment_embedding.weight
        prompt = sum_embeddings(list(self.nar_audio_embeddings), x) + segments[0]
        target = segments[1].expand(y.shape[0], y.shape[1], -1)
        for level in range(int(quantizer.max())):
            read = (quantizer > level).view(-1, 1, 1)
            target = target + self.nar_audio_embeddings[level](y[..., level]) * read
        prompt, target = self.nar_audio_prenet(prompt), self.nar_audio_prenet(target)
        starts = torch.zeros_like(x_lens)
        sequence = _join(prompt, x_lens, target, starts)
        total = x_lens + y_lens
        sequence = sequence[:, : int(total.max())]

        def mask() -> Tensor | None:
            if bool((total == sequence.shape[1]).all()):
                return None
            return lengths_to_mask(total, sequence.shape[1])[:, None, None]

        stages = torch.cat(list(self.nar_stage_embeddings.parameters()))
        condition = stages[quantizer - 1][:, None]  # (B, 1, D)
        positions = torch.arange(sequence.shape[1], device=x.device)
        if prefix_lens is not None:
            positions = _infill_positions(positions, x_lens, prefix_lens, y_lens)
        hidden = self.nar_decoder(sequence, positions, mask, condition=condition, rows=(total, total))
        columns = x_lens[:, None] + torch.arange(y.shape[1], device=x.device)
        columns = columns.clamp(max=hidden.shape[1] - 1)
        hidden = hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[-1]))
        first = int(quantizer[0])
        if bool((quantizer == first).all()):
            return self.nar_predict_layers[first - 1](hidden)
        heads = torch.stack(list(self.nar_predict_layers.parameters()))  # (Q-1, V, D)
        return torch.einsum("btd,bvd->btv", hidden, heads[quantizer - 1])

    def _ar_embed(self, y: Tensor) -> Tensor:
        """(B, T) or (B,) codes of quantizer 0 -> (B, T or 1, D)."""
        if y.dim() == 1:
            y = y[:, None]
        return self.ar_audio_prenet(self.ar_audio_embedding(y))

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
    ) -> AudioLMOutput:
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
        if reduction not in ("sum", "mean", "none"):
            raise ValueError(f"reduction is {reduction!r}, expected 'sum', 'mean' or 'none'")
        x, x_lens = self._check_codes(x, x_lens, "prompt x")
        y, y_lens = self._check_codes(y, y_lens, "target y")
        ends = torch.ones_like(y_lens)  # whether a row ends by itself
        if prefix_lens is not None:
            prefix_lens = _check_prefix_lens(prefix_lens, x_lens)
            ends = (prefix_lens == x_lens).long()
        valid = lengths_to_mask(y_lens, y.shape[1])
        rows = torch.zeros(x.shape[0], device=x.device)
        predictions: dict[str, Tensor] = {}
        metrics: Metrics = {}
        count, shape = 0, (self.num_quantizers, self.codebook_size)
        if train_stage in (0, 1):
            logits = self.ar_logits(x, x_lens, y[..., 0], y_lens, prefix_lens=prefix_lens, gap_lens=y_lens)
            # The end follows the last frame; what is behind it is no target.
            targets = F.pad(y[..., 0].masked_fill(~valid, 0), (0, 1))
            targets.scatter_(1, y_lens[:, None], self.eos)
            trained = lengths_to_mask(y_lens + ends, y.shape[1] + 1)
            row_losses, number = _cross_entropy(logits, targets, trained)
            metrics["ArLoss"] = (float(row_losses.detach().sum()), number)
            first = torch.zeros_like(y_lens)  # quantizer 0
            metrics |= code_metrics("Ar", logits[:, :-1], y[..., 0], valid, first, shape)
            predictions["ar"], rows, count = logits, rows + row_losses, count + number
        if train_stage in (0, 2) and self.num_quantizers > 1:
            for quantizer in self._nar_quantizers(x.shape[0], x.device):
                logits = self.nar_logits(x, x_lens, y, y_lens, quantizer, prefix_lens)
                index = quantizer.view(-1, 1, 1).expand(-1, y.shape[1], 1)
                targets = y.gather(2, index)[..., 0]
                row_losses, number = _cross_entropy(logits, targets, valid)
                named: Metrics = {"NarLoss": (float(row_losses.detach().sum()), number)}
                named |= code_metrics("Nar", logits, targets, valid, quantizer, shape)
                for name, (total, size) in named.items():
                    before = metrics.get(name, (0.0, 0))
                    metrics[name] = (before[0] + total, before[1] + size)
                predictions["nar"], rows, count = logits, rows + row_losses, count + number
        if not predictions:
            raise ValueError(
                f"nothing to train in train_stage {train_stage} with {self.num_quantizers} quantizer(s)"
            )
        loss = rows if reduction == "none" else rows.sum() / (count if reduction == "mean" else 1)
        return AudioLMOutput(predictions, loss, metrics)

    def _nar_quantizers(self, batch: int, device: torch.device) -> Iterator[Tensor]:
        if self.training:
            yield torch.randint(1, self.num_quantizers, (batch,)).to(device)
            return
        for quantizer in range(1, self.num_quantizers):
            yield torch.full((batch,), quantizer, device=device)

    def compute_loss(self, batch: dict[str, Any], stage: int) -> StageLoss:
        """For the engine: batch with x, x_lens, y, y_lens and, where gaps are filled, prefix_lens."""
        _, loss, metrics = self(
            batch["x"], batch["x_lens"], batch["y"], batch["y_lens"], "sum", stage, batch.get("prefix_lens")
        )
        count = sum(metrics[name][1] for name in ("ArLoss", "NarLoss") if name in metrics)
        return StageLoss(loss, count, metrics)

    def stage_parameters(self, stage: int) -> Iterator[tuple[str, nn.Parameter]]:
        """What a stage trains: 0 all, 1 `ar_*`, 2 `nar_*`."""
        prefix = {0: ("ar_", "nar_"), 1: ("ar_",), 2: ("nar_",)}[stage]
        return ((name, parameter) for name, parameter in self.named_parameters() if name.startswith(prefix))

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
        start: int,
        end: int,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        seed: int | None = None,
        dtype: str = "fp32",
        *,
        sampling: Sampling | None = None,
        num_samples: int = 1,
        on_frame: Callable[[int], object] | None = None,
    ) -> Generation:
        """Generate frames start … end - 1 of a recording anew, given what is before and behind them.

        For models trained with --infill-prob.

        Args:
            x: (T, Q) codes of the recording, or (B, T, Q) of several; what stands in the gap is not read.
            start, end: the gap, 0 ≤ start < end ≤ T, with something left outside.
            temperature, top_k, top_p, seed, dtype, sampling, num_samples, on_frame: see `generate`.

        Returns:
            codes (T, Q) each, prompt_lens T - (end - start).

        Raises:
            UserError: a gap that does not lie in the recording, or codes of the wrong shape or range.
        """
        total = x.shape[-2] if x.dim() > 1 else 0
        if not 0 <= start < end <= total or end - start == total:
            raise UserError(
                f"gap {start} to {end} in {total} frames: expected 0 <= start < end <= {total}, not all"
            )
        if num_samples < 1:
            raise UserError(f"num_samples is {num_samples}, expected 1 or more")
        x = x.clone()
        x[..., start:end, :] = 0
        x, _ = self._prompts(x, None)
        streams = make_streams(x.shape[0], seed, num_samples)
        x = x.repeat_interleave(num_samples, 0)
        known = torch.cat([x[:, :start], x[:, end:]], 1)
        lens, prefix_lens = (torch.full((x.shape[0],), n, device=x.device) for n in (known.shape[1], start))
        generator = Generator(self, dtype, sampling or Sampling(temperature, top_k, top_p), on_frame=on_frame)
        # The length is given: no row ends before.
        leg = generator.leg(known, lens, streams, end - start, end - start, prefix_lens)
        result = Generation(
            [torch.cat([row[:start], middle, row[end:]]) for row, middle in zip(x, leg.targets, strict=True)],
            lens.tolist(), leg.finish_reasons, leg.log_probs, generator.timings, generator.frame_seconds,
        )  # fmt: skip
        return result if num_samples == 1 else result.ranked(num_samples)

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
            generator, codec, x[0], make_streams(1, seed)[0], max_new_tokens, min_new_tokens, window,
            chunks or default_chunks(codec.frame_rate),
        )  # fmt: skip

    def _prompts(self, x: Tensor, x_lens: Tensor | None) -> tuple[Tensor, Tensor]:
        """Checked prompts (B, S, Q) and (B,) on the model's device; (S, Q) is taken as one row."""
        if x.dim() == 2:
            x = x[None]
        if x_lens is None:
            x_lens = torch.full((x.shape[0],), x.shape[1] if x.dim() == 3 else 0)
        return self._check_codes(x.to(self.device), x_lens.to(self.device), "prompt x")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.ar_audio_embedding.weight.device

    def _check_codes(self, codes: Tensor, lens: Tensor, what: str) -> tuple[Tensor, Tensor]:
        """Codes as int64 with their padding set to 0; a clear error on anything else than (B, T, Q) codes."""
        if codes.dim() != 3 or codes.shape[-1] != self.num_quantizers:
            raise UserError(
                f"{what}: shape {tuple(codes.shape)}, expected (batch, frames, {self.num_quantizers} quantizers)"
            )
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise UserError(f"{what}: codes are {codes.dtype}, expected an integer type")
        codes, lens = codes.long(), lens.long()
        if lens.shape != (codes.shape[0],) or int(lens.min()) < 1 or int(lens.max()) > codes.shape[1]:
            raise UserError(
                f"{what}: lengths {lens.tolist()[:8]}, expected {codes.shape[0]} numbers from 1 to {codes.shape[1]}"
            )
        codes = codes.masked_fill(~lengths_to_mask(lens, codes.shape[1])[..., None], 0)
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= self.codebook_size:
            raise UserError(f"{what}: codes from {low} to {high}, expected 0 to {self.codebook_size - 1}")
        return codes, lens


def _embedding(size: int, dim: int) -> nn.Embedding:
    table = nn.Embedding(size, dim)
    nn.init.normal_(table.weight, std=0.02)
    return table


def _prenet(dim: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(dim, 256), nn.ReLU(), nn.Dropout(0.25), nn.Linear(256, 256), nn.ReLU(), nn.Dropout(0.25),
        nn.Linear(256, dim),
    )  # fmt: skip


def _append(x: Tensor, lens: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
    """Put `item` (B, 1, D) directly behind each row's valid frames."""
    joined = F.pad(x, (0, 0, 0, 1))
    index = lens.view(-1, 1, 1).expand(-1, 1, x.shape[-1])
    return joined.scatter(1, index, item.to(joined.dtype)), lens + 1


def _join(prompt: Tensor, prompt_lens: Tensor, target: Tensor, starts: Tensor) -> Tensor:
    """Rows of [padding, prompt_i, target_i, padding], prompt and target without a gap.

    Args:
        prompt: (B, S, D), right-padded.
        prompt_lens: (B,).
        target: (B, T, D), right-padded.
        starts: (B,) column at which each row begins.

    Returns:
        (B, S + T, D).
    """
    both = torch.cat([prompt, target], 1)
    columns = torch.arange(both.shape[1], device=both.device) - starts[:, None]
    gap = prompt.shape[1] - prompt_lens[:, None]
    source = torch.where(columns < prompt_lens[:, None], columns, columns + gap).clamp(0, both.shape[1] - 1)
    return both.gather(1, source[..., None].expand(-1, -1, both.shape[-1]))


def _infill_positions(columns: Tensor, prompt_lens: Tensor, prefix_lens: Tensor, gap_lens: Tensor) -> Tensor:
    """The true time of each column of rows [prefix, suffix, middle]: the middle stands between the other two.

    Args:
        columns: (B, T) or (T,), counted from each row's start.
        prompt_lens: (B,) frames of prefix and suffix.
        prefix_lens: (B,).
        gap_lens: (B,) positions between prefix and suffix.

    Returns:
        (B, T). Where the suffix is empty, the columns themselves.
    """
    prefix, prompt = prefix_lens[:, None], prompt_lens[:, None]
    times = torch.where(columns < prompt, columns + gap_lens[:, None], columns - (prompt - prefix))
    return torch.where(columns < prefix, columns, times)


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


def _cross_entropy(logits: Tensor, targets: Tensor, valid: Tensor) -> tuple[Tensor, int]:
    """Sum of nats per row (B,), and the number of valid targets."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return (losses.view(valid.shape) * valid).sum(1), int(valid.sum())
