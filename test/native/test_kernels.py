"""The kernels in C against PyTorch in float32: every shape of edge, every number format, any number of threads."""

import pytest
import torch
from torch.nn import functional as F

from valle import native
from valle.models import AudioLM
from valle.modules import cpu

pytestmark = pytest.mark.skipif(not native.available(), reason=native.state())
BF16 = torch.bfloat16
# rows, columns, inner: less than a tile, tiles and a rest, more than a block of A and a group of B's panels
SHAPES = [
    (1, 1, 2),
    (7, 70, 34),
    (64, 64, 64),
    (13, 130, 66),
    (200, 257, 100),
    (5, 16, 1000),
    (301, 2100, 640),
]


def close(ours, theirs, dtype, floor=1e-5):
    """Within the rounding of the result's format, and float32's of its sums."""
    scale = float(theirs.abs().max())
    torch.testing.assert_close(
        ours.float(), theirs, rtol=2**-8 if dtype == BF16 else 1e-5, atol=floor * scale
    )


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("weights", [torch.float32, BF16])
@pytest.mark.parametrize("shape", SHAPES)
def test_product(shape, weights, dtype, threads):
    rows, columns, inner = shape
    torch.manual_seed(0)
    a, b, bias = (
        torch.randn(rows, inner).to(BF16),
        torch.randn(columns, inner).to(weights),
        torch.randn(columns),
    )
    exact = a.float() @ b.to(BF16).float().t()
    close(native.product(a, b, bias, dtype), exact + bias, dtype)
    close(native.product(a, b.t().contiguous(), None, dtype, by_rows=True), exact, dtype)


@pytest.mark.parametrize("with_sums", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 31, 333])
@pytest.mark.parametrize("shape", [(1, 1), (6, 64), (97, 65), (200, 130)])
def test_product_of_columns(shape, rows, with_sums, threads):
    torch.manual_seed(0)
    a, b = torch.randn(rows, shape[0]).to(BF16), torch.randn(rows, shape[1]).to(BF16)
    for dtype in (torch.float32, BF16):
        product, sums = native.product_of_columns(a, b, dtype, with_sums)
        close(product, a.float().t() @ b.float(), dtype)
        assert (sums is None) == (not with_sums)
        if sums is not None:
            close(sums, a.float().sum(0), torch.float32)


def test_products_of_slices_read_nothing_beside_them():
    torch.manual_seed(0)
    a, b = torch.full((40, 100), torch.nan).to(BF16), torch.full((50, 90), torch.nan)
    a[:, 10:76], b[:, 20:86] = torch.randn(40, 66).to(BF16), torch.randn(50, 66)
    a, b = a[:, 10:76], b[:, 20:86]
    close(native.product(a, b), a.float() @ b.to(BF16).float().t(), BF16)
    close(
        native.product_of_columns(a, b[:40].to(BF16))[0],
        a.float().t() @ b[:40].to(BF16).float(),
        torch.float32,
    )


def test_infinities_and_nans_come_through():
    a, b = torch.ones(40, 64).to(BF16), torch.ones(64, 64)
    a[3, 5], b[7, 9] = torch.inf, torch.nan
    product = native.product(a, b)
    assert (
        product[3].isinf().sum() == 63
        and product[:, 7].isnan().all()
        and int(product.isfinite().sum()) == 39 * 63
    )


def test_results_do_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    a, b, g = torch.randn(333, 256).to(BF16), torch.randn(520, 256), torch.randn(333, 520).to(BF16)
    rows = cpu.Rows([200, 133], [50, 133])
    qkv = torch.randn(333, 3, 2, 32).to(BF16)
    found = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        torch.manual_seed(1)
        x = torch.randn(333, 64).requires_grad_()
        with torch.autocast("cpu", BF16):
            kept, normal = cpu.normalize(x, torch.ones(2, 64), torch.zeros(2, 64), 1e-5, rows)
        leaf = qkv.clone().requires_grad_()
        out = cpu.attend_rows(leaf, None, rows, 0.2, 0.3)
        (kept.sum() + normal.float().square().sum() + out.float().square().sum()).backward()
        found.append(
            [
                native.product(a, b),
                *native.product_of_columns(g, a, with_sums=True),
                normal,
                x.grad,
                out,
                leaf.grad,
            ]
        )
    torch.set_num_threads(1)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize("name,function", [("relu", F.relu), ("gelu", F.gelu)])
