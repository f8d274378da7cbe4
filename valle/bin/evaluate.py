"""Evaluate a checkpoint on held-out cuts: `python -m valle.bin.evaluate --checkpoint C --manifest M --output-dir D`."""

from collections.abc import Sequence

from valle.config import parse
from valle.evaluation.evaluate import EvaluateConfig, evaluate
from valle.evaluation.summary import format_results
from valle.utils.command import run
from valle.utils.log import setup_logger


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, evaluate, print."""
    (config,) = parse("Evaluate an AudioLM on held-out cuts.", [EvaluateConfig], argv)
    setup_logger()
    results = evaluate(config)
    print(format_results(results))
    print(f"results: {config.output_dir}/results.json")
    if config.report:
        print(f"report: {config.output_dir}/report.html")


if __name__ == "__main__":
    run(main)
