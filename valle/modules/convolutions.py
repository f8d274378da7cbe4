"""Frame-rate convolutions of the project's own codec: ConvNeXt blocks over (B, T, D).

Source: ConvNeXt (arXiv 2201.03545, section 2), in one dimension as in Vocos (arXiv 2306.00814, section 3.2).
"""

import torch
from torch import Tensor, nn


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution over time, then a pointwise network, added to the input.

    Args:
        dim: width D.
        kernel_size: frames that the depthwise convolution sees (odd).
        expansion: width of the pointwise network relative to D.
        scale: initial weight of the branch, so that a deep stack starts close to the identity.
    """

    def __init__(self, dim: int, kernel_size: int, expansion: int, scale: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, expansion * dim)
        self.contract = nn.Linear(expansion * dim, dim)
        self.scale = nn.Parameter(torch.full((dim,), scale))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        inside = x if mask is None else x * mask
        branch = self.depthwise(inside.transpose(1, 2)).transpose(1, 2)  # (B, T, D)
        branch = self.contract(nn.functional.gelu(self.expand(self.norm(branch))))
        return x + self.scale * branch


class ConvNeXtStack(nn.Module):
    """(B, T, in_dim) -> (B, T, dim): an input convolution, `depth` blocks, and a final normalization."""

    def __init__(self, in_dim: int, dim: int, depth: int, kernel_size: int, expansion: int = 3) -> None:
        super().__init__()
        self.embed = nn.Conv1d(in_dim, dim, kernel_size, padding=kernel_size // 2)
        self.norm = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(
            ConvNeXtBlock(dim, kernel_size, expansion, 1.0 / depth) for _ in range(depth)
        )
        self.final_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Frames of `x` where `mask`, (B, T, 1) of 0 and 1, is 0 lie beyond the row's end; None: none does."""
        inside = x if mask is None else x * mask
        x = self.norm(self.embed(inside.transpose(1, 2)).transpose(1, 2))
        for block in self.blocks:
            x = block(x, mask)
        return self.final_norm(x)
