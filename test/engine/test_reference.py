"""The expected band: made of runs, read back, said in the log, drawn, and warned about."""

import json
import re
import sys
from pathlib import Path

import pytest
from test_metrics import events, scalars, train  # the same small training

from valle.config import DataConfig, ModelConfig, TrainConfig, parse, to_dict
from valle.engine.metrics import read_metrics
from valle.engine.reference import (
    Band,
    Reference,
    curve_points,
    draw_curves,
    make_bands,
    stage_steps,
    write_reference,
)
from valle.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
LOSS = (1, "valid", "loss")


def run_of(values, stage=1, split="valid", metric="loss", every=100, start=0):
    """Records of a run: one value every so many steps."""
    return [
        {"step": start + every * n, "stage": stage, "split": split, metric: value, "time": 1.0}
        for n, value in enumerate(values, 1)
    ]


def reference_file(path, high, stage=0, config=None, last=100):
    """Losses from 0 to `high` are expected, in training and validation."""
    bands = {
        (stage, split, "loss"): Band([0, last], [0.0, 0.0], [high, high]) for split in ("train", "valid")
    }
    write_reference(path, "a test", bands, config or {})
    return path


def test_one_run_gives_a_band_by_its_margin():
    band = make_bands([run_of([5.0, 4.0])], margin=0.1)[LOSS]
    assert band.steps == [100, 200] and band.low == [4.5, 3.6] and band.high == [5.5, 4.4]
    assert band.at(150) == (pytest.approx(4.05), pytest.approx(4.95))
    assert band.at(99) is None and band.at(201) is None
    accuracy = make_bands([run_of([0.01, 0.995], metric="ArTop10Accuracy")], margin=0.02)
    band = accuracy[1, "valid", "ArTop10Accuracy"]
    assert band.low == [0.0, 0.975] and band.high == [0.03, 1.0]


def test_several_runs_give_lowest_and_highest_where_all_have_been():
    bands = make_bands([run_of([5.0, 4.0, 3.0]), run_of([4.6, 3.8], every=150)], margin=0.0)
    band = bands[LOSS]
    assert band.steps == [150, 200, 300]
    assert band.low == [4.5, pytest.approx(4.0), 3.0] and band.high == [4.6, pytest.approx(4.3333), 3.8]
    with pytest.raises(UserError, match="no curve in common"):
        make_bands([run_of([5.0]), run_of([5.0], stage=2)])


def test_steps_count_from_the_beginning_of_their_stage():
    older = [*run_of([4.0, 3.9]), *run_of([6.9, 6.8], stage=2, every=50, start=200)]
    assert stage_steps(older) == [100, 200, 50, 100]
    newer = [{**record, "stage_step": 7} for record in older]
    assert stage_steps(newer) == [7, 7, 7, 7]
    assert curve_points(older)[2, "valid", "loss"] == {50: 6.9, 100: 6.8}


def test_what_is_no_curve_is_left_out_and_the_last_of_two_lines_counts():
    records = [
        {"step": 1, "stage": 0, "split": "train", "loss": None, "tot_ArTop10Accuracy": 0.2, "grad_norm": 1.0},
        {"step": 2, "stage": 0, "split": "train", "loss": 4.0},
        {"step": 2, "stage": 0, "split": "train", "loss": 3.0},
    ]
    assert curve_points(records) == {(0, "train", "loss"): {2: 3.0}}


def test_a_file_is_read_as_it_was_written(tmp_path):
    bands = make_bands([[*run_of([5.0, 4.0]), *run_of([0.2, 0.3], metric="ArTop10Accuracy", split="train")]])
    path = tmp_path / "conf" / "reference.json"
    write_reference(path, "two words", bands, {"dropout": 0.3, "codec": None})
    found = Reference.load(path)
    assert found.bands == bands and found.config == {"dropout": 0.3, "codec": None}
    assert json.loads(path.read_text())["about"] == "two words"
    assert found.expected(1, "valid", 100) == {"loss": [4.9, 5.1]}
    assert found.expected(1, "valid", 999) == {} == found.expected(2, "valid", 100)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"curves": [{"stage": 1}]}',
        '{"curves": [{"stage": 1, "split": "a", "metric": "loss", "steps": [1, 2], "low": [1], "high": [2]}]}',
    ],
)
def test_other_files_are_one_clear_line(tmp_path, text):
    path = tmp_path / "reference.json"
    path.write_text(text)
    with pytest.raises(UserError, match="is no reference .*make_reference"):
        Reference.load(path)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        Reference.load(tmp_path / "other.json")


