"""Audio to listen to while a model trains: the same few validation cuts every time, continued by the model as it is.

    samples/prompt   the cut's first seconds, through the codec
    samples/codec    the cut itself through the codec: the best that the model can reach
    samples/ar       prompt and continuation of the AR decoder, quantizer 0 alone
    samples/ar_nar   the same continuation with the quantizers that the NAR decoder adds to it

A second cut's tags end in `_2`, and so on. What is drawn at random is drawn anew from one seed each time: what changes
from sample to sample is the model.
"""

import copy
import logging
import math
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from valle.codecs import Codec
from valle.modules.packing import forget
from valle.modules.spectral import LogMel
from valle.utils.files import atomic_path

log = logging.getLogger(__name__)

PROMPT_SECONDS, NEW_SECONDS = 3.0, 5.0
SHORT_PROMPT = 0.4  # of a cut that is shorter than both together
CUTS = 2
KINDS = {
    "prompt": "prompt",
    "codec": "recording through the codec",
    "ar": "AR: quantizer 0 alone",
    "ar_nar": "AR + NAR",
}
WINDOW_SECONDS, HOP_SECONDS, MEL_BANDS = 0.064, 0.016, 80  # of the pictures
DYNAMIC_RANGE = 8.0  # of their colours, in nats of magnitude: 70 dB


class ContinuationSamples:
    """Makes the samples of an AudioLM: what the engine calls a `SampleMaker`.

    Args:
        codec: with as many quantizers as the model has.
        rows: (T, Q) codes of each cut.
        prompt_seconds, new_seconds: lengths of prompt and continuation.
        seed: of the draw.
    """

    def __init__(
        self,
        codec: Codec,
        rows: Sequence[Tensor],
        prompt_seconds: float = PROMPT_SECONDS,
        new_seconds: float = NEW_SECONDS,
        seed: int = 0,
    ) -> None:
        self.codec, self.seed, self.sample_rate = codec, seed, codec.sample_rate
        self.new_frames = round(new_seconds * codec.frame_rate)
        most = round(prompt_seconds * codec.frame_rate)
        self.rows = [row[: most + self.new_frames].long() for row in rows]
        self.prompts = [row[: min(most, math.ceil(SHORT_PROMPT * len(row)))] for row in self.rows]

    @torch.no_grad()
    def make(self, model: Any, stage: int) -> dict[str, Tensor]:
        """Tag -> (C, N) waveform. Stage 1 trains no NAR decoder, so its samples have none."""
        self.codec.to(model.device)
        first = with_quantizers(self.codec, 1)
        lens = torch.tensor([len(prompt) for prompt in self.prompts])
        prompts = torch.nn.utils.rnn.pad_sequence(self.prompts, batch_first=True)
        result = model.generate(
            prompts, lens, self.new_frames, seed=self.seed, min_new_tokens=self.new_frames
        )
        forget(model)
        audio = {}
        for number, (row, prompt, codes) in enumerate(
            zip(self.rows, self.prompts, result.codes, strict=True)
        ):
            wavs = {
                "prompt": decode(self.codec, prompt),
                "codec": decode(self.codec, row),
                "ar": decode(first, codes[:, :1]),
            }
            if stage != 1 and model.num_quantizers > 1:
                wavs["ar_nar"] = decode(self.codec, codes)
            suffix = f"_{number + 1}" if number else ""
            audio.update({f"samples/{kind}{suffix}": wav for kind, wav in wavs.items()})
        return audio


class ReadingSamples:
    """What a VALL-E makes of the texts of a few cuts, without a prompt: what the engine calls a `SampleMaker`.

    Args:
        codec: with as many quantizers as the model has.
        rows: (T, Q) codes of each cut.
        texts: (S,) symbols or (S, F) notes of each cut.
        seed: of the draw.
    """

    def __init__(self, codec: Codec, rows: Sequence[Tensor], texts: Sequence[Tensor], seed: int = 0) -> None:
        self.codec, self.seed, self.sample_rate = codec, seed, codec.sample_rate
        self.rows, self.texts = [row.long() for row in rows], list(texts)

    @torch.no_grad()
    def make(self, model: Any, stage: int) -> dict[str, Tensor]:
        """Tag -> (C, N) waveform. Stage 1 trains no NAR decoder, so its samples have none."""
        if not model.first_frame:
            return {}
        self.codec.to(model.device)
        first = with_quantizers(self.codec, 1)
        lens = torch.tensor([len(text) for text in self.texts])
        texts = torch.nn.utils.rnn.pad_sequence(self.texts, batch_first=True)
        limit = max(len(row) for row in self.rows) * 3 // 2
        result = model.generate(texts, lens, max_new_tokens=limit, seed=self.seed, min_new_tokens=1)
        forget(model)
        audio = {}
        for number, (row, codes) in enumerate(zip(self.rows, result.codes, strict=True)):
            wavs = {"codec": decode(self.codec, row), "ar": decode(first, codes[:, :1])}
            if stage != 1 and model.num_quantizers > 1:
                wavs["ar_nar"] = decode(self.codec, codes)
            suffix = f"_{number + 1}" if number else ""
            audio.update({f"samples/{kind}{suffix}": wav for kind, wav in wavs.items()})
        return audio


