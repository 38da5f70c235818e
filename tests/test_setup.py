"""Where something is missing, set-up fails with one clear line."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_no_python(tmp_path):
    assert _set_up("python4", tmp_path) == (
        "error: 'python4' not found; install Python >= 3.10, or name one: make PYTHON=python3.12"
    )


def test_old_python(tmp_path):
    old = _script(tmp_path / "python3", 'if [ "$1" = -V ]; then echo Python 3.8.10; else exit 1; fi')
    assert "Python >= 3.10 is needed, " in _set_up(old, tmp_path)
    assert "is Python 3.8.10" in _set_up(old, tmp_path)


def test_debian_python_without_venv(tmp_path):
    bare = _script(
        tmp_path / "python3", f'case "$*" in *ensurepip*|*virtualenv*) exit 1;; esac; exec {sys.executable} "$@"'
    )
    assert _set_up(bare, tmp_path).endswith("type: sudo apt install python3-venv")


def test_no_network(tmp_path):
    # A virtual environment is there; its pip cannot reach any index.
    venv = tmp_path / "venv"
    python = _script(venv / "bin" / "python", 'case "$*" in *install*) echo "no route" >&2; exit 1;; esac')
    assert _set_up(sys.executable, tmp_path, venv).startswith("error: pip could not install")
    assert Path(python).exists()


def test_a_torch_that_nothing_is_known_to_go_with(tmp_path):
    assert _set_up(sys.executable, tmp_path, torch="1.13") == (
        "error: no versions are known to go with torch '1.13'; there are torch-2.12 torch-2.13 torch-2.14"
    )


def test_make_keeps_other_versions_of_torch_apart():
    said = {torch: _make_setup(*torch) for torch in ((), ("TORCH=2.14",))}
    assert said[()].startswith("scripts/setup.sh python3 .venv cpu 2.13\n")
    assert said["TORCH=2.14",].startswith("scripts/setup.sh python3 .venv-2.14 cpu 2.14\n")


def _make_setup(*given: str) -> str:
    """What ``make setup`` would run."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "VENV", "TORCH")}
    command = ["make", "--no-print-directory", "--always-make", "--dry-run", "setup", "DEVICE=cpu", *given]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=True).stdout


def _set_up(python: str, folder: Path, venv: Path | None = None, torch: str = "2.13") -> str:
    """The last line that set-up prints before it fails."""
    command = [ROOT / "scripts" / "setup.sh", python, venv or folder / "venv", "cpu", torch]
    result = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    return result.stderr.strip().splitlines()[-1]


def _script(path: Path, body: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return str(path)
