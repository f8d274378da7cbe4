"""AudioLM's contract, and a test for each fault known from its ancestors."""

import pytest
import torch
from torch.nn import functional as F

from valle.models import AudioLM
from valle.utils.errors import UserError

V, Q = 50, 4


def make_model(seed=0, **changes):
    torch.manual_seed(seed)
    options = dict(d_model=32, nhead=4, num_layers=2, num_quantizers=Q, codebook_size=V, dropout=0.0)
    model = AudioLM(**{**options, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # away from the flat start, so that inputs matter
            if parameter.dim() >= 2:
                parameter.mul_(3.0)
    return model


def make_batch(seed=0, prompt_lens=(7, 4, 5), target_lens=(6, 9, 3)):
    torch.manual_seed(seed)
    x = torch.randint(V, (len(prompt_lens), max(prompt_lens), Q))
    y = torch.randint(V, (len(target_lens), max(target_lens), Q))
    return x, torch.tensor(prompt_lens), y, torch.tensor(target_lens)


VARIANTS = [
    {},
    {"position": "sine", "activation": "relu"},
    {"norm_first": False},
    {"prepend_bos": True},
    {"add_prenet": True},
    {"share_embedding": True},
    {"nar_scale_factor": 0.5},
    {"qk_norm": True},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a_row_does_not_depend_on_its_neighbours_or_padding(changes):
    model = make_model(**changes)
    x, x_lens, y, y_lens = make_batch()
    together = model(x, x_lens, y, y_lens, reduction="none").loss
    # What stands behind a row's end is no code at all.
    x_dirty, y_dirty = x.clone(), y.clone()
    for row in range(3):
        x_dirty[row, x_lens[row] :] = 99999
        y_dirty[row, y_lens[row] :] = -7
    torch.testing.assert_close(model(x_dirty, x_lens, y_dirty, y_lens, reduction="none").loss, together)
    for row in range(3):
        s, t = int(x_lens[row]), int(y_lens[row])
        one = slice(row, row + 1)
        alone = model(x[one, :s], x_lens[one], y[one, :t], y_lens[one], reduction="none").loss
        torch.testing.assert_close(alone, together[one], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_cached_logits_equal_the_full_forward(changes):
    model = make_model(**changes)
    x, x_lens, y, _ = make_batch()
    with torch.no_grad():
        full = model.ar_logits(x, x_lens, y[..., 0])
        cache = model.ar_decoder.new_cache(3, 40)
        parts = [model.ar_logits(x, x_lens, y[:, :0, 0], cache=cache)]
        parts += [model.ar_logits(x, x_lens, y[:, t : t + 1, 0], cache=cache) for t in range(4)]
        parts.append(model.ar_logits(x, x_lens, y[:, 4:, 0], cache=cache))  # several frames in one step
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-4, atol=1e-4)


def test_ar_attends_fully_in_the_prompt_and_causally_in_the_target():
    model = make_model()
    x, x_lens, y, y_lens = make_batch(prompt_lens=(5,), target_lens=(6,))
    # Gradients tell who sees whom: embed by hand, and look at the input's gradient of each position.
    captured = {}

    def keep(module, args):
        args[0].retain_grad() if args[0].requires_grad else None
        captured["input"] = args[0]

    model.ar_decoder.register_forward_pre_hook(keep)
    for target in range(7):
        logits = model.ar_logits(x, x_lens, y[..., 0])
        logits[0, target].square().sum().backward()
        seen = captured["input"].grad[0].abs().sum(-1) > 0
        assert seen[:5].all(), "every prompt frame is seen"
        assert seen[5 : 5 + target].all() and not seen[5 + target :].any()


def test_the_prompt_sees_itself_both_ways():
    model = make_model()
    x, x_lens, y, _ = make_batch(prompt_lens=(5,), target_lens=(2,))
    changed = x.clone()
    changed[0, 4] = (changed[0, 4] + 1) % V
    outputs = []
    first = model.ar_decoder.layers[0]  # (T, D), or with padding (1, T, D)
    first.register_forward_hook(lambda module, args, out: outputs.append(out.flatten(0, -2)))
    with torch.no_grad():
        model.ar_logits(x, x_lens, y[..., 0]), model.ar_logits(changed, x_lens, y[..., 0])
    assert (outputs[0][0] - outputs[1][0]).abs().max() > 1e-5


def test_nar_sees_both_sides_but_not_the_quantizer_it_predicts():
    model = make_model()
    x, x_lens, y, y_lens = make_batch(prompt_lens=(5,), target_lens=(6,))
    with torch.no_grad():
        before = model.nar_logits(x, x_lens, y, y_lens, 2)
        same, lower = y.clone(), y.clone()
        same[0, 3, 2:] = (same[0, 3, 2:] + 1) % V
        lower[0, 5, 1] = (lower[0, 5, 1] + 1) % V
        assert torch.equal(model.nar_logits(x, x_lens, same, y_lens, 2), before)
        changed = model.nar_logits(x, x_lens, lower, y_lens, 2)
    assert ((changed - before).abs().amax(-1) > 1e-6).all(), "a later frame is seen by all earlier ones"


def test_rows_with_different_quantizers_equal_one_quantizer_each():
    model = make_model()
    x, x_lens, y, y_lens = make_batch()
    mixed = model.nar_logits(x, x_lens, y, y_lens, torch.tensor([3, 1, 2]))
    for row, quantizer in enumerate([3, 1, 2]):
        alone = model.nar_logits(x, x_lens, y, y_lens, quantizer)[row]
        valid = int(y_lens[row])
        torch.testing.assert_close(mixed[row, :valid], alone[:valid], rtol=1e-4, atol=1e-4)


def test_the_first_target_frame_is_trained():
    """Overfitted clips: the ancestor gets 0 of 8 first codes right, since it never trains them."""
    torch.manual_seed(0)
    model = AudioLM(64, 4, 2, num_quantizers=Q, codebook_size=V, dropout=0.0)
    x, y = torch.randint(V, (8, 10, Q)), torch.randint(V, (8, 12, Q))
    x_lens, y_lens = torch.full((8,), 10), torch.full((8,), 12)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        (model.compute_loss(dict(x=x, x_lens=x_lens, y=y, y_lens=y_lens), 0).loss / (8 * 12)).backward()
        optimizer.step()
    generated = model.generate(x, x_lens, max_new_tokens=20, temperature=0)
    for row in range(8):
        assert generated.finish_reasons[row] == "eos", "the end was learned, and is no frame"
        assert torch.equal(generated.codes[row], torch.cat([x[row], y[row]])), f"row {row}"


def test_targets_and_counts_are_exact():
    model = make_model()
    x, x_lens, y, y_lens = make_batch()
    result = model.compute_loss(dict(x=x, x_lens=x_lens, y=y, y_lens=y_lens), 0)
    frames = int(y_lens.sum())
    assert result.num_targets == frames + 3 + (Q - 1) * frames
    with torch.no_grad():
        expected = 0.0
        for row in range(3):
            s, t = int(x_lens[row]), int(y_lens[row])
            one = slice(row, row + 1)
            targets = torch.cat([y[row, :t, 0], torch.tensor([V])])
            logits = model.ar_logits(x[one, :s], x_lens[one], y[one, :t, 0])[0]
            expected += float(F.cross_entropy(logits, targets, reduction="sum"))
            for q in range(1, Q):
                nar = model.nar_logits(x[one, :s], x_lens[one], y[one, :t], y_lens[one], q)[0]
                expected += float(F.cross_entropy(nar, y[row, :t, q], reduction="sum"))
    assert float(result.loss) == pytest.approx(expected, rel=1e-5)


def test_evaluation_is_no_draw():
    model = make_model()
    batch = make_batch()
    torch.manual_seed(1)
    first = model(*batch, train_stage=2).loss
    torch.manual_seed(2)
    assert torch.equal(first, model(*batch, train_stage=2).loss)
    assert (model(*batch).metrics["NarTop10Accuracy_q*"][1] > 0).tolist() == [False, True, True, True]


def test_reductions_agree():
    model = make_model()
    batch = make_batch()
    total, rows = model(*batch).loss, model(*batch, reduction="none").loss
    count = model.compute_loss(dict(zip(("x", "x_lens", "y", "y_lens"), batch, strict=True)), 0).num_targets
    torch.testing.assert_close(rows.sum(), total)
    torch.testing.assert_close(model(*batch, reduction="mean").loss, total / count)


def test_layers_start_different():
    model = AudioLM(32, 4, 3, num_quantizers=2, codebook_size=V)
    for decoder in (model.ar_decoder, model.nar_decoder):
        first, second = (decoder.layers[i].self_attn.in_proj_weight for i in (0, 1))
        assert not torch.equal(first, second)
        assert not torch.equal(decoder.layers[0].linear1.weight, decoder.layers[1].linear1.weight)


def test_stages_train_their_own_half():
    model = make_model()
    names = {stage: {name for name, _ in model.stage_parameters(stage)} for stage in (0, 1, 2)}
    assert names[1] and names[2] and not names[1] & names[2]
    assert names[0] == names[1] | names[2] == {name for name, _ in model.named_parameters()}
    assert all(name.startswith("ar_") for name in names[1]) and all(
        name.startswith("nar_") for name in names[2]
    )
    batch = make_batch()
    for stage, other in ((1, "nar_"), (2, "ar_")):
        model.zero_grad()
        model(*batch, train_stage=stage).loss.backward()
        assert all(p.grad is None for name, p in model.named_parameters() if name.startswith(other))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_type_is_taken(dtype):
    model = make_model()
    x, x_lens, y, y_lens = make_batch()
    expected = model(x, x_lens, y, y_lens).loss
    torch.testing.assert_close(model(x.to(dtype), x_lens, y.to(dtype), y_lens).loss, expected)


def test_the_quick_start_at_its_own_size():
    """As written in the quick start; three layers instead of twelve keep the test short."""
    torch.manual_seed(0)
    model = AudioLM(d_model=1024, nhead=16, num_layers=3, num_quantizers=4)
    model.eval()
    prompt_tokens = torch.randint(2048, (1, 150, 4))
    prompt_lens = torch.tensor([150])
    with torch.no_grad():
        generated = model.inference(
            x=prompt_tokens, x_lens=prompt_lens, max_new_tokens=50, temperature=1.0, top_k=50
        )
    assert generated.shape == (1, 200, 4)
    assert torch.equal(generated[:, :150], prompt_tokens)
    assert int(generated.min()) >= 0 and int(generated.max()) < 2048


def test_exactly_as_many_frames_as_asked():
    model = make_model()
    x, x_lens, _, _ = make_batch()
    for count in (1, 2, 17):
        assert model.inference(x[:1], x_lens[:1], max_new_tokens=count, seed=3).shape == (1, 7 + count, Q)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"top_k": 10, "seed": 7}], ids=str)
