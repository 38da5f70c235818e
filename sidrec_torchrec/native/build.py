"""The C++ for CPU (``csrc/``): built at first use by the compiler at hand, for this very processor, and kept.

The library lies in ``$SIDREC_CACHE`` (``~/.cache/sidrec_torchrec``), under a name made of all it depends on: sources,
flags, compiler, torch and processor. Without a compiler one warning is given, and the plain PyTorch runs that every
operator is also written in. ``SIDREC_OPS=reference`` in the environment asks for it.
"""

import fcntl
import hashlib
import os
import platform
import subprocess
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.utils import cpp_extension

from sidrec_torchrec.errors import DataError
from sidrec_torchrec.files import atomic_path, read_object, sha256_of, write_json
from sidrec_torchrec.output import say

FLAGS = ("-O3", "-march=native", "-std=c++20", "-fopenmp", "-fPIC", "-Wno-psabi")
_SOURCES = Path(__file__).parent / "csrc"
_BUILD_SECONDS = 1800


def is_available() -> bool:
    """Whether the C++ operators are loaded, built first if need be; no, if ``SIDREC_OPS`` keeps to plain PyTorch."""
    return not reference_is_asked_for() and problem() is None


def reference_is_asked_for() -> bool:
    """Whether ``SIDREC_OPS`` keeps to plain PyTorch."""
    return os.environ.get("SIDREC_OPS") == "reference"


@cache
def problem() -> str | None:
    """Builds and loads the operators, once; None, or in one line why that failed (and a warning that says so)."""
    try:
        torch.ops.load_library(library_path())
        return None
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        output = getattr(error, "stderr", None)
        output = output if isinstance(output, str) and output else str(error)  # after a timeout it is bytes
        reason = next((line for line in output.splitlines() if "error" in line), output.partition("\n")[0])
        remedy = "Install a C++20 compiler (g++ or clang++, or name one in CXX)"
        if (
            isinstance(error, _NoCacheError) or "No space left" in reason
        ):  # the compiler's word, if it was the disk of objects
            remedy = "Name a folder that can be written to, and has room, in SIDREC_CACHE"
        warnings.warn(
            f"the C++ operators could not be built ({reason}); the plain PyTorch ones run instead, many times slower. {remedy}",
            stacklevel=2,
        )
        return reason


def library_path() -> Path:
    """The built library; builds it if it is not there.

    Raises:
        OSError: without a compiler, or if the cache folder cannot be written.
        subprocess.SubprocessError: if the compiler fails.
    """
    compiler = os.environ.get("CXX", "c++")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    sources = sorted(_SOURCES.glob("*.cpp"))
    text = "".join(path.read_text() for path in sorted(_SOURCES.iterdir()))
    name = hashlib.sha256(repr((text, FLAGS, version, torch.__version__, _processor())).encode()).hexdigest()[:16]
    library = _cache() / f"operators-{name}.so"
    if not _is_whole(library):
        with _writable(library.parent), open(library.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # other processes wait; a killed one lets go
            if not _is_whole(library):
                with atomic_path(library) as temporary, TemporaryDirectory(dir=library.parent) as objects:
                    say("building the C++ operators, once; a minute or two")
                    _compile(compiler, sources, Path(objects), temporary)
                    write_json(_digest_file(library), {"library": sha256_of(temporary)}, sealed=True)
    return library


def _cache() -> Path:
    """The folder of what is built.

    Raises:
        _NoCacheError: if none is named, and there is no home folder: in a container, for a user that it does not know.
    """
    if named := os.environ.get("SIDREC_CACHE"):
        return Path(named)
    try:
        return Path.home() / ".cache" / "sidrec_torchrec"
    except RuntimeError as error:
        raise _NoCacheError(str(error)) from error


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """Makes the cache folder.

    Raises:
        _NoCacheError: if it cannot be written to, here or in the block.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise _NoCacheError(str(error)) from error


class _NoCacheError(OSError):
    """The cache cannot be written to."""


def _is_whole(library: Path) -> bool:
    """Whether it is as it was built: a library that was cut short ends the process when it is loaded, with no error to catch."""
    if not library.is_file():
        return False
    if not _digest_file(library).exists():
        return True  # built by an earlier version, which kept none
    try:
        return read_object(_digest_file(library)).get("library") == sha256_of(library)
    except DataError:
        return False


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".json")


def _compile(compiler: str, sources: list[Path], objects: Path, library: Path) -> None:
    """Each source on a core of its own, as far as there are any, and all to one library."""
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    common = [compiler, *FLAGS, abi, *(f"-I{path}" for path in cpp_extension.include_paths())]
    links = [option for path in cpp_extension.library_paths() for option in (f"-L{path}", f"-Wl,-rpath,{path}")]
    made = [objects / f"{source.stem}.o" for source in sources]
    commands = [[*common, "-c", str(s), "-o", str(o)] for s, o in zip(sources, made, strict=True)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, commands))
    _run([*common, "-shared", *map(str, made), "-o", str(library), *links, "-ltorch_cpu", "-lc10"])


def _run(command: list[str]) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True, timeout=_BUILD_SECONDS)


def _processor() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        return platform.processor() + platform.machine()
