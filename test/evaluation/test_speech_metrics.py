"""Speech metrics on speech that espeak-ng says: known words, known voices, and damage that must be heard."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from valle.evaluation.metrics import METRICS, Case, Excerpt
from valle.evaluation.speech import (
    _speaker_encoder,
    error_rates,
    normalize_text,
    speaker_vector,
    speaker_windows,
    transcribe,
    without_pauses,
)

RATE = 16000
TEXTS = ("The quick brown fox jumps over the lazy dog.", "We have three open windows in the new house.")
VOICES = ("en-us", "en-us+f3")

# espeak-ng keeps global state, so it speaks in a process of its own. Its C functions in order: initialize (2: give the
# samples, do not play them), where to put them, who speaks, speed (parameter 1), what (UTF-8), wait.
SAY = """
import ctypes, sys
import numpy as np, espeakng_loader
lib = ctypes.CDLL(espeakng_loader.get_library_path())
rate = lib.espeak_Initialize(2, 0, str(espeakng_loader.get_data_path()).encode(), 0)
pieces = []
@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
def keep(samples, count, events):
    if samples and count > 0:
        pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
    return 0
lib.espeak_SetSynthCallback(keep)
clips = {}
for who in sys.argv[2].split("|"):
    for number, text in enumerate(sys.argv[3].split("|")):
        pieces.clear()
        lib.espeak_SetVoiceByName(who.encode())
        lib.espeak_SetParameter(1, 130, 0)
        raw = text.encode()
        lib.espeak_Synth(raw, len(raw) + 1, 0, 1, 0, 1, None, None)
        lib.espeak_Synchronize()
        clips[f"{who}|{number}"] = np.concatenate(pieces).astype(np.float32)[None] / 32768
