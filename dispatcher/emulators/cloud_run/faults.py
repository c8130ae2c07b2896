"""Misbehaviour by script: what goes wrong, for which calls or jobs, how often and when.

    emulator.faults.add(lose_reply("Jobs.RunJob", share=0.3), refuse("Jobs.RunJob", share=0.1))
    with emulator.faults.during(outage()):
        ...

A fault is a value; `Faults` decides with a generator whether it strikes. Each fault has one of its
own: with a seed, which of the calls that it looks at are struck does not depend on how those of
other faults come in between. `from_json` reads the same from a file:
`[{"fault": "lose_reply", "on": "Jobs.RunJob", "share": 0.3}]`.
"""

from __future__ import annotations

import fnmatch
import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from dispatcher.emulators.cloud_run.refusal import Code
from dispatcher.errors import ConfigurationError

__all__ = [
    "CONSTRUCTORS",
    "Fault",
    "Faults",
    "Kind",
    "Reply",
    "clock_skew",
    "fail_tasks",
    "forget",
    "forget_running",
    "from_json",
    "kill_tasks",
    "lose_reply",
    "outage",
    "refuse",
    "slow_cancel",
    "slow_start",
    "stale_lists",
]


class Kind(StrEnum):
    """What a fault does."""

    REFUSE = "refuse"
    """The call is answered with an error and has no effect."""

    LOSE_REPLY = "lose_reply"
    """The call has its effect, and the caller does not learn of it."""

    STALE_LISTS = "stale_lists"
    """Lists show the world as it was some seconds ago."""

    SLOW_CANCEL = "slow_cancel"
    SLOW_START = "slow_start"
    KILL_TASKS = "kill_tasks"
    FAIL_TASKS = "fail_tasks"
    FORGET = "forget"
    """The record of a completed execution vanishes."""

    FORGET_RUNNING = "forget_running"
    """The record of an execution vanishes while it runs; it runs on."""

    CLOCK_SKEW = "clock_skew"
    """Every time that is shown is off."""


