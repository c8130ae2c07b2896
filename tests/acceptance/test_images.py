"""What the Dockerfiles copy is there to be copied: no image is built here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from installation import ROOT

DOCKERFILES = [ROOT / "Dockerfile", *sorted(ROOT.glob("examples/*/*/Dockerfile"))]


def copied(dockerfile: Path) -> list[str]:
    """The files and folders that a Dockerfile takes from where it is built."""
    lines = re.findall(r"^COPY (?!--)(.+) \S+$", dockerfile.read_text(), re.MULTILINE)
    return [source for line in lines for source in line.split()]


def sent() -> list[str]:
    """What of the project's root goes to the builder."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    return [rule[1:] for rule in rules if rule.startswith("!")]


@pytest.mark.parametrize(
    "dockerfile", DOCKERFILES, ids=lambda path: path.parent.relative_to(ROOT).as_posix()
)
def test_what_an_image_copies_is_sent_to_the_builder(dockerfile: Path) -> None:
    sources = copied(dockerfile)
    assert sources
    told = re.search(r"^#   docker build (.*)$", dockerfile.read_text(), re.MULTILINE)
    context = ROOT / told[1].split()[-1] if told else ROOT
    assert [source for source in sources if not (context / source).exists()] == []
    if context == ROOT:
        allowed = [f"{one}/" for one in sent()]
        kept_back = [source for source in sources if not f"{source}/".startswith(tuple(allowed))]
        assert kept_back == []


def test_no_rule_of_the_builder_looks_for_names_in_what_is_left_out() -> None:
    # Docker 20.10 finds nothing by it.
    assert [rule for rule in sent() if "*" in rule] == []
