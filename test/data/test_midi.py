"""MIDI front end: what a file says and what it does not, time in seconds, tokens that come back as notes."""

import random
import time
from pathlib import Path

import numpy as np
import pytest
from lhotse import MonoCut

from valle.data.midi import (
    BOS,
    EOS,
    FIELDS,
    NUM_SPECIAL,
    BeatTokenizer,
    MidiTokenizer,
    Notes,
    crop,
    cut_notes,
    make_midi_tokenizer,
    make_notes,
    read_notes,
    sustained,
    write_notes,
)
from valle.utils.errors import UserError

pytest.importorskip("symusic")
ASAP = Path(__file__).resolve().parents[3] / "shared" / "data" / "asap"


def _number(value: int) -> bytes:
    """A MIDI number of variable length."""
    found = [value & 127]
    while value := value >> 7:
        found.append(128 | (value & 127))
    return bytes(reversed(found))


def _midi(*tracks: list[tuple[int, bytes]], division: int = 480) -> bytes:
    """A MIDI file of tracks of (ticks since the event before, event)."""
    content = b"MThd\0\0\0\6\0\1" + len(tracks).to_bytes(2, "big") + division.to_bytes(2, "big")
    for track in tracks:
        events = b"".join(_number(delta) + event for delta, event in [*track, (0, b"\xff\x2f\0")])
        content += b"MTrk" + len(events).to_bytes(4, "big") + events
    return content


def _on(pitch: int, velocity: int = 64, channel: int = 0) -> bytes:
    return bytes([0x90 | channel, pitch, velocity])


def _off(pitch: int, channel: int = 0) -> bytes:
    return bytes([0x80 | channel, pitch, 0])


def _pedal(value: int, channel: int = 0) -> bytes:
    return bytes([0xB0 | channel, 64, value])


def _tempo(microseconds: int) -> bytes:
    return b"\xff\x51\x03" + microseconds.to_bytes(3, "big")


def _read(folder: Path, *tracks: list[tuple[int, bytes]], division: int = 480) -> Notes:
    path = folder / "Stück 1.mid"
    path.write_bytes(_midi(*tracks, division=division))
    return read_notes(path)


def _performance(seed: int = 0, count: int = 400, duration: float = 60.0) -> Notes:
    """Notes at random times, some of length 0, with a pedal."""
    draw = np.random.default_rng(seed)
    onset = draw.uniform(0, duration, count)
    length = draw.exponential(0.4, count) * draw.integers(0, 8, count).clip(0, 1)
    pedal = np.sort(draw.uniform(0, duration, 40)).reshape(-1, 2)
    return make_notes(
        onset, onset + length, draw.integers(21, 109, count), draw.integers(1, 128, count), pedal
    )


def test_tempo_changes_of_another_track_are_followed(tmp_path):
    tempo = [(0, _tempo(500_000)), (960, _tempo(250_000)), (960, _tempo(1_000_000))]
    piano = [(480, _on(60, 10)), (960, _off(60)), (480, _on(62, 127)), (480, _off(62))]
    notes = _read(tmp_path, tempo, piano)
    # 2 quarters of 0.5 s, 2 of 0.25 s, then 1 s each
    np.testing.assert_allclose(notes.onset, [0.5, 1.5])
    np.testing.assert_allclose(notes.offset, [1.25, 2.5])
    assert notes.pitch.tolist() == [60, 62] and notes.velocity.tolist() == [10, 127]
    assert notes.duration == pytest.approx(2.5)


def test_without_a_tempo_it_is_120_a_minute(tmp_path):
    notes = _read(tmp_path, [(100, _on(60)), (100, _off(60))], division=100)
    assert (notes.onset[0], notes.offset[0]) == (0.5, 1.0)


def test_time_is_exact_after_an_hour(tmp_path):
    tempo = [(0, _tempo(333_333))]
    notes = _read(tmp_path, tempo, [(5_184_000, _on(60)), (1, _off(60))])
    assert notes.onset[0] == pytest.approx(10_800 * 0.333333, abs=1e-9)


def test_hands_in_two_tracks_are_one_performance_and_drums_are_left_out(tmp_path):
    right = [(0, _on(72)), (480, _off(72))]
    left = [(240, _on(48, channel=1)), (480, _off(48, channel=1))]
    drums = [(0, _on(36, channel=9)), (480, _off(36, channel=9)), (0, _pedal(127, channel=9))]
    notes = _read(tmp_path, right, left, drums)
    assert notes.pitch.tolist() == [72, 48]
    assert len(notes.pedal) == 0


