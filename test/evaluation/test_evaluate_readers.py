"""The whole evaluation of models that read: a VALL-E without training, and stand-ins that listen to the text or not."""

import dataclasses
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import CODES, HOP, QUANTIZERS, RATE
from torch.nn import functional as F

from valle.data.midi import MidiTokenizer, make_notes, write_notes
from valle.data.symbols import SymbolTable
from valle.evaluation import evaluate as module
from valle.evaluation import judging
from valle.evaluation.evaluate import EvaluateConfig, evaluate
from valle.evaluation.summary import format_results
from valle.models import VALLE, Generation

LETTERS = "abcdefghijkl"  # each is the code of its place in here, for 5 frames
FRAMES = 5
TABLE = SymbolTable.build(["_", *LETTERS])
LOSS = "AR loss below that with another cut's text or notes"
WER = "word error rate better with a cut's own text or notes than with another's"
F1 = "onset F1 better with a cut's own text or notes than with another's"


class Heard:
    """Letters whose tone is heard, one each tenth of a second, against those of the text."""

    name, task, keys = "wer", "speech", {"wer": "lower"}
    calls: Counter = Counter()

    def missing(self):
        return None

    def applies(self, case):
        return case.text is not None

    def __call__(self, audio, case):
        self.calls[case.cut_id] += 1
        block = FRAMES * HOP
        heard = []
        for start in range(0, audio.wav.shape[1] - block + 1, block):
            spectrum = np.abs(np.fft.rfft(audio.wav[0, start : start + block]))
            if spectrum.max() > 20:  # the recordings' noise is below
                pitch = spectrum.argmax() * RATE / block
                heard.append(LETTERS[int(np.clip(round((pitch - 200) / 100), 0, CODES - 1))])
        wrong = sum(one != two for one, two in zip(heard, case.text, strict=False))
        return {"wer": (wrong + abs(len(heard) - len(case.text))) / len(case.text)}


class Onsets(Heard):
    """No figure of its own: how loud it is."""

    name, task, keys = "notes", "music", {"onset_f1": "higher"}

    def applies(self, case):
        return case.notes is not None

    def __call__(self, audio, case):
        return {"onset_f1": float(np.sqrt(np.mean(np.square(audio.wav))))}


class Level(Heard):
    name, task, keys = "level", "similarity", {"level": "higher"}

    def applies(self, case):
        return True

    def __call__(self, audio, case):
        return {"level": float(np.abs(audio.wav).max())}