def decode(codec: Codec, codes: Tensor) -> Tensor:
    """(T, Q) -> (C, N)."""
    return codec.decode(codes[None].to(codec.device))[0].float().cpu()


def with_quantizers(codec: Codec, number: int) -> Codec:
    """The same codec, with the same weights, for codes of its first `number` quantizers."""
    fewer = copy.copy(codec)
    fewer.num_quantizers = number
    return fewer


def choose(durations: Sequence[float], seed: int, count: int = CUTS) -> list[int]:
    """Places of the cuts to listen to: drawn from those that are long enough, then the longest of the others.

    Args:
        durations: of each cut in seconds.
        seed: of the draw.
        count: how many, at most.
    """
    enough = [place for place, seconds in enumerate(durations) if seconds >= PROMPT_SECONDS + NEW_SECONDS]
    chosen = random.Random(seed).sample(enough, min(count, len(enough)))
    others = sorted(set(range(len(durations))) - set(enough), key=lambda place: -durations[place])
    return (chosen + others)[:count]


def draw_spectrograms(audio: dict[str, Tensor], sample_rate: int, path: Path) -> np.ndarray | None:
    """Mel spectrograms of all clips, a cut a row, as a PNG file.

    Args:
        audio: tag -> (C, N), as `make` gives them.
        sample_rate: Hz.
        path: of the file.

    Returns:
        (H, W, 3) uint8; None where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.image import imsave
    except ImportError:
        return None
    clips: dict[str, dict[str, Tensor]] = {}  # cut -> kind -> (C, N)
    for tag, wav in audio.items():
        kind, _, number = tag.rpartition("/")[2].rpartition("_")
        named = (number, kind) if number.isdigit() else ("1", tag.rpartition("/")[2])
        clips.setdefault(named[0], {})[named[1]] = wav
    kinds = list(dict.fromkeys(kind for of_cut in clips.values() for kind in of_cut))
    transform = _mel(sample_rate)
    mels = {
        (cut, kind): transform(torch.nn.functional.pad(wav.float().cpu().mean(0), (0, 1))[None])[0].T.numpy()
        for cut, of_cut in clips.items()
        for kind, wav in of_cut.items()
    }  # (80, T) each
    top = max(float(mel.max()) for mel in mels.values() if mel.size)
    seconds = max(wav.shape[-1] for wav in audio.values()) / sample_rate
    ticks = _ticks(sample_rate)
    figure = Figure(figsize=(3.4 * len(kinds), 0.4 + 2.1 * len(clips)), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(len(clips), len(kinds), squeeze=False, sharex=True, sharey=True)
    for row, (cut, of_cut) in enumerate(clips.items()):
        boundary = of_cut["prompt"].shape[-1] / sample_rate if "prompt" in of_cut else None
        for column, kind in enumerate(kinds):
            axes = grid[row][column]
            mel = mels.get((cut, kind))
            if mel is not None and mel.size:
                axes.imshow(
                    mel, origin="lower", aspect="auto", cmap="magma", vmin=top - DYNAMIC_RANGE, vmax=top,
                    extent=(0, mel.shape[1] * HOP_SECONDS, 0, MEL_BANDS), interpolation="nearest",
                )  # fmt: skip
            if boundary is not None and kind != "prompt":
                axes.axvline(boundary, color="#35d6c0", linewidth=1.2, linestyle="--")
            axes.set_facecolor("#ececec")
            axes.set_xlim(0, seconds)
            axes.set_ylim(0, MEL_BANDS)
            axes.set_yticks([band for _, band in ticks], [f"{khz:g}" for khz, _ in ticks])
            if row == 0:
                axes.set_title(KINDS.get(kind, kind), fontsize=10)
        grid[row][0].set_ylabel(f"cut {cut}, kHz", fontsize=9)
    figure.supxlabel("time (s)", fontsize=9)
    canvas.draw()
    picture = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    with atomic_path(path) as temporary:
        imsave(temporary, picture)
    return picture


def _ticks(sample_rate: int) -> list[tuple[float, float]]:
    """(kHz, mel band with its fraction) of some frequencies that lie within the picture."""
    centres = (
        _mel(sample_rate).filters.argmax(0) * sample_rate / (2 * (_mel(sample_rate).filters.shape[0] - 1))
    )
    shown = [khz for khz in (0.5, 1, 2, 4, 8, 16) if centres[0] < khz * 1000 < centres[-1]]
    return [(khz, float(np.interp(khz * 1000, centres, np.arange(MEL_BANDS) + 0.5))) for khz in shown]


@lru_cache(maxsize=4)
def _mel(sample_rate: int) -> LogMel:
    return LogMel(
        sample_rate, 2 * round(sample_rate * WINDOW_SECONDS / 2), round(sample_rate * HOP_SECONDS), MEL_BANDS
    )
