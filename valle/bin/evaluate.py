"""Evaluate a checkpoint on held-out cuts, or compare two evaluations.

python -m valle.bin.evaluate --checkpoint C --manifest cuts_test.jsonl.gz --output-dir D
python -m valle.bin.evaluate --compare A/results.json B/results.json
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from valle.config import parse
from valle.evaluation.compare import compare, read_results
from valle.evaluation.evaluate import EvaluateConfig, evaluate
from valle.evaluation.report import build_report
from valle.evaluation.summary import comparison_sections, format_comparison, format_results
from valle.models.builder import find_checkpoint
from valle.utils.command import run
from valle.utils.files import write_json
from valle.utils.log import setup_logger


def main(argv: Sequence[str] | None = None, recipe: Path | None = None) -> None:
    """Parse, evaluate, print. In a recipe, the newest checkpoint of its exp/ and its test cuts are the defaults."""
    (config,) = parse("Evaluate an AudioLM or a VALL-E on held-out cuts.", [EvaluateConfig], argv)
    if config.compare:
        compare_and_print(config.compare, config.output_dir, config.report)
        return
    if recipe is not None:
        config.checkpoint = config.checkpoint or str(find_checkpoint(recipe))
        config.manifest = config.manifest or str(recipe / "data" / "tokenized")
        config.output_dir = config.output_dir or str(Path(config.checkpoint).parent / "report")
    setup_logger()
    results = evaluate(config)
    print(format_results(results))
    print(f"results: {config.output_dir}/results.json, as Markdown: {config.output_dir}/results.md")
    if config.report:
        print(f"report: {config.output_dir}/report.html")


def compare_and_print(files: tuple[str, str], output_dir: str, report: bool) -> None:
    """Say what is better in the second results than in the first; with an output folder, write it too."""
    found = compare(*(read_results(path) for path in files))
    print(f"a: {files[0]}\nb: {files[1]}\n{found.cuts} cuts in both")
    print(format_comparison(found.figures))
    for note in found.notes:
        print(note)
    print(f"verdict on b: {found.verdict} ({found.reason})")
    if output_dir:
        folder = Path(output_dir)
        write_json(folder / "comparison.json", {"files": list(files), **dataclasses.asdict(found)})
        if report:
            head = {
                "a": files[0],
                "b": files[1],
                "cuts": str(found.cuts),
                "verdict on b": f"{found.verdict} ({found.reason})",
            }
            build_report(
                folder / "comparison.html", "Two models compared", head, comparison_sections(found.figures)
            )


if __name__ == "__main__":
    run(main)
