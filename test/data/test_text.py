"""Text front ends: what a sentence becomes, alone or in a batch; symbols beside the cuts and in them."""

import copy
import gzip
import json
import logging
import sys

import pytest
from lhotse import MonoCut, SupervisionSegment

from valle.bin import split_manifest as split_command
from valle.bin import text_tokens as command
from valle.data.manifests import read_manifest, write_cuts
from valle.data.symbols import SymbolTable
from valle.data.text import (
    TEXT_TOKENIZERS,
    clean_text,
    load_text_tokenizer,
    make_text_tokenizer,
    text_tokens,
)
from valle.utils.errors import UserError

SENTENCES = [
    "Hello, world!",
    "The price was $5.20 at 3:45.",
    "“Quoted” words… and — so on; the U.S. (of course).",
    "naïve café",
    "你好，世界！",
    "",
    " \t\n",
    "...",
    "Hello, world!",
    "♪",
]


def _available(name: str) -> str:
    for package in {"phonemes": ["phonemizer", "espeakng_loader"], "pinyin": ["pypinyin"]}.get(name, []):
        pytest.importorskip(package)
    return name


def _phonemes(language: str = "en-us"):
    return make_text_tokenizer(_available("phonemes"), language)


def _say(text: str, language: str = "en-us") -> str:
    return " ".join(_phonemes(language)(text))


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  a \t b\n\nc ", "a b c"),
        ("ﬁne Ｈｅｌｌｏ，", "fine Hello,"),
        ("“a” «b» 「c」 ‘d’ it’s", '"a" "b" "c" \'d\' it\'s'),
        ("so… wait.. well .... a.b", "so… wait… well … a.b"),
        ("a - b -- c – d co-op", "a — b — c — d co-op"),
        ("zero\u200bwidth\u00ad \ufeffbell\x07", "zerowidth bell"),
        ("你好。世界、嗎؟", "你好.世界,嗎?"),
        ("snake_case", "snake case"),
        ("e\u0301", "é"),
    ],
)
def test_cleaning(text, clean):
    assert clean_text(text) == clean
    assert clean_text(clean) == clean


@pytest.mark.parametrize("name", TEXT_TOKENIZERS)
def test_batch_equals_one_by_one_in_any_order(name):
    tokenizer = make_text_tokenizer(_available(name))
    alone = [make_text_tokenizer(name)(text) for text in SENTENCES]
    assert tokenizer.batch(SENTENCES) == alone
    assert tokenizer.batch(SENTENCES[::-1]) == alone[::-1]
    assert tokenizer.batch([]) == []
    assert alone[5] == alone[6] == []
    table = SymbolTable.build([*tokenizer.symbols(), *(symbol for symbols in alone for symbol in symbols)])
    assert all(table.decode(table.encode(symbols)) == symbols for symbols in alone)
    config = tokenizer.config()
    assert make_text_tokenizer(**config).config() == config
    assert copy.deepcopy(tokenizer).batch(SENTENCES) == alone  # as for another process


def test_phonemes_with_stress_borders_and_marks():
    assert _say("Hello, world!") == "h ə l ˈ oʊ , _ w ˈ ɜː l d !"
    assert _say("(yes) “no”…") == '( j ˈ ɛ s ) _ " n ˈ oʊ " …'
    assert _say("well -- no") == "w ˈ ɛ l _ — _ n ˈ oʊ"
    assert _say("...") == "…"
    assert _say("!no") == "! n ˈ oʊ"


def test_numbers_times_and_initials_are_read_whole():
    # "five point two zero dollars", not "five. twenty"
    assert "p ɔɪ n t" in _say("It was $5.20.") and _say("It was $5.20.").endswith(" .")
    assert "." not in _say("5.20 and more")
    assert ":" not in _say("at 3:45 now") and ":" in _say("now: 3")
    assert "," not in _say("1,000 men") and "," in _say("1, 2")
    assert _say("U.S.") == "j ˌ uː ˈ ɛ s ."  # the letters', with one full stop
    assert _say("end.Next") == "ˈ ɛ n d . n ˈ ɛ k s t"


