"""`tools/convert_checkpoint.py`: checkpoints of the first VALL-Es become ones that generate and can be fine-tuned."""

import importlib.util
import json
import pathlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lhotse import CutSet, SupervisionSegment
from safetensors.torch import save_file
from synthetic import TINY_CODEBOOK, save_tiny_codec, write_tokenized

from valle.bin.infer import main as infer
from valle.bin.trainer import main as train_reader
from valle.bin.trainer_audiolm import main as train
from valle.codecs import codec_info
from valle.codecs.hf import HUB_IDS, PUBLISHED
from valle.data.midi import BOS, EOS, make_midi_tokenizer, make_notes, write_notes
from valle.data.symbols import SymbolTable
from valle.data.text import FOREIGN_TOKENIZERS, make_text_tokenizer
from valle.engine.checkpoint import load_checkpoint
from valle.models import VALLE, AudioLM, load_model
from valle.models.conversion import guess_extractor
from valle.utils.errors import UserError

TOOL = Path(__file__).resolve().parent.parent / "tools" / "convert_checkpoint.py"
D, Q = 16, 4
NOTES, WIDTHS = (92, 68, 1156, 772, 388, 20), (4, 3, 5, 2, 2, 2)
TABLE = "<eps> 0\n! 1\n_ 2\nh 3\noʊ 4\nə 5\nl 6\n"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["convert_checkpoint"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["convert_checkpoint"]


def theirs(kind, size, share=False):
    """Random weights by their names: of "valle", "midi" or "audio", one layer."""
    draw = torch.Generator().manual_seed(4)
    state = {}

    def put(name, *shape):
        state[name] = 0.2 * torch.randn(*shape, generator=draw)

    def norm(name, adaptive):
        inner = f"{name}.norm" if adaptive else name
        put(f"{inner}.weight", D)
        put(f"{inner}.bias", D)
        if adaptive:
            put(f"{name}.project_layer.weight", 2 * D, D)
            put(f"{name}.project_layer.bias", 2 * D)

    for part in ("ar", "nar"):
        layer = f"{part}_decoder.layers.0"
        for name, out, inside in (("in_proj_", 3 * D, D), ("out_proj.", D, D)):
            put(f"{layer}.self_attn.{name}weight", out, inside)
            put(f"{layer}.self_attn.{name}bias", out)
        for name, out, inside in (("linear1", 4 * D, D), ("linear2", D, 4 * D)):
            put(f"{layer}.{name}.weight", out, inside)
            put(f"{layer}.{name}.bias", out)
        for name in (f"{layer}.norm1", f"{layer}.norm2", f"{part}_decoder.norm"):
            norm(name, part == "nar")
        prefix = "prompt" if kind == "audio" else "text"
        put(f"{part}_audio_position.alpha", 1)
        put(f"{part}_{prefix}_position.alpha", 1)
        if kind == "audio":
            for number in range(Q):
                put(f"{part}_prompt_embeddings.{number}.word_embeddings.weight", size, D)
        elif kind == "midi":
            put(f"{part}_text_embedding.weight", D, sum(WIDTHS))
            put(f"{part}_text_embedding.bias", D)
        else:
            put(f"{part}_text_embedding.word_embeddings.weight", 20, D)
    if kind == "midi":
        for number, (rows, width) in enumerate(zip(NOTES, WIDTHS, strict=True)):
            put(f"feat_emb.{number}.word_embeddings.weight", rows, width)
    put("ar_audio_embedding.word_embeddings.weight", size + 1, D)
    put("ar_predict_layer.weight", size + 1, D)
    for number in range(Q):
        put(f"nar_audio_embeddings.{number}.word_embeddings.weight", size + (number == 0), D)
    for number in range(Q - 1):
        put(f"nar_predict_layers.{number}.weight", size, D)
        put(f"nar_stage_embeddings.{number}.word_embeddings.weight", 1, D)
        if share and number < Q - 2:
            other = f"nar_audio_embeddings.{number + 2}.word_embeddings.weight"
            state[other] = state[f"nar_predict_layers.{number}.weight"]
    return state


@pytest.fixture
def recipe(tmp_path):
    """A recipe's folder of theirs: symbols in data/tokenized, checkpoints in exp/valle."""
    table = tmp_path / "data" / "tokenized" / "unique_text_tokens.k2symbols"
    table.parent.mkdir(parents=True)
    table.write_text(TABLE, encoding="utf-8")
    (tmp_path / "exp" / "valle").mkdir(parents=True)
    return tmp_path


def test_a_valle_of_icefall_says_all_about_itself(tool, recipe, capsys):
    source = recipe / "exp" / "valle" / "epoch-40.pt"
    stored = {
        "nhead": 4,
        "prefix_mode": 2,
        "train_stage": 1,
        "batch_idx_train": 1234,
        "text_tokens": "data/tokenized/unique_text_tokens.k2symbols",
        "exp_dir": pathlib.Path("/somewhere"),  # what no weights-only reader takes
    }
    weights = theirs("valle", 1024)
    torch.save({"model": weights, "model_avg": None, **stored}, source)
    target = recipe / "ours" / "best-valid-loss.pt"
    tool.main([str(source), "--output", str(target)])
    said = capsys.readouterr().out
    assert "valle, 1 layers of 16, 4 heads" in said and "encodec_24khz, 4 quantizers x 1024, 75 Hz" in said
    assert "assumed  --codec encodec_24khz --text-extractor espeak" in said
    model, contents = load_model(target)
    assert isinstance(model, VALLE) and not isinstance(model, AudioLM)
    assert (model.prefix_mode, contents["config"]["model"]["nhead"]) == (2, 4)
    assert (contents["step"], contents["epoch"], contents["stages"]) == (1234, 40, [1])
    # A name that weights-only readers take; symbols by their ids.
    text = contents["text"]
    assert text["symbols"] == ["<eps>", "<bos>", "<eos>", "!", "<unused>", "_", "h", "l", "oʊ", "ə"]
    assert text["ends"] and text["sizes"] == 20
    said = make_text_tokenizer(**text["tokenizer"])("Hello!")
    assert SymbolTable(text["symbols"]).encode(said) == [6, 9, 7, 8, 3]
    row = weights["ar_text_embedding.word_embeddings.weight"][8]
    assert torch.equal(model.state_dict()["ar_text_embedding.weight"][8], row)


@pytest.mark.parametrize("form", ["bare", "module", "averaged", "safetensors"])
def test_every_form_of_file_gives_the_same_weights(tool, tmp_path, form, capsys):
    weights = theirs("midi", 2048, share=True)
    source = tmp_path / ("model.safetensors" if form == "safetensors" else "midi-valle.pt")
    if form == "bare":
        torch.save(weights, source)
    elif form == "module":
        torch.save({"model": {f"module.{name}": value for name, value in weights.items()}}, source)
    elif form == "averaged":
        torch.save({"model_avg": {name: value.double() for name, value in weights.items()}}, source)
    else:  # which holds a shared tensor once, by either name
        once = ("nar_predict_layers.0.weight", "nar_audio_embeddings.3.word_embeddings.weight")
        save_file({name: value for name, value in weights.items() if name not in once}, source)
    tool.main([str(source), str(tmp_path / "best.pt"), "--nhead", "2"])
    assert "assumed  --prefix-mode 1 --codec encodec_32khz" in capsys.readouterr().out
    model, contents = load_model(tmp_path / "best.pt")
    found = model.state_dict()
    assert all(value.dtype == torch.float32 for value in found.values())
    for name, other in (
        ("nar_predict_layers.0.weight", "nar_predict_layers.0.weight"),
        ("nar_audio_embeddings.2.weight", "nar_predict_layers.0.weight"),
        ("nar_audio_embeddings.3.weight", "nar_predict_layers.1.weight"),
        ("ar_text_embedding.tables.5.weight", "feat_emb.5.word_embeddings.weight"),
        ("nar_text_embedding.tables.5.weight", "feat_emb.5.word_embeddings.weight"),
    ):
        assert torch.equal(found[name], weights[other])
    tokenizer = make_midi_tokenizer(contents["text"]["tokenizer"])
    assert tokenizer.vocab_sizes == tuple(contents["text"]["sizes"]) == NOTES
    tokens = torch.from_numpy(tokenizer(make_notes([0.1, 1.0], [0.5, 2.0], [60, 64], [70, 80]), True))
    assert tokens[0].tolist() == [BOS] * 6 and tokens[-1].tolist() == [EOS] * 6
    with torch.no_grad():
        codes = torch.zeros(1, 5, dtype=torch.long)
        logits = model.ar_logits(tokens[None], torch.tensor([4]), codes)
    assert logits.shape == (1, 6, 2049) and logits.isfinite().all()


def test_an_audio_lm_continues_a_clip_and_is_fine_tuned(tool, tmp_path):
    """With no architecture flag for either."""
    codec = save_tiny_codec(tmp_path / "codec")
    source, target = tmp_path / "epoch-3.pt", tmp_path / "theirs" / "best-valid-loss.pt"
    torch.save({"model": theirs("audio", TINY_CODEBOOK), "nhead": 2}, source)
    tool.main([str(source), "--output", str(target), "--codec", str(codec)])
    contents = load_checkpoint(target)
    assert contents["codec"]["fingerprint"] == codec_info(str(codec), Q)["fingerprint"]
    np.save(tmp_path / "clip.npy", np.arange(200).reshape(50, 4) % TINY_CODEBOOK)
    infer(
        [
            "--checkpoint", str(target), "--prompt", str(tmp_path / "clip.npy"), "--max-new-tokens", "5",
            "--output-dir", str(tmp_path / "out"), "--device", "cpu",
        ]
    )  # fmt: skip
    assert (tmp_path / "out" / "clip_continuation.wav").is_file()
    data = write_tokenized(tmp_path / "data", {"train": 4, "validation": 2})
    (data / "codec.json").write_text(json.dumps(contents["codec"]))
    flags = ["--init-from", str(target), "--manifest-dir", str(data), "--max-steps", "1", "--device", "cpu"]
    train([*flags, "--exp-dir", str(tmp_path / "exp"), "--base-lr", "0.001", "--tensorboard", "false"])
    tuned = load_checkpoint(tmp_path / "exp" / "best-valid-loss.pt")
    assert tuned["config"]["model"]["position"] == "sine" and tuned["config"]["model"]["activation"] == "relu"
    assert tuned["config"]["model"]["separate_prompts"]


def with_texts(folder, symbols, tokenizer, midi=None):
    """Utterances of a folder's cuts, all with one text, or one MIDI file."""
    for split in ("train", "validation"):
        cuts = list(CutSet.from_file(folder / f"cuts_{split}.jsonl.gz"))
        for cut in cuts:
            said = SupervisionSegment(cut.id, cut.recording.id, 0.0, cut.duration, text="hello")
            said.custom = {"tokens": {"text": symbols}}
            cut.supervisions = [said]
            if midi:
                cut.midi = str(midi)
        CutSet.from_cuts(cuts).to_file(str(folder / f"utterances_{split}.jsonl.gz"))
    (folder / "text_tokenizer.json").write_text(json.dumps(tokenizer))
    SymbolTable.build(symbols).write(folder / "unique_text_tokens.k2symbols")
    return folder


@pytest.mark.parametrize("kind", ["valle", "midi"])
def test_readers_are_fine_tuned_with_their_own_symbols(tool, recipe, kind):
    """The corpus has another table; what the checkpoint has decides."""
    source, target = recipe / "epoch-3.pt", recipe / "theirs" / "best-valid-loss.pt"
    table = recipe / "data" / "tokenized" / "unique_text_tokens.k2symbols"
    codec = save_tiny_codec(recipe / "codec")
    torch.save({"model": theirs(kind, TINY_CODEBOOK), "nhead": 2, "text_tokens": str(table)}, source)
    tool.main([str(source), "--output", str(target), "--codec", str(codec)])
    contents = load_checkpoint(target)
    write_notes(recipe / "piece.mid", make_notes([0.1, 0.5], [0.4, 0.9], [60, 64], [70, 80]))
    tokenizer = {"name": "espeak", "language": "en-us", "lower": True}
    data = write_tokenized(recipe / "corpus", {"train": 4, "validation": 2})
    with_texts(data, ["h", "ə", "l", "oʊ"], tokenizer, recipe / "piece.mid")
    (data / "codec.json").write_text(json.dumps(contents["codec"]))
    flags = [
        "--init-from", str(target), "--manifest-dir", str(data), "--max-steps", "1", "--device", "cpu",
        "--base-lr", "0.001", "--tensorboard", "false",
    ]  # fmt: skip
    train_reader([*flags, "--exp-dir", str(recipe / "tuned")])
    tuned = load_checkpoint(recipe / "tuned" / "best-valid-loss.pt")
    reads = {"field_dims": None, "symbol_frames": None, "aligner": None} | contents["text"]
    assert json.dumps(tuned["text"], sort_keys=True) == json.dumps(reads, sort_keys=True)  # tuples or lists
    assert tuned["config"]["model"]["model_name"] == {"valle": "valle", "midi": "midi-valle"}[kind]
    packs = [np.load(path) for path in data.glob("packed/*train*/tokens.npy")]
    rows = next(rows for rows in packs if rows.shape[1] == (6 if kind == "midi" else 1))
    if kind == "valle":
        assert rows[:6, 0].tolist() == [1, 6, 9, 7, 8, 2]
        other = with_texts(data, ["h", "aɪ"], tokenizer)
        with pytest.raises(UserError, match="symbol 'aɪ' is not in the table"):
            train_reader([*flags[:3], str(other), *flags[4:], "--exp-dir", str(recipe / "other")])
        with_texts(data, ["h"], tokenizer | {"name": "phonemes"})
        with pytest.raises(UserError, match=r"reads other texts \(tokenizer\)"):
            train_reader([*flags, "--exp-dir", str(recipe / "other")])
    else:
        assert rows[1].tolist() == [4 + 60 - 21, 4 + 35, 4 + 57, 4 + 384, 4 + 19, 4]


def test_which_scale_an_audio_prompt_has(tool, tmp_path):
    """`VALLE-audio` scales it as the target and leaves the other scale at 1; `AudioLM` trains both."""
    weights = theirs("audio", 2048)
    target, prompt = (weights[f"ar_{name}_position.alpha"] for name in ("audio", "prompt"))
    for number, (changes, expected) in enumerate(
        [
            ({}, prompt),
            ({"model_name": "VALLE-audio"}, target),
            ({"model": weights | {"ar_prompt_position.alpha": torch.ones(1)}}, target),
        ]
    ):
        torch.save({"model": weights, "nhead": 2, **changes}, tmp_path / "epoch-1.pt")
        tool.main([str(tmp_path / "epoch-1.pt"), str(tmp_path / f"{number}.pt")])
        found = load_checkpoint(tmp_path / f"{number}.pt")["model"]["ar_prefix_position.alpha"]
        assert torch.equal(found, expected)


def test_errors_name_what_is_wrong(tool, recipe):
    source, out = recipe / "theirs.pt", ["--output", str(recipe / "out.pt")]
    table = ["--text-tokens", str(recipe / "data" / "tokenized" / "unique_text_tokens.k2symbols")]
    torch.save({"model": theirs("valle", 1024), "nhead": 2}, source)
    run = [str(source), *out]
    for arguments, expected in (
        (run, "does not name the table of its text symbols; give --text-tokens"),
        ([*run, "--text-tokens", "none.k2symbols"], "symbol table 'none.k2symbols' does not exist"),
        ([*run, *table, "--codec", "encodec_32khz"], "has 2048 values a code, but the model 1024"),
        ([*run, *table, "--codec", "mimi"], "has 2048 values a code, but the model 1024"),
        ([*run, *table, "--nhead", "3"], "nhead"),
        ([str(source), "--output", str(recipe / "epoch-4.pt"), *table], "not be that of a training to go on"),
        ([str(source), str(recipe / "folder"), *table], "its name must end with .pt"),
        ([str(source)], "1 names given, expected 2"),
        ([str(recipe / "none.pt"), *out], "'.*none.pt' does not exist"),
        ([str(source), str(source)], "exists; remove it first"),
    ):
        with pytest.raises(UserError, match=expected):
            tool.main(arguments)
        assert not (recipe / "out.pt").exists()
    torch.save({"model": theirs("valle", 1024), "text_tokens": "data/other.k2symbols"}, source)
    with pytest.raises(
        UserError, match="names 'data/other.k2symbols' as its text symbols, which is not there"
    ):
        tool.main(run)
    torch.save({"model": theirs("audio", 2048)}, source)
    with pytest.raises(UserError, match="--text-tokens is for checkpoints that read text"):
        tool.main([*run, *table])
    with pytest.raises(UserError, match="--prefix-mode is of VALL-Es"):
        tool.main([*run, "--prefix-mode", "1"])
    torch.save({"model": theirs("audio", 77)}, source)
    with pytest.raises(UserError, match="77 values a code are of no codec that is known; give --codec"):
        tool.main(run)
    odd = theirs("midi", 2048) | {"feat_emb.0.word_embeddings.weight": torch.zeros(90, WIDTHS[0])}
    torch.save({"model": odd}, source)
    with pytest.raises(UserError, match=r"notes of \[90, 68, .* not those of MIDI-VALLE"):
        tool.main(run)
    tool.main([*_good(source), str(recipe / "out.pt")])
    with pytest.raises(UserError, match="--nhead is for checkpoints of others"):
        tool.main([str(recipe / "out.pt"), str(recipe / "folder"), "--nhead", "2"])


def _good(source):
    torch.save({"model": theirs("midi", 2048), "nhead": 2, "prefix_mode": 1}, source)
    return [str(source)]


def test_front_ends_are_told_by_their_symbols():
    assert guess_extractor(["_", "aɪ", "n̩", "t", "1"]) == "espeak"
    assert guess_extractor(["-", "zh", "ong1", "n", "i3"]) == "pypinyin_initials_finals"
    assert guess_extractor(["-", "zhong1", "ni3"]) == "pypinyin"
    assert set(FOREIGN_TOKENIZERS) == {"espeak", "pypinyin", "pypinyin_initials_finals"}


def test_published_codecs():
    """Those that transformers' own defaults describe; the sums of all."""
    import transformers

    assert PUBLISHED.keys() == HUB_IDS.keys()
    for name, config in (
        ("encodec_24khz", transformers.EncodecConfig()),
        ("mimi", transformers.MimiConfig()),
    ):
        info = codec_info(name, 8)
        assert info["sample_rate"] == config.sampling_rate and info["frame_rate"] == config.frame_rate
        assert (info["codebook_size"], info["num_quantizers"]) == (config.codebook_size, 8)
    rates = {name: round(codec_info(name, 1)["frame_rate"], 1) for name in PUBLISHED}
    assert rates == {
        "encodec_24khz": 75, "encodec_32khz": 50, "encodec_48khz": 150, "dac_16khz": 50, "dac_24khz": 75,
        "dac_44khz": 86.1, "mimi": 12.5,
    }  # fmt: skip
    with pytest.raises(UserError, match="'encodec_32khz' has 4 quantizers, 8 were asked for"):
        codec_info("encodec_32khz", 8)


def test_ours_becomes_a_folder_and_a_file_again(tool, tmp_path):
    """As before: two names, in both directions; `--output` may name the second."""
    tool.main([*_good(tmp_path / "epoch-1.pt"), str(tmp_path / "ours.pt")])
    tool.main([str(tmp_path / "ours.pt"), "--output", str(tmp_path / "folder")])
    tool.main([str(tmp_path / "folder"), str(tmp_path / "back.pt")])
    first, back = (load_checkpoint(tmp_path / name) for name in ("ours.pt", "back.pt"))
    assert first.keys() == back.keys() and first["text"]["tokenizer"] == back["text"]["tokenizer"]
    assert all(torch.equal(value, back["model"][name]) for name, value in first["model"].items())
    with pytest.raises(UserError, match="is to be a folder: its name must not end with .pt"):
        tool.main([str(tmp_path / "ours.pt"), str(tmp_path / "again.pt")])
