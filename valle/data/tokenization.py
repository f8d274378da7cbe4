"""Codec tokens for every cut of a manifest: stage 2 of every recipe, between recordings and training.

A cut's codes lie in a file whose name ends in a digest of what they were made from: the audio file's bytes, the cut's
place in it, and the codec's weights. A file of that name is right and whole, so a killed run is taken up where it
stopped, and a changed recording or codec is computed anew.
"""

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lhotse.array import Array, TemporalArray
from lhotse.cut import Cut

from valle.codecs.base import Codec
from valle.data.manifests import file_id, read_manifest, with_codes, write_cuts, write_jsonl
from valle.utils.audio import convert_audio
from valle.utils.errors import UserError
from valle.utils.files import atomic_path, write_json
from valle.utils.progress import progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizationResult:
    """What a run did: numbers of cuts, and seconds of audio that it encoded."""

    encoded: int
    reused: int
    skipped: int
    encoded_duration: float


def tokenize_manifest(
    manifest: Path, output_dir: Path, codec: Codec, max_skipped: int = -1
) -> TokenizationResult:
    """Encode every cut of `manifest`.

    Writes into `output_dir`: codes/<split>/<cut>.<digest>.npy, (T, Q) uint16 each; cuts_all.jsonl.gz, the cuts with
    their codes as the temporal array `audio_features`; codec.json; skipped.jsonl, cuts left out with the reason.

    Args:
        manifest: lhotse cuts of any sample rate and channel count.
        codec: is asked for its rate, channels, hop and number of quantizers.
        max_skipped: more cuts left out than this is an error; -1 is no limit.

    Raises:
        UserError: no manifest, no cut that could be encoded, or more than `max_skipped` that could not.
    """
    cuts = list(read_manifest(manifest))
    info = codec.info()
    _announce_change(output_dir / "codec.json", info)
    done: list[Cut] = []
    skipped: list[dict[str, str]] = []
    encoded = 0
    encoded_duration = 0.0
    start = time.monotonic()
    with progress(cuts, desc="tokenize", unit="cut") as bar:
        for cut in bar:
            try:
                path = output_dir / "codes" / _split(cut) / _file_name(cut, info["fingerprint"])
                shape = _stored_shape(path, codec)
                if shape is None:
                    shape = _store(path, _encode(cut, codec))
                    encoded += 1
                    encoded_duration += cut.duration
                    speed = encoded_duration / max(time.monotonic() - start, 1e-9)
                    bar.set_postfix_str(f"{speed:.1f} audio-hours/hour", refresh=False)
                done.append(with_codes(cut, _temporal_array(cut, path, shape, codec)))
            except UserError as error:
                skipped.append({"id": cut.id, "reason": str(error)})
                if 0 <= max_skipped < len(skipped):
                    raise UserError(
                        f"'{manifest}': {len(skipped)} cuts could not be tokenized, --max-skipped is {max_skipped};"
                        f" the last: {error}"
                    ) from error
    write_jsonl(output_dir / "skipped.jsonl", skipped)
    if not done:
        first = skipped[0]["reason"] if skipped else "it is empty"
        raise UserError(f"'{manifest}': no cut could be tokenized; the first: {first}")
    if skipped:
        logger.warning(
            "left out %d of %d cuts; reasons in %s", len(skipped), len(cuts), output_dir / "skipped.jsonl"
        )
    _write_info(output_dir / "codec.json", info)
    write_cuts(output_dir / "cuts_all.jsonl.gz", done)
    _remove_stale(output_dir / "codes", done)
    return TokenizationResult(encoded, len(done) - encoded, len(skipped), encoded_duration)


def _announce_change(path: Path, info: dict[str, Any]) -> None:
    """Say it when the folder holds another codec's codes."""
    old = _read_info(path)
    if old is not None and old.get("fingerprint") != info["fingerprint"]:
        logger.info(
            "codec changed: %s (%s) -> %s (%s); all cuts are tokenized anew",
            *(old.get("name"), old.get("fingerprint"), info["name"], info["fingerprint"]),
        )


def _read_info(path: Path) -> dict[str, Any] | None:
    try:
        old = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return old if isinstance(old, dict) else None


def _write_info(path: Path, info: dict[str, Any]) -> None:
    if _read_info(path) != info:
        write_json(path, info)


