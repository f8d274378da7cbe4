"""One self-contained HTML page: numbers, curves, players and spectrograms. It opens from disk with no network.

A report is a list of sections of blocks (paragraphs, checks, tables, figures, clips); each block is a small dataclass
and knows nothing of models. Audio is embedded as 16-bit FLAC, or as MP3 where FLAC would make the page too large to
send by mail; drawings as SVG, and there are no scripts.
"""

import base64
import html
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile

from valle.evaluation.figures import Histogram, Plot, brightest, draw_histogram, draw_plot, draw_spectrogram
from valle.utils.files import atomic_path

AUDIO_BYTES = 18_000_000  # of a page's players, as text; with drawings and tables a page stays below 25 MB
# Of MP3 in kbit/s; what does not fit even with the smallest is left out of the page, last players first.
KBPS = (48, 56, 64, 80, 96, 112, 128, 160)
MP3_RATES = (16000, 22050, 24000, 32000, 44100, 48000)  # Hz, where the format has all of these bit rates


@dataclass(frozen=True)
class ReportText:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class ReportCheck:
    """A figure against what was asked of it. `passed` None: it could not be measured."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class ReportCell:
    """A cell of a table: text, a smaller line under it (its interval), and how it is marked.

    Attributes:
        text: the figure.
        detail: shown small under it.
        mark: "" or one of "best", "pass", "short", "open".
        link: title of a clip of the page that the text leads to.
    """

    text: str
    detail: str = ""
    mark: str = ""
    link: str = ""


@dataclass(frozen=True)
class ReportTable:
    """Cells are text already; the first column is a heading, `best` marks the columns to emphasize."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | ReportCell]]
    caption: str = ""
    best: Sequence[int] = ()


@dataclass(frozen=True)
class ReportFigures:
    """Plots side by side."""

    plots: Sequence[Plot | Histogram]
    caption: str = ""


@dataclass(frozen=True)
class ReportAudio:
    """One player; with `spectrogram`, its drawing above it, and a line at `boundary` seconds."""

    label: str
    wav: np.ndarray  # (C, N) float32
    sample_rate: int
    note: str = ""
    spectrogram: bool = False
    boundary: float | None = None


@dataclass(frozen=True)
class ReportClip:
    """The players of one recording; `facts` are shown beside its title, a picture (a PNG file's bytes) above them."""

    title: str
    audios: Sequence[ReportAudio]
    facts: dict[str, str] = field(default_factory=dict)
    text: str = ""
    picture: bytes = b""


Block = ReportText | ReportCheck | ReportTable | ReportFigures | ReportClip


@dataclass(frozen=True)
class ReportSection:
    """A heading and its blocks."""

    title: str
    blocks: Sequence[Block]


def build_report(
    path: str | Path,
    title: str,
    summary: dict[str, str],
    sections: Sequence[ReportSection],
    audio_bytes: int = AUDIO_BYTES,
) -> Path:
    """Write the page.

    Args:
        path: the HTML file.
        title: its heading.
        summary: name -> value, shown at the top: what was trained, with which command, on what.
        sections: the page's content, in order.
        audio_bytes: what all players together may take of the page, in bytes.

    Returns:
        `path`.
    """
    audios = list(_audios(sections))
    drawn = [audio for audio in audios if audio.spectrogram]
    # one colour scale for the whole page
    top = brightest([(audio.wav, audio.sample_rate) for audio in drawn])
    players = _Players(audios, audio_bytes)
    body = "\n".join(_section(section, top, players) for section in sections)
    if players.note:
        summary = {**summary, "players": players.note}
    facts = "\n".join(
        f"<dt>{_escape(name)}</dt><dd>{_unbroken_flags(_escape(value))}</dd>"
        for name, value in summary.items()
    )
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{_escape(title)}</h1>\n<dl class="summary">\n{facts}\n</dl>\n{body}\n</main>\n</body>\n</html>\n'
    )
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Path(path)


def _audios(sections: Sequence[ReportSection]) -> Iterator[ReportAudio]:
    """All there is to play, in the page's order."""
    for section in sections:
        for block in section.blocks:
            if isinstance(block, ReportClip):
                yield from (audio for audio in block.audios if audio.wav.shape[-1])


