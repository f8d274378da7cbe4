"""Stages that follow each other, fine-tuning from a checkpoint, being asked to end."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from synthetic import TINY_CODEBOOK, save_tiny_codec, write_tokenized

from valle.bin import trainer_codec
from valle.bin.trainer_audiolm import main
from valle.codecs import load_codec
from valle.config import TrainConfig
from valle.data.checks import check_codec
from valle.data.dataset import read_codec_info
from valle.engine.checkpoint import load_checkpoint, save_checkpoint
from valle.engine.trainer import Trainer
from valle.models import load_model
from valle.utils.errors import Unfinished, UserError

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = (
    "--decoder-dim 32 --nhead 4 --num-decoder-layers 2 --max-duration 8 --num-buckets 2 --log-interval 1 "
    "--optimizer-name AdamW --scheduler-name constant --base-lr 1e-3 --warmup-steps 2 --tensorboard false"
).split()
DIMS = SMALL[:6]


def run(tokenized, exp_dir, *flags, small=SMALL):
    main([*small, "--manifest-dir", str(tokenized), "--exp-dir", str(exp_dir), *map(str, flags)])
    return exp_dir


def weights(path, prefix=""):
    return {k: v for k, v in load_checkpoint(path)["model"].items() if k.startswith(prefix)}


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.pt")}


def last_epoch(folder):
    return max(folder.glob("epoch-*.pt"), key=lambda path: int(path.stem.split("-")[1]))


# ------------------------------------------------------------------------------------------------ auto


def test_auto_is_stage_1_then_stage_2_and_a_second_call_finds_nothing_left(tokenized, tmp_path, capfd):
    flags = ("--num-epochs", 2, "--save-every-n", 2)
    auto = run(tokenized, tmp_path / "auto", *flags, "--train-stage", "auto")
    hand = tmp_path / "hand"
    for stage in (1, 2):
        run(tokenized, hand, *flags, "--train-stage", stage)
    assert {path.name for path in auto.glob("*.pt")} == {path.name for path in hand.glob("*.pt")}
    for name in ("best-valid-loss.pt", "best-valid-loss-stage1.pt", "epoch-2.pt", "epoch-4.pt"):
        assert equal(weights(auto / name), weights(hand / name)), name
    best, first = load_checkpoint(auto / "best-valid-loss.pt"), auto / "best-valid-loss-stage1.pt"
    assert best["stages"] == [1, 2] and load_checkpoint(first)["stages"] == [1]
    assert best["train_stage"] == 2 and equal(
        weights(auto / "best-valid-loss.pt", "ar_"), weights(first, "ar_")
    )
    before = times(auto)
    capfd.readouterr()
    run(tokenized, auto, *flags, "--train-stage", "auto")
    assert times(auto) == before
    assert capfd.readouterr().err.count("nothing left to do") == 2


@pytest.mark.parametrize(
    "limit", [("--num-epochs", 2, "--valid-interval", 4), ("--max-steps", 3, "--valid-interval", 2)]
)
def test_auto_goes_on_exactly_wherever_it_was_killed(tokenized, tmp_path, monkeypatch, limit):
    """Also between a stage's last validation and its last checkpoint, and between the two stages."""
    flags = ("--train-stage", "auto", "--save-every-n", 3, "--max-duration", 20, "--base-lr", 1e-2, *limit)
    whole = run(tokenized, tmp_path / "whole", *flags)
    expected = weights(whole / "best-valid-loss.pt")
    best = load_checkpoint(whole / "best-valid-loss-stage1.pt")
    assert best["batch_idx_train"] == 6 or "--max-steps" in limit, "the last validation of stage 1 matters"
    saves, written = 0, []
    plain_save = Trainer.save

    class Killed(BaseException):
        pass

    def save(self, *names):
        nonlocal saves
        saves += 1
        written.append(names[0])
        if saves == deadly:
            raise Killed
        plain_save(self, *names)
        if saves == -deadly:
            raise Killed

    monkeypatch.setattr(Trainer, "save", save)
    deadly = 99
    run(tokenized, tmp_path / "count", *flags)
    assert saves > 6
    # Before a save and behind one, all over the chain, and where the stages meet.
    between = next((-1 - number for number, name in enumerate(written) if name == "epoch-2.pt"), -saves // 2)
    for deadly in [*[sign * number for number in range(1, saves + 1) for sign in (1, -1)][1::6], between]:
        saves = 0
        broken = tmp_path / f"broken{deadly}"
        with pytest.raises(Killed):
            run(tokenized, broken, *flags)
        deadly = 99
        run(tokenized, broken, *flags)
        assert equal(weights(broken / "best-valid-loss.pt"), expected)
        for name in ("best-valid-loss-stage1.pt", "best-valid-loss-stage2.pt"):
            assert equal(weights(broken / name), weights(whole / name)), name
        shutil.rmtree(broken)


def test_auto_with_one_quantizer_has_one_stage(tokenized, tmp_path):
    exp = run(tokenized, tmp_path / "exp", "--train-stage", "auto", "--num-quantizers", 1, "--num-epochs", 1)
    assert (exp / "best-valid-loss-stage1.pt").is_file() and not (exp / "best-valid-loss-stage2.pt").exists()
    contents = load_checkpoint(exp / "best-valid-loss.pt")
    assert contents["train_stage"] == 1 and contents["stages"] == [1]


def test_ar_is_continued_after_nar_and_the_best_model_stays_whole(tokenized, tmp_path):
    exp = tmp_path / "exp"
    run(tokenized, exp, "--train-stage", "auto", "--num-epochs", 2, "--keep-last-k", 1)
    trained_nar = weights(exp / "best-valid-loss-stage2.pt", "nar_")
    files = {name: stamp for name, stamp in times(exp).items() if name.startswith("epoch")}
    run(tokenized, exp, "--train-stage", 1, "--num-epochs", 4, "--keep-last-k", 1)
    best = load_checkpoint(exp / "best-valid-loss.pt")
    assert best["train_stage"] == 1, "four epochs are better than two"
    assert best["stages"] == [1, 2], "a whole model"
    assert equal(weights(exp / "best-valid-loss.pt", "nar_"), trained_nar)
    # Nothing that another stage, or this one before it, has written is gone or changed.
    assert files.items() <= times(exp).items()
    # What went on is what four epochs at once give: same batches, same optimizer, same dropout.
    once = run(tokenized, tmp_path / "once", "--train-stage", 1, "--num-epochs", 4)
    assert equal(weights(last_epoch(exp), "ar_"), weights(once / "epoch-4.pt", "ar_"))
    # Stage 2 is still done, and continued, takes the newer AR half over.
    before = times(exp)
    run(tokenized, exp, "--train-stage", 2, "--num-epochs", 2, "--keep-last-k", 1)
    assert times(exp) == before
    run(tokenized, exp, "--train-stage", 2, "--num-epochs", 3, "--keep-last-k", 1)
    assert equal(weights(last_epoch(exp), "ar_"), weights(exp / "best-valid-loss-stage1.pt", "ar_"))
    assert load_checkpoint(last_epoch(exp))["train_stage"] == 2
    # Called again with the same flags, both are done.
    before = times(exp)
    run(tokenized, exp, "--train-stage", 1, "--num-epochs", 4, "--keep-last-k", 1)
    run(tokenized, exp, "--train-stage", 2, "--num-epochs", 3, "--keep-last-k", 1)
    assert times(exp) == before


def test_a_continued_stage_is_resumed_like_any_other(tokenized, tmp_path):
    """Killed after it has been taken up again behind another stage."""
    flags = ("--save-every-n", 2, "--num-epochs", 50)
    folders = [tmp_path / "whole", tmp_path / "broken"]
    for exp in folders:
        run(tokenized, exp, *flags, "--train-stage", 1, "--max-steps", 4)
        run(tokenized, exp, *flags, "--train-stage", 2, "--max-steps", 3)
    run(tokenized, folders[0], *flags, "--train-stage", 1, "--max-steps", 9)
    for steps in (5, 7, 9):
        run(tokenized, folders[1], *flags, "--train-stage", 1, "--max-steps", steps)
    last = [max(exp.glob("checkpoint-*.pt"), key=lambda path: int(path.stem[11:])) for exp in folders]
    assert last[0].name == last[1].name == "checkpoint-12.pt"
    assert equal(weights(last[0]), weights(last[1]))
    contents = load_checkpoint(last[0])
    assert contents["batch_idx_train"] == 9, "steps of the stage are counted without those of the other"


def test_a_joint_training_gives_its_halves_to_the_stages(tokenized, tmp_path):
    exp = run(tokenized, tmp_path / "exp", "--train-stage", 0, "--num-epochs", 1)
    joint = weights(exp / "best-valid-loss.pt", "nar_")
    run(tokenized, exp, "--train-stage", 1, "--max-steps", 2)
    assert equal(weights(exp / "best-valid-loss-stage1.pt", "nar_"), joint)
    assert load_checkpoint(exp / "epoch-1.pt")["train_stage"] == 0, "not overwritten"


def test_a_codec_is_trained_in_both_stages(tmp_path, monkeypatch):
    from valle.config import TrainConfig as Config

    trained = []
    monkeypatch.setattr(
        trainer_codec, "train_stage", lambda data, config, _: trained.append(config.train_stage)
    )
    main = trainer_codec.main
    main(["--train-stage", "auto"])
    main(["--train-stage", "2"])
    assert trained == [1, 2, 2]
    with pytest.raises(UserError, match="1 .everything., 2 .decoder, adversarial. or auto"):
        main([])
    with pytest.raises(UserError, match="x.pt"):
        main(["--train-stage", "1", "--init-from", "x.pt"])
    assert Config().train_stage == 0


def test_a_codec_starts_from_another_one(tmp_path, monkeypatch):
    given = save_tiny_codec(tmp_path / "tiny")
    seen = []

    class Trainer:
        def __init__(self, model, config, train, valid, saved):
            seen.append((model.codec, saved["config"]["codec"]))

        def resume(self):
            pass

        run = resume

    monkeypatch.setattr(trainer_codec, "Trainer", Trainer)
    monkeypatch.setattr(trainer_codec, "split_paths", lambda *_: [])
    monkeypatch.setattr(trainer_codec, "RandomSegments", lambda *_: None)
    trainer_codec.main(["--train-stage", "1", "--init-from", str(given), "--exp-dir", str(tmp_path / "exp")])
    ((codec, architecture),) = seen
    expected = load_codec(given)
    assert architecture["codebook_size"] == TINY_CODEBOOK
    assert codec.fingerprint() == expected.fingerprint()
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in codec.state_dict().items())
    assert any(parameter.requires_grad for parameter in codec.parameters())


