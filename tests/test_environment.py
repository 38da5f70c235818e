"""What the package says about matching and mismatched sets, above all where torch and torchrec cannot be imported."""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sidrec_torchrec import environment
from sidrec_torchrec.environment import (
    check_environment,
    doctor,
    find_gpu_problems,
    find_problems,
    installed_versions,
    repair_commands,
    torch_sets,
    versions_and_hardware,
)
from sidrec_torchrec.ops import cuda

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "sidrec_torchrec" / "requirements"
CPU_SET = {"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"}


@pytest.mark.parametrize(
    "versions",
    [
        CPU_SET,
        {"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0"},
        {"torch": "2.13.1+cu130", "torchrec": "1.8.1", "fbgemm-gpu": "1.8.2+cu130"},
        {"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"},
        {"torch": "2.12.0", "torchrec": "1.7.0", "fbgemm-gpu": "1.7.0"},
        {"torch": "2.11.0", "torchrec": "1.6.0", "fbgemm-gpu": "1.6.0"},  # older than the sets: benefit of doubt
        {"torch": "2.14.0", "torchrec": "1.9.0", "fbgemm-gpu-cpu": "1.9.0"},
        {"torch": "2.99.0", "torchrec": "1.94.0", "fbgemm-gpu-cpu": "1.94.0"},  # newer: likewise
        CPU_SET | {"torchrec": "unknown version"},
    ],
)
def test_sets_that_match(versions):
    assert find_problems(versions) == []


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        (CPU_SET | {"torch": "2.12.0"}, ["fbgemm-gpu-cpu 1.8.0 does not match torch 2.12.0"]),
        (CPU_SET | {"torch": "2.99.0"}, ["fbgemm-gpu-cpu 1.8.0 does not match torch 2.99.0"]),
        (CPU_SET | {"fbgemm-gpu-cpu": "1.94.0", "torchrec": "1.94.0"}, ["1.94.0 does not match torch 2.13.0+cpu"]),
        (CPU_SET | {"torchrec": "1.9.0"}, ["torchrec 1.9.0 does not match fbgemm-gpu-cpu 1.8.0"]),
        (CPU_SET | {"torchrec": "1.80.0"}, ["torchrec 1.80.0 does not match"]),
        (CPU_SET | {"fbgemm-gpu": "1.8.0"}, ["both installed"]),
        (
            {"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0"},
            ["fbgemm-gpu cannot be loaded by the CPU-only torch 2.13.0+cpu"],
        ),
        ({}, ["torch is not installed", "torchrec is not installed", "fbgemm is not installed"]),
        ({"torch": "2.13.0", "torchrec": "1.8.0"}, ["fbgemm is not installed"]),
    ],
)
def test_sets_that_do_not_match(versions, words):
    problems = find_problems(versions)
    assert len(problems) == len(words)
    for problem, word in zip(problems, words, strict=True):
        assert word in problem


@pytest.mark.parametrize("series", ["2.12", "2.13", "2.14"])
@pytest.mark.parametrize("fbgemm", ["fbgemm-gpu-cpu", "fbgemm-gpu"])
def test_the_sets_belong_together(series, fbgemm):
    pins = torch_sets()[series]
    assert pins["torch"].startswith(f"{series}.")
    assert find_problems({name: pins[name] for name in ("torch", "torchrec", fbgemm)}) == []


def test_the_default_is_one_of_the_sets_and_the_documentation_has_all():
    pins = dict(_pin(name) for name in ("torch", "cpu", "cuda", "torchrec"))
    assert pins in torch_sets().values()
    install = (ROOT / "docs" / "install.md").read_text()
    assert f"pip install --no-deps torchrec=={pins['torchrec']}\n" in install
    rows = re.findall(r"^\| (\d+\.\d+\.\d+)[^|]*\| (\d+\.\d+\.\d+) \| (\d+\.\d+\.\d+) \|", install, re.MULTILINE)
    assert rows == [(pins["torch"], pins["torchrec"], pins["fbgemm-gpu"]) for _, pins in sorted(torch_sets().items())]


def test_a_cpu_fbgemm_leaves_a_gpu_unused():
    versions = CPU_SET | {"torch": "2.13.0"}
    assert "takes fbgemm-gpu." in find_gpu_problems(versions, ["NVIDIA H100"])[0]
    assert find_gpu_problems(versions, []) == []
    assert find_gpu_problems(CPU_SET, ["NVIDIA H100"]) == []  # a CPU-only torch is a choice
    assert find_gpu_problems({"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0"}, ["NVIDIA H100"]) == []


