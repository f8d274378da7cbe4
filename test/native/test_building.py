"""Compiling the kernels: where they go, and what happens where they cannot be had."""

import os
import stat
import subprocess
import sys

import pytest

from valle import native
from valle.native import building

SHOW = "from valle import native; print(native.available(), native.state())"
there = pytest.mark.skipif(not native.available(), reason=native.state())


def show(**variables):
    found = subprocess.run(
        [sys.executable, "-c", SHOW], capture_output=True, text=True, env=os.environ | variables, timeout=120
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


def test_switched_off():
    assert show(VALLE_NATIVE="0") == "False off by VALLE_NATIVE=0"


@there
def test_compiled_once_into_the_users_cache(tmp_path):
    assert show(XDG_CACHE_HOME=str(tmp_path)).startswith(f"True {tmp_path}/valle/kernels-")
    (library,) = (tmp_path / "valle").iterdir()  # nothing of the compilation is left
    assert stat.S_IMODE((tmp_path / "valle").stat().st_mode) == 0o700
    before = library.stat().st_mtime_ns
    assert show(XDG_CACHE_HOME=str(tmp_path)) == f"True {library}"
    assert library.stat().st_mtime_ns == before


@there
def test_a_compiler_that_fails_is_named(tmp_path):
    compiler = tmp_path / "mycc"
    compiler.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    compiler.chmod(0o755)
    said = show(CC=str(compiler), XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert said == f"False {compiler} failed: no such flag"


@there
def test_without_a_folder_to_keep_them_they_are_compiled_for_this_process(tmp_path):
    (tmp_path / "valle").write_text("in the way")
    assert show(XDG_CACHE_HOME=str(tmp_path), TMPDIR=str(tmp_path)).startswith(f"True {tmp_path}/valle-")


@pytest.mark.parametrize(
    "flags,said",
    [({"avx2"}, "lacks AVX-512"), (building.NEEDED | {"amx_bf16"}, "has AMX"), (set(), "not on Linux")],
)
def test_other_processors(monkeypatch, flags, said):
    monkeypatch.setattr(building, "_processor_flags", lambda: flags)
    with pytest.raises(building.Unavailable, match=said):
        building._compiled()


def test_no_compiler(monkeypatch):
    monkeypatch.setattr(building, "_processor_flags", lambda: building.NEEDED)
    monkeypatch.setattr(building.platform, "system", lambda: "Linux")
    monkeypatch.setattr(building.shutil, "which", lambda name: None)
    with pytest.raises(building.Unavailable, match="no C compiler"):
        building._compiled()