def test_a_training_says_what_is_expected_and_shows_it(tokenized, tmp_path, capfd):
    path = reference_file(tmp_path / "reference.json", high=9.5)
    flags = ("--reference", path, "--max-steps", 4, "--valid-interval", 2, "--tensorboard", "true")
    exp = train(tokenized, tmp_path / "exp", *flags)
    said = capfd.readouterr().err
    assert re.search(r"step 2/4 \| validation \| loss \S+ nats/token \(expected 0–9.5\)", said), said
    assert re.search(r"step 1/4 \| loss \S+ nats/token \(expected 0–9.5\)", said), said
    assert "above the reference" not in said
    assert read_metrics(exp / "log" / "metrics.jsonl")[0]["expected"] == {"loss": [0.0, 9.5]}
    shown = scalars(exp)
    assert (
        shown["reference/valid_loss_high"] == [(2, 9.5), (4, 9.5)]
        and len(shown["reference/train_loss_low"]) == 4
    )
    layout = pytest.importorskip("tensorboard.plugins.custom_scalar.layout_pb2").Layout()
    (event,) = events(exp).Tensors("custom_scalars__config__")
    layout.ParseFromString(event.tensor_proto.string_val[0])
    charts = {chart.title: chart.margin.series[0] for chart in layout.category[0].chart}
    for split, tag in (("valid", "train/valid_loss"), ("train", "train/current_loss")):
        series = charts[f"{split} loss"]
        assert (series.value, series.lower, series.upper) == (
            tag, f"reference/{split}_loss_low", f"reference/{split}_loss_high"
        )  # fmt: skip
        assert {series.value, series.lower, series.upper} <= set(shown), "it draws what is written"


def test_a_loss_above_the_band_is_warned_about_once(tokenized, tmp_path, capfd):
    path = reference_file(tmp_path / "reference.json", high=1.0)
    train(tokenized, tmp_path / "exp", "--reference", path, "--max-steps", 4, "--valid-interval", 1)
    warned = [line for line in capfd.readouterr().err.splitlines() if "above the reference" in line]
    assert len(warned) == 1 and "WARNING the validation loss 3." in warned[0] and "0–1 at step 1" in warned[0]


def test_a_loss_below_the_band_or_behind_its_end_is_fine(tokenized, tmp_path, capfd):
    bands = {(0, "valid", "loss"): Band([0, 100], [8.0, 8.0], [9.0, 9.0])}
    write_reference(tmp_path / "below.json", "", bands, {})
    ended = reference_file(tmp_path / "ended.json", high=1.0, last=0)
    for path in (tmp_path / "below.json", ended):
        train(tokenized, tmp_path / path.stem, "--reference", path, "--max-steps", 2)
    assert "above the reference" not in capfd.readouterr().err


def test_other_settings_are_not_compared(tokenized, tmp_path, capfd):
    config = {"decoder_dim": 64, "nhead": 4, "codec": "valle_16khz", "init_from": None}
    path = reference_file(tmp_path / "reference.json", high=1.0, config=config)
    exp = train(tokenized, tmp_path / "exp", "--reference", path, "--max-steps", 2)
    said = capfd.readouterr().err
    assert re.search(
        "not compared with the reference run: decoder_dim 32 instead of 64, .*codec tiny instead", said
    )
    assert "nhead" not in said and "max_duration 8.0 instead of 80.0" in said, (
        "what is not named has its default"
    )
    assert "expected" not in said and "expected" not in read_metrics(exp / "log" / "metrics.jsonl")[0]


def test_a_missing_reference_stops_before_the_training(tokenized, tmp_path):
    with pytest.raises(UserError, match="--reference .*nowhere.json' cannot be read"):
        train(tokenized, tmp_path / "exp", "--reference", tmp_path / "nowhere.json", "--max-steps", 1)


