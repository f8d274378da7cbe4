"""`tools/average_checkpoints.py`: the mean is the mean, what is written generates, what does not fit is refused."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from valle.bin.trainer_audiolm import main as train
from valle.config import ModelConfig, to_dict
from valle.engine.averaging import average_between, average_files
from valle.engine.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from valle.models import build_model, load_model
from valle.utils.errors import UserError
from valle.utils.sharded import write_sharded

TOOL = Path(__file__).resolve().parent.parent / "tools" / "average_checkpoints.py"
CODEC = {"name": "tiny", "frame_rate": 50.0, "num_quantizers": 4, "codebook_size": 30}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("average_checkpoints", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["average_checkpoints"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["average_checkpoints"]


def write(folder, name, step, stage=0, change=None, entries=None, **flags):
    """A checkpoint with random weights, `change`d, as a training writes it."""
    torch.manual_seed(step)
    config = ModelConfig(
        decoder_dim=16, nhead=flags.pop("nhead", 2), num_decoder_layers=1, num_quantizers=4, **flags
    )
    weights = build_model(config, CODEC["codebook_size"]).state_dict()
    if change is not None:
        change(weights)
    contents = {
        "config": {"model": to_dict(config), "data": {"max_duration": step}, "train": {"seed": step}},
        "codec": CODEC, "text_symbols": [], "version": "0", "model": weights, "optimizer": {"state": torch.ones(5)},
        "train_stage": stage, "step": step, "epoch": step + 1, "batch_idx_train": step, "average_period": 1,
        "scheduler": {"stage_start": [0, 1], "seconds": 1.0}, **(entries or {}),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder, [name], contents)
    return folder / name


def weights_of(path):
    return load_checkpoint(path)["model"]


def assert_mean(found, models):
    for name, value in found.items():
        expected = torch.stack([model[name].double() for model in models]).mean(0).float()
        assert torch.equal(value, expected), name


def test_the_mean_of_the_last_epochs_generates(tool, tmp_path, capsys):
    for number in range(1, 6):
        write(tmp_path, f"epoch-{number}.pt", number)
    tool.main(["--exp-dir", str(tmp_path), "--epoch", "4", "--avg", "3"])
    output = tmp_path / "epoch-4-avg-3.pt"
    assert capsys.readouterr().out.strip() == str(output)
    contents = torch.load(output, weights_only=True)
    assert_mean(contents["model"], [weights_of(tmp_path / f"epoch-{number}.pt") for number in (2, 3, 4)])
    assert (
        contents["config"]["train"] == {"seed": 4}
        and contents["codec"] == CODEC
        and contents["version"] == "0"
    )
    assert (contents["step"], contents["train_stage"]) == (4, 0)
    assert not {"optimizer", "scheduler", "batch_idx_train"} & set(contents)
    model, _ = load_model(output)
    assert model.inference(torch.zeros(1, 5, 4, dtype=torch.long), max_new_tokens=3).shape == (1, 8, 4)
    assert newest_checkpoint(tmp_path).path.name == "epoch-5.pt", "a training does not go on from an average"


def test_the_mean_of_the_last_steps_and_of_given_files(tool, tmp_path):
    paths = {step: write(tmp_path, f"checkpoint-{step}.pt", step) for step in (80, 100, 90, 1000, 110)}
    tool.main(["--exp-dir", str(tmp_path), "--iter", "110", "--avg", "3"])
    assert_mean(
        weights_of(tmp_path / "checkpoint-110-avg-3.pt"), [weights_of(paths[s]) for s in (90, 100, 110)]
    )
    other = write(tmp_path / "other", "best-valid-loss.pt", 7)
    tool.main([str(paths[1000]), str(other), "--output", str(tmp_path / "mine.pt")])
    assert_mean(weights_of(tmp_path / "mine.pt"), [weights_of(paths[1000]), weights_of(other)])
    assert load_checkpoint(tmp_path / "mine.pt")["step"] == 1000, (
        "the newest one's, in whatever order they are given"
    )


def test_the_running_average_is_the_mean_over_the_steps_between(tool, tokenized, tmp_path):
    """Through both stages of a training: the second begins at a step that is no multiple of the period."""
    common = (
        "--decoder-dim 16 --nhead 2 --num-decoder-layers 1 --max-duration 8 --optimizer-name AdamW --base-lr 1e-2 "
        "--scheduler-name constant --average-period 2 --save-every-n 1 --keep-last-k 0 --tensorboard false"
    ).split()  # fmt: skip
    common += ["--manifest-dir", str(tokenized), "--exp-dir", str(tmp_path / "exp")]
    train([*common, "--train-stage", "1", "--max-steps", "3"])
    train([*common, "--train-stage", "2", "--max-steps", "7"])
    exp, last = tmp_path / "exp", 10
    assert load_checkpoint(exp / "checkpoint-10.pt")["batch_idx_train"] == 7
    # In the stage the average took up steps 2, 4, 6: in the folder 5, 7, 9.
    tool.main(["--exp-dir", str(exp), "--iter", str(last), "--avg", "4", "--use-averaged-model", "true"])
    found = weights_of(exp / "checkpoint-10-avg-4-use-averaged-model.pt")
    expected = [weights_of(exp / f"checkpoint-{step}.pt") for step in (7, 9)]  # behind 6, which knows step 5
    moved = 0
    for name, value in found.items():
        mean = (expected[0][name] + expected[1][name]) / 2
        torch.testing.assert_close(value, mean, rtol=1e-5, atol=1e-6)
        moved += not torch.allclose(mean, expected[1][name], rtol=1e-4, atol=1e-5)
    assert moved > 10
    whole = average_between(None, exp / "checkpoint-10.pt")["model"]
    models = [weights_of(exp / f"checkpoint-{step}.pt") for step in (5, 7, 9)]
    for name, value in whole.items():
        torch.testing.assert_close(
            value, torch.stack([m[name] for m in models]).mean(0), rtol=1e-5, atol=1e-6
        )


def test_the_running_average_of_epochs_begins_with_the_stage(tool, tmp_path):
    def averaged(step):
        value = {"model_avg": {name: torch.full_like(v, step) for name, v in base.items()}}
        return {**value, "batch_idx_train": step, "scheduler": {"stage_start": [30, 4], "seconds": 1.0}}

    base = weights_of(write(tmp_path, "epoch-3.pt", 30, stage=1))
    for epoch in (4, 5, 6):
        write(tmp_path, f"epoch-{epoch}.pt", 10 * (epoch - 3), stage=2, entries=averaged(10 * (epoch - 3)))
    flags = ["--exp-dir", str(tmp_path), "--epoch", "6", "--use-averaged-model", "true", "--avg"]
    tool.main([*flags, "2"])
    found = weights_of(tmp_path / "epoch-6-avg-2-use-averaged-model.pt")["ar_predict_layer.weight"]
    assert torch.equal(found, torch.full_like(found, (30 * 30 - 10 * 10) / 20)), (
        "from epoch-4.pt's to epoch-6.pt's"
    )
    tool.main([*flags, "3"])
    found = weights_of(tmp_path / "epoch-6-avg-3-use-averaged-model.pt")["ar_predict_layer.weight"]
    assert torch.equal(found, torch.full_like(found, 30.0)), "all of the stage: what the last file holds"
    with pytest.raises(UserError, match="--avg is 4, but the stage of .*epoch-6.pt' has only 3 epoch"):
        tool.main([*flags, "4"])


def test_sharded_checkpoints_are_averaged_as_files_are(tool, tmp_path):
    for number in (1, 2, 3):
        path = write(tmp_path / "files", f"epoch-{number}.pt", number, share_embedding=True)
        write_sharded(tmp_path / "folders" / f"epoch-{number}", load_checkpoint(path))
    found = []
    for folder in ("files", "folders"):
        tool.main(["--exp-dir", str(tmp_path / folder), "--epoch", "3", "--avg", "2"])
        found.append(weights_of(tmp_path / folder / "epoch-3-avg-2.pt"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    load_model(tmp_path / "folders" / "epoch-3-avg-2.pt")


def test_sums_do_not_round_and_integers_come_from_the_last(tmp_path):
    def fill(value):
        def change(weights):
            weights["ar_predict_layer.weight"].fill_(value)
            weights["count"] = torch.tensor(int(abs(value)))

        return change

    values = [3e9, 1.0, -3e9]  # the 1 is lost in float32
    paths = [write(tmp_path, f"epoch-{i}.pt", i, change=fill(v)) for i, v in enumerate(values, 1)]
    found = average_files([paths[0], paths[2], paths[1]])["model"]
    assert torch.allclose(found["ar_predict_layer.weight"], torch.tensor(1 / 3))
    assert found["ar_predict_layer.weight"].dtype == torch.float32
    assert int(found["count"]) == 3_000_000_000


def test_tied_weights_stay_one_tensor(tool, tmp_path):
    for number in (1, 2):
        write(tmp_path, f"epoch-{number}.pt", number, share_embedding=True, entries={"optimizer": {}})
    output = tool.average(tool.AverageConfig(exp_dir=str(tmp_path), epoch=2, avg=2))
    found = weights_of(output)
    assert found["ar_predict_layer.weight"].data_ptr() == found["ar_audio_embedding.weight"].data_ptr()
    assert output.stat().st_size < 1.02 * (tmp_path / "epoch-2.pt").stat().st_size


def test_the_optimizers_state_is_not_read(tmp_path, monkeypatch):
    """A checkpoint holds two or three times its weights in training state."""
    opened = []

    def sizes(path, **options):
        assert options["mmap"]
        opened.append(path)
        return load_checkpoint(path, **options)

    monkeypatch.setattr("valle.engine.averaging.load_checkpoint", sizes)
    average_files([write(tmp_path, f"epoch-{number}.pt", number) for number in (1, 2)])
    assert len(opened) == 2


def poison(weights):
    weights["nar_decoder.norm.norm.weight"][3] = torch.nan


def test_what_cannot_be_averaged_is_named(tool, tmp_path):
    exp = tmp_path / "exp"
    for number, stage in ((1, 1), (2, 1), (3, 2), (4, 2), (6, 2)):
        write(exp, f"epoch-{number}.pt", number, stage)
    nan = write(exp, "epoch-5.pt", 5, 2, poison)
    heads = write(tmp_path / "heads", "epoch-4.pt", 4, 2, nhead=4)
    wide = write(tmp_path / "wide", "epoch-4.pt", 4, 2, prepend_bos=True)
    other = write(tmp_path / "other", "epoch-4.pt", 4, 2, entries={"codec": {**CODEC, "fingerprint": "f"}})
    same = write(tmp_path / "same", "epoch-4.pt", 4, 2, entries={"codec": {**CODEC, "fingerprint": "g"}})
    missing = write(
        tmp_path / "missing", "epoch-4.pt", 4, 2, lambda weights: weights.pop("ar_decoder.norm.bias")
    )
    broken = tmp_path / "broken.pt"
    broken.write_bytes(nan.read_bytes()[:3000])
    average = [
        write(tmp_path / "avg", f"checkpoint-{n}.pt", n, entries={"model_avg": weights_of(nan)})
        for n in (7, 8)
    ]
    four = str(exp / "epoch-4.pt")
    at = ["--exp-dir", str(exp)]
    cases = [
        ([*at, "--epoch", "4", "--avg", "3"], "stage 1: epoch-2.pt; stage 2: epoch-3.pt, epoch-4.pt"),
        ([*at, "--epoch", "8", "--avg", "3"], r"has no epoch-7.pt, epoch-8.pt, but epoch-1.pt, .*epoch-6.pt; lower"),
        ([*at, "--epoch", "2", "--avg", "3"], "--epoch 2 has only 2 epoch"),
        ([*at, "--iter", "4"], "has no checkpoint-4.pt, but no checkpoint-"),
        (["--exp-dir", str(average[0].parent), "--iter", "8", "--avg", "3"], "has 2 checkpoint.*checkpoint-7.pt, "),
        ([*at, "--epoch", "5", "--avg", "2"], "epoch-5.pt': weight 'nar_decoder.norm.norm.weight' is not finite"),
        (["--exp-dir", str(tmp_path / "no"), "--epoch", "5"], "--exp-dir '.*no' is not there"),
        ([four, str(heads)], "differ in config's model nhead: 2 and 4"),
        ([four, str(wide)], "differ in config's model prepend_bos: False and True"),
        ([str(other), str(same)], "differ in codec's fingerprint: f and g"),
        ([four, str(missing)], r"weight 'ar_decoder.norm.bias': shape \(16,\) and None"),
        ([four, str(tmp_path / "none.pt")], "none.pt' does not exist"),
        ([four, str(broken)], "broken.pt' is not a checkpoint, or it is damaged"),
        ([four, four], "epoch-4.pt given twice"),
        ([four, "--epoch", "4"], "give one of --epoch N, --iter N, or files"),
        ([], "give one of --epoch N, --iter N, or files"),
        ([*at, "--epoch", "4", "--avg", "0"], "--avg is 0, expected 1 or more"),
        ([*at, "--epoch", "4", "--avg", "1", "--output", str(exp)], "a folder, expected a file"),
        ([four, str(nan), "--use-averaged-model", "true"], "epoch-4.pt' has no running average; train with"),
        ([four, "--use-averaged-model", "true"], "1 file.* expected 2: start and end"),
        ([str(average[1]), str(average[0]), "--use-averaged-model", "true"], "are -1 steps apart"),
        ([str(p) for p in average] + ["--use-averaged-model", "true"], "checkpoint-7.pt': weight 'nar_.* not finite"),
    ]  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    for flags, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            tool.main(flags)
        assert "\n" not in str(caught.value), flags
    assert sorted(tmp_path.rglob("*")) == before, "nothing was written"


def test_dropout_may_differ(tool, tmp_path):
    """A training that went on with another dropout is the same model."""
    paths = [write(tmp_path, f"epoch-{n}.pt", n, dropout=0.1 * n) for n in (1, 2)]
    assert len(average_files(paths)["averaged"]) == 2
