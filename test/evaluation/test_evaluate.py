"""The whole evaluation with a model and a codec whose answers are known."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from valle.config import TrainConfig
from valle.evaluation import evaluate as module
from valle.evaluation import judging
from valle.evaluation.clips import continuation_batches, longest_continuation
from valle.evaluation.compare import compare
from valle.evaluation.evaluate import EvaluateConfig, evaluate
from valle.evaluation.summary import format_results, training_command
from valle.utils.errors import UserError


class Loudness:
    """Root mean square of the audio, and how far it is from the reference's."""

    name, task, keys = "loudness", "similarity", {"level": "higher", "error": "lower"}
    calls = 0

    def missing(self):
        return None

    def applies(self, case):
        return True

    def __call__(self, audio, case):
        type(self).calls += 1
        level, true = (float(np.sqrt(np.mean(np.square(part.wav)))) for part in (audio, case.reference))
        return {"level": level, "error": abs(level - true)}


class Absent(Loudness):
    name = "absent"

    def missing(self):
        return "the absent metric needs: pip install nothing"


class Words(Loudness):
    """Length of what is heard, in seconds, where there are words."""

    name, task, keys = "words", "speech", {"seconds": "lower"}

    def applies(self, case):
        return case.text is not None

    def __call__(self, audio, case):
        return {"seconds": audio.wav.shape[1] / audio.sample_rate}


