"""Item sources run in a process of their own: what they may give, and every way to go wrong."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from itertools import chain, islice, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dispatcher import item_source
from dispatcher.errors import InvalidItems
from dispatcher.item_source import run_source
from dispatcher.item_source_child import write_items
from dispatcher.items import MAX_ITEM_BYTES

Write = Callable[[str], None]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write the module `listing` into the directory where sources run."""

    def write(code: str) -> None:
        (tmp_path / "listing.py").write_text(textwrap.dedent(code))

    return write


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Iterator[str]]:
    def run(spec: str = "listing:items", timeout: float = 100, **params: Any) -> Iterator[str]:
        with run_source(spec, params, timeout=timeout, cwd=tmp_path) as stream:
            yield from stream

    return run


Run = Callable[..., Iterator[str]]


def refusal(items: Iterator[str]) -> str:
    with pytest.raises(InvalidItems) as caught:
        list(items)
    return str(caught.value)


def test_items_are_what_the_function_returns_or_yields(write: Write, run: Run) -> None:
    write("""
        def items(): return [{"b": 1, "a": "é\\n"}, None]
        def generated():
            yield 1
            yield (2, 3)
        def none(): return []
        class Shop:
            tables = staticmethod(lambda: "ab".split("x"))
    """)
    assert list(run()) == ['{"b":1,"a":"é\\n"}', "null"]
    assert list(run("listing:generated")) == ["1", "[2,3]"]
    assert list(run("listing:none")) == []
    assert list(run("listing:Shop.tables")) == ['"ab"']


def test_many_items_come_whole_and_in_order(write: Write, run: Run) -> None:
    write("def items(): return range(200_000)")
    assert list(run()) == [str(number) for number in range(200_000)]


def test_large_items_come_whole(write: Write, run: Run) -> None:
    write("def items(): return ['x' * 1_000_000, 'y', 'z' * 1_000_000]")
    assert [len(text) for text in run()] == [1_000_002, 3, 1_000_002]


def test_items_stream_and_closing_early_ends_the_function(write: Write, tmp_path: Path) -> None:
    fifo = tmp_path / "alive"
    os.mkfifo(fifo)
    write("""
        import itertools
        def items():
            with open("alive", "w"):
                yield from itertools.count()
    """)
    stream = run_source("listing:items", {}, timeout=60, cwd=tmp_path)
    descriptor = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    with open(descriptor) as alive:  # noqa: PTH123 - a number
        assert list(islice(stream, 3)) == ["0", "1", "2"]
        stream.close()
        # Ends only when nobody holds the other end any more.
        assert alive.read() == ""


def test_what_the_function_prints_stays_out_of_its_items(write: Write, run: Run) -> None:
    write("""
        import os, subprocess, sys
        def items():
            print("one")
            os.write(1, b"two\\n")
            subprocess.run(["echo", "three"], check=True)
            sys.stderr.write("x" * 1_000_000)
            yield 4
    """)
    assert list(run()) == ["4"]


def test_the_function_gets_the_params_that_it_names(write: Write, run: Run) -> None:
    write("""
        def none(): return ["none"]
        def one(day): return [day]
        def some(day, *, limit=3): return [day, limit]
        def every(**params): return [params]
    """)
    assert list(run("listing:none", day="monday", other=1)) == ['"none"']
    assert list(run("listing:one", day="monday", other=1)) == ['"monday"']
    assert list(run("listing:some", day="monday", other=1)) == ['"monday"', "3"]
    assert list(run("listing:every", day="é", other=[1])) == ['{"day":"é","other":[1]}']
    assert refusal(run("listing:one", other=1, more=2)) == (
        "item source 'listing:one': one() cannot be called with the batch's params: "
        "missing a required argument: 'day'; the batch has: more, other"
    )


def test_an_error_in_the_function_is_told_with_the_last_lines_it_wrote(
    write: Write, run: Run
) -> None:
    write("""
        def items():
            for number in range(100):
                print("reading", number)
            yield 1
            raise ValueError("no such\\ntable")
    """)
    said = refusal(run()).splitlines()
    assert said[:2] == [
        "item source 'listing:items': items() raised ValueError: no such table",
        "The last it wrote:",
    ]
    assert len(said) == 22
    assert "  reading 99" in said
    assert said[-2:] == ["  ValueError: no such", "  table"]
    assert not any("item_source_child" in line for line in said)


