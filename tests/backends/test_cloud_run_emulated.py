"""Cloud Run as it is spoken to: lost replies, lagging lists, quotas, refusals, `apply`."""

from __future__ import annotations

import json
import math
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
from typer.testing import CliRunner
from waiting import until

from dispatcher.backends.base import (
    UNMETERED,
    Definable,
    Handle,
    LaunchRequest,
    Meter,
    Phase,
    Recorded,
    Rejected,
    Report,
    TaskInput,
    Unavailable,
)
from dispatcher.backends.cloud_run import CloudRunBackend, CloudRunOptions, CloudRunSettings
from dispatcher.cli import app
from dispatcher.emulators.cloud_run import CloudRunEmulator, TaskEnd, TaskStart
from dispatcher.emulators.cloud_run.faults import (
    Reply,
    kill_tasks,
    lose_reply,
    outage,
    refuse,
    stale_lists,
)
from dispatcher.emulators.cloud_run.options import EmulatorOptions
from dispatcher.emulators.cloud_run.scripted import ScriptRunner
from dispatcher.job import Job
from dispatcher.states import Outcome

PROJECT, REGION = "project-1", "europe-west1"
LONG = 600.0
RUN, LIST, GET = "Jobs.RunJob", "Executions.ListExecutions", "Executions.GetExecution"
TASKS = "Tasks.ListTasks"


class Clock:
    """A monotonic clock that a test moves on, and can stop."""

    def __init__(self) -> None:
        self.ahead = 0.0
        self.stopped_at: float | None = None

    def __call__(self) -> float:
        shows = time.monotonic() if self.stopped_at is None else self.stopped_at
        return shows + self.ahead

    def stop(self) -> None:
        """Show only what the test adds from now on, however long its own steps take."""
        self.stopped_at = time.monotonic()


class CountingMeter:
    """Counts what was asked for, and refuses when told to."""

    def __init__(self, allowed: int | None = None) -> None:
        self.taken: Counter[str] = Counter()
        self.told: Counter[str] = Counter()
        self.allowed = allowed

    def take(
        self, kind: Literal["read", "write", "logs"], calls: int = 1, *, gentle: bool = False
    ) -> None:
        del gentle
        if self.allowed is not None and self.taken[kind] >= self.allowed:
            raise Unavailable("the budget is used up", not_started=True)
        self.taken[kind] += calls

    def throttled(self, kind: Literal["read", "write", "logs"]) -> None:
        self.told[kind] += 1


class Cloud:
    """An emulator with one job, whose tasks do as the test says."""

    def __init__(self, options: EmulatorOptions | None = None) -> None:
        self.script: Callable[[TaskStart], TaskEnd | float | None] = lambda _start: None
        self.emulator = CloudRunEmulator(script=self._behave, options=options)
        self.clock = Clock()

    def _behave(self, start: TaskStart) -> TaskEnd | float | None:
        return self.script(start)

    def backend(self, meter: Meter = UNMETERED, **given: Any) -> CloudRunBackend:
        settings = {
            "project": PROJECT,
            "region": REGION,
            "endpoint": self.emulator.grpc_address,
            "insecure": True,
            # It is of the machine's time: one that passes is to be of a call that nobody answers.
            "call_timeout": "60s",
            **given,
        }
        if settings.get("transport") == "rest":
            settings["endpoint"] = self.emulator.rest_url
        made = CloudRunSettings.model_validate(settings)
        return CloudRunBackend("cloud", made, meter, monotonic=self.clock)

    @staticmethod
    def knows_the_job(backend: CloudRunBackend) -> bool:
        """Have it read the job, where that can be done in time."""
        try:
            backend.definition(CloudRunOptions(job="etl"))
        except Unavailable:
            return False
        return True

    @property
    def calls(self) -> Counter[str]:
        return Counter(self.emulator.calls)


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    made = Cloud()
    with made.emulator as emulator:
        emulator.world.define(PROJECT, REGION, "etl", container="main")
        yield made


def request(tasks: int = 1, key: str | None = None, **given: Any) -> LaunchRequest:
    options = {"job": "etl", "max_tasks": 10_000, **given.pop("options", {})}
    made: dict[str, Any] = {
        "key": key or f"d-b-{uuid.uuid4().hex[:8]}",
        "instance": "inst1",
        "batch_id": "b",
        "job": "etl",
        "command": (),
        "tasks": tuple(TaskInput(index, index, 1, "[]") for index in range(tasks)),
        "options": CloudRunOptions.model_validate(options),
        "timeout": timedelta(minutes=5),
        "parallelism": tasks,
        "intended_at": datetime.now(UTC),
        **given,
    }
    return LaunchRequest(**made)


def ended(backend: CloudRunBackend, handle: Handle) -> Report:
    def probe() -> Report | None:
        report = backend.poll([handle]).get(handle)
        return report if report is not None and report.phase is Phase.ENDED else None

    found: Report = until(probe, f"{handle} ended")
    return found


# --- launch and find ------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["grpc", "rest"])
def test_a_launch_is_one_call_and_links_to_no_console_that_does_not_have_it(
    cloud: Cloud, transport: str
) -> None:
    cloud.script = lambda _start: LONG
    backend = cloud.backend(transport=transport)
    launched = backend.launch(request(3))
    assert launched.handle.startswith(f"projects/{PROJECT}/locations/{REGION}/jobs/etl/executions/")
    assert (launched.console_url, launched.logs_url) == (None, None)
    assert cloud.calls == {"Jobs.GetJob": 1, RUN: 1}
    backend.launch(request(2))
    assert cloud.calls == {"Jobs.GetJob": 1, RUN: 2}, "the job is looked at every five minutes"


@pytest.mark.parametrize("transport", ["grpc", "rest"])
@pytest.mark.parametrize("reply", [Reply.UNAVAILABLE, Reply.DROP, Reply.NEVER])
def test_a_lost_reply_is_open_and_the_execution_is_found_by_its_key(
    cloud: Cloud, transport: str, reply: Reply
) -> None:
    cloud.emulator.faults.add(lose_reply(RUN, reply))
    given: dict[str, Any] = {"call_timeout": "2s"} if reply is Reply.NEVER else {}
    backend = cloud.backend(transport=transport, **given)
    until(lambda: cloud.knows_the_job(backend), "connected: the launch has its time for itself")
    made = request(2)
    with pytest.raises(Unavailable) as caught:
        backend.launch(made)
    assert not caught.value.not_started
    found = cloud.backend(transport=transport).find(made)
    assert found is not None
    (execution,) = cloud.emulator.world.executed
    assert (found.handle, found.key) == (execution.name, made.key)
    assert cloud.calls[RUN] == 1, "nobody retried"


