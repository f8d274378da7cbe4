"""Which of two evaluations is better: known differences, noise, and what cannot be compared."""

import copy
import json

import numpy as np
import pytest

from valle.bin.evaluate import compare_and_print
from valle.evaluation.compare import compare, read_results
from valle.evaluation.summary import format_comparison
from valle.utils.errors import UserError


def results(cuts: int = 20, seed: int = 0, loss: float = 0.0, wer: float = 0.0, noise: float = 0.05) -> dict:
    """Cuts of very different difficulty; `loss` and `wer` are what a model adds to them, `noise` its own spread."""
    hard = np.random.default_rng(7).normal(4, 1, size=cuts)
    own = np.random.default_rng(seed).normal(0, noise, size=(cuts, 4))
    ids = [f"cut-{n}" for n in range(cuts)]
    info = {"metric": {"task": "speech", "keys": {"wer": "lower", "similar": "higher"}}}
    info["generation"] = {"task": "generation", "keys": {"repetition": "recording"}}
    table = {}
    for n, name in enumerate(ids):
        table[name] = {"recording": {"generation": {"repetition": 0.5}}}
        for j in range(2):
            figures = {"wer": hard[n] / 10 + wer + own[n, j], "similar": hard[n] / 10 - wer + own[n, j]}
            table[name][f"model-{j}"] = {"metric": figures, "generation": {"repetition": 0.5 + wer}}
    return {
        "prompt": "40% of it", "seeds": [42, 43], "metric_info": info, "clips_table": table,
        "codec": {"fingerprint": "f00d", "sample_rate": 8000, "frame_rate": 50.0},
        "generation": {"prompt_seconds": 3.0},
        "likelihood": [{"decoder": "ar"}, {"decoder": "nar"}],
        "per_cut": [
            {"id": name, "frames": 100 + n, "model": [hard[n] + own[n, 2], hard[n] + loss + own[n, 3]]}
            for n, name in enumerate(ids)
        ],
    }  # fmt: skip


def test_a_result_and_itself_cannot_be_told_apart():
    found = compare(results(), results())
    assert found.verdict == "cannot tell" and found.cuts == 20
    assert all(part["verdict"] == "cannot tell" for part in found.figures.values())
    assert found.figures["bits per second"]["difference"]["mean"] == 0


def test_pairing_finds_a_difference_much_smaller_than_the_cuts_differ():
    a, b = results(seed=1), results(seed=2, loss=0.2)
    found = compare(a, b)
    part = found.figures["loss, quantizer 1 (NAR)"]
    assert (
        part["verdict"] == "worse"
        and 0.1 < part["difference"]["low"] < 0.2 < part["difference"]["high"] < 0.3
    )
    assert part["b"]["low"] < part["a"]["high"]  # the intervals of the two overlap
    assert found.figures["loss, quantizer 0 (AR)"]["verdict"] == "cannot tell"
    assert found.verdict == "worse" and "quantizer 1 (NAR)" in found.reason
    back = compare(b, a)
    assert back.verdict == "better" and back.figures["bits per second"]["verdict"] == "better"
    assert "worse in" in format_comparison(found.figures)


def test_figures_of_continuations_know_which_way_is_better():
    found = compare(results(seed=1), results(seed=2, wer=-0.2)).figures
    assert found["metric: wer"]["verdict"] == "better" and found["metric: wer"]["difference"]["mean"] < 0
    assert (
        found["metric: similar"]["verdict"] == "better" and found["metric: similar"]["difference"]["mean"] > 0
    )
    # 0.3 is as wrong as 0.7 where the recording has 0.5
    assert found["generation: repetition, from the recording's"]["verdict"] == "worse"
    assert found["generation: repetition, from the recording's"]["difference"]["mean"] == pytest.approx(0.2)


