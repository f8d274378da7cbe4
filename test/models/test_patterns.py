"""Grouped codes, delay and flatten: layout, losses, generation."""

import itertools

import pytest
import torch
from test_audio_lm import make_batch, make_model
from test_valle import make_batch as make_text_batch
from test_valle import make_model as make_reader
from test_valle import prompts_of

from valle.generation.sampling import Sampling
from valle.modules.patterns import Pattern
from valle.utils.errors import UserError

Q, V = 3, 20
CASES = [("valle", 2), ("valle", 3), ("delay", 1), ("flatten", 1)]
IDS = [f"{name}-{size}" for name, size in CASES]


@pytest.mark.parametrize("name,size", [("valle", 1), *CASES])
def test_steps_and_back(name, size):
    pattern = Pattern(name, Q, V, size)
    codes = torch.randint(V, (3, 7, Q))
    lens = torch.tensor([7, 4, 1])
    targets, valid, quantizer = pattern.targets(codes, lens)
    for row, n in enumerate(lens.tolist()):
        steps = pattern.steps(n)
        said = pattern.frames(targets[row], n)
        assert torch.equal(said, codes[row, :n] if name != "valle" else codes[row, :n, :1])
        ends = (targets[row] == V) & valid[row]
        assert int(ends.sum()) == 1 and int(valid[row].sum()) == said.numel() + 1
        where = ends.nonzero()[0].tolist()
        assert pattern.place(*where) == (n, 0)
        assert bool(valid[row, :steps].any(1).all())
    heads = Q if name == "flatten" else pattern.slots
    for said in range(Q if name in ("delay", "flatten") else 1):
        steps, predictions = pattern.step_of(torch.arange(7), said)
        assert int(predictions.max()) < heads
        for frame, (step, head) in enumerate(zip(steps.tolist(), predictions.tolist(), strict=True)):
            slot = 0 if name == "flatten" else head  # its one slot is said by the quantizer's own prediction
            assert pattern.place(step, slot) == (frame, said) and (name != "flatten" or head == said)
            assert int(targets[0, step, slot]) == int(codes[0, frame, said])
    inputs = pattern.inputs(targets, valid, quantizer)
    assert inputs.shape == (3, targets.shape[1] - 1, pattern.slots)
    assert int(inputs.max()) < pattern.table_sizes[0] and int(inputs.min()) >= 0


def test_what_the_orders_are():
    codes = torch.tensor([[[1, 2, 3], [4, 5, 6]]])
    lens = torch.tensor([2])
    targets, valid, _ = Pattern("delay", 3, 9).targets(codes, lens)
    shown = targets.masked_fill(~valid, -1)[0].tolist()
    assert shown == [[1, -1, -1], [4, 2, -1], [9, 5, 3], [-1, -1, 6], [-1, -1, -1]]
    targets, valid, quantizer = Pattern("flatten", 3, 9).targets(codes, lens)
    assert targets[0, :, 0].tolist() == [1, 2, 3, 4, 5, 6, 9] and bool(valid.all())
    inputs = Pattern("flatten", 3, 9).inputs(targets, valid, quantizer)
    assert inputs[0, :, 0].tolist() == [1, 11, 21, 4, 14, 24]
    targets, valid, _ = Pattern("valle", 3, 9, 2).targets(codes.repeat(1, 2, 1)[:, :3], torch.tensor([3]))
    assert targets.masked_fill(~valid, -1)[0, :2].tolist() == [[1, 4], [1, 9]]
    for wrong in (("valle", 0), ("delay", 2)):
        with pytest.raises(ValueError, match="group_size is"):
            Pattern(wrong[0], 3, 9, wrong[1])


