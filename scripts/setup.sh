#!/usr/bin/env bash
# Makes a virtual environment that runs this checkout. Called by make; usage: scripts/setup.sh PYTHON VENV cpu|cuda
set -euo pipefail
cd "$(dirname "$0")/.."

python=$1 venv=$2 device=$3
requirements=sidrec_torchrec/requirements

fail() {
    echo "error: $*" >&2
    exit 1
}

install() {
    echo "installing: $*"
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check "$@" ||
        fail "pip could not install $* (its own message is above; set-up needs network access)"
}

command -v "$python" >/dev/null || fail "'$python' not found; install Python >= 3.10, or name one: make PYTHON=python3.12"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "Python >= 3.10 is needed, '$python' is $("$python" -V 2>&1); name another: make PYTHON=python3.12"

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        "$python" -m venv "$venv" || fail "'$python -m venv $venv' failed (its own message is above)"
    elif "$python" -m virtualenv --version >/dev/null 2>&1; then
        "$python" -m virtualenv --quiet "$venv" || fail "'$python -m virtualenv $venv' failed (its own message is above)"
    else
        fail "'$python' cannot make virtual environments; type: sudo apt install $(basename "$python")-venv"
    fi
fi

install -r "$requirements/torch.txt" 'setuptools>=77'
install -r "$requirements/base.txt" -r "$requirements/core.txt" -r "$requirements/with_torch.txt" -r "$requirements/$device.txt" -r "$requirements/test.txt"
install --no-deps -r "$requirements/torchrec.txt"
install --no-deps --no-build-isolation -e .
"$venv/bin/sidrec" doctor
