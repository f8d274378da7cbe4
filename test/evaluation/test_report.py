"""The report: well-formed, whole in one file, and its players play what was put in."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
from PIL import Image

from valle.engine.metrics import read_metrics
from valle.evaluation.figures import (
    MAX_COLUMNS,
    SHADES,
    Curve,
    Histogram,
    Plot,
    draw_histogram,
    draw_plot,
    draw_spectrogram,
    training_plot,
)
from valle.evaluation.report import (
    KBPS,
    MP3_RATES,
    ReportAudio,
    ReportCell,
    ReportCheck,
    ReportClip,
    ReportFigures,
    ReportSection,
    ReportTable,
    ReportText,
    audio_uri,
    build_report,
)

VOID = {"meta", "link", "br", "img", "input", "hr", "source"}
SVG_LEAVES = {"path", "use", "image", "rect", "stop", "line", "circle"}


class Page(HTMLParser):
    """Collects tags and checks that they nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def wave(channels: int, seconds: float, rate: int, seed: int = 0) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal((channels, int(seconds * rate))).astype(
        np.float32
    )


def report(tmp_path) -> tuple[str, list[ReportAudio]]:
    audios = [
        ReportAudio("Prompt + continuation", wave(1, 2.0, 16000), 16000, "a <note>", True, 0.8),
        ReportAudio("Recording", wave(2, 1.5, 24000, 1), 24000, "", True, 0.8),
        ReportAudio("Prompt", wave(1, 0.8, 16000, 2), 16000),
    ]
    empty = ReportAudio("Continuation", np.zeros((1, 0), dtype=np.float32), 16000, "", True)
    curves = [
        Curve("training", [1, 2, 3], [3.0, 2.0, 1.5], "#123123"),
        Curve("validation", [3], [2.0], "#321321", True),
    ]
    sections = [
        ReportSection(
            "Checks",
            [ReportCheck("a < b", True, "1 & 2"), ReportCheck("c", False, "no"), ReportCheck("d", None, "")],
        ),
        ReportSection(
            "Numbers",
            [ReportText("<script>alert(1)</script>"), ReportTable(["q", "loss"], [["0", "1.5"]], "why", [1])],
        ),
        ReportSection("Curves", [ReportFigures([Plot("loss", "nats", curves, {"unigram": 2.5})], "steps")]),
        ReportSection("Listen", [ReportClip('clip "one"', [*audios, empty], {"frames": "10"}, "some words")]),
    ]
    path = build_report(tmp_path / "report.html", "A <title>", {"trained with": "python -m x & y"}, sections)
    return path.read_text(), audios


def test_page_is_whole_and_loads_nothing(tmp_path):
    text, audios = report(tmp_path)
    page = Page(text)
    assert page.open == []
    assert "://" not in text
    names = [tag for tag, _ in page.tags]
    assert "script" not in names and "link" not in names and "iframe" not in names
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "data:").startswith(("data:", "#"))
    assert names.count("audio") == len(audios) and names.count("svg") == 3
    assert "PASS" in page.text and "SHORT" in page.text and "NOT MEASURED" in page.text
    assert "nothing to play" in page.text and 'clip "one"' in page.text and "A <title>" in page.text


def test_players_hold_the_audio_bit_for_bit(tmp_path):
    text, audios = report(tmp_path)
    sources = [attributes["src"] for tag, attributes in Page(text).tags if tag == "audio"]
    for source, audio in zip(sources, audios, strict=True):
        head, _, body = source.partition(",")
        assert head == "data:audio/flac;base64"
        wav, rate = soundfile.read(io.BytesIO(base64.b64decode(body)), dtype="int16", always_2d=True)
        buffer = io.BytesIO()
        soundfile.write(buffer, audio.wav.T, audio.sample_rate, format="WAV", subtype="PCM_16")
        buffer.seek(0)
        expected, _ = soundfile.read(buffer, dtype="int16", always_2d=True)
        assert rate == audio.sample_rate and (wav == expected).all()


