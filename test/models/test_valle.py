"""VALL-E, VALL-F and MIDI-VALLE: logits, losses, prompts, generation."""

import itertools

import pytest
import torch
from synthetic import TINY_CODEBOOK, save_tiny_codec

from valle.codecs import load_codec
from valle.generation.chunks import Chunks
from valle.models import VALLE, VALLF
from valle.models.builder import TIME_FIELDS
from valle.models.rows import join_codes, take, without_prompt_text
from valle.utils.errors import UserError

Q, V, TEXT = 3, 20, 11
NOTE_SIZES = (12, 9, 10, 8, 204, 9)
KINDS = {
    "valle": (VALLE, {}),
    "sine": (VALLE, {"position": "sine", "audio_from_zero": True, "activation": "relu", "norm_first": False}),
    "bos": (VALLE, {"prepend_bos": True}),
    "prenet": (VALLE, {"add_prenet": True}),
    "vallf": (VALLF, {"prepend_bos": True}),
    "vallf-sine": (VALLF, {"prepend_bos": True, "position": "sine", "audio_from_zero": True}),
    "clock": (VALLE, {"symbol_frames": [2.75] * TEXT}),
    "vallf-clock": (VALLF, {"prepend_bos": True, "symbol_frames": [2.75] * TEXT}),
    "notes": (VALLE, {"text_sizes": NOTE_SIZES}),
    "notes-side-by-side": (VALLE, {"text_sizes": NOTE_SIZES, "field_dims": (4, 4, 8, 8, 4, 4)}),
    "notes-on-time": (
        VALLE,
        {"text_sizes": NOTE_SIZES, "time_fields": TIME_FIELDS, "frame_rate": 50.0},
    ),
}


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return load_codec(save_tiny_codec(tmp_path_factory.mktemp("codec")), num_quantizers=Q)


def make_model(kind="valle", prefix_mode=1, **changes):
    torch.manual_seed(0)
    cls, settings = KINDS[kind]
    settings = (
        {"text_sizes": TEXT, "codebook_size": V, "num_quantizers": Q, "dropout": 0.0} | settings | changes
    )
    model = cls(32, 2, 2, prefix_mode=prefix_mode, **settings).eval()
    with torch.no_grad():  # so that everything matters from the start
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return model


def make_batch(model, seed=0):
    draw = torch.Generator().manual_seed(seed)
    sizes = model.text_sizes
    x = torch.stack([torch.randint(4, size, (3, 7), generator=draw) for size in sizes], -1)
    if not model.reads_notes:
        x = x[..., 0]
    y = torch.randint(V, (3, 16, Q), generator=draw)
    return x, torch.tensor([7, 3, 5]), y, torch.tensor([16, 9, 12])


def prompts_of(y):
    return y[:, :5].flip(1), torch.tensor([5, 2, 4])


