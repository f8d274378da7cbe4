"""`tools/plan.py` and its formulas against what small models count: parameters, operations, memory, files."""

import importlib.util
import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from valle.bin.trainer_audiolm import main as train
from valle.config import ModelConfig, TrainConfig
from valle.engine import planning
from valle.engine.memory import USABLE
from valle.engine.optimizers import OPTIMIZERS
from valle.engine.planning import GB, Architecture, Rows, Setup
from valle.models import build_model
from valle.modules import cpu
from valle.modules.masks import prefix_causal_mask
from valle.utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ModelConfig(decoder_dim=64, nhead=4, num_decoder_layers=3, num_quantizers=4)
VARIANTS = [
    {},
    {"prepend_bos": True, "scale_factor": 0.5},
    {"add_prenet": True, "norm_first": False},
    {"share_embedding": True, "num_quantizers": 1},
]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("plan", ROOT / "tools" / "plan.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["plan"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["plan"]


def make_batch(rows, prompt, target, quantizers=4, codebook_size=100):
    torch.manual_seed(0)
    return {
        "x": torch.randint(codebook_size, (rows, prompt, quantizers)),
        "x_lens": torch.full((rows,), prompt),
        "y": torch.randint(codebook_size, (rows, target, quantizers)),
        "y_lens": torch.full((rows,), target),
    }


def model_and_architecture(codebook_size=100, **flags):
    torch.manual_seed(0)
    config = replace(SMALL, **flags)
    return build_model(config, codebook_size).train(), Architecture.of(config, codebook_size)


def within(found, expected, tolerance):
    assert found == pytest.approx(expected, rel=tolerance), f"{found / expected:.4f}"


# ------------------------------------------------------------------------------------ parameters and states


@pytest.mark.parametrize("flags", VARIANTS)
def test_parameters_are_the_models(flags):
    model, _ = model_and_architecture(**flags)
    sizes = planning.parameter_sizes(replace(SMALL, **flags), 100)
    assert sizes == {name: parameter.numel() for name, parameter in model.named_parameters()}
    for stage in (0, 1, 2):
        assert sum(planning.stage_sizes(sizes, stage)) == sum(
            p.numel() for _, p in model.stage_parameters(stage)
        )


def test_parameters_of_the_full_size_by_hand():
    sizes = planning.parameter_sizes(ModelConfig(num_quantizers=4), 2048)
    d, layers, v = 1024, 12, 2048
    products, biases, norms = 12 * d**2, 9 * d, 4 * d
    assert sum(planning.stage_sizes(sizes, 1)) == (
        layers * (products + biases + norms) + 2 * d + (v + 1) * d + 3 * v * d + (v + 1) * d
    )
    adaptive = 2 * d**2 + 2 * d  # of each of 2 L + 1 normalizations
    assert sum(planning.stage_sizes(sizes, 2)) == (
        layers * (products + biases + norms) + 2 * d + (2 * layers + 1) * adaptive + (4 + 3) * v * d + 5 * d
    )


def tensors_in(value):
    """All tensors in nested containers, each once."""
    if isinstance(value, torch.Tensor):
        return {id(value): value}
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return {key: tensor for part in values for key, tensor in tensors_in(part).items()}


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_optimizer_state_after_a_step(optimizer, stage):
    model, _ = model_and_architecture()
    named = list(model.stage_parameters(stage))
    chosen = OPTIMIZERS[optimizer](named, TrainConfig(optimizer_name=optimizer))
    for _, parameter in named:
        parameter.grad = torch.ones_like(parameter)
    chosen.step()
    held = tensors_in(dict(chosen.state))
    found = sum(tensor.numel() * tensor.element_size() for tensor in held.values())
    sizes = planning.stage_sizes(planning.parameter_sizes(SMALL, 100), stage)
    assert planning.optimizer_bytes(optimizer, sizes) == found


@pytest.mark.parametrize(("stage", "optimizer", "period"), [(1, "AdamW", 0), (0, "ScaledAdam", 1)])
def test_a_checkpoints_size(tokenized, tmp_path, stage, optimizer, period):
    flags = "--decoder-dim 128 --nhead 4 --num-decoder-layers 4 --max-duration 8 --tensorboard false --max-steps 1"
    train([*flags.split(), "--manifest-dir", str(tokenized), "--exp-dir", str(tmp_path), "--train-stage", str(stage),
           "--optimizer-name", optimizer, "--average-period", str(period)])  # fmt: skip
    config = ModelConfig(decoder_dim=128, nhead=4, num_decoder_layers=4, num_quantizers=4)
    sizes = planning.parameter_sizes(config, 30)
    expected = planning.checkpoint_bytes(sizes, stage, optimizer, period > 0)
    within((tmp_path / "checkpoint-1.pt").stat().st_size, expected, 0.02)


# ------------------------------------------------------------------------------------------- operations


def count_flops(model, batch, stage):
    """Operations of forward and backward, those of oneDNN's products included, attention in plain products."""

    def product(x, weight, *args, out_shape=None, **kwargs):
        return 2 * x[0] * x[1] * weight[0]

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.mkldnn._linear_pointwise: product})
    with counter, sdpa_kernel(SDPBackend.MATH):
        model.compute_loss(batch, stage).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("kernels", ["of the CPU", "of PyTorch"])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("flags", VARIANTS[:3])
