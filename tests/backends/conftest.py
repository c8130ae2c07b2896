from __future__ import annotations

import os

import pytest

from dispatcher.backends import local


@pytest.fixture(autouse=True)
def shims_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where coverage follows subprocesses, let it into the shims too: it comes by site-packages."""
    if {"COVERAGE_PROCESS_CONFIG", "COVERAGE_PROCESS_START"} & os.environ.keys():
        monkeypatch.setattr("dispatcher.backends.local._FLAGS", ())


@pytest.fixture(autouse=True)
def shims_have_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up on no shim that begins slowly; a test of one that never does says when itself."""
    monkeypatch.setattr("dispatcher.backends.local.LAUNCH_SECONDS", 60.0)
    monkeypatch.setattr("dispatcher.backends.local._BOOT", boot_that_waits(60.0))


def boot_that_waits(seconds: float) -> str:
    """Start a shim that waits so long for the mark of another one that holds the lock."""
    return local._BOOT.replace(
        "import local_shim;", f"import local_shim; local_shim.MARKER_SECONDS = {seconds};"
    )


@pytest.fixture
def nobody(dead_port: int) -> str:
    """An address at which nobody listens, and nobody else can begin to."""
    return f"127.0.0.1:{dead_port}"