@pytest.mark.parametrize("count", [1, 17, 63, 64, 1000])
def test_activations(name, function, count):
    torch.manual_seed(0)
    x = (4 * torch.randn(count)).to(BF16)
    x[0] = 0
    exact = x.float().requires_grad_()
    y = function(exact)
    above = torch.randn(count).to(BF16)
    (grad,) = torch.autograd.grad(y, exact, above.float())
    close(native.activate_and_drop(name, x, 0, 0), y.detach(), BF16, 2e-6)
    close(native.activate_and_drop(name, above, 0, 0, x), grad, BF16, 2e-6)
    # Dropped alike in both directions: by one seed.
    keep = native.drop(torch.ones(count), 100, 5)
    close(native.activate_and_drop(name, x, 100, 5), y.detach() * keep, BF16, 2e-6)
    close(native.activate_and_drop(name, above, 100, 5, x), grad * keep, BF16, 2e-6)


def test_gelu_at_its_ends():
    x = torch.tensor([-1e30, -100.0, 100.0, 1e30, torch.inf, torch.nan]).to(BF16)
    y = native.activate_and_drop("gelu", x, 0, 0)
    assert torch.equal(y[:5], torch.tensor([0.0, 0.0, 100.0, 1e30, torch.inf]).to(BF16)) and y[5].isnan()
    slope = native.activate_and_drop("gelu", torch.ones_like(x), 0, 0, x)
    assert torch.equal(slope[:4], torch.tensor([0.0, 0.0, 1.0, 1.0]).to(BF16))


def test_a_number_that_is_none_stays_one_in_attention():
    qkv = torch.randn(80, 3, 2, 8).to(BF16)
    qkv[5, 1, 0, 3] = torch.nan  # a key of the first head
    out = cpu.attend_rows(qkv, None, cpu.Rows([80], [70]), 0.3).view(80, 2, 8)
    assert out[:, 0].isnan().all() and out[:, 1].isfinite().all()


def test_what_is_dropped_is_random():
    ones = torch.ones(1 << 18)
    kept = torch.stack([native.drop(ones, 77, seed) > 0 for seed in (0, 1, 2, 1 << 32, 2**63)]).float()
    share = 1 - 77 / 256
    assert (kept.mean(1) - share).abs().max() < 5 * (share * (1 - share) / ones.numel()) ** 0.5
    between = torch.corrcoef(kept) - torch.eye(5)
    assert between.abs().max() < 5 / ones.numel() ** 0.5, "one seed says nothing about another"
    for lag in (1, 2, 3, 4, 16, 63, 64, 1024):
        pair = torch.stack([kept[0, :-lag], kept[0, lag:]])
        assert float(torch.corrcoef(pair)[0, 1].abs()) < 5 / ones.numel() ** 0.5


@pytest.mark.parametrize("dtypes", [(torch.float32, BF16), (BF16, torch.float32), (BF16, BF16)])
def test_drop_and_add(dtypes):
    torch.manual_seed(0)
    x, other = (torch.randn(37, 53).to(dtype).requires_grad_() for dtype in dtypes)
    above = torch.randn(37, 53)
    y = cpu.drop_and_add(x, 0.25, other)
    assert y.dtype == torch.promote_types(*dtypes)
    to_x, to_other = torch.autograd.grad(y, (x, other), above.to(y.dtype))
    assert to_x.dtype == dtypes[0] and to_other.dtype == dtypes[1]
    keep = (to_x != 0).float() / 0.75
    close(y.detach(), x.detach().float() * keep + other.detach().float(), y.dtype)
    assert 0.7 < float((keep > 0).float().mean()) < 0.8
    close(to_other, above.to(to_other.dtype).float(), BF16)


