"""The only training loop, for every model of the toolkit.

A model gives `compute_loss(batch, stage) -> (loss sum, number of targets, metrics)` and `stage_parameters(stage)`;
a source of batches gives `epoch(number, skip)`. The engine divides the summed gradient by the number of targets over
all accumulated batches and ranks, so an update does not depend on how its targets were split into batches.

One step: batches -> forward, backward (sums) -> gradient / targets -> finite? -> optimizer.
"""

import contextlib
import logging
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from valle import __version__
from valle.config import TrainConfig
from valle.engine.checkpoint import load_checkpoint, numbered_checkpoints, remove_old, save_checkpoint
from valle.engine.metrics import MetricSums, MetricWriter
from valle.engine.optimizers import OPTIMIZERS
from valle.engine.schedules import SCHEDULES
from valle.utils import distributed
from valle.utils.errors import UserError

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_BAD_STEPS = 10  # non-finite steps in a row that end a training


class StageLoss(Protocol):
    """What `compute_loss` gives."""

    @property
    def loss(self) -> torch.Tensor: ...
    @property
    def num_targets(self) -> int: ...
    @property
    def metrics(self) -> dict[str, tuple[float, int]]: ...


class Trainable(Protocol):
    """What the engine needs of a model. `loss_unit` names what its loss is measured in."""

    loss_unit: str

    def compute_loss(self, batch: dict[str, Any], stage: int) -> StageLoss: ...
    def stage_parameters(self, stage: int) -> Iterator[tuple[str, nn.Parameter]]: ...


class BatchSource(Protocol):
    """What the engine needs of the data: the same epoch number gives the same batches."""

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[dict[str, Any]]: ...