# ------------------------------------------------------------------------------------------- fine-tuning


@pytest.fixture
def base(tokenized, tmp_path):
    """A trained checkpoint, in a folder of its own."""
    exp = run(tokenized, tmp_path / "base", "--num-epochs", 1, "--share-embedding", "true")
    return exp / "best-valid-loss.pt"


PLAIN = SMALL[6:]  # no architecture


@pytest.mark.parametrize("parts", ["all", "ar", "nar"])
@pytest.mark.parametrize("stage", [1, 2])
def test_init_from_gives_weights_and_architecture(tokenized, tmp_path, base, parts, stage):
    exp = run(tokenized, tmp_path / "exp", "--init-from", base, "--init-parts", parts, "--train-stage", stage,
              "--max-steps", 2, "--seed", 7, small=PLAIN)  # fmt: skip
    contents = load_checkpoint(exp / "checkpoint-2.pt")
    assert contents["config"]["model"]["decoder_dim"] == 32 and contents["config"]["model"]["share_embedding"]
    assert contents["step"] == 2 and contents["batch_idx_train"] == 2, "counters start anew"
    assert contents["stages"] == sorted({stage} | {"all": {1, 2}, "ar": {1}, "nar": {2}}[parts])
    idle = "nar_" if stage == 1 else "ar_"
    given = parts == "all" or idle.startswith(parts)
    assert equal(weights(exp / "checkpoint-2.pt", idle), weights(base, idle)) == given
    busy = "ar_" if stage == 1 else "nar_"
    moved = weights(exp / "checkpoint-2.pt", busy)
    assert not equal(moved, weights(base, busy))
    distance = max(float((moved[name] - value).abs().max()) for name, value in weights(base, busy).items())
    assert (distance < 5e-3) == (parts == "all" or busy.startswith(parts)), (
        "two steps from the base, or from elsewhere"
    )