def test_drawings_do_not_share_identifiers(tmp_path):
    text, _ = report(tmp_path)
    identifiers = [attributes["id"] for _, attributes in Page(text).tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    assert used <= set(identifiers) and used


def test_plots_follow_the_pages_colours():
    svg = draw_plot(
        Plot('a "b" <c>', "nats", [Curve("training", [1, 2], [3, 2], "#7aa6d8")], {"unigram": 4.0})
    )
    assert svg.startswith("<svg") and "currentColor" in svg and "#010203" not in svg
    assert "unigram 4" in svg and 'aria-label="a &quot;b&quot; &lt;c>"' in svg


def test_curves_take_their_stage_and_the_last_of_repeated_steps(tmp_path):
    lines = [
        {"step": 1, "stage": 1, "split": "train", "ArLoss": 3.0, "NarLoss": 9.0},
        {"step": 2, "stage": 1, "split": "train", "ArLoss": 2.9},
        {"step": 2, "stage": 1, "split": "train", "ArLoss": 2.5},
        {"step": 2, "stage": 1, "split": "valid", "ArLoss": 2.6, "NarLoss": 9.0},
        {"step": 3, "stage": 2, "split": "train", "ArLoss": float("nan"), "NarLoss": 4.0},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + '\n{"step": 4, "sta')
    records = read_metrics(path)
    assert len(records) == len(lines)
    ar = training_plot(records, "ArLoss", (0, 1), "AR", "nats")
    assert [(list(curve.x), list(curve.y)) for curve in ar.curves] == [([1, 2], [3.0, 2.5]), ([2], [2.6])]
    nar = training_plot(records, "NarLoss", (0, 2), "NAR", "nats")
    assert [(list(curve.x), list(curve.y)) for curve in nar.curves] == [([3], [4.0])]
    assert training_plot(records, "Other", (0,), "", "") is None
    assert read_metrics(tmp_path / "missing.jsonl") == []


def players(tmp_path, count: int, seconds: float, budget: int) -> tuple[Page, list[str]]:
    """A page of so many players of a noisy sweep, and what they play."""
    time = np.arange(int(seconds * 16000)) / 16000
    wav = wave(1, seconds, 16000) + (0.4 * np.sin(2 * np.pi * (300 + 200 * time) * time)).astype(np.float32)
    audios = [ReportAudio(f"clip {n}", wav, 16000) for n in range(count)]
    sections = [ReportSection("Listen", [ReportClip("one", audios)])]
    page = Page(build_report(tmp_path / "page.html", "page", {}, sections, budget).read_text())
    return page, [attributes["src"] for tag, attributes in page.tags if tag == "audio"]


def test_audio_that_is_too_large_becomes_mp3(tmp_path):
    page, sources = players(tmp_path, 4, 2.0, 2_000_000)
    assert [source[:16] for source in sources] == ["data:audio/flac;"] * 4 and "MP3" not in page.text
    budget = 8 * 90_000 // 6  # 8 s at 90 kbit/s, in base64
    assert sum(map(len, sources)) > budget
    page, sources = players(tmp_path, 4, 2.0, budget)
    assert [source[:16] for source in sources] == ["data:audio/mpeg;"] * 4 and sum(
        map(len, sources)
    ) <= budget
    assert "MP3 of 80 kbit/s" in page.text and "no room" not in page.text
    heard, rate = soundfile.read(io.BytesIO(base64.b64decode(sources[0].partition(",")[2])))
    assert rate == 16000 and abs(len(heard) / rate - 2.0) < 0.1 and 0.2 < np.sqrt(np.mean(heard**2)) < 0.5


def test_players_without_room_are_left_out_and_counted(tmp_path):
    page, sources = players(tmp_path, 4, 2.0, 30_000)
    assert 0 < len(sources) < 4 and sum(map(len, sources)) <= 30_000
    assert f"{4 - len(sources)} of 4 found no room" in page.text
    assert page.text.count("no room for it in this page") == 4 - len(sources)


def test_rates_that_mp3_does_not_know_stay_flac():
    assert audio_uri(wave(1, 0.1, 12345), 12345, 64).startswith("data:audio/flac")


@pytest.mark.parametrize("rate", MP3_RATES)
@pytest.mark.parametrize("kbps", KBPS)
def test_mp3_has_the_rate_that_was_asked_for(rate, kbps):
    size = len(audio_uri(wave(1, 2.0, rate), rate, kbps)) * 6 / 1000
    assert 0.95 * 2 * kbps < size < 1.12 * 2 * kbps  # and some frames of its own: encoder delay, a head


@pytest.mark.parametrize("seconds", [0.5, 30.0])
def test_spectrograms_are_small_palette_images(seconds):
    svg = draw_spectrogram(wave(1, seconds, 16000), 16000, "noise", 1.0)
    (image,) = re.findall(r"data:image/png;base64,([^\"]+)", svg)
    picture = Image.open(io.BytesIO(base64.b64decode(image)))
    assert picture.mode == "P" and len(picture.getcolors()) <= SHADES and len(image) < 90_000
    assert picture.width <= MAX_COLUMNS * 1.5


def test_histogram_counts_every_value():
    svg = draw_histogram(Histogram("lengths", "seconds", {"continued": [1.0, 2.0, 2.0], "asked": [2.0]}))
    assert "continued" in svg and "asked" in svg and "currentColor" in svg and 'aria-label="lengths"' in svg
    assert draw_histogram(Histogram("equal", "seconds", {"all": [3.0, 3.0]})).startswith("<svg")


def test_cells_carry_their_interval_mark_and_link(tmp_path):
    cells = [
        "WER <%>",
        ReportCell("0.2", "[0.1, 0.3]", "best"),
        ReportCell("a b", link="clip <1>"),
        ReportCell("worse", mark="short"),
    ]
    clip = ReportClip("clip <1>", [])
    sections = [ReportSection("s", [ReportTable(list("wxyz"), [cells]), clip])]
    text = build_report(tmp_path / "page.html", "page", {}, sections).read_text()
    assert "<td class=best>0.2<small>[0.1, 0.3]</small></td>" in text and "<td class=short>worse</td>" in text
    links = [attributes["href"] for tag, attributes in Page(text).tags if tag == "a"]
    targets = [attributes["id"] for tag, attributes in Page(text).tags if tag == "article"]
    assert links == ["#" + targets[0]] and "WER &lt;%&gt;" in text


def test_counted_x_has_ticks_at_whole_numbers_only():
    curves = [Curve("model", [0, 1, 2, 3], [0.6, 0.3, 0.2, 0.1], "#123123")]
    ticks = re.findall(r">(\d(?:\.\d+)?)</text>", draw_plot(Plot("q", "part", curves, whole_x=True)))
    assert ticks[:4] == ["0", "1", "2", "3"] and "0.5" not in ticks[:4]
