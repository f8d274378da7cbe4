"""The language models' trainings: from manifests and configuration to a running `Trainer`, stage after stage.

A task says what a model is trained on: `AudioTask` recordings and their continuation, `TextTask` text or notes and
their recordings. All else is the same for both.
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from valle.codecs import load_codec, matching_codec
from valle.config import DataConfig, ModelConfig, TrainConfig, ValleConfig, to_dict
from valle.data.checks import check_codec
from valle.data.dataset import CutBatches, PromptTargetDataset, TextAudioDataset, describe_codes
from valle.data.midi import MidiTokenizer, make_midi_tokenizer
from valle.data.packed import open_packed
from valle.data.packed_texts import CutNotes, CutSymbols, PackedTexts, TextSource, open_packed_texts
from valle.data.packed_times import PackedTimes, open_packed_times
from valle.data.split import settle_prompt
from valle.data.symbols import SymbolTable
from valle.data.text import load_text_tokenizer
from valle.engine import stages
from valle.engine.adapters import Adapters
from valle.engine.samples import ContinuationSamples, ReadingSamples, choose
from valle.engine.trainer import SampleMaker, Trainer
from valle.models import CodecLM, build_model
from valle.models.builder import DEFAULT_FRAME_RATE, PROMPT_SECONDS
from valle.utils import distributed
from valle.utils.errors import UserError
from valle.utils.log import setup_logger

log = logging.getLogger(__name__)


# What a checkpoint's `text` says of the clock: how long each symbol lasts, and what finds out when they are said.
CLOCK = ("symbol_frames", "aligner")


class Task(Protocol):
    """What a model is trained on.

    Attributes:
        manifests: begin of the manifests' names.
        text: what the model reads, for `build_model` and the checkpoint; None: nothing.
    """

    manifests: str
    text: dict[str, Any] | None

    def prepare(
        self, manifest: Path, codec: dict[str, Any], num_quantizers: int, begun: dict[str, Any] | None
    ) -> None:
        """Measure on the training cuts what a new model is to know of them, into `text`.

        Args:
            manifest: of the training cuts.
            codec: of their codes.
            num_quantizers: that are read of these.
            begun: the `text` of a training in the same folder that goes on.
        """

    def dataset(
        self, manifest: Path, codec: dict[str, Any], num_quantizers: int, seed: int, training: bool
    ) -> PromptTargetDataset | TextAudioDataset:
        """Makes the batches of a manifest."""

    def samples(self, codec: Any, source: CutBatches, places: Sequence[int], seed: int) -> SampleMaker:
        """Makes the audio that is listened to while training, of the cuts at `places` of the validation cuts."""


class AudioTask:
    """Recordings and their continuation: an AudioLM's.

    Args:
        data: with one way to decide about the prompt.
    """

    manifests = "cuts"
    text: dict[str, Any] | None = None

    def __init__(self, data: DataConfig) -> None:
        self.data = data

    def prepare(
        self, manifest: Path, codec: dict[str, Any], num_quantizers: int, begun: dict[str, Any] | None
    ) -> None:
        """See `Task`: nothing."""

    def dataset(
        self, manifest: Path, codec: dict[str, Any], num_quantizers: int, seed: int, training: bool
    ) -> PromptTargetDataset:
        """See `Task`."""
        return PromptTargetDataset(
            self.data, num_quantizers, int(codec["codebook_size"]), seed, training, codec.get("frame_rate")
        )

    def samples(self, codec: Any, source: CutBatches, places: Sequence[int], seed: int) -> SampleMaker:
        """See `Task`."""
        return ContinuationSamples(codec, _rows(source, places, codec.num_quantizers), seed=seed)


class TextTask:
    """Text or notes, and their recordings: a VALL-E's.

    Args:
        config: says what is read, and whether prompts come from neighbours.
        data: the manifests' folder, and the share of gaps to fill.
        text: what a fine-tuning's start reads, as its checkpoint says: then read so here too.

    Raises:
        UserError: no text symbols in the folder, or of another front end.
    """

    manifests = "utterances"

    def __init__(self, config: ValleConfig, data: DataConfig, text: dict[str, Any] | None = None) -> None:
        self.infill_prob = data.infill_prob
        self.neighbours = config.prefix_mode == 4
        self.source: TextSource
        if config.model_name == "midi-valle":
            self.source = CutNotes(make_midi_tokenizer(text["tokenizer"]) if text else MidiTokenizer())
        else:
            tokenizer, table = load_text_tokenizer(Path(data.manifest_dir))
            self.source = CutSymbols(table, tokenizer.config())
            if text and text.get("tokenizer") == tokenizer.config():  # else `check_text` tells
                table = SymbolTable(text["symbols"])
                self.source = CutSymbols(table, text["tokenizer"], bool(text.get("ends")), text["sizes"])
        self.text: dict[str, Any] | None = {
            **self.source.config(),
            "sizes": self.source.sizes,
            "field_dims": (text or {}).get("field_dims"),
            **{name: (text or {}).get(name) for name in CLOCK},
        }
        self.measures_clock = config.time_aligned and text is None and isinstance(self.source, CutSymbols)

    def prepare(
        self, manifest: Path, codec: dict[str, Any], num_quantizers: int, begun: dict[str, Any] | None
    ) -> None:
        """See `Task`: how long each symbol lasts, where text and audio are to share a clock."""
        assert self.text is not None
        self.training_manifest = manifest
        if begun is not None:  # weights that have learnt a clock, or none, keep it
            self.text |= {name: begun.get(name) for name in CLOCK}
        elif self.measures_clock:
            aligner = self._times(manifest, codec, num_quantizers).aligner()
            lasting = [round(float(frames), 2) for frames in aligner.frames[:-1]]
            self.text |= {"symbol_frames": lasting, "aligner": aligner.stored()}

    def _times(self, manifest: Path, codec: dict[str, Any], num_quantizers: int) -> PackedTimes:
        """When the symbols of a manifest are said, by what the training cuts teach."""
        size, symbols = int(codec["codebook_size"]), self.source.sizes
        assert isinstance(symbols, int)
        aligner = None
        if manifest != self.training_manifest:
            aligner = self._times(self.training_manifest, codec, num_quantizers).aligner()
        texts, codes = open_packed_texts(manifest, self.source), open_packed(manifest, num_quantizers, size)
        return open_packed_times(manifest, texts, codes, symbols, size, aligner)

    def dataset(
        self, manifest: Path, codec: dict[str, Any], num_quantizers: int, seed: int, training: bool
    ) -> TextAudioDataset:
        """See `Task`."""
        size = int(codec["codebook_size"])
        frames = round(PROMPT_SECONDS * float(codec.get("frame_rate") or DEFAULT_FRAME_RATE))
        codes = open_packed(manifest, num_quantizers, size) if self.neighbours else None
        texts = open_packed_texts(manifest, self.source)
        infill_prob = self.infill_prob if training else 0.0
        timed = self.text is not None and self.text["symbol_frames"] is not None
        times = self._times(manifest, codec, num_quantizers) if timed else None
        return TextAudioDataset(texts, codes, num_quantizers, size, seed, frames, infill_prob, times)

    def samples(self, codec: Any, source: CutBatches, places: Sequence[int], seed: int) -> SampleMaker:
        """See `Task`."""
        assert isinstance(source.dataset, TextAudioDataset)
        texts: PackedTexts = source.dataset.texts
        read = [torch.from_numpy(texts[source.kept[place]].astype("int64")) for place in places]
        return ReadingSamples(codec, _rows(source, places, codec.num_quantizers), read, seed=seed)


def _rows(source: CutBatches, places: Sequence[int], num_quantizers: int) -> list[torch.Tensor]:
    """(T, Q) codes of the cuts at `places`."""
    return [
        torch.from_numpy(source.codes[source.kept[place]][:, :num_quantizers].astype("int64"))
        for place in places
    ]


def make_task(config: ModelConfig, data: DataConfig, text: dict[str, Any] | None = None) -> Task:
    """The task of a model; `text` see `TextTask`."""
    if isinstance(config, ValleConfig):
        return TextTask(config, data, text)
    return AudioTask(data)


def train(model_config: ModelConfig, data: DataConfig, config: TrainConfig) -> dict[str, float]:
    """The stage, or the stages one after the other; returns the last validation's figures."""
    stages.check_flags(config)
    if config.train_stage != "auto":
        return train_stage(model_config, data, config)
    figures = train_stage(model_config, data, dataclasses.replace(config, train_stage=1))
    if model_config.num_quantizers == 1 or model_config.pattern != "valle":
        log.info("the AR decoder says all quantizers: there is no NAR decoder, and no stage 2")
        return figures
    return train_stage(model_config, data, dataclasses.replace(config, train_stage=2))