def test_flops_of_forward_and_backward(flags, stage, kernels, monkeypatch):
    if kernels == "of PyTorch":
        monkeypatch.setattr(cpu, "serves", lambda x: False)
    model, architecture = model_and_architecture(**flags, decoder_dim=128)
    rows, prompt, target = 3, 20, 17
    found = count_flops(model, make_batch(rows, prompt, target), stage)
    unread = kernels == "of PyTorch"
    lens = torch.full((rows,), prompt), [target] * rows
    needed = planning.train_flops(architecture, *lens, stage, unread)
    within(found, needed, 0.02)
    # Nothing less than what is needed, and no more than with all hidden pairs.
    dense = 3 * rows * sum(planning.forward_work(architecture, prompt, target, stage, dense=True))
    assert needed <= found * (1 + 1e-9) and found <= dense * (1 + 1e-9)
    if stage == 2 and unread:
        assert needed == dense


def test_attention_in_long_rows_counts():
    """Where attention is most of the work: 7 of 10 operations."""
    flags = {"decoder_dim": 32, "nhead": 2, "num_decoder_layers": 2}
    model, architecture = model_and_architecture(**flags)
    prompt, target = 100, 300
    work = planning.forward_work(architecture, prompt, target, 2)
    assert work.attention > 0.6 * sum(work)
    found = count_flops(model, make_batch(1, prompt, target), 2)
    within(found, planning.train_flops(architecture, [prompt], [target], 2, unread=False), 0.02)


@pytest.mark.parametrize(("prompt", "target"), [(1, 1), (5, 0), (7, 12)])
def test_attention_pairs_are_those_of_the_mask(prompt, target):
    columns = torch.arange(prompt + target)
    mask = prefix_causal_mask(torch.tensor([0]), torch.tensor([prompt]), columns, columns)
    assert planning.attention_pairs(prompt, target, 1) == int(mask.sum())
    assert planning.attention_pairs(prompt, target, 2) == mask.numel()


def test_flops_are_those_of_the_valid_frames():
    _, architecture = model_and_architecture()
    whole = planning.train_flops(architecture, [20, 9], [30, 11], 0)
    alone = sum(
        planning.train_flops(architecture, [prompt], [target], stage)
        for prompt, target in ((20, 30), (9, 11))
        for stage in (1, 2)
    )
    assert whole == pytest.approx(alone)
    # The usual rule, 6 operations a parameter and frame, of the weights that frames are multiplied with.
    config = ModelConfig(num_quantizers=4)
    sizes = planning.parameter_sizes(config, 1024)
    multiplied = sum(n for name, n in sizes.items() if name.startswith("ar_") and "embedding" not in name)
    work = planning.forward_work(Architecture.of(config, 1024), 150, 350, 1)
    within(3 * work.linear / 500, 6 * multiplied, 0.01)


# ------------------------------------------------------------------------------------------ activations


