"""Steps of the engine on batches in memory: every optimizer, stage and number format; two clips learned by heart."""

import pytest
import torch

from valle.config import TrainConfig
from valle.engine.trainer import Trainer
from valle.models import AudioLM

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 300
RATES = {"AdamW": 1e-3, "ScaledAdam": 0.02}


class OneBatch:
    """The same two clips in every epoch."""

    def __init__(self, codebook_size):
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(codebook_size, (2, 20, 3), generator=generator)
        self.batch = {
            "x": codes[:, :6], "x_lens": torch.tensor([6, 4]), "y": codes[:, 6:], "y_lens": torch.tensor([14, 9]),
            "ids": ["one", "two"],
        }  # fmt: skip

    def epoch(self, epoch, skip=0):
        return iter([dict(self.batch)][skip:])


def trainer(tmp_path, model=None, **settings):
    torch.manual_seed(0)
    source = OneBatch(30)
    model = model or AudioLM(32, 4, 2, num_quantizers=3, codebook_size=30, dropout=0.0)
    settings = {"tensorboard": False, "scheduler_name": "constant", "warmup_steps": 1, **settings}
    return Trainer(model, TrainConfig(exp_dir=str(tmp_path), **settings), source, None, {})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("optimizer", list(RATES))
def test_every_optimizer_stage_and_format_takes_a_step(tmp_path, optimizer, stage, dtype):
    engine = trainer(
        tmp_path, train_stage=stage, dtype=dtype, optimizer_name=optimizer, base_lr=RATES[optimizer], num_epochs=2,
        log_interval=1,
    )  # fmt: skip
    before = {name: value.clone() for name, value in engine.model.state_dict().items()}
    engine.run()
    moved = {
        name for name, value in engine.model.state_dict().items() if not torch.equal(value, before[name])
    }
    prefixes = {0: {"ar", "nar"}, 1: {"ar"}, 2: {"nar"}}[stage]
    assert {name.split("_")[0] for name in moved} == prefixes, "the other half stays bit-equal"
    assert engine.step == 2 and engine.guard.bad_steps == 0
    assert all(bool(torch.isfinite(value).all()) for value in engine.model.state_dict().values())
    assert all(value.dtype == torch.float32 for value in engine.model.state_dict().values())


@pytest.mark.parametrize(
    "optimizer,dtype", [("AdamW", "float32"), ("AdamW", "bfloat16"), ("ScaledAdam", "float32")]
)
@pytest.mark.parametrize("stage", [1, 2])
def test_two_clips_are_learned_by_heart(tmp_path, optimizer, dtype, stage):
    engine = trainer(
        tmp_path, train_stage=stage, dtype=dtype, optimizer_name=optimizer, base_lr=3 * RATES[optimizer],
        scheduler_name="cosine", max_steps=STEPS,
    )  # fmt: skip
    losses = []
    for _ in range(STEPS):
        engine._train_step([dict(engine.train_source.batch)])
        losses.append(engine.current.average()["loss"])
        engine.current = type(engine.current)()
    assert losses[-1] < 0.1 * losses[0], (losses[0], losses[-1])
