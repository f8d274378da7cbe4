"""What a metric is given and what it gives back, and the list of those there are.

A metric judges one piece of audio of one cut: `METRICS["stft"]()(audio, case)` is a dict of figures. What it may
compare with stands in the `Case`: the true recording, the prompt, the words, the notes. `Metric.task` says for what it
is meant, `Metric.keys` which figures it gives and which way is better.

The metrics themselves stand in `signal.py`, `speech.py` and `music.py`; these modules are loaded when one is built, and
heavy packages and weights when it is first called. A new metric is a class with these five members and one line in
`_PLACES`.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Protocol, cast

import numpy as np

from valle.data.midi import Notes

TASKS = ("codec", "quality", "similarity", "speech", "music")


@dataclass(frozen=True)
class Excerpt:
    """A piece of audio.

    Attributes:
        wav: (C, N) float32.
        sample_rate: Hz.
    """

    wav: np.ndarray
    sample_rate: int


@dataclass(frozen=True)
class Case:
    """What is known of a cut besides the audio to judge.

    Attributes:
        cut_id: name of the cut.
        reference: the true recording of the same stretch: what comes after the prompt, or all of it.
        prompt: what the model was given; None where there is no prompt.
        text: what is said in the stretch, where it is known.
        language: of the text, as "en" or "en-us", where it is known.
        notes: what is played in the stretch, times from its start, where it is known.
    """

    cut_id: str
    reference: Excerpt
    prompt: Excerpt | None
    text: str | None = None
    language: str | None = None
    notes: Notes | None = None


class Metric(Protocol):
    """One measurement of a piece of audio, which may give several figures.

    Attributes:
        name: as in `METRICS`.
        task: "codec" compares with the reference sample by sample, so it judges only a resynthesis; "quality" hears
            the audio alone; "similarity" compares with the prompt or the reference, not aligned in time; "speech" and
            "music" are for these.
        keys: figure -> "lower" or "higher", whichever is better.
    """

    name: str
    task: str
    keys: dict[str, str]

    def missing(self) -> str | None:
        """None where all it needs is installed, else one line that says what to install."""
        ...

    def applies(self, case: Case) -> bool:
        """Whether the case has what this metric compares with."""
        ...

    def __call__(self, audio: Excerpt, case: Case) -> dict[str, float | None]:
        """A figure for each of `keys`; None where it is not defined, as of silence."""
        ...


def install_hint(what: str, packages: tuple[str, ...], install: str) -> str | None:
    """None where all packages can be imported, else one line with what to install.

    Args:
        what: the object that needs them, as "STOI".
        packages: names as they are imported.
        install: arguments of `pip install`.
    """
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{what} needs {', '.join(absent)}: pip install {install}" if absent else None


_PLACES = {
    "mel": "valle.evaluation.signal:MelDistance",
    "stft": "valle.evaluation.signal:StftDistance",
    "chroma": "valle.evaluation.signal:ChromaDistance",
    "si_sdr": "valle.evaluation.signal:SiSdr",
    "stoi": "valle.evaluation.signal:Stoi",
    "pesq": "valle.evaluation.signal:Pesq",
    "profile": "valle.evaluation.signal:Profile",
    "dnsmos": "valle.evaluation.speech:Dnsmos",
    "wer": "valle.evaluation.speech:WordErrors",
    "speaker": "valle.evaluation.speech:SpeakerSimilarity",
    "notes": "valle.evaluation.music:NoteF1",
    "note_profile": "valle.evaluation.music:NoteProfile",
}


@cache
def _build(place: str) -> Metric:
    module, name = place.split(":")
    return cast(Metric, getattr(importlib.import_module(module), name)())


METRICS: dict[str, Callable[[], Metric]] = {name: partial(_build, place) for name, place in _PLACES.items()}
