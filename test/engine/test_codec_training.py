"""The codec's own training: its architecture is chosen by flags, kept in checkpoints, and not mixed up."""

import dataclasses

import numpy as np
import pytest
import torch
from lhotse import CutSet, MonoCut, Recording
from synthetic import save_tiny_codec

from valle.bin.trainer_codec import main
from valle.codecs import load_codec
from valle.codecs.spectral_codec import SpectralCodecConfig
from valle.engine.checkpoint import load_checkpoint, save_checkpoint
from valle.utils.audio import save_audio
from valle.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = (
    "--segment 0.4 --batch-size 2 --optimizer-name AdamW --scheduler-name constant --base-lr 1e-3 "
    "--tensorboard false --device cpu"
).split()
ARCHITECTURE = {
    "sample_rate": 8000, "hop_length": 80, "num_quantizers": 2, "codebook_size": 16, "n_fft": 256, "n_mels": 20,
    "latent_dim": 4, "encoder_dim": 8, "encoder_depth": 1, "encoder_kernel": 3, "decoder_dim": 12,
    "decoder_depth": 2, "decoder_kernel": 5, "quantizer_dropout": 0.5,
}  # fmt: skip


def flags_of(architecture):
    return [
        part for key, value in architecture.items() for part in (f"--{key.replace('_', '-')}", str(value))
    ]


@pytest.fixture
def manifest(tmp_path):
    """Two seconds of noise to learn, one to validate on."""
    cuts = []
    for split, seconds in (("train", 2), ("validation", 1)):
        wav = 0.1 * np.random.default_rng(seconds).standard_normal((1, 8000 * seconds)).astype(np.float32)
        save_audio(tmp_path / f"{split}.wav", wav, 8000)
        recording = Recording.from_file(tmp_path / f"{split}.wav", recording_id=split)
        cuts.append(MonoCut(split, 0.0, seconds, 0, recording=recording, custom={"split": split}))
    CutSet.from_cuts(cuts).to_file(str(tmp_path / "cuts.jsonl.gz"))
    return tmp_path / "cuts.jsonl.gz"


def train(manifest, exp, *flags, architecture=ARCHITECTURE, steps=1, stage=1):
    main([*SETTINGS, "--manifest", str(manifest), "--exp-dir", str(exp), "--max-steps", str(steps),
          "--train-stage", str(stage), *flags_of(architecture), *map(str, flags)])  # fmt: skip
    return load_checkpoint(max(exp.glob("checkpoint-*.pt"), key=lambda path: int(path.stem.split("-")[1])))


