"""What tasks wrote, read through Cloud Logging's client and over REST."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
import requests
from emulators.cloud import JOB, Cloud, Clouds
from google.api_core import exceptions
from google.cloud.logging_v2.services.logging_service_v2 import LoggingServiceV2Client
from google.cloud.logging_v2.services.logging_service_v2.transports import (
    LoggingServiceV2GrpcTransport,
)
from google.cloud.run_v2 import Execution

from dispatcher.emulators.cloud_run import (
    CloudRunEmulator,
    EmulatorOptions,
    Line,
    Refused,
    TaskEnd,
    TaskStart,
)
from dispatcher.emulators.cloud_run.logreading import compile_filter


def script(start: TaskStart) -> TaskEnd:
    return TaskEnd(lines=(f"task {start.index} begins", Line("something is odd", error=True)))


@pytest.fixture
def cloud(clients: Clouds) -> Iterator[Cloud]:
    with CloudRunEmulator(script=script, options=EmulatorOptions(logs_per_minute=5)) as emulator:
        emulator.world.define("p", "r", "job")
        yield clients(emulator)


def filter_of(execution: Execution, index: int) -> str:
    """The filter of clouds.md §3."""
    return (
        'resource.type="cloud_run_job" AND resource.labels.job_name="job" AND '
        f'labels."run.googleapis.com/execution_name"="{execution.name.rpartition("/")[2]}" AND '
        f'labels."run.googleapis.com/task_index"="{index}"'
    )


def test_a_tasks_lines_are_found_by_its_labels(cloud: Cloud) -> None:
    first = cloud.finished(cloud.run(task_count=3))
    cloud.finished(cloud.run(task_count=3))
    with grpc.insecure_channel(cloud.emulator.grpc_address) as channel:
        logging = LoggingServiceV2Client(transport=LoggingServiceV2GrpcTransport(channel=channel))
        found = list(
            logging.list_log_entries(
                resource_names=["projects/p"],
                filter=filter_of(first, 2),
                order_by="timestamp desc",
            )
        )
        assert [one.text_payload for one in found] == ["something is odd", "task 2 begins"]
        assert found[0].log_name == "projects/p/logs/run.googleapis.com%2Fstderr"
        assert found[0].resource.labels["job_name"] == "job"
        assert found[0].labels["run.googleapis.com/task_attempt"] == "0"
        pages = logging.list_log_entries(
            {"resource_names": ["projects/p"], "filter": 'textPayload:"BEGINS"', "page_size": 4}
        )
        assert len(list(pages)) == 6
        assert cloud.emulator.calls["LoggingServiceV2.ListLogEntries"] == 3
        # Two more are within the quota of five a minute.
        for _ in range(2):
            logging.list_log_entries(resource_names=["projects/p"])
        with pytest.raises(exceptions.ResourceExhausted, match=r"logging\.googleapis\.com"):
            logging.list_log_entries(resource_names=["projects/p"])


def test_lines_are_read_over_rest_too(cloud: Cloud) -> None:
    execution = cloud.finished(cloud.run(JOB))
    answer = requests.post(
        f"{cloud.emulator.rest_url}/v2/entries:list",
        json={"resourceNames": ["projects/p"], "filter": filter_of(execution, 0)},
        timeout=60,
    )
    assert [one["textPayload"] for one in answer.json()["entries"]] == [
        "task 0 begins",
        "something is odd",
    ]
    wrong = requests.post(f"{cloud.emulator.rest_url}/v2/entries:list", json={}, timeout=60)
    assert wrong.status_code == 400
    assert wrong.json()["error"]["status"] == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 6),
        ('labels."run.googleapis.com/task_index"="1" OR resource.labels.job_name="no"', 2),
        ('NOT textPayload:"odd"\nlabels."run.googleapis.com/task_index"="1"', 1),
        ('(textPayload:"task 0" OR textPayload="task 1 begins") AND severity>=DEFAULT', 2),
        ('logName="projects/p/logs/run.googleapis.com%2Fstderr"', 3),
        ('timestamp>="2020-01-01T00:00:00Z" AND timestamp < "2021-01-01T00:00:00Z"', 0),
        ("timestamp>=2020-01-01T00:00:00Z", 6),
        ('resource.labels.location!="r"', 0),
    ],
)
def test_the_filter_language_in_use_is_understood(cloud: Cloud, text: str, count: int) -> None:
    cloud.finished(cloud.run(task_count=3))
    matches = compile_filter(text)
    assert sum(matches(entry, 0.0) for entry in cloud.emulator.world.journal.entries()) == count


@pytest.mark.parametrize(
    "text",
    [
        "httpRequest.status=500",
        "textPayload=",
        "textPayload",
        'textPayload="x" )',
        '(textPayload="x"',
        'timestamp>"yesterday"',
        'textPayload>"x"',
        '"',
    ],
)
def test_a_filter_that_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(Refused, match="Unparseable filter"):
        compile_filter(text)
