"""`tools/decode_quality.py`: an exact way of decoding is called exact, a damaged one is not, and figures are right."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import TINY_CODEBOOK, save_tiny_codec, write_tokenized

from valle.codecs import load_codec
from valle.config import ModelConfig, to_dict
from valle.data.manifests import read_manifest, write_cuts
from valle.generation.chunks import Chunks, default_chunks
from valle.models.builder import build_model
from valle.models.generating import ArSession, make_prompts, refine
from valle.modules.packing import FORMATS, pack
from valle.utils.errors import UserError

TOOL = Path(__file__).resolve().parent.parent / "tools" / "decode_quality.py"
QUANTIZERS = 4
EQUAL = [f"equal_q{quantizer}" for quantizer in range(1, QUANTIZERS)]
SETTINGS = {"model_name": "audio-lm", "decoder_dim": 32, "nhead": 2, "num_decoder_layers": 2}


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("decode_quality", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["decode_quality"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["decode_quality"]


def make_model(**flags):
    """Random, but with opinions: fresh weights hardly tell codes apart, and look nowhere in particular."""
    torch.manual_seed(1)
    config = ModelConfig(**SETTINGS, num_quantizers=QUANTIZERS, **flags)
    model = build_model(config, TINY_CODEBOOK).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.4)
    return model, config


@pytest.fixture(scope="module")
def model():
    return make_model()[0]


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return load_codec(save_tiny_codec(tmp_path_factory.mktemp("codec")))


@pytest.fixture(scope="module")
def cuts(tool):
    draw = torch.Generator().manual_seed(2)
    lengths = [(9, 23), (30, 12), (1, 17)]
    return [
        tool.CutCodes(
            *(torch.randint(TINY_CODEBOOK, (frames, QUANTIZERS), generator=draw) for frames in length)
        )
        for length in lengths
    ]


def means(figures):
    return {name: interval.mean for name, interval in figures.items()}


# ------------------------------------------------------------------------------ number formats


@pytest.mark.parametrize("flags", [{}, {"prepend_bos": True}, {"norm_first": False, "add_prenet": True}])
def test_fp32_is_exact_and_the_others_are_near(tool, cuts, flags):
    results = tool.measure_formats(make_model(**flags)[0], cuts, seed=0)
    assert list(results) == list(FORMATS)
    exact, *rounded = (means(results[dtype]) for dtype in FORMATS)
    assert [exact[name] for name in ("top1", *EQUAL)] == [1.0] * QUANTIZERS
    assert 0 <= exact["kl_mean"] <= exact["kl_p99"] < 1e-8
    assert abs(exact["nll_change"]) < 1e-5
    for found in rounded:
        assert 10 * exact["kl_mean"] < found["kl_mean"] < 0.05
        assert found["kl_mean"] < found["kl_p99"] < 0.5
        assert found["top1"] > 0.8 and min(found[name] for name in EQUAL) > 0.5
        assert found["nll"] - exact["nll"] == pytest.approx(found["nll_change"] - exact["nll_change"])


def damage(monkeypatch, tool, damaged):
    """`packed` gives fresh copies, and the one in fp32 goes through `damaged` first."""

    def changed(model, dtype):
        copy = pack(model, dtype)
        if dtype == "fp32":
            damaged(copy)
        return copy

    monkeypatch.setattr(tool, "packed", changed)


def test_a_damaged_ar_decoder_is_caught(tool, model, cuts, monkeypatch):
    def swap(copy):
        stepper = copy.ar_decoder.stepper
        for layers in (stepper.layers, stepper.native.layers if stepper.native is not None else [0, 1]):
            layers[0], layers[1] = layers[1], layers[0]

    damage(monkeypatch, tool, swap)
    found = means(tool.measure_formats(model, cuts, seed=0)["fp32"])
    assert found["kl_mean"] > 0.1 and found["top1"] < 0.9 and abs(found["nll_change"]) > 1e-3
    assert [found[name] for name in EQUAL] == [1.0] * (QUANTIZERS - 1)


def test_a_damaged_nar_decoder_is_caught(tool, model, cuts, monkeypatch):
    def swap(copy):
        layers = copy.nar_predict_layers
        layers[1] = layers[0]

    damage(monkeypatch, tool, swap)
    found = means(tool.measure_formats(model, cuts, seed=0)["fp32"])
    assert found["top1"] == 1.0 and found["kl_mean"] < 1e-8
    assert found["equal_q1"] == 1.0 and found["equal_q2"] < 0.5


@pytest.mark.parametrize("wrong", ["token", "position"])
def test_a_step_that_errs_is_caught(tool, model, cuts, monkeypatch, wrong):
    class Erring(ArSession):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            if wrong == "position":
                self._cache.position_shift = self._cache.position_shift + 1

        def step(self, tokens):
            super().step((tokens + 1) % TINY_CODEBOOK if wrong == "token" else tokens)

    monkeypatch.setattr(tool, "ArSession", Erring)
    copy = pack(model, "fp32")
    stepped, whole = tool.stepped_logits(copy, cuts[0]), tool.whole_logits(model, cuts[0])
    assert stepped.shape == whole.shape == (23, TINY_CODEBOOK + 1)
    assert torch.allclose(stepped[0], whole[0], atol=1e-4)  # from the prompt alone
    assert float((stepped[1:] - whole[1:]).abs().amax(1).min()) > 1e-2
    assert means(tool.measure_formats(model, cuts, seed=0)["fp32"])["kl_mean"] > 1e-3


def test_logits_are_compared_as_the_definitions_say(tool):
    """Probabilities that can be written down; logits may be off by any constant."""
    reference = [[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.2, 0.5, 0.3]]
    found = [[0.25, 0.5, 0.25], [0.1, 0.1, 0.8], [0.25, 0.5, 0.25]]
    codes = [0, 2, 1]
    divergence = [
        sum(p * math.log(p / q) for p, q in zip(*rows, strict=True))
        for rows in zip(reference, found, strict=True)
    ]
    likelihoods = [math.log(row[code]) for row, code in zip(found, codes, strict=True)]
    references = [math.log(row[code]) for row, code in zip(reference, codes, strict=True)]
    figures = tool.compare_logits(
        torch.tensor(found).log() + 3.0, torch.tensor(reference).log() - 5.0, torch.tensor(codes)
    )
    assert figures == pytest.approx(
        {
            "top1": 2 / 3,
            "kl_mean": sum(divergence) / 3,
            "kl_p99": np.quantile(divergence, 0.99),
            "nll": -sum(likelihoods) / 3,
            "nll_change": (sum(references) - sum(likelihoods)) / 3,
        },
        abs=1e-6,
    )
    assert figures["nll_change"] == pytest.approx(math.log(2) / 3, abs=1e-6)


def test_equal_shares_leave_quantizer_0_out(tool):
    codes = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]])
    other = torch.tensor([[0, 2, 3], [0, 2, 3], [0, 2, 4], [0, 4, 4]])
    assert tool.equal_shares(codes, other) == {"equal_q1": 0.75, "equal_q2": 0.5}


def test_cuts_weigh_as_many_frames_as_they_have(tool, model, cuts):
    """12 and 17 target frames; the interval spans what the cuts span."""
    together = tool.measure_formats(model, cuts[1:], seed=0)["int8"]
    single = [tool.measure_formats(model, [cut], seed=0)["int8"] for cut in cuts[1:]]
    for name in ("kl_mean", "kl_p99", "nll"):
        values = [found[name].mean for found in single]
        assert values[0] != values[1]
        assert together[name].mean == pytest.approx((12 * values[0] + 17 * values[1]) / 29)
        assert (together[name].low, together[name].high) == pytest.approx((min(values), max(values)))


# -------------------------------------------------------------------------------------- chunks


def test_one_chunk_is_the_whole_and_small_ones_are_not(tool, model, codec, cuts):
    asked = [
        tool.Setting(0, 0, 0, Chunks(23, 2, 30)),  # the longest target, the longest prompt
        tool.Setting(0, 0, 0, Chunks(4, 1, 30)),
        tool.Setting(0, 0, 0, Chunks(23, 0, 1)),
    ]
    whole, (one, small, forgetful) = tool.measure_chunks(model, codec, cuts, asked, seed=0)
    assert [one[name].mean for name in EQUAL] == [1.0] * (QUANTIZERS - 1)
    assert one["to_whole"].mean == one["added"].mean == 0.0
    assert one["to_truth"] == whole["to_truth"] and whole["to_truth"].mean > 0
    for other in (small, forgetful):
        assert max(other[name].mean for name in EQUAL) < 1.0
        assert other["to_whole"].mean > 0
        assert other["added"].mean == pytest.approx(other["to_truth"].mean - whole["to_truth"].mean)


def test_distances_are_to_the_true_codes(tool, model, codec, cuts):
    """Where the truth is what the whole gives, it is not a bit away, and chunks are as far from one as the other."""
    copy = pack(model, "fp32")
    right = [
        tool.CutCodes(
            cut.prompt,
            refine(copy, make_prompts([cut.prompt]), cut.target[None, :, 0], torch.tensor([len(cut.target)]))[
                0
            ],
        )
        for cut in cuts
    ]
    asked = [tool.Setting(0, 0, 0, Chunks(4, 1, 30))]
    whole, (small,) = tool.measure_chunks(model, codec, right, asked, seed=0)
    assert whole["to_truth"].mean == 0.0
    assert small["to_truth"] == small["to_whole"] == small["added"]
    assert small["to_truth"].mean > 0


def test_a_target_sounds_behind_its_prompt(tool, codec, cuts):
    prompt, target = cuts[1]
    with torch.inference_mode():
        both = codec.decode(torch.cat([prompt, target])[None])[0].numpy()
        alone = codec.decode(target[None])[0].numpy()
    wav = tool.decode_target(codec, prompt, target)
    assert wav.shape == (1, 12 * codec.hop_length)
    assert np.array_equal(wav, both[:, 30 * codec.hop_length :]) and not np.array_equal(wav, alone)


@pytest.mark.parametrize("frame_rate", [12.5, 50.0, 75.0])
def test_settings_hold_the_default_and_nothing_impossible(tool, frame_rate):
    found = tool.settings(frame_rate)
    assert len({setting[:3] for setting in found}) == len(found)
    usual = {setting[:3]: setting.chunks for setting in found}
    assert usual[0.5, 0.1, 2.0] == default_chunks(frame_rate)
    assert {chunk for chunk, *_ in usual} == {0.25, 0.5, 1.0, 2.0}
    assert {lookahead for _, lookahead, _ in usual} == {0.0, 0.1, 0.2, 0.5}
    assert {context for chunk, lookahead, context in usual if (chunk, lookahead) == (0.5, 0.1)} == {
        0.5, 1.0, 2.0, 3.0,
    }  # fmt: skip
    if frame_rate == 50.0:
        assert len(found) == 14 + 3
        assert usual[0.25, 0.2, 2.0] == Chunks(12, 10, 100)
        assert usual[2.0, 0.0, 2.0].lookahead == 0


# ------------------------------------------------------------------------------------- command


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint, its codec, and cuts in that codec's codes."""
    root = tmp_path_factory.mktemp("files")
    info = load_codec(save_tiny_codec(root / "tiny")).info()
    tokenized = write_tokenized(root / "tokenized", {"test": 3}, num_quantizers=QUANTIZERS)
    (tokenized / "codec.json").write_text(json.dumps(info))
    trained, config = make_model()
    contents = {
        "config": {"model": to_dict(config), "data": {"prompt_ratio": 0.25}},
        "codec": info, "model": trained.state_dict(), "step": 7,
    }  # fmt: skip
    torch.save(contents, root / "best.pt")
    # the same, after the codec's folder was moved
    torch.save(contents | {"codec": info | {"name": str(root / "gone")}}, root / "moved.pt")
    return root


