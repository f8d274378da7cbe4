"""Packed copies against the models they were made of, and every kernel against PyTorch's linear layer."""

import copy
import gc
import weakref

import pytest
import torch
from models.test_audio_lm import VARIANTS, V, make_batch, make_model
from torch import nn
from torch.nn import functional as F

from valle import native
from valle.modules import bags, packing
from valle.modules.bags import BagCache
from valle.modules.packing import FORMATS, DynamicInt8, PackedLinear, pack, pack_linear, packed, quantize_rows
from valle.utils.errors import UserError

PROMPTS, FRAMES, CHUNK = (30, 9, 21), 40, 16  # columns 30 to 70: over the ends of three chunks
# Root mean square of the error, by the standard deviation of the logits. The test models' weights are three times what
# training starts from, which makes attention sharp and rounding felt.
NEAR_THE_MODEL = {"fp32": 1e-5, "bf16": 0.04, "int8": 0.08}
STEPS_NEAR_WHOLE = {"fp32": 1e-5, "bf16": 0.04, "int8": 0.04}
ROWS_NEAR_BATCH = {"fp32": 1e-5, "bf16": 0.01, "int8": 0.02}


@pytest.fixture(params=["native", "x86", "plain"])
def kernels(request, monkeypatch):
    """This machine's kernels, and what stands in for them on others."""
    if request.param == "native":
        if not native.available():
            pytest.skip(native.state())
        return request.param
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(bags, "CHUNK", CHUNK)  # many ends of chunks in few frames
    if request.param == "plain":
        monkeypatch.setattr(packing, "on_x86", lambda device: False)
    elif not packing.on_x86(torch.device("cpu")):
        pytest.skip("no x86 CPU")
    return request.param


def error(found, expected):
    """Root mean square, by the standard deviation of what is expected."""
    assert found.shape == expected.shape and found.dtype == expected.dtype == torch.float32
    return float((found - expected).square().mean().sqrt() / expected.std())


def stepwise(model, x, x_lens, y, **infill):
    """`ar_logits`, the prompt first and then frame by frame, from a cache."""
    with torch.inference_mode():
        cache = model.ar_decoder.new_cache(len(x), x.shape[1] + int(model.prepend_bos) + y.shape[1])
        parts = [model.ar_logits(x, x_lens, y[:, :0], cache=cache, **infill)]
        parts += [model.ar_logits(x, x_lens, y[:, t : t + 1], cache=cache) for t in range(y.shape[1])]
    assert isinstance(cache, BagCache)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_steps_of_a_packed_copy_are_the_whole_and_the_model(kernels, changes, dtype):
    model = make_model(**changes)
    x, x_lens, y, _ = make_batch(prompt_lens=PROMPTS, target_lens=(FRAMES,) * 3)
    twin, y = pack(model, dtype), y[..., 0]
    with torch.no_grad():
        original, whole = model.ar_logits(x, x_lens, y), twin.ar_logits(x, x_lens, y)
    steps = stepwise(twin, x, x_lens, y)
    assert error(whole, original) < NEAR_THE_MODEL[dtype]
    assert error(steps, original) < NEAR_THE_MODEL[dtype]
    assert error(steps, whole) < STEPS_NEAR_WHOLE[dtype]
    if dtype == "fp32":
        torch.testing.assert_close(steps, original, atol=1e-4, rtol=1e-4)
    else:
        assert error(steps, original) > 1e-3, "the format is really used"
    for row in (0, 1):  # a single row has kernels of its own
        one, s = slice(row, row + 1), int(x_lens[row])
        alone = stepwise(twin, x[one, :s], x_lens[one], y[one])
        assert error(alone, steps[one]) < ROWS_NEAR_BATCH[dtype]


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_packed_nar_logits_are_the_models(kernels, changes, dtype):
    model = make_model(**changes)
    x, x_lens, y, y_lens = make_batch(prompt_lens=PROMPTS, target_lens=(9, 30, 2))
    twin = pack(model, dtype)
    for prefix_lens in (None, torch.tensor([20, 9, 0])):
        with torch.no_grad():
            found, expected = (m.nar_logits(x, x_lens, y, y_lens, 2, prefix_lens) for m in (twin, model))
        for row, frames in enumerate(y_lens.tolist()):
            assert error(found[row, :frames], expected[row, :frames]) < NEAR_THE_MODEL[dtype]


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_in_filling_through_the_packed_cache(changes, dtype):
    """A gap inside, one at the start, a plain continuation; the prompt crosses a chunk's end."""
    model = make_model(**changes)
    x, x_lens, y, y_lens = make_batch(prompt_lens=PROMPTS, target_lens=(10,) * 3)
    twin, y = pack(model, dtype), y[..., 0]
    infill = dict(prefix_lens=torch.tensor([25, 0, 21]), gap_lens=y_lens)
    with torch.no_grad():
        expected = model.ar_logits(x, x_lens, y, **infill)
        plain = model.ar_logits(x, x_lens, y)
    steps = stepwise(twin, x, x_lens, y, **infill)
    assert error(steps, expected) < NEAR_THE_MODEL[dtype]
    assert all(error(steps[row], plain[row]) > 5 * error(steps[row], expected[row]) for row in (0, 1))
    for row in range(3):
        one, s = slice(row, row + 1), int(x_lens[row])
        given = {name: lens[one] for name, lens in infill.items()}
        alone = stepwise(twin, x[one, :s], x_lens[one], y[one], **given)
        assert error(alone, steps[one]) < ROWS_NEAR_BATCH[dtype]


