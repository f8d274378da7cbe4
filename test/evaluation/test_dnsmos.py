"""DNSMOS against values that `speechmos` 0.0.1.1 itself gives for the same signals."""

import numpy as np
import pytest

from valle.evaluation.audio import DNSMOS_HINT, dnsmos, dnsmos_available
from valle.utils.errors import UserError

needs_weights = pytest.mark.skipif(not dnsmos_available(), reason=f"DNSMOS needs its packages: {DNSMOS_HINT}")
# speechmos.dnsmos.run(signal, 16000) of `signal(seconds)`, drawn in this order from one generator.
REFERENCE = {
    5.0: {"ovrl": 1.1852762, "sig": 1.3112727, "bak": 1.3420162},
    9.5: {"ovrl": 1.3603334, "sig": 1.6126954, "bak": 1.5458549},
    12.3: {"ovrl": 1.2417772, "sig": 1.4195767, "bak": 1.4049834},
}


def signals() -> dict[float, np.ndarray]:
    generator = np.random.default_rng(0)
    out = {}
    for seconds in REFERENCE:
        time = np.arange(int(seconds * 16000)) / 16000
        wave = 0.3 * np.sin(2 * np.pi * 200 * time) * (1 + np.sin(2 * np.pi * 3 * time)) / 2
        out[seconds] = (wave + 0.01 * generator.standard_normal(len(time))).astype(np.float32)
    return out


@needs_weights
def test_equals_the_reference_implementation():
    for seconds, wav in signals().items():
        assert dnsmos(wav, 16000) == pytest.approx(REFERENCE[seconds], abs=1e-4)


@needs_weights
def test_any_rate_channels_and_level_work():
    wav = signals()[5.0]
    stereo = np.stack([wav, wav])
    assert dnsmos(stereo, 16000) == pytest.approx(dnsmos(wav, 16000))
    assert dnsmos(stereo * 8, 16000) == pytest.approx(dnsmos(wav / np.abs(wav).max(), 16000), abs=1e-3)
    assert 1 <= dnsmos(np.repeat(wav, 3)[None], 48000)["ovrl"] <= 5
    silence = dnsmos(np.zeros((1, 16000), dtype=np.float32), 16000)
    assert all(np.isfinite(list(silence.values())))
    with pytest.raises(ValueError, match="without samples"):
        dnsmos(np.zeros((1, 0), dtype=np.float32), 16000)


def test_missing_packages_are_one_clear_line(monkeypatch):
    import valle.evaluation.audio as module

    monkeypatch.setattr(module, "dnsmos_available", lambda: False)
    module._dnsmos_session.cache_clear()
    with pytest.raises(UserError, match="pip install speechmos onnxruntime"):
        dnsmos(np.zeros((1, 1600), dtype=np.float32), 16000)
