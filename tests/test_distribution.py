"""The source distribution has what a clone has, the wheel has the package, and what is installed from it speaks."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import NamedTuple

import pytest

import sidrec_torchrec
from sidrec_torchrec.environment import torch_sets

ROOT = Path(__file__).resolve().parent.parent
NOT_COPIED = shutil.ignore_patterns(
    ".git",
    ".venv*",
    ".*_cache",
    ".hypothesis",
    ".torchx_*",
    "__pycache__",
    "*.egg-info",
    "build",
    "dist",
    "demo",
    "runs",
)
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


class Distributions(NamedTuple):
    checkout: set[str]
    sdist: set[str]
    wheel: Path


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Distributions:
    """Files of this checkout, and of the sdist made of it; and the wheel that is made of the sdist."""
    folder = tmp_path_factory.mktemp("distributions")
    shutil.copytree(ROOT, folder / "checkout", ignore=NOT_COPIED)
    checkout = _files(folder / "checkout")
    sdist = _build("build_sdist", folder / "checkout", folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    return Distributions(checkout, _files(unpacked), _build("build_wheel", unpacked, folder))


def test_the_source_distribution_has_what_a_clone_has(distributions):
    assert distributions.checkout - distributions.sdist == set()
    made = {file for file in distributions.sdist - distributions.checkout if ".egg-info/" not in file}
    assert made <= {"PKG-INFO", "setup.cfg"}
    assert len([file for file in distributions.sdist if file.startswith("tests/")]) > 150


def test_the_wheel_has_the_package_and_nothing_else(distributions):
    with zipfile.ZipFile(distributions.wheel) as wheel:
        files = {file for file in wheel.namelist() if not file.endswith("/")}
    package = {file for file in _files(ROOT) if file.startswith("sidrec_torchrec/")}
    about = {file for file in files if ".dist-info/" in file}
    assert files - about == package
    assert f"sidrec_torchrec-{sidrec_torchrec.__version__}.dist-info/licenses/LICENSE" in about


def test_what_the_wheel_says_of_itself(distributions):
    about = f"sidrec_torchrec-{sidrec_torchrec.__version__}.dist-info"
    with zipfile.ZipFile(distributions.wheel) as wheel:
        said = Parser().parsestr(wheel.read(f"{about}/METADATA").decode())
        points = wheel.read(f"{about}/entry_points.txt").decode()
    assert (said["Name"], said["Version"]) == ("sidrec-torchrec", sidrec_torchrec.__version__)
    assert (said["License-Expression"], said["Requires-Python"]) == ("BSD-3-Clause", ">=3.10")
    needs = said.get_all("Requires-Dist")
    torch, torchrec = (torch_sets()["2.13"][name] for name in ("torch", "torchrec"))
    for extra in ("cpu", "cuda", "serving", "server"):
        assert f'torch=={torch}; extra == "{extra}"' in needs
    assert [need for need in needs if need.startswith("torchrec")] == [f'torchrec=={torchrec}; extra == "cuda"']
    assert not [need for need in needs if need.startswith(("torch=", "fbgemm")) and 'extra == "any"' in need]
    for line in points.splitlines():
        name, _, value = line.partition(" = ")
        if value and not value.startswith("torchx.tracker.mlflow"):  # which asks for mlflow
            assert EntryPoint(name, value, "").load()


def test_what_is_installed_speaks(distributions, tmp_path):
    """In a folder of its own, where nothing else of this checkout is."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", tmp_path / "site", distributions.wheel], check=True, capture_output=True)
    variables = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, tmp_path / "site" / "bin" / "sidrec", "--version"]
    result = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"sidrec-torchrec {sidrec_torchrec.__version__}"


def _build(how: str, source: Path, folder: Path) -> Path:
    """As pip has setuptools do it, in ``source``."""
    command = [sys.executable, "-c", BUILD, how, str(folder)]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return folder / result.stdout.splitlines()[-1]


def _files(folder: Path) -> set[str]:
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(file) for file in files if "__pycache__" not in file.parts}
