"""`valle doctor` and the one name of all commands."""

import dataclasses
import math
import subprocess
import sys

import pytest
import torch

from valle.bin import cli, doctor
from valle.config import ModelConfig, TrainConfig
from valle.engine import memory
from valle.utils.command import UNFINISHED, run
from valle.utils.errors import Unfinished, UserError

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = "--decoder-dim 32 --nhead 4 --num-decoder-layers 3".split()
CPU = torch.device("cpu")


def suggestion(said):
    words = next(line for line in said.splitlines() if line.startswith("suggestion")).split()
    return dict(zip(words[1::2], words[2::2], strict=True))


def test_the_doctor_knows_the_machine_and_what_fits_it(tokenized, tmp_path, capsys):
    doctor.main([*SMALL, "--manifest-dir", str(tokenized), "--exp-dir", str(tmp_path / "not" / "yet")])
    said = capsys.readouterr().out
    for part in ("versions    valle ", f"torch {torch.__version__}", "cores usable", "GB of RAM free", "GB free at",
                 "GFLOP/s", "OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0", "extra       lora (--lora-rank): ",
                 "valle_16khz: ready", "codec tiny, 4 quantizers", "fits        --max-duration up to"):  # fmt: skip
        assert part in said, part
    assert str(tmp_path) in said
    assert suggestion(said)["--max-duration"] == "80" and suggestion(said)["--accumulate-grad-steps"] == "1"
    assert not (tmp_path / "not").exists(), "nothing is written"


def test_missing_extras_are_named_with_the_way_to_them(capsys, monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    doctor.check_extras(doctor.Report())
    said = capsys.readouterr().out
    assert said.count("missing: pip install 'valle[") == len(doctor.EXTRAS)
    assert "speechmos, onnxruntime missing: pip install 'valle[eval]'" in said


def test_extras_are_those_of_the_package():
    known = (doctor.Path(__file__).resolve().parents[2] / "setup.py").read_text()
    assert all(f'"{extra}": ' in known for extra in doctor.EXTRAS)


def test_on_a_smaller_machine_batches_are_smaller_and_more(tokenized, capsys, monkeypatch):
    flags = [*SMALL, "--manifest-dir", str(tokenized), "--train-stage", "auto", "--dtype", "float32"]
    needs = doctor.measure(ModelConfig(decoder_dim=32, nhead=4, num_decoder_layers=3, num_quantizers=4),
                           TrainConfig(), 30, 2, CPU)  # fmt: skip
    monkeypatch.setattr(memory, "resident", lambda: 1e8)
    room = needs.fixed + 25 * 50 * needs.per_frame + 1e8
    monkeypatch.setattr(memory, "capacity", lambda device: room / memory.CAREFUL)
    monkeypatch.setattr(doctor, "LEAST_MEMORY", 0)
    doctor.main(flags)
    found = suggestion(capsys.readouterr().out)
    assert 20 <= float(found["--max-duration"]) <= 25 and found["--dtype"] == "float32"
    assert int(found["--accumulate-grad-steps"]) == math.ceil(80 / float(found["--max-duration"]))
    monkeypatch.setattr(memory, "capacity", lambda device: 1.1e8)
    with pytest.raises(
        UserError, match=r"1 problem.*one recording may last 20 s; lower --filter-max-duration"
    ):
        doctor.main(flags)


def test_activations_grow_with_layers_and_frames_as_measured():
    """What one and two layers tell about four is what four keep."""
    model = ModelConfig(decoder_dim=32, nhead=4, num_decoder_layers=4, num_quantizers=4)
    for dtype in ("float32", "bfloat16"):
        needs = doctor.measure(model, TrainConfig(dtype=dtype), 30, 1, CPU)
        whole = doctor.build_model(model, 30).train()
        kept = []
        for rows in (1, 3):
            batch = doctor.probe_batch(rows, 4, CPU)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                kept.append(memory.kept_for_backward(whole, batch, 1))
        measured = (kept[1] - kept[0]) / (2 * batch["x"].shape[1] * 2)
        assert needs.per_frame / doctor.PEAK_PARTS == pytest.approx(
            measured, rel=0.35 if dtype == "bfloat16" else 0.05
        )
        trained = sum(parameter.numel() for _, parameter in whole.stage_parameters(1))
        assert needs.parameters == trained
        every = sum(parameter.numel() for parameter in whole.parameters())
        assert needs.fixed >= 4 * every + 12 * trained
    more = doctor.measure(dataclasses.replace(model, decoder_dim=64), TrainConfig(), 30, 1, CPU)
    assert more.per_frame > 1.5 * needs.per_frame


@pytest.mark.parametrize(
    "speeds,expected",
    [({"float32": 1.0, "bfloat16": 3.0}, "bfloat16"), ({"float32": 1.0, "bfloat16": 1.1}, "float32"),
     ({"float32": 1.0, "bfloat16": 0.5, "float16": 4.0}, "float16")],
)  # fmt: skip
def test_the_number_format_is_one_that_is_fast(speeds, expected):
    assert doctor.best_dtype(speeds) == expected


def test_threads_that_cost_speed_are_named(capsys, monkeypatch):
    monkeypatch.setattr(doctor.torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(doctor, "usable_cores", lambda: 2)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    doctor.check_threads(doctor.Report())
    said = capsys.readouterr().out
    assert "more than the 2 cores; export OMP_NUM_THREADS=2" in said
    assert "export OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0" in said


# ------------------------------------------------------------------------------------------------- valle


def test_valle_lists_its_commands_and_calls_them(capsys, monkeypatch):
    cli.main([])
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in cli.COMMANDS)
    for module, _ in cli.COMMANDS.values():
        assert hasattr(__import__(f"valle.bin.{module}", fromlist=["main"]), "main"), module
    called = []
    monkeypatch.setattr("valle.bin.trainer_audiolm.main", called.append)
    cli.main(["train", "--train-stage", "auto"])
    assert called == [["--train-stage", "auto"]]
    with pytest.raises(UserError, match="valle has no command 'trian'; there are doctor, tokenize"):
        cli.main(["trian"])


def test_valle_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "valle.bin.cli", "infer", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "usage: valle infer" in done.stdout
    done = subprocess.run([sys.executable, "-m", "valle.bin.cli", "nothing"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: valle has no command 'nothing'")


def test_the_code_of_what_was_asked_to_end(capsys):
    def ended(argv):
        raise Unfinished("ended at step 3")

    with pytest.raises(SystemExit) as end:
        run(ended, [])
    assert end.value.code == UNFINISHED == 75
    assert capsys.readouterr().err == "ended at step 3\n"
