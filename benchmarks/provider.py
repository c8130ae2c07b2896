"""A provider for the makespan rows: each call takes 50 ms, and what runs is a row with an end time.

`python -m benchmarks.provider PORT LEAST MOST` serves it; all three systems under test call it over
the same line protocol: one JSON object a line, one answer a line. Durations are drawn from the key,
so each system gets the same work; a run begins when its launch call is answered.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from dispatcher.backends.base import (
    UNMETERED,
    BackendLimits,
    Definition,
    Handle,
    Launched,
    LaunchRequest,
    Meter,
    Phase,
    Remark,
    Report,
    TaskReport,
    Unavailable,
)
from dispatcher.job import Job
from dispatcher.states import Outcome

CALL_SECONDS = 0.05


def duration(key: str, least: float, most: float) -> float:
    """Draw the run time of a key: the same for everybody."""
    part = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return least + part * (most - least)


class Provider:
    """The server's state: runs by key, with the wall-clock time at which each ends."""

    def __init__(self, least: float, most: float) -> None:
        self.least, self.most = least, most
        self.runs: dict[str, tuple[float, float]] = {}
        self.calls: Counter[str] = Counter()

    def answer(self, call: dict[str, Any]) -> Any:
        """Answer one call."""
        verb = call["verb"]
        now = time.time()
        if verb == "counts":
            return {"calls": dict(self.calls), "runs": self.runs}
        self.calls[verb] += 1
        if verb == "launch":
            key = call["key"]
            # Named by its place in the order of launches: every system gets the same run times.
            drawn = duration(str(len(self.runs)), self.least, self.most)
            self.runs.setdefault(key, (now, now + drawn))
            return {"key": key}
        if verb == "list":
            wanted = call.get("keys") or list(self.runs)
            return {key: self.runs[key] for key in wanted if key in self.runs}
        raise ValueError(verb)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        while line := await reader.readline():
            call = json.loads(line)
            if call["verb"] != "counts":
                await asyncio.sleep(CALL_SECONDS)
            writer.write(json.dumps(self.answer(call)).encode() + b"\n")
            await writer.drain()
        writer.close()


class Client:
    """A connection for each thread that calls."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._local = threading.local()

    def call(self, **call: Any) -> Any:
        """Make a call and wait for its answer."""
        stream = getattr(self._local, "stream", None)
        if stream is None:
            connection = socket.create_connection(("127.0.0.1", self._port), timeout=10)
            stream = self._local.stream = connection.makefile("rwb")
        stream.write(json.dumps(call).encode() + b"\n")
        stream.flush()
        return json.loads(stream.readline())


class BenchBackend:
    """The dispatcher's backend for this provider."""

    class Settings(BaseModel):
        """Where it listens."""

        model_config = ConfigDict(extra="forbid", frozen=True)
        port: int

    class Options(BaseModel):
        """Nothing to set."""

        model_config = ConfigDict(extra="forbid", frozen=True)

    DEFAULTS: ClassVar[Mapping[str, Any]] = {}
    COMMAND: ClassVar[Literal["required", "refused"]] = "required"
    limits: ClassVar[BackendLimits] = BackendLimits(
        max_tasks=1,
        max_payload_bytes=1 << 20,
        inline_bytes=1 << 20,
        max_text_bytes=1 << 17,
        call_timeout=timedelta(seconds=10),
        find_grace=timedelta(seconds=1),
        absent_grace=timedelta(seconds=5),
        page_size=1000,
        poll_interval=timedelta(0),
        relaunch_safe=True,
        own_results=False,
        per_task_env=True,
    )

    def __init__(self, _name: str, settings: BaseModel, _meter: Meter = UNMETERED) -> None:
        if not isinstance(settings, self.Settings):
            raise TypeError(settings)
        self._client = Client(settings.port)

    def _call(self, **call: Any) -> Any:
        try:
            return self._client.call(**call)
        except OSError as error:
            raise Unavailable(str(error)) from error

    def home(self) -> Mapping[str, str] | None:
        """Reachable from anywhere."""
        return None

    def definition(self, _options: BaseModel) -> Definition:
        """Nothing is fixed."""
        return Definition()

    def check(self, _job: Job, _options: BaseModel) -> Sequence[Remark]:
        """Nothing can be wrong."""
        return ()

    def launch(self, request: LaunchRequest) -> Launched:
        """Launch by key."""
        self._call(verb="launch", key=request.key)
        return Launched(request.key, request.key)

    def find(self, request: LaunchRequest) -> Launched | None:
        """Find by key."""
        found = self._call(verb="list", keys=[request.key])
        return Launched(request.key, request.key) if found else None

    def poll(self, handles: Sequence[Handle]) -> Mapping[Handle, Report]:
        """Read a page."""
        now = time.time()
        reports = {}
        for key, (start, end) in self._call(verb="list", keys=list(handles)).items():
            began, ended = (datetime.fromtimestamp(at, UTC) for at in (start, end))
            if end > now:
                reports[key] = Report(Phase.RUNNING, began)
            else:
                task = TaskReport(0, Outcome.SUCCEEDED, 0, None, began, ended)
                reports[key] = Report(Phase.ENDED, began, (task,))
        return reports

    def cancel(self, _handle: Handle) -> None:
        """Nothing is cancelled here."""

    def strays(self, _instance: str, _since: datetime) -> Iterable[Launched]:
        """Nothing strays here."""
        return ()

    def logs(self, _handle: Handle, _task_index: int, _tail: int) -> Iterator[str]:
        """Nothing is logged here."""
        return iter(())

    def clean(self, _now: datetime) -> int:
        """Nothing is kept here."""
        return 0


async def _main(port: int, least: float, most: float) -> None:
    provider = Provider(least, most)
    server = await asyncio.start_server(provider.serve, "127.0.0.1", port, limit=1 << 24)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])))
