"""Checkpoints of the first VALL-Es as ours: lifeiteng/vall-e, MIDI-VALLE, and VIOLIN-VALLE's AudioLM.

Their architecture is read off the shapes of their tensors. What shapes do not tell is taken from the settings that
icefall stores beside the weights, or from the caller: heads, prefix mode, and what the text symbols are.

What is theirs and not ours stays as it was: sinusoids added to the embeddings, from 0 for text and audio each; ReLU;
fields of notes side by side; a table of its own for a prompt. The segment embedding, which they do not have, is zero.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from valle.config import ModelConfig, ValleConfig, to_dict
from valle.data.midi import NUM_SPECIAL, BeatTokenizer
from valle.data.symbols import ENDS, EPS
from valle.data.text import DEFAULT_LANGUAGE, EspeakTokenizer, InitialsFinalsTokenizer, SyllableTokenizer
from valle.models.builder import build_model
from valle.utils.errors import UserError

CODECS = {1024: "encodec_24khz", 2048: "encodec_32khz"}  # by size of the codebook
# Positions in the sequence of a text prenet.
CONVOLUTIONS, NORMS, PROJECTION = (1, 5, 9), (2, 6, 10), 14
# Text symbols have ids behind padding and `ENDS`, in the order of their names; so has their table's own first symbol,
# <eps>, although no text has it.
UNUSED = "<unused>"
PREFIX_MODE, HEAD_DIM = 1, 64  # where nothing tells: as in the originals' instructions
WEIGHTS = ("model", "model_avg", "state_dict")  # where a checkpoint has them, the first of these that it has


class Converted(NamedTuple):
    """A model of ours.

    Attributes:
        config: `ModelConfig` or `ValleConfig` as a dict.
        state: weights.
        codebook_size: V.
        text: what it reads, for `build_model`; None for an AudioLM.
    """

    config: dict[str, Any]
    state: dict[str, Tensor]
    codebook_size: int
    text: dict[str, Any] | None


def convert(
    state: Mapping[str, Tensor],
    settings: Mapping[str, Any] | None = None,
    nhead: int | None = None,
    prefix_mode: int | None = None,
    symbols: Sequence[str] | None = None,
    text_extractor: str | None = None,
    language: str = DEFAULT_LANGUAGE,
) -> Converted:
    """Convert a checkpoint's weights.

    Args:
        state: tensors by their original names.
        settings: what was stored beside them (`nhead`, `prefix_mode`).
        nhead: heads of the AR decoder (default: as the settings say, else width / 64).
        prefix_mode: of a VALL-E (default: as the settings say, else 1).
        symbols: text symbols of a VALL-E, all that its k2 table has.
        text_extractor: front end that they come from, of `FOREIGN_TOKENIZERS` (default: what they look like).
        language: of that front end.

    Raises:
        UserError: weights of no model that is known, or with parts that are not.
    """
    settings = settings or {}
    state = {_plain_name(name): tensor for name, tensor in state.items()}
    state = {name: tensor for name, tensor in state.items() if "_accuracy_metric" not in name}
    if "ar_predict_layer.weight" not in state or "ar_decoder.layers.0.linear1.weight" not in state:
        known = ", ".join(sorted(state)[:3])
        raise UserError(
            f"these are no weights of a VALL-E or AudioLM ({len(state)} tensors: {known}, ...); expected"
            " ar_decoder.layers.*"
        )
    reads_audio = any(name.startswith("ar_prompt_embeddings.") for name in state)
    crossed = "ar_decoder.layers.0.multihead_attn.in_proj_weight" in state
    notes = "feat_emb.0.weight" in state
    width = state["ar_predict_layer.weight"].shape[1]
    size = state["ar_predict_layer.weight"].shape[0] - 1
    quantizers = 1 + _count(state, r"nar_predict_layers\.(\d+)\.weight")
    _untie(state, quantizers)
    nar_width = state["nar_predict_layers.0.weight"].shape[1] if quantizers > 1 else width
    layers = _count(state, r"ar_decoder\.layers\.(\d+)\.linear1\.weight")
    nar_layers = _count(state, r"nar_decoder\.layers\.(\d+)\.linear1\.weight")
    heads = nhead or settings.get("nhead") or max(1, width // HEAD_DIM)
    shared: dict[str, Any] = {
        "decoder_dim": width,
        "nhead": int(heads),
        "num_decoder_layers": layers,
        "num_quantizers": quantizers,
        "scale_factor": nar_width / width,
        "norm_first": "ar_decoder.norm.weight" in state,
        "add_prenet": "ar_audio_prenet.0.weight" in state,
        "share_embedding": False,
        "prepend_bos": state["ar_audio_embedding.weight"].shape[0] == size + 2,
        "dropout": 0.1,
        "position": "sine",
        "activation": "relu",
        "audio_from_zero": True,
        "nar_num_decoder_layers": nar_layers if quantizers > 1 and nar_layers != layers else None,
    }
    config: ModelConfig
    text: dict[str, Any] | None = None
    if reads_audio:
        config = ModelConfig(**shared, separate_prompts=True)
    else:
        mode = prefix_mode if prefix_mode is not None else int(settings.get("prefix_mode", PREFIX_MODE))
        name = "midi-valle" if notes else ("vallf" if crossed else "valle")
        config = ValleConfig(**shared, model_name=name, prefix_mode=mode, time_aligned=False)
        if notes:
            text = _notes_of(state)
        else:
            text = _symbols_of(state, symbols, text_extractor, language)
    ours = _renamed(state, notes)
    model = build_model(config, size, text)
    expected = model.state_dict()
    if "nar_segment_embedding.weight" in expected:
        ours["nar_segment_embedding.weight"] = torch.zeros_like(expected["nar_segment_embedding.weight"])
    if reads_audio and _prompt_shares_scale(state, settings):
        ours["ar_prefix_position.alpha"] = state["ar_audio_position.alpha"]
    if quantizers > 1:  # the first table has a row for padding
        ours["nar_audio_embeddings.0.weight"] = ours["nar_audio_embeddings.0.weight"][:size]
    missing, left = sorted(expected.keys() - ours.keys()), sorted(ours.keys() - expected.keys())
    if missing or left:
        what = f"lacks {missing[0]}" if missing else f"has {left[0]}, which is not known"
        raise UserError(f"the checkpoint {what}; it is of a model that cannot be converted")
    wrong = [name for name in expected if ours[name].shape != expected[name].shape]
    if wrong:
        raise UserError(
            f"the checkpoint's {wrong[0]} is {tuple(ours[wrong[0]].shape)}, expected {tuple(expected[wrong[0]].shape)}"
        )
    return Converted(to_dict(config), {name: ours[name].float().clone() for name in expected}, size, text)


def _plain_name(name: str) -> str:
    """Without what DDP and their embeddings put around."""
    return name.removeprefix("module.").replace(".word_embeddings.", ".")


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the largest number that a name has."""
    return max((int(match[1]) + 1 for name in state if (match := re.fullmatch(pattern, name))), default=0)


