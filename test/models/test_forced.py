"""Logits for true codes, which evaluation scores: those of training, each given what the model would know then."""

import pytest
import torch
from test_audio_lm import make_model as make_audio_lm
from test_valle import TEXT
from test_valle import make_model as make_reader
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from valle.models.prompts import make_prompts

Q, V = 3, 20
PATTERNS = [("valle", 1), ("valle", 2), ("valle", 3), ("delay", 1), ("flatten", 1)]
IDS = [f"{name}-{size}" for name, size in PATTERNS]
KINDS = {
    "audio-lm": {},
    "audio-lm-bos": {"prepend_bos": True},
    "valle": {},
    "valle-clock": {"symbol_frames": [1.5] * TEXT},
    "vallf": {"prepend_bos": True},
}
LENS = (7, 9, 4)
PROMPT_LENS = (5, 2, 4)


def make(kind, case, mode=1):
    settings = {"num_quantizers": Q, "codebook_size": V, "pattern": case[0], "group_size": case[1]}
    if kind.startswith("audio-lm"):
        return make_audio_lm(**settings, **KINDS[kind]).double()
    return make_reader(kind.split("-")[0], mode, **settings, **KINDS[kind]).double()


def rows(model, seed=0):
    """Prompts, texts (None where none is read) and targets, row by row."""
    draw = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(V, (n, Q), generator=draw) for n in PROMPT_LENS]
    targets = [torch.randint(V, (n, Q), generator=draw) for n in LENS]
    texts = [torch.randint(TEXT, (n,), generator=draw) for n in (6, 8, 3)]
    return prompts, texts if hasattr(model, "text_sizes") else None, targets


@torch.no_grad()
def forced(model, prompts, texts, targets):
    """Quantizer by quantizer (B, T, V), without the end."""
    y, lens = pad_sequence(targets, batch_first=True), torch.tensor([len(row) for row in targets])
    found = list(model.forced_logits(make_prompts(prompts, texts), y, lens))
    assert len(found) == Q and all(part.shape[:2] == y.shape[:2] for part in found)
    return found


def nats(logits, codes):
    return float(F.cross_entropy(logits[: len(codes)], codes, reduction="sum"))


@pytest.mark.parametrize("case", PATTERNS, ids=IDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [0, 1])
def test_rows_in_a_batch_are_the_rows_alone(kind, case, mode):
    model = make(kind, case, mode)
    prompts, texts, targets = rows(model)
    together = forced(model, prompts, texts, targets)
    for row, target in enumerate(targets):
        one = slice(row, row + 1)
        alone = forced(model, prompts[one], texts and texts[one], targets[one])
        for quantizer in range(Q):
            assert together[quantizer][row, : len(target)].allclose(alone[quantizer][0], atol=1e-9)


