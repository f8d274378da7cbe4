"""Stages that follow each other in one folder, and trainings that start from another training's weights.

What a stage does not train, it takes from the best of the stage that does: `best-valid-loss.pt` is then always a whole
model, whichever stage has written it last, and a stage can be continued after the one that follows it.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from valle.config import ModelConfig, TrainConfig, chosen_by_user
from valle.engine.checkpoint import load_checkpoint, newest_checkpoint
from valle.utils.errors import UserError
from valle.utils.sharded import read_header

log = logging.getLogger(__name__)
NOT_ARCHITECTURE = {
    "dropout",
    "attention_dropout",
    "codebook_embedding",
}  # of ModelConfig: what a fine-tuning may choose anew


class Best(NamedTuple):
    """A stage's best checkpoint; the greatest is the newest."""

    step: int
    path: Path


class Start(NamedTuple):
    """Where a fine-tuning starts.

    Attributes:
        path, contents: the checkpoint that decides about the architecture.
        with_weights: its weights are to be taken; else `--exp-dir` has a training to go on with, which
            `Trainer.resume` reads.
    """

    path: Path
    contents: dict[str, Any]
    with_weights: bool


def check_flags(config: TrainConfig) -> None:
    """Refuse flags that contradict each other.

    Raises:
        UserError: naming both.
    """
    if config.train_stage == "auto" and (config.start_epoch > 1 or config.start_batch > 0):
        raise UserError(
            "--train-stage auto finds by itself where to go on; leave out --start-epoch and --start-batch, or give a "
            "stage's number"
        )
    if config.init_from is None:
        for flag, given in (
            ("--init-parts", config.init_parts != "all"),
            ("--lora-rank", config.lora_rank > 0),
        ):
            if given:
                raise UserError(f"{flag} needs --init-from: the checkpoint that is fine-tuned")
        return
    if Path(config.init_from).resolve().parent == Path(config.exp_dir).resolve():
        raise UserError(
            f"--init-from '{config.init_from}' lies in --exp-dir, whose own checkpoints a training goes on from; give "
            "the fine-tuning an --exp-dir of its own"
        )
    if config.lora_rank < 0:
        raise UserError(f"--lora-rank is {config.lora_rank}, expected 0 (no adapters) or more")
    if config.lora_rank > 0 and (config.parallel == "fsdp" or config.checkpoint_format == "sharded"):
        flag = "--parallel fsdp" if config.parallel == "fsdp" else "--checkpoint-format sharded"
        raise UserError(
            f"--lora-rank and {flag} do not go together; leave {flag} out: adapters need little memory"
        )
    if config.lora_rank > 0 and config.optimizer_name != "AdamW":
        raise UserError(
            f"--lora-rank and --optimizer-name {config.optimizer_name} do not go together: its steps are relative to "
            "the size of a tensor, and adapters start at 0; use --optimizer-name AdamW --base-lr 1e-3"
        )


# ------------------------------------------------------------------------------------- stages in one folder


def untrained_names(model: Any, stage: int) -> set[str]:
    """The entries of the model's state dict that a stage leaves as they are."""
    trained = {id(parameter) for _, parameter in model.stage_parameters(stage)}
    # By identity: tied weights have several names.
    return {name for name, value in model.state_dict(keep_vars=True).items() if id(value) not in trained}


def newest_best(folder: Path, besides: int) -> Best | None:
    """The newest `best-valid-loss-stage<S>.pt` of the stages other than one; damaged files are named."""
    found = []
    for path in folder.glob("best-valid-loss-stage?.pt"):
        try:
            contents = load_checkpoint(path, mmap=True)
        except UserError as error:
            log.warning("%s; it is not used", error)
            continue
        if contents["train_stage"] != besides:
            found.append(Best(contents["step"], path))
    return max(found, default=None)


def trained_in(contents: dict[str, Any]) -> list[int]:
    """The stages, 1 and 2, that a checkpoint's weights have been through, here or where they come from."""
    if "stages" in contents:
        return list(contents["stages"])
    return [1] if contents["train_stage"] == 1 else [1, 2]  # of an older version


def take_over(contents: dict[str, Any], folder: Path, untrained: set[str]) -> None:
    """Put into a stage's checkpoint what another stage has trained since it was written.

    Args:
        contents: the checkpoint; its `model`, `model_avg` and `stages` are changed.
        folder: with the other stages' best checkpoints.
        untrained: from `untrained_names`.
    """
    best = newest_best(folder, contents["train_stage"])
    if best is None or best.step <= contents["step"]:
        return
    newer = load_checkpoint(best.path)
    for state in (contents["model"], contents.get("model_avg", {})):
        state.update(
            {name: newer["model"][name] for name in untrained & state.keys() & newer["model"].keys()}
        )
    contents["stages"] = sorted({*trained_in(contents), *trained_in(newer)})
    log.info("what stage %d does not train comes from '%s'", contents["train_stage"], best.path)


