"""Every reason that can hold a batch or a chunk up has its sentence, and its code for programs."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeAlias

import pytest
from workbench import HERE, LEASE, Bench, job

from dispatcher.errors import InvalidInput, UnknownBatch
from dispatcher.explaining import Explanation, explain
from dispatcher.moments import clock
from dispatcher.rendering import batch_row, summary
from dispatcher.states import Outcome
from dispatcher.testing import Ending, Fault

MakeBench: TypeAlias = Callable[..., Bench]

LONG = Ending(seconds=100_000.0)


def awake(bench: Bench, host: str = "h1", **problems: str) -> None:
    """A worker says that it lives, and leads its target with the limits of the configuration."""
    bench.store.beat(host=host, pid=7, version="0.1.0", problems=problems)
    target = bench.config.targets[HERE]
    limits = target.model_dump(
        mode="json", include={"max_running", "max_executions", "launches_per_minute"}
    )
    grace = bench.engine.places[HERE].backend.limits.absent_grace
    limits["absent_grace"] = grace.total_seconds()
    bench.store.lease(HERE, backend="null", limits=limits, home=None, lease=LEASE)


def nobody_leads(bench: Bench, **home: str) -> None:
    """The target's lease runs out now, and it may have a home."""
    bench.store.lease(
        HERE, backend="null", limits={}, home=home or None, lease=timedelta(seconds=0)
    )


def told(bench: Bench, batch: Any, chunk: int | None = None) -> Explanation:
    return explain(bench.store, batch.id, chunk)


def codes(explanation: Explanation) -> list[str]:
    return [reason["code"] for reason in explanation.facts["reasons"]]


def reason(explanation: Explanation, code: str) -> dict[str, Any]:
    [found] = [one for one in explanation.facts["reasons"] if one["code"] == code]
    return dict(found)


def text(explanation: Explanation, code: str) -> str:
    return str(reason(explanation, code)["text"])


def at(bench: Bench, seconds: float = 0.0) -> str:
    """The time in so many seconds, as sentences have it."""
    return clock(bench.at + timedelta(seconds=seconds), bench.at)


# --- who serves it --------------------------------------------------------------------------------


def test_without_any_worker_that_comes_first(bench: Bench) -> None:
    batch = bench.enqueue([1])
    said = told(bench, batch)
    assert codes(said) == ["no_worker", "unplanned", "deadline"]
    assert said.text == (
        "Nothing moves: no worker has ever been alive; start one. "
        f"It was enqueued just now ({at(bench)}) and waits to be planned (its items are stored). "
        f"What is not final by its deadline in 24 h ({at(bench, 86400)}) is ended and fails."
    )


def test_a_worker_that_fell_silent_is_named_by_its_last_heartbeat(bench: Bench) -> None:
    awake(bench)
    batch = bench.enqueue([1])
    bench.script(LONG)
    bench.turn()
    bench.turn()
    bench.advance(18 * 60)
    said = told(bench, batch)
    assert codes(said)[0] == "no_worker"
    assert text(said, "no_worker") == (
        f"Nothing moves: no worker has been alive since {at(bench, -1080)} (18 min ago); start "
        "one. What runs already runs on."
    )


def test_a_worker_that_stopped_is_not_alive(bench: Bench) -> None:
    awake(bench)
    bench.store.release()
    assert codes(told(bench, bench.enqueue([1])))[0] == "no_worker"


def test_a_batch_of_newer_code_waits_for_a_newer_worker(bench: Bench) -> None:
    awake(bench)
    batch = bench.enqueue([1])
    bench.sql("UPDATE dispatcher.batch SET code_version = 9")
    said = told(bench, batch)
    assert text(said, "newer_code") == (
        "It was written by newer code (version 9) than any worker that is alive understands "
        "(version 3): it waits for a newer worker."
    )
    assert "waits to be planned (its items are stored)." in said.text


def test_a_job_that_this_code_cannot_read_is_explained_all_the_same(bench: Bench) -> None:
    awake(bench)
    batch = bench.enqueue([1])
    bench.plan()
    bench.sql("""UPDATE dispatcher.batch SET code_version = 9, job = '{"later": true}'""")
    assert codes(told(bench, batch)) == ["newer_code", "progress", "due", "deadline"]


def test_a_target_that_no_worker_knows_is_named(bench: Bench) -> None:
    batch = bench.enqueue([1])
    bench.store.beat(host="h1", pid=7, version="0.1.0", problems={})
    bench.sql("DELETE FROM dispatcher.target")
    assert text(told(bench, batch), "unserved") == (
        "No worker that is alive serves target here: is it in the jobs file of the workers?"
    )