def train_stage(model_config: ModelConfig, data: DataConfig, config: TrainConfig) -> dict[str, float]:
    """One stage of the training; returns the last validation's figures."""
    data = settle_prompt(data)
    folder = Path(data.manifest_dir)
    if not folder.is_dir():
        raise UserError(f"--manifest-dir '{folder}' is not there; run the recipe's prepare.sh first")
    kind = (TextTask if isinstance(model_config, ValleConfig) else AudioTask).manifests
    manifests = [folder / f"{kind}_{split}.jsonl.gz" for split in ("train", "validation")]
    setup_logger(Path(config.exp_dir) / "log" / f"train-stage{config.train_stage}.log")
    codec = describe_codes(folder, manifests[0])
    start = stages.find_start(config)
    if start is not None:
        check_codec(start.contents["codec"], codec, start.path, folder)
        stages.take_architecture(model_config, start.path, start.contents, config.init_parts)
    task = make_task(model_config, data, None if start is None else start.contents.get("text"))
    if model_config.num_quantizers is None:
        model_config.num_quantizers = int(codec["num_quantizers"])
    if model_config.num_quantizers > int(codec["num_quantizers"]):
        raise UserError(
            f"--num-quantizers is {model_config.num_quantizers}, but the codes in '{folder}' have "
            f"{codec['num_quantizers']}; lower it, or run prepare.sh --stage 2 with another codec"
        )
    if start is not None:
        stages.check_text(start, task.text)
    begun = stages.find_begun(config) if start is None and task.text is not None else None
    read = None if begun is None else begun.contents.get("text") or {}
    task.prepare(manifests[0], codec, model_config.num_quantizers, read)
    torch.manual_seed(config.seed)
    model = build_model(model_config, int(codec["codebook_size"]), task.text, codec.get("frame_rate"))
    if model_config.codebook_embedding:
        start_embeddings(model, codec)
    trained: list[int] = []
    if start is not None and start.with_weights:
        trained = stages.load_parts(model, start.path, start.contents, config.init_parts)
    adapters = None
    if config.lora_rank > 0:
        adapters = Adapters(model, int(config.train_stage), config.lora_rank, config.lora_alpha)
    sources = []
    for manifest, training in zip(manifests, (True, False), strict=True):
        dataset = task.dataset(manifest, codec, model_config.num_quantizers, config.seed, training)
        sources.append(
            CutBatches(manifest, data, dataset, config.seed, training, config.accumulate_grad_steps)
        )
    samples = make_samples(task, config, codec, sources[1], model_config.num_quantizers)
    # From here on, each rank draws its own dropout.
    torch.manual_seed(config.seed + distributed.rank())
    parts = {"model": to_dict(model_config), "data": to_dict(data), "train": to_dict(config)}
    symbols = (task.text or {}).get("symbols", [])
    saved = {"config": parts, "codec": codec, "text_symbols": symbols, "stages": trained}
    if task.text is not None:
        saved["text"] = task.text
    trainer = Trainer(model, config, sources[0], sources[1], saved, samples, adapters)
    trainer.resume()
    return trainer.run()


