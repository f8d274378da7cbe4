"""`infer.py --text`, `--midi` and `--list` on tiny models that read."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from synthetic import TINY_CODEBOOK, save_tiny_codec

from valle.bin import infer, reading
from valle.codecs import load_codec
from valle.config import ModelConfig, ValleConfig, to_dict
from valle.data.midi import BOS, EOS, MidiTokenizer, make_notes, read_notes, write_notes
from valle.data.symbols import SymbolTable
from valle.models import VALLE, build_model
from valle.utils.errors import UserError

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TABLE = SymbolTable.build([*LETTERS, *".,!", "_"])
RATE = 50  # frames a second
SETTINGS = {"decoder_dim": 16, "nhead": 2, "num_decoder_layers": 1, "num_quantizers": 4, "prefix_mode": 1}


def text_info(symbols=None, ends=False):
    symbols = list(symbols or TABLE)
    tokenizer = {"name": "characters", "language": "en-us", "lower": True}
    return {
        "kind": "symbols", "sizes": len(symbols), "symbols": symbols, "tokenizer": tokenizer, "ends": ends,
        "field_dims": None,
    }  # fmt: skip


def notes_info():
    tokenizer = MidiTokenizer()
    return {
        "kind": "notes", "sizes": tokenizer.vocab_sizes, "tokenizer": tokenizer.config(), "ends": True,
        "field_dims": None,
    }  # fmt: skip


def save_model(path, codec, text=None, data=None, **changes):
    torch.manual_seed(0)
    settings = SETTINGS | changes
    if text is None:
        settings.pop("prefix_mode")
    config = (ModelConfig if text is None else ValleConfig)(**settings)
    model = build_model(config, TINY_CODEBOOK, text, float(RATE))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embedding" in name:
                parameter.mul_(30)
        model.ar_predict_layer.weight[-1].zero_()
    saved = {
        "model": model.state_dict(),
        "config": {"model": to_dict(config), "data": data or {}},
        "codec": codec,
    }
    torch.save({**saved, "text": text} if text else saved, path)


def sine(seconds, pitch=220.0):
    return (0.3 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * 16000)) / 16000)).astype(np.float32)


def scale(seconds, pause=None):
    """Eighths of a second of a scale, with one pause, from and to a second."""
    onsets = np.arange(0.1, seconds, 0.125)
    if pause is not None:
        onsets = onsets[(onsets < pause[0]) | (onsets > pause[1])]
    count = len(onsets)
    return make_notes(onsets, onsets + 0.1, 60 + np.arange(count) % 12, np.full(count, 70))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Checkpoints text.pt, notes.pt, audio.pt, and clips and pieces."""
    root = tmp_path_factory.mktemp("reading")
    codec = load_codec(save_tiny_codec(root / "tiny")).info()
    save_model(root / "text.pt", codec, text_info())
    save_model(root / "ends.pt", codec, text_info(["<eps>", "<bos>", "<eos>", *LETTERS, "_"], ends=True))
    save_model(root / "notes.pt", codec, notes_info(), model_name="midi-valle")
    save_model(root / "short.pt", codec, notes_info(), {"filter_max_duration": 7.0}, model_name="midi-valle")
    save_model(root / "audio.pt", codec)
    save_model(root / "vallf.pt", codec, text_info(), model_name="vallf")
    filled = {"infill_prob": 0.5}
    save_model(root / "fills.pt", codec, text_info(), filled)
    save_model(root / "fills-notes.pt", codec, notes_info(), filled, model_name="midi-valle")
    save_model(root / "nameless.pt", codec, {**text_info(), "symbols": None})
    soundfile.write(root / "clip.wav", sine(2.0), 16000)
    soundfile.write(root / "long.wav", sine(11.0), 16000)
    write_notes(root / "clip.mid", scale(2.0))
    write_notes(root / "piece.mid", scale(31.0, (13.0, 14.0)))
    write_notes(root / "tune.mid", scale(3.0))
    write_notes(root / "empty.mid", make_notes([], [], [], []))
    return root


