from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from buckets import serve_s3


@pytest.fixture
def deserted(dead_port: int) -> str:
    """A URL where nobody answers, nor can begin to."""
    return f"http://127.0.0.1:{dead_port}"


@pytest.fixture(scope="module")
def moto() -> Iterator[tuple[str, Any]]:
    """An S3 for the tests of a module: its URL, and a client of boto3."""
    with serve_s3() as served:
        yield served


@pytest.fixture
def s3_bucket(moto: tuple[str, Any]) -> tuple[str, Any]:
    """The same, with nothing in its bucket."""
    url, client = moto
    for found in client.list_objects_v2(Bucket="bucket").get("Contents", []):
        client.delete_object(Bucket="bucket", Key=found["Key"])
    return url, client
