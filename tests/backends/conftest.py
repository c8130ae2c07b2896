from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def shims_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where coverage follows subprocesses, let it into the shims too: it comes by site-packages."""
    if {"COVERAGE_PROCESS_CONFIG", "COVERAGE_PROCESS_START"} & os.environ.keys():
        monkeypatch.setattr("dispatcher.backends.local._FLAGS", ())
