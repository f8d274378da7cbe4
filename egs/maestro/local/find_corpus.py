"""Stage 0: the unpacked MAESTRO corpus, and its table of performances."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from valle.config import option, parse
from valle.utils.command import run
from valle.utils.errors import UserError

WHERE = (
    "maestro-v3.0.0.zip (101 GB) from https://magenta.tensorflow.org/datasets/maestro, unpacked; the archive with MIDI"
    " alone is not enough"
)
COLUMNS = ("canonical_composer", "canonical_title", "split", "year", "midi_filename", "audio_filename")


@dataclass
class FindConfig:
    """Stage 0 of egs/maestro"""

    corpus_dir: str = option("maestro-v3.0.0", "the unpacked corpus")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    (config,) = parse("Look for the MAESTRO corpus.", [FindConfig], argv)
    folder, rows = read_corpus(Path(config.corpus_dir))
    present = sum((folder / row["audio_filename"]).is_file() for row in rows)
    if present == 0:
        raise UserError(f"'{folder}' holds none of the {len(rows)} recordings of its table; expected {WHERE}")
    print(f"{present} of {len(rows)} recordings in {folder}")


def read_corpus(folder: Path) -> tuple[Path, list[dict[str, str]]]:
    """The folder that file names are relative to, and the table's rows (CSV, or else JSON).

    Raises:
        UserError: no such folder, no table in it or one folder below, or a table of another layout.
    """
    if not folder.is_dir():
        raise UserError(f"--corpus-dir '{folder}' is not a folder; expected {WHERE}")
    tables = [
        path
        for suffix in ("csv", "json")
        for pattern in (f"maestro-v*.{suffix}", f"*/maestro-v*.{suffix}")
        for path in sorted(folder.glob(pattern))
    ]
    if not tables:
        raise UserError(f"--corpus-dir '{folder}' holds no maestro-v3.0.0.csv or .json; expected {WHERE}")
    table = tables[0]
    try:
        rows = read_csv(table) if table.suffix == ".csv" else read_json(table)
    except (ValueError, csv.Error, AttributeError) as error:
        raise UserError(f"'{table}' is no table of MAESTRO ({error}); download it again") from error
    lacking = [name for name in COLUMNS if not rows or name not in rows[0]]
    if lacking:
        raise UserError(f"'{table}' has no column {', '.join(lacking)}; expected MAESTRO v3.0.0's table")
    return table.parent, rows


def read_csv(path: Path) -> list[dict[str, str]]:
    """One dictionary a row."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        return [{k: v or "" for k, v in row.items() if isinstance(k, str)} for row in csv.DictReader(file)]


def read_json(path: Path) -> list[dict[str, str]]:
    """MAESTRO's JSON is by columns: {"split": {"0": "train", ...}, ...}."""
    columns = json.loads(path.read_text(encoding="utf-8"))
    keys = list(next(iter(columns.values()), {}))
    return [{name: str(values[key]) for name, values in columns.items()} for key in keys]


if __name__ == "__main__":
    run(main)
