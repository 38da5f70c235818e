"""What is installed here, whether it fits together, and how to fix it if it does not.

Reads package metadata only, never imports torch: a mismatched set breaks ``import torchrec`` with an error from a shared
library, and that is exactly when these functions are needed.
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

CPU_FBGEMM, CUDA_FBGEMM = "fbgemm-gpu-cpu", "fbgemm-gpu"

_MATCHED = ("torch", "torchrec", CPU_FBGEMM, CUDA_FBGEMM)
_REPORTED = ("sidrec-torchrec", *_MATCHED, "torchx", "torchmetrics", "tensordict", "torchdata", "numpy", "pyarrow")
_MODULES = {CPU_FBGEMM: "fbgemm_gpu", CUDA_FBGEMM: "fbgemm_gpu"}
_UNKNOWN = "unknown version"  # importable, but not installed by pip: built from source, say


def check_environment() -> None:
    """Refuses a set of torch, torchrec and fbgemm that cannot be imported together.

    Raises:
        ImportError: says what does not match, and the commands that mend it.
    """
    versions = installed_versions()
    problems = find_problems(versions)
    if problems:
        raise ImportError(_advice(problems, versions))


def check_if_installed() -> None:
    """As ``check_environment``, but lets pass where there is no torchrec at all: scoring needs none.

    Raises:
        ImportError: says what does not match, and the commands that mend it.
    """
    if "torchrec" in installed_versions():
        check_environment()


def doctor() -> int:
    """Prints versions and devices, what is wrong with them, and how to fix it.

    Returns:
        Exit code: 0 if the set matches, 1 if it does not.
    """
    from rich.console import Console  # a server has no need of it
    from rich.table import Table

    console = Console(highlight=False)
    versions, machine = installed_versions(), hardware()
    table = Table(show_header=False)
    table.add_row("python", f"{platform.python_version()} ({platform.platform()})")
    for name in _REPORTED:
        table.add_row(name, versions.get(name) or _version(name) or "-")
    table.add_section()
    table.add_row("CPU", f"{machine['cpu']}, {machine['cores']} cores")
    table.add_row("memory", f"{machine['memory_gib']} GiB")
    unused = " (unused: torch is CPU-only)" if versions.get("torch", "").endswith("+cpu") else ""
    table.add_row("CUDA devices", "\n".join(f"{gpu}{unused}" for gpu in machine["gpus"]) or "none")
    table.add_row("C++ compiler", machine["compiler"] or "none (our CPU operators and torch.compile need one)")
    console.print(table)
    problems = find_problems(versions) + find_gpu_problems(versions, machine["gpus"])
    if not problems:
        console.print("torch, torchrec and fbgemm match.")
        console.print(_operators(), markup=False, soft_wrap=True)
        return 0
    console.print(_advice(problems, versions), markup=False, soft_wrap=True)
    return 1


def _operators() -> str:
    """Which implementation of the operators runs, a sentence per kind of device that is there; builds them if need be."""
    import torch  # by now it can be imported

    from sidrec_torchrec.native import build
    from sidrec_torchrec.ops import cuda

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it would say is said here
        problem = build.problem()
        cuda_problem = cuda.problem() if torch.cuda.is_available() else None
    if problem is None:
        said = [f"The CPU operators run in C++: {build.library_path()}"]
    else:
        said = [
            f"The CPU operators run in plain PyTorch, many times slower, for they could not be built: {problem}",
            "Install a C++20 compiler (g++ or clang++), or name one: CXX=g++-12 sidrec doctor",
        ]
    if cuda_problem is not None:
        said.append(
            f"The CUDA operators run in plain PyTorch, many times slower: {cuda_problem}. Install torch's triton."
        )
    elif torch.cuda.is_available():
        said.append(f"The CUDA operators run in Triton {_version('triton')}.")
    return "\n".join(said)


@cache
def torch_sets() -> dict[str, dict[str, str]]:
    """The sets that belong together, by torch's series: the version of torch, torchrec, fbgemm-gpu and fbgemm-gpu-cpu.

    None of these packages pins the others. torchrec's series is fbgemm's.
    """
    texts = [
        path.read_text()
        for path in (files("sidrec_torchrec") / "requirements").iterdir()
        if re.fullmatch(r"torch-[\d.]+\.txt", path.name)
    ]
    sets = [dict(re.findall(r"^([\w-]+)==(\S+)", text, re.MULTILINE)) for text in texts]
    return {_series(pins["torch"]): pins for pins in sets}


def versions_and_hardware() -> dict[str, dict[str, Any]]:
    """What a report says about where it was made: ``{"versions": {...}, "hardware": {...}}``, ready for JSON."""
    versions = {"python": platform.python_version()} | {name: _version(name) for name in _REPORTED}
    return {"versions": {name: version for name, version in versions.items() if version}, "hardware": hardware()}


def installed_versions() -> dict[str, str]:
    """Version of each of torch, torchrec, fbgemm-gpu and fbgemm-gpu-cpu that is there."""
    found = {name: version for name in _MATCHED if (version := _version(name))}
    for name in ("torch", "torchrec", CPU_FBGEMM):
        importable = importlib.util.find_spec(_MODULES.get(name, name)) is not None
        if name not in found and importable and not (name == CPU_FBGEMM and CUDA_FBGEMM in found):
            found[name] = _UNKNOWN
    return found


def find_problems(versions: dict[str, str]) -> list[str]:
    """What keeps these packages from being imported together, a sentence each; empty if nothing is known to.

    Args:
        versions: version by package, as ``installed_versions`` gives it.
    """
    fbgemm = [name for name in (CPU_FBGEMM, CUDA_FBGEMM) if name in versions]
    if len(fbgemm) == 2:
        return [f"{CPU_FBGEMM} and {CUDA_FBGEMM} are both installed, and overwrite each other's files."]
    if not fbgemm or "torch" not in versions or "torchrec" not in versions:
        missing = [name for name in ("torch", "torchrec") if name not in versions] + ([] if fbgemm else ["fbgemm"])
        return [f"{name} is not installed." for name in missing]
    if fbgemm == [CUDA_FBGEMM] and versions["torch"].endswith("+cpu"):
        return [f"{CUDA_FBGEMM} cannot be loaded by the CPU-only torch {versions['torch']}; it takes {CPU_FBGEMM}."]
    return _find_mismatches(versions, fbgemm[0])


def find_gpu_problems(versions: dict[str, str], gpus: list[str]) -> list[str]:
    """What keeps an importable set from using the GPUs that are there.

    Args:
        versions: version by package, as ``installed_versions`` gives it.
        gpus: the GPUs, as ``hardware`` gives them.
    """
    if not gpus or CPU_FBGEMM not in versions or versions.get("torch", "+cpu").endswith("+cpu"):
        return []
    return [f"There is a GPU, and torch is built for it, but {CPU_FBGEMM} is not; it takes {CUDA_FBGEMM}."]


def repair_commands(versions: dict[str, str]) -> list[str]:
    """The commands that turn an installed set into one that belongs together: that of the torch which is there, if any.

    Args:
        versions: version by package, as ``installed_versions`` gives it.
    """
    torch = versions.get("torch", "")
    keep_torch = _series(torch) in torch_sets()
    pins = torch_sets()[_series(torch) if keep_torch else _default_series()]
    fbgemm = CUDA_FBGEMM if _gpus() and not (keep_torch and torch.endswith("+cpu")) else CPU_FBGEMM
    commands = []
    if {CPU_FBGEMM, CUDA_FBGEMM} & versions.keys() - {
        fbgemm
    }:  # they share their files: one cannot leave the other whole
        commands.append(f"pip uninstall --yes {CPU_FBGEMM} {CUDA_FBGEMM}")
    if not keep_torch:
        commands.append(f"pip install torch=={pins['torch']}")
    commands.append(f"pip install {fbgemm}=={pins[fbgemm]} {' '.join(_requirements('with_torch'))}")
    commands.append(f"pip install --no-deps torchrec=={pins['torchrec']}")
    return commands


@cache
def hardware() -> dict[str, Any]:
    """This machine: ``cpu``, ``cores`` (that this process may use), ``memory_gib``, ``gpus``, ``compiler``."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_model(),
        "cores": available_cores(),
        "memory_gib": round(memory / 2**30, 1),
        "gpus": _gpus(),
        "compiler": _first_line([os.environ.get("CXX", "c++"), "--version"]),
    }


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _find_mismatches(versions: dict[str, str], fbgemm: str) -> list[str]:
    if _UNKNOWN in (versions["torch"], versions["torchrec"], versions[fbgemm]):
        return []
    torch_series, fbgemm_series = _series(versions["torch"]), _series(versions[fbgemm])
    problems = []
    if _series(versions["torchrec"]) != fbgemm_series:
        problems.append(f"torchrec {versions['torchrec']} does not match {fbgemm} {versions[fbgemm]}.")
    torch_of = {_series(pins[CPU_FBGEMM]): series for series, pins in torch_sets().items()}
    known = fbgemm_series in torch_of or torch_series in torch_sets()
    if known and torch_of.get(fbgemm_series) != torch_series:
        problems.append(f"{fbgemm} {versions[fbgemm]} does not match torch {versions['torch']}.")
    return problems


