"""The emulator as a whole: operations, scripts, time, cost, and HTTP that no client would send."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests
from emulators.cloud import JOB, Cloud, Clouds, eventually
from google.api_core import exceptions
from google.cloud import run_v2
from google.longrunning import operations_pb2

from dispatcher.emulators.cloud_run import (
    CloudRunEmulator,
    EmulatorOptions,
    ScriptRunner,
    TaskEnd,
    TaskStart,
)
from dispatcher.emulators.cloud_run.faults import lose_reply, slow_start, stale_lists

Open = Callable[..., Cloud]
PARENT = "projects/p/locations/r"


# --- operations -----------------------------------------------------------------------------------


def test_operations_can_be_read_listed_and_deleted(opened: Open) -> None:
    cloud = opened(script=lambda _: math.inf)
    run = cloud.jobs.run_job(name=JOB).operation
    assert cloud.jobs.get_operation({"name": run.name}).done is False
    listed = cloud.jobs.list_operations({"name": PARENT, "page_size": 1})
    assert [one.name for one in listed.operations] == [run.name]
    # The one of the definition is older.
    assert listed.next_page_token
    cloud.jobs.delete_operation({"name": run.name})
    with pytest.raises(exceptions.NotFound):
        cloud.jobs.get_operation({"name": run.name})
    assert cloud.emulator.world.executed[0].deleted is False


def waited(cloud: Cloud, request: operations_pb2.WaitOperationRequest) -> operations_pb2.Operation:
    answer = cloud.jobs.wait_operation(request)
    # Over gRPC google-cloud-run 0.16.2 hands out the bytes of the answer.
    return operations_pb2.Operation.FromString(answer) if isinstance(answer, bytes) else answer


def test_waiting_for_an_operation_ends_with_it_or_with_its_time(opened: Open) -> None:
    cloud = opened(script=lambda start: 0.1 if start.env.get("QUICK") else math.inf)
    slow = cloud.jobs.run_job(name=JOB).operation
    request = operations_pb2.WaitOperationRequest(name=slow.name)
    request.timeout.nanos = 50_000_000
    assert waited(cloud, request).done is False
    cloud.run(env={"QUICK": "1"})
    request.name = cloud.emulator.world.executed[1].operation
    # Longer than this test may take: it ends with the operation, or too late.
    request.timeout.seconds = 600
    assert waited(cloud, request).done is True


# --- scripts and time -----------------------------------------------------------------------------


def test_the_work_of_a_task_is_done_at_its_end_and_only_if_it_gets_there(opened: Open) -> None:
    done: list[int] = []

    def script(start: TaskStart) -> TaskEnd:
        return TaskEnd(
            seconds=100 * start.index, effect=lambda: done.append(start.index), stop_seconds=50
        )

    cloud = opened(script=script, job={"timeout": 150})
    execution = cloud.run(task_count=3)
    eventually(lambda: done == [0])
    cloud.emulator.world.advance(120)
    eventually(lambda: done == [0, 1])
    cloud.emulator.world.advance(40)
    # Its time was up at 150 s, and it takes 50 s to stop.
    eventually(lambda: cloud.emulator.world.busy == 1)
    assert not cloud.executions.get_execution(name=execution.name).completion_time
    cloud.emulator.world.advance(50)
    assert cloud.finished(execution).failed_count == 1
    assert done == [0, 1]


def test_a_script_that_fails_fails_the_test_that_uses_it(clients: Clouds) -> None:
    def script(start: TaskStart) -> TaskEnd:
        raise KeyError(start.env["MISSING"])

    def use() -> None:
        with CloudRunEmulator(script=script) as emulator:
            emulator.world.define("p", "r", "job")
            cloud = clients(emulator)
            assert cloud.finished(cloud.run()).failed_count == 1

    with pytest.raises(RuntimeError, match=r"1 failures .*KeyError\('MISSING'\)"):
        use()


def test_an_image_that_has_gone_since_fails_the_execution(opened: Open) -> None:
    runner = ScriptRunner(images=["image"])
    cloud = opened(runner=runner, faults=(slow_start(5),))
    execution = cloud.run(task_count=2)
    runner._images = frozenset()
    cloud.emulator.world.advance(6)
    ended = cloud.finished(execution)
    assert ended.failed_count == 2
    assert ended.conditions[-1].reason == run_v2.Condition.CommonReason.CONTAINER_MISSING
    (first, _) = cloud.results(ended)
    assert first.last_attempt_result.status.message == "Image 'image' not found."


def test_a_cancel_ends_an_execution_that_has_not_begun(opened: Open) -> None:
    cloud = opened(faults=(slow_start(60),))
    execution = cloud.run(task_count=4)
    cloud.executions.cancel_execution(name=execution.name)
    assert cloud.finished(execution).cancelled_count == 4
    cloud.emulator.world.advance(61)
    assert not cloud.emulator.world.starts


def test_a_stale_list_shows_an_execution_as_pending_that_has_started_since(opened: Open) -> None:
    cloud = opened(script=lambda _: math.inf, faults=(stale_lists(5), slow_start(10)))
    cloud.run()
    cloud.emulator.world.advance(12)
    eventually(lambda: cloud.emulator.world.busy == 1)
    (listed,) = cloud.executions.list_executions(parent=JOB)
    assert (listed.running_count, bool(listed.start_time)) == (0, False)


# --- cost and closing -----------------------------------------------------------------------------


def test_ten_thousand_tasks_and_a_thousand_executions_need_no_thread_of_their_own(
    clients: Clouds,
) -> None:
    overrides = run_v2.RunJobRequest.Overrides.pb()
    with CloudRunEmulator(script=lambda _: 3600) as emulator:
        emulator.world.define("p", "r", "job", env={"INPUT": "x" * 20_000})
        threads = threading.active_count()
        emulator.world.run_job(JOB, overrides(task_count=10_000))
        for _ in range(1_000):
            emulator.world.run_job(JOB, overrides())
        eventually(lambda: emulator.world.busy == 11_000)
        # Not to the last one: those that other tests have left may start or end now.
        assert threading.active_count() < threads + 100
        emulator.world.advance(3600)
        eventually(lambda: not emulator.world.running)
        assert len(emulator.world.starts) == 11_000
        assert len(list(clients(emulator).executions.list_executions(parent=JOB))) == 1_000


def test_latency_is_waited_for(opened: Open) -> None:
    cloud = opened(options=EmulatorOptions(latency=0.1))
    before = time.monotonic()
    cloud.run()
    assert time.monotonic() - before >= 0.1
    assert len(cloud.emulator.world.executed) == 1


@pytest.mark.parametrize("transport", ["grpc", "rest"])
def test_latency_is_waited_for_by_all_calls_at_once(clients: Clouds, transport: str) -> None:
    failures: list[Exception] = []
    with CloudRunEmulator(options=EmulatorOptions(latency=3600)) as emulator:
        emulator.world.define("p", "r", "job")
        threads = begun(20, clients(emulator, transport), failures)
        eventually(lambda: emulator.calls["Jobs.RunJob"] == 20)
        assert not emulator.world.executed
    for thread in threads:
        thread.join(60)
    assert len(failures) == 20


def begun(count: int, cloud: Cloud, failures: list[Exception]) -> list[threading.Thread]:
    """Run the job on threads; what goes wrong is added to the failures."""

    def call() -> None:
        try:
            cloud.run()
        except Exception as error:  # noqa: BLE001 - which one differs by transport
            failures.append(error)

    threads = [threading.Thread(target=call) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


def test_an_emulator_closes_while_calls_wait_for_an_answer(clients: Clouds) -> None:
    failures: list[Exception] = []
    with CloudRunEmulator(faults=(lose_reply("Jobs.RunJob", "never"),)) as emulator:
        emulator.world.define("p", "r", "job")
        threads = [
            *begun(1, clients(emulator, "grpc"), failures),
            *begun(1, clients(emulator, "rest"), failures),
        ]
        eventually(lambda: len(emulator.world.executed) == 2)
    for thread in threads:
        thread.join(60)
    assert len(failures) == 2


def test_an_emulator_must_be_opened_and_takes_a_script_or_a_runner() -> None:
    with pytest.raises(RuntimeError, match="not open"):
        _ = CloudRunEmulator().grpc_address
    with pytest.raises(TypeError, match="not both"):
        CloudRunEmulator(script=lambda _: None, runner=ScriptRunner())


# --- HTTP -----------------------------------------------------------------------------------------


@pytest.fixture
def emulator() -> Iterator[CloudRunEmulator]:
    with CloudRunEmulator() as one:
        one.world.define("p", "r", "job")
        yield one


@pytest.mark.parametrize(
    ("verb", "path", "body", "status", "said"),
    [
        ("GET", "/v2/nowhere", b"", 404, "was not found on this server"),
        ("GET", f"/v2/{JOB}:run", b"", 404, "was not found on this server"),
        ("POST", f"/v2/{JOB}:run", b"{", 400, "Invalid JSON payload"),
        ("POST", f"/v2/{JOB}:run", b"[]", 400, "Invalid JSON payload"),
        ("POST", f"/v2/{JOB}:run", b'{"overides": {}}', 400, "overides"),
        ("GET", f"/v2/{PARENT}/jobs?pageSize=many", b"", 400, "Invalid JSON payload"),
        ("GET", f"/v2/{PARENT}/jobs?sort=up", b"", 400, "unknown name"),
        ("GET", f"/v2/{PARENT}/jobs?pageSize=-1", b"", 400, "must not be negative"),
        ("POST", "/v2/projects/p/jobs?jobId=j", b"{}", 404, "was not found on this server"),
    ],
)
def test_http_that_no_client_would_send_gets_googles_error(
    emulator: CloudRunEmulator, verb: str, path: str, body: bytes, status: int, said: str
) -> None:
    answer = requests.request(verb, emulator.rest_url + path, data=body, timeout=60)
    error: dict[str, Any] = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, status)
    assert said in error["message"]


def test_enums_are_words_unless_numbers_are_asked_for(emulator: CloudRunEmulator) -> None:
    url = f"{emulator.rest_url}/v2/{JOB}"
    words, numbers = (
        requests.get(url + query, timeout=60).json()["terminalCondition"]["state"]
        for query in ("", "?$alt=json;enum-encoding=int")
    )
    assert (words, numbers) == ("CONDITION_SUCCEEDED", 4)
