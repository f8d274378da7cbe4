"""From cuts to batches: packed codes, planned into batches, split into prompt and target, padded.

A batch is a dict: x (B, S, Q) and x_lens (B,) the prompts, y (B, T, Q) and y_lens (B,) the targets, prefix_lens (B,)
the frames of each prompt that stand before its target (fewer than x_lens where a gap is filled), ids (B strings),
num_frames (the longest row, prompt and target together), and filler (true: the batch does not count).
Of texts, x is (B, S) symbols or (B, S, F) notes, y the whole recordings; where prompts come from neighbours, prompts
(B, P, Q) and prompts_lens (B,); where text and audio share a clock, x_times (B, S) in frames; where gaps are filled,
prefix_lens and suffix_lens (B,), the frames before and behind each gap, 0 for rows without one.
"""

import copy
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from valle.config import DataConfig, to_dict
from valle.data.batching import BatchPlan, EpochPlan, PlannedBatch
from valle.data.manifests import stream_manifest
from valle.data.packed import PackedCodes, load_codes, open_packed
from valle.data.packed_texts import PackedTexts
from valle.data.packed_times import PackedTimes
from valle.data.split import PromptRule, draw_split, settle_prompt, split_prompt_target, uniform
from valle.utils import distributed
from valle.utils.errors import UserError
from valle.utils.signals import leave_to_parent

log = logging.getLogger(__name__)
FALLBACK_CODEBOOK_SIZE = 2048  # EnCodec 32 kHz: manifests of older recipes do not name their codec


