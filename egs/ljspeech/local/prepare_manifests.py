"""Stage 1: LJSpeech -> lhotse manifests, split by chapter. Everything shared is in valle/data/speech.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lhotse.recipes.ljspeech import prepare_ljspeech

from valle.config import option, parse
from valle.data.speech import Utterance, read_with_lhotse, write_speech_manifests
from valle.utils.command import run
from valle.utils.errors import UserError
from valle.utils.log import setup_logger

SPEAKER = "linda-johnson"
# The last two of the 50 chapters, about 50 minutes in all. Clips of a chapter follow each other in one recording
# session, so that whole chapters are held out, not sentences.
HELD_OUT = {"LJ049": "validation", "LJ050": "test"}


@dataclass
class ManifestConfig:
    """Stage 1 of egs/ljspeech"""

    data_dir: str = option("data", "folder of the recipe's output")
    min_duration: float = option(5.0, "shortest cut for AudioLM, in seconds")
    max_duration: float = option(15.0, "longest cut for AudioLM, in seconds")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    (config,) = parse("Manifests of LJSpeech.", [ManifestConfig], argv)
    setup_logger()
    data_dir = Path(config.data_dir)
    corpus = data_dir / "download" / "LJSpeech-1.1"
    if not corpus.is_dir():
        raise UserError(f"'{corpus}' does not exist; run prepare.sh --stage 0")
    utterances = [
        Utterance(
            recording=recording,
            text=(supervision.custom or {})["normalized_text"],
            speaker=SPEAKER,
            language="en",
            split=HELD_OUT.get(chapter_of(recording.id), "train"),
            passage=chapter_of(recording.id),
        )
        for recording, supervision in read_with_lhotse(partial(prepare_ljspeech, corpus), corpus)
    ]
    write_speech_manifests(data_dir, "ljspeech", utterances, config.min_duration, config.max_duration)


def chapter_of(clip_id: str) -> str:
    """LJ001-0002 -> LJ001"""
    return clip_id.split("-")[0]


if __name__ == "__main__":
    run(main)
