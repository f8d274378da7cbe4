"""From cuts to batches: codes read and checked, split into prompt and target, padded.

A batch is a dict: x (B, S, Q) and x_lens (B,) the prompts, y (B, T, Q) and y_lens (B,) the targets, prefix_lens (B,)
the frames of each prompt that stand before its target (fewer than x_lens where a gap is filled), ids (B strings).
"""

import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.dataset.sampling import DynamicBucketingSampler, DynamicCutSampler
from torch.utils.data import DataLoader, Dataset

from valle.config import DataConfig
from valle.data.manifests import read_manifest
from valle.data.split import draw_split, drawn_ratio, parse_ratio_range, split_prompt_target
from valle.utils import distributed
from valle.utils.errors import UserError

log = logging.getLogger(__name__)
FALLBACK_CODEBOOK_SIZE = 2048  # EnCodec 32 kHz: manifests of older recipes do not name their codec


def load_codes(cut: Cut, num_quantizers: int | None = None, codebook_size: int | None = None) -> np.ndarray:
    """A cut's codec tokens.

    They are the custom array `audio_features`, or `cut.features` as older VALL-E recipes write them.

    Args:
        cut: with codes.
        num_quantizers: read the first so many (default: all).
        codebook_size: codes must be below it.

    Returns:
        (T, Q) int64.

    Raises:
        UserError: no codes, unreadable, too few quantizers, or codes out of range.
    """
    custom = getattr(cut, "custom", None) or {}
    try:
        if "audio_features" in custom:
            codes = np.asarray(cut.load_audio_features())
        elif cut.has_features:
            codes = np.asarray(cut.load_features())
        else:
            raise UserError(f"cut '{cut.id}' has no codes; run prepare.sh --stage 2")
    except (OSError, ValueError, AssertionError) as error:
        raise UserError(
            f"cut '{cut.id}': its codes cannot be read ({error}); run prepare.sh --stage 2"
        ) from error
    if codes.ndim != 2 or codes.shape[0] == 0:
        raise UserError(f"cut '{cut.id}': codes of shape {codes.shape}, expected (frames, quantizers)")
    if num_quantizers is not None:
        if codes.shape[1] < num_quantizers:
            raise UserError(
                f"cut '{cut.id}': {codes.shape[1]} quantizers, but {num_quantizers} are to be modelled; "
                "run prepare.sh --stage 2 again, or lower --num-quantizers"
            )
        codes = codes[:, :num_quantizers]
    if np.issubdtype(codes.dtype, np.floating) and not np.array_equal(codes, np.round(codes)):
        raise UserError(f"cut '{cut.id}': its features are no codec tokens (they have fractions)")
    codes = codes.astype(np.int64)
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or (codebook_size is not None and high >= codebook_size):
        raise UserError(
            f"cut '{cut.id}': codes from {low} to {high}, expected 0 to {(codebook_size or 65536) - 1}; "
            "were they made with another codec?"
        )
    return codes


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
        quantizers = load_codes(next(iter(read_manifest(cuts)))).shape[1]
        log.warning(
            "'%s' has no codec.json; taking %d quantizers x %d codes",
            manifest_dir,
            quantizers,
            FALLBACK_CODEBOOK_SIZE,
        )
        info = {"name": None, "num_quantizers": quantizers, "codebook_size": FALLBACK_CODEBOOK_SIZE}
    return info


