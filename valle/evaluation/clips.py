"""Held-out recordings and what the model makes of their beginnings: the clips that one listens to and judges.

The model continues a prompt some times, until it ends by itself or has gone on half as long again as the recording.
Beside the continuations stand the recording, its resynthesis by the codec (no model of this codec can sound better) and
three answers that take no model: the prompt over and over, codes drawn from the unigrams, and silence. A model that
reads is given another cut's text too.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from lhotse.audio import AudioLoadingError
from lhotse.cut import Cut

from valle.codecs import Codec
from valle.evaluation.audio import log_mel_distance
from valle.evaluation.baselines import Unigram, sample_unigram
from valle.evaluation.metrics import Excerpt
from valle.evaluation.statistics import Interval, bootstrap_ci
from valle.utils.audio import convert_audio, save_audio

log = logging.getLogger(__name__)
MIN_REST_SECONDS = 1.0  # of recording after the prompt, for a cut to be a clip
MOST_LENGTH = 1.5  # times the recording's rest that a continuation may last
BATCH_FRAMES = 40_000  # padded frames that are continued at once

# What is scored, and how it is called in tables; the order is the tables' order. Of the model's continuations there
# is one a seed: model-0, model-1 ...
CONDITIONS = {
    "recording": "recording",
    "resynthesis": "codec resynthesis of the recording",
    "model": "prompt + continuation by the model",
    "wrong": "prompt + continuation by the model, given another cut's text or notes",
    "loop": "prompt over and over",
    "unigram": "prompt + codes drawn from the unigrams",
    "silence": "prompt + silence",
}


def condition_of(name: str) -> str:
    """`model-1` -> `model`; the other conditions are their own."""
    return "model" if name.startswith("model-") else name


@dataclass(frozen=True)
class Continuation:
    """What a model adds to a prompt.

    Attributes:
        codes: (T, Q) int64; T may be 0.
        finish_reason: "eos" where it ended by itself, "length" where it was stopped.
    """

    codes: np.ndarray
    finish_reason: str


@dataclass(frozen=True)
class Question:
    """What a model is given of a held-out cut, and what really came.

    Attributes:
        cut: the held-out cut.
        codes: (T, Q) of the prompt, then the true ones.
        prompt_frames: S, frames of the prompt.
        prompt_cut: the cut that is the prompt; None: `cut` begins with it.
        text: (L,) or (L, F) ids of what is read, the prompt's first; None where nothing is.
        own: how many of them are the prompt's.
        wrong: another cut's text behind the prompt's.
    """

    cut: Cut
    codes: np.ndarray
    prompt_frames: int
    prompt_cut: Cut | None = None
    text: np.ndarray | None = None
    own: int = 0
    wrong: np.ndarray | None = None

    @property
    def prompt(self) -> np.ndarray:
        """(S, Q)."""
        return self.codes[: self.prompt_frames]

    @property
    def rest(self) -> int:
        """Frames that came after the prompt."""
        return len(self.codes) - self.prompt_frames

    def with_wrong_text(self) -> "Question":
        """The same, with another cut's text to read."""
        return replace(self, text=self.wrong, wrong=None)


def longest_continuation(rest: int) -> int:
    """Frames that a continuation may have where the recording has `rest` more."""
    return math.ceil(MOST_LENGTH * rest)


