"""In which order an AR decoder says the codes of a recording: steps of one or several codes, and back to frames.

    valle    step n: quantizer 0 of frame n, or, in groups of G, of frames n·G … n·G + G - 1; a NAR decoder adds the
             others (VALL-E, arXiv 2301.02111; groups: VALL-E 2, arXiv 2406.05370, section 3.2)
    delay    step n: quantizer q of frame n - q, for all q at once
    flatten  step n: quantizer n mod Q of frame n div Q, one code a step

`delay` and `flatten` are MusicGen's (arXiv 2306.05284, section 2.2): one decoder for all quantizers, no NAR decoder.

A step has K slots. Ids of a slot's embedding: the codes 0 … V - 1, and V where there is none; with flatten, one table
holds all quantizers' codes, q · V + code. Only where quantizer 0 is said can the end (V) follow.

Shapes: B batch, T frames, Q quantizers, N steps, K slots, V codebook size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

PATTERNS = ("valle", "delay", "flatten")


@dataclass(frozen=True)
class Pattern:
    """One of `PATTERNS`.

    Attributes:
        name: which.
        num_quantizers: Q.
        codebook_size: V.
        group_size: G, frames of a step; of "valle" alone.
    """

    name: str
    num_quantizers: int
    codebook_size: int
    group_size: int = 1

    def __post_init__(self) -> None:
        if self.name not in PATTERNS:
            raise ValueError(f"pattern is '{self.name}', expected one of {', '.join(PATTERNS)}")
        if self.group_size < 1 or (self.group_size > 1 and self.name != "valle"):
            raise ValueError(f"group_size is {self.group_size} with pattern {self.name}, expected 1")

    @property
    def plain(self) -> bool:
        """One code of quantizer 0 a step."""
        return self.name == "valle" and self.group_size == 1

    @property
    def has_nar(self) -> bool:
        """Whether a NAR decoder says the other quantizers."""
        return self.name == "valle" and self.num_quantizers > 1

    @property
    def slots(self) -> int:
        """K, codes of a step."""
        return {"valle": self.group_size, "delay": self.num_quantizers, "flatten": 1}[self.name]

    @property
    def heads(self) -> int:
        """Predictions that the output layer makes for a step."""
        return self.num_quantizers if self.name == "flatten" else self.slots

    @property
    def table_sizes(self) -> list[int]:
        """Ids of each slot's embedding."""
        if self.name == "flatten":
            return [self.num_quantizers * self.codebook_size + 1]
        return [self.codebook_size + 1] * self.slots

    @property
    def steps_per_frame(self) -> float:
        """How much faster than frames steps go on."""
        return {"valle": 1 / self.group_size, "delay": 1.0, "flatten": float(self.num_quantizers)}[self.name]

    def steps(self, frames: int) -> int:
        """Steps that say so many frames and nothing else."""
        if self.name == "delay":
            return frames + self.num_quantizers - 1 if frames else 0
        return frames * self.num_quantizers if self.name == "flatten" else -(-frames // self.group_size)

    def whole_steps(self, frames: Tensor) -> Tensor:
        """(B,) steps all of whose codes are known when so many frames are."""
        if self.name == "flatten":
            return frames * self.num_quantizers
        return frames if self.name == "delay" else frames // self.group_size

    def place(self, step: Tensor | int, slot: int) -> tuple[Tensor | int, Tensor | int]:
        """Frame and quantizer of a slot of a step."""
        if self.name == "flatten":
            return step // self.num_quantizers, step % self.num_quantizers
        if self.name == "delay":
            return step - slot, slot
        return step * self.group_size + slot, 0

    def step_of(self, frame: Tensor, quantizer: int) -> tuple[Tensor, Tensor]:
        """The step that says a code of the AR decoder's, and which of its predictions; the reverse of `place`."""
        if self.name == "valle":
            return frame // self.group_size, frame % self.group_size
        step = frame * self.num_quantizers if self.name == "flatten" else frame
        return step + quantizer, torch.full_like(frame, quantizer)

    def targets(self, codes: Tensor, lens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What each step is to say.

        Args:
            codes: (B, T, Q).
            lens: (B,) frames.

        Returns:
            targets (B, N + 1, K): codes, and the end, V, behind the last frame; which of them count, (B, N + 1, K);
            and the quantizer of each, (N + 1, K). N steps say the longest row.
        """
        total = self.steps(int(lens.max())) + 1
        step = torch.arange(total, device=codes.device)[:, None].expand(-1, self.slots)
        slot = torch.arange(self.slots, device=codes.device).expand(total, -1)
        if self.name == "flatten":
            frame, quantizer = step // self.num_quantizers, step % self.num_quantizers
        elif self.name == "delay":
            frame, quantizer = step - slot, slot
        else:
            frame, quantizer = step * self.group_size + slot, torch.zeros_like(slot)
        padded = F.pad(codes, (0, 0, 0, 1))
        index = frame.clamp(0, codes.shape[1])
        found = padded[:, index, quantizer]  # (B, N + 1, K)
        ends = (frame == lens.view(-1, 1, 1)) & (quantizer == 0)
        inside = (frame >= 0) & (frame < lens.view(-1, 1, 1))
        return found.masked_fill(ends, self.codebook_size), inside | ends, quantizer

    def inputs(self, targets: Tensor, valid: Tensor, quantizer: Tensor) -> Tensor:
        """Ids that a decoder is given of what was said, (B, N, K): those of `targets` without the last step."""
        given = targets.masked_fill(~valid, self.codebook_size)[:, :-1]
        if self.name != "flatten":
            return given
        shifted = given + quantizer[:-1] * self.codebook_size
        return torch.where(given == self.codebook_size, self.num_quantizers * self.codebook_size, shifted)

    def frames(self, tokens: Tensor, frames: int) -> Tensor:
        """What steps (N, K) have said, as (frames, Q), or (frames, 1) of "valle"."""
        if self.name == "flatten":
            return tokens[: frames * self.num_quantizers, 0].view(frames, self.num_quantizers)
        if self.name == "delay":
            rows = torch.arange(frames, device=tokens.device)[:, None]
            columns = torch.arange(self.num_quantizers, device=tokens.device)
            return tokens[rows + columns, columns]
        return tokens.reshape(-1)[:frames, None]
