"""Configuration: one dataclass a part; defaults < conf/*.yaml < command line; unknown keys are errors.

A command lists the parts it needs and gets an instance of each: `model, data, train = parse(...)`. The parts are
saved in the checkpoint, so that inference needs no architecture flag.
"""

import argparse
import contextlib
import dataclasses
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from valle.utils.errors import UserError

CHOSEN = "chosen_by_user"  # where `parse` notes down on a part what the user has set


def option(
    default: Any,
    help: str,
    choices: Sequence[Any] | None = None,
    path: bool = False,
    metavar: str | tuple[str, ...] | None = None,
    positional: bool = False,
) -> Any:
    """A configuration field with its help text.

    A field of type `tuple[float, float]` is a flag that two values follow.

    Args:
        default: its value if nobody says anything.
        help: one line.
        choices: the only values that are taken.
        path: in a recipe's own conf/*.yaml, relative to the recipe's folder.
        metavar: what `--help` calls the value, or each of them (default: the type).
        positional: for `tuple[str, ...]`: the words of the command line that no flag stands before.
    """
    metadata = {"help": help, "choices": choices, "path": path, "metavar": metavar, "positional": positional}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    """The AudioLM's architecture (names of the VALL-E recipes)."""

    model_name: str = option("audio-lm", "model to train", ["audio-lm"])
    decoder_dim: int = option(1024, "width of the AR decoder")
    nhead: int = option(16, "attention heads")
    num_decoder_layers: int = option(12, "layers of each decoder")
    num_quantizers: int | None = option(None, "quantizers to model (default: all that the codec has)")
    scale_factor: float = option(1.0, "width of the NAR decoder relative to the AR decoder")
    norm_first: bool = option(True, "normalize before each block (pre-norm)")
    add_prenet: bool = option(False, "pass the embeddings through a small network first")
    prefix_mode: int = option(
        0, "VALL-E's acoustic prefix; an AudioLM's prompt is its prefix, so only 0", [0]
    )
    share_embedding: bool = option(False, "tie each output layer to the embedding of the codes it predicts")
    codebook_embedding: bool = option(
        True, "start the embeddings from the codec's own vectors, where it is at hand and its vectors add up"
    )
    prepend_bos: bool = option(False, "put a begin symbol between prompt and target")
    dropout: float = option(0.1, "dropout in the decoders, 0 to 1")
    attention_dropout: float = option(
        0.0, "dropout of attention's weights: helps where little data is learned by heart, costs some time"
    )
    qk_norm: bool = option(
        False, "normalize queries and keys in attention: keeps long trainings in bfloat16 stable"
    )
    position: str = option(
        "rope",
        "rope turns queries and keys; sine adds to the embeddings, as the first VALL-Es",
        ["rope", "sine"],
    )
    activation: str = option("gelu", "of the feed-forward networks", ["gelu", "relu"])
    audio_from_zero: bool = option(False, "positions of the target begin at 0 again, as in the first VALL-Es")
    nar_num_decoder_layers: int | None = option(
        None, "layers of the NAR decoder (default: as the AR decoder)"
    )
    pattern: str = option(
        "valle",
        "what the AR decoder says: valle quantizer 0, and a NAR decoder the others; delay or flatten all quantizers",
        ["valle", "delay", "flatten"],
    )
    group_size: int = option(1, "frames that the AR decoder says in one step, with --pattern valle")
    separate_prompts: bool = option(False, "an AudioLM's prompt has embeddings of its own")


@dataclass
class ValleConfig(ModelConfig):
    """The VALL-E's architecture (names of the VALL-E recipes)."""

    model_name: str = option(
        "valle",
        "valle: text before the audio; vallf: text by cross-attention; midi-valle: notes of a MIDI file",
        ["valle", "vallf", "midi-valle"],
    )
    prefix_mode: int = option(
        0,
        "prompt of the NAR decoder in training: 0 none, 1 the utterance's beginning, 2 a stretch of it, 4 another "
        "utterance of the same recording",
        [0, 1, 2, 4],
    )
    time_aligned: bool = option(
        True,
        "what is read and its audio have one clock: notes exactly, symbols of a text as long as the average",
    )


