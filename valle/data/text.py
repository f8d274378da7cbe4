"""Text front ends: from a sentence to the symbols that a text-to-speech model reads. Between manifests and batches.

    phonemes    IPA phones, stress marks apart, by espeak-ng; about a hundred languages    pip install 'valle[text]'
    pinyin      Mandarin: initial, and final with its tone, of every syllable              pip install 'valle[text]'
    characters  the text's own characters                                                   needs nothing
    bytes       its UTF-8 bytes, `<0x41>`: any text in any script has symbols               needs nothing

All of them clean the text first (`clean_text`), keep punctuation, and write the border of two words as `_`. No number
or abbreviation is written out, other than what espeak-ng does by itself. The same text gives the same symbols,
alone or in a batch.
"""

import difflib
import json
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lhotse.cut import Cut

from valle.data.manifests import TEXT_TOKENS_FILE, cut_text, stream_manifest, write_bytes, write_jsonl
from valle.data.symbols import SYMBOLS_FILE, WORD_BORDER, SymbolTable
from valle.utils.errors import UserError
from valle.utils.progress import progress

log = logging.getLogger(__name__)

STRESS = "ˈˌ"
PUNCTUATION = '.,;:!?…—"()[]{}¡¿'
TOKENIZER_FILE = "text_tokenizer.json"
DEFAULT_LANGUAGE = "en-us"
ALIASES = {"en": "en-us", "zh": "cmn", "zh-cn": "cmn", "mandarin": "cmn", "fr": "fr-fr"}

# One mark for those that are read alike, so that a rare one does not need an embedding of its own.
_TWINS = str.maketrans(
    {
        **dict.fromkeys("“”„‟«»《》〈〉「」『』", '"'),
        **dict.fromkeys("‘’‚‛`´", "'"),
        **dict.fromkeys("–―─", "—"),
        **dict.fromkeys("。।", "."),
        **dict.fromkeys("、،", ","),
        **dict.fromkeys("【〔", "["),
        **dict.fromkeys("】〕", "]"),
        "؛": ";",
        "؟": "?",
        "_": " ",  # the word border
    }
)
_CURLY = str.maketrans("“”", '""')
_MARK = r"[;!?…—\"()\[\]{}¡¿]"
# Not in 5.20, 1,000 and 3:45, nor between the letters of U.S.
_INNER = r"(?<=\d)[.,:](?=\d)|(?<=\b[^\W\d_])\.(?=[^\W\d_]\b)"
_PIECES = re.compile(rf"(?P<inner>{_INNER})|(?P<mark>{_MARK}|[.,:])")
_HAN = "[\u3007\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"

# fmt: off
INITIALS = ("b", "p", "m", "f", "d", "t", "n", "l", "g", "k", "h", "j", "q", "x", "zh", "ch", "sh", "r", "z", "c", "s")
FINALS = (
    "a", "o", "e", "ê", "i", "u", "v", "ai", "ei", "ao", "ou", "an", "en", "ang", "eng", "ong", "er", "ia", "io", "ie",
    "iao", "iou", "ian", "in", "iang", "ing", "iong", "ua", "uo", "uai", "uei", "uan", "uen", "uang", "ueng", "ve",
    "van", "vn",
)
# fmt: on
TONES = "12345"  # 5 is the neutral one


def clean_text(text: str) -> str:
    """What every front end does first.

    Unicode's compatibility form (NFKC: full-width letters, ligatures), control and invisible characters left out,
    quotes, dashes and full stops of all scripts as one each, two or more dots as `…`, a hyphen between spaces or two of
    them as `—`, `_` as a space, runs of white space as one space.
    """
    text = unicodedata.normalize("NFKC", text).translate(_TWINS)
    text = "".join(
        " " if character.isspace() else character
        for character in text
        if character.isspace() or unicodedata.category(character)[0] != "C"
    )
    text = re.sub(r"\.{2,}", "…", text)
    text = re.sub(r"-{2,}|(?<=\s)-(?=\s)", "—", text)
    return " ".join(text.split())