def test_what_cannot_be_read_leaves_no_trace():
    assert _say("♪ hello ♪") == _say("hello")
    assert _say("♪") == ""
    assert _say("hello ♪, hello") == _say("hello, hello")


@pytest.mark.parametrize(
    ("language", "text", "said"),
    [
        ("de", "Guten Tag", "ɡ ˈ uː t ə n _ t ˈ ɑː k"),
        ("fr", "Bonjour", "b ɔ̃ ʒ ˈ u ʁ"),
        ("it", "Ciao", "tʃ ˈ a o"),
    ],
)
def test_other_languages(language, text, said):
    assert _say(text, language) == said


def test_two_languages_at_once():
    german, english = _phonemes("de"), _phonemes("en-us")
    first = german("Wagen"), english("Wagen")
    assert first == (german("Wagen"), english("Wagen")) and first[0] != first[1]


def test_mandarin_has_its_short_name():
    assert _phonemes("zh").config()["language"] == "cmn"


def test_espeak_is_quiet(caplog, capfd):
    with caplog.at_level(logging.DEBUG):
        _phonemes().batch(["to be or not to be, that is the question of the day"] * 3)
        _phonemes()("the 你好 word")
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_unknown_names_are_told():
    with pytest.raises(UserError, match="espeak-ng has no language 'xx'; it has .*--language"):
        _say("hello", "xx")
    with pytest.raises(
        UserError, match="no text front end 'words'; there are phonemes, pinyin, characters, bytes"
    ):
        make_text_tokenizer("words")


@pytest.mark.parametrize(
    ("name", "package", "text"),
    [("phonemes", "phonemizer", "a"), ("phonemes", "espeakng_loader", "a"), ("pinyin", "pypinyin", "好")],
)
def test_missing_packages_are_told_in_one_line(monkeypatch, name, package, text):
    from valle.data import text as module

    _available(name)
    for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, package, None)
    module._espeak.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'valle\[text\]'"):
        make_text_tokenizer(name)(text)


def test_an_espeak_that_does_not_load_is_told(monkeypatch, tmp_path):
    from valle.data import text as module

    _available("phonemes")
    (tmp_path / "broken.so").write_bytes(b"no library")
    monkeypatch.setenv("PHONEMIZER_ESPEAK_LIBRARY", str(tmp_path / "broken.so"))
    module._espeak.cache_clear()
    with pytest.raises(UserError, match="espeak-ng does not start .*unset PHONEMIZER_ESPEAK_LIBRARY"):
        _say("hello")
    monkeypatch.undo()
    assert _say("hello") == "h ə l ˈ oʊ"


def test_pinyin_initials_and_finals_with_tone():
    tokenizer = make_text_tokenizer(_available("pinyin"))
    assert tokenizer("你好，世界！") == ["n", "i3", "h", "ao3", ",", "sh", "i4", "j", "ie4", "!"]
    assert tokenizer("绿月鱼吗") == ["l", "v4", "ve4", "v2", "m", "a5"]
    # the same character, read by its word: háng and xíng; spaces between words say nothing
    assert tokenizer("银行") == ["in2", "h", "ang2"] and tokenizer("行人") == ["x", "ing2", "r", "en2"]
    assert tokenizer("银 行 ， 行 人") == tokenizer("银行，行人")


def test_pinyin_lets_the_rest_pass():
    tokenizer = make_text_tokenizer(_available("pinyin"))
    assert tokenizer("b 用 iPhone 5 ok go") == ["B", "iong4", *"IPHONE", "_", "5", "_", *"OK", "_", *"GO"]
    assert tokenizer("嗯") == ["n2"]
    assert tokenizer("好龦龧") == ["h", "ao3", "龦", "龧"]  # nobody knows how to read these


def test_pinyin_knows_its_symbols_before_any_text():
    tokenizer = make_text_tokenizer(_available("pinyin"))
    table = tokenizer.symbols()
    common = "".join(chr(code) for code in range(0x4E00, 0x9000, 7))
    unknown = [symbol for character in common for symbol in tokenizer(character) if symbol not in table]
    assert len(unknown) < 5  # interjections and characters that nobody reads
    assert {"b", "B", "iong4", "er5", "_", "?"} <= set(table)