def flags(files, *more, checkpoint="best.pt"):
    manifest = files / "tokenized" / "cuts_test.jsonl.gz"
    return ["--checkpoint", str(files / checkpoint), "--manifest", str(manifest), *more]


def test_the_command_writes_and_prints_both_tables(tool, files, tmp_path, monkeypatch, capsys):
    asked = [
        tool.Setting(0.2, 0.0, 2.0, Chunks(10, 0, 100)),
        tool.Setting(9.0, 0.5, 9.0, Chunks(450, 25, 450)),
    ]
    monkeypatch.setattr(tool, "settings", lambda frame_rate: asked)
    output = tmp_path / "new" / "quality.json"
    more = ["--output", str(output), "--max-cuts", "2", "--codec", str(files / "tiny")]
    tool.main(flags(files, *more, checkpoint="moved.pt"))
    results = json.loads(output.read_text())
    frames = [
        len(cut.load_audio_features()) for cut in read_manifest(files / "tokenized" / "cuts_test.jsonl.gz")
    ]
    assert results["cuts"] == 2 and results["checkpoint"]["step"] == 7
    assert results["target_frames"] == sum(count - int(0.25 * count) for count in frames[:2])
    assert [row["dtype"] for row in results["formats"]] == list(FORMATS)
    assert results["formats"][0]["top1"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "count": 2}
    assert [row["chunk_seconds"] for row in results["chunks"]] == [0.2, 9.0]
    assert results["chunks"][1]["equal_q1"]["mean"] == 1.0 > results["chunks"][0]["equal_q1"]["mean"]

    printed = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines()]
    tables = [line for line in lines if len(line) > 1 and not line[0].endswith(":")]
    assert [line[0] for line in tables] == ["format", *FORMATS, "chunk s", "0.20", "9.00", "-"]
    head, exact = tables[0], tables[1]
    assert dict(zip(head, exact, strict=True))["same top 1 %"] == "100.00 [100.00, 100.00]"
    assert dict(zip(head, exact, strict=True))["equal q3 %"] == "100.00 [100.00, 100.00]"
    whole = dict(zip(tables[4], tables[7], strict=True))
    truth = results["whole"]["to_truth"]
    assert whole["log-mel to truth"] == f"{truth['mean']:.4f} [{truth['low']:.4f}, {truth['high']:.4f}]"
    assert whole["equal q1 %"] == whole["more than whole"] == "-"


