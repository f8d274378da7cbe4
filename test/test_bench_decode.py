"""`tools/bench_decode.py`: its kernels compute what they claim, its MusicGen is our decoder, its ratios are right."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from valle.models.audio_lm import AudioLM
from valle.modules.masks import prefix_causal_mask
from valle.utils.errors import UserError

TOOL = Path(__file__).resolve().parent.parent / "tools" / "bench_decode.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_decode", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_decode"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_decode"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    model = AudioLM(32, 2, 2, num_quantizers=2, codebook_size=20).eval()
    for parameter in model.parameters():  # biases and normalizations start at 0 and 1
        torch.nn.init.normal_(parameter, std=0.3)
    return model


# ---------------------------------------------------------------- bare loops


def test_linear_layers_are_all_that_an_ar_step_multiplies_with(bench, model):
    weights = bench.linear_layers(model)
    layer = [(96, 32), (32, 32), (128, 32), (32, 128)]
    assert [tuple(weight.shape) for weight, _ in weights] == [*layer, *layer, (21, 32)]
    assert [None if bias is None else len(bias) for _, bias in weights] == [96, 32, 128, 32] * 2 + [None]
    assert weights[3][0].data_ptr() == model.ar_decoder.layers[0].linear2.weight.data_ptr()


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype,tolerance", [("fp32", 1e-5), ("bf16", 0.02), ("int8", 0.05)])
def test_every_kernel_computes_the_linear_layers(bench, model, dtype, tolerance, threads, batch):
    weights = bench.linear_layers(model)
    before = torch.get_num_threads()
    computed = 0
    for kernel, candidate in bench.CANDIDATES[dtype].items():
        torch.manual_seed(2)
        try:
            loop = bench.bare_loop(kernel, candidate, weights, batch, threads)
            with torch.inference_mode():
                outputs = loop.run()
        except (RuntimeError, AttributeError):
            continue  # not on this processor
        computed += 1
        torch.manual_seed(2)
        inputs = {width: torch.randn(batch, width) for width in (32, 128)}
        assert (loop.kernel, loop.threads) == (kernel, threads)
        for (weight, bias), output in zip(weights, outputs, strict=True):
            expected = F.linear(inputs[weight.shape[1]], weight, bias)
            error = (output.float() - expected).norm() / expected.norm()
            assert error < tolerance, (kernel, tuple(weight.shape))
    assert computed > 0
    assert torch.get_num_threads() == before


def test_screening_keeps_the_fastest_and_names_what_is_missing(bench, model, monkeypatch):
    def absent(weight, bias, batch):
        raise RuntimeError("no such instruction\nsome trace")

    stock = bench.CANDIDATES["fp32"]["F.linear"]
    kernels = {name: stock for name in ("slow", "fast", "middle")}
    monkeypatch.setitem(
        bench.CANDIDATES, "fp32", {**kernels, "absent": bench.Candidate(torch.float32, absent)}
    )
    speed = {("slow", 1): 9.0, ("slow", 2): 8.0, ("fast", 1): 2.0, ("fast", 2): 5.0}
    speed |= {("middle", 1): 4.0, ("middle", 2): 3.0}
    monkeypatch.setattr(bench, "time_loop", lambda loop, seconds: speed[loop.kernel, loop.threads])
    weights = bench.linear_layers(model)
    finalists, tried = bench.screen("fp32", weights, 1, 2, 0.0)
    assert [(loop.kernel, loop.threads) for loop in finalists] == [("fast", 1), ("middle", 2), ("middle", 1)]
    assert {(entry["kernel"], entry["threads"]): entry["ms"] / 1e3 for entry in tried[:6]} == speed
    assert tried[6:] == [{"kernel": "absent", "threads": n, "missing": "no such instruction"} for n in (1, 2)]

    monkeypatch.setitem(bench.CANDIDATES, "fp32", {"absent": bench.Candidate(torch.float32, absent)})
    with pytest.raises(UserError, match="no kernel for fp32 runs on this machine: no such instruction"):
        bench.screen("fp32", weights, 1, 2, 0.0)


def test_a_loop_is_timed_with_its_own_threads(bench, one_thread):
    used = []

    def note():
        used.append(torch.get_num_threads())
        return []

    assert bench.time_loop(bench.BareLoop("note", 2, note), 0.0) > 0
    assert used == [2] * 6  # 5 that count behind one that does not
    assert torch.get_num_threads() == 1


# ------------------------------------------------------------------- MusicGen


def test_musicgen_is_our_decoder_but_for_biases_and_positions(bench):
    """Without those on either side, the logits of a causal sequence are equal: all other weights are ours."""
    torch.manual_seed(3)
    model = AudioLM(32, 2, 2, num_quantizers=2, codebook_size=20, position="sine").eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float(".norm" in name and "weight" in name), std=0.3)
        if name.endswith("alpha") or (name.endswith("bias") and ".norm" not in name):
            torch.nn.init.zeros_(parameter)
    musicgen = bench.build_musicgen(model, 30)
    musicgen.model.decoder.embed_positions.weights.zero_()
    codes = torch.randint(21, (3, 9))
    columns = torch.arange(9)
    none = torch.zeros(3, dtype=torch.long)
    with torch.inference_mode():
        hidden = model.ar_decoder(
            model.ar_audio_embedding(codes), columns, prefix_causal_mask(none, none, columns, columns)
        )
        expected = model.ar_predict_layer(hidden)[..., :20]
        found = musicgen(input_ids=codes).logits
    assert found.shape == (3, 9, 20)
    assert torch.allclose(found, expected, atol=1e-5)
    assert float(expected.std()) > 0.1


def test_musicgen_reads_its_prompt(bench, model):
    """Steps behind a prompt take what forward over the whole sequence takes: the likeliest code each."""
    musicgen = bench.build_musicgen(model, 30)
    fed = []
    musicgen.model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(args[0] if args else kwargs["input_ids"]), with_kwargs=True
    )
    prompt = torch.randint(20, (2, 7))
    assert len(bench.musicgen_steps(musicgen, prompt, 6)) == 6
    assert [tuple(codes.shape) for codes in fed] == [(2, 7), *[(2, 1)] * 6]
    steps = fed[1:]
    with torch.inference_mode():
        whole = musicgen(input_ids=torch.cat([prompt, *steps], 1), use_cache=False).logits.argmax(-1)
    assert torch.equal(whole[:, 6:-1], torch.cat(steps, 1))


def test_a_dropped_prompt_is_an_error(bench, model, monkeypatch):
    musicgen = bench.build_musicgen(model, 30)
    forward = musicgen.forward
    monkeypatch.setattr(musicgen, "forward", lambda input_ids, **named: forward(input_ids[:, -1:], **named))
    with pytest.raises(RuntimeError, match="cache holds 4 frames, expected 10"):
        bench.musicgen_steps(musicgen, torch.randint(20, (1, 7)), 3)


# ---------------------------------------------------------------- measurement


def test_around_is_the_median_of_the_steps_near_a_frame(bench):
    steps = [float(i) for i in range(1, 101)]
    assert bench.around(steps, 50) == 50.0
    assert bench.around(steps, 100) == 95.0  # of 90 … 100
    assert bench.around(steps, 500) == 95.0
    assert bench.around(steps, 1) == 6.0
    assert bench.around([3.0], 50) == 3.0


class Scripted:
    """Three generations of four frames, of known duration."""

    def __init__(self, model, bench):
        self.model, self.bench = model, bench
        self.seconds = iter([0.0, 0.4, 0.8, 0.6])  # the first one only packs weights
        self.latencies = iter([0.3, 0.1, 0.2])
        self.steps = iter([0.04, 0.02, 0.03])

    def prompt(self, batch):
        return torch.zeros(batch, 3, 2, dtype=torch.long)

    def generate(self, dtype, batch, frames):
        ar = next(self.seconds)
        parts = {"prefill": 0.1, "ar": ar, "nar": 0.2, "codec": 0.05}
        return self.bench.Generated([ar / 8, ar / 8, ar / 4, ar / 4], parts)

    def first_audio(self, dtype, frames):
        return next(self.latencies)

    def steps_alone(self, dtype, batch, frames, between):
        for frame in range(frames):
            between(frame)
        return [next(self.steps)] * frames


@pytest.fixture
def scripted(bench, model, monkeypatch):
    """`measure` on a machine that slows down: bare loops of 0.05, 0.06, 0.07, … s in turn, floors of 1 kB/s."""
    monkeypatch.setattr(bench, "peak_memory", lambda config, dtype, batch: 3.0 * 2**20)
    monkeypatch.setattr(bench, "copy_bandwidth", lambda threads: 1e6)
    monkeypatch.setattr(bench, "musicgen_steps", lambda musicgen, prompt, frames: [0.3, 0.5])
    loop = bench.BareLoop("F.linear", 1, lambda: [])
    slower = bench.BareLoop("oneDNN pre-packed", 2, lambda: [])
    monkeypatch.setattr(bench, "screen", lambda *arguments: bench.Screening([slower, loop], []))
    clock = iter(range(100))
    monkeypatch.setattr(
        bench, "time_loop", lambda loop, _: 1.0 if loop.threads == 2 else 0.05 + 0.01 * next(clock)
    )
    config = bench.BenchConfig(new_frames=4, rounds=3)
    return lambda musicgen, batch: bench.measure(config, Scripted(model, bench), musicgen, "fp32", batch)


def test_measure_compares_neighbours(bench, model, scripted):
    result = scripted(object(), 1)
    # means of a frame: 0.1, 0.2, 0.15; bare loops around them: 0.055, 0.075, 0.095
    expected = {
        "frames_per_second": 1 / 0.15,
        "frame_ms": 150,
        "frame_ms_early": 112.5,  # median of (0.075, 0.075, 0.15, 0.15)
        "bare_ms": 75,
        "ratio_to_bare": 0.1 / 0.055,
        "outside_products_ms": 55,
        "step_alone_ms": 30,
        "first_audio_seconds": 0.2,
        "all_in_seconds": 0.95,
        "musicgen_frame_ms": 400,
        "times_musicgen": 0.4 / 0.15,
        "peak_memory_bytes": 3 * 2**20,
    }
    assert {key: result[key] for key in expected} == pytest.approx(expected)
    assert (result["bare_kernel"], result["bare_threads"]) == ("F.linear", 1)
    assert result["parts_seconds"] == pytest.approx({"prefill": 0.1, "ar": 0.6, "nar": 0.2, "codec": 0.05})
    size = 4 * (2 * 12 * 32 * 32 + 21 * 32)  # bytes
    assert result["floor_ms"] == pytest.approx(1e3 * size / 1e6)
    assert result["ratio_to_floor"] == pytest.approx(0.15 / (size / 1e6))


def test_steps_alone_give_the_logits_of_the_decoder_and_bare_loops_run_between(bench, monkeypatch):
    config = bench.BenchConfig(decoder_dim=32, nhead=2, num_decoder_layers=2, prompt_frames=5, new_frames=9)
    ours, ran, seen = bench.Ours(config), [], []
    decoder = bench.packed(ours.model, "fp32")
    logits = decoder.ar_logits
    monkeypatch.setattr(
        decoder, "ar_logits", lambda *given, cache: seen.append(given[2]) or logits(*given, cache=cache)
    )
    loop = bench.BareLoop("none", 1, lambda: ran.append(torch.get_num_threads()) or [])
    step, bare = bench.step_beside_bare(config, ours, loop, "fp32", 3)
    assert ran == [1, 1, 1]  # of frames 0, 4 and 8
    assert [tuple(codes.shape) for codes in seen] == [(3, 0)] + [(3, 1)] * 9
    assert 0 < bare < step


def test_a_batch_counts_all_its_frames_and_has_no_first_audio(scripted):
    result = scripted(None, 4)
    assert result["frames_per_second"] == pytest.approx(4 / 0.15)
    assert result["first_audio_seconds"] is None
    assert result["times_musicgen"] is None


def test_table_shows_units_and_gaps(bench, scripted):
    lines = bench.table([scripted(None, 4)]).splitlines()
    assert len({len(line) for line in lines}) == 1
    heading, _, row = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    shown = dict(zip(heading, row, strict=True))
    assert shown["format"] == "fp32" and shown["batch"] == "4"
    assert shown["ms/frame"] == "150.00" and shown["x bare"] == "1.82"
    assert shown["peak MiB"] == "3"
    assert shown["first audio s"] == shown["x MusicGen"] == "-"


# -------------------------------------------------------------------- command


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--batch", "1,0"], "--batch is '1,0': '0' found, expected whole numbers from 1"),
        (["--batch", ""], "--batch is '': '' found"),
        (["--dtype", "fp32,fp8"], "'fp8' found, expected some of fp32,bf16,int8"),
        (["--new-frames", "0"], "--new-frames is 0, expected 1 or more"),
        (
            ["--decoder-dim", "30", "--nhead", "4"],
            "--decoder-dim is 30, expected an even multiple of --nhead 4",
        ),
        (["--output", "."], "--output is '.', a folder"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_measured(bench, flags, message, monkeypatch):
    monkeypatch.setattr(bench, "Ours", None)
    with pytest.raises(UserError) as error:
        bench.main(flags)
    assert message in str(error.value)


def test_openmp_is_told_to_wait_quietly_before_torch_loads():
    probe = (
        "import os, runpy, sys\n"
        "class Stop:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'torch':\n"
        "            print(os.environ['OMP_WAIT_POLICY'], os.environ['GOMP_SPINCOUNT'])\n"
        "            sys.exit(0)\n"
        "sys.meta_path.insert(0, Stop())\n"
        f"runpy.run_path({str(TOOL)!r})\n"
    )
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    for given, expected in (({}, "passive 0"), ({"OMP_WAIT_POLICY": "active"}, "active 0")):
        done = subprocess.run(
            [sys.executable, "-c", probe], env={**outer, **given}, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == expected


@pytest.mark.slow
def test_the_command_measures_everything(tmp_path):
    output = tmp_path / "bench.json"
    done = subprocess.run(
        [sys.executable, str(TOOL), "--decoder-dim", "32", "--nhead", "2", "--num-decoder-layers", "1",
         "--prompt-frames", "6", "--new-frames", "12", "--batch", "1,2", "--dtype", "bf16,int8", "--rounds", "1",
         "--bare-seconds", "0.01", "--output", str(output)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(output.read_text())
    cells = [(result["dtype"], result["batch"]) for result in report["results"]]
    assert cells == [(dtype, batch) for dtype in ("bf16", "int8") for batch in (1, 2)]
    for result in report["results"]:
        gaps = {key for key, value in result.items() if value is None}
        expected = set() if result["batch"] == 1 else {"first_audio_seconds"}
        if result["dtype"] == "int8":
            expected |= {"musicgen_frame_ms", "times_musicgen"}
        assert gaps == expected
        assert result["ratio_to_bare"] > 1
        assert set(result["parts_seconds"]) == {"prefill", "ar", "nar", "codec"}
        assert 1e8 < result["peak_memory_bytes"] < 1e10
    assert report["settings"]["new_frames"] == 12
    assert "MusicGen has no biases" in done.stdout
    assert done.stdout.startswith("| format")
