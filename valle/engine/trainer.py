"""The only training loop, for every model of the toolkit.

A model gives `compute_loss(batch, stage) -> (loss sum, number of targets, metrics)` and `stage_parameters(stage)`;
a source of batches gives `epoch(number, skip)`. The engine divides the summed gradient by the number of targets over
all accumulated batches and ranks, so an update does not depend on how its targets were split into batches.

One step: batches -> forward, backward (sums) -> gradient / targets -> finite? -> optimizer.

Everything that decides about the next step is in the checkpoint, and nothing else decides: a training that was killed
goes on as if it had not been (time limits aside).
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from valle import __version__
from valle.config import TrainConfig
from valle.data.checks import check_codec
from valle.engine import memory, stages
from valle.engine.adapters import Adapters, merged_copy
from valle.engine.checkpoint import (
    NumberedCheckpoint,
    is_numbered,
    newest_checkpoint,
    numbered_checkpoint,
    remove_leftovers,
    remove_old,
    save_checkpoint,
)
from valle.engine.devices import (
    keep_freed_memory,
    peak_memory,
    pick_device,
    rng_state,
    set_rng_state,
    to_device,
)
from valle.engine.guard import FIRST_SCALE, Guard
from valle.engine.metrics import MetricSums, MetricWriter, describe
from valle.engine.optimizers import OPTIMIZERS
from valle.engine.parallel import make_parallel
from valle.engine.reference import open_reference
from valle.engine.schedules import SCHEDULES
from valle.engine.watchdog import Watchdog
from valle.modules.transformer import Transformer
from valle.utils import distributed
from valle.utils.errors import Unfinished, UserError
from valle.utils.sharded import write_sharded
from valle.utils.signals import StopRequest

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class StageLoss(Protocol):
    """What `compute_loss` gives, a named tuple. Sums may be tensors on the device: they are read when they must be."""

    @property
    def loss(self) -> torch.Tensor: ...
    @property
    def num_targets(self) -> int: ...
    @property
    def metrics(self) -> dict[str, tuple[Any, int]]: ...


class Trainable(Protocol):
    """What the engine needs of a model. `loss_unit` names what its loss is measured in."""

    loss_unit: str

    def compute_loss(self, batch: dict[str, Any], stage: int) -> StageLoss: ...
    def stage_parameters(self, stage: int) -> Iterator[tuple[str, nn.Parameter]]: ...


class BatchSource(Protocol):
    """What the engine needs of the data.

    The same epoch number gives the same batches, and every rank gets the same number of them. A rank for which nothing
    is left gets a filler, a batch with `"filler": True` whose loss does not count.
    """

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[dict[str, Any]]: ...


class SampleMaker(Protocol):
    """What makes audio to listen to while training: tags -> (C, N) waveforms, with their rate in Hz."""

    sample_rate: int

    def make(self, model: Any, stage: int) -> dict[str, torch.Tensor]: ...


class Trainer:
    """Trains one stage of one model.

    Args:
        model: an `nn.Module` that is `Trainable`.
        config: the engine's settings.
        train, valid: sources of batches.
        saved: what checkpoints keep besides the engine's state: `config`, `codec`, `text_symbols`; and `stages`, those
            that the model's weights have been through already.
        samples: makes audio every `--sample-interval` steps.
        adapters: beside the model's weights, where they alone are trained.
    """

    def __init__(
        self,
        model: Any,
        config: TrainConfig,
        train: BatchSource,
        valid: BatchSource | None,
        saved: dict[str, Any],
        samples: SampleMaker | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        self.config, self.train_source, self.valid_source, self.saved = config, train, valid, saved
        self.samples, self.adapters = samples, adapters
        self.exp_dir = Path(config.exp_dir)
        self.device = pick_device(config.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.dtype = DTYPES[config.dtype]
        self.stage = int(config.train_stage)
        names = {name for name, _ in self._chosen(model)}
        if not names:
            raise UserError(f"--train-stage {self.stage} trains no parameter of this model")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        self.untrained = stages.untrained_names(model, self.stage)
        for module in model.modules():
            if isinstance(module, Transformer):
                module.checkpoint_layers = config.activation_checkpointing
                if config.compile:
                    module.compile_layers()
        self.parallel = make_parallel(model, self.device, config)
        self.model = model
        # Taken now: sharding puts other parameters in the place of the model's.
        self.trained = list(self._chosen(model))
        self.parameters = [parameter for _, parameter in self.trained]
        self.optimizer = OPTIMIZERS[config.optimizer_name](self.trained, config)
        self.schedule = SCHEDULES[config.scheduler_name](config)
        self.scaler = torch.amp.GradScaler(
            self.device.type, init_scale=FIRST_SCALE, enabled=self.dtype == torch.float16
        )
        self.guard = Guard(self.exp_dir, self.trained, config)
        self.fitted = memory.FittedBatches(self.device)
        self.writer: MetricWriter | None = None
        self.stages = set(saved.get("stages", ())) | ({self.stage} if self.stage else {1, 2})
        self.step = 0  # optimizer steps over all stages in this folder
        self.epoch = 1
        self.batch_in_epoch = 0  # of this rank
        self.stage_start = (0, 1)  # step and epoch at which this stage began
        self.files_since = (0, 1)  # step and epoch at which it was taken up after another stage
        self.seconds = 0.0  # spent in this stage's loop, over restarts
        self.best = {"valid": float("inf"), "train": float("inf")}
        self.stale_validations = 0
        self.validated_step = -1
        self.current, self.totals = MetricSums(), MetricSums()  # since the last log line; of the epoch
        self.model_avg: dict[str, torch.Tensor] | None = None
        self.last_valid: dict[str, float] = {}
        self.out_of_time = self.stopping = False
        self.stop = StopRequest()
        self.clock = Clock()
        self.reference = open_reference(config.reference, saved)

    # ---------------------------------------------------------------- the loop

    def run(self) -> dict[str, float]:
        """Train until the limit that comes first; returns the last validation's figures.

        Raises:
            Unfinished: the process was asked to end, and a checkpoint is written.
            UserError: the training cannot go on.
        """
        with self.stop, Watchdog(self.config.stuck_timeout) as watchdog:
            self.clock.entered = lambda part: watchdog.enter(self.step, part)
            return self._run()

    def _run(self) -> dict[str, float]:
        config = self.config
        if distributed.rank() == 0 and not self._finished():
            self.writer = MetricWriter(
                self.exp_dir, config.tensorboard, self.stage, self.step, self.step - self.stage_start[0],
                config.wandb_project, self.saved.get("config"), self.reference,
            )  # fmt: skip
        count = sum(parameter.numel() for parameter in self.parameters)
        log.info(
            "stage %d trains %.2f M parameters on %s, %s", self.stage, count / 1e6, self.device, config.dtype
        )
        if config.oom_check and not self._finished():
            self._try_largest_batch()
        first_step = self.step
        if self._finished():
            log.info("nothing left to do: this stage has reached its limit")
        self.clock.start(self.seconds)
        while not self._finished():
            # Counted in the stage: the same batches, whatever other stages did in between.
            number = self.epoch - self.stage_start[1] + 1
            for batches in self._grouped(self.train_source.epoch(number, self.batch_in_epoch)):
                self._try_step(batches)
                self.batch_in_epoch += len(batches)
                self._after_step()
                if self._finished():
                    break
            else:
                self._end_epoch()
        if self.out_of_time:  # on another rank: also when it goes on, this stage is done
            self.seconds = max(self.seconds, 60 * self.config.max_minutes)
        if self.step > first_step:
            if self.validated_step != self.step and not self.stopping:
                self.validate()
            if self.batch_in_epoch > 0:
                self.save(f"checkpoint-{self.step}.pt")
                self._prune("checkpoint")
        if self.writer is not None:
            self.writer.close()
        if self.stopping:
            raise Unfinished(
                f"ended at step {self.step} on {self.stop.name or 'a signal to another process'}, all is saved in "
                f"'{self.exp_dir}'; the same command goes on from there"
            )
        return self.last_valid

    def _grouped(self, batches: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        """The batches of one step together."""
        group: list[dict[str, Any]] = []
        iterator = iter(batches)
        while True:
            with self.clock.measure("data"):
                batch = next(iterator, None)
            if batch is None:
                break
            group.append(batch)
            if len(group) == self.config.accumulate_grad_steps:
                yield group
                group = []
        if group:
            yield group

    def _try_step(self, batches: list[dict[str, Any]]) -> None:
        """`_train_step`; one line where memory runs out."""
        try:
            self._train_step(batches)
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out_of_memory(error):
                raise
            raise UserError(self.fitted.advice(batches, self.step, self._max_duration())) from error
        self.fitted.note(batches)

    def _train_step(self, batches: list[dict[str, Any]]) -> None:
        """One optimizer step."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        sums, targets = MetricSums(), 0
        for number, batch in enumerate(batches):
            counts = not batch.get("filler", False)
            with (
                self.clock.measure("forward_backward"),
                self.parallel.accumulating(number == len(batches) - 1),
            ):
                with self._autocast():
                    result = self.parallel.loss(to_device(batch, self.device), self.stage)
                self.scaler.scale(result.loss * counts).backward()
            if counts:
                targets += result.num_targets
                sums.add({"loss": (result.loss.detach(), result.num_targets), **result.metrics})
        with self.clock.measure("exchange"):
            self.parallel.finish_gradients(self.parameters)
            self.seconds = self.clock.seconds()
            late = bool(self.config.max_minutes and self.seconds >= 60 * self.config.max_minutes)
            asked = self.stop.name is not None
            total, all_targets, late_ranks, asked_ranks, seconds = distributed.sum_over_ranks(
                [float(sums.sums.get("loss", 0.0)), targets, float(late), float(asked), self.seconds],
                self.device,
            )
            # The same on every rank: it decides about the learning rate, and when to stop.
            self.seconds, self.out_of_time = seconds / distributed.world_size(), late_ranks > 0
            self.stopping = asked_ranks > 0
        with self.clock.measure("optimizer"):
            if self.scaler.is_enabled():
                self.scaler.unscale_(self.optimizer)
            grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
            scale = 1.0 / max(1.0, all_targets)
            norm = self.parallel.norm(grads) * scale
            rate = self.schedule(
                self.step - self.stage_start[0], self.epoch - self.stage_start[1], self._progress()
            )
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            overflow = self.scaler.get_scale() if self.scaler.is_enabled() else None
            if self.guard.allows(self.step, total, float(norm), batches, overflow):
                limit = self.config.clip_grad_norm
                if self.config.optimizer_name == "AdamW" and limit > 0:
                    scale *= min(1.0, limit / (float(norm) + 1e-6))
                torch._foreach_mul_(grads, scale)
                self.scaler.step(self.optimizer) if self.scaler.is_enabled() else self.optimizer.step()
                sums.add({"grad_norm": (float(norm), 1)})
            if self.scaler.is_enabled():
                self.scaler.update()
        self.step += 1
        self.current.merge(sums)
        self.totals.merge(sums)

    def _after_step(self) -> None:
        """What is due every so many steps."""
        config = self.config
        # Counted in the stage, as `batch_idx_train` is, by which tools weight the running average.
        if config.average_period and (self.step - self.stage_start[0]) % config.average_period == 0:
            self._update_average()
        if self.step % config.log_interval == 0:
            self._log_train()
        if config.valid_interval and self.step % config.valid_interval == 0:
            self.validate()
        if config.sample_interval and self.step % config.sample_interval == 0:
            self._write_samples()
        # Last: a checkpoint holds what all of the above has decided.
        if config.save_every_n and self.step % config.save_every_n == 0:
            self.save(f"checkpoint-{self.step}.pt")
            self._prune("checkpoint")

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """All validation batches, on all ranks; keeps the best weights and returns averages."""
        if self.valid_source is None:
            return {}
        self.model.eval()
        self.validated_step = self.step
        sums = MetricSums()
        for batch in self.valid_source.epoch(0):
            with self.clock.measure("validation"), self._autocast():
                result = self.parallel.loss(to_device(batch, self.device), self.stage)
            if not batch.get("filler", False):
                sums.add({"loss": (result.loss, result.num_targets), **result.metrics})
        averages = sums.over_ranks(self.device).average()
        if "loss" not in averages:
            raise UserError(
                "validation has no batch: cuts_validation is empty after --filter-min/max-duration"
            )
        self.last_valid = averages
        record = self._record("valid", averages)
        shown = " | ".join(describe(record, self.model.loss_unit))
        log.info("epoch %d | step %s | validation | %s", self.epoch, self._place(), shown)
        if self.reference is not None:
            self.reference.warn_once(record)
        if self.writer is not None:
            self.writer.write(record)
        if averages["loss"] < self.best["valid"]:
            self.best["valid"] = averages["loss"]
            self.stale_validations = 0
            self.save("best-valid-loss.pt", f"best-valid-loss-stage{self.stage}.pt")
        else:
            self.stale_validations += 1
        return averages

    def _end_epoch(self) -> None:
        last = self.epoch + 1 - self.stage_start[1] >= self.config.num_epochs
        # The last file of a stage says that it is done: what is due at its end comes before.
        if not self.config.valid_interval or (last and self.validated_step != self.step):
            self.validate()
        train_loss = self.totals.over_ranks(self.device).average().get("loss", float("inf"))
        finished = self.epoch
        if train_loss < self.best["train"]:
            self.best["train"] = train_loss
            self.save("best-train-loss.pt")
        self.epoch, self.batch_in_epoch = self.epoch + 1, 0
        self.totals = MetricSums()
        self.save(f"epoch-{finished}.pt")
        self._prune("epoch")

    def _finished(self) -> bool:
        """The same on every rank."""
        config = self.config
        step, epoch = self.step - self.stage_start[0], self.epoch - self.stage_start[1]
        return (
            epoch >= config.num_epochs
            or bool(config.max_steps and step >= config.max_steps)
            or bool(config.max_minutes and self.seconds >= 60 * config.max_minutes)
            or self.out_of_time
            or self.stopping
            or bool(config.patience and self.stale_validations >= config.patience)
        )

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

    def _try_largest_batch(self) -> None:
        """Whether the largest batch of the epoch fits, so that memory runs out now or never."""
        with memory.unchanged(self.model, self.optimizer) as step_of_optimizer:

            def take_step(batch: dict[str, Any]) -> None:
                self.model.train()
                # With the exchange: DDP must see every step's end, or it would miss gradients in the next.
                with self.parallel.accumulating(True):
                    with self._autocast():
                        result = self.parallel.loss(to_device(batch, self.device), self.stage)
                    result.loss.backward()
                self.parallel.finish_gradients(self.parameters)
                step_of_optimizer()

            number = self.epoch - self.stage_start[1] + 1
            log.info(
                memory.check_largest(take_step, self.train_source, number, self._max_duration(), self.device)
            )

    def _max_duration(self) -> float | None:
        """Seconds in a batch, where the data goes by that."""
        return self.saved.get("config", {}).get("data", {}).get("max_duration")

    def _chosen(self, model: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained of the model."""
        named = model.stage_parameters(self.stage)
        return named if self.adapters is None else self.adapters.trained(named)

    def _plain(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The model's state dict without a trace of adapters beside it."""
        return state if self.adapters is None else self.adapters.merged(state)

    # ------------------------------------------------------------ what is shown

    def _record(self, split: str, averages: dict[str, float]) -> dict[str, Any]:
        """A line of metrics.jsonl."""
        stage_step = self.step - self.stage_start[0]
        place = {"step": self.step, "epoch": self.epoch, "stage": self.stage, "stage_step": stage_step}
        record = {**place, "split": split, **averages, "time": round(self.seconds, 2)}
        expected = self.reference.expected(self.stage, split, stage_step) if self.reference else {}
        return {**record, "expected": expected} if expected else record

    def _place(self) -> str:
        """The step, and of how many where that is known: where no other limit seems nearer."""
        config, done = self.config, self.step - self.stage_start[0]
        known = config.max_steps and done / config.max_steps >= self._progress()
        return f"{self.step}/{self.stage_start[0] + config.max_steps}" if known else f"{self.step}"

    def _log_train(self) -> None:
        current, totals = self.current.over_ranks(self.device), self.totals.over_ranks(self.device)
        record = self._record("train", current.average())
        seconds = max(1e-9, self.clock.lap())
        rate, memory = current.counts.get("loss", 0) / seconds, peak_memory(self.device) / 1e9
        self.current = MetricSums()
        lr = float(self.optimizer.param_groups[0]["lr"])
        progress = self._progress()
        eta = self.seconds * (1 - progress) / progress if progress > 0 else float("nan")
        unit = self.model.loss_unit.rpartition("/")[2]  # what a target is
        shown = [f"epoch {self.epoch}", f"step {self._place()}", *describe(record, self.model.loss_unit)]
        shown += [f"lr {lr:.1e}", f"{_short(rate)} {unit}s/s", f"{memory:.1f} GB", f"eta {_minutes(eta)}"]
        log.info(" | ".join(shown))
        shares = {f"share_{part}": share for part, share in self.clock.shares(seconds).items()}
        record["speed"] = {f"{unit}s_per_second": rate, "memory_gb": memory, **shares}
        if self.writer is not None:
            record.update({f"tot_{name}": value for name, value in totals.average().items()})
            record["lr"] = lr
            if self.scaler.is_enabled():
                record["grad_scale"] = self.scaler.get_scale()
            self.writer.write(record)

    def _write_samples(self) -> None:
        """Audio of the model as it is, for listening; leaves the random state alone. Rank 0 does it, others wait."""
        if self.samples is None or self.writer is None:
            return
        state = rng_state()
        self.model.eval()
        try:
            with self.clock.measure("samples"):
                model = self.model if self.adapters is None else merged_copy(self.model)
                audio = self.samples.make(model, self.stage)
                self.writer.write_samples(self.step, audio, self.samples.sample_rate)
        except torch.OutOfMemoryError:
            log.warning("no more audio samples: they do not fit beside the training on %s", self.device)
            self.samples = None
        set_rng_state(state)

    # -------------------------------------------------------------- checkpoints

    def save(self, *names: str) -> None:
        """Write a checkpoint from which `resume` goes on exactly, under one or more names; all ranks call it."""
        with self.clock.measure("checkpoint"):
            self._save(*names)

    def _save(self, *names: str) -> None:
        sharded = self.config.checkpoint_format == "sharded" and is_numbered(names[0])
        state = self.parallel.model_state(whole=not sharded)
        contents = {
            **self.saved,
            "version": __version__,
            "model": self._plain(state),
            "optimizer": self.parallel.optimizer_state(self.optimizer, whole=not sharded),
            "scheduler": {
                "stage_start": list(self.stage_start),
                "files_since": list(self.files_since),
                "seconds": self.seconds,
            },
            "sampler": {"epoch": self.epoch, "batch": self.batch_in_epoch, "ranks": distributed.world_size()},
            "grad_scaler": self.scaler.state_dict(),
            "rng": distributed.gather_objects(rng_state()),
            "current": self.current.over_ranks(self.device).state_dict(),
            "totals": self.totals.over_ranks(self.device).state_dict(),
            "train_stage": self.stage,
            "stages": sorted(self.stages),
            "step": self.step,
            "epoch": self.epoch,
            # Names by which icefall's averaging tools weight `model_avg`.
            "batch_idx_train": self.step - self.stage_start[0],
            "average_period": self.config.average_period,
            "best_valid_loss": self.best["valid"],
            "best_train_loss": self.best["train"],
            "stale_validations": self.stale_validations,
            "validated_step": self.validated_step,
            "bad_steps": self.guard.bad_steps,
        }
        if self.model_avg is not None:
            contents["model_avg"] = self.model_avg if sharded else self.parallel.gathered(self.model_avg)
        if self.adapters is not None:
            contents["lora"] = self.adapters.state_dict(state)
        if sharded:
            write_sharded(self.exp_dir / names[0].removesuffix(".pt"), contents)
        elif distributed.rank() == 0:
            save_checkpoint(self.exp_dir, names, contents)
            if self.adapters is not None and "best-valid-loss.pt" in names:
                self.adapters.export(self.exp_dir / f"lora-adapter-stage{self.stage}.safetensors", state)

    def resume(self) -> bool:
        """Go on where this stage stopped, or begin it from the best of the stage before; says which."""
        config = self.config
        if distributed.rank() == 0:
            remove_leftovers(self.exp_dir)
        if config.start_batch > 0:
            return self._restore(numbered_checkpoint(self.exp_dir, "checkpoint", config.start_batch))
        if config.start_epoch > 1:
            return self._restore(numbered_checkpoint(self.exp_dir, "epoch", config.start_epoch - 1))
        if not config.resume:
            return False
        mine, latest = newest_checkpoint(self.exp_dir, self.stage), newest_checkpoint(self.exp_dir)
        if mine is not None:
            return self._restore(mine.path, latest)
        best = stages.newest_best(self.exp_dir, besides=self.stage)
        if best is not None:
            return self._restore(best.path, latest)
        if self.stage == 2 and not config.init_from:
            log.warning("no best-valid-loss-stage1.pt in '%s': stage 2 starts from untrained weights of stage 1",
                        self.exp_dir)  # fmt: skip
        return False

    def _restore(self, path: Path, latest: NumberedCheckpoint | None = None) -> bool:
        """Load a checkpoint of this stage or of another; `latest` is the newest of all stages."""
        contents = self.parallel.read(path, self.optimizer)
        if "codec" in self.saved and "codec" in contents:  # a codec's own training has none
            folder = Path(self.saved["config"]["data"]["manifest_dir"])
            check_codec(contents["codec"], self.saved["codec"], path, folder)
        same_stage = contents["train_stage"] == self.stage
        if same_stage and latest is not None:
            stages.take_over(contents, self.exp_dir, self.untrained)
        state = contents["model"]
        if self.adapters is not None:
            fresh = {} if same_stage else self.parallel.model_state()
            state = self.adapters.resumed(contents, path) if same_stage else self.adapters.begun(state, fresh)
        elif same_stage and "lora" in contents:
            raise UserError(
                f"checkpoint '{path}' was trained with --lora-rank {contents['lora']['rank']}; give it, or another "
                "--exp-dir with --init-from"
            )
        try:
            self.parallel.load_model_state(state)
        except RuntimeError as error:
            raise UserError(
                f"checkpoint '{path}' was trained with another architecture; use another --exp-dir or the same "
                f"model flags ({str(error).splitlines()[-1].strip()[:160]})"
            ) from error
        self.stages |= set(stages.trained_in(contents))
        if not same_stage:
            # Counters go on, so that no file of the earlier stage is overwritten; everything else starts anew.
            self.step = max(contents["step"], latest.step if latest else 0)
            self.epoch = max(contents["epoch"], latest.epoch if latest else 1)
            if self.config.start_epoch > 1:
                self.epoch = self.config.start_epoch
            self.stage_start = self.files_since = (self.step, self.epoch)
            log.info("stage %d starts from '%s' (stage %d)", self.stage, path, contents["train_stage"])
            return True
        self.parallel.load_optimizer_state(self.optimizer, contents["optimizer"])
        self.scaler.load_state_dict(contents["grad_scaler"])
        self.stage_start = tuple(contents["scheduler"]["stage_start"])  # type: ignore[assignment]
        self.seconds = contents["scheduler"]["seconds"]
        self.epoch, self.batch_in_epoch = contents["sampler"]["epoch"], contents["sampler"]["batch"]
        self.step = contents["step"]
        self.best = {"valid": contents["best_valid_loss"], "train": contents["best_train_loss"]}
        self.stale_validations = contents["stale_validations"]
        self.validated_step = contents["validated_step"]
        self.files_since = tuple(contents["scheduler"].get("files_since", self.stage_start))
        self._number_behind(latest)
        self.guard.bad_steps = contents["bad_steps"]
        if "model_avg" in contents:
            self.model_avg = self.parallel.handed_out(contents["model_avg"])
        ranks = contents["sampler"]["ranks"]
        if ranks == distributed.world_size():
            set_rng_state(contents["rng"][distributed.rank()])
        else:
            self.batch_in_epoch = self.batch_in_epoch * ranks // distributed.world_size()
            log.warning("'%s' is of %d processes, now there are %d: dropout takes another course",
                        path, ranks, distributed.world_size())  # fmt: skip
        if distributed.rank() == 0:  # sums over all ranks: one of them carries them on
            self.current.load_state_dict(contents["current"])
            self.totals.load_state_dict(contents["totals"])
        log.info(
            "resumed from '%s': epoch %d, batch %d, step %d", path, self.epoch, self.batch_in_epoch, self.step
        )
        return True

    def _number_behind(self, latest: NumberedCheckpoint | None) -> None:
        """Where another stage was trained since, number steps and epochs on from it: no file of its is overwritten."""
        steps = max(0, latest.step - self.step) if latest else 0
        epochs = max(0, latest.epoch - self.epoch) if latest else 0
        if steps or epochs:
            self.step, self.epoch = self.step + steps, self.epoch + epochs
            self.stage_start = (self.stage_start[0] + steps, self.stage_start[1] + epochs)
            self.files_since = (self.step, self.epoch)

    def _prune(self, kind: str) -> None:
        if distributed.rank() == 0:
            first_step, first_epoch = self.files_since
            since = first_epoch if kind == "epoch" else first_step + 1
            remove_old(self.exp_dir, kind, self.config.keep_last_k, since)

    def _update_average(self) -> None:
        """Running average of the weights over all steps of the stage so far."""
        state = {
            name: value.detach()
            for name, value in self._plain(self.parallel.model_state(whole=False)).items()
        }
        if self.model_avg is None:
            self.model_avg = {name: value.clone() for name, value in state.items()}
            return
        weight = self.config.average_period / max(self.config.average_period, self.step - self.stage_start[0])
        for name, value in state.items():
            if value.is_floating_point():
                self.model_avg[name].lerp_(value, weight)
            else:
                self.model_avg[name].copy_(value)


class Clock:
    """Where the time of a training goes: seconds by part, in all, and since the last lap."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self.entered: Callable[[str], None] | None = None  # told of each part that begins
        self._before: dict[str, float] = {}
        self.start(0.0)

    def start(self, before: float) -> None:
        """Begin; `before` seconds were spent in earlier runs."""
        now = time.monotonic()
        self._started, self._lap = now - before, now

    def seconds(self) -> float:
        """Since the beginning, earlier runs included."""
        return time.monotonic() - self._started

    def lap(self) -> float:
        """Since the last lap, or the start."""
        now = time.monotonic()
        self._lap, passed = now, now - self._lap
        return passed

    def shares(self, seconds: float) -> dict[str, float]:
        """The share of each part, and of all others, in the last `seconds`: those since the last call."""
        spent = {part: total - self._before.get(part, 0.0) for part, total in self.parts.items()}
        self._before = dict(self.parts)
        spent["other"] = max(0.0, seconds - sum(spent.values()))
        return {part: share / seconds for part, share in spent.items() if share > 0}

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Count what is done inside for `part`."""
        if self.entered is not None:
            self.entered(part)
        begun = time.perf_counter()
        yield
        self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - begun


def _short(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"


def _minutes(seconds: float) -> str:
    if seconds != seconds:
        return "?"
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
