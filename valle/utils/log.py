"""Logging for commands: time-stamped lines on stderr and, for trainings, in a file. Rank 0 only speaks."""

import logging
import os
import sys
from pathlib import Path


def setup_logger(log_file: str | Path | None = None, level: str = "INFO") -> None:
    """Send the package's log lines to stderr and, when given, to `log_file` as well."""
    quiet = int(os.environ.get("RANK", "0")) > 0
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if log_file is not None and not quiet:
        Path(log_file).parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(log_file))
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    root = logging.getLogger("valle")
    root.handlers.clear()
    root.propagate = False
    for handler in handlers:
        handler.setFormatter(formatter)
        root.addHandler(handler)
    root.setLevel("ERROR" if quiet else level)
