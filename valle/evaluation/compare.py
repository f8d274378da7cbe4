"""Is one model better than another? Two `results.json` of the same held-out cuts, figure by figure and in one word.

Differences are paired: loss by cut, figures of continuations by cut and seed, distances by the same groups of cuts left
out. What is true of all cuts alike, hard or easy, so cancels. A figure is better or worse where the 95 % interval of
its difference leaves out 0. Of many figures some will do so by chance; the verdict on the whole therefore counts only
those that still do when 5 % is the chance that any of them errs (Holm, Scandinavian Journal of Statistics 6, 1979).
Where these disagree, what all held-out codes together cost decides, if that is sure: it is a proper score of all that
a model says, where any other figure hears one side of it and may be won by a worse model, as noise is nearer to any
harmony than a wrong one.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from valle.evaluation.statistics import Interval, jackknife_ci, resampled_means
from valle.utils.errors import UserError

LEVEL = 0.95
NUM_SAMPLES = 10_000
SEED = 0
DECISIVE = "bits per second"
VERDICTS = ("better", "worse", "cannot tell")
# What must be equal for figures to be about the same task.
SAME = {
    "likelihood": ("prompt", "codec.fingerprint"),
    "generation": ("generation.prompt_seconds", "codec.sample_rate"),
}


@dataclass
class Comparison:
    """What is better in b than in a.

    Attributes:
        figures: name -> `a` and `b` (interval or None), `difference` (b - a, interval), `better` ("lower", "higher" or
            "recording"), `verdict` on b, and `chance`, the share of resamples against it (two-sided).
        verdict: on the whole.
        reason: in one line.
        cuts: that both have.
        notes: what could not be compared, and why.
    """

    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    verdict: str = "cannot tell"
    reason: str = ""
    cuts: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Pairs:
    """Values of a and b for each cut, one a seed."""

    name: str
    better: str
    a: list[list[float]]
    b: list[list[float]]
    weights: list[float] | None = None

    def differences(self) -> list[list[float]]:
        return [
            [y - x for x, y in zip(one, two, strict=True)] for one, two in zip(self.a, self.b, strict=True)
        ]


def read_results(path: str | Path) -> dict[str, Any]:
    """A `results.json`.

    Raises:
        UserError: it is not there, or no results of an evaluation.
    """
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"'{path}' does not exist; expected a results.json of evaluate.py") from error
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read as JSON: {error}") from error
    if not isinstance(results, dict) or "likelihood" not in results or "per_cut" not in results:
        raise UserError(f"'{path}' has no 'likelihood' and 'per_cut'; expected a results.json of evaluate.py")
    return results


def compare(a: dict[str, Any], b: dict[str, Any]) -> Comparison:
    """Compare two evaluations of the same held-out cuts.

    Args:
        a: the results that the others are held against.
        b: the results that the verdicts are about.

    Raises:
        UserError: they have no cuts in common, or the same cut with other codes.
    """
    found = Comparison()
    ids = {cut["id"] for cut in a["per_cut"]} & {cut["id"] for cut in b["per_cut"]}
    if not ids:
        raise UserError(
            "the two results have no held-out cut in common; evaluate both on the same --manifest"
        )
    found.cuts = len(ids)
    for name, part in (("a", a), ("b", b)):
        if len(part["per_cut"]) > len(ids):
            found.notes.append(f"{len(part['per_cut']) - len(ids)} cuts are in {name} alone and left out")
    chances: dict[str, float] = {}
    for pairs in _all_pairs(a, b, found.notes):
        _judge_pairs(pairs, found.figures, chances)
    for name, kind, condition_a, condition_b in _distances(a, b, found.notes):
        _judge_distances(f"{name} {kind}", condition_a, condition_b, found.figures, chances)
    _conclude(found, chances)
    return found


def _all_pairs(a: dict[str, Any], b: dict[str, Any], notes: list[str]) -> Iterator[_Pairs]:
    if _same(a, b, "likelihood", notes):
        yield from _likelihood_pairs(a, b, notes)
    if _same(a, b, "generation", notes):
        yield from _figure_pairs(a, b)


def _same(a: dict[str, Any], b: dict[str, Any], what: str, notes: list[str]) -> bool:
    for path in SAME[what]:
        values = [_dig(part, path.split(".")) for part in (a, b)]
        if values[0] != values[1]:
            notes.append(f"{what}: not compared, {path} is {values[0]!r} in a and {values[1]!r} in b")
            return False
    return True


def _dig(part: Any, path: Sequence[str]) -> Any:
    for key in path:
        part = part.get(key) if isinstance(part, dict) else None
    return part


def _likelihood_pairs(a: dict[str, Any], b: dict[str, Any], notes: list[str]) -> Iterator[_Pairs]:
    """Loss of each quantizer, and bits per second of audio where both have as many quantizers."""
    other = {cut["id"]: cut for cut in b["per_cut"]}
    rows = [(cut, other[cut["id"]]) for cut in a["per_cut"] if cut["id"] in other]
    for one, two in rows:
        if one["frames"] != two["frames"]:
            raise UserError(
                f"cut '{one['id']}' has {one['frames']} target frames in a and {two['frames']} in b; evaluate both "
                "on the same --manifest, with the same prompts"
            )
    sizes = [len(part["likelihood"]) for part in (a, b)]
    frames = [float(one["frames"]) for one, _ in rows]
    for quantizer in range(min(sizes)):
        losses = [[[cut["model"][quantizer]] for cut in side] for side in zip(*rows, strict=True)]
        decoder = a["likelihood"][quantizer]["decoder"].upper()
        yield _Pairs(f"loss, quantizer {quantizer} ({decoder})", "lower", losses[0], losses[1], frames)
    if sizes[0] != sizes[1]:
        notes.append(f"bits per second: not compared, {sizes[0]} quantizers in a and {sizes[1]} in b")
        return
    factor = a["codec"]["frame_rate"] / math.log(2)
    bits = [[[factor * sum(cut["model"])] for cut in side] for side in zip(*rows, strict=True)]
    yield _Pairs(DECISIVE, "lower", bits[0], bits[1], frames)


def _figure_pairs(a: dict[str, Any], b: dict[str, Any]) -> Iterator[_Pairs]:
    """Each metric's figures of the model's continuations, by cut and seed."""
    tables = [part.get("clips_table") or {} for part in (a, b)]
    infos = [part.get("metric_info") or {} for part in (a, b)]
    seeds = [part.get("seeds") or [] for part in (a, b)]
    shared = [seed for seed in seeds[0] if seed in seeds[1]]
    for name, info in infos[0].items():
        if name not in infos[1]:
            continue
        for key, better in info["keys"].items():
            values: list[list[list[float]]] = [[], []]
            for cut in tables[0]:
                if cut not in tables[1]:
                    continue
                sides = [
                    [_figure(table[cut], f"model-{own.index(seed)}", name, key, better) for seed in shared]
                    for table, own in zip(tables, seeds, strict=True)
                ]
                both = [(x, y) for x, y in zip(*sides, strict=True) if x is not None and y is not None]
                if both:
                    values[0].append([x for x, _ in both])
                    values[1].append([y for _, y in both])
            if values[0]:
                label = f"{key}, from the recording's" if better == "recording" else key
                way = "lower" if better == "recording" else better
                yield _Pairs(f"{name}: {label}", way, values[0], values[1])


def _figure(cut: dict[str, Any], condition: str, name: str, key: str, better: str) -> float | None:
    """A figure; where nearer to the recording's is better, how far it is from that."""
    value = _dig(cut, [condition, name, key])
    if better != "recording" or value is None:
        return value
    true = _dig(cut, ["recording", name, key])
    return None if true is None else abs(value - true)