def test_what_workers_say_of_a_target_that_they_do_not_serve_is_told(bench: Bench) -> None:
    awake(bench)
    batch = bench.enqueue([1])
    bench.plan()
    nobody_leads(bench)
    bench.advance(40)
    bench.store.beat(host="h1", pid=7, version="0.1.0", problems={HERE: "its key has expired"})
    said = told(bench, batch)
    assert codes(said) == ["unserved", "progress", "due", "deadline"]
    assert text(said, "unserved") == (
        f"No worker that is alive serves target here since {at(bench, -40)} (40 s ago): its key "
        "has expired."
    )


def test_a_target_with_a_home_waits_for_a_worker_there(bench: Bench) -> None:
    awake(bench, host="elsewhere")
    batch = bench.enqueue([1])
    bench.plan()
    nobody_leads(bench, host="h2")
    assert text(told(bench, batch), "home") == (
        "Only host h2 can serve target here, and no worker there is alive: start one there."
    )


# --- planning -------------------------------------------------------------------------------------


def test_a_batch_that_was_just_enqueued_waits_for_the_next_sweep(bench: Bench) -> None:
    awake(bench)
    said = told(bench, bench.enqueue([1]))
    assert text(said, "unplanned") == (
        f"It was enqueued just now ({at(bench)}) and waits to be planned (its items are stored); "
        "a worker's next sweep plans it within seconds."
    )


def test_a_batch_that_reads_a_uri_says_so(bench: Bench) -> None:
    awake(bench)
    said = told(bench, bench.enqueue("s3://bucket/items.jsonl"))
    assert "its items will be read from s3://bucket/items.jsonl" in said.text


def test_a_batch_that_is_being_planned_is_told_from_one_that_waits(bench: Bench) -> None:
    awake(bench)
    batch = bench.enqueue([1])
    with bench.store.planning(batch.id) as planning:
        assert planning is not None
        said = told(bench, batch)
    assert codes(said) == ["being_planned", "deadline"]
    assert codes(told(bench, batch)) == ["unplanned", "deadline"]


def test_a_plan_that_was_put_off_says_why_and_until_when(bench: Bench) -> None:
    awake(bench)
    batch = bench.enqueue([1])
    bench.store.postpone_plan(batch.id, timedelta(minutes=3), "storage does not answer")
    said = told(bench, batch)
    assert text(said, "plan_postponed") == (
        "Planning was put off after 1 try: storage does not answer. The next try is in 3 min "
        f"({at(bench, 180)})."
    )


# --- running, and waiting for room ----------------------------------------------------------------


def test_progress_and_the_oldest_running_chunk_are_told(make_bench: MakeBench) -> None:
    bench = make_bench(limits={"max_running": 2})
    awake(bench)
    bench.world.script = lambda _batch, chunk, _attempt: Ending() if chunk < 2 else LONG
    batch = bench.enqueue(range(4))
    bench.turn()
    bench.turn(2)
    bench.turn(2)
    bench.turn(2)
    said = told(bench, batch)
    assert text(said, "progress") == "2 of 4 chunks are final (2 succeeded)."
    assert text(said, "running").startswith(
        "2 chunks run in 2 executions, the oldest (chunk 2) since "
    )
    assert reason(said, "progress")["counts"]["running"] == 2


def test_full_slots_of_the_target_name_who_holds_them(make_bench: MakeBench) -> None:
    bench = make_bench(limits={"max_running": 3})
    awake(bench)
    bench.script(LONG)
    first = bench.enqueue(range(2))
    bench.turn()
    second = bench.enqueue(range(5))
    bench.turn()
    said = told(bench, second)
    assert text(said, "target_slots") == (
        "4 chunks could be launched now, but all 3 slots of target here (max_running) are held, "
        f"2 by batch {first.id} (work) and 1 by batch {second.id} (work): the next goes out when "
        "one is given back."
    )
    assert reason(said, "target_slots")["held_by"] == [
        {"batch": first.id, "job": "work", "slots": 2, "executions": 2},
        {"batch": second.id, "job": "work", "slots": 1, "executions": 1},
    ]
    assert text(told(bench, second, 4), "target_slots").startswith(
        "Chunk 4 could be launched now, but all 3 slots of target here (max_running) are held, "
    )


def test_the_smallest_of_many_holders_are_only_counted(make_bench: MakeBench) -> None:
    bench = make_bench(limits={"max_running": 5})
    awake(bench)
    bench.script(LONG)
    for _ in range(5):
        bench.enqueue([1])
    bench.turn()
    batch = bench.enqueue([1])
    bench.plan()
    said = told(bench, batch)
    assert " and 2 by 2 more: the next goes out" in said.text