def test_zero_length_notes_stay_and_stuck_ones_go(tmp_path):
    notes = _read(tmp_path, [(0, _on(60)), (0, _off(60)), (480, _on(64)), (10, _on(67)), (10, _off(67))])
    assert notes.pitch.tolist() == [60, 67]
    assert notes.onset[0] == notes.offset[0] == 0.0
    tokens = MidiTokenizer()(notes)
    back = MidiTokenizer().decode(tokens)
    assert back.offset[0] == pytest.approx(0.005)


def test_pedal_is_down_from_64_on_and_to_the_end_if_never_released(tmp_path):
    track = [
        (0, _pedal(63)), (480, _pedal(64)), (100, _pedal(127)), (380, _pedal(0)), (480, _pedal(90)),
        (0, _on(60)), (480, _off(60)),
    ]  # fmt: skip
    notes = _read(tmp_path, track)
    np.testing.assert_allclose(notes.pedal, [[0.5, 1.0], [1.5, 2.0]])


def test_pedals_of_two_tracks_are_one(tmp_path):
    first = [(0, _on(60)), (0, _pedal(127)), (480, _pedal(0)), (960, _off(60))]
    second = [(240, _pedal(127, 1)), (480, _pedal(0, 1)), (0, _on(60, channel=1)), (1, _off(60, 1))]
    np.testing.assert_allclose(_read(tmp_path, first, second).pedal, [[0.0, 0.75]])


def test_notes_ring_while_the_pedal_is_down():
    pedal = [(1.0, 3.0), (5.0, 6.0)]
    notes = make_notes(
        [0.0, 0.5, 0.6, 1.5, 2.0, 2.0],
        [0.9, 1.2, 3.5, 1.6, 1.0 + 1.2, 3.0],
        [50, 51, 52, 53, 53, 54],
        [9] * 6,
        pedal,
    )
    rung = sustained(notes)
    # before the pedal: as it was. Let go in it: to its end. After it: as it was. Struck again: until then.
    np.testing.assert_allclose(rung.offset, [0.9, 3.0, 3.5, 2.0, 3.0, 3.0])
    assert len(rung.pedal) == 0
    np.testing.assert_array_equal(sustained(rung).offset, rung.offset)


def test_a_key_struck_again_while_down_is_not_shortened():
    notes = make_notes([0.0, 0.5], [1.0, 0.7], [60, 60], [9, 9], [(0.6, 2.0)])
    np.testing.assert_allclose(sustained(notes).offset, [1.0, 2.0])


def test_crop_takes_what_begins_inside_and_cuts_what_goes_on():
    notes = make_notes(
        [0.9, 1.0, 1.5, 2.0], [5.0, 1.2, 9.0, 2.5], [60, 61, 62, 63], [1, 2, 3, 4], [(0.5, 1.25)]
    )
    part = crop(notes, 1.0, 2.0)
    assert part.pitch.tolist() == [61, 62] and part.velocity.tolist() == [2, 3]
    np.testing.assert_allclose(part.onset, [0.0, 0.5])
    np.testing.assert_allclose(part.offset, [0.2, 1.0])
    np.testing.assert_allclose(part.pedal, [[0.0, 0.25]])
    assert len(crop(notes, 10.0, 20.0)) == 0 and len(crop(notes, 10.0, 20.0).pedal) == 0


def test_pieces_hold_every_note_once_and_sustain_alike():
    notes = _performance()
    pieces = [crop(notes, start, start + 7.0) for start in np.arange(0.0, 63.0, 7.0)]
    assert sum(len(piece) for piece in pieces) == len(notes)
    for number, piece in enumerate(pieces):
        whole = crop(sustained(notes), 7.0 * number, 7.0 * number + 7.0)
        np.testing.assert_allclose(sustained(piece).offset, whole.offset)


def test_the_notes_of_a_cut_are_on_its_clock(tmp_path):
    write_notes(tmp_path / "piece.mid", make_notes([1.0, 6.0], [2.0, 7.0], [60, 62], [5, 6]))
    cut = MonoCut("a", start=5.0, duration=5.0, channel=0, custom={"midi": str(tmp_path / "piece.mid")})
    notes = cut_notes(cut)
    assert notes.pitch.tolist() == [62]
    np.testing.assert_allclose(notes.onset, [1.0])
    with pytest.raises(UserError, match="cut 'b' names no MIDI file"):
        cut_notes(MonoCut("b", start=0.0, duration=5.0, channel=0))