@pytest.mark.parametrize("case", PATTERNS, ids=IDS)
@pytest.mark.parametrize("kind", KINDS)
def test_codes_cost_what_training_counts_for_them(kind, case):
    """A stage's loss is that of the codes, and of the end that each row's last frame is followed by."""
    model = make(kind, case, mode=0)
    name, size = case
    prompts, texts, targets = rows(model)
    y, lens = pad_sequence(targets, batch_first=True), torch.tensor(LENS)
    if texts is None:
        given = pad_sequence(prompts, batch_first=True), torch.tensor(PROMPT_LENS)
    else:  # there, what training reads as one utterance is a prompt of nothing and its target
        given = pad_sequence(texts, batch_first=True), torch.tensor([len(text) for text in texts])
        prompts = [prompt[:0] for prompt in prompts]
    logits = forced(model, prompts, texts, targets)
    by_ar = range(1 if name == "valle" else Q)
    with torch.no_grad():
        first = model(*given, y, lens, "none", 1)
        second = model(*given, y, lens, "none", 2).loss if name == "valle" else torch.zeros(3)
    ar = first.predictions["ar"]
    for row, target in enumerate(targets):
        t = len(target)
        where = {"valle": (t // size, t % size), "delay": (t, 0), "flatten": (t * Q, 0)}[name]
        end = ar[row, t] if case == ("valle", 1) else ar[(row, *where)]
        end_nats = -float(end.log_softmax(-1)[V])
        found = [nats(logits[quantizer][row], target[:, quantizer]) for quantizer in range(Q)]
        assert sum(found[quantizer] for quantizer in by_ar) == pytest.approx(
            float(first.loss[row]) - end_nats
        )
        if name == "valle":
            assert sum(found[1:]) == pytest.approx(float(second[row]))


@pytest.mark.parametrize("case", PATTERNS, ids=IDS)
@pytest.mark.parametrize("kind", ["valle", "vallf"])
def test_a_readers_prompt_is_the_beginning_of_what_it_says(kind, case):
    """Wherever an utterance is divided, the AR decoder says the same of what is behind; the NAR of mode 0 too."""
    model = make(kind, case, mode=0)
    _, texts, targets = rows(model)
    whole = forced(model, [target[:0] for target in targets], texts, targets)
    cut = (3, 4, 1)
    prompts = [target[:n] for target, n in zip(targets, cut, strict=True)]
    rest = [target[n:] for target, n in zip(targets, cut, strict=True)]
    parts = forced(model, prompts, texts, rest)
    for row, n in enumerate(cut):
        for quantizer in range(Q):
            behind = whole[quantizer][row, n : LENS[row]]
            assert parts[quantizer][row, : len(behind)].allclose(behind, atol=1e-9)


@pytest.mark.parametrize("mode", [1, 2])
def test_the_nar_decoder_has_the_prompt_as_in_training(mode):
    """Mode 1: the prompt's text is read too. Mode 2: training has shown none, but then its own part is not known."""
    model = make("valle", ("valle", 1), mode)
    prompts, texts, targets = rows(model)
    found = forced(model, prompts, texts, targets)
    x = pad_sequence(texts, batch_first=True), torch.tensor([len(text) for text in texts])
    y, lens = pad_sequence(targets, batch_first=True), torch.tensor(LENS)
    prompt = pad_sequence(prompts, batch_first=True), torch.tensor(PROMPT_LENS)
    for quantizer in (1, 2):
        with torch.no_grad():
            expected = model.nar_logits(*x, y, lens, quantizer, *prompt)
        assert found[quantizer].allclose(expected)


def known(case, frame, quantizer, of_frame, of_quantizer):
    """Whether a code is known when another one is said, behind a prompt of whole steps."""
    name, size = case
    if name == "delay":
        return frame + quantizer < of_frame + of_quantizer
    if name == "flatten":
        return frame * Q + quantizer < of_frame * Q + of_quantizer
    if of_quantizer == 0:
        return quantizer == 0 and frame // size < of_frame // size
    return quantizer < of_quantizer


@pytest.mark.parametrize("case", PATTERNS, ids=IDS)
@pytest.mark.parametrize("kind", ["audio-lm", "valle"])
def test_each_code_is_said_from_what_is_known_then(kind, case):
    model = make(kind, case)
    draw = torch.Generator().manual_seed(1)
    prompt, target = (torch.randint(V, (n, Q), generator=draw) for n in (6, 8))
    texts = None if kind == "audio-lm" else [torch.randint(TEXT, (5,), generator=draw)]

    def logits(prompt=prompt, texts=texts, target=target):
        return torch.stack([part[0, :, :V] for part in forced(model, [prompt], texts, [target])], 1)

    before = logits()  # (T, Q, V)
    for frame in (0, 3, 7):
        for quantizer in range(Q):
            other = target.clone()
            other[frame, quantizer] = (other[frame, quantizer] + 1) % V
            moved = (logits(target=other) - before).abs().amax(-1) > 1e-9
            expected = [[known(case, frame, quantizer, t, q) for q in range(Q)] for t in range(8)]
            assert moved.tolist() == expected, (frame, quantizer)
    heard = prompt.clone()
    heard[2] = (heard[2] + 1) % V
    assert bool(((logits(prompt=heard) - before).abs().amax(-1) > 1e-9).all())
    if texts is not None:
        read = [(texts[0] + 1) % TEXT]
        assert bool(((logits(texts=read) - before).abs().amax(-1) > 1e-9).all())
