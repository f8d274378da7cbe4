"""From configuration or checkpoint to a model: architecture flags are typed once, when it is trained."""

from pathlib import Path
from typing import Any

import torch

from valle.config import ModelConfig, ValleConfig
from valle.data.midi import FIELDS, NUM_SPECIAL, STEPS_PER_SECOND
from valle.models.audio_lm import AudioLM
from valle.models.codec_lm import CodecLM
from valle.models.valle import VALLE, VALLF
from valle.utils.checkpoints import load_checkpoint
from valle.utils.errors import UserError

PROMPT_SECONDS = 3.0  # of a VALL-E's prompts in training, at most (arXiv 2301.02111, section 5.1)
DEFAULT_FRAME_RATE = 75.0  # Hz, where a manifest does not tell
TIME_FIELDS = (
    (FIELDS.index("position"), NUM_SPECIAL, float(STEPS_PER_SECOND)),
    (FIELDS.index("second"), NUM_SPECIAL, 1.0),
)


def build_model(
    config: ModelConfig,
    codebook_size: int,
    text: dict[str, Any] | None = None,
    frame_rate: float | None = None,
) -> CodecLM:
    """A model with fresh weights.

    Args:
        config: with `num_quantizers` set; a `ValleConfig` gives a model that reads.
        codebook_size: V.
        text: what such a model reads: `sizes`, and `field_dims` where fields of notes are put side by side.
        frame_rate: of the codes in Hz.
    """
    if config.num_quantizers is None:
        raise ValueError("num_quantizers is not set; it comes from the codec")
    shared: dict[str, Any] = {
        "d_model": config.decoder_dim,
        "nhead": config.nhead,
        "num_layers": config.num_decoder_layers,
        "norm_first": config.norm_first,
        "add_prenet": config.add_prenet,
        "num_quantizers": config.num_quantizers,
        "nar_scale_factor": config.scale_factor,
        "prepend_bos": config.prepend_bos,
        "codebook_size": codebook_size,
        "share_embedding": config.share_embedding,
        "dropout": config.dropout,
        "position": config.position,
        "activation": config.activation,
        "qk_norm": config.qk_norm,
        "attention_dropout": config.attention_dropout,
        "audio_from_zero": config.audio_from_zero,
        "nar_num_layers": config.nar_num_decoder_layers,
        "pattern": config.pattern,
        "group_size": config.group_size,
    }
    try:
        if not isinstance(config, ValleConfig):
            return AudioLM(**shared, separate_prompts=config.separate_prompts)
        if text is None:
            raise ValueError("a model that reads needs the sizes of its text")
        timed = config.model_name == "midi-valle" and config.time_aligned
        rate = frame_rate or DEFAULT_FRAME_RATE
        return (VALLF if config.model_name == "vallf" else VALLE)(
            **shared,
            prefix_mode=config.prefix_mode,
            text_sizes=text["sizes"],
            field_dims=text.get("field_dims"),
            prefix_frames=round(PROMPT_SECONDS * rate),
            text_ends=bool(text.get("ends")),
            time_fields=TIME_FIELDS if timed else (),
            frame_rate=rate if timed else None,
            symbol_frames=text.get("symbol_frames"),
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def load_model(
    checkpoint: str | Path | dict[str, Any], device: str | torch.device = "cpu"
) -> tuple[CodecLM, dict[str, Any]]:
    """The model of a checkpoint, in evaluation mode, and the checkpoint.

    Args:
        checkpoint: path of a checkpoint of a language model, or what `load_checkpoint` gave.
        device: where the model goes.

    Raises:
        UserError: not a checkpoint, or not of a language model over codes.
    """
    contents = checkpoint if isinstance(checkpoint, dict) else load_checkpoint(checkpoint)
    name = "checkpoint" if isinstance(checkpoint, dict) else f"'{checkpoint}'"
    try:
        stored = contents["config"]["model"]
        config = (ModelConfig if stored.get("model_name", "audio-lm") == "audio-lm" else ValleConfig)(
            **stored
        )
        codebook_size = int(contents["codec"]["codebook_size"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{name} holds no AudioLM or VALL-E configuration; is it a checkpoint of trainer_audiolm.py or trainer.py?"
        ) from error
    model = build_model(config, codebook_size, contents.get("text"), contents["codec"].get("frame_rate"))
    try:
        model.load_state_dict(contents["model"], strict=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{name}: weights do not fit its configuration ({reason})") from error
    return model.to(device).eval(), contents


def load_audio_lm(
    checkpoint: str | Path | dict[str, Any], device: str | torch.device = "cpu"
) -> tuple[AudioLM, dict[str, Any]]:
    """As `load_model`, for commands that know AudioLMs alone.

    Raises:
        UserError: what `load_model` says; a model of another kind.
    """
    model, contents = load_model(checkpoint, device)
    if not isinstance(model, AudioLM):
        kind, name = type(model).__name__, "checkpoint" if isinstance(checkpoint, dict) else f"'{checkpoint}'"
        raise UserError(f"{name} is a {kind}, which reads text or notes; expected an AudioLM")
    return model, contents


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
