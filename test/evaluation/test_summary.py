"""How results are told: hand-made figures with known answers, and what appears only where it was measured."""

import copy
import json
import math

import numpy as np
import pytest

from valle.evaluation import summary, tables
from valle.evaluation.clips import Clip
from valle.evaluation.report import ReportCell, ReportClip, ReportFigures, ReportTable, build_report
from valle.evaluation.statistics import Interval
from valle.evaluation.summary import (
    checks_of,
    comparison_sections,
    format_comparison,
    format_results,
    markdown_table,
    report_sections,
    report_summary,
)

CUTS = ("piece-1", "piece 2", "piece-3")
RATE = 8000


def interval(mean: float, half: float = 0.1, count: int = 3) -> dict:
    return {"mean": mean, "low": mean - half, "high": mean + half, "count": count}


def predictor(loss: float, top1: float, top10: float) -> dict:
    return {"loss": interval(loss), "top1": interval(top1, 0.01), "top10": interval(top10, 0.01)}


def quantizer(number: int, loss: float) -> dict:
    return {
        "quantizer": number,
        "decoder": "nar" if number else "ar",
        "model": predictor(loss, 0.25, 0.5),
        "unigram": predictor(loss + 2, 0.02, 0.1),
        "bigram": predictor(loss + 0.5, 0.2, 0.4),
        "gain": {"unigram": interval(2.0), "bigram": interval(0.5)},
    }


@pytest.fixture
def old() -> dict:
    """What an evaluation without metrics writes: one bit per frame and quantizer more is easy to recognize."""
    results = {
        "valle": "0.1.0",
        "commit": "0123456789abcdef",
        "packages": {},
        "checkpoint": {"version": "0.1.0", "step": 70, "epoch": 2, "train_stage": 2, "stages": [1, 2],
                       "path": "exp/best.pt", "parameters": 9_600_000},
        "config": {"train": {"max_steps": 70}},
        "codec": {"name": "tone", "num_quantizers": 2, "codebook_size": 12, "frame_rate": 50.0, "sample_rate": RATE},
        "seed": 42,
        "data": {name: {"manifest": name, "cuts": 3, "frames": 300, "seconds": 6.0}
                 for name in ("test", "train", "validation")},
        "prompt_ratio": 0.4,
        "likelihood": [quantizer(0, 3 * math.log(2)), quantizer(1, 5 * math.log(2))],
        "audio": {"log_mel_distance": {"resynthesis": interval(0.165)}, "dnsmos": None},
        "generation": {"prompt_seconds": 0.5, "temperature": 1.0, "top_k": 50,
                       "clips": [{"id": name, "asked_frames": 50, "new_frames": 50 - 10 * n}
                                 for n, name in enumerate(CUTS)]},
        "per_cut": [{"id": name, "frames": 50, "model": [2.0 + n, 3.0], "unigram": [5.0, 5.0], "bigram": [4.0, 4.0]}
                    for n, name in enumerate(CUTS)],
    }  # fmt: skip
    results["checks"] = checks_of(results)
    return results


@pytest.fixture
def results(old) -> dict:
    """The same with metrics, distances, positions and the table of clips."""
    new = copy.deepcopy(old) | {
        "metrics": {
            "wer": {"wer": {"silence": interval(1.0, 0.0), "model": interval(0.8), "unigram": interval(1.2),
                            "loop": interval(1.1), "recording": interval(0.05, 0.01),
                            "resynthesis": interval(0.1, 0.02)}},
            "dnsmos": {"ovrl": {"recording": interval(3.1), "resynthesis": interval(2.7), "model": interval(2.1),
                                "loop": interval(2.6), "silence": {"mean": None, "low": None, "high": None}}},
        },
        "distances": {"mel": {"frechet": {"model": interval(12.3), "unigram": 45.6},
                              "kernel": {"model": -0.0012, "unigram": None}}},
        "metric_info": {
            "wer": {"task": "speech", "keys": {"wer": "lower"}, "whole": False},
            "dnsmos": {"task": "quality", "keys": {"ovrl": "higher"}, "whole": False},
            "generation": {"task": "generation", "keys": {"repetition": "recording"}, "whole": False},
        },
        "totals": {"model": {"bits_per_second": interval(400.0, 4.0)}},
        "positions": {
            "start": [0, 25, 50], "end": [25, 50, 75], "frames": [75, 70, 2],
            "ar": {name: [0.5, 0.6, 1.0] for name in ("model", "unigram", "bigram")},
            "nar": {name: [0.1, 0.2, 0.0] for name in ("model", "unigram", "bigram")},
        },
        "left_out": {"pesq": "pip install 'valle[eval]'"},
        "clips_table": {
            "piece-1": {"model-0": {"wer": {"wer": 0.9}}, "model-1": {"wer": {"wer": 0.5}},
                        "recording": {"wer": {"wer": 0.0}}},
            "piece 2": {"recording": {"wer": {"wer": 2.0}}, "model-0": {"wer": {"wer": 0.3}},
                        "model-1": {"wer": {"wer": None}}},
            "piece-3": {"model-0": {"wer": {"wer": 1.25}}, "model-1": {"wer": {"wer": 0.95}}},
        },
        "config_hash": "feedfacecafebeef",
        "tasks": ["audio", "speech"],
    }  # fmt: skip
    new["generation"] |= {
        "statistics": {"repetition": {"recording": interval(0.5), "model": interval(0.6), "loop": interval(0.9),
                                      "silence": interval(0.0)}},
        "clips": [{"id": name, "asked_frames": 50, "new_frames": 40, "all_new_frames": [40, 75],
                   "finish_reasons": ["eos", "length"]} for name in CUTS],
    }  # fmt: skip
    return json.loads(json.dumps(new))