def test_every_field_is_a_flag_with_a_help_line(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    names = {field.name for field in dataclasses.fields(SpectralCodecConfig)}
    assert names == ARCHITECTURE.keys()
    for field in dataclasses.fields(SpectralCodecConfig):
        assert f"--{field.name.replace('_', '-')} " in shown and field.metadata["help"]
        assert getattr(SpectralCodecConfig(**ARCHITECTURE), field.name) != field.default


def test_a_codec_of_any_architecture_trains_and_is_exported(manifest, tmp_path, capsys):
    contents = train(manifest, tmp_path / "exp")
    assert contents["config"]["codec"] == ARCHITECTURE
    train(manifest, tmp_path / "exp", stage=2)
    main(["--exp-dir", str(tmp_path / "exp"), "--export", str(tmp_path / "codec")])
    assert "step 2, stage 2" in capsys.readouterr().out
    codec = load_codec(tmp_path / "codec")
    assert dataclasses.asdict(codec.config) == ARCHITECTURE
    assert (codec.sample_rate, codec.hop_length, codec.frame_rate) == (8000, 80, 100.0)
    codes = codec.encode(0.1 * torch.randn(1, 1, 800, generator=torch.Generator().manual_seed(0)))
    assert codes.shape == (1, 10, 2) and int(codes.max()) < 16
    assert codec.decode(codes).shape == (1, 1, 800)
    assert codec.codebooks().shape == (2, 16, 4)


def test_without_flags_it_is_the_published_one():
    assert dataclasses.asdict(SpectralCodecConfig()) == {
        "sample_rate": 16000, "hop_length": 320, "num_quantizers": 4, "codebook_size": 1024, "n_fft": 640,
        "n_mels": 80, "latent_dim": 64, "encoder_dim": 256, "encoder_depth": 5, "encoder_kernel": 5,
        "decoder_dim": 384, "decoder_depth": 7, "decoder_kernel": 7, "quantizer_dropout": 0.25,
    }  # fmt: skip


def test_a_start_decides_about_the_architecture(manifest, tmp_path):
    given = save_tiny_codec(tmp_path / "tiny")
    config = dataclasses.asdict(load_codec(given).config)
    contents = train(manifest, tmp_path / "exp", "--init-from", given, architecture={"latent_dim": 8})
    assert contents["config"]["codec"] == config
    begun = train(manifest, tmp_path / "exp", "--init-from", given, architecture={}, steps=2)
    assert begun["config"]["codec"] == config and begun["step"] == 2
    for flag, value, found in (("--latent-dim", 16, 8), ("--n-fft", 1024, 640), ("--num-quantizers", 2, 4)):
        with pytest.raises(
            UserError, match=rf"{flag} is {value}, but --init-from '.*tiny' has {found}; leave"
        ) as e:
            train(manifest, tmp_path / "other", "--init-from", given, flag, value, architecture={})
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [{"num_quantizers": 3}, {"n_fft": 512}, {"decoder_dim": 16}, {"hop_length": 40}, {"sample_rate": 16000}],
    ids=str,
)
def test_another_architecture_in_the_same_folder_is_refused(manifest, tmp_path, stage, changes):
    """Also where all weights would fit: a codec of another rate is another codec."""
    train(manifest, tmp_path / "exp")
    ((field, value),) = changes.items()
    flag = f"--{field.replace('_', '-')}"
    with pytest.raises(
        UserError, match=f"{flag} is {value}, but .*checkpoint-1.pt' .* {ARCHITECTURE[field]}"
    ) as e:
        train(manifest, tmp_path / "exp", architecture=ARCHITECTURE | changes, steps=2, stage=stage)
    assert "\n" not in str(e.value) and not (tmp_path / "exp" / "checkpoint-2.pt").exists()


def test_flags_of_the_architecture_may_be_left_out_when_it_goes_on(manifest, tmp_path):
    train(manifest, tmp_path / "exp")
    for steps, stage in ((2, 1), (1, 2)):
        contents = train(manifest, tmp_path / "exp", architecture={}, steps=steps, stage=stage)
        assert contents["config"]["codec"] == ARCHITECTURE and contents["step"] == 1 + stage


def test_a_folder_with_a_training_is_gone_on_with_whatever_it_may_start_from(manifest, tmp_path):
    train(manifest, tmp_path / "exp")
    given = save_tiny_codec(tmp_path / "tiny")
    contents = train(manifest, tmp_path / "exp", "--init-from", given, architecture={}, steps=2)
    assert contents["config"]["codec"] == ARCHITECTURE and contents["step"] == 2


def test_another_models_folder_is_named(manifest, tmp_path):
    contents = train(manifest, tmp_path / "exp")
    contents["config"] = {"model": {}}
    save_checkpoint(tmp_path / "exp", ["checkpoint-1.pt"], contents)
    with pytest.raises(
        UserError, match="checkpoint-1.pt' is no codec's checkpoint; give the codec an --exp-dir"
    ):
        train(manifest, tmp_path / "exp", steps=2)


def test_a_new_training_in_the_same_folder_is_free(manifest, tmp_path):
    train(manifest, tmp_path / "exp")
    (tmp_path / "exp" / "checkpoint-1.pt").unlink()
    other = ARCHITECTURE | {"decoder_dim": 16}
    contents = train(manifest, tmp_path / "exp", "--resume", "false", architecture=other)
    assert contents["config"]["codec"] == other