def test_a_single_cut_has_no_interval(tool, files, monkeypatch, capsys):
    monkeypatch.setattr(tool, "settings", lambda frame_rate: [])
    tool.main(flags(files, "--max-cuts", "1"))
    assert "|       100.00 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more,message",
    [
        (["--checkpoint", ""], "--checkpoint is missing"),
        (["--manifest", ""], "--manifest is missing"),
        (["--max-cuts", "-1"], "--max-cuts is -1, expected 0 or more"),
        (["--output", "."], "--output is '.', a folder, expected a file"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_read(tool, files, monkeypatch, more, message):
    monkeypatch.setattr(tool, "load_audio_lm", None)
    with pytest.raises(UserError, match=message):
        tool.main(flags(files, *more))


def test_codes_of_another_codec_are_refused(tool, files, tmp_path):
    other = write_tokenized(tmp_path / "other", {"test": 1}, num_quantizers=QUANTIZERS)
    with pytest.raises(UserError, match="are of 'tiny' \\(fingerprint 0000000000000000\\); run prepare.sh"):
        tool.main(flags(files, "--manifest", str(other / "cuts_test.jsonl.gz")))
    with pytest.raises(UserError, match="unknown codec"):
        tool.main(flags(files, checkpoint="moved.pt"))


def test_a_cut_that_cannot_be_split_is_named(tool, files, tmp_path):
    (cut, *_) = read_manifest(files / "tokenized" / "cuts_test.jsonl.gz")
    folder = Path(cut.audio_features.array.storage_path)
    np.save(folder / "short.npy", np.zeros((1, QUANTIZERS), dtype=np.uint16))
    short = cut.truncate(duration=0.02)
    short.id = "short"
    short.custom["audio_features"].array.storage_key = "short.npy"
    short.custom["audio_features"].array.shape[0] = 1
    write_cuts(tmp_path / "cuts.jsonl.gz", [short])
    with pytest.raises(UserError, match="cut 'short': 1 frame, expected 2 or more"):
        tool.main(flags(files, "--manifest", str(tmp_path / "cuts.jsonl.gz")))
