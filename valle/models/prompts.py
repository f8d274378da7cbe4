"""Rows that are to be continued: what generation hands to a model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Prompts:
    """Rows that are to be continued.

    Attributes:
        codes: (B, S, Q), right-padded; S may be 0 where there is text.
        lens: (B,) frames.
        text: (B, L) symbols or (B, L, F) notes to be read, right-padded, those of the prompt first.
        text_lens: (B,).
        prompt_text_lens: (B,) how much of each text belongs to the prompt, where that is known.
        begin: the frame of the recording at which `codes` begin.
        text_times: (B, L) the frame at which each symbol begins, of models whose text and audio share a clock.
        least: (B,) new frames before which no row ends, where the model can tell.
        prefix_lens: (B,) for in-filling: frames before the gap; the others stand behind it.
        gap_lens: (B,) for in-filling: frames of the gap.
    """

    codes: Tensor
    lens: Tensor
    text: Tensor | None = None
    text_lens: Tensor | None = None
    prompt_text_lens: Tensor | None = None
    text_times: Tensor | None = None
    least: Tensor | None = None
    prefix_lens: Tensor | None = None
    gap_lens: Tensor | None = None
    begin: int = 0

    @property
    def columns(self) -> int:
        """Columns that the rows take in a decoder, at most."""
        return self.codes.shape[1] + (0 if self.text is None else self.text.shape[1])

    def with_codes(self, codes: Tensor, lens: Tensor) -> "Prompts":
        """The same text behind other codes."""
        return replace(self, codes=codes, lens=lens)

    def row(self, index: int) -> "Prompts":
        """One row, (1, …)."""
        parts: dict[str, Any] = {name: part for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, **{name: part[index : index + 1] for name, part in parts.items()})


def make_prompts(
    codes: Sequence[Tensor],
    texts: Sequence[Tensor] | None = None,
    prompt_text_lens: Sequence[int] | None = None,
) -> Prompts:
    """Rows of codes (S_i, Q) and, where the model reads any, of text (L_i,) or (L_i, F)."""
    device = codes[0].device
    lens = torch.tensor([len(row) for row in codes], device=device)
    padded = pad_sequence(list(codes), batch_first=True)
    if texts is None:
        return Prompts(padded, lens)
    text_lens = torch.tensor([len(row) for row in texts], device=device)
    own = None if prompt_text_lens is None else torch.tensor(prompt_text_lens, device=device)
    return Prompts(padded, lens, pad_sequence(list(texts), batch_first=True), text_lens, own)
