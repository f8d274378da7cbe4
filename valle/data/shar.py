"""lhotse Shar: a manifest and its codes as a row of tar files, for object stores and for reading in sequence.

    <folder>/cuts.000000.jsonl.gz, audio_features.000000.tar, cuts.000001.jsonl.gz, …
    <folder>/cuts.info.json         how many, and of which manifest; lhotse does not read it

`lhotse.CutSet.from_shar(in_dir=folder)` reads it. The cuts come without their recordings, whose paths would mean
nothing elsewhere; `recording_id` and `recording_start` (seconds) say where they are from.
"""

import hashlib
import json
import logging
import tempfile
from pathlib import Path

from lhotse.cut import Cut
from lhotse.shar import SharWriter
from lhotse.utils import fastcopy

from valle.data.manifests import stream_manifest
from valle.utils.errors import UserError
from valle.utils.files import write_json
from valle.utils.progress import progress

log = logging.getLogger(__name__)
INFO = "cuts.info.json"  # lhotse takes any name before the first dot for a field, but knows "cuts"
FIELD = "audio_features"
SHARD_SIZE = 1000  # cuts


def write_shar(manifest: Path, folder: Path, shard_size: int = SHARD_SIZE) -> bool:
    """Write a manifest with codes as Shar, unless `folder` holds it already.

    The folder is whole or absent: it is written beside its place, then renamed.

    Args:
        manifest: cuts with codes.
        folder: new, or written by this function before.
        shard_size: cuts a shard.

    Returns:
        Whether it was written.

    Raises:
        UserError: `shard_size` below 1, or `folder` holds something else.
    """
    if shard_size < 1:
        raise UserError(f"--shar-size is {shard_size}, expected 1 or more cuts")
    with open(manifest, "rb") as file:
        digest = hashlib.file_digest(file, "sha1").hexdigest()
    if (folder / INFO).is_file():
        old = json.loads((folder / INFO).read_text())
        if (old.get("manifest_sha1"), old.get("shard_size")) == (digest, shard_size):
            return False
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"--shar '{folder}' holds files that are not lhotse Shar of ours; name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as name:
        new = Path(name) / "new"
        new.mkdir()
        count = 0
        with (
            SharWriter(str(new), fields={FIELD: "numpy"}, shard_size=shard_size) as writer,
            progress(stream_manifest(manifest), desc="shar", unit="cut") as cuts,
        ):
            for cut in cuts:
                writer.write(_without_recording(cut))
                count += 1
        write_json(
            new / INFO,
            {"cuts": count, "shard_size": shard_size, "fields": [FIELD], "manifest_sha1": digest},
        )
        if folder.exists():
            folder.rename(Path(name) / "old")
        new.rename(folder)
    log.info("wrote %d cuts as lhotse Shar in '%s'", count, folder)
    return True


def _without_recording(cut: Cut) -> Cut:
    origin = {"recording_id": cut.recording_id, "recording_start": cut.start} if cut.has_recording else {}
    return fastcopy(cut, recording=None, custom={**(cut.custom or {}), **origin})
