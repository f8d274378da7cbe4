"""EnCodec, DAC and Mimi through Hugging Face `transformers`, behind the one codec interface.

Road: `load_codec("encodec_32khz")`, a hub name or a local folder -> here -> codes (B, T, Q). Every number (rate, hop,
quantizers, codebook size) is read from the model's own config. Needs `pip install "valle[hub]"`; no torchaudio.

Sources: EnCodec, Défossez et al. 2022 (arXiv:2210.13438); DAC, Kumar et al. 2023 (arXiv:2306.06546); Mimi, Défossez
et al. 2024 (arXiv:2410.00037). Each wrapper gives the codes that the `transformers` model itself gives.
"""

import contextlib
import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from valle.codecs.base import Codec
from valle.utils.errors import UserError

logger = logging.getLogger(__name__)

HUB_IDS = {
    "encodec_24khz": "facebook/encodec_24khz",
    "encodec_32khz": "facebook/encodec_32khz",
    "encodec_48khz": "facebook/encodec_48khz",
    "dac_16khz": "descript/dac_16khz",
    "dac_24khz": "descript/dac_24khz",
    "dac_44khz": "descript/dac_44khz",
    "mimi": "kyutai/mimi",
}

# (Hz, channels, samples a frame, quantizers, codebook size) of these, for who must do without the weights.
PUBLISHED = {
    "encodec_24khz": (24000, 1, 320, 32, 1024),
    "encodec_32khz": (32000, 1, 640, 4, 2048),
    "encodec_48khz": (48000, 2, 320, 16, 1024),
    "dac_16khz": (16000, 1, 320, 12, 1024),
    "dac_24khz": (24000, 1, 320, 32, 1024),
    "dac_44khz": (44100, 1, 512, 9, 1024),
    "mimi": (24000, 1, 1920, 32, 2048),
}

NORMALIZED_RMS = 0.1
"""Level, relative to full scale (-20 dB), at which a codec that normalizes its input gives sound back."""


