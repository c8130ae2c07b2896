"""Everything that an installation needs, looked at once: what `dispatcher check` says.

Each finding says what is right or wrong and, where something is to be done, what. Nothing is
changed by looking.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, Literal, Protocol
from urllib.parse import parse_qs, urlsplit

from dispatcher import queries, schema
from dispatcher.backends.base import Backend, BackendError, Remark
from dispatcher.backends.registry import make_backend
from dispatcher.config import Config, Settings, Target, load_config, load_settings
from dispatcher.counting import counted
from dispatcher.enqueueing import scheduled
from dispatcher.errors import (
    ConfigurationError,
    DispatcherError,
    InvalidInput,
    SchemaMismatch,
    Unreachable,
)
from dispatcher.items import is_uri
from dispatcher.job import Job
from dispatcher.moments import ago, ahead, span
from dispatcher.queries import FiringView, TargetView, WorkerView
from dispatcher.redaction import mask_url
from dispatcher.schedule import FIRST_SEEN, MISSED, Schedule, next_due
from dispatcher.storage import Storage
from dispatcher.store import Store
from dispatcher.storing import signs_results, signs_too_long, storage_need

__all__ = ["Finding", "Told", "check_all", "check_worker", "exit_code", "read_revision"]

BROKER_TIMEOUT: Final = 5.0
LED_ELSEWHERE: Final = " is led by "
"""Part of what a worker says of a target that another one leads, which is no problem."""


class Told(Protocol):
    """What the command line was told."""

    @property
    def database_url(self) -> str | None:
        """Over the settings' own."""
        ...

    @property
    def jobs(self) -> str | None:
        """Over the settings' own."""
        ...


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the check."""

    name: str
    """What was looked at: settings, database, broker, storage, jobs, job NAME, schedule NAME,
    workers, target NAME."""

    level: Literal["ok", "warn", "fail"]
    text: str
    todo: str | None = None
    unreachable: bool = False
    """Whether a server did not answer."""


def exit_code(findings: Iterable[Finding]) -> int:
    """Give 0 if nothing failed, 4 if a server did not answer, else 1."""
    failed = [finding for finding in findings if finding.level == "fail"]
    if any(finding.unreachable for finding in failed):
        return 4
    return 1 if failed else 0


def check_all(told: Told) -> Iterator[Finding]:
    """Look at the settings, the servers, the jobs file, each job and schedule, and who serves."""
    try:
        settings = load_settings(database_url=told.database_url, jobs=told.jobs)
    except ConfigurationError as error:
        yield Finding("settings", "fail", str(error), "mend them and check again")
        return
    yield Finding("settings", "ok", f"events will name {settings.actor}")
    store = Store(schema.create_engine(settings.database_url, pool_size=2), actor=settings.actor)
    try:
        database = _database(settings)
        yield database
        yield _broker(settings)
        stored = _storage(settings)
        yield stored
        config = None
        reached: set[str] = set()
        if settings.jobs is None:
            text = "DISPATCHER_JOBS is not set: enqueueing by name and workers need it"
            yield Finding("jobs", "warn", text, "set it to a YAML file or a Python module")
        else:
            try:
                config = load_config(settings.jobs)
            except ConfigurationError as error:
                yield Finding("jobs", "fail", str(error), "mend the file and check again")
        rows = queries.targets(store) if database.level != "fail" else {}
        if config is not None:
            jobs, targets = counted(len(config.jobs), "job"), counted(len(config.targets), "target")
            text = f"{jobs} on {targets} in {config.source}"
            yield Finding("jobs", "ok", text)
            # Of one that cannot be used at all it was said above; jobs are looked at beside it.
            yield from _jobs(
                config,
                rows,
                settings.storage_url,
                reached,
                usable=settings.storage_url is not None and stored.level == "ok",
            )
        workers = queries.workers(store) if database.level != "fail" else []
        if config is not None:
            fired = {}
            if database.level != "fail":
                fired = queries.last_firings(store, config.schedules)
            yield from _schedules(config, fired, workers)
        if database.level != "fail":
            yield from _service(workers, rows, config, reached, settings.lease)
    finally:
        store.engine.dispose()


def check_worker(told: Told) -> Iterator[Finding]:
    """Look whether a worker on this host is alive: for the health check of a container."""
    try:
        settings = load_settings(database_url=told.database_url, jobs=told.jobs)
    except ConfigurationError as error:
        yield Finding("settings", "fail", str(error), "mend them and check again")
        return
    database = _database(settings)
    if database.level == "fail":
        yield database
        return
    store = Store(schema.create_engine(settings.database_url, pool_size=1), actor=settings.actor)
    host = socket.gethostname()
    try:
        here = [worker for worker in queries.workers(store) if worker.host == host]
    finally:
        store.engine.dispose()
    alive = [worker for worker in here if worker.alive]
    if alive:
        yield Finding("worker", "ok", f"{alive[0].id} is alive")
    else:
        text = f"no worker on host {host} has been alive for {queries.SILENT} s"
        yield Finding("worker", "fail", text, "start it again")


def read_revision(url: str) -> str | None:
    """Read the revision of a database; None where nothing was ever migrated.

    Raises:
        Unreachable: the database does not answer.
    """
    store = Store(schema.create_engine(url, pool_size=1), actor="check")
    try:
        with store.transaction() as tx:
            return schema.revision(tx)
    finally:
        store.engine.dispose()


def _database(settings: Settings) -> Finding:
    place = mask_url(settings.database_url)
    store = Store(schema.create_engine(settings.database_url, pool_size=1), actor=settings.actor)
    try:
        with store.transaction() as tx:
            found = schema.revision(tx)
            schema.check(tx)
    except Unreachable as error:
        todo = "start Postgres, or mend DISPATCHER_DATABASE_URL"
        return Finding("database", "fail", str(error), todo, unreachable=True)
    except SchemaMismatch as error:
        return Finding("database", "fail", str(error))
    finally:
        store.engine.dispose()
    ahead = "" if found == schema.REVISION else f", newer than this code's {schema.REVISION}"
    return Finding("database", "ok", f"{place} answers, at revision {found}{ahead}")


def _broker(settings: Settings) -> Finding:
    url = settings.broker_url
    if url is None:
        text = "DISPATCHER_BROKER_URL is not set: workers find new batches a second or two later"
        return Finding("broker", "warn", text, "set it to wake them at once")
    place = mask_url(url)
    scheme = urlsplit(url).scheme
    if not scheme.startswith("redis"):
        return Finding("broker", "ok", f"{place} has no server to ask")
    problem = _ping(url)
    if problem is not None:
        text = f"cannot reach the broker at {place}: {problem}"
        todo = "start it, or mend DISPATCHER_BROKER_URL; batches run meanwhile, a second later"
        return Finding("broker", "fail", text, todo, unreachable=True)
    return Finding("broker", "ok", f"{place} answers")


def _storage(settings: Settings) -> Finding:
    """Write, read and remove something in the storage."""
    url = settings.storage_url
    if url is None:
        text = "DISPATCHER_STORAGE_URL is not set, which is fine for local targets"
        todo = "others need it for large inputs and for receipts"
        return Finding("storage", "ok", f"{text}; {todo}")
    todo = "mend DISPATCHER_STORAGE_URL, or what the credentials of this machine may do there"
    try:
        Storage(url).check()
    except Unreachable as error:
        return Finding("storage", "fail", str(error), todo, unreachable=True)
    except DispatcherError as error:
        return Finding("storage", "fail", str(error), todo)
    return Finding("storage", "ok", f"{url} can be written, create-only, and read")


def _ping(url: str) -> str | None:
    """Ask a Redis or Valkey at a broker's URL, which for a socket is written in Celery's way."""
    import redis  # noqa: PLC0415 - a third of a second, which no other command should wait for

    parts = urlsplit(url)
    try:
        if parts.scheme == "redis+socket":
            database = parse_qs(parts.query).get("virtual_host", ["0"])[0].strip("/")
            client = redis.Redis(
                unix_socket_path=parts.path,
                db=int(database or 0),
                password=parts.password,
                socket_timeout=BROKER_TIMEOUT,
                socket_connect_timeout=BROKER_TIMEOUT,
            )
        else:
            client = redis.Redis.from_url(
                url, socket_timeout=BROKER_TIMEOUT, socket_connect_timeout=BROKER_TIMEOUT
            )
        try:
            client.ping()
        finally:
            client.close()
    except (redis.RedisError, OSError, ValueError) as error:
        return str(error)
    return None


def _jobs(
    config: Config,
    rows: dict[str, TargetView],
    storage_url: str | None,
    reached: set[str],
    *,
    usable: bool,
) -> Iterator[Finding]:
    """Ask each job's backend whether it could run, and whether its tasks reach the storage.

    The targets that answered are added to `reached`.
    """
    backends = {name: make_backend(target) for name, target in config.targets.items()}
    signing: list[Remark] | None = None
    for job in config.jobs.values():
        backend = backends[job.target]
        name = f"job {job.name}"
        elsewhere = _elsewhere(backend, rows.get(job.target))
        if elsewhere is not None:
            text = f"not looked at: only host {elsewhere} can serve target {job.target}"
            yield Finding(name, "warn", text, "run this check there too")
            continue
        try:
            options = backend.Options.model_validate(job.options)
            remarks = backend.check(job, options)
        except BackendError as error:
            text = f"target {job.target} cannot be asked: {error}"
            yield Finding(name, "fail", text, unreachable=True)
            continue
        if all(remark.level != "fail" for remark in remarks):  # some fail before anything is asked
            reached.add(job.target)
        remarks = [*remarks, *_stored(job, config.targets[job.target], backend, storage_url)]
        if usable and signs_results(job):
            if signing is None:  # once for all jobs: the storage is the same
                signing = list(_signing(storage_url or ""))
            remarks = [*remarks, *signing]
        for remark in remarks:
            what = remark.todo
            if what is None and remark.level != "ok":
                what = f"mend the job in {config.source}"
            yield Finding(name, remark.level, remark.text, what)
        if all(remark.level == "ok" for remark in remarks):
            yield Finding(name, "ok", f"can run on target {job.target}")


def _stored(
    job: Job, target: Target, backend: Backend, storage_url: str | None
) -> Iterator[Remark]:
    """Say what the tasks of a job would miss of the storage, as far as settings tell."""
    own = backend.limits.own_results
    need = storage_need(job, claims=storage_url is not None and not backend.limits.relaunch_safe)
    too_long = signs_too_long(job)
    if too_long is not None:
        yield Remark("fail", too_long)
    if storage_url is None:
        if job.receipt == "required" and not own:
            text = f"requires receipts, and tasks on target {job.target} have nowhere to write them"
            todo = "set DISPATCHER_STORAGE_URL, to a place that the containers can write"
            yield Remark("fail", text, todo)
        elif need is not None and not own:
            text = f"{need}, and there is no storage"
            yield Remark("warn", text, "set DISPATCHER_STORAGE_URL, to a place that they can reach")
        elif _packs(job, backend):
            text = (
                f"an input of more than {backend.limits.inline_bytes:,} bytes an execution is "
                "rejected, as there is no storage"
            )
            todo = "set DISPATCHER_STORAGE_URL, unless the inputs of all packs are small"
            yield Remark("warn", text, todo)
        return
    emulated = bool(getattr(target.settings, "insecure", False))
    if storage_url.startswith("file:") and backend.home() is None and not emulated:
        if need is None and job.receipt == "ignored":
            return
        what = need or "may write receipts"
        yield Remark(
            "warn",
            f"{what}, and the storage is the directory {storage_url} of this machine: the tasks of "
            f"target {job.target} run elsewhere and cannot reach it",
            "set DISPATCHER_STORAGE_URL to a bucket, s3:// or gs://; leave it only if the tasks "
            "have the same directory mounted at the same path",
        )


def _packs(job: Job, backend: Backend) -> bool:
    """Whether executions of a job get a document with the inputs of all their chunks."""
    return (job.options.get("max_tasks") or 1) > 1 and not backend.limits.per_task_env


def _signing(storage_url: str) -> Iterator[Remark]:
    """Sign URLs of a probe and use them, as tasks would."""
    try:
        Storage(storage_url).check_signing()
    except DispatcherError as error:
        todo = (
            "set this machine's clock; on Google Cloud grant iam.serviceAccounts.signBlob on the "
            "workers' own account; or do without options.signed_urls"
        )
        yield Remark("fail", f"gives its tasks signed URLs, and these do not work: {error}", todo)


def _elsewhere(backend: Backend, row: TargetView | None) -> str | None:
    """Name the only host that can serve a target, if that is another one than this."""
    home = backend.home()
    if home is None or row is None or row.home is None:
        return None
    theirs = row.home.get("host")
    return None if theirs == home.get("host") else theirs


def _schedules(
    config: Config, fired: dict[str, FiringView], workers: list[WorkerView]
) -> Iterator[Finding]:
    """Say what became of the last due time of each schedule, and whether the next could fire."""
    now = datetime.now(UTC)
    alive = [worker for worker in workers if worker.alive]
    elsewhere = bool(alive) and all(worker.host != socket.gethostname() for worker in alive)
    for schedule in config.schedules.values():
        name, todo = f"schedule {schedule.name}", f"mend the schedule in {config.source}"
        told, made_one = _last_firing(schedule, fired.get(schedule.name), now)
        try:
            with scheduled(config.job(schedule.job), schedule, now):
                pass  # made, and not written
        except InvalidInput as error:
            text = f"cannot be fired: {error}; {told}"
            if elsewhere:  # a path may well be one of theirs
                todo += ", unless the workers' hosts, which are others, have what is missing here"
            elif schedule.items is not None and not is_uri(schedule.items):
                todo += "; a relative path starts at the working directory of the workers"
            yield Finding(name, "warn" if elsewhere else "fail", text, todo)
            continue
        if made_one:
            yield Finding(name, "ok", told)
        else:
            later = "what is wrong was looked for here and not found: see that the next one fires"
            yield Finding(name, "warn", told, later)


def _last_firing(schedule: Schedule, last: FiringView | None, now: datetime) -> tuple[str, bool]:
    """Tell of the last due time and the next, and whether all is as the schedule says."""
    due = next_due(schedule, now)
    then = "never due again" if due is None else f"next due {ahead(due, now)}"
    if last is None:
        return f"no worker has met it yet; {then}", True
    when = ago(last.due_at, now)
    if last.batch_id is not None:
        return f"last due {when}: batch {last.batch_id}; {then}", True
    reason = last.reason or "no reason was recorded"
    if reason == FIRST_SEEN:
        return f"not due yet since workers met it {when}; {then}", True
    return f"last due {when}, and no batch: {reason}; {then}", reason.startswith(MISSED)


def _service(
    workers: list[WorkerView],
    rows: dict[str, TargetView],
    config: Config | None,
    reached: set[str],
    lease: timedelta,
) -> Iterator[Finding]:
    """Say who is alive, and which targets nobody serves; `reached` are those that answered here."""
    alive = [worker for worker in workers if worker.alive]
    if not alive:
        text = f"none has been alive for {queries.SILENT} s: nothing moves"
        todo = "start one, as the Procfile says, or all of it with `dispatcher standalone`"
        yield Finding("workers", "fail", text, todo)
        return
    silent = [worker for worker in alive if worker.silence > lease]
    names = ", ".join(
        worker.id + (f" (not heard of for {span(worker.silence)})" if worker in silent else "")
        for worker in alive
    )
    if len(silent) == len(alive):
        todo = "see whether they are stopped, paused or overloaded, and start them again if so"
        yield Finding("workers", "warn", f"{len(alive)} may be alive: {names}", todo)
    else:
        yield Finding("workers", "ok", f"{len(alive)} alive: {names}")
    for name in rows if config is None else config.targets:
        yield _served(name, rows.get(name), alive, reached=name in reached)


def _served(
    name: str, row: TargetView | None, alive: list[WorkerView], *, reached: bool
) -> Finding:
    """Say who serves a target, and whether it answers."""
    label = f"target {name}"
    if row is None or not row.leased:
        lost = None if row is None else queries.silent_leader(row, alive)
        if lost is not None:
            text = (
                f"nobody serves it now: its worker {lost.id} has not been heard of for "
                f"{span(lost.silence)}, and its lease has run out"
            )
            todo = (
                "another worker that has it in its jobs file takes it over within seconds; if "
                f"there is none, see whether {lost.id} is stopped, paused or overloaded"
            )
            return Finding(label, "fail", text, todo)
        problems = {
            worker.problems[name]
            for worker in alive
            if name in worker.problems and LED_ELSEWHERE not in worker.problems[name]
        }
        why = "; ".join(sorted(problems)) or "no worker that is alive has it in its jobs file"
        todo = "give the workers the same DISPATCHER_JOBS, and restart them"
        return Finding(label, "fail", f"nobody serves it: {why}", todo)
    if row.down_since is None:
        return Finding(label, "ok", f"is led by {row.lease_owner}")
    since = f"since {row.down_since:%Y-%m-%d %H:%M:%SZ}: {row.down_reason}"
    if reached:
        text = f"answers this check; the workers have had no answer {since}"
        return Finding(label, "warn", text, "they say so until their next call there is answered")
    return Finding(label, "fail", f"does not answer {since}", unreachable=True)
