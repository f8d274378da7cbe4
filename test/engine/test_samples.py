"""Audio while training: what is heard, that it is the same every time, and that training does not notice."""

import json
import sys

import numpy as np
import pytest
import soundfile
import torch
from synthetic import TINY_CODEBOOK, save_tiny_codec, write_tokenized

from valle.bin.trainer_audiolm import main
from valle.codecs import load_codec
from valle.config import DataConfig, TrainConfig
from valle.engine.checkpoint import load_checkpoint
from valle.engine.samples import ContinuationSamples, choose, draw_spectrograms, with_quantizers
from valle.engine.tasks import AudioTask, make_samples
from valle.models import AudioLM

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = (
    "--decoder-dim 32 --nhead 4 --num-decoder-layers 2 --max-duration 8 --num-buckets 2 --log-interval 1 "
    "--optimizer-name AdamW --scheduler-name constant --base-lr 1e-3 --warmup-steps 2 --tensorboard false"
).split()
RATE, HOP = 16000, 320


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return load_codec(save_tiny_codec(tmp_path_factory.mktemp("codec")))


@pytest.fixture
def model():
    torch.manual_seed(1)
    return AudioLM(32, 4, 2, codebook_size=TINY_CODEBOOK).eval()


@pytest.fixture
def audible(tmp_path, codec):
    """Tokenized cuts whose codec is at hand."""
    folder = write_tokenized(tmp_path / "tokenized")
    (folder / "codec.json").write_text(json.dumps(codec.info()))
    return folder


def rows(*frames):
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(0, TINY_CODEBOOK, (count, 4), generator=draw) for count in frames]


def train(tokenized, exp_dir, *flags):
    main([*SMALL, "--manifest-dir", str(tokenized), "--exp-dir", str(exp_dir), *map(str, flags)])
    return exp_dir


def test_each_clip_is_what_its_tag_says(codec, model):
    codes = rows(200, 120)
    samples = ContinuationSamples(codec, codes, prompt_seconds=1.0, new_seconds=2.0)
    audio = samples.make(model, stage=2)
    assert list(audio) == [
        *(f"samples/{kind}" for kind in ("prompt", "codec", "ar", "ar_nar")),
        *(f"samples/{kind}_2" for kind in ("prompt", "codec", "ar", "ar_nar")),
    ]
    assert samples.sample_rate == RATE
    for row, suffix in zip(codes, ("", "_2"), strict=True):
        prompt = min(50, round(0.4 * len(row)))
        heard = row[: 50 + 100]
        torch.testing.assert_close(audio[f"samples/prompt{suffix}"], codec.decode(heard[None, :prompt])[0])
        torch.testing.assert_close(audio[f"samples/codec{suffix}"], codec.decode(heard[None])[0])
        full, first = audio[f"samples/ar_nar{suffix}"], audio[f"samples/ar{suffix}"]
        assert full.shape == first.shape == (1, (prompt + 100) * HOP)
        # Away from the seam, both begin with the prompt: all of its quantizers, and the first alone.
        sure = (prompt - codec.context_frames) * HOP
        torch.testing.assert_close(full[:, :sure], audio[f"samples/prompt{suffix}"][:, :sure])
        alone = with_quantizers(codec, 1).decode(heard[None, :prompt, :1])[0]
        torch.testing.assert_close(first[:, :sure], alone[:, :sure])
        assert not torch.allclose(full[:, :sure], first[:, :sure])
    # The AR continuation is the one that the NAR decoder refines.
    result = model.generate(codes[0][None, :50], None, 100, seed=0, min_new_tokens=100)
    torch.testing.assert_close(audio["samples/ar_nar"], codec.decode(result.codes[0][None])[0])
    torch.testing.assert_close(
        audio["samples/ar"], with_quantizers(codec, 1).decode(result.codes[0][None, :, :1])[0]
    )


def test_stage_1_has_no_nar_decoder_to_hear(codec, model):
    audio = ContinuationSamples(codec, rows(100), 1.0, 1.0).make(model, stage=1)
    assert list(audio) == ["samples/prompt", "samples/codec", "samples/ar"]
    single = AudioLM(32, 4, 2, num_quantizers=1, codebook_size=TINY_CODEBOOK).eval()
    few = ContinuationSamples(with_quantizers(codec, 1), [row[:, :1] for row in rows(100)], 1.0, 1.0)
    assert list(few.make(single, stage=0)) == ["samples/prompt", "samples/codec", "samples/ar"]


