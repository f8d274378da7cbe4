"""`python -m valle.bin.display_manifest_statistics`, beside this recipe's other commands."""

from valle.bin.display_manifest_statistics import main
from valle.utils.command import run

if __name__ == "__main__":
    run(main)
