"""The CPU's own kernels against plain PyTorch: values, gradients, who sees whom, and what is random."""

import pytest
import torch
from torch.nn import functional as F

from valle import native
from valle.models import AudioLM
from valle.modules import cpu
from valle.modules.embeddings import RotaryPositions, rotate

pytestmark = pytest.mark.skipif(not cpu.serves(torch.zeros(1)), reason="no x86 CPU with oneDNN")
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
HEADS, SIZE = 3, 8


@pytest.fixture(autouse=True, params=["native", "of PyTorch"])
def kernels(request, monkeypatch):
    """Everything with the kernels in C and without them."""
    if request.param == "of PyTorch":
        monkeypatch.setattr(native, "available", lambda: False)
    elif not native.available():
        pytest.skip(native.state())


def close(ours, theirs, dtype):
    error = (
        ours.detach().float() - theirs.detach().float()
    ).abs().max() / theirs.detach().float().abs().max()
    assert float(error) < TOLERANCES[dtype], float(error)


def plain_attention(qkv, rotation, rows, scale):
    outputs = []
    for start, prompt, length in rows.spans():
        query, key, value = qkv[start : start + length].permute(1, 2, 0, 3)
        if rotation is not None:
            turn = tuple(part[start : start + length][None] for part in rotation)
            query, key = rotate(query[None], turn)[0], rotate(key[None], turn)[0]
        index = torch.arange(length)
        mask = (index < prompt) | (index <= index[:, None])
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        outputs.append(out.transpose(0, 1).reshape(length, -1))
    return torch.cat(outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize("keeps", [True, False], ids=["kept", "again"])
@pytest.mark.parametrize(
    "lens,prompts", [((30, 30), (12, 12)), ((1, 45, 7), (1, 20, 0)), ((90,), (90,)), ((90,), (3,))]
)
def test_attention_over_rows(monkeypatch, dtype, rotates, keeps, lens, prompts):
    monkeypatch.setattr(cpu, "QUERY_BLOCK", 16)
    monkeypatch.setattr(cpu, "KEPT_BYTES", 1 << 30 if keeps else 0)
    torch.manual_seed(0)
    rows, frames = cpu.Rows(list(lens), list(prompts)), sum(lens)
    positions = torch.cat([torch.arange(n) for n in lens])
    cosine, sine = RotaryPositions(SIZE)(positions)
    rotation = (cosine[0, 0], sine[0, 0]) if rotates else None
    qkv = torch.randn(frames, 3, HEADS, SIZE).to(dtype).requires_grad_()
    above = torch.randn(frames, HEADS * SIZE).to(dtype)
    before = qkv.detach().clone()
    ours = cpu.attend_rows(qkv, rotation, rows, 0.3)
    (ours_grad,) = torch.autograd.grad(ours, qkv, above)
    assert torch.equal(qkv, before), "the input is left alone"
    exact = qkv.detach().float().requires_grad_()
    theirs = plain_attention(exact, rotation, rows, 0.3)
    (theirs_grad,) = torch.autograd.grad(theirs, exact, above.float())
    close(ours, theirs, dtype)
    close(ours_grad, theirs_grad, dtype)


@pytest.mark.parametrize("keeps", [True, False], ids=["kept", "again"])
def test_dropout_of_attention(monkeypatch, keeps):
    monkeypatch.setattr(cpu, "QUERY_BLOCK", 16)
    monkeypatch.setattr(cpu, "KEPT_BYTES", 1 << 30 if keeps else 0)
    rows = cpu.Rows([30, 11], [12, 0])
    qkv = torch.randn(41, 3, HEADS, SIZE, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def attend(x, seed, dropout=0.25):
        torch.manual_seed(seed)
        return cpu.attend_rows(x, None, rows, 0.3, dropout)

    assert torch.equal(attend(qkv, 1), attend(qkv, 1))
    assert not torch.equal(attend(qkv, 1), attend(qkv, 2))
    plain = plain_attention(qkv, None, rows, 0.3).detach()
    assert torch.allclose(attend(qkv, 1, 0.0), plain, atol=1e-5)
    mean = torch.stack([attend(qkv.detach(), seed) for seed in range(1500)]).mean(0)
    assert float((mean - plain).abs().max()) < 0.1  # 5 deviations of that mean
    # The last row's first frame sees itself alone: it is kept, and scaled, or it is not.
    alone = (attend(qkv, 1)[30].view(HEADS, SIZE) / qkv[30, 2]).detach()
    assert {round(float(x), 3) for x in alone.flatten()} <= {0.0, round(1 / 0.75, 3)}
    above, step = torch.randn(41, HEADS * SIZE), torch.randn_like(qkv)
    (grad,) = torch.autograd.grad(attend(qkv, 3), qkv, above)
    with torch.no_grad():
        ends = [(attend(qkv + sign * 5e-3 * step, 3) * above).sum() for sign in (1, -1)]
    assert float((grad * step).sum()) == pytest.approx(float(ends[0] - ends[1]) / 1e-2, rel=1e-2)


def test_a_model_drops_attention_in_training_alone():
    torch.manual_seed(0)
    model = AudioLM(16, 2, 1, num_quantizers=1, codebook_size=8, dropout=0.0, attention_dropout=0.5)
    codes, lens = torch.randint(8, (2, 9, 1)), torch.tensor([9, 6])

    def losses():
        return [float(model(codes, lens, codes, lens, train_stage=1)[1]) for _ in range(2)]

    first, second = losses()
    assert first != second
    model.eval()
    first, second = losses()
    assert first == second


def test_long_float32_rows_go_head_by_head():
    """Past the size at which products are made by oneDNN."""
    torch.manual_seed(0)
    rows = cpu.Rows([150, 100], [70, 100])
    qkv = torch.randn(250, 3, HEADS, SIZE, requires_grad=True)
    above = torch.randn(250, HEADS * SIZE)
    ours, theirs = cpu.attend_rows(qkv, None, rows, 0.3), plain_attention(qkv, None, rows, 0.3)
    close(ours, theirs, torch.float32)
    close(*(torch.autograd.grad(out, qkv, above)[0] for out in (ours, theirs)), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(dtype, bias):
    torch.manual_seed(0)
    x = torch.randn(3, 50, 96).to(dtype).requires_grad_()
    weight, offset = (
        torch.randn(40, 96).to(dtype).requires_grad_(),
        torch.randn(40).to(dtype).requires_grad_(),
    )
    inputs = (x, weight, offset) if bias else (x, weight)
    above = torch.randn(3, 50, 40).to(dtype)
    ours, theirs = cpu.linear(*inputs), F.linear(*inputs)
    close(ours, theirs, dtype)
    grads = [torch.autograd.grad(out, inputs, above) for out in (ours, theirs)]
    for mine, reference in zip(*grads, strict=True):
        assert mine.dtype == reference.dtype
        close(mine, reference, dtype)


def test_linear_under_autocast_keeps_gradients_in_the_weights_format():
    weight = torch.randn(8, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = cpu.linear(torch.randn(5, 4), weight)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_the_share_and_the_mean(dtype, p):
    torch.manual_seed(0)
    x = (torch.rand(501, 201) + 0.5).to(dtype).requires_grad_()  # a size that is no multiple of 8
    y = cpu.drop(x, p)
    kept = (y != 0).float().mean()
    level = round(p * 256) / 256
    assert float(kept) == pytest.approx(1 - level, abs=0.005)
    assert float(y.float().mean()) == pytest.approx(float(x.float().mean()), rel=0.01)
    torch.testing.assert_close(y[y != 0].float(), x[y != 0].float() / (1 - level), rtol=1e-2, atol=1e-2)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(grad != 0, y != 0)
    assert not torch.equal(cpu.drop(x, p) != 0, y != 0), "drawn anew each time"


def test_dropout_follows_the_seed_and_its_ends():
    x = torch.ones(1000)
    torch.manual_seed(3)
    first = cpu.drop(x, 0.3)
    torch.manual_seed(3)
    assert torch.equal(cpu.drop(x, 0.3), first)
    assert cpu.drop(x, 0.0) is x and not cpu.drop(x, 1.0).any()


def test_scale_rows():
    torch.manual_seed(0)
    rows = cpu.Rows([3, 1, 6], [3, 1, 6])
    inputs = [torch.randn(10, 4), torch.randn(3, 4), torch.randn(3, 4)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    which = torch.tensor([0] * 3 + [1] + [2] * 6)
    above = torch.randn(10, 4)
    ours = cpu.scale_rows(*inputs, rows)
    theirs = inputs[0] * inputs[1][which] + inputs[2][which]
    torch.testing.assert_close(ours, theirs)
    for mine, reference in zip(
        *(torch.autograd.grad(out, inputs, above) for out in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize(
    "changes", [{}, {"qk_norm": True}, {"norm_first": False}, {"position": "sine"}, {"prepend_bos": True}]
)
@pytest.mark.parametrize("stage", [1, 2])
def test_the_model_has_the_same_loss_and_gradients_without_them(monkeypatch, changes, stage):
    """Packed rows against padded ones with a mask, in a ragged batch with a gap to fill."""
    torch.manual_seed(0)
    model = AudioLM(32, 4, 2, num_quantizers=3, codebook_size=20, dropout=0.0, **changes)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    batch = {
        "x": torch.randint(20, (3, 9, 3)), "x_lens": torch.tensor([9, 4, 7]), "y": torch.randint(20, (3, 12, 3)),
        "y_lens": torch.tensor([5, 12, 1]), "prefix_lens": torch.tensor([9, 2, 7]),
    }  # fmt: skip
    results = []
    for served in (True, False):
        if not served:
            monkeypatch.setattr(cpu, "serves", lambda x: False)
        model.zero_grad()
        torch.manual_seed(1)
        loss = model.compute_loss(batch, stage).loss
        loss.backward()
        results.append(
            (loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        )
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    for name, grad in results[0][1].items():
        torch.testing.assert_close(grad, results[1][1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_checkpointed_layers_give_the_same_gradients():
    torch.manual_seed(0)
    model = AudioLM(32, 4, 2, num_quantizers=2, codebook_size=20, dropout=0.2)
    batch = {"x": torch.randint(20, (2, 6, 2)), "x_lens": torch.tensor([6, 3])}
    batch |= {"y": torch.randint(20, (2, 8, 2)), "y_lens": torch.tensor([4, 8])}
    grads = []
    for again in (False, True):
        model.ar_decoder.checkpoint_layers = again
        model.zero_grad()
        torch.manual_seed(1)
        model.compute_loss(batch, 1).loss.backward()
        grads.append(model.ar_decoder.layers[0].linear1.weight.grad.clone())
    assert torch.equal(*grads)
