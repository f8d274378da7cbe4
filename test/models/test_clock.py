"""Where in time the text stands: beside its audio, or by the number of its symbol; and who reads in order."""

import pytest
import torch
from test_valle import NOTE_SIZES, TEXT, Q, V, make_batch, make_model

from valle.config import ValleConfig
from valle.data.midi import FIELDS, NUM_SPECIAL, STEPS_PER_SECOND
from valle.models import VALLE, VALLF, build_model, load_model
from valle.utils.errors import UserError

CASES = [("valle", 1, 1.0), ("valle", 2, 0.5), ("valle", 3, 1 / 3), ("delay", 1, 1.0), ("flatten", 1, 3.0)]
IDS = [f"{name}-{size}" for name, size, _ in CASES]


def seen(decoder, call):
    """The positions that a decoder is given."""
    found = []
    hook = decoder.register_forward_pre_hook(lambda module, args: found.append(args[1]))
    with torch.no_grad():
        call()
    hook.remove()
    (positions,) = found
    return positions


def ar_call(model, x, x_lens, y, y_lens):
    return lambda: model.ar_logits(x, x_lens, *model._steps(y, y_lens))


@pytest.mark.parametrize("name,size,steps", CASES, ids=IDS)
def test_text_and_audio_share_a_clock(name, size, steps):
    model = make_model("clock", pattern=name, group_size=size)
    x, x_lens, y, y_lens = make_batch(model)
    positions = seen(model.ar_decoder, ar_call(model, x, x_lens, y, y_lens))
    steps_lens = model._steps(y, y_lens)[1]
    for row, (s, said) in enumerate(zip(x_lens.tolist(), steps_lens.tolist(), strict=True)):
        expected = torch.cat([2.75 * steps * torch.arange(s), torch.arange(said)])
        assert positions[row, : s + said].allclose(expected)
    if name == "valle":
        prompt, lens = y[:, :4], torch.tensor([4, 2, 3])
        positions = seen(model.nar_decoder, lambda: model.nar_logits(x, x_lens, y, y_lens, 1, prompt, lens))
        for row, (s, p, t) in enumerate(zip(x_lens.tolist(), lens.tolist(), y_lens.tolist(), strict=True)):
            expected = torch.cat([2.75 * torch.arange(s), torch.arange(p + t)])
            assert positions[row, : s + p + t].allclose(expected), (
                "of frames, whatever the AR decoder's steps"
            )


@pytest.mark.parametrize("name,size,steps", CASES, ids=IDS)
def test_notes_and_audio_share_a_clock(name, size, steps):
    model = make_model("notes-on-time", pattern=name, group_size=size)
    x = torch.full((1, 3, len(FIELDS)), NUM_SPECIAL)
    seconds = torch.tensor([0.0, 0.5, 2.25])
    x[0, :, FIELDS.index("second")] += seconds.long()
    x[0, :, FIELDS.index("position")] += ((seconds % 1) * STEPS_PER_SECOND).long()
    assert bool((x < torch.tensor(NOTE_SIZES)).all())
    y, lens = torch.zeros(1, 6, Q, dtype=torch.long), torch.tensor([6])
    positions = seen(model.ar_decoder, ar_call(model, x, torch.tensor([3]), y, lens))[0]
    assert positions[:3].allclose(seconds * 50 * steps)
    assert positions[3:].equal(torch.arange(len(positions) - 3).to(positions)) and len(positions) > 4
    if name == "valle":
        call = lambda: model.nar_logits(x, torch.tensor([3]), y, lens, 1)  # noqa: E731
        assert seen(model.nar_decoder, call)[0, :3].allclose(seconds * 50)


@pytest.mark.parametrize("kind", ["valle", "vallf"])
def test_a_frame_a_symbol_counts_symbols(kind):
    """1 frame a symbol is what counting symbols is, where audio begins at 0; anything else is something else."""
    counted = make_model(kind, audio_from_zero=True)
    x, x_lens, y, y_lens = make_batch(counted)
    expected = counted.ar_logits(x, x_lens, y[..., 0], y_lens)
    for frames, same in ((1.0, True), (2.0, False)):
        clocked = make_model(kind, symbol_frames=[frames] * TEXT)
        clocked.load_state_dict(counted.state_dict())
        found = clocked.ar_logits(x, x_lens, y[..., 0], y_lens)
        assert torch.allclose(found, expected, atol=1e-5) == same


def test_a_begin_symbol_stands_at_zero():
    model = make_model("bos", symbol_frames=[4.0] * TEXT)
    x, x_lens, y, y_lens = make_batch(model)
    positions = seen(model.ar_decoder, ar_call(model, x, x_lens, y, y_lens))
    assert positions[0].tolist() == [*(4.0 * n for n in range(7)), *range(17)]


