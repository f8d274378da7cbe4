"""What all language models over codes share: an AR and a NAR decoder, their logits and losses, and generation.

    prefix ──► AR decoder: quantizer 0, frame by frame; full attention inside the prefix, causal behind it, the first
               frame predicted from the prefix
           ──► NAR decoder: quantizer q = 1 … Q-1 of all target frames at once, from the prefix, the prompt and the sum
               of the target's quantizers below q; attention both ways

A model says what its prefix is: of an AudioLM the audio prompt, of a VALL-E text or notes. `ar_logits` and `nar_logits`
are the only places that compute logits; training and generation both call them.
Source: VALL-E (arXiv 2301.02111, sections 4.2.1 and 4.2.2).

Shapes: B batch, S length of what the prefix is made of, P prefix, T frames, Q quantizers, V codebook size, D width.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from valle.models.prompts import Prompts
from valle.models.watched import code_metrics
from valle.modules.cache import Cache
from valle.modules.embeddings import SinePositions, sum_embeddings
from valle.modules.masks import lengths_to_mask, prefix_causal_mask
from valle.modules.patterns import Pattern
from valle.modules.transformer import Linear, Transformer
from valle.utils.errors import UserError

CODEBOOK_RMS = 0.05  # size of quantizer 0's embeddings when they start from the codec's vectors
Metrics = dict[str, tuple[Any, Any]]


class LossOutput(NamedTuple):
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


class Part(NamedTuple):
    """A stretch of a decoder's input.

    Attributes:
        x: (B, n, D), right-padded.
        lens: (B,).
        positions: (B, n) or (n,), in time; whole numbers or not.
    """

    x: Tensor
    lens: Tensor
    positions: Tensor


class CodecLM(nn.Module):
    """Base of the language models over codes; see `AudioLM` and `VALLE` for what the arguments mean.

    Args:
        audio_from_zero: positions of audio begin at 0 behind the prefix, instead of going on from it.
        nar_num_layers: of the NAR decoder (default: num_layers).
        cross_attention: decoders read a memory.
        pattern, group_size: in which order the AR decoder says codes, see `valle.modules.patterns`.
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
        norm_first: bool,
        add_prenet: bool,
        num_quantizers: int,
        nar_scale_factor: float,
        prepend_bos: bool,
        codebook_size: int,
        share_embedding: bool,
        dropout: float,
        position: str,
        activation: str,
        qk_norm: bool,
        attention_dropout: float,
        audio_from_zero: bool = False,
        nar_num_layers: int | None = None,
        cross_attention: bool = False,
        pattern: str = "valle",
        group_size: int = 1,
    ) -> None:
        super().__init__()
        if num_quantizers < 1:
            raise ValueError(f"num_quantizers is {num_quantizers}, expected 1 or more")
        self.nar_dim, nar_heads = int(d_model * nar_scale_factor), max(1, int(nhead * nar_scale_factor))
        self.num_quantizers, self.codebook_size, self.prepend_bos = num_quantizers, codebook_size, prepend_bos
        self.eos, self.bos = codebook_size, codebook_size + 1
        self.audio_from_zero = audio_from_zero
        self.pattern = Pattern(pattern, num_quantizers, codebook_size, group_size)
        shared: dict[str, Any] = {
            "dropout": dropout,
            "norm_first": norm_first,
            "position": "rope" if position == "rope" else "none",
            "activation": activation,
            "qk_norm": qk_norm,
            "attention_dropout": attention_dropout,
            "cross_attention": cross_attention,
        }
        if position not in ("rope", "sine"):
            raise ValueError(f"position is '{position}', expected rope or sine")

        # Table 0 holds the codes of quantizer 0, wherever they stand, then EOS and, if used, BOS.
        self.ar_audio_embedding = new_embedding(codebook_size + 1 + int(prepend_bos), d_model)
        self.ar_audio_prenet = new_prenet(d_model) if add_prenet else nn.Identity()
        self.ar_prefix_position = SinePositions(d_model) if position == "sine" else None
        self.ar_audio_position = SinePositions(d_model) if position == "sine" else None
        self.ar_decoder = Transformer(d_model, nhead, num_layers, **shared)
        self.ar_predict_layer = Linear(d_model, self.pattern.heads * (codebook_size + 1), bias=False)
        if not self.pattern.plain:
            self.ar_slot_embeddings = nn.ModuleList(
                new_embedding(size, d_model) for size in self.pattern.table_sizes
            )
        elif share_embedding:
            if prepend_bos:
                raise ValueError(
                    "share_embedding cannot be combined with prepend_bos: the AR tables differ in size"
                )
            self.ar_predict_layer.weight = self.ar_audio_embedding.weight

        if self.pattern.has_nar:
            self.nar_audio_embeddings = nn.ModuleList(
                new_embedding(codebook_size, self.nar_dim) for _ in range(num_quantizers)
            )
            self.nar_segment_embedding = new_embedding(2, self.nar_dim)  # prompt, target
            self.nar_stage_embeddings = nn.ModuleList(
                new_embedding(1, self.nar_dim) for _ in range(num_quantizers - 1)
            )
            self.nar_audio_prenet = new_prenet(self.nar_dim) if add_prenet else nn.Identity()
            self.nar_prefix_position = SinePositions(self.nar_dim) if position == "sine" else None
            self.nar_audio_position = SinePositions(self.nar_dim) if position == "sine" else None
            self.nar_decoder = Transformer(
                self.nar_dim, nar_heads, nar_num_layers or num_layers, adaptive=True, **shared
            )
            self.nar_predict_layers = nn.ModuleList(
                Linear(self.nar_dim, codebook_size, bias=False) for _ in range(num_quantizers - 1)
            )
            if share_embedding:
                for index, layer in enumerate(self.nar_predict_layers):
                    layer.weight = self.nar_audio_embeddings[index + 1].weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.ar_audio_embedding.weight.device

    def code_tables(self) -> list[list[nn.Embedding]]:
        """The tables of codes, quantizer by quantizer, of each decoder."""
        tables: list[list[Any]] = [[self.ar_audio_embedding]]
        return [*tables, [*self.nar_audio_embeddings]] if self.pattern.has_nar else tables

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
        for tables in self.code_tables():
            dim = tables[0].weight.shape[1]
            projection = torch.empty(dim, codebooks.shape[2], device=self.device)
            nn.init.orthogonal_(projection)
            for table, vectors in zip(tables, scaled, strict=False):  # a VALL-E's AR decoder has one
                table.weight[:size] = vectors @ projection.T * (dim / codebooks.shape[2]) ** 0.5

    # ------------------------------------------------------------------ logits

    @abstractmethod
    def prefill(self, prompts: Prompts, cache: Cache) -> Tensor:
        """Fill a cache with prompts -> (B, V + 1) of the first new frame."""

    @abstractmethod
    def refine_logits(self, prompts: Prompts, y: Tensor, y_lens: Tensor, quantizer: int) -> Tensor:
        """(B, T, V) of one quantizer of what was generated behind prompts."""

    def ready(self, prompts: Prompts) -> Prompts:
        """Prompts with what the model works out once about them, before anything is generated."""
        return prompts

    @abstractmethod
    def said_logits(self, prompts: Prompts, y: Tensor, y_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the AR decoder's steps where it is told what to say.

        Args:
            prompts: what stands before.
            y: (B, T, Q) codes.
            y_lens: (B,).

        Returns:
            (B, N, V + 1), or (B, N, heads, V + 1) unless a step is one code; and (B,) the frame of these steps at which
            y begins.
        """

    def forced_logits(self, prompts: Prompts, y: Tensor, y_lens: Tensor) -> Iterator[Tensor]:
        """Quantizer by quantizer, (B, T, V or V + 1) for true codes: each given all that the model would know then.

        Args:
            prompts: what stands before.
            y: (B, T, Q) codes.
            y_lens: (B,).
        """
        said, begin = self.said_logits(prompts, y, y_lens)
        frames = begin[:, None] + torch.arange(y.shape[1], device=y.device)
        said = said.unsqueeze(2) if self.pattern.plain else said
        for quantizer in range(self.num_quantizers):
            if quantizer and self.pattern.has_nar:
                yield self.refine_logits(prompts, y, y_lens, quantizer)
                continue
            steps, heads = self.pattern.step_of(frames, quantizer)
            rows = torch.arange(len(y), device=y.device)[:, None]
            yield said[rows, steps.clamp(max=said.shape[1] - 1), heads]

    def _steps(self, y: Tensor, y_lens: Tensor) -> tuple[Tensor, Tensor]:
        """What the AR decoder is given of codes (B, T, Q): tokens and their lengths (B,)."""
        if self.pattern.plain:
            return y[..., 0], y_lens
        targets, valid, quantizer = self.pattern.targets(y, y_lens)
        return self.pattern.inputs(targets, valid, quantizer), valid.any(-1).sum(1) - 1

    @abstractmethod
    def compute_loss(self, batch: dict[str, Any], stage: int) -> StageLoss:
        """For the training engine."""

    def _run_ar(
        self,
        prefix: Sequence[Part],
        y: Tensor,
        y_lens: Tensor | None,
        cache: Cache | None,
        first_position: Tensor | None = None,
        first_from: Tensor | None = None,
        memory: Part | None = None,
    ) -> Tensor:
        """Logits behind the prefix, and behind each frame.

        Args:
            prefix: stands before the audio; its parts see each other, all of them.
            y: (B, T) codes of quantizer 0, or (B, T, K) ids of the pattern's steps; T may be 0.
            y_lens: (B,) (default: T each).
            cache: where keys and values are kept; rows are then right-aligned.
            first_position: (B,) in time, of the first frame, or of the begin symbol (default: behind the prefix, or 0).
            first_from: (B,) column of the prefix from which the first frame is predicted where there is no begin symbol
                (default: the last).
            memory: what cross-attention reads.

        Returns:
            (B, T + 1, V + 1): for frame 0 … T, the last one what follows y; index V is the end. With a cache, only what
            follows y, (B, 1, V + 1). Of steps of another pattern, (B, T + 1 or 1, heads, V + 1).
        """
        if y_lens is not None:
            inside = lengths_to_mask(y_lens, y.shape[1])
            y = y.masked_fill(~(inside if y.dim() == 2 else inside[..., None]), 0)
        begin = int(self.prepend_bos)
        frames = y.shape[1] + begin
        lens = torch.stack([part.lens for part in prefix]).sum(0)
        if first_position is None:
            first_position = torch.zeros_like(lens) if self.audio_from_zero else lens
        positions = first_position[:, None] + torch.arange(frames, device=y.device)
        target_lens = torch.full_like(lens, frames) if y_lens is None else y_lens + begin
        target = Part(self._ar_embed(y, positions, bool(begin)), target_lens, positions)
        total = lens + target_lens
        width = int(total.max())
        columns = torch.arange(width, device=y.device)
        starts = torch.zeros_like(lens)
        if cache is not None:
            starts = width - total
            cache.place(starts, lens)
            cache.position_shift = lens - first_position
        sequence, times = join([*prefix, target], starts, width)
        # The frame behind the prefix is predicted at the prefix's last column, or at the begin symbol's.
        ends = (starts + lens - 1 + begin)[:, None] + torch.arange(y.shape[1] + 1, device=y.device)
        if first_from is not None and not begin:
            ends[:, 0] = starts + first_from
        if cache is not None:
            ends = ends.gather(1, (target_lens - begin)[:, None])
        hidden = self.ar_decoder(
            sequence,
            times,
            lambda: prefix_causal_mask(starts, lens, columns, columns),
            cache,
            rows=(total, lens, ends.min(1).values.clamp(min=0) if cache is None else starts),
            memory=memory,
        )
        ends = ends.clamp(0, hidden.shape[1] - 1)
        return self._ar_predict(hidden.gather(1, ends[..., None].expand(-1, -1, hidden.shape[-1])))

    def next_logits(self, y: Tensor, cache: Cache) -> Tensor:
        """(B, T) codes, or (B, T, K) ids, behind those that a cache holds -> (B, T, …, V + 1) of what follows each."""
        frames = y.shape[1]
        positions = cache.positions(frames)
        hidden = self.ar_decoder(self._ar_embed(y, positions), positions, cache.mask(frames), cache)
        return self._ar_predict(hidden)

    def _ar_predict(self, hidden: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, V + 1), or (B, T, heads, V + 1) unless a step is one code of quantizer 0."""
        logits = self.ar_predict_layer(hidden)
        return logits if self.pattern.plain else logits.unflatten(-1, (self.pattern.heads, -1))

    def _ar_embed(self, y: Tensor, positions: Tensor, begin: bool = False) -> Tensor:
        """(B, T) codes of quantizer 0, or (B, T, K) ids -> (B, T, D), behind a begin symbol if there is to be one."""
        if y.dim() == 2:
            embedded = self.ar_audio_embedding(y)
        else:
            embedded = sum_embeddings(list(self.ar_slot_embeddings), y)
        if begin:
            first = self.ar_audio_embedding.weight[self.bos].expand(y.shape[0], 1, -1)
            embedded = torch.cat([first.to(embedded.dtype), embedded], 1)
        embedded = self.ar_audio_prenet(embedded)
        return embedded if self.ar_audio_position is None else self.ar_audio_position(embedded, positions)

    def _run_nar(
        self,
        parts: Sequence[Part],
        y: Tensor,
        y_lens: Tensor,
        positions: Tensor,
        quantizer: int | Tensor,
        memory: Part | None = None,
    ) -> Tensor:
        """Logits of one quantizer for all target frames.

        Args:
            parts: what stands before the target.
            y: (B, T, Q' ≤ Q) target codes; only quantizers below `quantizer` are read.
            y_lens: (B,).
            positions: (B, T) or (T,) of the target's frames.
            quantizer: 1 … Q-1, or one a row, (B,).
            memory: what cross-attention reads.

        Returns:
            (B, T, V).
        """
        if isinstance(quantizer, int):
            quantizer = torch.full((y.shape[0],), quantizer, device=y.device)
        target = self.nar_segment_embedding.weight[1].expand(y.shape[0], y.shape[1], -1)
        for level in range(int(quantizer.max())):
            read = (quantizer > level).view(-1, 1, 1)
            target = target + self.nar_audio_embeddings[level](y[..., level]) * read
        target = self._nar_place(self.nar_audio_prenet(target), positions)
        before = sum((part.lens for part in parts), torch.zeros_like(y_lens))
        total = before + y_lens
        width = int(total.max())
        sequence, times = join([*parts, Part(target, y_lens, positions)], torch.zeros_like(total), width)

        def mask() -> Tensor | None:
            if bool((total == width).all()):
                return None
            return lengths_to_mask(total, width)[:, None, None]

        stages = torch.cat(list(self.nar_stage_embeddings.parameters()))
        condition = stages[quantizer - 1][:, None]  # (B, 1, D)
        hidden = self.nar_decoder(
            sequence, times, mask, condition=condition, rows=(total, total, before), memory=memory
        )
        columns = (before[:, None] + torch.arange(y.shape[1], device=y.device)).clamp(max=width - 1)
        hidden = hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[-1]))
        first = int(quantizer[0])
        if bool((quantizer == first).all()):
            return self.nar_predict_layers[first - 1](hidden)
        heads = torch.stack(list(self.nar_predict_layers.parameters()))  # (Q-1, V, D)
        return torch.einsum("btd,bvd->btv", hidden, heads[quantizer - 1])

    def _nar_prompt(self, codes: Tensor, lens: Tensor, positions: Tensor) -> Part:
        """The prompt's codes (B, S, Q), all quantizers added up, as a part of the NAR decoder's input."""
        prompt = sum_embeddings(list(self.nar_audio_embeddings), codes) + self.nar_segment_embedding.weight[0]
        return Part(self._nar_place(self.nar_audio_prenet(prompt), positions), lens, positions)

    def _nar_place(self, x: Tensor, positions: Tensor) -> Tensor:
        return x if self.nar_audio_position is None else self.nar_audio_position(x, positions)

    # ---------------------------------------------------------------- training

    def _ar_stage(
        self,
        logits_of: Callable[[Tensor, Tensor], Tensor],
        y: Tensor,
        y_lens: Tensor,
        ends: Tensor,
        firsts: Tensor,
        metrics: Metrics,
    ) -> tuple[Tensor, Tensor, int]:
        """The AR decoder's logits, the loss of each row (B,) and the number of targets; adds to `metrics`.

        Args:
            logits_of: codes, or ids of steps, and their lengths -> logits.
            y: (B, T, Q).
            y_lens: (B,).
            ends: (B,) 1 where the end behind the last frame is to be learned, else 0.
            firsts: (B,) the first frame to be learned; of steps of another pattern, the first step.
        """
        if self.pattern.plain:
            logits = logits_of(y[..., 0], y_lens)
            trained = lengths_to_mask(y_lens + ends, y.shape[1] + 1) & ~lengths_to_mask(
                firsts, y.shape[1] + 1
            )
            return (logits, *self._ar_loss(logits, y[..., 0], y_lens, trained, metrics))
        targets, valid, quantizer = self.pattern.targets(y, y_lens)
        logits = logits_of(*self._steps(y, y_lens))  # (B, N + 1, heads, V + 1)
        shown = logits
        if self.pattern.name == "flatten":
            index = quantizer.view(1, -1, 1, 1).expand(len(y), -1, 1, logits.shape[-1])
            shown = logits.gather(2, index)
        valid = valid & ((targets < self.eos) | (ends > 0).view(-1, 1, 1))
        valid = valid & ~lengths_to_mask(firsts, valid.shape[1])[..., None]
        losses, number = cross_entropy(shown, targets, valid)
        metrics["ArLoss"] = (float(losses.detach().sum()), number)
        codes = valid & (targets < self.eos)
        for slot in range(targets.shape[2]):
            add_metrics(
                metrics,
                code_metrics(
                    "Ar", shown[:, :, slot], targets[:, :, slot].clamp(max=self.eos - 1), codes[:, :, slot],
                    torch.zeros_like(y_lens), (self.num_quantizers, self.codebook_size),
                ),
            )  # fmt: skip
        return logits, losses, number

    def _ar_loss(
        self, logits: Tensor, y: Tensor, y_lens: Tensor, trained: Tensor, metrics: Metrics
    ) -> tuple[Tensor, int]:
        """Loss of each row (B,) and the number of targets; adds to `metrics`.

        Args:
            logits: (B, T + 1, V + 1).
            y: (B, T) codes of quantizer 0.
            y_lens: (B,).
            trained: (B, T + 1), which of the frames, and of the ends behind them, are targets.
        """
        valid = lengths_to_mask(y_lens, y.shape[1])
        # The end follows the last frame; what is behind it is no target.
        targets = F.pad(y.masked_fill(~valid, 0), (0, 1))
        targets.scatter_(1, y_lens[:, None], self.eos)
        losses, number = cross_entropy(logits, targets, trained)
        metrics["ArLoss"] = (float(losses.detach().sum()), number)
        shape = (self.num_quantizers, self.codebook_size)
        metrics |= code_metrics(
            "Ar", logits[:, :-1], y, valid & trained[:, :-1], torch.zeros_like(y_lens), shape
        )
        return losses, number

    def _nar_loss(
        self, logits: Tensor, y: Tensor, valid: Tensor, quantizer: Tensor, metrics: Metrics
    ) -> tuple[Tensor, int]:
        """Loss of each row (B,) at its `quantizer` (B,), and the number of targets; adds to `metrics`.

        Args:
            logits: (B, T, V).
            y: (B, T, Q).
            valid: (B, T), which frames are targets.
        """
        index = quantizer.view(-1, 1, 1).expand(-1, y.shape[1], 1)
        targets = y.gather(2, index)[..., 0]
        losses, number = cross_entropy(logits, targets, valid)
        named: Metrics = {"NarLoss": (float(losses.detach().sum()), number)}
        shape = (self.num_quantizers, self.codebook_size)
        named |= code_metrics("Nar", logits, targets, valid, quantizer, shape)
        add_metrics(metrics, named)
        return losses, number

    def _nar_quantizers(self, batch: int, device: torch.device) -> Iterator[Tensor]:
        """In training, a quantizer drawn for each row; in evaluation all, so that a loss depends on no draw."""
        if self.training:
            yield torch.randint(1, self.num_quantizers, (batch,)).to(device)
            return
        for quantizer in range(1, self.num_quantizers):
            yield torch.full((batch,), quantizer, device=device)

    def _output(
        self,
        predictions: dict[str, Tensor],
        rows: Tensor,
        count: int,
        metrics: Metrics,
        reduction: str,
        stage: int,
    ) -> LossOutput:
        if not predictions:
            raise ValueError(
                f"nothing to train in train_stage {stage} with {self.num_quantizers} quantizer(s) and pattern "
                f"{self.pattern.name}"
            )
        loss = rows if reduction == "none" else rows.sum() / (count if reduction == "mean" else 1)
        return LossOutput(predictions, loss, metrics)

    def stage_parameters(self, stage: int) -> Iterator[tuple[str, nn.Parameter]]:
        """What a stage trains: 0 all, 1 `ar_*`, 2 `nar_*`."""
        prefix = {0: ("ar_", "nar_"), 1: ("ar_",), 2: ("nar_",)}[stage]
        return ((name, parameter) for name, parameter in self.named_parameters() if name.startswith(prefix))

    def check_codes(self, codes: Tensor, lens: Tensor, what: str) -> tuple[Tensor, Tensor]:
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


