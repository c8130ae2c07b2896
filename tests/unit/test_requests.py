"""From rows to the request of a launch: the same rows give the same request."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from dispatcher.backends.base import Definition
from dispatcher.errors import InvalidInput
from dispatcher.items import join_items, split_items
from dispatcher.job import Job
from dispatcher.requests import SLACK, Plan, audit_copy, check_chunk, launch_request, new_key
from dispatcher.testing import NullBackend, NullSettings

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ITEMS = {0: '["a",\n"b"]', 1: '["c"]', 2: "[]"}


def job(**fields: Any) -> Job:
    return Job.model_validate({"name": "work", "target": "t", "command": ["run", "it"], **fields})


def plan(one: Job, params: dict[str, Any] | None = None, **settings: Any) -> Plan:
    backend = NullBackend("test-requests", NullSettings(**settings))
    return Plan.read("batch1", one, params or {}, {"team": "a"}, backend)


def test_a_key_is_a_legal_name_everywhere_and_never_the_same() -> None:
    keys = {new_key("abcdefghjk23") for _ in range(500)}
    assert len(keys) == 500
    assert all(re.fullmatch("[a-z][a-z0-9-]{0,49}", key) for key in keys)


def test_a_request_says_all_that_a_backend_needs() -> None:
    one = job(
        args=["{items:csv}", "{param:day}"],
        env={"PLACE": "{chunk.index}/{attempt}/{batch.id}", "FIXED": "x"},
        params={"properties": {"day": {}}},
        timeout="5m",
        options={"max_tasks": 4, "parallelism": 3},
    )
    made = plan(one, {"day": "mon"})
    request = launch_request(
        made, "key", "inst", [(0, 1, None), (1, 4, None)], ITEMS, intended_at=NOW
    )
    assert (
        launch_request(made, "key", "inst", [(0, 1, None), (1, 4, None)], ITEMS, intended_at=NOW)
        == request
    )
    assert (request.key, request.instance, request.batch_id) == ("key", "inst", "batch1")
    assert (request.job, request.command) == ("work", ("run", "it"))
    assert (request.timeout, request.parallelism) == (timedelta(minutes=5), 2)
    assert request.labels == {"team": "a"}
    first, second = request.tasks
    assert (first.index, first.chunk_index, first.attempt) == (0, 0, 1)
    assert (second.index, second.chunk_index, second.attempt) == (1, 1, 4)
    assert first.items == ITEMS[0]
    assert (first.args, second.args) == (("a,b", "mon"), ("c", "mon"))
    assert second.env == {"PLACE": "1/4/batch1", "FIXED": "x"}


def test_a_pack_is_as_large_as_job_and_backend_allow() -> None:
    assert (plan(job()).max_tasks, plan(job()).parallelism) == (1, 1)
    many = job(options={"max_tasks": 50, "parallelism": 20})
    assert (plan(many).max_tasks, plan(many).parallelism) == (50, 20)
    small = plan(many, max_tasks=10)
    assert (small.max_tasks, small.parallelism) == (10, 10)


def test_where_tasks_share_one_environment_a_job_that_differs_by_chunk_is_not_packed() -> None:
    options = {"max_tasks": 50}
    for part in ({"args": ["{items:json}"]}, {"env": {"A": "{chunk.index}"}}):
        assert plan(job(options=options, **part), per_task_env=False).max_tasks == 1
        assert plan(job(options=options, **part)).max_tasks == 50
    assert plan(job(options=options, args=["{batch.id}"]), per_task_env=False).max_tasks == 50


def test_options_that_the_backend_does_not_take_are_refused() -> None:
    with pytest.raises(ValidationError):
        plan(job(options={"speed": "high"}))


def test_an_execution_may_take_as_long_as_its_tasks_one_after_the_other() -> None:
    made = plan(job(timeout="10m", start_timeout="2m", options={"max_tasks": 50, "parallelism": 4}))
    assert made.times(1, made.parallelism) == (
        timedelta(minutes=2),
        timedelta(minutes=10, seconds=30),
    )
    assert made.times(4, 4) == made.times(1, 4)
    assert made.times(9, made.parallelism) == (
        timedelta(minutes=2),
        timedelta(minutes=30, seconds=30),
    )


def test_the_audit_keeps_what_was_asked_without_its_secrets() -> None:
    one = job(args=["{items:json}"], env={"API_TOKEN": "hunter2", "PLAIN": "x"})
    request = launch_request(
        plan(one), "key", "inst", [(0, 1, None)], {0: '["a\\u0000\\\\u0000ä"]'}, intended_at=NOW
    )
    kept = json.loads(audit_copy(request))
    assert kept["command"] == ["run", "it"]
    assert kept["args"] == ['["a\\u0000\\\\u0000ä"]']
    assert kept["env"]["PLAIN"] == "x"
    assert "hunter2" not in audit_copy(request)
    assert (kept["tasks"], kept["parallelism"], kept["timeout"]) == (1, 1, 3600.0)


def test_the_audit_of_a_pack_says_what_differs_by_task() -> None:
    one = job(args=["fixed", "{items:csv}"], env={"IDS": "{items:csv}", "FIXED": "x"})
    pack = plan(one.model_copy(update={"options": {"max_tasks": 2, "parallelism": 2}}))
    given = [(0, 1, None), (1, 1, None)]
    kept = json.loads(
        audit_copy(
            launch_request(pack, "key", "inst", given, {0: "[1]", 1: "[2]"}, intended_at=NOW)
        )
    )
    assert (kept["env"]["IDS"], kept["tasks"]) == ("1", 2)
    assert kept["differs_by_task"] == ["args.1", "env.IDS"]
    alone = audit_copy(launch_request(pack, "key", "inst", given[:1], {0: "[1]"}, intended_at=NOW))
    assert "differs_by_task" not in alone


def test_the_audit_is_bounded_whatever_its_templates_were_filled_with() -> None:
    items = json.dumps([f"http://host:8080/{number}" for number in range(50_000)])
    one = job(
        command=["run", "https://me:hunter2@host/x"],
        args=["--token=hunter2", "{items:csv}", *["{items:json}"] * 50],
        env={"IDS": "{items:csv}"} | {f"E{n}": "ä" * 3000 for n in range(100)},
    )
    copy = audit_copy(
        launch_request(plan(one), "key", "inst", [(0, 1, None)], {0: items}, intended_at=NOW)
    )
    assert len(copy.encode()) < 65_536
    assert "hunter2" not in copy
    kept = json.loads(copy)
    assert kept["command"] == ["run", "https://me:***@host/x"]
    assert kept["args"][0] == "--token=***"
    assert re.fullmatch(r"http://host:8080/0,.{1981}… \(\d{7} characters in all\)", kept["args"][1])
    assert kept["args"][-1] == f"… ({52 - len(kept['args']) + 1} more)"
    assert kept["env"]["IDS"] == kept["args"][1]
    assert kept["env"]["…"] == f"{101 - len(kept['env']) + 1} more"


def test_the_audit_is_bounded_also_in_many_small_values_and_in_options() -> None:
    one = job(args=[""] * 100_000, env={f"E{number}": "" for number in range(20_000)})
    request = launch_request(plan(one), "key", "inst", [(0, 1, None)], ITEMS, intended_at=NOW)

    class Options(BaseModel):
        text: str = ""

    copy = audit_copy(replace(request, options=Options(text="x" * 100_000)))
    assert len(copy.encode()) < 65_536
    assert json.loads(copy)["options"] == {"…": "100012 bytes are left out"}


def test_a_chunk_is_tried_in_its_templates_when_it_is_planned() -> None:
    one = job(args=["{items:csv}", "fixed"])
    check_chunk(one, "b", {}, 0, '["a", 1, true]', max_text_bytes=100)
    with pytest.raises(InvalidInput, match=r"\{items:csv\} takes text, numbers, true and false"):
        check_chunk(one, "b", {}, 0, '["a", null]', max_text_bytes=100)


def test_a_template_that_grows_too_large_is_refused_when_the_chunk_is_planned() -> None:
    one = job(env={"IDS": "{items:csv}"})
    check_chunk(one, "b", {}, 3, '["aaaa","bbbb"]', max_text_bytes=9)
    with pytest.raises(InvalidInput) as told:
        check_chunk(one, "b", {}, 3, '["aaaa","bbbbb"]', max_text_bytes=9)
    assert str(told.value) == (
        "chunk 3 makes the job's env.IDS 10 bytes long; target t takes 9 at most: put fewer items "
        "in a chunk, or have the program read DISPATCH_ITEMS or DISPATCH_INPUT_URI"
    )


def test_templates_of_a_chunk_need_one_task_or_the_entry_wrapper() -> None:
    one = job(env={"IDS": "{items:csv}"}, options={"max_tasks": 4, "parallelism": 4})
    alone = plan(one, per_task_env=False)
    assert (alone.max_tasks, alone.wrapped) == (1, False)
    wrapped = plan(
        job(env={"IDS": "{items:csv}"}, options={"max_tasks": 4, "wrapped": True}),
        per_task_env=False,
    )
    assert (wrapped.max_tasks, wrapped.wrapped) == (4, True)
    request = launch_request(
        wrapped, "key", "inst", [(0, 1, None), (1, 1, None)], ITEMS, intended_at=NOW
    )
    assert request.wrapped
    assert [task.env for task in request.tasks] == [{"IDS": "a,b"}, {"IDS": "c"}]


def test_a_pack_can_be_given_to_each_of_its_tasks() -> None:
    one = job(env={"IDS": "{pack:csv}"}, options={"max_tasks": 4})
    made = plan(one, per_task_env=False)
    assert made.max_tasks == 4, "it is the same for all tasks"
    request = launch_request(
        made, "key", "inst", [(0, 1, None), (2, 1, None), (1, 2, None)], ITEMS, intended_at=NOW
    )
    assert {task.env["IDS"] for task in request.tasks} == {"a,b,c"}


def test_a_pack_holds_as_many_chunks_as_its_text_has_room_for() -> None:
    packed = plan(
        job(env={"IDS": "{pack:csv}"}, options={"max_tasks": 100}),
        per_task_env=False,
        inline_bytes=24 * 1024,
    )
    assert packed.pack_tasks(None) == 100
    assert packed.pack_tasks(400) == 61
    assert packed.pack_tasks(100_000) == 1
    assert plan(job(options={"max_tasks": 100})).pack_tasks(100_000) == 100


def test_what_the_definition_fixes_bounds_what_runs_at_once() -> None:
    made = plan(job(options={"max_tasks": 8, "parallelism": 8}))
    assert made.under(Definition()).parallelism == 8
    assert made.under(Definition(parallelism=2)).parallelism == 2
    assert made.under(Definition(parallelism=20)).parallelism == 8
    assert made.under(Definition(parallelism=2)).times(200, 2)[1] == 100 * made.job.timeout + SLACK


def test_an_attempt_may_be_given_some_items_of_its_chunk_as_they_were_written() -> None:
    items = {0: join_items(['{"a": 1.50}', '"b"', "3", '{"z":1,"a":2}'])}
    request = launch_request(plan(job()), "key", "inst", [(0, 2, [0, 3])], items, intended_at=NOW)
    assert split_items(request.tasks[0].items) == ['{"a": 1.50}', '{"z":1,"a":2}']
