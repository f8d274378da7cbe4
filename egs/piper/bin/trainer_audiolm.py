"""`python -m valle.bin.trainer_audiolm` with this recipe's conf/audiolm.yaml; the command line wins."""

from functools import partial
from pathlib import Path

from valle.bin.trainer_audiolm import main
from valle.utils.command import run

if __name__ == "__main__":
    run(partial(main, defaults=Path(__file__).resolve().parents[1] / "conf" / "audiolm.yaml"))