@dataclass
class DataConfig:
    """Which cuts are read and how they are batched and split."""

    manifest_dir: str = option(
        "data/tokenized", "folder with cuts_train.jsonl.gz and cuts_validation.jsonl.gz", path=True
    )
    max_duration: float = option(80.0, "seconds of audio in a batch, its padding included")
    filter_min_duration: float = option(0.0, "leave out cuts shorter than this, in seconds")
    filter_max_duration: float = option(20.0, "leave out cuts longer than this, in seconds")
    bucketing_sampler: bool = option(True, "batch cuts of similar duration")
    num_buckets: int = option(10, "duration buckets, at least; a large corpus gets more")
    shuffle: bool = option(True, "draw the training cuts in a new order each epoch")
    buffer_size: int = option(20000, "of older command lines, not used: the whole corpus is shuffled at once")
    drop_last: bool = option(
        False, "leave out the batches of an epoch that do not fill a step of all processes"
    )
    num_workers: int = option(
        0, "processes that read batches ahead, for slow disks; 0 reads in the training process"
    )
    prompt_ratio: float = option(0.4, "part of each recording that is the prompt; the rest is the target")
    prompt_ratio_range: str | None = option(
        None, "LOW,HIGH: draw the ratio anew for each row and epoch (validation keeps --prompt-ratio)"
    )
    prompt_seconds: float | None = option(None, "seconds of every prompt, in place of a ratio")
    prompt_from_cut: bool = option(
        False, "each cut says how long its prompt is: custom field prompt_duration, in seconds"
    )
    infill_prob: float = option(
        0.0, "share of the training rows that fill a gap, given both sides of it (validation has none)"
    )
    drop_prompt_prob: float = option(
        0.0, "share of the other training rows that see only the last frame of their prompt, "
        "for classifier-free guidance"
    )  # fmt: skip


