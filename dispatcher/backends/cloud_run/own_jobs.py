"""The Cloud Run jobs that launches made for themselves: how many there are, and which may go.

A region holds 1,000 jobs [D: quotas], and each launch of mode `strict` makes one. They are kept for
a while after their end, for people to look at; but where half of the region's places are taken,
those go at once whose end is recorded. Where all are taken, launches wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from threading import Lock
from typing import Any, Final

from google.api_core import exceptions as api
from google.cloud import run_v2

from dispatcher.backends.base import Meter, Recorded, Unavailable
from dispatcher.backends.cloud_run import outcomes
from dispatcher.backends.cloud_run.clients import Clients, RunClients
from dispatcher.backends.cloud_run.failures import CLIENT_ERRORS, at_read, calling
from dispatcher.backends.cloud_run.options import CloudRunSettings

__all__ = ["INSTANCE_LABEL", "KEY_LABEL", "OwnJobs"]

INSTANCE_LABEL: Final = "dispatcher-instance"
KEY_LABEL: Final = "dispatcher-key"

PAGE: Final = 500
"""Jobs asked for in one call; the API may give fewer [U: its most]."""

LISTED: Final = 60.0
"""Seconds for which a list of the region's jobs serves, while it names any that may go."""

LISTED_AGAIN: Final = 20.0
"""Seconds after a list in which no other is made where it named none."""

FRESH: Final = 180.0
"""Seconds after a list in which its count holds launches back. Only the worker that leads a target
lists; what others launch is refused by Cloud Run itself, for now, where the region is full."""

WAIT: Final = timedelta(seconds=10)
"""How long launches wait where the region is full, before they look again."""

UNKNOWN: Final = Recorded(ended=True, calls=2)
"""A key of another database, or of one that has forgotten it: nobody will read how it ended."""

MOST_DELETED: Final = 100
"""Jobs that one round removes: the budget of writes is less, but for large quotas."""


@dataclass(frozen=True, slots=True)
class _Over:
    """A job of ours whose execution has completed."""

    ended: datetime
    name: str
    key: str


class OwnJobs:
    """The jobs of one region that launches of ours have made. May be used by any thread."""

    def __init__(
        self,
        settings: CloudRunSettings,
        clients: Clients,
        meter: Meter,
        monotonic: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._clients = clients
        self._meter = meter
        self._monotonic = monotonic
        self._lock = Lock()
        self._instances: set[str] = set()
        self._held = 0
        """Jobs in the region, whoever made them, as far as is known."""

        self._any = True
        """Whether there may be some of ours."""

        self._over: list[_Over] = []
        self._listed = -math.inf

    def serve(self, instance: str) -> None:
        """Count the jobs of an installation among ours."""
        with self._lock:
            self._instances.add(instance)

    def take_place(self) -> None:
        """Take a place for a job that is about to be made.

        Raises:
            Unavailable: the region holds as many as it may, and nothing was called.
        """
        with self._lock:
            counted = self._monotonic() - self._listed < FRESH
            if counted and self._held >= self._settings.max_jobs:
                raise Unavailable(
                    f"the region {self._settings.region} holds {self._held:,} Cloud Run jobs and "
                    f"may hold {self._settings.max_jobs:,}: those that launches made for "
                    "themselves are removed as they end",
                    not_started=True,
                    retry_after=WAIT,
                )
            self._held += 1
            self._any = True

    def give_back(self) -> None:
        """Give back the place of a job that was not made, or is there no more."""
        with self._lock:
            self._held = max(0, self._held - 1)

    def make_room(
        self, before: datetime, recorded: Callable[[Sequence[str]], Mapping[str, Recorded]]
    ) -> int:
        """Delete those that ended before this, and where places are short also later ones.

        None is deleted of which it is still to be read how it ended; and for short places none of
        which a second call might still come. Makes no call where there are none of ours.

        Raises:
            Unavailable: ask again later.
        """
        with self._lock:
            nothing = not self._any or not self._instances
            age = self._monotonic() - self._listed
            soon = LISTED_AGAIN if self._is_short() and not self._over else LISTED
            wanted = age >= soon
        if nothing:
            return 0
        clients = self._ready()
        if wanted:
            self._list(clients)
        with self._lock:
            over, short = tuple(self._over), self._is_short()
        if not short:
            over = tuple(one for one in over if one.ended < before)
        if not over:
            return 0
        told = recorded([one.key for one in over])
        ended = [one for one in over if told.get(one.key, UNKNOWN).ended]
        old = [one for one in ended if one.ended < before]
        later = [one for one in ended if one.ended >= before]
        spare = [one for one in later if told.get(one.key, UNKNOWN).calls <= 1]
        removed = self._delete(clients, old)
        return removed + self._delete(clients, spare, while_short=True)

    def _is_short(self) -> bool:
        return self._held > self._settings.max_jobs // 2

    def _delete(
        self, clients: RunClients, over: Iterable[_Over], *, while_short: bool = False
    ) -> int:
        """Delete jobs; what the budget does not allow is left for the next time.

        Raises:
            Unavailable: a call did not work.
        """
        removed = 0
        for one in over:
            if removed == MOST_DELETED or (while_short and not self._is_short()):
                break
            try:
                with calling(self._meter, "write", f"cannot delete {one.name}", gentle=True):
                    clients.jobs.delete_job(
                        run_v2.DeleteJobRequest(name=one.name),
                        retry=None,
                        timeout=self._settings.call_timeout.total_seconds(),
                    )
                removed += 1
            except api.NotFound:
                pass
            except Unavailable as error:
                if error.not_started:
                    break
                raise
            self.give_back()
            with self._lock:
                self._over = [other for other in self._over if other is not one]
        return removed

    def _list(self, clients: RunClients) -> None:
        """Count the jobs of the region, and note those of ours that are over, oldest end first.

        Raises:
            Unavailable: it cannot be listed to the end now.
        """
        began, held, any_of_ours = self._monotonic(), 0, False
        over: list[_Over] = []
        for job in self._jobs(clients):
            held += 1
            if job.labels.get(INSTANCE_LABEL) in self._instances and KEY_LABEL in job.labels:
                any_of_ours = True
                ended = outcomes.moment(job.latest_created_execution, "completion_time")
                if ended:
                    over.append(_Over(ended, job.name, job.labels[KEY_LABEL]))
        with self._lock:
            self._held, self._any = held, any_of_ours
            self._over = sorted(over, key=lambda one: one.ended)
            self._listed = began

    def _jobs(self, clients: RunClients) -> Iterator[Any]:
        place = f"projects/{self._settings.project}/locations/{self._settings.region}"
        token = ""
        while True:
            asked = run_v2.ListJobsRequest(parent=place, page_size=PAGE, page_token=token)
            try:
                with calling(self._meter, "read", f"cannot list the jobs in {place}"):
                    pager = clients.jobs.list_jobs(
                        asked, retry=None, timeout=self._settings.call_timeout.total_seconds()
                    )
                    page = run_v2.ListJobsResponse.pb(next(iter(pager.pages)))
            except api.NotFound:
                return
            yield from page.jobs
            token = page.next_page_token
            if not token:
                return

    def _ready(self) -> RunClients:
        try:
            return self._clients.run()
        except CLIENT_ERRORS as error:
            raise at_read(error, "cannot speak to Cloud Run") from error