def test_the_traceback_is_of_the_users_own_frames(write: Write, run: Run, tmp_path: Path) -> None:
    write("raise LookupError('at import')")
    said = refusal(run()).splitlines()
    assert said[0].startswith("item source 'listing:items': module 'listing' cannot be imported: ")
    assert [line.split(", ")[0] for line in said[2:4]] == [
        "  Traceback (most recent call last):",
        f'    File "{tmp_path / "listing.py"}"',
    ]
    assert not any("importlib" in line or "item_source_child" in line for line in said)


def test_a_deep_traceback_keeps_its_head_and_its_last_calls(write: Write, run: Run) -> None:
    write("""
        def items(depth=50):
            return items(depth - 1) if depth else [][7]
    """)
    said = refusal(run()).splitlines()
    assert said[2] == "  Traceback (most recent call last):"
    assert said[-1] == "  IndexError: list index out of range"


@pytest.mark.parametrize(
    ("code", "spec", "said"),
    [
        ("", "nowhere:items", "module 'nowhere' cannot be imported: ModuleNotFoundError: No mod"),
        ("import nothing", "listing:items", "module 'listing' cannot be imported: ModuleNotFound"),
        ("raise SystemExit(3)", "listing:items", "module 'listing' cannot be imported: SystemExit"),
        ("", "listing:items", "module 'listing' has no 'items'"),
        ("items = [1]", "listing:items", "listing:items is a list and not a function"),
        ("", "listing", "its name must have the form module:function"),
        ("def items(): return 'abc'", "listing:items", "what items() returns must be a list or "),
        ("def items(): pass", "listing:items", "what items() returns must be a list or another "),
        ("async def items(): pass", "listing:items", "what items() returns must be a list or ano"),
        ("def items(): yield {1}", "listing:items", "item 0 is a set, which is not a JSON value:"),
        ("import sys\ndef items(): yield sys.exit(4)", "listing:items", "items() raised SystemEx"),
        (f"def items(): yield 'x' * {MAX_ITEM_BYTES}", "listing:items", "item 0 is 1,048,578 byt"),
    ],
)
def test_a_source_that_cannot_be_used_says_why(
    write: Write, run: Run, code: str, spec: str, said: str
) -> None:
    write(code)
    assert refusal(run(spec)).startswith(f"item source {spec!r}: {said}")


@pytest.mark.parametrize(
    ("end", "ending"),
    [
        ("os._exit(0)", "exit code 0"),
        ("os._exit(7)", "exit code 7"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "signal SIGKILL"),
    ],
)
def test_half_a_list_is_never_taken_as_whole(write: Write, run: Run, end: str, ending: str) -> None:
    write(f"""
        import os, signal
        def items():
            yield from range(20_000)
            print("so far")
            {end}
    """)
    said = refusal(run())
    assert said.startswith(f"item source 'listing:items' ended before its list did, with {ending}")
    assert said.endswith("items\nThe last it wrote:\n  so far")


