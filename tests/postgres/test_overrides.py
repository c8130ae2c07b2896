"""What a batch sets over its job: kept with the batch, launched as written, part of its key."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from typer.testing import CliRunner
from workbench import Bench, job

from dispatcher.cli import app
from dispatcher.errors import IdempotencyConflict, InvalidInput
from dispatcher.states import BatchState

MakeBench = Callable[..., Bench]
ALL = {"args": True, "env": ["KIND", "DB_PASSWORD"], "timeout": "2h", "tasks": 4}
OVERRIDES: dict[str, Any] = {
    "args": ["--pattern={items:csv}", "{param:gone}"],
    "env": {"KIND": "{attempt}"},
    "timeout": "30m",
    "tasks": 2,
}


def fenced(**fields: Any) -> Any:
    return job(
        args=["{param:gone}"],
        env={"IDS": "{items:csv}", "KIND": "own"},
        params={"properties": {"gone": {"type": "string"}}},
        overrides=ALL,
        **fields,
    )


def test_a_batch_runs_as_its_overrides_say_and_keeps_what_ran(make_bench: MakeBench) -> None:
    bench = make_bench(fenced())
    batch = bench.finish(bench.enqueue(range(5), overrides=OVERRIDES))
    assert batch.state is BatchState.SUCCEEDED
    tasks = [task for request in bench.world.requests() for task in request.tasks]
    assert sorted(task.env["IDS"] for task in tasks) == ["0,1,2", "3,4"], "two chunks"
    assert {task.args for task in tasks} == {("--pattern={items:csv}", "{param:gone}")}
    assert {task.env["KIND"] for task in tasks} == {"{attempt}"}
    assert {request.timeout for request in bench.world.requests()} == {timedelta(minutes=30)}
    (kept,) = bench.sql("SELECT job FROM dispatcher.batch")
    assert kept["timeout"] == "30m"
    assert kept["chunk"] == {"count": 2}
    assert kept["args"] == ["--pattern={{items:csv}}", "{{param:gone}}"]
    assert "overrides" not in kept, "older workers can read it: nothing is left to be allowed"


def test_another_batch_of_the_job_is_as_the_job_says(make_bench: MakeBench) -> None:
    bench = make_bench(fenced())
    bench.enqueue([1], overrides=OVERRIDES)
    bench.finish(bench.enqueue([2, 3], params={"gone": "x"}))
    last = [request for request in bench.world.requests() if request.tasks[0].items != "[1]"]
    assert {request.tasks[0].args for request in last} == {("x",)}
    assert {request.timeout for request in last} == {timedelta(hours=1)}


def test_a_retry_runs_with_the_same_overrides(make_bench: MakeBench) -> None:
    bench = make_bench(fenced())
    batch = bench.finish(bench.enqueue([1], overrides=OVERRIDES))
    bench.finish(bench.dispatcher.retry(batch.id, failed_only=False))
    first, second = bench.world.requests()
    assert (first.tasks[0].args, first.timeout) == (second.tasks[0].args, second.timeout)


def test_a_refused_override_writes_nothing(make_bench: MakeBench) -> None:
    bench = make_bench(fenced())
    with pytest.raises(InvalidInput, match=r"overrides\.tasks is 5; it must be at most 4"):
        bench.enqueue([1], params={"gone": ""}, overrides={"tasks": 5})
    with pytest.raises(InvalidInput, match=r"the job's args\.0 uses it"):
        bench.enqueue([1], overrides={"tasks": 4})
    with pytest.raises(InvalidInput, match=r"chunk_size and overrides\.tasks are both given"):
        bench.enqueue([1], chunk_size=1, overrides=OVERRIDES)
    assert bench.sql("SELECT id FROM dispatcher.batch") == []


def test_overrides_are_part_of_what_a_key_stands_for(make_bench: MakeBench) -> None:
    bench = make_bench(fenced())
    first = bench.enqueue([1], key="k", overrides=OVERRIDES)
    same = {**OVERRIDES, "timeout": timedelta(seconds=1800), "tasks": 2}
    assert bench.enqueue([1], key="k", overrides=same).id == first.id
    for changes, text in (
        ({"tasks": 3}, "overrides.tasks there is 2, here 3"),
        ({"tasks": None}, "overrides.tasks there is 2, here not given"),
        ({"timeout": "31m"}, "overrides.timeout there is 30m, here 31m"),
        (
            {"args": []},
            'overrides.args there is ["--pattern={items:csv}", "{param:gone}"], here []',
        ),
    ):
        with pytest.raises(IdempotencyConflict) as told:
            bench.enqueue([1], key="k", overrides={**OVERRIDES, **changes})
        assert str(told.value) == (
            f'key "k" belongs to batch {first.id}, a different request: {text}. '
            "Use another key for another request"
        )


def test_a_request_without_overrides_differs_from_one_that_had_some(make_bench: MakeBench) -> None:
    bench = make_bench(job(overrides=ALL))
    plain = bench.enqueue([1], key="plain")
    assert bench.enqueue([1], key="plain", overrides={}).id == plain.id
    with pytest.raises(IdempotencyConflict, match=r"overrides\.tasks there is not given, here 2"):
        bench.enqueue([1], key="plain", overrides={"tasks": 2})
    bench.enqueue([1], key="other", overrides={"env": {"DB_PASSWORD": "hunter2"}})
    with pytest.raises(IdempotencyConflict) as told:
        bench.enqueue([1], key="other")
    assert 'overrides.env there is {"DB_PASSWORD": "***"}, here not given' in str(told.value)


def test_the_command_line_has_the_same_overrides(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It would send the logs of this whole process to what is its stderr here.
    monkeypatch.setattr("dispatcher.logs.configure", lambda *_: None)
    jobs = tmp_path / "jobs.yaml"
    jobs.write_text(
        'targets: {t: {backend: "null"}}\n'
        "jobs: {work: {target: t, command: [x], overrides: "
        "{args: true, env: [KIND], timeout: 1h, tasks: 3}}}\n"
    )
    settings = {"DISPATCHER_DATABASE_URL": database_url, "DISPATCHER_JOBS": str(jobs)}

    def run(*words: str) -> tuple[int, str]:
        done = CliRunner(env=settings).invoke(app, ["enqueue", "work", "--item", "1", *words])
        return done.exit_code, done.output

    given = ("--arg=--fast", "--arg", "{x}", "--env", "KIND=a=b", "--timeout", "90s", "--tasks=3")
    assert run(*given, "--dry-run")[0] == 0
    code, output = run(*given)
    assert code == 0, output
    with psycopg.connect(database_url.replace("+psycopg", "", 1)) as connection:
        ((kept,),) = connection.execute("SELECT job FROM dispatcher.batch").fetchall()
    assert kept["args"] == ["--fast", "{{x}}"]
    assert (kept["env"], kept["timeout"]) == ({"KIND": "a=b"}, "1m30s")
    assert kept["chunk"] == {"count": 3}
    for words, text in (
        (("--timeout", "2h"), 'overrides.timeout is "2h"; it must be at most 1h'),
        (("--timeout", "2h", "--dry-run"), 'overrides.timeout is "2h"; it must be at most 1h'),
        (("--env", "PATH=x"), "the variables that may be set are: KIND"),
        (("--env", "PATH"), '--env is "PATH"; it must be NAME=VALUE'),
        (("--tasks=2", "--chunk-size=2"), "--chunk-size and --tasks are both given"),
    ):
        code, output = run(*words)
        assert code == 2
        assert text in output
