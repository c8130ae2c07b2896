from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from dispatcher.backends.base import Backend, Definition, Unavailable
from dispatcher.engine.definitions import Definitions
from dispatcher.requests import Plan


class Provider:
    """Answers with what it was given for each definition, and counts the questions."""

    def __init__(self) -> None:
        self.answers: dict[str, Definition | Exception] = {}
        self.asked: list[str] = []
        self.now = 100.0

    def definition(self, options: Any) -> Definition:
        self.asked.append(options)
        answer = self.answers[options]
        if isinstance(answer, Exception):
            raise answer
        return answer


def make(provider: Provider) -> Definitions:
    return Definitions(cast("Backend", provider), lambda: provider.now)


def plan(name: str) -> Plan:
    found = SimpleNamespace(
        definition_key=name, options=name, job=SimpleNamespace(name=name), under=lambda d: (name, d)
    )
    return cast("Plan", found)


def test_what_nobody_has_read_yet_is_known_after_the_next_reading() -> None:
    provider = Provider()
    provider.answers["a"] = Definition(parallelism=2)
    definitions = make(provider)
    assert definitions.under(plan("a")) is None
    assert definitions.read()
    assert definitions.under(plan("a")) == ("a", Definition(parallelism=2))
    assert not definitions.read(), "nothing is wanted"
    assert provider.asked == ["a"]


def test_a_definition_that_meets_a_fault_of_ours_is_asked_seldom_and_keeps_no_other_waiting() -> (
    None
):
    provider = Provider()
    provider.answers = {"broken": RuntimeError("boom"), "good": Definition()}
    definitions = make(provider)
    definitions.under(plan("broken"))
    assert not definitions.read()
    definitions.under(plan("good"))
    assert definitions.read(), "at once"
    for _ in range(10):
        provider.now += 0.1
        definitions.under(plan("broken"))
        assert not definitions.read()
    assert provider.asked == ["broken", "good"]
    provider.now += 1.1
    definitions.read()
    assert provider.asked == ["broken", "good", "broken"]


def test_while_the_provider_does_not_answer_nothing_is_asked_and_what_is_wanted_stays_so() -> None:
    provider = Provider()
    provider.answers["a"] = Unavailable("no answer")
    definitions = make(provider)
    definitions.under(plan("a"))
    for pause in (2.0, 4.0, 8.0):
        with pytest.raises(Unavailable, match="no answer"):
            definitions.read()
        provider.now += pause - 0.1
        assert not definitions.read()
        provider.now += 0.1
    provider.answers["a"] = Definition()
    assert definitions.read()
    assert len(provider.asked) == 4


def test_one_that_gets_no_answer_is_asked_seldom_and_keeps_no_other_from_being_read() -> None:
    provider = Provider()
    provider.answers = {"bad": Unavailable("500"), "good": Definition(), "late": Definition()}
    definitions = make(provider)
    for name in ("bad", "good"):
        definitions.under(plan(name))
    with pytest.raises(Unavailable, match="500"):
        definitions.read()
    assert definitions.under(plan("good")) is not None
    definitions.under(plan("late"))
    assert definitions.read(), "at once"
    assert provider.asked == ["bad", "good", "late"]
    for pause in (2.0, 4.0, 8.0):
        provider.now += pause - 0.1
        assert not definitions.read()
        provider.now += 0.1
        with pytest.raises(Unavailable, match="500"):
            definitions.read()
    assert provider.asked[3:] == ["bad"] * 3


def test_several_that_get_no_answer_let_others_go_before_them_the_next_time() -> None:
    provider = Provider()
    names = ("bad", "worse", "good", "fine")
    provider.answers = {name: Unavailable("500") for name in names}
    definitions = make(provider)
    for name in names:
        definitions.under(plan(name))
    with pytest.raises(Unavailable):
        definitions.read()
    assert provider.asked == ["bad", "worse"], "nobody answers, so it seems"
    provider.answers |= {"good": Definition(), "fine": Definition()}
    assert not definitions.read(), "all of them are left alone for a while"
    provider.now += 2.0
    with pytest.raises(Unavailable):
        definitions.read()
    assert provider.asked[2:] == ["good", "fine", "bad", "worse"]
    assert definitions.under(plan("good")) is not None


def test_one_that_is_refused_for_now_goes_after_the_others() -> None:
    provider = Provider()
    provider.answers = {"bad": Unavailable("429", not_started=True), "good": Definition()}
    definitions = make(provider)
    for name in ("bad", "good"):
        definitions.under(plan(name))
    with pytest.raises(Unavailable, match="429"):
        definitions.read()
    assert provider.asked == ["bad"]
    provider.now += 1.0
    with pytest.raises(Unavailable, match="429"):
        definitions.read()
    assert definitions.under(plan("good")) is not None
