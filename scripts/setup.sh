#!/usr/bin/env bash
# Makes a virtual environment that runs this checkout. Called by make; usage: scripts/setup.sh PYTHON VENV cpu|cuda TORCH, as 2.13
set -euo pipefail
cd "$(dirname "$0")/.."

python=$1 venv=$2 device=$3 torch=$4
requirements=sidrec_torchrec/requirements
set=$requirements/torch-$torch.txt
fbgemm=fbgemm-gpu$([ "$device" = cuda ] || echo -cpu)

fail() {
    echo "error: $*" >&2
    exit 1
}

install() {
    echo "installing: $*"
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check "$@" ||
        fail "pip could not install $* (its own message is above; set-up needs network access)"
}

[ -f "$set" ] || fail "no versions are known to go with torch '$torch'; there are $(basename -s .txt -a "$requirements"/torch-*.txt | xargs)"
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

install -c "$set" torch 'setuptools>=77' # alone and first: pip takes the small CPU build where its configuration offers one
install -c "$set" "$fbgemm" -r "$requirements/base.txt" -r "$requirements/core.txt" -r "$requirements/with_torch.txt" -r "$requirements/test.txt"
install -c "$set" --no-deps torchrec # it requires the CUDA build of fbgemm, everywhere
install --no-deps --no-build-isolation -e .
"$venv/bin/sidrec" doctor