def _prompt_shares_scale(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> bool:
    """Whether an AR prompt's sinusoids are scaled as the target's are, in VIOLIN-VALLE's `VALLE-audio`.

    Its checkpoints have the same names as those of its `AudioLM`, which scales them apart. The prompt's own scale,
    which `VALLE-audio` does not use, is still 1 there; no training leaves that of the other at 1.
    """
    named = str(settings.get("model_name", "")).lower().replace("_", "-") == "valle-audio"
    return named or bool((state["ar_prompt_position.alpha"] == 1.0).all())


def _untie(state: dict[str, Tensor], quantizers: int) -> None:
    """Put in what a file holds once that is two things: --share-embedding, and safetensors."""
    for number in range(quantizers - 2):
        pair = f"nar_predict_layers.{number}.weight", f"nar_audio_embeddings.{number + 2}.weight"
        for name, other in (pair, pair[::-1]):
            if name not in state and other in state:
                state[name] = state[other]


def _symbols_of(
    state: Mapping[str, Tensor], symbols: Sequence[str] | None, text_extractor: str | None, language: str
) -> dict[str, Any]:
    text: dict[str, Any] = {
        "kind": "symbols",
        "sizes": state["ar_text_embedding.weight"].shape[0],
        "ends": True,  # ids 1 and 2
    }
    if symbols is None:
        return text
    ordered = [EPS, *ENDS, *(UNUSED if symbol == EPS else symbol for symbol in sorted({EPS, *symbols}))]
    if len(ordered) > text["sizes"]:
        raise UserError(
            f"the symbol table has {len(ordered) - 1 - len(ENDS)} symbols, but the model has embeddings for"
            f" {text['sizes'] - 1 - len(ENDS)}; is it the table that the model was trained with?"
        )
    tokenizer = {"name": text_extractor or guess_extractor(symbols), "language": language, "lower": True}
    return {**text, "symbols": ordered, "tokenizer": tokenizer}


def guess_extractor(symbols: Sequence[str]) -> str:
    """The front end that text symbols look like: syllables with tones are Mandarin, zh apart from them an initial."""
    if not any(re.fullmatch("[a-zêü]+[1-5]", symbol) for symbol in symbols):
        return EspeakTokenizer.name
    return InitialsFinalsTokenizer.name if {"zh", "ch", "sh"} & set(symbols) else SyllableTokenizer.name


def _notes_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    tables = [state[f"feat_emb.{field}.weight"] for field in range(_count(state, r"feat_emb\.(\d+)\.weight"))]
    text: dict[str, Any] = {
        "kind": "notes",
        "sizes": [table.shape[0] for table in tables],
        "field_dims": [table.shape[1] for table in tables],
        "ends": True,
    }
    tokenizer = BeatTokenizer(max(1, text["sizes"][-1] - NUM_SPECIAL))
    if text["sizes"] == list(tokenizer.vocab_sizes):
        text["tokenizer"] = tokenizer.config()
    return text


def _renamed(state: Mapping[str, Tensor], notes: bool) -> dict[str, Tensor]:
    """Tensors by our names."""
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"feat_emb\.(\d+)\.weight", name):
            for decoder in ("ar", "nar"):  # one table for both there
                if any(other.startswith(f"{decoder}_text_embedding") for other in state):
                    ours[f"{decoder}_text_embedding.tables.{match[1]}.weight"] = tensor
            continue
        if notes and (match := re.fullmatch(r"(ar|nar)_text_embedding\.(weight|bias)", name)):
            ours[f"{match[1]}_text_embedding.project.{match[2]}"] = tensor
            continue
        if match := re.fullmatch(r"(ar|nar)_text_prenet\.(\d+)\.(.+)", name):
            place, rest = int(match[2]), match[3]
            part = (
                f"convolutions.{CONVOLUTIONS.index(place)}"
                if place in CONVOLUTIONS
                else f"norms.{NORMS.index(place)}"
                if place in NORMS
                else "projection"
            )
            ours[f"{match[1]}_text_prenet.{part}.{rest}"] = tensor
            continue
        ours[re.sub(r"^(ar|nar)_(text|prompt)_position\.", r"\1_prefix_position.", name)] = tensor
    return ours


