"""Neural codecs behind one interface: `load_codec(name_or_dir)`, or `matching_codec` for a checkpoint's own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from valle.codecs.base import Codec
from valle.codecs.spectral_codec import SpectralCodec
from valle.utils.errors import UserError

DEFAULT_CODEC = "valle_16khz"
ASSETS = Path(__file__).parent / "assets"


def _own(name: str, num_quantizers: int | None) -> Codec:
    folder = Path(name) if Path(name).is_dir() else ASSETS / name
    codec = SpectralCodec.load(folder, name)
    if num_quantizers is not None:
        if not 1 <= num_quantizers <= codec.num_quantizers:
            raise UserError(
                f"codec '{name}' has {codec.num_quantizers} quantizers, {num_quantizers} were asked for"
            )
        codec.num_quantizers = num_quantizers
    return codec


def _hub(name: str, num_quantizers: int | None) -> Codec:
    from valle.codecs.hf import build_hf_codec

    return build_hf_codec(name, num_quantizers)


BUILDERS: dict[str, Callable[[str, int | None], Codec]] = {
    DEFAULT_CODEC: _own,
    "encodec_24khz": _hub,
    "encodec_32khz": _hub,
    "encodec_48khz": _hub,
    "dac_16khz": _hub,
    "dac_24khz": _hub,
    "dac_44khz": _hub,
    "mimi": _hub,
}
FOLDER_BUILDERS: dict[str, Callable[[str, int | None], Codec]] = {
    "valle_spectral": _own,
    "encodec": _hub,
    "dac": _hub,
    "mimi": _hub,
}


def load_codec(
    name_or_dir: str | Path = DEFAULT_CODEC,
    device: str | torch.device = "cpu",
    num_quantizers: int | None = None,
) -> Codec:
    """Load a codec by its name, from a local folder, or by a hub name (`owner/model`).

    Args:
        name_or_dir: one of `BUILDERS`, a folder with a `config.json`, or a hub name.
        device: where it runs.
        num_quantizers: use only the first so many quantizers (default: the codec's own choice).

    Raises:
        UserError: unknown name, folder without a codec, or weights that cannot be had.
    """
    name = str(name_or_dir)
    if name in BUILDERS:
        builder = BUILDERS[name]
    elif Path(name).is_dir():
        builder = FOLDER_BUILDERS[_model_type(Path(name))]
    elif name.count("/") == 1 and not name.startswith((".", "/")):
        builder = _hub
    else:
        raise UserError(
            f"unknown codec '{name}'; known: {', '.join(BUILDERS)}, a hub name, or a folder with config.json"
        )
    return builder(name, num_quantizers).to(device).eval()


def matching_codec(
    info: dict[str, Any], device: str | torch.device = "cpu", num_quantizers: int | None = None
) -> Codec:
    """The codec that made a checkpoint's training codes.

    Args:
        info: what the checkpoint keeps about it, see `Codec.info`.
        device: where it runs.
        num_quantizers: of the model, where it has fewer than the codes that it was trained on.

    Raises:
        UserError: the checkpoint names none, or the codec has other weights now.
    """
    name = info.get("name")
    if not name:
        raise UserError("the checkpoint does not name its codec; its training manifest had no codec.json")
    stored = int(info["num_quantizers"])
    codec = load_codec(name, device, stored)
    if info.get("fingerprint") and codec.fingerprint() != info["fingerprint"]:
        raise UserError(
            f"codec '{name}' has fingerprint {codec.fingerprint()}, but the checkpoint was trained on codes of "
            f"{info['fingerprint']}: other weights; use the checkpoint with the version it was trained with"
        )
    # A codec's fingerprint is that of all its quantizers, so fewer are taken only now.
    return codec if num_quantizers in (None, stored) else load_codec(name, device, num_quantizers)


def codec_info(name_or_dir: str, num_quantizers: int) -> dict[str, Any]:
    """What `Codec.info` says; of a published codec without its weights, and so without their fingerprint.

    Args:
        name_or_dir: see `load_codec`.
        num_quantizers: that are used.

    Raises:
        UserError: the codec has fewer; a folder or hub name that cannot be loaded.
    """
    from valle.codecs.hf import PUBLISHED

    if name_or_dir not in PUBLISHED:
        return load_codec(name_or_dir, num_quantizers=num_quantizers).info()
    sample_rate, channels, hop_length, available, codebook_size = PUBLISHED[name_or_dir]
    if num_quantizers > available:
        raise UserError(f"codec '{name_or_dir}' has {available} quantizers, {num_quantizers} were asked for")
    return {
        "name": name_or_dir,
        "sample_rate": sample_rate,
        "channels": channels,
        "hop_length": hop_length,
        "frame_rate": sample_rate / hop_length,
        "num_quantizers": num_quantizers,
        "codebook_size": codebook_size,
    }


def _model_type(folder: Path) -> str:
    try:
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError) as error:
        raise UserError(f"codec folder '{folder}' has no readable config.json") from error
    if kind not in FOLDER_BUILDERS:
        raise UserError(f"codec folder '{folder}': model_type '{kind}', known: {', '.join(FOLDER_BUILDERS)}")
    return kind


__all__ = ["BUILDERS", "DEFAULT_CODEC", "Codec", "codec_info", "load_codec", "matching_codec"]
