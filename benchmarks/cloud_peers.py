"""What a user would write for Cloud Run, and the floor, both with Google's own client over gRPC.

(a) a Celery task per chunk that runs the job and then asks for its execution with
`retry(countdown=10)`, prefork 8, a channel for each child;
(b) a bare asyncio script that runs the job for every chunk at once and lists once a second; or,
packed, runs it once with a task per chunk and lists the tasks when all have ended. It records
nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from functools import cache
from typing import Any

import grpc
from celery import Celery
from google.cloud import run_v2
from google.cloud.run_v2.services.executions.transports import (
    ExecutionsGrpcAsyncIOTransport,
    ExecutionsGrpcTransport,
)
from google.cloud.run_v2.services.jobs.transports import (
    JobsGrpcAsyncIOTransport,
    JobsGrpcTransport,
)
from google.cloud.run_v2.services.tasks.transports import TasksGrpcAsyncIOTransport

from benchmarks.cloud_emulator import JOB, PAGE_SIZE, PROJECT, REGION

NAME = f"projects/{PROJECT}/locations/{REGION}/jobs/{JOB}"
TIMEOUT = 30.0

app = Celery(
    "cloud_peers", broker=os.environ.get("PEERS_BROKER"), backend=os.environ.get("PEERS_RESULTS")
)
app.conf.update(task_serializer="json", accept_content=["json"])


def _asked(key: str, tasks: int = 1) -> run_v2.RunJobRequest:
    """Ask for an execution that is told its work by a variable."""
    overrides = run_v2.RunJobRequest.Overrides
    env = [run_v2.EnvVar(name="WORK", value=key)]
    return run_v2.RunJobRequest(
        name=NAME,
        overrides=overrides(
            container_overrides=[overrides.ContainerOverride(env=env)], task_count=tasks
        ),
    )


@cache
def _clients(_pid: int, address: str) -> tuple[run_v2.JobsClient, run_v2.ExecutionsClient]:
    channel = grpc.insecure_channel(address)
    return (
        run_v2.JobsClient(transport=JobsGrpcTransport(channel=channel)),
        run_v2.ExecutionsClient(transport=ExecutionsGrpcTransport(channel=channel)),
    )


@app.task(bind=True, max_retries=None)  # type: ignore[untyped-decorator]  # celery ships no types
def chunk(self: Any, address: str, key: str, execution: str | None = None) -> tuple[str, float]:
    """Launch, then come back every 10 s until it has ended; answers when that was noticed."""
    jobs, executions = _clients(os.getpid(), address)
    if execution is None:
        execution = jobs.run_job(_asked(key), timeout=TIMEOUT).metadata.name
        raise self.retry(args=(address, key, execution), countdown=10)
    if not executions.get_execution(name=execution, timeout=TIMEOUT).completion_time:
        raise self.retry(args=(address, key, execution), countdown=10)
    return f"{execution}/0", time.time()


async def floor(address: str, chunks: int) -> dict[str, float]:
    """Launch all at once, list once a second; the time at which each end was noticed."""
    async with grpc.aio.insecure_channel(address, options=_LARGE) as channel:
        jobs = run_v2.JobsAsyncClient(transport=JobsGrpcAsyncIOTransport(channel=channel))
        executions = run_v2.ExecutionsAsyncClient(
            transport=ExecutionsGrpcAsyncIOTransport(channel=channel)
        )
        asked = [jobs.run_job(_asked(f"k{n}"), timeout=TIMEOUT) for n in range(chunks)]
        await asyncio.gather(*asked)
        noticed: dict[str, float] = {}
        while len(noticed) < chunks:
            await asyncio.sleep(1)
            request = run_v2.ListExecutionsRequest(parent=NAME, page_size=PAGE_SIZE)
            async for one in await executions.list_executions(request, timeout=TIMEOUT):
                if one.completion_time:
                    noticed.setdefault(f"{one.name}/0", time.time())
    return noticed


async def packed_floor(address: str, chunks: int) -> dict[str, float]:
    """Launch once with a task per chunk, look once a second, and list the tasks at the end."""
    async with grpc.aio.insecure_channel(address, options=_LARGE) as channel:
        jobs = run_v2.JobsAsyncClient(transport=JobsGrpcAsyncIOTransport(channel=channel))
        executions = run_v2.ExecutionsAsyncClient(
            transport=ExecutionsGrpcAsyncIOTransport(channel=channel)
        )
        tasks = run_v2.TasksAsyncClient(transport=TasksGrpcAsyncIOTransport(channel=channel))
        run = (await jobs.run_job(_asked("all", chunks), timeout=TIMEOUT)).metadata.name
        while not (await executions.get_execution(name=run, timeout=TIMEOUT)).completion_time:  # noqa: ASYNC110 - the API has no event to wait for
            await asyncio.sleep(1)
        request = run_v2.ListTasksRequest(parent=run, page_size=PAGE_SIZE)
        listed = await tasks.list_tasks(request, timeout=TIMEOUT)
        return {f"{run}/{task.index}": time.time() async for task in listed}


_LARGE = [("grpc.max_receive_message_length", -1)]

if __name__ == "__main__":
    way = packed_floor if sys.argv[3:] == ["packed"] else floor
    began, cpu = time.time(), time.process_time()
    seen = asyncio.run(way(sys.argv[1], int(sys.argv[2])))
    spent = time.process_time() - cpu
    print(json.dumps({"began": began, "noticed": seen, "cpu": spent}))
