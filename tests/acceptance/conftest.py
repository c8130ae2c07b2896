"""Each acceptance test has an installation of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from installation import Site


@pytest.fixture
def site(tmp_path: Path, database_url: str, valkey: str) -> Iterator[Site]:
    made = Site(tmp_path, database_url, valkey)
    yield made
    made.stop()
