"""A VALL-E learns to fill gaps: `--infill-prob` of trainer.py."""

import pytest
import torch
from test_reading_clock import SMALL, corpus

from valle.bin.trainer import main
from valle.models import VALLE, load_model
from valle.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def seen(monkeypatch):
    """Of each loss, whether the model is in training and (prefix, suffix) of its rows, or None."""
    calls, real = [], VALLE.compute_loss

    def compute_loss(self, batch, stage):
        sides = None
        if "suffix_lens" in batch:
            sides = list(zip(batch["prefix_lens"].tolist(), batch["suffix_lens"].tolist(), strict=True))
        calls.append((self.training, sides))
        return real(self, batch, stage)

    monkeypatch.setattr(VALLE, "compute_loss", compute_loss)
    return calls


def train(folder, *flags):
    main(
        [*SMALL, "--manifest-dir", str(folder / "data"), "--exp-dir", str(folder / "exp"), "--max-steps", "2"]
        + list(map(str, flags))
    )


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_training_has_gaps_and_validation_none(tmp_path, seen, stage):
    corpus(tmp_path / "data", 5)
    train(tmp_path, "--infill-prob", 0.5, "--train-stage", stage)
    training = [row for is_training, sides in seen if is_training for row in sides]
    assert (0, 0) in training and any(before > 0 and behind > 0 for before, behind in training)
    assert any(not is_training for is_training, _ in seen)
    assert all(sides is None for is_training, sides in seen if not is_training)
    model, contents = load_model(tmp_path / "exp" / "best-valid-loss.pt")
    assert contents["config"]["data"]["infill_prob"] == 0.5
    filled = model.infill(torch.tensor([1, 2, 3]), torch.ones(20, 2, dtype=torch.long), 5, 9, seed=0)
    assert filled.codes[0].shape == (20, 2)


def test_without_the_flag_there_are_none(tmp_path, seen):
    corpus(tmp_path / "data", 5)
    train(tmp_path)
    assert seen and all(sides is None for _, sides in seen)


@pytest.mark.parametrize(
    "flags,message",
    [
        (
            ("--infill-prob", 0.001, "--pattern", "delay"),
            "fills gaps with pattern valle and groups of 1 alone",
        ),
        (("--infill-prob", 1.5), "--infill-prob is 1.5, expected a share from 0 to 1"),
    ],
)
def test_what_cannot_be_is_said_before_the_first_step(tmp_path, seen, flags, message):
    corpus(tmp_path / "data", 5)
    with pytest.raises(UserError, match=message):
        train(tmp_path, *flags)
    assert len(seen) <= 1


def test_the_largest_batch_is_tried_without_gaps(tmp_path, seen):
    """A row with one has no prompt from elsewhere beside its frames, so it may be shorter."""
    corpus(tmp_path / "data", 5)
    train(tmp_path, "--infill-prob", 1, "--oom-check", "true")
    tried = [sides is None for is_training, sides in seen if is_training]
    assert tried[0] and tried[-2:] == [False, False] and tried == sorted(tried, reverse=True)