def test_rows_that_leave_take_nothing_along():
    """Logits after any row was dropped, in the middle of a chunk and at its end, are those of the rows that stay."""
    twin = pack(make_model(), "fp32")
    x, x_lens, y, _ = make_batch(prompt_lens=(30, 9, 21), target_lens=(9,) * 3)
    expected = stepwise(twin, x, x_lens, y[..., 0])
    for row in range(3):
        for when in (0, 1, 2, 3):  # columns 30 to 33
            with torch.inference_mode():
                cache = twin.ar_decoder.new_cache(3, 40)
                given = x_lens.clone()
                twin.ar_logits(x, given, y[:, :0, 0], cache=cache)
                order = [0, 1, 2]
                for frame in range(6):
                    if frame == when:
                        cache.drop(row)
                        order[row] = order[-1]
                        order.pop()
                        assert torch.equal(given, x_lens), (
                            "the caller's lengths are not the cache's to change"
                        )
                    logits = twin.ar_logits(x, given, y[order, frame : frame + 1, 0], cache=cache)[:, 0]
                    torch.testing.assert_close(logits, expected[order, frame + 1], atol=1e-4, rtol=1e-4)


def test_behind_the_prompt_one_frame_at_a_time():
    twin = pack(make_model(), "fp32")
    x, x_lens, y, _ = make_batch()
    with torch.inference_mode():
        cache = twin.ar_decoder.new_cache(3, 40)
        twin.ar_logits(x, x_lens, y[:, :0, 0], cache=cache)
        with pytest.raises(RuntimeError, match="2 frames at once"):
            twin.ar_logits(x, x_lens, y[:, :2, 0], cache=cache)


