"""MIDI files played with a SoundFont: audio for corpora that come without. Stage 1 of the piano recipes.

Two engines give the same notes at the same times: the program `fluidsynth`, and the Python package tinysoundfont where
that is not installed. Time 0 of the audio is time 0 of the MIDI file.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from valle.data.midi import read_notes, sustained
from valle.utils.errors import UserError

MIDI_SUFFIXES = (".mid", ".midi")
RATE = 44100  # Hz, of most SoundFonts: rendering at it and resampling afterwards leaves no aliases
PEAK = 0.9  # of full scale, for every piece; the dynamics inside a piece stay
TAIL = 3.0  # seconds after the last note, in which it dies away
TIMEOUT = 1800.0  # seconds that fluidsynth may take for a piece; it plays an hour in about 30
SHORTEST = 0.01  # seconds of a note

FOLDERS = (
    "/usr/share/sounds/sf2",
    "/usr/share/sounds/sf3",
    "/usr/share/soundfonts",
    "/usr/local/share/soundfonts",
    "/opt/homebrew/share/soundfonts",
    "~/.local/share/soundfonts",
)
PREFERRED = ("FluidR3_GM.sf2", "default-GM.sf2", "TimGM6mb.sf2")
INSTALL = "install one (Debian: apt-get install timgm6mb-soundfont, or fluid-soundfont-gm), or name a file"


def find_soundfont(given: str | None = None) -> Path:
    """The SoundFont that the user names, or else one that is installed.

    Raises:
        UserError: the named file does not exist or is none, or none is installed.
    """
    if given:
        path = Path(given).expanduser()
        if not path.is_file():
            raise UserError(f"--soundfont '{given}' does not exist; {INSTALL} with --soundfont")
        with open(path, "rb") as file:
            head = file.read(12)
        if head[:4] != b"RIFF" or head[8:12] != b"sfbk":
            raise UserError(f"--soundfont '{given}' is no SoundFont: expected an .sf2 or .sf3 file")
        return path.resolve()
    installed = [
        path
        for folder in FOLDERS
        for path in sorted(Path(folder).expanduser().glob("*.sf[23]"))
        if path.is_file()
    ]
    for name in PREFERRED:
        for path in installed:
            if path.name == name:
                return path.resolve()
    if not installed:
        raise UserError(f"no SoundFont found in {', '.join(FOLDERS)}; {INSTALL} with --soundfont")
    return installed[0].resolve()


@dataclass(frozen=True)
class Renderer:
    """Plays MIDI files with one SoundFont.

    Attributes:
        soundfont: .sf2 or .sf3 file.
        engine: "fluidsynth" or "tinysoundfont".
    """

    soundfont: Path
    engine: str

    def signature(self) -> dict[str, str]:
        """What the sound of a piece depends on beside its MIDI file."""
        digest = hashlib.sha1()
        with open(self.soundfont, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return {
            "engine": self.engine,
            "soundfont": self.soundfont.name,
            "soundfont_sha1": digest.hexdigest(),
        }

    def render(self, midi: Path) -> np.ndarray:
        """Play a MIDI file.

        Returns:
            (2, N) float32 at `RATE`, at most `PEAK` of full scale.

        Raises:
            UserError: a file that cannot be played, or that gives silence.
        """
        wav = ENGINES[self.engine](midi, self.soundfont)
        peak = float(np.abs(wav).max()) if wav.size else 0.0
        if not peak > 1e-5:
            raise UserError(f"MIDI file '{midi}' gives silence with SoundFont '{self.soundfont.name}'")
        return wav * np.float32(PEAK / peak)


def make_renderer(soundfont: str | None = None, engine: str | None = None) -> Renderer:
    """A renderer on what this machine has.

    Args:
        soundfont: the user's choice of a SoundFont (default: an installed one).
        engine: "fluidsynth" or "tinysoundfont" (default: the first of these that is installed).

    Raises:
        UserError: no SoundFont, or no engine.
    """
    path = find_soundfont(soundfont)
    available = [name for name, present in _PRESENT.items() if present()]
    if engine is None and available:
        return Renderer(path, available[0])
    if engine not in available:
        wanted = f"'{engine}'" if engine else "fluidsynth or tinysoundfont"
        raise UserError(
            f"{wanted} is needed to play MIDI files and is not installed: apt-get install fluidsynth, or"
            " pip install --no-deps tinysoundfont"
        )
    return Renderer(path, engine)


def _have_tinysoundfont() -> bool:
    try:
        import tinysoundfont  # noqa: F401
    except ImportError:
        return False
    return True


def _fluidsynth(midi: Path, soundfont: Path) -> np.ndarray:
    """(2, N): the program, without reverberation and chorus: what a codec hears is the piano."""
    with tempfile.TemporaryDirectory(prefix="valle-render-") as folder:
        output = Path(folder) / "piece.wav"
        command = ["fluidsynth", "-n", "-i", "-q", "-R", "0", "-C", "0", "-g", "0.2", "-r", str(RATE)]
        # 32-bit samples: nothing is clipped before the level is set
        command += ["-T", "wav", "-O", "float", "-F", str(output), str(soundfont), os.path.abspath(midi)]
        try:
            result = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserError(f"MIDI file '{midi}' could not be played: {error}") from error
        if result.returncode != 0 or not output.is_file():
            said = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
            raise UserError(f"MIDI file '{midi}' could not be played by fluidsynth: {said}")
        wav, _ = soundfile.read(output, dtype="float32", always_2d=True)
    return np.ascontiguousarray(wav.T)


def _tinysoundfont(midi: Path, soundfont: Path) -> np.ndarray:
    """(2, N): the package, which knows no pedal: here a note held by it ends when the pedal comes up."""
    import tinysoundfont

    events = _events(midi)
    synth = tinysoundfont.Synth(samplerate=RATE)
    try:
        font = synth.sfload(str(soundfont))
        synth.program_select(0, font, 0, 0)  # bank 0, program 0: grand piano
    except (tinysoundfont.SoundFontException, RuntimeError) as error:
        raise UserError(f"SoundFont '{soundfont}' cannot be loaded: {error}") from error
    pieces: list[np.ndarray] = []
    now = 0  # samples
    end = (round(events[-1][0] * RATE) if events else 0, 2, 0, 0)
    for time, kind, pitch, velocity in [*((round(e[0] * RATE), *e[1:]) for e in events), end]:
        until = time + round(TAIL * RATE) if kind == 2 else time
        if until > now:
            block = synth.generate(until - now)
            pieces.append(np.frombuffer(block, dtype=np.float32).reshape(-1, 2).copy())
            now = until
        if kind == 1:
            synth.noteon(0, pitch, velocity)
        elif kind == 0:
            synth.noteoff(0, pitch)
    return np.ascontiguousarray(np.concatenate(pieces).T)


def _events(midi: Path) -> list[tuple[float, int, int, int]]:
    """(seconds, 0 off or 1 on, pitch, velocity) in order of time, with the pedal's hold in the note ends."""
    notes = sustained(read_notes(midi))
    columns = (notes.onset.tolist(), notes.offset.tolist(), notes.pitch.tolist(), notes.velocity.tolist())
    events: list[tuple[float, int, int, int]] = []
    for onset, offset, pitch, velocity in zip(*columns, strict=True):
        events.append((onset, 1, pitch, velocity))
        # a note of no length is still struck, and its end must not be sorted before its beginning
        events.append((max(offset, onset + SHORTEST), 0, pitch, 0))
    return sorted(events)


ENGINES: dict[str, Callable[[Path, Path], np.ndarray]] = {
    "fluidsynth": _fluidsynth,
    "tinysoundfont": _tinysoundfont,
}
_PRESENT: dict[str, Callable[[], bool]] = {
    "fluidsynth": lambda: shutil.which("fluidsynth") is not None,
    "tinysoundfont": _have_tinysoundfont,
}