class Reply(StrEnum):
    """What the caller sees in place of the reply that was lost."""

    UNAVAILABLE = "unavailable"
    """503."""

    DROP = "drop"
    """The connection is closed."""

    NEVER = "never"
    """Nothing, until the caller gives up."""

    LATE = "late"
    """The reply itself, `seconds` later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One kind of misbehaviour. Made by the functions below."""

    kind: Kind
    on: str = "*"
    """A pattern of "Service.Method" for calls, and of the job's id for executions and tasks."""

    share: float = 1.0
    """The share of the matching calls, executions or attempts that it strikes."""

    times: int | None = None
    """It strikes so often at most."""

    skip: int = 0
    """So many that match are left alone first."""

    starts: float = 0.0
    """Seconds from its adding to its first strike."""

    lasts: float | None = None
    """Seconds from then to its end; None for ever."""

    seconds: float = 0.0
    """How long, how late or how stale, as its kind says."""

    code: Code = Code.UNAVAILABLE
    reply: Reply = Reply.UNAVAILABLE
    exit_code: int = 1
    out_of_memory: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be meant."""
        if not 0 <= self.share <= 1:
            raise ConfigurationError(f"fault {self.kind}: share is {self.share}, allowed: 0 to 1")


def refuse(
    on: str = "*",
    *,
    code: Code | str = Code.UNAVAILABLE,
    share: float = 1.0,
    times: int | None = None,
    skip: int = 0,
    starts: float = 0.0,
    lasts: float | None = None,
) -> Fault:
    """Answer calls with an error before they have an effect: 503, or any other code."""
    return Fault(
        kind=Kind.REFUSE,
        on=on,
        code=Code[code] if isinstance(code, str) else code,
        share=share,
        times=times,
        skip=skip,
        starts=starts,
        lasts=lasts,
    )


def outage(lasts: float | None = None, *, starts: float = 0.0) -> Fault:
    """Answer every call with 503 for some seconds, or until the fault is removed."""
    return Fault(kind=Kind.REFUSE, starts=starts, lasts=lasts)


def lose_reply(
    on: str = "*",
    reply: Reply | str = Reply.UNAVAILABLE,
    *,
    seconds: float = 0.0,
    share: float = 1.0,
    times: int | None = None,
    skip: int = 0,
    starts: float = 0.0,
    lasts: float | None = None,
) -> Fault:
    """Let calls have their effect, and lose the reply; `seconds` is for `late` only."""
    return Fault(
        kind=Kind.LOSE_REPLY,
        on=on,
        reply=Reply(reply),
        seconds=seconds,
        share=share,
        times=times,
        skip=skip,
        starts=starts,
        lasts=lasts,
    )


def stale_lists(seconds: float, on: str = "*", *, share: float = 1.0) -> Fault:
    """Show in lists what was so `seconds` ago: younger executions are not in them."""
    return Fault(kind=Kind.STALE_LISTS, on=on, seconds=seconds, share=share)


def slow_cancel(
    seconds: float, on: str = "*", *, share: float = 1.0, times: int | None = None
) -> Fault:
    """Let a cancel that was accepted take effect `seconds` later."""
    return Fault(kind=Kind.SLOW_CANCEL, on=on, seconds=seconds, share=share, times=times)


def slow_start(
    seconds: float, on: str = "*", *, share: float = 1.0, times: int | None = None
) -> Fault:
    """Keep executions pending for `seconds` before their first task starts."""
    return Fault(kind=Kind.SLOW_START, on=on, seconds=seconds, share=share, times=times)


def kill_tasks(
    seconds: float = 0.0,
    on: str = "*",
    *,
    share: float = 1.0,
    times: int | None = None,
    skip: int = 0,
) -> Fault:
    """Kill attempts with SIGKILL `seconds` after their start, as failing infrastructure does."""
    return Fault(kind=Kind.KILL_TASKS, on=on, seconds=seconds, share=share, times=times, skip=skip)


def fail_tasks(
    exit_code: int = 1,
    on: str = "*",
    *,
    seconds: float = 0.0,
    out_of_memory: bool = False,
    share: float = 1.0,
    times: int | None = None,
    skip: int = 0,
) -> Fault:
    """Have attempts fail `seconds` after their start, in place of what they would have done."""
    return Fault(
        kind=Kind.FAIL_TASKS,
        on=on,
        exit_code=exit_code,
        out_of_memory=out_of_memory,
        seconds=seconds,
        share=share,
        times=times,
        skip=skip,
    )


def forget(
    seconds: float = 0.0, on: str = "*", *, share: float = 1.0, times: int | None = None
) -> Fault:
    """Lose the records of executions `seconds` after they have completed."""
    return Fault(kind=Kind.FORGET, on=on, seconds=seconds, share=share, times=times)


def forget_running(
    seconds: float = 0.0, on: str = "*", *, share: float = 1.0, times: int | None = None
) -> Fault:
    """Lose the records of executions `seconds` after their launch, if they still run; they run on.

    With 0 seconds the reply of the launch is all that is ever said of it.
    """
    return Fault(kind=Kind.FORGET_RUNNING, on=on, seconds=seconds, share=share, times=times)


def clock_skew(seconds: float) -> Fault:
    """Shift every time that the API shows."""
    return Fault(kind=Kind.CLOCK_SKEW, seconds=seconds)


CONSTRUCTORS: Final[Mapping[str, Callable[..., Fault]]] = {
    function.__name__: function
    for function in (
        refuse,
        outage,
        lose_reply,
        stale_lists,
        slow_cancel,
        slow_start,
        kill_tasks,
        fail_tasks,
        forget,
        forget_running,
        clock_skew,
    )
}
"""The faults by the names that a file uses."""


def from_json(path: Path) -> tuple[Fault, ...]:
    """Read faults from a file: a list of objects, each with `fault` and that function's arguments.

    Raises:
        ConfigurationError: the file cannot be read, or says what no fault is.
    """
    try:
        given = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path}: the faults cannot be read: {error}") from error
    if not isinstance(given, list):
        raise ConfigurationError(f"{path}: a list of faults is expected, not {given!r:.60}")
    return tuple(_fault(path, number, one) for number, one in enumerate(given))


def _fault(path: Path, number: int, given: Any) -> Fault:
    where = f"{path}: fault {number}"
    name = str(given.get("fault")) if isinstance(given, dict) else ""
    if name not in CONSTRUCTORS:
        known = ", ".join(CONSTRUCTORS)
        raise ConfigurationError(f"{where}: 'fault' is {name!r}; allowed: {known}")
    # Any field of a fault may be given, whether its function has an argument for it or not.
    known_fields = {field.name for field in fields(Fault)} - {"kind"}
    arguments = {key: value for key, value in given.items() if key != "fault"}
    if unknown := arguments.keys() - known_fields:
        raise ConfigurationError(
            f"{where}: {name} has no {', '.join(sorted(unknown))}; "
            f"allowed: {', '.join(sorted(known_fields))}"
        )
    try:
        if "code" in arguments:
            arguments["code"] = Code[arguments["code"]]
        if "reply" in arguments:
            arguments["reply"] = Reply(arguments["reply"])
        needs = {"stale_lists", "slow_cancel", "slow_start", "clock_skew"}
        made = CONSTRUCTORS[name](*([0.0] if name in needs else []))
        return replace(made, **arguments)
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigurationError(f"{where}: {name}: {error}") from error


class _Live:
    """A fault that was added, and how often it matched and struck."""

    def __init__(self, fault: Fault, now: float, chance: random.Random) -> None:
        self.fault = fault
        self.chance = chance
        self.begins = now + fault.starts
        self.ends = None if fault.lasts is None else self.begins + fault.lasts
        self.matched = 0
        self.struck = 0

    def strikes_at(self, now: float) -> bool:
        """Whether its time has come and is not over."""
        return self.begins <= now and (self.ends is None or now < self.ends)


class Faults:
    """The faults of one emulator. Every method may be called from any thread.

    Attributes:
        struck: how often each kind has struck.
    """

    def __init__(self, clock: Callable[[], float], seed: int | None = None) -> None:
        self._clock = clock
        self._seed = seed
        self._added = 0
        self._lock = threading.Lock()
        self._live: list[_Live] = []
        self.struck: Counter[str] = Counter()
        self.history_seconds = 0.0
        """How far back lists may have to look."""

    def add(self, *faults: Fault) -> None:
        """Let faults strike from now on."""
        now = self._clock()
        with self._lock:
            self._live += [_Live(fault, now, self._chance()) for fault in faults]
            stale = [fault.seconds for fault in faults if fault.kind is Kind.STALE_LISTS]
            self.history_seconds = max([self.history_seconds, *stale])

    def _chance(self) -> random.Random:
        """Make the generator of the next fault."""
        self._added += 1
        seed = None if self._seed is None else f"{self._seed}/{self._added}"
        return random.Random(seed)  # noqa: S311 - chance, and not secrecy

    def remove(self, *faults: Fault) -> None:
        """Let them strike no more."""
        with self._lock:
            self._live = [live for live in self._live if live.fault not in faults]

    def clear(self) -> None:
        """Remove all."""
        with self._lock:
            self._live.clear()

    @contextmanager
    def during(self, *faults: Fault) -> Iterator[None]:
        """Have faults for as long as a block takes."""
        self.add(*faults)
        try:
            yield
        finally:
            self.remove(*faults)

    def strike(self, kind: Kind, subject: str) -> Fault | None:
        """Return the fault of a kind that strikes this call, execution or attempt, if one does."""
        if not self._live:
            return None
        now = self._clock()
        with self._lock:
            for live in self._live:
                fault = live.fault
                if (
                    fault.kind is kind
                    and live.strikes_at(now)
                    and fnmatch.fnmatchcase(subject, fault.on)
                    and self._hits(live)
                ):
                    self.struck[kind.value] += 1
                    return fault
        return None

    def _hits(self, live: _Live) -> bool:
        fault = live.fault
        live.matched += 1
        if live.matched <= fault.skip or (fault.times is not None and live.struck >= fault.times):
            return False
        if fault.share < 1 and live.chance.random() >= fault.share:
            return False
        live.struck += 1
        return True

    def skew(self) -> float:
        """By how many seconds the times that are shown are off now."""
        if not self._live:
            return 0.0
        now = self._clock()
        with self._lock:
            return sum(
                live.fault.seconds
                for live in self._live
                if live.fault.kind is Kind.CLOCK_SKEW and live.strikes_at(now)
            )