def test_a_batch_of_prompts_gives_what_one_by_one_gives(changes, sampling):
    model = make_model(**changes)
    x, x_lens, _, _ = make_batch()
    together = model.inference(x, x_lens, max_new_tokens=12, **sampling)
    assert together.shape == (3, 7 + 12, Q)
    for row in range(3):
        s = int(x_lens[row])
        alone = model.inference(x[row : row + 1, :s], x_lens[row : row + 1], max_new_tokens=12, **sampling)
        assert torch.equal(alone[0], together[row, : s + 12])
        assert not together[row, s + 12 :].any()
        assert torch.equal(alone[0, :s], x[row, :s])


def test_decoding_ends_where_the_end_is_drawn_not_where_it_is_likeliest():
    """One row whose likeliest symbol is always the end, but which is sampled: it may go on."""
    model = make_model()
    with torch.no_grad():
        model.ar_predict_layer.weight.zero_()
        model.ar_predict_layer.weight[V] = 0.02 * model.ar_decoder.norm.weight
    x, x_lens, _, _ = make_batch()
    lengths = [len(model.generate(x[:1], x_lens[:1], 200, top_k=0, seed=s).codes[0]) - 7 for s in range(20)]
    assert max(lengths) > 5, "the end's probability is about 1/51, so most rows go on"
    assert min(lengths) < 200, "and rows end when it is drawn"


