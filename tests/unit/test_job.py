from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dispatcher.errors import InvalidInput
from dispatcher.job import (
    Chunking,
    Job,
    Limits,
    RetryPolicy,
    SuccessPolicy,
    format_duration,
    parse_duration,
)
from dispatcher.problems import problems_of

DURATION = "it must be a duration such as 90s, 10m, 1h30m or 2d, or a number of seconds"


def job(**changes: Any) -> Job:
    return Job.model_validate({"name": "j", "target": "here", "command": ["true"], **changes})


def refusal(**changes: Any) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        job(**changes)
    return [str(problem) for problem in problems_of(caught.value, Job)]


# --- durations ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("10m", 600),
        ("1h30m", 5400),
        ("1h 30m", 5400),
        (" 2d ", 172800),
        ("1d2h3m4.5s", 93784.5),
        ("0.5s", 0.5),
        ("0s", 0),
        ("90", 90),
        ("1.5", 1.5),
        ("90m", 5400),
    ],
)
def test_durations_are_read_in_their_short_form(text: str, seconds: float) -> None:
    assert parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "text",
    ["", " ", "10x", "-5s", "1.5h", "5m1h", "1h1h", "h", "10 m 5", "1e3", "½s", "500ms"],
)
def test_any_other_form_is_refused_with_the_forms_that_are_allowed(text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_duration(text)
    assert str(caught.value) == (
        f"{json.dumps(text, ensure_ascii=False)} is not a duration; "
        "write one such as 90s, 10m, 1h30m or 2d, or a number of seconds"
    )


@pytest.mark.parametrize("text", ["9999999999d", "9" * 5000 + "s", "9" * 400])
def test_a_duration_beyond_all_calendars_is_too_long(text: str) -> None:
    with pytest.raises(InvalidInput, match="is too long"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("duration", "text"),
    [
        (timedelta(seconds=90), "1m30s"),
        (timedelta(hours=1, minutes=30), "1h30m"),
        (timedelta(days=2), "2d"),
        (timedelta(seconds=0.5), "0.5s"),
        (timedelta(minutes=1, microseconds=1), "1m0.000001s"),
        (timedelta(0), "0s"),
    ],
)
def test_durations_are_written_short(duration: timedelta, text: str) -> None:
    assert format_duration(duration) == text


@given(st.timedeltas(min_value=timedelta(0)))
def test_a_duration_that_was_written_reads_back_the_same(duration: timedelta) -> None:
    assert parse_duration(format_duration(duration)) == duration


def test_a_negative_duration_has_no_short_form() -> None:
    with pytest.raises(InvalidInput, match="is negative; it must be 0s or more"):
        format_duration(timedelta(seconds=-1))


@pytest.mark.parametrize("value", ["1m", 60, 60.0, timedelta(minutes=1), "60"])
def test_a_field_takes_text_seconds_or_a_timedelta(value: object) -> None:
    assert job(timeout=value).timeout == timedelta(minutes=1)


@pytest.mark.parametrize(
    ("value", "written"),
    [("10x", '"10x"'), (True, "true"), (None, "null"), ([1], "[1]"), (float("nan"), "NaN")],
)
def test_a_field_says_what_a_duration_is(value: object, written: str) -> None:
    assert refusal(timeout=value) == [f"timeout is {written}; {DURATION}"]


@pytest.mark.parametrize("value", [0, "0s", -1, 1e-9, "4000d", 1e300])
def test_a_field_takes_no_duration_out_of_bounds(value: object) -> None:
    (line,) = refusal(deadline=value)
    assert line.endswith("; it must be longer than 0s and at most 3650d")


# --- the job as a value ---------------------------------------------------------------------------


def test_a_job_needs_a_name_and_a_target_and_has_the_rest_by_default() -> None:
    assert job().model_dump(mode="json") == {
        "name": "j",
        "target": "here",
        "description": None,
        "command": ["true"],
        "params": None,
        "args": [],
        "clear_args": False,
        "env": {},
        "items": None,
        "chunk": {"size": 1, "count": None, "max_items": None, "balance_by": None},
        "timeout": "1h",
        "start_timeout": "10m",
        "retry": {
            "attempts": 3,
            "infrastructure_attempts": 5,
            "on_failure": "fail",
            "initial": "30s",
            "factor": 2.0,
            "max": "10m",
            "jitter": True,
            "exit_codes": {},
            "pack_wait": "30s",
        },
        "limits": {"running": None, "per_batch": None},
        "deadline": "1d",
        "success": {
            "max_failed_chunks": None,
            "max_failed_items": None,
            "min_ratio": None,
            "stop_early": None,
        },
        "receipt": "optional",
        "overrides": {"args": False, "env": [], "timeout": None, "tasks": None},
        "options": {},
        "priority": 0,
        "labels": {},
    }
    with pytest.raises(ValidationError) as caught:
        Job.model_validate({})
    assert [str(problem) for problem in problems_of(caught.value, Job)] == [
        "name is missing; it is required",
        "target is missing; it is required",
    ]


_plain = st.text(st.characters(codec="utf-8", exclude_characters="\x00{}"), max_size=8)
_durations = st.timedeltas(min_value=timedelta(microseconds=1), max_value=timedelta(days=3650))
_counts = st.integers(min_value=1)
_finite = st.floats(allow_nan=False, allow_infinity=False)
_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | _plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_plain, inner, max_size=3),
    max_leaves=6,
)
_chunkings = st.one_of(
    st.builds(Chunking, size=_counts),
    st.builds(Chunking, count=_counts, balance_by=st.none() | st.just("bytes")),
    st.builds(Chunking, max_items=_counts, balance_by=st.none() | st.just("bytes")),
)
_retries = st.builds(
    RetryPolicy,
    attempts=_counts,
    initial=_durations,
    max=st.just(timedelta(days=3650)),
    factor=st.floats(min_value=1, allow_infinity=False),
    exit_codes=st.dictionaries(st.integers(1, 255), st.sampled_from(["retry", "fail"]), max_size=4),
)
_jobs = st.builds(
    Job,
    name=st.from_regex(r"[a-z][a-z0-9-]{0,39}", fullmatch=True),
    target=st.just("here"),
    description=st.none() | _plain,
    command=st.lists(_plain, min_size=1, max_size=3)
    .filter(lambda words: bool(words[0]))
    .map(tuple),
    args=st.lists(_plain, max_size=3).map(tuple),
    env=st.dictionaries(st.sampled_from(["A", "_b", "DISPATCHER_X"]), _plain),
    chunk=_chunkings,
    timeout=_durations,
    retry=_retries,
    limits=st.builds(Limits, running=st.none() | _counts),
    success=st.builds(SuccessPolicy, max_failed_chunks=st.integers(min_value=0)),
    options=st.dictionaries(_plain, _json, max_size=3),
    priority=st.integers(-100, 100),
    labels=st.dictionaries(_plain, _plain, max_size=3),
)