class _Players:
    """The page's audio as `data:` URIs that stay, all together, within some bytes.

    FLAC where all of it fits; else MP3, at the constant rate that fits; else the first players only.
    """

    def __init__(self, audios: Sequence[ReportAudio], audio_bytes: int) -> None:
        self.note = ""
        self._uris: dict[int, str] = {}
        size = 0
        for audio in audios:
            self._uris[id(audio)] = audio_uri(audio.wav, audio.sample_rate)
            size += len(self._uris[id(audio)])
            if size > audio_bytes:
                break
        if size > audio_bytes:
            self._compress(audios, audio_bytes)

    def uri(self, audio: ReportAudio) -> str | None:
        """What plays it; None where it found no room."""
        return self._uris.get(id(audio))

    def _compress(self, audios: Sequence[ReportAudio], audio_bytes: int) -> None:
        # a player costs some frames more than it plays; a character of base64 holds 6 bits
        seconds = sum(audio.wav.shape[-1] / audio.sample_rate + 0.2 for audio in audios)
        room = audio_bytes * 6 / seconds / 1000
        kbps = max((rate for rate in KBPS if rate <= room), default=KBPS[0])
        self._uris, size = {}, 0
        for audio in audios:
            uri = audio_uri(audio.wav, audio.sample_rate, kbps)
            if size + len(uri) > audio_bytes:
                continue
            self._uris[id(audio)] = uri
            size += len(uri)
        left_out = len(audios) - len(self._uris)
        self.note = f"MP3 of {kbps} kbit/s, to keep this page small" + (
            f"; {left_out} of {len(audios)} found no room" if left_out else ""
        )


def audio_uri(wav: np.ndarray, sample_rate: int, kbps: int | None = None) -> str:
    """(C, N) audio as a `data:` URI: 16-bit FLAC, sample for sample what `save_audio` writes as wav.

    With `kbps`, one of `KBPS`, it is MP3 of so many kbit/s where the sample rate is one of `MP3_RATES`.
    """
    rounded, encoded = io.BytesIO(), io.BytesIO()
    # libsndfile rounds floats differently for wav and FLAC: go through wav
    soundfile.write(rounded, np.clip(wav, -1.0, 1.0).T, sample_rate, format="WAV", subtype="PCM_16")
    rounded.seek(0)
    samples, _ = soundfile.read(rounded, dtype="int16", always_2d=True)
    if kbps is None or sample_rate not in MP3_RATES or samples.shape[1] > 2:
        soundfile.write(encoded, samples, sample_rate, format="FLAC", subtype="PCM_16")
        return "data:audio/flac;base64," + base64.b64encode(encoded.getvalue()).decode("ascii")
    # libsndfile wants the rate as a place between the format's largest (0) and smallest (1), and refuses 1 itself
    low, high = (32, 320) if sample_rate >= 32000 else (8, 160)
    level = min(max((high - kbps) / (high - low), 0.0), 0.99)
    soundfile.write(
        encoded, samples, sample_rate, format="MP3", bitrate_mode="CONSTANT", compression_level=level
    )
    return "data:audio/mpeg;base64," + base64.b64encode(encoded.getvalue()).decode("ascii")


def _section(section: ReportSection, top: float, players: _Players) -> str:
    parts = [f"<section>\n<h2>{_escape(section.title)}</h2>"]
    in_list = False
    for block in section.blocks:
        if isinstance(block, ReportCheck) != in_list:
            in_list = not in_list
            parts.append('<ul class="checks">' if in_list else "</ul>")
        parts.append(_block(block, top, players))
    parts.append("</ul>\n</section>" if in_list else "</section>")
    return "\n".join(parts)


def _block(block: Block, top: float, players: _Players) -> str:
    if isinstance(block, ReportText):
        return f"<p>{_escape(block.text)}</p>"
    if isinstance(block, ReportCheck):
        return _check(block)
    if isinstance(block, ReportTable):
        return _table(block)
    if isinstance(block, ReportFigures):
        return _figures(block)
    return _clip(block, top, players)