def _split(cut: Cut) -> str:
    return file_id(str((cut.custom or {}).get("split", "all")))


def _file_name(cut: Cut, fingerprint: str) -> str:
    digest = hashlib.sha1(f"{cut.id}\n{cut.start}\n{cut.duration}\n{fingerprint}".encode())
    for source in _sources(cut):
        digest.update(source.encode())
    return f"{file_id(cut.id)}.{digest.hexdigest()[:16]}.npy"


def _sources(cut: Cut) -> list[str]:
    """A digest of each audio file under the cut."""
    tracks = getattr(cut, "tracks", None)
    if tracks:
        return [f"{track.offset} {source}" for track in tracks for source in _sources(track.cut)]
    if getattr(cut, "recording", None) is None:
        raise UserError(f"cut '{cut.id}' has no recording")
    return [
        _file_digest(source.source) if source.type == "file" else f"{source.type} {source.source}"
        for source in cut.recording.sources
    ]


def _file_digest(path: str) -> str:
    try:
        status = Path(path).stat()
        return _cached_digest(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise UserError(f"audio file '{path}' cannot be read: {error.strerror or error}") from error


@lru_cache(maxsize=16)
def _cached_digest(path: str, size: int, mtime_ns: int) -> str:
    """Many cuts may lie in one recording: read it once, as long as it is as it was."""
    digest = hashlib.sha1()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _stored_shape(path: Path, codec: Codec) -> tuple[int, int] | None:
    """(T, Q) of codes that are there already and whole, or None."""
    try:
        codes = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return None
    if codes.dtype != np.uint16 or codes.ndim != 2 or codes.shape[1] != codec.num_quantizers:
        return None
    return codes.shape


def _encode(cut: Cut, codec: Codec) -> np.ndarray:
    """(T, Q) uint16 codes of one cut."""
    try:
        wav = cut.load_audio()  # (C, N)
    except Exception as error:  # lhotse raises whatever its many readers do
        raise UserError(
            f"cut '{cut.id}': audio cannot be read ({' '.join(str(error).split())[:200]})"
        ) from error
    if wav is None or wav.shape[-1] == 0:
        raise UserError(f"cut '{cut.id}' has no samples")
    if not np.isfinite(wav).all():
        raise UserError(f"cut '{cut.id}' has NaN or infinite samples")
    wav = convert_audio(np.atleast_2d(wav), cut.sampling_rate, codec.sample_rate, codec.channels)
    with torch.inference_mode():
        codes = codec.encode(torch.from_numpy(wav)[None].to(codec.device))  # (1, T, Q)
    frames, expected = codes.shape[1], codec.num_frames(wav.shape[1])
    if abs(frames - expected) > 1 or codes.shape[2] != codec.num_quantizers:
        raise RuntimeError(
            f"codec '{codec.name}' gave {tuple(codes.shape[1:])} codes for cut '{cut.id}', expected"
            f" ({expected}, {codec.num_quantizers})"
        )
    if codes.min() < 0 or codes.max() >= codec.codebook_size:
        raise RuntimeError(
            f"codec '{codec.name}' gave codes out of 0..{codec.codebook_size - 1} for cut '{cut.id}'"
        )
    return codes[0].cpu().numpy().astype(np.uint16)


def _store(path: Path, codes: np.ndarray) -> tuple[int, int]:
    with atomic_path(path) as temporary:
        np.save(temporary, codes, allow_pickle=False)
    return codes.shape


def _temporal_array(cut: Cut, path: Path, shape: tuple[int, int], codec: Codec) -> TemporalArray:
    return TemporalArray(
        array=Array(
            storage_type="numpy_files",
            storage_path=str(path.parent.resolve()),
            storage_key=path.name,
            shape=list(shape),
        ),
        temporal_dim=0,
        frame_shift=codec.hop_length / codec.sample_rate,
        start=cut.start,
    )


def _remove_stale(folder: Path, cuts: Sequence[Cut]) -> None:
    """Delete codes that no cut refers to: those of another codec, or of recordings that are gone."""
    used = {
        (Path(array.storage_path).name, array.storage_key)
        for array in (cut.audio_features.array for cut in cuts)
    }
    for path in folder.glob("*/*.npy"):
        if (path.parent.name, path.name) not in used:
            path.unlink()
