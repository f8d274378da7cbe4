"""Each embedding: its shape, that it is the same at every call, and that distances between sets move the right way."""

import numpy as np
import pytest
import torch
import transformers

from valle.codecs import load_codec
from valle.evaluation import embeddings, speech
from valle.evaluation.distances import frechet_distance, kernel_distance
from valle.evaluation.embeddings import EMBEDDINGS, ClapEmbedding, EncodecEmbedding, window_statistics
from valle.evaluation.metrics import Excerpt
from valle.utils.audio import convert_audio
from valle.utils.errors import UserError

RATE = 16000
SHIPPED = ("mel", "codec")
PACKAGED = ("speaker", "whisper")
WINDOWS = {"mel": 7, "codec": 7, "speaker": 4, "whisper": 3}  # in 4 s
WIDTHS = {"mel": 96, "codec": 192, "speaker": 256, "whisper": 384}


def sounds(count: int, seconds: float = 3.0, octave: int = 0, seed: int = 0) -> list[np.ndarray]:
    """Clips (1, N) of random tones that swell and fade like syllables."""
    generator = np.random.default_rng(seed)
    time = np.arange(round(seconds * RATE)) / RATE
    clips = []
    for _ in range(count):
        wav = np.zeros(len(time))
        for onset in np.arange(0.0, seconds, 0.3):
            hz = 2**octave * 110 * 2 ** (generator.integers(0, 12) / 12)
            swell = np.exp(-(((time - onset - 0.1) / 0.06) ** 2))
            wav += 0.1 * swell * sum(np.sin(2 * np.pi * h * hz * time) / h for h in range(1, 9))
        clips.append(wav[None].astype(np.float32))
    return clips


def rows(name: str, clips: list[np.ndarray], rate: int = RATE) -> np.ndarray:
    return np.concatenate([EMBEDDINGS[name]()(Excerpt(clip, rate)) for clip in clips])


@pytest.mark.parametrize("name", [*SHIPPED, *PACKAGED])
def test_windows_width_and_repetition(name):
    embedding = EMBEDDINGS[name]()
    assert embedding.name == name and embedding.missing() is None
    (clip,) = sounds(1, seconds=4.0)
    vectors = embedding(Excerpt(clip, RATE))
    assert vectors.shape == (WINDOWS[name], WIDTHS[name])
    assert vectors.dtype == np.float32 and np.isfinite(vectors).all()
    np.testing.assert_array_equal(embedding(Excerpt(clip, RATE)), vectors)
    # what is heard does not depend on the rate and the channels of the file
    other = embedding(Excerpt(convert_audio(clip, RATE, 32000, 2), 32000))
    assert np.abs(other - vectors).mean() < 0.05 * np.abs(vectors).mean()


@pytest.mark.parametrize("name", [*SHIPPED, *PACKAGED])
@pytest.mark.parametrize("samples", [0, 1, 100, RATE])
def test_short_and_silent_audio(name, samples):
    vectors = EMBEDDINGS[name]()(Excerpt(np.zeros((1, samples), np.float32), RATE))
    assert vectors.shape[1] == WIDTHS[name] and np.isfinite(vectors).all()
    assert len(vectors) == (0 if samples == 0 or name == "speaker" else 1)


@pytest.mark.parametrize("name", [*SHIPPED, "whisper"])
def test_distances_move_the_right_way(name):
    clips = sounds(5)
    noise = np.random.default_rng(1).standard_normal((5, *clips[0].shape)).astype(np.float32)
    true = rows(name, clips)
    noisy = [
        rows(name, [clip + level * wav for clip, wav in zip(clips, noise, strict=True)])
        for level in (0.001, 0.01, 0.1)
    ]
    same_kind = rows(name, sounds(5, seed=1))
    higher = rows(name, sounds(5, octave=2, seed=1))
    silence = rows(name, [0 * clip for clip in clips])
    shorter = rows(name, [clip[:, : 2 * RATE] for clip in clips])  # fewer windows, but of the same kind
    for distance in (frechet_distance, kernel_distance):
        assert distance(true, true) == pytest.approx(0.0, abs=1e-3)
        steps = [distance(true, one) for one in noisy]
        assert 0 < steps[0] < steps[1] < steps[2]
        near = distance(true, same_kind)
        assert near < distance(true, higher) and near < distance(true, silence) and near < steps[2]
        assert distance(true, shorter) < steps[2] / 2


