from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.redaction import excerpt, is_secret_name, mask_url, redact, redact_env


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgresql://me:pw@host:5432/db", "postgresql://me:***@host:5432/db"),
        ("redis://:pw@host/0", "redis://:***@host/0"),
        ("postgres://me:p/w@d@host/db", "postgres://me:***@host/db"),
        ("see redis://a:pw@b and more", "see redis://a:***@b and more"),
        ("postgresql:///db?host=h&password=pw&x=1", "postgresql:///db?host=h&password=***&x=1"),
        ("host=h password=pw dbname=d", "host=h password=*** dbname=d"),
        ("host=h password='p w' dbname=d", "host=h password=*** dbname=d"),
        ("https://b/o?X-Amz-Signature=abc&y=2", "https://b/o?X-Amz-Signature=***&y=2"),
        ("AccountName=n;AccountKey=k==;x=y", "AccountName=n;AccountKey=***;x=y"),
    ],
)
def test_passwords_in_urls_and_connection_strings_are_masked(text: str, expected: str) -> None:
    assert mask_url(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "demo-out", "redis://host:6379/0", "me@host", "file:///a:b", "https://h/?page=2", "a=b"],
)
def test_what_has_no_secret_stays_as_it_is(text: str) -> None:
    assert mask_url(text) == text


@given(
    user=st.text("abcXYZ019-._", max_size=8),
    password=st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S"]), min_size=9),
)
def test_no_password_of_a_url_survives(user: str, password: str) -> None:
    masked = mask_url(f"postgresql://{user}:{password}@host/db")
    assert masked == f"postgresql://{user}:***@host/db"


@pytest.mark.parametrize(
    "name",
    [
        "PGPASSWORD",
        "AWS_SECRET_ACCESS_KEY",
        "github_token",
        "API_KEY",
        "OPENAI_APIKEY",
        "SSH_PRIVATE_KEY",
        "GOOGLE_APPLICATION_CREDENTIALS",
    ],
)
def test_secret_names_are_known(name: str) -> None:
    assert is_secret_name(name)
    assert redact_env({name: "x"}) == {name: "***"}


def test_other_variables_stay_but_for_passwords_in_their_urls() -> None:
    env = {
        "OUT": "demo-out",
        "DB": "postgresql://u:p@h/d",
        "AWS_ACCESS_KEY_ID": "AKIA",
        "TOKEN": "",
    }
    redacted = redact_env(env)
    assert redacted == {**env, "DB": "postgresql://u:***@h/d"}
    assert env["DB"] == "postgresql://u:p@h/d"


def test_nested_values_are_redacted_at_each_depth() -> None:
    value = {
        "env": {"TOKEN": "t", "N": 1},
        "list": [{"password": "p"}, "redis://:p@h", None],
        "secrets": {"mount": "/x", "secret": ["a"]},
    }
    assert redact(value) == {
        "env": {"TOKEN": "***", "N": 1},
        "list": [{"password": "***"}, "redis://:***@h", None],
        "secrets": {"mount": "/x", "secret": "***"},
    }


@pytest.mark.parametrize(
    "part", ["http://host:8080/x,", "//a:", "//a:@ //b:", "password='", "&token=", "/", "@", "a."]
)
def test_a_text_of_a_megabyte_is_masked_at_once(part: str) -> None:
    text = part * (1_000_000 // len(part))
    before = time.thread_time()
    mask_url(text)
    # Quadratic, 122 KB of URLs took 4 s; as it is, a megabyte takes less than 0.1 s.
    assert time.thread_time() - before < 10


@pytest.mark.parametrize("length", [0, 1999, 2000])
def test_an_excerpt_of_a_short_text_is_all_of_it(length: int) -> None:
    assert excerpt("x" * length) == "x" * length


def test_an_excerpt_of_a_long_text_says_what_is_left_out() -> None:
    assert excerpt("x" * 64_000_000) == f"{'x' * 2000}… (64000000 characters in all)"
    urls = ",".join(f"http://host:8080/{number}" for number in range(6000))
    assert excerpt(urls) == f"{urls[:2000]}… ({len(urls)} characters in all)"
    assert redact_env({"URLS": urls, "TOKENS": urls}) == {"URLS": excerpt(urls), "TOKENS": "***"}


@pytest.mark.parametrize(
    "secret",
    [
        "postgresql://user:{}@host/db",
        "//user:{}/{}@{}@host",
        "host=h password={} dbname=d",
        "host=h password='{} {}' dbname=d",
        "https://b/o?x-amz-signature={}&y=2",
    ],
)
@given(before=st.integers(1900, 2010), length=st.integers(1, 150), after=st.integers(1, 3000))
def test_no_part_of_a_secret_is_shown_where_an_excerpt_is_cut(
    secret: str, before: int, length: int, after: int
) -> None:
    for end in (" ", "x"):
        text = "x" * (before - 1) + " " + secret.replace("{}", "Z" * length) + end * after
        assert "Z" not in excerpt(text)