class Spectrum:
    """Magnitudes of 16 bands of each tenth of a second."""

    name = "spectrum"

    def missing(self):
        return None

    def __call__(self, audio):
        windows = audio.wav[0][: audio.wav.shape[1] // 800 * 800].reshape(-1, 800)
        return np.abs(np.fft.rfft(windows))[:, 1:].reshape(len(windows), 16, 25).mean(axis=2)


@pytest.fixture
def world(tmp_path, monkeypatch, make_model, codec, make_codes, make_cut):
    """Cuts of three splits, a checkpoint and a codec, where the evaluation looks for them."""
    sizes = {"train": [80] * 6, "validation": [70] * 2, "test": [75, 90, 40, 110]}
    cuts = {
        split: [
            make_cut(f"{split}-{n}", make_codes(frames, seed=100 * len(split) + n))
            for n, frames in enumerate(sizes[split])
        ]
        for split in sizes
    }
    saved = {
        "codec": {
            "name": "tone", "fingerprint": "f00d", "sample_rate": 8000, "frame_rate": 50.0,
            "num_quantizers": 3, "codebook_size": 12,
        },
        "config": {"model": {"decoder_dim": 64}, "data": {"prompt_ratio": 0.5}, "train": {"max_steps": 7}},
        "version": "0.1.0", "step": 7, "epoch": 1, "train_stage": 2, "best_valid_loss": math.inf,
    }  # fmt: skip
    model = make_model()
    monkeypatch.setattr(module, "load_model", lambda path, device: (model, saved))
    monkeypatch.setattr(module, "matching_codec", lambda info, device, num_quantizers: codec)
    monkeypatch.setattr(
        module, "read_manifest", lambda path: cuts[path.name.split(".")[0].removeprefix("cuts_")]
    )
    monkeypatch.setattr(module, "load_codes", lambda cut, quantizers, size: np.array(cut.custom["codes"]))
    loudness = Loudness()
    monkeypatch.setattr(judging, "METRICS", {"loudness": lambda: loudness, "absent": Absent, "words": Words})
    monkeypatch.setattr(judging, "EMBEDDINGS", {"spectrum": Spectrum})
    log = tmp_path / "exp" / "log"
    log.mkdir(parents=True)
    lines = [
        {"step": n, "stage": 1, "split": "train", "ArLoss": 3 - n / 5, "ArTop10Accuracy": n / 10}
        for n in range(1, 6)
    ]
    (log / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = EvaluateConfig(
        checkpoint=str(tmp_path / "exp" / "best.pt"),
        manifest=str(tmp_path / "data" / "cuts_test.jsonl.gz"),
        output_dir=str(tmp_path / "out"),
        num_clips=2,
        prompt_seconds=0.5,
        device="cpu",
        report=False,
    )
    return config, cuts, model


def test_results_wavs_and_report(world, tmp_path):
    config, cuts, model = world
    model.stop_after = 30
    results = evaluate(dataclasses.replace(config, report=True))

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=refuse) == results
    assert results["prompt"] == "50% of it" and results["data"]["test"] == {
        "manifest": config.manifest, "cuts": 4, "frames": 315, "seconds": 6.3,
    }  # fmt: skip
    assert [cut["frames"] for cut in results["per_cut"]] == [38, 45, 20, 55]
    ar, *nar = results["likelihood"]
    assert ar["gain"]["unigram"]["mean"] == pytest.approx(
        ar["unigram"]["loss"]["mean"] - ar["model"]["loss"]["mean"]
    )
    assert ar["gain"]["unigram"]["low"] > 0 and len(nar) == 2
    assert ar["model"]["top1"]["mean"] > 0.5 > 3 * ar["unigram"]["top1"]["mean"]
    assert (
        results["audio"]["log_mel_distance"]["resynthesis"]["mean"]
        < results["audio"]["log_mel_distance"]["silence"]["mean"]
    )
    assert results["audio"]["dnsmos"] is None and results["checks"][-1]["passed"] is None

    # test-2 goes on for less than a second after the prompt
    clips = results["generation"]["clips"]
    assert [clip["id"] for clip in clips] == ["test-0", "test-1", "test-3"]
    assert all(clip["all_new_frames"] == [30, 30] and clip["finish_reasons"] == ["eos"] * 2 for clip in clips)
    shown = [clip for clip in clips if (tmp_path / "out" / "clips" / f"{clip['id']}_full.wav").exists()]
    assert len(shown) == 2
    for clip in shown:
        full, rate = soundfile.read(tmp_path / "out" / "clips" / f"{clip['id']}_full.wav")
        assert (rate, len(full)) == (8000, (25 + clip["new_frames"]) * 160)
        assert (
            len(soundfile.read(tmp_path / "out" / "clips" / f"{clip['id']}_continuation.wav")[0])
            == clip["new_frames"] * 160
        )
        assert len(soundfile.read(tmp_path / "out" / "clips" / f"{clip['id']}_prompt.wav")[0]) == 25 * 160
        assert (tmp_path / "out" / "clips" / f"{clip['id']}_continuation-1.wav").exists()
    page = (tmp_path / "out" / "report.html").read_text()
    page = page.replace('<span class="flag">', "").replace("</span>", "")
    assert "words of" in page
    assert "trainer_audiolm --decoder-dim 64 --prompt-ratio 0.5 --max-steps 7" in page
    assert "AR loss" in format_results(results)
    assert (tmp_path / "out" / "results.md").read_text().startswith("| checkpoint")


def test_bits_perplexity_and_positions(world):
    config, _, _ = world
    results = evaluate(dataclasses.replace(config, tasks="likelihood"))
    losses = [entry["model"]["loss"]["mean"] for entry in results["likelihood"]]
    for entry, loss in zip(results["likelihood"], losses, strict=True):
        assert entry["model"]["bits"]["mean"] == pytest.approx(loss / math.log(2))
        assert entry["model"]["perplexity"]["mean"] == pytest.approx(math.exp(loss))
    totals = results["totals"]["model"]
    assert totals["nats_per_frame"]["mean"] == pytest.approx(sum(losses))
    assert totals["bits_per_second"]["mean"] == pytest.approx(50 * sum(losses) / math.log(2))
    positions = results["positions"]  # half seconds of 25 frames; targets of 38, 45, 20, 55 frames
    assert positions["start"] == [0, 25, 50] and positions["frames"] == [95, 58, 5]
    weights = np.array(positions["frames"]) / sum(positions["frames"])
    for name in ("model", "unigram", "bigram"):
        by_place = np.array(positions["quantizers"][name]["loss"])  # (Q, P)
        assert by_place @ weights == pytest.approx([e[name]["loss"]["mean"] for e in results["likelihood"]])
    assert results["metrics"] == {} and results["generation"]["clips"] == []


def test_every_figure_stands_beside_truth_ceiling_and_baselines(world):
    config, _, model = world
    results = evaluate(config)
    level, error = results["metrics"]["loudness"]["level"], results["metrics"]["loudness"]["error"]
    assert list(level) == ["recording", "resynthesis", "model", "loop", "unigram", "silence"]
    assert level["silence"]["mean"] == 0 and error["recording"]["mean"] == 0
    assert error["resynthesis"]["mean"] < error["silence"]["mean"] and level["model"]["count"] == 3
    # Words of the cut are not those of its rest: whole cuts, and no word about continuations.
    words = results["metrics"]["words"]["seconds"]
    assert list(words) == ["recording", "resynthesis"] and results["metric_info"]["words"]["whole"]
    assert words["recording"]["mean"] == pytest.approx((75 + 90 + 110) / 3 / 50)
    assert results["left_out"] == {"absent": "the absent metric needs: pip install nothing"}
    frechet = results["distances"]["spectrum"]["frechet"]
    assert list(frechet) == ["resynthesis", "model", "loop", "unigram", "silence"]
    assert frechet["resynthesis"]["mean"] < frechet["unigram"]["mean"] < frechet["silence"]["mean"]
    statistics = results["generation"]["statistics"]
    assert statistics["repetition"]["model"]["mean"] > statistics["repetition"]["recording"]["mean"]
    figures = results["clips_table"]["test-1"]
    assert figures["model-0"]["loudness"] != figures["model-1"]["loudness"]  # seeds differ


def test_a_stopped_run_goes_on_where_it_was(world, tmp_path, monkeypatch):
    config, _, model = world
    whole = evaluate(dataclasses.replace(config, output_dir=str(tmp_path / "whole")))
    made, judged = model.calls, Loudness.calls
    real = judging.judge_clip

    def broken(clip, *rest):
        if clip.cut_id == "test-3":
            raise KeyboardInterrupt
        return real(clip, *rest)

    monkeypatch.setattr(module, "judge_clip", broken)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config)
    monkeypatch.setattr(module, "judge_clip", real)
    model.calls = Loudness.calls = 0
    resumed = evaluate(config)
    assert model.calls == 0 and 0 < Loudness.calls < judged / 2 and made == config.num_samples
    assert whole.pop("run") and resumed.pop("run") and resumed == whole