def saved_bytes(model, batch, stage, dtype):
    """Bytes of all storages that autograd keeps, without parameters and what is in the batch."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *batch.values())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # held, so that no other one gets its place
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"),
    ):
        result = model.compute_loss(batch, stage)
    assert result.loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_activations_are_what_autograd_keeps(stage, dtype, monkeypatch):
    """In PyTorch's kernels, which GPUs use too; without dropout, whose masks are of another format on CPUs."""
    monkeypatch.setattr(cpu, "serves", lambda x: False)
    shapes = [
        (64, 2, 100, (4, 40, 57), {}),
        (128, 4, 300, (3, 60, 140), {}),
        (64, 3, 1000, (6, 9, 20), {"prepend_bos": True, "scale_factor": 0.5}),
        (64, 3, 100, (4, 40, 57), {"qk_norm": True}),
        (64, 3, 100, (4, 40, 57), {"add_prenet": True, "norm_first": False}),
    ]
    for width, layers, codes, rows, flags in shapes:
        flags = {**flags, "decoder_dim": width, "num_decoder_layers": layers, "dropout": 0.0}
        model, architecture = model_and_architecture(codes, **flags)
        found = saved_bytes(model, make_batch(*rows, codebook_size=codes), stage, dtype)
        expected = sum(planning.activation_bytes(architecture, Rows(*rows), stage, dtype))
        if architecture.add_prenet:  # whose dropout keeps floats on CPUs: see below
            frames = rows[0] * (rows[1] + rows[2]) * (2 if stage == 0 else 1)
            expected += 2 * planning.PRENET_DIM * frames * (planning.FORMAT_BYTES[dtype] - 1)
        within(found, expected, 0.1 if {"qk_norm", "add_prenet"} & set(flags) else 0.03)


@pytest.mark.parametrize("stage", [1, 2])
def test_dropout_keeps_a_byte_a_number(stage, monkeypatch):
    """PyTorch keeps a float a number on CPUs: 4 bytes where GPUs keep 1."""
    monkeypatch.setattr(cpu, "serves", lambda x: False)
    found, expected = [], []
    for dropout in (0.1, 0.0):
        model, architecture = model_and_architecture(dropout=dropout)
        found.append(saved_bytes(model, make_batch(3, 30, 40), stage, "float32"))
        expected.append(sum(planning.activation_bytes(architecture, Rows(3, 30, 40), stage, "float32")))
    assert found[0] - found[1] == 4 * (expected[0] - expected[1]) > 0


@pytest.mark.parametrize("stage", [1, 2])
def test_checkpointing_keeps_what_enters_each_layer(stage, monkeypatch):
    monkeypatch.setattr(cpu, "serves", lambda x: False)
    model, architecture = model_and_architecture(num_decoder_layers=6, dropout=0.0)
    model.ar_decoder.checkpoint_layers = model.nar_decoder.checkpoint_layers = True
    found = saved_bytes(model, make_batch(4, 60, 100), stage, "float32")
    kept = planning.activation_bytes(architecture, Rows(4, 60, 100), stage, "float32", checkpointing=True)
    within(found, kept.layers + kept.ends, 0.05)
    whole = planning.activation_bytes(architecture, Rows(4, 60, 100), stage, "float32")
    assert kept.again == pytest.approx(whole.layers / 6)


# ------------------------------------------------------------------------------------- memory of a GPU


def full_size(stage=1, **setup):
    config = ModelConfig(num_quantizers=4)
    chosen = Setup(stage, "bfloat16", "AdamW", **setup)
    return Architecture.of(config, 1024), planning.parameter_sizes(config, 1024), chosen


@pytest.mark.parametrize("setup", [{}, {"checkpointing": True}, {"shards": 8}, {"averaged": True}])
def test_the_largest_batch_fills_the_memory(setup):
    architecture, sizes, chosen = full_size(**setup)
    row = planning.split_row(1000, 0.4)
    number = planning.fitting_rows(architecture, sizes, chosen, row, 20 * GB)
    assert number > 1
    full = planning.gpu_memory(architecture, sizes, chosen, row._replace(number=number))
    assert full.total == pytest.approx(20 * GB)
    assert planning.fitting_rows(architecture, sizes, chosen, row, 0.1 * GB) == 0