def test_curves_are_drawn_from_the_second_validation_on(tokenized, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    once = train(tokenized, tmp_path / "once", "--max-steps", 1)
    assert not (once / "curves.png").exists(), "one point is no curve"
    exp = train(tokenized, tmp_path / "exp", "--max-steps", 3, "--valid-interval", 1)
    assert (exp / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    bare = train(tokenized, tmp_path / "bare", "--max-steps", 3, "--valid-interval", 1)
    assert (bare / "best-valid-loss.pt").exists() and not (bare / "curves.png").exists()


def test_the_picture_holds_curve_and_band(tmp_path, monkeypatch):
    """By matplotlib's own objects: a line by stage and split, and the band where one is known."""
    figures = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, path: drawn.append(self))
    records = [
        *run_of([5.0, 4.0]), *run_of([5.5, 3.5], split="train"), *run_of([0.3, 0.4], metric="ArTop10Accuracy"),
        *run_of([6.5, 6.4], stage=2, start=200),
    ]  # fmt: skip
    reference = Reference(make_bands([run_of([5.1, 4.1])]), {})
    assert draw_curves(records, reference, tmp_path / "curves.png")
    panels = {axes.get_title(): axes for axes in drawn[0].axes}
    assert list(panels) == ["stage 1: loss", "stage 2: loss", "stage 1: ArTop10Accuracy"]
    loss = panels["stage 1: loss"]
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in loss.lines}
    assert lines == {"training": ([100, 200], [5.5, 3.5]), "validation": ([100, 200], [5.0, 4.0])}
    (band,) = loss.collections
    assert band.get_label() == "validation, expected"
    assert (
        list(panels["stage 2: loss"].lines[0].get_xdata()) == [100, 200]
        and not panels["stage 2: loss"].collections
    )


def tool():
    import importlib.util

    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "tools" / "make_reference.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_reference"] = module
    spec.loader.exec_module(module)
    return module


def test_the_tool_makes_a_reference_that_the_same_training_lies_in(tokenized, tmp_path, capfd):
    flags = ("--max-steps", 4, "--valid-interval", 2)
    runs = [train(tokenized, tmp_path / f"run{seed}", *flags, "--seed", seed) for seed in (1, 2)]
    metrics = [str(run / "log" / "metrics.jsonl") for run in runs]
    main = tool().main
    output = tmp_path / "conf" / "reference.json"
    picture = tmp_path / "band.png"
    main([*metrics, "--output", str(output), "--about", "two seeds", "--picture", str(picture)])
    content = json.loads(output.read_text())
    assert content["about"].startswith("two seeds; 2 run(s)") and content["config"]["decoder_dim"] == 32
    assert content["config"]["codec"] == "tiny" and picture.is_file()
    capfd.readouterr()
    train(tokenized, tmp_path / "third", *flags, "--seed", 3, "--reference", output)
    said = capfd.readouterr().err
    assert "expected" in said and "above" not in said
    other = train(tokenized, tmp_path / "other", *flags, "--dropout", 0.5)
    with pytest.raises(UserError, match="no run of the same settings: dropout 0.5 instead of 0.1"):
        main([metrics[0], str(other / "log" / "metrics.jsonl"), "--output", str(output)])
    for arguments, message in (([], "no run is named"), (["nowhere.jsonl"], "'nowhere.jsonl' does not exist"),
                               ([metrics[0], "--margin", "2"], "--margin is 2.0")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            main([*arguments, "--output", str(output)])


def test_the_recipe_compares_with_its_own_reference():
    """Who changes the recipe's settings makes a new reference: this fails until then."""
    conf = ROOT / "egs" / "asterisk" / "conf" / "audiolm.yaml"
    model, data, config = parse("", [ModelConfig, DataConfig, TrainConfig], [], conf)
    reference = Reference.load(config.reference)
    model.num_quantizers = 4  # of its codec
    parts = {"model": to_dict(model), "data": to_dict(data), "train": to_dict(config)}
    assert reference.differences({"config": parts, "codec": {"name": "valle_16khz"}}) == []
    for stage, end in ((1, 3.6), (2, 6.4)):
        band = reference.bands[stage, "valid", "loss"]
        assert band.low[-1] < end < band.high[-1] and len(band.steps) > 4
        assert (stage, "train", "loss") in reference.bands