class Trainer:
    """Trains one stage of one model.

    Args:
        model: an `nn.Module` that is `Trainable`.
        config: the engine's settings.
        train, valid: sources of batches.
        saved: what checkpoints keep besides the engine's state: `config`, `codec`, `text_symbols`.
    """

    def __init__(
        self,
        model: Any,
        config: TrainConfig,
        train: BatchSource,
        valid: BatchSource | None,
        saved: dict[str, Any],
    ) -> None:
        self.config, self.train_source, self.valid_source, self.saved = config, train, valid, saved
        self.exp_dir = Path(config.exp_dir)
        self.device = pick_device(config.device)
        self.model = model.to(self.device)
        self.dtype = DTYPES[config.dtype]
        self.stage = config.train_stage
        trained = list(model.stage_parameters(self.stage))
        if not trained:
            raise UserError(f"--train-stage {self.stage} trains no parameter of this model")
        names = {name for name, _ in trained}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        self.trained = trained
        self.optimizer = OPTIMIZERS[config.optimizer_name](trained, config)
        self.schedule = SCHEDULES[config.scheduler_name](config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.step = 0  # optimizer steps over all stages in this folder
        self.epoch = 1
        self.batch_in_epoch = 0
        self.stage_start = (0, 1)  # step and epoch at which this stage began
        self.seconds = 0.0  # spent in this stage's loop, over restarts
        self.best = {"valid": float("inf"), "train": float("inf")}
        self.stale_validations = 0
        self.validated_step = -1
        self.totals = MetricSums()
        self.model_avg: dict[str, torch.Tensor] | None = None
        self.bad_steps = 0
        self.writer: MetricWriter | None = None

    # ---------------------------------------------------------------- the loop

    def run(self) -> dict[str, float]:
        """Train until the limit that comes first; returns the last validation's figures."""
        config = self.config
        if distributed.rank() == 0:
            self.writer = MetricWriter(self.exp_dir, config.tensorboard)
        count = sum(parameter.numel() for _, parameter in self.trained)
        log.info(
            "stage %d trains %.2f M parameters on %s, %s", self.stage, count / 1e6, self.device, config.dtype
        )
        if config.oom_check:
            self._try_largest_batch()
        started = time.monotonic() - self.seconds
        valid: dict[str, float] = {}
        current = MetricSums()
        interval_start, interval_targets = time.monotonic(), 0
        done = self._finished()
        if done:
            log.info("nothing left to do: this stage has reached its limit")
        first_step = self.step
        while not done:
            for batches in self._grouped(self.train_source.epoch(self.epoch, self.batch_in_epoch)):
                metrics, targets = self._train_step(batches)
                self.batch_in_epoch += len(batches)
                self.seconds = time.monotonic() - started
                current.add(metrics)
                self.totals.add(metrics)
                interval_targets += targets
                if config.average_period and self.step % config.average_period == 0:
                    self._update_average()
                if self.step % config.log_interval == 0:
                    rate = interval_targets / (time.monotonic() - interval_start)
                    self._log_train(current, rate)
                    current, interval_start, interval_targets = MetricSums(), time.monotonic(), 0
                if config.save_every_n and self.step % config.save_every_n == 0:
                    self.save(f"checkpoint-{self.step}.pt")
                    self._prune("checkpoint")
                if config.valid_interval and self.step % config.valid_interval == 0:
                    valid = self.validate()
                    interval_start, interval_targets = time.monotonic(), 0
                done = self._finished()
                if done:
                    break
            else:
                if not config.valid_interval:
                    valid = self.validate()
                self._end_epoch()
                done = self._finished()
        trained = self.step > first_step
        if trained and self.validated_step != self.step:
            valid = self.validate()
        if trained and self.batch_in_epoch > 0:
            self.save(f"checkpoint-{self.step}.pt")
            self._prune("checkpoint")
        if self.writer is not None:
            self.writer.close()
        return valid

    def _grouped(self, batches: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        """Batches of one step together; with several ranks, until the first rank has no more."""
        group: list[dict[str, Any]] = []
        iterator = iter(batches)
        while True:
            batch = next(iterator, None)
            have = distributed.sum_over_ranks([0.0 if batch is None else 1.0], self.device)[0]
            if batch is None or have < distributed.world_size():
                break
            group.append(batch)
            if len(group) == self.config.accumulate_grad_steps:
                yield group
                group = []
        if group:
            yield group

    def _train_step(self, batches: list[dict[str, Any]]) -> tuple[dict[str, tuple[float, int]], int]:
        """One optimizer step; returns the batches' metrics and the number of their targets."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        sums, targets, total = MetricSums(), 0, 0.0
        for batch in batches:
            with self._autocast():
                result = self.model.compute_loss(to_device(batch, self.device), self.stage)
            self.scaler.scale(result.loss).backward()
            loss = float(result.loss.detach())
            total += loss
            targets += result.num_targets
            sums.add({"loss": (loss, result.num_targets), **result.metrics})
        parameters = [parameter for _, parameter in self.trained]
        distributed.sum_gradients(parameters)
        total, all_targets = distributed.sum_over_ranks([total, targets], self.device)
        self.scaler.unscale_(self.optimizer) if self.scaler.is_enabled() else None
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_div_(grads, max(1.0, all_targets))
        norm = torch.nn.utils.get_total_norm(grads)
        rate = self.schedule(
            self.step - self.stage_start[0], self.epoch - self.stage_start[1], self._progress()
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if not (torch.isfinite(norm) and total == total and abs(total) != float("inf")):
            self._on_bad_step(total, norm, batches)
        else:
            self.bad_steps = 0
            if self.config.optimizer_name == "AdamW" and self.config.clip_grad_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(parameters, self.config.clip_grad_norm, norm)
            self.scaler.step(self.optimizer) if self.scaler.is_enabled() else self.optimizer.step()
            sums.add({"grad_norm": (float(norm), 1)})
        self.scaler.update() if self.scaler.is_enabled() else None
        self.step += 1
        return {name: (sums.sums[name], int(sums.counts[name])) for name in sums.sums}, targets

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """All validation batches; keeps the best weights and returns averages."""
        if self.valid_source is None:
            return {}
        self.model.eval()
        self.validated_step = self.step
        sums = MetricSums()
        for batch in self.valid_source.epoch(0):
            with self._autocast():
                result = self.model.compute_loss(to_device(batch, self.device), self.stage)
            sums.add({"loss": (float(result.loss), result.num_targets), **result.metrics})
        names = sorted(sums.sums)
        reduced = distributed.sum_over_ranks(
            [sums.sums[name] for name in names] + [sums.counts[name] for name in names], self.device
        )
        half = len(names)
        averages = {
            name: reduced[i] / reduced[half + i] for i, name in enumerate(names) if reduced[half + i] > 0
        }
        if "loss" not in averages:
            raise UserError(
                "validation has no batch: cuts_validation is empty after --filter-min/max-duration"
            )
        shown = " | ".join(f"{name} {value:.4g}" for name, value in averages.items())
        log.info("epoch %d | step %d | validation | %s", self.epoch, self.step, shown)
        if self.writer is not None:
            record = {
                "step": self.step,
                "epoch": self.epoch,
                "stage": self.stage,
                "split": "valid",
                **averages,
            }
            self.writer.write(
                {**record, "time": round(self.seconds, 2)},
                {f"train/valid_{name}": value for name, value in averages.items()},
            )
        if averages["loss"] < self.best["valid"]:
            self.best["valid"] = averages["loss"]
            self.stale_validations = 0
            self.save("best-valid-loss.pt")
            self.save(f"best-valid-loss-stage{self.stage}.pt")
        else:
            self.stale_validations += 1
        return averages

    def _end_epoch(self) -> None:
        train_loss = self.totals.average().get("loss", float("inf"))
        finished = self.epoch
        if train_loss < self.best["train"]:
            self.best["train"] = train_loss
            self.save("best-train-loss.pt")
        self.epoch, self.batch_in_epoch = self.epoch + 1, 0
        self.totals = MetricSums()
        self.save(f"epoch-{finished}.pt")
        self._prune("epoch")

    def _finished(self) -> bool:
        config = self.config
        step, epoch = self.step - self.stage_start[0], self.epoch - self.stage_start[1]
        mine = (
            epoch >= config.num_epochs
            or bool(config.max_steps and step >= config.max_steps)
            or bool(config.max_minutes and self.seconds >= 60 * config.max_minutes)
            or bool(config.patience and self.stale_validations >= config.patience)
        )
        return distributed.sum_over_ranks([float(mine)], self.device)[0] > 0

    def _progress(self) -> float:
        """Part of this stage that is done, 0 to 1, by the limit that is nearest."""
        config = self.config
        parts = [(self.epoch - self.stage_start[1]) / max(1, config.num_epochs)]
        if config.max_steps:
            parts.append((self.step - self.stage_start[0]) / config.max_steps)
        if config.max_minutes:
            parts.append(self.seconds / (60 * config.max_minutes))
        return max(parts)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def _on_bad_step(self, loss: float, norm: torch.Tensor, batches: list[dict[str, Any]]) -> None:
        """A loss or gradient is not finite: leave the weights alone, say so, and stop if it goes on."""
        self.bad_steps += 1
        ids = [cut for batch in batches for cut in batch.get("ids", [])]
        broken = [name for name, p in self.trained if p.grad is not None and not torch.isfinite(p.grad).all()]
        log.warning(
            "step %d skipped: loss %s, gradient norm %s, first broken gradient %s, cuts %s",
            self.step, loss, float(norm), broken[:1], ids[:8],
        )  # fmt: skip
        if self.config.inf_check or self.bad_steps >= MAX_BAD_STEPS:
            raise UserError(
                f"stopped at step {self.step}: {self.bad_steps} non-finite step(s) in a row; "
                f"try a lower --base-lr or --dtype float32 (cuts {ids[:8]})"
            )

    def _try_largest_batch(self) -> None:
        """Forward and backward on the largest batch of the epoch, so that memory runs out now or never."""
        largest = max(
            self.train_source.epoch(self.epoch),
            key=lambda batch: sum(v.numel() for v in batch.values() if isinstance(v, torch.Tensor)),
        )
        state = torch.get_rng_state()
        self.model.compute_loss(to_device(largest, self.device), self.stage).loss.backward()
        self.optimizer.zero_grad(set_to_none=True)
        torch.set_rng_state(state)
        log.info("the largest batch fits; %s", _memory(self.device))

    # ------------------------------------------------------------ what is shown

    def _log_train(self, current: MetricSums, rate: float) -> None:
        averages, totals = current.average(), self.totals.average()
        lr = float(self.optimizer.param_groups[0]["lr"])
        progress = self._progress()
        eta = self.seconds * (1 - progress) / progress if progress > 0 else float("nan")
        shown = [f"epoch {self.epoch}", f"step {self.step}"]
        shown += [f"loss {averages['loss']:.3f} {self.model.loss_unit}"] if "loss" in averages else []
        shown += [f"{name} {averages[name]:.3f}" for name in averages if name.endswith("Accuracy")]
        shown += [f"lr {lr:.1e}", f"{_short(rate)} targets/s", _memory(self.device), f"eta {_minutes(eta)}"]
        log.info(" | ".join(shown))
        if self.writer is not None:
            record = {
                "step": self.step,
                "epoch": self.epoch,
                "stage": self.stage,
                "split": "train",
                **averages,
            }
            tags = {f"train/current_{name}": value for name, value in averages.items()}
            tags.update({f"train/tot_{name}": value for name, value in totals.items()})
            tags.update({"train/learning_rate": lr, "train/epoch": float(self.epoch)})
            self.writer.write({**record, "lr": lr, "time": round(self.seconds, 2)}, tags)

    # -------------------------------------------------------------- checkpoints

    def save(self, name: str) -> None:
        """Write a checkpoint from which `restore` goes on exactly."""
        if distributed.rank() > 0:
            return
        contents = {
            **self.saved,
            "version": __version__,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {"stage_start": list(self.stage_start), "seconds": self.seconds},
            "sampler": {"epoch": self.epoch, "batch": self.batch_in_epoch},
            "grad_scaler": self.scaler.state_dict(),
            "rng": _rng_state(),
            "totals": self.totals.state_dict(),
            "train_stage": self.stage,
            "step": self.step,
            "epoch": self.epoch,
            # Names by which icefall's averaging tools weight `model_avg`.
            "batch_idx_train": self.step - self.stage_start[0],
            "average_period": self.config.average_period,
            "best_valid_loss": self.best["valid"],
            "best_train_loss": self.best["train"],
            "stale_validations": self.stale_validations,
        }
        if self.model_avg is not None:
            contents["model_avg"] = self.model_avg
        save_checkpoint(self.exp_dir / name, contents)

    def resume(self) -> bool:
        """Go on where this stage stopped, or begin it from the stage before; says which."""
        config = self.config
        if config.start_batch > 0:
            return self._restore(self.exp_dir / f"checkpoint-{config.start_batch}.pt")
        if config.start_epoch > 1:
            return self._restore(self.exp_dir / f"epoch-{config.start_epoch - 1}.pt")
        if not config.resume:
            return False
        candidates = [
            path for kind in ("epoch", "checkpoint") for _, path in numbered_checkpoints(self.exp_dir, kind)
        ]
        readable = []
        for path in candidates:
            try:
                contents = load_checkpoint(path)
            except UserError as error:
                log.warning("%s; the one before it is used", error)
                continue
            readable.append((contents["step"], contents["epoch"], str(path), contents["train_stage"]))
        mine = [entry for entry in readable if entry[3] == self.stage]
        if mine:
            return self._restore(Path(max(mine)[2]))
        if self.stage == 2:
            first = self.exp_dir / "best-valid-loss-stage1.pt"
            if first.is_file():
                return self._restore(first, at_least=max(readable, default=None))
            log.warning("no '%s': stage 2 starts from untrained AR weights", first)
        return False

    def _restore(self, path: Path, at_least: tuple[int, int, str, int] | None = None) -> bool:
        contents = load_checkpoint(path)
        try:
            self.model.load_state_dict(contents["model"], strict=True)
        except RuntimeError as error:
            raise UserError(
                f"checkpoint '{path}' was trained with another architecture; use another --exp-dir or the same "
                f"model flags ({str(error).splitlines()[-1].strip()[:160]})"
            ) from error
        if contents["train_stage"] != self.stage:
            # Counters go on, so that no file of the earlier stage is overwritten; everything else starts anew.
            self.step = max(contents["step"], at_least[0] if at_least else 0)
            self.epoch = max(contents["epoch"], at_least[1] if at_least else 1)
            if self.config.start_epoch > 1:
                self.epoch = self.config.start_epoch
            self.stage_start = (self.step, self.epoch)
            log.info("stage %d starts from '%s' (stage %d)", self.stage, path, contents["train_stage"])
            return True
        self.optimizer.load_state_dict(contents["optimizer"])
        self.scaler.load_state_dict(contents["grad_scaler"])
        self.stage_start = tuple(contents["scheduler"]["stage_start"])  # type: ignore[assignment]
        self.seconds = contents["scheduler"]["seconds"]
        self.epoch, self.batch_in_epoch = contents["sampler"]["epoch"], contents["sampler"]["batch"]
        self.step = contents["step"]
        self.best = {"valid": contents["best_valid_loss"], "train": contents["best_train_loss"]}
        self.stale_validations = contents["stale_validations"]
        self.totals.load_state_dict(contents["totals"])
        self.model_avg = contents.get("model_avg")
        _set_rng_state(contents["rng"])
        log.info(
            "resumed from '%s': epoch %d, batch %d, step %d", path, self.epoch, self.batch_in_epoch, self.step
        )
        return True

    def _prune(self, kind: str) -> None:
        if distributed.rank() == 0:
            first_step, first_epoch = self.stage_start
            since = first_epoch if kind == "epoch" else first_step + 1
            remove_old(self.exp_dir, kind, self.config.keep_last_k, since)

    def _update_average(self) -> None:
        """Running average of the weights over all steps of the stage so far."""
        state = {name: value.detach() for name, value in self.model.state_dict().items()}
        if self.model_avg is None:
            self.model_avg = {name: value.clone() for name, value in state.items()}
            return
        weight = self.config.average_period / max(self.config.average_period, self.step - self.stage_start[0])
        for name, value in state.items():
            if value.is_floating_point():
                self.model_avg[name].lerp_(value, weight)
            else:
                self.model_avg[name].copy_(value)


def pick_device(name: str) -> torch.device:
    """`auto` is this process's GPU where there is one, else the CPU."""
    if name == "auto":
        name = (
            f"cuda:{distributed.rank() % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
        )
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device '{name}' is unknown; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device '{name}': this PyTorch sees no GPU; use --device cpu")
    return device


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`."""
    return {
        key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()
    }


def _rng_state() -> dict[str, Any]:
    state: dict[str, Any] = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def _memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB"


def _short(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"


def _minutes(seconds: float) -> str:
    if seconds != seconds:
        return "?"
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