def test_other_settings_or_weights_do_not_take_old_parts(world):
    config, _, model = world
    first = evaluate(config)
    for change in ({"temperature": 0.5}, {"seed": 43}, {"prompt_seconds": 0.4}):
        model.calls = 0
        other = evaluate(dataclasses.replace(config, **change))
        assert model.calls == 2 and other["config_hash"] != first["config_hash"]
    model.calls, model.weight.data[0] = 0, 1.0
    assert evaluate(config)["config_hash"] != first["config_hash"] and model.calls == 2


def test_a_damaged_part_is_made_again(world, tmp_path):
    config, _, model = world
    first = evaluate(config)
    for part in (tmp_path / "out" / "parts").iterdir():
        part.write_bytes(b"{ no")
    again = evaluate(config)
    assert first.pop("run") and again.pop("run") and first == again


def test_a_planted_regression_is_found(world, tmp_path, make_model):
    config, _, model = world
    good = evaluate(config)

    def shifted(x, x_lens, y, y_lens, quantizer):
        return make_model.nar_logits(model, x, x_lens, y, y_lens, quantizer).roll(1, dims=-1)

    model.nar_logits = shifted
    bad = evaluate(dataclasses.replace(config, output_dir=str(tmp_path / "bad")))
    found = compare(good, bad)
    assert found.verdict == "worse" and found.figures["bits per second"]["difference"]["low"] > 0
    assert found.figures["loss, quantizer 0 (AR)"]["verdict"] == "cannot tell"
    assert compare(bad, good).verdict == "better"


