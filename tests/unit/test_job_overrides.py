"""What a batch may set over its job: within the fence, and as literal text."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dispatcher.errors import InvalidInput
from dispatcher.job import Chunking, Job
from dispatcher.overriding import MAX_BYTES, MAX_TEXTS, overridden
from dispatcher.problems import problems_of
from dispatcher.templating import Values, render

ALL = {"args": True, "env": ["KIND", "MODE", "API_TOKEN"], "timeout": "2h", "tasks": 20}
WHERE = "What a batch may set is in `overrides` of the job 'j' in the jobs file"


def job(**changes: Any) -> Job:
    return Job.model_validate({"name": "j", "target": "here", "command": ["true"], **changes})


def refusal(overrides: Any, **allowed: Any) -> str:
    with pytest.raises(InvalidInput) as told:
        overridden(job(overrides=allowed), overrides)
    text = str(told.value)
    assert text.startswith("the job 'j' cannot run so: ")
    assert text.endswith(f". {WHERE}")
    return text.removeprefix("the job 'j' cannot run so: ").removesuffix(f". {WHERE}")


def test_what_is_allowed_is_set_over_the_job_and_the_rest_stays() -> None:
    before = job(
        overrides=ALL,
        args=["--own"],
        env={"KIND": "own", "KEPT": "{items:csv}"},
        chunk={"max_items": 3, "balance_by": "bytes"},
    )
    after, asked = overridden(
        before, {"args": ["-x", "1"], "env": {"MODE": "m"}, "timeout": "1800s", "tasks": 8}
    )
    assert after == before.model_copy(
        update={
            "args": ("-x", "1"),
            "env": {"KIND": "own", "KEPT": "{items:csv}", "MODE": "m"},
            "timeout": timedelta(minutes=30),
            "chunk": Chunking(count=8, balance_by="bytes"),
        }
    )
    assert asked == {"args": ["-x", "1"], "env": {"MODE": "m"}, "timeout": "30m", "tasks": 8}


@pytest.mark.parametrize(
    "nothing", [None, {}, {"args": None, "env": None, "timeout": None, "tasks": None}, {"env": {}}]
)
def test_asking_for_nothing_is_allowed_everywhere(nothing: Any) -> None:
    assert overridden(job(), nothing) == (job(), {})


def test_an_empty_list_of_args_takes_the_jobs_away() -> None:
    after, asked = overridden(job(args=["--own"], overrides={"args": True}), {"args": []})
    assert (after.args, asked) == ((), {"args": []})


def test_the_bounds_themselves_are_allowed() -> None:
    after, _ = overridden(job(overrides=ALL), {"timeout": timedelta(hours=2), "tasks": 20})
    assert (after.timeout, after.chunk) == (timedelta(hours=2), Chunking(count=20))


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            {"args": ["-x"]},
            (
                'overrides.args is ["-x"]; the job takes no other args than its own: that needs '
                "`args: true` there"
            ),
        ),
        (
            {"env": {"PATH": "/x"}},
            'overrides.env.PATH is "/x"; the variables that may be set are: none',
        ),
        (
            {"timeout": "1m"},
            (
                'overrides.timeout is "1m"; it must be left out, as the job allows no other than '
                "its own"
            ),
        ),
        (
            {"tasks": 1},
            "overrides.tasks is 1; it must be left out, as the job allows no other than its own",
        ),
    ],
)
def test_a_job_that_says_nothing_allows_nothing(overrides: Any, text: str) -> None:
    assert refusal(overrides) == text


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            {"env": {"PATH": "/x", "KIND": "k"}},
            'overrides.env.PATH is "/x"; the variables that may be set are: API_TOKEN, KIND, MODE',
        ),
        ({"timeout": "121m"}, 'overrides.timeout is "2h1m"; it must be at most 2h'),
        ({"tasks": 21}, "overrides.tasks is 21; it must be at most 20"),
        (
            {"timeout": "3h", "tasks": 99},
            (
                'overrides.timeout is "3h"; it must be at most 2h; '
                "overrides.tasks is 99; it must be at most 20"
            ),
        ),
        ({"tasks": 0}, "overrides.tasks is 0; it must be at least 1"),
        ({"tasks": "8"}, 'overrides.tasks is "8"; it must be an integer'),
        (
            {"timeout": "soon"},
            (
                'overrides.timeout is "soon"; it must be a duration such as 90s, 10m, 1h30m or 2d, '
                "or a number of seconds"
            ),
        ),
        ({"args": "-x"}, 'overrides.args is "-x"; it must be a list'),
        ({"args": [7]}, "overrides.args.0 is 7; it must be text: put it in quotes"),
        (
            {"args": ["a\0b"]},
            (
                'overrides.args.0 is "a\\u0000b"; it must have no NUL character and no half of a '
                "surrogate pair"
            ),
        ),
        ({"env": {"KIND": 7}}, "overrides.env.KIND is 7; it must be text: put it in quotes"),
        (
            {"env": {"DISPATCH_KEY": "mine"}},
            (
                'overrides.env.DISPATCH_KEY is "DISPATCH_KEY"; it must not begin with DISPATCH_: '
                "the dispatcher sets those itself"
            ),
        ),
        (
            {"command": ["sh"]},
            "overrides.command is not a known key; allowed: args, env, tasks, timeout",
        ),
        ([], "overrides is []; it must be a mapping"),
    ],
)
def test_what_goes_too_far_is_named_with_what_is_allowed(overrides: Any, text: str) -> None:
    assert refusal(overrides, **ALL) == text


def test_a_secret_is_not_repeated_in_a_refusal() -> None:
    text = refusal({"env": {"DB_PASSWORD": "hunter2", "API_TOKEN": 7}}, **ALL)
    text += refusal({"env": {"DB_PASSWORD": "hunter2"}}, **ALL)
    assert "hunter2" not in text
    assert "overrides.env.DB_PASSWORD is ***" in text


def test_sizes_are_bounded_and_so_are_the_messages() -> None:
    assert f"must have at most {MAX_TEXTS:,}" in refusal({"args": [""] * (MAX_TEXTS + 1)}, **ALL)
    half = "ä" * (MAX_BYTES // 4)
    overridden(job(overrides=ALL), {"args": [half]})
    text = refusal({"args": [half, "x"], "env": {"KIND": half}}, **ALL)
    size = MAX_BYTES + len("xKIND")
    assert text == (
        f"overrides.args is too large: args and env together have {size:,} bytes and may have "
        f"{MAX_BYTES:,}; put the data into storage and name it"
    )
    many = refusal({"env": {f"V{n}": "x" * 1000 for n in range(900)}}, **ALL)
    assert len(many) < 2000
    assert "and 896 more" in many


@given(text=st.text(alphabet=st.sampled_from("{}ab:itemscv.param0 é"), max_size=40))
def test_what_a_batch_brings_is_text_and_never_a_template(text: str) -> None:
    after, asked = overridden(job(overrides=ALL), {"args": [text], "env": {"KIND": text}})
    values = Values(items="[1]", params={}, chunk_index=0, attempt=1, batch_id="b")
    assert render(after.args[0], values) == text
    assert render(after.env["KIND"], values) == text
    assert asked == {"args": [text], "env": {"KIND": text}}
    assert Job.model_validate(after.model_dump(mode="json")) == after


@pytest.mark.parametrize("template", ["{items:csv}", "{param:x}", "{attempt}", "{", "}}{{"])
def test_a_template_of_a_caller_stays_as_it_was_written(template: str) -> None:
    after, _ = overridden(job(overrides=ALL), {"args": [template]})
    values = Values(items="[1]", params={"x": "y"}, chunk_index=0, attempt=1, batch_id="b")
    assert render(after.args[0], values) == template


@pytest.mark.parametrize(
    ("allowed", "line"),
    [
        ({"args": "yes"}, 'overrides.args is "yes"; it must be true or false'),
        (
            {"env": ["DISPATCH_KEY"]},
            (
                'overrides.env.0 is "DISPATCH_KEY"; it must not begin with DISPATCH_: the '
                "dispatcher sets those itself"
            ),
        ),
        ({"tasks": 0}, "overrides.tasks is 0; it must be at least 1"),
        (
            {"command": True},
            "overrides.command is not a known key; allowed: args, env, tasks, timeout",
        ),
    ],
)
def test_a_fence_that_means_nothing_is_refused_when_the_job_is_loaded(
    allowed: Any, line: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        job(overrides=allowed)
    assert [str(problem) for problem in problems_of(caught.value, Job)] == [line]
