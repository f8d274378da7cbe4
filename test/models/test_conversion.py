"""Checkpoints of the first VALL-Es, against plain code for their documented formulas, by their own parameter names."""

import math
import pathlib

import pytest
import torch
from torch.nn import functional as F

from valle.config import ModelConfig, ValleConfig
from valle.models import build_model
from valle.models.conversion import convert, read_foreign
from valle.utils.errors import UserError

D, NAR, HEADS, LAYERS, Q, V, TEXT = 24, 12, 2, 2, 3, 10, 9
FIELDS, WIDTHS = (6, 5, 7), (4, 3, 5)


class Weights(dict):
    """Random tensors, made when first asked for: `w("a.b", 3, 4)`."""

    def __init__(self, seed):
        super().__init__()
        self.draw = torch.Generator().manual_seed(seed)

    def __call__(self, name, *shape, positive=False):
        if name not in self:
            value = 0.4 * torch.randn(*shape, generator=self.draw)
            self[name] = value.abs() + 0.5 if positive else value
        assert self[name].shape == shape
        return self[name]


def layer_norm(w, name, x, condition=None):
    dim = x.shape[-1]
    if condition is None:
        return F.layer_norm(x, (dim,), w(f"{name}.weight", dim), w(f"{name}.bias", dim))
    scale, shift = linear(w, f"{name}.project_layer", condition, 2 * dim).chunk(2, -1)
    return scale * layer_norm(w, f"{name}.norm", x) + shift


def linear(w, name, x, out, bias=True):
    return F.linear(x, w(f"{name}.weight", out, x.shape[-1]), w(f"{name}.bias", out) if bias else None)


