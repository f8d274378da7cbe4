"""`valle <command> …`: every command of the package under one name.

`valle train …` is `python -m valle.bin.trainer_audiolm …`, and so on; `valle <command> --help` lists its flags.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from valle.utils.command import run
from valle.utils.errors import UserError

# What one types -> its module in valle.bin, and what it does.
COMMANDS = {
    "doctor": ("doctor", "what this machine has, and which settings suit it"),
    "tokenize": ("tokenizer", "recordings -> codec tokens"),
    "text-tokens": ("text_tokens", "texts of cuts -> symbols for text-to-speech"),
    "split": ("split_manifest", "cuts -> training, validation and test cuts"),
    "statistics": ("display_manifest_statistics", "hours, durations and codebook use of cuts"),
    "audit": ("audit_codec", "what the codec keeps of the corpus: the ceiling of every model on its codes"),
    "train": ("trainer_audiolm", "train or fine-tune an AudioLM"),
    "train-codec": ("trainer_codec", "train the project's own codec"),
    "infer": ("infer", "continue a recording, say a text, play a piece"),
    "evaluate": ("evaluate", "measure a checkpoint on held-out cuts"),
}


def usage() -> str:
    """The list of commands."""
    lines = [f"  {name:<12} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        ["usage: valle <command> [flags]", "", *lines, "", "valle <command> --help lists its flags"]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Call the command.

    Raises:
        UserError: there is no such command.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return
    name, *rest = arguments
    if name not in COMMANDS:
        raise UserError(f"valle has no command '{name}'; there are {', '.join(COMMANDS)}")
    sys.argv[0] = f"valle {name}"  # what `--help` and argparse call it
    importlib.import_module(f"valle.bin.{COMMANDS[name][0]}").main(rest)


def entry() -> NoReturn:
    """The program `valle`."""
    run(main)


if __name__ == "__main__":
    entry()
