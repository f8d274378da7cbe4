"""Continue a recording: `infer.py clip.wav` writes <clip>_full.wav and <clip>_continuation.wav.

Or hear it while it is being made, `infer.py --stream out.wav clip.wav` (- for raw PCM on stdout); or make a part of it
anew, from second 1.5 to 2.5: `infer.py --infill 1.5 2.5 clip.wav` writes <clip>_infilled.wav. A clip may have any
sample rate and channel count, or be codec tokens (.npy, frames x quantizers). Architecture and codec come from the
checkpoint.
"""

import contextlib
import dataclasses
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from valle.codecs import Codec, matching_codec
from valle.codecs.streaming import StreamDecoder
from valle.config import option, parse
from valle.engine.devices import pick_device
from valle.generation.chunks import CHUNK_SECONDS, LOOKAHEAD_SECONDS, Chunks, default_chunks
from valle.generation.sampling import Sampling
from valle.models import AudioLM, Generation, load_model
from valle.models.builder import find_checkpoint
from valle.modules.packing import FORMATS
from valle.utils.audio import AudioSink, convert_audio, load_audio
from valle.utils.command import run
from valle.utils.errors import UserError
from valle.utils.progress import progress

MIN_PROMPT = 0.5  # seconds; less tells nothing about the sound to continue
USUAL_FRAMES = 500  # added when nobody says how many
WHOLE_SECONDS = 60.0  # what is longer is decoded in pieces, whose memory does not grow with it
PIECE_SECONDS = 10.0


@dataclass
class InferConfig:
    """What is continued, and how far"""

    clips: tuple[str, ...] = option(
        (), "recordings to continue, as --prompt", metavar="CLIP", positional=True
    )
    prompt: str | None = option(
        None, "recording (wav, flac, ogg, mp3, m4a, …) or codes (.npy) to continue; comma list"
    )
    checkpoint: str | None = option(
        None, "checkpoint (default: the newest best-valid-loss.pt in the recipe's exp/)"
    )
    output_dir: str = option(".", "where the results go")
    max_new_tokens: int | None = option(None, f"frames to add (default: {USUAL_FRAMES})")
    duration: float | None = option(None, "seconds to add, instead of --max-new-tokens")
    stop_at_eos: bool = option(False, "end where the model draws the end, even before the asked length")
    min_new_tokens: int | None = option(
        None, "end where the model draws the end, but not before so many frames"
    )
    max_prompt_duration: float = option(
        10.0, "the model sees so many seconds before what it generates, of --infill also behind it"
    )
    long: bool = option(
        False, "go on beyond the length that the model was trained on: it then sees its own last part"
    )
    window: float | None = option(
        None, "with --long, seconds that the model sees and adds at once (default: as trained)"
    )
    stream: str | None = option(
        None,
        "write the continuation to this .wav file while it is being made; -: raw PCM to stdout",
        metavar="OUT",
    )
    chunk: float | None = option(
        None,
        f"seconds between two pieces of a stream (default: {CHUNK_SECONDS}); without --stream, makes the codes that "
        "such a stream makes",
    )
    infill: tuple[float, float] | None = option(
        None, "make this part of the clip anew, in seconds", metavar=("START", "END")
    )
    dtype: str = option("fp32", "number format of the weights", FORMATS)
    device: str = option("auto", "auto, cpu, cuda or cuda:N")


@dataclass
class DrawConfig:
    """How codes are drawn"""

    seed: int = option(0, "of the draw; the same seed gives the same result")
    temperature: float = option(1.0, "0: always the likeliest code; higher: more surprising")
    top_k: int = option(50, "codes to draw from; 0: all")
    top_p: float = option(1.0, "probability mass to draw from")
    min_p: float = option(0.0, "leave out codes below this part of the likeliest one's probability")
    repetition_penalty: float = option(1.0, "above 1: make codes that were drawn before less likely")
    repetition_window: float = option(0.0, "seconds that the penalty looks back; 0: to the first new frame")
    repetition_aware: bool = option(
        False, "draw again from all codes where the last frames have the code too often"
    )
    stop_repetition: float = option(
        0.0, "end where the last so many seconds only repeat themselves; 0: never"
    )
    guidance_scale: float = option(1.0, "above 1: follow the prompt more closely (classifier-free guidance)")
    num_samples: int = option(1, "continuations of each clip, the likeliest one first")