def around(columns: Tensor, prefix_lens: Tensor, gap_lens: Tensor) -> Tensor:
    """The true time of each frame of a prompt that stands on both sides of a gap.

    Args:
        columns: (S,).
        prefix_lens: (B,) frames before the gap.
        gap_lens: (B,) of the gap.

    Returns:
        (B, S).
    """
    return columns + (columns >= prefix_lens[:, None]) * gap_lens[:, None]


def check_reduction(reduction: str) -> None:
    """Raises a ValueError for what is none."""
    if reduction not in ("sum", "mean", "none"):
        raise ValueError(f"reduction is {reduction!r}, expected 'sum', 'mean' or 'none'")


def new_embedding(size: int, dim: int) -> nn.Embedding:
    """A table (size, dim) of small random numbers."""
    table = nn.Embedding(size, dim)
    nn.init.normal_(table.weight, std=0.02)
    return table


def new_prenet(dim: int) -> nn.Module:
    """The small network that embeddings pass with --add-prenet, (…, D) -> (…, D)."""
    return nn.Sequential(
        nn.Linear(dim, 256), nn.ReLU(), nn.Dropout(0.25), nn.Linear(256, 256), nn.ReLU(), nn.Dropout(0.25),
        nn.Linear(256, dim),
    )  # fmt: skip


