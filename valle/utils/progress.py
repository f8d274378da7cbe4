"""Progress bars on stderr: lively on a terminal, a line now and then in a log file."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

TERMINAL_INTERVAL, FILE_INTERVAL = 0.2, 15.0  # seconds between two updates


def progress(
    items: Iterable[Any] | None = None,
    *,
    desc: str,
    unit: str,
    total: int | None = None,
    disable: bool = False,
) -> tqdm:
    """A bar over `items`, or one of `total` steps that the caller updates."""
    interval = TERMINAL_INTERVAL if sys.stderr.isatty() else FILE_INTERVAL
    return tqdm(
        items,
        desc=desc,
        unit=unit,
        total=total,
        disable=disable,
        mininterval=interval,
        dynamic_ncols=True,
        leave=False,
    )
