"""From configuration or checkpoint to a model: architecture flags are typed once, when it is trained."""

from pathlib import Path
from typing import Any

import torch

from valle.config import ModelConfig
from valle.models.audio_lm import AudioLM
from valle.utils.checkpoints import load_checkpoint
from valle.utils.errors import UserError


def build_model(config: ModelConfig, codebook_size: int) -> AudioLM:
    """A model with fresh weights; `config.num_quantizers` is set."""
    if config.num_quantizers is None:
        raise ValueError("num_quantizers is not set; it comes from the codec")
    try:
        return AudioLM(
            config.decoder_dim,
            config.nhead,
            config.num_decoder_layers,
            norm_first=config.norm_first,
            add_prenet=config.add_prenet,
            num_quantizers=config.num_quantizers,
            nar_scale_factor=config.scale_factor,
            prepend_bos=config.prepend_bos,
            codebook_size=codebook_size,
            share_embedding=config.share_embedding,
            dropout=config.dropout,
            qk_norm=config.qk_norm,
            attention_dropout=config.attention_dropout,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def load_model(
    checkpoint: str | Path | dict[str, Any], device: str | torch.device = "cpu"
) -> tuple[AudioLM, dict[str, Any]]:
    """The model of a checkpoint, in evaluation mode, and the checkpoint.

    Args:
        checkpoint: path of a checkpoint of `trainer_audiolm.py`, or what `load_checkpoint` gave.
        device: where the model goes.

    Raises:
        UserError: not a checkpoint, or not of an AudioLM.
    """
    contents = checkpoint if isinstance(checkpoint, dict) else load_checkpoint(checkpoint)
    name = "checkpoint" if isinstance(checkpoint, dict) else f"'{checkpoint}'"
    try:
        config = ModelConfig(**contents["config"]["model"])
        codebook_size = int(contents["codec"]["codebook_size"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{name} holds no AudioLM configuration; is it a checkpoint of trainer_audiolm.py?"
        ) from error
    model = build_model(config, codebook_size)
    try:
        model.load_state_dict(contents["model"], strict=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{name}: weights do not fit its configuration ({reason})") from error
    return model.to(device).eval(), contents


def find_checkpoint(recipe: Path | None = None) -> Path:
    """The newest AudioLM checkpoint: of a recipe's exp/, or, without one, of ./exp and ./egs/*/exp.

    Raises:
        UserError: there is none.
    """
    folders = [recipe / "exp"] if recipe else [Path("exp"), *sorted(Path("egs").glob("*/exp"))]
    found = [path for folder in folders for path in folder.glob("**/best-valid-loss.pt")]
    # A codec's training keeps its checkpoints beside those of the language models.
    found = [path for path in found if "codec" not in path.parent.name]
    if not found:
        places = ", ".join(f"'{folder}'" for folder in folders)
        raise UserError(f"no best-valid-loss.pt in {places}; train a model first, or give --checkpoint")
    return max(found, key=lambda path: path.stat().st_mtime)
