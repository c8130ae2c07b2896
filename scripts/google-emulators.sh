#!/usr/bin/env bash
# Install public emulators of BigQuery and Cloud Storage into .venv-google-emulators, for
# tests/acceptance/test_bigquery_emulators.py. Does nothing where they are there already.
#
#   scripts/google-emulators.sh          install what the lock names, each file by its hash
#   scripts/google-emulators.sh --lock   write the lock anew from its .in file (needs `make install`)
set -euo pipefail

cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
folder=.venv-google-emulators
lock=tests/emulators/google-emulators.lock

if [ "${1:-}" = --lock ]; then
    # uv reads neither pip's configuration nor one of its own here: the public index and no other.
    env -u UV_INDEX -u UV_DEFAULT_INDEX -u UV_INDEX_URL -u UV_EXTRA_INDEX_URL -u UV_FIND_LINKS \
        .venv-uv/*/bin/uv pip compile --quiet --no-config --universal --python-version 3.11 \
        --generate-hashes --no-annotate --upgrade \
        --custom-compile-command 'scripts/google-emulators.sh --lock' \
        --output-file "$lock" "${lock%.lock}.in"
    exit
fi

# Which lock is installed is the last thing that is written down.
if cmp --silent "$lock" "$folder/installed.lock"; then
    exit 0
fi
bash scripts/check-python.sh "$python"
rm -rf "$folder"
"$python" -m venv "$folder"
# Wheels only: to build one would fetch what has no hash here.
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir \
    --require-hashes --no-deps --only-binary :all: --requirement "$lock"
# DuckDB looks for extensions below HOME: this folder, here and in the test.
HOME="$PWD/$folder" "$folder/bin/python" -c \
    'from duckdb_extensions import import_extension; import_extension("spatial")'
cp "$lock" "$folder/installed.lock"