@pytest.mark.parametrize("transport", ["grpc", "rest"])
def test_too_many_launches_are_a_clear_not_now(cloud: Cloud, transport: str) -> None:
    cloud.emulator.faults.add(refuse(RUN, code="RESOURCE_EXHAUSTED"))
    with pytest.raises(Unavailable) as caught:
        cloud.backend(transport=transport).launch(request())
    assert caught.value.not_started
    assert cloud.emulator.world.executed == []


def test_refusals_are_rejected_with_the_providers_words(cloud: Cloud) -> None:
    backend = cloud.backend()
    with pytest.raises(Rejected, match=r"404 .*other.*options\.job"):
        backend.launch(request(options={"job": "other"}))
    with pytest.raises(Rejected, match="7d"):
        backend.launch(request(timeout=timedelta(hours=170)))
    with pytest.raises(Rejected, match="override an entrypoint"):
        backend.launch(request(command=("sh",)))
    cloud.emulator.world.permissions = frozenset({"run.jobs.run", "run.jobs.get"})
    with pytest.raises(Rejected, match=r"403 .*roles/run.jobsExecutorWithOverrides"):
        backend.launch(request())
    cloud.emulator.world.permissions = None
    cloud.emulator.world.authenticated = False
    cloud.clock.ahead += 60  # what was refused of the job holds for a moment
    with pytest.raises(Rejected, match=r"401 .*credentials"):
        backend.launch(request())
    assert cloud.emulator.world.executed == []


def test_an_endpoint_that_nobody_serves_leaves_a_launch_open(cloud: Cloud, nobody: str) -> None:
    for transport in ("grpc", "rest"):
        backend = cloud.backend(transport=transport)
        dead = replace(request())
        settings = backend.settings.model_copy(update={"endpoint": nobody})
        unserved = CloudRunBackend("cloud", settings)
        with pytest.raises(Unavailable):
            unserved.launch(dead)
        with pytest.raises(Unavailable):
            unserved.poll([f"projects/{PROJECT}/locations/{REGION}/jobs/etl/executions/a"])
        with pytest.raises(Unavailable):
            unserved.find(dead)


def test_missing_credentials_are_a_refusal_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    backend = CloudRunBackend("cloud", CloudRunSettings(project=PROJECT, region=REGION))
    with pytest.raises(Rejected, match="give the workers credentials"):
        backend.launch(request())
    with pytest.raises(Unavailable, match="give the workers credentials"):
        backend.poll([f"projects/{PROJECT}/locations/{REGION}/jobs/etl/executions/a"])
    job = Job(name="etl", target="cloud")
    assert "credentials" in backend.check(job, CloudRunOptions(job="etl"))[-1].text


def test_a_launch_goes_on_if_the_job_cannot_be_looked_at_now(cloud: Cloud) -> None:
    cloud.emulator.faults.add(refuse("Jobs.GetJob"))
    assert cloud.backend().launch(request()).handle
    assert cloud.backend(CountingMeter(allowed=0)).launch(request()).handle


def test_fewer_tasks_than_the_jobs_parallelism_are_refused_before_the_call(cloud: Cloud) -> None:
    cloud.emulator.world.define(PROJECT, REGION, "etl", parallelism=3, task_count=3)
    with pytest.raises(Rejected, match="has parallelism 3 and this execution has 2 tasks"):
        cloud.backend().launch(request(2))
    assert cloud.calls[RUN] == 0
    assert cloud.backend().launch(request(3)).handle