def _advice(problems: list[str], versions: dict[str, str]) -> str:
    return "\n".join([*problems, "Type:", *(f"  {command}" for command in repair_commands(versions))])


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _series(version: str) -> str:
    """Its first two numbers, such as ``2.11``; empty if it does not begin with two."""
    match = re.match(r"\d+\.\d+", version)
    return match[0] if match else ""


def _requirements(name: str) -> list[str]:
    lines = (files("sidrec_torchrec") / "requirements" / f"{name}.txt").read_text().splitlines()
    requirements = [line for line in lines if line and not line.startswith("#")]
    return [f"'{line}'" if re.search("[<>]", line) else line for line in requirements]


def _default_series() -> str:
    (torch,) = _requirements("torch")
    return _series(torch.partition("==")[2])


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@cache
def _gpus() -> list[str]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    return [f"{line} driver" for line in _output(query).splitlines()]


def _first_line(command: list[str]) -> str | None:
    return next(iter(_output(command).splitlines()), None)


def _output(command: list[str]) -> str:
    """What a command prints; nothing if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def is_command_line() -> bool:
    """Whether this process is ``sidrec ...`` or ``python -m sidrec_torchrec.cli ...``."""
    return Path(sys.argv[0]).name == "sidrec" or "sidrec_torchrec.cli" in sys.orig_argv