def _judge_pairs(pairs: _Pairs, figures: dict[str, dict[str, Any]], chances: dict[str, float]) -> None:
    means = [resampled_means(values, SEED, pairs.weights) for values in (pairs.a, pairs.b)]
    changes = resampled_means(pairs.differences(), SEED, pairs.weights, NUM_SAMPLES)
    count = len(pairs.a)
    enough = count > 1
    sides = [
        _interval(_mean(values, pairs.weights), drawn if enough else None, count)
        for values, drawn in zip((pairs.a, pairs.b), means, strict=True)
    ]
    difference = _interval(_mean(pairs.differences(), pairs.weights), changes if enough else None, count)
    against = min(float((changes <= 0).mean()), float((changes >= 0).mean())) if enough else 1.0
    chances[pairs.name] = min(1.0, 2 * max(against, 1 / NUM_SAMPLES))
    figures[pairs.name] = _entry(sides[0], sides[1], difference, pairs.better, chances[pairs.name])


def _mean(values: list[list[float]], weights: list[float] | None) -> float:
    return float(np.average([np.mean(part) for part in values], weights=weights))


def _interval(mean: float, drawn: np.ndarray | None, count: int) -> Interval:
    if drawn is None:
        return Interval(mean, None, None, count)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(low), float(high), count)