@given(_jobs)
def test_a_job_that_was_stored_as_json_comes_back_the_same(value: Job) -> None:
    stored = json.dumps(value.model_dump(mode="json"), allow_nan=False)
    assert Job.model_validate(json.loads(stored)) == value


def test_a_job_with_items_and_params_comes_back_too() -> None:
    value = job(
        items={"source": "shop.tables:list_tables", "timeout": "30s"},
        params={"type": "object", "properties": {"day": {"type": "string"}}},
        args=["--day={param:day}", "{items:json}"],
        retry={"exit_codes": {65: "fail", "75": "retry"}},
    )
    assert value.retry.exit_codes == {65: "fail", 75: "retry"}
    assert Job.model_validate_json(value.model_dump_json()) == value
    assert Job.model_validate(value.model_dump(mode="json")) == value


def test_a_job_is_frozen_and_its_options_are_its_own() -> None:
    options = {"cpu": [1]}
    value = job(options=options)
    options["cpu"].append(2)
    assert value.options == {"cpu": [1]}
    with pytest.raises(ValidationError, match="frozen"):
        setattr(value, "name", "other")  # noqa: B010 - mypy refuses the plain assignment, as hoped


@pytest.mark.parametrize("name", ["a", "nightly-export", "a" * 40, "a1-"])
def test_names_are_lower_case_words(name: str) -> None:
    assert job(name=name).name == name