def test_a_killed_fine_tuning_goes_on_without_its_base(tokenized, tmp_path, base):
    flags = ("--init-from", base, "--save-every-n", 2, "--num-epochs", 9)
    whole = run(tokenized, tmp_path / "whole", *flags, "--max-steps", 6, small=PLAIN)
    broken = run(tokenized, tmp_path / "broken", *flags, "--max-steps", 3, small=PLAIN)
    base.unlink()
    run(tokenized, broken, *flags, "--max-steps", 6, small=PLAIN)
    assert equal(weights(whole / "checkpoint-6.pt"), weights(broken / "checkpoint-6.pt"))


def test_what_does_not_fit_a_base_is_one_clear_line(tokenized, tmp_path, base):
    def fine_tune(*flags, init=base, small=PLAIN, manifests=tokenized):
        run(manifests, tmp_path / "exp", "--init-from", init, "--max-steps", 1, *flags, small=small)

    with pytest.raises(UserError, match="--nhead is 2, but .* was trained with 4; leave --nhead out"):
        fine_tune("--nhead", 2)
    with pytest.raises(UserError, match="--share-embedding is False, but .* True"):
        fine_tune("--share-embedding", "false")  # the default, said aloud
    with pytest.raises(UserError, match="nowhere.pt' does not exist"):
        fine_tune(init=tmp_path / "nowhere.pt")
    with pytest.raises(UserError, match="lies in --exp-dir"):
        run(tokenized, base.parent, "--init-from", base)
    with pytest.raises(UserError, match="--init-parts needs --init-from"):
        run(tokenized, tmp_path / "exp", "--init-parts", "ar")
    with pytest.raises(UserError, match="leave out --start-epoch"):
        run(tokenized, tmp_path / "exp", "--train-stage", "auto", "--start-epoch", 3)
    other = write_tokenized(tmp_path / "other", codebook_size=40)
    with pytest.raises(
        UserError, match=r"codebook_size 30\), but the codes in .* are of 'tiny' \(.*codebook_size 40"
    ):
        fine_tune(manifests=other)
    info = read_codec_info(tokenized)
    (tokenized / "codec.json").write_text(json.dumps(info | {"fingerprint": "f" * 16}))
    with pytest.raises(
        UserError, match="'tiny' .fingerprint 0{16}.*'tiny' .fingerprint f{16}.; run prepare.sh"
    ):
        fine_tune()
    (tokenized / "codec.json").write_text(json.dumps(info))
    contents = load_checkpoint(base)
    name = "nar_decoder.layers.1.linear2.weight"
    contents["model"][name] = contents["model"][name][:, :5].clone()
    save_checkpoint(tmp_path, ["bent.pt"], contents)
    with pytest.raises(UserError, match=rf"parameter '{name}' has shape \(32, 5\), expected \(32, 128\)"):
        fine_tune(init=tmp_path / "bent.pt")
    fine_tune("--init-parts", "ar", init=tmp_path / "bent.pt")
    shutil.rmtree(tmp_path / "exp")
    del contents["model"][name]
    save_checkpoint(tmp_path, ["bent.pt"], contents)
    with pytest.raises(UserError, match=f"parameter '{name}' is not in '.*bent.pt'"):
        fine_tune(init=tmp_path / "bent.pt")