class HFCodec(Codec):
    """A codec model of `transformers`; subclasses say how it encodes and decodes.

    Args:
        name: what the user called it.
        model: the `transformers` model, float32.
        hop_length: samples per frame.
        available: quantizers that the model has.
        usual: quantizers used when the user asks for none in particular (at most `available`).
        num_quantizers: quantizers asked for.

    Raises:
        UserError: more quantizers asked for than there are.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        hop_length: int,
        available: int,
        usual: int,
        num_quantizers: int | None,
    ) -> None:
        super().__init__()
        if num_quantizers is not None and not 1 <= num_quantizers <= available:
            raise UserError(f"codec '{name}' has {available} quantizers, {num_quantizers} were asked for")
        self.name = name
        self.model = model
        self.sample_rate = int(model.config.sampling_rate)
        self.channels = int(getattr(model.config, "audio_channels", 1))
        self.hop_length = hop_length
        self.num_quantizers = min(available, usual) if num_quantizers is None else num_quantizers
        self.codebook_size = int(model.config.codebook_size)

    @torch.no_grad()
    def encode(self, wav: Tensor) -> Tensor:
        """(B, C, N) float32 -> (B, T, Q) int64."""
        if wav.ndim != 3 or wav.shape[1] != self.channels or wav.shape[2] == 0:
            raise ValueError(f"codec '{self.name}' takes (B, {self.channels}, N > 0), got {tuple(wav.shape)}")
        return self._encode_piece(self._leveled(wav.float()))

    def _leveled(self, wav: Tensor) -> Tensor:
        """(B, C, N) at the level that the model was trained with."""
        return wav

    def _encode_long(self, wav: Tensor) -> Tensor:
        return super()._encode_long(self._leveled(wav[None].float())[0])  # one level for all pieces

    @torch.no_grad()
    def _encode_piece(self, wav: Tensor) -> Tensor:
        return self._encode(wav).transpose(1, 2).long()  # (B, Q, T) -> (B, T, Q)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """(B, T, Q) int64 -> (B, C, T * hop_length)."""
        if codes.ndim != 3 or codes.shape[2] != self.num_quantizers:
            raise ValueError(
                f"codec '{self.name}' takes (B, T, {self.num_quantizers}), got {tuple(codes.shape)}"
            )
        num_samples = codes.shape[1] * self.hop_length
        wav = self._decode(codes.transpose(1, 2).long())
        wav = wav.reshape(codes.shape[0], self.channels, -1)[..., :num_samples]
        return F.pad(wav, (0, num_samples - wav.shape[-1]))  # odd strides of DAC fall a few samples short

    @abstractmethod
    def _encode(self, wav: Tensor) -> Tensor:
        """(B, C, N) -> (B, Q, T)."""

    @abstractmethod
    def _decode(self, codes: Tensor) -> Tensor:
        """(B, Q, T) -> (B, C, ~T * hop_length)."""


class EncodecCodec(HFCodec):
    """EnCodec. Eight quantizers unless asked otherwise: 6 kbit/s at 24 kHz, the choice of VALL-E.

    The 48 kHz model was made for chunks of one second, 1 % overlapped, each with a loudness scale sent beside the
    codes. Overlapped chunks have no single frame rate and a scale is no code, so neither fits (B, T, Q). Here a
    recording is encoded whole and normalized once, and comes back at `NORMALIZED_RMS`: its level is lost, its
    dynamics are not.
    """

    def __init__(self, name: str, model: Any, num_quantizers: int | None) -> None:
        hop_length = math.prod(model.config.upsampling_ratios)
        super().__init__(name, model, hop_length, len(model.quantizer.layers), 8, num_quantizers)
        self.normalize = bool(model.config.normalize)
        self.causal = (
            model.config.use_causal_conv
            and model.config.trim_right_ratio == 1.0
            and model.config.norm_type == "weight_norm"  # the other norm averages over all of time
        )
        model.config.chunk_length_s = None
        model.config.normalize = False
        # residual quantizers come one after another: the smallest bandwidth with enough of them, cut to Q
        self.bandwidth = min(
            (
                bandwidth
                for bandwidth in model.config.target_bandwidths
                if model.quantizer.get_num_quantizers_for_bandwidth(bandwidth) >= self.num_quantizers
            ),
            default=max(model.config.target_bandwidths),
        )

    def _leveled(self, wav: Tensor) -> Tensor:
        if not self.normalize:
            return wav
        mono = wav.mean(dim=1, keepdim=True)  # (B, 1, N)
        return wav / (mono.pow(2).mean(dim=-1, keepdim=True).sqrt() + 1e-8)

    def _encode(self, wav: Tensor) -> Tensor:
        codes = self.model.encode(wav, bandwidth=self.bandwidth).audio_codes[0]  # one chunk: (1, B, Q', T)
        return codes[:, : self.num_quantizers]

    def codebooks(self) -> Tensor:
        layers = self.model.quantizer.layers[: self.num_quantizers]
        return torch.stack([layer.codebook.embed for layer in layers])  # (Q, V, D)

    def _decode(self, codes: Tensor) -> Tensor:
        wav = self.model.decode(codes[None], [None]).audio_values
        return wav * NORMALIZED_RMS if self.normalize else wav


class DacCodec(HFCodec):
    """DAC, its first 12 quantizers unless asked otherwise: all of the 16 and 44 kHz models; that of 24 kHz has 32.

    As the original does, the end is padded with silence to a whole frame.
    """

    def __init__(self, name: str, model: Any, num_quantizers: int | None) -> None:
        hop_length = math.prod(model.config.downsampling_ratios)
        super().__init__(name, model, hop_length, model.config.n_codebooks, 12, num_quantizers)

    @property
    def context_frames(self) -> int:
        """Reach of the decoder's convolutions, counted from the samples back to the codes."""
        reach = 0
        for layer in reversed(list(self.model.decoder.modules())):
            if isinstance(layer, nn.ConvTranspose1d):
                reach = math.ceil(reach / layer.stride[0]) + layer.kernel_size[0] // layer.stride[0] - 1
            elif isinstance(layer, nn.Conv1d):
                reach += layer.dilation[0] * (layer.kernel_size[0] // 2)
        return reach

    @property
    def encode_reach(self) -> int:
        """Reach of the encoder's convolutions, counted from the codes back to the samples."""
        reach = 0
        for layer in reversed(list(self.model.encoder.modules())):
            if isinstance(layer, nn.Conv1d):
                reach = reach * layer.stride[0] + layer.dilation[0] * (layer.kernel_size[0] - 1)
        return math.ceil(reach / self.hop_length)

    def _encode(self, wav: Tensor) -> Tensor:
        padding = self.num_frames(wav.shape[-1]) * self.hop_length - wav.shape[-1]
        return self.model.encode(F.pad(wav, (0, padding)), n_quantizers=self.num_quantizers).audio_codes

    def _decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(audio_codes=codes).audio_values


class MimiCodec(HFCodec):
    """Mimi, 8 of its 32 quantizers unless asked otherwise, as in Moshi: 1.1 kbit/s."""

    def __init__(self, name: str, model: Any, num_quantizers: int | None) -> None:
        hop_length = round(model.config.sampling_rate / model.config.frame_rate)
        super().__init__(name, model, hop_length, model.config.num_quantizers, 8, num_quantizers)
        self.causal = model.config.use_causal_conv and model.config.trim_right_ratio == 1.0

    def _encode(self, wav: Tensor) -> Tensor:
        semantic = self.model.config.num_semantic_quantizers
        codes = self.model.encode(wav, num_quantizers=max(self.num_quantizers, semantic)).audio_codes
        return codes[:, : self.num_quantizers]

    def _decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes).audio_values

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MimiCodec":
        super()._apply(fn, recurse)
        for module in self.model.modules():
            if hasattr(module, "_embed"):  # a codebook computed on first use, left behind on the old device
                module._embed = None
        return self


