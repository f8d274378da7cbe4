"""Who may attend to whom. True means: may attend (as in PyTorch's scaled_dot_product_attention)."""

import torch
from torch import Tensor


def lengths_to_mask(lens: Tensor, size: int) -> Tensor:
    """(B,) lengths -> (B, size), True on valid frames."""
    return torch.arange(size, device=lens.device) < lens[:, None]


def prefix_causal_mask(
    starts: Tensor, prompt_lens: Tensor, query_columns: Tensor, key_columns: Tensor
) -> Tensor:
    """Full attention inside the prompt, causal after it.

    Row i occupies the columns from starts[i]: first its prompt, then its target. Columns before the start are
    padding that nobody sees; columns behind the row's end are later than all its frames, so causality hides them.

    Args:
        starts, prompt_lens: (B,).
        query_columns: (Tq,), key_columns: (Tk,).

    Returns:
        (B, 1, Tq, Tk) bool.
    """
    keys = key_columns.view(1, 1, -1)
    start = starts.view(-1, 1, 1)
    in_prompt = keys < start + prompt_lens.view(-1, 1, 1)
    earlier = keys <= query_columns.view(1, -1, 1)
    return ((keys >= start) & (in_prompt | earlier))[:, None]