@pytest.mark.parametrize("name,size", CASES, ids=IDS)
@pytest.mark.parametrize("changes", [{}, {"prepend_bos": True}], ids=["", "bos"])
def test_the_loss_is_that_of_what_is_said(name, size, changes):
    """By hand, from logits over the pattern's steps of each row alone."""
    model = make_model(num_quantizers=Q, codebook_size=V, pattern=name, group_size=size, **changes)
    x, x_lens, y, y_lens = (part.clone() for part in make_batch())
    x, y = x[..., :Q] % V, y[..., :Q] % V
    stage = 1
    result = model(x, x_lens, y, y_lens, "none", stage)
    for row, (s, t) in enumerate(zip(x_lens.tolist(), y_lens.tolist(), strict=True)):
        one = slice(row, row + 1)
        targets, valid, quantizer = model.pattern.targets(y[one, :t], torch.tensor([t]))
        inputs = model.pattern.inputs(targets, valid, quantizer)
        steps = int(valid[0].any(-1).sum()) - 1
        logits = model.ar_logits(x[one, :s], x_lens[one], inputs[:, :steps])[0]  # (N + 1, heads, V + 1)
        expected = 0.0
        for step, slot in valid[0].nonzero().tolist():
            head = step % Q if name == "flatten" else slot
            expected -= float(logits[step, head].detach().log_softmax(-1)[targets[0, step, slot]])
        assert float(result.loss[row].detach()) == pytest.approx(expected, rel=1e-4)
    said = 1 if name == "valle" else Q
    assert result.metrics["ArLoss"][1] == int((said * y_lens + 1).sum())


def by_hand(model, x, x_lens, known, frames, first_logits):
    """Greedy draws in the pattern's order, from logits over the whole sequence each time: (F, Q or 1)."""
    pattern = model.pattern
    codes = known.clone()  # (P, Q), grows by whole frames; what is not said yet is -1
    codes = torch.cat([codes, torch.full((frames, Q), -1)])
    total = len(codes)
    for step in range(int(pattern.whole_steps(torch.tensor(len(known)))), pattern.steps(total)):
        filled = codes.clamp(min=0)[None]
        targets, valid, quantizer = pattern.targets(filled, torch.tensor([total]))
        inputs = pattern.inputs(targets, valid, quantizer)[:, :step]
        logits = first_logits(inputs)[0, -1]  # (heads, V + 1)
        for slot in range(pattern.slots):
            frame, q = pattern.place(step, slot)
            if 0 <= frame < total and codes[frame, q] < 0:
                head = q if pattern.name == "flatten" else slot
                codes[frame, q] = logits[head, :V].argmax()
    return codes[len(known) :]