def read_codec_info(manifest_dir: Path) -> dict[str, Any] | None:
    """The codec that made the codes in a folder, from its `codec.json`; None where there is none."""
    path = manifest_dir / "codec.json"
    if not path.is_file():
        return None
    try:
        info = json.loads(path.read_text())
        int(info["num_quantizers"]), int(info["codebook_size"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' does not describe a codec ({error}); run prepare.sh --stage 2") from error
    return info


def describe_codes(manifest_dir: Path, cuts: Path) -> dict[str, Any]:
    """`read_codec_info`, or what the first cut tells."""
    info = read_codec_info(manifest_dir)
    if info is None:
        quantizers = load_codes(next(stream_manifest(cuts))).shape[1]
        log.warning(
            "'%s' has no codec.json; taking %d quantizers x %d codes",
            manifest_dir,
            quantizers,
            FALLBACK_CODEBOOK_SIZE,
        )
        info = {"name": None, "num_quantizers": quantizers, "codebook_size": FALLBACK_CODEBOOK_SIZE}
    return info


def _check_share(name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise UserError(f"--{name.replace('_', '-')} is {share}, expected a share from 0 to 1")


class PromptTargetDataset:
    """Turns the codes of recordings into a batch.

    Args:
        config: how long prompts are, shares of rows to fill in and of dropped prompts.
        num_quantizers, codebook_size: what codes must be.
        seed: of what is drawn.
        draw: whether rows are drawn (training), or split the same way in every epoch (validation).
        frame_rate: of the codes in Hz; prompts of so many seconds need it.
    """

    def __init__(
        self,
        config: DataConfig,
        num_quantizers: int,
        codebook_size: int,
        seed: int,
        draw: bool,
        frame_rate: float | None = None,
    ) -> None:
        self.num_quantizers, self.codebook_size, self.seed = num_quantizers, codebook_size, seed
        self.rule = PromptRule.of(to_dict(settle_prompt(config)), frame_rate, fixed=not draw)
        for name in ("infill_prob", "drop_prompt_prob"):
            _check_share(name, getattr(config, name))
        self.infill_prob = config.infill_prob if draw else 0.0
        self.drop_prompt_prob = config.drop_prompt_prob if draw else 0.0

    def batch(
        self,
        ids: Sequence[str],
        codes: Sequence[np.ndarray],
        epoch: int,
        marks: Sequence[float] | None = None,
        cuts: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """A batch of recordings; what is drawn for one depends on its id, the epoch and the seed alone.

        Args:
            ids: B names.
            codes: B arrays (T, Q) of 2 frames or more.
            epoch: number of the epoch.
            marks: B lengths of prompts in seconds that the cuts themselves name, NaN where one does not.
            cuts: B numbers in the manifest, not read here.
        """
        lens = torch.tensor([len(row) for row in codes])
        padded = np.zeros((len(codes), int(lens.max()), self.num_quantizers), dtype=np.int64)
        places = []
        for row, (name, frames) in enumerate(zip(ids, codes, strict=True)):
            padded[row, : len(frames)] = frames
            prompt = self.rule.frames(len(frames), name, marks[row] if marks else None, epoch, self.seed)
            places.append(
                draw_split(
                    len(frames), prompt, self.infill_prob, self.drop_prompt_prob, name, epoch, self.seed
                )
            )
        prompt_starts, target_starts, target_lens = torch.tensor(places).unbind(1)
        split = split_prompt_target(torch.from_numpy(padded), lens, target_starts, target_lens, prompt_starts)
        return {
            "x": split.prompt,
            "x_lens": split.prompt_lens,
            "y": split.target,
            "y_lens": split.target_lens,
            "prefix_lens": split.prefix_lens,
            "ids": list(ids),
            "num_frames": int((split.prompt_lens + split.target_lens).max()),
        }


class TextAudioDataset:
    """Turns recordings and what is said or played in them into a batch.

    Args:
        texts: of all cuts of the manifest.
        codes: of the same cuts, for prompts from neighbours; None: there are no such prompts.
        num_quantizers, codebook_size: what codes must be.
        seed: of what is drawn.
        prompt_frames: of a neighbour at most.
        infill_prob: share of rows with a gap to fill, of any length.
        times: when the symbols of all cuts are said.
    """

    def __init__(
        self,
        texts: PackedTexts,
        codes: PackedCodes | None,
        num_quantizers: int,
        codebook_size: int,
        seed: int,
        prompt_frames: int,
        infill_prob: float = 0.0,
        times: PackedTimes | None = None,
    ) -> None:
        _check_share("infill_prob", infill_prob)
        self.texts, self.codes, self.times = texts, codes, times
        self.num_quantizers, self.codebook_size = num_quantizers, codebook_size
        self.seed, self.prompt_frames = seed, prompt_frames
        self.infill_prob, self.drop_prompt_prob = infill_prob, 0.0

    def batch(
        self,
        ids: Sequence[str],
        codes: Sequence[np.ndarray],
        epoch: int,
        marks: Sequence[float] | None = None,
        cuts: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """A batch; what is drawn for a recording depends on its id, the epoch and the seed alone.

        Args:
            ids: B names.
            codes: B arrays (T, Q).
            epoch: number of the epoch.
            marks: not read here.
            cuts: B numbers in the manifest.
        """
        assert cuts is not None
        texts = [torch.from_numpy(self.texts[cut].astype(np.int64)) for cut in cuts]
        targets = [torch.from_numpy(row[:, : self.num_quantizers].astype(np.int64)) for row in codes]
        batch = {
            "x": pad_sequence(texts, batch_first=True),
            "x_lens": torch.tensor([len(row) for row in texts]),
            "y": pad_sequence(targets, batch_first=True),
            "y_lens": torch.tensor([len(row) for row in targets]),
            "ids": list(ids),
            "num_frames": max(len(row) for row in targets),
        }
        if self.times is not None:
            times = [torch.from_numpy(self.times[cut].astype(np.float32)) for cut in cuts]
            batch["x_times"] = pad_sequence(times, batch_first=True)
        if self.codes is not None:
            prompts = [self._neighbour(cut, name, epoch) for cut, name in zip(cuts, ids, strict=True)]
            batch["prompts"] = pad_sequence(prompts, batch_first=True)
            batch["prompts_lens"] = torch.tensor([len(row) for row in prompts])
        if self.infill_prob:
            sides = [self._sides(len(row), name, epoch) for row, name in zip(targets, ids, strict=True)]
            batch["prefix_lens"], batch["suffix_lens"] = torch.tensor(sides).unbind(1)
        return batch

    def _sides(self, frames: int, name: str, epoch: int) -> tuple[int, int]:
        """Frames before and behind a recording's gap; 0 and 0 if it has none."""
        # What is edited is a word or a whole clause: each length is as likely as any other.
        kept = 2 + int(uniform(f"gap {self.seed} {epoch} {name}") * (frames - 2))
        _, start, length = draw_split(frames, kept, self.infill_prob, 0.0, name, epoch, self.seed)
        behind = frames - start - length
        return (start, behind) if behind else (0, 0)

    def _neighbour(self, cut: int, name: str, epoch: int) -> torch.Tensor:
        """Some frames of another recording of the same reader or room; of this one, where there is no other."""
        assert self.codes is not None
        other = int(self.texts.neighbours[cut])
        rows = self.codes[other if other >= 0 else cut][:, : self.num_quantizers]
        frames = min(len(rows), self.prompt_frames)
        start = int(uniform(f"neighbour {self.seed} {epoch} {name}") * (len(rows) - frames + 1))
        return torch.from_numpy(rows[start : start + frames].astype(np.int64))


class CutBatches:
    """The engine's source of batches: cuts of similar duration together, up to `max_duration` seconds a batch.

    Args:
        manifest: cuts with codes.
        config: batching, filters, workers.
        dataset: makes a batch of codes.
        seed: of the order.
        training: shuffle, as the configuration says; validation keeps one order.
        accumulate_grad_steps: batches that a rank sums up in one training step.

    Attributes:
        seconds: of all cuts.
    """

    def __init__(
        self,
        manifest: Path,
        config: DataConfig,
        dataset: PromptTargetDataset | TextAudioDataset,
        seed: int,
        training: bool,
        accumulate_grad_steps: int = 1,
    ) -> None:
        for name, least in (("max_duration", 0.001), ("num_buckets", 1), ("num_workers", 0)):
            if not getattr(config, name) >= least:
                raise UserError(
                    f"--{name.replace('_', '-')} is {getattr(config, name)}, expected {least:g} or more"
                )
        self.config, self.dataset, self.seed = config, dataset, seed
        self.codes = open_packed(manifest, dataset.num_quantizers, dataset.codebook_size)
        low, high = config.filter_min_duration, config.filter_max_duration
        durations = self.codes.durations
        self.kept = np.flatnonzero((low <= durations) & (durations <= high))
        if not len(self.kept):
            raise UserError(
                f"'{manifest}': none of its {len(self.codes)} cuts lasts {low:g} to {high:g} s; "
                "change --filter-min-duration or --filter-max-duration"
            )
        self.frames = self.codes.frames[self.kept]
        if self.frames.min() < 2:
            name = self.codes.id(self.kept[self.frames.argmin()])
            raise UserError(f"cut '{name}': 1 frame cannot be split; raise --filter-min-duration")
        if (
            isinstance(dataset, PromptTargetDataset) and dataset.rule.in_seconds
        ):  # what does not fit is said now, not in the middle of an epoch
            for cut, frames in zip(self.kept.tolist(), self.frames.tolist(), strict=True):
                dataset.rule.frames(frames, self.codes.id(cut), float(self.codes.prompt_durations[cut]))
        self.plan = BatchPlan(
            durations[self.kept],
            config.max_duration,
            config.num_buckets if config.bucketing_sampler else 0,
            shuffle=training and config.shuffle,
            drop_last=training and config.drop_last,
            seed=seed,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            accumulate_grad_steps=accumulate_grad_steps if training else 1,
        )
        self._planned: tuple[int, EpochPlan] | None = None
        self.seconds = float(self.plan.durations.sum())
        log.info(
            "%s: %d of %d cuts, %.2f h; %d batches an epoch, %.1f %% of their frames padding",
            *(manifest.name, len(self.kept), len(self.codes), self.seconds / 3600),
            *(len(self._epoch_plan(1).starts) - 1, 100 * self.padding_share(1)),
        )

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[dict[str, Any]]:
        """The batches of one epoch from number `skip` on; the same for the same epoch and seed."""
        loader = DataLoader(
            _Batches(self.codes, self.kept, self.dataset, epoch),
            sampler=_From(self._epoch_plan(epoch), skip),
            batch_size=None,
            num_workers=self.config.num_workers,
            worker_init_fn=leave_to_parent,
            pin_memory=torch.cuda.is_available(),
            # Its own generator: a loader would else draw from the stream that dropout uses, and a resumed training,
            # which makes one loader more, would go another way.
            generator=torch.Generator().manual_seed(self.seed),
        )
        return iter(loader)

    def num_batches(self, epoch: int) -> int:
        """Batches of this rank, and of every other, in an epoch."""
        return len(self._epoch_plan(epoch))

    def padding_share(self, epoch: int) -> float:
        """Part of the frames of an epoch's batches that is padding, 0 to 1."""
        return 1.0 - float(self.frames.sum() / self._epoch_plan(epoch).padded(self.frames).sum())

    def largest(self, epoch: int, max_duration: float | None = None) -> dict[str, Any]:
        """The batch of an epoch, of all ranks, that has most frames with padding; no other is read.

        No prompt is dropped in it: it is as large as any batch can be.

        Args:
            epoch: number of the epoch.
            max_duration: as if `--max-duration` were so many seconds (default: as it is).
        """
        plan = self._epoch_plan(epoch)
        if max_duration is not None:
            plan = replace(self.plan, max_duration=max_duration).epoch(epoch)
        cuts = plan.cuts(int(plan.padded(self.frames).argmax()))
        dataset = copy.copy(self.dataset)
        dataset.drop_prompt_prob = 0.0
        if isinstance(dataset, TextAudioDataset):
            dataset.infill_prob = 0.0  # a row with a gap has no prompt from elsewhere
        return _Batches(self.codes, self.kept, dataset, epoch)[PlannedBatch(cuts, False)]

    def _epoch_plan(self, epoch: int) -> EpochPlan:
        if self._planned is None or self._planned[0] != epoch:
            plan = self.plan.epoch(epoch)
            if not len(plan):
                raise UserError(
                    f"--drop-last leaves no batch: {len(plan.starts) - 1} an epoch, but a step takes "
                    f"{self.plan.group_size}; lower --max-duration or --accumulate-grad-steps"
                )
            self._planned = (epoch, plan)
        return self._planned[1]


class _Batches(Dataset):
    """Planned batches -> batches. All that decides about one comes with the request, so any worker makes the same."""

    def __init__(
        self,
        codes: PackedCodes,
        kept: np.ndarray,
        dataset: PromptTargetDataset | TextAudioDataset,
        epoch: int,
    ) -> None:
        self.codes, self.kept, self.dataset, self.epoch = codes, kept, dataset, epoch

    def __getitem__(self, planned: PlannedBatch) -> dict[str, Any]:
        cuts = self.kept[planned.cuts].tolist()
        ids, rows = [self.codes.id(cut) for cut in cuts], [self.codes[cut] for cut in cuts]
        marks = self.codes.prompt_durations[cuts].tolist()
        return {**self.dataset.batch(ids, rows, self.epoch, marks, cuts), "filler": planned.filler}


class _From:
    """The sampler of a loader: a plan's batches from number `skip` on."""

    def __init__(self, plan: EpochPlan, skip: int) -> None:
        self.plan, self.skip = plan, skip

    def __iter__(self) -> Iterator[PlannedBatch]:
        return (self.plan[number] for number in range(self.skip, len(self.plan)))

    def __len__(self) -> int:
        return max(0, len(self.plan) - self.skip)
