"""Bring a checkpoint of lifeiteng/vall-e, MIDI-VALLE or VIOLIN-VALLE's AudioLM; or fold a sharded one into a file.

python tools/convert_checkpoint.py epoch-40.pt --output exp/theirs/best-valid-loss.pt
python tools/convert_checkpoint.py exp/audio-lm/checkpoint-4000 exp/audio-lm/checkpoint-4000.pt
python tools/convert_checkpoint.py exp/audio-lm/epoch-3.pt exp/audio-lm/epoch-3

The first: what others have trained becomes a checkpoint that infer.py, evaluate.py and --init-from take; see
docs/valle.md. The others: a sharded checkpoint (a folder) becomes a single file, or a file a folder.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from valle import __version__
from valle.codecs import codec_info
from valle.config import option, parse
from valle.data.symbols import SymbolTable
from valle.data.text import DEFAULT_LANGUAGE, FOREIGN_TOKENIZERS
from valle.engine.checkpoint import is_numbered, load_checkpoint, save_checkpoint
from valle.models.conversion import CODECS, Converted, convert, read_foreign
from valle.utils.command import run
from valle.utils.errors import UserError
from valle.utils.sharded import write_sharded

LEVELS = 5  # folders above a checkpoint in which its recipe may be


@dataclass
class ConvertConfig:
    """What is read and written."""

    files: tuple[str, ...] = option((), "what to read, and what to write", positional=True)
    output: str | None = option(None, "what to write")


@dataclass
class ForeignConfig:
    """What a checkpoint that others have trained does not tell."""

    codec: str | None = option(
        None, "whose codes it was trained on: a name or a folder (default: encodec_24khz, encodec_32khz)"
    )
    nhead: int | None = option(None, "attention heads (default: as it says, else width / 64)")
    prefix_mode: int | None = option(None, "of a VALL-E (default: as it says, else 1)", [0, 1, 2, 4])
    text_tokens: str | None = option(
        None, "table of its text symbols, unique_text_tokens.k2symbols (default: the file it names)"
    )
    text_extractor: str | None = option(
        None, "what made these symbols (default: what they look like)", FOREIGN_TOKENIZERS
    )
    language: str = option(DEFAULT_LANGUAGE, "of espeak, as espeak-ng calls it")


def reshape(source: Path, target: Path) -> None:
    """Write a checkpoint of ours in the other form; one process, which holds all of it.

    Raises:
        UserError: the source is no checkpoint, or the target's name belongs to the other form.
    """
    if source.is_dir() != (target.suffix == ".pt"):
        form = (
            "a file: its name must end with .pt"
            if source.is_dir()
            else "a folder: its name must not end with .pt"
        )
        raise UserError(f"'{target}' is to be {form}")
    contents = load_checkpoint(source)
    if source.is_dir():
        save_checkpoint(target.parent, [target.name], contents)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_sharded(target, contents)
    print(f"wrote {target} (step {contents.get('step', '?')})")


def is_ours(source: Path) -> bool:
    """Whether a checkpoint is one of this toolkit. The others hold objects, or weights alone."""
    if source.is_dir():
        return True
    try:
        contents = load_checkpoint(source, mmap=True)
    except UserError:
        return False
    return isinstance(contents.get("config"), dict)


def bring(source: Path, target: Path, config: ForeignConfig) -> None:
    """Write a checkpoint that others have trained as one of ours.

    Raises:
        UserError: the model is none that is known, or something about it is not.
    """
    if target.suffix != ".pt" or is_numbered(target.name):
        raise UserError(
            f"'{target}' is to be a file such as best-valid-loss.pt: its name must end with .pt, and not be that of a"
            " training to go on with (epoch-N.pt, checkpoint-N.pt)"
        )
    state, settings = read_foreign(source)
    reads_text = any(name.removeprefix("module.").startswith("ar_text_embedding.word") for name in state)
    if not reads_text:
        _refuse(config, ("text_tokens", "text_extractor", "language"), "checkpoints that read text")
    table = _find_table(config.text_tokens, settings, source) if reads_text else None
    found = convert(
        state,
        settings,
        config.nhead,
        config.prefix_mode,
        None if table is None else list(SymbolTable.read(table)),
        config.text_extractor,
        config.language,
    )
    if found.text is None and config.prefix_mode:
        raise UserError("--prefix-mode is of VALL-Es; this checkpoint is an AudioLM")
    if found.text is not None and "tokenizer" not in found.text:
        raise UserError(
            f"notes of {found.text['sizes']} values a field: not those of MIDI-VALLE, 92, 68, 1156, 772, 388 and 4 more"
            " than there are bars; no tokenizer here makes them"
        )
    quantizers = int(found.config["num_quantizers"])
    name = config.codec or CODECS.get(found.codebook_size)
    if name is None:
        raise UserError(f"{found.codebook_size} values a code are of no codec that is known; give --codec")
    codec = codec_info(name, quantizers)
    if codec["codebook_size"] != found.codebook_size:
        raise UserError(
            f"codec '{name}' has {codec['codebook_size']} values a code, but the model {found.codebook_size}; give"
            " --codec"
        )
    stage = int(settings.get("train_stage", 0))
    epoch = re.fullmatch(r"epoch-(\d+)", source.stem)
    contents = {
        "version": __version__,
        "model": found.state,
        "config": {"model": found.config, "data": {}, "train": {}},
        "codec": codec,
        "text_symbols": (found.text or {}).get("symbols", []),
        "train_stage": stage if stage in (1, 2) else 0,
        "stages": [1] if stage == 1 else [1, 2],
        "step": int(settings.get("batch_idx_train", 0)),
        "epoch": int(settings.get("cur_epoch", epoch[1] if epoch else 0)),
        "converted_from": source.name,
    }
    if found.text is not None:
        contents["text"] = found.text
    save_checkpoint(target.parent, [target.name], contents)
    print("\n".join(_told(found, contents, config, settings, table, target)))


def _find_table(given: str | None, settings: Mapping[str, Any], source: Path) -> Path:
    """The symbol table that is given, or the one that the checkpoint names, as seen from here or from its recipe."""
    if given:
        return Path(given)
    named = settings.get("text_tokens")
    if not isinstance(named, str) or not named:
        raise UserError(
            f"'{source}' does not name the table of its text symbols; give --text-tokens unique_text_tokens.k2symbols"
        )
    for folder in (Path(), *source.resolve().parents[:LEVELS]):
        if (folder / named).is_file():
            return folder / named
    raise UserError(f"'{source}' names '{named}' as its text symbols, which is not there; give --text-tokens")


def _told(
    found: Converted,
    contents: Mapping[str, Any],
    config: ForeignConfig,
    settings: Mapping[str, Any],
    table: Path | None,
    target: Path,
) -> list[str]:
    """What was found out, and what was assumed."""
    model, codec = found.config, contents["codec"]
    millions = sum(tensor.numel() for tensor in found.state.values()) / 1e6
    lines = [
        f"wrote {target}: {model['model_name']}, {model['num_decoder_layers']} layers of {model['decoder_dim']},"
        f" {model['nhead']} heads, {millions:.1f} M parameters (step {contents['step']})",
        f"  codec    {codec['name']}, {codec['num_quantizers']} quantizers x {codec['codebook_size']},"
        f" {codec['frame_rate']:g} Hz",
    ]
    if table is not None and found.text is not None:
        made = found.text["tokenizer"]
        lines.append(f"  text     {len(found.text['symbols'])} symbols of {table}, {made['name']}")
    assumed = []
    if config.nhead is None and "nhead" not in settings:
        assumed.append(f"--nhead {model['nhead']}")
    if found.text is not None and config.prefix_mode is None and "prefix_mode" not in settings:
        assumed.append(f"--prefix-mode {model['prefix_mode']}")
    if config.codec is None:
        assumed.append(f"--codec {codec['name']}")
    if table is not None and found.text is not None and config.text_extractor is None:
        assumed.append(f"--text-extractor {found.text['tokenizer']['name']}")
    if assumed:
        lines.append(f"  assumed  {' '.join(assumed)}")
    return lines


def _refuse(config: ForeignConfig, names: Sequence[str], what: str) -> None:
    """Refuse flags that do not belong to what is converted."""
    defaults = {field.name: field.default for field in fields(config)}
    for name in names:
        if getattr(config, name) != defaults[name]:
            raise UserError(f"--{name.replace('_', '-')} is for {what}, which this one is not")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    config, foreign = parse(__doc__ or "", [ConvertConfig, ForeignConfig], argv)
    names = [*config.files, *([config.output] if config.output else [])]
    if len(names) != 2:
        raise UserError(f"{len(names)} names given, expected 2: what to read, and what to write")
    source, target = map(Path, names)
    if not source.exists():
        raise UserError(f"checkpoint '{source}' does not exist")
    if target.exists():
        raise UserError(f"'{target}' exists; remove it first, or give another name")
    if is_ours(source):
        _refuse(foreign, [field.name for field in fields(foreign)], "checkpoints of others")
        reshape(source, target)
    else:
        bring(source, target, foreign)


if __name__ == "__main__":
    run(main)
