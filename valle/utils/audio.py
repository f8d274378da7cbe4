"""Audio files in and out: the start and the end of the road. Arrays are (C, N) float32 in [-1, 1].

Reading tries libsndfile (wav, flac, ogg, mp3) and then FFmpeg through PyAV (m4a, g722, …); resampling is soxr.
"""

import contextlib
import io
import os
import struct
import sys
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import soundfile

from valle.utils.errors import UserError
from valle.utils.files import atomic_path


def load_audio(path: str | Path) -> tuple[np.ndarray, int]:
    """Read a whole audio file.

    Returns:
        wav (C, N) float32 and the sample rate in Hz.

    Raises:
        UserError: the file is missing, empty, no audio, has no samples, or holds NaN or infinite samples.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"audio file '{path}' does not exist")
    if path.is_dir():
        raise UserError(f"'{path}' is a folder, but an audio file was expected")
    try:
        size = path.stat().st_size
        if size == 0:
            raise UserError(f"audio file '{path}' is empty (0 bytes)")
        try:
            wav, sample_rate = soundfile.read(path, dtype="float32", always_2d=True)
            wav = wav.T
        except soundfile.LibsndfileError as error:
            wav, sample_rate = _load_with_av(path, str(error))
    except OSError as error:
        raise UserError(f"audio file '{path}' cannot be read: {error.strerror or error}") from error
    if wav.shape[1] == 0:
        raise UserError(f"audio file '{path}' has no samples")
    if not np.isfinite(wav).all():
        bad = int(np.size(wav) - np.isfinite(wav).sum())
        raise UserError(f"audio file '{path}' has {bad} NaN or infinite samples; export it again")
    return np.ascontiguousarray(wav), int(sample_rate)


def _load_with_av(path: Path, reason: str) -> tuple[np.ndarray, int]:
    import av

    # A raw G.722 stream has no header that FFmpeg could recognize.
    container_format = "g722" if path.suffix.lower() == ".g722" else None
    try:
        with av.open(str(path), format=container_format) as container:
            if not container.streams.audio:
                raise UserError(f"'{path}' holds no audio stream")
            stream = container.streams.audio[0]
            sample_rate = int(stream.rate)
            resampler = av.AudioResampler(format="fltp", rate=sample_rate)
            chunks = [
                converted.to_ndarray()
                for frame in container.decode(stream)
                for converted in resampler.resample(frame)
            ]
            chunks.extend(converted.to_ndarray() for converted in resampler.resample(None))
    except (av.error.FFmpegError, ValueError) as error:
        raise UserError(f"'{path}' is not an audio file that can be read ({reason.strip()})") from error
    if not chunks:
        raise UserError(f"audio file '{path}' has no samples")
    return np.concatenate(chunks, axis=1).astype(np.float32), sample_rate


def convert_audio(wav: np.ndarray, sample_rate: int, target_rate: int, channels: int) -> np.ndarray:
    """Bring (C, N) audio to another rate and channel count.

    Mixes to mono before resampling; one channel is duplicated where more are asked for.

    Returns:
        (channels, N') float32, N' = round(N · target_rate / sample_rate) ± 1.
    """
    import soxr

    if wav.shape[0] != channels:
        mono = wav.mean(axis=0, keepdims=True, dtype=np.float32)
        wav = np.repeat(mono, channels, axis=0)
    if sample_rate != target_rate:
        wav = soxr.resample(wav.T, sample_rate, target_rate, quality="HQ").T
    return np.ascontiguousarray(wav, dtype=np.float32)


def save_audio(path: str | Path, wav: np.ndarray, sample_rate: int) -> None:
    """Write (C, N) audio as 16-bit PCM; the suffix (.wav, .flac) chooses the format. Atomic."""
    with atomic_path(path) as temporary:
        soundfile.write(temporary, np.clip(np.asarray(wav), -1.0, 1.0).T, sample_rate, subtype="PCM_16")


class AudioSink:
    """Writes audio while it is being made, as 16-bit PCM: to a .wav file, or to stdout without a header.

    The file's header is true after every piece, so what an interruption leaves behind can be played. On stdout
    samples are little-endian, channels interleaved: `| aplay -f S16_LE -r 16000 -c 1`. Use it in a `with`.

    Args:
        path: a .wav file; "-": stdout.
        sample_rate: Hz.
        channels: C.

    Raises:
        UserError: another suffix, or a file that cannot be written.
    """

    def __init__(self, path: str | Path, sample_rate: int, channels: int) -> None:
        self.path, self.sample_rate, self.channels = str(path), sample_rate, channels
        self._listening = True
        self._written = 0  # bytes of samples
        self._to_stdout = self.path == "-"
        if self._to_stdout:
            self._stream: BinaryIO = sys.stdout.buffer
            return
        if Path(path).suffix.lower() != ".wav":
            raise UserError(f"audio stream '{path}': expected a .wav file, or - for raw PCM on stdout")
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._stream = open(path, "wb")
        except OSError as error:
            raise self._cannot_write(error) from error
        self.write(np.zeros((channels, 0), np.float32))  # the header of an empty file

    def write(self, wav: np.ndarray) -> bool:
        """Append (C, n) float samples in [-1, 1]; n may be 0.

        Returns:
            False once the reader of stdout has gone: nothing more need be made.

        Raises:
            UserError: the file cannot be written, as on a full disk.
            ValueError: another number of channels.
        """
        if wav.ndim != 2 or wav.shape[0] != self.channels:
            raise ValueError(f"audio stream '{self.path}' takes ({self.channels}, n), got {wav.shape}")
        if not self._listening:
            return False
        data = self._pcm(wav)
        self._written += len(data)
        try:
            if self._to_stdout:
                self._stream.write(data)
            else:
                self._stream.seek(0, os.SEEK_END)
                self._stream.write(data)
                self._stream.seek(0)
                self._stream.write(self._header())
            self._stream.flush()
        except OSError as error:
            self._give_up()
            if not isinstance(error, BrokenPipeError):
                raise self._cannot_write(error) from error
        return self._listening

    def close(self) -> None:
        """Close the file; stdout stays open."""
        self._listening = False
        if not self._to_stdout:
            self._stream.close()

    def _give_up(self) -> None:
        """What is still buffered goes nowhere, instead of failing once more when it is closed."""
        self._listening = False
        if self._to_stdout:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        else:
            with contextlib.suppress(OSError):
                self._stream.close()

    def __enter__(self) -> "AudioSink":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _header(self) -> bytes:
        """The 44 bytes in front of PCM samples in a RIFF WAVE file; sizes that 32 bits cannot hold stay at the most."""
        size, frame = min(self._written, 2**32 - 1 - 36), 2 * self.channels  # bytes
        form = struct.pack("<HHIIHH", 1, self.channels, self.sample_rate, self.sample_rate * frame, frame, 16)
        riff = struct.pack("<4sI4s4sI", b"RIFF", 36 + size, b"WAVE", b"fmt ", len(form))
        return riff + form + struct.pack("<4sI", b"data", size)

    def _pcm(self, wav: np.ndarray) -> bytes:
        """Samples as bytes, rounded by the same library as in `save_audio`."""
        buffer = io.BytesIO()
        soundfile.write(
            buffer,
            np.clip(wav, -1.0, 1.0).T,
            self.sample_rate,
            format="RAW",
            subtype="PCM_16",
            endian="LITTLE",
        )
        return buffer.getvalue()

    def _cannot_write(self, error: OSError) -> UserError:
        return UserError(f"audio stream '{self.path}' cannot be written: {error.strerror or error}")