class TextTokenizer:
    """What the front ends share.

    Args:
        language: as espeak-ng calls it ("en-us", "de", "cmn"); the others take it down only.
        lower: whether capital letters become small ones, where the front end leaves letters.
    """

    name = ""

    def __init__(self, language: str = DEFAULT_LANGUAGE, lower: bool = True) -> None:
        self.language = language
        self.lower = lower

    def __call__(self, text: str) -> list[str]:
        """The symbols of one text; [] where nothing in it can be read."""
        return self.batch([text])[0]

    def batch(self, texts: Sequence[str]) -> list[list[str]]:
        """The symbols of many texts, far faster than one by one where a library must be called."""
        return [self._symbols_of(clean_text(text)) for text in texts]

    def _symbols_of(self, text: str) -> list[str]:
        raise NotImplementedError

    def symbols(self) -> SymbolTable:
        """The symbols that are known before any text is: every table of this front end holds them."""
        return SymbolTable.build([*PUNCTUATION, WORD_BORDER])

    def config(self) -> dict[str, Any]:
        """What `make_text_tokenizer` makes the same one from: kept beside the symbol table and in checkpoints."""
        return {"name": self.name, "language": self.language, "lower": self.lower}


class CharacterTokenizer(TextTokenizer):
    """Characters, a space as `_`."""

    name = "characters"

    def _symbols_of(self, text: str) -> list[str]:
        text = unicodedata.normalize("NFKC", text.lower()) if self.lower else text
        return [WORD_BORDER if character == " " else character for character in text]


class ByteTokenizer(TextTokenizer):
    """UTF-8 bytes, `<0x00>` to `<0xFF>`, a space as any other."""

    name = "bytes"

    def _symbols_of(self, text: str) -> list[str]:
        return [f"<0x{byte:02X}>" for byte in (text.lower() if self.lower else text).encode()]

    def symbols(self) -> SymbolTable:
        """All 256: no text lacks a symbol."""
        return SymbolTable.build(f"<0x{byte:02X}>" for byte in range(256))


class PinyinTokenizer(TextTokenizer):
    """Mandarin syllables as initial and final with tone, e.g. 你好 as n i3 h ao3 (tones as written, without sandhi).

    The reading of a character depends on the words around it. What is not Chinese passes as capital letters, digits and
    marks, apart from the initials, which are small letters; numbers are to be written out. Spaces beside a Chinese
    character do not count, since some corpora have them between words and users do not write them.
    """

    name = "pinyin"

    def _symbols_of(self, text: str) -> list[str]:
        text = re.sub(rf"(?<={_HAN}) | (?={_HAN})", "", text)
        symbols: list[str] = []
        for piece in re.split(rf"({_HAN}+)", text):
            if re.match(_HAN, piece):
                symbols += _syllables(piece)
            else:
                symbols += [WORD_BORDER if character == " " else character for character in piece.upper()]
        return symbols

    def symbols(self) -> SymbolTable:
        """Marks, letters, digits, initials, and finals in all tones."""
        finals = [final + tone for final in FINALS for tone in TONES]
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
        return SymbolTable.build([*PUNCTUATION, WORD_BORDER, *letters, *INITIALS, *finals])


def _syllables(text: str) -> list[str]:
    """Initials and finals of a run of Chinese characters."""
    try:
        from pypinyin import Style, lazy_pinyin
        from pypinyin.contrib.tone_convert import to_finals_tone3, to_initials
    except ImportError:
        raise UserError("pinyin needs pypinyin: pip install 'valle[text]'") from None

    symbols: list[str] = []
    for syllable in lazy_pinyin(text, style=Style.TONE3, neutral_tone_with_five=True):
        initial = to_initials(syllable, strict=True)
        final = to_finals_tone3(syllable, strict=True, neutral_tone_with_five=True, v_to_u=False)
        if final[:-1] in FINALS:
            symbols += [initial, final] if initial else [final]
        elif rare := re.findall(_HAN, syllable):  # without a reading
            symbols += rare
        else:  # interjections without a final, such as 嗯, n2
            symbols.append(syllable)
    return symbols


