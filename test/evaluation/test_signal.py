"""Metrics against a reference: perfect for the same, worse under every damage they should hear, known values."""

import numpy as np
import pytest

from valle.evaluation.metrics import METRICS, TASKS, Case, Excerpt, install_hint
from valle.evaluation.signal import aligned, chroma, chroma_distance

RATE = 16000
PERFECT = {
    "mel": {"mel_distance": 0.0},
    "stft": {"stft_distance": 0.0},
    "chroma": {"chroma_distance": 0.0},
    "si_sdr": {"si_sdr": 100.0},
    "stoi": {"stoi": 1.0},
    "pesq": {"pesq": 4.64},
    "profile": dict.fromkeys(
        ("spectrum_reference", "spectrum_prompt", "harmony_reference", "harmony_prompt"), 0.0
    ),
}
LIBROSA = [0.357, 0.0585, 0.0119, 0.0276, 0.1749, 0.0306, 0.0321, 0.2078, 0.032, 0.0007, 0.0022, 0.0647]
NEEDS_PESQ = pytest.mark.skipif(
    METRICS["pesq"]().missing() is not None, reason="PESQ is compiled while it installs: needs a C compiler"
)
EVERY = [pytest.param(name, marks=NEEDS_PESQ if name == "pesq" else ()) for name in PERFECT]
ALIGNED = [one for one in EVERY if one.values[0] != "profile"]


def tone(hertz: float, seconds: float = 2.0, rate: int = RATE, harmonics: int = 1) -> np.ndarray:
    """(1, N) with harmonics that halve in amplitude."""
    time = np.arange(round(seconds * rate)) / rate
    wav = sum(0.5**k * np.sin(2 * np.pi * (k + 1) * hertz * time) for k in range(harmonics))
    return (0.2 * np.asarray(wav, dtype=np.float64)).astype(np.float32)[None]


def song(semitones: int = 0) -> np.ndarray:
    """(1, N): four notes of C major, half a second each."""
    factor = 2 ** (semitones / 12)
    return np.concatenate([tone(factor * hertz, 0.5, harmonics=4) for hertz in (262, 330, 392, 523)], axis=1)


def voice(pitch: float = 110.0, seconds: float = 3.0) -> np.ndarray:
    """(1, N): a buzz that glides through moving formants, with syllables and pauses, and a little noise."""
    time = np.arange(round(seconds * RATE)) / RATE
    phase = 2 * np.pi * np.cumsum(pitch * (1 + 0.2 * np.sin(2 * np.pi * 0.7 * time))) / RATE
    wav = np.zeros_like(time)
    for k in range(1, int(4000 / pitch)):
        for formant, width in ((600, 150), (1500, 200), (2600, 300)):
            centre = formant * (1 + 0.3 * np.sin(2 * np.pi * 1.3 * time + formant))
            wav += np.sin(k * phase) / (1 + ((k * pitch - centre) / width) ** 2)
    wav *= np.clip(np.sin(2 * np.pi * 2.5 * time), 0, 1)
    noise = np.random.default_rng(0).standard_normal(len(time))
    return (0.2 * wav / np.abs(wav).max() + 1e-4 * noise).astype(np.float32)[None]


def excerpt(wav: np.ndarray, rate: int = RATE) -> Excerpt:
    return Excerpt(wav.astype(np.float32), rate)


def measure(name: str, wav: np.ndarray, reference: np.ndarray, prompt: np.ndarray | None = None) -> dict:
    case = Case("cut-1", excerpt(reference), None if prompt is None else excerpt(prompt))
    metric = METRICS[name]()
    assert metric.applies(case)
    figures = metric(excerpt(wav), case)
    assert set(figures) == set(metric.keys)
    return figures


def test_every_metric_says_what_it_is():
    for name in (*PERFECT, "dnsmos", "wer", "speaker"):
        metric = METRICS[name]()
        assert metric.name == name and metric.task in TASKS
        assert metric.keys and set(metric.keys.values()) <= {"lower", "higher"}
        if name != "pesq":
            assert metric.missing() is None, "the Makefile installs what every metric needs"


