"""In-filling of models that read: the text of the whole, and audio on both sides of the gap, each frame at its time."""

import itertools

import pytest
import torch
from test_valle import KINDS, TEXT, Q, V, make_batch, make_model
from torch.nn import functional as F

from valle.models import VALLE, VALLF
from valle.models.builder import TIME_FIELDS
from valle.models.rows import take
from valle.modules.packing import FORMATS
from valle.utils.errors import UserError

# Of 16, 9 and 12 frames: a gap in the middle; none; a gap at the beginning.
PREFIX, SUFFIX = torch.tensor([5, 0, 0]), torch.tensor([4, 0, 3])
MODES = (0, 1, 2, 4)


def infill_batch(model, seed=0):
    """x, x_lens, y, y_lens, and as `ar_logits` takes it what is behind the gaps."""
    x, x_lens, y, y_lens = make_batch(model, seed)
    spoken = y_lens - SUFFIX
    behind = {
        "suffix": take(y, spoken, SUFFIX)[..., 0],
        "suffix_lens": SUFFIX,
        "suffix_starts": spoken,
    }
    return x, x_lens, y, y_lens, behind


def losses(model, batch, prefix=PREFIX, suffix=SUFFIX, **changes):
    """(B,) of both decoders; with prefix_mode 4, prompts are some codes."""
    x, x_lens, y, y_lens = batch[:4]
    other = {
        "y_prompts_codes": y[:, :6].flip(1),
        "y_prompts_lens": torch.tensor([6, 3, 5])[: len(y)],
    } | changes
    return model(x, x_lens, y, y_lens, "none", prefix_lens=prefix, suffix_lens=suffix, **other).loss.detach()


def decoder_inputs(model, decoder, call):
    """What `call` feeds to a decoder: embeddings (B, T, D) and positions; its result."""
    captured = {}

    def keep(module, args, named):
        captured["x"], captured["positions"] = args[0], args[1]
        captured["memory"] = named["memory"]
        if args[0].requires_grad:
            args[0].retain_grad()

    handle = getattr(model, decoder).register_forward_pre_hook(keep, with_kwargs=True)
    result = call()
    handle.remove()
    return captured, result


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_a_gap_are_what_they_were(kind):
    model = make_model(kind)
    x, x_lens, y, y_lens, behind = infill_batch(model)
    with torch.no_grad():
        plain = model.ar_logits(x, x_lens, y[..., 0], y_lens)
        mixed = model.ar_logits(x, x_lens, y[..., 0], y_lens - SUFFIX, **behind)
    torch.testing.assert_close(mixed[1, :10], plain[1, :10], rtol=0, atol=2e-6)
    assert (mixed[0, :12] - plain[0, :12]).abs().amax(-1).min() > 1e-4, "what is behind the gap is heard"


@pytest.mark.parametrize("kind,mode", itertools.product(KINDS, MODES))
def test_a_training_without_gaps_is_bit_equal(kind, mode):
    model = make_model(kind, mode).train()
    batch = make_batch(model)
    none = torch.zeros(3, dtype=torch.long)
    found = []
    for prefix, suffix in ((None, None), (none, none), (torch.tensor([3, 2, 1]), none)):
        torch.manual_seed(7)
        found.append(losses(model, batch, prefix, suffix))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    torch.manual_seed(7)
    filled = losses(model, batch)
    assert not torch.isclose(filled, found[0])[[0, 2]].any()