def test_a_source_that_hangs_is_killed_with_its_children_at_its_timeout(
    write: Write, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its time stands still until the first look at what it wrote, however long it took to begin.
    clock = chain([0.0] * 3, repeat(101.0))
    monkeypatch.setattr(item_source, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    fifo = tmp_path / "alive"
    os.mkfifo(fifo)
    write("""
        import os, subprocess
        def items():
            alive = os.open("alive", os.O_WRONLY)
            child = subprocess.Popen(["sleep", "600"], pass_fds=[alive])
            os.write(alive, b"started")
            print("waiting", flush=True)
            child.wait()
    """)
    descriptor = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    with open(descriptor) as alive:  # noqa: PTH123 - a number
        assert refusal(run(timeout=100)) == (
            "item source 'listing:items' was stopped: it did not end within its timeout of 100 s; "
            "it had given 0 items\nThe last it wrote:\n  waiting"
        )
        assert alive.read() == "started"


def test_a_process_left_behind_by_the_function_is_killed(
    write: Write, run: Run, tmp_path: Path
) -> None:
    fifo = tmp_path / "alive"
    os.mkfifo(fifo)
    write("""
        import os, subprocess
        def items():
            alive = os.open("alive", os.O_WRONLY)
            subprocess.Popen(["sleep", "600"], pass_fds=[alive])
            return [1]
    """)
    descriptor = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    with open(descriptor) as alive:  # noqa: PTH123 - a number
        assert list(run()) == ["1"]
        assert alive.read() == ""


def test_a_source_dies_with_the_worker_that_started_it(write: Write, tmp_path: Path) -> None:
    fifo = tmp_path / "alive"
    os.mkfifo(fifo)
    write("""
        import subprocess, os
        def items():
            alive = os.open("alive", os.O_WRONLY)
            os.write(alive, b"started")
            subprocess.run(["sleep", "600"], pass_fds=[alive])
    """)
    worker = subprocess.Popen(
        [
            sys.executable,
            "-c",
            (
                "from dispatcher.item_source import run_source as run\n"
                "list(run('listing:items', {}, timeout=600))"
            ),
        ],
        cwd=tmp_path,
    )
    try:
        with fifo.open("rb", buffering=0) as alive:
            assert alive.read(7) == b"started"
            worker.send_signal(signal.SIGKILL)
            assert alive.read(1) == b""
    finally:
        worker.kill()
        worker.wait()


def test_the_environment_can_be_given_whole(write: Write, tmp_path: Path) -> None:
    write("""
        import os
        def items(): return [os.environ.get("SHOP"), os.environ.get("HOME")]
    """)
    given = {"SHOP": "corner"}
    with run_source("listing:items", {}, timeout=100, cwd=tmp_path, env=given) as stream:
        assert list(stream) == ['"corner"', "null"]


def test_a_missing_working_directory_is_told(tmp_path: Path) -> None:
    with run_source("listing:items", {}, timeout=100, cwd=tmp_path / "gone") as stream:
        assert "cannot be run in" in refusal(iter(stream))


def test_nothing_is_left_open(write: Write, tmp_path: Path) -> None:
    """Seen in a process of its own: threads that other tests have left open files as they like."""
    write("def items(): return [1]")
    code = """
        import os
        from dispatcher.item_source import run_source

        def lowest_free():
            descriptor = os.dup(0)
            os.close(descriptor)
            return descriptor

        before = lowest_free()
        for _ in range(3):
            with run_source("listing:items", {}, timeout=100) as stream:
                assert list(stream) == ["1"]
        assert lowest_free() == before
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, check=True)


def test_what_it_wrote_is_told_also_by_a_worker_that_could_not_look_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = chain([0.0], repeat(60.0))
    monkeypatch.setattr(item_source, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    (items, items_in), (log, log_in) = os.pipe(), os.pipe()
    os.write(log_in, b"so far\n")
    source = item_source._Source(cast("subprocess.Popen[bytes]", None), items, log)
    source.drain()
    source._selector.close()
    for descriptor in (items, items_in, log, log_in):
        os.close(descriptor)
    assert source.tail() == "\nThe last it wrote:\n  so far"


class TestLines:
    """What the child writes, seen from inside one process."""

    def written(self, spec: str, params: dict[str, Any] | None = None) -> list[str]:
        out = io.BytesIO()
        write_items(spec, params or {}, out)
        return out.getvalue().decode().split("\n")

    def test_a_whole_list_ends_with_its_count(self) -> None:
        assert self.written("json:loads", {"s": "[1,[2]]"}) == ["1", "[2]", "!2", ""]
        assert self.written("json:loads", {"s": "[]"}) == ["!0", ""]

    def test_an_error_is_the_last_line_whatever_came_before(self) -> None:
        line, after = self.written("json:loads", {"s": "[1,"})
        assert line[0] == "?"
        assert json.loads(line[1:]).startswith("loads() raised json.decoder.JSONDecodeError")
        assert after == ""

    @pytest.mark.parametrize(
        ("spec", "said"),
        [
            ("nowhere:items", "module 'nowhere' cannot be imported: ModuleNotFoundError"),
            ("json:nothing", "module 'json' has no 'nothing'"),
            ("json:__name__", "json:__name__ is a str and not a function"),
            ("json", "its name must have the form module:function"),
            ("json:loads", "loads() cannot be called with the batch's params: missing a required"),
            ("itertools:repeat", "repeat does not tell its parameters; name a plain Python funct"),
            ("os:getcwd", "what getcwd() returns must be a list"),
        ],
    )
    def test_what_cannot_be_called_is_told(self, spec: str, said: str) -> None:
        line, _ = self.written(spec)
        assert json.loads(line[1:]).startswith(said)
