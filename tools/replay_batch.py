"""Look into a batch that a training has skipped because its loss or gradient was not finite.

    python tools/replay_batch.py exp/audio-lm/bad-batches/step-120-rank0.pt --checkpoint exp/audio-lm/epoch-3.pt

Prints the loss of each row, the first module whose output is not finite, and the first parameter whose gradient is not.
The nearest checkpoint before the step tells most; dropout is drawn anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from valle.config import option, parse
from valle.engine.devices import pick_device, to_device
from valle.engine.trainer import DTYPES
from valle.models import CodecLM, load_model
from valle.utils.command import run
from valle.utils.errors import UserError


@dataclass
class ReplayConfig:
    """What is replayed"""

    files: tuple[str, ...] = option((), "bad-batches/step-N-rankR.pt files", metavar="FILE", positional=True)
    checkpoint: str | None = option(None, "checkpoint to replay with")
    dtype: str | None = option(None, "number format (default: the training's)", list(DTYPES))
    train_stage: int | None = option(None, "stage (default: the training's)", [0, 1, 2])
    dropout: bool = option(True, "with dropout, as in training")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")


def read_batches(path: Path) -> dict[str, Any]:
    """What the training has kept.

    Raises:
        UserError: not such a file.
    """
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
        contents["batches"], contents["dtype"], contents["train_stage"]
    except Exception as error:  # of many kinds, by what the file is instead
        raise UserError(f"'{path}' is not a file of bad-batches/ ({type(error).__name__})") from error
    return contents


def first_broken_output(model: nn.Module, forward: Any) -> tuple[Any, str | None]:
    """What `forward()` returns, and which module gave the first number that is not finite."""
    broken: list[str] = []

    def watch(name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not broken and isinstance(output, Tensor) and not torch.isfinite(output).all():
                broken.append(f"{name} ({type(module).__name__})")

        return look

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        return forward(), broken[0] if broken else None
    finally:
        for handle in handles:
            handle.remove()


def replay(model: CodecLM, batch: dict[str, Any], stage: int, dtype: str) -> None:
    """Print what one batch gives."""
    device = next(model.parameters()).device
    batch = to_device(batch, device)
    names = ("x", "x_lens", "y", "y_lens")

    def forward() -> Tensor:
        with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32"):
            return model(*(batch[name] for name in names), "none", stage, batch.get("prefix_lens")).loss

    model.zero_grad(set_to_none=True)
    losses, module = first_broken_output(model, forward)
    ids = batch.get("ids", [""] * len(losses))
    for cut, loss, prompt, target in zip(
        ids, losses.tolist(), batch["x_lens"].tolist(), batch["y_lens"].tolist(), strict=True
    ):
        print(f"{cut}: loss {loss:.4g} nats, prompt {prompt} frames, target {target} frames")
    print(f"first output that is not finite: {module or 'none'}")
    losses.sum().backward()
    bad = [n for n, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    print(f"gradients that are not finite: {len(bad)}{', first ' + bad[0] if bad else ''}")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    (config,) = parse(__doc__ or "", [ReplayConfig], argv)
    if not config.files or config.checkpoint is None:
        raise UserError("give a file of bad-batches/ and --checkpoint")
    model, _ = load_model(config.checkpoint, pick_device(config.device))
    model.train(config.dropout)
    weights = [name for name, value in model.named_parameters() if not torch.isfinite(value).all()]
    print(f"weights that are not finite: {len(weights)}{', first ' + weights[0] if weights else ''}")
    for file in config.files:
        kept = read_batches(Path(file))
        stage = kept["train_stage"] if config.train_stage is None else config.train_stage
        print(
            f"{file}: step {kept['step']}, loss {kept['loss']}, gradient norm {kept['grad_norm']}, stage {stage}"
        )
        for batch in kept["batches"]:
            replay(model, batch, int(stage), config.dtype or kept["dtype"])


if __name__ == "__main__":
    run(main)
