"""The whole evaluation with a model and a codec whose answers are known."""

import dataclasses
import json
import math

import numpy as np
import pytest
import soundfile

from valle.config import TrainConfig
from valle.evaluation import evaluate as module
from valle.evaluation.evaluate import EvaluateConfig, evaluate
from valle.evaluation.summary import format_results, training_command
from valle.utils.errors import UserError


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
    monkeypatch.setattr(module, "dnsmos_available", lambda: False)
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
    )
    return config, cuts, model


def test_results_wavs_and_report(world, tmp_path):
    config, cuts, model = world
    model.stop_after = 30
    results = evaluate(config)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=refuse) == results
    assert results["prompt_ratio"] == 0.5 and results["data"]["test"] == {
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

    clips = results["generation"]["clips"]
    assert len(clips) == 2 and all(clip["new_frames"] == min(30, clip["asked_frames"]) for clip in clips)
    for clip in clips:
        full, rate = soundfile.read(tmp_path / "out" / "clips" / f"{clip['id']}_full.wav")
        assert (rate, len(full)) == (8000, (25 + clip["new_frames"]) * 160)
        assert (
            len(soundfile.read(tmp_path / "out" / "clips" / f"{clip['id']}_continuation.wav")[0])
            == clip["new_frames"] * 160
        )
        assert len(soundfile.read(tmp_path / "out" / "clips" / f"{clip['id']}_prompt.wav")[0]) == 25 * 160
    page = (tmp_path / "out" / "report.html").read_text()
    page = page.replace('<span class="flag">', "").replace("</span>", "")
    assert (
        page.count("<audio") == 2 * 6
        and "words of" in page
        and "trainer_audiolm --decoder-dim 64 --prompt-ratio 0.5 --max-steps 7" in page
    )
    assert "AR loss" in format_results(results)


def test_same_seed_same_results_but_for_times(world):
    config, _, _ = world
    first, second = evaluate(config), evaluate(dataclasses.replace(config, report=False))
    assert first.pop("run") and second.pop("run") and first == second


def test_model_that_stops_at_once_is_reported_not_a_crash(world, tmp_path):
    config, _, model = world
    model.stop_after = 0
    results = evaluate(config)
    assert [clip["new_frames"] for clip in results["generation"]["clips"]] == [0, 0]
    assert "nothing to play" in (tmp_path / "out" / "report.html").read_text()


def test_lost_recordings_leave_the_codes(world, tmp_path):
    config, cuts, _ = world
    for cut in cuts["test"]:
        (tmp_path / "audio" / f"{cut.id}.wav").unlink()
    results = evaluate(config)
    assert results["audio"]["log_mel_distance"] == {} and len(results["generation"]["clips"]) == 2


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
        UserError, match=r"codec 'other' \(beef\), but the checkpoint was trained on 'tone' \(f00d\)"
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
