"""`python -m valle.bin.infer` with this recipe's newest checkpoint as the default."""

from functools import partial
from pathlib import Path

from valle.bin.infer import main
from valle.utils.command import run

if __name__ == "__main__":
    run(partial(main, recipe=Path(__file__).resolve().parents[1]))