@pytest.mark.parametrize("name", ["", "A", "1a", "-a", "a_b", "a" * 41, "a\n", "é"])
def test_other_names_are_refused(name: str) -> None:
    (line,) = refusal(name=name)
    assert line == (
        f"name is {json.dumps(name, ensure_ascii=False)}; it must begin with a lower-case letter "
        "and go on with lower-case letters, digits and '-', at most 40 in all"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"command": []}, "command is []; it must have at least one word, the program"),
        ({"command": [""]}, 'command.0 is ""; it must name a program'),
        ({"command": "python3 x"}, 'command is "python3 x"; it must be a list'),
        ({"command": ["a", 1]}, "command.1 is 1; it must be text: put it in quotes"),
        (
            {"command": ["a\x00"]},
            (
                'command.0 is "a\\u0000"; it must have no NUL character and no half of a '
                "surrogate pair"
            ),
        ),
        (
            {"command": ["sh", "-c", "echo {items:csv}"]},
            (
                'command.2 is "echo {items:csv}"; {items:csv} is filled in args and env only: '
                "move it to args"
            ),
        ),
        ({"env": {"PORT": 8080}}, "env.PORT is 8080; it must be text: put it in quotes"),
        ({"env": {"TOKEN": 8080}}, "env.TOKEN is ***; it must be text: put it in quotes"),
        (
            {"env": {"9X": ""}},
            (
                "env.9X is \"9X\"; it must be a variable's name: letters, digits and '_', "
                "and no digit first"
            ),
        ),
        (
            {"env": {"DISPATCH_KEY": ""}},
            (
                'env.DISPATCH_KEY is "DISPATCH_KEY"; it must not begin with DISPATCH_: '
                "the dispatcher sets those itself"
            ),
        ),
        ({"items": "a:b"}, 'items is "a:b"; it must be a mapping of ItemSource'),
        ({"priority": 101}, "priority is 101; it must be at most 100"),
        ({"priority": "1"}, 'priority is "1"; it must be an integer'),
        ({"limits": {"running": 0}}, "limits.running is 0; it must be at least 1"),
        ({"limits": {"per_batch": True}}, "limits.per_batch is true; it must be an integer"),
        (
            {"success": {"max_failed_chunks": -1}},
            "success.max_failed_chunks is -1; it must be at least 0",
        ),
        ({"retry": {"attempts": 0}}, "retry.attempts is 0; it must be at least 1"),
        ({"retry": {"factor": 0.5}}, "retry.factor is 0.5; it must be at least 1"),
        (
            {"retry": {"factor": float("inf")}},
            "retry.factor is Infinity; it must be a finite number",
        ),
        ({"retry": {"jitter": 1}}, "retry.jitter is 1; it must be true or false"),
        (
            {"retry": {"initial": "15m"}},
            "retry.max is 10m; it must be at least `initial`, 15m",
        ),
        (
            {"retry": {"exit_codes": {65: "fial"}}},
            "retry.exit_codes.65 is \"fial\"; it must be 'retry' or 'fail'",
        ),
        (
            {"retry": {"attemps": 3}},
            (
                "retry.attemps is not a known key; allowed: attempts, exit_codes, factor, "
                "infrastructure_attempts, initial, jitter, max, on_failure, pack_wait "
                '(did you mean "attempts"?)'
            ),
        ),
        (
            {"options": {"at": timedelta(1)}},
            (
                "options.at is datetime.timedelta(days=1); it must be JSON: text, a finite number, "
                "true, false, null, a list or a mapping of text"
            ),
        ),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(
    changes: dict[str, Any], expected: str
) -> None:
    assert refusal(**changes) == [expected]


@pytest.mark.parametrize("code", [0, 256, -1, True, "x", "1.0", 65.0, None, "0065"])
def test_other_exit_codes_are_refused(code: object) -> None:
    (line,) = refusal(retry={"exit_codes": {code: "fail"}})
    assert line.endswith("; it must be an exit code from 1 to 255")


@pytest.mark.parametrize("source", ["a", "a:", ":b", "a.b:c d", "a-b:c", "a:b:c", "1:b", "a..b:c"])
def test_an_item_source_is_a_module_and_a_function(source: str) -> None:
    assert refusal(items={"source": source}) == [
        (
            f'items.source is "{source}"; it must be "module:function", '
            'such as "shop.tables:list_tables"'
        )
    ]