def test_files_come_back_as_written(tmp_path):
    notes = _performance(1)
    write_notes(tmp_path / "a.mid", notes)
    back = read_notes(tmp_path / "a.mid")
    np.testing.assert_allclose(back.onset, notes.onset, atol=1e-4)
    np.testing.assert_array_equal(np.sort(back.velocity), np.sort(notes.velocity))
    np.testing.assert_allclose(back.pedal, notes.pedal, atol=1e-4)
    first = (tmp_path / "a.mid").read_bytes()
    write_notes(tmp_path / "a.mid", notes)
    assert (tmp_path / "a.mid").read_bytes() == first


@pytest.mark.parametrize("sustain", [True, False])
def test_tokens_come_back_within_a_step(sustain):
    notes = _performance(2)
    tokenizer = MidiTokenizer(sustain)
    tokens = tokenizer(notes)
    assert tokens.shape == (len(notes), 6) and tokens.dtype == np.int64
    back = tokenizer.decode(tokens)
    # In another order only where two begin in the same step, so each is found by what is exact.
    want = sustained(notes) if sustain else notes
    assert sorted(zip(want.pitch, want.velocity, strict=True)) == sorted(
        zip(back.pitch, back.velocity, strict=True)
    )
    np.testing.assert_allclose(back.onset, want.onset, atol=0.0025 + 1e-9)
    order, other = (np.lexsort((n.velocity, n.pitch, np.round(n.onset * 200))) for n in (want, back))
    length = (want.offset - want.onset)[order]
    step = np.select(
        [length < 0.64, length < 1.92, length < 4.48, length < 9.6], [0.005, 0.01, 0.02, 0.04], 0.08
    )
    tolerance = np.where(length < 0.0025, 0.005, step / 2) + 1e-9
    assert (np.abs((back.offset - back.onset)[other] - length) <= tolerance).all()
    np.testing.assert_array_equal(tokenizer(back), tokens)
    assert (tokens < np.array(tokenizer.vocab_sizes)).all() and (tokens >= NUM_SPECIAL).all()


def test_fields_are_what_they_are_called():
    notes = make_notes([0.1, 0.1, 1.5, 4.0], [0.2, 1.015, 1.5, 40.0], [64, 60, 67, 21], [30, 31, 127, 1])
    values = MidiTokenizer()(notes) - NUM_SPECIAL
    fields = dict(zip(FIELDS, values.T.tolist(), strict=True))
    assert fields["pitch"] == [60, 64, 67, 21] and fields["velocity"] == [31, 30, 127, 1]
    assert fields["ioi"] == [0, 0, 280, 399]  # the last 2.5 s, more than the field holds
    assert fields["position"] == [20, 20, 100, 0] and fields["second"] == [0, 0, 1, 4]
    # 183 steps of 5 ms are 129 and 27 of two; 20 steps; the least; the most
    assert fields["duration"] == [128 + 27, 19, 0, 639]


def test_times_are_those_of_the_audio_frames():
    notes = make_notes([0.0, 0.3, 0.519, 12.98], [0.1, 0.4, 0.6, 13.0], [60, 61, 62, 63], [9] * 4)
    tokenizer = MidiTokenizer()
    tokens = tokenizer(notes, add_special=True)
    assert tokens[0].tolist() == [BOS] * 6 and tokens[-1].tolist() == [EOS] * 6
    times = tokenizer.times(tokens)
    assert np.isnan(times[[0, -1]]).all()
    np.testing.assert_allclose(times[1:-1], notes.onset, atol=0.0025)
    assert tokenizer.frames(tokens, 50.0).tolist() == [-1, 0, 15, 26, 649, -1]
    assert len(tokenizer.decode(tokens)) == 4


def test_a_note_at_the_very_end_keeps_its_second():
    tokenizer = MidiTokenizer(max_duration=10)
    tokens = tokenizer(make_notes([9.999], [10.0], [60], [9]))
    assert (tokens < np.array(tokenizer.vocab_sizes)).all()
    assert tokenizer.times(tokens)[0] == pytest.approx(9.995)
    with pytest.raises(UserError, match="notes from 10.00 to 10.00 s, expected 0 to 10 s; crop"):
        tokenizer(make_notes([10.0], [11.0], [60], [9]))
    with pytest.raises(UserError, match="crop"):
        tokenizer(make_notes([-0.1], [11.0], [60], [9]))


