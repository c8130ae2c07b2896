#!/usr/bin/env bash
# Says in plain words what is missing where a Python cannot be used: check-python.sh PYTHON
set -euo pipefail

python=$1

if ! "$python" -c '' >/dev/null 2>&1; then
    echo "there is no $python here: install Python 3.11 or newer, or name one with" \
        "'make PYTHON=/path/to/python3 …'" >&2
    exit 1
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    version=$("$python" -c 'import platform; print(platform.python_version())')
    echo "$python is Python $version: 3.11 or newer is needed; name one with" \
        "'make PYTHON=/path/to/python3 …'" >&2
    exit 1
fi
if ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
    echo "$python cannot make virtualenvs: on Debian and Ubuntu, 'apt-get install python3-venv'" >&2
    exit 1
fi