def test_statistics_by_hand():
    frames = torch.tensor(
        [[0.0, 5.0], [2.0, 5.0], [4.0, 5.0], [0.0, 5.0], [2.0, 5.0], [4.0, 5.0], [9.0, 9.0]]
    )
    windows = window_statistics(frames, frame_rate=4.0)  # four frames, every two; the last frame is left over
    assert windows.shape == (2, 6)
    np.testing.assert_allclose(windows[0], [1.5, 5.0, np.std([0, 2, 4, 0]), 0.0, 8 / 3, 0.0], rtol=1e-6)
    np.testing.assert_allclose(windows[1], [2.5, 5.0, np.std([4, 0, 2, 4]), 0.0, 8 / 3, 0.0], rtol=1e-6)
    np.testing.assert_allclose(window_statistics(frames[:1], 4.0), [[0.0, 5.0, 0.0, 0.0, 0.0, 0.0]])
    assert window_statistics(frames[:0], 4.0).shape == (0, 6)


def test_the_codec_embedding_is_of_the_shipped_codec():
    (clip,) = sounds(1, seconds=1.0)
    codec = load_codec("valle_16khz")
    latents = codec.latents(torch.from_numpy(clip)[None])[0].detach()  # (T, D)
    vectors = EMBEDDINGS["codec"]()(Excerpt(clip, RATE))
    np.testing.assert_allclose(vectors[0, : latents.shape[1]], latents.mean(dim=0), atol=1e-4)


def test_the_speaker_embedding_is_that_of_the_metric():
    (clip,) = sounds(1)
    np.testing.assert_array_equal(rows("speaker", [clip]), speech.speaker_windows(Excerpt(clip, RATE)))


def test_a_window_of_whisper_does_not_depend_on_where_it_stands():
    (clip,) = sounds(1, seconds=6.0)
    whole = rows("whisper", [clip])
    assert len(whole) == 5
    middle = clip[:, 2 * RATE : 4 * RATE]
    np.testing.assert_allclose(rows("whisper", [middle])[0], whole[2], atol=0.01)
    model = speech.recognizer(None)
    frames = np.array(model.encode(model.feature_extractor(middle[0])))[0]  # (100, 384)
    np.testing.assert_allclose(whole[2], frames.mean(axis=0), atol=0.01)


@pytest.mark.parametrize("name", ["clap", "encodec"])
def test_absent_hub_weights_are_one_clear_line(name, monkeypatch):
    monkeypatch.setattr(embeddings, "_cached", lambda source: False)
    embedding = EMBEDDINGS[name]()
    hint = embedding.missing()
    assert "hf download" in hint and "\n" not in hint
    embeddings._clap.cache_clear()
    with pytest.raises(UserError, match="hf download"):
        embedding(Excerpt(sounds(1)[0], RATE))


def test_clap_from_a_folder(tmp_path):
    torch.manual_seed(0)
    audio = dict(
        window_size=8, patch_embeds_hidden_size=8, depths=[1] * 4, num_attention_heads=[1] * 4, hidden_size=64
    )
    text = dict(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    config = transformers.ClapConfig(audio_config=audio, text_config=text, projection_dim=16)
    transformers.ClapModel(config).save_pretrained(tmp_path)
    transformers.ClapFeatureExtractor(truncation="rand_trunc").save_pretrained(tmp_path)
    embedding = ClapEmbedding(str(tmp_path))
    assert embedding.missing() is None
    (clip,) = sounds(1, seconds=4.0)
    vectors = embedding(Excerpt(clip, RATE))
    assert vectors.shape == (3, 16)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(embedding(Excerpt(clip, RATE)), vectors)
    assert embedding(Excerpt(clip[:, :0], RATE)).shape == (0, 16)


def test_encodec_from_a_folder(tmp_path):
    torch.manual_seed(0)
    config = transformers.EncodecConfig(
        sampling_rate=2400, upsampling_ratios=[4, 3, 2], num_filters=4, hidden_size=16, codebook_size=32,
        num_lstm_layers=1, target_bandwidths=[0.5, 1.0, 2.0],
    )  # fmt: skip
    transformers.EncodecModel(config).save_pretrained(tmp_path)
    embedding = EncodecEmbedding(str(tmp_path))
    assert embedding.missing() is None
    (clip,) = sounds(1, seconds=2.0)
    vectors = embedding(Excerpt(clip, RATE))
    assert vectors.shape == (3, 48) and np.isfinite(vectors).all() and vectors.std() > 0
    assert embedding(Excerpt(clip[:, :0], RATE)).shape == (0, 48)


def test_an_unreadable_clap_folder_is_one_clear_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        ClapEmbedding(str(tmp_path))(Excerpt(sounds(1)[0], RATE))