@pytest.fixture
def spy(monkeypatch):
    """Named arguments of each call of VALLE.generate, texts and prompts among them."""
    calls, real = [], VALLE.generate

    def generate(self, x, x_lens, prompts, prompts_lens, limits, **named):
        calls.append({"x": x, "x_lens": x_lens.tolist(), "prompts": prompts, "limits": limits, **named})
        if prompts_lens is not None:
            calls[-1]["prompts_lens"] = prompts_lens.tolist()
        calls[-1]["result"] = real(self, x, x_lens, prompts, prompts_lens, limits, **named)
        return calls[-1]["result"]

    monkeypatch.setattr(VALLE, "generate", generate)
    return calls


def run(root, folder, model, *flags):
    infer.main(["--checkpoint", str(root / f"{model}.pt"), "--output-dir", str(folder), *map(str, flags)])


def read(path):
    return soundfile.read(path, dtype="int16")[0].astype(int)


def ids(text):
    return TABLE.encode("_" if letter == " " else letter for letter in text)


PROMPT = ("--prompt-text", "well well.")


def test_the_prompts_text_stands_before_the_text(root, spy, tmp_path, capsys):
    run(root, tmp_path, "text", "--text", "Hello, you!", "--prompt", root / "clip.wav", *PROMPT, "--seed", 3)
    (call,) = spy
    assert call["x"][0].tolist() == ids("well well. hello, you!")
    assert call["prompt_text_lens"].tolist() == [len("well well. ")]
    assert call["prompts_lens"] == [100] and call["prompts"].shape == (1, 100, 4)
    assert call["limits"] == [int(np.ceil(1.5 * 100 / 11 * 11 + 50))]
    assert call["min_new_tokens"] == 0 and call["seed"] == 3
    frames = len(call["result"].codes[0]) - 100
    assert len(read(tmp_path / "speech.wav")) == 320 * frames
    said = capsys.readouterr()
    assert re.search(rf"speech.wav  {frames / 50:.1f} s \(ended by (eos|length)\)\n", said.out)
    assert "real time" in said.out.splitlines()[-1] and "hint" not in said.err


def test_begin_and_end_are_there_once(root, spy, tmp_path):
    run(root, tmp_path, "ends", "--text", "ab", "--prompt", root / "clip.wav", "--prompt-text", "c")
    letters = {letter: 3 + number for number, letter in enumerate(LETTERS)}
    assert spy[0]["x"][0].tolist() == [1, letters["c"], 3 + 26, letters["a"], letters["b"], 2]
    assert spy[0]["prompt_text_lens"].tolist() == [2 + 2]


def test_a_prompt_is_optional_and_its_text_is_missed(root, spy, tmp_path, capsys):
    run(root, tmp_path, "text", "--text", "hello", "--output-name", "greeting.wav")
    assert spy[0]["prompts"] is None and spy[0]["limits"] == [16 * 5]
    assert (tmp_path / "greeting.wav").exists() and "hint" not in capsys.readouterr().err
    run(root, tmp_path, "text", "--text", "hello", root / "clip.wav")
    assert spy[1]["prompts_lens"] == [100] and spy[1]["limits"] == [16 * 5]
    assert spy[1]["prompt_text_lens"].tolist() == [0]
    assert "hint: a prompt without --prompt-text" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [("--duration", "0.6"), ("--max-new-tokens", "30")])
def test_the_user_may_say_how_long(root, spy, tmp_path, flags):
    run(root, tmp_path, "text", "--text", "hello", *flags, "--min-new-tokens", "30")
    assert spy[0]["limits"] == [30] and len(read(tmp_path / "speech.wav")) == 30 * 320


def test_a_stream_is_the_same_sound(root, spy, tmp_path, capsys):
    flags = ["--text", "hello", root / "clip.wav", *PROMPT, "--min-new-tokens", 60, "--max-new-tokens", 60,
             "--chunk", 0.3]  # fmt: skip
    run(root, tmp_path, "text", *flags, "--stream", tmp_path / "stream.wav")
    assert re.search(r"1\.2 s \(ended by length\), first audio after [\d.]+ s", capsys.readouterr().out)
    run(root, tmp_path, "text", *flags)
    streamed, whole = read(tmp_path / "stream.wav"), read(tmp_path / "speech.wav")
    assert len(streamed) == len(whole) == 60 * 320
    assert 10 * np.log10((whole**2).sum() / ((streamed - whole) ** 2).sum()) > 25


