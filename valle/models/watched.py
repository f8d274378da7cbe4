"""What is watched of an AudioLM beside its loss: top-10 accuracy, and which codes its targets and predictions use.

Everything stays on the model's device, so that nothing waits for it. Names with a star stand for one figure a
quantizer: sums (Q,) or (Q, V) and counts (Q,), as the training engine adds them up.
"""

import torch
from torch import Tensor

TOP = 10  # ArTop10Accuracy and NarTop10Accuracy


@torch.no_grad()
def code_metrics(
    part: str, logits: Tensor, targets: Tensor, valid: Tensor, quantizer: Tensor, shape: tuple[int, int]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Accuracy, by quantizer too for the NAR decoder, and how often each code occurs.

    Args:
        part: "Ar" or "Nar".
        logits: (B, T, V), or (B, T, V + 1) with the end.
        targets: (B, T) codes.
        valid: (B, T) bool: which targets there are.
        quantizer: (B,) of each row.
        shape: (Q, V).

    Returns:
        name -> (sum, count).
    """
    top = logits.topk(min(TOP, logits.shape[-1]), -1).indices  # (B, T, 10), the likeliest first
    correct, frames = ((top == targets[..., None]).any(-1) & valid).sum(1), valid.sum(1)  # (B,)
    counts = _by_quantizer(frames, quantizer, shape[0])
    predicted = top[..., 0]
    found = {
        f"{part}Top10Accuracy": (correct.sum(), frames.sum()),
        "codes_used_q*": (_occurrences(targets, valid, quantizer, shape), counts),
        "codes_predicted_q*": (
            _occurrences(predicted, valid & (predicted < shape[1]), quantizer, shape), counts
        ),
    }  # fmt: skip
    if part == "Nar":
        found["NarTop10Accuracy_q*"] = (_by_quantizer(correct, quantizer, shape[0]), counts)
    return found


def _by_quantizer(rows: Tensor, quantizer: Tensor, num_quantizers: int) -> Tensor:
    """(B,) -> (Q,): the sum over the rows of each quantizer."""
    return rows.new_zeros(num_quantizers).index_add_(0, quantizer, rows)


def _occurrences(codes: Tensor, valid: Tensor, quantizer: Tensor, shape: tuple[int, int]) -> Tensor:
    """(B, T) -> (Q, V): how often each code occurs in the rows of each quantizer."""
    places = (quantizer[:, None] * shape[1] + codes).where(valid, 0)
    counts = torch.zeros(shape[0] * shape[1], dtype=torch.long, device=codes.device)
    return counts.index_add_(0, places.flatten(), valid.flatten().long()).view(shape)