class PromptTargetDataset(Dataset):
    """Turns a list of cuts into a batch.

    Args:
        config: prompt ratio and its range, shares of rows to fill in and of dropped prompts.
        num_quantizers, codebook_size: what codes must be.
        seed: of what is drawn.
        draw: whether rows are drawn (training), or all continue a prompt of the fixed ratio (validation).
    """

    def __init__(
        self, config: DataConfig, num_quantizers: int, codebook_size: int, seed: int, draw: bool
    ) -> None:
        self.num_quantizers, self.codebook_size, self.seed = num_quantizers, codebook_size, seed
        self.ratio = config.prompt_ratio
        if not 0 < self.ratio < 1:
            raise UserError(f"--prompt-ratio is {self.ratio}, expected more than 0 and less than 1")
        for name in ("infill_prob", "drop_prompt_prob"):
            if not 0 <= getattr(config, name) <= 1:
                raise UserError(
                    f"--{name.replace('_', '-')} is {getattr(config, name)}, expected a share from 0 to 1"
                )
        self.range = parse_ratio_range(config.prompt_ratio_range) if draw else None
        self.infill_prob = config.infill_prob if draw else 0.0
        self.drop_prompt_prob = config.drop_prompt_prob if draw else 0.0
        self.current_epoch = 0

    def __getitem__(self, cuts: CutSet) -> dict[str, Any]:
        rows, places, ids = [], [], []
        for cut in cuts:
            codes = load_codes(cut, self.num_quantizers, self.codebook_size)
            ratio = self.ratio
            if self.range is not None:
                ratio = drawn_ratio(*self.range, cut.id, self.current_epoch, self.seed)
            if len(codes) < 2:
                raise UserError(f"cut '{cut.id}': 1 frame cannot be split; raise --filter-min-duration")
            rows.append(torch.from_numpy(codes))
            places.append(
                draw_split(
                    len(codes), ratio, self.infill_prob, self.drop_prompt_prob,
                    cut.id, self.current_epoch, self.seed,
                )
            )  # fmt: skip
            ids.append(cut.id)
        lens = torch.tensor([len(row) for row in rows])
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        prompt_starts, target_starts, target_lens = torch.tensor(places).unbind(1)
        split = split_prompt_target(padded, lens, target_starts, target_lens, prompt_starts)
        return {
            "x": split.prompt,
            "x_lens": split.prompt_lens,
            "y": split.target,
            "y_lens": split.target_lens,
            "prefix_lens": split.prefix_lens,
            "ids": ids,
        }


class CutBatches:
    """The engine's source of batches: cuts of similar duration together, up to `max_duration` seconds a batch.

    Args:
        manifest: cuts with codes.
        config: batching, filters, workers.
        dataset: makes a batch of cuts.
        seed: of the order.
        training: shuffle, as the configuration says; validation keeps one order.
    """

    def __init__(
        self, manifest: Path, config: DataConfig, dataset: PromptTargetDataset, seed: int, training: bool
    ):
        self.config, self.dataset, self.seed = config, dataset, seed
        self.shuffle = training and config.shuffle
        self.drop_last = training and config.drop_last
        low, high = config.filter_min_duration, config.filter_max_duration
        every = read_manifest(manifest)
        self.cuts = [cut for cut in every if low <= cut.duration <= high]
        self.seconds = sum(cut.duration for cut in self.cuts)
        if not self.cuts:
            raise UserError(
                f"'{manifest}': none of its {len(every)} cuts lasts {low:g} to {high:g} s; "
                "change --filter-min-duration or --filter-max-duration"
            )
        log.info("%s: %d of %d cuts, %.2f h", manifest.name, len(self.cuts), len(every), self.seconds / 3600)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[dict[str, Any]]:
        """The batches of one epoch from number `skip` on; the same for the same epoch and seed."""
        sampler = self._sampler()
        sampler.set_epoch(epoch)
        self.dataset.current_epoch = epoch
        loader = DataLoader(
            self.dataset,
            sampler=_Skipping(sampler, skip),
            batch_size=None,
            num_workers=self.config.num_workers,
            # Its own generator: a loader would else draw from the stream that dropout uses, and a resumed training,
            # which makes one loader more, would go another way.
            generator=torch.Generator().manual_seed(self.seed),
        )
        return iter(loader)

    def _sampler(self) -> Any:
        # The cuts of a small corpus are in memory: lhotse's advice to read them lazily does not apply.
        warnings.filterwarnings("ignore", message=".*eagerly read CutSet.*", module="lhotse")
        common = dict(
            max_duration=self.config.max_duration,
            shuffle=self.shuffle,
            drop_last=self.drop_last,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            seed=self.seed,
        )
        cuts = CutSet.from_cuts(self.cuts).to_eager()
        if self.config.bucketing_sampler:
            # More buckets than cuts cannot be estimated.
            buckets = max(1, min(self.config.num_buckets, len(self.cuts) // 2))
            if buckets > 1:
                return DynamicBucketingSampler(
                    cuts, num_buckets=buckets, buffer_size=self.config.buffer_size, **common
                )
        return DynamicCutSampler(cuts, **common)


class _Skipping:
    """A sampler without its first batches; they are drawn, not loaded."""

    def __init__(self, sampler: Any, skip: int) -> None:
        self.sampler, self.skip = sampler, skip

    def __iter__(self) -> Iterator[CutSet]:
        # `yield from` would call iter() again, and lhotse's samplers begin anew at each iter().
        batches = iter(self.sampler)
        number = 0
        while (batch := next(batches, None)) is not None:
            if number >= self.skip:
                yield batch
            number += 1