@pytest.mark.parametrize("value", [float("nan"), {1: 2}, "\x00", "\ud800", {1, 2}, b"x"])
def test_options_that_json_would_change_are_refused(value: object) -> None:
    (line,) = refusal(options={"deep": [value]})
    assert line.startswith("options.deep.0 is ")


def test_options_that_hold_themselves_are_refused() -> None:
    loop: dict[str, Any] = {}
    loop["loop"] = loop
    assert refusal(options=loop) == ["options is nested too deep; it must be at most 100 levels"]


# --- chunking -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunk", "has"),
    [({}, "none of them"), ({"size": 1, "count": 2}, "size and count")],
)
def test_chunking_is_exactly_one_of_three(chunk: dict[str, int], has: str) -> None:
    assert refusal(chunk=chunk) == [
        (
            f"chunk is {json.dumps(chunk)}; it must have exactly one of size, count and max_items, "
            f"and has {has}"
        )
    ]


@pytest.mark.parametrize("name", ["size", "count", "max_items"])
def test_a_chunking_of_nothing_is_refused(name: str) -> None:
    assert refusal(chunk={name: 0}) == [f"chunk.{name} is 0; it must be at least 1"]


def test_balance_by_goes_with_count_or_max_items() -> None:
    assert Chunking(count=2, balance_by="bytes").balance_by == "bytes"
    assert Chunking(max_items=2, balance_by="bytes").balance_by == "bytes"
    assert refusal(chunk={"size": 2, "balance_by": "bytes"}) == [
        (
            'chunk is {"size": 2, "balance_by": "bytes"}; it must have no balance_by beside size: '
            "take count or max_items"
        )
    ]


# --- templates and params -------------------------------------------------------------------------

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "day": {"type": "string", "format": "date"},
        "region": {"enum": ["eu", "us"], "default": "eu"},
        "n": {"type": ["integer", "null"], "minimum": 1},
    },
    "required": ["day"],
    "additionalProperties": False,
}


def test_templates_are_checked_when_the_job_is_made() -> None:
    lines = refusal(args=["{item:csv}"], env={"A": "{", "API_KEY": "s3cret{"})
    assert len(lines) == 3
    assert lines[0].startswith('args.0 is "{item:csv}"; {item:csv} is no template (did you mean')
    assert lines[1].startswith('env.A is "{"; the single { in { is no template; allowed: ')
    assert lines[2].startswith("env.API_KEY is ***; a template in it is wrong; allowed: ")
    assert "s3cret" not in lines[2]


def test_a_template_names_a_declared_param() -> None:
    assert job(params=SCHEMA, args=["{param:day}"]).args == ("{param:day}",)
    assert refusal(params=SCHEMA, env={"DAY": "{param:dya}"}) == [
        (
            'env.DAY is "{param:dya}"; {param:dya} names no param of this job; '
            "allowed: day, n, region; mend it here or in the job's `params`"
        )
    ]
    assert refusal(args=["{param:day}"]) == [
        (
            'args.0 is "{param:day}"; {param:day} names no param of this job; '
            "it has none: declare it in the job's `params`, a JSON schema"
        )
    ]
    assert job(params={"type": "object"}, args=["{param:any}"])
    assert job(params={"allOf": [SCHEMA], "properties": {}}, args=["{param:any}"])


def test_params_are_a_json_schema_of_an_object() -> None:
    assert refusal(params={"properties": {"day": {"type": "strnig"}}}, args=["{param:day}"]) == [
        (
            "params.properties.day.type is no JSON schema: 'strnig' is not one of "
            "['array', 'boolean', 'integer', 'null', 'number', 'object', 'string']"
        )
    ]
    assert refusal(params={"required": "day"}) == [
        "params.required is no JSON schema: 'day' is not of type 'array'"
    ]
    assert refusal(params={"type": "array"}) == [
        'params.type is "array"; it must be "object", as params are given by name'
    ]


