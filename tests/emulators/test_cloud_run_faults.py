"""What can be made to go wrong, as the real client sees it over gRPC and REST."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
from emulators.cloud import JOB, Cloud, eventually
from google.api_core import exceptions
from google.cloud import run_v2

from dispatcher.emulators.cloud_run import Code, EmulatorOptions
from dispatcher.emulators.cloud_run.faults import (
    CONSTRUCTORS,
    Fault,
    Faults,
    Kind,
    clock_skew,
    fail_tasks,
    forget,
    forget_running,
    from_json,
    kill_tasks,
    lose_reply,
    outage,
    refuse,
    slow_cancel,
    slow_start,
    stale_lists,
)
from dispatcher.errors import ConfigurationError

Open = Callable[..., Cloud]
LOST = (exceptions.GoogleAPICallError, requests.exceptions.RequestException)


def test_a_refusal_before_accept_starts_nothing(opened: Open) -> None:
    cloud = opened(faults=(refuse("Jobs.RunJob", times=1),))
    with pytest.raises(exceptions.ServiceUnavailable):
        cloud.run()
    assert not cloud.emulator.world.executed
    cloud.run()
    assert len(cloud.emulator.world.executed) == 1
    assert cloud.emulator.refused["Jobs.RunJob", "UNAVAILABLE"] == 1


def left_waiting(cloud: Cloud) -> None:
    """Make a call that is accepted, and give it up."""
    request = run_v2.RunJobRequest(name=JOB)
    if cloud.transport == "grpc":
        # Not by a time limit: gRPC drops a call whose time is up before the server looked at it.
        call = cloud.jobs.transport.run_job.future(request)  # type: ignore[attr-defined]  # gRPC's
        eventually(lambda: cloud.emulator.world.executed)
        call.cancel()
    else:
        # What was sent is read, also if nobody waits for the answer any more.
        with pytest.raises(LOST):
            cloud.jobs.run_job(request, timeout=0.1)
        eventually(lambda: cloud.emulator.world.executed)


@pytest.mark.parametrize("reply", ["unavailable", "drop", "never"])
def test_a_reply_lost_after_accept_leaves_one_execution(opened: Open, reply: str) -> None:
    cloud = opened(faults=(lose_reply("Jobs.RunJob", reply, times=1),))
    if reply == "never":
        left_waiting(cloud)
    else:
        with pytest.raises(LOST):
            cloud.run()
    (accepted,) = cloud.emulator.world.executed
    # The same client goes on, over a new connection if need be.
    (listed,) = cloud.executions.list_executions(parent=JOB)
    assert listed.name == accepted.name
    call = eventually(lambda: [one for one in cloud.emulator.history if "RunJob" in one.method])[0]
    assert call.accepted
    assert call.subject == JOB
    assert call.code in (Code.UNAVAILABLE, Code.UNKNOWN)


def test_a_reply_may_just_be_late(opened: Open) -> None:
    cloud = opened(faults=(lose_reply("Jobs.RunJob", "late", seconds=0.3),))
    execution = cloud.run()
    assert cloud.finished(execution).name == execution.name


def test_a_share_of_the_calls_is_struck_and_the_same_ones_for_a_seed(opened: Open) -> None:
    def struck() -> list[bool]:
        cloud = opened(
            faults=(refuse("Executions.ListExecutions", share=0.3),),
            options=EmulatorOptions(seed=7),
        )
        seen = []
        for _ in range(40):
            try:
                list(cloud.executions.list_executions(parent=JOB))
            except exceptions.ServiceUnavailable:
                seen.append(True)
            else:
                seen.append(False)
        assert cloud.emulator.faults.struck["refuse"] == sum(seen)
        return seen

    first = struck()
    assert 4 <= sum(first) <= 20
    assert struck() == first


def test_an_outage_refuses_every_call_while_it_lasts(opened: Open) -> None:
    cloud = opened(script=lambda _: math.inf)
    execution = cloud.run()
    with cloud.emulator.faults.during(outage()):
        for call in (
            lambda: cloud.jobs.get_job(name=JOB),
            lambda: cloud.executions.get_execution(name=execution.name),
            lambda: list(cloud.tasks.list_tasks(parent=execution.name)),
        ):
            with pytest.raises(exceptions.ServiceUnavailable):
                call()
    assert cloud.executions.get_execution(name=execution.name).name == execution.name
    cloud.emulator.faults.add(outage(500))
    with pytest.raises(exceptions.ServiceUnavailable):
        cloud.jobs.get_job(name=JOB)
    cloud.emulator.world.advance(501)
    assert cloud.jobs.get_job(name=JOB).name == JOB


def test_stale_lists_show_what_was_so_some_seconds_ago(opened: Open) -> None:
    cloud = opened(script=lambda _: 300, faults=(stale_lists(500),))
    execution = cloud.run(task_count=2)
    eventually(lambda: cloud.emulator.world.busy == 2)

    def listed() -> list[tuple[int, int]]:
        found = cloud.executions.list_executions(parent=JOB)
        return [(one.running_count, one.succeeded_count) for one in found]

    assert listed() == []
    assert cloud.executions.get_execution(name=execution.name).running_count == 2
    cloud.emulator.world.advance(550)
    assert cloud.finished(execution).succeeded_count == 2
    assert listed() == [(2, 0)]
    assert [task.last_attempt_result.status.code for task in cloud.results(execution)] == [0, 0]
    assert not any(task.completion_time for task in cloud.results(execution))
    cloud.emulator.world.advance(300)
    assert listed() == [(0, 2)]
    assert all(task.completion_time for task in cloud.results(execution))


def test_a_slow_cancel_takes_effect_later(opened: Open) -> None:
    cloud = opened(script=lambda _: math.inf, faults=(slow_cancel(300),))
    execution = cloud.run()
    eventually(lambda: cloud.emulator.world.busy == 1)
    cloud.executions.cancel_execution(name=execution.name)
    now = cloud.executions.get_execution(name=execution.name)
    assert (now.running_count, now.cancelled_count) == (1, 0)
    assert now.conditions[-1].execution_reason == run_v2.Condition.ExecutionReason.CANCELLING
    cloud.emulator.world.advance(301)
    assert cloud.finished(execution).cancelled_count == 1


def test_a_slow_start_keeps_an_execution_pending(opened: Open) -> None:
    cloud = opened(faults=(slow_start(300),))
    execution = cloud.run()
    now = cloud.executions.get_execution(name=execution.name)
    assert not now.start_time
    assert now.conditions[-1].state == run_v2.Condition.State.CONDITION_PENDING
    cloud.emulator.world.advance(301)
    cloud.finished(execution)


def test_tasks_can_be_killed_or_made_to_fail(opened: Open) -> None:
    cloud = opened(
        script=lambda _: 5, faults=(kill_tasks(1, times=1), fail_tasks(9, skip=1, times=1))
    )
    execution = cloud.run(task_count=3)
    eventually(lambda: len(cloud.emulator.world.starts) == 3)
    cloud.emulator.world.advance(6)
    execution = cloud.finished(execution)
    results = [task.last_attempt_result for task in cloud.results(execution)]
    assert [(one.exit_code, one.term_signal) for one in results] == [(0, 9), (9, 0), (0, 0)]


def test_a_record_that_was_there_can_vanish(opened: Open) -> None:
    cloud = opened(script=lambda _: math.inf)
    execution = cloud.run()
    eventually(lambda: cloud.emulator.world.busy == 1)
    cloud.emulator.world.forget(execution.name)
    with pytest.raises(exceptions.NotFound):
        cloud.executions.get_execution(name=execution.name)
    assert not list(cloud.executions.list_executions(parent=JOB))
    assert cloud.emulator.world.busy == 1
    cloud.emulator.faults.add(forget())
    other = cloud.run(task_count=2)
    cloud.executions.cancel_execution(name=other.name)
    eventually(lambda: [one for one in cloud.emulator.world.executed if one.deleted and one.done])
    with pytest.raises(exceptions.NotFound):
        cloud.executions.get_execution(name=other.name)


def test_a_record_can_vanish_while_its_execution_runs_on(opened: Open, tmp_path: Path) -> None:
    path = tmp_path / "faults.json"
    path.write_text(json.dumps([{"fault": "forget_running", "seconds": 200, "times": 1}]))
    assert from_json(path) == (forget_running(200, times=1),)
    cloud = opened(script=lambda _: 500, faults=from_json(path))
    execution, other = cloud.run(), cloud.run()
    eventually(lambda: cloud.emulator.world.busy == 2)
    assert cloud.executions.get_execution(name=execution.name).running_count == 1
    cloud.emulator.world.advance(201)
    (gone, _) = cloud.emulator.world.executed
    eventually(lambda: gone.deleted)
    assert (gone.done, cloud.emulator.world.busy) == (False, 2)
    with pytest.raises(exceptions.NotFound):
        cloud.executions.get_execution(name=execution.name)
    assert [one.name for one in cloud.executions.list_executions(parent=JOB)] == [other.name]
    cloud.emulator.world.advance(500)
    eventually(lambda: gone.done)
    assert cloud.finished(other).succeeded_count == 1


def test_a_skewed_clock_shows_in_every_time(opened: Open) -> None:
    cloud = opened()
    execution = cloud.finished(cloud.run())
    with cloud.emulator.faults.during(clock_skew(-3600)):
        earlier = cloud.executions.get_execution(name=execution.name)
        assert (execution.create_time - earlier.create_time).total_seconds() == 3600
        assert (execution.completion_time - earlier.completion_time).total_seconds() == 3600
    assert cloud.executions.get_execution(name=execution.name).create_time == execution.create_time


def test_with_a_seed_the_same_calls_are_struck_however_they_come() -> None:
    """Calls of other faults, which come in any order, take nothing from a fault's own draws."""

    def struck(order: str) -> list[bool]:
        faults = Faults(lambda: 0.0, seed=4)
        faults.add(refuse(share=0.5), kill_tasks(share=0.5))
        kinds = {"r": Kind.REFUSE, "k": Kind.KILL_TASKS}
        hits = [(one, faults.strike(kinds[one], "Jobs.RunJob") is not None) for one in order]
        return [hit for one, hit in hits if one == "r"]

    assert struck("r" * 40) == struck("rk" * 40) == struck("k" * 40 + "r" * 40)
    assert {*struck("r" * 40)} == {True, False}