def test_a_missing_package_is_one_line_that_says_what_to_install(monkeypatch):
    assert install_hint("X", ("numpy",), "'valle[eval]'") is None
    assert install_hint("X", ("numpy", "absent_one"), "'valle[eval]'") == (
        "X needs absent_one: pip install 'valle[eval]'"
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("stoi", "pesq", "wer", "speaker", "dnsmos"):
        hint = METRICS[name]().missing()
        assert hint is not None and "pip install" in hint and "\n" not in hint
    assert METRICS["mel"]().missing() is None


@pytest.mark.parametrize("name", EVERY)
def test_identical_audio_is_perfect(name):
    wav = voice()
    assert measure(name, wav, wav, wav) == pytest.approx(PERFECT[name], abs=5e-3)


@pytest.mark.parametrize("name", ALIGNED)
def test_every_damage_makes_it_worse(name):
    """Noise (more is worse), another pitch, a late start, an end that is missing, silence."""
    wav = voice()
    noise = np.random.default_rng(1).standard_normal(wav.shape).astype(np.float32)
    (key, better), *_ = METRICS[name]().keys.items()
    sign = 1 if better == "higher" else -1

    def score(other: np.ndarray) -> float:
        return sign * measure(name, other, wav)[key]

    perfect = score(wav)
    assert perfect > score(wav + 0.003 * noise) > score(wav + 0.03 * noise)
    assert perfect > score(voice(pitch=130))
    if name != "pesq":  # aligns in time, as its standard says
        assert perfect > score(np.roll(wav, RATE // 4, axis=1))
    assert perfect > score(wav[:, : 2 * wav.shape[1] // 3])
    silence = measure(name, np.zeros_like(wav), wav)[key]
    assert silence is None if name == "pesq" else sign * silence < perfect


@NEEDS_PESQ
def test_pesq_forgives_a_constant_delay():
    """The standard aligns in steps of 4 ms; speech with silence around loses nothing by a delay of such steps."""
    wav = np.pad(voice(), ((0, 0), (RATE // 2, RATE // 2)))
    for delay in (400, 1600):
        assert measure("pesq", np.roll(wav, delay, axis=1), wav)["pesq"] == pytest.approx(4.64, abs=0.01)


@pytest.mark.parametrize(("name", "value"), [("mel", 0.0), ("stft", 0.0), ("chroma", None), ("si_sdr", None)])
def test_a_silent_reference(name, value):
    silence = np.zeros((1, RATE), dtype=np.float32)
    assert list(measure(name, silence, silence).values()) == [value]


@pytest.mark.parametrize("name", ["stoi", pytest.param("pesq", marks=NEEDS_PESQ)])
def test_what_is_silent_or_too_short_to_judge_is_not_defined(name):
    silence, wav = np.zeros((1, RATE), dtype=np.float32), voice()
    assert measure(name, wav, silence)[name] is None
    assert measure(name, wav[:, :3000], wav[:, :3000])[name] is None
    if name == "stoi":  # needs 30 frames, 0.4 s
        assert measure(name, wav[:, :5000], wav[:, :5000])[name] is None
    assert measure(name, silence[:, :0], wav)[name] in (None, 0.0)


@pytest.mark.parametrize("name", EVERY)
def test_audio_without_samples_is_no_crash(name):
    empty = np.zeros((1, 0), dtype=np.float32)
    figures = measure(name, empty, voice())
    assert all(value is None or np.isfinite(value) for value in figures.values())
    case = Case("cut-1", excerpt(empty), None)
    assert not METRICS[name]().applies(case)


def test_si_sdr_is_the_ratio_it_is_defined_as():
    """A sine plus an orthogonal one of a tenth of its amplitude: 20 dB, at any level."""
    wav, other = tone(400), tone(800)
    for gain in (1.0, 0.3):
        assert measure("si_sdr", gain * (wav + 0.1 * other), wav)["si_sdr"] == pytest.approx(20, abs=0.01)


@pytest.mark.parametrize(("name", "best"), [("stoi", 1.0), pytest.param("pesq", 4.64, marks=NEEDS_PESQ)])
def test_intelligibility_and_quality_ignore_the_level(name, best):
    wav = voice()
    assert measure(name, 0.5 * wav, wav)[name] == pytest.approx(best, abs=0.02)


def test_alignment_cuts_what_is_long_and_fills_what_is_short():
    wav = voice(seconds=1.0)
    reference = excerpt(wav)
    true, estimate, rate = aligned(excerpt(np.pad(wav, ((0, 0), (0, 5000)))), reference)
    assert rate == RATE and np.array_equal(true, wav) and np.array_equal(estimate, wav)
    true, estimate, _ = aligned(excerpt(wav[:, :-1500]), reference)  # a codec's last frame
    assert true.shape == estimate.shape == (1, RATE - 1500)
    true, estimate, _ = aligned(excerpt(wav[:, :-1700]), reference)
    assert true.shape == estimate.shape == (1, RATE) and not estimate[:, -1700:].any()


def test_other_rates_and_channels_are_converted_to_the_reference():
    double = tone(440, rate=2 * RATE)
    stereo = Excerpt(np.repeat(double, 2, axis=0), 2 * RATE)
    case = Case("cut-1", excerpt(tone(440)), None)
    assert METRICS["mel"]()(stereo, case)["mel_distance"] < 0.1
    assert METRICS["si_sdr"]()(stereo, case)["si_sdr"] > 30


@pytest.mark.parametrize("rate", [16000, 24000, 44100])
@pytest.mark.parametrize(("hertz", "pitch_class"), [(261.63, 0), (440.0, 9), (1108.73, 1), (3951.07, 11)])
def test_a_tone_lights_its_pitch_class_at_any_rate(rate, hertz, pitch_class):
    energy = chroma(tone(hertz, rate=rate), rate).sum(axis=0)
    assert energy.argmax() == pitch_class
    assert energy[pitch_class] > 0.6 * energy.sum()


def test_chroma_is_power():
    energy = chroma(tone(440) + 0.5 * tone(523.25), RATE).sum(axis=0)
    assert energy[9] / energy[0] == pytest.approx(4, rel=0.1)


def test_harmony_is_the_same_an_octave_up_and_softer_but_not_a_semitone_up():
    wav = tone(440)
    semitone = 2 ** (1 / 12)
    assert chroma_distance(wav, 0.1 * wav, RATE) == pytest.approx(0, abs=1e-5)
    assert chroma_distance(wav, tone(880), RATE) < 0.1
    assert chroma_distance(wav, tone(440 * semitone), RATE) > 0.5
    assert chroma_distance(wav, tone(440 * semitone**3), RATE) > 0.9
    assert chroma_distance(wav, np.zeros_like(wav), RATE) == 1.0


def test_chroma_agrees_with_librosa():
    """librosa 0.11.0: chroma_stft(y=song, sr=16000, n_fft=4096, hop_length=1024, tuning=0, norm=None), summed.

    Its frequencies spread over more classes, so the two are alike, not equal.
    """
    energy = chroma(song(), RATE).sum(axis=0)
    librosa = np.array(LIBROSA)
    cosine = energy @ librosa / np.linalg.norm(energy) / np.linalg.norm(librosa)
    assert cosine > 0.98


def test_profile_hears_what_does_not_depend_on_order():
    """Backwards is the same; another key moves harmony; noise moves the spectrum; a prompt is compared too."""
    wav, other = song(), song(semitones=1)
    noise = 0.05 * np.random.default_rng(0).standard_normal(wav.shape).astype(np.float32)
    same = measure("profile", wav[:, ::-1].copy(), wav, other)
    assert same["harmony_reference"] < 0.02 and same["spectrum_reference"] < 0.05
    assert same["harmony_prompt"] > 10 * same["harmony_reference"] + 0.1
    assert measure("profile", other, wav)["harmony_reference"] > 0.1
    assert measure("profile", other, wav)["harmony_prompt"] is None
    noisy = [measure("profile", wav + gain * noise, wav)["spectrum_reference"] for gain in (0.0, 0.1, 1.0)]
    assert noisy == sorted(noisy) and noisy[0] == 0 and noisy[1] > 0
    silence = measure("profile", np.zeros_like(wav), wav)
    assert silence["harmony_reference"] == 1.0 and silence["spectrum_reference"] > 0.5


@pytest.mark.parametrize("name", EVERY)
def test_two_calls_give_the_same(name):
    wav = voice()
    noisy = wav + 0.01 * np.random.default_rng(1).standard_normal(wav.shape).astype(np.float32)
    assert measure(name, noisy, wav, wav) == measure(name, noisy, wav, wav)