# A flag, and those that say something else or nothing beside it.
EXCLUDES = {
    "max_new_tokens": ("duration",),
    "stop_at_eos": ("min_new_tokens",),
    "stream": ("num_samples", "stop_repetition"),
    "infill": (
        "stream", "chunk", "long", "window", "max_new_tokens", "duration", "stop_at_eos", "min_new_tokens",
        "stop_repetition", "guidance_scale",
    ),
}  # fmt: skip
# A flag, and those of which one must stand beside it.
NEEDS = {
    "window": ("long",),
    "repetition_window": ("repetition_penalty",),
    "stop_repetition": ("stop_at_eos", "min_new_tokens"),
}


@dataclass(frozen=True)
class Setup:
    """All that a mode of this command works with.

    Attributes:
        checkpoint: where the model is from.
        training_data: the data settings that it was trained with.
    """

    config: InferConfig
    draw: DrawConfig
    clips: list[Path]
    checkpoint: Path
    model: AudioLM
    codec: Codec
    training_data: dict[str, Any]

    @property
    def sampling(self) -> Sampling:
        """Seconds as frames."""
        draw = self.draw
        return Sampling(
            draw.temperature, draw.top_k, draw.top_p, draw.min_p, draw.repetition_penalty,
            self.frames("repetition_window", draw.repetition_window), draw.repetition_aware,
            stop_repetition=self.frames("stop_repetition", draw.stop_repetition),
        )  # fmt: skip

    @property
    def new_frames(self) -> tuple[int, int]:
        """At most and at least so many frames are to be added."""
        config = self.config
        frames = USUAL_FRAMES if config.max_new_tokens is None else config.max_new_tokens
        if config.duration is not None:
            frames = self.frames("duration", config.duration)
        if frames < 1:
            raise UserError(
                f"{frames} frames are to be added, expected 1 or more (--max-new-tokens, --duration)"
            )
        least = 0 if config.stop_at_eos else frames
        if config.min_new_tokens is not None:
            least = config.min_new_tokens
            if not 0 <= least <= frames:
                raise UserError(
                    f"--min-new-tokens is {least}, expected 0 to {frames}, the frames to be added"
                )
        return frames, least

    @property
    def chunks(self) -> Chunks:
        """A stream's pieces."""
        chunks, seconds = default_chunks(self.codec.frame_rate), self.config.chunk
        if seconds is None:
            return chunks
        frames = self.frames("chunk", seconds)
        if frames <= chunks.lookahead:
            raise UserError(
                f"--chunk is {seconds} s, expected more than its lookahead of {LOOKAHEAD_SECONDS} s"
            )
        return dataclasses.replace(chunks, frames=frames)

    def window(self, frames: int) -> int | None:
        """Frames that the model works on at once, None: all; a hint where these are more than it was trained on.

        Args:
            frames: prompt and what is added.
        """
        trained = self.training_data.get("filter_max_duration")
        if self.config.long:
            seconds = trained if self.config.window is None else self.config.window
            if seconds is None:
                raise UserError(
                    f"'{self.checkpoint}' does not say how long its training data was; give --window"
                )
            return self.frames("window", seconds)
        if trained is not None and frames > trained * self.codec.frame_rate:
            advice = "lower --max-prompt-duration" if self.config.infill else "--long true suits that better"
            print(
                f"hint: the model works on {self.seconds(frames):.1f} s at once, but was trained on up to "
                f"{trained:.1f} s; {advice}",
                file=sys.stderr,
            )
        return None

    def frames(self, name: str, seconds: float) -> int:
        """A flag's seconds as frames.

        Raises:
            UserError: negative, not a number, or less than a frame without being 0.
        """
        if not 0 <= seconds < math.inf:
            raise UserError(f"{_flag(name)} is {seconds} s, expected 0 or more")
        frames = round(seconds * self.codec.frame_rate)
        if frames == 0 and seconds > 0:
            raise UserError(f"{_flag(name)} is {seconds} s, expected at least a frame of {self.seconds(1)} s")
        return frames

    def output(self, clip: Path, part: str, number: int = 1) -> Path:
        """<clip>_<part>.wav, <clip>_<part>_2.wav, …"""
        suffix = "" if number == 1 else f"_{number}"
        return Path(self.config.output_dir) / f"{clip.stem}_{part}{suffix}.wav"

    def seconds(self, frames: int) -> float:
        """How long so many frames are."""
        return frames / self.codec.frame_rate

    def say(self, line: str) -> None:
        """To stdout, unless that carries sound."""
        print(line, file=sys.stderr if self.config.stream == "-" else sys.stdout, flush=True)

    def summarize(self, generation: Generation, elapsed: float) -> None:
        """The last line: how fast it was, and where the time went.

        Args:
            generation: its result.
            elapsed: seconds of everything from the first code to the last sample.
        """
        frames = sum(map(len, generation.codes)) - sum(generation.prompt_lens)
        spent = generation.timings | {"codec": elapsed - sum(generation.timings.values())}
        names = {"ar": "AR", "nar": "NAR"}
        parts = ", ".join(f"{names.get(part, part)} {seconds:.2f} s" for part, seconds in spent.items())
        self.say(
            f"checkpoint {self.checkpoint}, {frames / elapsed:.0f} frames/s, "
            f"{self.seconds(frames) / elapsed:.1f} x real time: {parts}"
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# ---------------------------------------------------------------------------------------------- what comes in


def read_clip(path: Path, codec: Codec, num_quantizers: int, max_seconds: float | None = None) -> Tensor:
    """A recording or .npy file as codes.

    Returns:
        (S, Q) int64: all of it, or the last `max_seconds`.

    Raises:
        UserError: not readable, shorter than MIN_PROMPT, or codes that do not fit the codec.
    """
    if path.suffix.lower() == ".npy":
        codes = _read_codes(path, codec, num_quantizers)
        seconds = len(codes) / codec.frame_rate
    else:
        wav, sample_rate = load_audio(path)
        seconds = wav.shape[1] / sample_rate
        if seconds >= MIN_PROMPT:
            if max_seconds is not None:
                wav = wav[:, -round(max_seconds * sample_rate) :]
            converted = torch.from_numpy(convert_audio(wav, sample_rate, codec.sample_rate, codec.channels))
            codes = codec.encode(converted[None].to(codec.device))[0, :, :num_quantizers].cpu()
    if seconds < MIN_PROMPT:
        raise UserError(
            f"prompt '{path}' lasts {seconds:.2f} s, expected at least {MIN_PROMPT} s (3 to 5 s work best)"
        )
    return codes if max_seconds is None else codes[-round(max_seconds * codec.frame_rate) :]


def _read_codes(path: Path, codec: Codec, num_quantizers: int) -> Tensor:
    try:
        codes = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"prompt '{path}' is not a NumPy array: {error}") from error
    if codes.ndim != 2 or codes.shape[1] != num_quantizers or not np.issubdtype(codes.dtype, np.integer):
        raise UserError(
            f"prompt '{path}': {codes.dtype} array {codes.shape}, "
            f"expected integers (frames, {num_quantizers} quantizers)"
        )
    if codes.size and (codes.min() < 0 or codes.max() >= codec.codebook_size):
        raise UserError(
            f"prompt '{path}': codes from {codes.min()} to {codes.max()}, expected 0 to {codec.codebook_size - 1}"
        )
    return torch.from_numpy(codes.astype(np.int64))


