"""A tap is never in the way: it may be lost, and the caller neither waits nor fails."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dispatcher import wake
from dispatcher.servers import EmbeddedValkey
from dispatcher.wake import PLAN, QUEUE, WAITING, Waker, celery_settings


@contextmanager
def silent_broker() -> Iterator[tuple[str, threading.Event]]:
    """A server that takes connections and says nothing; and whether somebody is connected."""
    connected = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        open_ones: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    open_ones.append(server.accept()[0])
                    connected.set()
                except OSError:
                    return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield f"redis://127.0.0.1:{server.getsockname()[1]}/0", connected
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(60)
            for connection in open_ones:
                connection.close()


def test_without_a_broker_a_tap_does_nothing() -> None:
    waker = Waker(None)
    waker.tap(PLAN, batch_id="x")
    assert waker._thread is None
    waker.close()


def test_a_tap_arrives_as_one_small_celery_message(
    valkey: str, valkey_server: EmbeddedValkey
) -> None:
    waker = Waker(valkey)
    waker.tap(PLAN, batch_id="abc")
    waker.close(timeout=20)
    with valkey_server.connect() as client:
        found = client.lrange(QUEUE, 0, -1)
    assert isinstance(found, list)
    (message,) = map(json.loads, found)
    assert message["headers"]["task"] == PLAN
    assert message["content-type"] == "application/json"


HANGING = """
    import sys, time
    from dispatcher.wake import PLAN, Waker
    waker = Waker(sys.argv[1])
    waker.tap(PLAN, batch_id="first")
    sys.stdin.readline()
    began = time.perf_counter()
    for number in range(1000):
        waker.tap(PLAN, batch_id=str(number))
    tapped = time.perf_counter()
    waker.close()
    print(tapped - began, waker._taps.qsize(), time.perf_counter() - tapped)
"""


def test_a_broker_that_hangs_holds_up_neither_a_tap_nor_the_end_of_the_process() -> None:
    with (
        silent_broker() as (url, connected),
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(HANGING), url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        assert connected.wait(60), "the first tap is on its way, and hangs"
        began = time.monotonic()
        told, _ = process.communicate("go on\n", timeout=100)
        took = time.monotonic() - began
    assert process.returncode == 0
    tapping, waiting, closing = map(float, told.splitlines()[-1].split())
    # Nine hundred that wait for room would wait ten seconds each, and so would each that is sent.
    assert tapping < 30.0
    assert waiting == WAITING, "taps are dropped, and memory is not filled with them"
    assert closing < 30.0
    assert took < 60.0


def warnings(monkeypatch: pytest.MonkeyPatch) -> Callable[[Waker], list[str]]:
    """What the thread of a waker warns of; threads that other tests have left may do so too."""
    told: list[tuple[threading.Thread, str]] = []

    def note(text: str, **_: object) -> None:
        told.append((threading.current_thread(), text))

    monkeypatch.setattr(wake.log, "warning", note)
    return lambda waker: [text for thread, text in told if thread is waker._thread]


@pytest.mark.parametrize("waiting", [1, WAITING + 2])
def test_a_sender_that_was_left_behind_says_nothing_more_and_ends(
    monkeypatch: pytest.MonkeyPatch, waiting: int
) -> None:
    told = warnings(monkeypatch)
    with silent_broker() as (url, connected):
        waker = Waker(url)
        waker.tap(PLAN, batch_id="first")
        assert connected.wait(60), "the first tap is on its way, and hangs"
        for number in range(waiting):
            waker.tap(PLAN, batch_id=str(number))
        waker.close(timeout=0.1)
        thread = waker._thread
        assert thread is not None
        assert thread.is_alive()
    thread.join(60)  # the broker has hung up on it
    assert not thread.is_alive()
    assert told(waker) == []


def test_a_broker_that_is_gone_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By a transport that fails at once: its folder is not there."""
    told = warnings(monkeypatch)
    monkeypatch.chdir(tmp_path)
    waker = Waker("filesystem://")
    for _ in range(3):
        waker.tap(PLAN, batch_id="x")
    waker.close(timeout=60)
    assert waker._thread is not None
    assert not waker._thread.is_alive()
    assert told(waker) == ["the broker does not take taps; clocks will do"]


def test_a_waker_may_be_closed_twice() -> None:
    waker = Waker("memory://")
    waker.tap(PLAN, batch_id="x")
    waker.close(timeout=20)
    waker.close()


def test_sender_and_worker_keep_no_results_and_wait_for_no_broker() -> None:
    settings = celery_settings("redis://127.0.0.1:6379/0")
    assert settings["task_ignore_result"] is True
    assert "result_backend" not in settings
    assert settings["accept_content"] == ["json"]
    assert settings["task_acks_late"] is True
    options = settings["broker_transport_options"]
    assert options["socket_connect_timeout"] <= 5
    assert options["socket_keepalive"] is True
    assert (
        "socket_keepalive" not in celery_settings("redis+socket:///x")["broker_transport_options"]
    )
    assert celery_settings(None)["broker_url"] == "memory://"