def test_full_executions_of_the_target_are_told(make_bench: MakeBench) -> None:
    bench = make_bench(limits={"max_executions": 1})
    awake(bench)
    bench.script(LONG)
    batch = bench.enqueue(range(2))
    bench.turn()
    assert text(told(bench, batch), "target_executions") == (
        "1 chunk could be launched now, but all 1 executions of target here (max_executions) are "
        f"held, 1 by batch {batch.id} (work): the next goes out when one is given back."
    )


def test_full_slots_of_the_job_are_told(make_bench: MakeBench) -> None:
    bench = make_bench(job(limits={"running": 1}))
    awake(bench)
    bench.script(LONG)
    first = bench.enqueue([1])
    bench.turn()
    second = bench.enqueue([1])
    bench.turn()
    assert text(told(bench, second), "job_slots") == (
        "1 chunk could be launched now, but all 1 slots of job work (limits.running) are held, 1 "
        f"by batch {first.id} (work): the next goes out when one is given back."
    )


def test_full_slots_of_the_batch_are_told(make_bench: MakeBench) -> None:
    bench = make_bench(job(limits={"per_batch": 1}))
    awake(bench)
    bench.script(LONG)
    batch = bench.enqueue(range(2))
    bench.turn()
    assert text(told(bench, batch), "batch_slots").startswith(
        "1 chunk could be launched now, but all 1 slots of this batch (limits.per_batch) are held,"
    )