@pytest.mark.parametrize("name,size", CASES, ids=IDS)
def test_greedy_continuations_by_hand(name, size):
    model = make_model(num_quantizers=Q, codebook_size=V, pattern=name, group_size=size)
    x = torch.randint(V, (6, Q), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        result = model.generate(x, None, 7, temperature=0, min_new_tokens=7)
        lens = torch.tensor([6])
        expected = by_hand(model, x, lens, x[:0], 7, lambda inputs: model.ar_logits(x[None], lens, inputs))
    found = result.codes[0][6:]
    assert found.shape == (7, Q) and result.finish_reasons == ["length"]
    said = 1 if name == "valle" else Q
    assert torch.equal(found[:, :said], expected[:, :said])
    assert len(result.log_probs[0]) == 7 and bool((result.log_probs[0] < 0).all())


@pytest.mark.parametrize("name,size", CASES, ids=IDS)
def test_a_reader_goes_on_from_its_prompt(name, size):
    """Prompts whose last frames are only partly said in whole steps."""
    model = make_reader("valle", 1, pattern=name, group_size=size)
    x, x_lens, y, _ = make_text_batch(model)
    for frames in (4, 5, 0):
        prompt = y[0, :frames]
        with torch.no_grad():
            given = prompt[None] if frames else None
            result = model.generate(x[:1], x_lens[:1], given, None, 6, temperature=0, min_new_tokens=6)
            expected = by_hand(
                model, x, x_lens, prompt, 6, lambda inputs: model.ar_logits(x[:1], x_lens[:1], inputs)
            )
        said = 1 if name == "valle" else Q
        assert torch.equal(result.codes[0][frames:, :said], expected[:, :said]), frames


@pytest.mark.parametrize("name,size", CASES, ids=IDS)
def test_rows_end_by_themselves_and_do_not_mind_their_neighbours(name, size):
    model = make_reader("valle", 1, pattern=name, group_size=size)
    x, x_lens, y, _ = make_text_batch(model)
    prompt, prompt_lens = prompts_of(y)
    with torch.no_grad():  # ends soon
        weight = model.ar_predict_layer.weight.view(model.pattern.heads, V + 1, -1)
        weight[0, V] = weight[0, :V].mean(0)
        weight[0] *= 0.3
    lens, reasons = set(), set()
    for seed in range(4):
        together = model.generate(x, x_lens, prompt, prompt_lens, 40, seed=seed, top_k=0, min_new_tokens=2)
        for row in range(3):
            one = slice(row, row + 1)
            alone = model.generate(
                x[one, : x_lens[row]], None, prompt[one, : prompt_lens[row]], None, 40, seed=seed, top_k=0,
                min_new_tokens=2,
            )  # fmt: skip
            assert torch.equal(together.codes[row], alone.codes[0])
            assert together.finish_reasons[row] == alone.finish_reasons[0]
            new = len(alone.codes[0]) - int(prompt_lens[row])
            assert 2 <= new <= 40 and len(alone.log_probs[0]) == new
            assert (new == 40) == (alone.finish_reasons[0] == "length")
            assert torch.equal(alone.codes[0][: prompt_lens[row]], prompt[row, : prompt_lens[row]])
            assert 0 <= int(alone.codes[0].min()) and int(alone.codes[0].max()) < V
            lens.add(new)
            reasons.add(alone.finish_reasons[0])
    assert len(lens) > 3 and "eos" in reasons


@pytest.mark.parametrize("name,size", CASES, ids=IDS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_in_every_number_format(name, size, dtype):
    model = make_model(d_model=64, num_quantizers=Q, codebook_size=V, pattern=name, group_size=size)
    x = torch.randint(V, (2, 9, Q), generator=torch.Generator().manual_seed(0))
    result = model.generate(x, torch.tensor([9, 5]), 8, seed=0, min_new_tokens=8, dtype=dtype, num_samples=2)
    assert [len(codes) for codes in result.codes] == [17, 17, 13, 13]


@pytest.mark.parametrize(
    "kind,mode,case,stage",
    itertools.product(["valle", "vallf", "notes-on-time"], (0, 1, 2, 4), CASES, (0, 1, 2)),
)
def test_every_prefix_mode_pattern_and_stage_trains_and_generates(kind, mode, case, stage):
    name, size = case
    model = make_reader(kind, mode, pattern=name, group_size=size).train()
    x, x_lens, y, y_lens = make_text_batch(model)
    prompt, prompt_lens = prompts_of(y)
    batch = {
        "x": x,
        "x_lens": x_lens,
        "y": y,
        "y_lens": y_lens,
        "prompts": prompt,
        "prompts_lens": prompt_lens,
    }
    if stage == 2 and name != "valle":
        with pytest.raises(ValueError, match="nothing to train"):
            model.compute_loss(batch, stage)
        return
    output = model.compute_loss(batch, stage)
    output.loss.backward()
    trained = {name for name, _ in model.stage_parameters(stage)}
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved <= trained and len(moved) > 10 and output.num_targets > 0
    if stage == 0:
        result = model.eval().generate(x, x_lens, prompt, prompt_lens, 5, seed=0, min_new_tokens=5)
        assert [len(row) - n for row, n in zip(result.codes, prompt_lens.tolist(), strict=True)] == [5, 5, 5]


def test_what_cannot_be_is_said():
    model = make_model(num_quantizers=Q, codebook_size=V, pattern="delay")
    x = torch.randint(V, (6, Q))
    with pytest.raises(UserError, match="what looks at repetition"):
        model.generate(x, None, 5, sampling=Sampling(repetition_aware=True))
    with pytest.raises(UserError, match="guidance needs"):
        model.generate(x, None, 5, guidance_scale=2.0)
