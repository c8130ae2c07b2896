"""The package is typed for those who use it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

USE = """
from collections.abc import Iterator

import sqlalchemy as sa
from dispatcher import Batch, BatchState, Chunk, Dispatcher, Job


def nightly(connection: sa.Connection, names: list[str]) -> str:
    with Dispatcher() as dispatcher:
        batch: Batch = dispatcher.enqueue("export", names, key="k", connection=connection)
        state: BatchState = batch.wait(10.0).state
        chunks: Iterator[Chunk] = dispatcher.chunks(batch.id)
        print(state, [chunk.outcome for chunk in chunks])
        return batch.id


def wrong() -> None:
    Dispatcher().enqueue(3)
    Job(name="x", target="t", command=("x",)).nmae
"""


@pytest.mark.timeout(600)  # it reads half the libraries there are
def test_a_users_code_is_checked_strictly_against_our_types(tmp_path: Path) -> None:
    path = tmp_path / "use.py"
    path.write_text(USE)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--config-file=",
            f"--cache-dir={os.devnull}",
            str(path),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 2, done.stdout
    assert 'incompatible type "int"; expected "str | Job"' in errors[0]
    assert '"Job" has no attribute "nmae"' in errors[1]