class Reader(VALLE):
    """Says each letter of its text for 5 frames, if it listens; else its prompt's codes again."""

    def __init__(self, listens, silent=False):
        super().__init__(8, 1, 1, num_quantizers=QUANTIZERS, codebook_size=CODES, text_sizes=len(TABLE))
        self.listens, self.silent = listens, silent

    def forced_logits(self, prompts, y, y_lens):
        frames = prompts.lens[:, None] + torch.arange(y.shape[1])
        place = (frames // FRAMES).clamp(max=prompts.text.shape[1] - 1)
        said = codes_of_symbols(prompts.text.gather(1, place))
        for quantizer in range(QUANTIZERS):
            first = quantizer == 0 and self.listens
            right = F.one_hot(said, CODES + 1) if first else torch.zeros(*y.shape[:2], CODES + 1)
            yield right * math.log(9)

    def generate(self, x, x_lens, prompts, prompts_lens, most, temperature, top_k, *, seed, prompt_text_lens):
        rows = []
        for row, own in enumerate(prompt_text_lens.tolist()):
            prompt = prompts[row, : prompts_lens[row]]
            said = codes_of_symbols(x[row, own : x_lens[row]]).repeat_interleave(FRAMES)
            new = torch.stack([said, *[torch.full_like(said, 5)] * (QUANTIZERS - 1)], 1)
            if not self.listens:
                new = prompt[torch.arange(len(new)) % len(prompt)]
            rows.append(torch.cat([prompt, new[: 0 if self.silent else most[row]]]))
        return Generation(rows, prompts_lens.tolist(), ["eos"] * len(rows), [torch.zeros(0)] * len(rows))


def codes_of_symbols(ids):
    return (ids - TABLE.id("a")).clamp(0, CODES - 1)


def letters(number, length):
    return "".join(LETTERS[i] for i in np.random.default_rng(number).integers(0, CODES, length))


@pytest.fixture
def make_world(tmp_path, monkeypatch, codec, make_cut):
    """Gives a configuration; the codec, cuts and `model` are where the evaluation looks for them."""

    def make(model, notes=False):
        cuts = {}
        for split, lengths in {"train": [12] * 4, "validation": [14, 11], "test": [12, 15, 13]}.items():
            cuts[split] = []
            for number, length in enumerate(lengths):
                text = letters(100 * len(split) + number, length)
                first = np.repeat([LETTERS.index(letter) for letter in text], FRAMES)
                codes = np.stack([first, np.full_like(first, 5), np.full_like(first, 5)], 1)
                cut = make_cut(f"{split}-{number}", codes)
                said = cut.supervisions[0]
                said.text, said.custom = text, {"tokens": {"text": list(text)}}
                if notes:
                    onsets = np.arange(0.05, cut.duration, 0.2)
                    pitch = 50 + number * 5 + np.arange(len(onsets))
                    midi = make_notes(onsets, onsets + 0.1, pitch, np.full(len(onsets), 60))
                    write_notes(tmp_path / f"{cut.id}.mid", midi)
                    cut.supervisions, cut.custom["midi"] = [], str(tmp_path / f"{cut.id}.mid")
                cuts[split].append(cut)
        tokenizer = {"name": "espeak", "language": "en-us", "lower": True}
        text = {"tokenizer": tokenizer, "symbols": list(TABLE), "ends": False, "sizes": len(TABLE)}
        if notes:
            text = {"tokenizer": MidiTokenizer().config(), "ends": True, "sizes": MidiTokenizer().vocab_sizes}
        saved = {
            "codec": {
                "name": "tone", "fingerprint": "f00d", "sample_rate": RATE, "frame_rate": 50.0,
                "num_quantizers": QUANTIZERS, "codebook_size": CODES,
            },
            "config": {"model": {"model_name": "midi-valle" if notes else "valle"}},
            "version": "0.1.0", "step": 7, "epoch": 1, "train_stage": 2, "stages": [1, 2], "text": text,
        }  # fmt: skip
        monkeypatch.setattr(module, "load_model", lambda path, device: (model, saved))
        monkeypatch.setattr(module, "matching_codec", lambda info, device, num_quantizers: codec)
        monkeypatch.setattr(
            module, "read_manifest", lambda path: cuts[path.name.split(".")[0].removeprefix("utterances_")]
        )
        monkeypatch.setattr(module, "load_codes", lambda cut, quantizers, size: np.array(cut.custom["codes"]))
        monkeypatch.setattr(judging, "METRICS", {"level": Level, "wer": Heard, "notes": Onsets})
        monkeypatch.setattr(judging, "EMBEDDINGS", {})
        monkeypatch.setattr(Heard, "calls", Counter())
        (tmp_path / "data").mkdir()
        return EvaluateConfig(
            checkpoint=str(tmp_path / "exp" / "best.pt"), manifest=str(tmp_path / "data"),
            output_dir=str(tmp_path / "out"), num_clips=2, prompt_seconds=0.4 if notes else 1.0, device="cpu",
            report=False,
        )  # fmt: skip

    return make


def untrained(notes=False):
    torch.manual_seed(0)
    sizes = MidiTokenizer().vocab_sizes if notes else len(TABLE)
    model = VALLE(
        16, 2, 1, num_quantizers=QUANTIZERS, codebook_size=CODES, text_sizes=sizes, text_ends=notes, prefix_mode=1,
        symbol_frames=None if notes else [5.0] * sizes,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
        # So that it hardly ends by itself: one channel is constant, and says that the end (V) is unlikely.
        norm, table = model.ar_decoder.norm, model.ar_predict_layer.weight
        norm.weight[0], norm.bias[0] = 0.0, 8.0
        table[:, 0], table[CODES] = 0.0, 0.0
        table[CODES, 0] = -1.0
    return model


def passed(results):
    return {check["name"]: check["passed"] for check in results["checks"]}


def counted(model, monkeypatch):
    """Its calls of generate, in a list."""
    calls, generate = [], model.generate
    monkeypatch.setattr(
        model, "generate", lambda *args, **named: (calls.append(named), generate(*args, **named))[1]
    )
    return calls


# ---------------------------------------------------------------------------------- a VALL-E as it is


def test_results_wavs_and_report_of_a_valle(make_world, tmp_path):
    config = make_world(untrained())
    results = evaluate(dataclasses.replace(config, report=True))
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert results["reads"] is True and results["prompt"] == "25% of it"
    assert results["data"]["test"]["manifest"].endswith("utterances_test.jsonl.gz")
    assert [cut["frames"] for cut in results["per_cut"]] == [45, 56, 49]
    for entry in results["likelihood"]:
        loss = {name: entry[name]["loss"]["mean"] for name in ("model", "wrong", "unigram")}
        assert loss["wrong"] != loss["model"] and all(value > 0 for value in loss.values())
        assert entry["gain"]["wrong"]["mean"] == pytest.approx(loss["wrong"] - loss["model"])
        weights = np.array([cut["frames"] for cut in results["per_cut"]])
        by_cut = [cut["wrong"][entry["quantizer"]] for cut in results["per_cut"]]
        assert loss["wrong"] == pytest.approx(np.average(by_cut, weights=weights))
    conditions = ["recording", "resynthesis", "model", "wrong", "loop", "unigram", "silence"]
    assert list(results["metrics"]["level"]["level"]) == conditions
    assert list(results["metrics"]["wer"]["wer"]) == conditions
    # Behind another cut as prompt comes all of this one, so its words are known: nothing is wrong in the truth.
    assert results["metrics"]["wer"]["wer"]["recording"]["mean"] == 0
    assert (
        results["metrics"]["wer"]["wer"]["model"]["mean"] > 0.5 and not results["metric_info"]["wer"]["whole"]
    )
    table = results["clips_table"]
    differences = [
        np.mean([cut["wrong"]["wer"]["wer"] - cut[f"model-{n}"]["wer"]["wer"] for n in range(2)])
        for cut in table.values()
    ]
    assert results["listening"]["wer"]["mean"] == pytest.approx(np.mean(differences))
    assert results["listening"]["wer"]["count"] == 3 and "onset_f1" not in results["listening"]
    assert {LOSS, WER} <= set(passed(results)) and F1 not in passed(results)
    asked = {clip["id"]: clip["asked_frames"] for clip in results["generation"]["clips"]}
    assert asked == {"test-0": 60, "test-1": 75, "test-2": 65}

    page = (tmp_path / "out" / "report.html").read_text()
    page = page.replace('<span class="flag">', "").replace("</span>", "")
    assert "VALLE: what it learnt" in page
    players = [clip for clip in page.split("<article")[1:] if "<audio" in clip]
    assert len(players) == 2 and all("Wrong text or notes" in clip for clip in players)
    assert "python -m valle.bin.trainer" in page and "trainer_audiolm" not in page
    assert ", of test-" in page, "whose voice the prompt is"
    markdown = (tmp_path / "out" / "results.md").read_text()
    (head,) = [
        line for line in markdown.splitlines() if "with another cut's text" in line and "quantizer" in line
    ]
    first = markdown.splitlines()[markdown.splitlines().index(head) + 2]
    wrong = results["likelihood"][0]["wrong"]["loss"]["mean"]
    assert float(first.strip("| ").split("|")[-1]) == pytest.approx(wrong, abs=0.006)
    assert "with another cut's text" in format_results(results)


def test_a_stopped_run_goes_on_where_it_was(make_world, tmp_path, monkeypatch):
    model = untrained()
    config = make_world(model)
    calls = counted(model, monkeypatch)
    whole = evaluate(dataclasses.replace(config, output_dir=str(tmp_path / "whole")))
    assert len(calls) == 3, "two seeds, and the wrong text"
    real = judging.judge_clip

    def broken(clip, *rest):
        if clip.cut_id == "test-2":
            raise KeyboardInterrupt
        return real(clip, *rest)

    monkeypatch.setattr(module, "judge_clip", broken)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config)
    monkeypatch.setattr(module, "judge_clip", real)
    calls.clear(), Heard.calls.clear()
    resumed = evaluate(config)
    assert not calls and set(Heard.calls) == {"test-2"}
    assert whole.pop("run") and resumed.pop("run") and resumed == whole


def test_same_seed_same_results(make_world, tmp_path):
    config = make_world(untrained())
    first = evaluate(config)
    second = evaluate(dataclasses.replace(config, output_dir=str(tmp_path / "again")))
    other = evaluate(dataclasses.replace(config, output_dir=str(tmp_path / "other"), seed=7))
    assert first.pop("run") and second.pop("run") and first == second
    assert other["likelihood"][0]["model"]["loss"]["mean"] == first["likelihood"][0]["model"]["loss"]["mean"]
    assert other["clips_table"] != first["clips_table"]


def test_another_text_does_not_take_old_parts(make_world, monkeypatch):
    model = untrained()
    config = make_world(model)
    calls = counted(model, monkeypatch)
    evaluate(config)
    for cut in module.read_manifest(module.Path("utterances_test.jsonl.gz")):
        cut.supervisions[0].custom["tokens"]["text"][-1] = "a"
    calls.clear()
    evaluate(config)
    assert len(calls) == 3


def test_a_valle_of_notes(make_world, tmp_path):
    config = make_world(untrained(notes=True), notes=True)
    results = evaluate(dataclasses.replace(config, report=True))
    assert results["reads"] is True and "music" in results["tasks"] and "speech" not in results["tasks"]
    assert [len(cut["wrong"]) for cut in results["per_cut"]] == [QUANTIZERS] * 3
    assert (
        results["likelihood"][0]["wrong"]["loss"]["mean"] != results["likelihood"][0]["model"]["loss"]["mean"]
    )
    assert "wrong" in results["metrics"]["notes"]["onset_f1"] and list(results["listening"]) == ["onset_f1"]
    assert {LOSS, F1} <= set(passed(results)) and WER not in passed(results)
    # Its own beginning is the prompt: only what has 1 s behind 0.4 s of it is asked about.
    asked = {clip["id"]: clip["asked_frames"] for clip in results["generation"]["clips"]}
    assert asked == {"test-1": 55}
    assert "Wrong text or notes" in (tmp_path / "out" / "report.html").read_text()


# -------------------------------------------------------------------------------------- who listens


def test_a_model_that_listens_passes(make_world):
    results = evaluate(make_world(Reader(listens=True)))
    assert results["metrics"]["wer"]["wer"]["model"]["mean"] == 0
    assert results["metrics"]["wer"]["wer"]["wrong"]["mean"] > 0.5
    assert results["listening"]["wer"]["low"] > 0.5
    assert results["likelihood"][0]["gain"]["wrong"]["low"] > 0.5
    assert results["likelihood"][0]["model"]["top1"]["mean"] == 1
    assert passed(results)[LOSS] and passed(results)[WER]


def test_a_model_that_does_not_listen_is_found_out(make_world):
    results = evaluate(make_world(Reader(listens=False)))
    assert results["likelihood"][0]["gain"]["wrong"]["mean"] == 0
    assert results["metrics"]["wer"]["wer"]["model"]["mean"] > 0.5
    assert passed(results)[LOSS] is False and passed(results)[WER] is False


def test_who_says_nothing_has_said_all_words_wrong(make_world):
    results = evaluate(make_world(Reader(listens=True, silent=True)))
    assert [clip["new_frames"] for clip in results["generation"]["clips"]] == [0, 0, 0]
    for condition in ("model", "wrong", "silence"):
        found = results["metrics"]["wer"]["wer"][condition]
        assert found["mean"] == 1 and found["count"] == 3
    assert "model" not in results["metrics"]["level"]["level"], "what judges sound has none to judge"
    assert passed(results)[WER] is False
