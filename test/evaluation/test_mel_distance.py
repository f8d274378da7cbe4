"""Log-mel distance: zero for the same, growing with noise, finite for silence."""

import numpy as np
import pytest

from valle.evaluation.audio import log_mel, log_mel_distance, mel_frequencies


def tone(seconds: float = 1.0, rate: int = 16000, hz: float = 440.0) -> np.ndarray:
    time = np.arange(int(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * hz * time)).astype(np.float32)[None]


def test_identical_is_zero_and_noise_increases_it():
    wav = tone()
    noise = np.random.default_rng(0).standard_normal(wav.shape).astype(np.float32)
    distances = [log_mel_distance(wav, wav + level * noise, 16000) for level in (0.0, 0.001, 0.01, 0.1)]
    assert distances[0] == 0.0
    assert distances == sorted(distances) and distances[1] > 0.01


def test_ten_times_louder_is_a_distance_of_one():
    noise = np.random.default_rng(0).standard_normal((1, 16000)).astype(np.float32)
    assert log_mel_distance(noise, 10 * noise, 16000) == pytest.approx(1.0, abs=1e-4)


def test_silence_and_very_short_audio_are_finite():
    silence = np.zeros((1, 8000), dtype=np.float32)
    assert log_mel_distance(silence, silence, 16000) == 0.0
    assert (
        np.isfinite(log_mel_distance(tone(0.5), silence, 16000))
        and log_mel_distance(tone(0.5), silence, 16000) > 0.5
    )
    assert log_mel(silence[:, :10], 16000).shape == (1, 1, 80)


def test_lengths_may_differ_channels_may_not():
    assert log_mel_distance(tone(1.0), tone(0.7), 16000) < 0.05
    assert log_mel_distance(tone()[0], tone(), 16000) == 0.0
    with pytest.raises(ValueError, match="2 channels against 1"):
        log_mel_distance(np.zeros((2, 4000)), np.zeros((1, 4000)), 16000)


@pytest.mark.parametrize("rate", [16000, 24000, 44100])
def test_a_tone_lights_the_band_of_its_frequency_at_any_rate(rate):
    spectrum = log_mel(tone(rate=rate, hz=1000.0), rate)[0]
    assert spectrum.shape[0] == pytest.approx(1 / 0.016, abs=1)
    centres = mel_frequencies(rate)
    assert (np.diff(centres) > 0).all()
    assert centres[spectrum.mean(axis=0).argmax()] == pytest.approx(1000, rel=0.08)