@pytest.mark.parametrize("gpus", [[], ["NVIDIA H100"]])
@pytest.mark.parametrize(
    "versions",
    [
        {},
        CPU_SET | {"torch": "2.12.0+cpu"},
        CPU_SET | {"torch": "2.12.0"},
        CPU_SET | {"torch": "2.13.0", "fbgemm-gpu": "1.8.0"},
        CPU_SET | {"torchrec": "1.9.0"},
        {"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0"},
        {"torch": "2.14.0", "torchrec": "1.9.0", "fbgemm-gpu": "1.8.0"},
    ],
)
def test_repair_commands_end_in_a_set_that_matches(versions, gpus, monkeypatch):
    monkeypatch.setattr(environment, "_gpus", lambda: gpus)
    repaired = _type(repair_commands(versions), dict(versions))
    assert find_problems(repaired) == []
    assert find_gpu_problems(repaired, gpus) == []


def test_repairs_keep_the_torch_that_is_there_if_anything_goes_with_it():
    versions = {"torch": "2.14.0", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.9.0"}
    assert not [command for command in repair_commands(versions) if "torch==" in command]
    assert "pip install torch==2.13.0" in repair_commands(versions | {"torch": "2.9.0"})


def test_this_environment_matches(capsys):
    check_environment()
    assert doctor() == 0
    assert installed_versions()["torch"] in capsys.readouterr().out


def test_doctor_says_what_computes_on_cuda(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for problem, said in ((None, "CUDA operators run in Triton"), ("No module named 'triton'", "in plain PyTorch")):
        monkeypatch.setattr(cuda, "problem", lambda problem=problem: problem)
        doctor()
        assert said in capsys.readouterr().out


def test_versions_and_hardware_are_true_and_fit_into_json():
    report = json.loads(json.dumps(versions_and_hardware()))
    assert report["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert report["versions"]["python"] == platform.python_version()
    assert report["hardware"]["cores"] == len(os.sched_getaffinity(0))
    meminfo = Path("/proc/meminfo").read_text()
    kilobytes = int(re.search(r"MemTotal:\s+(\d+)", meminfo)[1])
    assert report["hardware"]["memory_gib"] == pytest.approx(kilobytes / 2**20, abs=0.1)


def test_what_pip_does_not_know_of_is_taken_on_trust(monkeypatch):
    known = {"torch": "2.13.0+cpu", "fbgemm-gpu-cpu": "1.8.0"}
    monkeypatch.setattr(environment, "_version", known.get)
    assert installed_versions() == known | {"torchrec": "unknown version"}
    check_environment()


@pytest.fixture
def broken(tmp_path):
    """Environment variables under which pip knows of another torch, and torchrec dies as it does with one."""
    metadata = tmp_path / "torch-2.9.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.9.0\n")
    (tmp_path / "torchrec").mkdir()
    (tmp_path / "torchrec" / "__init__.py").write_text("raise OSError('fbgemm_gpu_py.so: undefined symbol')")
    return os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}


def test_importing_the_package_says_what_does_not_match(broken):
    result = _python(broken, "-c", "import sidrec_torchrec.ranker.model")
    assert result.returncode == 1
    error = result.stderr[result.stderr.index("ImportError") :]
    assert "does not match torch 2.9.0." in error
    assert "\n  pip install torch==2.13.0\n" in error
    assert "OSError" not in result.stderr


def test_doctor_speaks_in_a_broken_environment(broken):
    result = _python(broken, "-m", "sidrec_torchrec.cli", "doctor")
    assert (result.returncode, result.stderr) == (1, "")
    assert "does not match torch 2.9.0." in result.stdout
    assert "\n  pip install torch==2.13.0\n" in result.stdout


def test_jobs_refuse_a_broken_environment_in_words(broken):
    result = _python(broken, "-m", "sidrec_torchrec.cli", "pipeline", "--out", "nowhere")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert _python(broken, "-m", "sidrec_torchrec.cli", "--help").returncode == 0


def _python(variables: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], env=variables, capture_output=True, text=True, check=False)


def _pin(name: str) -> tuple[str, str]:
    lines = (REQUIREMENTS / f"{name}.txt").read_text().splitlines()
    (pin,) = [line for line in lines if not line.startswith("#")]
    package, version = pin.split("==")
    return package, version


def _type(commands: list[str], versions: dict[str, str]) -> dict[str, str]:
    """What pip would make of the commands; torchrec may only come without its dependencies."""
    for command in commands:
        if "uninstall" in command:
            versions = {name: version for name, version in versions.items() if name not in command.split()}
            continue
        pins = dict(re.findall(r"([\w-]+)==([\w.+]+)", command))
        assert "torchrec" not in pins or "--no-deps" in command
        versions = versions | {name: pins[name] for name in pins if name in ("torch", "torchrec") or "fbgemm" in name}
    return versions