@pytest.mark.parametrize("kind", ["vallf", "vallf-clock", "vallf-sine"])
def test_the_order_of_what_cross_attention_reads_matters(kind):
    model = make_model(kind)
    _, _, y, y_lens = make_batch(model)
    x, x_lens = torch.tensor([[5, 6, 7, 8, 9]]).repeat(3, 1), torch.full((3,), 5)
    turned = x[:, [0, 3, 2, 1, 4]]
    for logits in (
        lambda text: model.ar_logits(text, x_lens, y[..., 0], y_lens),
        lambda text: model.nar_logits(text, x_lens, y, y_lens, 1),
    ):
        with torch.no_grad():
            assert (logits(x) - logits(turned))[0].abs().amax(-1).min() > 1e-4


def test_cross_attention_knows_how_far_it_reads_not_where():
    """Text and audio moved by as much give the same: positions are relative, as in self-attention."""
    model = make_model("vallf")
    draw = torch.Generator().manual_seed(0)
    x, memory = torch.randn(1, 6, 32, generator=draw), torch.randn(1, 4, 32, generator=draw)
    lens = torch.tensor([4])

    def out(shift, ahead=0.0):
        places = torch.arange(4)[None] + shift + ahead
        with torch.no_grad():
            return model.ar_decoder(
                x, torch.arange(6)[None] + shift, lambda: None, memory=(memory, lens, places)
            )

    assert out(0.0).allclose(out(37.5), atol=1e-4)
    assert not out(0.0).allclose(out(0.0, ahead=3.0), atol=1e-3)


def test_sine_models_turn_nothing():
    """What converted checkpoints have learnt: positions are added to what is read, and nothing is turned."""
    model = make_model("vallf-sine")
    assert model.ar_decoder.rotary is None and model.nar_decoder.rotary is None
    x, memory, lens = torch.randn(1, 6, 32), torch.randn(1, 4, 32), torch.tensor([4])
    places = torch.arange(4)[None]
    with torch.no_grad():
        found = [
            model.ar_decoder(x, torch.arange(6)[None] + n, lambda: None, memory=(memory, lens, places * n))
            for n in (0, 5)
        ]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "frames,message",
    [
        ([0.0] * TEXT, "expected 0 or more each, and not 0 for all"),
        ([1.0] * (TEXT - 1) + [-0.5], "expected 0 or more each, and not 0 for all"),
        ([1.0] * (TEXT - 1), f"{TEXT - 1} symbol_frames, expected one for each symbol of a text"),
        ([], "0 symbol_frames, expected one for each symbol of a text"),
    ],
)
def test_no_time_is_no_clock(frames, message):
    with pytest.raises(ValueError, match=message):
        make_model("valle", symbol_frames=frames)
    with pytest.raises(UserError, match=message):
        build_model(ValleConfig(num_quantizers=Q), V, {"sizes": TEXT, "symbol_frames": frames})


def test_some_symbols_may_take_no_time():
    model = make_model("valle", symbol_frames=[0.0, 1.5, 4.0] + [0.0] * (TEXT - 3))
    assert model.clock(torch.tensor([[0, 1, 2, 0, 0, 1]])).tolist() == [[0.0, 0.0, 1.5, 5.5, 5.5, 5.5]]


@pytest.mark.parametrize("kind,number", [("notes-on-time", 1), ("notes-on-time", TEXT), ("notes", 6)])
def test_notes_have_their_own_clock(kind, number):
    with pytest.raises(ValueError, match=f"{number} symbol_frames, expected one for each symbol of a text"):
        make_model(kind, symbol_frames=[2.0] * number)


@pytest.mark.parametrize("name,cls", [("valle", VALLE), ("vallf", VALLF)])
def test_a_checkpoint_says_which_clock_it_has(name, cls):
    """One that says nothing, as those before there was a clock, counts symbols."""
    settings = {
        "decoder_dim": 32,
        "nhead": 2,
        "num_decoder_layers": 1,
        "num_quantizers": Q,
        "model_name": name,
    }
    config = ValleConfig(**settings, prepend_bos=name == "vallf", share_embedding=False)
    torch.manual_seed(0)
    weights = build_model(config, V, {"sizes": TEXT}).state_dict()
    found = {}
    for clock in ("none", None, 3.5):
        frames = [clock] * TEXT if clock == 3.5 else None
        text = {"sizes": TEXT} | ({} if clock == "none" else {"symbol_frames": frames})
        contents = {
            "config": {"model": vars(config)}, "codec": {"codebook_size": V, "frame_rate": 50.0}, "text": text,
            "model": weights,
        }  # fmt: skip
        model, _ = load_model(contents)
        assert type(model) is cls
        assert model.audio_from_zero == model.has_clock == (clock == 3.5)
        assert (None if model.symbol_frames is None else model.symbol_frames.tolist()) == frames
        x, x_lens, y, y_lens = make_batch(model)
        found[clock] = model.ar_logits(x, x_lens, y[..., 0], y_lens)
        positions = model._text(x, x_lens, "ar").positions[0]
        assert positions.tolist() == [n * (3.5 if clock == 3.5 else 1) for n in range(7)]
    assert torch.equal(found["none"], found[None]) and not torch.allclose(found[None], found[3.5], atol=1e-5)