def test_shards_divide_what_each_gpu_would_hold():
    row = Rows(8, 400, 600)
    alone, shared, many = (
        planning.gpu_memory(*full_size(shards=shards), row) for shards in (1, 8, 1_000_000)
    )
    assert shared.optimizer == pytest.approx(alone.optimizer / 8)
    assert shared.activations == alone.activations
    # What is gathered does not shrink: tables of codes, output layers, last normalizations; two layers and a gradient.
    _, sizes, _ = full_size()
    loose = {name: 4 * size for name, size in sizes.items() if ".layers." not in name}
    layer = 4 * 12 * 1024**2
    assert many.weights == pytest.approx(sum(loose.values()) + 2 * layer, rel=1e-3)
    trained = sum(size for name, size in loose.items() if name.startswith("ar_"))
    assert many.gradients == pytest.approx(trained + layer, rel=1e-3)


def test_a_stage_needs_both_decoders_weights_and_the_gradients_of_one():
    row = Rows(1, 400, 600)
    ar, nar, both = (planning.gpu_memory(*full_size(stage), row) for stage in (1, 2, 0))
    assert ar.weights == nar.weights == both.weights
    assert both.gradients == ar.gradients + nar.gradients and both.optimizer == ar.optimizer + nar.optimizer


# ------------------------------------------------------------------------------------------- the command

FLAGS = (
    "--hours 1000 --gpus 8 --gpu a100-80gb --dtype bfloat16 --optimizer-name AdamW --train-stage auto".split()
)


def report_of(tool, capsys, *flags):
    tool.main([*FLAGS, *map(str, flags), "--json", "true"])
    return json.loads(capsys.readouterr().out)


def codec_folder(tmp_path, **changes):
    info = {
        "name": "other", "sample_rate": 24000, "channels": 1, "hop_length": 1920, "frame_rate": 12.5,
        "num_quantizers": 8, "codebook_size": 2048, "fingerprint": "0", **changes,
    }  # fmt: skip
    (tmp_path / "codec.json").write_text(json.dumps(info))
    return tmp_path


def test_rates_and_sizes_come_from_the_codec(tool, capsys, tmp_path):
    shipped = report_of(tool, capsys)
    assert shipped["codec"]["frame_rate"] * 3600 * 1000 == shipped["data"]["frames"]
    other = report_of(tool, capsys, "--manifest-dir", codec_folder(tmp_path))
    assert other["data"]["frames"] == 12.5 * 3600 * 1000
    assert other["data"]["codes"] == 8 * other["data"]["frames"]
    assert other["data"]["codes_bytes"] == 2 * other["data"]["codes"]
    assert other["data"]["audio_bytes"] == 2 * 24000 * 3600 * 1000
    fewer = report_of(tool, capsys, "--manifest-dir", tmp_path, "--num-quantizers", 2)
    assert fewer["data"]["codes_bytes"] == other["data"]["codes_bytes"], "all codes are on the disk"
    assert fewer["parameters"]["nar"] < other["parameters"]["nar"]


def test_days_follow_operations_and_gpus(tool, capsys):
    one = report_of(tool, capsys)
    work = one["stages"][0]["work"]
    assert work["total"] == pytest.approx(work["epoch"] * one["assumed"]["num_epochs"])
    architecture = Architecture.of(ModelConfig(num_quantizers=4), one["codec"]["codebook_size"])
    cut = planning.train_flops(architecture, [400], [600], 1)  # 20 s at 50 Hz, split at 0.4
    assert work["epoch"] == pytest.approx(cut * 1000 * 3600 / 20)
    assert work["days"] == pytest.approx(work["total"] / (8 * 312e12 * 0.4) / 86400)
    two = report_of(tool, capsys, "--gpus", 16, "--hours", 2000, "--utilization", 0.2)["stages"][0]["work"]
    assert two["days"] == pytest.approx(2 * work["days"])
    shorter = report_of(tool, capsys, "--cut-seconds", 5)["stages"][1]["work"]
    assert shorter["attention_share"] < one["stages"][1]["work"]["attention_share"] / 3