def test_the_same_codec_under_another_path_or_with_fewer_quantizers_is_taken(tmp_path):
    info = {"name": "a", "num_quantizers": 4, "codebook_size": 30, "fingerprint": "1", "frame_rate": 50.0}
    check_codec(info, info | {"name": "/elsewhere/a"}, tmp_path, tmp_path)
    check_codec(info, info | {"num_quantizers": 8, "fingerprint": "2"}, tmp_path, tmp_path)
    for wrong in ({"fingerprint": "2"}, {"num_quantizers": 8, "name": "b"}, {"frame_rate": 75.0}):
        with pytest.raises(UserError, match="run prepare.sh --stage 2"):
            check_codec(info, info | wrong, tmp_path, tmp_path)


def test_a_recipes_yaml_yields_to_the_base(tokenized, tmp_path, base):
    recipe = tmp_path / "recipe"
    (recipe / "conf").mkdir(parents=True)
    (recipe / "conf" / "audiolm.yaml").write_text("decoder_dim: 64\nnum_decoder_layers: 3\n")
    main([*PLAIN, "--manifest-dir", str(tokenized), "--exp-dir", str(tmp_path / "exp"), "--init-from", str(base),
          "--max-steps", "1"], recipe / "conf" / "audiolm.yaml")  # fmt: skip
    model, _ = load_model(tmp_path / "exp" / "checkpoint-1.pt")
    assert model.ar_audio_embedding.weight.shape[1] == 32