def test_only_the_model_changes_from_sample_to_sample(codec, model):
    samples = ContinuationSamples(codec, rows(100), 1.0, 1.0)
    first = samples.make(model, 0)
    torch.manual_seed(99)
    again = samples.make(model, 0)
    assert all(torch.equal(wav, again[tag]) for tag, wav in first.items())
    # As an optimizer may: without that PyTorch counts it as a change. Packed copies have their own of this matrix.
    model.ar_predict_layer.weight.data.mul_(-1.5)
    changed = samples.make(model, 0)
    assert not torch.equal(changed["samples/ar"], first["samples/ar"])
    assert torch.equal(changed["samples/codec"], first["samples/codec"])


@pytest.mark.parametrize("kind", ["encodec", "dac", "mimi"])
def test_codecs_of_the_hub_decode_their_first_quantizer(kind, tmp_path):
    """As a codec does that is loaded with one quantizer; the codec itself keeps all of its own."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    common = dict(sampling_rate=2400, num_filters=4, hidden_size=16, codebook_size=32)
    model = {
        "encodec": lambda: transformers.EncodecModel(transformers.EncodecConfig(
            **common, upsampling_ratios=[4, 3, 2], num_lstm_layers=1, target_bandwidths=[0.5, 1.0, 2.0],
        )),
        "dac": lambda: transformers.DacModel(transformers.DacConfig(
            sampling_rate=1600, downsampling_ratios=[2, 4, 2], encoder_hidden_size=4, decoder_hidden_size=32,
            n_codebooks=3, codebook_size=32, codebook_dim=4,
        )),
        "mimi": lambda: transformers.MimiModel(transformers.MimiConfig(
            **common, upsampling_ratios=[4, 3], codebook_dim=8, vector_quantization_hidden_dimension=8,
            num_quantizers=10, upsample_groups=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, intermediate_size=32, head_dim=8,
        )),
    }  # fmt: skip
    made = model[kind]()
    for name, buffer in made.named_buffers():  # codebooks of random vectors, in the place of zeros
        if name.endswith(("embed", "embed_sum")):
            buffer.normal_()
    made.save_pretrained(tmp_path / kind)
    codec = load_codec(tmp_path / kind, num_quantizers=3)
    codes = torch.randint(0, 32, (1, 20, 3))
    alone = with_quantizers(codec, 1).decode(codes[..., :1])
    torch.testing.assert_close(alone, load_codec(tmp_path / kind, num_quantizers=1).decode(codes[..., :1]))
    assert codec.num_quantizers == 3 and codec.decode(codes).shape == alone.shape
    assert not torch.allclose(codec.decode(codes), alone)


def test_long_cuts_are_chosen_and_the_choice_stays():
    durations = [2.0, 9.0, 8.5, 3.0, 12.0, 9.5]
    chosen = [choose(durations, seed) for seed in range(20)]
    assert all(len(set(places)) == 2 and min(durations[p] for p in places) >= 8 for places in chosen)
    assert [choose(durations, seed) for seed in range(20)] == chosen
    assert len(set(map(tuple, chosen))) > 3, "the seed matters"
    assert choose([2.0, 9.0, 3.0], seed=0) == [1, 2] and choose([1.0], seed=0) == [0]


def test_training_does_not_notice_that_it_is_listened_to(audible, tmp_path, monkeypatch):
    flags = ("--max-steps", 5, "--dropout", 0.2, "--save-every-n", 5)
    silent = train(audible, tmp_path / "silent", *flags)
    make = ContinuationSamples.make

    def drawing(self, model, stage):
        torch.rand(5)  # as other makers may, from the numbers that dropout uses
        return make(self, model, stage)

    monkeypatch.setattr(ContinuationSamples, "make", drawing)
    heard = train(audible, tmp_path / "heard", *flags, "--sample-interval", 2)
    assert sorted(path.name for path in (heard / "samples").iterdir()) == ["step-2", "step-4"]
    one, two = (load_checkpoint(exp / "checkpoint-5.pt") for exp in (silent, heard))
    for name, value in one["model"].items():
        assert torch.equal(value, two["model"][name]), name
    assert all(torch.equal(state, two["rng"][0][name]) for name, state in one["rng"][0].items())


def test_files_pictures_and_tensorboard(audible, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("matplotlib")
    flags = ("--max-steps", 2, "--sample-interval", 1, "--train-stage", 2, "--tensorboard", "true")
    exp = train(audible, tmp_path / "exp", *flags)
    kinds = [f"{kind}{suffix}" for suffix in ("", "_2") for kind in ("prompt", "codec", "ar", "ar_nar")]
    for step in (1, 2):
        folder = exp / "samples" / f"step-{step}"
        assert {path.name for path in folder.iterdir()} == {
            *(f"{kind}.wav" for kind in kinds),
            "spectrogram.png",
        }
        wav, rate = soundfile.read(folder / "ar_nar.wav")
        assert rate == RATE and len(wav) > 5 * RATE and np.abs(wav).max() > 0
        assert (folder / "spectrogram.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    sizes = {"audio": 0, "images": 0}
    found = accumulator.EventAccumulator(str(exp / "tensorboard"), size_guidance=sizes).Reload()
    assert set(found.Tags()["audio"]) == {f"samples/{kind}" for kind in kinds}
    (one, two) = found.Audio("samples/ar_nar")
    assert (one.step, two.step) == (1, 2) and one.sample_rate == RATE and one.length_frames == len(wav)
    pictures = found.Images("samples/spectrogram")
    assert [picture.step for picture in pictures] == [1, 2] and pictures[0].width > pictures[0].height > 200


def test_a_codec_that_is_not_at_hand_is_said_once_and_training_goes_on(tokenized, tmp_path, capfd):
    exp = train(tokenized, tmp_path / "exp", "--max-steps", 3, "--sample-interval", 1)
    said = [line for line in capfd.readouterr().err.splitlines() if "no audio samples" in line]
    assert len(said) == 1 and "unknown codec 'tiny'" in said[0]
    assert (exp / "best-valid-loss.pt").is_file() and not (exp / "samples").exists()


def test_sharded_models_are_not_listened_to():
    config = TrainConfig(sample_interval=5, parallel="fsdp")
    assert make_samples(AudioTask(DataConfig()), config, {"name": "valle_16khz"}, None, 4) is None


def test_samples_that_do_not_fit_into_memory_are_given_up(audible, tmp_path, monkeypatch, capfd):
    calls = []

    def too_large(self, model, stage):
        calls.append(stage)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ContinuationSamples, "make", too_large)
    exp = train(audible, tmp_path / "exp", "--max-steps", 3, "--sample-interval", 1)
    assert calls == [0] and (exp / "best-valid-loss.pt").is_file()
    assert "no more audio samples" in capfd.readouterr().err


def test_without_matplotlib_there_is_audio_and_no_picture(audible, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    exp = train(audible, tmp_path / "exp", "--max-steps", 1, "--sample-interval", 1)
    assert (exp / "samples" / "step-1" / "ar.wav").is_file()
    assert not list(exp.rglob("*.png"))


def test_a_picture_shows_where_sound_is(tmp_path):
    """A tone of 1 kHz in the second half of the clip: bright there and nowhere else."""
    pytest.importorskip("matplotlib")
    time = torch.arange(2 * RATE) / RATE
    tone = torch.sin(2 * torch.pi * 1000 * time) * (time > 1)
    clips = {"samples/prompt": tone[None, :RATE], "samples/ar": tone[None]}
    picture = draw_spectrograms(clips, RATE, tmp_path / "p.png")
    assert picture is not None and picture.dtype == np.uint8 and picture.ndim == 3
    # By the columns of its two panels, apart from axes and titles: warm colours are loud.
    red, green, blue = (picture[..., index].astype(int) for index in range(3))
    loud = (red > 200) & (green > 60) & (blue < 200)
    places = np.flatnonzero(loud.sum(0) > 2)
    assert len(places) and places.min() > 0.7 * picture.shape[1]