def test_every_fault_can_be_written_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "faults.json"
    path.write_text(
        json.dumps(
            [
                {"fault": "lose_reply", "on": "Jobs.RunJob", "reply": "drop", "share": 0.3},
                {"fault": "refuse", "code": "RESOURCE_EXHAUSTED", "starts": 5, "lasts": 2},
                {"fault": "stale_lists", "seconds": 5},
            ]
        )
    )
    assert from_json(path) == (
        lose_reply("Jobs.RunJob", "drop", share=0.3),
        refuse(code="RESOURCE_EXHAUSTED", starts=5, lasts=2),
        stale_lists(5),
    )
    path.write_text(json.dumps([{"fault": name, "seconds": 1} for name in CONSTRUCTORS]))
    assert all(isinstance(one, Fault) for one in from_json(path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read"),
        ("{}", "a list of faults"),
        ('[{"fault": "fire"}]', "'fault' is 'fire'; allowed: refuse"),
        ('[{"fault": "refuse", "often": 1}]', "refuse has no often; allowed: code"),
        ('[{"fault": "refuse", "code": "TEAPOT"}]', "TEAPOT"),
        ('[{"fault": "refuse", "share": 3}]', "share is 3, allowed: 0 to 1"),
    ],
)
def test_a_file_of_faults_that_is_wrong_is_refused_in_words(
    tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "faults.json"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=said):
        from_json(path)
