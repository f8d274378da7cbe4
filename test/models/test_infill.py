"""In-filling: a prompt on both sides of the target, each frame at its true time."""

import math

import pytest
import torch
from test_audio_lm import VARIANTS, Q, V, make_batch, make_model
from torch.nn import functional as F

from valle.models import AudioLM
from valle.utils.errors import UserError

PREFIX = (
    3,
    4,
    0,
    5,
)  # a gap in the middle; a plain continuation; a gap at the start; the suffix is one frame


def infill_batch(seed=0):
    x, x_lens, y, y_lens = make_batch(seed, prompt_lens=(7, 4, 5, 6), target_lens=(6, 9, 3, 5))
    return x, x_lens, y, y_lens, torch.tensor(PREFIX)


def one_row(batch, row):
    x, x_lens, y, y_lens, prefix = batch
    s, t = int(x_lens[row]), int(y_lens[row])
    one = slice(row, row + 1)
    return x[one, :s], x_lens[one], y[one, :t], y_lens[one], prefix[one]


def decoder_inputs(model, decoder, call):
    """What `call` feeds to a decoder: embeddings (B, T, D) and positions; its result."""
    captured = {}

    def keep(module, args):
        captured["x"], captured["positions"] = args[0], args[1]
        if args[0].requires_grad:
            args[0].retain_grad()

    handle = getattr(model, decoder).register_forward_pre_hook(keep)
    result = call()
    handle.remove()
    return captured["x"], captured["positions"], result


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a_row_is_the_same_alone_and_in_a_mixed_batch(changes):
    model = make_model(**changes)
    batch = infill_batch()
    x, x_lens, y, y_lens, prefix = batch
    together = model(x, x_lens, y, y_lens, "none", prefix_lens=prefix).loss
    x_dirty, y_dirty = x.clone(), y.clone()
    for row in range(4):
        x_dirty[row, x_lens[row] :] = 99999
        y_dirty[row, y_lens[row] :] = -7
    torch.testing.assert_close(
        model(x_dirty, x_lens, y_dirty, y_lens, "none", prefix_lens=prefix).loss, together
    )
    for row in range(4):
        *inputs, one = one_row(batch, row)
        alone = model(*inputs, "none", prefix_lens=one).loss
        torch.testing.assert_close(alone, together[row : row + 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_cached_logits_equal_the_full_forward(changes):
    model = make_model(**changes)
    x, x_lens, y, y_lens, prefix = infill_batch()
    infill = dict(prefix_lens=prefix, gap_lens=y_lens)
    with torch.no_grad():
        full = model.ar_logits(x, x_lens, y[..., 0], **infill)
        cache = model.ar_decoder.new_cache(4, 40)
        parts = [model.ar_logits(x, x_lens, y[:, :0, 0], cache=cache, **infill)]
        parts += [model.ar_logits(x, x_lens, y[:, t : t + 1, 0], cache=cache) for t in range(4)]
        parts.append(model.ar_logits(x, x_lens, y[:, 4:, 0], cache=cache))  # several frames in one step
    assert cache.position_shift.tolist() == [4, 0, 5, 1]
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a_continuation_is_bit_equal_with_and_without_prefix_lens(changes):
    model = make_model(**changes)
    x, x_lens, y, y_lens, prefix = infill_batch()
    with torch.no_grad():
        plain = model.ar_logits(x, x_lens, y[..., 0])
        assert torch.equal(model.ar_logits(x, x_lens, y[..., 0], prefix_lens=x_lens, gap_lens=y_lens), plain)
        mixed = model.ar_logits(x, x_lens, y[..., 0], prefix_lens=prefix, gap_lens=y_lens)
        nar, nar_mixed = (model.nar_logits(x, x_lens, y, y_lens, 2, p) for p in (None, prefix))
        assert torch.equal(model.nar_logits(x, x_lens, y, y_lens, 2, x_lens), nar)
    for row, size in enumerate(y_lens.tolist()):
        is_plain = PREFIX[row] == x_lens[row]
        assert torch.equal(mixed[row, :size], plain[row, :size]) == is_plain
        assert torch.equal(nar_mixed[row, :size], nar[row, :size]) == is_plain
    whole, given = (model(x, x_lens, y, y_lens, "none", prefix_lens=p).loss for p in (None, x_lens))
    assert torch.equal(whole, given)


@pytest.mark.parametrize("bos", [False, True])
def test_every_frame_stands_at_its_true_time(bos):
    model = make_model(prepend_bos=bos)
    x, x_lens, y, y_lens, prefix = infill_batch()
    _, positions, _ = decoder_inputs(
        model, "ar_decoder",
        lambda: model.ar_logits(x, x_lens, y[..., 0], prefix_lens=prefix, gap_lens=y_lens),
    )  # fmt: skip
    for row in range(4):
        p, s, g, b = int(prefix[row]), int(x_lens[row]), int(y_lens[row]), int(bos)
        before, behind = list(range(p)), [p + b + g + j for j in range(s - p)]
        expected = before + behind + list(range(p, p + b + g))  # BOS and target
        assert positions[row, : s + b + g].tolist() == expected
        assert sorted(expected) == list(range(s + b + g)), "no time is taken twice or left out"
    _, positions, _ = decoder_inputs(
        model, "nar_decoder", lambda: model.nar_logits(x, x_lens, y, y_lens, 1, prefix)
    )
    for row in range(4):
        p, s, g = int(prefix[row]), int(x_lens[row]), int(y_lens[row])
        expected = [*range(p), *range(p + g, s + g), *range(p, p + g)]
        assert positions[row, : s + g].tolist() == expected


def test_the_middle_is_the_continuation_of_shuffled_columns():
    """Attention sees sets: the NAR decoder gives the same for prefix + suffix as for a prompt put in order by hand."""
    model = make_model()
    x, x_lens, y, y_lens = make_batch(prompt_lens=(7,), target_lens=(6,))
    with torch.no_grad():
        logits = model.nar_logits(x, x_lens, y, y_lens, 2, torch.tensor([3]))
        prompt = sum(table(x[..., q]) for q, table in enumerate(model.nar_audio_embeddings))
        target = sum(model.nar_audio_embeddings[q](y[..., q]) for q in range(2))
        segments = model.nar_segment_embedding.weight
        prompt, target = prompt + segments[0], target + segments[1]
        ordered = torch.cat([prompt[:, :3], target, prompt[:, 3:]], 1)
        condition = model.nar_stage_embeddings[1].weight[None]
        hidden = model.nar_decoder(ordered, torch.arange(13), condition=condition)[:, 3:9]
        torch.testing.assert_close(logits, model.nar_predict_layers[1](hidden), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prefix", [0, 1, 3, 6, 7])
@pytest.mark.parametrize("bos", [False, True])
def test_who_sees_whom(prefix, bos):
    """The target sees prefix and suffix and what precedes it in the target; a first frame nothing of the target."""
    model = make_model(prepend_bos=bos)
    x, x_lens, y, y_lens = make_batch(prompt_lens=(7,), target_lens=(6,))
    prompt = 7 + int(bos)
    infill = dict(prefix_lens=torch.tensor([prefix]), gap_lens=y_lens)
    for target in range(7):
        inputs, _, logits = decoder_inputs(
            model, "ar_decoder", lambda: model.ar_logits(x, x_lens, y[..., 0], **infill)
        )
        logits[0, target].square().sum().backward()
        seen = inputs.grad[0].abs().sum(-1) > 0
        assert seen[:prompt].all(), "both sides are seen"
        assert seen[prompt : prompt + target].all() and not seen[prompt + target :].any()
    inputs, _, logits = decoder_inputs(
        model, "nar_decoder", lambda: model.nar_logits(x, x_lens, y, y_lens, 2, infill["prefix_lens"])
    )
    logits[0, 2].square().sum().backward()
    assert (inputs.grad[0].abs().sum(-1) > 0).all()


@pytest.mark.parametrize(
    ("prefix", "bos", "column"), [(3, False, 2), (0, False, 6), (7, False, 6), (3, True, 7)]
)
def test_the_first_frame_is_predicted_at_the_frame_before_it(prefix, bos, column):
    model = make_model(prepend_bos=bos)
    x, x_lens, y, y_lens = make_batch(prompt_lens=(7,), target_lens=(6,))
    outputs = []
    model.ar_decoder.register_forward_hook(lambda module, args, out: outputs.append(out))
    with torch.no_grad():
        logits = model.ar_logits(x, x_lens, y[..., 0], prefix_lens=torch.tensor([prefix]), gap_lens=y_lens)
        torch.testing.assert_close(logits[:, 0], model.ar_predict_layer(outputs[0][:, column]))
        rest = outputs[0][:, 7 + int(bos) :]
        torch.testing.assert_close(logits[:, 1:], model.ar_predict_layer(rest))


def test_the_length_of_the_gap_is_heard():
    model = make_model()
    x, x_lens, y, _ = make_batch(prompt_lens=(7,), target_lens=(6,))
    with torch.no_grad():
        short, long = (
            model.ar_logits(
                x, x_lens, y[:, :2, 0], prefix_lens=torch.tensor([3]), gap_lens=torch.tensor([gap])
            )
            for gap in (2, 30)
        )
    assert (short - long).abs().max() > 1e-4


def test_a_filled_gap_has_no_end_to_learn():
    model = make_model()
    batch = infill_batch()
    x, x_lens, y, y_lens, prefix = batch
    result = model.compute_loss(dict(x=x, x_lens=x_lens, y=y, y_lens=y_lens, prefix_lens=prefix), 0)
    frames = int(y_lens.sum())
    assert result.num_targets == frames + 1 + (Q - 1) * frames, "only row 1 continues its prompt to an end"
    assert result.metrics["ArLoss"][1] == frames + 1 and result.metrics["ArTop10Accuracy"][1] == frames
    expected = 0.0
    with torch.no_grad():
        for row in range(4):
            one_x, s, one_y, t, p = one_row(batch, row)
            logits = model.ar_logits(one_x, s, one_y[..., 0], prefix_lens=p, gap_lens=t)[0]
            targets = one_y[0, :, 0]
            if PREFIX[row] == int(s):
                targets = torch.cat([targets, torch.tensor([V])])
            expected += float(F.cross_entropy(logits[: len(targets)], targets, reduction="sum"))
            for q in range(1, Q):
                logits = model.nar_logits(one_x, s, one_y, t, q, p)[0]
                expected += float(F.cross_entropy(logits, one_y[0, :, q], reduction="sum"))
    assert float(result.loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_contradictory_lengths_are_refused():
    model = make_model()
    x, x_lens, y, y_lens, prefix = infill_batch()
    for wrong in (prefix + 3, prefix - 1, prefix[:2]):
        with pytest.raises(UserError, match="prefix_lens"):
            model(x, x_lens, y, y_lens, prefix_lens=wrong)
    with pytest.raises(ValueError, match="gap_lens"):
        model.ar_logits(x, x_lens, y[..., 0], prefix_lens=prefix)


@pytest.mark.parametrize("stage", [1, 2])
def test_what_only_the_suffix_tells_is_learned(stage):
    """The middle repeats the suffix, which is drawn anew each time: blind to it, ln(8) nats a frame is the least."""
    codes, gap = 8, 3
    torch.manual_seed(0)
    model = AudioLM(32, 2, 2, num_quantizers=2, codebook_size=codes, dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    lens, gaps = torch.full((32,), 2 + gap), torch.full((32,), gap)

    def loss():
        x = torch.randint(codes, (32, 2 + gap, 2))
        y = x[:, 2:].clone()
        if stage == 2:  # the quantizer below, which the NAR decoder reads, tells nothing
            y[..., 0] = torch.randint(codes, (32, gap))
        return model(x, lens, y, gaps, "mean", stage, torch.full((32,), 2)).loss

    for _ in range(250):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        reached = sum(float(loss()) for _ in range(5)) / 5
    assert reached < 0.2 * math.log(codes)
