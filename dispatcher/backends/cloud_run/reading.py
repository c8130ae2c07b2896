"""Following executions: which calls are made to say how they are, and no more than those.

One list, newest first, tells of a page of executions of a job; an execution is asked for by name
only where the list does not tell of it. Tasks are listed only when the counts of their execution
say that more have ended than are known: at most every `tasks_interval` while it runs, and when it
has completed. Every page is paid for at the meter before it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from threading import Lock
from typing import Any, Final

import structlog
from google.api_core import exceptions as api
from google.cloud import run_v2

from dispatcher.backends.base import (
    Handle,
    Launched,
    LaunchRequest,
    Meter,
    Phase,
    Report,
    TaskReport,
    Unavailable,
)
from dispatcher.backends.cloud_run import outcomes
from dispatcher.backends.cloud_run.clients import Clients
from dispatcher.backends.cloud_run.failures import CLIENT_ERRORS, at_read, calling
from dispatcher.backends.cloud_run.memory import Known, Memory
from dispatcher.backends.cloud_run.names import (
    ANY_JOB,
    ExecutionName,
    job_name,
    read_handle,
    same_place,
)
from dispatcher.backends.cloud_run.options import CloudRunSettings

__all__ = ["PAGE", "Reader", "launched_as"]

log = structlog.get_logger(__name__)

PAGE: Final = 500
"""Executions, or tasks, asked for in one call; the API may give fewer [U: its most]."""

SMALLEST_PAGE: Final = 50
"""A list carries each execution's whole environment, so it is no longer than it need be."""

FEW: Final = 3
"""So many are asked for by name rather than with another page of the list."""

MOST_LOOKUPS: Final = 20
"""Executions asked for by name in one poll, at most; the others come in the next ones."""

LIST_LAG: Final = 10.0
"""Seconds that a list may lag behind before what it does not show is asked for by name [U]."""

SKEW: Final = timedelta(minutes=15)
"""By how much the provider's clock may differ from the database's."""

OUT_OF_ORDER: Final = timedelta(minutes=1)
"""By how much a list may stray from newest first: creation times are not strictly ordered [C]."""

UNTOLD: Final = 60.0
"""Seconds after an execution completed in which its list of tasks may still lag behind."""

RELIST: Final = 5.0
"""Seconds between two listings of the tasks of a completed execution that lags."""

MOST_TASK_PAGES: Final = 25
"""Pages of one execution's tasks in one poll at most: other reads want their part of the budget."""

FULL_SCAN: Final = 600.0
"""Seconds between two scans for strays that read every page."""

MOST_PAGES: Final = 500
"""Pages of one listing at most: 1,000 completed executions a job are kept [D]."""

SHARED: Final = 0.5
"""Seconds by which a list may be older than the poll that uses it too."""

SEEN_LATELY: Final = 60.0


@dataclass(slots=True)
class _Look:
    """What a look at some executions of one job has found; None stands for NOT_FOUND."""

    found: dict[Handle, Any | None] = field(default_factory=dict)
    error: Unavailable | None = None