class PhonemeTokenizer(TextTokenizer):
    """IPA phones by espeak-ng, stress marks (ˈ ˌ) as symbols of their own, words apart by `_`, punctuation kept.

    phonemizer (GPL-3) calls espeak-ng (GPL-3), which comes with PyPI's espeakng-loader: nothing else is needed. The
    environment variable PHONEMIZER_ESPEAK_LIBRARY names another build of it.
    """

    name = "phonemes"

    def __init__(self, language: str = DEFAULT_LANGUAGE, lower: bool = True) -> None:
        super().__init__(ALIASES.get(language.lower(), language), lower)

    def symbols(self) -> SymbolTable:
        """Marks and stress; which phones there are, the texts say."""
        return SymbolTable.build([*PUNCTUATION, WORD_BORDER, *STRESS])

    def batch(self, texts: Sequence[str]) -> list[list[str]]:
        """The symbols of many texts; what stands between two marks is spoken once, however often it occurs."""
        divided = [_divide(clean_text(text)) for text in texts]
        spoken = sorted(
            {piece.strip() for pieces in divided for piece, is_mark in pieces if not is_mark} - {""}
        )
        phones = dict(zip(spoken, _phonemize(spoken, self.language), strict=True))
        return [_join(pieces, phones) for pieces in divided]


def _divide(text: str) -> list[tuple[str, bool]]:
    """Divide a text at its marks -> (piece, whether it is a mark), in order. Those of 5.20 and U.S. divide nothing."""
    pieces: list[tuple[str, bool]] = []
    start = 0
    for match in _PIECES.finditer(text):
        if match["mark"]:
            pieces += [(text[start : match.start()], False), (match["mark"], True)]
            start = match.end()
    return [(piece, is_mark) for piece, is_mark in [*pieces, (text[start:], False)] if piece]


def _join(pieces: Iterable[tuple[str, bool]], phones: dict[str, list[str]]) -> list[str]:
    """Symbols of the pieces of a text, with a word border where it has a space between two things that are read."""
    symbols: list[str] = []
    border = False
    for piece, is_mark in pieces:
        found = [piece] if is_mark else phones.get(piece.strip(), [])
        border = border or piece[0] == " "
        if found:
            symbols += [WORD_BORDER, *found] if border and symbols else found
            border = False
        border = border or piece[-1] == " "
    return symbols


def _phonemize(texts: list[str], language: str) -> list[list[str]]:
    """Texts without marks -> phones, stress marks and word borders."""
    if not texts:
        return []
    espeak = _espeak(language)
    from phonemizer.separator import Separator  # it is known to be there now

    separator = Separator(word=" ", phone="|", syllable="")
    lines = espeak.phonemize(texts, separator=separator, strip=True, njobs=1)
    return [_phones(line) for line in lines]


def _phones(line: str) -> list[str]:
    symbols: list[str] = []
    for word in line.split():
        symbols += [WORD_BORDER] if symbols else []
        for phone in word.split("|"):
            symbols += re.findall(f"[{STRESS}]|[^{STRESS}]+", phone)
    return symbols


@cache
def _espeak(language: str, plain: bool = False) -> Any:
    """espeak-ng for a language. Starting it takes as long as speaking a hundred sentences, so each is kept.

    Args:
        language: as espeak-ng calls it.
        plain: as `EspeakTokenizer` needs it: without stress, and phonemizer takes care of the marks.
    """
    try:
        import espeakng_loader
        from phonemizer.backend import EspeakBackend
        from phonemizer.backend.espeak.wrapper import EspeakWrapper
    except ImportError:
        raise UserError(
            "phonemes need phonemizer and espeakng-loader: pip install 'valle[text]' (or --text-extractor characters)"
        ) from None
    own = os.environ.get("PHONEMIZER_ESPEAK_LIBRARY")
    EspeakWrapper.set_library(own or espeakng_loader.get_library_path())
    EspeakWrapper.set_data_path(None if own else espeakng_loader.get_data_path())
    quiet = logging.getLogger(f"{__name__}.espeak")
    quiet.setLevel(logging.ERROR)  # else a line about each word that it joins with the next one
    try:
        known = EspeakBackend.supported_languages()
    except RuntimeError as error:
        raise UserError(
            f"espeak-ng does not start ({error}); "
            + ("unset PHONEMIZER_ESPEAK_LIBRARY" if own else "pip install --force-reinstall espeakng-loader")
        ) from error
    if language not in known:
        near = difflib.get_close_matches(language, known, n=3, cutoff=0.3) or ["en-us", "de", "cmn"]
        raise UserError(
            f"espeak-ng has no language '{language}'; it has {len(known)}, such as {', '.join(near)} (--language)"
        )
    if plain:
        return EspeakBackend(language, preserve_punctuation=True, words_mismatch="ignore", logger=quiet)
    no_marks = re.compile(r"(?!)")  # they have been taken out, and those of 5.20 are to be read
    return EspeakBackend(
        language,
        punctuation_marks=no_marks,
        with_stress=True,
        language_switch="remove-flags",
        words_mismatch="ignore",
        logger=quiet,
    )


