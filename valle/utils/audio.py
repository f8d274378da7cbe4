"""Audio files in and out: the start and the end of the road. Arrays are (C, N) float32 in [-1, 1].

Reading tries libsndfile (wav, flac, ogg, mp3) and then FFmpeg through PyAV (m4a, g722, …); resampling is soxr.
"""

import contextlib
import io
import itertools
import os
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import soundfile

from valle.utils.errors import UserError
from valle.utils.files import atomic_path

BLOCK = 2**17  # samples of all channels that are read at once
MIN_RATE, MAX_RATE = 1000, 1_000_000  # Hz; a broken header's 1 Hz would turn a second into hours
MISSING_TOLERANCE = 0.3  # seconds that an encoder's delay and padding may account for


class AudioReader:
    """An audio file, read piece by piece: memory does not grow with its length. Use it in a `with`, iterate once.

    Iterating gives (C, n) float32 blocks. What is wrong with the file is said when it is opened, or when the reading
    gets there: damage, NaN samples, and a file that ends long before its header says.

    Args:
        path: any file that libsndfile or FFmpeg reads.
        start: seconds to leave out at the beginning.
        duration: seconds to read at most; None: to the end.

    Attributes:
        sample_rate: Hz.
        channels: C.

    Raises:
        UserError: the file is missing, empty, no audio, has no samples, is damaged or cut off, or holds NaN or
            infinite samples.
    """

    def __init__(self, path: str | Path, start: float = 0.0, duration: float | None = None) -> None:
        self.path = Path(path)
        self.start, self.duration = start, duration
        self.sample_rate = self.channels = 0
        self._resources = contextlib.ExitStack()
        try:
            if not self.path.exists():
                raise UserError(f"audio file '{self.path}' does not exist")
            if self.path.is_dir():
                raise UserError(f"'{self.path}' is a folder, but an audio file was expected")
            if not self.path.is_file():  # to open a pipe would wait for someone to write into it
                raise UserError(f"'{self.path}' is no regular file, but an audio file was expected")
            if self.path.stat().st_size == 0:
                raise UserError(f"audio file '{self.path}' is empty (0 bytes)")
            self._blocks = self._open()
        except OSError as error:
            self.close()
            raise UserError(f"audio file '{self.path}' cannot be read: {error.strerror or error}") from error
        except BaseException:
            self.close()
            raise
        if not MIN_RATE <= self.sample_rate <= MAX_RATE or self.channels < 1:
            self.close()
            raise UserError(
                f"audio file '{self.path}' has {self.channels} channels at {self.sample_rate} Hz; expected 1 or more"
                f" at {MIN_RATE} to {MAX_RATE} Hz"
            )

    def __iter__(self) -> Iterator[np.ndarray]:
        limit = None if self.duration is None else round(self.duration * self.sample_rate)
        found = 0  # samples a channel
        while limit is None or found < limit:
            try:
                block = next(self._blocks, None)
            except UserError:
                raise
            except Exception as error:  # libsndfile, FFmpeg and Python's own, a dozen kinds
                after = self.start + found / self.sample_rate
                reason = " ".join(str(error).split())[:200]
                raise UserError(
                    f"audio file '{self.path}' is damaged after {after:.2f} s ({reason})"
                ) from error
            if block is None:
                break
            block = block[:, : None if limit is None else limit - found]
            bad = int(block.size - np.isfinite(block).sum())
            if bad:
                after = self.start + found / self.sample_rate
                raise UserError(
                    f"audio file '{self.path}' has {bad} NaN or infinite samples from {after:.2f} s on; export it again"
                )
            found += block.shape[1]
            yield block
        if found == 0:
            where = f" from {self.start:g} s on" if self.start else ""
            raise UserError(
                f"audio file '{self.path}' has no samples{where}; it is a header only, or was cut off"
            )

    def close(self) -> None:
        """Close the file."""
        self._resources.close()

    def __enter__(self) -> "AudioReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self) -> Iterator[np.ndarray]:
        """Set rate and channels, and give the blocks from `start` on; by libsndfile where it knows the format."""
        # As bytes: a file name need not be valid text.
        name = os.fsencode(self.path) if os.name == "posix" else str(self.path)
        try:
            file = _SequentialFile(name)
        except (
            soundfile.LibsndfileError,
            TypeError,
        ) as error:  # TypeError: it takes .raw for headerless samples
            return self._open_with_av(getattr(error, "error_string", str(error)))
        if file.format == "MP3" and not _has_length(self.path):
            # libsndfile would guess the length by the first frame's bit rate, and cut off what goes beyond.
            file.close()
            return self._open_with_av("MP3 without a table of its length")
        self._resources.callback(file.close)
        self.sample_rate, self.channels = int(file.samplerate), int(file.channels)
        return self._soundfile_blocks(file)

    def _soundfile_blocks(self, file: soundfile.SoundFile) -> Iterator[np.ndarray]:
        frames = max(1, BLOCK // self.channels)
        first = round(self.start * self.sample_rate)
        position = 0
        if file.format != "MP3":  # there, what follows a jump is not quite what it is without
            position = file.seek(min(first, file.frames))
        while True:
            # A buffer of our own: else soundfile asks for no more than the header says.
            buffer = np.empty((frames, self.channels), dtype=np.float32)
            block = file.read(out=buffer).T
            if block.shape[1] == 0:
                break
            yield from _from_sample(first - position, block)
            position += block.shape[1]
        self._check_end(position, _promised_frames(self.path, file))

    def _open_with_av(self, reason: str) -> Iterator[np.ndarray]:
        """The same through FFmpeg."""
        import av

        # A raw G.722 stream has no header that FFmpeg could recognize.
        container_format = "g722" if self.path.suffix.lower() == ".g722" else None
        file = self._resources.enter_context(open(self.path, "rb"))
        try:
            # An open file and no protocol: a play list with an audio suffix must not make FFmpeg open other files.
            options = {"protocol_whitelist": "none"}
            container = self._resources.enter_context(av.open(file, format=container_format, options=options))
            if not container.streams.audio:
                raise UserError(f"'{self.path}' holds no audio stream")
            stream = container.streams.audio[0]
            self.sample_rate, self.channels = int(stream.rate or 0), int(stream.channels or 0)
            if not self.sample_rate or not self.channels:  # the suffix alone made it a stream
                raise ValueError("no sample rate")
        except UserError:
            raise
        except Exception as error:  # FFmpeg's own kinds, and whatever its wrapper makes of an odd header
            raise UserError(
                f"'{self.path}' is not an audio file that can be read ({reason.strip()})"
            ) from error
        return self._av_blocks(container, stream)

    def _av_blocks(self, container: Any, stream: Any) -> Iterator[np.ndarray]:
        import av

        resampler = av.AudioResampler(format="fltp", rate=self.sample_rate)
        first = round(self.start * self.sample_rate)
        position = 0
        for frame in itertools.chain(_av_frames(container, stream), [None]):
            for converted in resampler.resample(frame):
                block = converted.to_ndarray().astype(np.float32, copy=False)
                yield from _from_sample(first - position, block)
                position += block.shape[1]
        # Only where the length is written down: raw streams have it guessed.
        promised = 0.0
        if stream.duration and container.format.name.startswith("mov"):
            promised = float(stream.duration * stream.time_base)
        elif container.duration and "matroska" in container.format.name and len(container.streams) == 1:
            promised = container.duration / av.time_base
        self._check_end(position, round(promised * self.sample_rate))

    def _check_end(self, found: int, promised: int) -> None:
        if found and (promised - found) / self.sample_rate > MISSING_TOLERANCE:
            raise UserError(
                f"audio file '{self.path}' is cut off: its header says {promised / self.sample_rate:.2f} s,"
                f" {found / self.sample_rate:.2f} s are there; copy it again"
            )


def _av_frames(container: Any, stream: Any) -> Iterator[Any]:
    import av

    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            # Tags lie between the frames of joined MP3 files; there, libsndfile looks for the next frame, too.
            if container.format.name != "mp3":
                raise
            continue
        yield from frames


class _SequentialFile(soundfile.SoundFile):
    """Read from the beginning to the end: else soundfile seeks after each block, and MP3 and Opus do not quite go on
    after a seek as they do without."""

    def seekable(self) -> bool:
        return False


def _from_sample(first: int, block: np.ndarray) -> Iterator[np.ndarray]:
    """A block (C, n) without the samples before `first`; nothing, where none is left."""
    if first < block.shape[1]:
        yield block[:, max(first, 0) :]


def _has_length(path: Path) -> bool:
    """Whether an MP3 file begins with a table that tells its length (Xing, Info or VBRI)."""
    with open(path, "rb") as file:
        head = file.read(10)
        if head[:3] == b"ID3" and len(head) == 10:  # a tag comes first; its length has 7 bits a byte
            length = sum((byte & 127) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
            file.seek(10 + length)
        else:
            file.seek(0)
        head = file.read(2048)
    return any(word in head for word in (b"Xing", b"Info", b"VBRI"))


def _promised_frames(path: Path, file: soundfile.SoundFile) -> int:
    """Samples a channel that the header says, 0 where it does not: libsndfile corrects them to what is there."""
    with open(path, "rb") as raw:
        form = raw.read(12)[:4]
        if form not in (b"RIFF", b"FORM"):
            return file.frames
        order, wanted = ("<", b"data") if form == b"RIFF" else (">", b"SSND")
        while len(head := raw.read(8)) == 8:
            length = struct.unpack(f"{order}I", head[4:])[0]
            if head[:4] == wanted:
                here = path.stat().st_size - raw.tell()
                # Programs that write to a pipe do not know the length, and put the largest number or 0.
                known = 0 < here < length < 2**31 - 2**16
                return round(file.frames * length / here) if known else 0
            raw.seek(length + length % 2, os.SEEK_CUR)
    return 0


def load_audio(path: str | Path) -> tuple[np.ndarray, int]:
    """Read a whole audio file.

    Returns:
        wav (C, N) float32 and the sample rate in Hz.

    Raises:
        UserError: as `AudioReader`.
    """
    with AudioReader(path) as reader:
        return np.ascontiguousarray(np.concatenate(list(reader), axis=1)), reader.sample_rate


def convert_audio(wav: np.ndarray, sample_rate: int, target_rate: int, channels: int) -> np.ndarray:
    """Bring (C, N) audio to another rate and channel count.

    Mixes to mono before resampling; one channel is duplicated where more are asked for.

    Returns:
        (channels, N') float32, N' = round(N · target_rate / sample_rate) ± 1.
    """
    import soxr

    wav = _with_channels(wav, channels)
    if sample_rate != target_rate:
        wav = soxr.resample(wav.T, sample_rate, target_rate, quality="HQ").T
    return np.ascontiguousarray(wav, dtype=np.float32)


def convert_blocks(
    blocks: Iterable[np.ndarray], sample_rate: int, target_rate: int, channels: int
) -> Iterator[np.ndarray]:
    """`convert_audio` for audio that comes piece by piece; joined, the pieces are the same, bit for bit.

    Args:
        blocks: (C, n) float32 each.

    Yields:
        (channels, n') float32.
    """
    import soxr

    stream = None
    if sample_rate != target_rate:
        stream = soxr.ResampleStream(sample_rate, target_rate, channels, dtype="float32", quality="HQ")
    for block in blocks:
        block = _with_channels(block, channels)
        yield block if stream is None else stream.resample_chunk(np.ascontiguousarray(block.T)).T
    if stream is not None:
        yield stream.resample_chunk(np.zeros((0, channels), dtype=np.float32), last=True).T


def _with_channels(wav: np.ndarray, channels: int) -> np.ndarray:
    """Mix (C, N) to mono and repeat it, unless the channels are as many as asked for."""
    if wav.shape[0] == channels:
        return wav
    return np.repeat(wav.mean(axis=0, keepdims=True, dtype=np.float32), channels, axis=0)


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