def test_no_notes_are_no_tokens(tmp_path):
    notes = _read(tmp_path, [(0, _tempo(500_000))])
    assert len(notes) == 0 and notes.duration == 0.0
    tokenizer = MidiTokenizer(**MidiTokenizer(sustain=False).config())
    assert tokenizer(notes).shape == (0, 6)
    assert len(tokenizer.decode(tokenizer(notes, add_special=True))) == 0


def test_wrong_tokens_are_named():
    tokenizer = MidiTokenizer()
    row = np.full((1, 6), NUM_SPECIAL)
    with pytest.raises(UserError, match=r"shape \(1, 5\), expected \(notes, 6\)"):
        tokenizer.decode(row[:, :5])
    with pytest.raises(UserError, match="position 204 in row 1, expected 0 to 203"):
        tokenizer.decode(np.concatenate([row, np.array([[4, 4, 4, 4, 204, 4]])]))
    with pytest.raises(UserError, match="special symbols and values"):
        tokenizer.times(np.array([[0, 4, 4, 4, 4, 4]]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no MIDI file"),
        (b"RIFF and more that is no MIDI", "is no MIDI file"),
        (_midi([(0, _on(60)), (9, _off(60))])[:-8], "is no MIDI file"),
        (_midi([(0, _on(60)), (9, _off(60))], division=0xE728), "is no MIDI file"),  # frames of film
        (_midi([(0, _tempo(0)), (9, _on(60)), (9, _off(60))]), "in which no time passes"),
    ],
    ids=["empty", "other", "truncated", "smpte", "tempo"],
)
def test_broken_files_are_named(tmp_path, content, message):
    path = tmp_path / "broken.mid"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"broken.mid'.*{message}") as caught:
        read_notes(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(UserError, match="none.mid' does not exist"):
        read_notes(tmp_path / "none.mid")
    with pytest.raises(UserError, match="is no MIDI file that can be read"):
        read_notes(tmp_path)


def test_damaged_bytes_give_notes_or_an_error(tmp_path):
    notes = _performance(3, count=60)
    write_notes(tmp_path / "good.mid", notes)
    good, draw = (tmp_path / "good.mid").read_bytes(), random.Random(0)
    for _ in range(300):
        content = bytearray(good)
        for _ in range(draw.randint(1, 6)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        (tmp_path / "bad.mid").write_bytes(content)
        try:
            found = read_notes(tmp_path / "bad.mid")
        except UserError:
            continue
        assert (found.offset >= found.onset).all() and (np.diff(found.onset) >= 0).all()
        MidiTokenizer()(crop(found, 0.0, 20.0))


def test_a_note_cannot_end_before_it_begins():
    with pytest.raises(ValueError, match="ends before it begins"):
        make_notes([1.0], [0.5], [60], [9])
    with pytest.raises(ValueError, match="different numbers"):
        make_notes([1.0], [2.0, 3.0], [60], [9])


def test_ten_minutes_take_less_than_a_second(tmp_path):
    notes = _performance(4, count=12_000, duration=600.0)
    write_notes(tmp_path / "long.mid", notes)
    tokenizer = MidiTokenizer()
    start = time.process_time()
    found = read_notes(tmp_path / "long.mid")
    for second in range(0, 600, 10):
        tokenizer(crop(found, second, second + 10.0))
    assert len(found) == 12_000 and time.process_time() - start < 1.0


def test_octuple_of_miditok_says_the_same_on_a_grid(tmp_path):
    """At 120 beats a minute, 4/4, and 100 positions a beat, a position is 5 ms and a bar two seconds."""
    miditok = pytest.importorskip("miditok")
    draw = np.random.default_rng(5)
    onset = np.cumsum(draw.integers(0, 90, 80)) / 200
    steps = draw.integers(1, 128, 80)
    notes = make_notes(
        onset, onset + steps / 200, draw.permutation(np.arange(21, 101)), draw.integers(1, 128, 80)
    )
    write_notes(tmp_path / "grid.mid", notes)
    config = miditok.TokenizerConfig(
        pitch_range=(0, 127), beat_res={(0, 12): 100}, num_velocities=127, use_programs=False, use_tempos=False,
        use_time_signatures=False, max_bar_embedding=64,
    )  # fmt: skip
    (sequence,) = miditok.Octuple(config)(tmp_path / "grid.mid")
    theirs = []
    for row in sequence.tokens:
        pitch, position, bar, velocity, duration = (word.split("_")[1] for word in row)
        beats, positions, _ = (int(number) for number in duration.split("."))
        theirs.append([int(pitch), int(velocity), 100 * beats + positions, int(position) + 400 * int(bar)])
    values = MidiTokenizer()(notes) - NUM_SPECIAL
    ours = np.stack([values[:, 0], values[:, 1], values[:, 2] + 1, values[:, 4] + 200 * values[:, 5]], axis=1)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.skipif(not ASAP.is_dir(), reason="no performances in ../shared/data/asap")
def test_real_performances_come_back():
    tokenizer = MidiTokenizer(sustain=False)
    for path in sorted(ASAP.glob("*.mid"))[::10]:
        notes = crop(read_notes(path), 10.0, 30.0)
        assert len(notes) > 10 and (notes.velocity > 0).all()
        back = tokenizer.decode(tokenizer(notes))
        np.testing.assert_allclose(back.onset, notes.onset, atol=0.0025 + 1e-9)
        assert sorted(back.pitch) == sorted(notes.pitch)


def test_beats_ticks_and_bars_of_midi_valle():
    """96 ticks a beat, two beats a second, four beats a bar; every field's first value has id 4."""
    tokenizer = BeatTokenizer()
    assert tokenizer.vocab_sizes == (92, 68, 1156, 772, 388, 20) and tokenizer.max_duration == 32
    notes = make_notes(
        [0.0, 0.0, 0.5, 2.0, 6.0, 6.0],
        [0.001, 1.0, 8.0, 2.5, 6.5, 6.25],
        [21, 108, 60, 20, 64, 62],
        [1, 127, 64, 90, 2, 70],
        [(0.0, 9.0)],  # does not count
    )
    values = tokenizer(notes) - NUM_SPECIAL
    assert values.tolist() == [
        [0, 0, 0, 384, 0, 0],  # key 21, velocity 1, one tick
        [87, 63, 191, 384, 0, 0],
        [39, 32, 1151, 384 + 96, 96, 0],  # 7.5 s are 6; velocity 64 is between 63 and 65: the upper
        [41, 35, 47, 384 + 383, 0, 3],  # 1056 ticks later; key 20 is not there
        [43, 1, 95, 384, 0, 3],
    ]
    tokens = tokenizer(notes, add_special=True)
    assert tokens[0].tolist() == [BOS] * 6 and tokens[-1].tolist() == [EOS] * 6
    np.testing.assert_allclose(tokenizer.times(tokens)[1:-1], [0, 0, 0.5, 6, 6])
    back = tokenizer.decode(tokens)
    np.testing.assert_allclose(back.offset - back.onset, [1 / 192, 1, 6, 0.25, 0.5])
    assert back.velocity.tolist() == [1, 127, 65, 71, 3]
    assert tokenizer.frames(tokens, 50.0).tolist() == [-1, 0, 0, 25, 300, 300, -1]
    with pytest.raises(UserError, match="expected 0 to 32 s"):
        tokenizer(make_notes([32.0], [33.0], [60], [9]))


def test_order_in_a_tick_is_that_of_the_onsets():
    """As in files of more ticks a beat: 1 ms is no tick of its own, but still before."""
    tokens = BeatTokenizer()(make_notes([0.500, 0.501, 0.501], [0.7, 0.9, 0.8], [70, 60, 60], [9, 9, 9]))
    assert (tokens[:, 0] - NUM_SPECIAL + 21).tolist() == [70, 60, 60] and tokens[1, 2] < tokens[2, 2]
    assert set(tokens[:, 4]) == {NUM_SPECIAL + 96}
    # 14 of 384 ticks a beat are 3.5 of 96, but in seconds not quite
    start = 14 * (500_000 * 1e-6 / 384)
    assert BeatTokenizer()(make_notes([start], [start + 0.1], [60], [9]))[0, 4] == NUM_SPECIAL + 4


def test_tokenizers_come_back_from_checkpoints():
    for tokenizer in (MidiTokenizer(sustain=False), BeatTokenizer(30)):
        again = make_midi_tokenizer(tokenizer.config())
        assert type(again) is type(tokenizer) and again.vocab_sizes == tokenizer.vocab_sizes
        assert again.config() == tokenizer.config() and again.sustain is False
    for config in ({"name": "octuple"}, {"bars": 3}):
        with pytest.raises(UserError, match="no MIDI tokenizer of configuration"):
            make_midi_tokenizer(config)
