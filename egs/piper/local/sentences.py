"""Plain text of books -> sentences to be spoken: whole ones, without digits, abbreviations or rare characters.

What is said must be what is written, since the text is what a model learns from, and what a recognizer's words are
counted against: hence no numbers and no acronyms, which can be read in several ways.
"""

import re
from collections.abc import Iterator

MIN_WORDS = 5  # below that, under 2 s
MAX_WORDS = 32  # above that, over 12 s
SPEAKABLE = re.compile(r"[A-Za-z .,;:!?'-]+")
ACRONYM = re.compile(r"\b[A-Z]{2,3}\b|\b(?=[A-Z]{4})[^AEIOUY\W]{4,}\b|\b[A-Za-z]\.[A-Za-z]")
ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|vs|etc|Co|Inc|No|Vol|pp?|cf|[A-Z])\.")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
CLAUSE_END = re.compile(r"(?<=[;:])\s+")


def read_sentences(text: str) -> Iterator[str]:
    """The sentences of a book that can be spoken, in their order, each once.

    A sentence of too few words is said together with those that follow it in its paragraph, one of too many in its
    clauses.
    """
    seen = set()
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in group_short(split_paragraph(clean(paragraph))):
            words = len(sentence.split())
            if sentence not in seen and MIN_WORDS <= words <= MAX_WORDS and is_speakable(sentence):
                seen.add(sentence)
                yield sentence


def clean(paragraph: str) -> str:
    """One line; without quotation marks, marks of emphasis and dashes; EMPHASIS as Emphasis."""
    line = " ".join(paragraph.split())
    line = re.sub(r"(?<!\w)'|'(?!\w)|[`\"“”_*]", "", line.replace("’", "'"))
    line = re.sub(r"\s*(?:--+|—)\s*", ", ", line)
    line = re.sub(r"([,.;:!?])(?:,\s)+", r"\1 ", line)  # "!--" and "`Well!' --"
    line = re.sub(r"\b(?=\w*[AEIOUY])[A-Z]{4,}\b", lambda match: match.group().capitalize(), line)
    return " ".join(line.split())


def split_paragraph(paragraph: str) -> list[str]:
    """Sentences, and the clauses of those that are too long."""
    parts: list[str] = []
    for sentence in SENTENCE_END.split(paragraph):
        long = len(sentence.split()) > MAX_WORDS
        parts += CLAUSE_END.split(sentence) if long else [sentence]
    return parts


def group_short(sentences: list[str]) -> Iterator[str]:
    """Neighbours together until they have enough words; what is left at the end is not said."""
    group = ""
    for sentence in sentences:
        group = f"{group} {sentence}".strip()
        if len(group.split()) >= MIN_WORDS:
            yield group
            group = ""


def is_speakable(sentence: str) -> bool:
    """Whether there is one way to say it."""
    return (
        SPEAKABLE.fullmatch(sentence) is not None
        and sentence[-1] in ".!?;:"
        and ACRONYM.search(sentence) is None
        and ABBREVIATION.search(sentence) is None
    )
