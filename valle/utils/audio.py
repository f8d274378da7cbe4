"""Audio files in and out: the start and the end of the road. Arrays are (C, N) float32 in [-1, 1].

Reading tries libsndfile (wav, flac, ogg, mp3) and then FFmpeg through PyAV (m4a, g722, …); resampling is soxr.
"""

from pathlib import Path

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