@pytest.mark.parametrize("kind", KINDS)
def test_frames_see_the_text_and_what_was_before_alone(kind):
    model = make_model(kind)
    x, x_lens, y, y_lens = make_batch(model)
    logits = model.ar_logits(x, x_lens, y[..., 0], y_lens)
    assert logits.shape == (3, 17, V + 1)
    later = y[..., 0].clone()
    later[:, 6] = (later[:, 6] + 1) % V
    changed = model.ar_logits(x, x_lens, later, y_lens)
    assert torch.allclose(logits[:, :7], changed[:, :7], atol=1e-5)
    assert (logits[0, 7:] - changed[0, 7:]).abs().amax(-1).min() > 1e-4
    other = x.clone()
    other[:, 1] = 4 + (other[:, 1] - 3) % 4
    assert not torch.equal(other, x)
    assert (logits - model.ar_logits(other, x_lens, y[..., 0], y_lens)).abs().amax(-1)[0].min() > 1e-5
    padded = x.clone()
    padded[1, 3:] = 5  # behind the row's end
    assert torch.allclose(
        logits[1, :10], model.ar_logits(padded, x_lens, y[..., 0], y_lens)[1, :10], atol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_a_batch_are_the_rows_alone(kind):
    model = make_model(kind)
    x, x_lens, y, y_lens = make_batch(model)
    prompt, prompt_lens = prompts_of(y)
    logits = model.ar_logits(x, x_lens, y[..., 0], y_lens)
    nar = model.nar_logits(x, x_lens, y, y_lens, 2, prompt, prompt_lens)
    for row, (s, t, p) in enumerate(zip(x_lens.tolist(), y_lens.tolist(), prompt_lens.tolist(), strict=True)):
        one = slice(row, row + 1)
        alone = model.ar_logits(x[one, :s], x_lens[one], y[one, :t, 0])
        assert torch.allclose(logits[row, : t + 1], alone[0], atol=1e-4)
        alone = model.nar_logits(
            x[one, :s], x_lens[one], y[one, :t], y_lens[one], 2, prompt[one, :p], prompt_lens[one]
        )
        assert torch.allclose(nar[row, :t], alone[0], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_from_a_cache_are_the_whole(kind):
    """Prompts of different lengths in one batch, filled in at once, then frame by frame."""
    model = make_model(kind)
    x, x_lens, y, _ = make_batch(model)
    lens = torch.tensor([4, 0, 7])
    with torch.no_grad():
        cache = model.ar_decoder.new_cache(3, 40)
        filled = take(y, torch.zeros(3, dtype=torch.long), lens)[..., 0]
        parts = [model.ar_logits(x, x_lens, filled, lens, cache)]
        for step in range(5):
            token = y[torch.arange(3), lens + step, 0][:, None]
            parts.append(model.ar_logits(x, x_lens, token, None, cache))
        found = torch.cat(parts, 1)  # (3, 6, V + 1)
        for row, (s, n) in enumerate(zip(x_lens.tolist(), lens.tolist(), strict=True)):
            one = slice(row, row + 1)
            whole = model.ar_logits(x[one, :s], x_lens[one], y[one, : n + 5, 0])[0]
            assert torch.allclose(found[row], whole[n:], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_nar_sees_text_prompt_and_lower_quantizers(kind):
    model = make_model(kind)
    x, x_lens, y, y_lens = make_batch(model)
    prompt, prompt_lens = prompts_of(y)

    def logits(**changes):
        given = {"x": x, "y": y, "prompt": prompt} | changes
        return model.nar_logits(
            given["x"], x_lens, given["y"], y_lens, 1, given["prompt"], prompt_lens
        ).detach()

    before = logits()
    same, lower = y.clone(), y.clone()
    same[..., 1:] = (same[..., 1:] + 1) % V
    lower[:, 8, 0] = (lower[:, 8, 0] + 1) % V
    assert torch.equal(logits(y=same), before)
    assert (logits(y=lower) - before)[0].abs().amax(-1).min() > 1e-6, "attention both ways"
    heard = prompt.clone()
    heard[:, 1, Q - 1] = (heard[:, 1, Q - 1] + 1) % V
    assert not torch.allclose(logits(prompt=heard), before)
    assert not torch.allclose(logits(x=torch.where(x == 5, 6, x)), before)


@pytest.mark.parametrize("kind,mode,stage", itertools.product(KINDS, (0, 1, 2, 4), (0, 1, 2)))
def test_every_kind_trains_and_generates(kind, mode, stage):
    model = make_model(kind, mode).train()
    x, x_lens, y, y_lens = make_batch(model)
    prompt, prompt_lens = prompts_of(y)
    batch = {
        "x": x,
        "x_lens": x_lens,
        "y": y,
        "y_lens": y_lens,
        "prompts": prompt,
        "prompts_lens": prompt_lens,
    }
    output = model.compute_loss(batch, stage)
    output.loss.backward()
    trained = dict(model.stage_parameters(stage))
    for name, parameter in model.named_parameters():
        used = name in trained
        got = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        if (
            not name.endswith(("in_proj_bias", "alpha"))
            and "norms" not in name
            and "convolutions" not in name
        ):
            assert got or not used or "stage" in name or "predict_layers" in name or "nar_audio" in name, name
        assert used or not got, name
    assert output.num_targets > 0 and output.loss.isfinite()
    if stage == 0:
        model.eval()
        result = model.generate(x, x_lens, prompt, prompt_lens, 6, seed=1, min_new_tokens=6)
        assert [len(row) for row in result.codes] == [11, 8, 10]
        for row, (codes, n) in enumerate(zip(result.codes, prompt_lens.tolist(), strict=True)):
            assert torch.equal(codes[:n], prompt[row, :n])
            assert 0 <= int(codes.min()) and int(codes.max()) < V


@pytest.mark.parametrize("mode", [0, 1, 2, 4])
@pytest.mark.parametrize("kind", ["valle", "vallf", "notes-on-time", "clock", "vallf-clock"])
def test_a_row_generates_the_same_in_any_batch(kind, mode):
    model = make_model(kind, mode)
    x, x_lens, y, _ = make_batch(model)
    prompt, prompt_lens = prompts_of(y)
    own = torch.tensor([2, 1, 2])
    together = model.generate(x, x_lens, prompt, prompt_lens, 12, seed=5, top_k=8, prompt_text_lens=own)
    for row in range(3):
        one = slice(row, row + 1)
        alone = model.generate(
            x[one, : x_lens[row]], None, prompt[one, : prompt_lens[row]], None, 12, seed=5, top_k=8,
            prompt_text_lens=own[one],
        )  # fmt: skip
        assert torch.equal(together.codes[row], alone.codes[0])
        assert together.finish_reasons[row] == alone.finish_reasons[0]


def test_each_row_may_have_its_own_limit():
    model = make_model("valle")
    x, x_lens, _, _ = make_batch(model)
    limits = [4, 9, 6]
    together = model.generate(x, x_lens, max_new_tokens=limits, seed=5, min_new_tokens=9, num_samples=2)
    assert [len(codes) for codes in together.codes] == [4, 4, 9, 9, 6, 6]
    for row, limit in enumerate(limits):
        alone = model.generate(
            x[row, : x_lens[row]], max_new_tokens=limit, seed=5, min_new_tokens=limit, num_samples=2
        )
        assert all(map(torch.equal, together.codes[2 * row : 2 * row + 2], alone.codes))
    with pytest.raises(UserError, match="max_new_tokens: 2 numbers for 3 texts"):
        model.generate(x, x_lens, max_new_tokens=[4, 9])


def test_greedy_generation_by_hand():
    """Quantizer 0 as `ar_logits` over the whole sequence says, the others as `nar_logits`; with and without prompt."""
    model = make_model("valle", 1)
    x, x_lens, y, _ = make_batch(model)
    for prompt in (y[:1, :4], y[:1, :0]):
        given = prompt if prompt.shape[1] else None
        result = model.generate(x[:1], x_lens[:1], given, None, 5, temperature=0, min_new_tokens=5)
        codes = prompt[..., 0]
        with torch.no_grad():
            for _ in range(5):
                logits = model.ar_logits(x[:1], x_lens[:1], codes)[:, -1, :V]
                codes = torch.cat([codes, logits.argmax(-1)[:, None]], 1)
            n = prompt.shape[1]
            target, lens, prompt_lens = codes[:, n:, None], torch.tensor([5]), torch.tensor([n])
            for quantizer in range(1, Q):
                logits = model.nar_logits(x[:1], x_lens[:1], target, lens, quantizer, prompt, prompt_lens)
                target = torch.cat([target, logits.argmax(-1, keepdim=True)], -1)
        assert torch.equal(result.codes[0][n:], target[0])


def test_without_prompts_in_training_a_prompt_is_a_known_beginning():
    """prefix_mode 0: of the prompt, only the quantizers below the one that is predicted are read."""
    model = make_model("valle", 0)
    x, x_lens, y, _ = make_batch(model)
    result = model.generate(x[:1], x_lens[:1], y[:1, :4], None, 5, temperature=0, min_new_tokens=5).codes[0]
    known = torch.cat([y[0, :4], result[4:]])[None]
    with torch.no_grad():
        for quantizer in range(1, Q):
            logits = model.nar_logits(x[:1], x_lens[:1], known[..., :quantizer], torch.tensor([9]), quantizer)
            assert torch.equal(logits.argmax(-1)[0, 4:], result[4:, quantizer])


@pytest.mark.parametrize("mode", [2, 4])
def test_the_prompts_own_text_is_not_read_where_training_had_none(mode):
    model = make_model("valle", mode)
    x, _, y, _ = make_batch(model)
    own = torch.tensor([3])
    options = {"max_new_tokens": 5, "temperature": 0, "min_new_tokens": 5, "prompt_text_lens": own}
    result = model.generate(x[:1], None, y[:1, :4], **options).codes[0]
    with torch.no_grad():
        logits = model.nar_logits(
            x[:1, 3:], torch.tensor([4]), result[None, 4:], torch.tensor([5]), 1, y[:1, :4], torch.tensor([4])
        )
    assert torch.equal(logits.argmax(-1)[0], result[4:, 1])


def test_inference_is_the_continuation_alone():
    model = make_model("valle", 1)
    x, _, y, _ = make_batch(model)
    found = model.inference(x[:1], torch.tensor([7]), y[:1, :4], torch.tensor([2]), top_k=5, seed=3)
    whole = model.generate(x[:1], None, y[:1, :4], None, 16 * 7, top_k=5, seed=3).codes[0]
    assert torch.equal(found, whole[None, 4:])
    with pytest.raises(UserError, match="3 texts, expected 1"):
        model.inference(x, torch.tensor([7, 3, 5]), y[:1, :4])


@pytest.mark.parametrize("kind", ["valle", "vallf", "notes"])
@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("prompted", [True, False])
def test_a_stream_is_what_the_same_chunks_give_at_once(codec, kind, mode, prompted):
    model = make_model(kind, mode, codebook_size=TINY_CODEBOOK)
    x, _, y, _ = make_batch(model)
    chunks = Chunks(4, 1, 30)
    prompt = y[:1, :5] if prompted else None
    stream = model.stream(x[0], codec, prompt, 22, seed=2, min_new_tokens=22, chunks=chunks)
    wav = torch.cat(list(stream), 1)
    whole = model.generate(x[:1], None, prompt, None, 22, seed=2, min_new_tokens=22, chunks=chunks)
    assert torch.equal(stream.generation.codes[0], whole.codes[0])
    expected = codec.decode(whole.codes[0][None])[0, :, (5 if prompted else 0) * codec.hop_length :]
    assert wav.shape == expected.shape
    # At a seam, the last frames of a piece have not heard the next one's.
    assert float((wav - expected).abs().median()) < 0.02 * float(expected.abs().median())


def test_prompts_in_training():
    """Mode 1: beginnings of a quarter to a half; mode 2: stretches inside, whose frames are no targets."""
    y = torch.arange(40).view(1, 40, 1).expand(2, 40, Q).contiguous() % V
    lens = torch.tensor([40, 24])
    model = make_model("valle", 1).train()
    torch.manual_seed(0)
    drawn = set()
    for _ in range(30):
        prompt, prompt_lens, target, target_lens, valid = model._draw_prompts(y, lens, None, None)
        assert torch.equal(prompt_lens + target_lens, lens)
        assert bool((prompt_lens >= lens // 4).all() and (prompt_lens <= lens // 2).all())
        for row in range(2):
            p, t = int(prompt_lens[row]), int(target_lens[row])
            assert torch.equal(torch.cat([prompt[row, :p], target[row, :t]]), y[row, : p + t])
            assert int(valid[row].sum()) == t
        drawn.add(int(prompt_lens[0]))
    assert len(drawn) > 3
    model = make_model("valle", 2, prefix_frames=8).train()
    starts = set()
    for _ in range(30):
        prompt, prompt_lens, target, target_lens, valid = model._draw_prompts(y, lens, None, None)
        assert torch.equal(target, y) and torch.equal(target_lens, lens)
        assert prompt_lens.tolist() == [8, 6]
        for row in range(2):
            n = int(lens[row])
            left = (~valid[row, :n]).nonzero()[:, 0]
            assert len(left) == int(prompt_lens[row]) and bool((left.diff() == 1).all())
            assert torch.equal(prompt[row, : len(left)], y[row, left])
        starts.add(int((~valid[0]).nonzero()[0]))
    assert len(starts) > 3
    model.eval()
    first, second = (model._draw_prompts(y, lens, None, None)[0] for _ in range(2))
    assert torch.equal(first, second), "validation draws nothing"


def test_notes_share_the_audios_clock():
    """A note 0.3 s after the beginning stands where frame 15 stands."""
    model = make_model("notes-on-time")
    notes = torch.full((1, 2, 6), 4)
    notes[0, 1, 4] = 4 + 60  # 60 steps of 5 ms
    notes[0, 1, 5] = 4 + 2
    part = model._text(notes, torch.tensor([2]), "ar")
    assert part.positions.tolist() == [[0.0, pytest.approx(50 * 2.3)]]
    seen = []
    original = model.ar_decoder.forward
    model.ar_decoder.forward = lambda x, positions, *rest, **named: (
        seen.append(positions) or original(x, positions, *rest, **named)
    )
    model.ar_logits(notes, torch.tensor([2]), torch.zeros(1, 3, dtype=torch.long))
    assert seen[0][0].tolist() == [0.0, pytest.approx(115.0), 0.0, 1.0, 2.0]


def test_errors():
    model = make_model()
    x, x_lens, y, y_lens = make_batch(model)
    with pytest.raises(UserError, match=r"text x: ids from 0 to 30, expected 0 to 10"):
        model(x.masked_fill(x == 5, 30), x_lens, y, y_lens)
    with pytest.raises(UserError, match=r"text x: shape \(3, 7, 1\), expected \(batch, symbols\)"):
        model(x[..., None], x_lens, y, y_lens)
    with pytest.raises(UserError, match="text x: lengths"):
        model(x, torch.tensor([7, 0, 5]), y, y_lens)
    with pytest.raises(UserError, match="3 texts and 2 prompts"):
        model.generate(x, x_lens, y[:2, :4])
    with pytest.raises(UserError, match="y_prompts_codes is missing"):
        make_model("valle", 4)(x, x_lens, y, y_lens)
    with pytest.raises(UserError, match="no begin symbol"):
        make_model("vallf", prepend_bos=False).generate(x, x_lens)
    with pytest.raises(UserError, match="guidance cannot be combined with text"):
        from valle.generation.sampling import Sampling
        from valle.models.generating import Generator, make_prompts

        Generator(model, "fp32", Sampling(), 2.0).leg(make_prompts([y[0]], [x[0]]), [None], 3, 0)
    with pytest.raises(ValueError, match="prefix_mode is 3"):
        make_model("valle", 3)


def test_helpers_on_ragged_rows():
    y = torch.arange(10).view(2, 5, 1)
    taken = take(y, torch.tensor([1, 3]), torch.tensor([3, 1]))[..., 0]
    assert taken.tolist() == [[1, 2, 3], [8, 0, 0]]
    joined = join_codes(y, torch.tensor([2, 4]), y + 100, torch.tensor([3, 0]))[..., 0]
    assert joined.tolist() == [[0, 1, 100, 101, 102], [5, 6, 7, 8, joined[1, 4]]]
    x, lens = without_prompt_text(y[..., 0], torch.tensor([5, 4]), torch.tensor([2, 3]), False)
    assert x[0, :3].tolist() == [2, 3, 4] and x[1, :1].tolist() == [8] and lens.tolist() == [3, 1]
    x, lens = without_prompt_text(y[..., 0], torch.tensor([5, 5]), torch.tensor([4, 3]), True)
    assert x[0, :3].tolist() == [0, 3, 4] and x[1, :4].tolist() == [5, 7, 8, 9] and lens.tolist() == [3, 4]
