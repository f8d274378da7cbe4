"""`python -m valle.bin.tokenizer`, beside this recipe's other commands."""

from valle.bin.tokenizer import main
from valle.utils.command import run

if __name__ == "__main__":
    run(main)