class EspeakTokenizer(TextTokenizer):
    """Phones without stress, for checkpoints of lifeiteng/vall-e (its text extractor `espeak`).

    A symbol is a run of letters between two separators, or one other character: a mark, or the sign under n̩. Nothing
    is cleaned but white space and curly quotes.
    """

    name = "espeak"

    def __init__(self, language: str = DEFAULT_LANGUAGE, lower: bool = True) -> None:
        super().__init__(ALIASES.get(language.lower(), language), lower)

    def batch(self, texts: Sequence[str]) -> list[list[str]]:
        """The symbols of many texts."""
        return [self._symbols_of(" ".join(text.translate(_CURLY).split())) for text in texts]

    def _symbols_of(self, text: str) -> list[str]:
        if not text:
            return []
        espeak = _espeak(self.language, plain=True)
        from phonemizer.separator import Separator  # it is known to be there now

        separator = Separator(word=WORD_BORDER, phone="|", syllable="-")
        # One by one: with marks, it tells texts apart by what it finds between these, which may be nothing.
        return _runs("".join(espeak.phonemize([text], separator=separator, strip=True, njobs=1)))


def _runs(line: str) -> list[str]:
    """`h|iː|z_n|oʊ.` -> h iː z _ n oʊ ."""
    symbols: list[str] = []
    for number, word in enumerate(line.split(WORD_BORDER)):
        symbols += [WORD_BORDER] if number else []
        symbols += [run for run in re.findall(r"\w+|[^\w\s]", word) if run != "|"]
    return symbols


class SyllableTokenizer(TextTokenizer):
    """Mandarin syllables with tones, `-` between them, for checkpoints of lifeiteng/vall-e (`pypinyin`)."""

    name = "pypinyin"

    def batch(self, texts: Sequence[str]) -> list[list[str]]:
        """The symbols of many texts."""
        return [self._symbols_of(" ".join(text.split())) for text in texts]

    def _symbols_of(self, text: str) -> list[str]:
        try:
            from phonemizer.punctuation import Punctuation
            from pypinyin import Style, pinyin
        except ImportError:
            raise UserError(f"{self.name} needs pypinyin and phonemizer: pip install 'valle[text]'") from None

        marks = Punctuation.default_marks() + WORD_BORDER
        line = ""
        spaced = text.replace(" ", WORD_BORDER)
        for (found,) in pinyin(spaced, style=Style.TONE3, neutral_tone_with_five=True):
            if all(character in marks for character in found):
                line = line.removesuffix("-") + found
            elif parts := self._parts(found):
                line += f"{parts}-"
        return _runs(line.rstrip(f"{WORD_BORDER}-"))

    def _parts(self, syllable: str) -> str:
        """What is written for what pypinyin takes as one; "" where that is not read."""
        return syllable


class InitialsFinalsTokenizer(SyllableTokenizer):
    """As `SyllableTokenizer`, each syllable as its initial, and its final with the tone."""

    name = "pypinyin_initials_finals"

    def _parts(self, syllable: str) -> str:
        from pypinyin.style._utils import get_finals, get_initials

        if not syllable[-1].isalnum():  # letters with a mark behind them
            return ""
        tone = syllable[-1] if syllable[-1].isdigit() else ""
        final = get_finals(syllable.removesuffix(tone), strict=False) + tone
        return f"{get_initials(syllable, strict=False)}|{final}"


_TOKENIZERS: dict[str, Callable[[str, bool], TextTokenizer]] = {
    kind.name: kind for kind in (PhonemeTokenizer, PinyinTokenizer, CharacterTokenizer, ByteTokenizer)
}
TEXT_TOKENIZERS = tuple(_TOKENIZERS)
# Of checkpoints that others have trained, by the names that they have there.
_FOREIGN: dict[str, Callable[[str, bool], TextTokenizer]] = {
    kind.name: kind for kind in (EspeakTokenizer, SyllableTokenizer, InitialsFinalsTokenizer)
}
FOREIGN_TOKENIZERS = tuple(_FOREIGN)