@dataclass(slots=True)
class _Sweep:
    """A list of executions, as far as it was read: newest first."""

    lock: Lock = field(default_factory=Lock)
    began: float = -math.inf
    size: int = PAGE
    token: str = ""
    ended: bool = False
    depth: int = 0
    pages: int = 0
    cost: int = 1
    """Pages that the last look took."""

    oldest: datetime | None = None
    seen: dict[Handle, tuple[Any, int]] = field(default_factory=dict)
    deepest: int = PAGE
    """How deep in the list the last one of those lay that were wanted."""

    def restart(self, now: float) -> None:
        """Begin at the newest again, with pages as long as the last list shows to be enough."""
        # With room for what is launched meanwhile.
        self.size = min(PAGE, max(SMALLEST_PAGE, self.deepest * 3 // 2))
        self.began, self.token, self.ended = now, "", False
        self.depth, self.oldest, self.seen, self.deepest = 0, None, {}, 0
        self.pages = 0


@dataclass(slots=True)
class _Scan:
    """A scan for strays, which may be broken off and gone on with."""

    token: str = ""
    pages: int = 0
    began: float = 0.0


@dataclass(slots=True)
class _Listing:
    """The last listing of a job that was made to find keys in."""

    lock: Lock = field(default_factory=Lock)
    began: float = -1.0
    floor: datetime | None = None
    failed: tuple[float, Unavailable] | None = None
    """When the last one that could not be made was begun, and why it could not."""

    wanted: list[datetime | None] = field(default_factory=list)
    """How far back those who wait for the next one need it to go; None: to the end."""


class Reader:
    """Reads executions and tasks of one target."""

    def __init__(
        self,
        settings: CloudRunSettings,
        clients: Clients,
        meter: Meter,
        memory: Memory,
        monotonic: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._clients = clients
        self._meter = meter
        self._memory = memory
        self._monotonic = monotonic
        self._timeout = settings.call_timeout.total_seconds()
        self._lock = Lock()
        self._sweeps: dict[str, _Sweep] = {}
        self._listings: dict[str, _Listing] = {}
        self._scanning = Lock()
        self._scan = _Scan()
        self._full_scan: float | None = None

    # --- poll -------------------------------------------------------------------------------------

    def poll(self, handles: Sequence[Handle]) -> Mapping[Handle, Report]:
        """Report on executions; what cannot be told of now is left out.

        Raises:
            Unavailable: nothing could be read.
        """
        began = self._monotonic()
        self._memory.trim()
        reports: dict[Handle, Report] = {}
        wanted: dict[Handle, ExecutionName] = {}
        for handle in handles:
            name = read_handle(handle)
            if name is None:  # no execution can have such a name
                reports[handle] = Report(Phase.ABSENT)
                continue
            final = self._memory.of(handle).report
            if final is not None:
                reports[handle] = final
            else:
                wanted[handle] = name
        told, error = False, None
        for parent, names in _grouped(wanted).items():
            look = self._look(parent, names, began)
            error = error or look.error
            told = told or bool(look.found)
            for handle in sorted(look.found, key=self._listing_age):
                reports[handle] = self._report(handle, look.found[handle])
        if error is not None and not told:
            raise error
        return reports

    def _listing_age(self, handle: Handle) -> tuple[float, float]:
        """Order executions by when their tasks were listed last, and what is being listed first.

        The budget may do for the tasks of one pack only: so each has its turn.
        """
        known = self._memory.of(handle)
        listed = -math.inf if known.tasks_listed is None else known.tasks_listed
        return listed, math.inf if known.listing is None or not known.page_token else known.listing

    def _look(self, parent: str, names: Mapping[Handle, ExecutionName], began: float) -> _Look:
        """Look at executions under one parent: by list, and by name where that does not tell."""
        look, missing = _Look(), dict(names)
        listed = self._is_worth_a_list(parent, len(names))
        if listed:
            try:
                self._list(parent, missing, look, began)
            except api.NotFound:
                listed = False  # the job is gone; each execution says for itself whether it is
            except Unavailable as error:
                look.error = error
                return look
        now = self._monotonic()
        overdue = [
            known
            for known in map(self._memory.of, missing)
            if not listed or self._is_overdue(known, now)
        ]
        overdue.sort(key=lambda known: known.looked_up)
        for known in overdue[:MOST_LOOKUPS]:
            known.looked_up = now
            try:
                look.found[known.handle] = self._get(known.handle)
            except api.NotFound:
                look.found[known.handle] = None
            except Unavailable as error:
                look.error = error
                break
        return look

    def _is_worth_a_list(self, parent: str, wanted: int) -> bool:
        """Whether a list takes fewer calls than asking for each execution by its name."""
        with self._lock:
            sweep = self._sweeps.get(parent)
        cost = 1 if sweep is None else sweep.cost
        return wanted > 1 and (cost <= wanted or wanted > MOST_LOOKUPS)

    def _is_overdue(self, known: Known, now: float) -> bool:
        """Whether to ask by name for what a list did not show: it may just lag."""
        if known.missed is None:
            known.missed = now
        return known.listed or now - known.missed >= LIST_LAG

    def _list(
        self, parent: str, missing: dict[Handle, ExecutionName], look: _Look, began: float
    ) -> None:
        """Read the list of executions as far as it tells of those that are missing.

        Polls of several pages at the same time share one list, and go on where another stopped.
        """
        with self._lock:
            sweep = self._sweeps.setdefault(parent, _Sweep())
        with sweep.lock:
            if sweep.began < began - SHARED:
                sweep.restart(self._monotonic())
            while True:
                for handle in sweep.seen.keys() & missing.keys():
                    del missing[handle]
                    look.found[handle], depth = sweep.seen[handle]
                    sweep.deepest = max(sweep.deepest, depth)
                if not missing or sweep.ended or (sweep.depth and len(missing) <= FEW):
                    break
                created = [self._memory.of(handle).created for handle in missing]
                last = sweep.oldest
                if last is not None and all(one and one > last + OUT_OF_ORDER for one in created):
                    break
                if sweep.pages > len(look.found) + len(missing):
                    break  # they lie deep: by name they are cheaper
                self._sweep_page(parent, sweep)
            sweep.cost = sweep.pages
            if missing:
                sweep.deepest = PAGE  # they may lie deeper: the next list has whole pages

    def _sweep_page(self, parent: str, sweep: _Sweep) -> None:
        """Read the next page of a list."""
        page = self._page(parent, sweep.size, sweep.token)
        for execution in page.executions:
            sweep.depth += 1
            name = same_place(execution.name, parent)
            if name is not None:
                self._note(name, execution, listed=True)
                execution.ClearField("template")  # large, and known by now
                sweep.seen[name.handle] = execution, sweep.depth
        if page.executions:
            sweep.oldest = outcomes.moment(page.executions[-1], "create_time")
        sweep.pages += 1
        sweep.token = page.next_page_token
        sweep.ended = not sweep.token

    def _report(self, handle: Handle, execution: Any | None) -> Report:
        """Say how an execution is, with the ends of its tasks as far as they are known."""
        if execution is None:
            return Report(Phase.ABSENT)
        known, told, now = self._memory.of(handle), outcomes.tally(execution), self._monotonic()
        if told.done and known.done is None:
            known.done = now
        sole = outcomes.sole_success(execution, told)
        if sole is not None:
            known.ends[0] = sole
        elif self._should_list(known, told, now):
            self._try_tasks(handle, known, told)
        if told.done:
            self._fill(execution, known, told)
        self._memory.count(known)
        tasks = tuple(known.ends[index] for index in sorted(known.ends))
        starts = [task.started_at for task in tasks if task.started_at is not None]
        started = min(starts) if starts else outcomes.moment(execution, "start_time")
        if told.done and len(tasks) == told.tasks and known.listing is None:
            report = Report(Phase.ENDED, started, tasks)
            if self._is_settled(known, told, sole):
                known.report = report
                return report
        if told.running or told.ended or tasks:
            return Report(Phase.RUNNING, started, tasks, self._more_in(known, told))
        return Report(Phase.PENDING)

    def _try_tasks(self, handle: Handle, known: Known, told: outcomes.Tally) -> None:
        """List tasks if it can be done now: without them the execution is told of all the same."""
        try:
            self._list_tasks(handle, known, told)
        except Unavailable as error:
            log.debug("tasks not listed", handle=handle, why=str(error))
        except api.NotFound:
            log.debug("tasks not listed", handle=handle, why="the execution is gone")

    def _is_settled(self, known: Known, told: outcomes.Tally, sole: TaskReport | None) -> bool:
        """Whether a completed execution's counts add up, or were waited for long enough."""
        if sole is not None or told.ended == told.tasks:
            return True
        return known.done is not None and self._monotonic() - known.done >= UNTOLD

    def _should_list(self, known: Known, told: outcomes.Tally, now: float) -> bool:
        """Whether the tasks of an execution are worth listing now."""
        if known.listing is not None:
            return True  # go on with the one that was broken off
        last = known.tasks_listed
        interval = self._settings.tasks_interval.total_seconds()
        if told.done or told.ended == told.tasks > 0:
            if len(known.ends) >= told.tasks:
                return False
            before_it_was_done = known.done is not None and last is not None and last < known.done
            return last is None or before_it_was_done or now - last >= min(RELIST, interval)
        if len(known.ends) >= told.ended:
            return False
        return last is None or now - last >= interval

    def _more_in(self, known: Known, told: outcomes.Tally) -> timedelta | None:
        """Say when a look can tell of more tasks that have ended; None if all are told of."""
        if known.listing is not None:
            return timedelta(0)  # it was broken off
        if len(known.ends) >= told.ended and not told.done:
            return None
        interval = self._settings.tasks_interval.total_seconds()
        if told.done:
            interval = min(RELIST, interval)
        passed = math.inf if known.tasks_listed is None else self._monotonic() - known.tasks_listed
        return timedelta(seconds=max(0.0, interval - passed))

    def _list_tasks(self, handle: Handle, known: Known, told: outcomes.Tally) -> None:
        """List the tasks of an execution until as many ends are known as it counts.

        A long listing is gone on with at the next look, also if the budget breaks it off: else the
        tasks of a large execution could never be read to the end.

        Raises:
            Unavailable: a page could not be read; what was read before is kept.
        """
        if known.listing is None:
            known.page_token = ""
        if not known.page_token:
            known.listing = self._monotonic()  # also where no page could be had so far
        goal = told.tasks if told.done else told.ended
        for _ in range(MOST_TASK_PAGES):
            try:
                page = self._task_page(handle, known.page_token)
            except Unavailable as error:
                if isinstance(error.__cause__, api.BadRequest):
                    known.listing = None  # the token has become too old: begin anew
                raise
            for task in page.tasks:
                if task.index not in known.ends:
                    report = outcomes.task_report(task, cancelled=told.is_cancelled)
                    if report is not None:
                        known.ends[task.index] = report
            known.page_token = page.next_page_token
            if not known.page_token or len(known.ends) >= goal > 0:
                break
        else:
            return  # gone on with at the next look
        known.tasks_listed, known.listing = known.listing, None

    def _fill(self, execution: Any, known: Known, told: outcomes.Tally) -> None:
        """Complete the ends of a completed execution from its counts, where its tasks say none."""
        if known.listing is not None or len(known.ends) >= told.tasks:
            return
        waited = known.done is not None and self._monotonic() - known.done >= UNTOLD
        rest = outcomes.rest_of(execution, told, known.ends, waited=waited)
        for report in rest or ():
            known.ends[report.index] = report

    # --- find and strays --------------------------------------------------------------------------

    def find(self, request: LaunchRequest, job: str) -> Launched | None:
        """Look for the execution of a key among those of a job, newest first.

        Finds at the same time share one listing, and a key is said to be missing only by a listing
        that was begun after the question came.

        Raises:
            Unavailable: it cannot be said now.
        """
        found = self._memory.launched(request.key)
        if found is not None:
            return found
        asked = self._monotonic()
        floor = None if request.intended_at is None else request.intended_at - SKEW
        parent = job_name(self._settings.project, self._settings.region, job)
        with self._lock:
            listing = self._listings.setdefault(parent, _Listing())
            listing.wanted.append(floor)
        with listing.lock:
            found = self._memory.launched(request.key)
            if found is not None:
                return found  # somebody else's listing has shown it
            if listing.failed is not None and listing.failed[0] >= asked:
                raise listing.failed[1]
            enough = listing.floor is None or (floor is not None and listing.floor <= floor)
            if not (listing.began >= asked and enough):
                with self._lock:
                    wanted, listing.wanted = listing.wanted, []
                floors = [one for one in (*wanted, floor) if one is not None]
                to_the_end = floor is None or None in wanted
                lowest = None if to_the_end else min(floors)
                began = self._monotonic()
                try:
                    self._list_since(parent, lowest)
                except Unavailable as error:
                    listing.failed = began, error
                    raise
                listing.began, listing.floor = began, lowest
        return self._memory.launched(request.key)

    def _list_since(self, parent: str, floor: datetime | None) -> None:
        """Note every execution of a job that is not older than this."""
        token = ""
        try:
            for _ in range(MOST_PAGES):
                page = self._page(parent, PAGE, token)
                for execution in page.executions:
                    name = same_place(execution.name, parent)
                    if name is not None:
                        self._note(name, execution, listed=True)
                token = page.next_page_token
                if not token or (floor is not None and _is_older(page, floor)):
                    return
        except api.NotFound:
            return  # no job, no executions

    def strays(self, instance: str, since: datetime) -> list[Launched]:
        """List what runs in the region for an installation and was created since then.

        Every page is read now and then; in between only the newest, as far as they hold anything
        new. What was not seen running of late is left out until then.

        Raises:
            Unavailable: it cannot be listed now; what was read is kept, and gone on with.
        """
        parent = job_name(self._settings.project, self._settings.region, ANY_JOB)
        with self._scanning:
            now = self._monotonic()
            full = self._full_scan is None or now - self._full_scan >= FULL_SCAN
            if not self._scan.token:
                self._scan = _Scan(began=now)
            self._scan_pages(parent, full=full)
            began, self._scan = self._scan.began, _Scan()
            if full:
                self._full_scan = now
        seen_after = min(began, self._monotonic() - SEEN_LATELY)
        found = []
        for known in self._memory.live(instance, since, seen_after):
            name = read_handle(known.handle)
            if name is not None:
                found.append(launched_as(self._settings, name, known.key))
        return found

    def _scan_pages(self, parent: str, *, full: bool) -> None:
        """Read the pages of a scan, from where the last one was broken off."""
        while self._scan.pages < MOST_PAGES:
            try:
                page = self._page(parent, PAGE, self._scan.token)
            except Unavailable as error:
                if isinstance(error.__cause__, api.BadRequest):
                    self._scan = _Scan()  # the token has become too old: begin anew
                raise
            except api.NotFound:
                return
            news = 0
            for execution in page.executions:
                name = same_place(execution.name, parent)
                if name is not None:
                    news += self._note(name, execution, listed=False)
            self._scan.pages += 1
            self._scan.token = page.next_page_token
            if not self._scan.token or (not full and not news):
                return
        log.warning("too many executions to scan for strays", parent=parent)

    # --- calls ------------------------------------------------------------------------------------

    def remember(self, execution: Any, parent: str, request: LaunchRequest) -> Launched | None:
        """Note what a launch has started; None if the answer does not name it."""
        name = same_place(execution.name, parent)
        if name is None:
            return None
        launched = launched_as(self._settings, name, request.key, execution.log_uri)
        created = outcomes.moment(execution, "create_time")
        self._memory.note_launch(launched, created, request.instance)
        return launched

    def _note(self, name: ExecutionName, execution: Any, *, listed: bool) -> bool:
        """Remember an execution of a list if it is ours; whether it was news."""
        known = self._memory.ours(name.handle)
        news = known is None
        if known is None:
            marks = _marks(execution)
            if not marks.get("DISPATCH_KEY"):
                return False
            launched = launched_as(self._settings, name, marks["DISPATCH_KEY"], execution.log_uri)
            created = outcomes.moment(execution, "create_time")
            self._memory.note_launch(launched, created, marks.get("DISPATCH_INSTANCE", ""))
            known = self._memory.of(name.handle)
        known.seen, known.missed = self._monotonic(), None
        known.listed = known.listed or listed
        if known.created is None:
            known.created = outcomes.moment(execution, "create_time")
        if execution.HasField("completion_time"):
            known.live = False
        return news

    def _page(self, parent: str, size: int, token: str) -> Any:
        """Read one page of executions, newest first [C].

        Raises:
            Unavailable: the budget is used up, or it cannot be read.
            NotFound: there is no such job.
        """
        request = run_v2.ListExecutionsRequest(parent=parent, page_size=size, page_token=token)
        clients = self._ready()
        with calling(self._meter, "read", f"cannot list the executions of {parent}"):
            pager = clients.executions.list_executions(request, retry=None, timeout=self._timeout)
            return run_v2.ListExecutionsResponse.pb(next(iter(pager.pages)))

    def _task_page(self, handle: Handle, token: str) -> Any:
        """Read one page of tasks.

        Raises:
            Unavailable: the budget is used up, or it cannot be read.
            NotFound: there is no such execution.
        """
        request = run_v2.ListTasksRequest(parent=handle, page_size=PAGE, page_token=token)
        clients = self._ready()
        with calling(self._meter, "read", f"cannot list the tasks of {handle}", gentle=True):
            pager = clients.tasks.list_tasks(request, retry=None, timeout=self._timeout)
            return run_v2.ListTasksResponse.pb(next(iter(pager.pages)))

    def _get(self, handle: Handle) -> Any:
        """Read one execution by its name.

        Raises:
            Unavailable: the budget is used up, or it cannot be read.
            NotFound: there is no such execution.
        """
        clients = self._ready()
        with calling(self._meter, "read", f"cannot read {handle}"):
            request = run_v2.GetExecutionRequest(name=handle)
            execution = run_v2.Execution.pb(
                clients.executions.get_execution(request, retry=None, timeout=self._timeout)
            )
        name = read_handle(handle)
        if name is not None:
            self._note(name, execution, listed=False)
        return execution

    def _ready(self) -> Any:
        try:
            return self._clients.run()
        except CLIENT_ERRORS as error:
            raise at_read(error, "cannot speak to Cloud Run") from error


def _grouped(wanted: Mapping[Handle, ExecutionName]) -> dict[str, dict[Handle, ExecutionName]]:
    """Group executions by the parent of the list that tells of them.

    Where many jobs have one execution each, as in mode `strict`, one list of all jobs tells of all.
    """
    groups: dict[str, dict[Handle, ExecutionName]] = {}
    for handle, name in wanted.items():
        groups.setdefault(name.parent, {})[handle] = name
    lone = [parent for parent, names in groups.items() if len(names) == 1]
    if len(lone) > FEW:
        for parent in lone:
            ((handle, name),) = groups.pop(parent).items()
            everywhere = job_name(name.project, name.region, ANY_JOB)
            groups.setdefault(everywhere, {})[handle] = name
    return groups


def _is_older(page: Any, floor: datetime) -> bool:
    last = outcomes.moment(page.executions[-1], "create_time") if page.executions else None
    return last is not None and last < floor


def _marks(execution: Any) -> dict[str, str]:
    """Read the variables of ours that an execution was given."""
    return {
        variable.name: variable.value
        for container in execution.template.containers
        for variable in container.env
        if variable.name in {"DISPATCH_KEY", "DISPATCH_INSTANCE"}
    }


def launched_as(
    settings: CloudRunSettings, name: ExecutionName, key: str, log_uri: str = ""
) -> Launched:
    """Say what was launched, with links to Google's console unless it is elsewhere than there."""
    if settings.insecure:  # an emulator's: its project may be somebody's at Google
        return Launched(name.handle, key)
    return Launched(name.handle, key, name.console_url, log_uri or name.logs_url)