# ----------------------------------------------------------------------------------------- asked to end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_training_that_then_goes_on_exactly(tokenized, tmp_path, monkeypatch, number):
    flags = ("--num-epochs", 2, "--train-stage", "auto")
    whole = run(tokenized, tmp_path / "whole", *flags)
    after = Trainer._after_step

    def signalled(self):
        if self.step in (2, 9):
            signal.raise_signal(number)
        after(self)

    monkeypatch.setattr(Trainer, "_after_step", signalled)
    broken = tmp_path / "broken"
    for step in (3, 10):  # the step that is under way is finished
        with pytest.raises(
            Unfinished, match=f"ended at step {step} on {number.name}.*the same command goes on"
        ):
            run(tokenized, broken, *flags)
        assert (broken / f"checkpoint-{step}.pt").is_file()
        lines = [json.loads(line) for line in (broken / "log" / "metrics.jsonl").read_text().splitlines()]
        assert (lines[-1]["split"], lines[-1]["step"]) == ("train", step), "there is no time for a validation"
    run(tokenized, broken, *flags)
    assert equal(weights(whole / "best-valid-loss.pt"), weights(broken / "best-valid-loss.pt"))
    assert equal(weights(last_epoch(whole)), weights(last_epoch(broken)))
    assert signal.getsignal(number) == signal.SIG_DFL, "handlers are given back"


@pytest.mark.parametrize("processes,everyone", [(1, True), (2, False)])
def test_a_cluster_gets_code_75_and_the_line(tokenized, tmp_path, processes, everyone):
    """Whether all processes are signalled, those that read data too, or the first one alone, which hands it on."""
    command = [sys.executable, "-m", "valle.bin.trainer_audiolm", *SMALL, "--manifest-dir", str(tokenized),
               "--exp-dir", str(tmp_path / "exp"), "--num-epochs", "100000", "--valid-interval", "100000",
               "--world-size", str(processes), "--num-workers", str(int(everyone))]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        metrics = tmp_path / "exp" / "log" / "metrics.jsonl"
        until = time.monotonic() + 120
        while not (metrics.is_file() and metrics.stat().st_size) and time.monotonic() < until:
            time.sleep(0.1)
        (os.killpg if everyone else os.kill)(process.pid, signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 75, said[-2000:]
    assert "the same command goes on from there" in said and "Traceback" not in said
    (saved,) = (tmp_path / "exp").glob("checkpoint-*.pt")
    assert load_checkpoint(saved)["step"] == int(saved.stem[11:]) > 0


def test_config_of_a_stage_is_saved_by_number(tokenized, tmp_path):
    exp = run(tokenized, tmp_path / "exp", "--train-stage", "auto", "--num-epochs", 1)
    saved = load_checkpoint(exp / "best-valid-loss.pt")["config"]["train"]
    assert saved["train_stage"] == 2
    assert set(saved) <= {field.name for field in dataclasses.fields(TrainConfig)}