def make_text_tokenizer(name: str, language: str = DEFAULT_LANGUAGE, lower: bool = True) -> TextTokenizer:
    """A front end by its name.

    Raises:
        UserError: there is none of that name.
    """
    known = _TOKENIZERS | _FOREIGN
    if name not in known:
        raise UserError(f"no text front end '{name}'; there are {', '.join(known)}")
    return known[name](language, lower)


def load_text_tokenizer(folder: Path) -> tuple[TextTokenizer, SymbolTable]:
    """The front end and the symbol table that `tokenize_texts` has used in a folder.

    Raises:
        UserError: they are not there or damaged.
    """
    path = folder / TOKENIZER_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        tokenizer = make_text_tokenizer(config["name"], config["language"], config["lower"])
    except FileNotFoundError:
        raise UserError(f"'{path}' does not exist; run python -m valle.bin.text_tokens") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"'{path}' is damaged ({error}); run python -m valle.bin.text_tokens again"
        ) from error
    return tokenizer, SymbolTable.read(folder / SYMBOLS_FILE)


def text_tokens(cuts: Iterable[Cut], tokenizer: TextTokenizer) -> tuple[dict[str, list[int]], SymbolTable]:
    """Text ids of cuts, and the table they are of.

    Args:
        cuts: those without text are left out.
        tokenizer: makes the symbols.

    Returns:
        Ids by cut id; the table of the front end's own symbols and all that occur.
    """
    symbols = _text_symbols(cuts, tokenizer)
    table = _table(tokenizer, (found for _, found in symbols.values()))
    return {cut_id: table.encode(found) for cut_id, (_, found) in symbols.items()}, table


def tokenize_texts(folder: Path, tokenizer: TextTokenizer) -> dict[str, int]:
    """Text symbols for the utterances of DIR/cuts_all.jsonl.gz; `split_manifest` then puts them into the cuts.

    Writes text_tokens.jsonl.gz (lines of id, text, tokens), unique_text_tokens.k2symbols, and text_tokenizer.json,
    which says how they were made. Run twice, it changes nothing.

    Args:
        folder: with cuts_all.jsonl.gz.
        tokenizer: makes the symbols.

    Returns:
        How many "texts", different "symbols", and "empty" texts, which nothing can be read of.

    Raises:
        UserError: no manifest, or no text in it.
    """
    manifest = folder / "cuts_all.jsonl.gz"
    cuts = progress(stream_manifest(manifest), desc="texts", unit="cut")
    symbols = _text_symbols((cut for cut in cuts if (cut.custom or {}).get("kind") != "audio"), tokenizer)
    if not symbols:
        raise UserError(f"'{manifest}': no utterance has a text; expected supervisions with text")
    empty = [cut_id for cut_id, (_, found) in symbols.items() if not found]
    if empty:
        log.warning("%d texts have nothing that can be read, such as that of cut '%s'", len(empty), empty[0])
    table = _table(tokenizer, (found for _, found in symbols.values()))
    table.write(folder / SYMBOLS_FILE)
    config = json.dumps(tokenizer.config(), indent=2, ensure_ascii=False) + "\n"
    write_bytes(folder / TOKENIZER_FILE, config.encode())
    items = ({"id": cut_id, "text": text, "tokens": found} for cut_id, (text, found) in symbols.items())
    write_jsonl(folder / TEXT_TOKENS_FILE, items)
    return {"texts": len(symbols), "symbols": len(table), "empty": len(empty)}


def _text_symbols(cuts: Iterable[Cut], tokenizer: TextTokenizer) -> dict[str, tuple[str, list[str]]]:
    texts = {cut.id: text for cut in cuts if (text := cut_text(cut))}
    found = tokenizer.batch(list(texts.values()))
    return {cut_id: (text, symbols) for (cut_id, text), symbols in zip(texts.items(), found, strict=True)}


def _table(tokenizer: TextTokenizer, texts: Iterable[list[str]]) -> SymbolTable:
    found = {symbol for symbols in texts for symbol in symbols}
    return SymbolTable.build([*tokenizer.symbols(), *found])