def attention(w, name, x, memory, heads, mask):
    dim = x.shape[-1]
    weight, bias = w(f"{name}.in_proj_weight", 3 * dim, dim), w(f"{name}.in_proj_bias", 3 * dim)
    q = F.linear(x, weight[:dim], bias[:dim])
    k, v = (F.linear(memory, weight[i * dim : (i + 1) * dim], bias[i * dim : (i + 1) * dim]) for i in (1, 2))
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(0, 1) for part in (q, k, v))
    scores = q @ k.transpose(1, 2) / math.sqrt(dim // heads)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return linear(w, f"{name}.out_proj", (scores.softmax(-1) @ v).transpose(0, 1).flatten(1), dim)


def decoder(w, name, x, heads, layers, pre, mask=None, condition=None, memory=None):
    """(T, D) -> (T, D)."""
    dim = x.shape[-1]
    for number in range(layers):
        at = f"{name}.layers.{number}"
        steps = [lambda x, at=at: attention(w, f"{at}.self_attn", x, x, heads, mask)]
        if memory is not None:
            steps.append(lambda x, at=at: attention(w, f"{at}.multihead_attn", x, memory, heads, None))
        steps.append(
            lambda x, at=at: linear(w, f"{at}.linear2", F.relu(linear(w, f"{at}.linear1", x, 4 * dim)), dim)
        )
        for index, step in enumerate(steps, 1):
            norm = f"{at}.norm{index}"
            x = (
                x + step(layer_norm(w, norm, x, condition))
                if pre
                else layer_norm(w, norm, x + step(x), condition)
            )
    return layer_norm(w, f"{name}.norm", x, condition) if pre else x


def embed(w, name, x, size, dim):
    return w(f"{name}.word_embeddings.weight", size, dim)[x]


def place(w, name, x):
    """Sinusoids from 0 on."""
    time, dim = x.shape
    angles = torch.arange(time)[:, None] * torch.exp(-math.log(10000.0) * torch.arange(0, dim, 2) / dim)
    table = torch.zeros(time, dim)
    table[:, 0::2], table[:, 1::2] = angles.sin(), angles.cos()
    return x + w(f"{name}.alpha", 1) * table


def small_net(w, name, x):
    if name is None:
        return x
    for number, width in ((0, 256), (3, 256)):
        x = F.relu(linear(w, f"{name}.{number}", x, width))
    return linear(w, f"{name}.6", x, w.dims[name])


def text_net(w, name, x):
    dim = x.shape[-1]
    x = x.T[None]
    for conv, norm in ((1, 2), (5, 6), (9, 10)):
        x = F.conv1d(x, w(f"{name}.{conv}.weight", dim, dim, 5), w(f"{name}.{conv}.bias", dim), padding=2)
        mean, variance = (w(f"{name}.{norm}.running_{what}", dim, positive=True) for what in ("mean", "var"))
        x = F.relu(
            F.batch_norm(x, mean, variance, w(f"{name}.{norm}.weight", dim), w(f"{name}.{norm}.bias", dim))
        )
        w.setdefault(f"{name}.{norm}.num_batches_tracked", torch.tensor(7))
    return linear(w, f"{name}.14", x[0].T, dim)


class Ancestor:
    """The formulas, for one row.

    kind: "valle", "vallf", "midi" or "audio".
    """

    def __init__(self, kind, pre, prenet, bos, seed=0):
        self.kind, self.pre, self.prenet, self.bos = kind, pre, prenet, bos
        self.w = Weights(seed)
        self.w.dims = {
            f"{d}_{n}_prenet": s for d, s in (("ar", D), ("nar", NAR)) for n in ("audio", "prompt")
        }

    def prefix(self, x, part):
        w, dim = self.w, {"ar": D, "nar": NAR}[part]
        if self.kind == "audio":
            out = sum(embed(w, f"{part}_prompt_embeddings.{q}", x[:, q], V, dim) for q in range(Q))
            out = small_net(w, f"{part}_prompt_prenet" if self.prenet else None, out)
            return place(w, f"{part}_prompt_position", out)
        if self.kind == "midi":
            fields = [
                embed(w, f"feat_emb.{f}", x[:, f], n, d)
                for f, (n, d) in enumerate(zip(FIELDS, WIDTHS, strict=True))
            ]
            out = linear(w, f"{part}_text_embedding", torch.cat(fields, -1), dim)
        else:
            out = embed(w, f"{part}_text_embedding", x, TEXT, dim)
        if self.prenet:
            out = text_net(w, f"{part}_text_prenet", out)
        return place(w, f"{part}_text_position", out)

    def ar(self, x, y):
        """Logits behind each input of the audio: the begin symbol, if there is one, and y (T,)."""
        w = self.w
        tokens = F.pad(y, (1, 0), value=V + 1) if self.bos else y
        audio = embed(w, "ar_audio_embedding", tokens, V + 1 + self.bos, D)
        audio = place(w, "ar_audio_position", small_net(w, "ar_audio_prenet" if self.prenet else None, audio))
        prefix = self.prefix(x, "ar")
        causal = torch.ones(len(tokens), len(tokens)).tril().bool()
        if self.kind == "vallf":
            hidden = decoder(w, "ar_decoder", audio, HEADS, LAYERS, self.pre, causal, memory=prefix)
        else:
            n = len(prefix)
            mask = torch.zeros(n + len(tokens), n + len(tokens), dtype=torch.bool)
            mask[:, :n] = True
            mask[n:, n:] = causal
            both = torch.cat([prefix, audio])
            hidden = decoder(w, "ar_decoder", both, HEADS, LAYERS, self.pre, mask)[n:]
        return linear(w, "ar_predict_layer", hidden, V + 1, bias=False)

    def nar(self, x, prompt, y, stage):
        """Logits of quantizer `stage` of y (T, stage); of a prompt (P, Q), all are added up."""
        w = self.w
        sizes = [V + 1] + [V] * (Q - 1)
        tables = [
            w(f"nar_audio_embeddings.{q}.word_embeddings.weight", size, NAR) for q, size in enumerate(sizes)
        ]
        audio = sum(tables[q][y[:, q]] for q in range(stage))
        audio = torch.cat(
            [sum(tables[q][prompt[:, q]] for q in range(Q)) if len(prompt) else audio[:0], audio]
        )
        audio = place(
            w, "nar_audio_position", small_net(w, "nar_audio_prenet" if self.prenet else None, audio)
        )
        prefix = self.prefix(x, "nar")
        conditions = [w(f"nar_stage_embeddings.{q}.word_embeddings.weight", 1, NAR) for q in range(Q - 1)]
        condition, heads = conditions[stage - 1], HEADS // 2
        if self.kind == "vallf":
            hidden = decoder(w, "nar_decoder", audio, heads, 1, self.pre, None, condition, prefix)
        else:
            both = torch.cat([prefix, audio])
            hidden = decoder(w, "nar_decoder", both, heads, 1, self.pre, None, condition)[len(prefix) :]
        outputs = [w(f"nar_predict_layers.{q}.weight", V, NAR) for q in range(Q - 1)]
        return hidden[len(prompt) :] @ outputs[stage - 1].T


CASES = [
    (kind, pre, prenet, bos)
    for kind in ("valle", "vallf", "midi", "audio")
    for pre, prenet, bos in ((True, False, False), (False, True, True), (True, True, True))
]


@pytest.mark.parametrize("kind,pre,prenet,bos", CASES)
def test_converted_weights_give_the_same_logits(kind, pre, prenet, bos):
    ancestor = Ancestor(kind, pre, prenet, bos)
    draw = torch.Generator().manual_seed(1)
    if kind == "audio":
        x = torch.randint(V, (6, Q), generator=draw)
    elif kind == "midi":
        x = torch.stack([torch.randint(size, (6,), generator=draw) for size in FIELDS], -1)
    else:
        x = torch.randint(TEXT, (6,), generator=draw)
    y, prompt = torch.randint(V, (8, Q), generator=draw), torch.randint(V, (4, Q), generator=draw)
    expected = ancestor.ar(x, y[:, 0])
    nar = [ancestor.nar(x, prompt[:0] if kind == "audio" else prompt, y, stage) for stage in range(1, Q)]
    found = convert(dict(ancestor.w), {"nhead": HEADS, "prefix_mode": 1})
    kept = found.config
    assert (kept["norm_first"], kept["add_prenet"], kept["prepend_bos"]) == (pre, prenet, bos)
    assert (kept["decoder_dim"], kept["scale_factor"], kept["num_quantizers"]) == (D, NAR / D, Q)
    assert (kept["num_decoder_layers"], kept["nar_num_decoder_layers"], found.codebook_size) == (LAYERS, 1, V)
    model = build_model((ModelConfig if kind == "audio" else ValleConfig)(**kept), V, found.text)
    model.load_state_dict(found.state)
    model.eval()
    lens, y_lens = torch.tensor([6]), torch.tensor([8])
    with torch.no_grad():
        logits = model.ar_logits(x[None], lens, y[None, :, 0])[0]
        # Without a begin symbol, theirs predict nothing from the prefix.
        assert torch.allclose(logits[0 if bos else 1 :], expected, atol=1e-4)
        for stage in range(1, Q):
            if kind == "audio":
                logits = model.nar_logits(x[None], lens, y[None], y_lens, stage)[0]
            else:
                logits = model.nar_logits(
                    x[None], lens, y[None], y_lens, stage, prompt[None], torch.tensor([4])
                )[0]
            assert torch.allclose(logits, nar[stage - 1], atol=1e-4)


def weights_of(kind="valle"):
    ancestor = Ancestor(kind, True, False, False)
    x = torch.zeros(6, 3, dtype=torch.long) if kind in ("audio", "midi") else torch.zeros(6, dtype=torch.long)
    ancestor.ar(x, torch.zeros(4, dtype=torch.long))
    ancestor.nar(x, torch.zeros(0, Q, dtype=torch.long), torch.zeros(4, Q, dtype=torch.long), 1)
    return dict(ancestor.w)


def test_symbols_have_the_ids_that_they_had():
    """Padding, begin, end, then the table's symbols by name, its own <eps> among them, although no text has it."""
    expected = ["<eps>", "<bos>", "<eos>", "!", "<unused>", "_", "a", "b"]
    for symbols in (["<eps>", "b", "a", "_", "!"], ["!", "_", "a", "b"]):
        found = convert(weights_of(), symbols=symbols)
        assert found.text["symbols"] == expected
        assert found.text["sizes"] == TEXT and found.config["nhead"] == 1
    with pytest.raises(UserError, match="8 symbols, but the model has embeddings for 6; is it the table"):
        convert(weights_of(), symbols=list("abcdefg"))


def test_errors():
    with pytest.raises(UserError, match="these are no weights of a VALL-E"):
        convert({"encoder.weight": torch.zeros(2)})
    weights = weights_of()
    with pytest.raises(UserError, match="has mystery.weight"):
        convert(weights | {"mystery.weight": torch.zeros(1)})
    del weights["ar_decoder.layers.1.norm2.bias"]
    with pytest.raises(UserError, match="lacks ar_decoder.layers.1.norm2.bias"):
        convert(weights)
    weights = {f"module.{name}": value for name, value in weights_of().items()}
    assert convert(weights).state.keys() == convert(weights_of()).state.keys()


def test_nothing_in_a_file_is_run(tmp_path):
    class Sampler:
        def __init__(self):
            self.seen = [1]

    class Evil:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "touched",)

    Sampler.__qualname__, Evil.__qualname__ = "Sampler", "Evil"
    globals()["Sampler"], globals()["Evil"] = Sampler, Evil
    path = tmp_path / "epoch-3.pt"
    contents = {"model": weights_of(), "nhead": 2, "exp_dir": pathlib.Path("/exp"), "sampler": Sampler()}
    torch.save(contents, path)
    state, settings = read_foreign(path)
    assert settings == {"nhead": 2}
    assert all(torch.equal(state[name], value) for name, value in contents["model"].items())
    torch.save({**contents, "sampler": Evil()}, path)
    with pytest.raises(UserError, match="is no checkpoint that can be read"):
        read_foreign(path)
    assert not (tmp_path / "touched").exists()
    path.write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="is no checkpoint that can be read"):
        read_foreign(path)
    with pytest.raises(UserError, match="does not exist"):
        read_foreign(tmp_path / "none.pt")
