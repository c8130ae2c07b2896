from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def shims_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where coverage follows subprocesses, let it into the shims too: it comes by site-packages."""
    if {"COVERAGE_PROCESS_CONFIG", "COVERAGE_PROCESS_START"} & os.environ.keys():
        monkeypatch.setattr("dispatcher.backends.local._FLAGS", ())


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address at which nobody listens, and nobody else can begin to."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"