def start_embeddings(model: CodecLM, info: dict[str, Any]) -> None:
    """Start the model's tables from the codec's vectors; where that cannot be, say so and go on with random ones."""
    reason = "its vectors do not add up"
    try:
        codec = load_codec(info["name"], num_quantizers=model.num_quantizers) if info.get("name") else None
        codebooks = codec.codebooks() if codec is not None else None
    except UserError as error:
        codebooks, reason = None, str(error)
    if codebooks is None:
        log.info("embeddings start at random: codec %s: %s", info.get("name"), reason)
    else:
        model.start_from_codebooks(codebooks)


def make_samples(
    task: Task, config: TrainConfig, info: dict[str, Any], valid: CutBatches, num_quantizers: int
) -> SampleMaker | None:
    """Audio of a few validation cuts every --sample-interval; where the codec is not at hand, say so and do without."""
    if not config.sample_interval:
        return None
    if config.parallel == "fsdp":
        log.warning("no audio samples: with --parallel fsdp, no process has the whole model")
        return None
    try:
        codec = matching_codec(info, num_quantizers=num_quantizers)
    except UserError as error:
        log.warning("no audio samples: %s", error)
        return None
    places = choose(valid.codes.durations[valid.kept].tolist(), config.seed)
    log.info("audio samples every %d steps of %s", config.sample_interval,
             ", ".join(valid.codes.id(valid.kept[place]) for place in places))  # fmt: skip
    return task.samples(codec, valid, places, config.seed)