def test_flags_fit_their_gpu_and_give_the_batch(tool, capsys):
    report = report_of(tool, capsys, "--gpus", 4, "--target-batch", 1000, "--gpu-sizes", "2,4,8,24,80")
    assert [size["gigabytes"] for size in report["gpu_sizes"]] == [2, 4, 8, 24, 80]
    rooms = [size["room"] for size in report["gpu_sizes"]]
    for size, room in zip(report["gpu_sizes"], rooms, strict=True):
        if room is not None:
            assert room["memory"]["total"] <= USABLE * size["gigabytes"] * GB
            step = 4 * room["max_duration"] * room["accumulate_grad_steps"]
            assert 0.85 * 1000 <= step <= 1.1 * 1000
    assert "activation-checkpointing" in rooms[1]["flags"] and rooms[2]["flags"] == rooms[3]["flags"] == ""
    assert rooms[2]["accumulate_grad_steps"] > rooms[3]["accumulate_grad_steps"] == 1
    # The flags of both stages: the NAR decoder takes more.
    nar = report_of(
        tool, capsys, "--gpus", 4, "--target-batch", 1000, "--gpu-sizes", "2,4,8,24,80", "--train-stage", 2
    )
    assert [size["room"] for size in nar["gpu_sizes"]] == rooms
    tool.main([*FLAGS, "--gpus", "1", "--gpu-sizes", "2"])
    assert "does not fit: smaller --decoder-dim" in capsys.readouterr().out


def test_only_what_trains_with_shards_is_offered_shards(tool, capsys):
    for optimizer, offered in (("AdamW", 2), ("ScaledAdam", 0)):
        rooms = report_of(tool, capsys, "--optimizer-name", optimizer)["stages"][0]["rooms"]
        assert sum("fsdp" in room["flags"] for room in rooms) == offered


@pytest.mark.parametrize("recipe", ["asterisk", "folder"])
def test_recipes_can_be_planned(tool, capsys, recipe):
    tool.main(
        ["--config", str(ROOT / "egs" / recipe / "conf" / "audiolm.yaml"), "--hours", "0.3", "--gpus", "1"]
    )
    shown = capsys.readouterr().out
    assert "width 256" in shown and "| 0 AR + NAR | -" in shown and "--parallel" not in shown


def test_bad_values_are_named(tool, tmp_path):
    cases = [
        (["--hours", "0"], "--hours is 0, expected more than 0"),
        (["--gpus", "-1"], "--gpus is -1"),
        (["--gpu", "abacus"], "--gpu"),
        (["--utilization", "40"], "--utilization is 40, expected a share"),
        (["--cut-seconds", "30"], "--cut-seconds is 30, expected 0 to --filter-max-duration 20"),
        (["--gpu-sizes", "8,large"], "--gpu-sizes is '8,large'"),
        (["--num-quantizers", "9"], "--num-quantizers is 9, but codec 'valle_16khz' has 4"),
        (["--codec", "none"], "unknown codec 'none'"),
        (["--decoder-dim", "33"], "multiple of nhead"),
        (["--prompt-ratio", "1"], "--prompt-ratio is 1"),
    ]
    for flags, message in cases:
        with pytest.raises(UserError, match=message):
            tool.main(flags)


def planned_in_the_docs():
    """(flags, lines) of each call of the tool in docs/scaling.md, and of the tables under it."""
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").replace("\\\n", " ")
    found = []
    for part in re.split(r"^```bash\n(?=python tools/plan\.py)", text, flags=re.MULTILINE)[1:]:
        command, _, rest = part.partition("\n```\n")
        rest = re.split(r"^(?:#|```bash)", rest, flags=re.MULTILINE)[0]
        lines = [
            line for line in rest.splitlines() if line.startswith(("| ", "parameters ", "data ", "storage "))
        ]
        found.append((shlex.split(command)[2:], lines))
    return found


@pytest.mark.parametrize(("flags", "lines"), planned_in_the_docs())
def test_figures_of_the_docs_are_what_their_command_shows(tool, capsys, flags, lines):
    tool.main(flags)
    shown = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert len(lines) > 3
    for line in lines:
        if not set(line) <= set("|- "):
            assert " ".join(line.split()) in shown, line
