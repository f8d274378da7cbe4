"""Fine-tuning with low-rank adapters."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from valle.bin.trainer_audiolm import main
from valle.engine.adapters import Adapters, apply_adapter, merged_copy
from valle.engine.checkpoint import load_checkpoint
from valle.engine.trainer import Trainer
from valle.models import AudioLM, load_model
from valle.utils.errors import UserError

pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = (
    "--max-duration 8 --num-buckets 2 --log-interval 1 --optimizer-name AdamW --scheduler-name constant "
    "--base-lr 1e-2 --warmup-steps 2 --tensorboard false"
).split()
DIMS = "--decoder-dim 32 --nhead 4 --num-decoder-layers 2 --share-embedding true".split()
LORA = ("--lora-rank", 4, "--lora-alpha", 8)
TOOL = Path(__file__).resolve().parents[2] / "tools" / "apply_lora.py"
MATRICES = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")


def run(tokenized, exp_dir, *flags):
    main([*PLAIN, "--manifest-dir", str(tokenized), "--exp-dir", str(exp_dir), *map(str, flags)])
    return exp_dir


def records(exp_dir, split):
    lines = [json.loads(line) for line in (exp_dir / "log" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


@pytest.fixture
def base(tokenized, tmp_path):
    return run(tokenized, tmp_path / "base", *DIMS, "--num-epochs", 1) / "best-valid-loss.pt"


def batch(seed=0):
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(30, (3, 30, 4), generator=draw)
    lens = torch.tensor([10, 8, 5])
    return {"x": codes[:, :10], "x_lens": lens, "y": codes[:, 10:], "y_lens": 2 * lens}


def model_with_adapters(stage):
    torch.manual_seed(0)
    model = AudioLM(32, 4, 2, codebook_size=30)
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    return model, plain, Adapters(model, stage, 4, 8.0)


@pytest.mark.parametrize("stage,decoders", [(0, ("ar_", "nar_")), (1, ("ar_",)), (2, ("nar_",))])
def test_only_adapters_of_the_stage_are_trained_and_at_first_nothing_changes(stage, decoders):
    model, plain, adapters = model_with_adapters(stage)
    names = [name for name, _ in adapters.trained(model.stage_parameters(stage))]
    assert len(names) == 2 * len(MATRICES) * 2 * len(decoders) and all(
        name.startswith(decoders) for name in names
    )
    expected = {
        f"{half}decoder.layers.{layer}.{matrix}"
        for half in decoders
        for layer in (0, 1)
        for matrix in MATRICES
    }
    assert set(adapters.places) == expected
    merged = adapters.merged(model.state_dict())
    assert merged.keys() == plain.keys() and all(torch.equal(merged[name], plain[name]) for name in plain)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_merged_gives_what_unmerged_gives(stage):
    model, plain, adapters = model_with_adapters(stage)
    with torch.no_grad():
        for _, parameter in adapters.trained(model.named_parameters()):
            parameter.normal_(std=0.3)
    model.eval()
    twin = AudioLM(32, 4, 2, codebook_size=30).eval()
    twin.load_state_dict(adapters.merged(model.state_dict()))
    first, copied = twin.compute_loss(batch(), 0).loss, merged_copy(model)
    torch.testing.assert_close(model.compute_loss(batch(), 0).loss, first)
    torch.testing.assert_close(copied.compute_loss(batch(), 0).loss, first)
    assert copied.state_dict().keys() == plain.keys()
    twin.load_state_dict(plain)
    assert not torch.isclose(twin.compute_loss(batch(), 0).loss, first), "adapters do something"
    # The copy is one: the model still has its adapters, and its own weights.
    again = adapters.state_dict(model.state_dict())["base"]
    assert all(torch.equal(value, plain[name]) for name, value in again.items())


def test_a_lora_training_learns_and_leaves_the_base_alone(tokenized, tmp_path, base):
    exp = run(
        tokenized, tmp_path / "exp", "--init-from", base, *LORA, "--num-epochs", 4, "--train-stage", "auto"
    )
    losses = [line["loss"] for line in records(exp, "valid") if line["stage"] == 1]
    assert losses[-1] < losses[0] - 0.02 and losses[-1] < records(base.parent, "valid")[-1]["ArLoss"] - 0.05
    start = load_checkpoint(base)["model"]
    first, best = (load_checkpoint(exp / f"best-valid-loss{suffix}.pt") for suffix in ("-stage1", ""))
    assert all(torch.equal(value, start[name]) for name, value in first["lora"]["base"].items())
    for name, value in best["model"].items():
        adapted = name.endswith(MATRICES)
        assert torch.equal(value, start[name]) != adapted, name
        if name.startswith("ar_"):
            assert torch.equal(value, first["model"][name]), "stage 2 stands on stage 1's sum"
    sizes = [
        sum(value.numel() for value in best["lora"][part].values()) for part in ("lora_A", "lora_B", "base")
    ]
    assert sum(sizes[:2]) < 0.5 * sizes[2]
    moments = [value["exp_avg"].numel() for value in best["optimizer"]["state"].values()]
    assert sum(moments) == sum(sizes[:2]), "the optimizer holds adapters only"
    # Generation needs no peft, and no flag.
    model, _ = load_model(exp / "best-valid-loss.pt")
    assert model.inference(torch.zeros(1, 5, 4, dtype=torch.long), max_new_tokens=3).shape == (1, 8, 4)


def test_the_exported_adapter_makes_the_base_the_best_model(tokenized, tmp_path, base, monkeypatch):
    exp = run(tokenized, tmp_path / "exp", "--init-from", base, *LORA, "--num-epochs", 2, "--train-stage", 1)
    adapter = exp / "lora-adapter-stage1.safetensors"
    assert adapter.stat().st_size < 0.3 * base.stat().st_size
    tool = importlib.util.spec_from_file_location("apply_lora", TOOL)
    module = importlib.util.module_from_spec(tool)
    monkeypatch.setitem(sys.modules, "apply_lora", module)  # dataclasses look their module up
    tool.loader.exec_module(module)
    module.main([str(base), str(adapter), "--output", str(tmp_path / "tuned.pt")])
    _, contents = load_model(tmp_path / "tuned.pt")
    made, expected = contents["model"], load_checkpoint(exp / "best-valid-loss.pt")["model"]
    assert made.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in made.items())
    with pytest.raises(UserError, match="of shape .* is not in the checkpoint"):
        apply_adapter(AudioLM(64, 4, 2, codebook_size=30).state_dict(), adapter)
    with pytest.raises(UserError, match="is not an adapter"):
        apply_adapter(made, base)


def test_a_killed_lora_training_goes_on_exactly(tokenized, tmp_path, base):
    flags = ("--init-from", base, *LORA, "--save-every-n", 3, "--num-epochs", 9, "--average-period", 1)
    whole = run(tokenized, tmp_path / "whole", *flags, "--max-steps", 8)
    broken = run(tokenized, tmp_path / "broken", *flags, "--max-steps", 4)
    base.unlink()
    run(tokenized, broken, *flags, "--max-steps", 8)
    one, two = (load_checkpoint(exp / "checkpoint-8.pt") for exp in (whole, broken))
    for part in ("model", "model_avg"):
        assert one[part].keys() == two[part].keys()
        assert all(torch.equal(value, two[part][name]) for name, value in one[part].items()), part
    with pytest.raises(UserError, match="--lora-rank 4 --lora-alpha 8.0, not 2"):
        run(tokenized, broken, *flags, "--lora-rank", 2, "--max-steps", 9)
    with pytest.raises(UserError, match="was trained with --lora-rank 4; give it"):
        run(tokenized, broken, *flags, "--lora-rank", 0, "--max-steps", 9)


def test_listening_samples_are_made_by_a_plain_model(tokenized, tmp_path, base, monkeypatch):
    heard = []

    class Samples:
        sample_rate = 16000

        def make(self, model, stage):
            codes = model.inference(torch.zeros(1, 5, 4, dtype=torch.long), max_new_tokens=2, seed=0)
            heard.append(codes)
            return {"samples/ar": torch.rand(1, 8000)}

    plain = Trainer.__init__

    def init(self, model, config, train, valid, saved, samples=None, adapters=None):
        plain(self, model, config, train, valid, saved, Samples(), adapters)

    monkeypatch.setattr(Trainer, "__init__", init)
    exp = run(
        tokenized, tmp_path / "exp", "--init-from", base, *LORA, "--max-steps", 3, "--sample-interval", 3
    )
    (codes,) = heard
    model, _ = load_model(exp / "checkpoint-3.pt")
    assert torch.equal(
        model.inference(torch.zeros(1, 5, 4, dtype=torch.long), max_new_tokens=2, seed=0), codes
    )


def test_contradictions_are_named(tokenized, tmp_path, base):
    with pytest.raises(UserError, match="--lora-rank needs --init-from"):
        run(tokenized, tmp_path / "exp", *LORA)
    with pytest.raises(UserError, match="--optimizer-name ScaledAdam do not go together"):
        run(tokenized, tmp_path / "exp", *LORA, "--init-from", base, "--optimizer-name", "ScaledAdam")
    with pytest.raises(UserError, match="--parallel fsdp do not go together"):
        run(tokenized, tmp_path / "exp", *LORA, "--init-from", base, "--parallel", "fsdp")
    with pytest.raises(UserError, match="--lora-rank is -1"):
        run(tokenized, tmp_path / "exp", "--lora-rank", -1, "--init-from", base)


def test_without_peft_the_way_to_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'valle\[lora\]'"):
        Adapters(AudioLM(32, 4, 1, codebook_size=30), 1, 4, 8.0)