# ----------------------------------------------------------------------------------------- fine-tuning


def find_start(config: TrainConfig) -> Start | None:
    """Where a fine-tuning starts; None without `--init-from`."""
    if config.init_from is None:
        return None
    begun = newest_checkpoint(Path(config.exp_dir)) if config.resume else None
    if begun is not None:
        log.info("'%s' has a training to go on with; --init-from is not read again", config.exp_dir)
        return Start(begun.path, load_checkpoint(begun.path, mmap=True), False)
    path = Path(config.init_from)
    return Start(path, load_checkpoint(path), True)


def find_begun(config: TrainConfig) -> Start | None:
    """What a training in `--exp-dir` goes on from, whatever its stage; None where it begins."""
    if not (config.resume or config.start_epoch > 1 or config.start_batch > 0):
        return None
    folder = Path(config.exp_dir)
    begun = newest_checkpoint(folder) or newest_best(folder, besides=0)
    if begun is None:
        return None
    path = begun.path
    return Start(path, read_header(path) if path.is_dir() else load_checkpoint(path, mmap=True), False)


def take_architecture(config: ModelConfig, path: Path, contents: dict[str, Any], parts: str) -> None:
    """Set the architecture to that of a checkpoint.

    Args:
        config: changed; what a recipe's YAML says yields to the checkpoint.
        path, contents: the checkpoint.
        parts: "all", or the decoder whose weights are taken; `--scale-factor` is then free for AR.

    Raises:
        UserError: the user has asked for another architecture, or the checkpoint has none.
    """
    stored = contents.get("config", {}).get("model")
    if not isinstance(stored, dict):
        raise UserError(f"--init-from '{path}' holds no AudioLM; is it a checkpoint of trainer_audiolm.py?")
    chosen = chosen_by_user(config)
    taken = []
    for field in dataclasses.fields(config):
        name = field.name
        if name in NOT_ARCHITECTURE or name not in stored or (parts == "ar" and name == "scale_factor"):
            continue
        if name in chosen and getattr(config, name) != stored[name]:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{flag} is {getattr(config, name)}, but '{path}' was trained with {stored[name]}; leave {flag} out"
            )
        if getattr(config, name) != stored[name]:
            setattr(config, name, stored[name])
            taken.append(f"{name} {stored[name]}")
    if taken:
        log.info("architecture of '%s': %s", path, ", ".join(taken))


def check_text(start: Start, text: dict[str, Any] | None) -> None:
    """Refuse texts in other symbols than those that a checkpoint reads.

    Raises:
        UserError: they differ.
    """
    theirs = start.contents.get("text")
    for fact in ("kind", "tokenizer", "symbols", "sizes"):
        found, expected = (None if part is None else part.get(fact) for part in (text, theirs))
        if _listed(found) != _listed(expected):
            raise UserError(
                f"checkpoint '{start.path}' reads other texts ({fact}) than the manifests have; run prepare.sh "
                "--stage 3 with its --text-extractor, --language and symbol table"
            )


def _listed(value: Any) -> Any:
    """Tuples come back from checkpoints as lists; nothing, as one that is empty."""
    return list(value) if isinstance(value, tuple) else value or None


@torch.no_grad()
def load_parts(model: nn.Module, path: Path, contents: dict[str, Any], parts: str) -> list[int]:
    """Set a model's weights, or those of one decoder, to a checkpoint's.

    Args:
        model: with fresh weights.
        path, contents: the checkpoint.
        parts: "all", "ar" or "nar": the beginning of the parameters' names.

    Returns:
        The stages that they have been through.

    Raises:
        UserError: a parameter is missing, not known, or of another shape.
    """
    prefix = "" if parts == "all" else f"{parts}_"
    ours = {name: value for name, value in model.state_dict().items() if name.startswith(prefix)}
    theirs = {name: value for name, value in contents["model"].items() if name.startswith(prefix)}
    if not ours:
        raise UserError(f"--init-parts {parts}: the model to train has no {prefix}* parameters")
    for name in [*ours, *theirs]:
        if name not in theirs or name not in ours:
            where = f"'{path}'" if name not in theirs else "the model to train"
            raise UserError(f"--init-from '{path}': parameter '{name}' is not in {where}")
        if ours[name].shape != theirs[name].shape:
            raise UserError(
                f"--init-from '{path}': parameter '{name}' has shape {tuple(theirs[name].shape)}, expected "
                f"{tuple(ours[name].shape)}; the architecture flags must be those it was trained with"
            )
    for name, value in ours.items():
        value.copy_(theirs[name])
    log.info(
        "weights (%s) of '%s': stage %s, step %s",
        parts, path, contents.get("train_stage", "?"), contents.get("step", "?"),
    )  # fmt: skip
    given = {"all": {1, 2}, "ar": {1}, "nar": {2}}[parts]
    return sorted(given & set(trained_in(contents)))
