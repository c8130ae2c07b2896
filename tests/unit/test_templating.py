from __future__ import annotations

import csv
import io
import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.errors import InvalidInput
from dispatcher.templating import Values, check_template, params_used, render, uses_chunk

RULES = (
    "allowed: {items:csv}, {items:json}, {items:lines}, {pack:csv}, {pack:json}, {pack:lines}, "
    "{chunk.index}, {attempt}, {batch.id}, "
    '{param:NAME}; write a literal brace twice, as in {{"a": 1}}'
)


def values(items: object = (), params: dict[str, object] | None = None) -> Values:
    return Values(
        items=json.dumps(items), params=params or {}, chunk_index=7, attempt=2, batch_id="b-1"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("", ""),
        ("{items:csv}", "1,2,x"),
        ("{items:json}", '[1, 2, "x"]'),
        ("{items:lines}", "1\n2\nx"),
        ("{chunk.index}/{attempt} of {batch.id}", "7/2 of b-1"),
        ("--day={param:day}", "--day=2024-02-29"),
        ("{param:opts}", '{"deep":[1,null]}'),
        ("{param:n}{param:yes}", "3true"),
        ('{{"a": {attempt}}}', '{"a": 2}'),
        ("{{{attempt}}}", "{2}"),
        ("{{items:csv}}", "{items:csv}"),
        ("}}{{", "}{"),
    ],
)
def test_templates_are_filled(text: str, expected: str) -> None:
    params = {"day": "2024-02-29", "opts": {"deep": [1, None]}, "n": 3, "yes": True}
    assert render(text, values([1, 2, "x"], params)) == expected


def test_numbers_keep_the_digits_that_the_caller_wrote() -> None:
    given_items = Values("[1.10, 1e3, 12345678901234567890]", {}, 0, 1, "b")
    assert render("{items:csv}", given_items) == "1.10,1e3,12345678901234567890"


def test_csv_quotes_a_comma_a_quote_and_a_line_end() -> None:
    rendered = render("{items:csv}", values(["a,b", 'say "x"', "two\nlines", True, ""]))
    assert rendered == '"a,b","say ""x""","two\nlines",true,'


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\x00"))))
def test_any_list_of_texts_comes_back_through_a_csv_reader(items: list[str]) -> None:
    rendered = render("{items:csv}", values(items))
    assert next(csv.reader(io.StringIO(rendered, newline=""), strict=True), []) == items


@given(st.text())
def test_text_with_doubled_braces_is_literal(text: str) -> None:
    escaped = text.replace("{", "{{").replace("}", "}}")
    check_template(escaped, param_names=frozenset())
    assert not uses_chunk(escaped)
    assert render(escaped, values()) == text


@given(st.text(alphabet=string.ascii_letters + "{}:. ", max_size=40))
def test_a_text_is_either_refused_or_rendered(text: str) -> None:
    try:
        check_template(text, param_names=None)
    except InvalidInput:
        with pytest.raises(InvalidInput):
            render(text, values())
    else:
        render(text, values(params=dict.fromkeys(params_used(text), "v")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{item:csv}", f"{{item:csv}} is no template (did you mean {{items:csv}}?); {RULES}"),
        ('{"a": 1}', f'{{"a": 1}} is no template; {RULES}'),
        ("{}", f"{{}} is no template; {RULES}"),
        ("{param:}", f"{{param:}} is no template; {RULES}"),
        ("${HOME}", f"{{HOME}} is no template; {RULES}"),
        ("{attempt", f"the single {{ in {{attempt is no template; {RULES}"),
        ("attempt}", f"the single }} in attempt}} is no template; {RULES}"),
        ('{"a": {"b": 1}}', f'the single {{ in {{"a": {{"b": 1}}}} is no template; {RULES}'),
    ],
)
def test_anything_else_in_braces_is_refused_and_says_what_is_allowed(
    text: str, message: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_template(text, param_names=None)
    assert str(caught.value) == message


def test_a_param_must_be_one_of_the_jobs() -> None:
    check_template("{param:day}", param_names=frozenset({"day"}))
    check_template("{param:any}", param_names=None)
    with pytest.raises(InvalidInput) as caught:
        check_template("{param:dya}", param_names=frozenset({"day", "region"}))
    assert str(caught.value) == (
        "{param:dya} names no param of this job; allowed: day, region; "
        "mend it here or in the job's `params`"
    )
    with pytest.raises(InvalidInput, match="it has none: declare it in the job's `params`"):
        check_template("{param:day}", param_names=frozenset())


def test_a_param_that_is_not_given_is_named() -> None:
    with pytest.raises(InvalidInput) as caught:
        render("{param:day}", values(params={"region": "eu"}))
    assert (
        str(caught.value) == "{param:day} is used but the param 'day' is not given; given: region"
    )


@pytest.mark.parametrize("text", ["{items:csv}", "x{items:json}", "{items:lines}", "{attempt}"])
def test_items_the_chunk_and_the_attempt_make_a_text_differ_by_chunk(text: str) -> None:
    assert uses_chunk(text)
    assert uses_chunk("{chunk.index}")


@pytest.mark.parametrize("text", ["", "plain", "{batch.id}", "{param:day}", "{{attempt}}"])
def test_the_batch_and_its_params_do_not(text: str) -> None:
    assert not uses_chunk(text)


def test_the_params_of_a_text_are_named() -> None:
    assert params_used("{param:a}{param:b}{param:a}{attempt}{{param:c}}") == {"a", "b"}


@pytest.mark.parametrize("form", ["csv", "lines"])
@pytest.mark.parametrize("item", [{"id": 1}, [1], None])
def test_items_that_are_no_scalars_have_no_text_form(form: str, item: object) -> None:
    with pytest.raises(InvalidInput) as caught:
        render(f"{{items:{form}}}", values(["ok", item]))
    written = json.dumps(item, separators=(",", ":"))
    assert str(caught.value) == (
        f"{{items:{form}}} takes text, numbers, true and false; "
        f"item 1 of the chunk is {written}; use {{items:json}}"
    )


def test_lines_refuse_an_item_of_several_lines() -> None:
    with pytest.raises(InvalidInput) as caught:
        render("{items:lines}", values(["two\nlines"]))
    assert str(caught.value) == (
        '{items:lines} cannot hold an item of several lines, "two\\nlines"; use {items:json}'
    )


@pytest.mark.parametrize("item", ["a\x00b", "\ud800"])
def test_characters_that_no_argument_can_carry_are_refused(item: str) -> None:
    with pytest.raises(InvalidInput, match="a character that no argument can carry"):
        render("{items:csv}", values([item]))


def test_a_long_item_is_cut_in_the_message() -> None:
    with pytest.raises(InvalidInput) as caught:
        render("{items:csv}", values([["x" * 500]]))
    assert len(str(caught.value)) < 200


def test_items_are_parsed_once() -> None:
    once = values([1])
    assert once.parsed_items is once.parsed_items


@pytest.mark.parametrize("text", ["{", '{"a": 1}'])
def test_items_that_are_no_json_array_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="the chunk's items"):
        render("{items:csv}", Values(text, {}, 0, 1, "b"))