def check_flags(config: InferConfig, draw: DrawConfig) -> list[Path]:
    """The clips, once it is clear that the flags go together.

    Raises:
        UserError: flags that contradict each other, no clip, or one that does not exist.
    """
    used = {
        field.name for part in (config, draw) for field in dataclasses.fields(part)
        if getattr(part, field.name) != field.default
    }  # fmt: skip
    for name in [name for name in EXCLUDES if name in used]:
        for other in [other for other in EXCLUDES[name] if other in used]:
            raise UserError(f"{_flag(name)} and {_flag(other)} do not go together; give one of them")
    for name, others in NEEDS.items():
        if name in used and used.isdisjoint(others):
            raise UserError(f"{_flag(name)} needs {' or '.join(map(_flag, others))} beside it")
    if not MIN_PROMPT <= config.max_prompt_duration < math.inf:
        raise UserError(
            f"--max-prompt-duration is {config.max_prompt_duration} s, expected at least {MIN_PROMPT} s"
        )
    given = [part.strip() for part in config.prompt.split(",")] if config.prompt else []
    clips = [Path(part) for part in [*config.clips, *given]]
    if not clips:
        raise UserError("--prompt clip.wav is required: the recording to continue")
    for path in clips:
        if not path.exists():
            raise UserError(f"prompt '{path}' does not exist")
    for name in ("stream", "infill"):
        if name in used and len(clips) > 1:
            raise UserError(f"{_flag(name)} takes one clip, but {len(clips)} are given")
    stems = [path.stem for path in clips]
    for stem in stems:
        if stems.count(stem) > 1:
            raise UserError(
                f"{stems.count(stem)} clips are called '{stem}': each would write {stem}_full.wav"
            )
    return clips


