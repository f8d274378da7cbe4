"""Turn a sharded checkpoint (a folder) into a single file, or a file into a folder. Nothing is lost on either way.

python tools/convert_checkpoint.py exp/audio-lm/checkpoint-4000 exp/audio-lm/checkpoint-4000.pt
python tools/convert_checkpoint.py exp/audio-lm/epoch-3.pt exp/audio-lm/epoch-3
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from valle.config import option, parse
from valle.engine.checkpoint import load_checkpoint, save_checkpoint
from valle.utils.command import run
from valle.utils.errors import UserError
from valle.utils.sharded import write_sharded


@dataclass
class ConvertConfig:
    """What is read and written."""

    files: tuple[str, ...] = option(
        (), "a folder and a .pt file to write, or a .pt file and a folder", positional=True
    )


def convert(source: Path, target: Path) -> None:
    """Write a checkpoint in the other form; one process, which holds all of it.

    Raises:
        UserError: the source is no checkpoint, the target exists, or its name belongs to the other form.
    """
    if target.exists():
        raise UserError(f"'{target}' exists; remove it first, or give another name")
    if source.is_dir() != (target.suffix == ".pt"):
        form = (
            "a file: its name must end with .pt"
            if source.is_dir()
            else "a folder: its name must not end with .pt"
        )
        raise UserError(f"'{target}' is to be {form}")
    contents = load_checkpoint(source)
    if source.is_dir():
        save_checkpoint(target.parent, [target.name], contents)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_sharded(target, contents)
    print(f"wrote {target} (step {contents.get('step', '?')})")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    (config,) = parse(__doc__ or "", [ConvertConfig], argv)
    if len(config.files) != 2:
        raise UserError(f"{len(config.files)} names given, expected 2: what to read, and what to write")
    convert(Path(config.files[0]), Path(config.files[1]))


if __name__ == "__main__":
    run(main)