np.savez(sys.argv[1], rate=rate, **clips)
"""


@pytest.fixture(scope="module")
def speech(tmp_path_factory) -> dict[tuple[str, int], Excerpt]:
    """(voice, number of the text) -> what that voice says."""
    path = Path(tmp_path_factory.mktemp("speech")) / "clips.npz"
    subprocess.run([sys.executable, "-c", SAY, str(path), "|".join(VOICES), "|".join(TEXTS)], check=True)
    with np.load(path) as clips:
        rate = int(clips["rate"])
        return {
            (who, number): Excerpt(clips[f"{who}|{number}"], rate)
            for who in VOICES
            for number in range(len(TEXTS))
        }


def changed(excerpt: Excerpt, wav: np.ndarray) -> Excerpt:
    return Excerpt(wav.astype(np.float32), excerpt.sample_rate)


def noisy(excerpt: Excerpt, level: float) -> Excerpt:
    noise = np.random.default_rng(0).standard_normal(excerpt.wav.shape)
    return changed(excerpt, excerpt.wav + level * noise)


def faster(excerpt: Excerpt, factor: float) -> Excerpt:
    """Played faster: higher and shorter."""
    return Excerpt(excerpt.wav, round(excerpt.sample_rate * factor))


# words


@pytest.mark.parametrize(
    ("reference", "hypothesis", "wer", "cer"),
    [
        ("the cat sat on the mat", "the cat sat on the mat", 0.0, 0.0),
        ("the cat sat on the mat", "The cat sat, on the mat!", 0.0, 0.0),
        ("the cat sat on the mat", "the cat sit on mat", 2 / 6, 5 / 22),  # one word exchanged, one left out
        ("one", "a b c", 3.0, None),  # more errors than words
        ("press forty two now", "Press 42 now.", 0.0, 0.0),
        ("the cat sat", "", 1.0, 1.0),
    ],
)
def test_error_rates_have_known_values(reference, hypothesis, wer, cer):
    figures = error_rates(reference, hypothesis)
    assert figures["wer"] == pytest.approx(wer)
    assert cer is None or figures["cer"] == pytest.approx(cer)


def test_text_without_words_has_no_error_rate():
    assert error_rates(" ... ", "words") == {"wer": None, "cer": None}
    assert normalize_text("It's  TWENTY-one, o'clock") == normalize_text("it is 21 o'clock")


def test_words_apply_to_english_text_only():
    clip = Excerpt(np.zeros((1, 100), dtype=np.float32), RATE)
    metric = METRICS["wer"]()
    assert metric.applies(Case("a", clip, None, text="hello", language="en-us"))
    assert metric.applies(Case("a", clip, None, text="hello"))
    assert not metric.applies(Case("a", clip, None, text="hola", language="es"))
    assert not metric.applies(Case("a", clip, None, text=" ... ", language="en"))
    assert not metric.applies(Case("a", clip, None))


def test_the_recognizer_hears_what_is_said_and_damage_costs_words(speech):
    metric = METRICS["wer"]()
    clip = speech["en-us", 0]
    case = Case("a", clip, None, text=TEXTS[0], language="en")
    clean = metric(clip, case)
    assert clean["wer"] <= 2 / 9 and clean["cer"] <= 0.1  # it hears "jump", synthetic speech being hard
    assert metric(clip, case) == clean
    assert metric(noisy(clip, 0.2), case)["wer"] > clean["wer"] + 0.2
    assert metric(faster(clip, 2.2), case)["wer"] > clean["wer"] + 0.2
    half = changed(clip, clip.wav[:, : clip.wav.shape[1] // 2])
    assert metric(half, case)["wer"] >= clean["wer"] + 0.3
    assert metric(clip, Case("a", clip, None, text=TEXTS[1]))["wer"] >= 0.8


def test_words_are_bounded_by_the_time_there_is_to_say_them(speech, monkeypatch):
    """A recognizer that is lost repeats itself; here the bound is set so low that it cuts good speech."""
    clip = speech["en-us", 0]
    monkeypatch.setattr("valle.evaluation.speech.TOKENS_PER_SECOND", 1)
    assert 1 <= len(transcribe(clip).split()) <= np.ceil(clip.wav.shape[1] / clip.sample_rate)


def test_silence_has_no_words(monkeypatch):
    def invent(model: str | None) -> None:
        raise AssertionError("a recognizer is not asked about silence, as it would invent words")

    monkeypatch.setattr("valle.evaluation.speech.recognizer", invent)
    silence = Excerpt(np.zeros((2, 8000), dtype=np.float32), 8000)
    assert transcribe(silence) == transcribe(Excerpt(silence.wav[:, :0], 8000)) == ""
    case = Case("a", silence, None, text=TEXTS[0])
    assert METRICS["wer"]()(silence, case) == {"wer": 1.0, "cer": 1.0}


# voice


def buzz(seconds: float, pitch: float, formants: tuple[float, ...]) -> np.ndarray:
    """(N,) at 16 kHz: no speech, but all that the speaker network needs to tell voices apart."""
    time = np.arange(int(seconds * RATE)) / RATE
    phase = 2 * np.pi * np.cumsum(pitch * (1 + 0.05 * np.sin(2 * np.pi * 4 * time))) / RATE
    wav = np.zeros_like(time)
    for k in range(1, int(7000 / pitch)):
        moving = [formant * (1 + 0.1 * np.sin(2 * np.pi * 2 * time)) for formant in formants]
        wav += sum(1 / (1 + ((k * pitch - one) / 120) ** 2) for one in moving) * np.sin(k * phase)
    wav *= 0.5 + 0.5 * np.sin(2 * np.pi * 3 * time) ** 2
    noise = np.random.default_rng(0).standard_normal(len(time))
    return (0.1 * wav / np.abs(wav).max() + 1e-4 * noise).astype(np.float32)


# VoiceEncoder.embed_utterance of resemblyzer 0.1.4 with librosa 0.11.0: windows, and the largest five of 256 values
RESEMBLYZER = {
    (3.0, 110, (500, 1500, 2500)): (
        3,
        {127: 0.24283, 113: 0.23473, 248: 0.21151, 213: 0.19772, 133: 0.18782},
    ),
    (2.3, 210, (700, 1100, 2900)): (2, {127: 0.2382, 10: 0.20019, 116: 0.1967, 224: 0.19223, 133: 0.18928}),
    (1.0, 150, (300, 2200, 3000)): (1, {62: 0.33874, 13: 0.29111, 165: 0.26775, 127: 0.18196, 197: 0.17141}),
}
RESEMBLYZER_COSINES = [0.68918, 0.5984, 0.54669]  # first and second, first and third, second and third


def test_speaker_vectors_equal_those_of_the_reference_implementation():
    vectors = []
    for arguments, (count, largest) in RESEMBLYZER.items():
        with torch.inference_mode():
            windows = _speaker_encoder().windows(torch.from_numpy(buzz(*arguments))).numpy()
        assert windows.shape == (count, 256)
        vector = windows.mean(axis=0) / np.linalg.norm(windows.mean(axis=0))
        assert {i: float(vector[i]) for i in np.argsort(-vector)[:5]} == pytest.approx(largest, abs=2e-4)
        vectors.append(vector)
    cosines = [float(vectors[i] @ vectors[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert cosines == pytest.approx(RESEMBLYZER_COSINES, abs=5e-4)


def test_the_same_voice_is_nearer_than_another(speech):
    metric = METRICS["speaker"]()
    case = Case("a", speech["en-us", 0], speech["en-us", 1])
    assert metric(speech["en-us", 0], case)["speaker_reference"] == pytest.approx(1.0, abs=1e-6)
    same = metric(speech["en-us", 0], case)["speaker_prompt"]
    other = metric(speech["en-us+f3", 0], case)
    assert same > 0.75
    assert same > other["speaker_prompt"] + 0.1 and other["speaker_reference"] < 0.75
    assert metric(speech["en-us", 0], case) == metric(speech["en-us", 0], case)


def test_noise_another_pitch_and_leaving_out_cost_similarity_level_and_delay_do_not(speech):
    metric, clip = METRICS["speaker"](), speech["en-us", 0]
    case = Case("a", clip, None)

    def score(excerpt: Excerpt) -> float:
        return metric(excerpt, case)["speaker_reference"]

    assert 1 > score(noisy(clip, 0.01)) > score(noisy(clip, 0.1))
    assert score(faster(clip, 1.3)) < 0.8
    assert score(changed(clip, clip.wav[:, : clip.wav.shape[1] // 3])) < 0.97
    assert score(changed(clip, np.roll(clip.wav, 400, axis=1))) > 0.95
    assert score(changed(clip, 0.5 * clip.wav)) > 0.95
    assert metric(clip, case)["speaker_prompt"] is None


def test_silence_has_no_voice(speech):
    clip = speech["en-us", 0]
    silence = changed(clip, np.zeros_like(clip.wav))
    assert speaker_vector(silence) is None and speaker_windows(silence).shape == (0, 256)
    metric = METRICS["speaker"]()
    assert metric(silence, Case("a", clip, clip)) == {"speaker_prompt": None, "speaker_reference": None}
    assert metric(clip, Case("a", silence, clip))["speaker_reference"] is None
    very_short = changed(clip, clip.wav[:, 20000:20100])
    assert 0 < metric(very_short, Case("a", clip, clip))["speaker_prompt"] < 0.8


@pytest.mark.parametrize(("seconds", "count"), [(0.2, 1), (1.6, 1), (1.8, 1), (2.0, 2), (2.6, 2), (2.8, 3)])
def test_a_window_that_is_mostly_missing_is_left_out(seconds, count):
    """1.6 s every 0.77 s; the last must have three quarters of its 1.6 s."""
    wav = torch.from_numpy(buzz(seconds, 110, (500, 1500, 2500)))
    with torch.inference_mode():
        assert len(_speaker_encoder().windows(wav)) == count


def test_soft_speech_is_raised_and_loud_speech_is_left_alone():
    wav = buzz(2.0, 110, (500, 1500, 2500))
    loud = speaker_windows(Excerpt(8 * wav[None], RATE))
    with torch.inference_mode():
        asis = _speaker_encoder().windows(torch.from_numpy(without_pauses(8 * wav))).numpy()
    assert loud == pytest.approx(asis, abs=1e-4)
    soft, softer = (speaker_windows(Excerpt(gain * wav[None], RATE)) for gain in (0.1, 0.03))
    assert soft == pytest.approx(softer, abs=1e-4)
    assert np.abs(soft - loud).max() > 1e-3


def test_long_pauses_are_shortened_and_nothing_else():
    wav = buzz(2.0, 110, (500, 1500, 2500))
    assert np.array_equal(without_pauses(wav), wav[: len(wav) // 480 * 480])
    pause = np.zeros(3 * RATE, dtype=np.float32)
    shorter = without_pauses(np.concatenate([wav, pause, wav]))
    assert len(shorter) / RATE == pytest.approx(4.0 + 0.36, abs=0.1)


# opinion


def test_dnsmos_is_wrapped_and_noise_lowers_it(speech):
    metric, clip = METRICS["dnsmos"](), speech["en-us", 0]
    case = Case("a", clip, None)
    clean, loud = metric(clip, case), metric(noisy(clip, 0.1), case)
    assert set(clean) == set(metric.keys) == {"ovrl", "sig", "bak"}
    assert clean["ovrl"] > loud["ovrl"] + 0.5 and clean["bak"] > loud["bak"] + 0.5
    assert metric(changed(clip, clip.wav[:, :0]), case) == {"ovrl": None, "sig": None, "bak": None}