def test_good_params_come_back_with_defaults() -> None:
    checked = job(params=SCHEMA).check_params({"day": "2024-02-29", "n": None})
    assert checked == {"day": "2024-02-29", "n": None, "region": "eu"}
    assert job().check_params(None) == job().check_params({}) == {}


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (None, "params.day is missing; it is required"),
        ({"day": 5}, "params.day is 5; it must be of type string"),
        ({"day": "2024-02-30"}, 'params.day is "2024-02-30"; it must fit format: "date"'),
        (
            {"day": "2024-02-29", "region": "eux"},
            'params.region is "eux"; it must be one of "eu", "us"',
        ),
        ({"day": "2024-02-29", "n": 0}, "params.n is 0; it must fit minimum: 1"),
        ({"day": "2024-02-29", "n": "1"}, 'params.n is "1"; it must be of type integer or null'),
        (
            {"day": "2024-02-29", "regoin": "eu"},
            (
                "params.regoin is not a param of this job; allowed: day, n, region "
                '(did you mean "region"?)'
            ),
        ),
        (
            {"day": timedelta(1)},
            (
                "params.day is datetime.timedelta(days=1); it must be JSON: text, a finite number, "
                "true, false, null, a list or a mapping of text"
            ),
        ),
        (
            {"day": "x", "n": 0},
            'params.day is "x"; it must fit format: "date"; params.n is 0; it must fit minimum: 1',
        ),
        ([], "params is []; it must be a mapping"),
    ],
)
def test_wrong_params_are_named_with_what_is_allowed(params: Any, expected: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        job(params=SCHEMA).check_params(params)
    assert str(caught.value) == f"the job 'j' cannot run so: {expected}"


def test_patterns_of_params_are_allowed_too() -> None:
    schema = {"patternProperties": {"^x-": {"type": "string"}}, "additionalProperties": False}
    assert job(params=schema).check_params({"x-a": "1"}) == {"x-a": "1"}
    with pytest.raises(InvalidInput, match=r"params.y is not a param of this job; allowed: none"):
        job(params=schema).check_params({"x-a": "1", "y": 2})


def test_a_param_that_a_template_uses_must_be_given_though_the_schema_does_not_say_so() -> None:
    schema = {"properties": {"day": {}, "region": {}}, "required": ["region"]}
    value = job(params=schema, args=["{param:region}"], env={"DAY": "{param:day}"})
    with pytest.raises(InvalidInput) as caught:
        value.check_params({})
    assert str(caught.value) == (
        "the job 'j' cannot run so: params.region is missing; it is required; "
        "params.day is missing; the job's env.DAY uses it"
    )


def test_a_job_without_a_schema_takes_no_params() -> None:
    with pytest.raises(InvalidInput) as caught:
        job().check_params({"day": 1})
    assert str(caught.value) == (
        "the job 'j' takes no params, and was given day; leave them out "
        "or declare them in the job's `params`, a JSON schema"
    )


@pytest.mark.parametrize("ref", ["https://example.invalid/schema.json", "#/$defs/none"])
def test_a_schema_that_points_elsewhere_is_never_fetched(ref: str) -> None:
    schema = {"properties": {"day": {"$ref": ref}}}
    with pytest.raises(InvalidInput, match=r"the schema's \$ref .* leads nowhere"):
        job(params=schema).check_params({"day": 1})


def test_refs_within_the_schema_are_followed() -> None:
    schema = {"properties": {"day": {"$ref": "#/$defs/d"}}, "$defs": {"d": {"type": "string"}}}
    assert job(params=schema).check_params({"day": "x"}) == {"day": "x"}


@pytest.mark.parametrize(
    ("success", "stops"),
    [
        ({}, False),
        ({"max_failed_chunks": 0}, False),
        ({"max_failed_chunks": 2}, True),
        ({"max_failed_items": 0}, False),
        ({"max_failed_items": 7}, True),
        ({"min_ratio": 0.9}, True),
        ({"min_ratio": 1.0}, False),
        ({"min_ratio": 0}, True),
        ({"max_failed_items": 7, "stop_early": False}, False),
        ({"stop_early": True}, True),
    ],
)
def test_a_batch_stops_early_where_some_failures_are_allowed_or_it_is_said(
    success: dict[str, Any], stops: bool
) -> None:
    assert job(success=success).success.stops_early is stops


def test_a_success_policy_has_one_bound_at_most() -> None:
    with pytest.raises(ValidationError, match="one bound at most, and has max_failed_items and"):
        job(success={"max_failed_items": 1, "min_ratio": 0.5})
