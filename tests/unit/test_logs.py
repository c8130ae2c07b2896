"""What the logs of a process show, and what they keep to themselves."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
    import logging, sys
    import structlog
    from dispatcher import logs

    logs.configure(logging.INFO, sys.argv[1])

    def connect(url):
        raise OSError("no route")

    try:
        connect("postgresql://me:" + "hunter" + str(2) + "@db/x")
    except OSError:
        structlog.get_logger("dispatcher.test").exception("cannot connect")
"""


@pytest.mark.parametrize("form", ["console", "json"])
def test_a_traceback_in_the_log_shows_no_values_of_variables(form: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), form],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert "cannot connect" in done.stderr
    assert "in connect" in done.stderr
    assert "no route" in done.stderr
    assert "hunter2" not in done.stderr