def continuation_batches(lengths: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Rows in batches of similar length.

    Args:
        lengths: frames of each prompt, and of what came after it.
    """
    longest = [prompt + longest_continuation(rest) for prompt, rest in lengths]
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: longest[row]):
        frames = longest[row]
        if batches and frames * (len(batches[-1]) + 1) <= BATCH_FRAMES:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


@dataclass
class Clip:
    """One held-out recording, in all conditions, at the codec's rate.

    Attributes:
        cut_id: of the held-out cut.
        text: its transcript, where it has one.
        boundary: samples of prompt at the start of every condition.
        asked_frames: of recording after the prompt.
        new_frames: of the model's first continuation.
        wavs: condition -> (C, N) float32, prompt included: recording (where it is there), resynthesis, model-0 …
            model-(n-1), wrong (of models that read), loop, unigram, silence.
        prompt_id: of the cut that is the prompt, where that is another one.
    """

    cut_id: str
    text: str
    sample_rate: int
    boundary: int
    asked_frames: int
    new_frames: int
    wavs: dict[str, np.ndarray] = field(default_factory=dict)
    prompt_id: str | None = None

    def part(self, condition: str, part: str) -> np.ndarray:
        """(C, N) of `full`, `prompt` or `continuation`."""
        wav = self.wavs[condition]
        return {"full": wav, "prompt": wav[:, : self.boundary], "continuation": wav[:, self.boundary :]}[part]

    def excerpt(self, condition: str, part: str = "continuation") -> Excerpt:
        """The same, as the metrics take it."""
        return Excerpt(np.ascontiguousarray(self.part(condition, part)), self.sample_rate)


def choose_cuts(cuts: Sequence[Cut], number: int, shortest: float, seed: int) -> list[Cut]:
    """Draw cuts at random among those that are long enough: nobody picks the good ones.

    Args:
        cuts: to choose from.
        number: how many at most.
        shortest: seconds of a cut, at least.
        seed: of the draw.
    """
    long_enough = [cut for cut in cuts if cut.duration >= shortest]
    order = np.random.default_rng(seed).permutation(len(long_enough))[:number]
    return [long_enough[i] for i in sorted(order)]


def codes_of_conditions(
    question: Question,
    continuations: Sequence[Continuation],
    wrong: Continuation | None,
    unigrams: Sequence[Unigram],
    seed: int,
) -> dict[str, np.ndarray]:
    """Codes of the stretch after the prompt: condition -> (T, Q). Silence has none.

    Args:
        question: what the model was given.
        continuations: the model's, one a seed.
        wrong: what it made of another cut's text.
        unigrams: one a quantizer.
        seed: of the codes drawn from them.
    """
    prompt, rest = question.prompt, question.rest
    made = {"resynthesis": question.codes[question.prompt_frames :]}
    made |= {f"model-{number}": part.codes for number, part in enumerate(continuations)}
    if wrong is not None:
        made["wrong"] = wrong.codes
    made["loop"] = np.tile(prompt, (math.ceil(rest / len(prompt)), 1))[:rest]
    made["unigram"] = sample_unigram(unigrams, rest, seed)
    return made


def make_clip(
    question: Question,
    continuations: Sequence[Continuation],
    wrong: Continuation | None,
    unigrams: Sequence[Unigram],
    codec: Codec,
    seed: int,
) -> Clip:
    """Decode a cut in all conditions.

    Args:
        question: what the model was given; its recordings are read, where they are still there.
        continuations: the model's, one a seed.
        wrong: what it made of another cut's text.
        unigrams: one a quantizer.
        codec: decodes.
        seed: of the codes drawn from the unigrams.
    """
    clip = Clip(
        cut_id=question.cut.id,
        text=" ".join(part.text for part in question.cut.supervisions if part.text),
        sample_rate=codec.sample_rate,
        boundary=question.prompt_frames * codec.hop_length,
        asked_frames=question.rest,
        new_frames=len(continuations[0].codes) if continuations else 0,
        prompt_id=None if question.prompt_cut is None else question.prompt_cut.id,
    )
    recording = _read_both(question, codec)
    if recording is not None:
        clip.wavs["recording"] = recording
    for name, rest in codes_of_conditions(question, continuations, wrong, unigrams, seed).items():
        clip.wavs[name] = _decode(codec, np.concatenate([question.prompt, rest]))
    silence = clip.wavs["resynthesis"].copy()
    silence[:, clip.boundary :] = 0
    clip.wavs["silence"] = silence
    return clip


def _read_both(question: Question, codec: Codec) -> np.ndarray | None:
    """(C, N) of the prompt and what really came."""
    recording = read_recording(question.cut, codec)
    if recording is None or question.prompt_cut is None:
        return recording
    prompt = read_recording(question.prompt_cut, codec)
    if prompt is None:
        return None
    samples = question.prompt_frames * codec.hop_length
    padded = np.pad(prompt[:, :samples], ((0, 0), (0, max(0, samples - prompt.shape[1]))))
    return np.concatenate([padded, recording], 1)


def read_recording(cut: Cut, codec: Codec) -> np.ndarray | None:
    """(C, N) of the cut at the codec's rate; None where only the codes are left."""
    if not cut.has_recording:
        return None
    try:
        wav = cut.load_audio()
    except AudioLoadingError as error:
        log.warning("cut '%s': recording left out, %s", cut.id, str(error).splitlines()[0])
        return None
    return convert_audio(
        np.atleast_2d(wav).astype(np.float32), cut.sampling_rate, codec.sample_rate, codec.channels
    )


def save_clips(clips: Sequence[Clip], folder: Path) -> None:
    """Every clip as wavs: `<cut>_prompt.wav`, `_resynthesis.wav`, `_recording.wav`; of the model's continuations
    `_full.wav` and `_continuation.wav`, of other seeds than the first with their number behind it."""
    for clip in clips:
        source = "recording" if "recording" in clip.wavs else "resynthesis"
        parts = {"prompt": clip.part(source, "prompt"), "resynthesis": clip.wavs["resynthesis"]}
        if "recording" in clip.wavs:
            parts["recording"] = clip.wavs["recording"]
        for name in clip.wavs:
            if condition_of(name) == "model":
                end = "" if name == "model-0" else name.removeprefix("model")
                parts[f"full{end}"] = clip.wavs[name]
                parts[f"continuation{end}"] = clip.part(name, "continuation")
        for name, wav in parts.items():
            if wav.shape[-1]:
                save_audio(folder / f"{file_stem(clip.cut_id)}_{name}.wav", wav, clip.sample_rate)


def file_stem(cut_id: str) -> str:
    """A cut's name with nothing in it that a file's name cannot hold."""
    return "".join(char if char.isalnum() or char in "-_." else "_" for char in cut_id)


def mel_table(
    cuts: Sequence[Cut], codes: Sequence[np.ndarray], codec: Codec, seed: int
) -> dict[str, Interval]:
    """Log-mel distance to the recording, over all cuts whose recording is there: the codec's, and silence's."""
    distances: dict[str, list[float]] = {"resynthesis": [], "silence": []}
    for cut, cut_codes in zip(cuts, codes, strict=True):
        recording = read_recording(cut, codec)
        if recording is None:
            continue
        distances["resynthesis"].append(
            log_mel_distance(recording, _decode(codec, cut_codes), codec.sample_rate)
        )
        distances["silence"].append(log_mel_distance(recording, np.zeros_like(recording), codec.sample_rate))
    return {name: bootstrap_ci(values, seed) for name, values in distances.items() if values}


@torch.inference_mode()
def _decode(codec: Codec, codes: np.ndarray) -> np.ndarray:
    """(T, Q) -> (C, N)."""
    return codec.decode(torch.from_numpy(codes[None]).to(codec.device))[0].float().cpu().numpy()