@dataclass
class TrainConfig:
    """The engine's settings, the same for every model."""

    exp_dir: str = option("exp/audio-lm", "where checkpoints, logs and TensorBoard events go", path=True)
    train_stage: int | str = option(
        0,
        "0: everything, 1: AR only, 2: NAR only, auto: 1 to its limit, then 2 from its best",
        [0, 1, 2, "auto"],
    )
    num_epochs: int = option(20, "epochs to train")
    max_steps: int = option(0, "stop after so many steps; 0: no limit")
    max_minutes: float = option(0.0, "stop after so many minutes in the training loop; 0: no limit")
    start_epoch: int = option(1, "resume after epoch N-1 (loads epoch-(N-1).pt)")
    start_batch: int = option(0, "resume from checkpoint-N.pt; takes precedence over --start-epoch")
    resume: bool = option(
        True, "go on from the newest checkpoint of this stage in --exp-dir, if there is one"
    )
    init_from: str | None = option(
        None, "checkpoint whose weights (and architecture) a new training starts from: fine-tuning"
    )
    init_parts: str = option("all", "what --init-from gives", ["all", "ar", "nar"])
    lora_rank: int = option(
        0,
        "train low-rank adapters of so many rows beside the weights of --init-from; 0: the weights themselves",
    )
    lora_alpha: float = option(16.0, "what the adapters add is scaled by alpha / rank")
    base_lr: float = option(0.05, "base learning rate (0.05 suits ScaledAdam, 5e-4 AdamW)")
    optimizer_name: str = option("ScaledAdam", "optimizer", ["ScaledAdam", "AdamW"])
    scheduler_name: str = option("Eden", "learning-rate schedule", ["Eden", "cosine", "constant"])
    warmup_steps: int = option(200, "steps of learning-rate warm-up")
    weight_decay: float = option(0.01, "AdamW's weight decay")
    clip_grad_norm: float = option(1.0, "largest gradient norm (AdamW)")
    accumulate_grad_steps: int = option(1, "batches summed up in one step")
    activation_checkpointing: bool = option(
        False,
        "compute each layer's activations again in backward: a third more time, a fraction of the memory",
    )
    compile: bool = option(False, "torch.compile each layer (needs a C++ compiler, or a GPU with Triton)")
    dtype: str = option("float32", "arithmetic of the forward pass", ["float32", "bfloat16", "float16"])
    world_size: int = option(1, "processes that train together")
    master_port: int = option(0, "port on which the processes of --world-size meet; 0: any that is free")
    parallel: str = option(
        "auto",
        "several processes: ddp keeps the whole model on each, fsdp shards it; auto: ddp",
        ["auto", "ddp", "fsdp"],
    )
    checkpoint_format: str = option(
        "single",
        "numbered checkpoints: single file, or sharded, a folder that all processes write",
        ["single", "sharded"],
    )
    stuck_timeout: float = option(
        1800.0,
        "seconds without progress of a process after which all end, saying which; more than validation takes",
    )
    seed: int = option(42, "seed of everything random")
    log_interval: int = option(50, "steps between two log lines")
    sample_interval: int = option(
        0, "steps between two sets of audio samples (prompt, codec, AR, AR + NAR); 0: none"
    )
    valid_interval: int = option(0, "steps between two validations; 0: at the end of each epoch")
    save_every_n: int = option(0, "steps between two checkpoint-<step>.pt; 0: only at the end of epochs")
    keep_last_k: int = option(5, "checkpoint-<step>.pt and epoch-N.pt files to keep of each kind")
    average_period: int = option(0, "steps between two updates of the averaged model; 0: no averaging")
    patience: int = option(0, "stop after so many validations without a better loss; 0: never")
    tensorboard: bool = option(True, "write TensorBoard events")
    wandb_project: str | None = option(
        None, "report to this project of Weights & Biases too; WANDB_MODE=offline keeps it on disk"
    )
    reference: str | None = option(
        None, "file with the band of the reference runs, drawn beside this run's curves", path=True
    )
    inf_check: bool = option(
        False, "stop on the first non-finite loss or gradient, naming step and parameter"
    )
    max_bad_steps: int = option(10, "non-finite steps in a row that end a training")
    oom_check: bool = option(
        False, "before training, try the largest batch and say what --max-duration would fit"
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N")


def to_dict(config: Any) -> dict[str, Any]:
    """A part as a plain dict, as it is saved in checkpoints."""
    return dataclasses.asdict(config)


def parse(
    description: str,
    parts: Sequence[type],
    argv: Sequence[str] | None = None,
    defaults: str | Path | None = None,
    prog: str | None = None,
) -> list[Any]:
    """Read a command's configuration.

    Args:
        description: first line of `--help`.
        parts: dataclasses whose fields become flags; field names are unique over the parts.
        argv: the command line without the program's name.
        defaults: a recipe's conf/*.yaml, below `--config` and the flags.
        prog: program name in `--help`.

    Returns:
        One instance a part, in order.

    Raises:
        UserError: an unknown key or flag, or a value of the wrong type.
    """
    fields = {field.name: field for part in parts for field in dataclasses.fields(part)}
    parser = _Parser(prog=prog, description=description, formatter_class=_Formatter, allow_abbrev=False)
    parser.add_argument("--config", action="append", default=[], metavar="FILE.yaml",
                        help="flat keys, named as the flags; the command line wins")  # fmt: skip
    hints = {name: kind for part in parts for name, kind in typing.get_type_hints(part).items()}
    for part in parts:
        group = parser.add_argument_group((part.__doc__ or part.__name__).strip().splitlines()[0])
        for field in dataclasses.fields(part):
            _add_flag(group, field, hints[field.name])
    given = vars(parser.parse_intermixed_args(_dashes(argv)))
    values: dict[str, Any] = {}
    if defaults is not None:
        recipe = Path(defaults).resolve().parents[1]
        for name, value in _read_yaml(Path(defaults), fields, hints).items():
            values[name] = str(recipe / value) if fields[name].metadata.get("path") and value else value
    chosen: dict[str, Any] = {}
    for path in given.pop("config"):
        chosen.update(_read_yaml(Path(path), fields, hints))
    for name, value in given.items():
        if value not in (None, []):
            chosen[name] = tuple(value) if isinstance(value, list) else value
    values.update(chosen)
    for name, value in values.items():
        choices = fields[name].metadata.get("choices")
        if choices and value is not None and value not in choices:
            raise UserError(f"--{name.replace('_', '-')} is {value!r}, but must be one of {list(choices)}")
    built = [
        part(**{field.name: values[field.name] for field in dataclasses.fields(part) if field.name in values})
        for part in parts
    ]
    for part in built:
        vars(part)[CHOSEN] = frozenset(chosen) & {field.name for field in dataclasses.fields(part)}
    return built


def chosen_by_user(part: Any) -> frozenset[str]:
    """The fields that `--config` or the command line set, not the recipe's own YAML; of a part from `parse`."""
    return vars(part).get(CHOSEN, frozenset())


def parse_bool(text: str) -> bool:
    """`true`/`false` (also yes/no, 1/0), as the recipes write booleans."""
    lowered = text.lower()
    if lowered in ("true", "yes", "1", "on"):
        return True
    if lowered in ("false", "no", "0", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is not true or false")


class NumberOrWord:
    """The type of a flag such as `--train-stage`, which takes whole numbers and a few words; never instantiated."""

    @staticmethod
    def read(text: str) -> int | str:
        """`2` -> 2, `auto` -> "auto"."""
        return int(text) if text.isdecimal() else text


READERS: dict[type, Any] = {bool: parse_bool, NumberOrWord: NumberOrWord.read}  # others read themselves


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message} (see --help)")


def _dashes(argv: Sequence[str] | None) -> list[str] | None:
    """`--exp_dir X` and `--exp-dir X` are the same flag."""
    if argv is None:
        return None
    out = []
    for argument in argv:
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            argument = name.replace("_", "-") + equals + value
        out.append(argument)
    return out


def _plain_type(kind: Any) -> tuple[type, int | str | None]:
    """The type of one value, and how many there are, as argparse says it.

    `int | None` -> (int, None); `tuple[float, float]` -> (float, 2); `tuple[str, ...]` -> (str, "*"); a number or
    word, `int | str` -> (NumberOrWord, None).
    """
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        kinds = [member for member in typing.get_args(kind) if member is not type(None)]
        kind = NumberOrWord if kinds == [int, str] else kinds[0]
    if typing.get_origin(kind) is not tuple:
        return kind, None
    members = typing.get_args(kind)
    return members[0], "*" if members[-1] is Ellipsis else len(members)


def _add_flag(group: Any, field: dataclasses.Field, kind: Any) -> None:
    plain, count = _plain_type(kind)
    shown = str(field.default).lower() if plain is bool else field.default
    text = field.metadata.get("help", "")
    if field.default not in (dataclasses.MISSING, None, ()):
        text = f"{text} (default: {shown})"
    metavar = field.metadata.get("metavar") or ("true|false" if plain is bool else plain.__name__.upper())
    settings = {
        "type": READERS.get(plain, plain),
        "nargs": count,
        "help": text.replace("%", "%%"),
    }
    if field.metadata.get("positional"):
        group.add_argument(field.name, metavar=metavar, **settings)
        return
    choices = field.metadata.get("choices")
    group.add_argument(
        "--" + field.name.replace("_", "-"),
        dest=field.name,
        choices=choices,
        default=None,
        metavar=None if choices else metavar,
        **settings,
    )


def _read_yaml(path: Path, fields: dict[str, dataclasses.Field], hints: dict[str, Any]) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"configuration '{path}' does not exist")
    try:
        loaded = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"configuration '{path}' is no valid YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"configuration '{path}' must hold 'key: value' lines")
    values = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            raise UserError(
                f"configuration '{path}': unknown key '{key}'; known: {', '.join(sorted(fields))}"
            )
        plain, count = _plain_type(hints[name])
        try:
            values[name] = None if value is None else _yaml_value(value, plain, count)
        except TypeError as error:
            expected = plain.__name__ if count is None else f"a list of {count} {plain.__name__}"
            raise UserError(
                f"configuration '{path}': {key} is {value!r} ({type(value).__name__}), "
                f"expected {expected.replace('* ', '')}"
            ) from error
    return values


def _yaml_value(value: Any, plain: type, count: int | str | None) -> Any:
    """A value as its field holds it: YAML's lists as tuples, its whole numbers and text such as 1e-3 as floats.

    Raises:
        TypeError: it has another type, or another number of parts.
    """
    if count is not None:
        if not isinstance(value, list) or count not in ("*", len(value)):
            raise TypeError
        return tuple(_yaml_value(part, plain, None) for part in value)
    if plain is float and isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            value = float(value)
    taken = int | str if plain is NumberOrWord else plain
    if not isinstance(value, taken) or (isinstance(value, bool) and plain is not bool):
        raise TypeError
    return value