def test_a_packed_copy_serves_in_and_outside_of_inference_mode():
    """Some layouts are made when they are first needed; where that is must not matter later."""
    x, x_lens, y, _ = make_batch(prompt_lens=(4,), target_lens=(3,))
    for dtype in FORMATS:
        twin = pack(make_model(), dtype)
        steps = stepwise(twin, x, x_lens, y[..., 0])
        with torch.no_grad():
            cache = twin.ar_decoder.new_cache(1, 9)
            first = twin.ar_logits(x, x_lens, y[:, :0, 0], cache=cache)
            second = twin.ar_logits(x, x_lens, y[:, :1, 0], cache=cache)
        torch.testing.assert_close(torch.cat([first, second], 1), steps[:, :2], atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- single layers


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 24), (3, 24), (1, 1, 24), (2, 5, 24), (1, 7, 24)], ids=str)
@pytest.mark.parametrize("dtype", FORMATS)
def test_every_kernel_is_a_linear_layer(kernels, dtype, shape, has_bias):
    torch.manual_seed(0)
    weight, bias = torch.randn(2049, 24) / 24**0.5, torch.randn(2049) if has_bias else None
    layer, x = pack_linear(weight, bias, dtype), torch.randn(shape)
    tolerance = {"fp32": 1e-5, "bf16": 0.04, "int8": 0.05}[dtype]  # of outputs around 1
    before = x.clone()
    with torch.no_grad():
        expected = F.linear(x, weight, bias)
        torch.testing.assert_close(layer(x).float(), expected, atol=tolerance, rtol=tolerance)
        if len(shape) == 2:  # as the steps call them
            for name, function in (("relu", F.relu), ("gelu", F.gelu)):
                found = layer.activated(x, name).float()
                torch.testing.assert_close(found, function(expected), atol=tolerance, rtol=tolerance)
            residual = torch.randn(shape[0], 2049)
            kept = residual.clone()
            found = layer.added(x, residual)
            assert found.dtype == torch.float32 and torch.equal(residual, kept)
            torch.testing.assert_close(found, kept + expected, atol=tolerance, rtol=tolerance)
            half = layer.added(x.half(), residual)  # what the cache of 16 bits gives
            torch.testing.assert_close(half, kept + expected, atol=tolerance + 2e-3, rtol=tolerance)
    assert torch.equal(x, before)
    assert isinstance(layer, PackedLinear) and not list(layer.parameters())


def test_eight_bits_of_a_row_come_from_that_row():
    torch.manual_seed(0)
    weight = torch.randn(6, 40) * torch.tensor([100.0, 1.0, 1e-3, 1.0, 1.0, 0.0])[:, None]
    whole, scale = quantize_rows(weight)
    assert whole.dtype == torch.int8 and whole.abs().amax(1).tolist() == [127] * 5 + [0]
    assert ((whole * scale[:, None] - weight).abs() <= scale[:, None] / 2 * (1 + 1e-5)).all()


@pytest.mark.skipif(not packing.on_x86(torch.device("cpu")), reason="no x86 CPU")
@pytest.mark.parametrize("reduced", [None, True, False])
def test_an_eight_bit_row_does_not_depend_on_its_neighbours(reduced):
    torch.manual_seed(0)
    layer = DynamicInt8(torch.randn(70, 40) / 40**0.5, torch.randn(70))
    if reduced is not None:  # with and without one bit less for the inputs; the machine's own choice first
        layer.reduced = reduced
    x = torch.randn(9, 40) * torch.logspace(-1, 2, 9)[:, None]
    x[0] = 0.0  # no range
    x[1], x[2] = x[1].abs(), -x[2].abs()  # the range always holds 0
    x[3, 0] = 50.0  # an outlier costs its own row precision, no other
    together = layer(x)
    assert torch.equal(layer(x[None])[0], together) and torch.equal(layer(x[:4]), together[:4])
    weight = torch.ops.quantized.linear_unpack(layer.weight)[0].dequantize()
    steps = 127 if layer.reduced else 255
    for row in range(9):
        alone, span = layer(x[row : row + 1])[0], float(x[row].clamp(min=0).max() - x[row].clamp(max=0).min())
        exact = F.linear(x[row], weight, layer.bias)
        # Inputs are wrong by half a step each, in both; so much can add up at the worst.
        bound = 0.51 * span / steps * weight.abs().sum(1) + 1e-4
        assert ((alone - exact).abs() <= bound).all() and ((together[row] - exact).abs() <= bound).all()
        assert (alone - together[row]).square().mean().sqrt() <= 0.3 * span / steps + 1e-6


@pytest.mark.skipif(not packing.on_x86(torch.device("cpu")), reason="no x86 CPU")
def test_eight_bit_products_do_not_overflow():
    """The largest inputs on the largest weights, where 16-bit sums of pairs would clip."""
    weight = torch.ones(32, 4096)
    layer = DynamicInt8(weight, None)
    for rows in (1, 4):
        x = torch.ones(rows, 4096)
        torch.testing.assert_close(layer(x), torch.full((rows, 32), 4096.0), rtol=1e-3, atol=0)


