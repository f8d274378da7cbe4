"""Stage 1: LibriTTS -> lhotse manifests in the corpus' own splits. Everything shared is in valle/data/speech.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lhotse.recipes.libritts import prepare_libritts
from parts import DEFAULT_PARTS, PARTS, parse_parts

from valle.config import option, parse
from valle.data.speech import Utterance, read_with_lhotse, write_speech_manifests
from valle.utils.command import run
from valle.utils.errors import UserError
from valle.utils.log import setup_logger
from valle.utils.progress import progress


@dataclass
class ManifestConfig:
    """Stage 1 of egs/libritts"""

    data_dir: str = option("data", "folder of the recipe's output")
    parts: str = option(DEFAULT_PARTS, "parts, with commas, or all")
    min_duration: float = option(5.0, "shortest cut for AudioLM, in seconds")
    max_duration: float = option(15.0, "longest cut for AudioLM, in seconds")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    (config,) = parse("Manifests of LibriTTS.", [ManifestConfig], argv)
    setup_logger()
    data_dir = Path(config.data_dir)
    corpus = data_dir / "download" / "LibriTTS"
    utterances = [item for part in parse_parts(config.parts) for item in read_part(corpus, part)]
    write_speech_manifests(data_dir, "libritts", utterances, config.min_duration, config.max_duration)


def read_part(corpus: Path, part: str) -> list[Utterance]:
    """All utterances of one part."""
    folder = corpus / part
    if not folder.is_dir():
        raise UserError(f"'{folder}' does not exist; run prepare.sh --stage 0 --parts {part}")
    speakers = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name.isdigit())
    utterances = []
    for speaker in progress(speakers, desc=f"read {part}", unit="speaker"):
        for recording, supervision in read_with_lhotse(lambda name=speaker: read(corpus, part, name), folder):
            reader, chapter, *_ = recording.id.split("_")
            utterances.append(
                Utterance(
                    recording=recording,
                    text=supervision.text or "",
                    speaker=f"libritts-{reader}",
                    language="en",
                    split=PARTS[part],
                    passage=f"{reader}_{chapter}",
                )
            )
    return utterances


def read(corpus: Path, part: str, speaker: str) -> dict[str, Any]:
    """lhotse's manifests of one speaker: for a whole part its time grows with the square of the utterances."""
    name = f"{part}/{speaker}"
    return prepare_libritts(corpus, dataset_parts=[name])[name]


if __name__ == "__main__":
    run(main)
