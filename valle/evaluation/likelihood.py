"""What the model itself scores on held-out cuts: the AR loss, and each NAR quantizer given the true lower ones.

Teacher forcing through the same functions as training and generation (`forced_logits`); batched by length, and each
cut's figures are the same in any batch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from valle.evaluation.scores import PositionSums, SplitCodes, TokenScores, frame_scores, stack_scores
from valle.models.prompts import Prompts, make_prompts
from valle.utils.progress import progress


class ScoredModel(Protocol):
    """What scoring needs of a model; see `valle.models.CodecLM`."""

    num_quantizers: int

    def forced_logits(self, prompts: Prompts, y: Tensor, y_lens: Tensor) -> Iterable[Tensor]:
        """Prompts and target codes (B, T, Q) -> quantizer by quantizer (B, T, V or V + 1); index V ends the target."""


@torch.inference_mode()
def score_model(
    model: ScoredModel,
    splits: Sequence[SplitCodes],
    device: str | torch.device = "cpu",
    max_frames: int = 6000,
    show_progress: bool = True,
    bin_frames: int | None = None,
    wrong: bool = False,
) -> TokenScores:
    """Score every quantizer on the target frames of each cut.

    Args:
        model: in eval mode.
        splits: held-out cuts; prompt and target have at least `model.num_quantizers` columns.
        wrong: let it read what other cuts say.
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
        prompts = _prompts([splits[row] for row in rows], num_quantizers, wrong, device)
        y, y_lens = pad_codes([splits[row].target[:, :num_quantizers] for row in rows], device)
        real = torch.arange(y.shape[1], device=y.device) < y_lens[:, None]  # (B, T)
        for quantizer, logits in enumerate(model.forced_logits(prompts, y, y_lens)):
            scores = frame_scores(logits.float(), y[..., quantizer])  # (B, T, 3)
            scores = torch.where(real[..., None], scores, 0.0)
            sums[rows, quantizer] = scores.sum(dim=1).cpu().numpy()
            if positions is not None:
                positions.add(scores.sum(dim=0).cpu().numpy(), quantizer)
        bar.update(len(rows))
    bar.close()
    return stack_scores([len(split.target) for split in splits], sums, positions)


def _prompts(
    splits: Sequence[SplitCodes], num_quantizers: int, wrong: bool, device: str | torch.device
) -> Prompts:
    """What stands before the targets; with `wrong`, other cuts' texts."""
    codes = [torch.from_numpy(split.prompt[:, :num_quantizers].astype(np.int64)) for split in splits]
    read = [split.wrong if wrong else split.text for split in splits]
    texts = [torch.from_numpy(text).to(device) for text in read if text is not None]
    prompts = make_prompts([row.to(device) for row in codes], texts or None)
    said = [split.wrong_times if wrong else split.times for split in splits]
    times = [torch.from_numpy(part.astype(np.float32)).to(device) for part in said if part is not None]
    return replace(prompts, text_times=pad_sequence(times, batch_first=True)) if times else prompts


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
