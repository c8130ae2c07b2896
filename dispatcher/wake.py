"""One Celery message by name: a tap on the shoulder, sent after commit, never in the way.

A tap carries an id and may be lost, doubled or late: the truth is in Postgres, and a worker's clock
finds within a second or two what a tap would have told at once. So taps leave from a background
thread with a short queue: when the broker hangs, the queue fills, taps are dropped, and `enqueue`
does not notice.
"""

from __future__ import annotations

import atexit
import queue
import threading
from typing import Any, Final

import structlog

__all__ = ["LAUNCH", "PLAN", "QUEUE", "SWEEP", "Waker", "celery_settings"]

log = structlog.get_logger(__name__)

PLAN: Final = "dispatcher.plan"
LAUNCH: Final = "dispatcher.launch"
SWEEP: Final = "dispatcher.sweep"
QUEUE: Final = "dispatcher"

WAITING: Final = 100
"""Taps that may wait; more are dropped."""

LAST_WORDS: Final = 1.0
"""Seconds that a process which ends gives its last taps."""


def celery_settings(broker_url: str | None) -> dict[str, Any]:
    """Give the settings that sender and worker share; `facts` for each in docs/operations.md.

    No result backend, JSON only, late acknowledgement, short timeouts on every call to the broker,
    and a visibility timeout that may be short because no message waits for a time to come.
    """
    options: dict[str, Any] = {}
    if broker_url is not None and broker_url.startswith("redis"):
        options = {
            "visibility_timeout": 300,
            "unacked_restore_interval": 10,
            "unacked_restore_throttle": 1,
            "socket_timeout": 10,
            "socket_connect_timeout": 5,
            "health_check_interval": 25,
        }
        if not broker_url.startswith("redis+socket"):
            options["socket_keepalive"] = True
    return {
        "broker_url": broker_url or "memory://",
        "broker_transport_options": options,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_connection_timeout": 4,
        "task_default_queue": QUEUE,
        "task_acks_late": True,
        "task_acks_on_failure": True,
        "task_acks_on_timeout": True,
        "task_reject_on_worker_lost": False,
        "task_ignore_result": True,
        "task_store_errors_even_if_ignored": False,
        "worker_prefetch_multiplier": 1,
        "worker_send_task_events": True,
        "task_send_sent_event": False,
        "worker_hijack_root_logger": False,
        "task_serializer": "json",
        "accept_content": ["json"],
        "enable_utc": True,
        "timezone": "UTC",
    }


class Waker:
    """Sends taps from a thread of its own."""

    def __init__(self, broker_url: str | None) -> None:
        self._broker_url = broker_url
        self._taps: queue.Queue[tuple[str, dict[str, str]] | None] = queue.Queue(WAITING)
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._complained = False
        self._left = False

    def tap(self, name: str, **kwargs: str) -> None:
        """Ask for a task to be run soon. Returns at once and raises nothing."""
        if self._broker_url is None:
            return
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._send_all, name="wake", daemon=True)
                self._thread.start()
                atexit.register(self.close)
        try:
            self._taps.put_nowait((name, kwargs))
        except queue.Full:
            log.debug("tap dropped; the clock will find it", task=name)

    def close(self, timeout: float = LAST_WORDS) -> None:
        """Send what waits, for a short time at most, and end the thread.

        A thread that a broker holds up for longer is left behind. It says nothing any more: what it
        would log comes seconds later, when whoever tapped is over and the log may be another's.
        """
        thread = self._thread
        if thread is None or not thread.is_alive():
            return
        try:
            self._taps.put_nowait(None)
        except queue.Full:
            self._left = True
        else:
            thread.join(timeout)
            self._left = thread.is_alive()
        atexit.unregister(self.close)

    def _send_all(self) -> None:
        from celery import Celery  # noqa: PLC0415 - slow to import, and not in the caller's way

        app = Celery("dispatcher", set_as_current=False)
        app.conf.update(celery_settings(self._broker_url))
        while not self._left and (tap := self._taps.get()) is not None:
            name, kwargs = tap
            try:
                app.send_task(name, kwargs=kwargs, retry=False, ignore_result=True)
            except Exception as error:  # noqa: BLE001 - whatever a transport raises: a lost tap
                if not self._complained and not self._left:
                    log.warning("the broker does not take taps; clocks will do", why=str(error))
                self._complained = True
            else:
                self._complained = False
        app.close()