def test_a_list_is_read_whatever_some_lines_are(root, spy, tmp_path, capsys):
    rows = [
        "id\ttext\tprompt\tprompt_text",
        "one\thello\tclip.wav\twell well.",
        "two\tschön\t\t",
        "",
        "one\tagain\t\t",
        "three\thello there, you\t\t",
        "../four\thello\t\t",
        "five\thello\tnone.wav\t",
        "six\t\t\t",
        "seven\tgood bye\tclip.wav\twell well.",
        "eight\t~\t\t",
    ]
    path = root / "list.tsv"
    path.write_text("\n".join(rows) + "\n")
    with pytest.raises(UserError) as raised:
        run(root, tmp_path, "text", "--list", path, "--batch-size", 2)
    lines = [3, 5, 7, 8, 9, 11]
    assert str(raised.value).startswith("6 of the 9 lines of ")
    assert "failed (3, 5, 7, 8, 9, 11)" in str(raised.value)
    said = capsys.readouterr().err
    for number, message in zip(lines, ("'ö'", "is that of line 2", "id is '../four'", "none.wav' does not exist",
                                       "neither text nor midi is given for 'six'", "'~'"), strict=True):  # fmt: skip
        assert re.search(rf"^line {number} of '.*list.tsv': .*{re.escape(message)}", said, re.MULTILINE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.wav", "seven.wav", "three.wav"]
    # Two and one at once: a batch with prompts, and one row without.
    assert sorted(len(call["x_lens"]) for call in spy) == [1, 2]
    together = {name: read(tmp_path / f"{name}.wav") for name in ("one", "seven", "three")}
    run(root, tmp_path, "text", "--text", "good bye", "--prompt", root / "clip.wav", *PROMPT)
    assert np.abs(read(tmp_path / "speech.wav") - together["seven"]).max() <= 1


def test_a_list_may_be_json_and_have_one_prompt_for_all(root, spy, tmp_path):
    (root / "list.jsonl").write_text(
        "\n".join(json.dumps(line) for line in (
            {"id": "a", "text": "hello"}, {"id": "b", "text": "you", "prompt": "long.wav", "prompt_text": None},
        ))
    )  # fmt: skip
    run(root, tmp_path, "text", "--list", root / "list.jsonl", "--prompt", root / "clip.wav", *PROMPT)
    (call,) = spy
    order = call["x_lens"].index(len("well well. hello"))
    assert call["prompts_lens"][order] == 100 and call["prompts_lens"][1 - order] == 500, (
        "its last ten seconds"
    )
    for row, message in (
        ('{"id": "a", "text": "b", "voice": "c"}', "'voice' is not known"),
        ('{"id": "a", "text": 3}', "text is 3, expected text"), ('{"id": ', "no JSON object"),
        ('{"id": "a", "text": "b", "prompt_text": "c"}', "has a prompt_text, but no prompt"),
    ):  # fmt: skip
        (root / "bad.jsonl").write_text(row + "\n")
        (found,) = reading.read_list(root / "bad.jsonl", reading.ReadConfig(), None).values()
        assert isinstance(found, UserError) and re.search(message, str(found))


def test_samples_do_not_overwrite_another_lines(root, spy, tmp_path, capsys):
    (root / "clash.tsv").write_text("a_2\thello\na\thello\n")
    with pytest.raises(UserError, match="1 of the 2 lines"):
        run(root, tmp_path, "text", "--list", root / "clash.tsv", "--num-samples", 2)
    assert (
        "line 2 of " in (said := capsys.readouterr().err) and "its a_2.wav is also written by line 1" in said
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_2.wav", "a_2_2.wav"]


def test_a_line_that_ends_at_once_does_not_cost_the_others(root, tmp_path, capsys, monkeypatch):
    real = VALLE.generate

    def generate(self, *args, **named):
        result = real(self, *args, **named)
        result.codes[0], result.log_probs[0] = result.codes[0][:0], result.log_probs[0][:0]
        return result

    monkeypatch.setattr(VALLE, "generate", generate)
    (root / "ending.tsv").write_text("a\thello\nb\thello you\n")
    with pytest.raises(UserError, match=r"1 of the 2 lines of '.*' failed \(1\)"):
        run(root, tmp_path, "text", "--list", root / "ending.tsv")
    assert "the model ended 'a' at once" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["b.wav"]


def test_a_text_that_is_too_long_for_the_model_is_hinted_at(root, tmp_path, capsys):
    contents = torch.load(root / "text.pt", weights_only=True)
    contents["config"]["data"] = {"filter_max_duration": 1.0}
    torch.save(contents, root / "brief.pt")
    run(root, tmp_path, "brief", "--text", "hello", "--min-new-tokens", 60)
    said = capsys.readouterr().err
    assert re.search(
        r"hint: 'speech' and its prompt last 1\.\d s, but the model was trained on up to 1\.0 s", said
    )


def test_a_piece_is_played_in_legs_on_one_clock(root, spy, tmp_path):
    run(root, tmp_path, "notes", "--midi", root / "piece.mid", "--prompt", root / "clip.wav", "--prompt-midi",
        root / "clip.mid")  # fmt: skip
    first, second, third = spy
    piece, tokenizer = read_notes(root / "piece.mid"), MidiTokenizer()
    starts = [0]
    for call in spy[:-1]:
        assert call["min_new_tokens"] == call["limits"][0], "as long as its stretch"
        starts.append(starts[-1] + call["limits"][0])
    assert starts[1] == pytest.approx(14.0 * RATE, abs=8), "in the pause"
    assert third["min_new_tokens"] == 0
    assert third["limits"][0] == pytest.approx((piece.duration + 3) * RATE - starts[2], abs=1)
    # The first: 2 s of the prompt's notes, then the piece's, 2 s later.
    rows = first["x"][0].numpy()
    assert (rows[0] == BOS).all() and (rows[-1] == EOS).all()
    played = tokenizer.decode(rows)
    own = len(read_notes(root / "clip.mid"))
    assert first["prompt_text_lens"].tolist() == [own + 2] and first["prompts_lens"] == [100]
    np.testing.assert_allclose(
        played.onset[own:] - 2.0, piece.onset[piece.onset < starts[1] / RATE], atol=0.003
    )
    # The second: what was just generated, and the notes from there on.
    assert torch.equal(second["prompts"][0], first["result"].codes[0][-150:])
    played = tokenizer.decode(second["x"][0].numpy())
    begin = starts[1] / RATE - 3.0
    inside = (piece.onset >= begin) & (piece.onset < starts[2] / RATE)
    np.testing.assert_allclose(played.onset + begin, piece.onset[inside], atol=0.003)
    assert second["prompt_text_lens"].tolist() == [(piece.onset[inside] < starts[1] / RATE).sum() + 2]
    assert len({call["seed"] for call in spy}) == 3
    new = starts[2] + len(third["result"].codes[0]) - 150
    assert len(read(tmp_path / "piece.wav")) == 320 * new
    # One decode of everything behind the prompt: no seam between the legs.
    codes = torch.cat([call["result"].codes[0][0 if call is first else 150 :] for call in spy])
    expected = load_codec(root / "tiny").decode(codes[None])[0, 0, 100 * 320 :].numpy()
    assert np.abs(read(tmp_path / "piece.wav") - np.clip(expected, -1, 1) * 32767).max() <= 2


@pytest.mark.parametrize("settings", [{"pattern": "delay"}, {"pattern": "flatten"}, {"group_size": 2}])
def test_legs_of_any_pattern_are_as_long_as_their_stretches(root, spy, tmp_path, settings):
    codec, path = load_codec(root / "tiny").info(), root / "pattern.pt"
    save_model(path, codec, notes_info(), {"filter_max_duration": 7.0}, model_name="midi-valle", **settings)
    write_notes(root / "eight.mid", scale(8.0))
    run(root, tmp_path, "pattern", "--midi", root / "eight.mid")
    lens = [len(call["result"].codes[0]) - call["result"].prompt_lens[0] for call in spy]
    assert len(lens) > 2 and lens[:-1] == [call["limits"][0] for call in spy[:-1]]
    assert len(read(tmp_path / "eight.wav")) == 320 * sum(lens)


def test_stretches_fit_what_the_model_was_trained_on(root, spy, tmp_path):
    run(root, tmp_path, "short", "--midi", root / "piece.mid")
    assert len(spy) > 31 / 4 and max(call["limits"][0] for call in spy[:-1]) <= 4 * RATE
    assert spy[0]["prompts"] is None and {call["prompts"].shape[1] for call in spy[1:]} <= {*range(133, 151)}


def test_a_streamed_piece_is_the_same_codes(root, tmp_path, monkeypatch):
    chunk, streamed, real = ("--chunk", "0.5"), [], VALLE.stream

    def stream(self, *args, **named):
        streamed.append(real(self, *args, **named))
        return streamed[-1]

    monkeypatch.setattr(VALLE, "stream", stream)
    run(root, tmp_path, "short", "--midi", root / "tune.mid", "--stream", tmp_path / "a.wav", *chunk)
    run(root, tmp_path, "short", "--midi", root / "tune.mid", *chunk)
    assert len(read(tmp_path / "a.wav")) == len(read(tmp_path / "tune.wav"))
    run(root, tmp_path, "short", "--midi", root / "piece.mid", "--stream", tmp_path / "b.wav", *chunk)
    generations = [one.generation for one in streamed[1:]]
    assert len(generations) > 3
    for before, after in zip(generations, generations[1:], strict=False):
        assert torch.equal(after.codes[0][: after.prompt_lens[0]], before.codes[0][-after.prompt_lens[0] :])
    frames = sum(len(one.codes[0]) - one.prompt_lens[0] for one in generations)
    assert len(read(tmp_path / "b.wav")) == frames * 320


def test_pieces_of_a_list_do_not_depend_on_each_other(root, spy, tmp_path):
    (root / "pieces.tsv").write_text(
        "p\t\t\t\tpiece.mid\nt\t\tclip.wav\t\ttune.mid\tclip.mid\nu\t\t\t\ttune.mid\n"
    )
    run(root, tmp_path, "notes", "--list", root / "pieces.tsv", "--min-p", "0.01")
    run(root, tmp_path, "notes", "--midi", root / "piece.mid", "--min-p", "0.01")
    assert np.abs(read(tmp_path / "p.wav") - read(tmp_path / "piece.wav")).max() <= 1
    run(root, tmp_path, "notes", "--midi", root / "tune.mid", "--min-p", "0.01", "--prompt", root / "clip.wav",
        "--prompt-midi", root / "clip.mid")  # fmt: skip
    assert np.abs(read(tmp_path / "t.wav") - read(tmp_path / "tune.wav")).max() <= 1


def test_the_notes_of_a_long_prompt_are_those_of_its_end(root, spy, tmp_path):
    onsets = np.sort(np.random.default_rng(0).uniform(0, 10.9, 80))
    write_notes(root / "long.mid", make_notes(onsets, onsets + 0.1, 30 + np.arange(80), np.full(80, 70)))
    run(root, tmp_path, "notes", "--midi", root / "tune.mid", "--prompt", root / "long.wav", "--prompt-midi",
        root / "long.mid", "--max-prompt-duration", 4)  # fmt: skip
    own = spy[0]["prompt_text_lens"].tolist()[0] - 2
    played, true = MidiTokenizer().decode(spy[0]["x"][0].numpy()), read_notes(root / "long.mid")
    heard = true.onset >= 7.0
    np.testing.assert_allclose(np.sort(played.onset[:own] + 7.0), true.onset[heard], atol=0.003)
    assert set(played.pitch[:own]) == set(true.pitch[heard])


class Loudness:
    """A metric that likes silence."""

    name, task, keys = "wer", "speech", {"wer": "lower"}

    def __init__(self):
        self.cases = []

    def missing(self):
        return None

    def applies(self, case):
        return case.text is not None

    def __call__(self, audio, case):
        self.cases.append(case)
        return {"wer": float(np.abs(audio.wav).mean())}


def test_the_best_of_several_is_the_first(root, tmp_path, capsys, monkeypatch):
    flags = ("--text", "hello", root / "clip.wav", *PROMPT, "--num-samples", 4, "--min-new-tokens", 40)
    run(root, tmp_path / "a", "text", *flags)
    scores = [float(score) for score in re.findall(r"score (-[\d.]+) nats", capsys.readouterr().out)]
    assert len(scores) == 4 and scores == sorted(scores, reverse=True)
    metric = Loudness()
    monkeypatch.setitem(reading.METRICS, "wer", lambda: metric)
    run(root, tmp_path / "b", "text", *flags, "--rank", "asr")
    loud = [np.abs(read(tmp_path / "b" / f"speech{end}.wav")).mean() for end in ("", "_2", "_3", "_4")]
    assert loud == sorted(loud) and len(set(loud)) == 4
    shown = capsys.readouterr().out
    found = [float(figure) for figure in re.findall(r", wer ([\d.]+), score", shown)]
    assert len(found) == 4 and found == sorted(found)
    assert all(case.text == "hello" and case.prompt.wav.shape == (1, 32000) for case in metric.cases)
    four = {read(tmp_path / "a" / f"speech{end}.wav").tobytes() for end in ("", "_2", "_3", "_4")}
    assert four == {read(tmp_path / "b" / f"speech{end}.wav").tobytes() for end in ("", "_2", "_3", "_4")}


def test_samples_of_a_piece_go_their_own_way(root, spy, tmp_path):
    run(root, tmp_path, "short", "--midi", root / "piece.mid", "--num-samples", 2)
    for before, after in zip(spy, spy[1:], strict=False):
        assert len(after["prompts"]) == 2
        for row in range(2):
            codes = before["result"].codes[row]
            assert torch.equal(after["prompts"][row], codes[-after["prompts_lens"][row] :])
    assert not np.array_equal(read(tmp_path / "piece.wav")[:40000], read(tmp_path / "piece_2.wav")[:40000])


def test_a_metric_that_is_not_installed_is_said_before_the_work(root, spy, tmp_path, monkeypatch):
    metric = Loudness()
    metric.missing = lambda: "WER needs ears: pip install ears"
    monkeypatch.setitem(reading.METRICS, "wer", lambda: metric)
    with pytest.raises(UserError, match="--rank asr: WER needs ears: pip install ears"):
        run(root, tmp_path, "text", "--text", "hello", "--num-samples", "2", "--rank", "asr")
    assert not spy


@pytest.mark.parametrize(
    "model,flags,message",
    [
        ("audio", "--text a", "is an AudioLM, which continues recordings and reads nothing; leave out --text"),
        ("audio", "--list list", "leave out --list"),
        ("text", "clip.wav", "is a VALLE that reads text; give --text, or --list"),
        ("notes", "--text a", "reads notes; give --midi"),
        ("text", "--midi tune.mid", "reads text; give --text"),
        ("vallf", "--text a", "no begin symbol"),
        ("nameless", "--text a", "does not say what its text symbols are"),
        ("text", "--text a --midi tune.mid", "--text and --midi do not go together"),
        ("text", "--text a --infill 1 2", "--infill needs --prompt beside it"),
        ("text", "clip.wav --infill 1 2", "is a VALLE that reads text; give --text"),
        ("text", "clip.wav --text a --infill 1 1.5", "was not trained for that; use a model that was trained with"),
        ("fills", "clip.wav --midi tune.mid --infill 1 1.5", "reads text; give --text"),
        ("fills", "clip.wav --list a --infill 1 1.5", "--infill and --list do not go together"),
        ("fills", "clip.wav --text a --prompt-text b --infill 1 1.5", "--infill and --prompt-text"),
        ("fills", "clip.wav --text a --output-name b --infill 1 1.5", "--infill and --output-name"),
        ("fills", "clip.wav --text a --stream b.wav --infill 1 1.5", "--infill and --stream"),
        ("fills", "clip.wav --text a --infill 1 1.5 --duration 0", "0 frames are to be added"),
        ("fills", "clip.wav --text a --infill 1 3", "not a part of 'clip.wav'"),
        ("fills", "clip.wav --text _ --infill 1 1.5", "nothing in the text '_' can be read"),
        ("fills", "long.wav --text a --infill 10.5 10.7", "sees the whole clip, but before or behind the gap"),
        ("fills-notes", "clip.wav --midi tune.mid --infill 1 1.5 --duration 1", "--midi and --duration"),
        ("fills-notes", "clip.wav --midi empty.mid --infill 1 1.5", "'empty.mid' has no notes"),
        ("fills-notes", "long.wav --midi tune.mid --infill 8 9 --max-prompt-duration 1", "no notes from 7.0 to 10.0 s"),
        ("text", "--text a --guidance-scale 2", "--text and --guidance-scale"),
        ("text", "--text a --long true", "--text and --long"),
        ("text", "--list a --stream b.wav", "--stream and --list"),
        ("text", "--list a --output-name b", "--list and --output-name"),
        ("notes", "--midi tune.mid --duration 3", "--midi and --duration"),
        ("text", "--text a --prompt-text b", "--prompt-text needs --prompt"),
        ("text", "clip.wav --prompt-text b", "--prompt-text needs --text or --list"),
        ("notes", "--midi tune.mid --prompt-midi clip.mid", "--prompt-midi needs --prompt"),
        ("text", "--text a --rank asr", "--rank needs --num-samples"),
        ("text", "--text a --batch-size 2", "--text and --batch-size"),
        ("text", "clip.wav --language de", "--language needs --text"),
        ("text", "--text a --prompt clip.wav,long.wav", "--text takes one clip, but 2"),
        ("text", "--text a long.wav --prompt-text b", "lasts more than the 10.0 s of --max-prompt-duration"),
        ("text", "--text a_7", "symbols that the model's 31 do not hold: '7'"),
        ("text", "--text _", "nothing in the text '_' can be read"),
        ("text", "--text a --output-name b/c", "expected a name without a folder"),
        ("text", "--text a --num-samples 0", "num_samples is 0"),
        ("text", "--text a --num-samples 2 --rank speaker", "--rank speaker needs a prompt"),
        ("text", "--text a --num-samples 2 --rank onset-f1", "--rank onset-f1 needs notes"),
        ("text", "--text a clip.wav --output-name clip --output-dir .", "would overwrite the prompt"),
        ("notes", "--list pieces.tsv --duration 3", "--duration: a piece lasts as long as its notes"),
        ("notes", "--midi empty.mid", "has no notes"),
        ("notes", "--midi none.mid", "does not exist"),
        ("notes", "--midi tune.mid clip.wav --prompt-midi empty.mid", "no notes from 0.0 to 2.0 s"),
        ("text", "--list none.tsv", "cannot be read"),
        ("text", "--list clip.wav", "cannot be read"),
        ("text", "--list columns.tsv", "has a column 'voice'"),
        ("text", "--list blank.tsv", "has no line"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_named(root, tmp_path, monkeypatch, spy, model, flags, message):
    monkeypatch.chdir(root)
    (root / "columns.tsv").write_text("id\tvoice\na\tb\n")
    (root / "pieces.tsv").write_text("a\t\t\t\ttune.mid\n")
    (root / "blank.tsv").write_text("\n\n")
    with pytest.raises(UserError, match=re.escape(message)):
        run(root, tmp_path, model, *flags.split())
    assert not spy


@pytest.fixture
def filled(monkeypatch):
    """Arguments of each call of VALLE.infill."""
    calls, real = [], VALLE.infill

    def infill(self, x, y, start, end, **named):
        calls.append({"x": x, "y": y, "gap": (start, end), **named})
        return real(self, x, y, start, end, **named)

    monkeypatch.setattr(VALLE, "infill", infill)
    return calls


@pytest.mark.parametrize("seconds", [None, 0.3, 0.9])
def test_a_word_is_said_anew(root, filled, tmp_path, capsys, seconds):
    longer = () if seconds is None else ("--duration", seconds)
    run(
        root,
        tmp_path,
        "fills",
        root / "clip.wav",
        "--text",
        "so be it",
        "--infill",
        1,
        1.5,
        "--seed",
        2,
        *longer,
    )
    (call,) = filled
    assert call["x"].tolist() == ids("so be it") and call["y"].shape == (100, 4) and call["gap"] == (50, 75)
    new = 25 if seconds is None else round(seconds * RATE)
    assert call["new_frames"] == new and call["seed"] == 2
    said = capsys.readouterr().out
    assert "clip_infilled.wav  1.00 to 1.50 s of 2.00 s made anew" in said
    assert (f" in {seconds} s" in said or f" in {seconds}0 s" in said) == (seconds is not None)
    wav = read(tmp_path / "clip_infilled.wav")
    assert len(wav) == 320 * (75 + new)
    codec = load_codec(root / "tiny")
    clip = torch.from_numpy(soundfile.read(root / "clip.wav", dtype="float32")[0])
    same = (codec.decode(codec.encode(clip[None, None]))[0, 0].numpy() * 32768).round()
    reach = codec.context_frames * codec.hop_length
    assert np.abs(wav[: 16000 - reach] - same[: 16000 - reach]).max() <= 1
    assert np.abs(wav[-8000 + reach :] - same[-8000 + reach :]).max() <= 1
    assert np.abs(wav[16000:20000] - same[16000:20000]).max() > 100


def test_a_text_that_is_filled_in_has_its_begin_and_end(root, filled, tmp_path):
    data = {"infill_prob": 0.5}
    codec = load_codec(root / "tiny").info()
    symbols = ["<eps>", "<bos>", "<eos>", *LETTERS, "_"]
    save_model(root / "fills-ends.pt", codec, text_info(symbols, ends=True), data)
    run(
        root,
        tmp_path,
        "fills-ends",
        root / "clip.wav",
        "--text",
        "ab",
        "--infill",
        1,
        1.5,
        "--num-samples",
        2,
    )
    assert filled[0]["x"].tolist() == [1, 3, 4, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip_infilled.wav", "clip_infilled_2.wav"]


def test_a_bar_is_played_anew_from_the_notes_near_by(root, filled, tmp_path):
    run(
        root, tmp_path, "fills-notes", root / "long.wav", "--midi", root / "piece.mid", "--infill", 5, 6,
        "--max-prompt-duration", 2,
    )  # fmt: skip
    (call,) = filled
    assert call["y"].shape == (250, 4) and call["gap"] == (100, 150)
    notes = MidiTokenizer().decode(call["x"].numpy())
    expected = scale(31.0, (13.0, 14.0))
    inside = (expected.onset >= 3) & (expected.onset < 8)
    assert np.allclose(notes.onset, expected.onset[inside] - 3, atol=0.01)
    assert notes.pitch.tolist() == expected.pitch[inside].tolist()
    assert len(read(tmp_path / "long_infilled.wav")) == 11 * 16000


@pytest.mark.parametrize(
    "model,rank,flags,figure,sign",
    [
        ("text", "speaker", "--text hello --min-new-tokens 60", "speaker_prompt", -1),
        ("text", "asr", "--text hello --min-new-tokens 60", "wer", 1),
        ("notes", "onset-f1", "--midi tune.mid --prompt-midi clip.mid", "onset_f1", -1),
    ],
)
def test_ranks_by_the_metrics_of_evaluation(
    root, tmp_path, monkeypatch, capsys, model, rank, flags, figure, sign
):
    monkeypatch.chdir(root)
    run(root, tmp_path, model, *flags.split(), "clip.wav", "--num-samples", 2, "--rank", rank)
    shown = capsys.readouterr().out
    found = [sign * float(value) for value in re.findall(rf", {figure} ([\d.]+), score", shown)]
    assert len(found) == 2 and found == sorted(found)


def test_stdout_carries_sound_alone(root, tmp_path):
    command = [
        sys.executable, "-m", "valle.bin.infer", "--checkpoint", str(root / "text.pt"), "--text", "hello", "--stream",
        "-", "--max-new-tokens", "40", "--min-new-tokens", "40",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0 and len(done.stdout) == 40 * 320 * 2
    said = done.stderr.decode()
    assert "s16le, 16000 Hz, 1 channel" in said and "first audio after" in said and "x real time" in said
    assert not list(tmp_path.iterdir())
