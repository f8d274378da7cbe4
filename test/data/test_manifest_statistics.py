"""Figures of manifests: hours, durations, speakers, use of the codes, within bounded memory."""

import random
import tracemalloc

import numpy as np
import pytest
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource

from valle.bin import display_manifest_statistics
from valle.data.statistics import (
    CodeCounts,
    CutSample,
    codebook_table,
    duration_table,
    entropy,
    measure_manifest,
)
from valle.utils.errors import UserError


def cut_of(name, duration, speaker=None, **custom):
    recording = Recording(
        name, [AudioSource("file", [0], f"{name}.wav")], 16000, int(duration * 16000), duration
    )
    spoken = [SupervisionSegment(name, name, 0.0, duration, speaker=speaker)] if speaker else []
    return MonoCut(name, 0.0, duration, 0, recording=recording, supervisions=spoken, custom=custom or None)


def write(path, cuts):
    with CutSet.open_writer(str(path)) as writer:
        for cut in cuts:
            writer.write(cut)
    return path


def rows_of(table, name):
    return [line.split() for line in table.splitlines() if line.startswith(name)]


def test_hours_and_percentiles_by_speaker_most_hours_first(tmp_path):
    cuts = [cut_of(f"a{n}", 3600.0 * (n + 1), "anna") for n in range(3)]
    cuts += [cut_of(f"b{n}", 7200.0, "bert") for n in range(9)]
    cuts += [cut_of(f"p{n}", 600.0, pianist="Clara Wieck") for n in range(2)] + [cut_of("x", 60.0)]
    statistics = measure_manifest(write(tmp_path / "m.jsonl", cuts), 5, 0)
    table = duration_table({"m": statistics})
    whole, *speakers = rows_of(table, "m ")
    assert whole == ["m", "all", "4", "15", "24.350", "60.00", "600.00", "7200.00", "7200.00", "10800.00"]
    assert [row[1] for row in speakers] == ["bert", "anna", "Clara", "-"]
    assert speakers[1] == ["m", "anna", "3", "6.000", "3600.00", "4320.00", "7200.00", "10080.00", "10800.00"]


def test_rows_for_speakers_are_capped_and_the_rest_is_summed(tmp_path):
    cuts = [cut_of(f"c{n}", 36.0 * (1 + n), f"speaker-{n}") for n in range(30)]
    statistics = measure_manifest(write(tmp_path / "m.jsonl", cuts), 0, 0)
    rows = rows_of(duration_table({"m": statistics}, max_speakers=4), "m ")
    assert [row[1] for row in rows] == ["all", "speaker-29", "speaker-28", "speaker-27", "speaker-26", "26"]
    assert rows[-1][2:5] == ["more", "26", f"{sum(range(1, 27)) / 100:.3f}"]


def test_a_sample_depends_on_ids_and_seed_alone():
    cuts = [cut_of(f"c{n}", 1.0) for n in range(500)]

    def drawn(size, seed, order):
        sample = CutSample(size, seed)
        for cut in order:
            sample.offer(cut)
        return [cut.id for cut in sample.cuts()]

    shuffled = random.Random(0).sample(cuts, 500)
    first = drawn(50, 1, cuts)
    assert first == drawn(50, 1, shuffled) != drawn(50, 2, cuts) and len(set(first)) == 50
    assert drawn(10, 1, cuts) == first[:10], "the first n are a sample of n"
    assert len(drawn(1000, 1, cuts)) == 500 and drawn(0, 1, cuts) == []
    assert 150 < np.mean([int(name[1:]) for name in first]) < 350, "from all over the manifest"


def test_codes_are_counted_over_the_sample_alone(tokenized):
    path = tokenized / "cuts_train.jsonl.gz"
    every, some = (measure_manifest(path, size, 3) for size in (24, 5))
    frames = [int(rows_of(codebook_table({"m": part}, 30), "m ")[0][3]) for part in (every, some)]
    assert [len(part.sample) for part in (every, some)] == [24, 5] and frames[0] > 3 * frames[1] > 0
    assert rows_of(codebook_table({"m": some}, 30), "m ")[0][2] == "5/24"
    assert codebook_table({"m": measure_manifest(path, 0, 3)}, 30) == ""


def test_counts_of_codes_are_right():
    counts = CodeCounts(4)
    counts.add(np.array([[0, 1], [0, 2]]))
    counts.add(np.array([[3, 1], [0, 0]]))
    assert [list(column) for column in counts.counts] == [[3, 0, 0, 1], [1, 2, 1, 0]]
    assert counts.frames == 4 and counts.used() == [2, 3]
    assert (
        counts.entropies()[1] == pytest.approx(entropy(np.array([1, 2, 1]))) == pytest.approx(1.5 * np.log(2))
    )


def test_memory_does_not_grow_with_the_manifest(tmp_path):
    """Eight times the cuts need little more memory: durations alone are kept."""

    def peak(count):
        path = write(tmp_path / f"{count}.jsonl", (cut_of(f"c{n}", 5.0, f"s{n % 7}") for n in range(count)))
        tracemalloc.start()
        statistics = measure_manifest(path, 10, 0)
        duration_table({"m": statistics})
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(100)  # what is imported and cached once
    assert peak(4000) - peak(500) < 3500 * 100, "bytes a cut; a cut itself has some thousand"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-speakers", "-1"], "--max-speakers is -1"),
        (["--max-code-cuts", "-2"], "--max-code-cuts is -2"),
        (["--manifest", "empty.jsonl"], "'empty.jsonl' holds no cut"),
    ],
)
def test_wrong_settings_are_named(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match=message):
        display_manifest_statistics.main(flags)


def test_printed_tables_name_the_manifests(tokenized, capsys):
    display_manifest_statistics.main(["--manifest-dir", str(tokenized), "--max-code-cuts", "2"])
    printed = capsys.readouterr().out
    assert all(f"cuts_{split}" in printed for split in ("train", "validation", "test")) and "2/24" in printed
