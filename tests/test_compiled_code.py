"""What is compiled: kept for machines of one kind, whole, and not tried where it cannot be made."""

import os
import shutil
import time
from pathlib import Path

import pyarrow
import pytest

from nanochat import compiled_code
from nanochat.compiled_code import cpu_kind, keep_compiled_code, remove_cut_off_code, why_not_compile
from toolchain import needs_compiler

LIBRARY = next(Path(pyarrow.__file__).parent.glob("lib.*.so"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def cut_off(path: Path, size: int, age: float) -> None:
    os.truncate(path, size)
    os.utime(path, (time.time() - age,) * 2)


def test_machines_with_other_instructions_have_other_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = []
    for flags in ("sse2 avx2 avx512f", "sse2 avx2", "sse2 avx2"):
        cpuinfo = tmp_path / "cpuinfo"
        cpuinfo.write_text(f"processor : 0\nflags : {flags}\ncpu MHz : {len(kinds)}\n\nprocessor : 1\n")
        kinds.append(cpu_kind(cpuinfo))
    assert kinds[0] != kinds[1] == kinds[2]
    assert cpu_kind(tmp_path / "none")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    keep_compiled_code(tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor" / cpu_kind())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    keep_compiled_code(tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"


@pytest.mark.parametrize("left", [0, 40, 4096, LIBRARY.stat().st_size - 1])
def test_what_a_killed_compiler_has_left_is_removed_and_nothing_else(cache: Path, left: int) -> None:
    folder = cache / "ab"
    folder.mkdir(parents=True)
    for name in ("cut.so", "cut.o", "whole.so", "under_way.so"):
        shutil.copyfile(LIBRARY, folder / name)
    for name in ("cut.so", "cut.o"):
        cut_off(folder / name, left, age=1000)
    cut_off(folder / "whole.so", LIBRARY.stat().st_size, age=1000)
    cut_off(folder / "under_way.so", left, age=0)
    (folder / "kernel.cpp").write_text("int a;")
    remove_cut_off_code()
    assert sorted(path.name for path in folder.iterdir()) == ["kernel.cpp", "under_way.so", "whole.so"]


@needs_compiler
def test_a_working_compiler_is_found_to_work_and_broken_code_is_no_end(cache: Path) -> None:
    assert why_not_compile() is None
    made = list(cache.rglob("*.so"))
    assert made
    for path in made:
        cut_off(path, 4096, age=1000)
    assert why_not_compile() is not None
    remove_cut_off_code()
    assert why_not_compile() is None


def test_a_missing_compiler_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/usr/bin/no-such-compiler")
    assert "no-such-compiler" in str(why_not_compile())


@needs_compiler
def test_what_a_compiler_says_is_the_reason(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without Python's headers: the compiler answers questions, and compiles nothing."""
    stand_in = cache.parent / "g++"
    fails = "echo 'main.cpp:2:10: fatal error: Python.h: No such file or directory' >&2; exit 1"
    stand_in.write_text(f'#!/bin/sh\ncase "$*" in *.cpp*) {fails};; esac\nexec {shutil.which("g++")} "$@"\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("CXX", str(stand_in))
    assert why_not_compile() == "main.cpp:2:10: fatal error: Python.h: No such file or directory"


def test_a_cache_that_cannot_be_written_is_a_reason(cache: Path) -> None:
    cache.write_text("a file where a folder should be")
    assert "cache" in str(why_not_compile())


def test_a_compiler_that_does_not_end_is_a_reason(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_code, "PROBE_SECONDS", 0.5)
    assert why_not_compile() == "it takes more than 0.5 s"
