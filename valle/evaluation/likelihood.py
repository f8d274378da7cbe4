"""What the model itself scores on held-out cuts: the AR loss, and each NAR quantizer given the true lower ones.

Teacher forcing through the same functions as training and generation (`ar_logits`, `nar_logits`); batched by
length, and each cut's figures are the same in any batch.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from valle.evaluation.scores import PositionSums, SplitCodes, TokenScores, frame_scores, stack_scores
from valle.utils.progress import progress


class ScoredModel(Protocol):
    """What scoring needs of a model; see `valle.models.audio_lm.AudioLM`."""

    num_quantizers: int

    def ar_logits(self, x: Tensor, x_lens: Tensor, y: Tensor, y_lens: Tensor) -> Tensor:
        """Prompt (B, S, Q) and codes y (B, T) of quantizer 0 -> (B, T + 1, V + 1); index V ends the target."""

    def nar_logits(self, x: Tensor, x_lens: Tensor, y: Tensor, y_lens: Tensor, quantizer: int) -> Tensor:
        """Prompt (B, S, Q), target (B, T, Q) of which y[..., :quantizer] is read -> (B, T, V)."""


@torch.inference_mode()
def score_model(
    model: ScoredModel,
    splits: Sequence[SplitCodes],
    device: str | torch.device = "cpu",
    max_frames: int = 6000,
    show_progress: bool = True,
    bin_frames: int | None = None,
) -> TokenScores:
    """Score every quantizer on the target frames of each cut.

    Args:
        model: an AudioLM in eval mode.
        splits: held-out cuts; prompt and target have at least `model.num_quantizers` columns.
        device: where the model is.
        max_frames: padded frames in a batch.
        show_progress: show a bar on stderr.
        bin_frames: also score by position in the target, so many frames together.

    Returns:
        Scores in the order of `splits`, for quantizers 0 (AR) to Q - 1 (NAR).
    """
    num_quantizers = model.num_quantizers
    sums = np.zeros((len(splits), num_quantizers, 3))
    positions = PositionSums.of(splits, num_quantizers, bin_frames)
    bar = progress(total=len(splits), desc="scoring cuts", unit="cut", disable=not show_progress)
    for rows in _batches(splits, max_frames):
        x, x_lens = pad_codes([splits[row].prompt[:, :num_quantizers] for row in rows], device)
        y, y_lens = pad_codes([splits[row].target[:, :num_quantizers] for row in rows], device)
        real = torch.arange(y.shape[1], device=y.device) < y_lens[:, None]  # (B, T)
        for quantizer in range(num_quantizers):
            if quantizer == 0:
                logits = model.ar_logits(x, x_lens, y[..., 0], y_lens)[
                    :, : y.shape[1]
                ]  # without the end's position
            else:
                logits = model.nar_logits(x, x_lens, y, y_lens, quantizer)
            scores = frame_scores(logits.float(), y[..., quantizer])  # (B, T, 3)
            scores = torch.where(real[..., None], scores, 0.0)
            sums[rows, quantizer] = scores.sum(dim=1).cpu().numpy()
            if positions is not None:
                positions.add(scores.sum(dim=0).cpu().numpy(), quantizer)
        bar.update(len(rows))
    bar.close()
    return stack_scores([len(split.target) for split in splits], sums, positions)


def _batches(splits: Sequence[SplitCodes], max_frames: int) -> list[list[int]]:
    """Rows sorted by length, in batches of at most `max_frames` padded frames (at least one cut)."""
    lengths = [len(split.prompt) + len(split.target) for split in splits]
    batches: list[list[int]] = []
    for row in sorted(range(len(splits)), key=lambda row: lengths[row]):
        if batches and lengths[row] * (len(batches[-1]) + 1) <= max_frames:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def pad_codes(codes: Sequence[np.ndarray], device: str | torch.device) -> tuple[Tensor, Tensor]:
    """(T_i, Q) arrays -> (B, T, Q) int64, right-padded with zeros, and (B,) lengths."""
    lengths = torch.tensor([len(part) for part in codes], device=device)
    padded = torch.zeros(len(codes), int(lengths.max()), codes[0].shape[1], dtype=torch.int64)
    for row, part in enumerate(codes):
        padded[row, : len(part)] = torch.from_numpy(part.astype(np.int64))
    return padded.to(device), lengths