def check_training(setup: Setup) -> None:
    """Raises a UserError where the model was not trained for what is asked of it."""
    for name, wanted, needed in (
        ("infill", setup.config.infill is not None, "infill_prob"),
        ("guidance_scale", setup.draw.guidance_scale != 1, "drop_prompt_prob"),
    ):
        if wanted and not setup.training_data.get(needed):
            raise UserError(
                f"{_flag(name)}: '{setup.checkpoint}' was not trained for that; "
                f"use a model that was trained with {_flag(needed)}"
            )


# ---------------------------------------------------------------------------------------------- what comes out


def decode(codec: Codec, codes: Tensor) -> Iterator[np.ndarray]:
    """Codes (T, Q) as (C, n) samples: at once, or, if they are long, piece by piece with the same result."""
    if len(codes) <= WHOLE_SECONDS * codec.frame_rate:
        yield codec.decode(codes[None].to(codec.device))[0].cpu().numpy()
        return
    decoder = StreamDecoder(codec, lookahead=codec.context_frames)
    for piece in codes.split(round(PIECE_SECONDS * codec.frame_rate)):
        yield decoder.push(piece).cpu().numpy()
    yield decoder.flush().cpu().numpy()


def write(codec: Codec, codes: Tensor, files: dict[Path, int]) -> None:
    """Decode codes (T, Q) once, into several files: each with the frame that it begins at."""
    with contextlib.ExitStack() as stack:
        sinks = [
            (
                stack.enter_context(AudioSink(path, codec.sample_rate, codec.channels)),
                frame * codec.hop_length,
            )
            for path, frame in files.items()
        ]
        done = 0  # samples
        for wav in decode(codec, codes):
            for sink, first in sinks:
                sink.write(wav[:, max(0, first - done) :])
            done += wav.shape[1]


# ---------------------------------------------------------------------------------------------- the three modes