def join(parts: Sequence[Part], starts: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Rows of [padding, the parts without a gap, padding].

    Args:
        parts: right-padded.
        starts: (B,) column at which each row begins.
        width: columns.

    Returns:
        (B, width, D) and the positions (B, width); both of no meaning in padding.
    """
    batch = len(starts)
    both = torch.cat([part.x for part in parts], 1)
    positions = torch.cat([part.positions.expand(batch, -1) for part in parts], 1)
    columns = torch.arange(width, device=both.device) - starts[:, None]
    source, before, shift = columns, torch.zeros_like(starts), torch.zeros_like(starts)
    for part in parts[:-1]:
        # What lies behind a part comes after its padding.
        before = before + part.lens
        shift = shift + part.x.shape[1] - part.lens
        source = torch.where(columns < before[:, None], source, columns + shift[:, None])
    source = source.clamp(0, both.shape[1] - 1)
    return both.gather(1, source[..., None].expand(-1, -1, both.shape[-1])), positions.gather(1, source)


def cross_entropy(logits: Tensor, targets: Tensor, valid: Tensor) -> tuple[Tensor, int]:
    """Sum of nats per row (B,), and the number of valid targets, of logits (B, …, V) and the others (B, …)."""
    losses = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="none")
    return (losses.view(valid.shape) * valid).flatten(1).sum(1), int(valid.sum())


def add_metrics(metrics: Metrics, more: Metrics) -> None:
    """Add sums and counts to those that are there."""
    for name, (total, size) in more.items():
        before = metrics.get(name, (0.0, 0))
        metrics[name] = (before[0] + total, before[1] + size)