# ---------------------------------------------------------------- the copy and its model


def model_state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("changes", [{}, {"share_embedding": True}, {"add_prenet": True}], ids=str)
def test_packing_changes_nothing_in_the_model(changes, dtype):
    model, untouched = (make_model(**changes, dropout=0.1).train() for _ in range(2))
    names = [name for name, _ in model.named_parameters()]
    twin = packed(model, dtype)
    x, x_lens, y, y_lens = make_batch()
    model.generate(x, x_lens, 3, dtype=dtype)
    assert model.training and not twin.training
    assert all(module.training for module in model.modules())
    assert [name for name, _ in model.named_parameters()] == names
    before, after = model_state(untouched), model_state(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    losses = []
    for one, other in zip(model.modules(), untouched.modules(), strict=True):
        assert vars(one).keys() == vars(other).keys(), (
            "nothing is kept in the model, so copies and files are as before"
        )
    for each in (model, untouched, copy.deepcopy(model)):
        torch.manual_seed(3)
        loss = each(x, x_lens, y, y_lens).loss
        loss.backward()
        torch.optim.SGD(each.parameters(), 1e-3).step()
        losses.append(float(loss.detach()))
        assert all(parameter.grad is not None for parameter in each.parameters())
    assert len(set(losses)) == 1
    one, other = model_state(model), model_state(untouched)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_embeddings_and_norms_are_shared():
    model = make_model()
    for dtype in FORMATS:
        twin = pack(model, dtype)
        ours = {id(parameter) for parameter in model.parameters()}
        names = [name for name, parameter in twin.named_parameters()]
        assert all(id(parameter) in ours for parameter in twin.parameters())
        assert "ar_audio_embedding.weight" in names and "ar_decoder.layers.0.norm1.weight" in names
        assert not [name for name in names if "linear" in name or "in_proj" in name]


def weights_moved(model):
    torch.optim.SGD(model.parameters(), 0.5).step()


def state_loaded(model):
    model.load_state_dict(make_model(seed=1).state_dict())


def state_assigned(model):
    model.load_state_dict(make_model(seed=1).state_dict(), assign=True)


def one_layer_replaced(model):
    model.ar_predict_layer.weight = nn.Parameter(torch.randn(V + 1, 32))


def scaled_while_inferring(model):
    with torch.inference_mode():
        model.ar_decoder.layers[1].linear2.weight.mul_(-1)


@pytest.mark.parametrize(
    "change", [weights_moved, state_loaded, state_assigned, one_layer_replaced, scaled_while_inferring]
)
def test_a_copy_is_made_anew_when_the_weights_have_changed_and_only_then(change):
    model = make_model()
    x, x_lens, y, y_lens = make_batch()
    twins = {dtype: packed(model, dtype) for dtype in FORMATS}
    assert len({id(twin) for twin in twins.values()}) == 3
    model(x, x_lens, y, y_lens).loss.backward()
    model.train()
    model.generate(x, x_lens, 3)
    model.eval()
    with torch.no_grad():
        first = model.ar_logits(x, x_lens, y[..., 0])
    assert all(packed(model, dtype) is twin for dtype, twin in twins.items())
    change(model)
    for dtype, twin in twins.items():
        again = packed(model, dtype)
        assert again is not twin and packed(model, dtype) is again
        with torch.no_grad():
            found, expected = (each.ar_logits(x, x_lens, y[..., 0]) for each in (again, model))
        assert error(found, expected) < NEAR_THE_MODEL[dtype] < error(found, first)


def test_a_copy_goes_with_its_model():
    model = make_model()
    alive = [weakref.ref(model), *(weakref.ref(packed(model, dtype)) for dtype in FORMATS)]
    other = packed(make_model(seed=1), "fp32")
    del model
    gc.collect()
    assert [reference() for reference in alive] == [None] * 4
    assert other is not None


def test_unknown_formats_are_named():
    with pytest.raises(UserError, match="dtype is 'fp16', expected one of fp32, bf16, int8"):
        packed(make_model(), "fp16")
