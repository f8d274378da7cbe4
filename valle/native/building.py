"""Compiles kernels.c once for this machine, at first use, and loads it.

The kernels serve x86 processors with AVX-512's bfloat16 products but without AMX (AMD Zen 4 and later), under Linux
with a C compiler (`$CC`, cc, gcc or clang); with AMX, oneDNN's own are faster. Anywhere else, and with
`VALLE_NATIVE=0`, callers do the same by PyTorch. What is compiled lies in `$XDG_CACHE_HOME/valle` (~/.cache/valle),
under a name that changes with the source, the compiler and PyTorch, whose OpenMP threads the kernels share.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.c")
NEEDED = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni", "fma", "f16c"}
BETTER = {"amx_bf16"}
FLAGS = [
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    *(f"-m{name.replace('_', '')}" for name in sorted(NEEDED)),
]
SECONDS = 120  # that a compiler may take


class Unavailable(Exception):
    """Why there are no kernels."""


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None; and where it lies, or why there is none."""
    if os.environ.get("VALLE_NATIVE", "1") == "0":
        return None, "off by VALLE_NATIVE=0"
    try:
        path = _compiled()
        return ctypes.CDLL(str(path)), str(path)
    except (Unavailable, OSError) as error:
        return None, str(error)


def _compiled() -> Path:
    flags = _processor_flags()
    if platform.system() != "Linux" or not flags >= NEEDED:
        raise Unavailable("this processor lacks AVX-512's bfloat16 products" if flags else "not on Linux")
    if flags & BETTER:
        raise Unavailable("this processor has AMX, which oneDNN uses")
    compiler = next(filter(None, map(shutil.which, [os.environ.get("CC", ""), "cc", "gcc", "clang"])), None)
    if compiler is None:
        raise Unavailable("no C compiler (cc, gcc or clang) was found")
    # PyTorch's own OpenMP: a second one beside it would start threads of its own.
    openmp = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    linked = [str(openmp[0])] if openmp else ["-fopenmp"]
    about = [
        SOURCE.read_text(),
        *FLAGS,
        *linked,
        compiler,
        str(os.stat(compiler).st_mtime_ns),
        torch.__version__,
    ]
    name = f"kernels-{hashlib.sha256(chr(0).join(about).encode()).hexdigest()[:16]}.so"
    folder = _folder()
    if not (folder / name).exists():
        logger.info("compiling kernels for this processor, once: into %s", folder)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            made, parts = Path(place) / name, Path(place) / "kernels.o"
            _call([compiler, *FLAGS, "-c", str(SOURCE), "-o", str(parts)])
            _call([compiler, "-shared", str(parts), *linked, "-lm", "-o", str(made)])
            os.replace(made, folder / name)  # another process may have been first: both are the same
    return folder / name


def _processor_flags() -> set[str]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return set(line.split(":", 1)[1].split())
    return set()


def _folder() -> Path:
    """Where compiled kernels are kept: the user's cache, or a folder for this process alone."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "valle"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):
        pass
    return Path(tempfile.mkdtemp(prefix="valle-"))


def _call(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, errors="replace")
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{command[0]} took more than {SECONDS} s") from None
    if done.returncode:
        raise Unavailable(f"{command[0]} failed: {done.stderr.strip()[-300:]}")