@pytest.mark.parametrize("kind,mode", itertools.product(KINDS, MODES))
def test_a_row_is_the_same_alone_and_in_a_mixed_batch(kind, mode):
    model = make_model(kind, mode)
    x, x_lens, y, y_lens, _ = infill_batch(model)
    together = losses(model, (x, x_lens, y, y_lens))
    dirty = y.clone()
    for row in range(3):
        dirty[row, y_lens[row] :] = -7
    clean = {"y_prompts_codes": y[:, :6].flip(1)}
    torch.testing.assert_close(losses(model, (x, x_lens, dirty, y_lens), **clean), together)
    for row, (s, t) in enumerate(zip(x_lens.tolist(), y_lens.tolist(), strict=True)):
        one = slice(row, row + 1)
        alone = losses(
            model, (x[one, :s], x_lens[one], y[one, :t], y_lens[one]), PREFIX[one], SUFFIX[one],
            y_prompts_codes=y[one, :6].flip(1), y_prompts_lens=torch.tensor([[6, 3, 5][row]]),
        )  # fmt: skip
        torch.testing.assert_close(alone, together[one], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_from_a_cache_are_the_whole(kind):
    model = make_model(kind)
    x, x_lens, y, y_lens, behind = infill_batch(model)
    prefix = torch.tensor([5, 4, 0])  # of the row without a gap, what has been said
    with torch.no_grad():
        full = model.ar_logits(x, x_lens, y[..., 0], y_lens - SUFFIX, **behind)
        cache = model.ar_decoder.new_cache(3, 60)
        given = y[:, : int(prefix.max()), 0]
        parts = [model.ar_logits(x, x_lens, given, prefix, cache, **behind)]
        rows = torch.arange(3)
        for step in range(4):
            parts.append(model.ar_logits(x, x_lens, y[rows, prefix + step, 0][:, None], None, cache))
    found = torch.cat(parts, 1)
    for row, start in enumerate(prefix.tolist()):
        torch.testing.assert_close(found[row], full[row, start : start + 5], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["valle", "sine", "bos", "vallf", "vallf-sine", "notes-on-time"])
def test_every_frame_stands_at_its_true_time(kind):
    model = make_model(kind)
    x, x_lens, y, y_lens, behind = infill_batch(model)
    captured, _ = decoder_inputs(
        model, "ar_decoder", lambda: model.ar_logits(x, x_lens, y[..., 0], y_lens - SUFFIX, **behind)
    )
    begin = int(model.prepend_bos)
    for row in range(3):
        read = 0 if isinstance(model, VALLF) else int(x_lens[row])
        first = 0 if model.audio_from_zero else read
        frames, suffix = int(y_lens[row]), int(SUFFIX[row])
        times = captured["positions"][row, read : read + frames + begin].tolist()
        last = first + begin + frames
        assert times == [*range(last - suffix, last), *range(first, last - suffix)]
    prompt, prompt_lens = torch.cat([y[:, :5], y[:, 12:]], 1)[:1], torch.tensor([9])
    captured, _ = decoder_inputs(
        model, "nar_decoder",
        lambda: model.nar_logits(
            x[:1], x_lens[:1], y[:1, 5:12], torch.tensor([7]), 1, prompt, prompt_lens, PREFIX[:1]
        ),
    )  # fmt: skip
    read = 0 if isinstance(model, VALLF) else 7
    first = 0 if model.audio_from_zero else read
    times = captured["positions"][0, read:].tolist()
    assert [time - first for time in times] == [*range(5), *range(12, 16), *range(5, 12)]


@pytest.mark.parametrize("kind", ["valle", "bos", "vallf", "notes"])
def test_who_sees_whom(kind):
    """A frame sees text, suffix and what was said before; text and suffix see each other, and nothing that is said."""
    model = make_model(kind)
    x, x_lens, y, _, _ = infill_batch(model)
    x, x_lens = x[:1], x_lens[:1]
    behind = {"suffix": y[:1, 12:, 0], "suffix_lens": SUFFIX[:1], "suffix_starts": torch.tensor([12])}
    begin, read = int(model.prepend_bos), 0 if kind == "vallf" else 7
    outputs = []
    first = model.ar_decoder.layers[0]  # (T, D), or with padding (1, T, D)
    first.register_forward_hook(lambda module, args, out: outputs.append(out.flatten(0, -2)))
    for frame in range(13):
        captured, logits = decoder_inputs(
            model, "ar_decoder", lambda: model.ar_logits(x, x_lens, y[:1, :12, 0], None, **behind)
        )
        logits[0, frame].square().sum().backward()
        seen = captured["x"].grad[0].abs().sum(-1) > 0
        assert seen[: read + 4 + begin + frame].all() and not seen[read + 4 + begin + frame :].any()
    captured, _ = decoder_inputs(
        model, "ar_decoder", lambda: model.ar_logits(x, x_lens, y[:1, :12, 0], None, **behind)
    )
    outputs[-1][: read + 4].square().sum().backward()
    seen = captured["x"].grad[0].abs().sum(-1) > 0
    assert seen[: read + 4].all() and not seen[read + 4 :].any()
    if read:
        captured, _ = decoder_inputs(
            model, "ar_decoder", lambda: model.ar_logits(x, x_lens, y[:1, :12, 0], None, **behind)
        )
        outputs[-1][0].square().sum().backward()
        assert (captured["x"].grad[0, read : read + 4].abs().sum(-1) > 0).all(), "the text sees the suffix"


def test_the_nar_decoder_sees_both_sides_in_the_order_of_time():
    """Attention sees sets: prefix + suffix as prompt is the recording put in order by hand."""
    model = make_model("valle")
    x, x_lens, y, _ = make_batch(model)
    x, x_lens, y = x[:1], x_lens[:1], y[:1]
    with torch.no_grad():
        prompt = torch.cat([y[:, :5], y[:, 12:]], 1)
        logits = model.nar_logits(
            x, x_lens, y[:, 5:12], torch.tensor([7]), 2, prompt, torch.tensor([9]), torch.tensor([5])
        )
        whole = sum(table(y[..., q]) for q, table in enumerate(model.nar_audio_embeddings))
        target = sum(model.nar_audio_embeddings[q](y[:, 5:12, q]) for q in range(2))
        sides, middle = model.nar_segment_embedding.weight
        parts = [model.nar_text_embedding(x), whole[:, :5] + sides, target + middle, whole[:, 12:] + sides]
        condition = model.nar_stage_embeddings[1].weight[None]
        hidden = model.nar_decoder(torch.cat(parts, 1), torch.arange(7 + 16), condition=condition)[:, 12:19]
        expected = model.nar_predict_layers[1](hidden)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_in_the_gap_is_learned_and_no_end(mode):
    model = make_model("valle", mode)
    x, x_lens, y, y_lens, _ = infill_batch(model)
    other = {"prompts": y[:, :6].flip(1), "prompts_lens": torch.tensor([6, 3, 5])}
    batch = {"x": x, "x_lens": x_lens, "y": y, "y_lens": y_lens, "prefix_lens": PREFIX, "suffix_lens": SUFFIX}
    rows = (0, 2)
    result = model.compute_loss({**batch, **other}, 0)
    alone = {name: part[1:2] for name, part in {**batch, **other}.items()}
    plain = model.compute_loss(alone, 0)
    gaps = {0: 7, 2: 9}
    assert plain.metrics["ArLoss"][1] == 10 and result.metrics["ArLoss"][1] == 10 + 7 + 9
    assert result.num_targets == plain.num_targets + Q * (7 + 9)
    expected = float(plain.loss.detach())
    with torch.no_grad():
        for row in rows:
            one, p, s, n = slice(row, row + 1), int(PREFIX[row]), int(SUFFIX[row]), int(y_lens[row])
            text, text_lens, codes = x[one, : x_lens[row]], x_lens[one], y[one, :n]
            middle, gap = codes[:, p : n - s], torch.tensor([gaps[row]])
            logits = model.ar_logits(
                text, text_lens, codes[:, : n - s, 0], None,
                None, codes[:, n - s :, 0], SUFFIX[one], torch.tensor([n - s]),
            )  # fmt: skip
            expected += float(F.cross_entropy(logits[0, p:-1], middle[0, :, 0], reduction="sum"))
            known = torch.cat([codes[:, :p], codes[:, n - s :]], 1)
            for quantizer in range(1, Q):
                logits = model.nar_logits(
                    text, text_lens, middle, gap, quantizer, known, torch.tensor([p + s]), PREFIX[one]
                )
                expected += float(F.cross_entropy(logits[0], middle[0, :, quantizer], reduction="sum"))
    assert float(result.loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_every_parameter_that_a_stage_has_is_trained_by_gaps_too():
    for stage, kind in itertools.product((1, 2), ("valle", "notes", "vallf")):
        model = make_model(kind, 1).train()
        x, x_lens, y, y_lens, _ = infill_batch(model)
        batch = {
            "x": x,
            "x_lens": x_lens,
            "y": y,
            "y_lens": y_lens,
            "prefix_lens": PREFIX,
            "suffix_lens": SUFFIX,
        }
        model.compute_loss(batch, stage).loss.backward()
        trained = dict(model.stage_parameters(stage))
        for name, parameter in model.named_parameters():
            assert name in trained or parameter.grad is None
        table = model.ar_audio_embedding if stage == 1 else model.nar_audio_embeddings[0]
        assert bool(table.weight.grad.abs().sum() > 0)


def test_what_cannot_be_is_named():
    model = make_model()
    batch = make_batch(model)
    for prefix, suffix, message in (
        (None, SUFFIX, "expected both, 3 numbers each"),
        (PREFIX[:2], SUFFIX, "expected both"),
        (PREFIX, SUFFIX + torch.tensor([7, 0, 0]), "together less than the"),
        (PREFIX - 6, SUFFIX, "expected 0 or more"),
        (PREFIX, SUFFIX - 1, "expected 0 or more"),
    ):
        with pytest.raises(UserError, match=message):
            losses(model, batch, prefix, suffix)
    x, x_lens, y, y_lens = batch
    for start, end in ((-1, 3), (3, 3), (5, 3), (3, 17), (0, 16)):
        with pytest.raises(UserError, match=f"gap {start} to {end} in 16 frames"):
            model.infill(x[0], y[0], start, end)
    for changes, message in (
        (dict(start=[1, 2]), "gaps: 2 numbers for 3 recordings"),
        (dict(new_frames=[1, 2]), "new_frames: 2 numbers for 3 recordings"),
        (dict(new_frames=0), "max_new_tokens is 0"),
        (dict(y_lens=torch.tensor([17, 9, 9])), "but the codes have 16 frames"),
        (dict(y_lens=torch.tensor([9, 9])), "lengths: 2 numbers for 3"),
        (dict(y=y[:2]), "3 texts and 2 recordings"),
        (dict(y=y + V), f"expected 0 to {V - 1}"),
        (dict(y=y[..., :2]), "expected .batch, frames, 3 quantizers"),
        (dict(num_samples=0), "num_samples is 0"),
    ):
        with pytest.raises(UserError, match=message):
            model.infill(**({"x": x, "y": y, "start": 1, "end": 3, "x_lens": x_lens} | changes))
    with pytest.raises(UserError, match="no begin symbol and fills no gap at the beginning"):
        make_model("vallf", prepend_bos=False).infill(x[0], y[0], 0, 3)


@pytest.mark.parametrize(
    "changes", [{"pattern": "delay"}, {"pattern": "flatten"}, {"pattern": "valle", "group_size": 2}]
)
def test_other_patterns_do_not_fill(changes):
    model = make_model(share_embedding=False, **changes)
    x, x_lens, y, y_lens = make_batch(model)
    message = f"pattern valle and groups of 1 alone, this one has pattern {changes['pattern']}"
    with pytest.raises(UserError, match=message):
        losses(model, (x, x_lens, y, y_lens))
    with pytest.raises(UserError, match=message):
        losses(model, (x, x_lens, y, y_lens), 0 * PREFIX, 0 * SUFFIX)  # at a training's first step
    with pytest.raises(UserError, match=message):
        model.infill(x[0], y[0], 2, 5)


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize(
    "kind,mode", [*itertools.product(KINDS, (1,)), ("valle", 0), ("valle", 2), ("notes", 4)]
)
def test_gaps_are_filled_and_nothing_else_in_any_batch(kind, mode):
    model = make_model(kind, mode)
    x, x_lens, y, y_lens = make_batch(model)
    starts, ends, news = [5, 2, 0], [12, 3, 9], [7, 4, 2]
    options = {"seed": 3, "top_k": 8}
    together = model.infill(x, y, starts, ends, x_lens, y_lens, new_frames=news, **options)
    assert together.finish_reasons == ["length"] * 3
    for row, (start, end, new) in enumerate(zip(starts, ends, news, strict=True)):
        codes, true = together.codes[row], y[row, : y_lens[row]]
        assert together.prompt_lens[row] == len(true) - (end - start)
        assert len(codes) == len(true) - (end - start) + new and len(together.log_probs[row]) == new
        assert torch.equal(codes[:start], true[:start]) and torch.equal(codes[start + new :], true[end:])
        assert 0 <= int(codes.min()) and int(codes.max()) < V
        alone = model.infill(x[row, : x_lens[row]], true, start, end, new_frames=new, **options)
        assert torch.equal(alone.codes[0], codes)
    again = model.infill(x, y, starts, ends, x_lens, y_lens, new_frames=news, **options)
    assert all(map(torch.equal, again.codes, together.codes))
    other = model.infill(x, y, starts, ends, x_lens, y_lens, new_frames=news, seed=4, top_k=8)
    assert not all(map(torch.equal, other.codes, together.codes))


def test_what_is_read_and_what_is_not():
    model = make_model()
    x, _, y, _ = make_batch(model)
    x, y = x[0], y[0]
    filled = model.infill(x, y, 6, 11, seed=2).codes[0]
    hidden = y.clone()
    hidden[6:11] = -1
    assert torch.equal(model.infill(x, hidden, 6, 11, seed=2).codes[0], filled)
    before, behind, text = y.clone(), y.clone(), x.clone()
    before[3], behind[13], text[2] = (before[3] + 1) % V, (behind[13] + 1) % V, 4 + (text[2] - 3) % (TEXT - 4)
    for other in ((x, before), (x, behind), (text, y)):
        assert not torch.equal(model.infill(*other, 6, 11, seed=2).codes[0][6:11], filled[6:11])


@pytest.mark.parametrize("mode", MODES)
def test_greedy_filling_by_hand(mode):
    model = make_model("valle", mode)
    x, x_lens, y, _ = make_batch(model)
    x, x_lens, y = x[:1], x_lens[:1], y[:1]
    codes, behind = y[:, :6, 0], (y[:, 11:, 0], torch.tensor([5]), torch.tensor([11]))
    known, lens = torch.cat([y[:, :6], y[:, 11:]], 1), torch.tensor([11])
    with torch.no_grad():
        for _ in range(5):
            logits = model.ar_logits(x, x_lens, codes, None, None, *behind)[:, -1, :V]
            codes = torch.cat([codes, logits.argmax(-1)[:, None]], 1)
        target = codes[:, 6:, None]
        for quantizer in range(1, Q):
            logits = model.nar_logits(
                x, x_lens, target, torch.tensor([5]), quantizer, known, lens, torch.tensor([6])
            )
            target = torch.cat([target, logits.argmax(-1, keepdim=True)], -1)
    assert torch.equal(model.infill(x, y, 6, 11, temperature=0).codes[0][6:11], target[0])


@pytest.mark.parametrize("dtype", FORMATS)
def test_every_number_format_and_several_samples(dtype):
    model = make_model("notes")
    x, x_lens, y, y_lens = make_batch(model)
    result = model.infill(x, y, 2, 6, x_lens, y_lens, seed=1, dtype=dtype, num_samples=2)
    assert [len(codes) for codes in result.codes] == [16, 16, 9, 9, 12, 12]
    for row in range(3):
        best, second = result.scores[2 * row : 2 * row + 2]
        assert best >= second


# ---------------------------------------------------------------- what it is for


@pytest.mark.parametrize("kind", ["valle", "clock", "vallf", "notes"])
def test_a_gap_is_filled_with_what_text_and_suffix_say(kind):
    """Two sentences, each said in two ways that the suffix alone tells apart: both are needed to know the middle."""
    draw = torch.Generator().manual_seed(1)
    codes, gap, side = 8, 4, 3
    x = torch.tensor([[4, 5, 6], [6, 4, 5]])[[0, 0, 1, 1]]
    before = torch.randint(codes, (side, 2), generator=draw).expand(4, -1, -1)
    behind = torch.randint(codes, (2, side, 2), generator=draw)[[0, 1, 0, 1]]
    middle = torch.randint(codes, (4, gap, 2), generator=draw)
    cls, settings = VALLE, {"text_sizes": 8}
    if kind == "vallf":
        cls, settings = VALLF, settings | {"prepend_bos": True}
    elif kind == "clock":
        settings |= {"symbol_frames": [3.3] * 8}
    elif kind == "notes":
        sizes = (8, 8, 8, 8, 204, 9)
        x = torch.stack([x, x, x, x, torch.full_like(x, 4), 4 + torch.arange(3).expand(4, 3)], -1)
        settings = {"text_sizes": sizes, "time_fields": TIME_FIELDS, "frame_rate": 3.0}
    y = torch.cat([before, middle, behind], 1)
    lens, text_lens = torch.full((4,), 2 * side + gap), torch.full((4,), 3)
    sides = torch.full((4,), side)
    torch.manual_seed(0)
    model = cls(
        32, 2, 2, num_quantizers=2, codebook_size=codes, dropout=0.0, prefix_mode=1, **settings
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        model(x, text_lens, y, lens, "mean", 0, prefix_lens=sides, suffix_lens=sides).loss.backward()
        optimizer.step()
    model.eval()
    holes = y.clone()
    holes[:, side : side + gap] = 0
    filled = model.infill(x, holes, side, side + gap, temperature=0)
    for row in range(4):
        assert torch.equal(filled.codes[row], y[row])