@pytest.mark.parametrize("size", [8, 50, 64])
@pytest.mark.parametrize("by_row", [True, False])
def test_normalize(size, by_row):
    torch.manual_seed(0)
    rows = cpu.Rows([40, 1, 33], [40, 1, 33])
    which = torch.tensor([0] * 40 + [1] + [2] * 33) if by_row else torch.zeros(74, dtype=torch.long)
    x = (5 + 3 * torch.randn(74, size)).requires_grad_()
    weight, bias = (torch.randn(3 if by_row else 1, size).requires_grad_() for _ in range(2))
    above, beside = torch.randn(74, size).to(BF16), torch.randn(74, size)
    kept, ours = cpu.normalize(x, weight, bias, 1e-5, rows if by_row else None)
    theirs = F.layer_norm(x, (size,)) * weight[which] + bias[which]
    close(ours.detach(), theirs.detach(), BF16)
    one = torch.autograd.grad((kept, ours), (x, weight, bias), (beside, above))
    other = torch.autograd.grad((x * 1, theirs), (x, weight, bias), (beside, above.float()))
    for mine, reference in zip(one, other, strict=True):
        close(mine, reference, torch.float32, 1e-4)


def test_a_normalization_whose_result_is_not_used_passes_the_gradient():
    x = torch.randn(5, 8).requires_grad_()
    kept, _ = cpu.normalize(x, torch.ones(1, 8), torch.zeros(1, 8), 1e-5)
    kept.square().sum().backward()
    assert torch.equal(x.grad, 2 * x.detach())


def test_dropped_attention_is_that_of_its_own_weights():
    """With values that are the identity, the output shows the weights that were kept."""
    torch.manual_seed(0)
    frames, level = 64, 128
    qkv = torch.randn(frames, 3, 1, frames).to(BF16)
    qkv[:, 2, 0] = torch.eye(frames)
    rows = cpu.Rows([frames], [frames])
    whole = cpu.attend_rows(qkv, None, rows, 0.1, 0.0).float()
    part = cpu.attend_rows(qkv, None, rows, 0.1, level / 256).float()
    kept = part != 0
    assert abs(float(kept.float().mean()) - 0.5) < 0.05
    torch.testing.assert_close(part[kept], 2 * whole[kept], rtol=1e-2, atol=1e-4)


def test_a_training_step_is_that_of_pytorch(monkeypatch):
    """Loss and gradients of a whole model in bfloat16, with the kernels and without, beside those in float32."""
    torch.manual_seed(0)
    model = AudioLM(64, 4, 3, num_quantizers=3, codebook_size=40, dropout=0.0)
    batch = {
        "x": torch.randint(40, (3, 50, 3)), "x_lens": torch.tensor([50, 14, 37]), "y": torch.randint(40, (3, 61, 3)),
        "y_lens": torch.tensor([25, 61, 2]),
    }  # fmt: skip
    found = {}
    for name in ("exact", "native", "of PyTorch"):
        with monkeypatch.context() as patch:
            if name == "of PyTorch":
                patch.setattr(native, "available", lambda: False)
            model.zero_grad()
            torch.manual_seed(1)
            with torch.autocast("cpu", BF16, enabled=name != "exact"):
                loss = model.compute_loss(batch, 0).loss
            loss.backward()
            found[name] = (
                torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]),
                loss,
            )
    exact, scale = found["exact"], found["exact"][0].norm()
    errors = {name: float((found[name][0] - exact[0]).norm() / scale) for name in ("native", "of PyTorch")}
    assert errors["native"] < 0.02 and errors["native"] < 1.2 * errors["of PyTorch"], errors
    assert abs(float(found["native"][1] - exact[1])) < 2e-3 * float(exact[1])