def test_bad_codes_are_named():
    model = make_model()
    x, x_lens, y, y_lens = make_batch()
    with pytest.raises(UserError, match="expected 0 to 49"):
        model.inference(torch.full((1, 5, Q), V), torch.tensor([5]), max_new_tokens=1)
    with pytest.raises(UserError, match="4 quantizers"):
        model.inference(x[..., :2], x_lens, max_new_tokens=1)
    with pytest.raises(UserError, match="4 quantizers"):
        model.inference(x.transpose(1, 2), x_lens, max_new_tokens=1)
    with pytest.raises(UserError, match="integer"):
        model.inference(x.float(), x_lens, max_new_tokens=1)
    with pytest.raises(UserError, match="lengths"):
        model(x, x_lens + 9, y, y_lens)
    with pytest.raises(UserError, match="max_new_tokens"):
        model.inference(x, x_lens, max_new_tokens=0)


def test_tables_may_start_from_the_codec():
    """Embeddings keep the geometry of the codec's vectors: distances up to one factor, sums over quantizers too."""
    model = make_model(share_embedding=True)
    codebooks = torch.randn(Q, V, 8) * torch.tensor([4.0, 2.0, 1.0, 0.5]).view(-1, 1, 1)
    model.start_from_codebooks(codebooks)
    codes = torch.randint(V, (20, Q))
    latents = sum(codebooks[q][codes[:, q]] for q in range(Q))
    for tables in ([model.ar_audio_embedding, *model.ar_prompt_embeddings], model.nar_audio_embeddings):
        embedded = sum(table(codes[:, q]) for q, table in enumerate(tables))
        ratios = torch.pdist(embedded) / torch.pdist(latents)
        torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), rtol=1e-4, atol=1e-6)
    assert model.ar_predict_layer.weight is model.ar_audio_embedding.weight


def test_one_quantizer_needs_no_nar():
    model = make_model(num_quantizers=1)
    x, x_lens, _, _ = make_batch()
    assert model.inference(x[..., :1], x_lens, max_new_tokens=3).shape == (3, 10, 1)


def test_dropout_is_off_while_generating_and_back_on_after():
    model = make_model(dropout=0.5).train()
    x, x_lens, _, _ = make_batch()
    first, second = (model.inference(x, x_lens, max_new_tokens=5, temperature=0) for _ in range(2))
    assert torch.equal(first, second) and model.training
