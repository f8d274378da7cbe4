"""Continue a recording: `infer.py clip.wav` writes <clip>_full.wav and <clip>_continuation.wav.

Or hear it while it is being made, `infer.py --stream out.wav clip.wav` (- for raw PCM on stdout); or make a part of it
anew, from second 1.5 to 2.5: `infer.py --infill 1.5 2.5 clip.wav` writes <clip>_infilled.wav; `--duration 1.2` beside
it makes the part longer or shorter. A clip may have any sample rate and channel count, or be codec tokens (.npy, frames
x quantizers). Architecture and codec come from the checkpoint.

A VALL-E says a text in the voice of a clip: `infer.py --text "Good morning." --prompt clip.wav --prompt-text "What the
clip says."`, or plays a piece with its piano and room: `infer.py --midi piece.mid --prompt clip.wav --prompt-midi
clip.mid`; `--list FILE` does many. A word of a clip is said anew, or another in its place, with `--infill 1.5 2.5
clip.wav --text "What all of it is to say."`, a bar played anew with `--midi` of the whole.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from valle.bin.inference import (
    MIN_PROMPT,
    DrawConfig,
    InferConfig,
    Setup,
    check_target,
    flag,
    play,
    read_clip,
    write,
)
from valle.bin.reading import ReadConfig, Reader, make_reader, read_aloud
from valle.codecs import matching_codec
from valle.config import parse
from valle.engine.devices import pick_device
from valle.models import VALLE, AudioLM, CodecLM, load_model
from valle.models.builder import find_checkpoint
from valle.utils.command import run
from valle.utils.errors import UserError
from valle.utils.progress import progress

# Of a recording alone: reading has no window, and nothing that goes without a prompt.
_CONTINUING = ("long", "window", "guidance_scale")
# A flag, and those that say something else or nothing beside it.
EXCLUDES = {
    "max_new_tokens": ("duration",),
    "stop_at_eos": ("min_new_tokens",),
    "stream": ("num_samples", "stop_repetition", "list"),
    "infill": (
        "stream", "chunk", "long", "window", "max_new_tokens", "stop_at_eos", "min_new_tokens", "stop_repetition",
        "guidance_scale", "list", "prompt_text", "prompt_midi", "output_name", "rank",
    ),
    "text": ("midi", "list", "prompt_midi", "batch_size", *_CONTINUING),
    "midi": (
        "list", "prompt_text", "language", "batch_size", "max_new_tokens", "duration", "min_new_tokens", *_CONTINUING,
    ),
    "list": ("output_name", *_CONTINUING),
}  # fmt: skip
# A flag, and those of which one must stand beside it.
NEEDS = (
    ("infill", ("prompt",)),
    ("window", ("long",)),
    ("repetition_window", ("repetition_penalty",)),
    ("stop_repetition", ("stop_at_eos", "min_new_tokens", "text", "midi", "list")),
    ("prompt_text", ("prompt",)),
    ("prompt_text", ("text", "list")),
    ("prompt_midi", ("prompt",)),
    ("prompt_midi", ("midi", "list")),
    ("language", ("text", "list")),
    ("output_name", ("text", "midi")),
    ("rank", ("num_samples",)),
    ("rank", ("text", "midi", "list")),
    ("batch_size", ("list",)),
)


def check_flags(config: InferConfig, draw: DrawConfig, read: ReadConfig) -> list[Path]:
    """The clips, once it is clear that the flags go together.

    Raises:
        UserError: flags that contradict each other, no clip, or one that does not exist.
    """
    used = {
        field.name for part in (config, draw, read) for field in dataclasses.fields(part)
        if getattr(part, field.name) != field.default
    }  # fmt: skip
    used |= {"prompt"} if config.clips else set()
    for name in [name for name in EXCLUDES if name in used]:
        for other in [other for other in EXCLUDES[name] if other in used]:
            raise UserError(f"{flag(name)} and {flag(other)} do not go together; give one of them")
    for name, others in NEEDS:
        if name in used and used.isdisjoint(others):
            raise UserError(f"{flag(name)} needs {' or '.join(map(flag, others))} beside it")
    if not MIN_PROMPT <= config.max_prompt_duration < math.inf:
        raise UserError(
            f"--max-prompt-duration is {config.max_prompt_duration} s, expected at least {MIN_PROMPT} s"
        )
    given = [part.strip() for part in config.prompt.split(",")] if config.prompt else []
    clips = [Path(part) for part in [*config.clips, *given]]
    if not clips and read.asked is None:
        raise UserError("--prompt clip.wav is required: the recording to continue")
    for path in clips:
        if not path.exists():
            raise UserError(f"prompt '{path}' does not exist")
    for name in ("stream", "infill", "text", "midi", "list"):
        if name in used and len(clips) > 1:
            raise UserError(f"{flag(name)} takes one clip, but {len(clips)} are given")
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
                f"{flag(name)}: '{setup.checkpoint}' was not trained for that; "
                f"use a model that was trained with {flag(needed)}"
            )


# ---------------------------------------------------------------------------------------------- the three modes


def continue_clips(setup: Setup, model: AudioLM) -> list[Path]:
    """<clip>_full.wav and <clip>_continuation.wav of every clip, and the continuations of its other samples."""
    config, draw, codec = setup.config, setup.draw, setup.codec
    frames, least = setup.new_frames
    codes = [read_clip(path, codec, model.num_quantizers, config.max_prompt_duration) for path in setup.clips]
    lens = torch.tensor([len(row) for row in codes])
    window = setup.window(int(lens.max()) + frames)
    started = time.perf_counter()
    with progress(total=frames, desc="generating", unit="frame") as bar:
        result = model.generate(
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


def fill_gap(setup: Setup, model: AudioLM | VALLE, reader: Reader | None, read: ReadConfig) -> list[Path]:
    """<clip>_infilled.wav: the clip as the codec gives it back, with the gap made anew; `reader` of a VALL-E."""
    config, draw, codec, clip = setup.config, setup.draw, setup.codec, setup.clips[0]
    codes = read_clip(clip, codec, model.num_quantizers)
    start, end = gap_frames(setup, clip, len(codes))
    context = setup.frames("max_prompt_duration", config.max_prompt_duration)
    first, last = max(0, start - context), min(len(codes), end + context)
    frames = end - start if config.duration is None else setup.new_frames[0]
    if isinstance(model, AudioLM):
        fill = model.infill
    else:
        assert reader is not None
        fill = functools.partial(model.infill, reader.tokens(read, len(codes), first, last))
    setup.window(last - first - (end - start) + frames)
    started = time.perf_counter()
    with progress(total=frames, desc="generating", unit="frame") as bar:
        result = fill(
            codes[first:last], start - first, end - first, seed=draw.seed, dtype=config.dtype,
            sampling=setup.sampling, num_samples=draw.num_samples, new_frames=frames,
            on_frame=lambda done: bar.update(done - bar.n),
        )  # fmt: skip
    written = []
    for number, (row, score) in enumerate(zip(result.codes, result.scores, strict=True), 1):
        path = setup.output(clip, "infilled", number)
        write(codec, torch.cat([codes[:first], row.cpu(), codes[last:]]), {path: 0})
        setup.say(
            f"{path}  {setup.seconds(start):.2f} to {setup.seconds(end):.2f} s of {setup.seconds(len(codes)):.2f} s "
            f"made anew"
            f"{'' if frames == end - start else f' in {setup.seconds(frames):.2f} s'}{_score(setup, score)}"
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


def stream(setup: Setup, model: AudioLM) -> list[Path]:
    """The continuation, written while it is being made."""
    config, codec, target = setup.config, setup.codec, str(setup.config.stream)
    frames, least = setup.new_frames
    codes = read_clip(setup.clips[0], codec, model.num_quantizers, config.max_prompt_duration)
    check_target(setup, setup.clips)
    window = setup.window(len(codes) + frames)
    started = time.perf_counter()
    with progress(total=frames, desc="streaming", unit="frame") as bar:
        pieces = model.stream(
            codes, codec, frames, seed=setup.draw.seed, min_new_tokens=least, dtype=config.dtype,
            sampling=setup.sampling, guidance_scale=setup.draw.guidance_scale, window=window, chunks=setup.chunks,
            on_frame=lambda done: bar.update(done - bar.n),
        )  # fmt: skip
        played = play(setup, pieces, started)
    result = pieces.generation
    if played.first_audio is None:
        raise UserError(
            f"the model ended '{setup.clips[0]}' at once; try another --seed, or --stop-at-eos false"
        )
    ended = "by the listener" if result is None else f"by {result.finish_reasons[0]}"
    setup.say(
        f"{target}  {played.samples / codec.sample_rate:.1f} s added to {setup.seconds(len(codes)):.1f} s "
        f"(ended {ended}), first audio after {played.first_audio:.2f} s"
    )
    if result is not None:
        setup.summarize(result, played.elapsed)
    return [] if target == "-" else [Path(target)]


def _score(setup: Setup, score: float) -> str:
    """Of one among several samples: what they are ordered by."""
    return f", score {score:.3f} nats/frame" if setup.draw.num_samples > 1 else ""


def infer(
    config: InferConfig, draw: DrawConfig, read: ReadConfig | None = None, recipe: Path | None = None
) -> list[Path]:
    """Continue, stream, fill or read; returns the files written."""
    read = read or ReadConfig()
    clips = check_flags(config, draw, read)
    device = pick_device(config.device)
    checkpoint = Path(config.checkpoint) if config.checkpoint else find_checkpoint(recipe)
    model, contents = load_model(checkpoint, device)
    check_kind(model, checkpoint, read)
    codec = matching_codec(contents["codec"], device, model.num_quantizers)
    setup = Setup(config, draw, clips, checkpoint, codec, contents["config"].get("data", {}))
    check_training(setup)
    if isinstance(model, VALLE):
        reader = make_reader(setup, read, model, contents["text"])
        if config.infill is not None:
            return fill_gap(setup, model, reader, read)
        return read_aloud(setup, read, reader)
    assert isinstance(model, AudioLM)
    if config.infill is not None:
        return fill_gap(setup, model, None, read)
    return continue_clips(setup, model) if config.stream is None else stream(setup, model)


def check_kind(model: CodecLM, checkpoint: Path, read: ReadConfig) -> None:
    """Raises a UserError where a model is asked for what its kind does not do."""
    if isinstance(model, VALLE):
        wanted, what = ("midi", "notes") if model.reads_notes else ("text", "text")
        if read.list is None and getattr(read, wanted) is None:
            raise UserError(
                f"'{checkpoint}' is a {type(model).__name__} that reads {what}; give --{wanted}, or --list"
            )
    elif read.asked is not None:
        raise UserError(
            f"'{checkpoint}' is an {type(model).__name__}, which continues recordings and reads nothing; leave out "
            f"{flag(read.asked)}, or give --checkpoint of a VALL-E"
        )


def main(argv: Sequence[str] | None = None, defaults: Path | None = None, recipe: Path | None = None) -> None:
    """Entry point; without --checkpoint, looks in the recipe's exp/, else in ./exp and ./egs/*/exp."""
    config, draw, read = parse(__doc__ or "", [InferConfig, DrawConfig, ReadConfig], argv, defaults)
    infer(config, draw, read, recipe)


if __name__ == "__main__":
    run(main)
