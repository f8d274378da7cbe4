"""Evaluate a checkpoint on held-out cuts: `python -m valle.bin.evaluate --checkpoint C --manifest M --output-dir D`."""

from collections.abc import Sequence
from pathlib import Path

from valle.config import parse
from valle.evaluation.evaluate import EvaluateConfig, evaluate
from valle.evaluation.summary import format_results
from valle.models.builder import find_checkpoint
from valle.utils.command import run
from valle.utils.log import setup_logger


def main(argv: Sequence[str] | None = None, recipe: Path | None = None) -> None:
    """Parse, evaluate, print. In a recipe, the newest checkpoint of its exp/ and its test cuts are the defaults."""
    (config,) = parse("Evaluate an AudioLM on held-out cuts.", [EvaluateConfig], argv)
    if recipe is not None:
        config.checkpoint = config.checkpoint or str(find_checkpoint(recipe))
        config.manifest = config.manifest or str(recipe / "data" / "tokenized" / "cuts_test.jsonl.gz")
        config.output_dir = config.output_dir or str(Path(config.checkpoint).parent / "report")
    setup_logger()
    results = evaluate(config)
    print(format_results(results))
    print(f"results: {config.output_dir}/results.json")
    if config.report:
        print(f"report: {config.output_dir}/report.html")


if __name__ == "__main__":
    run(main)
