"""The codec that belongs to a checkpoint: the same weights or an error."""

import pytest
from synthetic import save_tiny_codec

from valle.codecs import load_codec, matching_codec
from valle.utils.errors import UserError


@pytest.fixture
def info(tmp_path):
    return load_codec(save_tiny_codec(tmp_path / "tiny")).info()


def test_the_codec_comes_with_the_quantizers_of_the_model(info):
    assert matching_codec(info).num_quantizers == info["num_quantizers"] == 4
    assert matching_codec(info, "cpu", 2).num_quantizers == 2


def test_other_weights_are_refused(info):
    with pytest.raises(UserError, match="has fingerprint .* other weights"):
        matching_codec({**info, "fingerprint": "f" * 16}, "cpu", 2)
    assert matching_codec({**info, "fingerprint": None}).name == info["name"]


def test_a_checkpoint_without_a_codec_is_refused(info):
    with pytest.raises(UserError, match="does not name its codec"):
        matching_codec({**info, "name": None})
