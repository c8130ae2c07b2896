"""`CloudRunEmulator`: the world, its timetable and its servers, as one context manager."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from dispatcher.emulators.cloud_run.faults import Fault, Faults
from dispatcher.emulators.cloud_run.gate import Call, Gate
from dispatcher.emulators.cloud_run.grpc_server import GrpcServer
from dispatcher.emulators.cloud_run.options import EmulatorOptions
from dispatcher.emulators.cloud_run.rest_server import RestServer
from dispatcher.emulators.cloud_run.scripted import Script, ScriptRunner
from dispatcher.emulators.cloud_run.tasks import Runner
from dispatcher.emulators.cloud_run.timetable import Clock
from dispatcher.emulators.cloud_run.world import World

__all__ = ["CloudRunEmulator"]

T = TypeVar("T")
CLOSING_SECONDS: Final = 10


class CloudRunEmulator:
    """Cloud Run Jobs on loopback, from `with` to its end.

        with CloudRunEmulator(script=lambda start: 0.1) as emulator:
            emulator.world.define("p", "r", "job")

    Args:
        script: what tasks do, without processes; or give a `runner`.
        runner: what makes tasks run, such as a `ProcessRunner` or a `ContainerRunner`; closed at
            the end.
        faults: what goes wrong from the start.
        options: everything else.

    Attributes:
        world: what exists there.
        faults: what goes wrong; may be changed at any time.
    """

    def __init__(
        self,
        *,
        script: Script | None = None,
        runner: Runner | None = None,
        faults: tuple[Fault, ...] = (),
        options: EmulatorOptions | None = None,
    ) -> None:
        if script is not None and runner is not None:
            raise TypeError("give a script or a runner, not both")
        self.options = options or EmulatorOptions()
        clock = Clock()
        self.faults = Faults(clock, self.options.seed)
        self.faults.add(*faults)
        made = runner or (ScriptRunner(script) if script is not None else ScriptRunner())
        self.world = World(made, self.options, self.faults, clock)
        self._gate = Gate(self.world)
        self._grpc = GrpcServer(self._gate)
        self._rest = RestServer(self._gate)
        self._ports: tuple[int, int] | None = None

    # --- where it is ------------------------------------------------------------------------------

    @property
    def grpc_address(self) -> str:
        """`127.0.0.1:PORT`, without TLS."""
        return f"127.0.0.1:{self._opened()[0]}"

    @property
    def rest_url(self) -> str:
        """`http://127.0.0.1:PORT`."""
        return f"http://127.0.0.1:{self._opened()[1]}"

    def _opened(self) -> tuple[int, int]:
        if self._ports is None:
            raise RuntimeError("the emulator is not open: use it in a with statement")
        return self._ports

    # --- what was called --------------------------------------------------------------------------

    @property
    def calls(self) -> Counter[str]:
        """How often each method was called, by "Service.Method", refused calls included."""
        return self._gate.calls

    @property
    def pages(self) -> Counter[str]:
        """How many of those calls were for a further page of a list."""
        return self._gate.pages

    @property
    def refused(self) -> Counter[tuple[str, str]]:
        """How often each (method, name of a code) was answered with an error."""
        return self._gate.refused

    @property
    def history(self) -> list[Call]:
        """The latest calls, oldest first."""
        return list(self._gate.history)

    # --- open and close ---------------------------------------------------------------------------

    def __enter__(self) -> Self:
        """Start the servers.

        Raises:
            OSError: a port is taken.
        """
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="cloud-run-servers", daemon=True
        )
        self._thread.start()
        try:
            self._ports = self._on_loop(self._open_servers)
        except BaseException:
            self._stop_loop()
            raise
        self.world.timetable.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop the servers and whatever runs.

        Raises:
            RuntimeError: a script or an effect failed meanwhile.
        """
        self._on_loop(self._close_servers)
        self._stop_loop()
        self.world.timetable.close()
        self.world.runner.close()
        failures = self.world.timetable.failures
        if failures and error is None:
            raise RuntimeError(
                f"{len(failures)} failures within the emulator; the first: {failures[0]!r}"
            ) from failures[0]

    async def _open_servers(self) -> tuple[int, int]:
        grpc_port = await self._grpc.open(self.options.grpc_port)
        try:
            return grpc_port, await self._rest.open(self.options.rest_port)
        except BaseException:
            await self._grpc.close()
            raise

    async def _close_servers(self) -> None:
        await self._rest.close()
        await self._grpc.close()

    def _on_loop(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return asyncio.run_coroutine_threadsafe(work(), self._loop).result(CLOSING_SECONDS)

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