def _check(check: ReportCheck) -> str:
    kind, word = {True: ("pass", "PASS"), False: ("short", "SHORT"), None: ("open", "NOT MEASURED")}[
        check.passed
    ]
    return (
        f'<li><span class="badge {kind}">{word}</span> <span><strong>{_escape(check.name)}</strong> '
        f'<span class="detail">{_escape(check.detail)}</span></span></li>'
    )


def _table(table: ReportTable) -> str:
    head = "".join(f'<th scope="col">{_escape(name)}</th>' for name in table.columns)
    rows = []
    for row in table.rows:
        cells = "".join(
            f"<td{_mark(cell, i in table.best)}>{_cell(cell)}</td>" for i, cell in enumerate(row) if i
        )
        rows.append(f'<tr><th scope="row">{_cell(row[0])}</th>{cells}</tr>')
    caption = f'<p class="caption">{_escape(table.caption)}</p>' if table.caption else ""
    return (
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + f"\n</tbody></table></div>\n{caption}"
    )


def _mark(cell: str | ReportCell, best: bool) -> str:
    mark = cell.mark if isinstance(cell, ReportCell) else ""
    mark = mark or ("best" if best else "")
    return f" class={mark}" if mark else ""


def _cell(cell: str | ReportCell) -> str:
    if isinstance(cell, str):
        return _escape(cell)
    text = _escape(cell.text)
    if cell.link:
        text = f'<a href="#{_anchor(cell.link)}">{text}</a>'
    return text + (f"<small>{_escape(cell.detail)}</small>" if cell.detail else "")


def _anchor(title: str) -> str:
    """A clip's title as an identifier; different titles stay different."""
    return "clip-" + "".join(
        c if c.isalnum() and c.isascii() or c in "-." else f"_{ord(c):x}_" for c in title
    )


def _figures(figures: ReportFigures) -> str:
    drawn = "\n".join(
        f"<figure><figcaption>{_escape(plot.title)}</figcaption>{_draw(plot)}</figure>"
        for plot in figures.plots
    )
    caption = f'<p class="caption">{_escape(figures.caption)}</p>' if figures.caption else ""
    return f'<div class="plots">\n{drawn}\n</div>\n{caption}'


def _draw(plot: Plot | Histogram) -> str:
    return draw_plot(plot) if isinstance(plot, Plot) else draw_histogram(plot)


def _clip(clip: ReportClip, top: float, players: _Players) -> str:
    facts = " · ".join(f"{_escape(name)} <b>{_escape(value)}</b>" for name, value in clip.facts.items())
    longest = max(
        (audio.wav.shape[-1] / audio.sample_rate for audio in clip.audios if audio.spectrogram), default=0.0
    )
    large = "\n".join(_audio(audio, top, longest, players) for audio in clip.audios if audio.spectrogram)
    small = "\n".join(_audio(audio, top, longest, players) for audio in clip.audios if not audio.spectrogram)
    text = f'<p class="text">{_escape(clip.text)}</p>' if clip.text else ""
    if clip.picture:
        source = "data:image/png;base64," + base64.b64encode(clip.picture).decode("ascii")
        text += f'<img alt="{_escape(clip.title)}: spectrograms" src="{source}">\n'
    return (
        f'<article class="clip" id="{_anchor(clip.title)}">\n<h3>{_escape(clip.title)}</h3>\n'
        f'<p class="facts">{facts}</p>\n{text}'
        f'<div class="large">\n{large}\n</div>\n<div class="small">\n{small}\n</div>\n</article>'
    )


