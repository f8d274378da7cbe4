"""Held-out recordings and what the model makes of their beginnings: the clips that one listens to and judges.

Each cut's true codes are split after some seconds of prompt, and the model continues the prompt some times, until it
ends by itself or has gone on half as long again as the recording does. Beside the continuations stand the recording,
its resynthesis by the codec (no model of this codec can sound better) and three answers that take no model: the
prompt over and over, codes drawn from the unigrams, and silence.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lhotse.audio import AudioLoadingError
from lhotse.cut import Cut

from valle.codecs import Codec
from valle.evaluation.audio import log_mel_distance
from valle.evaluation.baselines import Unigram, sample_unigram
from valle.evaluation.likelihood import pad_codes
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


def continue_prompts(
    model: Any,
    prompts: Sequence[np.ndarray],
    most: Sequence[int],
    seed: int,
    temperature: float,
    top_k: int,
) -> list[Continuation]:
    """Continue a batch of prompts: the one place that knows how a model is asked.

    Args:
        model: an AudioLM.
        prompts: (S_i, Q) codes each.
        most: frames that each may get.
        seed: of the sampling.
        temperature, top_k: of the sampling.
    """
    device = next(model.parameters()).device
    x, x_lens = pad_codes(prompts, device)
    made = model.generate(x, x_lens, max(most), temperature, top_k, seed=seed)
    out = []
    for codes, start, limit, reason in zip(
        made.codes, made.prompt_lens, most, made.finish_reasons, strict=True
    ):
        new = codes[start:].cpu().numpy()
        out.append(Continuation(new[:limit], reason if len(new) <= limit else "length"))
    return out


def longest_continuation(rest: int) -> int:
    """Frames that a continuation may have where the recording has `rest` more."""
    return math.ceil(MOST_LENGTH * rest)


def continuation_batches(lengths: Sequence[int], prompt_frames: int) -> list[list[int]]:
    """Rows in batches of similar length.

    Args:
        lengths: frames of each recording.
        prompt_frames: of them, given to the model.
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        frames = prompt_frames + longest_continuation(lengths[row] - prompt_frames)
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
            model-(n-1), loop, unigram, silence.
    """

    cut_id: str
    text: str
    sample_rate: int
    boundary: int
    asked_frames: int
    new_frames: int
    wavs: dict[str, np.ndarray] = field(default_factory=dict)

    def part(self, condition: str, part: str) -> np.ndarray:
        """(C, N) of `full`, `prompt` or `continuation`."""
        wav = self.wavs[condition]
        return {"full": wav, "prompt": wav[:, : self.boundary], "continuation": wav[:, self.boundary :]}[part]

    def excerpt(self, condition: str, part: str = "continuation") -> Excerpt:
        """The same, as the metrics take it."""
        return Excerpt(np.ascontiguousarray(self.part(condition, part)), self.sample_rate)


def choose_cuts(cuts: Sequence[Cut], number: int, prompt_seconds: float, seed: int) -> list[Cut]:
    """Draw cuts at random among those that go on long enough after the prompt: nobody picks the good ones.

    Args:
        cuts: to choose from.
        number: how many at most.
        prompt_seconds: length of the prompt.
        seed: of the draw.
    """
    long_enough = [cut for cut in cuts if cut.duration >= prompt_seconds + MIN_REST_SECONDS]
    order = np.random.default_rng(seed).permutation(len(long_enough))[:number]
    return [long_enough[i] for i in sorted(order)]


def codes_of_conditions(
    codes: np.ndarray,
    prompt_frames: int,
    continuations: Sequence[Continuation],
    unigrams: Sequence[Unigram],
    seed: int,
) -> dict[str, np.ndarray]:
    """Codes of the stretch after the prompt: condition -> (T, Q). Silence has none.

    Args:
        codes: (T, Q) the recording's.
        prompt_frames: S, smaller than T.
        continuations: the model's, one a seed.
        unigrams: one a quantizer.
        seed: of the codes drawn from them.
    """
    rest = len(codes) - prompt_frames
    prompt = codes[:prompt_frames]
    made = {"resynthesis": codes[prompt_frames:]}
    made |= {f"model-{number}": part.codes for number, part in enumerate(continuations)}
    made["loop"] = np.tile(prompt, (math.ceil(rest / prompt_frames), 1))[:rest]
    made["unigram"] = sample_unigram(unigrams, rest, seed)
    return made


def make_clip(
    cut: Cut,
    codes: np.ndarray,
    prompt_frames: int,
    continuations: Sequence[Continuation],
    unigrams: Sequence[Unigram],
    codec: Codec,
    seed: int,
) -> Clip:
    """Decode a cut in all conditions.

    Args:
        cut: the held-out cut; its recording is read, where it is still there.
        codes: (T, Q) its true codes, Q of the model.
        prompt_frames: S, smaller than T.
        continuations: the model's, one a seed.
        unigrams: one a quantizer.
        codec: decodes.
        seed: of the codes drawn from the unigrams.
    """
    clip = Clip(
        cut_id=cut.id,
        text=" ".join(part.text for part in cut.supervisions if part.text),
        sample_rate=codec.sample_rate,
        boundary=prompt_frames * codec.hop_length,
        asked_frames=len(codes) - prompt_frames,
        new_frames=len(continuations[0].codes) if continuations else 0,
    )
    recording = read_recording(cut, codec)
    if recording is not None:
        clip.wavs["recording"] = recording
    for name, rest in codes_of_conditions(codes, prompt_frames, continuations, unigrams, seed).items():
        clip.wavs[name] = _decode(codec, np.concatenate([codes[:prompt_frames], rest]))
    silence = clip.wavs["resynthesis"].copy()
    silence[:, clip.boundary :] = 0
    clip.wavs["silence"] = silence
    return clip


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
