"""What is watched beside the loss, against plain loops over frames."""

import pytest
import torch

from valle.models import AudioLM
from valle.models.watched import TOP, code_metrics

B, T, Q, V = 5, 7, 4, 40


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(B, T, V + 1, generator=draw)
    targets = torch.randint(0, V, (B, T), generator=draw)
    # A few easy ones, and a place where the end is the likeliest.
    logits[0].scatter_(1, targets[0][:, None], 9.0)
    logits[1, 2, V] = 20.0
    lens = torch.tensor([7, 4, 1, 6, 7])
    return logits, targets, torch.arange(T) < lens[:, None], torch.tensor([1, 3, 3, 1, 0])


def test_counts_are_those_of_a_loop(batch):
    logits, targets, valid, quantizer = batch
    found = code_metrics("Nar", logits, targets, valid, quantizer, (Q, V))
    used, predicted = torch.zeros(Q, V), torch.zeros(Q, V)
    correct, frames = torch.zeros(Q), torch.zeros(Q)
    for b in range(B):
        for t in range(T):
            if valid[b, t]:
                q, code, best = (
                    int(quantizer[b]),
                    int(targets[b, t]),
                    logits[b, t].sort(descending=True).indices,
                )
                used[q, code] += 1
                frames[q] += 1
                correct[q] += code in best[:TOP].tolist()
                if best[0] < V:
                    predicted[q, best[0]] += 1
    for name, total in (
        ("codes_used_q*", used),
        ("codes_predicted_q*", predicted),
        ("NarTop10Accuracy_q*", correct),
    ):
        assert torch.equal(found[name][0].float(), total), name
        assert torch.equal(found[name][1].float(), frames), name
    total, count = found["NarTop10Accuracy"]
    assert (int(total), int(count)) == (int(correct.sum()), 25)
    assert predicted.sum() == 24, "the end is no code"


def test_a_training_step_tells_every_quantizers_accuracy_and_codes():
    torch.manual_seed(0)
    model = AudioLM(32, 4, 1, num_quantizers=Q, codebook_size=V).train()
    x, y = torch.randint(0, V, (2, 16, 6, Q)), torch.randint(0, V, (2, 16, 9, Q))
    x_lens, y_lens = torch.full((16,), 6), torch.full((16,), 9)
    metrics = model(x[0], x_lens, y[0], y_lens).metrics
    counts = metrics["codes_used_q*"][1].tolist()
    assert counts[0] == 16 * 9 and sum(counts[1:]) == 16 * 9 and all(count % 9 == 0 for count in counts)
    assert metrics["NarTop10Accuracy_q*"][1].tolist() == [0, *counts[1:]]
    assert torch.equal(metrics["codes_used_q*"][0][0], torch.bincount(y[0][..., 0].flatten(), minlength=V))
    model.eval()
    metrics = model(x[0], x_lens, y[0], y_lens).metrics
    assert metrics["codes_used_q*"][1].tolist() == [16 * 9] * Q
    for quantizer in range(Q):
        expected = torch.bincount(y[0][..., quantizer].flatten(), minlength=V)
        assert torch.equal(metrics["codes_used_q*"][0][quantizer], expected)
    # Ten of forty codes by chance.
    for total, count in zip(*metrics["NarTop10Accuracy_q*"], strict=True):
        assert count == 0 or 0.05 < float(total / count) < 0.5