def _audio(audio: ReportAudio, top: float, longest: float, players: _Players) -> str:
    seconds = audio.wav.shape[-1] / audio.sample_rate
    note = f'<span class="note">{_escape(audio.note)}</span>' if audio.note else ""
    label = (
        f'<div class="label"><strong>{_escape(audio.label)}</strong> <span>{seconds:.1f} s</span>{note}</div>'
    )
    if audio.wav.shape[-1] == 0:
        return f'<div class="audio">{label}<p class="note">nothing to play</p></div>'
    drawing = ""
    if audio.spectrogram:
        name = f"{audio.label}: log-mel spectrogram"
        drawing = draw_spectrogram(audio.wav, audio.sample_rate, name, top, longest, audio.boundary)
    source = players.uri(audio)
    if source is None:
        return f'<div class="audio">{label}{drawing}<p class="note">no room for it in this page</p></div>'
    player = f'<audio controls preload="metadata" aria-label="{_escape(audio.label)}" src="{source}"></audio>'
    return f'<div class="audio">{label}{drawing}{player}</div>'


def _unbroken_flags(text: str) -> str:
    """Lines of a command break between flags, not at their hyphens."""
    return re.sub(r"(?<!\S)(--[\w-]+)", r'<span class="flag">\1</span>', text)


def _escape(text: str) -> str:
    return html.escape(str(text), quote=True)


CSS = """
:root { color-scheme: light dark; --back: #ffffff; --card: #f6f7f9; --ink: #1d2330; --soft: #5b6472; --line: #dfe3e8;
  --pass: #17794f; --short: #b3411a; --best: #0f5fa8; }
@media (prefers-color-scheme: dark) { :root { --back: #14171c; --card: #1c2027; --ink: #e4e8ee; --soft: #9aa4b2;
  --line: #323945; --pass: #4cc38a; --short: #f08a5d; --best: #7db9f5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 8px 0 16px; }
h2 { font-size: 19px; margin: 40px 0 12px; padding-bottom: 6px; border-bottom: 1px solid var(--line); }
h3 { font-size: 15px; margin: 0; overflow-wrap: anywhere; }
p { max-width: 78ch; margin: 8px 0; }
.summary { display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px; margin: 0; font-size: 14px; }
.summary dt { color: var(--soft); }
.summary dd { margin: 0; overflow-wrap: anywhere; }
.flag { white-space: nowrap; }
.checks { list-style: none; padding: 0; margin: 8px 0; display: grid; gap: 7px; }
.checks li { display: flex; gap: 12px; align-items: baseline; }
.badge { flex: none; min-width: 64px; text-align: center; font-size: 12px; font-weight: 700; letter-spacing: .03em;
  border: 1.5px solid currentColor; border-radius: 5px; padding: 0 6px; }
.badge.pass { color: var(--pass); } .badge.short { color: var(--short); } .badge.open { color: var(--soft); }
.detail { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; margin: 8px 0; }
th, td { padding: 5px 14px 5px 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--back); }
tbody th { font-weight: 600; } td small { display: block; color: var(--soft); font-size: 12px; font-weight: 400; }
td.best { color: var(--best); font-weight: 650; } td a { color: inherit; }
td.pass { color: var(--pass); font-weight: 650; } td.short { color: var(--short); font-weight: 650; }
td.open { color: var(--soft); }
.caption, .note, .facts, .text { color: var(--soft); font-size: 13px; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); gap: 18px 26px; }
figure { margin: 0; } figcaption { font-weight: 600; font-size: 14px; margin-bottom: 2px; }
svg, img { width: 100%; height: auto; display: block; }
.clip { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; padding: 14px 16px; margin: 14px 0; }
.facts { margin: 2px 0 8px; } .facts b { color: var(--ink); font-weight: 600; }
.large { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 14px 20px; }
.small { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 260px), 1fr)); gap: 8px 20px;
  margin-top: 12px; }
.label { font-size: 13.5px; display: flex; flex-wrap: wrap; gap: 0 8px; align-items: baseline; }
.label span { color: var(--soft); } .label .note { flex-basis: 100%; }
.large .label { min-height: 3.2em; align-content: flex-start; }
audio { width: 100%; height: 36px; margin-top: 4px; }
@media (max-width: 560px) { main { padding: 14px 12px 40px; } h1 { font-size: 21px; }
  .summary { grid-template-columns: 1fr; gap: 0; } th { white-space: normal; min-width: 5.5em; }
  tbody th { min-width: 8em; }
  .summary dd { margin-bottom: 6px; } .large .label { min-height: 0; } }
"""
