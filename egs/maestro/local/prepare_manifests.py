"""Stage 1: MAESTRO's recordings and MIDI -> FLAC at the codec's rate, manifests with the corpus's splits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from find_corpus import read_corpus

from egs.shared.piano import Piece, assign_piece_splits, audio_format, limit_pieces, piece_id, prepare
from valle.config import option, parse
from valle.data.manifests import normalize_text
from valle.utils.command import run
from valle.utils.errors import UserError
from valle.utils.log import setup_logger


@dataclass
class ManifestConfig:
    """Stage 1 of egs/maestro"""

    corpus_dir: str = option("maestro-v3.0.0", "the unpacked corpus")
    data_dir: str = option("data", "folder of the recipe's output")
    split_by: str = option(
        "metadata", "the corpus's splits, or composition: drawn anew", ["metadata", "composition"]
    )
    check_clock: bool = option(True, "leave out recordings whose onsets do not fit their MIDI's")
    limit: int = option(0, "so many pieces, for a quick look; 0: all")
    codec: str = option("encodec_32khz", "codec, for its sample rate and channels")
    train_codec: bool = option(False, "the codec is the recipe's own, which is trained later")
    min_duration: float = option(5.0, "shortest cut, in seconds")
    max_duration: float = option(15.0, "longest cut, in seconds")
    jobs: int = option(2, "pieces that are converted at the same time")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    (config,) = parse("Manifests of MAESTRO.", [ManifestConfig], argv)
    setup_logger()
    target = audio_format(
        *(config.codec, config.train_codec, config.min_duration, config.max_duration, config.check_clock)
    )
    folder, rows = read_corpus(Path(config.corpus_dir))
    skipped: list[dict[str, str]] = []
    pieces = list(list_pieces(folder, rows, skipped))
    if not pieces:
        raise UserError(f"'{folder}' holds no recording with its MIDI; the first: {skipped[0]['reason']}")
    known = {piece.id for piece in pieces}
    pieces = limit_pieces(assign_piece_splits(pieces, config.split_by), config.limit)
    prepare(pieces, "maestro", Path(config.data_dir), target, None, config.jobs, skipped, known)


def list_pieces(
    folder: Path, rows: Sequence[dict[str, str]], skipped: list[dict[str, str]]
) -> Iterator[Piece]:
    """The performances whose files are there; the others go to `skipped`."""
    for row in rows:
        name = str(Path(row["audio_filename"]).with_suffix(""))
        missing = [
            row[key] for key in ("audio_filename", "midi_filename") if not (folder / row[key]).is_file()
        ]
        if missing:
            skipped.append({"id": name, "reason": f"no file '{missing[0]}'"})
            continue
        yield Piece(
            id=piece_id("maestro", name),
            midi=folder / row["midi_filename"],
            audio=folder / row["audio_filename"],
            composition=normalize_text(f"{row['canonical_composer']} {row['canonical_title']}"),
            split=row["split"].strip() or None,
            performer=None,  # the corpus does not tell
            custom={
                "composer": row["canonical_composer"],
                "title": row["canonical_title"],
                "year": row["year"],
            },
        )


if __name__ == "__main__":
    run(main)