def test_characters_and_bytes():
    assert make_text_tokenizer("characters")("Ab ﬁ ß!") == ["a", "b", "_", "f", "i", "_", "ß", "!"]
    assert make_text_tokenizer("characters", lower=False)("Ab") == ["A", "b"]
    assert make_text_tokenizer("bytes")("A é") == ["<0x61>", "<0x20>", "<0xC3>", "<0xA9>"]
    table = make_text_tokenizer("bytes").symbols()
    assert len(table) == 257
    for text in ("any text — 你好 🎵", "ᚠ and \u0378"):
        assert table.encode(make_text_tokenizer("bytes")(text))


def _cut(cut_id: str, text: str | None, split: str = "train", kind: str = "utterance") -> MonoCut:
    supervision = SupervisionSegment(cut_id, "r", 0.0, 1.0, text=text, custom={"split": split})
    custom = {"split": split, "kind": kind}
    return MonoCut(cut_id, start=0.0, duration=1.0, channel=0, supervisions=[supervision], custom=custom)


def test_ids_of_cuts_and_their_table():
    cuts = [_cut("a", "ba"), _cut("b", None), _cut("c", "cab!")]
    ids, table = text_tokens(cuts, make_text_tokenizer("characters"))
    assert list(ids) == ["a", "c"]
    assert table.decode(ids["c"]) == ["c", "a", "b", "!"]
    assert "?" in table and "z" not in table
    again, same = text_tokens(reversed(cuts), make_text_tokenizer("characters"))
    assert same == table and again == ids


def test_the_text_of_joined_supervisions_is_in_order_of_time():
    cut = _cut("a", "two")
    cut.supervisions = [
        SupervisionSegment("2", "r", 1.0, 1.0, text="two"),
        SupervisionSegment("1", "r", 0.0, 1.0, text="one"),
    ]
    ids, table = text_tokens([cut], make_text_tokenizer("characters"))
    assert "".join(table.decode(ids["a"])) == "one_two"


@pytest.fixture
def folder(tmp_path):
    """Cuts of all splits, with and without text."""
    cuts = [_cut(f"{kind}-{split}", f"Text {split}.", split, kind) for split in ("train", "validation", "test")
            for kind in ("audio", "utterance")]  # fmt: skip
    write_cuts(tmp_path / "cuts_all.jsonl.gz", [*cuts, _cut("silent", None)])
    return tmp_path


