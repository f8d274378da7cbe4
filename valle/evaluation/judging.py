"""Every metric on every condition of every cut, then one table of means with intervals.

A cut is judged on what comes after its prompt. Where the words of that stretch are not known, as only the whole cut has
a transcript, what needs words is judged on the whole recording and its resynthesis, and not on continuations, which are
free to say something else.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from lhotse.cut import Cut

from valle.data.midi import Notes, crop, cut_notes
from valle.evaluation.clips import CONDITIONS, Clip, condition_of
from valle.evaluation.distances import frechet_distance, kernel_distance
from valle.evaluation.embeddings import EMBEDDINGS, Embedding
from valle.evaluation.metrics import METRICS, Case, Excerpt, Metric
from valle.evaluation.parts import Figures, Parts
from valle.evaluation.statistics import Interval, jackknife, jackknife_ci, nested_ci
from valle.utils.errors import UserError

log = logging.getLogger(__name__)

TASKS = (
    "likelihood", "generation", "codec", "quality", "similarity", "speech", "music", "distances",
)  # fmt: skip
ALIGNED = ("recording", "resynthesis", "unigram", "silence")  # conditions of the task "codec"
TRUE = ("recording", "resynthesis")
MIN_JUDGED_SECONDS = 0.5  # what is shorter says too little
COUNT_SILENCE = ("speech", "music")  # words and notes that are not there are errors, however short the audio
DISTANCES = {"frechet": frechet_distance, "kernel": kernel_distance}


@dataclass(frozen=True)
class Judges:
    """What is measured.

    Attributes:
        tasks: in the order of `TASKS`.
        metrics: name -> metric.
        embeddings: name -> embedding, for distances.
        left_out: name -> why it is not measured.
        silences: what a metric says of a second of silence.
    """

    tasks: tuple[str, ...]
    metrics: dict[str, Metric]
    embeddings: dict[str, Embedding]
    left_out: dict[str, str]
    silences: dict[str, dict[str, float | None]] = field(default_factory=dict)

    def of_silence(self, metric: Metric, audio: Excerpt, case: Case) -> dict[str, float | None]:
        """What a metric that hears the audio alone says of silence: the same for every cut, so heard once."""
        if metric.name not in self.silences:
            second = Excerpt(np.zeros((len(audio.wav), audio.sample_rate), np.float32), audio.sample_rate)
            self.silences[metric.name] = {key: _finite(value) for key, value in metric(second, case).items()}
        return self.silences[metric.name]


def choose_tasks(text: str, cuts: Iterable[Cut]) -> tuple[str, ...]:
    """`--tasks`: names with commas, `all`, or `auto`.

    `auto` is speech where cuts have words, and music where they have notes; then quality only where they have words.
    """
    if text == "all":
        return TASKS
    if text == "auto":
        cuts = list(cuts)
        words = any(part.text for cut in cuts for part in cut.supervisions)
        notes = any((cut.custom or {}).get("midi") for cut in cuts)
        # DNSMOS has heard speech alone: of a piano it prefers silence.
        there = {"speech": words, "music": notes, "quality": words or not notes}
        absent = {name for name, wanted in there.items() if not wanted}
        return tuple(task for task in TASKS if task not in absent)
    named = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [name for name in named if name not in TASKS]
    if unknown or not named:
        raise UserError(f"--tasks is '{text}', expected auto, all, or some of {','.join(TASKS)}")
    return tuple(task for task in TASKS if task in named)


def choose_judges(tasks: tuple[str, ...]) -> Judges:
    """The metrics and embeddings of the tasks that can run here; a warning for each that cannot."""
    metrics: dict[str, Metric] = {}
    embeddings: dict[str, Embedding] = {}
    left_out: dict[str, str] = {}
    for name, build in METRICS.items():
        metric = build()
        if metric.task in tasks and not _is_missing(name, metric, left_out):
            metrics[name] = metric
    if "distances" in tasks:
        for name, make in EMBEDDINGS.items():
            embedding = make()
            if not _is_missing(name, embedding, left_out):
                embeddings[name] = embedding
    return Judges(tasks, metrics, embeddings, left_out)


def _is_missing(name: str, judge: Metric | Embedding, left_out: dict[str, str]) -> bool:
    reason = judge.missing()
    if reason is None:
        return False
    if name not in left_out:  # a metric and an embedding may share a name, and what they need
        log.warning("%s is left out: %s", name, reason)
    left_out[name] = reason
    return True


@dataclass(frozen=True)
class Cases:
    """What is known of a cut: of the stretch after the prompt, and of all of it."""

    rest: Case
    whole: Case


def make_cases(cut: Cut, clip: Clip) -> Cases:
    """What the metrics may compare with.

    Args:
        cut: the held-out cut.
        clip: its audio.
    """
    truth = "recording" if "recording" in clip.wavs else "resynthesis"
    # Behind another cut as prompt comes all of this one.
    start = 0.0 if clip.prompt_id is not None else clip.boundary / clip.sample_rate
    spoken = [part for part in cut.supervisions if part.text]
    after = spoken and all(part.start >= start for part in spoken)
    language = next((part.language for part in cut.supervisions if part.language), None)
    notes: Notes | None = None
    if (cut.custom or {}).get("midi"):
        notes = cut_notes(cut)
    text = clip.text or None
    return Cases(
        rest=Case(
            cut.id, clip.excerpt(truth), clip.excerpt(truth, "prompt"), text if after else None, language,
            None if notes is None else crop(notes, start, cut.duration),
        ),
        whole=Case(cut.id, clip.excerpt(truth, "full"), None, text, language, notes),
    )  # fmt: skip


def judge_clip(clip: Clip, cases: Cases, judges: Judges, parts: Parts) -> Figures:
    """Every metric on every condition; what is known already is not measured again.

    Returns:
        condition -> metric -> key -> value, None where it has none.
    """
    figures = parts.figures()
    for name, metric in judges.metrics.items():
        whole = not metric.applies(cases.rest)
        case = cases.whole if whole else cases.rest
        if not metric.applies(case):
            continue
        for condition in clip.wavs:
            known = figures.setdefault(condition, {})
            if name in known or (whole and condition not in TRUE):
                continue
            if metric.task == "codec" and condition not in ALIGNED:
                continue
            audio = clip.excerpt(condition, "full" if whole else "continuation")
            if metric.task in COUNT_SILENCE:
                audio = _at_least(audio)
            known[name] = dict.fromkeys(metric.keys)
            if metric.task == "quality" and condition == "silence":
                known[name] |= judges.of_silence(metric, audio, case)
            elif _long_enough(audio):
                known[name] |= {key: _finite(value) for key, value in metric(audio, case).items()}
    parts.keep_figures(figures)
    return figures


def embed_clip(clip: Clip, judges: Judges, parts: Parts) -> dict[tuple[str, str], np.ndarray]:
    """(embedding, condition) -> (windows, D) of what comes after the prompt; what is known is not computed again."""
    rows = parts.embeddings()
    before = len(rows)
    for name, embedding in judges.embeddings.items():
        for condition in clip.wavs:
            audio = clip.excerpt(condition)
            if (name, condition) not in rows and _long_enough(audio):
                rows[name, condition] = np.asarray(embedding(audio), dtype=np.float32)
    if len(rows) > before:
        parts.keep_embeddings(rows)
    return rows


def metric_table(figures: Sequence[Figures], seed: int) -> dict[str, dict[str, dict[str, Interval]]]:
    """Metric -> key -> condition -> mean over cuts (and the model's seeds) with its interval.

    Args:
        figures: of each cut.
        seed: of the resampling.
    """
    values: dict[str, dict[str, dict[str, list[list[float]]]]] = {}
    for cut in figures:
        of_cut: dict[tuple[str, str, str], list[float]] = {}
        for condition, metrics in cut.items():
            for name, keys in metrics.items():
                for key, value in keys.items():
                    if value is not None:
                        of_cut.setdefault((name, key, condition_of(condition)), []).append(value)
        for (name, key, condition), found in of_cut.items():
            values.setdefault(name, {}).setdefault(key, {}).setdefault(condition, []).append(found)
    return {
        name: {
            key: {
                condition: nested_ci(conditions[condition], seed)
                for condition in CONDITIONS
                if condition in conditions
            }
            for key, conditions in keys.items()
        }
        for name, keys in sorted(values.items(), key=lambda item: _order(item[0]))
    }


def _order(name: str) -> int:
    return list(METRICS).index(name) if name in METRICS else -1


def distance_table(
    embeddings: Sequence[Mapping[tuple[str, str], np.ndarray]],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """How far the sounds of each condition, all cuts together, are from the recordings'.

    Args:
        embeddings: of each cut, (embedding, condition) -> (windows, D).

    Returns:
        embedding -> distance -> condition -> Interval, and the same with the values without each group of cuts.
    """
    table: dict[str, Any] = {}
    without: dict[str, Any] = {}
    for name in dict.fromkeys(name for cut in embeddings for name, _ in cut):
        cuts = [
            {condition: rows for (other, condition), rows in cut.items() if other == name and len(rows)}
            for cut in embeddings
        ]
        truth = "recording" if any("recording" in cut for cut in cuts) else "resynthesis"
        # A cut counts with all it has: where the model said nothing, its recording still counts.
        cuts = [cut for cut in cuts if truth in cut]
        there = dict.fromkeys(condition for cut in cuts for condition in cut)
        for condition in CONDITIONS:
            variants = [variant for variant in there if condition_of(variant) == condition]
            if condition == truth or not variants:
                continue
            for kind, distance in DISTANCES.items():
                whole, parts = jackknife(partial(_distance, cuts, truth, variants, distance), len(cuts))
                if not math.isfinite(whole):
                    continue
                parts = parts if all(map(math.isfinite, parts)) else []
                interval = jackknife_ci(whole, parts, len(cuts))
                table.setdefault(name, {}).setdefault(kind, {})[condition] = interval
                without.setdefault(name, {}).setdefault(kind, {})[condition] = parts
    return table, without


def _distance(
    cuts: Sequence[Mapping[str, np.ndarray]],
    truth: str,
    variants: Sequence[str],
    distance: Callable[[np.ndarray, np.ndarray], float],
    rows: Sequence[int],
) -> float:
    """Of some cuts; mean over the seeds, as a distance depends on the size of its sets. NaN without windows."""
    real = np.concatenate([cuts[row][truth] for row in rows])
    values = []
    for variant in variants:
        made = [cuts[row][variant] for row in rows if variant in cuts[row]]
        if min(len(real), sum(map(len, made))) < 2:
            return math.nan
        values.append(distance(real, np.concatenate(made)))
    return sum(values) / len(values)


def _long_enough(audio: Excerpt) -> bool:
    return audio.wav.shape[-1] >= MIN_JUDGED_SECONDS * audio.sample_rate


def _at_least(audio: Excerpt) -> Excerpt:
    """With silence behind it, as long as is judged."""
    missing = math.ceil(MIN_JUDGED_SECONDS * audio.sample_rate) - audio.wav.shape[-1]
    return Excerpt(np.pad(audio.wav, ((0, 0), (0, max(0, missing)))), audio.sample_rate)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
