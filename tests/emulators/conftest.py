"""Emulators, and the real client library against them over both transports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import pytest
from containers import Docker, private_docker
from emulators.cloud import Cloud, Clouds

from dispatcher.emulators.cloud_run import CloudRunEmulator


@pytest.fixture
def clients() -> Iterator[Clouds]:
    """Make clients of an emulator for a transport."""
    with ExitStack() as stack:

        def make(emulator: CloudRunEmulator, transport: str = "grpc") -> Cloud:
            channel = grpc.insecure_channel(emulator.grpc_address)
            stack.callback(channel.close)
            return Cloud(emulator, transport, channel)

        yield make


@pytest.fixture(params=["grpc", "rest"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def opened(transport: str, clients: Clouds) -> Iterator[Callable[..., Cloud]]:
    """Open an emulator with the job `job`, for a transport."""
    with ExitStack() as stack:

        def make(*, job: dict[str, Any] | None = None, **options: Any) -> Cloud:
            emulator = stack.enter_context(CloudRunEmulator(**options))
            emulator.world.define("p", "r", "job", **(job or {}))
            return clients(emulator, transport)

        yield make


@pytest.fixture(scope="session")
def docker() -> Iterator[Docker]:
    """A container engine that only this pytest process uses."""
    with private_docker() as engine:
        yield engine