def continue_clips(setup: Setup) -> list[Path]:
    """<clip>_full.wav and <clip>_continuation.wav of every clip, and the continuations of its other samples."""
    config, draw, codec = setup.config, setup.draw, setup.codec
    frames, least = setup.new_frames
    codes = [
        read_clip(path, codec, setup.model.num_quantizers, config.max_prompt_duration) for path in setup.clips
    ]
    lens = torch.tensor([len(row) for row in codes])
    window = setup.window(int(lens.max()) + frames)
    started = time.perf_counter()
    with progress(total=frames, desc="generating", unit="frame") as bar:
        result = setup.model.generate(
            torch.nn.utils.rnn.pad_sequence(codes, batch_first=True), lens, frames,
            seed=draw.seed, min_new_tokens=least, dtype=config.dtype, sampling=setup.sampling,
            guidance_scale=draw.guidance_scale, num_samples=draw.num_samples, window=window,
            chunks=None if config.chunk is None else setup.chunks,
            on_frame=lambda done: bar.update(done - bar.n),
        )  # fmt: skip
    written: list[Path] = []
    empty = []
    for row, (new, score) in enumerate(zip(result.codes, result.scores, strict=True)):
        clip, number = setup.clips[row // draw.num_samples], row % draw.num_samples + 1
        prompt, full = result.prompt_lens[row], setup.output(clip, "full")
        files = {full: 0} if number == 1 else {}
        if len(new) == prompt:
            empty.append(f"'{clip}'" if number == 1 else f"'{clip}' (sample {number})")
        else:
            continuation = setup.output(clip, "continuation", number)
            files[continuation] = prompt
            setup.say(
                f"{continuation}  {setup.seconds(len(new) - prompt):.1f} s added to {setup.seconds(prompt):.1f} s "
                f"(ended by {result.finish_reasons[row]}){_score(setup, score)}"
            )
        if files:
            write(codec, new, files)
        if full in files:
            setup.say(str(full))
        written += files
    setup.summarize(result, time.perf_counter() - started)
    if empty:
        raise UserError(
            f"the model ended {', '.join(empty)} at once; try another --seed, or --stop-at-eos false"
        )
    return written


def fill_gap(setup: Setup) -> list[Path]:
    """<clip>_infilled.wav: the clip as the codec gives it back, with the gap made anew."""
    config, draw, codec, clip = setup.config, setup.draw, setup.codec, setup.clips[0]
    codes = read_clip(clip, codec, setup.model.num_quantizers)
    start, end = gap_frames(setup, clip, len(codes))
    context = setup.frames("max_prompt_duration", config.max_prompt_duration)
    first, last = max(0, start - context), min(len(codes), end + context)
    setup.window(last - first)
    started = time.perf_counter()
    with progress(total=end - start, desc="generating", unit="frame") as bar:
        result = setup.model.infill(
            codes[first:last], start - first, end - first, seed=draw.seed, dtype=config.dtype,
            sampling=setup.sampling, num_samples=draw.num_samples,
            on_frame=lambda done: bar.update(done - bar.n),
        )  # fmt: skip
    written = []
    for number, (row, score) in enumerate(zip(result.codes, result.scores, strict=True), 1):
        path = setup.output(clip, "infilled", number)
        write(codec, torch.cat([codes[:first], row.cpu(), codes[last:]]), {path: 0})
        setup.say(
            f"{path}  {setup.seconds(start):.2f} to {setup.seconds(end):.2f} s of {setup.seconds(len(codes)):.2f} s "
            f"made anew{_score(setup, score)}"
        )
        written.append(path)
    setup.summarize(result, time.perf_counter() - started)
    return written


def gap_frames(setup: Setup, clip: Path, frames: int) -> tuple[int, int]:
    """The first frame of the gap, and the first behind it.

    Raises:
        UserError: not inside the clip of so many frames, shorter than one, or without a neighbour on either side.
    """
    assert setup.config.infill is not None
    start, end = setup.config.infill
    asked, frame, length = f"--infill {start:g} {end:g}", setup.seconds(1), setup.seconds(frames)
    if not 0 <= start < end <= length:
        raise UserError(f"{asked}: not a part of '{clip}', expected 0 < START < END < {length:.2f} s")
    first, last = round(start / frame), round(end / frame)
    if first == last:
        raise UserError(f"{asked}: less than a frame of {frame} s; make the gap longer")
    if first < 1 or last > frames - 1:
        side = "before" if first < 1 else "behind"
        raise UserError(
            f"{asked}: '{clip}' has nothing {side} the gap, but the model fills it from both sides; "
            f"expected 0 < START < END < {length:.2f} s, {frame} s or more from either end"
        )
    return first, last


def stream(setup: Setup) -> list[Path]:
    """The continuation, written while it is being made."""
    config, codec, target = setup.config, setup.codec, str(setup.config.stream)
    frames, least = setup.new_frames
    codes = read_clip(setup.clips[0], codec, setup.model.num_quantizers, config.max_prompt_duration)
    if target == "-":
        announce_pcm(setup)
    elif Path(target).exists() and os.path.samefile(target, setup.clips[0]):
        raise UserError(f"--stream {target} would overwrite the clip that is continued; give another file")
    window = setup.window(len(codes) + frames)
    started = time.perf_counter()
    blocked = 0.0  # seconds, by who listens
    first_audio: float | None = None
    samples = 0
    with progress(total=frames, desc="streaming", unit="frame") as bar:
        pieces = setup.model.stream(
            codes, codec, frames, seed=setup.draw.seed, min_new_tokens=least, dtype=config.dtype,
            sampling=setup.sampling, guidance_scale=setup.draw.guidance_scale, window=window, chunks=setup.chunks,
            on_frame=lambda done: bar.update(done - bar.n),
        )  # fmt: skip
        opened = time.perf_counter()
        with AudioSink(target, codec.sample_rate, codec.channels) as sink:
            try:
                for wav in pieces:
                    arrived = time.perf_counter()
                    if first_audio is None:
                        first_audio = arrived - opened
                    if not sink.write(wav.cpu().numpy()):
                        break
                    blocked += time.perf_counter() - arrived
                    samples += wav.shape[1]
            except KeyboardInterrupt:
                if target != "-":
                    setup.say(f"{target}  holds the first {samples / codec.sample_rate:.1f} s")
                raise
    elapsed = time.perf_counter() - started - blocked
    result = pieces.generation
    if first_audio is None:
        raise UserError(
            f"the model ended '{setup.clips[0]}' at once; try another --seed, or --stop-at-eos false"
        )
    ended = "by the listener" if result is None else f"by {result.finish_reasons[0]}"
    setup.say(
        f"{target}  {samples / codec.sample_rate:.1f} s added to {setup.seconds(len(codes)):.1f} s (ended {ended}), "
        f"first audio after {first_audio:.2f} s"
    )
    if result is not None:
        setup.summarize(result, elapsed)
    return [] if target == "-" else [Path(target)]


def announce_pcm(setup: Setup) -> None:
    """Say what is going to be on stdout, and how to hear it.

    Raises:
        UserError: stdout is a terminal.
    """
    codec = setup.codec
    layout = {1: "mono", 2: "stereo"}.get(codec.channels, f"{codec.channels}c")
    players = (
        f"aplay -f S16_LE -r {codec.sample_rate} -c {codec.channels}",
        f"ffplay -f s16le -ar {codec.sample_rate} -ch_layout {layout} -",
    )
    if sys.stdout.isatty():
        raise UserError(f"--stream - writes raw samples to stdout; pipe them: | {players[0]}")
    setup.say(
        f"raw PCM on stdout: s16le, {codec.sample_rate} Hz, {codec.channels} channel(s); to hear it: "
        f"| {players[0]}, or | {players[1]}"
    )


def _score(setup: Setup, score: float) -> str:
    """Of one among several samples: what they are ordered by."""
    return f", score {score:.3f} nats/frame" if setup.draw.num_samples > 1 else ""


def infer(config: InferConfig, draw: DrawConfig, recipe: Path | None = None) -> list[Path]:
    """Continue, stream or fill; returns the files written."""
    clips = check_flags(config, draw)
    device = pick_device(config.device)
    checkpoint = Path(config.checkpoint) if config.checkpoint else find_checkpoint(recipe)
    model, contents = load_model(checkpoint, device)
    codec = matching_codec(contents["codec"], device, model.num_quantizers)
    setup = Setup(config, draw, clips, checkpoint, model, codec, contents["config"].get("data", {}))
    check_training(setup)
    if config.infill is not None:
        return fill_gap(setup)
    return continue_clips(setup) if config.stream is None else stream(setup)


def main(argv: Sequence[str] | None = None, defaults: Path | None = None, recipe: Path | None = None) -> None:
    """Entry point; without --checkpoint, looks in the recipe's exp/, else in ./exp and ./egs/*/exp."""
    config, draw = parse(__doc__ or "", [InferConfig, DrawConfig], argv, defaults)
    infer(config, draw, recipe)


if __name__ == "__main__":
    run(main)