def test_where_figures_disagree_the_likelihood_decides():
    a, b = results(seed=1), results(seed=2, loss=0.3, wer=-0.2)  # worse codes, fewer errors
    found = compare(a, b)
    assert (
        found.figures["metric: wer"]["verdict"] == "better"
        and found.figures["metric: similar"]["verdict"] == "better"
    )
    assert (
        found.verdict == "worse"
        and "bits per second decide" in found.reason
        and "metric: wer" in found.reason
    )
    assert compare(b, a).verdict == "better"
    alike = compare(a, results(seed=2, wer=-0.2))  # a recording's repetition is missed, errors are fewer
    assert alike.figures["bits per second"]["verdict"] == "cannot tell" and alike.verdict == "cannot tell"


def test_noise_seldom_has_a_verdict_on_the_whole():
    verdicts = [
        compare(results(seed=2 * n, noise=1), results(seed=2 * n + 1, noise=1)).verdict for n in range(8)
    ]
    assert verdicts.count("cannot tell") >= 7


def test_continuations_are_paired_by_seed_not_by_place():
    a, b = results(), results()
    b["seeds"] = [43, 42]
    for cut in b["clips_table"].values():
        cut["model-0"], cut["model-1"] = cut["model-1"], cut["model-0"]
    part = compare(a, b).figures["metric: wer"]
    assert part["difference"]["low"] == part["difference"]["high"] == 0


def test_distances_are_paired_by_what_is_left_out():
    def with_distance(shift: float, spread: float) -> dict:
        out = results()
        without = [5.0 + shift + spread * (-1) ** n for n in range(10)]
        interval = {"mean": 5.0 + shift, "low": 1.0, "high": 9.0, "count": 20}
        out["distances"] = {"mel": {"frechet": {"model": interval}}}
        out["distances_without"] = {"mel": {"frechet": {"model": without}}}
        return out

    found = compare(with_distance(0, 1.0), with_distance(0.5, 1.01)).figures["mel frechet"]
    assert found["verdict"] == "worse" and found["difference"]["low"] > 0.4
    assert (
        compare(with_distance(0, 1.0), with_distance(0.5, -1.0)).figures["mel frechet"]["verdict"]
        == "cannot tell"
    )


def test_what_cannot_be_compared_is_said():
    a, b = results(), results()
    b["codec"]["fingerprint"], b["generation"]["prompt_seconds"] = "beef", 5.0
    found = compare(a, b)
    assert not found.figures and found.verdict == "cannot tell"
    assert found.notes == [
        "likelihood: not compared, codec.fingerprint is 'f00d' in a and 'beef' in b",
        "generation: not compared, generation.prompt_seconds is 3.0 in a and 5.0 in b",
    ]
    b = results()
    for cut in b["per_cut"]:
        cut["id"] += "x"
    with pytest.raises(UserError, match="no held-out cut in common"):
        compare(a, b)
    b = results()
    b["per_cut"][3]["frames"] = 9
    with pytest.raises(UserError, match="cut 'cut-3' has 103 target frames in a and 9 in b"):
        compare(a, b)


def test_cuts_of_one_alone_are_left_out():
    a, b = results(), results(cuts=20)
    b = copy.deepcopy(b)
    b["per_cut"] = b["per_cut"][:12]
    found = compare(a, b)
    assert found.cuts == 12 and found.notes == ["8 cuts are in a alone and left out"]
    assert found.figures["bits per second"]["difference"]["count"] == 12


def test_one_cut_gives_no_verdict():
    found = compare(results(cuts=1), results(cuts=1, loss=5.0))
    assert found.verdict == "cannot tell" and found.figures["bits per second"]["difference"]["low"] is None


def test_the_command_prints_and_writes(tmp_path, capsys):
    for name, loss in (("a", 0.0), ("b", 0.5)):
        (tmp_path / f"{name}.json").write_text(json.dumps(results(loss=loss)))
    compare_and_print((str(tmp_path / "a.json"), str(tmp_path / "b.json")), str(tmp_path / "out"), True)
    assert "verdict on b: worse (of " in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["verdict"] == "worse"
    assert "quantizer 1 (NAR)" in (tmp_path / "out" / "comparison.html").read_text()


def test_files_that_are_no_results_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist; expected a results.json"):
        read_results(tmp_path / "none.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match="has no 'likelihood' and 'per_cut'"):
        read_results(tmp_path / "other.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_results(tmp_path / "broken.json")