class Turnstile(CountingMeter):
    """Holds what is to be paid for until the test opens it."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.open = threading.Event(), threading.Event()

    def take(
        self, kind: Literal["read", "write", "logs"], calls: int = 1, *, gentle: bool = False
    ) -> None:
        self.reached.set()
        assert self.open.wait(60)
        super().take(kind, calls, gentle=gentle)


@pytest.mark.parametrize(("known", "listings"), [(True, 1), (False, 2)])
def test_finds_at_the_same_time_share_a_listing(
    cloud: Cloud, *, known: bool, listings: int
) -> None:
    """Who asks while a listing is under way takes what it shows, or waits for the next one."""
    asked = [request() for _ in range(8)]
    if known:
        launched = list(map(cloud.backend().launch, asked))
    turnstile = Turnstile()
    backend, before = cloud.backend(turnstile), cloud.calls
    with ThreadPoolExecutor(8) as pool:
        try:
            first = pool.submit(backend.find, asked[0])
            assert turnstile.reached.wait(60)
            (listing,) = backend._reader._listings.values()
            others = [pool.submit(backend.find, one) for one in asked[1:]]
            until(lambda: len(listing.wanted) == 7, "the others wait for the first one's listing")
        finally:
            turnstile.open.set()
        found = [one.result() for one in (first, *others)]
    assert found == (launched if known else [None] * 8)
    assert cloud.calls - before == {LIST: listings}


def test_a_key_is_called_missing_only_by_a_listing_begun_after_the_question(cloud: Cloud) -> None:
    cloud.emulator.faults.add(stale_lists(3600))
    backend = cloud.backend()
    made = request()
    other = cloud.backend().launch(made)
    assert backend.find(made) is None, "the list lags"
    cloud.emulator.world.advance(3601)
    found = backend.find(made)
    assert found is not None
    assert found.handle == other.handle


def test_a_listing_for_a_key_goes_no_further_than_it_can_be() -> None:
    made = Cloud(EmulatorOptions(page_size=5))
    with made.emulator as emulator:
        emulator.world.define(PROJECT, REGION, "etl")
        backend = made.backend()
        for _ in range(20):
            backend.launch(request())
        emulator.world.advance(3600)
        young = datetime.now(UTC) + timedelta(hours=1)
        for _ in range(3):
            backend.launch(request())
        assert made.backend().find(request(intended_at=young)) is None
        assert made.calls[LIST] == 1
        assert made.backend().find(request(intended_at=None)) is None
        assert made.calls[LIST] == 6, "without a time it goes to the end"


# --- poll -----------------------------------------------------------------------------------------


def test_one_list_tells_of_a_page_of_executions(cloud: Cloud) -> None:
    cloud.script = lambda _start: LONG
    backend = cloud.backend()
    handles = [backend.launch(request()).handle for _ in range(100)]
    until(lambda: len(cloud.emulator.world.starts) == 100, "all run")
    before = cloud.calls
    reports = backend.poll(handles)
    assert {reports[handle].phase for handle in handles} == {Phase.RUNNING}
    assert cloud.calls - before == {LIST: 1}


def test_pages_that_are_polled_at_the_same_time_share_a_list(cloud: Cloud) -> None:
    cloud.script = lambda _start: LONG
    backend = cloud.backend()
    handles = [backend.launch(request()).handle for _ in range(300)]
    cloud.clock.stop()
    before = cloud.calls
    with ThreadPoolExecutor(3) as pool:
        pages = list(pool.map(backend.poll, [handles[at::3] for at in range(3)]))
    assert sum(len(page) for page in pages) == 300
    assert (cloud.calls - before)[LIST] <= 4


def test_a_list_that_lags_costs_no_look_ups_and_says_nothing(cloud: Cloud) -> None:
    cloud.script = lambda _start: LONG
    cloud.emulator.faults.add(stale_lists(3600))
    backend = cloud.backend()
    handles = [backend.launch(request()).handle for _ in range(20)]
    until(lambda: len(cloud.emulator.world.starts) == 20, "all run")
    cloud.clock.stop()
    for _ in range(3):
        cloud.clock.ahead += 3
        assert backend.poll(handles) == {}
    assert cloud.calls[GET] == 0
    cloud.clock.ahead += 6
    reports = backend.poll(handles)
    assert {report.phase for report in reports.values()} == {Phase.RUNNING}
    assert cloud.calls[GET] == 20, "then each is asked for by name"


def test_what_the_list_no_longer_shows_is_asked_for_by_name_and_absent(cloud: Cloud) -> None:
    cloud.script = lambda _start: LONG
    backend = cloud.backend()
    handles = [backend.launch(request()).handle for _ in range(5)]
    until(lambda: len(cloud.emulator.world.starts) == 5, "all run")
    backend.poll(handles)
    cloud.emulator.world.forget(handles[0])
    cloud.clock.ahead += 1  # a list of half a second ago may serve
    reports = backend.poll(handles)
    assert reports[handles[0]] == Report(Phase.ABSENT)
    assert {reports[handle].phase for handle in handles[1:]} == {Phase.RUNNING}


def test_an_error_while_polling_is_never_an_outcome(cloud: Cloud) -> None:
    cloud.script = lambda _start: LONG
    backend = cloud.backend()
    handles = [backend.launch(request()).handle for _ in range(3)]
    with cloud.emulator.faults.during(outage()):
        with pytest.raises(Unavailable):
            backend.poll(handles)
        with pytest.raises(Unavailable):
            backend.poll(handles[:1])
        with pytest.raises(Unavailable):
            backend.cancel(handles[0])
        with pytest.raises(Unavailable):
            list(backend.strays("inst1", datetime.now(UTC) - timedelta(hours=1)))
    assert len(backend.poll(handles)) == 3


def test_the_error_of_one_job_hides_no_report_of_another(cloud: Cloud) -> None:
    cloud.script = lambda _start: LONG
    cloud.emulator.world.define(PROJECT, REGION, "other")
    backend = cloud.backend()
    mine = [backend.launch(request()).handle for _ in range(2)]
    theirs = [backend.launch(request(options={"job": "other"})).handle for _ in range(2)]
    cloud.emulator.faults.add(refuse(LIST, skip=1, times=1))
    reports = backend.poll([*mine, *theirs])
    assert set(reports) == set(mine)


def test_throttled_reads_are_told_to_the_meter(cloud: Cloud) -> None:
    meter = CountingMeter()
    backend = cloud.backend(meter)
    handle = backend.launch(request()).handle
    cloud.emulator.faults.add(refuse(GET, code="RESOURCE_EXHAUSTED"))
    with pytest.raises(Unavailable):
        backend.poll([handle])
    assert meter.told == {"read": 1}


@pytest.mark.parametrize("transport", ["grpc", "rest"])
def test_every_call_but_launches_is_paid_for_before(cloud: Cloud, transport: str) -> None:
    meter = CountingMeter()
    backend = cloud.backend(meter, transport=transport)
    cloud.script = lambda start: TaskEnd(seconds=LONG if start.index else 0.0, lines=("x",))
    one, two = (backend.launch(request(3)).handle for _ in range(2))
    until(lambda: len(backend.poll([one, two])[one].tasks) == 1, "one ended")
    backend.find(request())
    list(backend.strays("inst1", datetime.now(UTC) - timedelta(hours=1)))
    backend.cancel(one)
    list(backend.logs(one, 0, 3))
    backend.make_room(datetime.now(UTC), lambda _: {})
    backend.definition(CloudRunOptions(job="etl"))
    calls = cloud.calls
    reads = sum(calls[name] for name in (LIST, GET, TASKS, "Jobs.GetJob", "Jobs.ListJobs"))
    assert meter.taken == {
        "read": reads,
        "write": calls["Executions.CancelExecution"],
        "logs": calls["LoggingServiceV2.ListLogEntries"],
    }


def test_without_a_budget_nothing_is_called(cloud: Cloud) -> None:
    handle = cloud.backend().launch(request()).handle
    before = cloud.calls
    backend = cloud.backend(CountingMeter(allowed=0))
    for call in (
        lambda: backend.poll([handle]),
        lambda: backend.poll([handle, handle + "x"]),
        lambda: backend.cancel(handle),
        lambda: list(backend.logs(handle, 0, 1)),
        lambda: backend.find(request()),
        lambda: backend.strays("inst1", datetime.now(UTC)),
    ):
        with pytest.raises(Unavailable, match="budget"):
            call()
    assert cloud.calls == before


def test_tasks_are_listed_when_more_have_ended_and_not_too_often(cloud: Cloud) -> None:
    ends = {0: 0.0, 1: 200.0}
    cloud.script = lambda start: ends.get(start.index, LONG)
    cloud.clock.stop()
    backend = cloud.backend()
    handle = backend.launch(request(3)).handle
    until(lambda: len(backend.poll([handle])[handle].tasks) == 1, "the first has ended")
    assert cloud.calls[TASKS] == 1
    cloud.emulator.world.advance(200)
    until(lambda: cloud.emulator.world.executed[0].succeeded == 2, "the second has ended")
    for _ in range(5):
        assert len(backend.poll([handle])[handle].tasks) == 1
    assert cloud.calls[TASKS] == 1, "within 30 s no second list"
    cloud.clock.ahead += 31
    assert len(backend.poll([handle])[handle].tasks) == 2
    for _ in range(5):
        cloud.clock.ahead += 31
        backend.poll([handle])
    assert cloud.calls[TASKS] == 2, "and none while nothing more has ended"
    backend.cancel(handle)
    report = ended(backend, handle)
    assert [task.outcome for task in report.tasks] == [
        Outcome.SUCCEEDED,
        Outcome.SUCCEEDED,
        Outcome.CANCELLED,
    ]


def test_of_single_tasks_that_succeed_no_task_is_listed(cloud: Cloud) -> None:
    backend = cloud.backend()
    (task,) = ended(backend, backend.launch(request()).handle).tasks
    assert (task.outcome, task.exit_code) == (Outcome.SUCCEEDED, 0)
    assert task.started_at is not None
    assert task.ended_at is not None
    assert cloud.calls[TASKS] == 0


def test_what_has_ended_is_not_asked_for_again(cloud: Cloud) -> None:
    cloud.script = lambda _start: TaskEnd(exit_code=4)
    backend = cloud.backend()
    handle = backend.launch(request(2)).handle
    report = ended(backend, handle)
    before = cloud.calls
    assert backend.poll([handle])[handle] is report
    assert cloud.calls == before


def test_a_long_list_of_tasks_is_read_within_the_budget_and_gone_on_with() -> None:
    made = Cloud(EmulatorOptions(page_size=10))
    with made.emulator as emulator:
        emulator.world.define(PROJECT, REGION, "etl")
        made.script = lambda start: TaskEnd(exit_code=start.index % 2)
        meter = CountingMeter()
        backend = made.backend(meter)
        handle = backend.launch(request(200)).handle
        until(lambda: emulator.world.executed[0].done, "all ended")
        known = []
        while True:
            meter.taken.clear()
            meter.allowed = 6
            report = backend.poll([handle])[handle]
            known.append(len(report.tasks))
            if report.phase is Phase.ENDED:
                break
            assert report.phase is Phase.RUNNING
        assert known == [50, 100, 150, 200]
        assert [task.exit_code for task in report.tasks] == [0, 1] * 100
        assert made.calls[TASKS] == 20


def test_ten_thousand_tasks_are_one_launch_and_few_reads(cloud: Cloud) -> None:
    """Half of them end while the others run."""
    cloud.script = lambda start: TaskEnd(
        seconds=200.0 * (start.index % 2), exit_code=int(start.index % 100 == 7)
    )
    cloud.clock.stop()
    backend = cloud.backend()
    launched = backend.launch(request(10_000, input_uri="gs://b/i.jsonl"))
    (execution,) = cloud.emulator.world.executed
    until(lambda: execution.ended == 5_000, "the first half has ended")

    def known() -> int:
        cloud.clock.ahead += 1
        return len(backend.poll([launched.handle])[launched.handle].tasks)

    until(lambda: known() == 5_000, "their ends are known")
    cloud.emulator.world.advance(200)
    until(lambda: execution.done, "the others have ended")
    cloud.clock.ahead += 1
    report = ended(backend, launched.handle)
    outcomes = Counter(task.outcome for task in report.tasks)
    assert outcomes == {Outcome.SUCCEEDED: 9900, Outcome.FAILED: 100}
    assert cloud.calls[RUN] == 1
    assert cloud.emulator.pages[TASKS] <= 220


def test_tasks_that_the_platform_killed_are_told_by_their_signal(cloud: Cloud) -> None:
    cloud.script = lambda _start: LONG
    cloud.emulator.faults.add(kill_tasks(0.05))
    backend = cloud.backend()
    (task,) = ended(backend, backend.launch(request()).handle).tasks
    assert (task.outcome, task.exit_code) == (Outcome.FAILED, 137)


@pytest.mark.parametrize(
    ("end", "outcome", "said"),
    [
        (TaskEnd(out_of_memory=True), Outcome.OUT_OF_MEMORY, "Memory limit of 512Mi exceeded"),
        (
            TaskEnd(problem="Image 'gone' not found.", missing_image=True),
            Outcome.REJECTED,
            "Image 'gone' not found.",
        ),
        (TaskEnd(problem="the machine broke"), Outcome.LOST, "the machine broke"),
    ],
    ids=["memory", "image", "internal"],
)
def test_memory_images_and_internal_errors_have_outcomes_of_their_own(
    cloud: Cloud, end: TaskEnd, outcome: Outcome, said: str
) -> None:
    backend = cloud.backend()
    cloud.script = lambda _start: end
    (task,) = ended(backend, backend.launch(request()).handle).tasks
    assert task.outcome is outcome
    assert said in (task.reason or "")


def test_a_cancelled_execution_keeps_what_succeeded_before(cloud: Cloud) -> None:
    cloud.script = lambda start: 0.0 if start.index == 1 else LONG
    cloud.emulator.world.define(PROJECT, REGION, "etl", parallelism=2, task_count=2)
    backend = cloud.backend()
    handle = backend.launch(request(5)).handle
    until(lambda: len(backend.poll([handle])[handle].tasks) == 1, "one has ended")
    backend.cancel(handle)
    outcomes = {task.index: task.outcome for task in ended(backend, handle).tasks}
    assert outcomes == {
        0: Outcome.CANCELLED,
        1: Outcome.SUCCEEDED,
        2: Outcome.CANCELLED,
        3: Outcome.CANCELLED,
        4: Outcome.CANCELLED,
    }


def test_a_stop_that_exits_with_zero_is_not_success(cloud: Cloud) -> None:
    cloud.script = lambda _start: TaskEnd(seconds=math.inf, exit_code=0, stop_seconds=0.05)
    backend = cloud.backend()
    handle = backend.launch(request(2)).handle
    until(lambda: backend.poll([handle])[handle].phase is Phase.RUNNING, "runs")
    backend.cancel(handle)
    assert {t.outcome for t in ended(backend, handle).tasks} == {Outcome.CANCELLED}


def test_an_execution_that_waits_for_a_place_has_not_started() -> None:
    made = Cloud(EmulatorOptions(max_parallel_tasks=1))
    with made.emulator as emulator:
        emulator.world.define(PROJECT, REGION, "etl")
        made.script = lambda _start: LONG
        backend = made.backend()
        first, second = (backend.launch(request()).handle for _ in range(2))
        until(lambda: backend.poll([first, second])[first].phase is Phase.RUNNING, "first runs")
        assert backend.poll([first, second])[second].phase is Phase.PENDING


def test_a_few_that_lie_deep_in_the_list_are_asked_for_by_name() -> None:
    made = Cloud(EmulatorOptions(page_size=10))
    with made.emulator as emulator:
        emulator.world.define(PROJECT, REGION, "etl")
        made.script = lambda start: LONG if start.env["DISPATCH_KEY"].startswith("long") else 0.0
        backend = made.backend()
        old = [backend.launch(request(key=f"long-{number}")).handle for number in range(5)]
        for _ in range(200):
            backend.launch(request())
        fresh = made.backend()
        made.clock.ahead += 20
        fresh.poll(old)
        made.clock.ahead += 20
        assert len(fresh.poll(old)) == 5
        before = made.calls
        for _ in range(3):
            made.clock.ahead += 5
            assert len(fresh.poll(old)) == 5
        assert made.calls - before == {GET: 15}


def test_a_list_that_cannot_be_gone_on_with_is_begun_anew() -> None:
    made = Cloud(EmulatorOptions(page_size=10))
    with made.emulator as emulator:
        emulator.world.define(PROJECT, REGION, "etl")
        made.script = lambda _start: TaskEnd(exit_code=1)
        meter = CountingMeter(allowed=3)
        backend = made.backend(meter)
        handle = backend.launch(request(50)).handle
        until(lambda: emulator.world.executed[0].failed == 50, "all ended")
        assert len(backend.poll([handle])[handle].tasks) == 10
        meter.allowed = None
        emulator.faults.add(refuse(TASKS, code="INVALID_ARGUMENT", times=1))
        assert len(backend.poll([handle])[handle].tasks) == 10
        assert ended(backend, handle).phase is Phase.ENDED


# --- cancel, strays, logs -------------------------------------------------------------------------


def test_cancels_of_what_is_gone_or_over_are_fine(cloud: Cloud) -> None:
    for transport in ("grpc", "rest"):
        backend = cloud.backend(transport=transport)
        handle = backend.launch(request()).handle
        ended(backend, handle)
        backend.cancel(handle)
        backend.cancel(handle + "x")


def test_strays_are_found_in_every_job_of_the_region(cloud: Cloud) -> None:
    cloud.script = lambda _start: LONG
    cloud.emulator.world.define(PROJECT, REGION, "other")
    backend = cloud.backend()
    one = backend.launch(request()).handle
    two = backend.launch(request(options={"job": "other"})).handle
    backend.launch(replace(request(), instance="another"))
    hour_ago = datetime.now(UTC) - timedelta(hours=1)
    fresh = cloud.backend()
    assert {stray.handle for stray in fresh.strays("inst1", hour_ago)} == {one, two}
    fresh.cancel(one)
    ended(fresh, one)
    assert {stray.handle for stray in fresh.strays("inst1", hour_ago)} == {two}


def test_a_second_scan_for_strays_reads_only_what_is_new() -> None:
    made = Cloud(EmulatorOptions(page_size=10))
    with made.emulator as emulator:
        emulator.world.define(PROJECT, REGION, "etl")
        made.script = lambda _start: LONG
        backend, other = made.backend(), made.backend()
        handles = {other.launch(request()).handle for _ in range(40)}
        hour_ago = datetime.now(UTC) - timedelta(hours=1)
        assert {stray.handle for stray in backend.strays("inst1", hour_ago)} == handles
        assert made.calls[LIST] == 4
        new = other.launch(request()).handle
        assert new in {stray.handle for stray in backend.strays("inst1", hour_ago)}
        assert made.calls[LIST] == 6
        made.clock.ahead += 601
        backend.strays("inst1", hour_ago)
        assert made.calls[LIST] == 11, "now and then every page is read"


def test_a_scan_that_the_budget_breaks_off_is_gone_on_with() -> None:
    made = Cloud(EmulatorOptions(page_size=10))
    with made.emulator as emulator:
        emulator.world.define(PROJECT, REGION, "etl")
        made.script = lambda _start: LONG
        other = made.backend()
        handles = {other.launch(request()).handle for _ in range(40)}
        hour_ago = datetime.now(UTC) - timedelta(hours=1)
        meter = CountingMeter(allowed=3)
        backend = made.backend(meter)
        with pytest.raises(Unavailable):
            backend.strays("inst1", hour_ago)
        meter.allowed = 4
        assert {stray.handle for stray in backend.strays("inst1", hour_ago)} == handles


@pytest.mark.parametrize("transport", ["grpc", "rest"])
def test_the_output_of_one_task_is_read_in_one_call(cloud: Cloud, transport: str) -> None:
    cloud.script = lambda start: TaskEnd(lines=(f"task {start.index}", "second line"))
    backend = cloud.backend(transport=transport)
    handle = backend.launch(request(3)).handle
    ended(backend, handle)
    assert list(backend.logs(handle, 1, 10)) == ["task 1", "second line"]
    assert list(backend.logs(handle, 2, 1)) == ["second line"]
    assert cloud.calls["LoggingServiceV2.ListLogEntries"] == 2


@pytest.mark.parametrize("transport", ["grpc", "rest"])
def test_output_that_cannot_be_read_is_a_not_now(cloud: Cloud, transport: str) -> None:
    backend = cloud.backend(transport=transport)
    handle = backend.launch(request()).handle
    cloud.emulator.faults.add(refuse("LoggingServiceV2.*", code="RESOURCE_EXHAUSTED"))
    with pytest.raises(Unavailable):
        list(backend.logs(handle, 0, 10))


# --- strict ---------------------------------------------------------------------------------------

STRICT = {"mode": "strict"}


def test_a_strict_launch_that_is_repeated_adopts_what_is_there(cloud: Cloud) -> None:
    cloud.script = lambda _start: 0.1
    backend = cloud.backend()
    made = request(2, options=STRICT)
    with cloud.emulator.faults.during(lose_reply("Jobs.CreateJob")), pytest.raises(Unavailable):
        backend.launch(made)
    first = backend.launch(made)
    assert cloud.backend().launch(made).handle == first.handle
    found = cloud.backend().find(made)
    assert found is not None
    assert found.handle == first.handle
    assert len(cloud.emulator.world.executed) == 1
    ended(backend, first.handle)
    assert cloud.backend().launch(made).handle == first.handle


def test_strict_takes_the_shared_jobs_template_and_any_number_of_tasks(cloud: Cloud) -> None:
    cloud.emulator.world.define(
        PROJECT, REGION, "etl", parallelism=5, task_count=5, max_retries=3, env={"MODE": "fast"}
    )
    cloud.script = lambda _start: TaskEnd(exit_code=1)
    backend = cloud.backend()
    handle = backend.launch(request(1, options=STRICT)).handle
    (task,) = ended(backend, handle).tasks
    assert task.outcome is Outcome.FAILED
    (start,) = cloud.emulator.world.starts
    assert start.env["MODE"] == "fast"
    assert start.attempt == 0, "and no retry of Cloud Run's own"


def test_many_strict_executions_are_polled_with_one_list(cloud: Cloud) -> None:
    cloud.script = lambda _start: LONG
    backend = cloud.backend()
    handles = [backend.launch(request(options=STRICT)).handle for _ in range(12)]
    until(lambda: len(cloud.emulator.world.starts) == 12, "all run")
    before = cloud.calls
    reports = backend.poll(handles)
    assert {report.phase for report in reports.values()} == {Phase.RUNNING}
    assert len(reports) == 12
    assert cloud.calls - before == {LIST: 1}


def test_strict_jobs_are_deleted_some_time_after_their_end(cloud: Cloud) -> None:
    backend = cloud.backend(keep="1h")
    old = backend.launch(request(key="d-b-ended", options=STRICT)).handle
    ended(backend, old)
    cloud.script = lambda _start: LONG
    backend.launch(request(options=STRICT))
    now = datetime.now(UTC)
    live = {"d-b-ended": Recorded(ended=False, calls=1)}
    later, other = now + timedelta(hours=2), cloud.backend(keep="1h")
    assert backend.make_room(now, lambda _: {}) == 0
    assert other.make_room(later, lambda _: {}) == 0, "they may be another's"
    assert backend.make_room(later, lambda _: live) == 0, "how it ended is still to be read"
    assert backend.make_room(later, lambda _: {}) == 1
    assert backend.make_room(later, lambda _: {}) == 0
    assert cloud.calls["Jobs.DeleteJob"] == 1


def test_a_strict_launch_without_its_template_is_rejected(cloud: Cloud) -> None:
    made = request(options={**STRICT, "job": "other"})
    with pytest.raises(Rejected, match="other"):
        cloud.backend().launch(made)
    assert cloud.backend().find(made) is None


# --- definition and check -------------------------------------------------------------------------


def test_the_definition_is_the_live_jobs(cloud: Cloud) -> None:
    backend = cloud.backend()
    own = CloudRunOptions(job="etl")
    assert backend.definition(own).parallelism is None
    assert backend.definition(own).max_timeout == timedelta(hours=168)
    cloud.emulator.world.define(PROJECT, REGION, "etl", parallelism=2, task_count=2)
    assert backend.definition(own).parallelism == 2
    with pytest.raises(Rejected):
        backend.definition(CloudRunOptions(job="other"))
    with cloud.emulator.faults.during(outage()), pytest.raises(Unavailable):
        backend.definition(own)


def remarks(backend: CloudRunBackend, given: Job | None = None, **options: Any) -> dict[str, str]:
    job = given or Job(name="etl", target="cloud")
    own = CloudRunOptions.model_validate({"job": "etl", **options})
    return {remark.text: remark.level for remark in backend.check(job, own) if remark.level != "ok"}


def only(found: dict[str, str], level: str, *parts: str) -> None:
    ((text, its),) = found.items()
    assert its == level
    for part in parts:
        assert part in text


@pytest.mark.parametrize("transport", ["grpc", "rest"])
def test_a_job_that_is_well_has_nothing_to_mend(cloud: Cloud, transport: str) -> None:
    backend = cloud.backend(transport=transport)
    assert remarks(backend) == {}
    assert backend.check(Job(name="etl", target="cloud"), CloudRunOptions(job="etl"))
    assert cloud.emulator.world.executed == [], "a check starts nothing"


def test_check_names_what_is_wrong_with_the_job(cloud: Cloud) -> None:
    backend, world = cloud.backend(), cloud.emulator.world
    only(remarks(backend, job="etk"), "fail", "no Cloud Run job etk", 'did you mean "etl"')
    world.define(PROJECT, REGION, "etl", max_retries=3)
    only(remarks(backend), "warn", "max_retries 3", "up to 4 times")
    world.define(PROJECT, REGION, "etl", parallelism=4, task_count=4)
    only(remarks(backend, max_tasks=10), "fail", "parallelism 4", "fewer tasks")
    found = remarks(backend, max_tasks=2)
    assert any("parallelism 4" in text and level == "fail" for text, level in found.items())
    limited = Job.model_validate({"name": "etl", "target": "cloud", "limits": {"running": 2}})
    found = remarks(backend, limited, max_tasks=10)
    assert any("limits allow 2" in text and level == "fail" for text, level in found.items())
    world.define(PROJECT, REGION, "etl", parallelism=0)
    only(remarks(backend, limited, max_tasks=10), "warn", "will have 2 tasks at most")
    only(remarks(backend, parallelism=3, max_tasks=9), "fail", "options.parallelism is 3")
    only(remarks(backend, container="side"), "fail", "options.container is 'side'")


ETL = f"projects/{PROJECT}/locations/{REGION}/jobs/etl"
ON_JOB = {"run.jobs.get", "run.jobs.run", "run.jobs.runWithOverrides", "run.executions.cancel"}
FOLLOWING = {
    *("run.executions.get", "run.executions.list", "run.tasks.list", "run.jobs.list"),
    "logging.logEntries.list",
}
MAKING = {"run.jobs.create", "run.jobs.delete", "run.jobs.get", "run.executions.cancel"}


def permit(cloud: Cloud, project: set[str], on_job: set[str] | None = None) -> None:
    cloud.emulator.world.permissions = frozenset(project)
    cloud.emulator.world.permissions_on = {ETL: frozenset(on_job or ())}


@pytest.mark.parametrize("transport", ["grpc", "rest"])
def test_check_is_content_with_the_permissions_that_the_page_lists(
    cloud: Cloud, transport: str
) -> None:
    backend, world = cloud.backend(transport=transport), cloud.emulator.world
    permit(cloud, FOLLOWING, ON_JOB)
    assert remarks(backend) == {}
    permit(cloud, FOLLOWING | MAKING, {"run.jobs.get"})
    assert remarks(backend, mode="strict") == {}
    world.define(PROJECT, REGION, "etl", parallelism=4, task_count=4)
    permit(cloud, FOLLOWING | MAKING, ON_JOB)
    assert remarks(backend, mode="mixed", max_tasks=4) == {}
    assert (world.executed, len(list(world.list_jobs(ETL.partition("/jobs")[0])))) == ([], 1)


@pytest.mark.parametrize(
    ("missing", "level", "part", "role"),
    [
        ("run.jobs.get", "fail", "cannot read", "roles/run.viewer"),
        ("run.jobs.run", "fail", "a launch with overrides", "roles/run.jobsExecutorWithOverrides"),
        ("run.jobs.runWithOverrides", "fail", "a launch with", "run.jobsExecutorWithOverrides"),
        ("run.executions.cancel", "fail", "is missing on", "roles/run.jobsExecutorWithOverrides"),
        ("run.executions.get", "fail", "is missing on", "roles/run.viewer"),
        ("run.tasks.list", "fail", "the tasks of", "roles/run.viewer"),
        ("logging.logEntries.list", "warn", "the output of tasks", "roles/logging.viewer"),
    ],
)
@pytest.mark.parametrize("transport", ["grpc", "rest"])
def test_check_names_each_permission_that_is_missing_and_a_role_that_has_it(
    cloud: Cloud, transport: str, missing: str, level: str, part: str, role: str
) -> None:
    permit(cloud, FOLLOWING - {missing}, ON_JOB - {missing})
    backend = cloud.backend(transport=transport)
    told = backend.check(Job(name="etl", target="cloud"), CloudRunOptions(job="etl"))
    (remark,) = (one for one in told if one.level != "ok")
    assert (remark.level, missing in remark.text) == (level, True)
    assert part in remark.text
    assert role in (remark.todo or "")


def test_check_tells_that_strays_cannot_be_found_with_grants_on_the_job_alone(cloud: Cloud) -> None:
    permit(cloud, FOLLOWING - {"run.executions.list"}, ON_JOB | {"run.executions.list"})
    backend = cloud.backend()
    only(remarks(backend), "fail", "strays are never found", "'run.executions.list' denied")
    permit(cloud, FOLLOWING - {"run.executions.list"}, ON_JOB)
    assert len(remarks(backend)) == 2


@pytest.mark.parametrize(
    ("missing", "part"),
    [
        ("run.jobs.create", "creating one is refused"),
        ("run.jobs.delete", "deleting it is refused"),
        ("run.executions.cancel", "cancelling it is refused"),
        ("run.jobs.get", "finding it again is refused"),
    ],
)
@pytest.mark.parametrize("mode", ["strict", "mixed"])
def test_check_tries_what_a_mode_that_makes_jobs_needs_in_the_project(
    cloud: Cloud, mode: Literal["strict", "mixed"], missing: str, part: str
) -> None:
    cloud.emulator.world.define(PROJECT, REGION, "etl", parallelism=4, task_count=4)
    permit(cloud, FOLLOWING | (MAKING - {missing}), ON_JOB)
    told = cloud.backend().check(
        Job(name="etl", target="cloud"), CloudRunOptions(job="etl", mode=mode, max_tasks=4)
    )
    (remark,) = (one for one in told if one.level != "ok")
    assert remark.level == "fail"
    assert f"mode {mode} makes jobs of its own, and {part}: 403" in remark.text
    assert "roles/run.developer on the project" in (remark.todo or "")


def test_check_names_what_is_missing_where_all_is(cloud: Cloud) -> None:
    backend, world = cloud.backend(), cloud.emulator.world
    world.permissions = frozenset({"run.jobs.get", "run.jobs.run"})
    found = remarks(backend)
    assert sorted(found.values()) == ["fail"] * 6 + ["warn"]
    assert any("runWithOverrides" in text for text in found)
    world.permissions = frozenset()
    only(remarks(backend), "fail", "403")
    world.permissions = None
    world.authenticated = False
    only(remarks(backend), "fail", "401")


def test_retries_of_cloud_runs_own_are_told_of_in_mode_mixed_too(cloud: Cloud) -> None:
    cloud.emulator.world.define(PROJECT, REGION, "etl", max_retries=3)
    backend = cloud.backend()
    only(remarks(backend, mode="mixed"), "warn", "max_retries 3", "up to 4 times")
    assert remarks(backend, mode="strict") == {}, "jobs of its own have none"


def test_a_timeout_of_less_than_a_second_is_tried_as_it_is_launched(cloud: Cloud) -> None:
    short = Job.model_validate({"name": "etl", "target": "cloud", "timeout": "0.2s"})
    assert remarks(cloud.backend(), short) == {}
    assert remarks(cloud.backend(), short, mode="strict") == {}


@pytest.mark.parametrize("mode", ["shared", "strict"])
def test_what_fails_on_paper_is_not_said_to_be_taken(
    cloud: Cloud, mode: Literal["shared", "strict"]
) -> None:
    for wrong in ({"timeout": "169h"}, {"command": ["sh"], "timeout": "5m"}):
        job = Job.model_validate({"name": "etl", "target": "cloud", **wrong})
        told = cloud.backend().check(job, CloudRunOptions(job="etl", mode=mode))
        assert [one.level for one in told] == ["fail"]


def test_a_check_during_an_outage_says_that_it_cannot_say(cloud: Cloud) -> None:
    with cloud.emulator.faults.during(outage()), pytest.raises(Unavailable):
        remarks(cloud.backend())


# --- apply ----------------------------------------------------------------------------------------

DEFINITION = {"image": "img:1", "cpu": "1", "memory": "512Mi", "env": {"MODE": "fast"}}


@pytest.mark.parametrize("transport", ["grpc", "rest"])
def test_a_definition_is_created_then_updated_then_the_same(cloud: Cloud, transport: str) -> None:
    backend = cloud.backend(transport=transport)
    assert isinstance(backend, Definable)
    job = Job(name="new", target="cloud")
    own = CloudRunOptions.model_validate({"job": "new", "definition": DEFINITION})
    found = {change.path: change.new for change in backend.changes(job, own) or ()}
    assert found["containers.0.image"] == "img:1"
    assert found["max_retries"] == 0
    name = f"projects/{PROJECT}/locations/{REGION}/jobs/new"
    assert backend.apply(job, own) == name
    assert backend.changes(job, own) == []
    own = CloudRunOptions.model_validate(
        {"job": "new", "definition": {**DEFINITION, "image": "img:2"}}
    )
    (change,) = backend.changes(job, own) or ()
    assert (change.old, change.new) == ("img:1", "img:2")
    backend.apply(job, own)
    assert backend.changes(job, own) == []
    assert backend.launch(request(options={"job": "new"})).handle
    assert backend.changes(job, CloudRunOptions(job="new")) is None
    with pytest.raises(Rejected, match=r"no options\.definition"):
        backend.apply(job, CloudRunOptions(job="new"))


def test_a_definition_that_cloud_run_refuses_is_rejected(cloud: Cloud) -> None:
    own = CloudRunOptions.model_validate({"job": "new", "definition": {"image": "i"}})
    job = Job(name="new", target="cloud")
    cloud.emulator.world.permissions = frozenset({"run.jobs.get"})
    with pytest.raises(Rejected, match=r"403 .*account that applies roles/run\.developer"):
        cloud.backend().apply(job, own)
    cloud.emulator.world.permissions = frozenset()
    with pytest.raises(Rejected, match="403"):
        cloud.backend().changes(job, own)


def run_apply(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["apply", *words])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def jobs_file(cloud: Cloud, tmp_path: Path) -> str:
    path = tmp_path / "jobs.yaml"
    document = {
        "targets": {
            "cloud": {
                "backend": "cloud_run",
                "project": PROJECT,
                "region": REGION,
                "endpoint": cloud.emulator.grpc_address,
                "insecure": True,
                "call_timeout": "60s",
            },
            "here": {"backend": "local"},
        },
        "jobs": {
            "nightly": {
                "target": "cloud",
                "options": {"job": "nightly-etl", "definition": DEFINITION},
            },
            "plain": {"target": "cloud", "options": {"job": "etl"}},
            "at-home": {"target": "here", "command": ["true"]},
        },
    }
    path.write_text(json.dumps(document))
    return str(path)


def test_apply_shows_the_difference_first_and_writes_when_told_to(
    cloud: Cloud, jobs_file: str
) -> None:
    name = f"projects/{PROJECT}/locations/{REGION}/jobs/nightly-etl"
    code, out, _ = run_apply("--jobs", jobs_file, "--check")
    assert code == 1
    assert "job nightly on target cloud:" in out
    assert '  containers.0.image: nothing → "img:1"' in out
    code, _, err = run_apply("--jobs", jobs_file)
    assert code == 2
    assert "--yes" in err
    assert cloud.calls["Jobs.CreateJob"] == 0
    code, out, _ = run_apply("--jobs", jobs_file, "--yes")
    assert code == 0
    assert out.splitlines()[-1] == f"applied {name}"
    code, out, _ = run_apply("--jobs", jobs_file, "--check", "--json", "nightly")
    assert code == 0
    assert json.loads(out) == [
        {"job": "nightly", "target": "cloud", "changes": [], "applied": None}
    ]


def test_apply_says_that_what_it_wrote_cannot_run_yet(jobs_file: str) -> None:
    document = json.loads(Path(jobs_file).read_text())
    with CloudRunEmulator(runner=ScriptRunner(images={"another"})) as emulator:
        document["targets"]["cloud"]["endpoint"] = emulator.grpc_address
        Path(jobs_file).write_text(json.dumps(document))
        code, out, err = run_apply("--jobs", jobs_file, "--yes")
    assert code == 0
    assert out.splitlines()[-1].startswith("applied ")
    assert "job nightly cannot run yet: " in err
    assert "img:1" in err


def test_apply_refuses_a_job_without_a_definition_by_name(cloud: Cloud, jobs_file: str) -> None:
    code, _, err = run_apply("--jobs", jobs_file, "plain")
    assert code == 2
    assert "job plain has no definition" in err
    code, _, err = run_apply("--jobs", jobs_file, "at-home")
    assert code == 2
    assert "local target, which takes no definition" in err
    cloud.emulator.world.permissions = frozenset()
    code, _, err = run_apply("--jobs", jobs_file)
    assert code == 2
    assert "403" in err
    cloud.emulator.world.permissions = None
    with cloud.emulator.faults.during(outage()):
        code, _, err = run_apply("--jobs", jobs_file)
    assert code == 4


@pytest.mark.parametrize(
    ("image", "container", "refused"),
    [("img:2", None, True), ("img:1", None, False), ("img:2", "sidecar", False)],
    ids=["differently", "alike", "another container"],
)
def test_apply_refuses_jobs_that_would_undo_each_others_definition(
    cloud: Cloud, jobs_file: str, image: str, container: str | None, *, refused: bool
) -> None:
    document = json.loads(Path(jobs_file).read_text())
    options: dict[str, Any] = {"job": "nightly-etl", "definition": {**DEFINITION, "image": image}}
    if container is not None:
        options["container"] = container
    document["jobs"]["weekly"] = {"target": "cloud", "options": options}
    # Only what both set is compared: this one sets less, and not otherwise.
    part = {"job": "nightly-etl", "definition": {"image": "img:1", "env": {"OTHER": "x"}}}
    document["jobs"]["partly"] = {"target": "cloud", "options": part}
    other = {"job": "monthly-etl", "definition": DEFINITION}
    document["jobs"]["monthly"] = {"target": "cloud", "options": other}
    Path(jobs_file).write_text(json.dumps(document))
    code, _, err = run_apply("--jobs", jobs_file, "--check", "nightly")
    assert code == (2 if refused else 1)
    name = f"projects/{PROJECT}/locations/{REGION}/jobs/nightly-etl"
    said = f"jobs nightly and weekly define {name} differently (image)"
    assert (said in err) is refused
    assert run_apply("--jobs", jobs_file, "--check", "monthly")[0] == 1, "it is none of the two"
    assert cloud.calls["Jobs.CreateJob"] == 0


def test_sequences_are_what_a_poll_takes(cloud: Cloud) -> None:
    handles: Sequence[Handle] = ()
    assert cloud.backend().poll(handles) == {}
    assert cloud.calls == Counter()
