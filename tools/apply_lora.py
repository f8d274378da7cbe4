"""Add an exported adapter to the checkpoint it was trained from: base + some MB = the fine-tuned model.

    python tools/apply_lora.py base.pt lora-adapter-stage1.safetensors --output tuned.pt

Several adapters (of AR and of NAR) are added one after the other. `infer.py --checkpoint tuned.pt` takes the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from valle.config import option, parse
from valle.engine.adapters import apply_adapter
from valle.engine.checkpoint import load_checkpoint, save_checkpoint
from valle.utils.command import run
from valle.utils.errors import UserError

KEPT = ("config", "codec", "text_symbols", "version", "train_stage", "stages", "step", "epoch")


@dataclass
class ApplyConfig:
    """Files"""

    files: tuple[str, ...] = option((), "base checkpoint, then adapters", metavar="FILE", positional=True)
    output: str | None = option(None, "checkpoint to write")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    (config,) = parse(__doc__ or "", [ApplyConfig], argv)
    if len(config.files) < 2 or config.output is None:
        raise UserError("give the base checkpoint, one adapter or more, and --output")
    base, *adapters = config.files
    contents = load_checkpoint(base)
    weights = contents["model"]
    for adapter in adapters:
        weights = apply_adapter(weights, Path(adapter))
    output = Path(config.output)
    kept = {name: contents[name] for name in KEPT if name in contents}
    save_checkpoint(output.parent, [output.name], {**kept, "model": weights})
    print(f"wrote {output}")


if __name__ == "__main__":
    run(main)