def _distances(
    a: dict[str, Any], b: dict[str, Any], notes: list[str]
) -> Iterator[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """(embedding, kind, of a, of b) with the figure and the values without each group of cuts."""
    tables = [part.get("distances") or {} for part in (a, b)]
    if not all(tables) or not _same(a, b, "generation", []):
        return
    if list(a.get("clips_table", {})) != list(b.get("clips_table", {})):
        notes.append("distances: not compared, they are of other cuts in a than in b")
        return
    for name, kinds in tables[0].items():
        for kind in kinds:
            sides = [
                {"interval": _dig(part, ["distances", name, kind, "model"]),
                 "without": _dig(part, ["distances_without", name, kind, "model"])}
                for part in (a, b)
            ]  # fmt: skip
            if all(side["interval"] and side["without"] for side in sides):
                yield name, kind, sides[0], sides[1]


def _judge_distances(
    name: str,
    a: dict[str, Any],
    b: dict[str, Any],
    figures: dict[str, dict[str, Any]],
    chances: dict[str, float],
) -> None:
    if len(a["without"]) != len(b["without"]):
        return
    without = [y - x for x, y in zip(a["without"], b["without"], strict=True)]
    mean = b["interval"]["mean"] - a["interval"]["mean"]
    difference = jackknife_ci(mean, without, a["interval"]["count"])
    values = np.asarray(without)
    error = math.sqrt((len(values) - 1) / len(values) * np.square(values - values.mean()).sum())
    chances[name] = 1.0 if mean == 0 else math.erfc(abs(mean) / max(error, 1e-300) / math.sqrt(2))
    figures[name] = _entry(
        Interval(**a["interval"]), Interval(**b["interval"]), difference, "lower", chances[name]
    )


def _entry(a: Interval, b: Interval, difference: Interval, better: str, chance: float) -> dict[str, Any]:
    verdict = "cannot tell"
    if difference.low is not None and difference.high is not None:
        if difference.low > 0 or difference.high < 0:
            verdict = "better" if (difference.mean < 0) == (better == "lower") else "worse"
    parts = {"a": a, "b": b, "difference": difference}
    return {name: part.to_dict() for name, part in parts.items()} | {
        "better": better, "chance": chance, "verdict": verdict,
    }  # fmt: skip


def _conclude(found: Comparison, chances: dict[str, float]) -> None:
    """One verdict of many, by Holm's rule: the smallest chance must be below 5 % / m, the next below 5 % / (m - 1) …"""
    sure: dict[str, list[str]] = {"better": [], "worse": []}
    ranked = sorted(chances, key=lambda name: chances[name])
    for place, name in enumerate(ranked):
        verdict = found.figures[name]["verdict"]
        if chances[name] > (1 - LEVEL) / (len(ranked) - place) or verdict not in sure:
            break
        sure[verdict].append(name)
    counts = f"of {len(ranked)} figures, {len(sure['better'])} are surely better and {len(sure['worse'])} surely worse"
    if bool(sure["better"]) != bool(sure["worse"]):
        found.verdict = "better" if sure["better"] else "worse"
        found.reason = f"{counts}: {', '.join(sure[found.verdict])}"
    elif sure["better"]:
        found.reason = f"{counts}: better {', '.join(sure['better'])}; worse {', '.join(sure['worse'])}"
        decisive = [verdict for verdict, names in sure.items() if DECISIVE in names]
        if decisive:
            found.verdict = decisive[0]
            found.reason += f"; where they disagree, {DECISIVE} decide"
    else:
        found.reason = counts