def test_an_empty_bucket_of_launch_calls_says_when_the_next_one_is_due(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(limits={"launches_per_minute": 1.0})
    awake(bench)
    bench.script(LONG)
    batch = bench.enqueue(range(3))
    bench.turn()
    said = told(bench, batch)
    assert text(said, "launch_rate") == (
        "2 chunks could be launched now, but target here may be called 1 times a minute "
        f"(launches_per_minute); the next call is due in 60 s ({at(bench, 60)})."
    )
    bench.store.slow_down(HERE, "launch")
    assert "(launches_per_minute, slowed to 50% after throttling)" in told(bench, batch).text


def test_a_job_that_was_refused_for_now_says_when_it_is_called_again(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(concurrency=1)
    awake(bench)
    bench.world.fail_next("launch", Fault.THROTTLED)
    batch = bench.enqueue(range(3))
    bench.turn()
    second = bench.enqueue([1])
    bench.plan()
    said = told(bench, second)
    assert text(said, "target_throttled") == (
        "1 chunk could be launched now, but target here refuses launches for now; they resume "
        f"in 8 s ({at(bench, 7.5)})."
    )
    assert text(said, "job_throttled") == (
        "Also, target here has refused an execution of job work for now (scripted fault of "
        "launch: throttled), and what was asked for before comes first: called again in 8 s "
        f"({at(bench, 7.5)})."
    )
    assert bench.finish(batch).state == "succeeded"


def test_a_bucket_that_is_not_empty_holds_nothing_up(make_bench: MakeBench) -> None:
    bench = make_bench(limits={"launches_per_minute": 600.0})
    awake(bench)
    batch = bench.enqueue([1])
    bench.turn()
    second = bench.enqueue([1])
    bench.plan()
    assert batch.refresh().state == "running"
    assert codes(told(bench, second)) == ["progress", "launching_soon", "deadline"]


def test_a_target_that_is_down_says_when_launches_resume(bench: Bench) -> None:
    awake(bench)
    batch = bench.enqueue([1])
    bench.plan()
    bench.store.target_down(HERE, "connection refused", resume_in=None)
    bench.advance(5)
    bench.store.target_down(HERE, "connection refused", resume_in=7.0)
    said = told(bench, batch)
    assert codes(said) == ["progress", "target_down", "deadline"]
    assert text(said, "target_down") == (
        "1 chunk could be launched now, but target here does not answer since "
        f"{at(bench, -5)} (5 s ago) (connection refused); launches resume in 7 s ({at(bench, 7)})."
    )


def test_news_of_a_target_that_cannot_be_polled_are_said_to_be_late(bench: Bench) -> None:
    awake(bench)
    bench.script(LONG)
    batch = bench.enqueue([1])
    bench.turn()
    bench.store.target_down(HERE, "throttled", resume_in=None)
    expected = (
        f"Target here does not answer since {at(bench)} (just now) (throttled): what has ended "
        "there is noted when it does."
    )
    assert text(told(bench, batch), "target_down") == expected
    assert text(told(bench, batch, 0), "target_down") == expected


def test_batches_of_a_higher_priority_go_first(bench: Bench) -> None:
    awake(bench)
    low = bench.enqueue([1])
    high = bench.enqueue([1], priority=10)
    bench.plan()
    assert text(told(bench, low), "priority") == (
        "1 chunk could be launched now; of a higher priority, and first, is batch "
        f"{high.id} (work, priority 10)."
    )
    assert text(told(bench, high), "launching_soon") == (
        "1 chunk could be launched now: the next round of launches is a second or two away."
    )


# --- retries --------------------------------------------------------------------------------------


def test_a_retry_says_when_it_is_due_and_after_what(bench: Bench) -> None:
    awake(bench)
    bench.script(Ending(Outcome.FAILED, exit_code=1), Ending(Outcome.FAILED, exit_code=1), LONG)
    batch = bench.enqueue([1])
    bench.turn()
    bench.turn(2)
    bench.turn(10)
    bench.turn(2)
    said = told(bench, batch)
    assert codes(said) == ["progress", "retry_due", "deadline"]
    expected = (
        f"A retry of chunk 0 is due in 20 s ({at(bench, 20)}), after attempt 2 failed with exit "
        "code 1 (2 of 3 attempts used)."
    )
    assert text(said, "retry_due") == expected
    assert told(bench, batch, 0).text == expected
    found = reason(told(bench, batch, 0), "retry_due")
    assert (found["exit_code"], found["used"], found["budget"]) == (1, 2, 3)


def test_further_retries_are_counted(bench: Bench) -> None:
    awake(bench)
    bench.script(Ending(Outcome.LOST))
    batch = bench.enqueue(range(3))
    bench.turn()
    bench.turn(2)
    assert text(told(bench, batch), "retry_due") == (
        f"A retry of chunk 0 is due in 10 s ({at(bench, 10)}), after attempt 1 lost "
        "(1 of 5 infrastructure attempts used); 2 chunks more wait for theirs."
    )


def test_a_lack_of_capacity_uses_no_budget(bench: Bench) -> None:
    awake(bench)
    bench.script(Ending(Outcome.NO_CAPACITY))
    batch = bench.enqueue([1])
    bench.turn()
    bench.turn(2)
    assert text(told(bench, batch), "retry_due").endswith(", after attempt 1 no capacity.")


def test_retries_wait_for_company_in_a_pack(make_bench: MakeBench) -> None:
    packed = job(options={"max_tasks": 4, "parallelism": 4}, retry={"initial": "1s"})
    bench = make_bench(packed)
    awake(bench)
    bench.world.script = lambda _batch, chunk, attempt: (
        Ending(Outcome.FAILED) if (chunk, attempt) == (0, 1) else LONG
    )
    batch = bench.enqueue(range(4))
    bench.turn()
    bench.turn(2)
    bench.advance(2)
    left = bench.sql("SELECT hold_until FROM dispatcher.chunk WHERE index = 0")[0] - bench.at
    expected = (
        "Chunk 0 waits for other retries to share an execution with, and will be due in "
        f"{left.total_seconds():.0f} s ({at(bench, left.total_seconds())}) at the latest."
    )
    assert told(bench, batch, 0).text == expected
    assert text(told(bench, batch), "held_for_pack").startswith("1 chunk waits for other retries")


def test_a_chunk_that_waits_for_room_again_says_after_what(make_bench: MakeBench) -> None:
    bench = make_bench(limits={"max_running": 1})
    awake(bench)
    bench.world.script = lambda _batch, chunk, attempt: (
        Ending(Outcome.FAILED) if (chunk, attempt) == (0, 1) else LONG
    )
    batch = bench.enqueue(range(2))
    bench.turn()
    bench.turn(2)
    bench.turn(2)
    bench.advance(20)
    assert told(bench, batch, 0).text.startswith(
        "Chunk 0 could be launched now, after attempt 1 failed with exit code 1 (1 of 3 attempts "
        "used), but all 1 slots of target here (max_running) are held, "
    )


# --- executions on their way ----------------------------------------------------------------------


def stuck(bench: Bench, **columns: Any) -> Any:
    """A batch of one chunk whose launch is committed, and its execution as the columns say."""
    bench.script(LONG)
    batch = bench.enqueue([1])
    bench.plan()
    bench.world.fail_next("launch", Fault.THROTTLED, retry_after=timedelta(seconds=30))
    bench.launch()
    for column, value in columns.items():
        statement = f"UPDATE dispatcher.execution SET {column} = :value"  # noqa: S608 - a name
        bench.sql(statement, value=value)
    return batch


def test_a_launch_call_that_is_being_made_is_told(bench: Bench) -> None:
    awake(bench)
    batch = stuck(bench, next_call_at=None, call_by=bench.at + timedelta(seconds=15), reason=None)
    assert told(bench, batch, 0).text == (
        "Attempt 1 of chunk 0 is being launched: worker-1 is making the call, which must begin "
        f"in 15 s ({at(bench, 15)})."
    )
    bench.advance(20)
    awake(bench)
    assert text(told(bench, batch), "calling") == (
        "One execution (chunk 0) is being launched: worker-1 is making the call; no answer was "
        "recorded in time, so it is looked up by its key next."
    )


def test_a_throttled_launch_says_when_it_is_called_again(bench: Bench) -> None:
    awake(bench)
    batch = stuck(bench)
    assert told(bench, batch, 0).text == (
        "Attempt 1 of chunk 0 is waiting to be called again, next in 45 s "
        f"({at(bench, 45)}): scripted fault of launch: throttled. It costs no attempt."
    )


def test_an_unclear_launch_says_that_it_is_looked_up(bench: Bench) -> None:
    awake(bench)
    bench.script(LONG)
    batch = bench.enqueue([1])
    bench.plan()
    bench.world.fail_next("launch", Fault.UNAVAILABLE)
    bench.launch()
    bench.sql(
        "UPDATE dispatcher.execution SET looks = 1, next_look_at = :at",
        at=bench.at + timedelta(seconds=2),
    )
    said = told(bench, batch, 0)
    assert text(said, "unknown") == (
        "It is not known whether the launch of attempt 1 of chunk 0 started anything (call of "
        f"just now ({at(bench)}): Unavailable: scripted fault of launch: unavailable): it is "
        f"looked up by its key on target here, next in 2 s ({at(bench, 2)}); 1 look found nothing "
        "so far."
    )


def test_an_execution_that_has_not_started_says_until_when(bench: Bench) -> None:
    awake(bench)
    bench.script(Ending(start_seconds=3600, seconds=1))
    batch = bench.enqueue([1])
    bench.turn()
    bench.turn(2)
    bench.advance(58)
    awake(bench)
    assert told(bench, batch, 0).text == (
        "Attempt 1 of chunk 0 is accepted by target here since "
        f"{at(bench, -60)} (60 s ago), which counts as running, and not started yet; given up if "
        f"not started in 9 min ({at(bench, 540)})."
    )


def test_a_running_chunk_says_since_when_and_how_long_it_may(bench: Bench) -> None:
    awake(bench)
    bench.script(LONG)
    batch = bench.enqueue([1])
    bench.turn()
    bench.turn(2)
    bench.advance(18 * 60 - 2)
    awake(bench)
    handle = bench.sql("SELECT handle FROM dispatcher.execution")[0]
    assert told(bench, batch, 0).text == (
        f"Attempt 1 of chunk 0 runs since {at(bench, -1080)} (18 min ago) as {handle} on target "
        f"here; a task is stopped after 60 min, the execution at the latest in 52 min "
        f"({at(bench, 4230 - 1080)})."
    )


def test_a_chunk_in_a_pack_says_with_how_many(make_bench: MakeBench) -> None:
    bench = make_bench(job(options={"max_tasks": 3, "parallelism": 3}))
    awake(bench)
    bench.script(LONG)
    batch = bench.enqueue(range(3))
    bench.turn()
    bench.turn(2)
    assert ", an execution with 3 open tasks; a task is" in told(bench, batch, 1).text


def test_an_execution_that_the_provider_does_not_know_says_since_when(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(settings={"absent_grace": timedelta(minutes=5)})
    awake(bench)
    bench.script(LONG)
    batch = bench.enqueue([1])
    bench.turn()
    bench.turn(2)
    bench.world.vanish(bench.world.handles()[0])
    bench.turn(2)
    assert told(bench, batch, 0).text == (
        f"Attempt 1 of chunk 0 is unknown to target here since {at(bench)} (just now); if that "
        f"stays so for its grace until {at(bench, 300)}, it counts as lost after a last cancel."
    )


def test_an_execution_that_is_ended_for_its_time_says_so(bench: Bench) -> None:
    awake(bench)
    bench.world.enforces_timeout = False
    bench.script(LONG)
    batch = bench.enqueue([1])
    bench.turn()
    bench.turn(2)
    bench.advance(4300)
    awake(bench)
    bench.world.fail_next("cancel", Fault.UNAVAILABLE, times=9)
    bench.follow()
    bench.follow()
    said = told(bench, batch, 0)
    assert text(said, "cancelling") == (
        f"Attempt 1 of chunk 0 is being ended since {at(bench)} (just now), as it ran past its "
        f"deadline; the provider is asked again in 2 s ({at(bench, 2)}) (1 call so far)."
    )


def test_an_attempt_that_is_settled_while_one_asks_is_no_error(bench: Bench) -> None:
    awake(bench)
    batch = stuck(bench)
    # As if another transaction had settled the execution and not yet shown the chunk.
    bench.sql("UPDATE dispatcher.execution SET batch_id = 'another'")
    assert told(bench, batch, 0).text == ("Chunk 0 has moved on at this very moment; ask again.")
    bench.sql("UPDATE dispatcher.execution SET batch_id = :id", id=batch.id)


def test_a_chunk_that_was_split_names_the_chunks_in_which_its_items_go_on(
    make_bench: MakeBench,
) -> None:
    split = {"attempts": 1, "on_failure": "split"}
    bench = make_bench(job(chunk={"size": 4}, retry=split, receipt="ignored"))
    awake(bench)
    bench.world.script = lambda _batch, chunk, _attempt: (
        Ending(Outcome.FAILED, exit_code=1) if chunk == 0 else LONG
    )
    batch = bench.enqueue(range(4))
    bench.turn()
    bench.turn(2)
    bench.advance(600)
    said = told(bench, batch, 0)
    assert said.text == (
        f"Chunk 0 was split 10 min ago ({at(bench, -600)}) after attempt 1: failed with exit code "
        "1; 1 of 1 attempts used. Its items go on in chunks 1 and 2."
    )
    assert reason(said, "split")["parts"] == [1, 2]
    with pytest.raises(InvalidInput, match=r" has no chunk 3: its chunks are 0 to 2$"):
        told(bench, batch, 3)


# --- cancel, deadline -----------------------------------------------------------------------------


def test_a_cancel_says_who_asked_when_and_what_is_confirmed(bench: Bench) -> None:
    awake(bench)
    bench.world.script = lambda _batch, chunk, _attempt: Ending(seconds=4) if chunk == 0 else LONG
    batch = bench.enqueue(range(3))
    bench.turn()
    bench.turn(2)
    bench.world.fail_next("cancel", Fault.UNAVAILABLE, times=9)
    bench.dispatcher.cancel(batch.id, "wrong month")
    bench.follow()
    bench.turn(3)
    said = told(bench, batch)
    assert codes(said) == ["progress", "cancelling"]
    found = reason(said, "cancelling")
    assert (found["actor"], found["executions"], found["confirmed"]) == ("app", 3, 1)
    next_call = bench.sql("SELECT min(next_cancel_at) FROM dispatcher.execution")[0]
    assert text(said, "cancelling").startswith(
        f"app asked 3 s ago ({at(bench, -3)}) for its cancel (wrong month); 1 of 3 executions is "
        "confirmed to have ended, and the provider is asked again in "
        f"{(next_call - bench.at).total_seconds():.0f} s "
    )


def test_a_batch_that_can_no_longer_succeed_is_being_ended(make_bench: MakeBench) -> None:
    success = {"max_failed_chunks": 0, "stop_early": True}
    bench = make_bench(job(success=success, retry={"attempts": 1}))
    awake(bench)
    bad = Ending(Outcome.FAILED, exit_code=1)
    bench.world.script = lambda _batch, chunk, _attempt: bad if chunk == 0 else LONG
    batch = bench.enqueue(range(2))
    bench.turn()
    bench.world.fail_next("cancel", Fault.UNAVAILABLE, times=9)
    bench.turn(2)
    bench.follow()
    assert "the batch can no longer succeed" in text(told(bench, batch, 1), "cancelling")
    assert "1 of 1 chunk failed" in text(told(bench, batch), "cancelling")


def test_a_cancelled_launch_that_is_unclear_is_only_looked_for(bench: Bench) -> None:
    awake(bench)
    bench.script(LONG)
    batch = bench.enqueue([1])
    bench.plan()
    bench.world.fail_next("launch", Fault.UNAVAILABLE)
    bench.launch()
    bench.dispatcher.cancel(batch.id, "no")
    assert "one whose launch is unclear is looked up by its key and never launched again" in (
        told(bench, batch).text
    )


def test_a_cancelled_launch_whose_call_is_open_is_waited_for(bench: Bench) -> None:
    awake(bench)
    batch = stuck(bench)
    bench.dispatcher.cancel(batch.id, "no")
    assert "one that was about to be launched is settled when its call is over" in (
        told(bench, batch).text
    )


def test_a_batch_past_its_deadline_is_being_ended(bench: Bench) -> None:
    awake(bench)
    bench.script(Ending(start_seconds=100_000))
    batch = bench.enqueue([1])
    bench.turn()
    bench.world.fail_next("cancel", Fault.UNAVAILABLE, times=9)
    bench.advance(86400)
    awake(bench)
    bench.plan()
    assert text(told(bench, batch), "cancelling").startswith(
        f"It is being ended since {at(bench)} (just now): the batch's deadline passed; 0 of 1 "
        "execution is confirmed to have ended, and the provider is asked again at once"
    )


def test_a_running_batch_without_an_open_chunk_is_about_to_end(bench: Bench) -> None:
    awake(bench)
    batch = bench.enqueue([1])
    bench.finish(batch)
    with bench.database.begin() as tx:
        tx.exec_driver_sql(
            "UPDATE dispatcher.batch SET state = 'running', reason = NULL, finished_at = NULL"
        )
    assert codes(told(bench, batch)) == ["progress", "verdict"]
    bench.sql("UPDATE dispatcher.batch SET state = 'succeeded', finished_at = now()")


# --- the end --------------------------------------------------------------------------------------


def test_a_batch_that_succeeded_says_so_in_a_sentence(bench: Bench) -> None:
    batch = bench.enqueue(range(3))
    bench.finish(batch)
    took = (batch.refresh().finished_at or bench.at) - batch.created_at
    bench.advance(600)
    said = told(bench, batch)
    assert codes(said) == ["succeeded"]
    assert said.text == (
        f"It succeeded 10 min ago ({at(bench, -600)}), after {took.total_seconds():.0f} s: all 3 "
        "chunks succeeded."
    )
    assert told(bench, batch, 1).text == (
        f"Chunk 1 succeeded 10 min ago ({at(bench, -600)}) with attempt 1."
    )


def test_a_batch_without_items_says_so(bench: Bench) -> None:
    batch = bench.enqueue([])
    bench.plan()
    assert told(bench, batch).text.endswith(": it had no items.")


def test_failures_that_are_allowed_can_still_be_retried(make_bench: MakeBench) -> None:
    bench = make_bench(job(success={"max_failed_chunks": 1}, retry={"attempts": 1}))
    bench.world.script = lambda _batch, chunk, _attempt: (
        Ending(Outcome.FAILED) if chunk == 1 else Ending()
    )
    batch = bench.enqueue(range(3))
    bench.finish(batch)
    said = told(bench, batch)
    assert codes(said) == ["succeeded", "failed_chunk", "retry"]
    assert "1 of 3 chunks failed, allowed" in said.text


def test_a_failed_batch_names_its_first_failures_and_the_way_back(make_bench: MakeBench) -> None:
    bench = make_bench(job(retry={"attempts": 1, "exit_codes": {65: "fail"}}))
    bench.script(Ending(Outcome.FAILED, exit_code=65))
    batch = bench.enqueue(range(4))
    bench.finish(batch)
    said = told(bench, batch)
    assert codes(said) == ["failed", *["failed_chunk"] * 3, "retry"]
    assert said.text == (
        f"It failed just now ({at(bench)}): 4 of 4 chunks failed. "
        "Chunk 0: failed with exit code 65; the job says not to retry exit code 65. "
        "Chunk 1: as chunk 0. Chunk 2: as chunk 0. "
        f"`dispatcher retry --failed {batch.id}` runs 4 chunks again, with fresh budgets."
    )
    assert told(bench, batch, 3).text == (
        f"Chunk 3 failed just now ({at(bench)}) after 1 attempt: failed with exit code 65; the "
        f"job says not to retry exit code 65. `dispatcher retry --failed {batch.id}` runs 4 "
        "chunks again, with fresh budgets."
    )


def test_a_reason_that_ends_with_a_stop_is_said_once_and_has_one_stop(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(job(retry={"attempts": 1}))
    awake(bench)
    bench.script(Ending(Outcome.FAILED, exit_code=1, reason="The container exited with an error."))
    batch = bench.enqueue([1])
    assert text(told(bench, batch), "unplanned")
    bench.plan()
    assert text(told(bench, batch), "progress") == "0 of 1 chunk is final."
    bench.finish(batch)
    said = told(bench, batch).text
    assert said.count("The container exited with an error") == 1
    assert ".." not in said
    assert f"exited with an error. `dispatcher retry --failed {batch.id}`" in said
    assert ".." not in told(bench, batch, 0).text


def test_an_outage_that_a_launch_met_is_told_in_full_only_once(bench: Bench) -> None:
    awake(bench)
    batch = bench.enqueue([1])
    bench.plan()
    why = "Unavailable: 503 the service is unavailable, please try again later."
    bench.world.fail_next("launch", Fault.UNAVAILABLE)
    bench.launch()
    bench.sql("UPDATE dispatcher.execution SET reason = :why", why=why)
    bench.store.target_down(HERE, why.removeprefix("Unavailable: "), resume_in=None)
    bench.sql("UPDATE dispatcher.target SET resume_at = NULL")
    said = told(bench, batch)
    assert {"unknown", "target_down"} <= set(codes(said))
    assert said.text.count("503 the service is unavailable") == 1
    assert "(as said above)" in text(said, "target_down")
    assert reason(said, "target_down")["reason"].startswith("503 the service")


def test_a_failed_chunk_of_a_batch_that_runs_waits_for_its_end(make_bench: MakeBench) -> None:
    bench = make_bench(job(retry={"attempts": 1}))
    awake(bench)
    bench.world.script = lambda _batch, chunk, _attempt: (
        Ending(Outcome.FAILED) if chunk == 0 else LONG
    )
    batch = bench.enqueue(range(2))
    bench.turn()
    bench.turn(2)
    assert told(bench, batch, 0).text.endswith(" It can be retried when the batch has ended.")


def test_a_retry_by_an_operator_forgives_what_was_used(make_bench: MakeBench) -> None:
    bench = make_bench(job(retry={"attempts": 2}))
    awake(bench)
    bench.script(*[Ending(Outcome.FAILED, exit_code=1)] * 3)
    batch = bench.enqueue([1])
    bench.finish(batch)
    bench.dispatcher.retry(batch.id)
    assert ", after attempt 2 failed with exit code 1: the next" in told(bench, batch, 0).text
    bench.launch()
    bench.turn(2)
    assert "after attempt 3 failed with exit code 1 (1 of 2 attempts used)" in (
        told(bench, batch, 0).text
    )


def test_a_batch_that_could_not_be_planned_says_why(make_bench: MakeBench) -> None:
    bench = make_bench(job(chunk={"max_items": 2, "balance_by": "bytes"}))
    batch = bench.enqueue([1])
    bench.plan()
    said = told(bench, batch)
    assert codes(said) == ["failed", "retry"]
    assert said.text.startswith(
        f"It failed just now ({at(bench)}) unplanned: item 0 is no object, so it has no 'bytes'"
    )
    assert said.text.endswith(f"`dispatcher retry --failed {batch.id}` plans it again.")


def test_what_an_item_source_wrote_comes_in_lines_after_the_sentence(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(job(chunk={"max_items": 2, "balance_by": "bytes"}))
    batch = bench.enqueue([1])
    bench.plan()
    why = "item source 'm:f': f() raised ValueError: boom\nThe last it wrote:\n  Traceback"
    bench.sql("UPDATE dispatcher.batch SET reason = :why", why=why)
    assert told(bench, batch).text == (
        f"It failed just now ({at(bench)}) unplanned: item source 'm:f': f() raised ValueError: "
        "boom.\nThe last it wrote:\n  Traceback\n"
        f"`dispatcher retry --failed {batch.id}` plans it again."
    )
    assert batch_row(batch.refresh(), bench.at)[-1] == why.partition("\n")[0]
    assert summary(batch.refresh(), bench.at).endswith("boom")


def test_a_cancelled_batch_says_by_whom_and_what_had_succeeded(make_bench: MakeBench) -> None:
    bench = make_bench(limits={"max_running": 1})
    bench.world.script = lambda _batch, chunk, _attempt: Ending() if chunk == 0 else LONG
    batch = bench.enqueue(range(3))
    bench.turn()
    bench.turn(2)
    bench.turn(2)
    bench.dispatcher.cancel(batch.id, "wrong month")
    bench.finish(batch)
    said = told(bench, batch)
    assert codes(said) == ["cancelled", "retry"]
    assert said.text == (
        f"It was cancelled by app, and nothing of it runs since {at(bench)} (just now) (wrong "
        f"month); 1 chunk had succeeded. `dispatcher retry --failed {batch.id}` runs 2 chunks "
        "again, with fresh budgets."
    )
    assert told(bench, batch, 2).text.startswith("Chunk 2 was cancelled ")
    assert " before any attempt: wrong month." in told(bench, batch, 2).text


# --- what is asked for wrongly --------------------------------------------------------------------


def test_a_chunk_that_the_batch_has_not_is_refused(bench: Bench) -> None:
    batch = bench.enqueue(range(3))
    with pytest.raises(InvalidInput, match=rf"^batch {batch.id} has no chunk 0: it has none, and "):
        told(bench, batch, 0)
    bench.plan()
    with pytest.raises(InvalidInput, match=rf"^batch {batch.id} has no chunk 9: its chunks are 0 "):
        told(bench, batch, 9)


def test_a_batch_that_there_is_not_is_refused(bench: Bench) -> None:
    with pytest.raises(UnknownBatch, match=r'^no batch "nowhere"'):
        explain(bench.store, "nowhere")


def test_the_facts_are_json(bench: Bench) -> None:
    awake(bench)
    bench.script(LONG)
    batch = bench.enqueue([1])
    bench.turn()
    bench.turn(2)
    facts = told(bench, batch, 0).facts
    assert facts["batch"] == batch.id
    assert facts["chunk"] == 0
    assert facts["state"] == "running"
    assert facts["at"].endswith("Z")
    assert facts["reasons"][0]["timeout"] == 3600.0
