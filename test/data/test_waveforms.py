"""Random pieces of recordings: repeatable, and as many batches on every rank."""

import numpy as np
import pytest
import torch

from valle.data.manifests import write_audio
from valle.data.waveforms import RandomSegments


@pytest.fixture
def paths(tmp_path):
    draw = np.random.default_rng(0)
    found = [tmp_path / f"{number}.flac" for number in range(3)]
    for number, path in enumerate(found):
        write_audio(path, 0.3 * draw.uniform(-1, 1, (1, 8000 * (number + 1))), 8000)
    return found


def test_pieces_are_a_function_of_seed_epoch_and_number(paths):
    source, again, other = (RandomSegments(paths, 8000, 0.5, 4, seed) for seed in (1, 1, 2))
    whole = [batch["wav"] for batch in source.epoch(3)]
    assert len(whole) == 3 and all(wav.shape == (4, 1, 4000) for wav in whole)
    rest = [batch["wav"] for batch in again.epoch(3, 1)]
    assert all(torch.equal(one, two) for one, two in zip(rest, whole[1:], strict=True))
    assert not torch.equal(next(again.epoch(4))["wav"], whole[0])
    # Another rank draws others, as many.
    ranks = [batch["wav"] for batch in other.epoch(3)]
    assert len(ranks) == 3 and not torch.equal(ranks[0], whole[0])


def test_the_largest_batch_has_as_many_pieces_as_fit(paths):
    source = RandomSegments(paths, 8000, 0.38, 4, 1)
    assert torch.equal(source.largest(2)["wav"], next(source.epoch(2))["wav"])
    for seconds, pieces in ((1.14, 3), (1.0, 2), (0.1, 1)):
        assert source.largest(2, max_duration=seconds)["wav"].shape == (pieces, 1, 3040)
