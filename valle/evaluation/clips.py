"""Held-out recordings and what the model makes of their beginnings: the clips that one listens to and scores by ear.

Each clip's true codes are split after some seconds of prompt; the model continues the prompt for exactly as long as
the recording goes on. Beside it stand the recording, its resynthesis by the codec (no
model of this codec can sound better), codes drawn from the unigrams, and white noise.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lhotse.audio import AudioLoadingError
from lhotse.cut import Cut

from valle.codecs import Codec
from valle.evaluation.audio import dnsmos, log_mel_distance
from valle.evaluation.baselines import Unigram, sample_unigram
from valle.evaluation.statistics import Interval, bootstrap_ci
from valle.utils.audio import convert_audio, save_audio
from valle.utils.progress import progress

log = logging.getLogger(__name__)
MIN_REST_SECONDS = 1.0  # of recording after the prompt, for a cut to be a clip

# What is scored, and how it is called in tables; the order is the tables' order.
CONDITIONS = {
    "recording": "recording",
    "resynthesis": "codec resynthesis of the recording",
    "model": "prompt + continuation by the model",
    "unigram": "prompt + codes drawn from the unigrams",
    "noise": "white noise, as loud as the recording",
}


@dataclass
class Clip:
    """One held-out recording, in all conditions, at the codec's rate.

    Attributes:
        cut_id: of the held-out cut.
        text: its transcript, where it has one.
        boundary: samples of prompt at the start of every condition.
        asked_frames, new_frames: of continuation; `AudioLM.inference` gives all that are asked.
        wavs: condition -> (C, N) float32.
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


def choose_cuts(cuts: Sequence[Cut], num_clips: int, prompt_seconds: float, seed: int) -> list[Cut]:
    """Draw clips at random among the cuts that go on long enough after the prompt: nobody picks the good ones."""
    long_enough = [cut for cut in cuts if cut.duration >= prompt_seconds + MIN_REST_SECONDS]
    order = np.random.default_rng(seed).permutation(len(long_enough))[:num_clips]
    return [long_enough[i] for i in sorted(order)]


def make_clip(
    cut: Cut,
    codes: np.ndarray,
    model: Any,
    codec: Codec,
    unigrams: Sequence[Unigram],
    prompt_frames: int,
    seed: int,
    temperature: float,
    top_k: int,
) -> Clip:
    """Continue one cut's beginning, and decode everything to compare it with.

    Args:
        cut: the held-out cut; its recording is read, where it is still there.
        codes: (T, Q) its true codes, Q of the model.
        model: an AudioLM on the codec's device.
        codec: decodes.
        unigrams: one a quantizer.
        prompt_frames: S, smaller than T.
        seed: of the sampling.
        temperature, top_k: of the sampling.
    """
    rest = len(codes) - prompt_frames
    prompt = torch.from_numpy(codes[None, :prompt_frames]).to(codec.device)  # (1, S, Q)
    full = model.inference(prompt, max_new_tokens=rest, temperature=temperature, top_k=top_k, seed=seed)
    generated = full[0].cpu().numpy()  # (S + new, Q)
    drawn = np.concatenate([codes[:prompt_frames], sample_unigram(unigrams, rest, seed)])
    clip = Clip(
        cut_id=cut.id,
        text=" ".join(part.text for part in cut.supervisions if part.text),
        sample_rate=codec.sample_rate,
        boundary=prompt_frames * codec.hop_length,
        asked_frames=rest,
        new_frames=len(generated) - prompt_frames,
    )
    recording = read_recording(cut, codec)
    resynthesis = _decode(codec, codes)
    if recording is not None:
        clip.wavs["recording"] = recording
    clip.wavs["resynthesis"] = resynthesis
    clip.wavs["model"] = _decode(codec, generated)
    clip.wavs["unigram"] = _decode(codec, drawn)
    loudness = np.sqrt(np.mean(np.square(resynthesis if recording is None else recording)))
    noise = np.random.default_rng(seed).standard_normal(resynthesis.shape) * loudness
    clip.wavs["noise"] = noise.astype(np.float32)
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
    """`<cut>_prompt.wav`, `_continuation.wav`, `_full.wav`, `_resynthesis.wav` and `_recording.wav` of each clip."""
    for clip in clips:
        stem = "".join(
            character if character.isalnum() or character in "-_." else "_" for character in clip.cut_id
        )
        parts = {"full": clip.wavs["model"], "continuation": clip.part("model", "continuation"),
                 "prompt": clip.part("model", "prompt"), "resynthesis": clip.wavs["resynthesis"]}  # fmt: skip
        if "recording" in clip.wavs:
            parts["recording"] = clip.wavs["recording"]
            parts["prompt"] = clip.part("recording", "prompt")
        for name, wav in parts.items():
            if wav.shape[-1]:
                save_audio(folder / f"{stem}_{name}.wav", wav, clip.sample_rate)


def dnsmos_table(clips: Sequence[Clip], seed: int, show_progress: bool = True) -> dict[str, dict[str, Any]]:
    """DNSMOS of every condition: condition -> `full` and `continuation` -> score name -> Interval.

    Noise has no beginning to keep apart, and stands under both.
    """
    pairs = [(condition, part) for condition in CONDITIONS for part in ("full", "continuation")]
    pairs.remove(("noise", "full"))
    table: dict[str, dict[str, Any]] = {}
    bar = progress(total=len(pairs) * len(clips), desc="DNSMOS", unit="clip", disable=not show_progress)
    for condition, part in pairs:
        scores = []
        for clip in clips:
            bar.update()
            if condition in clip.wavs and clip.part(condition, part).shape[-1]:
                scores.append(dnsmos(clip.part(condition, part), clip.sample_rate))
        if scores:
            intervals = {name: bootstrap_ci([score[name] for score in scores], seed) for name in scores[0]}
            table.setdefault(condition, {})[part] = intervals
    bar.close()
    if "noise" in table:
        table["noise"]["full"] = table["noise"]["continuation"]
    return table


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