def clips(count: int = 3, seconds: float = 0.6) -> list[Clip]:
    wav = 0.1 * np.random.default_rng(0).standard_normal((1, int(seconds * RATE))).astype(np.float32)
    names = ("recording", "resynthesis", "model-0", "model-1", "loop", "unigram", "silence")
    ids = [*CUTS, *(f"other-{n}" for n in range(count))][:count]
    return [Clip(name, "words", RATE, RATE // 4, 50, 40, {key: wav for key in names}) for name in ids]


def tables_of(sections) -> dict[str, ReportTable]:
    return {
        block.columns[0]: block
        for section in sections
        for block in section.blocks
        if isinstance(block, ReportTable)
    }


def titles(sections) -> list[str]:
    return [section.title for section in sections]


def row(table: ReportTable, start: str) -> dict[str, str | ReportCell]:
    cells = next(cells for cells in table.rows if cells[0].startswith(start))
    return dict(zip(table.columns, cells, strict=True))


def test_old_results_are_told_without_what_they_lack(old, tmp_path):
    sections = report_sections(old, [], tmp_path / "none.jsonl")
    assert titles(sections) == [
        "Was it worth training?", "Predicting held-out codes", "How it sounds, in numbers", "How it goes on",
        "Best and worst",
    ]  # fmt: skip
    assert "speech" not in tables_of(sections) and "log-mel distance to the recording" in tables_of(sections)
    page = build_report(tmp_path / "page.html", "old", report_summary(old), sections).read_text()
    assert "40% of it" in page and "commit 0123456789ab, seed 42" in page
    assert "| figure |" not in markdown_table(old) and "figure" not in format_results(old)


def test_loss_becomes_bits_and_perplexity(old, tmp_path):
    bits = tables_of(report_sections(old, [], tmp_path / "none.jsonl"))
    table = next(table for table in bits.values() if "perplexity" in table.columns)
    assert [cells[0] for cells in table.rows] == ["0 (AR)", "1 (NAR)", "all"]
    # 3 and 5 bits: 8 and 32 codes, at 50 frames a second; together 8 bits, of 4 bits in the mean
    assert [(cells[1], cells[4], cells[7]) for cells in table.rows] == [
        ("8.00", "3.00", "150"), ("32.0", "5.00", "250"), ("16.0", "8.00", "400"),
    ]  # fmt: skip


def test_every_figure_stands_beside_truth_ceiling_and_baselines(results, tmp_path):
    found = tables_of(report_sections(results, [], tmp_path / "none.jsonl"))
    speech = found["speech"]
    assert speech.columns == [
        "speech", "recording", "codec's resynthesis", "model", "loop of the prompt", "unigram codes", "silence",
    ]  # fmt: skip
    wer = row(speech, "word error rate")
    assert wer["speech"] == "word error rate ↓" and wer["model"] == ReportCell(
        "0.800", "[0.700, 0.900]", "best"
    )
    assert [cell.mark for cell in speech.rows[0][1:]] == ["", "", "best", "", "", ""]
    quality = row(found["quality, heard alone"], "DNSMOS")
    assert quality["quality, heard alone"].endswith("↑")
    assert quality["loop of the prompt"].mark == "best" and not quality["recording"].mark
    assert "silence" not in found["quality, heard alone"].columns
    distance = found["distance of all clips to all recordings"]
    assert row(distance, "Fréchet distance, mel ↓")["unigram codes"] == ReportCell("45.6")
    kernel = row(distance, "kernel distance, mel ↓")
    assert kernel["unigram codes"] == ReportCell("–") and kernel["model"] == ReportCell("-0.0012")


def test_unknown_metric_has_no_arrow_and_no_best(results):
    results["metrics"]["mine"] = {"my_key": {"model": interval(1.0), "loop": interval(2.0)}}
    figure = next(figure for figure in tables.figures_of(results) if figure.name == "mine")
    assert figure.heading == "my key" and figure.best() is None


def test_equal_figures_have_no_best(results):
    results["metrics"]["wer"]["wer"] |= {"silence": interval(0.8), "loop": interval(0.9)}
    assert next(f for f in tables.figures_of(results) if f.key == "wer").best() is None


def test_best_and_worst_are_named_and_lead_to_their_clips(results, tmp_path):
    sections = report_sections(results, clips(2), tmp_path / "none.jsonl")
    table = tables_of(sections)["figure"]
    assert row(table, "AR loss")["best cut"] == ReportCell("piece-1", "2.00", link="piece-1")
    wer = row(table, "word error rate")
    assert wer["best cut"] == ReportCell(
        "piece 2", "0.300", link="piece 2"
    )  # not the recording, None left out
    assert wer["worst cut"] == ReportCell(
        "piece-3", "1.10"
    )  # mean of its two continuations; no clip of it here
    first, second = (block for block in sections[-1].blocks if isinstance(block, ReportClip))
    assert first.facts["best in"] == "AR loss (nats/frame) ↓" and "worst in" not in first.facts
    assert second.facts["best in"] == "word error rate ↓"
    page = build_report(tmp_path / "page.html", "new", report_summary(results), sections).read_text()
    assert page.count('href="#clip-piece_20_2"') == page.count('id="clip-piece_20_2"') == 1


def test_a_clip_plays_all_but_silence(results, tmp_path):
    (section,) = [s for s in report_sections(results, clips(1), tmp_path / "x") if s.title == "Listen"]
    audios = section.blocks[1].audios
    assert [(audio.label, audio.spectrogram) for audio in audios] == [
        ("Prompt + continuation", True), ("Codec resynthesis", True), ("True recording", True),
        ("Prompt + continuation 2", False), ("Loop of the prompt", False), ("Prompt + unigram codes", False),
    ]  # fmt: skip


def test_a_page_has_at_most_twenty_clips(results, tmp_path):
    section = report_sections(results, clips(23), tmp_path / "x")[-1]
    assert sum(isinstance(block, ReportClip) for block in section.blocks) == summary.MAX_CLIPS == 20


def test_lengths_are_counted(old, tmp_path):
    (section,) = [s for s in report_sections(old, [], tmp_path / "x") if s.title == "How it goes on"]
    figures = next(block for block in section.blocks if isinstance(block, ReportFigures))
    assert list(figures.plots[0].series.values()) == [[1.0, 0.8, 0.6], [1.0, 1.0, 1.0]]
    assert figures.caption.startswith("2 of 3 continuations ended")


def test_lengths_of_every_seed_are_counted(results, tmp_path):
    (section,) = [s for s in report_sections(results, [], tmp_path / "x") if s.title == "How it goes on"]
    table, figures = section.blocks
    assert row(table, "stretches")["model"].mark == "best"  # 0.1 from the recording; loop 0.4, silence 0.5
    assert table.rows[0][0].endswith("≈")
    assert list(figures.plots[0].series.values()) == [[0.8, 1.5] * 3, [1.0] * 3]
    assert figures.caption.startswith("3 of 6 continuations ended by themselves")


def test_accuracy_is_drawn_by_quantizer_and_by_position(results, tmp_path):
    (section,) = [s for s in report_sections(results, [], tmp_path / "x") if "codes" in s.title]
    plots = {
        plot.title: plot
        for block in section.blocks
        if isinstance(block, ReportFigures)
        for plot in block.plots
    }
    quantizers = plots["Top-10 accuracy by quantizer"].curves
    assert [(list(curve.x), list(curve.y)) for curve in quantizers] == [
        ([0, 1], [0.5, 0.5]), ([0, 1], [0.1, 0.1]), ([0, 1], [0.4, 0.4]),
    ]  # fmt: skip
    by_time = [plots[f"{name} top-10 accuracy by position"].curves[0] for name in ("AR", "NAR")]
    assert [(list(curve.x), list(curve.y)) for curve in by_time] == [
        ([0.25, 0.75], [0.5, 0.6]), ([0.25, 0.75], [0.1, 0.2]),
    ]  # fmt: skip


def test_what_was_not_measured_is_said(results, tmp_path):
    (section,) = [
        s for s in report_sections(results, [], tmp_path / "x") if s.title.startswith("How it sounds")
    ]
    assert section.blocks[-2].text == "Not measured: pesq: pip install 'valle[eval]'."


def test_figures_of_whole_cuts_say_so(results):
    results["metric_info"]["wer"]["whole"] = True
    assert "word error rate (whole cuts) ↓" in format_results(results)


def test_markdown_has_one_row_for_the_model_and_the_tables(results):
    lines = markdown_table(results).splitlines()
    assert lines[0].startswith("| checkpoint | parameters |") and lines[1].startswith("|---|---:|")
    model = dict(zip(lines[0].split(" | "), lines[2].split(" | "), strict=True))
    assert model["AR perplexity ↓"] == "8.00" and model["bits/s ↓"] == "400 [396, 404]"
    assert model["word error rate ↓"] == "0.800 [0.700, 0.900]"
    wer = next(line for line in lines if line.startswith("| word error rate"))
    assert wer.split(" | ")[1:] == [
        "0.050 [0.040, 0.060]", "0.100 [0.080, 0.120]", "**0.800 [0.700, 0.900]**", "1.10 [1.00, 1.20]",
        "1.20 [1.10, 1.30]", "1.00 [1.00, 1.00] |",
    ]  # fmt: skip
    heads = [line.count("|") for line in lines if line.startswith("|")]
    assert len(set(heads[:3])) == 1 and "configuration feedfacecafe" in markdown_table(results)


def test_terminal_shows_the_same_figures(results):
    text = format_results(results)
    assert "word error rate ↓" in text and "0.800 [0.700, 0.900]" in text and "bits per second" in text


def test_what_the_metrics_tell_is_not_told_twice(results, tmp_path):
    results["audio"]["dnsmos"] = {
        "model": {"continuation": {key: interval(2.1) for key in ("ovrl", "sig", "bak")}}
    }
    assert "DNSMOS, model" not in format_results(results)
    assert "DNSMOS" not in tables_of(report_sections(results, [], tmp_path / "x"))
    del results["metrics"]["dnsmos"]
    assert "DNSMOS, model: continuation 2.10" in format_results(results)
    assert "DNSMOS" in tables_of(report_sections(results, [], tmp_path / "x"))


def comparison() -> dict:
    return {
        "wer": {"a": interval(0.8), "b": interval(0.6), "difference": Interval(-0.2, -0.3, -0.1, 20),
                "verdict": "better", "better": "lower"},
        "ar_loss": {"a": 3.4, "b": 3.9, "difference": interval(0.5), "verdict": "worse"},
        "stft": {"a": interval(1.0), "b": interval(1.01), "difference": interval(0.01), "verdict": "cannot tell"},
    }  # fmt: skip


def test_comparison_says_what_is_better_worse_and_open(tmp_path):
    sections = comparison_sections(comparison(), ("old", "new"))
    (line,), (table,) = (section.blocks for section in sections)
    assert line.text == "new against old: better in 1 (wer), worse in 1 (ar_loss), cannot tell in 1."
    assert table.columns == ("figure", "old", "new", "new minus old", "new is")
    assert table.rows[0][0] == "wer ↓" and table.rows[0][3] == ReportCell("-0.200", "[-0.300, -0.100]")
    assert [cells[4].mark for cells in table.rows] == ["pass", "short", "open"]
    assert table.rows[1][1:4] == [
        ReportCell("3.40"),
        ReportCell("3.90"),
        ReportCell("+0.500", "[0.400, 0.600]"),
    ]
    page = build_report(tmp_path / "page.html", "compared", {}, sections).read_text()
    assert "<td class=short>worse</td>" in page
    text = format_comparison(comparison(), ("old", "new"))
    assert "cannot tell in 1" in text.splitlines()[-1] and len(text.splitlines()) == 5


def test_comparison_of_nothing_says_so():
    assert "no figure in common" in comparison_sections({})[0].blocks[0].text
    assert "no figure in common" in format_comparison({})


@pytest.mark.parametrize(
    "value, shown",
    [(0.16496, "0.165"), (2.6439, "2.64"), (26.44, "26.4"), (1643.2, "1643"), (0.00123, "0.0012"), (0, "0.000"),
     (-0.5, "-0.500")],
)  # fmt: skip
def test_numbers_keep_about_three_digits(value, shown):
    assert tables.number(value) == shown