@pytest.mark.parametrize(
    "tasks, expected",
    [
        ("auto", {"speech"}),
        ("all", {"speech", "music"}),
        ("music,codec", {"music", "codec"}),
        ("codec", set()),
    ],
)
def test_tasks_are_chosen(world, tasks, expected):
    _, cuts, _ = world
    chosen = judging.choose_tasks(tasks, cuts["test"])
    assert expected <= set(chosen) and ("music" in chosen) == ("music" in expected)


def test_a_piano_is_not_heard_as_speech(world):
    """Notes without words: no DNSMOS; with words, or without either, it is measured."""

    def cut(text, midi):
        words = [SimpleNamespace(text=text)] if text else []
        return SimpleNamespace(supervisions=words, custom={"midi": midi} if midi else {})

    for text, midi, expected in (("", "a.mid", False), ("words", "a.mid", True), ("", "", True)):
        assert ("quality" in judging.choose_tasks("auto", [cut(text, midi)])) == expected


def test_unknown_tasks_are_named(world):
    with pytest.raises(
        UserError, match="--tasks is 'codec,songs', expected auto, all, or some of likelihood,"
    ):
        judging.choose_tasks("codec,songs", [])


def test_batches_hold_all_rows_and_bounded_frames():
    lengths = [200, 5000, 900, 300, 20_000, 200]
    batches = continuation_batches([(100, length - 100) for length in lengths])
    assert sorted(sum(batches, [])) == list(range(6))
    for batch in batches:
        longest = 100 + max(longest_continuation(lengths[row] - 100) for row in batch)
        assert len(batch) == 1 or longest * len(batch) <= 40_000


def test_same_seed_same_results_but_for_times(world):
    config, _, _ = world
    first, second = evaluate(config), evaluate(dataclasses.replace(config, report=True))
    assert first.pop("run") and second.pop("run") and first == second


def test_model_that_stops_at_once_is_reported_not_a_crash(world, tmp_path):
    config, _, model = world
    model.stop_after = 0
    results = evaluate(dataclasses.replace(config, report=True))
    assert [clip["new_frames"] for clip in results["generation"]["clips"]] == [0, 0, 0]
    assert results["generation"]["statistics"]["early_stop"]["model"]["mean"] == 1
    assert "model" not in results["metrics"]["loudness"]["level"]
    assert (tmp_path / "out" / "report.html").exists()


def test_lost_recordings_leave_the_codes(world, tmp_path):
    config, cuts, _ = world
    for cut in cuts["test"]:
        (tmp_path / "audio" / f"{cut.id}.wav").unlink()
    results = evaluate(config)
    assert results["audio"]["log_mel_distance"] == {} and len(results["generation"]["clips"]) == 3
    assert results["metrics"]["loudness"]["error"]["resynthesis"]["mean"] == 0  # now the reference itself


def test_cuts_that_are_in_training_too_are_refused(world):
    config, cuts, _ = world
    cuts["train"].append(cuts["test"][1])
    with pytest.raises(UserError, match="'test-1' and 0 more are in the held-out and the train cuts both"):
        evaluate(config)


def test_codes_of_another_codec_are_refused(world, tmp_path):
    config, _, _ = world
    (tmp_path / "data").mkdir()
    info = {"name": "other", "num_quantizers": 3, "codebook_size": 12, "fingerprint": "beef"}
    (tmp_path / "data" / "codec.json").write_text(json.dumps(info))
    with pytest.raises(
        UserError,
        match=r"codec 'tone' \(fingerprint f00d\), but the codes in .* are of 'other' \(fingerprint beef\)",
    ):
        evaluate(config)


def test_missing_arguments_are_named(tmp_path):
    with pytest.raises(UserError, match="--manifest is missing"):
        evaluate(EvaluateConfig(checkpoint="a.pt", output_dir=str(tmp_path)))


def test_training_command_shows_what_differs_from_the_defaults():
    config = {"train": {**dataclasses.asdict(TrainConfig()), "tensorboard": False, "train_stage": 2}}
    assert (
        training_command(config) == "python -m valle.bin.trainer_audiolm --train-stage 2 --tensorboard false"
    )
