"""Notes heard in audio that is made here from known notes, and F1 of notes counted by hand."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from valle.data.midi import Notes, make_notes
from valle.evaluation import music
from valle.evaluation.metrics import METRICS, Case, Excerpt
from valle.evaluation.music import (
    MOST_OCTAVES,
    NoteF1,
    NoteProfile,
    note_f1,
    note_profile,
    note_spans,
    transcribe,
)
from valle.utils.errors import UserError

RATE = 16000
MAPS = Path(__file__).resolve().parents[3] / "shared" / "data" / "maps"


def melody(seconds: float, seed: int = 0) -> Notes:
    """A note every 0.4 s and a third above every other, all of 0.35 s."""
    generator = np.random.default_rng(seed)
    onset = np.arange(0.3, seconds - 0.5, 0.4)
    pitch = generator.integers(52, 76, len(onset))
    onset, pitch = np.concatenate([onset, onset[::2]]), np.concatenate([pitch, pitch[::2] + 4])
    return make_notes(onset, onset + 0.35, pitch, generator.integers(40, 120, len(onset)))


def plucked(notes: Notes, seconds: float, shift: float = 0.0, semitones: float = 0.0) -> Excerpt:
    """Notes as decaying tones of six harmonics, that stop within 20 ms at their offset."""
    wav = np.zeros(round(seconds * RATE))
    columns = (notes.onset + shift, notes.offset + shift, notes.pitch + semitones, notes.velocity)
    for onset, offset, pitch, velocity in zip(*columns, strict=True):
        first = round(onset * RATE)
        time = np.arange(min(round((offset + 0.02) * RATE), len(wav)) - first) / RATE
        envelope = np.clip((offset + 0.02 - onset - time) / 0.02, 0, 1) * np.clip(time / 0.004, 0, 1)
        pitch_hz = 440 * 2 ** ((pitch - 69) / 12)
        # Upper harmonics are softer and die away faster, as on a string; else the network hears octaves.
        tone = sum(
            np.exp(-2 * h * time) * np.sin(2 * np.pi * h * pitch_hz * time) / h**2 for h in range(1, 7)
        )
        wav[first : first + len(time)] += 0.15 * (velocity / 127) ** 2 * envelope * tone
    return Excerpt(wav[None].astype(np.float32), RATE)


def case_of(reference: Excerpt, notes: Notes | None = None, text: str | None = None) -> Case:
    return Case("cut", reference, None, text=text, notes=notes)


def test_notes_are_heard_where_they_are():
    notes = melody(24.0)  # several windows of the network
    heard = transcribe(plucked(notes, 24.0))
    score = note_f1(notes, heard)
    assert score["onset_f1"] > 0.9 and score["offset_f1"] > 0.5
    errors = []
    for onset, pitch in zip(notes.onset, notes.pitch, strict=True):
        same = heard.onset[heard.pitch == pitch]
        if len(same) and np.abs(same - onset).min() < 0.1:
            errors.append(same[np.abs(same - onset).argmin()] - onset)
    assert abs(np.median(errors[:20])) < 0.015 and abs(np.median(errors[-20:])) < 0.015  # no drift
    assert len(heard.pedal) == 0 and heard.velocity.min() >= 1 and heard.velocity.max() <= 127


def test_louder_notes_get_higher_velocities():
    onset = np.arange(12) * 0.8 + 0.3
    loud = np.tile([40, 110], 6)
    heard = transcribe(plucked(make_notes(onset, onset + 0.6, np.full(12, 60), loud), 10.0))
    assert len(heard) == 12
    assert heard.velocity[1::2].min() > heard.velocity[::2].max() + 20


def test_any_rate_and_any_channels_give_the_same_notes():
    audio = plucked(melody(4.0), 4.0)
    heard = transcribe(audio)
    stereo = transcribe(Excerpt(np.repeat(audio.wav, 2, axis=0), RATE))
    np.testing.assert_array_equal(stereo.onset, heard.onset)
    from valle.utils.audio import convert_audio

    other = transcribe(Excerpt(convert_audio(audio.wav, RATE, 44100, 2), 44100))
    assert note_f1(heard, other)["onset_f1"] > 0.95


@pytest.mark.parametrize("samples", [0, 1, 300, 5 * RATE])
def test_silence_has_no_notes(samples):
    silence = Excerpt(np.zeros((1, samples), np.float32), RATE)
    assert len(transcribe(silence)) == 0
    played = case_of(plucked(melody(3.0), 3.0))
    assert NoteF1()(silence, played) == {"onset_f1": 0.0, "offset_f1": 0.0, "velocity_f1": 0.0}
    assert NoteProfile()(silence, played) == {
        "pitch_class_overlap": 0.0,
        "pitch_overlap": 0.0,
        "ioi_overlap": 0.0,
        "density_error": MOST_OCTAVES,
    }
    # of silence nothing can be repeated
    assert set(NoteF1()(played.reference, case_of(silence)).values()) == {None}
    assert set(NoteProfile()(played.reference, case_of(silence)).values()) == {None}


def test_identical_audio_is_perfect_and_damage_costs():
    notes = melody(8.0)
    true = plucked(notes, 8.0)
    case, metric = case_of(true), NoteF1()
    assert metric(true, case) == pytest.approx({"onset_f1": 1.0, "offset_f1": 1.0, "velocity_f1": 1.0})

    def onsets(audio: Excerpt) -> float:
        return metric(audio, case)["onset_f1"]

    assert onsets(plucked(notes, 8.0, shift=0.02)) > 0.95  # within the tolerance
    assert onsets(plucked(notes, 8.0, shift=0.12)) < 0.2
    assert onsets(plucked(notes, 8.0, semitones=1.0)) < 0.2
    half = onsets(Excerpt(true.wav[:, : 4 * RATE], RATE))
    assert half == pytest.approx(2 / 3, abs=0.06)  # all precision, half of the recall
    noise = np.random.default_rng(0).standard_normal(true.wav.shape).astype(np.float32)
    noisy = [onsets(Excerpt(true.wav + level * noise, RATE)) for level in (0.0, 0.03, 0.3)]
    assert noisy[0] > noisy[1] > noisy[2]


def test_kind_of_notes_outlasts_a_shift_in_time_but_not_in_pitch():
    notes = melody(8.0)
    case, metric = case_of(plucked(notes, 8.0)), NoteProfile()
    same = metric(case.reference, case)
    assert same == pytest.approx(
        {"pitch_class_overlap": 1.0, "pitch_overlap": 1.0, "ioi_overlap": 1.0, "density_error": 0.0}
    )
    later = metric(plucked(notes, 8.0, shift=0.12), case)
    assert later["pitch_class_overlap"] > 0.9 and later["ioi_overlap"] > 0.9 and later["density_error"] < 0.15
    higher = metric(plucked(notes, 8.0, semitones=13.0), case)
    assert higher["pitch_class_overlap"] < 0.8 and higher["pitch_overlap"] < 0.6
    # half of it, in half of the time, is as dense
    assert metric(Excerpt(case.reference.wav[:, : 4 * RATE], RATE), case)["density_error"] < 0.3


def test_known_notes_are_taken_before_heard_ones():
    notes = melody(6.0)
    audio = plucked(notes, 6.0)
    wrong = make_notes(notes.onset, notes.offset, notes.pitch + 1, notes.velocity)
    metric = NoteF1()
    assert metric(audio, case_of(audio, notes))["onset_f1"] > 0.9
    assert metric(audio, case_of(audio, wrong))["onset_f1"] < 0.2
    assert metric(audio, case_of(audio))["onset_f1"] == 1.0


def test_f1_by_hand():
    true = make_notes([0.0, 1.0, 2.0, 3.0], [0.5, 1.5, 2.5, 3.5], [60, 62, 64, 65], [40, 60, 80, 100])
    # one right, one 60 ms late, one with a late offset, one of another key, and one too many
    found = make_notes(
        [0.0, 1.06, 2.0, 3.0, 3.0], [0.5, 1.5, 2.8, 3.5, 3.5], [60, 62, 64, 66, 80], [20, 30, 40, 50, 50]
    )
    score = note_f1(true, found)
    assert score["onset_f1"] == pytest.approx(2 * 2 / (4 + 5))
    assert score["offset_f1"] == pytest.approx(2 * 1 / (4 + 5))
    # velocities at half the scale are right; one that breaks the order is not
    quiet = make_notes(true.onset, true.offset, true.pitch, true.velocity // 2)
    assert note_f1(true, quiet)["velocity_f1"] == pytest.approx(1.0)
    uneven = make_notes(true.onset, true.offset, true.pitch, [100, 20, 100, 20])
    assert note_f1(true, uneven)["offset_f1"] == 1.0
    assert note_f1(true, uneven)["velocity_f1"] < 0.5
    assert set(note_f1(true, make_notes([], [], [], [])).values()) == {0.0}
    assert set(note_f1(make_notes([], [], [], []), true).values()) == {None}


def test_the_pedal_lengthens_reference_notes():
    keys = make_notes([0.0], [0.2], [60], [80], pedal=[(0.1, 2.0)])
    assert note_f1(keys, make_notes([0.0], [2.0], [60], [80]))["offset_f1"] == 1.0
    assert note_f1(keys, make_notes([0.0], [0.2], [60], [80]))["offset_f1"] == 0.0
    assert (
        note_f1(make_notes([0.5], [0.5], [60], [80]), make_notes([0.5], [0.5], [60], [80]))["onset_f1"] == 1.0
    )


def test_profile_by_hand():
    true = make_notes([0.0, 1.0, 2.0, 3.0], [0.5, 1.5, 2.5, 3.5], [60, 60, 64, 67], [80] * 4)
    other = make_notes([0.0, 1.0], [0.5, 1.5], [60, 72], [80] * 2)
    figures = note_profile(true, other, 4.0, 4.0)
    assert figures["pitch_class_overlap"] == pytest.approx(0.5)  # C is half of the one and all of the other
    assert figures["pitch_overlap"] == pytest.approx(0.5)  # 60 to 63 is half of both
    assert figures["ioi_overlap"] == pytest.approx(1.0)
    assert figures["density_error"] == pytest.approx(1.0)  # an octave fewer
    assert note_profile(true, other, 4.0, 2.0)["density_error"] == pytest.approx(0.0)
    chord = make_notes([0.0, 0.01], [1.0, 1.0], [60, 64], [80, 80])
    assert note_profile(chord, true, 1.0, 4.0)["ioi_overlap"] is None


def test_maps_become_notes():
    sounding, beginning = np.zeros((60, 88)), np.zeros((60, 88))
    beginning[10, 39], sounding[11:30, 39] = 0.9, 0.8  # key 60, heard from the frame after its onset
    sounding[15:18, 39] = 0.1  # a gap of three frames does not end it
    beginning[40, 39], sounding[40:46, 39], sounding[52:58, 39] = 0.7, 0.5, 0.5  # one of six does
    beginning[20, 50], sounding[20:40, 50] = 0.5, 0.9  # too weak an onset
    beginning[20, 60], sounding[20:23, 60] = 0.9, 0.9  # too short
    beginning[20, 70] = 0.9  # never heard
    beginning[5, 0], beginning[9, 0], sounding[5:20, 0] = (
        0.8,
        0.7,
        0.9,
    )  # struck again: SHORTEST is not reached
    beginning[30, 87], beginning[31, 87], sounding[30:60, 87] = 0.8, 0.9, 0.9  # one peak; to the end
    assert note_spans(sounding, beginning).tolist() == [
        [9, 20, 21],
        [10, 30, 60],
        [40, 46, 60],
        [31, 60, 108],
    ]
    assert note_spans(sounding[:0], beginning[:0]).shape == (0, 3)


@pytest.mark.parametrize(("level", "late", "kept"), [(0.4, 0, False), (0.4, 5, True), (0.75, 0, True)])
def test_a_faint_octave_struck_with_a_note_is_its_overtone(level, late, kept):
    sounding, beginning = np.zeros((60, 88)), np.zeros((60, 88))
    beginning[10, 39], sounding[10:40, 39] = 0.9, 0.9
    beginning[10 + late, 51], sounding[10 + late : 40, 51] = 0.9, level
    assert (72 in note_spans(sounding, beginning)[:, 2]) == kept
    assert 60 in note_spans(sounding, beginning)[:, 2]


def test_which_cases_it_applies_to():
    audio = plucked(melody(1.0), 1.0)
    for metric in (METRICS["notes"](), METRICS["note_profile"]()):
        assert metric.task == "music" and metric.missing() is None
        assert metric.applies(case_of(audio)) and metric.applies(case_of(audio, melody(1.0)))
        assert not metric.applies(case_of(audio, text="spoken words"))
        assert set(metric(audio, case_of(audio))) == set(metric.keys)


def test_missing_weights_are_one_clear_line(monkeypatch):
    find = music.importlib.util.find_spec
    monkeypatch.setattr(
        music.importlib.util, "find_spec", lambda name: None if name == "basic_pitch" else find(name)
    )
    assert "pip install --no-deps basic-pitch" in NoteF1().missing()
    assert "\n" not in NoteF1().missing()
    music._session.cache_clear()
    with pytest.raises(UserError, match="basic-pitch"):
        transcribe(Excerpt(np.full((1, RATE), 0.1, np.float32), RATE))


@pytest.mark.skipif(not MAPS.is_dir(), reason="no recordings in ../shared/data/maps")
def test_a_real_piano_is_heard():
    scores = []
    for name in ("MUS-bk_xmas4_ENSTDkCl", "MUS-scn15_12_ENSTDkCl", "MUS-chpn_op7_1_ENSTDkAm"):
        wav, rate = soundfile.read(MAPS / f"MAPS_{name}.flac", frames=16000 * 15, dtype="float32")
        table = np.loadtxt(MAPS / f"MAPS_{name}.tsv", skiprows=1)
        onset, offset, pitch, velocity = table[table[:, 0] < 15.0].T
        scores.append(
            note_f1(make_notes(onset, offset, pitch, velocity), transcribe(Excerpt(wav[None], rate)))
        )
    assert np.mean([score["onset_f1"] for score in scores]) > 0.65
    assert np.mean([score["offset_f1"] for score in scores]) > 0.2
