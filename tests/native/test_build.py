"""The C++ operators are built where there is a compiler; elsewhere the reference runs, and one warning says so."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sidrec_torchrec.native import build
from sidrec_torchrec.ops.code_attention import code_attention
from sidrec_torchrec.ops.kernels import kernel_runs
from sidrec_torchrec.ops.side_decode import side_decode

DECODE_TWICE = """
import torch
from sidrec_torchrec.ops.side_decode import side_decode
words = torch.tensor([[5], [7]])
for _ in range(2):
    print(side_decode(words, torch.arange(18.0).view(9, 2), [3, 3, 3], [0, 0, 0]).tolist())
"""


def decode_twice(**environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", DECODE_TWICE], env=os.environ | environment, capture_output=True, text=True, check=True
    )


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")
def test_built_where_there_is_a_compiler():
    assert build.problem() is None
    assert kernel_runs(side_decode, "cpu", torch.float32)
    assert not kernel_runs(side_decode, "cpu", torch.float64)


def test_without_a_compiler_the_reference_runs_with_one_warning(tmp_path):
    result = decode_twice(CXX="/no/compiler", SIDREC_CACHE=str(tmp_path))
    # 5 is digits 0, 1, 2 and 7 is 0, 2, 1: rows 0, 4, 8 and 0, 5, 7
    assert result.stdout.splitlines() == ["[[24.0, 27.0], [24.0, 27.0]]"] * 2
    assert result.stderr.count("could not be built") == 1
    assert "/no/compiler" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")
def test_a_compiler_that_fails_is_quoted_and_leaves_nothing_half_built(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo 1 || { echo "error: no such standard" >&2; exit 1; }\n'
    )
    compiler.chmod(0o755)
    result = decode_twice(CXX=str(compiler), SIDREC_CACHE=str(tmp_path / "cache"))
    assert result.stdout.splitlines() == ["[[24.0, 27.0], [24.0, 27.0]]"] * 2
    assert result.stderr.count("could not be built (error: no such standard)") == 1
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_library_that_was_cut_short_or_changed_is_built_again(tmp_path, monkeypatch):
    built = []

    def compile_(compiler, sources, objects, library):
        built.append(library)
        library.write_bytes(b"a library")

    monkeypatch.setattr(build, "_compile", compile_)
    monkeypatch.setenv("SIDREC_CACHE", str(tmp_path))
    path = build.library_path()
    for broken in (b"", b"a lib", b"b library", None):
        assert build.library_path() == path and len(built) == 1
        path.unlink() if broken is None else path.write_bytes(broken)
        assert build.library_path().read_bytes() == b"a library" and len(built) == 2
        built.pop()
    path.with_suffix(".json").write_text("{}")
    build.library_path()
    assert len(built) == 2
    path.with_suffix(".json").unlink()  # as of an earlier version
    build.library_path()
    assert len(built) == 2


def test_a_compiler_that_takes_too_long_is_a_warning_too(tmp_path, monkeypatch):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 1 || { echo "warning: slow" >&2; exec sleep 60; }\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("SIDREC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_BUILD_SECONDS", 1)
    with pytest.warns(UserWarning, match="could not be built .*timed out after 1"):
        assert "timed out" in build.problem.__wrapped__()


def test_a_cache_that_cannot_be_written_is_named_as_the_reason():
    result = decode_twice(SIDREC_CACHE="/dev/null/cache")
    assert result.stderr.count("UserWarning") == 1
    assert "Not a directory" in result.stderr and "in SIDREC_CACHE" in result.stderr
    assert "compiler" not in result.stderr
    assert len(result.stdout.splitlines()) == 2


def test_without_a_home_a_cache_is_asked_for(monkeypatch):
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SIDREC_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", home)
    with pytest.warns(
        UserWarning, match=r"determine home directory.*Name a folder that can be written to.* SIDREC_CACHE"
    ):
        assert build.problem.__wrapped__()


def test_a_disk_that_is_full_while_the_compiler_writes_is_no_fault_of_the_compiler(tmp_path, monkeypatch):
    compiler = tmp_path / "c++"
    says = "fatal error: error writing to greedy.o: No space left on device"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo 1 || {{ echo "{says}" >&2; exit 1; }}\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("SIDREC_CACHE", str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match="No space left on device.*and has room, in SIDREC_CACHE"):
        assert build.problem.__wrapped__() == says


def test_the_reference_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("SIDREC_OPS", "reference")
    assert not kernel_runs(code_attention, "cpu", torch.float32)
