"""What every call passes on its way to the world and back: counts, faults, permission, quota, time.

    count → half the latency → refusals by fault → credentials → permission → quota → the verb
          → lost replies by fault → half the latency

Both servers call it on the emulator's event loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from dispatcher.emulators.cloud_run.api import Method
from dispatcher.emulators.cloud_run.faults import Kind, Reply
from dispatcher.emulators.cloud_run.messages import seconds_of
from dispatcher.emulators.cloud_run.refusal import Code, Refused
from dispatcher.emulators.cloud_run.world import World

__all__ = ["Call", "Dropped", "Gate"]

MINUTE: Final = 60.0
KEPT_CALLS: Final = 100_000
WAIT_LIMIT: Final = 3_600.0
WAIT_STEP: Final = 0.05


class Dropped(Exception):
    """The connection is to be closed instead of answering."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call that was made."""

    at: float
    method: str
    """Such as "Jobs.RunJob"."""

    subject: str
    """The full name of what it is about."""

    code: Code
    """How it was answered; UNKNOWN if the reply was dropped or never came."""

    accepted: bool
    """Whether it had its effect."""


class Gate:
    """Lets calls through to a world.

    Attributes:
        calls: how often each method was called, by "Service.Method", refused ones included.
        pages: calls of list methods for a further page (with a token).
        refused: how often each (method, code name) was answered with an error.
        history: the latest calls, oldest first.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._lock = threading.Lock()
        self._windows: dict[tuple[str, str], deque[float]] = {}
        self.calls: Counter[str] = Counter()
        self.pages: Counter[str] = Counter()
        self.refused: Counter[tuple[str, str]] = Counter()
        self.history: deque[Call] = deque(maxlen=KEPT_CALLS)

    async def call(self, method: Method, request: Any) -> Any:
        """Make a call; returns the response.

        Raises:
            Refused: answer it with that error.
            Dropped: do not answer it, and close its connection.
        """
        world = self._world
        at = world.clock()
        with self._lock:
            self.calls[method.name] += 1
            if getattr(request, "page_token", ""):
                self.pages[method.name] += 1
        accepted = False
        code = Code.UNKNOWN
        try:
            await self._pause()
            self._refuse(method, request)
            response = method.handle(world, request)
            accepted = True
            if method.rpc == "WaitOperation":
                response = await self._wait(method, request, response)
            await self._lose(method)
            await self._pause()
            code = Code.OK
        except Refused as refused:
            code = refused.code
            raise
        finally:
            subject = method.subject(request)
            with self._lock:
                self.history.append(Call(at, method.name, subject, code, accepted))
                if code is not Code.OK:
                    self.refused[method.name, code.name] += 1
        return response

    async def _pause(self) -> None:
        if self._world.options.latency:
            await asyncio.sleep(self._world.options.latency / 2)

    def _refuse(self, method: Method, request: Any) -> None:
        """Refuse a call for what is not its content (google/rpc/code.proto)."""
        world = self._world
        fault = world.faults.strike(Kind.REFUSE, method.name)
        if fault is not None:
            if fault.code is Code.RESOURCE_EXHAUSTED:
                raise _over_quota(method.quota or "read", method.subject(request))
            raise Refused(fault.code, "The service is currently unavailable.")
        if not world.authenticated:
            raise Refused(
                Code.UNAUTHENTICATED,
                "Request had invalid authentication credentials.",
                reason="ACCESS_TOKEN_TYPE_UNSUPPORTED",
            )
        self._permit(method, request)
        self._spend(method, request)

    def _permit(self, method: Method, request: Any) -> None:
        """Check what the caller may do (clouds.md §3)."""
        needed = [method.permission] if method.permission else []
        if method.rpc == "RunJob" and request.overrides.ByteSize():
            needed.append("run.jobs.runWithOverrides")
        subject = method.subject(request)
        for permission in needed:
            if not self._world.permits(permission, subject):
                raise Refused(
                    Code.PERMISSION_DENIED,
                    f"Permission '{permission}' denied on resource '{subject}' (or resource may "
                    "not exist).",
                    reason="IAM_PERMISSION_DENIED",
                    metadata={"permission": permission, "resource": subject},
                )

    def _spend(self, method: Method, request: Any) -> None:
        """Count a call against its quota per minute.

        clouds.md §3; guess: minute, refused_calls_count.
        """
        options = self._world.options
        if method.quota is None:
            return
        limit = {
            "run": options.run_per_minute,
            "read": options.read_per_minute,
            "write": options.write_per_minute,
            "logs": options.logs_per_minute,
        }[method.quota]
        if limit is None:
            return
        subject = method.subject(request)
        # Logging counts by project, Cloud Run by project and region.
        parts = subject.split("/")
        whose = "/".join(parts[:2] if method.quota == "logs" else parts[:4])
        now = self._world.clock()
        with self._lock:
            window = self._windows.setdefault((method.quota, whose), deque())
            while window and window[0] <= now - MINUTE:
                window.popleft()
            if len(window) >= limit:
                raise _over_quota(method.quota, whose)
            window.append(now)

    async def _lose(self, method: Method) -> None:
        """Lose the reply of a call that had its effect (google/rpc/code.proto: UNAVAILABLE)."""
        fault = self._world.faults.strike(Kind.LOSE_REPLY, method.name)
        if fault is None:
            return
        if fault.reply is Reply.UNAVAILABLE:
            raise Refused(Code.UNAVAILABLE, "The service is currently unavailable.")
        if fault.reply is Reply.DROP:
            raise Dropped
        await asyncio.sleep(WAIT_LIMIT if fault.reply is Reply.NEVER else fault.seconds)
        if fault.reply is Reply.NEVER:
            raise Dropped

    async def _wait(self, method: Method, request: Any, response: Any) -> Any:
        """Answer WaitOperation when the operation is done, or its time is up."""
        loop = asyncio.get_running_loop()
        limit = seconds_of(request.timeout) if request.HasField("timeout") else WAIT_LIMIT
        deadline = loop.time() + min(limit, WAIT_LIMIT)
        handle: Callable[[World, Any], Any] = method.handle
        while not response.done and loop.time() < deadline:
            await asyncio.sleep(min(WAIT_STEP, max(deadline - loop.time(), 0)))
            response = handle(self._world, request)
        return response


def _over_quota(quota: str, whose: str) -> Refused:
    """Tell of a quota that is used up (clouds.md §3: 429 with RATE_LIMIT_EXCEEDED)."""
    service = "logging.googleapis.com" if quota == "logs" else "run.googleapis.com"
    names = {
        "run": "Job run requests",
        "read": "Read requests",
        "write": "Write requests",
        "logs": "Read requests",
    }
    return Refused(
        Code.RESOURCE_EXHAUSTED,
        f"Quota exceeded for quota metric '{names[quota]}' and limit '{names[quota]} per minute' "
        f"of service '{service}' for consumer '{whose}'.",
        reason="RATE_LIMIT_EXCEEDED",
        metadata={"service": service, "consumer": whose, "quota_metric": names[quota]},
    )