def _snapshot(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def test_the_command_writes_symbols_that_the_split_puts_into_cuts(folder):
    flags = ["--manifest-dir", str(folder), "--text-extractor", "characters"]
    command.main(flags)
    split_command.main(["--manifest-dir", str(folder)])
    assert (folder / "unique_text_tokens.k2symbols").read_text(encoding="utf-8").startswith("<eps> 0\n! 1\n")
    tokenizer, table = load_text_tokenizer(folder)
    cuts = {cut.id: cut for cut in read_manifest(folder / "utterances_train.jsonl.gz")}
    custom = cuts["utterance-train"].supervisions[0].custom
    assert custom == {"split": "train", "tokens": {"text": list("text_train.")}}
    assert tokenizer("Text train.") == custom["tokens"]["text"] and table.encode(custom["tokens"]["text"])
    assert list(cuts) == ["utterance-train"], "the one without a text is left out"
    (audio,) = read_manifest(folder / "cuts_train.jsonl.gz")
    assert "tokens" not in audio.supervisions[0].custom
    with gzip.open(folder / "text_tokens.jsonl.gz", "rt") as file:
        assert len([json.loads(line) for line in file]) == 3

    before = _snapshot(folder)
    command.main(flags)
    split_command.main(["--manifest-dir", str(folder)])
    assert _snapshot(folder) == before


def test_what_has_notes_need_no_text(folder):
    played = _cut("played", None)
    played.custom["midi"] = "played.mid"
    write_cuts(folder / "cuts_all.jsonl.gz", [*read_manifest(folder / "cuts_all.jsonl.gz"), played])
    command.main(["--manifest-dir", str(folder), "--text-extractor", "characters"])
    split_command.main(["--manifest-dir", str(folder)])
    cuts = {cut.id: cut for cut in read_manifest(folder / "utterances_train.jsonl.gz")}
    assert set(cuts) == {"utterance-train", "played"}
    assert "tokens" not in cuts["played"].supervisions[0].custom


def test_symbols_of_other_texts_are_not_taken(folder):
    command.main(["--manifest-dir", str(folder), "--text-extractor", "bytes"])
    cuts = [cut for cut in read_manifest(folder / "cuts_all.jsonl.gz")]
    cuts[1].supervisions[0].text = "changed"
    write_cuts(folder / "cuts_all.jsonl.gz", cuts)
    with pytest.raises(
        UserError, match="cut 'utterance-train': its text is not the one in .*text_tokens again"
    ):
        split_command.main(["--manifest-dir", str(folder)])
    (folder / "text_tokens.jsonl.gz").write_bytes(b"broken")
    with pytest.raises(UserError, match="text_tokens.jsonl.gz' is damaged"):
        split_command.main(["--manifest-dir", str(folder)])


def test_no_manifest_no_text_and_no_tokenizer_are_told(tmp_path):
    flags = ["--manifest-dir", str(tmp_path), "--text-extractor", "bytes"]
    with pytest.raises(UserError, match="does not exist"):
        command.main(flags)
    write_cuts(tmp_path / "cuts_all.jsonl.gz", [_cut("a", None), _cut("b", "x", kind="audio")])
    with pytest.raises(UserError, match="no utterance has a text"):
        command.main(flags)
    with pytest.raises(UserError, match="text_tokenizer.json' does not exist"):
        load_text_tokenizer(tmp_path)
    (tmp_path / "text_tokenizer.json").write_text('{"name": 3}')
    with pytest.raises(UserError, match="text_tokenizer.json' is damaged|no text front end"):
        load_text_tokenizer(tmp_path)


def test_texts_without_anything_to_read_are_counted(tmp_path, capfd):
    write_cuts(tmp_path / "cuts_all.jsonl.gz", [_cut("a", "x"), _cut("b", "\u200b")])
    command.main(["--manifest-dir", str(tmp_path), "--text-extractor", "characters"])
    assert "1 texts have nothing that can be read, such as that of cut 'b'" in capfd.readouterr().err


def test_phones_of_the_first_valle():
    """Without stress; letters between separators are one symbol, whatever else there is, one each."""
    tokenizer = make_text_tokenizer(_available("espeak"))
    assert " ".join(tokenizer("Hello, world!")) == "h ə l oʊ , _ w ɜː l d !"
    assert tokenizer("button")[-2:] == ["n", "\u0329"]  # the sign of a syllable apart from its letter
    assert " ".join(tokenizer("“no”  (yes)...")) == '" n oʊ " _ ( j ɛ s ) . . .'
    texts = ["", "?!", "Go to her.", " ", "no"]
    assert tokenizer.batch(texts) == [tokenizer(text) for text in texts]
    assert tokenizer("") == [] and tokenizer("?!") == ["?", "!"]


@pytest.mark.parametrize(
    ("name", "symbols"),
    [
        ("pypinyin", "ni3 - hao3 , shi4 - jie4 _ wo3 !"),
        ("pypinyin_initials_finals", "n i3 - h ao3 , sh i4 - j ie4 _ w o3 !"),
    ],
)
def test_syllables_of_the_first_valle(name, symbols):
    tokenizer = make_text_tokenizer(_available(name))
    assert " ".join(tokenizer("你好,世界 我!")) == symbols
    assert tokenizer("") == [] and tokenizer("我。")[-1] == ("。" if name == "pypinyin" else "o3")
    assert make_text_tokenizer(**tokenizer.config()).config() == tokenizer.config()
    if name.endswith("finals"):
        assert tokenizer("爱")[-1] == "ai4" and "-" not in tokenizer("爱")
