"""What the modes of `infer.py` share: settings, clips to read, sound to write.

`Setup` holds what all of them work with; `read_clip` turns a prompt into codes, `write` codes into files, and `play`
gives out a stream while it is made.
"""

import contextlib
import dataclasses
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from valle.codecs import Codec
from valle.codecs.streaming import StreamDecoder
from valle.config import option
from valle.generation.chunks import CHUNK_SECONDS, LOOKAHEAD_SECONDS, Chunks, default_chunks
from valle.generation.sampling import Sampling
from valle.models import Generation
from valle.modules.packing import FORMATS
from valle.utils.audio import AudioSink, convert_audio, load_audio
from valle.utils.errors import UserError

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
    duration: float | None = option(
        None, "seconds to add, instead of --max-new-tokens; of --infill, those that take the gap's place"
    )
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
            raise UserError(f"{flag(name)} is {seconds} s, expected 0 or more")
        frames = round(seconds * self.codec.frame_rate)
        if frames == 0 and seconds > 0:
            raise UserError(f"{flag(name)} is {seconds} s, expected at least a frame of {self.seconds(1)} s")
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


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# ---------------------------------------------------------------------------------------------- what comes in


def read_clip(path: Path, codec: Codec, num_quantizers: int, max_seconds: float | None = None) -> Tensor:
    """A recording or .npy file as codes.

    Returns:
        (S, Q) int64: all of it, or the last `max_seconds`.

    Raises:
        UserError: not readable, shorter than MIN_PROMPT, or codes that do not fit the codec.
    """
    return read_prompt(path, codec, num_quantizers, max_seconds)[0]


def read_prompt(
    path: Path, codec: Codec, num_quantizers: int, max_seconds: float | None = None
) -> tuple[Tensor, float]:
    """As `read_clip`, and the second of the recording at which the codes begin."""
    longest = math.inf if max_seconds is None else max_seconds
    begin = 0.0
    if path.suffix.lower() == ".npy":
        codes = _read_codes(path, codec, num_quantizers)
        seconds = len(codes) / codec.frame_rate
    else:
        wav, sample_rate = load_audio(path)
        seconds = wav.shape[1] / sample_rate
        if seconds >= MIN_PROMPT:
            if seconds > longest:
                begin = seconds - round(longest * sample_rate) / sample_rate
                wav = wav[:, -round(longest * sample_rate) :]
            converted = torch.from_numpy(convert_audio(wav, sample_rate, codec.sample_rate, codec.channels))
            codes = codec.encode(converted[None].to(codec.device))[0, :, :num_quantizers].cpu()
    if seconds < MIN_PROMPT:
        raise UserError(
            f"prompt '{path}' lasts {seconds:.2f} s, expected at least {MIN_PROMPT} s (3 to 5 s work best)"
        )
    over = 0 if max_seconds is None else max(0, len(codes) - round(longest * codec.frame_rate))
    return codes[over:], begin + over / codec.frame_rate


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


@dataclass(frozen=True)
class Played:
    """A stream that has been given out.

    Attributes:
        samples: of each channel.
        first_audio: seconds that its listener waited; None: there was no sound.
        elapsed: seconds that making it took, without those that its listener let it wait.
        stopped: the listener went.
    """

    samples: int
    first_audio: float | None
    elapsed: float
    stopped: bool


def play(setup: "Setup", pieces: Iterable[Tensor], started: float) -> Played:
    """Write (C, n) pieces to --stream as they come.

    Args:
        setup: where to.
        pieces: are made as they are asked for.
        started: `time.perf_counter()` when the work began.
    """
    target, codec = str(setup.config.stream), setup.codec
    opened, blocked, samples, stopped = time.perf_counter(), 0.0, 0, False
    first_audio: float | None = None
    with AudioSink(target, codec.sample_rate, codec.channels) as sink:
        try:
            for wav in pieces:
                arrived = time.perf_counter()
                if first_audio is None:
                    first_audio = arrived - opened
                if not sink.write(wav.cpu().numpy()):
                    stopped = True
                    break
                blocked += time.perf_counter() - arrived
                samples += wav.shape[1]
        except KeyboardInterrupt:
            if target != "-":
                setup.say(f"{target}  holds the first {samples / codec.sample_rate:.1f} s")
            raise
    return Played(samples, first_audio, time.perf_counter() - started - blocked, stopped)


def check_target(setup: "Setup", clips: Iterable[Path]) -> None:
    """Before a stream: say what will be on stdout, or that the file is one of the clips it is made from.

    Raises:
        UserError: it is, or stdout is a terminal.
    """
    target = str(setup.config.stream)
    if target == "-":
        announce_pcm(setup)
        return
    for clip in clips:
        if Path(target).exists() and os.path.samefile(target, clip):
            raise UserError(
                f"--stream {target} would overwrite the clip that is continued; give another file"
            )


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
