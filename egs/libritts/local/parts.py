"""The seven parts of LibriTTS, and in which split each one is."""

from valle.data.manifests import SPLITS
from valle.utils.errors import UserError

PARTS = {
    "train-clean-100": "train",
    "train-clean-360": "train",
    "train-other-500": "train",
    "dev-clean": "validation",
    "dev-other": "validation",
    "test-clean": "test",
    "test-other": "test",
}
DEFAULT_PARTS = "train-clean-100,dev-clean,test-clean"


def parse_parts(text: str) -> list[str]:
    """`--parts`: a comma list, or all; each known, named once, and every split among them."""
    names = list(PARTS) if text == "all" else [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise UserError(
            f"--parts: '{unknown[0]}' is no part of LibriTTS, expected {', '.join(PARTS)}, or all"
        )
    for split in SPLITS:
        if split not in {PARTS[name] for name in names}:
            members = [name for name in PARTS if PARTS[name] == split]
            raise UserError(f"--parts is '{text}': none for {split}; add one of {', '.join(members)}")
    return list(dict.fromkeys(names))