def read_foreign(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights, and what else a checkpoint of icefall's form holds. Nothing in the file is run.

    A file may also hold weights alone, as those of safetensors do.

    What is neither a tensor nor a plain value (paths, enumerations, samplers) becomes an empty object.

    Raises:
        UserError: no such file, or no checkpoint.
    """
    if not path.is_file():
        raise UserError(f"checkpoint '{path}' does not exist")
    try:
        contents = _load_safetensors(path) if path.suffix == ".safetensors" else _load(path)
    except Exception as error:  # whatever a damaged file, or one of another kind, leads to
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"'{path}' is no checkpoint that can be read ({reason})") from error
    if not isinstance(contents, dict):
        raise UserError(f"'{path}' holds a {type(contents).__name__}, expected a checkpoint")
    weights = next((contents[name] for name in WEIGHTS if isinstance(contents.get(name), dict)), contents)
    state = (
        {str(name): tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}
        if isinstance(weights, dict)
        else {}
    )
    if not state:
        raise UserError(f"'{path}' holds no weights")
    settings = {
        name: value for name, value in contents.items() if isinstance(value, bool | int | float | str)
    }
    return state, settings


def _load(path: Path) -> Any:
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    with torch.serialization.safe_globals([(_Nothing, name) for name in unknown]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _load_safetensors(path: Path) -> Any:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names, stored = file.keys(), file.metadata() or {}
        settings = {name: int(value) for name, value in stored.items() if value.isdecimal()}
        return {**settings, "model": {name: file.get_tensor(name) for name in names}}


class _Nothing:
    """Stands for any class that a checkpoint names."""

    def __init__(self, *arguments: object, **named: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass
