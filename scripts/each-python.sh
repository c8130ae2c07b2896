#!/usr/bin/env bash
# Runs `make test` on each supported Python that is installed: each-python.sh MAKE
# A version is looked for on PATH and among pyenv's; a shim of pyenv may be there and not run.
set -euo pipefail

make=$1
tested=()

find_python() {
    local candidate
    for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/"python$1"; do
        if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
            # Of a virtualenv, the Python that it was made from.
            "$candidate" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))'
            return
        fi
    done
}

for version in 3.11 3.12 3.13; do
    python=$(find_python "$version")
    if [ -z "$python" ]; then
        echo "Python $version is not installed: not tested"
        continue
    fi
    echo "Python $version: $python"
    "$make" test PYTHON="$python" VENV=".venv-$version"
    tested+=("$version")
done

if [ ${#tested[@]} -eq 0 ]; then
    echo "none of Python 3.11, 3.12 and 3.13 is installed" >&2
    exit 1
fi
echo "tested on: ${tested[*]}"