WRAPPERS: dict[str, tuple[str, Callable[[str, Any, int | None], HFCodec]]] = {
    "encodec": ("EncodecModel", EncodecCodec),
    "dac": ("DacModel", DacCodec),
    "mimi": ("MimiModel", MimiCodec),
}
"""model_type in config.json -> class in `transformers`, our wrapper."""


def build_hf_codec(name_or_dir: str, num_quantizers: int | None = None) -> Codec:
    """Load EnCodec, DAC or Mimi.

    Args:
        name_or_dir: a name of `HUB_IDS`, a hub name (`owner/model`), or a folder with config.json and the weights.
        num_quantizers: use the first so many quantizers; None: the wrapper's usual number.

    Raises:
        UserError: `transformers` is missing, the weights cannot be had or are not complete, the model is of another
            type, or has fewer quantizers.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(f"codec '{name_or_dir}' needs transformers: pip install 'valle[hub]'") from error
    source = name_or_dir if Path(name_or_dir).is_dir() else HUB_IDS.get(name_or_dir, name_or_dir)
    model, absent = _load_from_somewhere(name_or_dir, source)
    if absent:
        raise UserError(
            f"codec '{name_or_dir}': {len(absent)} weights missing or misshapen, the first: {absent[0]}"
        )
    model.requires_grad_(False)
    return WRAPPERS[model.config.model_type][1](name_or_dir, model.eval(), num_quantizers)


def _load_from_somewhere(name: str, source: str) -> tuple[Any, list[str]]:
    """From the folder or the hub's cache without asking the hub; else from the hub."""
    try:
        with _quiet():
            return _load(name, source, local_files_only=True)
    except UserError:
        raise
    except (
        Exception
    ) as error:  # hub, network and file errors share no class, and all mean the same to the user
        if Path(source).is_dir():
            raise _cannot_load(name, source, error) from error
    logger.info("codec '%s': fetching %s from the hub", name, source)
    try:
        with _quiet(bars=True):
            return _load(name, source, local_files_only=False)
    except UserError:
        raise
    except Exception as error:  # as above
        raise _cannot_load(name, source, error) from error


def _load(name: str, source: str, local_files_only: bool) -> tuple[Any, list[str]]:
    """The model and the names of weights that the files do not have, or not in the model's shape."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(source, local_files_only=local_files_only)
    if config.model_type not in WRAPPERS:
        raise UserError(f"codec '{name}': model_type '{config.model_type}', known: {', '.join(WRAPPERS)}")
    model, report = getattr(transformers, WRAPPERS[config.model_type][0]).from_pretrained(
        source, dtype=torch.float32, output_loading_info=True, local_files_only=local_files_only
    )
    return model, sorted(str(key) for key in (*report["missing_keys"], *report["mismatched_keys"]))


@contextlib.contextmanager
def _quiet(bars: bool = False) -> Iterator[None]:
    """Hold back what the libraries print while loading: what goes wrong is said once, by us."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars_were_on = transformers_logging.is_progress_bar_enabled()
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    transformers_logging.set_verbosity(logging.CRITICAL)
    if not bars:
        transformers_logging.disable_progress_bar()
    hub.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars_were_on:
            transformers_logging.enable_progress_bar()
        hub.setLevel(level)


def _cannot_load(name: str, source: str, error: Exception) -> UserError:
    if Path(source).is_dir():
        return UserError(f"codec folder '{source}' cannot be loaded: {_first_line(error)}")
    return UserError(
        f"weights of codec '{name}' (hub id {source}) cannot be had: {_first_line(error)} - connect to the hub once "
        "(with HF_HUB_OFFLINE unset), or download them elsewhere and give the local folder (with config.json) instead"
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".:")[:200]
